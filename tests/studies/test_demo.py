"""`resnetv2 demo`: a step in four ways, and what it prints and draws is what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from resnetv2.cli.command import main
from resnetv2.studies import demo as module
from resnetv2.studies.demo import MODES, demo, draw
from resnetv2.studies.results import Result, show
from resnetv2.train import InputError
from tests.support.yardstick import DEVICE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def result() -> Result:
    return demo(47, 1, seconds=1e-9, device=str(DEVICE), progress=False)


def test_every_mode_takes_less_than_the_one_before_it(result: Result) -> None:
    (table,) = result.tables
    assert table.column("mode") == list(MODES)
    peaks = table.column("peak MB")
    assert peaks == sorted(peaks, reverse=True)
    assert len({*peaks}) == len(MODES)
    assert peaks[-1] < 0.5 * peaks[0]
    losses = table.column("loss")
    assert losses[1] == losses[2] == losses[3] == pytest.approx(losses[0])
    assert result.settings["rounds"] == 3


def test_a_sentence_for_each_mode(result: Result) -> None:
    (table,) = result.tables
    peaks = table.column("peak MB")
    assert len(result.conclusions) == len(MODES)
    for mode, peak, sentence in zip(MODES, peaks, result.conclusions, strict=True):
        assert sentence.startswith(mode)
        assert f"{peak:.1f} MB" in sentence
        if mode != "eager":
            assert f"{peaks[0] / peak:.1f} times less" in sentence
    assert all(show(peak) in str(result) for peak in peaks)


def test_bars_are_as_long_as_the_figures() -> None:
    peaks, times = {"eager": 100.0, "invert": 10.0}, {"eager": 50.0, "invert": 60.0}
    picture = draw(peaks, times, "A step")
    for axes, values in zip(picture.axes, (peaks, times), strict=True):
        assert [bar.get_width() for bar in axes.patches] == list(values.values())
    texts = [text.get_text() for axes in picture.axes for text in axes.texts]
    assert texts == ["100 MB", "10 MB (0.1x)", "50 ms", "60 ms (1.2x)"]


def test_time_is_the_median_of_rounds_in_which_all_take_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[float] = []

    def seconds(step: module.GradientStep) -> float:
        turns.append(1.0 + len(turns) // len(MODES))  # a machine that slows down
        return turns[-1]

    monkeypatch.setattr(module.GradientStep, "seconds", seconds)
    result = demo(11, 1, seconds=1e-9, progress=False)
    (table,) = result.tables
    assert result.conclusions[1].endswith("in a time that these rounds do not tell from eager's.")
    assert table.column("ms a step") == [2000.0] * len(MODES)
    assert turns == [1.0] * 4 + [2.0] * 4 + [3.0] * 4


def test_a_time_is_more_or_less_where_all_rounds_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"recompute": [1.1, 1.2, 1.3], "invert": [0.9, 1.2, 1.3], "segment": [0.8, 0.7, 0.9]}
    turns = [[1.0, *(values[i] for values in seconds.values())] for i in range(3)]
    flat = iter([value for turn in turns for value in turn])
    monkeypatch.setattr(module.GradientStep, "seconds", lambda step: next(flat))
    _, recompute, invert, segment = demo(11, 1, seconds=1e-9, progress=False).conclusions
    assert recompute.endswith("in 20% more time.")
    assert invert.endswith("in a time that these rounds do not tell from eager's.")
    assert segment.endswith("in 20% less time.")


def test_command_writes_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["demo", "--depth", "11", "--batch-size", "1", "--seconds", "1e-9", "--no-progress"]
    result = CliRunner().invoke(main, small)
    assert result.exit_code == 0, result.output
    assert re.search(r"^wrote demo\.png in \d+ s$", result.stdout, re.MULTILINE)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    result = CliRunner().invoke(main, [*small, "--out", "pictures/mine.png"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "pictures" / "mine.png").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"depth": 12}, "depth must be 9n+2 for BottleneckPreActBlock, got 12"),
        ({"batch_size": 0}, "batch_size must be above 0, got 0"),
        ({"seconds": float("nan")}, "seconds must be above 0, got nan"),
        ({"device": "tpu"}, "there is no device 'tpu'"),
    ],
)
def test_impossible_demos(options: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        demo(**options)  # type: ignore[arg-type]
