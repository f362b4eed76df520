"""DistributedDataParallel: two gloo processes give the gradients of one with the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnetv2 import PreActResNet, fuse
from tests.support.fuse_checks import fused_units
from tests.support.fuse_models import PlainNet
from tests.support.yardstick import assert_close_steps, eager_twin, images, randomise

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
    ),
]


def own(backend: str, rank: int = 0) -> nn.Module:
    torch.manual_seed(rank)  # DDP must make the ranks' weights equal
    model = PreActResNet("basic", [2, 1], 5, widths=[4, 8], stem_width=4, backend=backend)
    return randomise(model, rank)


def foreign(rank: int, fused: bool) -> nn.Module:
    torch.manual_seed(rank)
    model = randomise(PlainNet(), rank)
    return fuse(model, backend="aten") if fused else model


def fused_in_its_wrapper(rank: int) -> nn.Module:
    wrapped = DistributedDataParallel(foreign(rank, False))
    assert fuse(wrapped, backend="aten") is wrapped
    assert fused_units(wrapped.module) == 4
    return wrapped


# A rank's model, each name with the one whose blocks run child by child.
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "own": lambda rank: DistributedDataParallel(own("aten", rank)),
    "own eager": lambda rank: DistributedDataParallel(own("eager", rank)),
    "foreign, fused before": lambda rank: DistributedDataParallel(foreign(rank, True)),
    "foreign, fused after": fused_in_its_wrapper,
    "foreign eager": lambda rank: DistributedDataParallel(foreign(rank, False)),
}
EAGER = {name: f"{name.split(',')[0]} eager" for name in MODELS if not name.endswith("eager")}


def steps(model: nn.Module, rank: int) -> dict[str, Tensor]:
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


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    torch.save({name: steps(make(rank), rank) for name, make in MODELS.items()}, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What two processes found, by model."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.parametrize("name", EAGER)
def test_two_processes_follow_eager(ranks, name):
    """Gradients averaged over ranks, equal on both, and as those of unfused blocks under DDP."""
    for found in ranks:
        assert_close_steps(found[name], found[EAGER[name]], rtol=1e-3, atol=1e-4)
    for tensor, value in ranks[0][name].items():
        if "running" not in tensor:  # statistics are each rank's own until the next forward
            assert torch.equal(value, ranks[1][name][tensor]), tensor


def test_first_gradient_is_the_mean_of_the_ranks(ranks):
    alone = [steps(eager_twin(own("aten")), rank) for rank in range(2)]
    for name, a in alone[0].items():
        if name.startswith("0 "):
            mean = (a + alone[1][name]) / 2
            mine = ranks[0]["own"][name.replace("0 ", "0 module.")]
            scale = max(float(mean.abs().max()), 1.0)
            torch.testing.assert_close(mine, mean, rtol=1e-4, atol=1e-5 * scale, msg=name)
