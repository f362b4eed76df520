"""``resnetv2 study``: the paper's experiments, and a page of them all."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..core.table import counted
from ..studies.options import StudyOptions
from ..training.fields import fields_of
from .command import PathName, WrongInput, clean_errors
from .options import options_of, progress, threads

if TYPE_CHECKING:
    from ..studies import Study


class Depths(click.ParamType[tuple[int, ...]]):
    """Whole numbers separated by commas."""

    name = "N[,N...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a number of layers, nor several separated by commas")


_OF_A_STUDY = [name for name in fields_of(StudyOptions) if name not in ("root", "device")]


@click.command()
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--list", "listed", is_flag=True, help="Say what each study asks, and end.")
@click.option("--preset", help="A named set of values, such as paper; --list has them.")
# The defaults of these two are the same in all studies.
@options_of(StudyOptions, "root", "device")
@options_of(StudyOptions, *_OF_A_STUDY, default="", types={"depth": Depths()})
@threads
@click.option(
    "--out",
    type=PathName(path_type=Path),
    default="runs/study",
    show_default=True,
    help="Folder for NAME/results.json and NAME/*.png, and for index.html.",
)
@progress
def study(
    names: tuple[str, ...],
    listed: bool,
    preset: str | None,
    threads: int | None,
    out: Path,
    **given: Any,
) -> None:
    """Run experiments of ResNet V2 and print what they find.

    \b
    architecture  both blocks as diagrams       bn-position  no BN, BN after or before conv
    block         one block step by step        identity     |F(x)| of both blocks
    depth         20 to 1000 layers             gradients    gradient norm at every layer
    versions      ResNet against ResNet V2      norms        batch, group and layer norm
    ordering      the paper's Table 2           activations  ReLU, GELU, SiLU
    shortcuts     the paper's Table 1           hybrid       pre- and post-activation mixed
    recipe        what the training regime gives against what the architecture gives

    "all", or several names, also writes one HTML page. Defaults take minutes on two CPU cores;
    each study has its own, and names those of these options that it does not listen to. With
    several studies an option goes to those that listen to it. A study that is stopped goes on
    behind its finished nets when the same command is given again.

    \b
    resnetv2 study depth --depth 20,50,1000
    resnetv2 study versions --preset paper --device cuda
    resnetv2 study all --out results
    """
    with clean_errors():
        import torch

        from ..studies import STUDIES
        from ..studies.page import write_page

        if listed:
            for each in STUDIES.values():
                click.echo(_describe(each))
            return
        chosen = _choose(names, STUDIES)
        check_out(out)
        if threads is not None:
            torch.set_num_threads(threads)
        changes = {name: value for name, value in given.items() if value is not None}
        several = len(chosen) > 1
        settings = [_settings(each, preset, changes, lenient=several) for each in chosen]
        if several:
            _check_heard(chosen, preset, changes)
        results = []
        started = time.perf_counter()
        files = [out / each.name / "finished.jsonl" for each in chosen]
        for number, (each, values, file) in enumerate(zip(chosen, settings, files), 1):
            if several:
                minutes = (time.perf_counter() - started) / 60
                click.echo(f"[{number}/{len(chosen)}, {minutes:.1f} min] {each.title}", err=True)
            with _going_on(file):
                results.append(each(**values))
            paths = results[-1].save(out / each.name)
            click.echo(f"{results[-1]}\n\nwrote {', '.join(map(str, paths))}\n")
            if several:
                # After every study: a run that is stopped has its page up to there.
                page = write_page(results, out / "index.html")
        for file in files:
            file.unlink(missing_ok=True)
        if several:
            click.echo(f"wrote {page} in {(time.perf_counter() - started) / 60:.1f} minutes")


@contextmanager
def _going_on(file: Path) -> Iterator[None]:
    """Keep a study's finished nets in ``file``; say how many there are and how to go on."""
    from ..studies import finished

    before = finished.count(file)
    if before:
        click.echo(f"going on behind {counted(before, 'net')} in {file}", err=True)
    try:
        with finished.kept_in(file):
            yield
    except KeyboardInterrupt:
        there = finished.count(file)
        if not there:
            raise
        click.echo(
            f"stopped; {counted(there, 'finished net')} kept in {file}: the same command goes on "
            "behind them",
            err=True,
        )
        sys.exit(130)


def _choose(names: tuple[str, ...], studies: dict[str, Study]) -> list[Study]:
    known = f"{', '.join(studies)}, all"
    if not names:
        raise WrongInput(f"name a study: {known}")
    for name in names:
        if name not in studies and name != "all":
            raise WrongInput(f"unknown study {name!r}: choose from {known}")
    if "all" in names:
        return list(studies.values())
    return [studies[name] for name in dict.fromkeys(names)]


def check_out(out: Path) -> None:
    """Refuse a folder that cannot be made before a study takes its minutes, not after."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise WrongInput(f"cannot write to {out}: {existing} is not a folder that takes files")


def _settings(
    study: Study, preset: str | None, changes: dict[str, Any], lenient: bool
) -> dict[str, Any]:
    """The arguments of a study's call, checked now rather than after the studies before it.

    lenient: leave out what the study does not listen to.
    """
    if lenient:
        heard = {*study.defaults, "device", "progress"}
        changes = {name: value for name, value in changes.items() if name in heard}
        preset = preset if preset in study.presets else None
    values = {"preset": preset, **changes}
    if len(values.get("depth", ())) == 1:
        (values["depth"],) = values["depth"]
    study.options(**values)
    return values


def _check_heard(studies: list[Study], preset: str | None, changes: dict[str, Any]) -> None:
    """With several studies, every option given must be of use to one of them."""
    for name in changes:
        heard = any(name in study.defaults for study in studies)
        if not heard and name not in ("device", "progress"):
            raise WrongInput(f"none of these studies has the option --{name.replace('_', '-')}")
    if preset is not None and not any(preset in study.presets for study in studies):
        raise WrongInput(f"none of these studies has the preset {preset!r}")


def _describe(study: Study) -> str:
    options = ", ".join(f"{name}={value}" for name, value in study.defaults.items())
    lines = [study.name, f"    {study.question}", f"    {options}"]
    lines += [
        f"    --preset {name}: {', '.join(f'{key}={value}' for key, value in values.items())}"
        for name, values in study.presets.items()
    ]
    return "\n".join(lines)
