"""The bytes and time of a training step before it is run, and the choice of a memory mode."""

from ..core.memory import BudgetError, parse_bytes
from .memory import Plan, plan

__all__ = ["BudgetError", "Plan", "parse_bytes", "plan"]
