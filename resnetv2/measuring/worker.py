"""A provider's side of a measurement: it builds a case and runs it, in a process of its own.

So no allocator serves two providers, and whatever one of them does, down to dying, changes its own
rows only.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data.host import keep_freed_memory
from ..kernels.inspect import host_time
from ..names import DTYPES
from ..planning.memory import quiet_profiler
from ..training.capture import CudaRecorder, Recorder
from ..training.step import WARMUP_STEPS
from .cases import STEP, Case, device
from .providers import Provider
from .steps import GradientStep, plain


class Failure(Exception):  # noqa: N818 - an outcome to report, not an error of the benchmark
    """Why a provider has no figures for a case, in one line."""


def launched(step: Callable[[], Any]) -> int | None:
    """Kernels that ``step()`` runs on a GPU; None on a CPU, where nothing is launched."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    quiet_profiler()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(
        event.device_type() == DeviceType.CUDA and not event.name().startswith(("Memcpy", "Memset"))
        for event in profiler.profiler.kineto_results.events()
    )


class Worker:
    """One provider's side: holds a case and answers orders. Runs inline or in a process.

    recorder: what captures a step in a CUDA graph, for tests.
    """

    def __init__(self, recorder: Callable[[torch.device], Recorder] = CudaRecorder) -> None:
        self.recorder = recorder
        self.case: Case | None = None
        self._step: GradientStep | None = None
        self.graphs: dict[str, Recorder] = {}
        self.graph_outs: dict[str, Tensor] = {}
        self.graph_bytes: dict[str, int] = {}
        self.built: list[tuple[Case, GradientStep]] = []

    def build(self, case: Case, provider: Provider) -> None:
        """Prepare the case; nothing is run."""
        self.drop()
        self.case, self.provider = case, provider
        self._step = self._made(provider.prepare(case), *case.inputs())

    def drop(self) -> None:
        """Forget the case."""
        if self._step is None and not self.built:
            return  # collecting garbage takes tenths of a second
        self.case = self._step = None
        self.built = []
        self.graphs.clear()
        self.graph_outs.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def step(self) -> GradientStep:
        """The case's workload."""
        assert self._step is not None
        return self._step

    def _made(self, module: Any, x: Tensor, target: Tensor) -> GradientStep:
        assert self.case is not None
        return GradientStep(module, x, target, self.case.loss, DTYPES[self.case.dtype])

    def _run(self, mode: str) -> Tensor:
        """The workload once; the output."""
        return self.step.forward() if mode == "forward" else self.step()

    def _runner(self, mode: str) -> Callable[[], Any]:
        if not self.provider.graph:

            def run() -> None:
                self.step.clear()
                self._run(mode)

            return run
        if mode not in self.graphs:
            recorder = self.recorder(device())

            def step() -> Tensor:
                self.step.clear()
                return self._run(mode)

            for _ in range(WARMUP_STEPS):
                recorder.run(step)
            self.step.clear()
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if cuda else 0
            self.graph_outs[mode] = recorder.capture(step)
            self.graph_bytes[mode] = (torch.cuda.max_memory_allocated() if cuda else 0) - before
            self.graphs[mode] = recorder
        return self.graphs[mode].replay

    def results(self) -> dict[str, Tensor]:
        """One forward and backward: "out", "dx", "grad NAME" and "buffer NAME", in float64."""
        if self.provider.graph:
            self._runner(STEP)()
            out = self.graph_outs[STEP]
        else:
            self.step.clear()
            out = self._run(STEP)
        result = {"out": out}
        if self.step.x.grad is not None:
            result["dx"] = self.step.x.grad
        for name, parameter in plain(self.step.module).named_parameters():
            if parameter.grad is None:
                raise Failure(f"no gradient for {name}")
            result[f"grad {name}"] = parameter.grad
        for name, buffer in plain(self.step.module).named_buffers():
            if buffer.is_floating_point():
                result[f"buffer {name}"] = buffer
        return {name: tensor.detach().double().cpu() for name, tensor in result.items()}

    def reference(self, case: Case, path: str) -> None:
        """The case in float64 by eager PyTorch, saved to ``path``; unlike the rest, no provider."""
        fp32 = case._replace(dtype="fp32")
        self.case, self.provider = fp32, Provider("float64", lambda case: None)
        x, target = fp32.inputs()
        x = x.detach().double().requires_grad_(x.requires_grad)
        self._step = self._made(fp32.build(backend="eager", dtype=torch.float64), x, target)
        torch.save(self.results(), path)
        self.drop()

    def errors(self, path: str) -> tuple[dict[str, float], float]:
        """Relative distance to ``reference``'s results of "out", "dx", "gradients", "buffers";
        and the seconds that the first step took, compiling included.

        The Euclidean norm over all elements of all tensors of a kind, over the same of the
        reference.
        """
        exact = torch.load(path)
        threads = torch.get_num_threads()
        if not self.provider.compiles:
            # All providers do this at once, and threads that wait for a taken core are slow. What
            # is compiled here has the number of threads that it will be timed with.
            torch.set_num_threads(1)
        start = time.perf_counter()
        mine = self.results()
        seconds = time.perf_counter() - start
        torch.set_num_threads(threads)
        if mine.keys() != exact.keys():
            differing = sorted(mine.keys() ^ exact.keys())
            raise Failure(f"other results than the reference: {differing[0]}")
        kinds = {"out": "out", "dx": "dx", "grad": "gradients", "buffer": "buffers"}
        sums: dict[str, list[float]] = {}
        for name, value in exact.items():
            total = sums.setdefault(kinds[name.split()[0]], [0.0, 0.0])
            if mine[name].shape != value.shape:
                raise Failure(f"{name} has shape {tuple(mine[name].shape)}")
            total[0] += float((mine[name] - value).square().sum())
            total[1] += float(value.square().sum())
        return {kind: math.sqrt(error / size) for kind, (error, size) in sums.items()}, seconds

    def sample(self, mode: str, repeats: int) -> float:
        """Seconds for ``repeats`` runs."""
        return self.step.seconds(self._runner(mode), repeats)

    def host_build(self, cases: list[Case], provider: Provider) -> None:
        """Prepare several cases, whose steps ``host_seconds`` and ``host_calls`` take in turns."""
        self.drop()
        built = []
        for case in cases:
            self.build(case, provider)
            built.append((case, self.step))
        self.built = built

    def _each(self, figure: Callable[[Callable[[], Any]], Any]) -> list[Any]:
        result = []
        for built in self.built:
            self.case, self._step = built
            self.step.clear()
            result.append(figure(self.step))
        return result

    def host_seconds(self) -> list[float]:
        """Processor time of a step of each case."""
        return self._each(host_time.seconds)

    def host_calls(self) -> list[int] | None:
        """Python functions entered in a step of each case; None where others' threads do so."""
        return None if torch.cuda.is_available() else self._each(host_time.calls)

    def peak(self, mode: str) -> int:
        """Most bytes that a step allocates beyond parameters and gradients."""
        run = self._runner(mode)
        if self.provider.graph:
            return self.graph_bytes[mode] - self._gradient_bytes(mode)
        return self.step.peak(run) - self._gradient_bytes(mode)

    def _gradient_bytes(self, mode: str) -> int:
        return 0 if mode == "forward" else self.step.gradient_bytes()

    def host(self, mode: str) -> float:
        """Processor time of a run in seconds, the least of three: on a CPU, all of it."""
        run = self._runner(mode)
        return min(host_time.seconds(run) for _ in range(3))

    def launches(self, mode: str) -> int | None:
        """Kernels a step runs on a GPU."""
        return launched(self._runner(mode))

    def need(self, case: Case, provider: Provider) -> int:
        """Bytes that a training step needs in all: parameters, momentum, gradients and the rest.

        A step is run for it; the module is dropped again.
        """
        self.build(case, provider)
        try:
            if torch.cuda.is_available():  # the first step also allocates cuDNN's workspaces
                self.sample(STEP, 1)
            peak = self.peak(STEP)
            parameters = self._gradient_bytes(STEP)
            buffers = sum(b.numel() * b.element_size() for b in plain(self.step.module).buffers())
            return peak + 3 * parameters + buffers
        finally:
            self.drop()


