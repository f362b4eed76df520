"""Launches of training steps by the project's ``launch`` and by Triton itself, as JSON on stdout.

Run by test_launcher.py in a process of its own, with Triton's real launcher over a libcuda that
does nothing (stub_driver.py): each launch of a step is made both ways, one after the other, and
what the driver gets is compared.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import torch

from resnetv2.core import execution
from resnetv2.kernels.inspect import stub_driver


def both_ways(stub: stub_driver.Stub) -> list[dict[str, Any]]:
    """Have every launch made by Triton too; the list fills with both."""
    from resnetv2.kernels import launch as module

    ours, first = module.launch, module._first
    made: list[dict[str, Any]] = []
    misses: list[str] = []

    def counted(kernel: Any, *rest: Any) -> Any:
        misses.append(kernel.fn.__name__)
        return first(kernel, *rest)

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        misses.clear()
        with stub.recorded() as mine:
            ours(kernel, grid, *args, **constants)
        with stub.recorded() as theirs:
            kernel[grid](*args, **constants)
        pointers = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
        made.append(
            {
                "kernel": kernel.fn.__name__,
                "ours": mine,
                "theirs": theirs,
                "missed": bool(misses),
                "pointers": len(pointers),
                "pointers passed": len(pointers.intersection(theirs[0].values)),
            }
        )

    module._first = counted  # type: ignore[assignment]
    for loaded in list(sys.modules.values()):
        if loaded.__name__.startswith("resnetv2.kernels") and getattr(loaded, "launch", 0) is ours:
            loaded.launch = launch  # type: ignore[attr-defined]
    return made


def blocks() -> dict[str, torch.nn.Module]:
    from resnetv2 import BottleneckPreActBlock, PreActBlock

    return {
        "basic": PreActBlock(16, 16),
        "basic, strided": PreActBlock(16, 32, stride=2),
        "bottleneck": BottleneckPreActBlock(64, 64),
        "bottleneck, strided": BottleneckPreActBlock(64, 128, stride=2),
    }


def step(block: torch.nn.Module, x: torch.Tensor, precision: str) -> None:
    execution.PROGRAMS.clear()  # a replay does not come through ``launch``
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        out = block(x)
    out.float().sum().backward()


def main() -> int:
    stub = stub_driver.install()
    import triton

    from resnetv2.kernels import dispatch, moments

    os.environ["RESNETV2_BACKEND"] = "triton"
    dispatch.TritonEngine()  # imports the kernels
    made = both_ways(stub)
    # Outside of kernels these cost 4 us a call.
    triton.cdiv = triton.next_power_of_2 = None
    result: dict[str, Any] = {}
    warnings.simplefilter("error")
    for precision in ("bfloat16", "float32"):
        for name, block in blocks().items():
            block.to(memory_format=torch.channels_last)
            channels = 16 if name.startswith("basic") else 64
            x = torch.randn(3, channels, 8, 8).to(memory_format=torch.channels_last)
            step(block, x, precision)
            first = len(made)
            step(block, x, precision)
            result[f"{name}, {precision}"] = made[first:]
            made.clear()

    # One element off a 16-byte boundary: another kernel.
    storage = torch.empty(2 * 24 * 64 + 1)
    tensors = [storage[at : at + 2 * 24 * 64].view(2, 8, 8, 24) for at in (0, 1, 0, 1)]
    for x in tensors:
        moments.moments(x.permute(0, 3, 1, 2))
    result["alignment"] = list(made)
    made.clear()

    block, x = blocks()["basic"], torch.randn(3, 16, 8, 8).to(memory_format=torch.channels_last)
    block.to(memory_format=torch.channels_last)
    for allowed in (False, True, False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        step(block, x, "float32")
    count = len(made) // 4
    result["tf32"] = [made[i * count : (i + 1) * count] for i in range(4)]

    calls: list[Any] = []
    triton.knobs.runtime.launch_enter_hook.add(lambda about: calls.append(about.get()["name"]))
    triton.knobs.runtime.launch_exit_hook.add(lambda about: calls.append("end"))
    moments.moments(tensors[0].permute(0, 3, 1, 2))
    result["hooks"] = calls
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
