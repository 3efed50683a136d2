"""User-facing errors: printed as one line, without a traceback."""

import traceback
import unicodedata
from pathlib import Path
from pickle import UnpicklingError

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id

from .util import cut

MOST_OF_MESSAGE = 1500  # letters
LOG_IN = "run `hf auth login` or set HF_TOKEN"
RETRYABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # Unicode's categories of what controls and is not seen
JOINERS = "\u200c\u200d"


class UserError(ValueError):
    """Bad input. The message is one line: which file or field, what is wrong, what to do.

    Of a longer one than fits on a screen, which names of others make, the middle is left out.
    """

    def __init__(self, message: str):
        # A DataLoader builds the error of its worker again, with the traceback above the message.
        super().__init__(message if "\n" in message else cut(message, MOST_OF_MESSAGE))


class DataError(UserError):
    """A data source that cannot be used as it is. One line: where, what is wrong, what to do."""


def first_line(error: BaseException) -> str:
    """Returns the first line of a library's message, which names the cause; the rest are hints."""
    if isinstance(error, UnpicklingError):  # its own message advises to run what is in it
        return "its weights are a pickle that is damaged or would run code; take a copy in safetensors"
    if isinstance(error, StrictDataclassError):  # its first line names only the field, or our validator
        error = error.__cause__ if isinstance(error.__cause__, ValueError) else error
        return " ".join(str(error).split())
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def causes(error: BaseException | None) -> list[BaseException]:
    """Returns an error and the chain of errors behind it."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def http_status(error: BaseException) -> int | None:
    """Returns the status of the Hub's answer behind an error; None if there was no answer."""
    return next((link.response.status_code for link in causes(error) if isinstance(link, HfHubHTTPError)), None)


def describe_hub_error(error: BaseException, kind: str = "dataset", revision: str | None = None) -> str | None:
    """Says why a repository could not be read from the Hub, to follow its name: what is wrong and what to do.

    Every reader of the Hub uses this one function, whatever library stood between: the whole chain of causes counts.

    Args:
        error: What huggingface_hub, transformers or `datasets` raised.
        kind: "model" or "dataset".
        revision: The revision asked for.

    Returns:
        A phrase; None if the Hub is not the cause.
    """
    chain, status = causes(error), http_status(error)

    def raised(*kinds: type) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    # `datasets` drops the cause here and keeps only its words.
    if raised(GatedRepoError) or status == 403 or f"gated {kind}" in str(error):
        return f"it is gated or closed to this account: ask for access on its page, and {LOG_IN}"
    if raised(RevisionNotFoundError):
        return f"it has no revision {revision!r}: give a branch, tag or commit of it"
    if raised(RepositoryNotFoundError) or status == 401:
        return f"no such folder, and no such {kind} on the Hub or a private one: check the name, or {LOG_IN}"
    if raised(HFValidationError):
        return f"no such folder, and not a {kind} id: give org/name, or a folder that exists"
    if raised(OfflineModeIsEnabled):
        return "it is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub: fetch it once with a network"
    if raised(RevisionResolutionError, LocalEntryNotFoundError, httpx2.TransportError):
        return "it is not in the cache, and the Hub cannot be reached: try again with a network"
    return None if status is None else f"the Hub answers with HTTP status {status}: try again later"


def why_not_loaded(name: str, error: Exception) -> str:
    """Says why a model could not be loaded.

    Args:
        name: The model as the user gave it: a folder or a Hub id.
        error: What transformers raised.
    """
    folder = Path(name)
    if folder.exists():
        is_run = not (folder / "config.json").exists() and (folder / "export" / "config.json").exists()
        return f"a run's folder; did you mean {folder / 'export'}?" if is_run else first_line(error)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return "no such folder"
    return describe_hub_error(error, "model") or first_line(error)


def one_line_or_traceback(error: BaseException) -> str:
    """Describes a failure that does not end the run: its cause, or the traceback if the bug may be ours."""
    if isinstance(error, UserError | OSError):
        return first_line(error)
    return "".join(traceback.format_exception(error)).strip()


def last_line(error: BaseException) -> str:
    """Returns the message of one of our own errors, which a DataLoader puts below its worker's traceback."""
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
