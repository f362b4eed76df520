"""Imports go one way and no module reaches itself, deferred imports included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each part may import the parts before it (resnetv2/README.md, "The house"); names and errors are
# for all.
BELOW = {
    "kernels": set(),
    "errors": set(),
    "names": {"kernels"},
    "core": {"kernels", "names", "errors"},
    "blocks": {"core", "kernels", "names", "errors"},
    "models": {"blocks", "core", "kernels", "names", "errors"},
    "fuse": {"models", "blocks", "core", "kernels", "names", "errors"},
    "planning": {"models", "blocks", "core", "kernels", "names", "errors"},
    "data": {"names", "errors"},
}
BELOW["training"] = {"data", "planning", "fuse"} | BELOW["planning"]
# What doctor and the benchmarks share.
BELOW["measuring"] = {"training", *BELOW["training"]}
BELOW["doctor"] = {"measuring", *BELOW["measuring"]}
BELOW["studies"] = {"measuring", *BELOW["measuring"]}
BELOW["train"] = {"training", *BELOW["training"]}
BELOW["visualization"] = {"studies", *BELOW["studies"]}
BELOW["cli"] = {"studies", "train", "visualization", "doctor", *BELOW["studies"]}
BELOW["cli"].add("_started")
BELOW["_started"] = set()
BELOW["__main__"] = {"cli"}
# The package's own namespace: what a user imports.
BELOW["__init__"] = {"_started", "data", "fuse", *BELOW["planning"], "planning", "doctor"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("resnetv2", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts)


SOURCES = {
    module_of(path): path
    for folder in ("resnetv2", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.is_relative_to(ROOT / "resnetv2" / "kernels")
}


def imports_of(module: str) -> set[str]:
    """The project's modules that a module imports anywhere, packages as their ``__init__``."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            targets = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, name in targets:
            for candidate in (
                f"{base}.{name}",
                f"{base}.{name}.__init__",
                base,
                f"{base}.__init__",
            ):
                if candidate in SOURCES:
                    found.add(candidate)
                    break
    return found


IMPORTS = {module: imports_of(module) for module in SOURCES}


def part_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("part", sorted({part_of(module) for module in SOURCES}))
def test_imports_go_down(part: str) -> None:
    upwards = {
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in targets
        if part_of(module) == part and part_of(target) not in {part, *BELOW[part]}
    }
    assert not upwards


def test_no_module_reaches_itself() -> None:
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in finished:
            for target in sorted(IMPORTS[module]):
                visit(target, (*path, module))
            finished.add(module)

    for module in SOURCES:
        visit(module, ())


def test_library_does_not_look_at_its_kernels() -> None:
    """kernels/inspect is for tests, benchmarks and doctor."""
    users = {
        part_of(module)
        for module, targets in IMPORTS.items()
        if any(target.startswith("resnetv2.kernels.inspect") for target in targets)
        and not module.startswith("resnetv2.kernels.inspect")
    }
    assert users == {"doctor", "measuring"}


def test_few_modules_stand_at_the_root() -> None:
    """What a stranger opens first."""
    root = [module for module in SOURCES if module.count(".") == 1]
    assert len([module for module in root if module != "resnetv2._started"]) <= 8
