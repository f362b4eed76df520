"""The processes of one training run: who this is, and what they tell each other.

``torchrun`` starts them and says so in the environment; a process of its own is the only one.
Tensors are reduced on the device, by NCCL or gloo; what the host decides (to stop, which
checkpoint) is agreed upon over gloo, so that no process waits for its GPU.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError
from .capture import capture_stream

T = TypeVar("T")

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# A process that decodes a large data set keeps the others waiting.
_PATIENCE = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    Args:
        rank, size: its number, from 0, and how many there are.
        local_rank: its number on this machine.
        control: the group for what the host decides; None if this process is the only one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in the order of their ranks; ``values`` on the only one."""
        return self._gathered(values).sum(0) if self.size > 1 else values

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the main one's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def _gathered(self, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set in any process. All processes call it together."""
        if self.size == 1:
            return flags
        values = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.control)
        return tuple(bool(value) for value in values)

    def gather(self, value: Any) -> list[Any]:
        """Every process' value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """The main process' result of ``work``, told to all; or the InputError that it raised."""
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        if self.is_main:
            try:
                told[0] = work()
            except InputError as error:
                told[1] = str(error)
        dist.broadcast_object_list(told, src=0, group=self.control)
        if told[1] is not None:
            raise _ToldError(told[1]) if not self.is_main else InputError(told[1])
        return told[0]  # type: ignore[no-any-return]

    def together(self, work: Callable[[], T]) -> T:
        """This process' result of ``work``; or, in every process, an InputError that one raised.

        The first process that has one reports it: none waits for another that has given up.
        """
        if self.size == 1:
            return work()
        found: list[T] = []
        problem: InputError | None = None
        try:
            found.append(work())
        except InputError as error:
            problem = error
        problems = self.gather(None if problem is None else str(problem))
        first = next((rank for rank, text in enumerate(problems) if text is not None), None)
        if first is None:
            return found[0]
        if first == self.rank and problem is not None:
            raise problem
        raise _ToldError(problems[first])


class ProcessLostError(RuntimeError):
    """Another process of the run has ended or cannot be reached any more."""


def _is_lost(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "Connection closed by peer", "Connection reset by peer")
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


class _ToldError(InputError):
    """Another process' error, which that process reports."""


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """Around what goes wrong in every process of a run or in none: the main one reports it."""
    check_environment()
    try:
        yield
    except InputError as error:
        if is_silent():
            raise _ToldError(str(error)) from error
        raise


def is_silent() -> bool:
    """Whether what all processes of a run have to say is another one's to say."""
    return started_by_torchrun() and os.environ["RANK"] != "0"


def is_reported_elsewhere(error: BaseException) -> bool:
    """Whether another process of the run tells the user about this error."""
    return isinstance(error, _ToldError)


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[World]:
    """This process' place among those that torchrun started, or alone.

    A process group that the caller has made is used, and left as it is.

    Args:
        device: this process'; decides between NCCL and gloo.

    Raises:
        InputError: the other processes cannot be reached.
    """
    if not dist.is_available():
        yield World()
        return
    own = not dist.is_initialized()
    if own and not started_by_torchrun():
        yield World()
        return
    if own:
        # NCCL reports a GPU that two processes share only when it hangs.
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            if "EADDRINUSE" in str(error):
                port = os.environ["MASTER_PORT"]
                raise InputError(
                    f"cannot join the other processes: port {port} is taken by another job; give "
                    "torchrun another --master-port"
                ) from error
            raise InputError(f"cannot join the other processes: {_first_line(error)}") from error
    try:
        size = dist.get_world_size()
        if size == 1:
            yield World()
            return
        gloo = dist.get_backend() == "gloo"
        control = dist.group.WORLD if gloo else dist.new_group(backend="gloo", timeout=_PATIENCE)
        yield World(dist.get_rank(), size, _local_rank(), control)
    except RuntimeError as error:
        if _is_lost(error):
            raise ProcessLostError(
                f"process {dist.get_rank()} has lost another one, whose own error says why "
                f"({_first_line(error)}); go on with --resume auto"
            ) from error
        raise
    finally:
        if own and dist.is_initialized():
            dist.destroy_process_group()


def check_environment() -> None:
    """Refuse an environment that names other processes and does not lead to them.

    Raises:
        InputError: a variable that torchrun sets is missing, no number, or out of its range.
    """
    given = {name: os.environ.get(name, "") for name in _ENVIRONMENT}
    if given["RANK"] in ("", "0") and given["WORLD_SIZE"] in ("", "1"):
        return
    start = "start with torchrun, or unset RANK and WORLD_SIZE"
    missing = [name for name, value in given.items() if not value]
    if missing:
        there = " and ".join(name for name in ("RANK", "WORLD_SIZE") if given[name])
        raise InputError(f"{there} in the environment without {', '.join(missing)}: {start}")
    most = {"MASTER_PORT": 65535, "WORLD_SIZE": 1_000_000}
    numbers: dict[str, int] = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        text = os.environ.get(name, "0")
        high = most.get(name, numbers.get("WORLD_SIZE", 0) - 1)
        low = 1 if name == "WORLD_SIZE" else 0
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise InputError(
                f"{name} in the environment must be a whole number in {low}..{high}, got {text!r}: "
                f"{start}"
            )
        numbers[name] = int(text)


def started_by_torchrun() -> bool:
    """Whether the environment names other processes, as torchrun does."""
    return all(name in os.environ for name in _ENVIRONMENT) and os.environ["WORLD_SIZE"] != "1"


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process for a device that names none, where torchrun started several.

    Raises:
        InputError: more processes on this machine than GPUs.
    """
    if str(device) != "cuda" or not started_by_torchrun():
        return device
    rank, count = _local_rank(), torch.cuda.device_count()
    if rank >= count:
        raise InputError(
            f"process {rank} of this machine has no GPU of its own, there are {count}: "
            f"take --nproc-per-node {count}"
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def distribute(
    model: nn.Module, device: torch.device, synced: bool, images: tuple[int, ...]
) -> DistributedDataParallel:
    """Wrap a model so that gradients are averaged over the processes.

    DDP sorts its buckets anew after the first backward, and with them the order in which a ring
    adds the ranks' gradients. Here that happens before the first step, in a backward whose results
    are thrown away: a run that goes on from a checkpoint then adds in the order of one that was
    never stopped. Parameters, buffers and random states are as before.

    Args:
        synced: whether norms are synchronised, and buffers so equal in all processes.
        images: size (b, C, H, W) of a batch, as small as the model takes.
    """
    devices = [device] if device.type == "cuda" else None
    # PyTorch 2.13 renamed it.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: not synced}
    with capture_stream(device):
        wrapped = DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, **options
        )
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cuda = [device] if device.type == "cuda" else []
    training = model.training
    with torch.random.fork_rng(devices=cuda):
        model.train()
        for _ in range(2):  # the buckets are sorted when the second forward begins
            wrapped(torch.zeros(images, device=device)).float().sum().backward()
            model.zero_grad(set_to_none=True)
        model.train(training)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
    return wrapped
