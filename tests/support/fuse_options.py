"""Options in a module of their own, for ``mutations``."""

SCALE = 1


def scale() -> int:
    return SCALE
