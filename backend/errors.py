"""What a user can get wrong, told from a fault of the program."""


class UserError(ValueError):
    """Its message is one line that says what to do; every other ValueError is a fault of ours, or
    of a library, and shows its traceback."""
