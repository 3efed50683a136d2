"""The cells of a sweep of `vidprism ablate`: a line of cells.jsonl for each head that has been trained and tested."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cell:
    """A trained head.

    Attributes:
        right: For each held-out clip whether it was recognised.
        parameters: Numbers that were learned.
        seconds: That it took.
    """

    right: list[bool]
    parameters: int
    seconds: float

    @property
    def top1(self) -> float:
        """Share of the held-out clips that were recognised."""
        return sum(self.right) / len(self.right)


Cells = dict[int | None, list[Cell]]  # a seed, or None where there is nothing random, to the folds' cells


def read_cells(path: Path) -> dict[str, Cell]:
    """The finished cells by key. A line that a killed sweep left unfinished is passed over."""
    cells = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            cell = json.loads(line)
            cells[cell["key"]] = Cell([right == "1" for right in cell["right"]], cell["parameters"], cell["seconds"])
    return cells


def append_cell(path: Path, key: str, cell: Cell) -> None:
    """Adds a finished cell in one write, on a line of its own."""
    right = "".join(str(int(right)) for right in cell.right)
    line = json.dumps(
        {"key": key, "right": right, "parameters": cell.parameters, "seconds": cell.seconds}, allow_nan=False
    )
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "ab") as file:
        file.write(b"\n" * torn + line.encode() + b"\n")
