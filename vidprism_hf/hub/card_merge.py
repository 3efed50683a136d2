"""A README that there is and a new card become one: what is generated is written anew, all else stays as it is."""

import re

BEGIN = "<!-- vidprism:generated begin"
END = "<!-- vidprism:generated end -->"
SECTION = re.compile(re.escape(BEGIN) + r".*?" + re.escape(END), re.DOTALL)
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
KEY = re.compile(r"""["']?([\w-]+)["']?:""")
# Metadata that follows the weights. The rest, such as license and tags, is written once and then the reader's own.
OWNED = frozenset({"library_name", "pipeline_tag", "base_model", "datasets", "metrics", "model-index"})
RESULTS = frozenset({"metrics", "model-index"})  # of earlier weights: gone where the new ones have none


def merge_card(existing: str, generated: str) -> str:
    """Refreshes the generated part of a README and the metadata that follows the weights.

    A README with text but without exactly one generated part is a person's, and comes back as it is.

    Args:
        existing: The README that there is, of the Hub or of an earlier export.
        generated: A whole new card.
    """
    newline = "\r\n" if "\r\n" in existing else "\n"
    generated = generated.replace("\r\n", "\n").replace("\n", newline)
    front, new_front = FRONT_MATTER.match(existing), FRONT_MATTER.match(generated)
    body, new_body = (
        text[match.end() if match else 0 :] for text, match in ((existing, front), (generated, new_front))
    )
    if len(SECTION.findall(body)) == 1 == body.count(BEGIN):
        body = SECTION.sub(lambda _: SECTION.search(new_body)[0], body)
    elif not body.strip():
        body = new_body
    else:
        return existing
    if front is None:
        return new_front[0] + body
    head, tail = existing[: front.start(1)], existing[front.end(1) : front.end()]
    return head + merge_metadata(front[1], new_front[1]) + tail + body


def merge_metadata(existing: str, generated: str) -> str:
    """The metadata block with the owned keys of the generated one in their places; new keys come last.

    By lines, not as parsed YAML: order, comments and quotes of the other keys stay.
    """
    old, new = entries(existing), dict(entries(generated))
    merged = []
    for key, text in old:
        if key in OWNED and key in new:
            text = new[key]
        elif key in RESULTS:
            continue
        merged.append(text)
    present = {key for key, _ in old}
    return "".join(merged + [text for key, text in new.items() if key not in present])


def entries(block: str) -> list[tuple[str | None, str]]:
    """The lines of a YAML mapping by top-level key; comments and blank lines between keys have none."""
    found: list[tuple[str | None, str]] = []
    pending = ""  # blank lines, which belong to a key if more of it follows
    for line in re.findall(r"[^\n]*\n|[^\n]+", block):
        key = KEY.match(line)
        if key:
            found += [(None, pending), (key[1], line)]
        elif not line.strip():
            pending += line
            continue
        elif line[0] in " \t-" and found and found[-1][0] is not None:
            found[-1] = (found[-1][0], found[-1][1] + pending + line)
        else:
            found.append((None, pending + line))
        pending = ""
    return [*((key, text) for key, text in found if text), (None, pending)]
