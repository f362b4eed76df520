"""The one place that launches kernels, and what a launch needs to know of the device.

``launch`` binds a kernel's arguments once for each set of constants, dtypes, alignments and special
integers: from then on it starts the compiled kernel itself, which costs a tenth of
``kernel[grid](...)``. What is started is a ``Compiled`` with a grid and a tuple of arguments, in
their order, and nothing else.

Device properties come from Triton's active driver, so that the dry run's stand-in device is asked
like a real one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from . import recording
from .progress import COMPILING
from .switches import allow_tf32

INTERPRET: bool = triton.knobs.runtime.interpret

# The dtypes in which a kernel's tl.dot multiplies; float64 is the reference's alone.
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

_recorders: list[Callable[[str, tuple[int, ...], dict[str, Any]], None]] = []

# What a driver says of a kernel that it cannot load or start. Its other errors are no fault of that
# kernel: an illegal access of an earlier one, memory that is gone.
_KERNEL_FAULTS = (
    "invalid device function",
    "invalid image",
    "kernel image is invalid",
    "no kernel image",
    "no binary for gpu",
    "out of resources",
    "ptx jit compil",
    "too many resources",
    "unsupported toolchain",
)


class KernelError(RuntimeError):
    """A kernel that this device cannot have: it does not compile, or takes more than there is."""


class Config(NamedTuple):
    """A kernel's tile and how it is run. BLOCK_M: rows, BLOCK_N: columns, BLOCK_K: reduction.

    unroll: whether a convolution's loops over taps and channels are unrolled where they are short.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2
    unroll: bool = True


class Compiled(NamedTuple):
    """A kernel that is ready to start, and the constants that follow its arguments.

    run: Triton's launcher of it. kernel: Triton's ``CompiledKernel``.
    """

    run: Callable[..., None]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]
    kernel: Any

    def start(self, grid: tuple[int, ...], stream: int, args: tuple[Any, ...]) -> None:
        """Start it; hooks that are set in ``triton.knobs.runtime`` are called, as by Triton."""
        x, y, z = (*grid, 1, 1)[:3]
        runtime = triton.knobs.runtime
        enter, leave, about = runtime.launch_enter_hook, runtime.launch_exit_hook, None
        # A chain without hooks is one that does nothing.
        if enter is not None and not getattr(enter, "calls", True):
            enter = None
        if leave is not None and not getattr(leave, "calls", True):
            leave = None
        if enter is not None:
            about = self.kernel.launch_metadata(grid, stream, *args, *self.constants)
        self.run(
            x, y, z, stream, self.function, self.metadata, about, enter, leave,
            *args, *self.constants,
        )  # fmt: skip


class Start(NamedTuple):
    """How code that is written for one kernel starts it.

    function(x, y, z, stream, *before, *arguments, *constants), or with all of these as one tuple
    behind ``before``, where ``packed``. Hooks are not called.
    """

    function: Callable[..., None]
    before: tuple[Any, ...]
    constants: tuple[Any, ...]
    packed: bool


# Versions of Triton whose launcher in Python start_of goes past; a test compares its arguments.
_LAUNCHERS_READ = ("3.6", "3.7", "3.8")


def start_of(compiled: Compiled) -> Start:
    """The shortest way: past Triton's launcher in Python where it only passes arguments on."""
    run: Any = compiled.run
    none, scratch = (None, None, None), (None, None)  # launch's description and hooks; its memory
    version = triton.__version__.rsplit(".", 1)[0]
    passes_on = version in _LAUNCHERS_READ and type(run).__name__ == "CudaLauncher"
    if (
        not passes_on
        or run.global_scratch_size
        or run.profile_scratch_size
        or getattr(run, "gsan_enabled", False)
    ):
        plain = (compiled.function, compiled.metadata, *none)
        return Start(run, plain, compiled.constants, False)
    head = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
    if version == "3.6":
        # A launcher is compiled for each signature, and not told it.
        return Start(
            run.launch, (*head, *scratch, compiled.metadata, *none), compiled.constants, False
        )
    told = (run.arg_annotations, run.kernel_signature)
    before = (*head, compiled.metadata, *none, *scratch, *told)
    return Start(run.launch, before, compiled.constants, True)


# Of every compilation: said, and not left to a default that differs between versions of Triton.
OPTIONS = {"enable_fp_fusion": True}
_compiled: dict[tuple[Any, ...], Compiled] = {}


