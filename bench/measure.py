"""How a case is measured: each provider in a process of its own, in turns, once it is right.

A process of its own per provider, so that no allocator serves two and whatever one of them does,
down to dying, changes its own rows only. The processes take their samples in turns, round after
round, so that all see the same machine; a ratio is the median over rounds of the ratio within a
round. Nothing is timed before outputs and gradients agree with float64.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import DTYPES, Case, device
from bench.providers import COMPILE, EAGER, Provider
from resnetv2.data.host import keep_freed_memory
from resnetv2.planning.memory import peak_bytes

# A provider's error against float64 may be twice eager's (the project's yardstick), plus a few
# units in the last place, where eager has hardly any.
YARDSTICK = 2.0
ULPS = 16
# A value within rounding of 0 may get the other sign, and its gradient passes a ReLU or does not:
# in eager as anywhere, but not the same values. So many of the smallest activated tensor's
# gradients may be wrong altogether, where eager was lucky.
FLIPS = 4
# What is wrong by half is refused however wrong eager is: gradients of zero are wrong by 1.
MOST = 0.5
GATED = ("out", "dx", "gradients")
LEAST_SAMPLE = 0.06  # seconds: shorter steps are repeated within a sample


@dataclass(frozen=True)
class Settings:
    """seconds: of timing a case's mode, per provider. rounds: least and most.

    patience: seconds after which a provider's process is given up. threads: 0 for torch's own.
    """

    seconds: float = 1.5
    rounds: tuple[int, int] = (8, 17)
    patience: float = 240.0
    threads: int = 0


class Failure(Exception):  # noqa: N818 - an outcome to report, not an error of the benchmark
    """Why a provider has no figures for a case, in one line."""


# --- in the provider's process ------------------------------------------------------------------


def launched(step: Callable[[], Any]) -> int | None:
    """Kernels that ``step()`` runs on a GPU; None on a CPU, where nothing is launched."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(
        event.device_type() == DeviceType.CUDA and not event.name().startswith(("Memcpy", "Memset"))
        for event in profiler.profiler.kineto_results.events()
    )


class Worker:
    """One provider's side: holds a case and answers orders. Runs inline or in a process."""

    def __init__(self) -> None:
        self.case: Case | None = None
        self.graphs: dict[str, Any] = {}
        self.graph_outs: dict[str, Tensor] = {}
        self.graph_bytes: dict[str, int] = {}

    def build(self, case: Case, provider: Provider) -> None:
        """Prepare the case; nothing is run."""
        self.drop()
        self.case, self.provider = case, provider
        self.module = provider.prepare(case)
        self.x, self.target = case.inputs()

    def drop(self) -> None:
        """Forget the case."""
        self.case = self.module = self.x = self.target = None
        self.graphs.clear()
        self.graph_outs.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _autocast(self) -> Any:
        assert self.case is not None
        if self.case.dtype == "fp32":
            return nullcontext()
        return torch.autocast(device().type, DTYPES[self.case.dtype])

    def _clear(self) -> None:
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None

    def _step(self, mode: str) -> Tensor:
        """The workload once; the output."""
        assert self.case is not None
        with self._autocast():
            out = self.module(self.x)
            if mode == "forward":
                return out
            loss, gradient = self.case.loss(out, self.target)
        loss.backward(gradient)
        return out

    def _runner(self, mode: str) -> Callable[[], Any]:
        if not self.provider.graph:

            def run() -> None:
                self._clear()
                self._step(mode)

            return run
        if mode not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._clear()
                    self._step(mode)
            torch.cuda.current_stream().wait_stream(side)
            self._clear()
            graph = torch.cuda.CUDAGraph()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.cuda.graph(graph):
                self.graph_outs[mode] = self._step(mode)
            self.graph_bytes[mode] = torch.cuda.max_memory_allocated() - before
            self.graphs[mode] = graph
        return self.graphs[mode].replay

    def results(self) -> dict[str, Tensor]:
        """One forward and backward: "out", "dx", "grad NAME" and "buffer NAME", in float64."""
        if self.provider.graph:
            self._runner("forward+backward")()
            out = self.graph_outs["forward+backward"]
        else:
            self._clear()
            out = self._step("forward+backward")
        result = {"out": out}
        if self.x.grad is not None:
            result["dx"] = self.x.grad
        for name, parameter in _plain(self.module).named_parameters():
            if parameter.grad is None:
                raise Failure(f"no gradient for {name}")
            result[f"grad {name}"] = parameter.grad
        for name, buffer in _plain(self.module).named_buffers():
            if buffer.is_floating_point():
                result[f"buffer {name}"] = buffer
        return {name: tensor.detach().double().cpu() for name, tensor in result.items()}

    def reference(self, case: Case, path: str) -> None:
        """The case in float64 by eager PyTorch, saved to ``path``; unlike the rest, no provider."""
        plain = case._replace(dtype="fp32")
        self.case, self.provider = plain, Provider("float64", lambda case: None)
        self.module = plain.build(backend="eager", dtype=torch.float64)
        self.x, self.target = plain.inputs()
        self.x = self.x.detach().double().requires_grad_(self.x.requires_grad)
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
        run = self._runner(mode)
        _synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        _synchronize()
        return time.perf_counter() - start

    def peak(self, mode: str) -> int:
        """Most bytes that a step allocates beyond parameters and gradients."""
        run = self._runner(mode)
        if self.provider.graph:
            return self.graph_bytes[mode] - self._gradient_bytes(mode)
        self._clear()
        _synchronize()
        return peak_bytes(run, torch.cuda.is_available()) - self._gradient_bytes(mode)

    def _gradient_bytes(self, mode: str) -> int:
        if mode == "forward":
            return 0
        return sum(p.numel() * p.element_size() for p in _plain(self.module).parameters())

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
                self.sample("forward+backward", 1)
            peak = self.peak("forward+backward")
            parameters = self._gradient_bytes("forward+backward")
            buffers = sum(b.numel() * b.element_size() for b in _plain(self.module).buffers())
            return peak + 3 * parameters + buffers
        finally:
            self.drop()


