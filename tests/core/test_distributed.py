"""DistributedDataParallel: two gloo processes give the gradients of one with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnetv2 import PreActResNet
from tests.support.ports import free_port
from tests.support.yardstick import assert_close_steps, eager_twin, images, randomise

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
    ),
]


def model_of(backend: str, rank: int = 0) -> nn.Module:
    torch.manual_seed(rank)  # DDP must make the ranks' weights equal
    model = PreActResNet("basic", [2, 1], 5, widths=[4, 8], stem_width=4, backend=backend)
    return randomise(model, rank)


def run(model: nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """Two steps of SGD on a rank's images: gradients, then weights and buffers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = {}
    for number in range(2):
        optimizer.zero_grad()
        out = model(images((2, 3, 6, 6), 10 * number + rank).cpu())
        out.square().sum().backward()
        for name, parameter in model.named_parameters():
            result[f"{number} {name}"] = parameter.grad.clone()
        optimizer.step()
    return {**result, **{name: value.clone() for name, value in model.state_dict().items()}}


def worker(rank: int, port: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(model_of(backend, rank))
    torch.save(run(model, rank), f"{folder}/{backend}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_follow_eager(tmp_path):
    """Gradients averaged over ranks, equal on both, and as those of unfused blocks under DDP."""
    for backend in ("aten", "eager"):
        mp.spawn(worker, (free_port(), str(tmp_path), backend), nprocs=2)
    fused, eager = (
        [torch.load(tmp_path / f"{backend}-{rank}.pt") for rank in range(2)]
        for backend in ("aten", "eager")
    )
    for rank in range(2):
        assert_close_steps(fused[rank], eager[rank], rtol=1e-3, atol=1e-4)
    for name in fused[0]:
        if "running" not in name:  # statistics are each rank's own until the next forward
            assert torch.equal(fused[0][name], fused[1][name]), name


def test_first_gradient_is_the_mean_of_the_ranks(tmp_path):
    mp.spawn(worker, (free_port(), str(tmp_path), "aten"), nprocs=2)
    found = torch.load(tmp_path / "aten-0.pt")
    alone = [run(eager_twin(model_of("aten")), rank) for rank in range(2)]
    for name, a in alone[0].items():
        if name.startswith("0 "):
            mean = (a + alone[1][name]) / 2
            mine = found[name.replace("0 ", "0 module.")]
            scale = max(float(mean.abs().max()), 1.0)
            torch.testing.assert_close(mine, mean, rtol=1e-4, atol=1e-5 * scale, msg=name)
