"""`vidprism convert`: a checkpoint of the authors' released trainer to the Hub's layout.

The released file holds `model_state_dict` (`visual.*` in OpenAI CLIP's naming, the text tower,
`logit_scale`), `fusion_model_state_dict` (the temporal head) and `optimizer_state_dict`. The converted model
has the released code's switches (`VidPrismConfig.released`), which reproduce its numbers.
"""

import argparse
import csv
import math
import re
from collections import Counter
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.table import Table

from ..errors import UserError, printable
from ..hub import CardFacts, export_model, render_card
from ..model import VidPrismConfig, VidPrismForVideoClassification, VidPrismVideoProcessor
from ..util import preview

CLIP_HEAD_WIDTH = 64  # of every OpenAI ViT
DEFAULT_RATES = (2, 4, 8, 16)

# (part of the model, released name, our name); numbers of layers, experts and streams stay as they are.
RULES = [
    (part, re.compile(pattern + "$"), name)
    for part, pattern, name in [
        ("vision tower", r"visual\.class_embedding", "{tower}.embeddings.class_embedding"),
        ("vision tower", r"visual\.positional_embedding", "{tower}.embeddings.position_embedding.weight"),
        ("vision tower", r"visual\.conv1\.weight", "{tower}.embeddings.patch_embedding.weight"),
        ("vision tower", r"visual\.ln_pre\.(\w+)", r"{tower}.pre_layrnorm.\1"),
        ("vision tower", r"visual\.ln_post\.(\w+)", r"{tower}.post_layernorm.\1"),
        ("vision tower", r"visual\.proj", "vidprism.vision_tower.visual_projection.weight"),
        (
            "vision tower",
            r"visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)",
            r"{layer}.\1.layer_norm\2.\3",
        ),
        (
            "vision tower",
            r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)",
            r"{layer}.\1.self_attn.qkv_proj.\2",
        ),
        (
            "vision tower",
            r"visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)",
            r"{layer}.\1.self_attn.out_proj.\2",
        ),
        (
            "vision tower",
            r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)",
            r"{layer}.\1.mlp.fc1.\2",
        ),
        (
            "vision tower",
            r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)",
            r"{layer}.\1.mlp.fc2.\2",
        ),
        ("RgSTA", r"pooling_layers\.(\d+)\.metric_proj\.(\w+)", r"{head}.mergers.\1.metric_proj.\2"),
        ("RgSTA", r"pooling_layers\.(\d+)\.score_head\.0\.(\w+)", r"{head}.mergers.\1.score_norm.\2"),
        ("RgSTA", r"pooling_layers\.(\d+)\.score_head\.1\.(\w+)", r"{head}.mergers.\1.score_head.\2"),
        ("DBI", r"dynamic_interaction\.slow2fast\.proj\.(\w+)", r"{head}.interaction.slow_to_fast.\1"),
        (
            "DBI",
            r"dynamic_interaction\.fast2slow_ops\.(\d+)->(\d+)\.tconv\.weight",
            r"{head}.interaction.fast_to_slow.\1_\2.weight",
        ),
        (
            "DBI",
            r"dynamic_interaction\.score_mlps\.(\d+_\d+)\.(\d)\.(\w+)",
            r"{head}.interaction.gates.\1.\2.\3",
        ),
        ("experts", r"mote\.experts\.(\d+)\.attn\.in_proj_(\w+)", r"{head}.experts.\1.attention.qkv.\2"),
        (
            "experts",
            r"mote\.experts\.(\d+)\.attn\.out_proj\.(\w+)",
            r"{head}.experts.\1.attention.out_proj.\2",
        ),
        ("experts", r"mote\.experts\.(\d+)\.ln_1\.(\w+)", r"{head}.experts.\1.attention_norm.\2"),
        ("experts", r"mote\.experts\.(\d+)\.ln_2\.(\w+)", r"{head}.experts.\1.mlp_norm.\2"),
        ("experts", r"mote\.experts\.(\d+)\.ffn\.(\d)\.(\w+)", r"{head}.experts.\1.mlp.\2.\3"),
        ("read-out", r"mote\.readout_gate\.global_query", "{head}.readout.query"),
        ("read-out", r"mote\.readout_gate\.attn\.in_proj_(\w+)", r"{head}.readout.in_proj.\1"),
        ("read-out", r"mote\.readout_gate\.attn\.out_proj\.(\w+)", r"{head}.readout.out_proj.\1"),
        ("read-out", r"mote\.readout_gate\.ln\.(\w+)", r"{head}.readout.norm.\1"),
        ("text alignment", r"projection_head\.(\d)\.(\w+)", r"vidprism.projection_head.\1.\2"),
        ("classifier", r"head\.(\w+)", r"classifier.\1"),
    ]
]
PREFIXES = {
    "tower": "vidprism.vision_tower.vision_model",
    "layer": "vidprism.vision_tower.vision_model.encoder.layers",
    "head": "vidprism.temporal_model",
}


