"""How far two runs' ratios to eager lie apart.

    python -m bench.compare BEFORE.csv AFTER.csv [--within 0.2]

Prints, for times and peaks of each suite, the median and the largest distance of the ratios that
both runs have, and exits with 1 where one is larger than ``--within``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.schema import Row, read


class Distance(NamedTuple):
    """A ratio in both runs; ``relative`` is their distance over the smaller."""

    row: Row
    before: float
    after: float

    @property
    def relative(self) -> float:
        return max(self.before, self.after) / min(self.before, self.after) - 1


def distances(before: Sequence[Row], after: Sequence[Row]) -> list[Distance]:
    """The ratios to eager of times and peaks that both runs have, in the order of ``after``."""

    def key(row: Row) -> tuple[str, ...]:
        return row.suite, row.case, row.provider, row.mode, row.metric

    known = {key(row): row.ratio_to_eager for row in before}
    result = []
    for row in after:
        old = known.get(key(row))
        if row.metric in ("time", "peak") and old and row.ratio_to_eager:
            result.append(Distance(row, old, row.ratio_to_eager))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--within", type=float, default=0.2)
    args = parser.parse_args(arguments)
    try:
        found = distances(read(args.before), read(args.after))
    except (OSError, ValueError) as error:
        print(f"expected two reports' CSVs: {error}", file=sys.stderr)
        return 2
    if not found:
        print("expected runs with cases in common, got none", file=sys.stderr)
        return 2
    for suite, metric in dict.fromkeys((d.row.suite, d.row.metric) for d in found):
        part = [d for d in found if (d.row.suite, d.row.metric) == (suite, metric)]
        worst = max(part, key=lambda d: d.relative)
        print(
            f"{suite}, {metric}: {len(part)} ratios, median distance "
            f"{statistics.median(d.relative for d in part):.1%}, largest {worst.relative:.1%} "
            f"({worst.row.case}, {worst.row.provider}, {worst.row.mode}: {worst.before:.3f} and "
            f"{worst.after:.3f})"
        )
    return int(any(d.relative > args.within for d in found))


if __name__ == "__main__":
    sys.exit(main())
