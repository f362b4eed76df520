"""Options of a run: defaults, conversions, recipes, and every way to get them wrong."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from resnetv2.cli.train import train
from resnetv2.errors import InputError
from resnetv2.training import config as module
from resnetv2.training.config import (
    FIELDS,
    TrainConfig,
    check_resumable,
    check_steps,
    make_config,
    saved_config,
)
from resnetv2.training.fields import Choice, Field
from resnetv2.training.recipe import recipe_names


def message(call: Any, *args: Any, **options: Any) -> str:
    """The one line that `call` refuses its arguments with."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert text.isprintable(), f"more than one line: {text!r}"
    return text


def test_defaults_are_the_papers_in_proportion() -> None:
    config = TrainConfig()
    assert (config.epochs, config.steps, config.batch_size) == (30, None, 128)
    assert (config.lr, config.momentum, config.weight_decay) == (0.1, 0.9, 1e-4)
    assert (config.schedule, config.warmup_steps, config.decay_all) == ("step", None, True)
    assert (config.ema, config.label_smoothing, config.nesterov) == (0, 0, False)


def test_a_model_names_depth_block_and_stem(tmp_path: Path) -> None:
    config = make_config(model="preact_resnet50", lr=0.2)
    assert (config.depth, config.block, config.stem) == (50, "bottleneck", "imagenet")
    # As a checkpoint or config.yaml has it.
    assert make_config(**dataclasses.asdict(config) | {"steps": None}) == config
    assert saved_config(dataclasses.asdict(config), "file") == config
    said = "block contradicts model preact_resnet20, whose block is 'basic': got 'bottleneck'"
    assert message(make_config, model="preact_resnet20", block="bottleneck") == said
    assert message(TrainConfig, model="preact_resnet20", block="bottleneck") == said
    # The default of an option, given.
    assert message(make_config, model="preact_resnet50", depth=20).startswith("depth contradicts")
    assert message(make_config, model="preact_resnet21").endswith("did you mean preact_resnet20?")


