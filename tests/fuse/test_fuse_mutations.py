"""``fuse`` never changes what a model computes: blocks that differ from the plain one by a thing.

Each is fused and equal to its unfused twin, in outputs, gradients and buffers, or is left alone for
a reason that names what stands in the way.
"""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
from torch import nn

from resnetv2 import explain
from tests.support.fuse_checks import fuse_if_any
from tests.support.mutations import CHANNELS, MUTATIONS, Mutation
from tests.support.yardstick import DEVICE, assert_close_steps, images, randomise, step

pytestmark = pytest.mark.usefixtures("one_thread")


def build(mutation: Mutation) -> nn.Module:
    torch.manual_seed(0)
    return randomise(mutation.build()).to(DEVICE)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def assert_alike(fused: nn.Module, plain: nn.Module, seed: int) -> None:
    """Both modes; and without gradients, in evaluation."""
    x = images((3, CHANNELS, 5, 6), seed)
    for training in (True, False):
        results = []
        for each in (fused, plain):
            try:
                seed_all(seed)
                results.append(step(each.train(training), x, seed=seed))
            except Exception as error:
                results.append({"raised": type(error)})
        if "raised" in results[1]:
            assert results[0] == results[1]
        else:
            assert_close_steps(*results)
    with torch.no_grad():
        seed_all(seed)
        expected = plain(x) if "raised" not in results[1] else None
        seed_all(seed)
        if expected is not None:
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_same_function_or_a_reason(name):
    mutation = MUTATIONS[name]
    fused, plain = fuse_if_any(build(mutation)), build(mutation)
    was_fused = False
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("as built", "later"):
            if stage == "later":
                if mutation.later is None:
                    continue
                for each in (fused, plain):
                    mutation.later(each, patch)
            assert_alike(fused, plain, seed=1)
            assert_alike(fused, plain, seed=2)
            rows = explain(fused.train()).blocks
            if stage == "as built" and mutation.fused is not None:
                assert bool(rows and rows[0].fused) == mutation.fused, rows
            for row in rows:
                if not row.fused:
                    # One that was not fused may have another reason now.
                    if was_fused or stage == "as built":
                        assert re.search(mutation.reason, row.reason), row.reason
                    assert "resnetv2." not in row.reason
                    assert "TracedValue" not in row.reason
            was_fused = bool(rows and rows[0].fused)
