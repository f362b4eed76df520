"""The machine that a run trains on: its device, its versions, and how it is made repeatable."""

import contextlib
import os
import platform
import random
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..kernels import choices
from ..kernels.dispatch import resolve_backend
from ..kernels.switches import allow_tf32
from ..names import AUTO
from .fields import show


def select_device(device: str | torch.device) -> torch.device:
    """The device by its name; ``auto`` is a GPU where there is one.

    Raises:
        InputError: there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that are none any more
            place = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"there is no device {str(device)!r}: expected cpu, cuda, cuda:1, ... or auto"
        ) from error
    try:
        torch.empty(0, device=place)
    # AssertionError or ImportError where torch was built without it, RuntimeError and
    # NotImplementedError with its reasons in many lines where it computes nothing there.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = "this PyTorch does not compute there"
        if place.type == "cuda":
            # Its first sentence: advice on drivers and kernels follows.
            reason = str(error).partition("\n")[0].partition(". ")[0]
        raise InputError(
            f"cannot use device {str(device)!r}: {reason}; take --device cpu"
        ) from error
    if place.type == "meta":
        raise InputError("cannot use device 'meta': it computes nothing")
    return place


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's kind and number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {os.cpu_count()} cores)"


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("resnetv2", "torchvision", "triton", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


# Variables of the environment that choose between implementations of one function.
_SWITCHES = ("RESNETV2_BACKEND", "RESNETV2_STREAM", "TRITON_INTERPRET")


def machine(device: torch.device, backend: str = AUTO) -> dict[str, Any]:
    """What decides the roundings of a run beside its options: a value by name, None if not set.

    backend: the run's.
    """
    versions = package_versions()
    name = device_name(device)
    if device.type == "cpu":
        # ATen has kernels for each set of vector instructions; the number of cores decides nothing.
        name = f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    return {
        "threads": torch.get_num_threads(),
        "device": name,
        **{f"version of {package}": versions.get(package) for package in ("torch", "triton")},
        "measured choices": choices_digest(device, backend),
        "TF32": device.type == "cuda" and allow_tf32(),
        **{name: os.environ.get(name) for name in _SWITCHES},
    }


def machine_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each value of ``before``, an answer of ``machine``, that is another ``now``."""
    return [
        f"{name} was {show(before.get(name))} and is {show(now.get(name))}: the same function with "
        "other roundings"
        for name in before
        if before.get(name) != now.get(name)
    ]


def choices_digest(device: torch.device, backend: str = AUTO) -> str | None:
    """Of what ``resnetv2 doctor --tune`` measured on this device; None where nothing of it is used.

    A run that goes on with others has other roundings.
    """
    if backend not in (AUTO, "triton") or resolve_backend(AUTO, device) != "triton":
        return None
    name = choices.device_name(torch.empty(0, device=device))
    return None if name is None else choices.measured(name).digest


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute with so many CPU threads, None: with as many as before; put them back in the end."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


@contextlib.contextmanager
def reproducible(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's generators and pin cuDNN's choices; in the end put these and the generators of
    Python and NumPy back."""
    cuda = [device] if device.type == "cuda" else []
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    others = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before
            random.setstate(others[0])
            np.random.set_state(others[1])  # noqa: NPY002
