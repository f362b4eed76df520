"""The benchmarks' own promises: wrong providers refused, failures their own rows, one schema."""

from dataclasses import replace

import pytest
import torch

from bench import cases, compare, report, schema
from bench.conftest import record
from bench.kernel_steps import measure as measure_kernels
from bench.providers import all_providers
from bench.schema import Row
from bench.suites import accuracy_rows, kernel_rows, largest, limit_rows, timed_rows
from resnetv2.measuring.cases import device
from resnetv2.measuring.providers import EAGER, Provider
from resnetv2.measuring.rounds import Bench, Settings, disagreement, quantiles, spread
from resnetv2.measuring.worker import Inline, Process

pytestmark = pytest.mark.usefixtures("one_thread")

TOY = cases.network("basic", 8, 2, "fp32")._replace(size=8)
SETTINGS = Settings(seconds=0.0, rounds=(2, 2), patience=120.0, threads=1)


def plain():
    """The providers that need no compiler."""
    return [p for p in all_providers() if not p.compiles and not p.missing]


def raises(case):
    raise RuntimeError("taken out")


def slightly_wrong(case):
    """Eager, but for one weight of many."""
    module = case.build(backend="eager")
    with torch.no_grad():
        module.stage2[0].conv1.weight[0, 0, 0, 0] += 0.01
    return module


def without_gradient(case):
    module = case.build(backend="eager")
    module.fc.bias.requires_grad_(False)
    return module


def out_of_memory(case):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB")


def run(providers, case=TOY, host=Inline):
    bench = Bench(providers, SETTINGS, host=host)
    try:
        outcomes = bench.run(case)
    finally:
        bench.close()
    return outcomes, list(timed_rows("depth", case, outcomes))


def test_standard_net():
    case = cases.standard("wide_resnet16_8", 2, "fp32")._replace(size=8)
    assert (case.layers, case.name) == (16, "wide_resnet16_8, batch 2")
    module = case.build(backend="aten")
    activated = []
    for child in module.modules():
        if isinstance(child, torch.nn.BatchNorm2d):
            child.register_forward_hook(lambda m, i, out: activated.append(out.numel()))
    images, labels = case.inputs()
    loss, _ = case.loss(module(images), labels)
    assert torch.isfinite(loss)
    assert case.narrowest == min(activated)
    with pytest.raises(ValueError, match="there is no net 'resnet50': choose from"):
        cases.standard("resnet50", 2, "fp32")


@pytest.fixture(scope="module")
def measured():
    return run(plain())


