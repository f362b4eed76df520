"""Launches of training steps by the project's ``launch``, by a program's replay and by Triton
itself, as JSON on stdout.

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
from torch.utils._python_dispatch import TorchDispatchMode

from resnetv2.core import execution, program, steps
from resnetv2.kernels.inspect import stub_driver

# Each kernel in both; each block in one.
PRECISIONS = ("float32", "bfloat16", "bfloat16", "float32")


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
            kernel[grid](*args, **constants, enable_fp_fusion=True)
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


def step(block: torch.nn.Module, x: torch.Tensor, precision: str, fresh: bool = True) -> None:
    if fresh:
        execution.PROGRAMS.clear()  # a replay does not come through ``launch``
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        out = block(x)
    out.float().sum().backward()


class Kept(TorchDispatchMode):
    """Keeps what operators return, so that no address comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self._results: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._results.append(func(*args, **(kwargs or {})))
        return self._results[-1]


class Pool:
    """Gives the same memory again from each start on, so that addresses can be compared."""

    def __init__(self) -> None:
        self._empty = torch.empty_strided
        self._made: list[torch.Tensor] = []
        self._next = 0

    def start(self) -> None:
        self._next = 0

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        if self._next == len(self._made):
            self._made.append(self._empty(*args, **options))
        self._next += 1
        return self._made[self._next - 1]


def replayed(
    stub: stub_driver.Stub,
    block: torch.nn.Module,
    x: torch.Tensor,
    precision: str,
    made: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Each launch of a step's two replays: by address, and the same one made by Triton."""
    from resnetv2.kernels import launch as module

    step(block, x, precision)
    pairs: list[dict[str, Any]] = []

    def both(self: program.Program, inputs: Any) -> list[torch.Tensor]:
        pool = Pool()
        torch.empty_strided = pool
        try:
            code = self._compile(module.start_of), self._compile(None)
            with Kept():
                with stub.recorded() as ours:
                    code[0](inputs, module.replay_stream())
                pool.start()
                made.clear()
                results = code[1](inputs, None)
        finally:
            torch.empty_strided = pool._empty
        assert len(ours) == len(made) > 0
        theirs = [one["theirs"][0] for one in made]
        # Results of ATen's operators lie elsewhere each time: one place in this, one in that.
        moved = {
            (a, b)
            for mine, other in zip(ours, theirs)
            for a, b in zip(mine.values, other.values)
            if a != b
        }
        assert len(moved) == len({a for a, _ in moved}) == len({b for _, b in moved})
        assert len(moved) <= sum(isinstance(step, steps.Call) for step in self.steps)
        assert all(min(pair) > 2**32 for pair in moved)
        place = dict(moved)
        pairs.extend(
            {
                "kernel": one["kernel"],
                "ours": mine._replace(values=tuple(place.get(v, v) for v in mine.values)),
                "theirs": other,
            }
            for one, mine, other in zip(made, ours, theirs)
        )
        return results

    replay, program.Program.__call__ = program.Program.__call__, both  # type: ignore[method-assign]
    try:
        step(block, x, precision, fresh=False)
    finally:
        program.Program.__call__ = replay  # type: ignore[method-assign]
    made.clear()
    return pairs


def main() -> int:
    stub = stub_driver.install()
    from resnetv2.kernels import ahead

    with ahead.one_at_a_time():
        print(json.dumps(launches(stub)))
    return 0


def launches(stub: stub_driver.Stub) -> dict[str, Any]:
    """What came of each launch, by what is launched."""
    import triton

    from resnetv2.kernels import moments, triton_engine

    os.environ["RESNETV2_BACKEND"] = "triton"
    triton_engine.TritonEngine()  # imports the kernels
    made = both_ways(stub)
    # Outside of kernels these cost 4 us a call.
    triton.cdiv = triton.next_power_of_2 = None
    result: dict[str, Any] = {}
    warnings.simplefilter("error")
    # A PyTorch with CUDA asks the stub for devices, and warns that it has none.
    warnings.filterwarnings("ignore", "CUDA initialization")
    # Triton 3.8 compiles by a form of Python's ast that is deprecated from 3.13 on.
    warnings.filterwarnings("ignore", "AnnAssign", DeprecationWarning)
    for (name, block), precision in zip(blocks().items(), PRECISIONS):
        block.to(memory_format=torch.channels_last)
        channels = 16 if name.startswith("basic") else 64
        x = torch.randn(3, channels, 8, 8).to(memory_format=torch.channels_last)
        step(block, x, precision)
        first = len(made)
        step(block, x, precision)
        result[name] = made[first:]
        result[f"{name}, replayed"] = replayed(stub, block, x, precision, made)
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
    return result


if __name__ == "__main__":
    sys.exit(main())
