"""What ``launch`` gives to the driver is what Triton's own path gives, by Triton's real launcher.

The launcher runs over a libcuda that does nothing (kernels/inspect/stub_driver.py), in a process of
its own: kernels cannot be compiled where they are interpreted.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels need Triton")

from resnetv2.kernels import launch  # noqa: E402
from resnetv2.kernels.inspect import stub_driver  # noqa: E402
from tests.support.compiled import checked  # noqa: E402

CASES = ("basic", "basic, strided", "bottleneck", "bottleneck, strided")


@pytest.fixture(scope="module")
def found() -> Any:
    if stub_driver.missing():
        pytest.skip(stub_driver.missing())
    return checked("launcher_checks")


def test_contraction_is_asked_for() -> None:
    """Versions of Triton have other defaults, and so would results have other roundings."""
    asked: dict[str, Any] = {}
    launch._first({(1,): lambda *args, **options: asked.update(options)}, (1,), (), {"BLOCK": 16})
    assert asked == {"BLOCK": 16, "enable_fp_fusion": True}


@pytest.mark.parametrize("case", CASES)
def test_the_driver_gets_what_triton_gives_it(found: Any, case: str) -> None:
    """Function, stream, grid, block, shared memory and every parameter's value."""
    made = found[case]
    names = {one["kernel"] for one in made}
    assert {"_conv_forward_kernel", "_conv_dgrad_kernel", "_conv_wgrad_kernel"} <= names
    for one in made:
        assert len(one["theirs"]) == 1
        assert one["ours"] == one["theirs"], one["kernel"]
        # The comparison sees the arguments: each tensor's address is among the parameters.
        assert one["pointers passed"] == one["pointers"] > 0


@pytest.mark.parametrize("case", CASES)
def test_a_replay_gives_the_driver_what_triton_would(found: Any, case: str) -> None:
    replayed = found[f"{case}, replayed"]
    assert [one["kernel"] for one in replayed] == [one["kernel"] for one in found[case]]
    for one in replayed:
        assert one["ours"] == one["theirs"], one["kernel"]


@pytest.mark.parametrize("case", CASES)
def test_a_second_step_goes_by_what_the_first_compiled(found: Any, case: str) -> None:
    assert [one["kernel"] for one in found[case] if one["missed"]] == []


def functions(made: list[dict[str, Any]]) -> list[int]:
    return [one["ours"][0][0] for one in made]


def test_a_pointer_off_its_alignment_has_its_own_kernel(found: Any) -> None:
    made = found["alignment"]
    assert all(one["ours"] == one["theirs"] for one in made)
    aligned, off, aligned_again, off_again = functions(made)
    assert aligned != off
    assert (aligned_again, off_again) == (aligned, off)
    assert [one["missed"] for one in made] == [True, True, False, False]


def test_a_changed_switch_for_tf32_is_honoured(found: Any) -> None:
    exact, rounded, exact_again, rounded_again = (functions(made) for made in found["tf32"])
    assert exact != rounded
    assert (exact_again, rounded_again) == (exact, rounded)


def test_hooks_around_launches_are_called(found: Any) -> None:
    assert found["hooks"] == 2 * ["_moments_kernel", "end"]


# --- several devices ----------------------------------------------------------------------------


class TwoDevices:
    """A driver of two GPUs, of which number 0 is the current one."""

    def __init__(self) -> None:
        self.current = 0
        self.asked: list[int] = []
        self.utils = SimpleNamespace(get_device_properties=self.properties)

    def properties(self, number: int) -> dict[str, int]:
        self.asked.append(number)
        return {"multiprocessor_count": (132, 20)[number]}

    def get_current_device(self) -> int:
        return self.current

    def get_current_target(self) -> Any:
        return SimpleNamespace(backend="cuda", arch=(90, 80)[self.current])

    def get_current_stream(self, number: int) -> int:
        return 10 + number

    @contextmanager
    def guard(self, device: Any) -> Any:
        before, self.current = self.current, getattr(device, "index", device)
        yield
        self.current = before


class Remote:
    """What ``launch`` asks of a tensor on GPU 1."""

    is_cuda, is_meta = True, False
    dtype = torch.float32
    device = torch.device("cuda", 1)

    def get_device(self) -> int:
        return 1

    def data_ptr(self) -> int:
        return 4096


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Any:
    driver = TwoDevices()
    monkeypatch.setattr(launch, "INTERPRET", False)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch.cuda, "device", driver.guard)
    launch._device.cache_clear()
    yield driver
    launch._device.cache_clear()


def test_tiles_are_chosen_for_the_device_of_the_tensors(devices: TwoDevices) -> None:
    assert launch.device_of(Remote()) == launch.Device(20, "cuda", 80)  # type: ignore[arg-type]
    assert launch.device_of(torch.empty(1)) == launch.Device(132, "cuda", 90)
    launch.device_of(Remote())  # type: ignore[arg-type]
    assert devices.asked == [1, 0]


def test_a_launch_is_made_on_the_device_of_the_tensors(devices: TwoDevices) -> None:
    """By Triton the first time, and by what it compiled the second, on that device's stream."""
    made: list[tuple[Any, ...]] = []

    class Kernel:
        arg_names = ("x_ptr", "n", "BLOCK")
        pre_run_hooks = ()

        @staticmethod
        def fn() -> None:
            pass

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*args: Any, **constants: Any) -> Any:
                made.append(("triton", devices.current))
                return SimpleNamespace(run=started, function=7, packed_metadata=(4,))

            return run

    def started(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        made.append(("again", devices.current, (x, y, z), stream, function, rest[4:]))

    kernel, tensor = Kernel(), Remote()
    for _ in range(2):
        launch.launch(kernel, (5, 2), tensor, 3, BLOCK=64, num_warps=4)
    assert made == [("triton", 1), ("again", 1, (5, 2, 1), 11, 7, (tensor, 3, 64))]
    assert devices.current == 0
