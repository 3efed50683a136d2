"""What a person reads when a push fails: one line, what is wrong and what to do, never the token."""

from collections.abc import Callable

from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import LOG_IN, UserError
from .retries import MOVED_STATUS, GaveUp, LongWait, OddAnswer, read_failure, root

NO_ROOM_STATUS = frozenset({402, 413, 507})


class PushError(UserError):
    """A push that did not end well; the exported folder is as it was."""


def explain(error: Exception, step: str, endpoint: str, account: Callable[[], tuple[str, str] | None]) -> str | None:
    """What is wrong and what to do.

    Args:
        error: What the client raised.
        step: What was under way, such as "the commit".
        endpoint: Of the Hub.
        account: Name of the token's owner and role of the token, if the Hub tells.

    Returns:
        Nothing where the error is none of the client's or the Hub's.
    """
    failure, error = read_failure(error), root(error)
    status, cause = failure.status, failure.cause
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to push"
    if isinstance(error, LongWait):
        return f"{cause} at {step}; push again after it"
    if isinstance(error, GaveUp):
        return f"{endpoint} has failed at {step} for too long ({cause}); push again later to go on from there"
    if isinstance(error, OddAnswer):
        return (
            f"{endpoint} answers {step} as no Hub does ({cause}); is it one, or a proxy's page to log in? push again "
            "to go on from there"
        )
    if isinstance(error, GatedRepoError):
        return f"{step}: the repository is gated and this token has no access; ask for it on its page ({cause})"
    if isinstance(error, DisabledRepoError):
        return "the Hub has disabled this repository"
    if isinstance(error, RevisionNotFoundError):
        return f"{step}: there is no such branch ({cause})"
    if status in NO_ROOM_STATUS or (status == 403 and is_about_room(cause)):
        return f"the Hub has no room for {step} ({cause}); make room or ask for more"
    if isinstance(error, RepositoryNotFoundError) and status == 404:
        return "there is no such repository, or this token cannot see it; check the name, or push without --create-pr"
    if status == 401:
        return f"the Hub does not know this token ({cause}); {LOG_IN}"
    if status == 403:
        return explain_forbidden(step, cause, account())
    if status in MOVED_STATUS:
        return f"others committed each time in between ({cause}); push again"
    if failure.passing and status is None:
        return f"{endpoint} cannot be reached at {step} ({cause}); push again to go on from there"
    if failure.passing:
        return f"the Hub fails at {step} ({cause}, status {status}); push again later to go on from there"
    if status is not None:
        return f"the Hub refuses {step} ({cause}, status {status})"
    if isinstance(error, ValueError | RuntimeError | OSError):
        return f"{step} failed ({' '.join(str(error).split())})"
    return None


def explain_forbidden(step: str, cause: str, account: tuple[str, str] | None) -> str:
    """A refusal for lack of rights: of the token, or of its owner."""
    if account is not None and account[1] == "read":
        return f"the token of {account[0]} is read-only; use one that may write ({LOG_IN})"
    who = f"the token of {account[0]}" if account is not None else "this token"
    if "creation" in step:
        return f"{who} may not create it ({cause}); choose a name in a namespace of yours"
    return f"{who} may not do {step} ({cause}); propose the change with --create-pr, or choose another name"


def is_about_room(cause: str) -> bool:
    """Whether a refusal speaks of a quota, which the Hub answers with the status of lacking rights."""
    words = cause.lower()
    return "quota" in words or ("storage" in words and "limit" in words)
