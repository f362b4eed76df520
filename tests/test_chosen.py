"""Blocks whose convolutions are computed otherwise than the cost model has it, forward, dgrad and
wgrad each in a way of its own.

Promise: what is promised of all blocks (test_blocks.py), however they are computed.
"""

from __future__ import annotations

import pytest

from resnetv2.kernels import choices
from resnetv2.kernels.choices import (
    APART,
    ATEN,
    BOTH,
    DGRAD,
    FORWARD,
    FUSED,
    WGRAD,
    WRITTEN,
    Choice,
)
from tests.support.yardstick import check_module, needs_triton
from tests.test_wide import SHAPE, build

pytestmark = pytest.mark.usefixtures("one_thread")
WAYS = {
    "dgrad by ATen": ("projection", {DGRAD: ATEN, WGRAD: WRITTEN}),
    "dgrad by ATen beside a fused wgrad": ("bottleneck", {DGRAD: ATEN, WGRAD: FUSED}),
    "wgrad by ATen": ("projection", {DGRAD: WRITTEN, WGRAD: ATEN}),
    "wgrad by ATen beside a fused dgrad": ("bottleneck", {DGRAD: FUSED, WGRAD: ATEN}),
    "fused, a kernel for each gradient": ("bottleneck", {DGRAD: FUSED, WGRAD: FUSED, BOTH: APART}),
    "written, walked back": ("invert", {FORWARD: WRITTEN, DGRAD: WRITTEN, WGRAD: WRITTEN}),
}


@needs_triton
@pytest.mark.parametrize("way", WAYS)
def test_training_step(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, hows = WAYS[way]
    stated = {operation: Choice(how) for operation, how in hows.items()}
    monkeypatch.setattr(choices, "find", lambda operation, *_: stated.get(operation))
    check_module(build(name), SHAPE)
