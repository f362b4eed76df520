"""What becomes of kernels that a device cannot have, by Triton's compiler and launcher, as JSON.

Run by test_fallback.py in a process of its own, over a libcuda that does nothing (stub_driver.py).
"""

from __future__ import annotations

import ast
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from resnetv2.kernels.inspect import stub_driver

# Bytes of shared memory: less than the tiles of the block below take.
LIMIT = 12 * 1024


def said(run: Callable[[], object]) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # A PyTorch with CUDA asks the stub for devices, and warns that it has none.
        warnings.filterwarnings("ignore", "CUDA initialization")
        run()
    return [str(warning.message) for warning in caught]


def faults() -> dict[str, BaseException]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return {
        "CompilationError": CompilationError("x = 1", ast.parse("x = 1").body[0], "wrong"),
        "PTXASError": PTXASError("ptxas died"),
        "pass": RuntimeError("PassManager::run failed"),
        "registers": OutOfResources(512, 255, "threads"),
        "no kernel image": RuntimeError(
            "Triton Error [CUDA]: no kernel image is available for execution on the device"
        ),
        "illegal access": RuntimeError(
            "Triton Error [CUDA]: an illegal memory access was encountered"
        ),
        "out of memory": torch.OutOfMemoryError("CUDA out of memory"),
        "KeyboardInterrupt": KeyboardInterrupt(),
    }


def main() -> int:
    stub = stub_driver.install(shared_memory=LIMIT)
    from triton.runtime.jit import JITFunction

    from resnetv2 import BottleneckPreActBlock
    from resnetv2.kernels import launch, triton_engine

    os.environ["RESNETV2_BACKEND"] = "triton"
    engine = triton_engine.TritonEngine()
    result: dict[str, Any] = {"limit": LIMIT}
    compile_ = JITFunction._do_compile
    for number, (name, fault) in enumerate(faults().items()):

        def broken(*args: Any, fault: BaseException = fault, **options: Any) -> None:
            raise fault

        # Its own number of channels: nothing of it is compiled yet.
        x = torch.randn(2, 16 + number, 8, 8).to(memory_format=torch.channels_last)
        JITFunction._do_compile = broken
        try:
            result[name] = [said(lambda x=x: engine.moments(x)) for _ in range(2)]
        except type(fault) as error:
            result[name] = "raised" if error is fault else f"another: {error!r}"
        finally:
            JITFunction._do_compile = compile_

    kernels: list[str] = []
    block = BottleneckPreActBlock(256, 256).to(memory_format=torch.channels_last)
    x = torch.randn(8, 256, 16, 16).to(memory_format=torch.channels_last).requires_grad_()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            block(x).float().sum().backward()

    result["said"] = said(step)
    names = launch.record(lambda name, grid, constants: kernels.append(name))
    with names, stub.recorded() as launches:
        result["said again"] = said(step)
    result["kernels"] = kernels
    result["shared"] = [made.shared for made in launches]
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
