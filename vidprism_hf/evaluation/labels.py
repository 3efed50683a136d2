"""Which of a model's classes is which of the data's: both have names, and seldom the same order and spelling."""

import re
from collections.abc import Mapping

from ..errors import UserError
from ..util import preview

MOST_NAMES = 3  # of labels that do not match, in the message


def matched_labels(name: str, theirs: Mapping[int, str], ours: Mapping[int, str]) -> list[int]:
    """For each class of the data the index that a model has it at: by name, without regard to case, blanks and signs.

    Args:
        name: Of the model, for the message.
        theirs: The model's label of each index.
        ours: The data's.

    Raises:
        UserError: If the two do not name the same classes.
    """
    same = set(theirs.values()) == set(ours.values())  # then spelling may be all that tells two of them apart
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
    """A label's letters and digits: `ApplyEyeMakeup` and `apply eye makeup` are the same."""
    return label if as_it_is else re.sub(r"[\W_]+", "", label.casefold()) or label
