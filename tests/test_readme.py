"""Measured figures in the README are those of committed reports; what documents refer to exists."""

import ast
import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import click
import pytest
from PIL import Image

import resnetv2.studies
import resnetv2.visualization
from bench import extreme_depth, plots, report, training
from bench.schema import CSV_NAME, REPORTS, read
from resnetv2.cli.command import main
from resnetv2.studies.demo import MODES
from resnetv2.studies.harness import Study
from resnetv2.training.config import FIELDS, make_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEVICES = sorted(path.parent for path in REPORTS.glob(f"*/{CSV_NAME}"))

# A figure with a unit of measurement, as tables print it.
MEASURED = re.compile(r"(\d+(?:\.\d+)?)\s?(ms|MB|GB|images/s|GB/s|GFLOP/s|x)(?![\w/])")


def rows_of(device):
    return report.Rows(read(device / CSV_NAME))


def printed(device):
    """Every figure that a table could print of a device's report, with its unit."""
    result = set()
    for row in rows_of(device).rows:
        if row.value is not None:
            result.add((report.figure(row.value), row.unit))
        for value in (row.ratio_to_eager, row.ratio_to_compile):
            result.add((report.ratio(value).rstrip("x"), "x"))
    return result


def tables(text):
    """Runs of lines that begin with a bar."""
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)


def test_there_is_a_report():
    assert DEVICES


def test_every_measured_number_in_a_table_is_in_a_report():
    known = set().union(*(printed(device) for device in DEVICES))
    found = [
        match.groups()
        for lines in tables(README)
        for match in MEASURED.finditer("\n".join(lines.splitlines()[2:]))
    ]
    assert len(found) > 40, "the README has lost its tables of measurements"
    assert not [number for number in found if number not in known]


def test_an_invented_number_would_be_noticed():
    known = set().union(*(printed(device) for device in DEVICES))
    assert MEASURED.findall("| `x` | 12.34 ms (0.98x), 7 MB |") == [
        ("12.34", "ms"), ("0.98", "x"), ("7", "MB"),
    ]  # fmt: skip
    assert ("12.345", "ms") not in known


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_benchmark_table_is_the_reports(device):
    assert report.opening(rows_of(device)) in README


def test_blocks_are_filled_between_their_comments():
    device = DEVICES[0].name
    text = f"a\n<!-- bench: demo {device} -->\n<!-- end -->\nb\n<!-- end -->\n"
    filled = report.with_blocks(text)
    assert filled.endswith("\n<!-- end -->\nb\n<!-- end -->\n")
    assert report.picture(rows_of(DEVICES[0])) in filled
    assert report.with_blocks(filled) == filled
    assert report.with_blocks(README) == README


def test_opens_with_a_picture_of_a_report():
    """Before the first section; its file says which figures it was drawn from."""
    head = README.partition("\n## ")[0]
    (device,) = (device for device in DEVICES if report.picture(rows_of(device)) in head)
    _, peaks, times = plots.demo_figures(rows_of(device))
    with Image.open(device / report.DEMO_PICTURE) as image:
        drawn = json.loads(image.text["Description"])
    assert drawn == {"peak MB": peaks, "ms a step": times}
    assert [*peaks] == [*MODES]


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_page_is_what_the_csv_says(device):
    page = (device / report.PAGE).read_text(encoding="utf-8")
    assert page == report.page(rows_of(device), device.name)


def test_extreme_depth_is_a_reports():
    rows = next(r for r in map(rows_of, DEVICES) if r.where(suite="extreme depth"))
    peak = rows.one(suite="extreme depth", metric="peak")
    assert f"with {report.figure(peak.value)} MB beyond" in README
    losses = [row.value for row in rows.where(suite="extreme depth", metric="loss")]
    half = len(losses) // 2
    assert sum(losses[half:]) < sum(losses[:half]), "the README says that the loss falls"


def test_fast_recipe_is_a_reports():
    epochs = training.read_csv(training.REPORT / "epochs.csv")
    stated = re.search(r"to (\S+) % test accuracy, on two CPU cores in (\S+) minutes", README)
    assert stated, "the README no longer says what the recipe reaches"
    found = []
    for rows in training.by_run(epochs).values():
        last = rows[-1]
        if (last["threads"], last["step"]) == ("2", last["total_steps"]):
            accuracy = 100 * float(last["test_accuracy"])
            minutes = sum(float(row["seconds"]) for row in rows) / 60
            found.append((f"{accuracy:.1f}", f"{minutes:.1f}"))
    assert stated.groups() in found


def test_training_page_is_what_the_csv_says():
    tables = [training.read_csv(training.REPORT / name) for name in ("epochs.csv", "steps.csv")]
    assert (training.REPORT / "README.md").read_text(encoding="utf-8") == training.page(*tables)