def load_released(file: Path) -> dict[str, torch.Tensor]:
    """Reads a released checkpoint, weights only, as one state dict without `module.` prefixes.

    Raises:
        UserError: If it is no such checkpoint.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        parts = [checkpoint["model_state_dict"], checkpoint["fusion_model_state_dict"]]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except Exception as error:  # torch.load raises whatever its unpickler meets
        raise UserError(f"{file}: not a checkpoint of the released trainer ({type(error).__name__})") from error
    return {
        name.removeprefix("module."): tensor for part in parts for name, tensor in part.items() if tensor is not None
    }


def infer_config(
    state: dict[str, torch.Tensor], num_frames: int, labels: list[str], rates: list[int] | None = None
) -> VidPrismConfig:
    """Reads the sizes of tower and head off the weights.

    Raises:
        UserError: If the weights lack a part, or labels or rates do not fit them.
    """
    try:
        patches = state["visual.conv1.weight"]
        width, patch_size = patches.shape[0], patches.shape[-1]
        grid = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
        projection_dim = state["visual.proj"].shape[1]
        intermediate_size = state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
        num_classes, hidden_size = state["head.weight"].shape
    except KeyError as error:
        raise UserError(f"the checkpoint has no {error.args[0]}: not a released VidPrism with a ViT tower") from error
    layers, streams = (
        len({match[1] for name in state if (match := re.match(pattern, name))})
        for pattern in (r"visual\.transformer\.resblocks\.(\d+)\.", r"pooling_layers\.(\d+)\.")
    )
    rates = rates or list(DEFAULT_RATES[:streams])
    if len(rates) != streams:
        raise UserError(f"--rates: the checkpoint has {streams} streams, not {len(rates)}")
    if len(labels) != num_classes:
        raise UserError(f"--labels: the checkpoint has {num_classes} classes, the file names {len(labels)}")
    vision_config = {
        "hidden_size": width,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": width // CLIP_HEAD_WIDTH,
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "projection_dim": projection_dim,
    }
    try:
        return VidPrismConfig.released(
            vision_config=vision_config,
            num_frames=num_frames,
            rates=rates,
            hidden_size=hidden_size,
            projection_head="projection_head.0.weight" in state,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )
    except StrictDataclassError as error:
        raise UserError(" ".join(str(error).split())) from error


def map_weights(
    state: dict[str, torch.Tensor], config: VidPrismConfig
) -> tuple[dict[str, torch.Tensor], Counter, list[str]]:
    """Renames and reshapes the released weights.

    Returns:
        Our state dict, the tensors mapped for each part of the model, and the released names that have no
        place.
    """
    mapped, counts, unused = {}, Counter(), []
    for released, tensor in state.items():
        name = edge_name(released, len(config.rates))
        rule = next(((part, match.expand(ours)) for part, rx, ours in RULES if (match := rx.match(name))), None)
        if rule is None:
            unused.append(released)
            continue
        part, ours = rule
        counts[part] += 1
        mapped.update(split_fused(ours.format(**PREFIXES), tensor))
    expected = VidPrismForVideoClassification(config).state_dict().keys()
    # Gates of pairs that never interact exist in the released head.
    idle = {name for name in mapped if ".interaction.gates." in name and name not in expected}
    counts["DBI"] -= len(idle)
    unused += sorted(idle)
    return {name: tensor for name, tensor in mapped.items() if name not in idle}, counts, unused


def edge_name(name: str, num_streams: int) -> str:
    """The released head numbers gate MLPs source * N + destination; we name them source_destination."""
    return re.sub(
        r"(?<=score_mlps\.)\d+",
        lambda match: "{}_{}".format(*divmod(int(match[0]), num_streams)),
        name,
    )


def split_fused(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cuts or reshapes the tensors that are stored in another form."""
    if ".qkv_proj." in name:
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {name.replace("qkv_proj", f"{letter}_proj"): part.clone() for letter, part in parts}
    if ".readout.in_proj." in name:
        query, key_value = tensor.tensor_split([tensor.shape[0] // 3])
        return {
            name.replace("in_proj", "query_proj"): query.clone(),
            name.replace("in_proj", "key_value_proj"): key_value.clone(),
        }
    if name.endswith("slow_to_fast.weight"):
        tensor = tensor.squeeze(-1)  # a 1x1 convolution is a linear layer
    elif name.endswith("visual_projection.weight"):
        tensor = tensor.T  # OpenAI multiplies from the right
    return {name: tensor.float().contiguous()}


def convert(
    file: Path, num_frames: int, labels: list[str], rates: list[int] | None = None
) -> tuple[VidPrismForVideoClassification, Counter, list[str]]:
    """Converts a released checkpoint.

    Returns:
        The classifier, and what `map_weights` says of the mapping.

    Raises:
        UserError: If the file is no such checkpoint, or weights are missing.
    """
    state = load_released(file)
    config = infer_config(state, num_frames, labels, rates)
    weights, counts, unused = map_weights(state, config)
    model = VidPrismForVideoClassification(config)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # shapes
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error
    if missing or unexpected:
        first = preview(missing + unexpected, 3)
        raise UserError(f"{file}: {len(missing)} weights are missing, {len(unexpected)} have no place: {first}")
    return model.eval(), counts, unused


def read_labels(file: Path) -> list[str]:
    """Reads label names from a CSV with the columns id and name, the field's common form.

    Raises:
        UserError: If the file cannot be read, a column is missing, or ids are not 0, 1, 2, ...
    """
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            rows = sorted((int(row["id"]), row["name"].strip()) for row in csv.DictReader(lines))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (KeyError, ValueError, AttributeError, TypeError) as error:  # a short row has None in it
        raise UserError(f"{file}: every line needs the columns id (a number) and name") from error
    if [index for index, _ in rows] != list(range(len(rows))):
        raise UserError(f"{file}: ids must be 0 to {len(rows) - 1}, each once")
    return [name for _, name in rows]


def main(argv: list[str]) -> int:
    """Converts, exports and says what went where."""
    parser = argparse.ArgumentParser(prog="vidprism convert", description=__doc__.partition("\n")[0])
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