def test_a_recipe_s_net_gives_way_to_the_one_that_is_given(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("depth: 164\nblock: bottleneck\n")
    config = make_config(recipe, model="wide_resnet16_8")
    assert (config.model, config.depth, config.block) == ("wide_resnet16_8", 16, "basic")
    recipe.write_text("model: preact_resnet50\n")
    config = make_config(recipe, depth=26)
    assert (config.model, config.depth, config.stem) == (None, 26, "cifar")


def test_every_option_is_documented_and_on_the_command_line() -> None:
    """A field without an ``Option`` would be missing in both."""
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    arguments, _, _ = (TrainConfig.__doc__ or "").partition("Raises:")
    assert re.findall(r"^ {8}(\w+): ", arguments, flags=re.MULTILINE) == names
    assert {*names} < {parameter.name for parameter in train.params}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", "1e-4", 1e-4),
        ("lr", 1, 1.0),
        ("lr", np.float32(0.5), 0.5),
        ("steps", "64_000", 64_000),
        ("steps", "64e3", 64_000),
        ("steps", 64e3, 64_000),
        ("batch_size", np.int64(8), 8),
        ("nesterov", 1, True),
        ("nesterov", "Yes", True),
        ("flip", "off", False),
        ("flip", None, None),
        ("root", Path("images"), "images"),
        ("device", torch.device("cuda", 1), "cuda:1"),
        ("graph", "auto", "auto"),
        ("graph", True, "on"),
        ("graph", False, "off"),
    ],
    ids=lambda value: f"{type(value).__name__} {value}",
)
def test_values_become_their_fields_type(name: str, value: Any, expected: Any) -> None:
    found = getattr(TrainConfig(**{name: value}), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("budget", ["8GiB", "500 MB", "2e9", 8_000_000_000, 8e9])
def test_budgets(budget: str | float) -> None:
    found = TrainConfig(memory="auto", budget=budget).budget  # type: ignore[arg-type]
    assert found == (budget if isinstance(budget, str) else "8000000000")


INTEGER = "a whole number of at least"
PART = "a number of at least 0 and below 1"
BYTES = 'bytes, such as "8GiB" or a number above 0'
WRONG = [
    ("batch_size", 0, f"{INTEGER} 1"),
    ("batch_size", 1.5, f"{INTEGER} 1"),
    ("batch_size", "many", f"{INTEGER} 1"),
    ("batch_size", True, f"{INTEGER} 1"),
    ("batch_size", None, f"{INTEGER} 1"),
    ("batch_size", [128], f"{INTEGER} 1"),
    ("batch_size", float("nan"), f"{INTEGER} 1"),
    ("depth", -20, f"{INTEGER} 1 and below 100000"),
    ("workers", -1, f"{INTEGER} 0 and below 1024"),
    ("crop_padding", -1, f"{INTEGER} 0"),
    ("lr", 0, "a number above 0"),
    ("lr", -0.1, "a number above 0"),
    ("lr", "nan", "a number above 0"),
    ("lr", float("inf"), "a number above 0"),
    ("lr", True, "a number above 0"),
    ("lr", {"start": 0.1}, "a number above 0"),
    ("lr", torch.tensor(0.1), "a number above 0"),
    ("weight_decay", -1e-4, "a number of at least 0"),
    ("weight_decay", float("nan"), "a number of at least 0"),
    ("momentum", 1, PART),
    ("ema", -0.5, PART),
    ("label_smoothing", float("nan"), PART),
    ("nesterov", 2, "true or false"),
    ("nesterov", "maybe", "true or false"),
    ("data", "", "some text"),
    ("data", 10, "some text"),
    ("data", "imagefolder:a\0b", "some text"),
    ("root", None, "some text"),
    ("device", 0, "some text"),
    ("budget", "8 bananas", BYTES),
    ("budget", -1, BYTES),
    ("budget", True, BYTES),
    ("block", "wide", "one of basic, bottleneck"),
    ("stem", 7, "one of cifar, imagenet"),
    ("memory", None, "one of recompute, invert_h1, invert, segment, auto"),
    ("dtype", ["fp32"], "one of fp32, bf16, fp16"),
]


@pytest.mark.parametrize(
    ("name", "value", "expected"), WRONG, ids=[f"{name}={value!r}" for name, value, _ in WRONG]
)
def test_wrong_values(name: str, value: Any, expected: str) -> None:
    shown = " ".join(repr(value).split())
    assert message(TrainConfig, **{name: value}) == f"{name} must be {expected}, got {shown}"
    assert message(make_config, "fast", **{name: value}).startswith(f"{name} must be {expected}")


@pytest.mark.parametrize("value", [2**63, 10**30, 16**5000], ids=["2**63", "10**30", "16**5000"])
def test_numbers_beyond_torchs(value: int) -> None:
    text = message(TrainConfig, steps=value)
    assert text.startswith("steps is too large, got ")
    assert len(text) < 120
    assert message(TrainConfig, memory="auto", budget="1e400") == "budget is too large, got '1e400'"


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("schedule", "cosin", "cosine"),
        ("schedule", "One_Cycle", "one-cycle"),
        ("dtype", "BF16", "bf16"),
        ("memory", "invert-h1", "invert_h1"),
    ],
)
def test_a_misspelt_choice_names_the_nearest(name: str, value: str, nearest: str) -> None:
    text = message(TrainConfig, **{name: value})
    assert re.fullmatch(
        rf"{name} must be one of [\w, -]+, got '{value}': did you mean {nearest}\?", text
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"epochs": 3, "steps": 100},
            "epochs and steps both say how long to train: give one of them, got epochs 3 and "
            "steps 100",
        ),
        (
            {"eager": True, "backend": "triton"},
            "eager contradicts backend 'triton': give one of them",
        ),
        (
            {"nesterov": True, "momentum": 0},
            "nesterov needs a momentum above 0, got momentum 0",
        ),
        (
            {"budget": "8GiB"},
            'budget is for memory "auto", which chooses by it: got budget 8GiB with memory '
            '"recompute"',
        ),
        (
            {"cache": "stream", "data": "cifar10"},
            "cache \"stream\" is for images in a folder, data imagefolder:PATH: got data 'cifar10'",
        ),
    ],
    ids=["epochs and steps", "eager and backend", "nesterov", "budget", "stream"],
)
def test_contradictions(options: dict[str, Any], expected: str) -> None:
    assert message(TrainConfig, **options) == expected


def test_eager_is_a_backend() -> None:
    assert TrainConfig(eager=True).backend == "eager"
    assert TrainConfig(eager=True, backend="eager").backend == "eager"


def test_a_warmup_has_to_fit() -> None:
    config = TrainConfig(warmup_steps=400)
    check_steps(config, 400)
    check_steps(TrainConfig(), 1)
    assert message(check_steps, config, 11) == (
        "warmup_steps must be at most the run's 11 steps, got 400"
    )


def test_paper_recipe() -> None:
    """He et al. 2016, appendix: each number that it names."""
    config = make_config("paper")
    assert (config.batch_size, config.steps, config.epochs) == (128, 64_000, None)
    assert (config.weight_decay, config.decay_all, config.momentum) == (1e-4, True, 0.9)
    assert (config.crop_padding, config.flip, config.dtype) == (4, True, "fp32")
    assert (config.nesterov, config.label_smoothing, config.ema) == (False, 0, 0)
    assert (config.lr, config.schedule) == (0.1, "step")
    # 400 steps, by the schedule's own proportion (test_schedule.py).
    assert config.warmup_steps is None