def reason_of(error: BaseException) -> str:
    """One line for a row: what went wrong."""
    if isinstance(error, Failure):
        return str(error)
    text = str(error).strip().splitlines() or [""]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in text[0]:
        return "out of memory"
    return f"{type(error).__name__}: {text[0]}"[:200]


def _serve(pipe: Any, threads: int) -> None:
    """A provider's process: carries out orders until the pipe closes."""
    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    worker = Worker()
    while True:
        try:
            order, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(worker, order)(*arguments)))
        except Exception as error:  # whatever a provider raises is a row, not a crash
            reason = reason_of(error)
            del error
            worker.drop()
            pipe.send((False, reason))


class Inline:
    """A host that carries out orders in this process: for tests."""

    def __init__(self, threads: int = 0) -> None:
        self.worker = Worker()
        self.answers: list[tuple[bool, Any]] = []

    def send(self, order: str, *arguments: Any) -> None:
        try:
            self.answers.append((True, getattr(self.worker, order)(*arguments)))
        except Exception as error:  # as in _serve
            self.answers.append((False, reason_of(error)))

    def receive(self, patience: float) -> Any:
        right, answer = self.answers.pop(0)
        if not right:
            raise Failure(answer)
        return answer

    def close(self) -> None:
        self.worker.drop()


class Process:
    """A host that carries out orders in a process of its own, started again if it dies."""

    def __init__(self, threads: int = 0) -> None:
        self.threads = threads
        self.process: Any = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.threads), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, order: str, *arguments: Any) -> None:
        if self.process is None:
            self._start()
        try:
            self.pipe.send((order, *arguments))
        except OSError:  # it died since it last answered
            self._kill()
            self._start()
            self.pipe.send((order, *arguments))

    def receive(self, patience: float) -> Any:
        if not self.pipe.poll(patience):
            self._kill()
            raise Failure(f"gave up after {patience:.0f} s")
        try:
            right, answer = self.pipe.recv()
        except EOFError:
            self._kill()
            raise Failure("the process died, as it does where memory ends") from None
        if not right:
            raise Failure(answer)
        return answer

    def _kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.process = None

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.pipe.close()
            self.process.join(timeout=10)
            if self.process.is_alive():
                self._kill()
            self.process = None
