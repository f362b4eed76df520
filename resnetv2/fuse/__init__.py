"""Recognise pre-activation blocks of foreign models by their dataflow, and run them as chains."""

from .rewrite import BlockReport, Report, explain, fuse, unfuse

__all__ = ["BlockReport", "Report", "explain", "fuse", "unfuse"]
