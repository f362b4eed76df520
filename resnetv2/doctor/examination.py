"""The checks of ``resnetv2.doctor()``, in their order."""

from __future__ import annotations

import functools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

import torch

from ..kernels.fallback import FallbackWarning
from ..measuring.cases import STEP, Case, device, network
from ..measuring.providers import COMPILE, EAGER, Provider, compiled, eager, memory_mode
from ..measuring.rounds import Bench, Outcome, Settings
from ..measuring.worker import Failure, Inline, Process, Worker, reason_of
from ..names import DTYPES, MEMORY_MODES
from .report import NOT_CHECKED, RIGHT, WRONG, Check, Diagnosis
from .surroundings import backend_of, environment
from .verdict import verdict

OURS = MEMORY_MODES[0]
GRAPH = " + graph"
# Seconds after which nothing new is begun, so that all is over within 30 and 180.
_LIMITS = {True: 22.0, False: 130.0}
# The share of it after which nothing of a part is begun.
_SHARES = {"kernel": 0.35, "unit": 0.45, "bits": 0.55, "speed": 1.0}
# Seconds that torch.compile may take in all.
_COMPILING = 40.0
# Units held against float64: block, channels in and out, stride, pixels, images, norm, activation.
_SHAPES = (
    ("basic", 17, 17, 1, 13, 3, "batch", "relu"),
    ("basic", 9, 21, 2, 11, 2, "batch", "relu"),
    ("bottleneck", 68, 68, 1, 7, 3, "batch", "relu"),
    ("bottleneck", 24, 52, 2, 9, 3, "batch", "relu"),
    ("basic", 15, 21, 2, 9, 3, "group:3", "silu"),
)


