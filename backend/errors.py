"""Errors of the user, in contrast to faults of the program."""


class UserError(ValueError):
    """An error with a message of one line that says what to do. Any other ValueError is a fault of
    the program or of a library, and shows its traceback."""


def not_utf8(
    error: UnicodeDecodeError, name: str, remedy: str = "convert it to UTF-8", offset: int = 0
) -> UserError:
    """The error for the text `name`; `offset` is the position of the bytes that `error` holds."""
    byte = f"invalid byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"
    return UserError(f"{name} is not UTF-8: {byte}; {remedy}")
