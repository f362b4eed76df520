"""Measured figures in the README are those of committed reports."""

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
