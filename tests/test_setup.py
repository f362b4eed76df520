"""Installation: one package from two folders, torchvision beside any torch, the README."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import resnetv2
from tests.support.processes import ROOT, python


def run_python(code: str, *path: Path) -> str:
    """Run `code` away from the checkout, with nothing but `path` before the installed packages."""
    return python("-c", code, path=path, cwd=Path(sys.executable).parent)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from a copy of the checkout, so that no build folder is left in it."""
    pytest.importorskip("setuptools", minversion="77.0.3")
    source = tmp_path_factory.mktemp("source")
    for name in ("resnetv2", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "-w", str(target), "."],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=120,
    )
    return next(target.glob("*.whl"))


def test_wheel_holds_one_package(wheel: Path) -> None:
    assert wheel.name.startswith(f"resnetv2-{resnetv2.__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"resnetv2"}
    sources = {
        ("resnetv2/" * (folder == "kernels")) + path.relative_to(ROOT).as_posix()
        for folder in ("resnetv2", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        if "resnetv2/kernels" not in path.as_posix()
    }
    assert {name for name in names if name.endswith(".py")} >= sources
    assert "resnetv2/py.typed" in names
    assert {f"resnetv2/training/recipes/{name}.yaml" for name in ("fast", "paper")} < {*names}


def test_wheel_imports_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    printed = run_python(
        "import resnetv2.kernels, resnetv2.cli; print(resnetv2.kernels.__file__)", tmp_path
    )
    assert printed.strip() == str(tmp_path / "resnetv2" / "kernels" / "__init__.py")


def test_installed_package_imports_from_elsewhere() -> None:
    try:
        metadata.distribution("resnetv2")
    except metadata.PackageNotFoundError:
        pytest.skip("resnetv2 is not installed in this environment")
    run_python("import resnetv2.kernels, resnetv2.cli")


def test_import_leaves_out_what_is_slow() -> None:
    """Two seconds of PyTorch's compiler, one of Triton: only what uses them imports them."""
    slow = ("torch._dynamo", "torch._inductor", "triton", "torchvision", "matplotlib")
    found = python("-c", f"import resnetv2, sys; print([m for m in {slow} if m in sys.modules])")
    assert found == "[]\n"


def test_nothing_imports_kernels_by_its_folder_name() -> None:
    """A package named `kernels` exists in registries."""
    for folder in ("resnetv2", "kernels", "tests", "bench"):
        for path in (ROOT / folder).glob("**/*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                modules = []
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    modules = [node.module or ""]
                assert all(module.split(".")[0] != "kernels" for module in modules), path


def test_readme_has_two_setup_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Set up\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```\w*\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    assert [block.count("\n") for block in blocks] == [1, 1]
    assert re.fullmatch(
        r"python -m pip install -c constraints.txt -e \. && python -m resnetv2 train .+\n",
        blocks[0],
    )
    assert blocks[1] == (
        "python -m pip install -c constraints.txt -e '.[test]' && "
        "python -m pytest -n 2 --dist loadfile\n"
    )


def test_constraints_pin_what_setup_asks_for() -> None:
    pins = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    lists = [node for node in ast.walk(tree) if isinstance(node, ast.List)]
    asked = set()
    for node in lists:
        for item in node.elts:
            if isinstance(item, ast.Constant) and isinstance(item.value, str):
                name = re.split(r"[><=;]", item.value)[0]
                if name.isidentifier() or "-" in name:
                    asked.add(name)
    asked -= {"resnetv2", "LICENSE"}
    assert {"torch", "torchvision", "triton", "numpy", "pytest"} <= asked
    assert asked <= pins


# What torchvision does at import: registers a fake for operators that its C extension declares.
FAKE_TORCHVISION = """
import torch
{before}
for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{{name}}")(lambda dets, scores, iou: scores)
WHOLE = True
"""

HEALTHY = """
lib = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    lib.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


@pytest.mark.parametrize(
    ("before", "declared"),
    [
        pytest.param(HEALTHY, False, id="healthy"),
        pytest.param("from torchvision import extension", True, id="extension-does-not-load"),
    ],
)
def test_torchvision_imports(before: str, declared: bool, tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE_TORCHVISION.format(before=before))
    (package / "extension.py").write_text("")
    code = (
        "from resnetv2.data import _torchvision as shim\n"
        "import sys\n"
        "module = shim.import_torchvision()\n"
        "import torchvision\n"
        "assert torchvision is module is shim.import_torchvision() and torchvision.WHOLE\n"
        "assert torchvision.__file__.startswith(sys.path[1]), torchvision.__file__\n"
        f"assert (shim._declared is not None) == {declared}\n"
    )
    run_python(code, tmp_path, ROOT)


def test_threads_import_torchvision_at_once(tmp_path: Path) -> None:
    """As those that decode images do; here while one declares the operators."""
    package = tmp_path / "torchvision"
    package.mkdir()
    before = "import time; time.sleep(0.05)\nfrom torchvision import extension"
    (package / "__init__.py").write_text(FAKE_TORCHVISION.format(before=before))
    (package / "extension.py").write_text("")
    code = (
        "from resnetv2.data import _torchvision as shim\n"
        "import time\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from torch.library import Library\n"
        "define = Library.define\n"
        "Library.define = lambda *arguments: [define(*arguments), time.sleep(0.5)]\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    modules = [pool.submit(shim.import_torchvision) for _ in range(4)]\n"
        "assert len({id(module.result()) for module in modules}) == 1\n"
    )
    run_python(code, tmp_path, ROOT)


def test_real_torchvision_has_data_sets() -> None:
    """As timm imports it: whoever has imported resnetv2 needs to know nothing of it."""
    code = (
        "import resnetv2\n"
        "from torchvision import datasets, transforms\n"
        "assert datasets.ImageFolder and transforms.functional.resize\n"
    )
    run_python(code, ROOT)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(
            None,
            "torchvision is not installed, and loading images needs it: "
            "python -m pip install torchvision",
            id="missing",
        ),
        pytest.param(
            "raise RuntimeError('built for another moon')",
            "torchvision is installed but fails at import: built for another moon",
            id="broken-otherwise",
        ),
    ],
)
def test_unusable_torchvision_is_a_clear_error(
    source: str | None, message: str, tmp_path: Path
) -> None:
    prepare = "sys.modules['torchvision'] = None"
    if source is not None:
        (tmp_path / "torchvision.py").write_text(source)
        prepare = "pass"
    code = (
        f"import sys\n{prepare}\n"
        "from resnetv2.data._torchvision import import_torchvision\n"
        "try:\n    import_torchvision()\n"
        "except ImportError as error:\n    print(error)\n"
    )
    assert run_python(code, tmp_path, ROOT).strip() == message
