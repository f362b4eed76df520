"""What ``launch`` gives to the driver is what Triton's own path gives, by Triton's real launcher.

The launcher runs over a libcuda that does nothing (tests/support/stub_driver.py), in a process of
its own: kernels cannot be compiled where they are interpreted.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from tests.support import stub_driver
from tests.support.compiled import compiled

pytestmark = pytest.mark.skipif(bool(stub_driver.missing()), reason=stub_driver.missing())

CASES = [
    f"{block}, {precision}"
    for block in ("basic", "basic, strided", "bottleneck", "bottleneck, strided")
    for precision in ("bfloat16", "float32")
]


@pytest.fixture(scope="module")
def found() -> Any:
    return compiled("launcher_checks.py")


@pytest.mark.parametrize("case", CASES)
def test_the_driver_gets_what_triton_gives_it(found: Any, case: str) -> None:
    """Function, stream, grid, block, shared memory and every parameter's value."""
    made = found[case]
    names = {launch["kernel"] for launch in made}
    assert {"conv_forward_kernel", "conv_dgrad_kernel", "_conv_wgrad_kernel"} <= names
    for launch in made:
        assert len(launch["theirs"]) == 1
        assert launch["ours"] == launch["theirs"], launch["kernel"]
        # The comparison sees the arguments: each tensor's address is among the parameters.
        assert launch["pointers passed"] == launch["pointers"] > 0


@pytest.mark.parametrize("case", CASES)
def test_a_second_step_goes_by_what_the_first_compiled(found: Any, case: str) -> None:
    assert [launch["kernel"] for launch in found[case] if launch["missed"]] == []


def functions(made: list[dict[str, Any]]) -> list[int]:
    return [launch["ours"][0][0] for launch in made]


def test_a_pointer_off_its_alignment_has_its_own_kernel(found: Any) -> None:
    made = found["alignment"]
    assert all(launch["ours"] == launch["theirs"] for launch in made)
    aligned, off, aligned_again, off_again = functions(made)
    assert aligned != off
    assert (aligned_again, off_again) == (aligned, off)
    assert [launch["missed"] for launch in made] == [True, True, False, False]


def test_a_changed_switch_for_tf32_is_honoured(found: Any) -> None:
    exact, rounded, exact_again, rounded_again = (functions(made) for made in found["tf32"])
    assert exact != rounded
    assert (exact_again, rounded_again) == (exact, rounded)


def test_hooks_around_launches_are_called(found: Any) -> None:
    assert found["hooks"] == 2 * ["_moments_kernel", "end"]
