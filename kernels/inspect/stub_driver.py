"""Triton's own NVIDIA driver and launcher over a libcuda that does nothing (cuda_stub.c).

    stub = stub_driver.install()          # in a process whose TRITON_INTERPRET is not set
    with stub.recorded() as launches:
        block(x)                          # CPU tensors, backend "triton"

Kernels are compiled for the GPU that the stub says it is, their arguments are packed by Triton's C
launcher, and the driver gets each launch as a real one would: grid, block, shared memory, values of
parameters. Needs gcc and Python's headers, as Triton does on a GPU.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_SOURCE = Path(__file__).with_name("cuda_stub.c")
_MAX_PARAMETERS, _MAX_RECORDS = 64, 65536
# Bytes of a parameter by its type in Triton's signature.
_BYTES = {"i1": 1, "u1": 1, "i8": 1, "i32": 4, "u32": 4, "i64": 8, "u64": 8, "fp32": 4, "fp64": 8}


class Launch(NamedTuple):
    """What the driver was asked to start; ``values`` holds each parameter's bytes as an integer."""

    function: int
    stream: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    values: tuple[int, ...]


class _Record(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("parameters", ctypes.c_uint32),
        ("values", ctypes.c_uint64 * _MAX_PARAMETERS),
    )


class Stub(NamedTuple):
    """The library, and Triton's driver that stands on it."""

    library: ctypes.CDLL
    driver: Any

    @property
    def launches(self) -> int:
        """Kernels started so far."""
        return ctypes.c_uint64.in_dll(self.library, "stub_launches").value

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Launch]]:
        """Launches inside the block, in order; the list is filled when it ends."""
        launches: list[Launch] = []
        count = ctypes.c_uint64.in_dll(self.library, "stub_launches")
        recording = ctypes.c_int.in_dll(self.library, "stub_recording")
        before, count.value, recording.value = count.value, 0, 1
        try:
            yield launches
        finally:
            recording.value = 0
            records = (_Record * _MAX_RECORDS).in_dll(self.library, "stub_records")
            if count.value > _MAX_RECORDS:
                raise RuntimeError(f"{count.value} launches, of which {_MAX_RECORDS} are recorded")
            for record in records[: count.value]:
                launches.append(
                    Launch(
                        record.function,
                        record.stream,
                        tuple(record.grid),
                        tuple(record.block),
                        record.shared,
                        tuple(record.values[: record.parameters]),
                    )
                )
            count.value += before


def missing() -> str:
    """What this machine lacks for ``install``, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if shutil.which("gcc") is None:
        return "gcc is not installed"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed"
    return ""


def _build() -> Path:
    """A folder with the stub as libcuda.so.1, for as long as this process lives."""
    folder = Path(tempfile.mkdtemp(prefix="cuda-stub-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = folder / "libcuda.so.1"
    command = ["gcc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*command, str(_SOURCE)], check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    return folder


@functools.cache
def install(
    capability: tuple[int, int] = (9, 0), multiprocessors: int = 132, shared_memory: int = 232448
) -> Stub:
    """Make Triton's NVIDIA driver, over the stub, the active one of this process; an H100's limits.

    Called again with the same limits, it gives what is there.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    folder = _build()
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    # With its name known to the loader, Triton's modules are linked to this one.
    library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    (ctypes.c_int * 2).in_dll(library, "stub_capability")[:] = list(capability)
    ctypes.c_int.in_dll(library, "stub_multiprocessors").value = multiprocessors
    ctypes.c_int.in_dll(library, "stub_shared_memory").value = shared_memory

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 interprets kernels: unset it before Triton's import")

    class Launcher(nvidia.CudaLauncher):
        """Triton's, which tells the stub a function's signature before its first launch."""

        def __init__(self, src: Any, metadata: Any) -> None:
            super().__init__(src, metadata)
            types = [str(ty) for ty in src.signature.values() if ty != "constexpr"]
            self._bytes = bytes(8 if ty.startswith("*") else _BYTES[ty] for ty in types)

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            library.stub_signature(ctypes.c_uint64(function), len(self._bytes), self._bytes)
            # Only the first launch pays for this: the next one finds the parent's method.
            self.__class__ = nvidia.CudaLauncher
            self(x, y, z, stream, function, *rest)

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), Launcher

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            return None

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_device_capability(self, device: int = 0) -> tuple[int, int]:
            return capability

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    driver = Driver()
    triton.runtime.driver.set_active(driver)
    return Stub(library, driver)
