"""Claim: a step of VidPrism costs what its CLIP tower costs.

Three models take the same pixels: CLIP's tower as transformers has it and our tower (which leaves out what nothing
reads, see tower_vidprism.py), each with a linear classifier on the mean of the frame features, and VidPrism. They run
in turn, round by round; the ratios are medians over the rounds, each of two times of one round. Weights are random,
which costs the same. bf16 is autocast, as `precision=bf16-mixed` trains.

    python benchmarks/step.py                                          # on the CPU: what a CPU does in half an hour
    python benchmarks/step.py --device cuda --output benchmarks/results/step_cuda.md     # all of it on a GPU

Without options a GPU measures the whole grid, most of the time compiling, and a CPU the parts of GRIDS. Options replace
values of the first part and the others are left out, such as with `--modes eager`, or `--modes compiled --frames 32
--batch_sizes 32 --precisions bf16`.
"""

import argparse
import itertools
import statistics

import torch
from report import add_report_options, write_report
from timing import CLOCKS, describe_device, gigabytes, in_turn, median_ratio, peak_memory
from torch import nn
from transformers import CLIPVisionModelWithProjection

from vidprism_hf import VidPrismConfig, VidPrismForVideoClassification
from vidprism_hf.model.tower_vidprism import VidPrismVisionTower

NUM_CLASSES = 400
MODELS = ["CLIP", "tower", "VidPrism"]
ALONE = ["tower", "VidPrism"]  # CLIP takes longer than either
# What is measured by default: grids, one after another.
GRIDS = {
    "cuda": [
        {
            "towers": ["b16", "l14"],
            "frames": [8, 16, 32],
            "batch_sizes": [1, 8, 32],
            "modes": ["eager", "compiled"],
            "precisions": ["fp32", "bf16"],
            "models": MODELS,
            "rounds": 10,
        }
    ],
    "cpu": [
        {
            "towers": [tower],
            "frames": [frames],
            "batch_sizes": [batch],
            "modes": modes,
            "precisions": precisions,
            "models": models,
            "rounds": rounds,
        }
        for tower, frames, batch, modes, precisions, models, rounds in (
            ("b16", 32, 1, ["eager"], ["fp32"], MODELS, 3),
            ("b16", 8, 1, ["eager"], ["fp32", "bf16"], ALONE, 3),
            ("b16", 8, 2, ["eager"], ["bf16"], ALONE, 2),
            ("b16", 16, 1, ["eager"], ["fp32"], ALONE, 2),
            ("b16", 32, 1, ["eager"], ["bf16"], ALONE, 2),
            ("l14", 8, 1, ["eager"], ["bf16"], ALONE, 2),
            ("b16", 8, 1, ["compiled"], ["fp32"], ALONE, 3),
        )
    ],
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


def build(tower, frames, names, device):
    """The models by name."""
    config = VidPrismConfig.from_preset(
        tower, num_frames=frames, id2label={index: str(index) for index in range(NUM_CLASSES)}
    )
    makers = {
        "CLIP": lambda: OnTheMean(ClipTower(config), config),
        "tower": lambda: OnTheMean(VidPrismVisionTower(config), config),
        "VidPrism": lambda: VidPrism(config),
    }
    models = {name: makers[name]().to(device).train() for name in names}
    return models, config.vision_config.image_size


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


def measure(models, size, mode, precision, rounds, args):
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
            seconds = in_turn(runs, rounds, device, args.clock)
            peaks = {name: peak_memory(run, device) for name, run in runs.items()}
        except torch.OutOfMemoryError:
            for model in models.values():
                model.zero_grad()
            torch.cuda.empty_cache()
            rows.append([what, "out of memory", *["-"] * 7])
            continue
        times = [f"{1e3 * statistics.median(seconds[name]):.1f}" if name in models else "-" for name in MODELS]
        rivals_of = [base if {base, "VidPrism"} <= models.keys() else None for base in ("tower", "CLIP")]
        ratios = [f"{median_ratio(seconds, 'VidPrism', base):.3f}" if base else "-" for base in rivals_of]
        rows.append([what, *times, *ratios, *(gigabytes(peaks.get(name)) for name in MODELS)])
    return rows


def measure_grid(grid, args):
    """Rows of the table for all of a grid, printed as they are found."""
    rows = []
    for tower, frames in itertools.product(grid["towers"], grid["frames"]):
        models, edge = build(tower, frames, grid["models"], torch.device(args.device))
        for batch, mode, precision in itertools.product(grid["batch_sizes"], grid["modes"], grid["precisions"]):
            found = measure(models, (batch, frames, edge), mode, precision, grid["rounds"], args)
            rows += [[tower, str(frames), str(batch), mode, precision, str(grid["rounds"]), *row] for row in found]
            print(*rows[-len(found) :], sep="\n", flush=True)
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
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="process: what others use is left out")
    add_report_options(parser)
    args = parser.parse_args()
    first = GRIDS[args.device][0]
    chosen = {name: getattr(args, name) for name in first if getattr(args, name) is not None}
    grids = [first | chosen] if chosen else GRIDS[args.device]
    rows = [row for grid in grids for row in measure_grid(grid, args)]
    header = ["tower", "frames", "clips", "mode", "precision", "rounds", "pass"]
    header += ["CLIP, ms", "tower, ms", "VidPrism, ms"]
    header += ["VidPrism / tower", "VidPrism / CLIP", "CLIP, GB", "tower, GB", "VidPrism, GB"]
    about = (
        f"On {describe_device(torch.device(args.device))}: a pass of CLIP's own tower and of ours, each with a linear "
        f"classifier on the mean, and of VidPrism (all losses). Times ({args.clock} clock) are medians, ratios medians "
        "of the ratios within each round; GB is what a pass needs at its peak beside weights and "
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
