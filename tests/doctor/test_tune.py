"""``doctor --tune``: what is measured for a net is kept, later runs compute by it, and nothing that
is wrong is chosen. Times are the test's own; kernels run in the interpreter, or on a GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton", reason="there is nothing to choose without Triton")

from resnetv2 import PreActResNet, explain
from resnetv2.cli import main
from resnetv2.core import execution
from resnetv2.data.datasets import create_synthetic_dataset
from resnetv2.doctor.report import Diagnosis
from resnetv2.doctor.surroundings import environment
from resnetv2.doctor.tuning import Tuned, tune
from resnetv2.errors import InputError
from resnetv2.kernels import choices, launch, triton_engine
from resnetv2.kernels.choices import ATEN, DGRAD, FORWARD, WGRAD, WRITTEN
from resnetv2.kernels.inspect.tuning import BACKWARD, Found, Tuner, tasks_of
from resnetv2.kernels.operands import Geometry
from resnetv2.planning.cost import step_costs
from resnetv2.training.run import train_resnet_v2
from tests.support.yardstick import DEVICE

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = choices.device_name(torch.empty(0, device=DEVICE))
assert NAME is not None
SIZE, BATCH = 4, 2
# The net's two convolutions, 3x3: 16 channels in, 8 out, and 8 in and out.
FIRST, SECOND = (8, 16, 3, 3), (8, 8, 3, 3)
PADDED = Geometry(padding=(1, 1))


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type != "cuda":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture(autouse=True)
def _no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RESNETV2_CACHE_DIR", str(tmp_path / "cache"))
    choices.forget()
    yield
    choices.forget()


def net() -> PreActResNet:
    torch.manual_seed(0)
    return PreActResNet("basic", [1], 4, widths=(8,)).to(DEVICE)


def forced() -> dict[str, choices.Choice]:
    """What the candidate that is being timed computes by."""
    return dict(choices._forced.get() or {})


def clock(run: Callable[[], Any]) -> float:
    """Tiles are faster than none, ATen's wgrad beside another dgrad is faster than all."""
    hows = {operation: choice.how for operation, choice in forced().items()}
    if hows.get(DGRAD) == WRITTEN and hows.get(WGRAD) == ATEN:
        return 0.25
    return 0.5 if any(choice.tile for choice in forced().values()) else 1.0


def tuned(**options: Any) -> Tuned:
    given = {"timer": clock, "dtype": "fp32", "image_size": SIZE, **options}
    return tune(net(), BATCH, **given)


def key(operation: str, weight: tuple[int, ...], dtype: torch.dtype = torch.float32) -> str:
    return choices.key(operation, (BATCH, weight[1], SIZE, SIZE), weight, PADDED, dtype)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, str]:
    """A net tuned in bfloat16, for which several tiles are tried, and the file's text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESNETV2_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        choices.forget()
        found = tuned(dtype="bf16")
        return found, choices.path().read_text()


def atens() -> bool:
    return {choice.how for choice in forced().values()} == {ATEN}


def one(
    direction: str, weight: tuple[int, ...], timer: Callable[[Any], float] = lambda run: 1.0
) -> Found:
    """What one convolution's candidates took."""
    tasks = tasks_of(lambda: step_costs(net(), BATCH, SIZE, triton=True))
    (task,) = (t for t in tasks if (t.direction, t.weight) == (direction, weight))
    return Tuner(task, DEVICE, timer).tune()


