"""What a training step needs before it is run: bytes, time, and the choice of a memory mode."""

from ..core.memory import BudgetError, parse_bytes
from .memory import Plan, plan

__all__ = ["BudgetError", "Plan", "parse_bytes", "plan"]
