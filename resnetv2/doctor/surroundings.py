"""The device, the versions, and what is missing, with the command that brings it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..kernels import choices
from ..kernels.dispatch import has_triton, resolve_backend
from ..training.environment import device_name, package_versions

# Files that show a GPU's driver whether or not PyTorch can use it.
_NVIDIA = Path("/proc/driver/nvidia/version")
_AMD = Path("/dev/kfd")


def backend_of(device: torch.device) -> str:
    """ "triton" or "aten": what a block takes on ``device``.

    Raises:
        InputError: ``RESNETV2_BACKEND`` asks for what there is not.
    """
    try:
        return resolve_backend("auto", device)
    except (ValueError, ImportError) as error:
        raise InputError(str(error)) from error


def environment(device: torch.device) -> dict[str, Any]:
    """What decides results and speed here, for the report."""
    facts: dict[str, Any] = {
        "versions": package_versions(),
        "system": platform.platform(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "backend": backend_of(device),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("RESNETV2_", "TRITON_")) or name == "CUDA_VISIBLE_DEVICES"
        },
        "missing": missing(device),
        "choices": _measured(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["capability"] = list(torch.cuda.get_device_capability(device))
        facts["memory_bytes"] = properties.total_memory
        facts["cuda"] = torch.version.cuda or f"ROCm {torch.version.hip}"
        facts["driver"] = _driver()
    return facts


def _measured(device: torch.device) -> dict[str, Any]:
    """The file of ``doctor --tune``: its path, what of it is used, and why not."""
    found = choices.Measured({})
    if backend_of(device) == "triton":
        name = choices.device_name(torch.empty(0, device=device))
        assert name is not None
        found = choices.measured(name)
    return {
        "file": str(choices.path()),
        "number": len(found.choices),
        "digest": found.digest,
        "note": found.note,
    }


def _driver() -> str:
    """The driver's version; empty where no tool tells."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.partition("\n")[0].strip()


def missing(device: torch.device) -> list[dict[str, str]]:
    """What would make this installation faster: what is missing, why, and how it comes here."""
    found = []

    def miss(what: str, why: str, command: str) -> None:
        found.append({"what": what, "why": why, "command": command})

    cuda = device.type == "cuda"
    if not cuda and _NVIDIA.exists():
        built = torch.version.cuda is not None
        miss(
            "a PyTorch that uses the NVIDIA GPU",
            "the driver is there; this PyTorch "
            + ("cannot start it" if built else "was built for CPUs"),
            "nvidia-smi" if built else "python -m pip install --upgrade --force-reinstall torch",
        )
    if not cuda and _AMD.exists() and torch.version.hip is None:
        miss(
            "a PyTorch that uses the AMD GPU",
            "this PyTorch was built without ROCm",
            "see https://pytorch.org/get-started/locally",
        )
    if not has_triton():
        why = "without it a GPU runs ATen's kernels, unfused" if cuda else "the kernels need it"
        miss("triton", why, "python -m pip install triton")
    if cuda and has_triton():
        if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
            miss("a C compiler", "Triton builds its launcher with it", "apt-get install gcc")
        if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
            miss("Python.h", "Triton's launcher is built with it", "apt-get install python3-dev")
    if importlib.util.find_spec("numpy") is None:
        miss("numpy", "training needs it", "python -m pip install numpy")
    return found
