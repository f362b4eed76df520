"""Compile every launch of a program for a GPU that is not there.

    with dry_run("sm_90") as run:
        block(x)                     # CPU tensors, backend "triton"
    for launch in run.launches:
        print(launch.kernel.name, launch.grid, launch.kernel.registers, launch.kernel.stack)

A stand-in driver is made Triton's active one: it answers for the device's properties, reads the
resources of each compiled binary, and does nothing where a real driver would start the kernel. The
project's own launch path runs unchanged, so what is compiled is what would be launched. Outputs
keep whatever their memory held.
"""

from __future__ import annotations

import contextlib
import functools
import re
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

from .. import ahead, launch
from . import identity, sass, trips


class Device(NamedTuple):
    """What launch code may ask of a device: its target and its limits per multiprocessor."""

    target: GPUTarget
    multiprocessors: int
    shared_memory: int


# A100, RTX 3090, RTX 4090, H100 SXM, B200, RTX 5090 and MI300X: their data sheets' multiprocessors,
# and the shared memory that one program may take (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability": 163, 99, 99, 227, 227 and 99 KB).
DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 108, 166912),
    "sm_86": Device(GPUTarget("cuda", 86, 32), 82, 101376),
    "sm_89": Device(GPUTarget("cuda", 89, 32), 128, 101376),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 132, 232448),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 148, 232448),
    "sm_120": Device(GPUTarget("cuda", 120, 32), 170, 101376),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 304, 65536),
}


class Resources(NamedTuple):
    """What a binary takes: registers a thread, and bytes a thread of local memory and of spills.

    ``spilled`` is what the compiler reports for a spill. For CUDA that is the stack frame, which
    also holds local arrays; the project's kernels have none.
    """

    registers: int
    stack: int
    spilled: int


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: name, what it was specialised for, and what it takes.

    ``constants`` has a record's fields (``operands.Convolution``) under their own names.

    ``key`` is Triton's, ``digest`` that of identity.py.
    ``seconds`` of processor time went into compiling it; None if a dry run did not compile it.
    ``files`` maps the stages of compilation (ttgir, ptx, cubin, amdgcn, ...) to their files.
    """

    name: str
    target: str
    key: str
    digest: str
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    spilled: int
    shared: int
    seconds: float | None
    files: dict[str, Path] = field(repr=False)

    def text(self, stage: str) -> str:
        """The kernel in a textual stage of compilation: "ttgir", "ptx", "amdgcn", ..."""
        return self.files[stage].read_text()

    @functools.cached_property
    def sass(self) -> str:
        """The machine code of a CUDA kernel, disassembled."""
        return cuobjdump(self.files["cubin"].read_bytes(), "--dump-sass")


class TensorArgument(NamedTuple):
    """A tensor that a launch was given: its memory, not its values."""

    address: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Launch:
    """One launch: its kernel, its grid, its tensors and its scalar arguments, by name."""

    kernel: Kernel
    grid: tuple[int, int, int]
    tensors: dict[str, TensorArgument]
    scalars: dict[str, Any]

    @property
    def programs(self) -> int:
        """Number of programs in the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def count(self) -> sass.Count:
        """Instructions that a warp of program 0 executes; for CUDA targets."""
        kernel = self.kernel
        values = [self.scalars.get(name) for name in kernel.signature]
        integers = [value if isinstance(value, int) else None for value in values]
        times = trips.loop_trips(kernel.text("ttgir"), integers, self.grid)
        return sass.count(kernel.sass, times, trips.loop_bodies(kernel.text("ptx")))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the launch, memory that several of them share once."""
        total = end = 0
        for tensor in sorted(self.tensors.values()):
            start = max(tensor.address, end)
            stop = tensor.address + tensor.nbytes
            total += max(0, stop - start)
            end = max(end, stop)
        return total


class Listed(NamedTuple):
    """A launch that nothing was compiled for: the kernel by name and digest (identity.py)."""

    kernel: str
    digest: str
    grid: tuple[int, int, int]


@dataclass
class DryRun:
    """What a dry run saw: launches in order, and kernels that the device could not hold.

    ``listed`` has the launches of kernels that were not compiled.
    """

    device: Device
    launches: list[Launch] = field(default_factory=list)
    listed: list[Listed] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def kernels(self) -> list[Kernel]:
        """The distinct kernels launched, in order of their first launch."""
        return list({launch.kernel.key: launch.kernel for launch in self.launches}.values())


@contextlib.contextmanager
def dry_run(
    target: str = "sm_90", compiles: Callable[[str], bool] | None = None
) -> Iterator[DryRun]:
    """Compile for ``target``, a name in ``DEVICES``, every kernel launched inside the block.

    ``compiles`` says of a kernel's digest (identity.py) whether it is; the others are ``listed``.

    Tensors live on the CPU and the backend is ``"triton"``. A kernel that needs more shared memory
    than the device has raises ``triton.runtime.errors.OutOfResources``, as on the device, and is
    named in ``failures``; what the project then runs instead (``fallback``) is seen as well.

    Raises:
        ValueError: ``target`` is unknown.
        RuntimeError: kernels are interpreted in this process, so nothing would be compiled.
    """
    if target not in DEVICES:
        raise ValueError(f"target must be one of {', '.join(DEVICES)}, got {target!r}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "a dry run compiles kernels, but TRITON_INTERPRET=1 interprets them: unset it before "
            "triton is imported"
        )
    config = triton.runtime.driver
    # DriverConfig.active would look for a real device; there may be none to come back to.
    previous = config._active
    run = DryRun(DEVICES[target])
    config.set_active(_Driver(target, run))
    try:
        with ahead.one_at_a_time(), _compilation_timed(), _listed(run, compiles), _unconvolved():
            yield run
    finally:
        config._active = previous


@contextlib.contextmanager
def _unconvolved() -> Iterator[None]:
    """ATen's convolutions take no time either: their results are memory as it is found.

    By another kernel of the operators: under a mode chains would run as operators, whole.
    """

    def found(operator: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            result = operator(*tree_map_only(torch.Tensor, lambda t: t.to("meta"), args))
            return tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="cpu"), result)

        return run

    library = torch.library.Library("aten", "IMPL")
    for operator in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
        library.impl(operator.default, found(operator.default), "CPU")
    try:
        yield
    finally:
        library._destroy()


_SECONDS = "compile_seconds"


def _compile_seconds(file: str | None) -> float | None:
    """What compiling the kernel took that ``file`` of Triton's cache belongs to."""
    note = None if file is None else Path(file).with_name(_SECONDS)
    return float(note.read_text()) if note is not None and note.exists() else None


