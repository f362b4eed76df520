"""The error that a user can mend."""


class InputError(ValueError):
    """A wrong name, path or value, told in one line: the user can put it right."""