def test_every_provider_is_measured(measured):
    outcomes, rows = measured
    assert set(outcomes) == {p.name for p in plain()}
    for name in outcomes:
        mine = {r.metric: r for r in rows if r.provider == name}
        assert not outcomes[name].problem, name
        assert mine["time"].value > 0
        assert mine["time"].trials == 2
        assert mine["peak"].value > 0
        assert mine["throughput"].value == pytest.approx(1e3 * TOY.batch / mine["time"].value)
    eager = next(r for r in rows if r.provider == EAGER and r.metric == "time")
    assert eager.ratio_to_eager == 1


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (slightly_wrong, "refused: relative error of out"),
        (without_gradient, "failed: no gradient for fc.bias"),
        (raises, "failed: RuntimeError: taken out"),
        (out_of_memory, "out of memory"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_is_wrong_is_refused_and_has_no_figures(broken, reason):
    outcomes, rows = run([plain()[0], Provider("broken", broken)])
    mine = [r for r in rows if r.provider == "broken"]
    assert outcomes["broken"].problem.startswith(reason)
    assert [(r.value, r.note) for r in mine] == [(None, outcomes["broken"].problem)]
    assert not outcomes["broken"].times
    assert not outcomes["broken"].peaks
    assert all(r.value is not None for r in rows if r.provider == EAGER)


def test_disabling_this_project_changes_its_rows_only(measured):
    disabled = [p._replace(prepare=raises) if p.ours else p for p in plain()]
    _, rows = run(disabled)
    ours = {p.name for p in disabled if p.ours}
    assert ours
    for row in rows:
        assert (row.value is None) == (row.provider in ours), row

    def deterministic(found):
        return [
            (r.provider, r.metric, r.value)
            for r in found
            if r.provider not in ours and r.metric == "peak"
        ]

    assert deterministic(rows) == deterministic(measured[1])


def test_providers_in_processes_of_their_own(measured):
    providers = [plain()[0], Provider("broken", raises)]
    outcomes, rows = run(providers, host=Process)
    assert outcomes["broken"].problem == "failed: RuntimeError: taken out"
    inline = {(r.provider, r.metric): r.value for r in measured[1]}
    peak = next(r for r in rows if (r.provider, r.metric) == (EAGER, "peak"))
    assert peak.value == pytest.approx(inline[EAGER, "peak"], rel=0.02)


def test_compiling_has_a_limit():
    compiled = Provider("compile", plain()[0].prepare, compiles=True)
    bench = Bench([plain()[0], compiled], SETTINGS, host=Inline)
    bench.new_suite(10.0)
    bench.compiled.append((8, 6.0))
    assert "compiling 8 layers took 6 s, 14 layers would pass" in bench.skip(
        TOY._replace(depth=14), compiled
    )
    bench.new_suite(10.0)
    assert bench.skip(TOY._replace(depth=14), compiled) == ""


def test_peers_that_are_not_there_are_rows():
    peers = [p for p in all_providers(graphs=True) if p.missing]
    _, rows = run([plain()[0], *peers])
    notes = {r.provider: r.note for r in rows if r.value is None}
    assert notes == {p.name: f"not run: {p.missing}" for p in peers}
    if not torch.cuda.is_available():
        assert "attorch" in notes
        assert notes["eager + graph"] == "not run: CUDA graphs need a GPU"


UNIT = cases.unit("a unit", "basic", 16, 32, 64, "fp32")
ONE_VALUE = UNIT.narrowest**-0.5  # of the tensor's norm


@pytest.mark.parametrize(
    ("eager", "mine", "refused"),
    [
        ({"out": 1e-3}, {"out": 1.9e-3}, ""),
        ({"out": 1e-3}, {"out": 2.1e-3}, "out"),
        ({"out": 1e-3}, {"out": float("nan")}, "out"),
        ({"out": 1e-3, "gradients": 1e-3}, {"out": 1e-3, "gradients": 4e-3}, "gradients"),
        # Half wrong is wrong, whatever eager is.
        ({"gradients": 0.7}, {"gradients": 1.0}, "gradients"),
        # Where eager has rounding alone, a few values near 0 may have the other sign.
        ({"dx": 1e-6, "gradients": 1e-6}, {"dx": ONE_VALUE, "gradients": ONE_VALUE}, ""),
        ({"dx": 1e-6}, {"dx": 3 * ONE_VALUE}, "dx"),
        ({"out": 1e-6}, {"out": ONE_VALUE}, "out"),
    ],
)
def test_yardstick(eager, mine, refused):
    said = disagreement(mine, eager, UNIT)
    assert said.startswith(f"refused: relative error of {refused} " if refused else "")
    assert bool(said) == bool(refused)


def test_accuracy_rows(measured):
    rows = list(accuracy_rows(TOY, measured[0]))
    found = {(r.provider, r.metric): r for r in rows}
    assert 0 < found[EAGER, "error of gradients"].value < 1e-2
    assert found["recompute", "error of gradients"].ratio_to_eager <= 2
    # torch.utils.checkpoint moves running statistics twice (pytorch#96136), this project once.
    assert found["checkpoint", "error of buffers"].value > 1e-3
    assert found["segment", "error of buffers"].value < 1e-5


def test_quantiles():
    assert quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert quantiles([float(n) for n in range(11)]) == (2, 5, 8)
    assert spread([float(n) for n in range(11)]) == pytest.approx(6 / 5)


@pytest.mark.parametrize("first", [1, 2, 50])
def test_largest_is_the_largest(first):
    asked = []

    def needs(n):
        asked.append(n)
        return 1000 + 37 * n + 5 * (n % 3)

    n, used, trials = largest(needs, 5000, first)
    assert used == needs(n) <= 5000 < needs(n + 1)
    assert {n, n + 1} <= set(asked[:trials])
    assert trials <= 10
    assert largest(needs, 10, first)[0] == 0


def test_samples_reach_pytest_benchmark(benchmark):
    benchmark.skipped = True
    if not benchmark.enabled:
        pytest.skip("pytest-benchmark is switched off")
    record(benchmark, "a group", [1.0, 2.0, 6.0], {"peak_bytes": 7})
    found = benchmark.stats.as_dict(flat=True)
    assert (found["group"], found["extra_info"]) == ("a group", {"peak_bytes": 7})
    assert (found["median"], found["max"], found["rounds"]) == (2.0, 6.0, 3)


def test_limits_of_a_budget():
    providers = [p for p in plain() if p.name in (EAGER, "segment")]
    bench = Bench([*providers, Provider("broken", raises)], SETTINGS, host=Inline)
    rows = limit_rows(bench, TOY, "batch", 4 * 10**6, 2)
    eager, segment = rows[EAGER][1], rows["segment"][1]
    assert segment.value > eager.value > 1
    assert segment.ratio_to_eager == segment.value / eager.value
    assert rows["broken"][1].note == "failed: RuntimeError: taken out"


def test_kernel_rows():
    case = cases.unit("toy", "bottleneck", 16, 8, 2, "fp32")
    times = measure_kernels(case, 5, 0.0, lambda label: None)
    # On a CPU ATen's norm takes its moments itself.
    first = ["moments"] if device().type == "cuda" else []
    assert [t.name for t in times] == [
        *first,
        "1x1 16>4 forward",
        "3x3 4>4 forward",
        "1x1 4>16 forward + shortcut",
        "1x1 4>16 backward",
        "3x3 4>4 backward",
        "1x1 16>4 backward + shortcut",
    ]
    rates = {"copy cold": 1e9, "copy warm": 2e9, "multiply": 1e9}
    rows = list(kernel_rows(case, times, rates))
    for time in times:
        mine = {(r.mode, r.metric): r.value for r in rows if r.provider == time.name}
        gap = mine["cold", "time"] / mine["cold", "floor"]
        assert mine["cold", "gap"] == pytest.approx(gap)


def test_schema_round_trip(tmp_path):
    rows = [
        Row("unit", "a, b", EAGER, "forward", "time", "ms", 1.23456789, p50=1.25, trials=3),
        Row("unit", "a, b", "x", "forward", "time", "ms", None, note='said "no", twice'),
    ]
    schema.write(tmp_path / "r.csv", rows)
    assert schema.read(tmp_path / "r.csv") == [replace(rows[0], value=1.2346), rows[1]]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns suite"):
        schema.read(tmp_path / "other.csv")


def test_a_suite_run_again_replaces_its_rows():
    old = [Row(s, "c", "p", "m", "time", "ms", 1.0) for s in ("unit", "depth", "extreme depth")]
    new = [Row("depth", "c", "p", "m", "time", "ms", 2.0)]
    merged = schema.merge(old, new)
    assert [(r.suite, r.value) for r in merged] == [
        ("unit", 1.0), ("depth", 2.0), ("extreme depth", 1.0),
    ]  # fmt: skip


def test_report_from_csv(measured, tmp_path):
    rows = [*measured[1], *accuracy_rows(TOY, measured[0])]
    broken = Row("depth", TOY.name, "attorch", "forward+backward", "time", "ms", None)
    rows.append(replace(broken, note="not run: not installed"))
    schema.write(tmp_path / schema.CSV_NAME, rows)
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / report.PAGE).read_text()
    assert text.index("| a step |") < text.index("Time: median of 2 rounds") < text.index("## ")
    assert "`attorch`: not run: not installed" in text
    assert (tmp_path / "depth.png").stat().st_size > 10_000
    assert report.main([str(tmp_path / "nowhere")]) == 2


