"""Measured figures in the README are those of committed reports."""

import csv
from pathlib import Path

import pytest

from bench.memory_modes import REPORTS, table

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
TABLES = sorted(REPORTS.glob("*/memory-modes-*.csv"))


@pytest.mark.parametrize("path", TABLES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_memory_table_is_the_reports(path):
    assert table(path) in README


def test_there_is_a_report():
    assert TABLES


@pytest.mark.parametrize(
    "path", sorted(REPORTS.glob("*/extreme-depth-*.csv")), ids=lambda p: p.stem
)
def test_extreme_depth_is_the_reports(path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert f"with {rows[0]['peak_mb']} MB beyond" in README
    losses = [float(row["loss"]) for row in rows]
    half = len(losses) // 2
    assert sum(losses[half:]) < sum(losses[:half]), "the README says that the loss falls"
