"""Claim: on the demo only the order of frames tells opposite motions apart, and VidPrism reads it.

A ridge classifier on the mean of the frame features of the trained tower, without streams and experts, is set beside
the whole model: over all classes, and between the two motions of each pair.

    make finetune && python benchmarks/demo_order.py runs/demo/export
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from vidprism_hf import VideoDataModule, VidPrismForVideoClassification
from vidprism_hf.data import ClipDataset
from vidprism_hf.data.sources.demo import DEMO_CLASSES, DEMO_PAIRS

RIDGE = 10.0


@torch.no_grad()
def read_clips(model, data, loader):
    """Mean frame features (M, D), the model's logits (M, K) and the labels (M,) of all clips."""
    means, logits, labels = [], [], []
    for batch in loader:
        pixels = data.on_after_batch_transfer(batch, 0)["pixel_values_videos"]
        features = model.vidprism.get_frame_features(pixels)
        means.append(features.mean(dim=1))
        logits.append(model(frame_features=features).logits)
        labels.append(batch["labels"])
    return torch.cat(means), torch.cat(logits), torch.cat(labels)


def ridge_scores(train, labels, held_out):
    """Scores (M, K) of a one-against-all ridge classifier on standardised features."""
    mean, deviation = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, held_out = (train - mean) / deviation, (held_out - mean) / deviation
    targets = torch.nn.functional.one_hot(labels, len(DEMO_CLASSES)).float()
    gram = train.T @ train + RIDGE * torch.eye(train.shape[1])
    return held_out @ torch.linalg.solve(gram, train.T @ (targets - targets.mean(dim=0)))


def accuracies(scores, labels):
    """Accuracy over all classes, and between the two motions of each pair."""
    rows = {"all classes": (scores.argmax(dim=1) == labels).float().mean().item()}
    for pair in DEMO_PAIRS:
        indices = torch.tensor([DEMO_CLASSES.index(label) for label in pair])
        chosen = torch.isin(labels, indices)
        guess = indices[scores[chosen][:, indices].argmax(dim=1)]
        rows[" / ".join(pair)] = (guess == labels[chosen]).float().mean().item()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="export of a demo run")
    parser.add_argument("--root", default="data", help="where the demo clips are (data.root)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the demo clips (data.seed)")
    args = parser.parse_args()

    model = VidPrismForVideoClassification.from_pretrained(args.model).eval()
    data = VideoDataModule(
        "demo", root=args.root, seed=args.seed, processor=args.model, num_frames=model.config.num_frames, num_workers=0
    )
    data.prepare_data()
    data.setup("test")
    # Both splits as the processor makes them: evaluation views, so that the probe is at its best.
    train = torch.utils.data.DataLoader(ClipDataset(data.train_table, data.video_processor), batch_size=16)
    train_means, _, train_labels = read_clips(model, data, train)
    means, logits, labels = read_clips(model, data, data.val_dataloader())
    probe, whole = accuracies(ridge_scores(train_means, train_labels, means), labels), accuracies(logits, labels)

    table = Table("held-out accuracy", "chance", "mean of frame features", "VidPrism")
    for name in probe:
        chance = 1 / len(DEMO_CLASSES) if name == "all classes" else 0.5
        table.add_row(name, f"{chance:.3f}", f"{probe[name]:.3f}", f"{whole[name]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