def launched(step: Callable[[], object]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    with launch.record(lambda name, grid, constants: found.setdefault(name, []).append(constants)):
        step()
    return found


def test_all_that_a_net_computes_is_measured(measured: tuple[Tuned, str]) -> None:
    found, text = measured
    section = json.loads(text)["devices"][NAME]
    assert section["digest"] == found.digest
    shapes = {name.partition(" ")[2].partition(" stride")[0] for name in section["choices"]}
    assert shapes == {
        f"2x{c}x4x4 * {k}x{c}x{r}x{r}" for k, c, r in ((8, 16, 3), (8, 8, 3), (8, 16, 1))
    }
    assert {name.partition(" ")[0] for name in section["choices"]} >= {FORWARD, DGRAD, WGRAD}
    for entry in section["choices"].values():
        assert len(entry["seconds"]) >= 3
    assert {row[3] for row in found.rows if row[0].startswith("backward")} == {
        "dgrad written, wgrad aten"
    }
    assert f"digest {found.digest}" in str(found)


def test_behind_group_norms_there_is_nothing_to_choose() -> None:
    torch.manual_seed(0)
    model = PreActResNet("basic", [1], 4, widths=(8,), norm="group:2").to(DEVICE)
    assert str(tune(model, BATCH, image_size=SIZE)).startswith("nothing to choose: each of")


def test_a_later_run_computes_by_it(measured: tuple[Tuned, str]) -> None:
    """Implementations and tiles, in forward and backward."""
    images = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE)

    def step() -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out: torch.Tensor = net()(images)
        out.float().sum().backward()
        return out.detach()

    before = launched(step)
    choices.path().parent.mkdir()
    choices.path().write_text(measured[1])
    choices.forget()
    execution.PROGRAMS.clear()
    after = launched(step)
    entries = choices.measured(NAME).choices
    for weight in (FIRST, SECOND):
        tile = entries[key(FORWARD, weight, torch.bfloat16)].tile
        assert tile is not None
        launches = [
            c for c in after["_conv_forward_kernel"]
            if weight[:3] == (c["CONV"].K, c["CONV"].C, c["CONV"].R)
        ]  # fmt: skip
        assert [(c["BLOCK_M"], c["BLOCK_N"]) for c in launches] == [tile[:2]]
    assert [c["BLOCK_M"] for c in before["_conv_forward_kernel"]] != [
        c["BLOCK_M"] for c in after["_conv_forward_kernel"]
    ]
    assert "_conv_wgrad_kernel" in before
    assert "_conv_wgrad_kernel" not in after


def test_explain_says_what_was_measured(measured: tuple[Tuned, str]) -> None:
    report = explain(net())
    assert [row.by for row in report.blocks] == ["written, written; fused"]
    assert report.measured == ""
    choices.path().parent.mkdir()
    choices.path().write_text(measured[1])
    choices.forget()
    report = explain(net())
    (by,) = (row.by for row in report.blocks)
    assert re.fullmatch(r"written/written/aten\*, written/written/aten\*; \w+/\w+/aten\*", by)
    assert f"(digest {measured[0].digest})" in str(report)
    assert f"{measured[0].digest}" in report._repr_html_()
    text = measured[1].replace(NAME or "", "NVIDIA A100, sm_80, 108 multiprocessors")
    choices.path().write_text(text)
    choices.forget()
    assert f"has choices for NVIDIA A100, sm_80, 108 multiprocessors, none for {NAME}" in str(
        explain(net())
    )


def test_a_wrong_candidate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton_engine.TritonEngine._operand

    def wrong(self: Any, *args: Any) -> torch.Tensor:
        found = right(self, *args)
        return found * 1.01 if forced().get(FORWARD, choices.Choice("")).how == WRITTEN else found

    monkeypatch.setattr(triton_engine.TritonEngine, "_operand", wrong)
    found = one(FORWARD, SECOND)
    assert re.match(r"wrong: result is off by \d\S* of the allowed", found.refused[WRITTEN])
    assert [*found.seconds] == ["fused", ATEN]
    assert found.choices[key(FORWARD, SECOND)].how != WRITTEN


