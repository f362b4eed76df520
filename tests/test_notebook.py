"""Notebooks: results show themselves as HTML tables and pictures, in a real kernel too."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from resnetv2 import PreActBlock, explain, fuse, plan
from resnetv2.core.table import html_table
from resnetv2.studies import architecture
from resnetv2.train import InputError, TrainingResult, create_synthetic_dataset, train_resnet_v2
from tests.support.processes import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")


class Page(HTMLParser):
    """The cells of each table's rows, the words outside of tables, and the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.feed(text)
        assert not self.open, "tags that are not closed"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        if tag == "img":
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif data.strip():
            self.words.append(data)


def cells_of(text: str) -> list[list[str]]:
    """The cells of a table in text, whose columns stand two spaces or more apart."""
    lines = [line for line in text.splitlines() if "  " in line.strip()]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_text_in_a_table_is_no_markup() -> None:
    page = Page(html_table(["<b>", "n"], [["a & b <script>", "1"]], [False, True]))
    assert page.rows == [["<b>", "n"], ["a & b <script>", "1"]]
    assert page.seen == {"table", "thead", "tbody", "tr", "th", "td"}


@pytest.fixture(scope="module")
def trained() -> TrainingResult:
    data = create_synthetic_dataset(num_samples=60, image_size=8)
    return train_resnet_v2(data, depth=8, epochs=2, device="cpu", backend="aten", verbose=False)


def without_blanks(rows: list[list[str]]) -> list[list[str]]:
    return [[cell for cell in row if cell] for row in rows]


def test_html_has_the_cells_of_the_text(trained: TrainingResult) -> None:
    model = fuse(nn.Sequential(PreActBlock(4, 4), PreActBlock(4, 8, 2)))
    for shown in (explain(model), plan(20, 8, "1GiB", device="cpu"), trained):
        page = Page(shown._repr_html_())
        text = str(shown)
        rules = [line for line in text.splitlines() if set(line) == {"-", " "}]
        (rule,) = rules
        table = [line for line in cells_of(text) if line != cells_of(rule)[0]]
        rows = without_blanks(page.rows)
        assert len(rows) > 1
        assert rows == table[: len(rows)], type(shown)
        assert all(words in text for words in page.words)
    assert "no pre-activation block" in Page(explain(nn.ReLU())._repr_html_()).words[0]


def test_a_study_shows_sentences_tables_and_figures() -> None:
    result = architecture(width=4)
    page = Page(result._repr_html_())
    assert result.title in page.words
    assert all(sentence in page.words for sentence in result.conclusions)
    rows = [row for table in result.tables for row in ([*table.columns], *table.cells())]
    assert page.rows == rows
    assert result._repr_html_().count("data:image/png;base64,") == len(result.figures) > 0


def test_a_result_draws_its_curves(trained: TrainingResult) -> None:
    picture = trained.plot()
    losses, errors = picture.axes
    assert list(losses.lines[0].get_ydata()) == [entry.train_loss for entry in trained.history]
    assert list(errors.lines[1].get_ydata()) == pytest.approx(
        [100 * (1 - entry.test_accuracy) for entry in trained.history]
    )
    assert picture._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="no epoch of this run is finished"):
        TrainingResult(trained.model, trained.config).plot()


def test_many_epochs_are_folded(trained: TrainingResult) -> None:
    long = TrainingResult(trained.model, trained.config, trained.history * 10)
    page = Page(long._repr_html_())
    assert "details" in page.seen
    assert f"20 epochs, {100 * trained.test_accuracy:.2f} % test accuracy" in page.words
    assert len(page.rows) == 21


CELLS = [
    "from resnetv2 import explain, plan, preact_resnet20\n"
    "from resnetv2.studies import architecture\n"
    "from resnetv2.train import create_synthetic_dataset, train_resnet_v2\n"
    "explain(preact_resnet20())",
    'plan("preact_resnet20", 8, "1GiB", device="cpu")',
    "architecture(width=2)",
    "data = create_synthetic_dataset(num_samples=60, image_size=8)\n"
    'result = train_resnet_v2(data, depth=8, epochs=1, device="cpu")\n'
    "result",
    "result.plot()",
]


def test_a_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # kernels in it take minutes
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = [cell.outputs[-1].data for cell in notebook.cells]
    assert all("<table>" in data["text/html"] for data in shown[:4])
    assert "text/html" not in shown[4]
    assert shown[4]["image/png"].startswith("iVBOR")
    if folder := os.environ.get("RESNETV2_NOTEBOOK"):  # to look at
        nbformat.write(notebook, Path(folder) / "resnetv2.ipynb")
