"""The forms of list files: the rows of a list of clips, and the names in a file of label names.

The form of a list is told from its name and its content:

| form       | told by                          | a row                                                              |
| ---------- | -------------------------------- | ------------------------------------------------------------------ |
| text       | anything else                    | `path label`, `path num_frames label` or `path`; the separator is  |
|            |                                  | a tab, a comma or spaces, the same in the whole file               |
| CSV, TSV   | a first row of column names      | a path column and a label column: `PATH_COLUMNS`, `LABEL_COLUMNS`  |
| Kinetics   | a CSV with a column `youtube_id` | `label,youtube_id,time_start,time_end,split`: the file is          |
|            |                                  | `<label>/<id>_<start>_<end>.mp4` or that name without the folder   |
| SSv2       | `.json`, entries with `template` | `{"id": "78687", "template": "Holding [something]", ...}`          |
| other JSON | `.json`                          | objects with a path key and a label key, named like CSV columns    |

Files are UTF-8, with or without a byte order mark; empty lines are skipped. A text row is parsed from the right, so
paths may hold spaces; where they lack the extension of a video, labels must be numbers, or tabs separate them. There
are no comments: names of HMDB51 begin with `#`. A label is a whole number or a name.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..util import check_regular, preview, shorten
from .folder import VIDEO_EXTENSIONS
from .tables import DataError

# fmt: off
PATH_COLUMNS = (
    "path", "video_path", "file_path", "filepath", "clip_path", "relative_path", "video_file", "file", "filename",
    "file_name", "video", "video_name", "clip", "clip_name", "video_id", "id",
)
LABEL_COLUMNS = (
    "label_name", "class_name", "action_name", "label", "class", "action", "category", "target",
    "label_id", "class_id", "class_index",
)
# fmt: on
KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end")

_EXTENSION = rf"\.(?:{'|'.join(sorted(extension[1:] for extension in VIDEO_EXTENSIONS))})"
_VIDEO = re.compile(rf"{_EXTENSION}(?=[\s,]|$)", re.IGNORECASE)
_NUMBER = re.compile(r"-?[0-9]{1,18}")
_TAB, _COMMA, _SPACES, _NOTHING = _SEPARATORS = (r"\t", r" *, *", r"[ \t]+", "")


class LabelNames(NamedTuple):
    """Class names in the order of their indices, and the index of each number that a list may use."""

    names: list[str]
    indices: dict[int, int]


class ListRow(NamedTuple):
    """A row of a list: its line or entry, the paths that its clip may have, its label, whether the clip is there."""

    number: int
    paths: tuple[str, ...]
    label: int | str | None
    present: bool = False

    @property
    def folder(self) -> str:
        """The name of the folder that the clip lies in; empty for the root."""
        return self.paths[0].rpartition("/")[0].rpartition("/")[2]


@dataclass
class ClipList:
    """The rows of a list file, and what one of them is called in messages."""

    path: Path
    rows: list[ListRow]
    unit: str = "line"

    def where(self, row: ListRow) -> str:
        return f"{self.path}, {self.unit} {row.number}"


def read_list(path: str | os.PathLike | None, field: str) -> ClipList:
    """Reads a list of clips.

    Args:
        path: The file.
        field: The setting that names it, for messages.

    Raises:
        DataError: If it cannot be read or a row is unclear.
    """
    if path is None:
        raise DataError(f"{field}: is not given; list files need data.train_list and data.val_list")
    path = Path(path)
    clips = _read_json(path, field) if path.suffix.lower() == ".json" else _read_text(path, field)
    if not clips.rows:
        raise DataError(f"{path}: lists no clips; give `path label` in every line")
    first = clips.rows[0]
    for row in clips.rows:
        if type(row.label) is not type(first.label):
            raise DataError(
                f"{clips.where(row)}: label {row.label!r} is of another kind than {first.label!r} in {clips.unit} "
                f"{first.number}; give numbers or names throughout"
            )
    return clips


def read_label_names(path: str | os.PathLike) -> LabelNames:
    """Reads a file of label names.

    Its forms: a CSV `id,name` with or without that header; `id name` a line (`classInd.txt` of UCF101); a name a
    line, the first being number 0; a JSON object `{name: id}` (`labels.json` of SSv2) or `{id: name}`, or a JSON
    list of names. Numbers count from 0 or from 1 without gaps.

    Raises:
        DataError: If the file cannot be read, or its names or numbers are not those of so many classes.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        pairs = _json_names(path, _load_json(path, "data.label_names"))
    else:
        try:
            pairs = _text_names(path, _read_lines(path, "data.label_names"))
        except csv.Error as error:
            raise DataError(f"{path}: {error}; mend the line ends or quotes") from error
    pairs = sorted((number, name.strip()) for number, name in pairs)
    numbers, names = [number for number, _ in pairs], [name for _, name in pairs]
    if not pairs:
        raise DataError(f"{path}: holds no label names; give one a line")
    if numbers[0] not in (0, 1) or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise DataError(f"{path}: its label numbers do not count from 0 or 1 without gaps or repeats; number them so")
    counts = Counter(names)
    bad = [name for name in names if not name or not _is_text(name) or counts[name] > 1]
    if bad:
        raise DataError(
            f"{path}: label name {shorten(bad[0])!r} is empty, no UTF-8 or given twice; give each class its own"
        )
    return LabelNames(names, {number: index for index, number in enumerate(numbers)})