def test_fast_recipe() -> None:
    config = make_config("fast")
    assert (config.epochs, config.steps, config.nesterov) == (10, None, True)
    assert config.schedule in ("cosine", "one-cycle")
    assert not config.decay_all
    assert 0 < config.label_smoothing <= 0.1
    assert 0.99 <= config.ema <= 0.999


def test_recipes_are_short_and_explain_themselves() -> None:
    assert recipe_names() == ["fast", "paper"]
    for name in recipe_names():
        path = Path(module.__file__).parent / "recipes" / f"{name}.yaml"
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("# ")
        assert len(lines) <= 40
        assert make_config(path) == make_config(name)


def test_what_is_given_overrides_the_recipe() -> None:
    config = make_config("fast", lr=0.1, epochs=3)
    assert (config.lr, config.epochs, config.nesterov) == (0.1, 3, True)
    assert make_config(lr=0.2) == TrainConfig(lr=0.2)
    assert make_config("paper", crop_padding=None).crop_padding is None


@pytest.mark.parametrize(
    ("recipe", "given", "expected"),
    [
        ("paper", {"epochs": 3}, (3, None)),
        ("paper", {"steps": 100}, (None, 100)),
        ("fast", {"steps": 100}, (None, 100)),
        ("fast", {"steps": None}, (10, None)),
        ("fast", {"steps": 100, "epochs": None}, (None, 100)),
    ],
)
def test_the_length_given_wins(
    recipe: str, given: dict[str, Any], expected: tuple[int | None, int | None]
) -> None:
    config = make_config(recipe, **given)
    assert (config.epochs, config.steps) == expected


def test_unknown_options() -> None:
    assert message(make_config, bach_size=3) == (
        "unknown option 'bach_size': did you mean batch_size?"
    )
    assert message(make_config, xyz=3) == "unknown option 'xyz'"


def test_contradictions_with_a_recipe_name_it() -> None:
    assert message(make_config, "fast", momentum=0) == (
        "nesterov needs a momentum above 0, got momentum 0 (with the options of recipe fast)"
    )


def test_own_recipe(tmp_path: Path) -> None:
    path = tmp_path / "own.yml"
    path.write_text("lr: 1e-3\nepochs: 2\nflip: no\n")
    config = make_config(str(path), batch_size="64")
    assert (config.lr, config.epochs, config.flip, config.batch_size) == (1e-3, 2, False, 64)
    path.write_bytes(b"\xef\xbb\xbfepochs: 4\r\n")  # as Windows' editor writes it
    assert make_config(path).epochs == 4


NOT_YAML = "is not valid YAML at line"
BAD_RECIPES = {
    "unknown option": ("bach_size: 8", ": unknown option 'bach_size': did you mean batch_size?"),
    "hyphen": ("batch-size: 8", ": unknown option 'batch-size': did you mean batch_size?"),
    "value": ("lr: -1", ": lr must be a number above 0, got -1"),
    "list": ("lr: [0.1, 0.01]", ": lr must be a number above 0, got [0.1, 0.01]"),
    "date": ("lr: 2020-01-01", ": lr must be a number above 0, got datetime.date(2020, 1, 1)"),
    "choice": (
        "schedule: cosinus",
        ": schedule must be one of step, cosine, one-cycle, constant, got 'cosinus': did you mean "
        "cosine?",
    ),
    "both lengths": (
        "epochs: 1\nsteps: 2",
        "epochs and steps both say how long to train: give one of them, got epochs 1 and steps 2 "
        "(with the options of {path})",
    ),
    "twice": ("lr: 1\nepochs: 2\nlr: 2", f" {NOT_YAML} 3, column 1: 'lr' is there twice"),
    "unclosed": ("lr: [1, 2", f" {NOT_YAML} 1, column 10: "),
    "two documents": ("lr: 1\n---\nlr: 2", f" {NOT_YAML} 2, column 1: "),
    "python object": (
        "lr: !!python/object/apply:os.system [ls]",
        f" {NOT_YAML} 1, column 5: ",
    ),
    "no such date": ("lr: 2020-99-99", " is not valid YAML: "),
    "nested": ("lr: " + "[" * 1200, " is not valid YAML: "),
    "empty": ("", ": expected a line for each option, such as epochs: 10, got nothing"),
    "a word": ("paper", ": expected a line for each option, such as epochs: 10, got 'paper'"),
    "control characters": ("lr: \x07", " is not a text file: "),
}


