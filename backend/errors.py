"""What a user can get wrong, told from a fault of the program."""


class UserError(ValueError):
    """Its message is one line that says what to do; every other ValueError is a fault of ours, or
    of a library, and shows its traceback."""


def not_utf8(
    error: UnicodeDecodeError, name: str, remedy: str = "convert it to UTF-8", offset: int = 0
) -> UserError:
    """The error for a text of this name, whose bytes from `offset` on `error` is of."""
    byte = f"invalid byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"
    return UserError(f"{name} is not UTF-8: {byte}; {remedy}")