def _json_names(path: Path, content: Any) -> list[tuple[int, str]]:
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return list(enumerate(content))
    if isinstance(content, dict):
        for pairs in (list(content.items()), [(name, number) for number, name in content.items()]):
            if all(_NUMBER.fullmatch(str(number)) and isinstance(name, str) for name, number in pairs):
                return [(int(number), name) for name, number in pairs]
    raise DataError(f"{path}: is no JSON object of names and their numbers; give {{name: number}} or a list of names")


def _text_names(path: Path, lines: list[str]) -> list[tuple[int, str]]:
    if path.suffix.lower() in (".csv", ".tsv"):
        delimiter = "\t" if any("\t" in line for line in lines) else ","
        rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
        # A name may hold commas that nobody put in quotes.
        pairs = [(row[0].strip(), delimiter.join(row[1:])) for row in rows]
        lines = [delimiter.join(row) for row in rows]
    else:
        matches = [re.fullmatch(r"\s*([^\s,]*)(?:\s*,\s*|\s+)(.*)", line) for line in lines]
        pairs = [(match[1], match[2]) if match else ("", "") for match in matches]
    if pairs and pairs[0][0].lower() in ("id", *LABEL_COLUMNS) and pairs[0][1].strip().lower().endswith("name"):
        pairs = pairs[1:]
    if all(_NUMBER.fullmatch(number) for number, _ in pairs):
        return [(int(number), name) for number, name in pairs]
    return list(enumerate(lines))


def _read_bytes(path: Path, field: str) -> bytes:
    try:
        check_regular(path)
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{field}={path}: cannot be read ({error.strerror}); give a file that can") from error


def _read_lines(path: Path, field: str) -> list[str]:
    """The lines of a text file. Bytes that are not UTF-8 become surrogates, as in file names."""
    data = _read_bytes(path, field)
    if b"\0" in data:
        raise DataError(f"{field}={path}: is no UTF-8 text; save it as UTF-8")
    lines = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").split("\n")
    lines = [line.removesuffix("\r") for line in lines]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _load_json(path: Path, field: str) -> Any:
    try:
        return json.loads(_read_bytes(path, field))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{field}={path}: is not JSON ({error}); mend or replace it") from error


def _read_json(path: Path, field: str) -> ClipList:
    entries = _load_json(path, field)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f'{path}: is no list of clips; give [{{"id": ..., "template": ...}}, ...] as SSv2 does')
    clips = ClipList(path, [], unit="entry")
    for number, entry in enumerate(entries, start=1):
        record = {_column(name): value for name, value in entry.items()}
        clips.rows.append(_record_row(record, number, f"{path}, entry {number}"))
    return clips


def _read_text(path: Path, field: str) -> ClipList:
    lines = _read_lines(path, field)
    first = next((line for line in lines if line.strip()), "")
    delimiter = "\t" if "\t" in first else ";" if ";" in first and "," not in first else ","
    try:
        header = [_column(cell) for cell in next(csv.reader([first], delimiter=delimiter), [])]
        if set(header) & set(LABEL_COLUMNS) and set(header) & {*PATH_COLUMNS, *KINETICS_COLUMNS}:
            return ClipList(path, list(_table_rows(path, lines, header, delimiter)))
        return ClipList(path, list(_text_rows(path, lines, header)))
    except csv.Error as error:
        raise DataError(f"{path}: {error}; mend the line ends or quotes") from error


