"""The page of the compile matrix: every kernel's row, and what a page says of the worst."""

import csv

import pytest

pytest.importorskip("triton")

from resnetv2.kernels.inspect import compile_report
from resnetv2.kernels.inspect.cases import UNITS
from resnetv2.kernels.inspect.compile import Row


def row(target, dtype, registers, spilled=0, seconds=0.5):
    return Row(
        target=target, dtype=dtype, case=f"{UNITS[0].name}: moments", kernel="_moments_kernel",
        constants={"C": 64, "BLOCK_M": 32, "BLOCK_C": 64}, key="", digest="0123", grid=[1, 1, 1],
        programs=1, num_warps=1, num_stages=3, registers=registers, spilled=spilled, shared=2048,
        seconds=seconds, matrix=0, wgmma=0, local=0, multiply_adds=0, rounded=0, instructions=None,
        nbytes=0, ratio=None, tile_ratio=0.5, unsure="",
    )  # fmt: skip


def lines(folder, start):
    return [s for s in (folder / "README.md").read_text().splitlines() if s.startswith(start)]


def test_page_tells_the_worst_of_each_target(tmp_path):
    rows = [row("sm_90", "bf16", 100), row("sm_80", "bf16", 80, 40, 9.25), row("sm_80", "bf16", 99)]
    compile_report.write(tmp_path, rows)
    assert lines(tmp_path, "| sm_80 | bf16 |") == [
        "| sm_80 | bf16 | 2 | 99 | 1 (40) | 2,048 | 9.2 | 166,912 |"
    ]
    assert len(lines(tmp_path, "| sm_80 | 9.25 | bf16 | `_moments_kernel`")) == 1
    assert lines(tmp_path, f"| {UNITS[0].name} |") == [
        f"| {UNITS[0].name} | sm_80 | 2 | 99 | 1 (40) | 2,048 | 9.2 |",
        f"| {UNITS[0].name} | sm_90 | 1 | 100 | 0 | 2,048 | 0.5 |",
    ]
    assert compile_report.versions() in " ".join((tmp_path / "README.md").read_text().split())


def test_a_part_replaces_its_own_rows_alone(tmp_path):
    compile_report.write(tmp_path, [row("sm_90", "bf16", 100), row("sm_80", "bf16", 80)])
    compile_report.write(tmp_path, [row("sm_90", "bf16", 90), row("sm_90", "tf32", 50)])
    with (tmp_path / "kernels.csv").open() as file:
        found = [(r["target"], r["dtype"], r["registers"]) for r in csv.DictReader(file)]
    assert found == [("sm_80", "bf16", "80"), ("sm_90", "tf32", "50"), ("sm_90", "bf16", "90")]


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [row("sm_80", "bf16", 80), row("sm_90", "bf16", 100, seconds=None)]
    compile_report.write(tmp_path, rows)
    assert compile_report.read(tmp_path) == (rows, {compile_report.versions()})
