"""Formats of annotation files: text, CSV, TSV and JSON lists of videos and labels.

The format is recognised by the name and the content:

| format     | recognised by                    | a row                                                              |
| ---------- | -------------------------------- | ------------------------------------------------------------------ |
| text       | anything else                    | `path label`, `path num_frames label` or `path`; the separator is  |
|            |                                  | a tab, a comma or spaces, the same in the whole file               |
| CSV, TSV   | a first row of column names      | a path column and a label column: `PATH_COLUMNS`, `LABEL_COLUMNS`  |
| Kinetics   | a CSV with a column `youtube_id` | `label,youtube_id,time_start,time_end,split`: the file is          |
|            |                                  | `<label>/<id>_<start>_<end>.mp4` or that name without the folder   |
| SSv2       | `.json`, entries with `template` | `{"id": "78687", "template": "Holding [something]", ...}`          |
| other JSON | `.json`                          | objects with a path key and a label key, named like CSV columns    |

Files are UTF-8, with or without a byte order mark; empty lines are skipped. A text row is parsed from the right, so
paths may contain spaces; without the extension of a video, labels must be numbers or separated by tabs. There are no
comments: names of HMDB51 begin with `#`. A label is a whole number or a name.
"""

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...label_names import LABEL_COLUMNS, NUMBER, is_text, read_json, read_lines
from ...util import preview
from ..tables import VIDEO_EXTENSIONS, DataError

# fmt: off
PATH_COLUMNS = (
    "path", "video_path", "file_path", "filepath", "clip_path", "relative_path", "video_file", "file", "filename",
    "file_name", "video", "video_name", "clip", "clip_name", "video_id", "id",
)
# fmt: on
KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end")

_EXTENSION = rf"\.(?:{'|'.join(sorted(extension[1:] for extension in VIDEO_EXTENSIONS))})"
_VIDEO = re.compile(rf"{_EXTENSION}(?=[\s,]|$)", re.IGNORECASE)
_TAB, _COMMA, _SPACES, _NOTHING = _SEPARATORS = (r"\t", r" *, *", r"[ \t]+", "")


class ListRow(NamedTuple):
    """An annotation: its line or entry, the paths that the video may have, its label, whether the video exists."""

    number: int
    paths: tuple[str, ...]
    label: int | str | None
    present: bool = False

    @property
    def folder(self) -> str:
        """The name of the video's folder; empty for the root."""
        return self.paths[0].rpartition("/")[0].rpartition("/")[2]


@dataclass
class ClipList:
    """The rows of an annotation file, and the word for one in messages."""

    path: Path
    rows: list[ListRow]
    unit: str = "line"

    def where(self, row: ListRow) -> str:
        return f"{self.path}, {self.unit} {row.number}"


def read_list(path: str | os.PathLike | None, field: str) -> ClipList:
    """Reads an annotation file.

    Args:
        path: The file.
        field: The setting that names it, for messages.

    Raises:
        DataError: If it cannot be read or a row is unclear.
    """
    if path is None:
        raise DataError(f"{field}: is not given; give data.train_list, and data.val_list or data.val_fraction")
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


def _read_json(path: Path, field: str) -> ClipList:
    entries = read_json(path, field)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f'{path}: is not a list of clips; give [{{"id": ..., "template": ...}}, ...] as SSv2 does')
    clips = ClipList(path, [], unit="entry")
    for number, entry in enumerate(entries, start=1):
        record = {_column(name): value for name, value in entry.items()}
        clips.rows.append(_record_row(record, number, f"{path}, entry {number}"))
    return clips


def _read_text(path: Path, field: str) -> ClipList:
    lines = read_lines(path, field)
    first = next((line for line in lines if line.strip()), "")
    delimiter = "\t" if "\t" in first else ";" if ";" in first and "," not in first else ","
    try:
        header = [_column(cell) for cell in next(csv.reader([first], delimiter=delimiter), [])]
        if set(header) & set(LABEL_COLUMNS) and set(header) & {*PATH_COLUMNS, *KINETICS_COLUMNS}:
            return ClipList(path, list(_table_rows(path, lines, header, delimiter)))
        return ClipList(path, list(_text_rows(path, lines, header)))
    except csv.Error as error:
        raise DataError(f"{path}: {error}; check its line ends and quotes") from error


def _column(name: Any) -> str:
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def _table_rows(path: Path, lines: list[str], header: list[str], delimiter: str) -> Iterator[ListRow]:
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    rows = ((reader.line_num, row) for row in reader if row)
    next(rows)
    for number, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path}, line {number}: has {len(row)} columns, the header {len(header)}; correct it")
        yield _record_row(dict(zip(header, row, strict=True)), number, f"{path}, line {number}")


def _record_row(record: dict[str, Any], number: int, where: str) -> ListRow:
    """Makes a row from a table row or a JSON object, whose keys are column names."""
    if isinstance(record.get("template"), str):  # SSv2, whose `label` is a caption
        label = re.sub(r"[\[\]]", "", record["template"])
    else:
        label = next((record[name] for name in LABEL_COLUMNS if name in record), None)
    label = _label(label, where)
    if all(name in record for name in KINETICS_COLUMNS):
        try:
            start, end = (int(float(record[name])) for name in KINETICS_COLUMNS[1:])
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{where}: time_start and time_end are not seconds ({error}); correct them") from error
        name = f"{record['youtube_id']}_{start:06d}_{end:06d}.mp4"
        return ListRow(number, (f"{label}/{name}", name), label)
    path = next((record[name] for name in PATH_COLUMNS if name in record), None)
    if not isinstance(path, str | int):
        raise DataError(f"{where}: names no file; give it as {PATH_COLUMNS[0]!r}")
    return ListRow(number, (str(path).strip(),), label)


def _label(value: Any, where: str) -> int | str:
    text = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if NUMBER.fullmatch(text):
        return int(text)
    if not text or re.fullmatch(r"-?[0-9]+\.[0-9]*", text) or not is_text(text):
        raise DataError(f"{where}: label {value!r} is neither a whole number nor a name in UTF-8; correct it")
    return text


def _text_rows(path: Path, lines: list[str], header: list[str]) -> Iterator[ListRow]:
    """Yields rows without column names, split at the first separator that fits all lines; else paths alone."""
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
    """Returns the path and what follows it, None if the line has another form."""
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
        # Up to the last extension of a video; without one, the label must be a number.
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
