"""Claim: the temporal head is many times faster than its formulas as loops, and next to nothing beside the tower.

The loops are the tests' reference, tests/model/slow_reference.py: clips, windows, frames and taps one after the other.
Head and loops take the same features and weights, run forward without gradients in turn, and must agree; both work out
the rank loss, the head the other losses too. Ratios are medians over the rounds. Beside that the head's step (forward,
all losses, backward), plain and compiled, the operations that a step starts, and its counted share of the tower's
multiply-adds.

    python benchmarks/head.py                                          # on the CPU
    python benchmarks/head.py --device cuda --output benchmarks/results/head_cuda.md
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from report import add_report_options, write_report
from timing import CLOCKS, describe_device, in_turn, median_ratio
from torch.utils._python_dispatch import TorchDispatchMode

from vidprism_hf import VidPrismConfig, VidPrismTemporalModel
from vidprism_hf.evaluation.compute import empty_view, giga_macs, without_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "model"))
import slow_reference


class Operations(TorchDispatchMode):
    """Counts operations that compute something; views cost nothing on the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def step(model, features):
    """Forward, all losses and backward."""
    output = model(features, output_losses=True)
    loss = output.pooler_output.square().mean() + output.rank_loss + output.gate_loss + output.diversity_loss
    loss.backward()
    model.zero_grad()


def count_operations(model, features):
    """Operations of a forward pass without gradients, and of a step."""
    with Operations() as forward, torch.inference_mode():
        model(features)
    with Operations() as both:
        step(model, features)
    return forward.count, both.count


def gmacs_share(config, num_frames):
    """The head's multiply-adds as a share of the tower's."""
    model = without_memory(config).vidprism
    features = torch.empty(1, num_frames, config.feature_size, device="meta")
    return giga_macs(model.temporal_model, features) / giga_macs(model.vision_tower, empty_view(config, num_frames))


def measure(tower, frames, batch, args):
    """One row: head and loops at one size."""
    device = torch.device(args.device)
    config = VidPrismConfig.from_preset(tower, num_frames=frames)
    torch.manual_seed(0)
    model = VidPrismTemporalModel(config).to(device).train()
    features = torch.randn(batch, frames, config.feature_size, device=device)
    state = model.state_dict()

    def loops():
        with torch.inference_mode():
            return slow_reference.temporal_model(state, config, features, dtype=torch.float32)

    def head():
        with torch.inference_mode():
            return model(features, output_losses=True)

    (clips, rank_loss), found = loops(), head()
    for name, key in (("pooler_output", "pooled"), ("gates", "gates"), ("expert_weights", "weights")):
        torch.testing.assert_close(found[name], torch.stack([clip[key] for clip in clips]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.rank_loss, rank_loss, rtol=1e-3, atol=1e-3)
    rivals = {"loops": loops, "head": head, "step": lambda: step(model, features)}
    if args.compiled:
        torch.compiler.reset()
        compiled = torch.compile(model)
        rivals["compiled step"] = lambda: step(compiled, features)
    seconds = in_turn(rivals, args.rounds, device, args.clock)
    milliseconds = [f"{1e3 * statistics.median(times):.1f}" for times in seconds.values()]
    ratio = f"{median_ratio(seconds, 'loops', 'head'):.1f}"
    operations = count_operations(model, features)
    return [*milliseconds[:2], ratio, *milliseconds[2:], *map(str, operations), f"{gmacs_share(config, frames):.3%}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--towers", nargs="+", choices=["b32", "b16", "l14", "tiny"], default=["b16", "l14"])
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32], help="clips")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="also the compiled step")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="process: what others use is left out")
    add_report_options(parser)
    args = parser.parse_args()
    rows = []
    for tower in args.towers:
        for frames in args.frames:
            for batch in args.batch_sizes:
                rows.append([tower, str(frames), str(batch), *measure(tower, frames, batch, args)])
                print(rows[-1], flush=True)
    header = ["head of", "frames", "clips", "loops, ms", "head, ms", "loops / head", "step, ms"]
    header += ["compiled step, ms"] if args.compiled else []
    header += ["operations forward", "operations of a step", "GMACs, share of the tower's"]
    about = (
        f"On {describe_device(torch.device(args.device))}, in float32: the head forward as plain loops and as it is, "
        f"and its step (forward, losses, backward). Times ({args.clock} clock) are medians of {args.rounds} "
        "rounds, the ratio the median of the rounds' ratios. Operations are those that compute something, of any size."
    )
    if args.device == "cpu":
        about += (
            "\n\nNo GPU was at hand: `python benchmarks/head.py --device cuda --compiled --output "
            "benchmarks/results/head_cuda.md` measures one."
        )
    write_report("The head beside its loops", about, header, rows, args)


if __name__ == "__main__":
    main()