def _plain(module: Any) -> nn.Module:
    """The module itself, without torch.compile's wrapper and the prefix that it gives to names."""
    return getattr(module, "_orig_mod", module)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reason(error: BaseException) -> str:
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
            reason = _reason(error)
            del error
            worker.drop()
            pipe.send((False, reason))


# --- in the process that measures ---------------------------------------------------------------


class Inline:
    """A host that carries out orders in this process: for tests."""

    def __init__(self, threads: int = 0) -> None:
        self.worker = Worker()
        self.answers: list[tuple[bool, Any]] = []

    def send(self, order: str, *arguments: Any) -> None:
        try:
            self.answers.append((True, getattr(self.worker, order)(*arguments)))
        except Exception as error:  # as in _serve
            self.answers.append((False, _reason(error)))

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


@dataclass
class Times:
    """A provider's samples of one mode: seconds a run, one per round; ratios within a round."""

    seconds: list[float]
    to_eager: list[float] = field(default_factory=list)
    to_compile: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """What is known of one provider for one case. problem: why there are no figures, or ""."""

    provider: Provider
    problem: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    times: dict[str, Times] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    launches: dict[str, int | None] = field(default_factory=dict)
    compile_seconds: float = 0.0


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def spread(values: Sequence[float]) -> float:
    """Distance between the 20th and the 80th percentile, over the median."""
    low, middle, high = quantiles(values)
    return (high - low) / middle


