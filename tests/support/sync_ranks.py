"""Each process of tests/core/test_sync_norm.py; results go back as files, one for each rank.

Four processes are started once. Ranks 0 and 1, and 2 and 3, are first two pairs that know nothing
of each other, so that one run can be held against another; then all four are one group.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnetv2 import BottleneckPreActBlock, PreActBlock, PreActResNet, explain, fuse
from resnetv2.blocks import Stage
from resnetv2.core.sync import SyncBatchNorm, convert_sync_batchnorm
from resnetv2.names import MEMORY_MODES
from tests.support.fuse_models import PlainNet
from tests.support.yardstick import images, randomise

BATCH, STEPS, RATE = 8, 10, 0.05
Record = dict[str, Any]


class Case(NamedTuple):
    """One training run. norms: "ours", "naive" (see ``naive``) or "local". sizes: images of each
    rank; equal shares if empty. momentum, affine, track: of the norms. seed: of weights and images.
    """

    norms: str = "ours"
    memory: str = "recompute"
    block: str = "bottleneck"
    backend: str = "aten"
    steps: int = 1
    sizes: tuple[int, ...] = ()
    channels_last: bool = True
    autocast: torch.dtype | None = None
    momentum: float | None = 0.1
    affine: bool = True
    track: bool = True
    seed: int = 0


NAIVE = Case("naive", backend="eager")
# Of the first pair and of all four.
TRAINING = {
    **{memory: Case(memory=memory, steps=STEPS) for memory in MEMORY_MODES},
    "naive": NAIVE._replace(steps=STEPS),
}
# Of the second pair: the same, and with other weights and images, to tell errors from luck.
DRAWS = 3
DRAWN = {
    f"{name} {seed}": case._replace(seed=seed)
    for name, case in TRAINING.items()
    for seed in range(DRAWS)
}
# Of the first pair: what differs from the usual.
VARIANTS = {
    "basic": Case(block="basic"),
    "children one by one": Case(backend="eager"),
    "NCHW": Case(channels_last=False),
    "uneven": Case(sizes=(3, 5)),
    "bf16": Case(autocast=torch.bfloat16),
    "momentum=None": Case(momentum=None, steps=2),
    "affine=False": Case(affine=False),
    "affine=False, children one by one": Case(affine=False, backend="eager"),
    "track_running_stats=False": Case(track=False),
    "local": Case("local", steps=2),
    "local eager": Case("local", backend="eager", steps=2),
}


def model_of(case: Case) -> PreActResNet:
    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(
            channels, momentum=case.momentum, affine=case.affine, track_running_stats=case.track
        )

    torch.manual_seed(0)
    model = PreActResNet(
        case.block, [2, 1], 5, widths=[8, 16], stem_width=8, memory=case.memory,
        backend=case.backend, norm=norm,
    )  # fmt: skip
    model = randomise(model, case.seed)
    return model.to(memory_format=torch.channels_last) if case.channels_last else model


def batch_of(case: Case, number: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step, whose images are neither centred nor scaled."""
    number += 100 * case.seed
    x = images((BATCH, 3, 8, 8), number, channels_last=case.channels_last, mean=3.0, std=2.0).cpu()
    labels = torch.randint(0, 5, (BATCH,), generator=torch.Generator().manual_seed(number))
    return x, labels