def _column(name: Any) -> str:
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def _table_rows(path: Path, lines: list[str], header: list[str], delimiter: str) -> Iterator[ListRow]:
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    rows = ((reader.line_num, row) for row in reader if row)
    next(rows)
    for number, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path}, line {number}: has {len(row)} columns, the header {len(header)}; mend it")
        yield _record_row(dict(zip(header, row, strict=True)), number, f"{path}, line {number}")


def _record_row(record: dict[str, Any], number: int, where: str) -> ListRow:
    """A row of a table or a JSON object, whose keys are column names."""
    if isinstance(record.get("template"), str):  # SSv2, whose `label` is a caption
        label = re.sub(r"[\[\]]", "", record["template"])
    else:
        label = next((record[name] for name in LABEL_COLUMNS if name in record), None)
    label = _label(label, where)
    if all(name in record for name in KINETICS_COLUMNS):
        try:
            start, end = (int(float(record[name])) for name in KINETICS_COLUMNS[1:])
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{where}: time_start and time_end are no seconds ({error}); mend them") from error
        name = f"{record['youtube_id']}_{start:06d}_{end:06d}.mp4"
        return ListRow(number, (f"{label}/{name}", name), label)
    path = next((record[name] for name in PATH_COLUMNS if name in record), None)
    if not isinstance(path, str | int):
        raise DataError(f"{where}: names no file; give it as {PATH_COLUMNS[0]!r}")
    return ListRow(number, (str(path).strip(),), label)


def _label(value: Any, where: str) -> int | str:
    text = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if _NUMBER.fullmatch(text):
        return int(text)
    if not text or re.fullmatch(r"-?[0-9]+\.[0-9]*", text) or not _is_text(text):
        raise DataError(f"{where}: label {value!r} is neither a whole number nor a name in UTF-8; mend it")
    return text


def _is_text(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _text_rows(path: Path, lines: list[str], header: list[str]) -> Iterator[ListRow]:
    """Rows without column names, in the first separator that fits all lines; else paths alone."""
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    splits = []
    for separator in _SEPARATORS:
        splits.append((separator, [_split(line, separator) for _, line in numbered]))
        if None not in splits[-1][1]:
            break
    separator, fields = min(splits, key=lambda split: split[1].count(None))
    if None in fields:
        number, line = numbered[fields.index(None)]
        if number > numbered[0][0]:
            raise DataError(f"{path}, line {number}: {line!r} does not read like the other lines; give `path label`")
        raise DataError(
            f"{path}, line {number}: is neither `path label` nor a header with the columns of a list; found: "
            f"{preview(header)}; give one of {', '.join(PATH_COLUMNS)} and one of {', '.join(LABEL_COLUMNS)}"
        )
    fields = _without_frame_counts(fields, separator)
    for (number, _), (clip, label) in zip(numbered, fields, strict=True):
        yield ListRow(number, (clip,), _label(label, f"{path}, line {number}") if separator else None)


def _split(line: str, separator: str) -> tuple[str, str] | None:
    """The path and what follows it, None if the line has another form."""
    if separator == _TAB:
        clip, _, rest = line.partition("\t")
        return (clip, rest) if clip and rest.strip() else None
    line = line.strip()
    if separator == _NOTHING:
        return (line, "") if re.fullmatch(rf".+{_EXTENSION}", line, re.IGNORECASE) else None
    if separator == _COMMA and '"' in line:
        clip, *more = next(csv.reader([line], skipinitialspace=True))
        rest = ",".join(more)
    else:
        # Up to the last extension of a video; without one the label must be a number.
        match = re.fullmatch(rf"(.+{_EXTENSION}){separator}(.+)", line, re.IGNORECASE)
        if not match and not _VIDEO.search(line):
            match = re.fullmatch(rf"(.+?){separator}(-?[0-9]+)", line)
        clip, rest = match.groups() if match else ("", "")
    return (clip, rest) if clip and rest and not _VIDEO.search(rest) else None


def _without_frame_counts(fields: list[tuple[str, str]], separator: str) -> list[tuple[str, str]]:
    """Drops the number between path and label if every line has one."""
    if not separator:
        return fields
    counts = [re.fullmatch(rf"([0-9]+){separator}(.+)", rest) for _, rest in fields]
    if all(counts):
        return [(clip, match[2]) for (clip, _), match in zip(fields, counts, strict=True)]
    counts = [re.fullmatch(rf"(.+?){separator}[0-9]+", clip) for clip, _ in fields]
    if all(counts):
        return [(match[1], rest) for (_, rest), match in zip(fields, counts, strict=True)]
    return fields
