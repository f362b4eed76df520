"""Options in a module of their own, for ``fuse_mutations``."""

SCALE = 1


def scale() -> int:
    return SCALE