class Bench:
    """Runs cases over providers; keeps one host each for as long as it lives.

    Args:
        providers: eager among them. host: ``Process`` or, for tests, ``Inline``.
        say: is told what is going on, in a few words.
    """

    def __init__(
        self,
        providers: Sequence[Provider],
        settings: Settings,
        host: Callable[[int], Any] = Process,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.providers = list(providers)
        self.settings = settings
        self.say = say
        self.hosts = {p.name: host(settings.threads) for p in providers}
        self.reference = host(settings.threads)
        self.compiled: list[tuple[int, float]] = []  # (layers, seconds), of one suite
        self.compile_limit = math.inf
        self.checked: dict[Case, dict[str, Outcome]] = {}

    def close(self) -> None:
        """End all processes."""
        for host in (*self.hosts.values(), self.reference):
            host.close()

    def new_suite(self, compile_limit: float) -> None:
        """The cases that follow share ``compile_limit`` seconds of compiling."""
        self.compile_limit = compile_limit
        self.compiled.clear()

    def _skip(self, case: Case, provider: Provider) -> str:
        """Why a provider is not asked at all, or ""."""
        if provider.missing:
            return f"not run: {provider.missing}"
        if not provider.compiles or not self.compiled:
            return ""
        layers, seconds = self.compiled[-1]
        limit = self.compile_limit
        ahead = seconds * case.layers / layers
        if sum(s for _, s in self.compiled) + ahead <= limit:
            return ""
        return (
            f"not run: compiling {layers} layers took {seconds:.0f} s, {case.layers} layers would "
            f"pass the {limit:.0f} s that compiling may take in a suite"
        )

    def check(self, case: Case) -> dict[str, Outcome]:
        """Build the case everywhere and hold results against float64; times are not taken.

        An outcome without a problem is ready to be timed.
        """
        outcomes = {p.name: Outcome(p, self._skip(case, p)) for p in self.providers}
        asked = [o for o in outcomes.values() if not o.problem]
        self.say("float64")
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "reference.pt")
            self.reference.send("reference", case, path)
            self.reference.receive(self.settings.patience)
            self.say("building and checking")
            for outcome in asked:
                self.hosts[outcome.provider.name].send("build", case, outcome.provider)
            for outcome in asked:
                self._receive(outcome)
            asked = [o for o in asked if not o.problem]
            for outcome in asked:
                self.hosts[outcome.provider.name].send("errors", path)
            for outcome in asked:
                answer = self._receive(outcome)
                if answer is not None:
                    outcome.errors, seconds = answer
                    outcome.compile_seconds = seconds if outcome.provider.compiles else 0.0
        spent = [o.compile_seconds for o in asked if o.provider.compiles]
        if spent:
            self.compiled.append((case.layers, max(spent)))
        eager = outcomes[EAGER]
        for outcome in outcomes.values():
            if not outcome.problem:
                outcome.problem = disagreement(outcome.errors, eager.errors, case)
        self.checked[case] = outcomes
        return outcomes

    def _receive(self, outcome: Outcome) -> Any:
        """A host's answer; None, and ``outcome.problem`` says why, if it failed."""
        try:
            return self.hosts[outcome.provider.name].receive(self.settings.patience)
        except Failure as failure:
            text = str(failure)
            outcome.problem = text if text == "out of memory" else f"failed: {text}"
            return None

    def ask(self, outcome: Outcome, order: str, *arguments: Any) -> Any:
        """One order to one host, and its answer as ``_receive`` gives it."""
        self.hosts[outcome.provider.name].send(order, *arguments)
        return self._receive(outcome)

    def run(self, case: Case) -> dict[str, Outcome]:
        """Check a case, and time what is right: provider's name to what came out."""
        outcomes = self.check(case)
        try:
            for mode in case.modes:
                self._time(case, mode, outcomes)
            for mode in case.modes:
                self.say(f"memory, {mode}")
                for outcome in self._right(outcomes):
                    outcome.peaks[mode] = self.ask(outcome, "peak", mode)
                for outcome in self._right(outcomes):
                    outcome.launches[mode] = self.ask(outcome, "launches", mode)
        finally:
            self._drop(outcomes)
        return outcomes

    def check_only(self, case: Case) -> dict[str, Outcome]:
        """``check``, or its outcome where the case was checked before; nothing stays built."""
        if case not in self.checked:
            self._drop(self.check(case))
        return self.checked[case]

    def _drop(self, outcomes: dict[str, Outcome]) -> None:
        for outcome in outcomes.values():
            if outcome.errors:
                try:
                    self.hosts[outcome.provider.name].send("drop")
                    self.hosts[outcome.provider.name].receive(self.settings.patience)
                except Failure:
                    continue

    @staticmethod
    def _right(outcomes: dict[str, Outcome]) -> list[Outcome]:
        return [outcome for outcome in outcomes.values() if not outcome.problem]

    def _time(self, case: Case, mode: str, outcomes: dict[str, Outcome]) -> None:
        """Warm up, then rounds in which every provider takes one sample, in a rotating order."""
        self.say(f"warming up, {mode}")
        seconds = {}
        for _ in range(2):  # first steps fault their pages in
            for outcome in self._right(outcomes):
                seconds[outcome.provider.name] = self.ask(outcome, "sample", mode, 1)
        eager = seconds.get(EAGER)
        if not eager:
            return
        repeats = max(1, math.ceil(LEAST_SAMPLE / eager))
        least, most = self.settings.rounds
        rounds = max(least, min(most, int(self.settings.seconds / (repeats * eager))))
        samples: dict[str, list[float]] = {o.provider.name: [] for o in self._right(outcomes)}
        for number in range(rounds):
            self.say(f"{mode}, round {number + 1} of {rounds}")
            order = self._right(outcomes)
            if not order:
                return
            turn = number % len(order)
            for outcome in order[turn:] + order[:turn]:
                taken = self.ask(outcome, "sample", mode, repeats)
                if taken is not None:
                    samples[outcome.provider.name].append(taken / repeats)
        for outcome in self._right(outcomes):
            mine = samples[outcome.provider.name]
            times = Times(mine)
            for base, ratios in ((EAGER, times.to_eager), (COMPILE, times.to_compile)):
                if base in samples and len(samples[base]) == len(mine):
                    ratios += [a / b for a, b in zip(mine, samples[base])]
            outcome.times[mode] = times


def disagreement(errors: dict[str, float], eager: dict[str, float], case: Case) -> str:
    """Why a provider's results are refused, or "": errors against float64, eager's beside them."""
    if not eager:
        return "not run: eager, which it is held against, has no results"
    rounding = ULPS * torch.finfo(DTYPES[case.dtype]).eps
    flipped = math.sqrt(FLIPS / case.narrowest)
    for kind in GATED:
        slack = rounding if kind == "out" else rounding + flipped
        if kind not in eager:
            continue
        if not errors[kind] <= min(YARDSTICK * eager[kind] + slack, MOST):
            return (
                f"refused: relative error of {kind} {errors[kind]:.1e}, eager's {eager[kind]:.1e}"
            )
    return ""