def test_each_reason_is_told_once():
    """Providers and depths that one reason holds for share it."""
    rows = []
    for depth in (20, 56, 110):
        case = f"basic ResNet-{depth}, batch 16"
        for provider in ("eager", "compile", "compile max-autotune", "attorch"):
            row = Row("depth", case, provider, "forward+backward", "time", "ms", 1.0, trials=2)
            if provider == "attorch":
                row = replace(row, value=None, note="not run: not installed")
            elif provider != "eager" and depth > 20:
                note = f"not run: 20 layers took 28 s, {depth} layers would pass 60 s"
                row = replace(row, value=None, note=note)
            rows += [row, replace(row, metric="peak", unit="MB")]
    last = report.opening(schema.Rows(rows)).splitlines()[-1]
    assert last == (
        "Not in the table: `compile`, `compile max-autotune` (56, 110 layers): not run: 20 layers "
        "took 28 s, more would pass 60 s; `attorch`: not run: not installed."
    )


def test_compare(tmp_path, capsys):
    def run_of(ratio, name):
        row = Row("unit", "c", "recompute", "forward", "time", "ms", 1.0, ratio_to_eager=ratio)
        schema.write(tmp_path / name, [row])
        return str(tmp_path / name)

    one, near, far = run_of(1.0, "a"), run_of(1.1, "b"), run_of(1.3, "c")
    assert compare.main([one, near]) == 0
    assert compare.main([one, far]) == 1
    assert "largest 30.0% (c, recompute, forward: 1.000 and 1.300)" in capsys.readouterr().out
    assert compare.main([one, str(tmp_path / "nowhere")]) == 2