def _processor_seconds() -> float:
    """Of this process and of the compilers that it ran and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@contextlib.contextmanager
def _compilation_timed() -> Iterator[None]:
    """Note beside each kernel in Triton's cache what compiling it took, for later processes too."""
    began = 0.0

    def begin(**_: Any) -> None:
        nonlocal began
        began = _processor_seconds()

    def end(metadata_group: dict[str, str], cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            note = Path(next(iter(metadata_group.values()))).with_name(_SECONDS)
            note.write_text(f"{_processor_seconds() - began:.2f}")

    with triton.knobs.runtime.scope(), triton.knobs.compilation.scope():
        triton.knobs.runtime.jit_cache_hook = begin
        triton.knobs.compilation.listener = end
        yield


@contextlib.contextmanager
def _listed(run: DryRun, compiles: Callable[[str], bool] | None) -> Iterator[None]:
    """Tell Triton that a kernel which is not wanted needs no compiling, and write it down."""
    if compiles is None:
        yield
        return
    grid: tuple[int, ...] = ()

    def launched(name: str, size: tuple[int, ...], constants: dict[str, Any]) -> None:
        nonlocal grid
        grid = size

    begin = triton.knobs.runtime.jit_cache_hook

    def skip(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found = identity.digest(
            fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0],
            compile["num_warps"], compile["num_stages"],
        )  # fmt: skip
        if compiles(found):
            begin()
            return False
        x, y, z = (*grid, 1, 1)[:3]
        run.listed.append(Listed(fn.jit_function.fn.__name__, found, (x, y, z)))
        return True

    with launch.record(launched), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = skip
        yield


class _Utils:
    def __init__(self, device: Device) -> None:
        self._device = device

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self._device.shared_memory,
            "max_num_regs": 65536,
            "multiprocessor_count": self._device.multiprocessors,
            "warpSize": self._device.target.warp_size,
            "sm_clock_rate": 1755000,
            "mem_clock_rate": 2619000,
            "mem_bus_width": 5120,
        }

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[object, Resources, int, int, int]:
        cuda = self._device.target.backend == "cuda"
        resources = cuda_resources(binary) if cuda else hip_resources(binary)
        return binary, resources, resources.registers, resources.spilled // 4, 1024


