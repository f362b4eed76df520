"""The error that a user can mend."""


class InputError(ValueError):
    """What the user asked for cannot be had: a wrong name, path or value, in one line."""