def share(case: Case, rank: int, size: int) -> slice:
    sizes = case.sizes or (BATCH // size,) * size
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def train(model: nn.Module, case: Case, part: slice = slice(None)) -> Record:
    """Steps of SGD on a part of each batch.

    "grad NAME", "first NAME" (buffers) after the first step, "last NAME" (parameters and buffers)
    after the last.
    """
    result: Record = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    names = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    buffers = {name.removeprefix("module."): b for name, b in model.named_buffers()}
    for number in range(case.steps):
        x, labels = batch_of(case, number)
        x = x[part].to(next(model.parameters()).dtype)
        with torch.autocast("cpu", dtype=case.autocast, enabled=case.autocast is not None):
            out = model(x)
        # Shares of different sizes weigh by their images only in a sum.
        reduction = "sum" if case.sizes else "mean"
        out = out.float() if case.autocast else out
        loss = F.cross_entropy(out, labels[part], reduction=reduction)
        optimizer.zero_grad()
        loss.backward()
        if number == 0:
            result.update((f"grad {n}", p.grad.clone()) for n, p in names.items())
            result.update((f"first {n}", b.clone()) for n, b in buffers.items())
        optimizer.step()
    state = {**names, **buffers}
    result.update((f"last {n}", value.detach().clone()) for n, value in state.items())
    return result


def naive(model: nn.Module) -> nn.Module:
    """Synchronised norms as anybody would write them, with PyTorch's differentiable all_reduce."""

    def forward(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
        rows = torch.full((1,), x.numel() / x.shape[1], dtype=x.dtype)
        sums = differentiable.all_reduce(torch.cat((x.sum((0, 2, 3)), rows)))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = x - mean.view(1, -1, 1, 1)
        var = differentiable.all_reduce(centred.square().sum((0, 2, 3))) / total
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (total / (total - 1)), self.momentum)
        scale = torch.rsqrt(var + self.eps) * self.weight
        return centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = forward.__get__(module)
    return model


def distributed(case: Case, group: Any = None) -> nn.Module:
    """The case's model as DistributedDataParallel runs it."""
    model = model_of(case)
    if case.norms == "ours":
        convert_sync_batchnorm(model, group)
    elif case.norms == "naive":
        naive(model)
    # Buffers are not sent around, so that synchronised norms must make them equal themselves.
    return DistributedDataParallel(model, process_group=group, broadcast_buffers=False)


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The collectives that Python calls for meanwhile, by name."""
    calls: list[str] = []
    names = ("all_gather_single", "all_gather_into_tensor", "all_gather", "all_reduce", "broadcast")
    found = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def counting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return collective(*args, **kwargs)

        return call

    for name, collective in found.items():
        setattr(dist, name, counting(name, collective))
    try:
        yield calls
    finally:
        for name, collective in found.items():
            setattr(dist, name, collective)


def collectives(rank: int) -> Record:
    """(in the forward, in the backward) of each memory mode, and of evaluation."""
    result: Record = {}
    for memory in MEMORY_MODES:
        case = Case(memory=memory)
        model = convert_sync_batchnorm(model_of(case))
        x, _ = batch_of(case, 0)
        with counted() as calls:
            out = model(x[rank::2])
            forward = len(calls)
            out.sum().backward()
        result[memory] = forward, len(calls) - forward
    return result


def evaluation(rank: int) -> Record:
    """Outputs in evaluation, which rank 0 alone asks for."""
    if rank:
        return {}
    result: Record = {}
    x, _ = batch_of(Case(), 0)
    for backend in ("aten", "eager"):
        model = model_of(Case(backend=backend)).eval()
        result[f"{backend} local"] = model(x).detach()
        result[backend] = convert_sync_batchnorm(model)(x).detach()
    return result


def foreign_model() -> nn.Module:
    torch.manual_seed(0)
    return randomise(PlainNet())


def foreign_step(model: nn.Module, rank: int, size: int) -> Record:
    """Gradients and buffers of a step without DistributedDataParallel: the rank's own gradients."""
    x, labels = batch_of(Case(channels_last=False), 0)
    part = share(Case(), rank, size)
    F.cross_entropy(model(x[part]), labels[part]).backward()
    result: Record = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    result.update((f"first {name}", b) for name, b in model.named_buffers())
    return result


def foreign(rank: int) -> Record:
    """A model that somebody else wrote, fused before and after its norms are synchronised."""
    result: Record = {}
    before = convert_sync_batchnorm(fuse(foreign_model(), backend="aten"))
    after = fuse(convert_sync_batchnorm(foreign_model()), backend="aten")
    # PyTorch's norm refuses a CPU by itself, but not in a chain.
    theirs = foreign_model()
    theirs.layers = nn.SyncBatchNorm.convert_sync_batchnorm(theirs.layers)
    if rank == 0:
        # Not even a trial run waits for the other rank.
        result["report"] = str(explain(theirs))
    convert_sync_batchnorm(theirs.bn)
    models = {
        "before": before,
        "after": after,
        "torch's norms": fuse(theirs, backend="aten"),
        "unfused": convert_sync_batchnorm(foreign_model()),
    }
    for name, model in models.items():
        result[f"fused {name}"] = len(explain(model).fused)
        result[name] = foreign_step(model, rank, 2)
    return result


def tiny_chain(backend: str) -> nn.Module:
    """A basic and a bottleneck unit as small as Triton's interpreter wants them."""
    torch.manual_seed(0)
    blocks = PreActBlock(4, 8, 2, backend=backend), BottleneckPreActBlock(8, 8, backend=backend)
    return randomise(Stage(*blocks, backend=backend)).to(memory_format=torch.channels_last)


def tiny_batch() -> tuple[Tensor, Tensor]:
    return images((4, 4, 4, 4), 3, mean=2.0).cpu(), images((4, 8, 2, 2), 4).cpu()


def kernels(rank: int) -> Record:
    """A chain on the Triton kernels, with one image here and three there."""
    model = convert_sync_batchnorm(tiny_chain("triton"))
    x, g = (tensor[:1] if rank == 0 else tensor[1:] for tensor in tiny_batch())
    x.requires_grad_()
    out = model(x)
    out.backward(g)
    result: Record = {"out": out.detach(), "dx": x.grad}
    result.update((f"grad {name}", p.grad) for name, p in model.named_parameters())
    result.update((f"first {name}", b) for name, b in model.named_buffers())
    return result


def error_of(call: Callable[[], Any]) -> str:
    """What a call raises, by class and message."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def twice_differentiated(rank: int) -> Record:
    """What create_graph=True gives."""
    stage = convert_sync_batchnorm(tiny_chain("aten"))
    x = tiny_batch()[0][rank::2]
    return {"error": error_of(lambda: stage(x).sum().backward(create_graph=True))}


def empty(rank: int) -> Record:
    """What rank 0 meets that has no images; the other one is not there to wait for."""
    result: Record = {}
    x, _ = batch_of(Case(), 0)
    for name, backend in (("chain", "aten"), ("children", "eager")):
        model = convert_sync_batchnorm(model_of(Case(backend=backend)))
        result[name] = error_of(lambda m=model: m(x[:0])) if rank == 0 else ""
    return result


def of_ranks(cases: dict[str, Case], rank: int, size: int, group: Any = None) -> Record:
    """Each case trained on this rank's share."""
    return {
        name: train(distributed(case, group), case, share(case, rank, size))
        for name, case in cases.items()
    }


def worker(rank: int, folder: str) -> None:
    """One of four processes; ``folder`` is also where they find each other."""
    torch.set_num_threads(1)
    # Ranks are processes on CPUs, where there is a GPU too; Triton is not imported yet.
    os.environ["TRITON_INTERPRET"] = "1"
    torch.backends.cudnn.allow_tf32 = False  # as in conftest.py, which only the parent imports
    warnings.simplefilter("ignore")  # what PyTorch calls deprecated here is not what is tested
    pair, second = divmod(rank, 2)

    def join(name: str, number: int, size: int) -> None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{name}",
            rank=number,
            world_size=size,
            timeout=datetime.timedelta(seconds=120),
        )

    join(f"pair{pair}", second, 2)
    result: Record = {}
    if pair == 0:
        result["pair"] = of_ranks(TRAINING, second, 2)
        result["variants"] = of_ranks(VARIANTS, second, 2)
        result["collectives"] = collectives(second)
        result["foreign"] = foreign(second)
    else:
        result["draws"] = of_ranks(DRAWN, second, 2)
        result["evaluation"] = evaluation(second)
        result["twice"] = twice_differentiated(second)
        if importlib.util.find_spec("triton") is not None:
            result["kernels"] = kernels(second)
        result["empty"] = empty(second)
    dist.destroy_process_group()

    join("all", rank, 4)
    result["all"] = of_ranks(TRAINING, rank, 4)
    # Every process takes part in making every group.
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[rank % 2]
    result["group"] = of_ranks({"recompute": TRAINING["recompute"]}, rank // 2, 2, group)
    outside = SyncBatchNorm(4, process_group=groups[0])
    x = images((2, 4, 3, 3), rank).cpu()
    result["outside"] = torch.equal(outside(x), nn.BatchNorm2d(4)(x))
    dist.destroy_process_group()
    torch.save(result, f"{folder}/{rank}.pt")
