"""The errors that a person can mend: the command line shows them as one line, without a traceback."""

import traceback
import unicodedata
from pathlib import Path
from pickle import UnpicklingError

from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id

from .util import cut

MOST_OF_MESSAGE = 1500  # letters
LOG_IN = "run `hf auth login` or set HF_TOKEN"
HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # Unicode's categories of what controls and is not seen
JOINERS = "\u200c\u200d"


class UserError(ValueError):
    """Bad input. The message is one line: which file or field, what is wrong, what to do.

    Of a longer one than fits on a screen, which names of others make, the middle is left out.
    """

    def __init__(self, message: str):
        # A DataLoader builds the error of its worker again, with the traceback above the message.
        super().__init__(message if "\n" in message else cut(message, MOST_OF_MESSAGE))


def first_line(error: BaseException) -> str:
    """The first line of a library's message, which tells the cause; what follows are its hints."""
    if isinstance(error, UnpicklingError):  # its own message advises to run what is in it
        return "its weights are a pickle that is damaged or would run code; take a copy in safetensors"
    if isinstance(error, StrictDataclassError):  # its first line names the field or our validator alone
        error = error.__cause__ if isinstance(error.__cause__, ValueError) else error
        return " ".join(str(error).split())
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def why_not_loaded(name: str, error: Exception) -> str:
    """Why a model could not be loaded.

    Args:
        name: Of the model as the user gave it: a folder or a Hub id.
        error: What transformers raised.
    """
    folder, cause = Path(name), error.__cause__
    if folder.exists():
        is_run = not (folder / "config.json").exists() and (folder / "export" / "config.json").exists()
        return f"a run's folder; did you mean {folder / 'export'}?" if is_run else first_line(error)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return "no such folder"
    if isinstance(cause, GatedRepoError):
        return f"it is gated: ask for access on its page, and {LOG_IN}"
    if isinstance(cause, RepositoryNotFoundError):
        return f"no such folder, and no such model on the Hub or a private one: check the name, or {LOG_IN}"
    return first_line(error)


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
    """The text as one line that a terminal shows and does not obey.

    Control characters, line breaks, marks that turn the direction of text, and bytes of file names that are no text
    are written as escapes. The joiners of Persian, Indic scripts and emoji stay.
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def printable_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def _visible(character: str) -> str:
    if unicodedata.category(character) not in HIDDEN or character in JOINERS:
        return character
    return (
        character.encode("ascii", "backslashreplace").decode() if ord(character) > 0x7F else f"\\x{ord(character):02x}"
    )
