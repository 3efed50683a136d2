"""Keeps what the libraries print about every run off the screen, so that the run's own lines can be read."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("lightning.pytorch", "lightning.fabric")
# Of Lightning's warnings, those that a run means to cause.
EXPECTED = (
    r"Found \d+ module\(s\) in eval mode",  # a frozen tower
    r"Checkpoint directory .* exists and is not empty",  # of a resumed run
    "You're resuming from a checkpoint that ended before the epoch ended",  # the loader starts where it should
    "The number of training batches .* is smaller than the logging interval",
    ".*`isinstance.treespec, LeafSpec.` is deprecated",
)


@contextmanager
def quiet_lightning(level: int = logging.WARNING) -> Iterator[None]:
    """Silences Lightning's device tables, tips and notes while a run lasts, but for its warnings.

    Args:
        level: Of its messages that are shown.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            for message in EXPECTED:
                warnings.filterwarnings("ignore", message)
            if level > logging.WARNING:
                warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, own in zip(loggers, before, strict=True):
            logger.setLevel(own)
