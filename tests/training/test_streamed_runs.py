"""Whole runs on a dataset of the Hub: fetched, and streamed in one process and in two."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub
from small import LABELS, motion_folder, run_arguments

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SOURCE = "org/motions"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A dataset of parquet files with embedded videos: 12 training rows in three files, one of them no video."""
    from datasets import ClassLabel, Dataset, Features, Video

    clips = motion_folder(tmp_path_factory.mktemp("hub") / "clips", train=6)
    folder = tmp_path_factory.mktemp("hub") / "dataset"
    (folder / "data").mkdir(parents=True)
    features = Features({"video": Video(decode=False), "label": ClassLabel(names=list(LABELS))})
    for split, shards in (("train", 3), ("validation", 2)):
        source = clips / ("train" if split == "train" else "val")
        rows = [
            {"video": {"bytes": path.read_bytes(), "path": path.name}, "label": LABELS.index(path.parent.name)}
            for number in range(6)
            for path in sorted(source.glob(f"*/{number}.mp4"))
        ]
        if split == "train":
            rows[3]["video"]["bytes"] = b"no video"
        table = Dataset.from_list(rows, features=features)
        for shard in range(shards):
            part = table.shard(shards, shard)
            part.to_parquet(folder / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet")
    return folder


def finetune(published, tmp_path, *more):
    arguments = [
        argument
        for argument in run_arguments(Path("unused"), tmp_path / "run", *more)
        if not argument.startswith("--data.source=")
    ]
    arguments += [f"--data.source={SOURCE}", f"--data.root={tmp_path / 'data'}", "--data.max_bad_fraction=0.1"]
    with Hub() as hub:
        hub.add_dataset(SOURCE, published)
        finished = subprocess.run(
            [sys.executable, "-m", "vidprism_hf", *arguments],
            env=hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
            cwd=Path(__file__).parents[2],
        )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--data.streaming=true", "--data.num_workers=2"),
        ("--data.streaming=true", "--data.num_workers=1", "--trainer.devices=2", "--trainer.strategy=ddp"),
    ],
    ids=["fetched", "streamed", "streamed by two processes"],
)
def test_a_hub_dataset(published, tmp_path, more):
    printed = finetune(published, tmp_path, *more)
    assert re.search(r"Held-out top-1 \S+ on 4 clips", printed)
    (row,) = (tmp_path / "run" / "bad_clips.csv").read_text().splitlines()[1:]
    assert row.startswith("train,")
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert f"| dataset | {SOURCE} |" in card
    assert "| training clips | 11 of 12 (1 undecodable) |" in card
    assert "| held-out clips | 4 |" in card
    assert os.listdir(tmp_path / "run" / "export")


def test_two_processes_evaluate_fewer_shards_than_they_have_workers(published, tmp_path):
    import pyarrow.parquet as pq

    few = tmp_path / "few"
    (few / "data").mkdir(parents=True)
    for split, count in (("train", 12), ("validation", 3)):
        rows = pq.read_table(sorted((published / "data").glob(f"{split}-*.parquet"))).slice(0, count)
        pq.write_table(rows, few / "data" / f"{split}-00000-of-00001.parquet")
    printed = finetune(
        few,
        tmp_path,
        *("--data.streaming=true", "--data.num_workers=4", "--trainer.devices=2", "--trainer.strategy=ddp"),
        "--trainer.max_epochs=1",
    )
    assert re.search(r"Held-out top-1 \S+ on 3 clips", printed)
