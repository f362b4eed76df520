"""Where there is no GPU, kernels run in Triton's interpreter, which must be asked for before
triton is imported; with one, the same tests run on it."""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from resnetv2.kernels.inspect import interpreter

    interpreter.prepare()

# cuDNN's fastest kernels add up in any order: equal bits and gradcheck need those that do not.
torch.backends.cudnn.deterministic = True
# PyTorch multiplies float32 convolutions in TF32 by default, and kernels do, in the interpreter too
# (tests/kernels/test_tf32.py); all other tests hold float32 to the precision of float32.
torch.backends.cudnn.allow_tf32 = False

# Processes side by side (pytest -n 2) would wait for each other's threads.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


# The files that take longest, before all others: with --dist loadfile a file has one process, and
# one that comes last leaves the other processes idle.
LONGEST = (
    "kernels/test_compile.py",
    "training/test_resume.py",
    "planning/test_memory.py",
    "training/test_torchrun.py",
    "test_blocks.py",
    "core/test_operators.py",
    "core/test_sync_norm.py",
    "core/test_program.py",
    "cli/test_bad_commands.py",
    "kernels/test_budgets.py",
    "cli/test_cli.py",
)


def pytest_configure(config):
    # pytest-xdist would begin with the files of most tests.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    def place(item):
        file = item.nodeid.partition("::")[0].removeprefix("tests/")
        return LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="module")
def quick_collections():
    """Collections of garbage pass by what is there already: modules, tests, their parameters."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def one_thread():
    """ATen on one thread: on tensors of a few kilobytes, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler():
    """No graph of another test counts as a recompilation of this one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def fresh_programs(request):
    """What a test patches is no part of a program's key: no other test may replay it."""
    from resnetv2.core import execution

    patches = "monkeypatch" in request.fixturenames
    if patches:
        execution.PROGRAMS.clear()
    yield
    if patches:
        execution.PROGRAMS.clear()
