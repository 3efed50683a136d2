"""Claim: the table of clips costs a loader worker no memory that grows with the epochs.

Workers get a pickled copy of the table when they start. Of a Python list that is an object for each row and each name;
Arrow buffers and NumPy arrays are little more than the text that they hold, and nothing in them is written as it is
read. Four workers read the rows in random order, epoch after epoch, through a real DataLoader; unique memory (USS:
pages that no other process shares) and proportional memory (PSS) are read from /proc/<pid>/smaps_rollup, so this runs
on Linux.

    python benchmarks/table_memory.py
"""

import argparse
import gc
import multiprocessing
import sys
from pathlib import Path

import numpy as np
from report import add_report_options, write_report
from torch.utils.data import DataLoader, Dataset, Sampler

from vidprism_hf.data import FileTable
from vidprism_hf.workers import CONTEXT

NUM_CLASSES = 400


class ListTable:
    """What a FileTable would be without Arrow: a list of (name, label)."""

    def __init__(self, names, labels):
        self.rows = list(zip(names, labels, strict=True))

    def __len__(self):
        return len(self.rows)

    def row(self, index):
        """Characters of the path and the label of a row."""
        name, label = self.rows[index]
        return len("/clips/" + name) + label


class ArrowTable:
    """A FileTable, asked for the same."""

    def __init__(self, names, labels):
        self.table = FileTable.from_lists("/clips", names, labels)

    def __len__(self):
        return len(self.table)

    def row(self, index):
        """Characters of the path and the label of a row."""
        return len(self.table.video(index)) + int(self.table.labels[index])


class Rows(Dataset):
    """The rows of a table, without any video."""

    def __init__(self, table):
        self.table = table

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        return self.table.row(index)


class Order(Sampler):
    """The rows in an order that is set anew before each epoch; none at first, so that workers only start."""

    def __init__(self):
        self.rows = []

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)


def clip_names(count):
    """File names as benchmarks have them, and their labels; made one by one, as reading a list file does."""
    generator = np.random.default_rng(0)
    names, labels = [], []
    for number in range(count):
        label = int(generator.integers(NUM_CLASSES))
        names.append(f"train/some_action_{label:03}/{generator.bytes(8).hex()}_{number:06}_000010.mp4")
        labels.append(label)
    return names, labels


def memory(process):
    """USS and PSS of a process, in MB."""
    fields = {}
    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        fields[name] = int(value.split()[0]) * 1024 / 1e6
    return fields["Private_Clean"] + fields["Private_Dirty"], fields["Pss"]


def measure(make_table, count, num_workers, epochs):
    """USS and PSS of each worker at its start and after each epoch, (1 + epochs, workers, 2), in MB."""
    table = make_table(*clip_names(count))
    gc.collect()
    order = Order()
    loader = DataLoader(
        Rows(table),
        batch_size=500,
        sampler=order,
        num_workers=num_workers,
        persistent_workers=True,
        multiprocessing_context=CONTEXT,
    )
    figures, total = [], 0
    for epoch in range(1 + epochs):
        if epoch:
            order.rows = np.random.default_rng(epoch).permutation(count).tolist()
        total += sum(int(batch.sum()) for batch in loader)
        figures.append([memory(process) for process in multiprocessing.active_children()])
    expected = epochs * sum(table.row(index) for index in range(count))
    if total != expected:
        raise RuntimeError(f"the workers read {total} instead of {expected}")
    del loader
    return np.array(figures)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    add_report_options(parser)
    args = parser.parse_args()
    if not Path("/proc/self/smaps_rollup").exists():
        print("This system does not tell how much memory a process shares: nothing is measured.", file=sys.stderr)
        return

    rows = []
    for name, make_table in (("FileTable (Arrow)", ArrowTable), ("list of (str, int)", ListTable)):
        figures = measure(make_table, args.rows, args.workers, args.epochs)
        for column, kind in enumerate(("USS", "PSS")):
            worst = figures[..., column].max(axis=1)
            growth = (figures[-1, :, column] - figures[0, :, column]).max()
            rows.append([name, kind, *(f"{value:.1f}" for value in worst), f"{growth:+.1f}"])
    header = ["table", "MB", "start", *(f"epoch {epoch + 1}" for epoch in range(args.epochs)), "growth"]
    about = (
        f"Memory of a loader worker in MB, the largest of {args.workers}, for {args.rows:,} rows read in random order. "
        "USS is what the worker shares with nobody; growth is the largest of any worker from its start to its last "
        "epoch. Of PSS, each page's size divided by the processes that share it, a part moves between processes."
    )
    write_report("What a table of clips costs a loader worker", about, header, rows, args)


if __name__ == "__main__":
    main()
