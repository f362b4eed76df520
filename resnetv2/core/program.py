"""A chain's work for one set of shapes, recorded once and replayed.

``record`` runs a function of tensors once, as it is, while a ``Recorder`` writes down the steps
that reach the device: kernel launches, ATen operators, calls of Python functions (collectives). The
``Program`` does the same steps to other tensors of the same shapes without the Python that decided
on them. ``tidy`` takes superfluous steps out; ``replay`` writes the rest as code without branches,
compiled once, in which a launch is a call of Triton's launcher with addresses filled in.

Temporaries that only kernels touch lie in one arena, which a replay takes from PyTorch's allocator
as a whole; their offsets are planned from their first and last uses. Results are tensors of their
own. All that a Program depends on besides its inputs' values must be in the key under which it is
kept (``Programs``).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import recording
from .recorder import Recorder
from .replay import Code
from .steps import Alloc, Call, Cost, Launch, is_view, uses
from .tidy import place_in_arena, tidy


class Program:
    """Recorded steps as one function of tensors like those that they were recorded with.

    Args:
        recorder: what was recorded. inputs: how many tensors the function takes. outputs: the
            registers of its results. device: where it runs.

    Attributes:
        steps: in order, without views that nothing reads. arena: bytes of the temporaries that only
        kernels touch. faults: what a replay raises where a kernel can no longer be had.
    """

    def __init__(
        self, recorder: Recorder, inputs: int, outputs: Sequence[int], device: torch.device
    ) -> None:
        self.device = device
        self.inputs = inputs
        self.outputs = tuple(outputs)
        self.roots = [root for root, _ in recorder.roots]
        self._storages = recorder.storages
        self.steps = tidy(recorder.steps, self.outputs, self.roots, recorder.views)
        self.offsets, self.arena = place_in_arena(self.steps, self.outputs, self.roots)
        launches = [step for step in self.steps if isinstance(step, Launch)]
        # kernels.launch, where all launches can be started again without Triton's own launcher.
        self._launcher: Any = None
        self.faults: tuple[type[Exception], ...] = ()
        if launches:
            from ..kernels import launch

            self.faults = (launch.KernelError,)
            if all(step.compiled is not None for step in launches):
                self._launcher = launch
        self._fast: Callable[..., list[Tensor]] | None = None
        self._slow: Callable[..., list[Tensor]] | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results for ``inputs``."""
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self(inputs)
        stream = self._launcher.replay_stream() if self._launcher is not None else None
        if stream is None:
            if self._slow is None:
                self._slow = self._compile(None)
            return self._slow(inputs, stream)
        if self._fast is None:
            self._fast = self._compile(self._launcher.start_of)
        return self._fast(inputs, stream)

    def _compile(self, start_of: Callable[[Any], Any] | None) -> Callable[..., list[Tensor]]:
        return Code(self.inputs, self.offsets, self.arena, self.device, start_of).compile(
            self.steps, self.outputs
        )

    def allocs(self) -> dict[int, Alloc]:
        """Tensors that are made without a value, by register."""
        return {step.register: step for step in self.steps if isinstance(step, Alloc)}

    @functools.cached_property
    def costs(self) -> list[Cost]:
        """The costs of launches and calls, in order, views left out."""
        found = []
        for step in self.steps:
            if isinstance(step, Launch):
                found.append(Cost(step.kernel.fn.__name__, step.moved, step.flops))
            elif isinstance(step, Call) and not is_view(step.function):
                name = getattr(step.function, "overloadpacket", step.function).__name__
                found.append(Cost(name, step.moved, step.flops))
        return found

    @functools.cached_property
    def peak(self) -> int:
        """Most bytes that a replay holds besides its inputs: the arena, results, and all between.

        A tensor is held from the step that makes it to the last one that uses it.
        """
        as_tensor, addressed = uses(self.steps, self.outputs)
        last: dict[int, int] = {}
        for number, places in (*as_tensor.items(), *addressed.items()):
            root = self.roots[number]
            last[root] = max(last.get(root, -1), *places)
        ending: dict[int, list[int]] = {}
        for root, place in last.items():
            ending.setdefault(place, []).append(root)
        held: dict[int, int] = {}
        alive = most = self.arena
        for place, step in enumerate(self.steps):
            made: dict[int, int] = {}
            scratch = 0
            if isinstance(step, Alloc) and step.register not in self.offsets:
                made[step.register] = step.nbytes
            elif isinstance(step, Call):
                scratch = step.scratch
                numbers = [number for number in step.results if number is not None]
                made = {self.roots[number]: self._storages[number] for number in numbers}
            for root, nbytes in made.items():
                if root >= self.inputs and root not in held:
                    held[root] = nbytes
                    alive += nbytes
            most = max(most, alive + scratch)
            for root in ending.get(place, ()):
                alive -= held.get(root, 0)
        return most


def record(
    function: Callable[..., tuple[Sequence[Tensor], Any]],
    inputs: Sequence[Tensor],
    device: torch.device,
) -> tuple[Program, list[Tensor], Any]:
    """Run ``function(*inputs)``, which gives tensors and something static, and record it.

    Returns the program, and what this run gave.
    """
    recorder = Recorder(inputs)
    with recording.to(recorder), recorder:
        results, static = function(*inputs)
    recorder.finish()
    outputs = [recorder.register_of(tensor) for tensor in results]
    return Program(recorder, len(inputs), outputs, device), list(results), static


class Programs:
    """The programs in use, by key; the one used least recently goes where there are too many.

    Args:
        limit: how many are kept.
        prepare: called with what is run and recorded next: its function, inputs and ``named``.
    """

    def __init__(
        self, limit: int, prepare: Callable[[Any, Sequence[Tensor], Any], None] | None = None
    ) -> None:
        self.limit = limit
        self._prepare = prepare
        # With each what its function gave that is static, and what its key names by identity.
        self._kept: OrderedDict[Hashable, tuple[Program, Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def run(
        self,
        key: Hashable,
        function: Callable[..., tuple[Sequence[Tensor], Any]],
        inputs: Sequence[Tensor],
        device: torch.device,
        named: Any = None,
    ) -> tuple[list[Tensor], Any]:
        """``function(*inputs)``: replayed, or run and recorded where ``key`` is new.

        named: what must live as long as the key, which has its id.
        """
        found = self._kept.get(key)
        if found is not None:
            with contextlib.suppress(KeyError):
                self._kept.move_to_end(key)
            try:
                return found[0](inputs), found[1]
            except found[0].faults:
                # Recorded anew, its kernel's replacement is chosen as at first (kernels.fallback).
                self._kept.pop(key, None)
        if self._prepare is not None:
            self._prepare(function, inputs, named)
        program, results, static = record(function, inputs, device)
        with self._lock:
            self._kept[key] = program, static, named
            while len(self._kept) > self.limit:
                self._kept.popitem(last=False)
        return results, static

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._kept.clear()