@pytest.mark.parametrize(("text", "expected"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_bad_recipes(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    found = message(make_config, path)
    if "{path}" in expected:
        assert found == expected.format(path=path)
    else:
        assert found.startswith(f"{path}{expected}")


def test_bad_recipe_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.yaml").mkdir()
    Path("binary.yaml").write_bytes(bytes(range(128, 256)))
    Path("model.yaml").write_bytes(b"a" * (2**20 + 1))
    Path("file").touch()
    refused = {
        "missing.yaml": "no recipe at missing.yaml",
        "folder.yaml": "folder.yaml is not a file: a recipe is a YAML file of options",
        "binary.yaml": "binary.yaml is not a text file: a recipe is YAML in UTF-8",
        "model.yaml": "model.yaml is longer than 1 MiB: a recipe is a YAML file of options",
        "a\0.yaml": r"no recipe at 'a\x00.yaml'",
        "papr": "unknown recipe 'papr': choose from fast, paper, or give the path of a .yaml file: "
        "did you mean paper?",
        "": "unknown recipe '': choose from fast, paper, or give the path of a .yaml file",
        3: "recipe must be a name or a path, got 3",
    }
    assert {recipe: message(make_config, recipe) for recipe in refused} == refused
    assert message(make_config, "a\nb.yaml") == r"no recipe at 'a\nb.yaml'"
    assert "name too long" in message(make_config, "a" * 5000 + ".yaml")
    assert "file/x.yaml" in message(make_config, "file/x.yaml")
    assert "~nobody-at-all" in message(make_config, "~nobody-at-all/x.yaml")


def test_recipe_that_the_system_does_not_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a folder without permission does, for every user."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "own.yaml"
    path.touch()
    monkeypatch.setattr(Path, "open", refuse)
    assert message(make_config, path) == f"cannot read the recipe {path}: Permission denied"


@pytest.mark.parametrize("recipe", [None, "fast", "paper"])
def test_a_configuration_survives_its_file(recipe: str | None) -> None:
    config = make_config(recipe, memory="auto", budget="8GiB", eager=True)
    values = dataclasses.asdict(config)
    for saved in (values, json.loads(json.dumps(values)), yaml.safe_load(yaml.safe_dump(values))):
        assert saved_config({**saved, "parameters": 5}, "run") == config
    assert check_resumable(values, config, "run") == []


def test_a_saved_configuration_that_no_run_has() -> None:
    assert message(saved_config, {"depth": "deep"}, "a.pt") == (
        "a.pt: depth must be a whole number of at least 1 and below 100000, got 'deep'"
    )
    assert message(saved_config, [1], "a.pt") == "a.pt: expected a configuration by name, got [1]"


def another(field: Field) -> Any:
    """A value that the field may have and that is not its default."""
    if isinstance(field.rule, Choice):
        return next(word for word in field.rule if word != field.default)
    if field.kind is bool:
        return not field.default
    if field.kind is str:
        return "other"
    return field.kind(field.default / 2) if field.default else {int: 5, float: 0.5}[field.kind]


# Options that cannot be given alone, or change another: the test after the next has them.
TOGETHER = {"model", "steps", "cache", "budget", "eager"}


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in TOGETHER])
def test_resuming_with_another_value(name: str) -> None:
    saved = dataclasses.asdict(TrainConfig())
    other = another(FIELDS[name])
    now = TrainConfig(**{name: other})
    was, here = repr(saved[name]), repr(other)
    if FIELDS[name].option.resume == "decides":
        assert message(check_resumable, saved, now, Path("runs/a.pt")) == (
            f"runs/a.pt was written with {name} {was}, this run has {name} {here}: a resumed run "
            "keeps what decides its result"
        )
    elif FIELDS[name].option.resume == "machine":
        assert check_resumable(saved, now, Path("runs/a.pt")) == []  # what came of it is compared
    else:
        rounds = FIELDS[name].option.resume == "rounds"
        note = ": the same function with other roundings" if rounds else ""
        assert check_resumable(saved, now, Path("runs/a.pt")) == [
            f"{name} was {was} and is {here}{note}"
        ]


def test_options_that_need_another_are_compared_as_well() -> None:
    saved = dataclasses.asdict(TrainConfig())
    assert message(check_resumable, saved, TrainConfig(steps=100), "a.pt") == (
        "a.pt was written with epochs 30, steps None, this run has epochs None, steps 100: a "
        "resumed run keeps what decides its result"
    )
    named = TrainConfig(model="preact_resnet50")
    assert message(check_resumable, saved, named, "a.pt") == (
        "a.pt was written with model None, depth 20, block 'basic', this run has model "
        "'preact_resnet50', depth 50, block 'bottleneck' (1 more differ): a resumed run keeps what "
        "decides its result"
    )
    notes = check_resumable(saved, TrainConfig(memory="auto", budget="1GiB", eager=True), "a.pt")
    assert [note.split()[0] for note in notes] == ["memory", "budget", "backend", "eager"]
    folder = TrainConfig(data="imagefolder:a")
    streamed = dataclasses.replace(folder, cache="stream")
    assert check_resumable(dataclasses.asdict(folder), streamed, "a.pt") == [
        "cache was 'auto' and is 'stream'"
    ]