@contextmanager
def record(callback: Callable[[str, tuple[int, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Call ``callback(kernel name, grid, constants)`` before each launch inside the block."""
    _recorders.append(callback)
    try:
        yield
    finally:
        _recorders.remove(callback)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run ``kernel[grid](*args, **constants)`` on the device of its first argument, a tensor.

    Raises:
        KernelError: the kernel does not compile for this device, or takes more than it has.
    """
    recorder = recording.current()
    if recorder is None:
        _launch(kernel, grid, args, constants)
    else:
        recorder.launch(kernel, grid, args, constants, _launch)


def _launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
) -> Compiled | None:
    """``launch``; what starts the kernel again, or None where Triton itself must."""
    if args[0].is_meta:
        # Nothing to compute: a program's cost is wanted, or the names of its kernels.
        recording.list_launch(kernel, args, constants)
        return None
    for callback in _recorders:
        callback(kernel.fn.__name__, grid, constants)
    if INTERPRET:
        kernel[grid](*args, **constants)
        return None
    active = triton.runtime.driver.active
    number = active.get_current_device()
    tensor = args[0]
    if tensor.is_cuda and tensor.get_device() != number:
        with torch.cuda.device(tensor.device):
            return _launch(kernel, grid, args, constants)
    if unusual(kernel):
        _first(kernel, grid, args, constants)
        return None
    key = key_of(kernel, number, args, constants)
    found = _compiled.get(key)
    if found is not None:
        found.start(grid, active.get_current_stream(number), args)
        return found
    handle = _first(kernel, grid, args, constants)
    # None where a hook of Triton's says that there is nothing to launch.
    if handle is None:
        return None
    behind = tuple(constants[name] for name in kernel.arg_names[len(args) :])
    compiled = Compiled(handle.run, handle.function, handle.packed_metadata, behind, handle)
    _compiled[key] = compiled
    return compiled


def key_of(
    kernel: Any, number: int, args: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, ...]:
    """What decides which kernel is needed on device ``number``, never coarser than Triton's own
    specialization. Tensors without memory count as aligned."""
    key = [kernel.fn, number, *constants, *constants.values()]
    for a in args:
        if a is None:
            key.append(None)
        elif type(a) is int:
            key += (1 if a == 1 else a % 16 == 0, -(2**31) <= a < 2**31, a < 2**63)
        elif type(a) is float:
            key.append(float)
        else:
            key += (a.dtype, a.data_ptr() % 16 == 0)
    if _device(number).backend == "hip":
        # Buffer operations, for memory that ends within 2 GiB.
        key += [a.untyped_storage().size() < 2**31 for a in args if isinstance(a, Tensor)]
    return tuple(key)


def is_compiled(key: tuple[Any, ...]) -> bool:
    """Whether the kernel of ``key_of`` has been launched before."""
    return key in _compiled


def replay_stream() -> int | None:
    """The current stream, for compiled kernels to be started again on it.

    None where each launch has to come by here: in the interpreter, while launches are recorded for
    a test, and with Triton's hooks or debugging.
    """
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    # A chain without hooks is one that does nothing.
    hooked = any(hook is not None and getattr(hook, "calls", True) for hook in hooks)
    if INTERPRET or _recorders or hooked or runtime.debug:
        return None
    active = triton.runtime.driver.active
    return int(active.get_current_stream(active.get_current_device()))


def unusual(kernel: Any) -> bool:
    """Whether Triton's own way to a launch does more than look its kernel up and start it."""
    runtime = triton.knobs.runtime
    return (
        runtime.debug
        or kernel.pre_run_hooks
        or triton.knobs.compilation.instrumentation_mode
        or getattr(runtime, "add_stages_inspection_hook", None) is not None
    )


def _first(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
) -> Any:
    """Triton's own launch, which compiles and loads what is needed; its ``CompiledKernel``."""
    try:
        with COMPILING.kernel():
            return kernel[grid](*args, **constants, **OPTIONS)
    except (TritonError, RuntimeError) as error:
        if not _of_the_kernel(error):
            raise
        reason = str(error).strip() or type(error).__name__
        raise KernelError(f"{kernel.fn.__name__}: {reason}") from error


def _of_the_kernel(error: Exception) -> bool:
    """Whether an error says that a kernel cannot be had, and not that the device is in trouble."""
    if isinstance(error, TritonError):
        return True
    text = str(error)
    if text.startswith("Triton Error ["):
        return any(fault in text.lower() for fault in _KERNEL_FAULTS)
    # The compiler's passes raise RuntimeError itself, PyTorch its subclasses.
    return type(error) is RuntimeError


class Device(NamedTuple):
    """What tiles are chosen by. backend: "cuda", "hip" or "interpreter". arch: 90, "gfx942", ..."""

    multiprocessors: int
    backend: str
    arch: int | str

    @property
    def target(self) -> str:
        """ "sm_90", "gfx942", ..."""
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch or self.backend)

    @property
    def matrix_unit(self) -> str:
        """What multiplies matrices: "wgmma", "tcgen05", "mma.sync", AMD's "mfma", or nothing."""
        if self.backend != "cuda":
            return "mfma" if self.backend == "hip" else ""
        return {9: "wgmma", 10: "tcgen05"}.get(int(self.arch) // 10, "mma.sync")


INTERPRETER = Device(1, "interpreter", "")


@functools.cache
def _device(number: int) -> Device:
    active = triton.runtime.driver.active
    target = active.get_current_target()
    properties = active.utils.get_device_properties(number)
    return Device(int(properties["multiprocessor_count"]), target.backend, target.arch)


def device_of(tensor: Tensor) -> Device:
    """A tensor's device; for a CPU tensor the active driver's: a dry run's.

    For a tensor without memory the one that it stands for (``recording.for_gpu``).
    """
    if tensor.is_meta:
        stated: Device = recording.gpu()
        return stated
    if INTERPRET:
        return INTERPRETER
    if tensor.is_cuda:
        number = tensor.get_device()
        if number != triton.runtime.driver.active.get_current_device():
            with torch.cuda.device(number):
                return _device(number)
        return _device(number)
    return _device(triton.runtime.driver.active.get_current_device())


def describe(tensor: Tensor) -> str:
    """A tensor's device by name and target, for messages."""
    target = device_of(tensor).target
    return f"{torch.cuda.get_device_name(tensor.device)} ({target})" if tensor.is_cuda else target


def input_precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s input_precision for operands of ``dtype``."""
    return "tf32" if dtype == torch.float32 and allow_tf32() else "ieee"


def is_wide(*tensors: Tensor) -> bool:
    """Whether an element's offset in one of ``tensors`` needs 64 bits."""
    return max([tensor.numel() for tensor in tensors]) >= 2**31
