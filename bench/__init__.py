"""Benchmarks; their reports are under ``bench/reports/``, one folder a device."""
