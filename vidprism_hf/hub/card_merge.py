"""A README that there is and a new card become one: what is generated is written anew, all else stays as it is."""

import re
from collections.abc import Collection
from dataclasses import dataclass

import yaml

from ..safe_yaml import parse_yaml
from .markdown import escape

BEGIN = "<!-- vidprism:generated begin"
END = "<!-- vidprism:generated end -->"
SECTION = re.compile(re.escape(BEGIN) + r".*?" + re.escape(END), re.DOTALL)
# As the Hub's client finds it, which lets blank lines pass.
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
KEY = re.compile(r"""["']?([\w-]+)["']?:""")
BOM = "\ufeff"  # some editors put it first; behind it nobody finds the metadata
# Metadata that follows the weights. The rest, such as license and tags, is written once and then the reader's own.
OWNED = frozenset({"library_name", "pipeline_tag", "base_model", "datasets", "metrics", "model-index", "model_name"})
# Of these, what a person writes where a run on plain folders knows none: it stays until a new card states its own.
BY_HAND = frozenset({"base_model", "datasets"})
UNSTATED = ("license", "unknown")  # what a card says where nobody has stated it
EVALUATION = "## Evaluation"  # the chapter of the generated part
OUTSIDE = "its text outside the generated section"


@dataclass(frozen=True)
class Parts:
    """A README in its parts, of which front matter and generated section may be missing.

    Args:
        front: The match of the metadata and its fences.
        body: What follows.
        section: The generated part of the body; None unless there is exactly one.
    """

    front: re.Match | None
    body: str
    section: str | None

    @property
    def outside(self) -> str:
        """The text that a person has written: all of the body but the generated part."""
        return (self.body if self.section is None else self.body.replace(self.section, "")).strip()

    @property
    def is_persons(self) -> bool:
        """Whether there is text, and no generated part to refresh."""
        return self.section is None and bool(self.outside)

    @property
    def keys(self) -> dict[str, str]:
        """The lines of the metadata by key."""
        return {key: text for key, text in entries(self.front[1] if self.front else "") if key is not None}


def take_apart(text: str) -> Parts:
    """A README in its parts, without a byte-order mark."""
    text = text.removeprefix(BOM)
    front = FRONT_MATTER.match(text)
    body = text[front.end() :] if front else text
    sections = SECTION.findall(body)
    return Parts(front, body, sections[0] if len(sections) == 1 == body.count(BEGIN) else None)


def merge_card(existing: str, generated: str, anew: Collection[str] = ()) -> str:
    """Refreshes the generated part of a README and the metadata that follows the weights.

    A person's words in the README that there is stay; where it has none, those of the new card come in. A README
    with text but without exactly one generated part is a person's, and comes back as it is.

    Args:
        existing: The README that there is, of the Hub or of an earlier export.
        generated: A whole new card; a person may have edited it too.
        anew: Keys of the metadata that are written anew beside those that follow the weights.
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
    """Puts an evaluation into the generated part of a README, in the place of an earlier one of the same title.

    A README without exactly one generated part comes back as it is, and so does all outside it.

    Args:
        card: The README.
        title: One line, which tells this evaluation from others.
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
    """The text with lines that end in one character."""
    return text.replace("\r\n", "\n")


def stays(old: Parts, new: Parts) -> bool:
    """Whether a README is to stay as it is: a person's, or one with a person's words and nothing to refresh it from."""
    return old.is_persons or (new.section is None and bool(old.outside))


def is_kept(existing: str, generated: str) -> bool:
    """Whether `merge_card` takes nothing of the new card."""
    return stays(take_apart(existing), take_apart(generated))


def states_results(card: str) -> bool:
    """Whether the metadata of a card have results of its model."""
    return "model-index" in take_apart(card).keys


def states_license(card: str) -> bool:
    """Whether the generated part of a card names the licence of the weights, as its export was told it."""
    parts = take_apart(card)
    return f"\n| these weights | {escape(value(parts.keys.get('license', '')))} |" in (parts.section or "")


def left_out(generated: str, merged: str) -> list[str]:
    """What a person has put into a card that a merged README holds otherwise: its text, or keys of the metadata."""
    new, made = (take_apart(plain_lines(text)) for text in (generated, merged))
    lost = [OUTSIDE] if new.outside and new.outside != made.outside else []
    for key, text in new.keys.items():
        stated = value(text)
        if key not in OWNED and (key, stated) != UNSTATED and stated != value(made.keys.get(key, "")):
            lost.append(key)
    return lost + [key for key in made.keys if key in BY_HAND and key not in new.keys]


def merge_metadata(existing: str, generated: str, anew: Collection[str] = ()) -> str:
    """The metadata block with the keys of the generated one that are owned or in `anew` in their places; new ones last.

    By lines, not as parsed YAML: order, comments and quotes of the other keys stay.
    """
    old, new = entries(existing), {key: text for key, text in entries(generated) if key is not None}
    merged = []
    for key, text in old:
        if key in new and (key in OWNED or key in anew or (key, value(text)) == UNSTATED):
            text = new[key]
        elif key in OWNED - BY_HAND:  # of earlier weights
            continue
        merged.append(text)
    present = {key for key, _ in old}
    return "".join(merged + [text for key, text in new.items() if key not in present])


def value(text: str) -> object:
    """What the lines of one key say; the lines themselves if they are no YAML on their own."""
    try:
        return next(iter((parse_yaml(text) or {None: None}).values()))
    except (yaml.YAMLError, ValueError, AttributeError):
        return text


def entries(block: str) -> list[tuple[str | None, str]]:
    """The lines of a YAML mapping by top-level key; comments and blank lines between keys have none."""
    found: list[tuple[str | None, str]] = []
    pending = ""  # blank lines and comments, which belong to a key if more of it follows
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
