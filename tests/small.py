"""Small models, clip folders and runs, which many tests share."""

from pathlib import Path

import torch

from vidprism_hf import VidPrismForVideoClassification, VidPrismVideoProcessor
from vidprism_hf.data.sources.demo import demo_frames, write_clip
from vidprism_hf.hub import CardFacts, export_model, render_card

LABELS = ("growing", "shrinking")  # two of the demo's motions, opposite to each other
NUM_FRAMES = 8


def tiny_model(labels=LABELS, seed: int = 0, **config) -> VidPrismForVideoClassification:
    """A classifier on the `tiny` tower with random weights, in eval mode."""
    torch.manual_seed(seed)
    config = {"num_frames": NUM_FRAMES} | config
    model = VidPrismForVideoClassification.from_vision_pretrained("tiny", id2label=dict(enumerate(labels)), **config)
    return model.eval()


def tiny_processor() -> VidPrismVideoProcessor:
    """The processor of the `tiny` tower."""
    return VidPrismVideoProcessor(
        num_frames=NUM_FRAMES, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )


def card_facts(labels=LABELS, **facts) -> CardFacts:
    """The facts that every card has."""
    return CardFacts(
        **{
            "model_name": "small",
            "labels": list(labels),
            "num_frames": NUM_FRAMES,
            "rates": [2, 4, 8],
            "origin": "Its weights are random.",
        }
        | facts
    )


def tiny_export(folder: Path, labels=LABELS, **settings) -> Path:
    """An exported model with random weights."""
    return export_model(tiny_model(labels, **settings), tiny_processor(), folder, render_card(card_facts(labels)))


def motion_folder(root: Path, train: int = 4, val: int = 2) -> Path:
    """A folder train/<class>/, val/<class>/ of demo clips."""
    for split, count in (("train", train), ("val", val)):
        for label in LABELS:
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                frames = demo_frames(label, 0, split, number)
                write_clip(root / split / label / f"{number}.mp4", frames, 10)
    return root


def run_arguments(source: Path, output: Path, *more: str) -> list[str]:
    """`vidprism finetune` on a folder with the `tiny` tower: two steps an epoch, on the CPU."""
    settings = {
        "output": output,
        "model.backbone": "tiny",
        "model.num_frames": NUM_FRAMES,
        "model.learning_rate": 1e-3,
        "model.warmup_epochs": 1,
        "data.source": source,
        "data.batch_size": 4,
        "data.num_workers": 0,
        "trainer.max_epochs": 2,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    }
    return ["finetune", *(f"--{name}={value}" for name, value in settings.items()), *more]


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def complaint(capsys) -> str:
    """The line on stderr in which a verb says why it ends; there must be one, the last, and no traceback."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    lines = text.splitlines()
    said = [number for number, line in enumerate(lines) if line.startswith("vidprism ")]
    assert said == [len(lines) - 1], text
    return lines[-1]
