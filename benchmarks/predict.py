"""Claim: `vidprism predict` over many clips runs at the pace of the tower or of the decoder, whichever is slower.

The same clips in turn: the model's tower alone on pixels that are in memory, in batches; the whole model likewise; the
processor alone, which decodes and resizes; and `predict` file by file in one process, as it was, and in batches beside
decoding processes. Clips a second are medians over the rounds. Weights are random, which costs the same; a folder with
fewer clips is gone through again.

    python benchmarks/predict.py --data path/to/folder                 # on the CPU
    python benchmarks/predict.py --data path/to/folder --device cuda --tower b16 --frames 32 --clips 1000 \
        --batch_sizes 8 32 --workers 4 8 16 --output benchmarks/results/predict_cuda.md
"""

import argparse
import itertools
import statistics
from functools import partial

import torch
from report import add_report_options, write_report
from timing import describe_device, in_turn

from vidprism_hf import VidPrismConfig, VidPrismForVideoClassification
from vidprism_hf.data import load_processor
from vidprism_hf.evaluation.predict import DecodedFiles, predict, videos_below


def rivals(model, processor, files, args):
    """What is timed, by name: each goes through all files once."""
    config, device = model.config, model.device
    edge, frames = config.vision_config.image_size, config.num_frames
    batch = torch.randn(args.batch_sizes[0], frames, 3, edge, edge, device=device)
    decoded = DecodedFiles(files, processor, frames)

    def in_memory(module):
        with torch.inference_mode():
            for start in range(0, len(files), len(batch)):
                module(batch[: len(files) - start])

    def predicted(batch_size, workers):
        found = list(predict(model, processor, files, batch_size=batch_size, workers=workers))
        if bad := [prediction.error for prediction in found if prediction.error]:
            raise RuntimeError(f"clips that do not decode would be counted: {bad[:3]}")

    def decode():
        for index in range(len(files)):
            decoded[index]

    runs = {
        "tower alone, pixels in memory": lambda: in_memory(model.vidprism.vision_tower),
        "model, pixels in memory": lambda: in_memory(model),
        "processor alone, one process": decode,
        "predict, file by file": lambda: predicted(1, 0),
    }
    for batch_size, workers in itertools.product(args.batch_sizes, args.workers):
        runs[f"predict, batches of {batch_size}, {workers} workers"] = partial(predicted, batch_size, workers)
    return runs


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder of videos")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--tower", choices=["b32", "b16", "l14", "tiny"], default="b32")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    add_report_options(parser)
    args = parser.parse_args()

    files = list(itertools.islice(itertools.cycle(videos_below(args.data)), args.clips))
    processor = load_processor(args.tower, args.frames)
    config = VidPrismConfig.from_preset(args.tower, num_frames=args.frames, num_labels=400)
    model = VidPrismForVideoClassification(config).to(args.device).eval()
    seconds = in_turn(rivals(model, processor, files, args), args.rounds, torch.device(args.device))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    alone = medians["tower alone, pixels in memory"]
    rows = [[name, f"{len(files) / time:.2f}", f"{alone / time:.2f}"] for name, time in medians.items()]
    about = (
        f"{len(files)} clips, {args.frames} frames each, {args.tower} on "
        f"{describe_device(torch.device(args.device))}; medians of {args.rounds} rounds, starting the worker processes "
        "included. On a CPU decoding and tower share the cores, so that nothing can overlap for free."
    )
    if args.device == "cpu":
        about += "\n\nNo GPU was at hand: the docstring of `benchmarks/predict.py` has the command that measures one."
    write_report("Clips a second of `vidprism predict`", about, ["way", "clips a second", "of the tower's"], rows, args)


if __name__ == "__main__":
    main()
