"""The one place that imports torchvision.

torchvision looks up the operators `nms` and `qnms` of its own C extension while it is imported.
Beside a build of torch that the extension was not made for (a CPU build of torch with the wheel
of torchvision that registries carry, which is made for CUDA) the extension does not load and the
import fails, although data sets and transforms need no operator at all. Declaring the operators'
schemas first is enough; calling one still fails, as it must.
"""

import importlib
import importlib.util
import sys
import threading
from types import ModuleType

import torch

# As torchvision's C extension declares them (torchvision/csrc/ops/nms.cpp, quantized/).
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# Operators live only as long as the Library that defined them.
_declared: torch.library.Library | None = None

# Threads decode images: the second try of one must not be another's first.
_lock = threading.RLock()


def import_torchvision() -> ModuleType:
    """Import and return `torchvision`, whether or not its C extension loads.

    A torchvision that imports by itself is left as it is. Repeated calls cost a dictionary look-up.
    Threads may call it at once.

    Raises:
        ImportError: torchvision is not installed, or fails at import for another reason than
            operators that its C extension did not register.
    """
    with _lock:
        return _import()


def _import() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ImportError(
            "torchvision is not installed, and loading images needs it: "
            "python -m pip install torchvision"
        ) from error
    except (RuntimeError, AttributeError) as error:
        if not _is_missing_operator(error):
            raise ImportError(f"torchvision is installed but fails at import: {error}") from error
    _declare_operators()
    _forget_half_import()
    try:
        return importlib.import_module("torchvision")
    except (RuntimeError, AttributeError) as error:
        raise ImportError(
            f"torchvision does not fit torch {torch.__version__} and fails at import: {error}"
        ) from error


def _is_missing_operator(error: Exception) -> bool:
    return any(
        f"torchvision::{name}" in str(error) and not _is_registered(name) for name in _SCHEMAS
    )


def _is_registered(name: str) -> bool:
    return hasattr(torch.ops.torchvision, name)


def _declare_operators() -> None:
    global _declared
    if _declared is None:
        # A fragment, because the extension, had it loaded, would own the namespace.
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        for name, schema in _SCHEMAS.items():
            if not _is_registered(name):
                _declared.define(schema)


def _forget_half_import() -> None:
    """Drop what the failed import left behind: `import torchvision` would hand it out as whole."""
    # Of a copy: other threads import other packages meanwhile.
    for name in list(sys.modules):
        if name.split(".")[0] == "torchvision":
            del sys.modules[name]
