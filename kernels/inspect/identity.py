"""What a kernel is compiled from, as a digest: where it is equal, one compiler makes the same code.

Triton's own key also has the line at which a function begins, its comments and the compiler's
files, so that it cannot be compared with a committed table's.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Mapping
from types import CodeType, ModuleType
from typing import Any

import triton
import triton.language as tl


def _referred(code: CodeType, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Functions and constants that a function's names may mean, its modules' attributes too."""
    found = {name: namespace[name] for name in code.co_names if name in namespace}
    for value in list(found.values()):
        if isinstance(value, ModuleType) and not value.__name__.startswith("triton"):
            found |= {name: getattr(value, name, None) for name in code.co_names}
    return found


def _collect(function: Any, seen: dict[str, str]) -> None:
    name = f"{function.fn.__module__}.{function.fn.__qualname__}"
    if name in seen:
        return
    tree = function.parse()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    seen[name] = ast.unparse(tree)
    for other, value in sorted(_referred(function.fn.__code__, function.fn.__globals__).items()):
        if isinstance(value, triton.JITFunction):
            _collect(value, seen)
        elif isinstance(value, tl.constexpr):
            seen[f"{name}: {other}"] = repr(value.value)


@functools.cache
def _sources(function: Any) -> str:
    """The code of a kernel and of all that it calls, without comments and docstrings."""
    seen: dict[str, str] = {}
    _collect(function, seen)
    return "\n".join(f"{name}\n{text}" for name, text in sorted(seen.items()))


def digest(
    function: Any,
    signature: Mapping[str, str],
    constants: Mapping[Any, Any],
    attributes: Mapping[Any, Any],
    num_warps: int,
    num_stages: int,
) -> str:
    """16 hexadecimal digits for a ``triton.JITFunction`` and what it is specialised for.

    Args:
        signature: type of each argument. constants: value of each that is one, by name or position.
        attributes: what is known of the others' values, such as alignment, by position.
    """
    positions = {name: (index,) for index, name in enumerate(function.arg_names)}
    values = {positions.get(name, name): str(value) for name, value in constants.items()}
    parts = (
        _sources(function), sorted(signature.items()), sorted(values.items()),
        sorted((key, str(value)) for key, value in attributes.items()), num_warps, num_stages,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
