"""Running statistics by themselves: how they round."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnetv2.core.statistics import BufferUpdate
from resnetv2.kernels.inspect.yardstick import allowed, distance
from tests.support.yardstick import DEVICE

CHANNELS, ROWS = 4096, 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.01, 0.1, 1.0])
def test_a_step_is_one_rounding_of_the_result(momentum, dtype):
    """Of moments that are exact: nothing else is off that eager's would excuse."""
    generator = torch.Generator().manual_seed(0)
    mean, running_mean = torch.randn(2, CHANNELS, generator=generator).to(DEVICE)
    var, running_var = torch.rand(2, CHANNELS, generator=generator).to(DEVICE) + 0.5
    norm = nn.BatchNorm2d(CHANNELS, momentum=momentum, device=DEVICE, dtype=dtype)
    norm.running_mean.copy_(running_mean)
    norm.running_var.copy_(running_var)
    unbiased = var.double() * ROWS / (ROWS - 1)
    for name, batch in (("running_mean", mean.double()), ("running_var", unbiased)):
        norm.register_buffer(f"exact_{name}", getattr(norm, name).double().lerp(batch, momentum))
    BufferUpdate([norm], [ROWS]).apply(torch.cat((mean, var, *[torch.zeros_like(mean)] * 3)))
    for name in ("running_mean", "running_var"):
        exact = norm.get_buffer(f"exact_{name}")
        error = distance(norm.get_buffer(name), exact)
        assert error <= allowed(0.0, float(exact.norm()), dtype), name
