"""The verdict: one sentence out of all checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .report import NOT_CHECKED, WRONG, Check

# Beyond this share of eager's time a step counts as slower: less is the machine's noise.
SLOWER = 1.05
# Where so much of a step is the host's, faster kernels do not show.
_HOST_BOUND = 0.8
_SHOWN = 3


def verdict(checks: Sequence[Check], facts: dict[str, Any], ours: str, eager: str) -> str:
    """ "right, 2.9x eager" or what stands against it.

    ours, eager: names of the two providers in ``Check.name``, after the case's and a comma.
    """
    wrong = [check for check in checks if check.state == WRONG]
    if wrong:
        shown = "; ".join(f"{check.name}: {check.detail}" for check in wrong[:_SHOWN])
        more = f"; {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        return f"wrong: {len(wrong)} of {len(checks)} checks failed: {shown}{more}"
    if checks and all(check.state == NOT_CHECKED for check in checks):
        return f"nothing was checked: {checks[-1].detail}"
    left_out = sum(check.state == NOT_CHECKED for check in checks)
    suffix = f"; {left_out} of {len(checks)} checks could not be made" if left_out else ""
    return _of_speed(checks, facts, ours, eager) + suffix


def _of_speed(checks: Sequence[Check], facts: dict[str, Any], ours: str, eager: str) -> str:
    """What is right, and how fast."""
    speeds = {check.name: check for check in checks if check.part == "speed" and check.figures}
    suffix = f", {ours}"
    mine = {n.removesuffix(suffix): c for n, c in speeds.items() if n.endswith(suffix)}
    if not mine:
        return "right; nothing was timed"
    slower = {name: c for name, c in mine.items() if c.figures["to_eager"] > SLOWER}
    if slower:
        listed = ", ".join(
            f"{name} ({1 / check.figures['to_eager']:.2f}x)" for name, check in slower.items()
        )
        reason = _reason(slower, speeds, facts, ours)
        return f"right, but slower than eager for {listed}: {reason}"
    name, last = list(mine.items())[-1]
    words = f"right, {1 / last.figures['to_eager']:.2g}x eager ({name}"
    graphed = [speeds.get(f"{name}, {who} + graph") for who in (eager, ours)]
    if graphed[0] is not None and graphed[1] is not None:
        ratio = graphed[0].figures["seconds"] / graphed[1].figures["seconds"]
        words += f"; both in a CUDA graph {ratio:.2g}x"
    return f"{words}), {last.figures['peak_to_eager']:.2g}x its memory"


def _reason(
    slower: dict[str, Check], speeds: dict[str, Check], facts: dict[str, Any], ours: str
) -> str:
    """Why, as far as the figures tell."""
    if "capability" not in facts:
        return "on a CPU the algorithm runs in plain PyTorch and computes normalised inputs twice"
    if facts["backend"] == "aten":
        known = [each["what"] for each in facts["missing"]]
        if "triton" in known:
            return "triton is missing, so that nothing is fused"
        if facts["capability"] < [8, 0]:
            return "below sm_80 ATen's kernels run"
        return "RESNETV2_BACKEND asks for ATen's kernels"
    for name, check in slower.items():
        host = check.figures.get("host_seconds", 0.0)
        if host > _HOST_BOUND * check.figures["seconds"]:
            graphed = speeds.get(f"{name}, {ours} + graph")
            gain = f", which takes {1e3 * graphed.figures['seconds']:.3g} ms" if graphed else ""
            return (
                f"the host takes {1e3 * host:.3g} ms of a step of "
                f"{1e3 * check.figures['seconds']:.3g} ms: capture it as a CUDA graph{gain}"
            )
    return "the kernels take longer than ATen's there: report it, with --json FILE"
