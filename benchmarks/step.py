"""Claim: a step of VidPrism costs what its CLIP tower costs.

Three models take the same pixels: CLIP's tower as transformers has it and our tower (which leaves out what nothing
reads, see tower_vidprism.py), each with a linear classifier on the mean of the frame features, and VidPrism. They run
in turn, round by round; the ratios are medians over the rounds, each of two times of one round. Weights are random,
which costs the same. bf16 is autocast, as `precision=bf16-mixed` trains.

    python benchmarks/step.py                                          # on the CPU: B/16 at 32 frames
    python benchmarks/step.py --device cuda --output benchmarks/results/step_cuda.md     # all of it on a GPU

Without options a GPU measures the whole grid, most of the time compiling; each option picks a part of it, such as
`--modes eager`, or `--modes compiled --frames 32 --batch_sizes 32 --precisions bf16`.
"""

import argparse
import statistics

import torch
from report import add_report_options, write_report
from timing import CLOCKS, describe_device, gigabytes, in_turn, median_ratio, peak_memory
from torch import nn
from transformers import CLIPVisionModelWithProjection

from vidprism_hf import VidPrismConfig, VidPrismForVideoClassification
from vidprism_hf.model.tower_vidprism import VidPrismVisionTower

NUM_CLASSES = 400
GRIDS = {
    "cuda": {
        "towers": ["b16", "l14"],
        "frames": [8, 16, 32],
        "batch_sizes": [1, 8, 32],
        "modes": ["eager", "compiled"],
        "precisions": ["fp32", "bf16"],
        "rounds": 10,
    },
    "cpu": {
        "towers": ["b16"],
        "frames": [32],
        "batch_sizes": [1],
        "modes": ["eager"],
        "precisions": ["fp32"],
        "rounds": 5,
    },
}


class ClipTower(nn.Module):
    """CLIP's tower as transformers has it: pixels (B, T, 3, H, W) to frame features (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.clip = CLIPVisionModelWithProjection._from_config(config.vision_config)

    def forward(self, pixels):
        return self.clip(pixel_values=pixels.flatten(0, 1)).image_embeds.unflatten(0, pixels.shape[:2])


class OnTheMean(nn.Module):
    """A linear classifier on the mean of a tower's frame features."""

    def __init__(self, tower, config):
        super().__init__()
        self.tower = tower
        self.classifier = nn.Linear(config.feature_size, config.num_labels)

    def forward(self, pixels, labels=None):
        logits = self.classifier(self.tower(pixels).mean(dim=1))
        return logits if labels is None else nn.functional.cross_entropy(logits, labels)


class VidPrism(nn.Module):
    """VidPrism with the interface of `OnTheMean`; its loss has all four parts."""

    def __init__(self, config):
        super().__init__()
        self.model = VidPrismForVideoClassification(config)

    def forward(self, pixels, labels=None):
        output = self.model(pixels, labels=labels)
        return output.logits if labels is None else output.loss


def build(tower, frames, device):
    """The three models by name."""
    config = VidPrismConfig.from_preset(
        tower, num_frames=frames, id2label={index: str(index) for index in range(NUM_CLASSES)}
    )
    models = {
        "CLIP": OnTheMean(ClipTower(config), config),
        "tower": OnTheMean(VidPrismVisionTower(config), config),
        "VidPrism": VidPrism(config),
    }
    return {name: model.to(device).train() for name, model in models.items()}


def passes(model, compiled, pixels, labels, precision):
    """What is timed: a forward pass without gradients, and one with the backward pass."""

    def autocast():
        return torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    def forward():
        with torch.inference_mode(), autocast():
            compiled(pixels)

    def step():
        with autocast():
            loss = compiled(pixels, labels)
        loss.backward()
        model.zero_grad()

    return {"forward": forward, "forward + backward": step}


def measure(models, size, mode, precision, args):
    """Rows of the table for one batch size, mode and precision: one for each pass."""
    device = torch.device(args.device)
    batch, frames, edge = size
    pixels = torch.randn(batch, frames, 3, edge, edge, device=device)
    labels = torch.arange(batch, device=device) % NUM_CLASSES
    torch.compiler.reset()
    rivals = {
        name: passes(model, torch.compile(model) if mode == "compiled" else model, pixels, labels, precision)
        for name, model in models.items()
    }
    rows = []
    for what in args.passes:
        runs = {name: rival[what] for name, rival in rivals.items()}
        try:
            seconds = in_turn(runs, args.rounds, device, args.clock)
            peaks = {name: peak_memory(run, device) for name, run in runs.items()}
        except torch.OutOfMemoryError:
            for model in models.values():
                model.zero_grad()
            torch.cuda.empty_cache()
            rows.append([what, *["out of memory"] * 3, *["-"] * 5])
            continue
        times = [f"{1e3 * statistics.median(seconds[name]):.1f}" for name in models]
        ratios = [f"{median_ratio(seconds, 'VidPrism', base):.3f}" for base in ("tower", "CLIP")]
        rows.append([what, *times, *ratios, *(gigabytes(peaks[name]) for name in models)])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--towers", nargs="+", choices=["b32", "b16", "l14", "tiny"])
    parser.add_argument("--frames", type=int, nargs="+")
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="clips")
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"])
    parser.add_argument("--passes", nargs="+", default=["forward", "forward + backward"])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="process: what others use is left out")
    add_report_options(parser)
    args = parser.parse_args()
    for name, value in GRIDS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    rows = []
    for tower in args.towers:
        for frames in args.frames:
            models = build(tower, frames, torch.device(args.device))
            edge = models["VidPrism"].model.config.vision_config.image_size
            for batch in args.batch_sizes:
                for mode in args.modes:
                    for precision in args.precisions:
                        found = measure(models, (batch, frames, edge), mode, precision, args)
                        rows += [[tower, str(frames), str(batch), mode, precision, *row] for row in found]
                        print(*rows[-len(found) :], sep="\n", flush=True)
    header = ["tower", "frames", "clips", "mode", "precision", "pass", "CLIP, ms", "tower, ms", "VidPrism, ms"]
    header += ["VidPrism / tower", "VidPrism / CLIP", "CLIP, GB", "tower, GB", "VidPrism, GB"]
    about = (
        f"On {describe_device(torch.device(args.device))}: a pass of CLIP's own tower and of ours, each with a linear "
        f"classifier on the mean, and of VidPrism (all losses). Times ({args.clock} clock) are medians, ratios medians "
        f"of the ratios within each of {args.rounds} rounds; GB is what a pass needs at its peak beside weights and "
        "pixels."
    )
    if args.device == "cpu":
        about += (
            "\n\nNo GPU was at hand: `python benchmarks/step.py --device cuda --output "
            "benchmarks/results/step_cuda.md` measures one."
        )
    write_report("What a step costs beside the tower's", about, header, rows, args)


if __name__ == "__main__":
    main()
