"""`vidprism convert`: an authors' checkpoint to the Hub's layout."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..convert.released import convert, read_labels
from ..errors import printable
from ..hub import CardFacts, export_model, render_card
from ..model import VidPrismVideoProcessor
from ..util import preview


def main(argv: list[str]) -> int:
    """Converts, exports and says what went where."""
    parser = argparse.ArgumentParser(
        prog="vidprism convert", description="Converts a checkpoint of the authors' trainer."
    )
    parser.add_argument("checkpoint", type=Path, help="the authors' .pt file")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--num-frames", type=int, required=True, help="frames per clip it was trained with")
    parser.add_argument("--labels", type=Path, required=True, help="CSV with the columns id,name")
    parser.add_argument("--rates", type=int, nargs="+", help="of the streams (the first of 2 4 8 16)")
    args = parser.parse_args(argv)

    labels = read_labels(args.labels)
    model, counts, unused = convert(args.checkpoint, args.num_frames, labels, args.rates)
    config = model.config
    image_size = config.vision_config.image_size
    processor = VidPrismVideoProcessor(
        num_frames=config.num_frames,
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
    )
    card = CardFacts(
        model_name=args.out.name,
        labels=labels,
        num_frames=config.num_frames,
        rates=config.rates,
        origin="Its weights were converted from a checkpoint of the authors' released code.",
        config=config,
    )
    export_model(model, processor, args.out, render_card(card))

    table = Table("part", "tensors")
    for part, count in counts.items():
        table.add_row(part, str(count))
    Console().print(table)
    print(printable(f"not used ({len(unused)}): {preview(unused, 20) or 'none'}"))
    print(f"written to {args.out}: {len(labels)} classes, {config.num_frames} frames, rates {config.rates}")
    return 0
