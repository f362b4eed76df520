"""Timing the few tiles that a shape can use, where the user asks for it, and remembering the best.

Off unless RESNETV2_AUTOTUNE=1: a timing race decides differently from run to run, and the tile
decides the order of additions, so the promise of equal bits would hold only within a
process. With it on, a choice holds for the process and, through a JSON file in RESNETV2_CACHE_DIR
(~/.cache/resnetv2), for later ones on the same device and version of Triton.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from . import launch, recording
from .launch import Config

# Milliseconds that a candidate warms up and is timed for: a network's shapes in seconds.
_WARMUP, _REPEAT = 5, 20

_chosen: dict[str, Config] = {}


def enabled() -> bool:
    """Whether tiles are timed: asked for, and on a GPU (no interpreter, no dry run)."""
    if os.environ.get("RESNETV2_AUTOTUNE") != "1" or launch.INTERPRET:
        return False
    if recording.gpu() is not None:
        return False  # tensors without memory
    if not torch.cuda.is_available():
        return False
    return type(triton.runtime.driver.active).__module__.startswith("triton.backends.")


def cache_file() -> Path:
    """Where choices are kept."""
    folder = os.environ.get("RESNETV2_CACHE_DIR")
    return (Path(folder) if folder else Path.home() / ".cache" / "resnetv2") / "tiles.json"


def device_name() -> str:
    """Name and capability of the current GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{properties.name} {properties.major}.{properties.minor}"


def time_milliseconds(run: Callable[[], Any]) -> float:
    """Median time of ``run`` on the current GPU."""
    return float(triton.testing.do_bench(run, warmup=_WARMUP, rep=_REPEAT, return_mode="median"))


def _read(path: Path) -> dict[str, list[int]]:
    """The file's choices; none, with a warning, if it cannot be understood."""
    try:
        entries = json.loads(path.read_text())
        return {str(key): [int(value) for value in tile] for key, tile in entries.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is ignored: {error}", RuntimeWarning, stacklevel=4)
        return {}


def _write(path: Path, key: str, config: Config) -> None:
    """Add a choice to the file, replaced as a whole: a reader never sees half of one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = _read(path) | {key: list(config)}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(entries, file, indent=0, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"{path} cannot be written: {error}", RuntimeWarning, stacklevel=4)


def choices() -> dict[str, list[int]]:
    """The tiles that this process has chosen by timing, by device, version, kernel and shape."""
    return {name: list(config) for name, config in _chosen.items()}


def take(tiles: dict[str, list[int]]) -> None:
    """Choose these, as ``choices`` gave them, before the file's and before any timing."""
    _chosen.update({name: Config._make(tile) for name, tile in tiles.items()})


def choose(
    kernel: str,
    key: Sequence[Any],
    candidates: Sequence[Config],
    run: Callable[[Config], Any],
    *,
    timer: Callable[[Callable[[], Any]], float] = time_milliseconds,
    device: Callable[[], str] = device_name,
) -> Config:
    """The fastest of ``candidates`` for ``kernel`` on a shape, timed at most once a process.

    Args:
        kernel, key: name and everything that the choice may depend on (shape, dtypes).
        candidates: the heuristic's first; it is also taken where nothing can be timed.
        run: runs the kernel with a tile; may be called many times.
        timer: of a function of no arguments, in any unit. device: names what the times belong to.
    """
    name = "/".join(str(part) for part in (device(), triton.__version__, kernel, *key))
    if _chosen.get(name) in candidates:
        return _chosen[name]
    path = cache_file()
    known = _read(path).get(name)
    remembered = [c for c in candidates if list(c) == known]
    if remembered or len(candidates) == 1:
        best = (remembered or list(candidates))[0]
    elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        # A graph must not hold the trial runs.
        best = candidates[0]
    else:
        times = []
        for candidate in candidates:
            try:
                with recording.paused():
                    times.append(timer(functools.partial(run, candidate)))
            except launch.KernelError:
                times.append(math.inf)
        best = candidates[times.index(min(times))]
        if min(times) < math.inf:
            _write(path, name, best)
    _chosen[name] = best
    return best