FOLDERS = ("bench", "kernels", "resnetv2", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py"))
PAGES = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "resnetv2/README.md")
]
# A page, a comma and a heading in quotes, which may go on in a comment's next line.
CITED = re.compile(r'((?:\w+/)?README(?:\.md)?),\s+(?:# )?"([^"]+)"')
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def headings(page):
    return re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def anchor(heading):
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_cited_headings_exist():
    cited = {
        (f"{page.removesuffix('.md')}.md", re.sub(r"\s+(?:# )?", " ", heading))
        for path in [*SOURCES, *PAGES]
        for page, heading in CITED.findall(path.read_text(encoding="utf-8"))
    }
    assert len(cited) > 5
    assert not [(page, h) for page, h in cited if h not in headings(ROOT / page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "code", page.read_text(encoding="utf-8"))  # x[i](y) is no link
    links = LINK.findall(text)
    assert links
    for target, part in links:
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not part or part in map(anchor, headings(path)), f"{target}#{part}"


# Of a line of a block, or in backquotes.
COMMAND = re.compile(
    r"(?:^|`|&& )(resnetv2 \w[^`\n]*|torchrun [^`\n]*|python -m (?:resnetv2|bench)[.\w]* [^`\n]*)",
    re.MULTILINE,
)
COMMANDS = sorted({command for command in COMMAND.findall(README) if "..." not in command})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_complete(command, monkeypatch):
    """As far as the data: every option exists, and is one that the run takes."""
    words = shlex.split(command.partition(" > ")[0])
    if words[2:3] == ["bench.extreme_depth"]:

        class LoadedError(Exception):
            pass

        def load(name, **_):
            raise LoadedError(name)

        monkeypatch.setattr("resnetv2.data.datasets.load_data", load)
        monkeypatch.setattr(sys, "argv", words[2:])
        with pytest.raises(LoadedError, match="cifar10"):
            extreme_depth.main()
        return
    start = words.index("resnetv2") + 1
    name, given = words[start], words[start + 1 :]
    if name == "NAME" or given == ["NAME"]:
        return
    parsed = main.get_command(click.Context(main), name)
    assert parsed is not None
    try:
        values = parsed.make_context(name, given).params
    except click.exceptions.Exit:  # an option that ends there, such as --list-models
        return
    if name == "train":
        options = {key: values[key] for key in FIELDS if values[key] is not None}
        make_config(values["recipe"], **options)


def test_commands_are_found():
    names = {word for command in COMMANDS for word in shlex.split(command)}
    assert names >= {"train", "eval", "plan", "study", "torchrun", "bench.extreme_depth"}


@pytest.mark.parametrize(
    "code",
    [
        code
        for code in re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
        if "timm" not in code
    ]
    + [resnetv2.visualization.__doc__.partition("\n\n")[2]],
    ids=lambda code: re.findall(r"import (\w+)", code)[-1],
)
def test_snippets_run_by_themselves(code, monkeypatch, one_thread):
    """On fewer images. That of timm is in tests/fuse/test_fuse_packages.py, with its output."""
    for many, few in (("randn(8,", "randn(1,"), ("num_samples=800", "num_samples=160")):
        code = code.replace(many, few)
    monkeypatch.setenv("RESNETV2_BACKEND", "aten")  # Triton's interpreter would take minutes
    exec(code, {})


def calls(text):
    """Calls of the library in backquotes: the function, and what it is given, by its source."""
    for code in re.findall(r"`([\w.]+\([^`]*\))`", text):
        tree = ast.parse(code, mode="eval").body
        found = resnetv2
        for name in ast.unparse(tree.func).removeprefix("resnetv2.").split("."):
            found = getattr(found, name, None)
        if found is not None:
            yield code, found, tree


CALLS = {code: (function, tree) for code, function, tree in calls(README)}


@pytest.mark.parametrize("code", CALLS)
def test_calls_in_the_text_are_taken(code):
    """Every argument has a name that the function knows; "..." may stand for any."""
    function, call = CALLS[code]
    keywords = {keyword.arg: None for keyword in call.keywords}
    if isinstance(function, Study):
        function.options(
            **{name: ast.literal_eval(k.value) for name, k in zip(keywords, call.keywords)}
        )
        return
    given = [arg for arg in call.args if ast.unparse(arg) != "..."]
    inspect.signature(function).bind_partial(*given, **keywords)


def test_calls_are_found():
    assert {"fuse(model, memory=...)", "unfuse(model)", "load_weights(model, weights)"} < {*CALLS}
    assert any(isinstance(function, Study) for function, _ in CALLS.values())
