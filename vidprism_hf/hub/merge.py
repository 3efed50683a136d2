"""Merges a regenerated model card into an existing README: only generated parts are replaced."""

import re
from collections.abc import Collection
from dataclasses import dataclass

import yaml

from ..safe_yaml import parse_yaml
from .markdown import escape

BEGIN = "<!-- vidprism:generated begin"
END = "<!-- vidprism:generated end -->"
SECTION = re.compile(re.escape(BEGIN) + r".*?" + re.escape(END), re.DOTALL)
# As the Hub's client finds it, which allows leading blank lines.
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
KEY = re.compile(r"""["']?([\w-]+)["']?:""")
BOM = "\ufeff"  # some editors write it first, which hides the metadata
# Metadata that depends on the weights. The rest, such as license and tags, is written once and then left to the user.
OWNED = frozenset({"library_name", "pipeline_tag", "base_model", "datasets", "metrics", "model-index", "model_name"})
# Of these, keys that a run on plain folders does not know: a person's values stay until a new card states its own.
BY_HAND = frozenset({"base_model", "datasets"})
UNSTATED = ("license", "unknown")  # metadata of a card without a stated licence
EVALUATION = "## Evaluation"  # heading in the generated part
OUTSIDE = "its text outside the generated section"


@dataclass(frozen=True)
class Parts:
    """Parts of a README; front matter and generated section are optional.

    Args:
        front: Match of the metadata and its fences.
        body: Text after the front matter.
        section: Generated part of the body; None unless there is exactly one.
    """

    front: re.Match | None
    body: str
    section: str | None

    @property
    def outside(self) -> str:
        """A person's text: the body without the generated part."""
        return (self.body if self.section is None else self.body.replace(self.section, "")).strip()

    @property
    def is_persons(self) -> bool:
        """Whether there is text but no generated part to refresh."""
        return self.section is None and bool(self.outside)

    @property
    def keys(self) -> dict[str, str]:
        """Lines of the metadata by key."""
        return {key: text for key, text in entries(self.front[1] if self.front else "") if key is not None}


def take_apart(text: str) -> Parts:
    """Splits a README into its parts, without a byte-order mark."""
    text = text.removeprefix(BOM)
    front = FRONT_MATTER.match(text)
    body = text[front.end() :] if front else text
    sections = SECTION.findall(body)
    return Parts(front, body, sections[0] if len(sections) == 1 == body.count(BEGIN) else None)


def merge_card(existing: str, generated: str, anew: Collection[str] = ()) -> str:
    """Refreshes the generated part of a README and the metadata that depends on the weights.

    A person's text in the existing README is kept; if there is none, the new card's is used. A README with text but
    without exactly one generated part is a person's and is returned unchanged.

    Args:
        existing: The existing README, from the Hub or an earlier export.
        generated: A complete new card, possibly edited by a person.
        anew: Further metadata keys to replace.
    """
    newline = "\r\n" if "\r\n" in existing else "\n"
    old, new = take_apart(existing), take_apart(plain_lines(generated).replace("\n", newline))
    if stays(old, new):
        return existing
    body = new.body
    if old.section is not None and new.section is not None and (old.outside or not new.outside):
        body = old.body.replace(old.section, new.section)
    if old.front is None:
        return (new.front[0] if new.front else "") + body
    head, tail = old.front[0][: old.front.start(1)], old.front[0][old.front.end(1) :]
    return head + merge_metadata(old.front[1], new.front[1] if new.front else "", anew) + tail + body


