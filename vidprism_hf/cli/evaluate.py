"""`vidprism evaluate`: accuracy of any video classifier on the validation split of a recipe's data."""

import argparse

from ..errors import UserError
from ..evaluation.evaluate import evaluate
from .recipe import parse, trainer_settings

USAGE = """usage: vidprism evaluate MODEL --config RECIPE [--key value]

MODEL is an export, or any video classifier of transformers in a folder or on the Hub: VidPrism, VideoMAE, TimeSformer,
ViViT, V-JEPA 2. Keys are those of `vidprism finetune --help`, among them

  --revision REVISION                     branch, tag or commit of a model on the Hub (main)
  --model.num_frames N                    frames per view, for a VidPrism without learned positions (the model's)
  --data.frame_stride N                   every Nth frame of a clip; default: frames from the whole video
  --data.test_clips N                     clips per video, from N places in time
  --data.test_crops 3                     crops per clip, along the longer side
  --evaluation.average_clips score|prob   average the views' logits (the default), or their probabilities
  --evaluation.output FOLDER              folder of evaluation.json and confusion.png
  --trainer.devices N                     number of ranks, each with a shard of the videos
  --trust-recipe                          lets the recipe name any class, and so run its code

VideoMAE, TimeSformer and ViViT were published with a stride on Kinetics-400: recipes/README.md has it and their views.
"""
DATA_KEYS = {"--config", "-c", "--data", "--data.source"}
# Only the recipe's data are needed: the smallest model is a placeholder.
NO_MODEL = ("--model.checkpoint=null", "--model.config=null", "--model.backbone=tiny")


def main(argv: list[str]) -> int:
    """Evaluates a model."""
    if {"-h", "--help"}.intersection(argv):
        print(USAGE, end="")
        return 0
    if not argv or argv[0].startswith("-"):
        raise UserError("name the model first, then --config RECIPE")
    model, (revision, rest) = argv[0], asked(argv[1:], "--revision")
    if revision == "":
        raise UserError("--revision: is empty; name a branch, tag or commit, or leave it out")
    if not {word.partition("=")[0] for word in rest}.intersection(DATA_KEYS):
        raise UserError("name the videos: --config RECIPE (a run's own is its config.yaml), or --data.source CLIPS")
    # The recipe's number of frames is for training; one on the command line is for the evaluation.
    frames, _ = asked(rest, "--model.num_frames")
    cli = parse([*rest, *NO_MODEL])
    settings = cli.config_init.evaluation
    evaluate(
        model,
        cli.datamodule,
        output=settings.output,
        average_clips=settings.average_clips,
        revision=revision,
        num_frames=cli.config.model.num_frames if frames else None,
        trainer=trainer_settings(cli),
        collective_timeout=cli.config.collective_timeout,
    )
    return 0


def asked(settings: list[str], option: str) -> tuple[str | None, list[str]]:
    """Returns an option's value on the command line (empty without a value), and the remaining arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, nargs="?", const="", dest="value")
    found, others = parser.parse_known_args(settings)
    return found.value, others
