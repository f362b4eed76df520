"""The machine that a run trains on: its device, its versions, and how it is made repeatable."""

import contextlib
import os
import platform
import random
import warnings
from collections.abc import Iterator
from importlib import metadata

import numpy as np
import torch

from ..errors import InputError


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
            reason = str(error).partition("\n")[0]
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
