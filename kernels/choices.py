"""How a convolution is computed: the cost model, and what was measured on this device, tiles too.

``resnetv2 doctor --tune`` writes one file, choices.json in RESNETV2_CACHE_DIR (~/.cache/resnetv2);
``dispatch`` asks ``find`` for each operation and shape. What the file does not have, the cost model
decides (``implementation``, configs.py, wgrad_config.py). Nothing is timed in a run, and a
process reads the file once: choices, and with them bits, depend on no race.

The file is an object: ``format``, and under ``devices`` for each device its ``versions``, its
``choices`` and their ``digest``. What belongs to other versions, or is damaged, is not used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import recording
from .operands import Geometry
from .switches import allow_tf32

FORMAT = 1
# A convolution's directions, and both of its gradients in one launch.
FORWARD, DGRAD, WGRAD, BOTH = OPERATIONS = ("forward", "dgrad", "wgrad", "both gradients")
# How one is computed (kernels/README.md, "Which implementation runs").
FUSED = "fused"  # prologues are applied as the kernel loads its operands
WRITTEN = "written"  # an elementwise kernel writes the operands once, the kernel reads them plain
ATEN = "aten"  # ATen's (cuDNN's) convolution, between the same elementwise kernels
# Both gradients: not in one launch, but by a kernel for each.
APART = "apart"
HOWS = (FUSED, WRITTEN, ATEN, APART)
_TILE = 6  # numbers of a tile: ``launch.Config``, ``wgrad_config.WgradConfig``


# Channels on the narrower side from which arithmetic binds a convolution of that kernel size
# (kernels/README.md, "Which implementation runs").
WIDE = {(1, 1): 512, (3, 3): 128}


def implementation(weight_shape: Sequence[int], geometry: Geometry) -> str:
    """The cost model: how a convolution with a weight (K, C, R, S) is computed, in both directions,
    where nothing was measured.

    A prologue at each tap of a 3x3 costs 2-3x its memory time in instructions, against 0.7x
    without one: its operands are written once. A 1x1 is at the memory floor with all fused. Where
    arithmetic binds, no convolution in Triton is known to be faster than cuDNN's.
    """
    k, c, *size = weight_shape
    if geometry.dilation != (1, 1) or geometry.groups != 1 or geometry.extra != (0, 0):
        return ATEN
    kernel_size = (size[0], size[1])
    if min(k, c) >= WIDE.get(kernel_size, WIDE[3, 3]):
        return ATEN
    return FUSED if kernel_size == (1, 1) else WRITTEN


class Choice(NamedTuple):
    """How an operation is computed; None: as the cost model has it. tile: its kernel's, likewise.

    seconds: what was measured, by candidate.
    """

    how: str | None
    tile: tuple[int, ...] | None = None
    seconds: Mapping[str, float] = {}


class Measured(NamedTuple):
    """A device's choices by ``key``, and their digest; none, and why the file is not used."""

    choices: Mapping[str, Choice]
    digest: str | None = None
    note: str = ""


class DamagedError(ValueError):
    """A file of choices that is not as it was written: what was expected, and what came."""


_forced: ContextVar[Mapping[str, Choice] | None] = ContextVar("forced", default=None)


@contextmanager
def forced(choices: Mapping[str, Choice]) -> Iterator[None]:
    """Inside the block each operation is computed so, whatever its shape; others by the cost model.

    The file is not asked.
    """
    token = _forced.set(choices)
    try:
        yield
    finally:
        _forced.reset(token)


def path() -> Path:
    """Where the file is."""
    folder = os.environ.get("RESNETV2_CACHE_DIR")
    return (Path(folder) if folder else Path.home() / ".cache" / "resnetv2") / "choices.json"


