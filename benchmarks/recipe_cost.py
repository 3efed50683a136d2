"""What a training recipe costs, worked out without a GPU: multiply-adds, activations, states, and hours.

Counts come from the real model on PyTorch's meta device, which runs every operation without data: multiply-adds by
torch's own counter, activations as the bytes that autograd keeps for the backward pass of one clip (an upper
bound: attention maps are among them, which flash attention does not keep). Hours follow from
an assumed share of a GPU's peak; nothing here was timed.

    python benchmarks/recipe_cost.py
"""

import argparse
from pathlib import Path

import torch

from vidprism_hf import VidPrismConfig, VidPrismForVideoClassification
from vidprism_hf.evaluation.compute import empty_view, giga_macs_per_view, million_parameters, without_memory

# Training clips and epochs of the recipes.
DATASETS = {"ucf101": (9_537, 30), "hmdb51": (3_570, 30), "k400": (240_000, 40), "ssv2": (168_913, 30)}
SIZES = [("b16", 8), ("b16", 32), ("l14", 8), ("l14", 32)]
ADAM_BYTES = 16  # of each parameter under mixed precision: weight, gradient and two moments, in float32


def build(preset: str, num_frames: int, num_labels: int) -> VidPrismForVideoClassification:
    """The recipe's model, with no memory behind its weights."""
    labels = {index: str(index) for index in range(num_labels)}
    return without_memory(VidPrismConfig.from_preset(preset, num_frames=num_frames, id2label=labels))


def activation_bytes(model: VidPrismForVideoClassification, num_frames: int) -> int:
    """Bytes that autograd keeps for one clip; each tensor once, in bfloat16, without the weights."""
    model = model.train().to(torch.bfloat16)
    weights = {id(parameter) for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base  # views share their memory
        if id(base) not in weights:
            kept[id(base)] = base
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(
            empty_view(model.config, num_frames).to(torch.bfloat16),
            labels=torch.zeros(1, dtype=torch.long, device="meta"),
        )
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tflops", type=float, default=312, help="peak of one GPU in bfloat16 (A100: 312)")
    parser.add_argument("--share", type=float, default=0.4, help="share of the peak that training reaches")
    parser.add_argument("--batch-size", type=int, default=32, help="clips per step and GPU")
    parser.add_argument("--output", type=Path, help="Markdown file")
    args = parser.parse_args()
    lines = [
        "| tower | frames | GMACs a view | parameters (M) | GB a GPU at "
        f"{args.batch_size} clips | " + " | ".join(f"{name}, GPU hours" for name in DATASETS) + " |",
        "| --- " * (5 + len(DATASETS)) + "|",
    ]
    for preset, num_frames in SIZES:
        model = build(preset, num_frames, 400)
        parameters = million_parameters(model)
        gmacs = giga_macs_per_view(model.config)
        memory = parameters * 1e6 * ADAM_BYTES + args.batch_size * activation_bytes(model, num_frames)
        # A multiply-add is two operations; the backward pass costs two forward passes.
        seconds = gmacs * 1e9 * 2 * 3 / (args.tflops * 1e12 * args.share)
        hours = " | ".join(f"{clips * epochs * seconds / 3600:.1f}" for clips, epochs in DATASETS.values())
        lines.append(f"| {preset} | {num_frames} | {gmacs:.1f} | {parameters:.1f} | {memory / 1e9:.0f} | {hours} |")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
