"""Let torchvision be imported beside a build of torch that its C extension does not fit.

torchvision looks up the operators `nms` and `qnms` of its own C extension while it is imported.
Beside a build of torch that the extension was not made for (a CPU build of torch with the wheel
of torchvision that registries carry, which is made for CUDA) the extension does not load and the
import fails, although data sets and transforms need no operator at all. Declaring the operators'
schemas first is enough; calling one still fails, as it must.

``import resnetv2`` has every later import of torchvision mended so: of the library's own data sets,
and of a package such as timm.
"""

import functools
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

# As torchvision's C extension declares them (torchvision/csrc/ops/nms.cpp, quantized/).
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# Operators live only as long as the Library that defined them.
_declared: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """Import and return `torchvision`, whether or not its C extension loads.

    Raises:
        ImportError: torchvision is not installed, or fails at import for another reason than
            operators that its C extension did not register.
    """
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
        raise ImportError(f"torchvision is installed but fails at import: {error}") from error


class _Finder(MetaPathFinder):
    """Finds torchvision as the other finders do, and has its import tried a second time."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                loader = spec.loader
                if loader is not None:
                    run = functools.partial(_run, loader)
                    loader.exec_module = run  # type: ignore[method-assign]  # of this one alone
                return spec
        return None


def _run(loader: Loader, module: ModuleType) -> None:
    """Run torchvision's code, and once more with its operators declared where they are missing.

    A torchvision that imports by itself is left as it is.
    """
    before = dict(vars(module))
    execute = functools.partial(type(loader).exec_module, loader, module)
    try:
        execute()
    except (RuntimeError, AttributeError) as error:
        if not _is_missing_operator(error):
            raise
        _declare_operators()
        _forget_half_import()
        vars(module).clear()
        vars(module).update(before)
        execute()


sys.meta_path.insert(0, _Finder())


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
    """Drop the submodules that the failed import left behind, which hold parts of it."""
    # Of a copy: other threads import other packages meanwhile.
    for name in list(sys.modules):
        if name.startswith("torchvision."):
            del sys.modules[name]
