"""The command ``resnetv2``: thin layers over the library's functions.

A subcommand is a click command in a module of its own choice and a line in COMMANDS; its module
is imported when the command runs or ``--help`` lists it. Wrong input is one line and exit code 2.
"""

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import click

from .. import _started

COMMANDS = {
    "train": "resnetv2.cli.train:train",
    "eval": "resnetv2.cli.train:evaluate",
    "predict": "resnetv2.cli.predict:predict",
    "export": "resnetv2.cli.predict:export",
    "plan": "resnetv2.cli.plan:plan",
    "demo": "resnetv2.cli.demo:demo",
    "study": "resnetv2.cli.study:study",
    "doctor": "resnetv2.cli.doctor:doctor",
}


class CommandGroup(click.Group):
    """Subcommands by name, imported when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The subcommand that is named; a wrong name gets the nearest one as a suggestion."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from ..training.fields import nearest

            ctx.fail(f"No such command {name!r}{nearest(name, COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands with their whole first sentence, which click cuts off."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, each.get_short_help_str(1000)) for name, each in commands.items() if each]
            )

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Read what stands before the subcommand."""
        _started.begin()
        with _usage_in_one_line(), _stopped_in_one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Read the subcommand's arguments and run it."""
        with _usage_in_one_line(ctx), _stopped_in_one_line():
            return super().invoke(ctx)


@contextmanager
def _stopped_in_one_line() -> Iterator[None]:
    """Ctrl-C where nothing else takes it: while a subcommand's modules are imported."""
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            click.echo("stopped at once", err=True)
        sys.exit(130)


@contextmanager
def _usage_in_one_line(ctx: click.Context | None = None) -> Iterator[None]:
    """Turn click's three lines about a wrong argument into one.

    ctx: of the group, where the subcommand is known.
    """
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        name = ctx.invoked_subcommand if ctx is not None else None
        command = f"resnetv2 {name}" if name else "resnetv2"
        text = " ".join(error.format_message().split()).removesuffix(".")
        raise WrongInput(f"{text}; {command} --help lists what there is") from error


class PathName(click.Path):
    """A path that is some text in UTF-8: it is printed, and written to files."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = str(value)
        if not text.strip():
            self.fail("expected a path, got nothing", param, ctx)
        if any("\ud800" <= character <= "\udfff" for character in text):
            self.fail(f"{text!r} is not in UTF-8: take another name", param, ctx)
        return super().convert(value, param, ctx)


class WrongInput(click.ClickException):
    """One line on stderr; the user can put it right.

    What a terminal would not show as it is, such as a newline in a file's name, is escaped.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it, unless another process of the run does."""
        from ..training.parallel import is_reported_elsewhere

        if self.__cause__ is None or not is_reported_elsewhere(self.__cause__):
            super().show(file)
        _tell_torchrun(self.message)
        _let_go(self)


class RunFailed(WrongInput):
    """The same for a run that failed by itself."""

    exit_code = 1


@contextmanager
def clean_errors() -> Iterator[None]:
    """Turn what the user can put right into one line: exit code 2, or 1 if the run itself failed,
    or 128 and the signal's number if it was stopped.

    Everything else is a defect of the program and keeps its traceback.
    """
    from ..core.memory import BudgetError
    from ..errors import InputError
    from ..training.loop import DivergenceError, Interrupted
    from ..training.parallel import ProcessLostError, is_silent

    try:
        yield
    except ImportError as error:
        raise WrongInput(" ".join(str(error).split())) from error
    except (InputError, BudgetError) as error:
        raise WrongInput(str(error)) from error
    except DivergenceError as error:
        if is_silent():
            sys.exit(1)
        raise RunFailed(str(error)) from error
    except ProcessLostError as error:
        raise RunFailed(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise WrongInput(
            "there is not enough memory: a smaller batch or image size needs less, and "
            "--memory segment keeps less; resnetv2 plan tells how much"
        ) from error
    except Interrupted as error:
        if not is_silent():
            click.echo(str(error), err=True)
        sys.exit(128 + error.signal)


def _tell_torchrun(message: str) -> None:
    """Let the report with which torchrun ends say why, in the place of a traceback."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"timestamp": str(int(time.time()))}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of an error hold: threads of a process group that are there when the
    interpreter ends may end it with a signal."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch has no class of its own for a CPU's.
    return "DefaultCPUAllocator" in str(error) or "Storage size calculation" in str(error)


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="resnetv2")
def main() -> None:
    """Pre-activation residual networks (ResNet V2) with fused kernels."""


if __name__ == "__main__":
    sys.exit(main())