class _Examination:
    """One run of all checks."""

    def __init__(self, quick: bool, say: Callable[[str], None]) -> None:
        self.quick = quick
        self.begun = time.perf_counter()
        self.limit = _LIMITS[quick]
        self.say = say
        self.device = device()
        self.cuda = self.device.type == "cuda"
        self.backend = backend_of(self.device)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    def late(self, part: str) -> str:
        """Why nothing more of a part is begun, or ""."""
        limit = _SHARES[part] * self.limit
        return f"the {limit:.0f} s until it were over" if self.seconds > limit else ""

    @functools.cached_property
    def dtypes(self) -> list[str]:
        """Names of the dtypes that the device multiplies in."""
        if not self.cuda:
            return ["fp32", "bf16"]
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return [name for name in DTYPES if name != "bf16" or has_bf16]

    # --- kernels --------------------------------------------------------------------------------

    def kernels(self) -> Iterator[Check]:
        """Every kernel's result against float64."""
        if self.backend != "triton":
            yield Check("kernel", "Triton's kernels", NOT_CHECKED, self._why_no_kernels())
            return
        from ..kernels.inspect.cases import DTYPES as KERNEL_DTYPES
        from ..kernels.inspect.cases import ODD

        known = [name for name in KERNEL_DTYPES if name.partition("+")[0] in self.dtypes]
        if not self.cuda:
            from ..kernels.inspect import interpreter

            interpreter.prepare()
        elif torch.cuda.get_device_capability()[0] >= 8 and torch.version.hip is None:
            known.insert(1, "tf32")
        for number, unit in enumerate(ODD):
            for dtype in [known[number % len(known)]] if self.quick else known:
                name = f"{unit.name}, {dtype}"
                if reason := self.late("kernel"):
                    yield Check("kernel", name, NOT_CHECKED, reason)
                else:
                    self.say(f"kernels: {name}")
                    yield from _steps(unit, dtype, self.device)

    def _why_no_kernels(self) -> str:
        if os.environ.get("RESNETV2_BACKEND") == "aten":
            return "RESNETV2_BACKEND=aten leaves them out"
        if self.cuda:
            return "ATen's kernels run on this GPU, or triton is not installed"
        return "they need a GPU, or Triton's interpreter (TRITON_INTERPRET=1)"

    # --- units and bits -------------------------------------------------------------------------

    def provider(self, memory: str, graph: bool = False) -> Provider:
        """This project in a memory mode."""
        prepare = functools.partial(memory_mode, memory=memory, backend=self.backend)
        return Provider(memory + GRAPH * graph, prepare, ours=True, graph=graph)

    def units(self) -> Iterator[Check]:
        """Whole units of odd shapes against float64, eager beside them."""
        modes = [self.provider(memory) for memory in MEMORY_MODES]
        bench = Bench([Provider(EAGER, eager), *modes], Settings(), host=Inline)
        for number, (block, c, k, stride, size, batch, norm, act) in enumerate(_SHAPES):
            dtypes = self.dtypes
            for dtype in [dtypes[number % len(dtypes)]] if self.quick else dtypes:
                name = f"{block} {c}>{k}" + f" /{stride}" * (stride > 1)
                name += f", {norm}, {act}" * (norm != "batch") + f", {dtype}"
                case = Case(name, block, batch, 0, c, k, stride, size, dtype, norm=norm, act=act)
                if reason := self.late("unit"):
                    yield Check("unit", name, NOT_CHECKED, reason)
                    continue
                self.say(f"units: {name}")
                yield from self._checked(bench, case)
        bench.close()

    def _checked(self, bench: Bench, case: Case) -> Iterator[Check]:
        try:
            outcomes = bench.check_only(case)
        except Failure as failure:  # of the float64 reference
            yield Check("unit", case.name, NOT_CHECKED, f"float64: {failure}")
            return
        for outcome in outcomes.values():
            name = f"{case.name}, {outcome.provider.name}"
            yield Check("unit", name, *_state(outcome.problem))

    def bits(self, worker: Callable[[], Worker] = Worker) -> Iterator[Check]:
        """Two runs from the same state, and a run in a CUDA graph, have the same bits."""
        dtype = "bf16" if self.cuda and "bf16" in self.dtypes else "fp32"
        case = Case("bits", "bottleneck", 4, 0, 64, 64, 1, 16, dtype, units=3)
        for memory in MEMORY_MODES if not self.quick else (OURS, MEMORY_MODES[-1]):
            self.say(f"bits: {memory}")
            if reason := self.late("bits"):
                yield Check("bits", memory, NOT_CHECKED, reason)
                continue
            first, again = (self._results(worker(), case, memory, False) for _ in range(2))
            yield _same(f"{memory}, twice", first, again)
            if self.cuda or worker is not Worker:
                graphed = self._results(worker(), case, memory, True)
                # The warm-up's steps have moved the running statistics.
                graphed = {n: v for n, v in graphed.items() if not n.startswith("buffer")}
                yield _same(f"{memory}, in a CUDA graph", first, graphed)
            else:
                name = f"{memory}, in a CUDA graph"
                yield Check("bits", name, NOT_CHECKED, "CUDA graphs need a GPU")

    def _results(
        self, worker: Worker, case: Case, memory: str, graph: bool
    ) -> dict[str, torch.Tensor]:
        try:
            worker.build(case, self.provider(memory, graph))
            return worker.results()
        finally:
            worker.drop()

    # --- speed ----------------------------------------------------------------------------------

    def speeds(self) -> Iterator[Check]:
        """A unit, a stage and a deep net: time, peak and host time of a step."""
        providers = self._providers()
        settings = Settings(0.3, (3, 6), 45.0) if self.quick else Settings(1.0, (5, 12), 60.0)
        bench = Bench(providers, settings, host=Inline if self.quick else Process)
        bench.new_suite(_COMPILING)
        try:
            for case, modes in self._cases():
                if reason := self.late("speed"):
                    yield Check("speed", case.name, NOT_CHECKED, reason)
                    continue
                bench.say = functools.partial(self._said, case.name)
                bench.providers = [p for p in providers if modes or not _beside(p)]
                yield from self._timed(bench, case)
        finally:
            bench.close()

    def _said(self, case: str, text: str) -> None:
        self.say(f"speed: {case}: {text}")

    def _providers(self) -> list[Provider]:
        plain = [Provider(EAGER, eager)]
        if not self.quick:
            plain.append(Provider(COMPILE, compiled, compiles=True))
        plain += [self.provider(memory) for memory in MEMORY_MODES]
        graphed = [p._replace(name=p.name + GRAPH, graph=True) for p in plain if not _beside(p)]
        return plain + (graphed if self.cuda else [])

    def _cases(self) -> list[tuple[Case, bool]]:
        """What is timed, and whether in all memory modes."""
        dtype = ("bf16" if "bf16" in self.dtypes else "fp16") if self.cuda else "fp32"
        batch = 128 if self.cuda else 4
        unit = Case("a unit", "bottleneck", batch, 0, 64, 64, dtype=dtype)
        stage = unit._replace(name="a stage of 6 units", units=6)
        depth, images = (164, 64) if self.cuda else (164, 2)
        if self.cuda and not self.quick:
            depth, images = 1001, 32
        deep = network("bottleneck", depth, images, dtype)._replace(name=f"a net of {depth} layers")
        # A CPU has no time for all of a deep net's modes.
        return [(unit, False), (stage, True), (deep, self.cuda and not self.quick)]

    def _timed(self, bench: Bench, case: Case) -> Iterator[Check]:
        try:
            outcomes = bench.run(case)
            hosts = self._host_seconds(case, outcomes) if self.cuda else {}
        except Failure as failure:  # of the float64 reference
            yield Check("speed", case.name, NOT_CHECKED, f"float64: {failure}")
            return
        base = outcomes[EAGER]
        for name, outcome in outcomes.items():
            figures = _figures(outcome, base)
            if name in hosts:
                figures["host_seconds"] = hosts[name]
            state, detail = _state(outcome.problem)
            if outcome.provider.compiles and state == WRONG:
                state = NOT_CHECKED  # not this project's
            yield Check("speed", f"{case.name}, {name}", state, detail, figures)

    def _host_seconds(self, case: Case, outcomes: dict[str, Outcome]) -> dict[str, float]:
        """By provider: in this process, of what does not compile."""
        found = {}
        worker = Worker()
        for name, outcome in outcomes.items():
            if outcome.times and not outcome.provider.compiles:
                worker.build(case, outcome.provider)
                worker.sample(STEP, 2)
                found[name] = worker.host(STEP)
        worker.drop()
        return found


