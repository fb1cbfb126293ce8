"""Errors of the user, in contrast to faults of the program."""


class UserError(ValueError):
    """An error with a message of one line that says what to do; any other ValueError is a fault of
    the program or of a library, and shows its traceback."""