class _Launcher:
    """Stands where Triton's launcher would start a kernel, and records it instead."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.src = src
        self.metadata = metadata
        self.kernel: Kernel | None = None
        run, limit = _active().run, _active().run.device.shared_memory
        if metadata.shared > limit:
            run.failures.append(f"{metadata.name}: {metadata.shared} bytes of {limit} shared")

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: Resources, *rest: Any
    ) -> None:
        # rest: packed metadata, launch metadata, two hooks, then the kernel's own arguments.
        arguments = dict(zip(self.src.fn.arg_names, rest[4:], strict=True))
        if self.kernel is None:
            self.kernel = self._describe(arguments, function)
        tensors, scalars = {}, {}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                tensors[name] = TensorArgument(
                    value.data_ptr(),
                    value.numel() * value.element_size(),
                    tuple(value.shape),
                    str(value.dtype).removeprefix("torch."),
                )
            else:
                scalars[name] = getattr(value, "value", value)
        _active().run.launches.append(Launch(self.kernel, (x, y, z), tensors, scalars))

    def _describe(self, arguments: dict[str, Any], resources: Resources) -> Kernel:
        metadata = self.metadata
        group = get_cache_manager(metadata.hash).get_group(f"{metadata.name[:150]}.json") or {}
        signature = dict(self.src.signature)
        constants: dict[str, Any] = {}
        for name, value in arguments.items():
            if signature[name] == "constexpr":
                value = getattr(value, "value", value)
                constants |= value._asdict() if hasattr(value, "_asdict") else {name: value}
        return Kernel(
            name=metadata.name,
            target=_active().name,
            key=metadata.hash,
            digest=identity.digest(
                self.src.fn,
                signature,
                self.src.constants,
                self.src.attrs,
                metadata.num_warps,
                metadata.num_stages,
            ),
            signature={k: str(v) for k, v in signature.items() if v != "constexpr"},
            constants=constants,
            num_warps=metadata.num_warps,
            num_stages=metadata.num_stages,
            registers=resources.registers,
            stack=resources.stack,
            spilled=resources.spilled,
            shared=metadata.shared,
            seconds=_compile_seconds(next(iter(group.values()), None)),
            files={Path(name).suffix[1:]: Path(path) for name, path in group.items()},
        )


class _Driver(DriverBase):
    """A driver whose device exists on paper only."""

    def __init__(self, name: str, run: DryRun) -> None:
        self.name = name
        self.run = run
        self.utils = _Utils(run.device)
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_device(self) -> int:
        # Triton and the project keep compiled kernels and limits by device number: one that no
        # real device and no other target has keeps them apart.
        return 1_000_000 + list(DEVICES).index(self.name)

    def set_current_device(self, device: int) -> None:
        return None

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.run.device.target

    def get_device_capability(self, device: int) -> tuple[int, int]:
        arch = self.run.device.target.arch
        return divmod(arch, 10) if isinstance(arch, int) else (9, 4)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        def benchmark(kernel_call: Any, *, quantiles: Any = None, **_: Any) -> Any:
            # Compiles the configuration; all of them then take the same time.
            kernel_call()
            return [1.0] * len(quantiles) if quantiles else 1.0

        return benchmark

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        return None


def _active() -> _Driver:
    active = triton.runtime.driver.active
    if not isinstance(active, _Driver):
        raise RuntimeError("a kernel that a dry run compiled was launched outside of it")
    return active


def cuobjdump(binary: bytes, *options: str) -> str:
    """What cuobjdump, which triton's wheel carries, prints for a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cuda_resources(cubin: bytes) -> Resources:
    """Registers and stack of a cubin's kernel."""
    text = cuobjdump(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resources:\n{text}")
    registers, stack = int(found[1]), int(found[2])
    return Resources(registers, stack, stack)


def hip_resources(hsaco: bytes) -> Resources:
    """Vector registers and spills of an AMD code object, from its metadata note.

    The note is MessagePack: a key such as ``.vgpr_count`` is followed by an unsigned integer.
    """

    def value(key: str) -> int:
        at = hsaco.find(key.encode())
        if at < 0:
            raise RuntimeError(f"the code object's metadata has no {key}")
        at += len(key)
        width = {0xCC: 1, 0xCD: 2, 0xCE: 4}.get(hsaco[at], 0)
        return int.from_bytes(hsaco[at + 1 : at + 1 + width], "big") if width else hsaco[at]

    # Scalar registers spill to lanes of vector registers, which takes no memory.
    spilled = 4 * value(".vgpr_spill_count")
    return Resources(value(".vgpr_count"), value(".private_segment_fixed_size"), spilled)