def with_evaluation(card: str, title: str, body: str) -> str:
    """Adds an evaluation to the generated part of a README, replacing one with the same title.

    Text outside the generated part is kept; a README without exactly one generated part is returned unchanged.

    Args:
        card: The README.
        title: One line that identifies the evaluation.
        body: Markdown without headings.
    """
    section = take_apart(card).section
    if section is None:
        return card
    newline = "\r\n" if "\r\n" in card else "\n"
    block = f"### {title}\n\n{body.strip()}\n\n"
    text = plain_lines(section)
    earlier = re.search(rf"^### {re.escape(title)}\n.*?(?=^###? |^{re.escape(END)})", text, re.DOTALL | re.MULTILINE)
    chapter = re.search(rf"^{EVALUATION}\n.*?(?=^## |^{re.escape(END)})", text, re.DOTALL | re.MULTILINE)
    if earlier:
        text = text[: earlier.start()] + block + text[earlier.end() :]
    elif chapter:
        text = text[: chapter.end()] + block + text[chapter.end() :]
    else:
        place = re.search(rf"^## Limitations|^{re.escape(END)}", text, re.MULTILINE).start()
        text = f"{text[:place]}{EVALUATION}\n\n{block}{text[place:]}"
    return card.replace(section, text.replace("\n", newline))


def plain_lines(text: str) -> str:
    """Replaces CRLF line ends by LF."""
    return text.replace("\r\n", "\n")


def stays(old: Parts, new: Parts) -> bool:
    """Returns whether a README is kept: a person's, or one with a person's text and no generated part to add."""
    return old.is_persons or (new.section is None and bool(old.outside))


def is_kept(existing: str, generated: str) -> bool:
    """Returns whether `merge_card` returns the existing README unchanged."""
    return stays(take_apart(existing), take_apart(generated))


def states_results(card: str) -> bool:
    """Returns whether a card's metadata have results of its model."""
    return "model-index" in take_apart(card).keys


def states_license(card: str) -> bool:
    """Returns whether the generated part of a card states the licence of the weights."""
    parts = take_apart(card)
    return f"\n| these weights | {escape(value(parts.keys.get('license', '')))} |" in (parts.section or "")


def left_out(generated: str, merged: str) -> list[str]:
    """Lists a person's changes to a card that a merged README does not have: its text, or metadata keys."""
    new, made = (take_apart(plain_lines(text)) for text in (generated, merged))
    lost = [OUTSIDE] if new.outside and new.outside != made.outside else []
    for key, text in new.keys.items():
        stated = value(text)
        if key not in OWNED and (key, stated) != UNSTATED and stated != value(made.keys.get(key, "")):
            lost.append(key)
    return lost + [key for key in made.keys if key in BY_HAND and key not in new.keys]


def merge_metadata(existing: str, generated: str, anew: Collection[str] = ()) -> str:
    """Replaces owned keys, and those in `anew`, in the existing metadata; appends new keys.

    Works on lines instead of parsed YAML, to keep order, comments and quotes of the other keys.
    """
    old, new = entries(existing), {key: text for key, text in entries(generated) if key is not None}
    merged = []
    for key, text in old:
        if key in new and (key in OWNED or key in anew or (key, value(text)) == UNSTATED):
            text = new[key]
        elif key in OWNED - BY_HAND:  # of the earlier weights
            continue
        merged.append(text)
    present = {key for key, _ in old}
    return "".join(merged + [text for key, text in new.items() if key not in present])


def value(text: str) -> object:
    """Parses the value of one key's lines; returns the lines if they are not valid YAML."""
    try:
        return next(iter((parse_yaml(text) or {None: None}).values()))
    except (yaml.YAMLError, ValueError, AttributeError):
        return text


def entries(block: str) -> list[tuple[str | None, str]]:
    """Splits the lines of a YAML mapping by top-level key; comments and blank lines between keys have the key None."""
    found: list[tuple[str | None, str]] = []
    pending = ""  # blank lines and comments, part of a key if more of it follows
    for line in re.findall(r"[^\n]*\n|[^\n]+", block):
        key = KEY.match(line)
        if key:
            found += [(None, pending), (key[1], line)]
        elif not line.strip() or line[0] == "#":
            pending += line
            continue
        elif line[0] in " \t-" and found and found[-1][0] is not None:
            found[-1] = (found[-1][0], found[-1][1] + pending + line)
        else:
            found.append((None, pending + line))
        pending = ""
    return [*((key, text) for key, text in found if text), (None, pending)]
