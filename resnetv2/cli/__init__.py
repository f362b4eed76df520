"""The command ``resnetv2``."""

from .command import main

__all__ = ["main"]
