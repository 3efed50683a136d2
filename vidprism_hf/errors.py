"""The errors that a person can mend: the command line shows them as one line, without a traceback."""

import traceback


class UserError(ValueError):
    """Bad input. The message is one line: which file or field, what is wrong, what to do."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message, which tells the cause; what follows are its hints."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line_or_traceback(error: BaseException) -> str:
    """What to say of a failure that does not end the run: the cause, or the traceback where it is our own mistake."""
    if isinstance(error, UserError | OSError):
        return first_line(error)
    return "".join(traceback.format_exception(error)).strip()


def last_line(error: BaseException) -> str:
    """The message of one of our own errors, which a DataLoader puts below its worker's traceback."""
    name = f"{type(error).__module__}.{type(error).__qualname__}: "
    return str(error).strip().splitlines()[-1].removeprefix(name)


def printable(text: str) -> str:
    """The text with bytes that are none, as file names may hold, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
