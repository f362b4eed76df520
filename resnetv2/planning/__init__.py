"""What a training step needs before it is run: bytes, time, and the choice of a memory mode."""

from .memory import BudgetError, Plan, parse_bytes, plan

__all__ = ["BudgetError", "Plan", "parse_bytes", "plan"]
