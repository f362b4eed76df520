"""A block's diagram as boxes and arrows."""

from __future__ import annotations

from matplotlib.axes import Axes

from .tracing import Diagram

_BOX = {
    "input": "#FFFFFF",
    "norm": "#CFE6F5",
    "act": "#FBE3B5",
    "conv": "#CDE9DE",
    "add": "#FFFFFF",
    "other": "#EEEEEE",
}
_SIDE = 1.75  # where the shortcut runs, in boxes' half widths from the middle


def draw_block(axes: Axes, diagram: Diagram) -> None:
    """Boxes on the residual path below one another, the shortcut beside them."""
    place = {node.name: (0.0 if node.main else _SIDE, node.level) for node in diagram.nodes}
    for node in diagram.nodes:
        x, y = place[node.name]
        for source in node.inputs:
            _connect(axes, place[source], (x, y))
        style = "circle,pad=0.25" if node.kind == "add" else "round,pad=0.35"
        axes.text(
            x,
            y,
            node.label,
            ha="center",
            va="center",
            fontsize=10 if node.main else 9,
            bbox={"boxstyle": style, "facecolor": _BOX[node.kind], "edgecolor": "#333333"},
            zorder=3,
        )
    last = diagram.nodes[-1]
    axes.annotate("", (0, last.level + 0.65), (0, last.level), arrowprops=_ARROW, zorder=1)


_ARROW = {"arrowstyle": "-|>", "color": "#333333", "shrinkA": 0, "shrinkB": 0}


def _connect(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow straight down, or round the boxes between by the side."""
    (x0, y0), (x1, y1) = start, end
    half, gap = 0.2, 0.14  # half a box's height; how close an arrow comes to the sum's circle
    if x0 == x1 and y1 - y0 == 1:
        axes.annotate("", (x1, y1 - half), (x0, y0), arrowprops=_ARROW, zorder=1)
        return
    if x1 == 0:  # into the sum from the side
        axes.plot([x0, _SIDE, _SIDE], [y0, y0, y1], color="#333333", linewidth=1, zorder=1)
        axes.annotate("", (gap, y1), (_SIDE, y1), arrowprops=_ARROW, zorder=1)
    else:  # out to a projection
        axes.plot([x0, x1], [y0, y0], color="#333333", linewidth=1, zorder=1)
        axes.annotate("", (x1, y1 - half), (x1, y0), arrowprops=_ARROW, zorder=1)
