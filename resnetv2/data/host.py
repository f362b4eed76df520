"""The memory and the cores that this machine has for a process."""

import contextlib
import ctypes
import os
import sys

import torch

from ..errors import InputError

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

_keeps = False

_GROUP = "/sys/fs/cgroup"


def available_memory() -> int | None:
    """Bytes that this process may still take, None where the system does not tell.

    Of the machine, or of the control group (a container's limit) if that is less, in equal parts
    for the processes that torchrun started here.
    """
    values = []
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as file:
        line = next(line for line in file if line.startswith("MemAvailable:"))
        values.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError, KeyError):
        with open(f"{_GROUP}/memory.max") as file:
            limit = int(file.read())
        with open(f"{_GROUP}/memory.stat") as file:
            taken = dict(line.split() for line in file)
        # The cache of files is given back when its memory is needed.
        values.append(limit - int(taken["anon"]) - int(taken["shmem"]))
    if not values:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            values.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return max(0, min(values)) // local_processes() if values else None


def check_memory(needed: int, what: str, remedy: str, share: float = 0.9) -> None:
    """Raise InputError if `what`, of `needed` bytes, takes more than `share` of what there is."""
    available = available_memory()
    if available is not None and needed > share * available:
        raise InputError(
            f"{what} take {gibibytes(needed)}, more than {share:.0%} of the "
            f"{gibibytes(available)} of memory that this process can have: {remedy}"
        )


def decoding_threads() -> int:
    """A few, shared between the processes of this machine."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return max(1, min(8, cores // local_processes()))


def local_processes() -> int:
    """Processes of this job on this machine, as torchrun says."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(given)) if given.isdigit() else 1


def gibibytes(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def keep_freed_memory() -> None:
    """Let glibc keep freed memory in this process, as PyTorch's allocator does on a GPU.

    By default the sizes of earlier blocks decide whether glibc keeps a large one or returns it to
    the system. Page faults then make the same step take up to 1.8 times as long in one process as
    in another.
    """
    global _keeps
    if sys.platform != "linux":
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)
        _keeps = True


def release_freed_memory() -> None:
    """Return to the system the free memory that ``keep_freed_memory`` keeps.

    Blocks lie elsewhere in every step, and a page that was touched once stays resident: 4 % more
    memory in 40 steps of 1,001 layers. The step after a checkpoint takes it again, in a second.
    """
    if _keeps:
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak(device: torch.device) -> None:
    """Let ``peak_memory`` count from here on; where Linux does not, it counts from the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that this process held: of a GPU what torch had allocated, else resident memory,
    which includes the program and its libraries. None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return None


def memory_in_use(device: torch.device) -> int | None:
    """Bytes that this process holds: of a GPU what torch has allocated, else resident memory.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None
