"""Matches a model's classes to the data's by name; order and spelling often differ."""

import re
from collections.abc import Mapping

from ..errors import UserError
from ..util import preview

MOST_NAMES = 3  # unmatched labels in the message


def matched_labels(name: str, theirs: Mapping[int, str], ours: Mapping[int, str]) -> list[int]:
    """Returns the model's index of each of the data's classes, ignoring case, blanks and punctuation.

    Args:
        name: The model's name, for the message.
        theirs: The model's labels by index.
        ours: The data's labels by index.

    Raises:
        UserError: If the two do not have the same classes.
    """
    same = set(theirs.values()) == set(ours.values())  # then names may differ by spelling only
    by_name, known = ({plain_name(label, same): index for index, label in names.items()} for names in (theirs, ours))
    apart = {
        "only in the model": [label for label in theirs.values() if plain_name(label, same) not in known],
        "only in the data": [label for label in ours.values() if plain_name(label, same) not in by_name],
        "the same but for case, blanks and signs": [
            label
            for labels, names in ((theirs, by_name), (ours, known))
            for index, label in labels.items()
            if names[plain_name(label, same)] != index
        ],
    }
    if any(apart.values()):
        said = "; ".join(f"{what}: {preview(labels, MOST_NAMES)}" for what, labels in apart.items() if labels)
        raise UserError(f"{name}: its labels are not the data's ({said}); take data with the same classes")
    return [by_name[plain_name(ours[index], same)] for index in range(len(ours))]


def plain_name(label: str, as_it_is: bool = False) -> str:
    """Reduces a label to letters and digits: `ApplyEyeMakeup` equals `apply eye makeup`."""
    return label if as_it_is else re.sub(r"[\W_]+", "", label.casefold()) or label
