"""Reads the files of label names that `data.label_names` and `vidprism convert --labels` take."""

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from .errors import DataError
from .util import check_regular, shorten

LABEL_COLUMNS = (
    *("label_name", "class_name", "action_name", "label", "class", "action", "category", "target"),
    *("label_id", "class_id", "class_index"),
)
NUMBER = re.compile(r"-?[0-9]{1,18}")


class LabelNames(NamedTuple):
    """Class names by index, and the class index of each number that an annotation may use."""

    names: list[str]
    indices: dict[int, int]


def read_label_names(path: Path | str, field: str = "data.label_names") -> LabelNames:
    """Reads a file of label names.

    Formats: CSV `id,name` with or without that header; one `id name` per line (`classInd.txt` of UCF101); one name per
    line, starting at number 0; a JSON object `{name: id}` (`labels.json` of SSv2) or `{id: name}`; a JSON list of
    names. Numbers start at 0 or 1 and have no gaps.

    Args:
        path: The file.
        field: Name of the setting, for messages.

    Raises:
        DataError: If the file cannot be read, or its numbers or names are unclear.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        pairs = _json_names(path, read_json(path, field))
    else:
        try:
            pairs = _text_names(path, read_lines(path, field))
        except csv.Error as error:
            raise DataError(f"{path}: {error}; check its line ends and quotes") from error
    pairs = sorted((number, name.strip()) for number, name in pairs)
    numbers, names = [number for number, _ in pairs], [name for _, name in pairs]
    if not pairs:
        raise DataError(f"{path}: has no label names; give one per line")
    if numbers[0] not in (0, 1) or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise DataError(f"{path}: label numbers must count from 0 or 1 without gaps or repeats; renumber them")
    counts = Counter(names)
    bad = [name for name in names if not name or not is_text(name) or counts[name] > 1]
    if bad:
        what = f"label name {shorten(bad[0])!r} is empty, not UTF-8 or given twice"
        raise DataError(f"{path}: {what}; give each class its own")
    return LabelNames(names, {number: index for index, number in enumerate(numbers)})


def _json_names(path: Path, content: Any) -> list[tuple[int, str]]:
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return list(enumerate(content))
    if isinstance(content, dict):
        for pairs in (list(content.items()), [(name, number) for number, name in content.items()]):
            if all(NUMBER.fullmatch(str(number)) and isinstance(name, str) for name, number in pairs):
                return [(int(number), name) for name, number in pairs]
    raise DataError(f"{path}: is not a JSON object of names and numbers; give {{name: number}} or a list of names")


def _text_names(path: Path, lines: list[str]) -> list[tuple[int, str]]:
    if path.suffix.lower() in (".csv", ".tsv"):
        delimiter = "\t" if any("\t" in line for line in lines) else ","
        rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
        # A name may contain unquoted commas.
        pairs = [(row[0].strip(), delimiter.join(row[1:])) for row in rows]
        lines = [delimiter.join(row) for row in rows]
    else:
        matches = [re.fullmatch(r"\s*([^\s,]*)(?:\s*,\s*|\s+)(.*)", line) for line in lines]
        pairs = [(match[1], match[2]) if match else ("", "") for match in matches]
    header = [cell.strip().lower() for cell in pairs[0]] if pairs else ["", ""]
    if header[0] in ("id", "index", *LABEL_COLUMNS) and (header[1].endswith("name") or header[1] in LABEL_COLUMNS):
        pairs = pairs[1:]
        if not all(NUMBER.fullmatch(number) for number, _ in pairs):
            raise DataError(f"{path}: every line below the header needs a number and a name")
    if all(NUMBER.fullmatch(number) for number, _ in pairs):
        return [(int(number), name) for number, name in pairs]
    return list(enumerate(lines))


def read_lines(path: Path, field: str) -> list[str]:
    """Returns the lines of a text file without trailing empty ones; bytes that are not UTF-8 become surrogates."""
    data = _read_bytes(path, field)
    if b"\0" in data:
        raise DataError(f"{field}={path}: is not UTF-8 text; save it as UTF-8")
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_json(path: Path, field: str) -> Any:
    """Returns the content of a JSON file."""
    try:
        return json.loads(_read_bytes(path, field))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{field}={path}: is not JSON ({error}); correct or replace it") from error


def _read_bytes(path: Path, field: str) -> bytes:
    try:
        check_regular(path)
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{field}={path}: cannot be read ({error.strerror}); give a readable file") from error


def is_text(name: str) -> bool:
    """Whether a name was valid UTF-8 when it was read."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)