def key(
    operation: str, x: Sequence[int], weight: Sequence[int], geometry: Geometry, dtype: torch.dtype
) -> str:
    """What a choice is kept under.

    Args:
        x, weight: (N, C, H, W), the convolution's input, and (K, C, R, S). dtype: multiplied in.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32 and allow_tf32():
        name = "tf32"
    return f"{operation} {_times(x)} * {_place(weight, geometry)} {name}"


def _place(weight: Sequence[int], geometry: Geometry) -> str:
    stride, padding = _times(geometry.stride), _times(geometry.padding)
    return f"{_times(weight)} stride {stride} padding {padding}"


def _times(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def find(
    operation: str, x: Tensor, weight: Sequence[int], geometry: Geometry, dtype: torch.dtype
) -> Choice | None:
    """What was measured for a convolution of x, or None; arguments as of ``key``."""
    stated = _forced.get()
    if stated is not None:
        return stated.get(operation)
    device = device_name(x)
    if device is None:
        return None
    known = measured(device).choices
    return known.get(key(operation, x.shape, weight, geometry, dtype)) if known else None


def known(x: Tensor, weight: Sequence[int], geometry: Geometry) -> dict[str, tuple[str, ...]]:
    """How each direction of a convolution is computed for sizes of x that were measured on its
    device: the implementations by operation, nothing where none was."""
    device = device_name(x)
    found: dict[str, set[str]] = {}
    if device is not None:
        place = _place(weight, geometry)
        for name, choice in measured(device).choices.items():
            operation = next(o for o in OPERATIONS if name.startswith(o + " "))
            if f" * {place} " in name and operation != BOTH:
                found.setdefault(operation, set()).add(str(choice.how))
    return {operation: tuple(sorted(hows)) for operation, hows in found.items()}


def device_name(x: Tensor) -> str | None:
    """What choices for a tensor's device are kept under; None where no kernel of Triton's runs.

    Name, target and multiprocessors. Tensors without memory stand for the GPU that is here, if it
    is that which they are planned for.
    """
    if not x.is_cuda and (
        not x.is_meta or recording.gpu() is None or not torch.cuda.is_available()
    ):
        return None if x.is_meta else _of_a_stand_in(x)
    from . import launch

    device = launch.device_of(x)
    number = x.get_device() if x.is_cuda else torch.cuda.current_device()
    if x.is_meta and device.multiprocessors != _multiprocessors(number):
        return None
    return f"{torch.cuda.get_device_name(number)}, {_described(device)}"


def _multiprocessors(number: int) -> int:
    return int(torch.cuda.get_device_properties(number).multi_processor_count)


def _of_a_stand_in(x: Tensor) -> str:
    """The interpreter, or the driver that stands in for a GPU in tests."""
    from . import launch

    return _described(launch.device_of(x))


def _described(device: Any) -> str:
    return f"{device.target}, {device.multiprocessors} multiprocessors"


@functools.cache
def versions() -> dict[str, str]:
    """What decides how fast a kernel is, beside the device."""
    found = {"torch": str(torch.__version__)}
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    if cudnn is not None:
        found["cudnn"] = str(cudnn)
    for package in ("triton", "resnetv2"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def digest(device: str, choices: Mapping[str, Choice]) -> str:
    """Of all that decides bits: device, versions, and each choice without its times."""
    what = {name: [choice.how, choice.tile] for name, choice in choices.items()}
    text = json.dumps([device, versions(), what], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measured(device: str) -> Measured:
    """The file's choices for a device. A process reads the file once.

    Warns:
        RuntimeWarning: the file is damaged, once.
    """
    return _measured(path(), device)


@functools.cache
def _measured(file: Path, device: str) -> Measured:
    try:
        sections = _sections(file)
        section = sections.get(device)
        if section is None:
            others = ", ".join(sections) or "no device"
            note = f"{file} has choices for {others}, none for {device}" if sections else ""
            return Measured({}, note=note)
        if section.get("versions") != versions():
            was, now = (_listed(v) for v in (section.get("versions"), versions()))
            return Measured({}, note=f"{file} was measured with {was}, here are {now}")
        found = _choices(device, section)
    except DamagedError as error:
        note = f"{file} is not used: {error}"
        warnings.warn(f"{note}; the cost model chooses", RuntimeWarning, stacklevel=2)
        return Measured({}, note=note)
    return Measured(found, section["digest"])


def forget() -> None:
    """Read the file again when it is next asked for."""
    _measured.cache_clear()


def _listed(found: Any) -> str:
    if not isinstance(found, Mapping):
        return repr(found)
    return ", ".join(f"{name} {number}" for name, number in sorted(found.items()))


def _sections(file: Path) -> dict[str, Any]:
    """What the file has, by device; nothing where there is no file.

    Raises:
        DamagedError: it cannot be read.
    """
    try:
        text = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DamagedError(f"it cannot be read: {error.strerror}") from error
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DamagedError(
            f"expected JSON, got {len(text)} bytes that are none: {error}"
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise DamagedError(f"expected format {FORMAT}, got {found!r}")
    sections = content.get("devices")
    if not isinstance(sections, dict) or not all(isinstance(s, dict) for s in sections.values()):
        raise DamagedError(f"expected objects by device, got {sections!r:.60}")
    return sections


def _choices(device: str, section: Mapping[str, Any]) -> dict[str, Choice]:
    """A section's choices.

    Raises:
        DamagedError: they are others than those of its digest.
    """
    entries = section.get("choices")
    if not isinstance(entries, dict):
        raise DamagedError(f"expected an object of choices, got {entries!r:.60}")
    found = {name: _choice(name, entry) for name, entry in entries.items()}
    expected, came = section.get("digest"), digest(device, found)
    if expected != came:
        raise DamagedError(f"expected choices with digest {expected}, got some with {came}")
    return found


def _choice(name: str, entry: Any) -> Choice:
    entry = entry if isinstance(entry, dict) else {}
    how, tile = entry.get("how"), entry.get("tile")
    whole = tile is None or (
        isinstance(tile, list) and len(tile) == _TILE and all(isinstance(n, int) for n in tile)
    )
    if how not in HOWS or not whole:
        raise DamagedError(
            f"expected one of {', '.join(HOWS)} and a tile of {_TILE} numbers for {name}, "
            f"got {how!r} and {tile!r:.60}"
        )
    seconds = entry.get("seconds")
    return Choice(how, None if tile is None else tuple(tile), seconds if seconds else {})


def check_writable() -> None:
    """Raises OSError where ``write`` could not write."""
    folder = path().parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):
        pass


def write(device: str, choices: Mapping[str, Choice]) -> str:
    """Add a device's choices to the file, and give the digest of all that it then has for it.

    Those of other devices stay, and its own of other shapes, if versions are the same. The file is
    replaced as a whole: a reader never sees half of one.

    Raises:
        OSError: it cannot be written; what is there stays.
    """
    file = path()
    try:
        sections = _sections(file)
    except DamagedError:
        sections = {}
    known: dict[str, Choice] = {}
    if sections.get(device, {}).get("versions") == versions():
        try:
            known = _choices(device, sections[device])
        except DamagedError:
            known = {}
    known |= choices
    found = digest(device, known)
    sections[device] = {
        "versions": versions(),
        "digest": found,
        "choices": {name: choice._asdict() for name, choice in known.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=file.parent, delete=False, suffix=".part", encoding="utf-8"
    ) as out:
        try:
            json.dump({"format": FORMAT, "devices": sections}, out, indent=1, sort_keys=True)
            out.flush()
            os.replace(out.name, file)
        except BaseException:
            os.unlink(out.name)
            raise
    forget()
    return found
