"""What the Hub's read errors are called, whatever library stood between."""

import httpx2
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vidprism_hf.errors import describe_hub_error


def answer(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    request = httpx2.Request("GET", "https://hub.example/org/name?token=secret")
    return kind("long\nstory", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (answer(GatedRepoError, 403), "it is gated or closed to this account: ask for access on its page, and run"),
        (answer(HfHubHTTPError, 403), "it is gated or closed to this account"),
        (answer(RevisionNotFoundError, 404), "it has no revision 'v9': give a branch, tag or commit of it"),
        (answer(RepositoryNotFoundError, 404), "no such folder, and no such model on the Hub or a private one"),
        (answer(HfHubHTTPError, 401), "no such folder, and no such model on the Hub or a private one"),
        (answer(HfHubHTTPError, 503), "the Hub answers with HTTP status 503: try again later"),
        (HFValidationError("a/b/c"), "no such folder, and not a model id: give org/name"),
        (OfflineModeIsEnabled("offline"), "it is not in the cache, and HF_HUB_OFFLINE forbids"),
        (LocalEntryNotFoundError("none"), "it is not in the cache, and the Hub cannot be reached"),
        (httpx2.ConnectError("refused"), "it is not in the cache, and the Hub cannot be reached"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_refusal_of_the_hub_is_one_line(error, expected, wrapped):
    if wrapped:  # as transformers and `datasets` do
        try:
            raise OSError("We could not") from error
        except OSError as outer:
            error = outer
    described = describe_hub_error(error, "model", revision="v9")
    assert described.startswith(expected)
    assert "\n" not in described
    assert "secret" not in described


def test_other_errors_are_not_blamed_on_the_hub():
    assert describe_hub_error(ValueError("bad config")) is None