def _until_it_fails(part: str, checks: Iterator[Check]) -> Iterator[Check]:
    """The checks; whatever is raised meanwhile is the last one."""
    try:
        yield from checks
    except Exception as error:
        yield Check(part, "what comes after", *_state(f"failed: {reason_of(error)}"))


def _beside(provider: Provider) -> bool:
    """Whether it is a memory mode beside the default."""
    return provider.ours and provider.name.removesuffix(GRAPH) != OURS


def _steps(unit: Any, dtype: str, where: torch.device) -> Iterator[Check]:
    """A unit's steps on the kernels."""
    from ..kernels.inspect.accuracy import Steps

    steps = Steps(unit, dtype, where)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", FallbackWarning)
        labels = steps.labels()
    fallbacks = "; ".join(dict.fromkeys(str(each.message) for each in caught))
    for label in labels:
        name = f"{unit.name}, {label}, {dtype}"
        if label in steps.failures:
            yield Check("kernel", name, WRONG, steps.failures[label])
            continue
        tensor, excess = steps.check(label).worst()
        figures = {"of_allowed": excess} if excess < float("inf") else {}
        if excess <= 1:
            yield Check("kernel", name, RIGHT, fallbacks, figures)
            fallbacks = ""  # said once
        else:
            kernels = ", ".join(steps.kernels[label])
            detail = f"{tensor} is off by {excess:.3g} of the allowed error ({kernels})"
            yield Check("kernel", name, WRONG, detail, figures)


def _state(problem: str) -> tuple[str, str]:
    """State and detail of an outcome's ``problem``: what did not fit or was not asked is open."""
    if not problem:
        return RIGHT, ""
    open_ = problem.startswith("not run: ") or problem.endswith("out of memory")
    return (NOT_CHECKED if open_ else WRONG), problem.removeprefix("not run: ")


def _same(name: str, first: dict[str, torch.Tensor], again: dict[str, torch.Tensor]) -> Check:
    different = [key for key, value in again.items() if not torch.equal(value, first[key])]
    if different:
        return Check("bits", name, WRONG, f"other bits in {', '.join(different[:3])}")
    return Check("bits", name, RIGHT)


def _figures(outcome: Outcome, base: Outcome) -> dict[str, float]:
    figures: dict[str, float] = {}
    times = outcome.times.get(STEP)
    if times is not None and times.seconds:
        figures["seconds"] = statistics.median(times.seconds)
        if times.to_eager:
            figures["to_eager"] = statistics.median(times.to_eager)
    if outcome.peaks.get(STEP) is not None:
        figures["peak_bytes"] = float(outcome.peaks[STEP])
        if base.peaks.get(STEP):
            figures["peak_to_eager"] = outcome.peaks[STEP] / base.peaks[STEP]
    return figures


def examine(quick: bool, say: Callable[[str], None]) -> Diagnosis:
    """``resnetv2.doctor``."""
    examination = _Examination(quick, say)
    facts = environment(examination.device)
    checks: list[Check] = []
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic
    cudnn.deterministic = True  # as training has it: equal bits need it
    try:
        with torch.random.fork_rng(devices=[examination.device] if examination.cuda else []):
            for part, found in (
                ("kernel", examination.kernels()),
                ("unit", examination.units()),
                ("bits", examination.bits()),
                ("speed", examination.speeds()),
            ):
                checks += _until_it_fails(part, found)
    finally:
        cudnn.deterministic = before
    return Diagnosis(
        facts,
        tuple(checks),
        verdict(checks, facts, OURS, EAGER),
        quick,
        examination.seconds,
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
