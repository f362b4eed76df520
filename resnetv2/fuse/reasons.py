"""Why a module is left alone."""

from __future__ import annotations


class NotAUnitError(Exception):
    """Why a module is not exactly a pre-activation unit, in one line and in a user's words.

    resembles: whether its own forward adds two tensors, or cannot be traced.
    """

    def __init__(self, reason: str, resembles: bool = False) -> None:
        super().__init__(reason)
        self.resembles = resembles