@pytest.mark.parametrize("weight", [FIRST, SECOND], ids=["first", "second"])
def test_all_candidates_between_atens_convolutions(
    weight: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a step makes other calls: gradients that wait for z, a projection's that is added."""
    monkeypatch.setattr(choices, "WIDE", {(1, 1): 512, (3, 3): 8})
    found = one(BACKWARD, weight)
    assert found.refused == {}
    assert [*found.seconds] == [
        ATEN, "fused", WRITTEN, "dgrad written, wgrad aten", "dgrad aten, wgrad written"
    ]  # fmt: skip


def test_what_is_hardly_faster_is_not_chosen() -> None:
    """Or the clock's noise would change bits."""
    found = one(BACKWARD, SECOND, lambda run: 1.0 if atens() else 1.01)
    assert found.choices[key(DGRAD, SECOND)][:2] == (WRITTEN, None)
    assert (found.before, found.after, found.name) == (1.01, 1.01, WRITTEN)
    found = one(BACKWARD, SECOND, lambda run: 1.0 if atens() else 1.1)
    assert found.choices[key(DGRAD, SECOND)][:2] == (ATEN, None)
    assert (found.before, found.after, found.name) == (1.1, 1.0, ATEN)


def test_a_folder_that_cannot_be_written_costs_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("")

    def timer(run: Callable[[], Any]) -> float:
        raise AssertionError("something was timed")

    with pytest.raises(InputError, match=r"cannot write .*choices.json: "):
        tuned(timer=timer)
    options = ["--tune", "--depth", "20", "--batch-size", "2"]
    result = CliRunner().invoke(main, ["doctor", *options])
    assert result.exit_code == 2
    assert result.output.splitlines()[-1].startswith("Error: cannot write ")


def test_nothing_to_choose_on_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNETV2_BACKEND", "aten")
    result = CliRunner().invoke(main, ["doctor", "--tune", "--depth", "20"])
    assert result.exit_code == 0
    assert result.output == f"nothing to choose: ATen's kernels are the only ones on {DEVICE}\n"
    assert not choices.path().exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tune"], "give --depth or --model"),
        (["--tune", "--quick", "--depth", "20"], "leave out --quick and --json"),
        (["--depth", "20", "--dtype", "bf16"], "--depth, --dtype: only with --tune"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_go_together(options: list[str], said: str) -> None:
    result = CliRunner().invoke(main, ["doctor", *options])
    assert result.exit_code == 2
    assert said in result.output


def test_doctor_names_the_file() -> None:
    entry = {key(FORWARD, FIRST): choices.Choice(ATEN)}
    digest = choices.write(NAME or "", entry)
    facts = environment(DEVICE)["choices"]
    assert facts == {"file": str(choices.path()), "number": 1, "digest": digest, "note": ""}
    told = [f"1 of {choices.path()}, digest {digest}"]
    choices.path().write_text(choices.path().read_text().replace(NAME or "", "NVIDIA A100"))
    choices.forget()
    told.append(f"none: {choices.path()} has choices for NVIDIA A100, none for {NAME}")
    found = [facts, environment(DEVICE)["choices"]]
    for each, expected in zip(found, told, strict=True):
        about = {**environment(DEVICE), "choices": each}
        text = str(Diagnosis(about, (), "right", True, 0.0, "now"))
        assert f"\nmeasured choices: {expected}\n" in text


def test_a_run_records_the_digest_and_says_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = create_synthetic_dataset(8, 4, image_size=SIZE)

    def run(epochs: int, **options: Any) -> Any:
        return train_resnet_v2(
            data, model=net(), epochs=epochs, batch_size=4, device=str(DEVICE), backend="auto",
            out=tmp_path / "run", verbose=True, **options,
        )  # fmt: skip

    first = choices.write(NAME or "", {key(FORWARD, FIRST): choices.Choice(ATEN)})
    assert run(1).config["measured_choices"] == first
    second = choices.write(NAME or "", {key(FORWARD, FIRST): choices.Choice(WRITTEN)})
    capsys.readouterr()
    run(1, resume="auto")
    said = capsys.readouterr().out
    assert f"measured choices was '{first}' and is '{second}': the same function with other" in said
