"""`vidprism convert`: the authors' checkpoints, a recorded one and one that is made here."""

import re

import pytest
import torch
from safetensors.torch import load_file
from small import complaint, files_of

from vidprism_cli import main
from vidprism_hf import VidPrismConfig, VidPrismForVideoClassification

CLASSES = ("jump", "run", "sit", "skip", "wave")

# Our names and the released ones, written down apart from the converter's own table; dots are dots.
TOWER, HEAD = "vidprism.vision_tower.", "vidprism.temporal_model."
LAYER, BLOCK = TOWER + "vision_model.encoder.layers.", "visual.transformer.resblocks."
RENAMES = [
    (TOWER + "vision_model.embeddings.class_embedding", "visual.class_embedding"),
    (TOWER + "vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    (TOWER + "vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
    (TOWER + "vision_model.pre_layrnorm.", "visual.ln_pre."),
    (TOWER + "vision_model.post_layernorm.", "visual.ln_post."),
    (TOWER + "visual_projection.weight", "visual.proj"),
    (LAYER + r"(\d+).layer_norm", BLOCK + r"\1.ln_"),
    (LAYER + r"(\d+).self_attn.out_proj.", BLOCK + r"\1.attn.out_proj."),
    (LAYER + r"(\d+).mlp.fc1.", BLOCK + r"\1.mlp.c_fc."),
    (LAYER + r"(\d+).mlp.fc2.", BLOCK + r"\1.mlp.c_proj."),
    (HEAD + r"mergers.(\d).metric_proj.", r"pooling_layers.\1.metric_proj."),
    (HEAD + r"mergers.(\d).score_norm.", r"pooling_layers.\1.score_head.0."),
    (HEAD + r"mergers.(\d).score_head.", r"pooling_layers.\1.score_head.1."),
    (HEAD + r"interaction.slow_to_fast.", "dynamic_interaction.slow2fast.proj."),
    (
        HEAD + r"interaction.fast_to_slow.(\d)_(\d).weight",
        r"dynamic_interaction.fast2slow_ops.\1->\2.tconv.weight",
    ),
    (HEAD + r"experts.(\d).attention.qkv.", r"mote.experts.\1.attn.in_proj_"),
    (HEAD + r"experts.(\d).attention.out_proj.", r"mote.experts.\1.attn.out_proj."),
    (HEAD + r"experts.(\d).attention_norm.", r"mote.experts.\1.ln_1."),
    (HEAD + r"experts.(\d).mlp_norm.", r"mote.experts.\1.ln_2."),
    (HEAD + r"experts.(\d).mlp.", r"mote.experts.\1.ffn."),
    (HEAD + "readout.query$", "mote.readout_gate.global_query"),
    (HEAD + "readout.out_proj.", "mote.readout_gate.attn.out_proj."),
    (HEAD + "readout.norm.", "mote.readout_gate.ln."),
    ("vidprism.projection_head.", "projection_head."),
    ("classifier.", "head."),
]


def small_model() -> VidPrismForVideoClassification:
    """A model as the converter builds it, all weights random."""
    torch.manual_seed(0)
    config = VidPrismConfig.released(
        vision_config={
            "hidden_size": 128,  # two heads of 64, as OpenAI's towers have
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "projection_dim": 16,
        },
        num_frames=16,
        projection_head=True,
        num_labels=len(CLASSES),
    )
    model = VidPrismForVideoClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def released_form(model: VidPrismForVideoClassification) -> dict:
    """The checkpoint that the released trainer would have written of a model."""
    ours = model.state_dict()
    released = {"logit_scale": torch.tensor(4.6)}
    for block in range(2):  # fused in the released form
        for kind in ("weight", "bias"):
            parts = [ours.pop(f"{LAYER}{block}.self_attn.{letter}_proj.{kind}") for letter in "qkv"]
            released[f"{BLOCK}{block}.attn.in_proj_{kind}"] = torch.cat(parts)
    for kind in ("weight", "bias"):
        parts = [ours.pop(f"{HEAD}readout.{part}_proj.{kind}") for part in ("query", "key_value")]
        released[f"mote.readout_gate.attn.in_proj_{kind}"] = torch.cat(parts)
    for source in range(4):  # the released head has a gate for each pair, also where nothing flows
        for destination in range(4):
            name = f"dynamic_interaction.score_mlps.{4 * source + destination}"
            for place, kind, shape in (
                (0, "weight", (4, 32)),
                (0, "bias", (4,)),
                (2, "weight", (1, 4)),
                (2, "bias", (1,)),
            ):
                gate = ours.pop(f"{HEAD}interaction.gates.{source}_{destination}.{place}.{kind}", None)
                released[f"{name}.{place}.{kind}"] = torch.randn(shape) if gate is None else gate
    for name, tensor in ours.items():
        rules = ((re.compile(pattern.replace(".", r"\.")), new) for pattern, new in RENAMES)
        theirs = [rule.sub(new, name) for rule, new in rules if rule.match(name)]
        assert len(theirs) == 1, name
        released[theirs[0]] = tensor
    released["visual.proj"] = released["visual.proj"].T.contiguous()
    slow2fast = "dynamic_interaction.slow2fast.proj.weight"
    released[slow2fast] = released[slow2fast].unsqueeze(-1)
    tower = {name for name in released if name.startswith(("visual.", "logit_scale"))}
    return {
        "epoch": 3,
        "model_state_dict": {name: released[name] for name in tower},
        "fusion_model_state_dict": {name: released[name] for name in released.keys() - tower},
        "optimizer_state_dict": {"state": {}, "param_groups": []},
    }


def with_module_prefix(checkpoint: dict) -> dict:
    return {
        key: {f"module.{name}": tensor for name, tensor in value.items()} if "model_state" in key else value
        for key, value in checkpoint.items()
    }


def write_labels(path, names):
    path.write_text("id,name\n" + "".join(f"{index},{name}\n" for index, name in enumerate(names)))
    return path


def arguments(folder, checkpoint, classes=CLASSES, **options):
    """`vidprism convert` of a checkpoint, which is written first unless it is a path."""
    if isinstance(checkpoint, dict):
        torch.save(checkpoint, folder / "released.pt")
        checkpoint = folder / "released.pt"
    options = {"num-frames": 16, "labels": write_labels(folder / "labels.csv", classes)} | options
    given = [str(word) for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    return ["convert", str(checkpoint), str(folder / "out"), *given]


@pytest.fixture
def checkpoint():
    return released_form(small_model())


@pytest.mark.parametrize("prefixed", [False, True], ids=["plain", "module-prefix"])
def test_every_weight_finds_its_place(tmp_path, checkpoint, prefixed):
    checkpoint = with_module_prefix(checkpoint) if prefixed else checkpoint
    assert main(arguments(tmp_path, checkpoint)) == 0
    model, expected = VidPrismForVideoClassification.from_pretrained(tmp_path / "out"), small_model()
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    pixels = torch.randn(2, 16, 3, 16, 16)
    torch.testing.assert_close(model(pixels).logits, expected(pixels).logits, atol=1e-5, rtol=0)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.num_frames == 16


def test_says_what_went_where(tmp_path, checkpoint, capsys):
    main(arguments(tmp_path, checkpoint))
    printed = capsys.readouterr().out
    counts = {part.strip(): int(count) for part, count in re.findall(r"│ ([\w -]+?) +│ (\d+) +│", printed)}
    gates, mappings = (
        2 * 4 * 4,
        2 + 4,
    )  # two linear layers on each of eight edges; one projection, four strided
    assert counts["DBI"] == gates + mappings
    assert counts["RgSTA"] == 4 * 5
    assert counts["classifier"] == 2
    assert sum(counts.values()) + 33 == sum(len(part) for name, part in checkpoint.items() if "model_state" in name)
    assert "not used (33): logit_scale, " in printed  # and the gates of the eight pairs without an edge
    assert "5 classes, 16 frames, rates [2, 4, 8, 16]" in printed


def test_rates_can_be_given(tmp_path, checkpoint):
    assert main(arguments(tmp_path, checkpoint, rates="1 2 8 8")) == 0
    assert VidPrismConfig.from_pretrained(tmp_path / "out").rates == [1, 2, 8, 8]


@pytest.fixture
def recorded(shared):
    reference = shared / "reference"
    return reference / "official_checkpoint_tiny.pt", load_file(reference / "official_checkpoint_tiny_io.safetensors")


@pytest.mark.parametrize("prefixed", [False, True], ids=["plain", "module-prefix"])
def test_recorded_checkpoint_gives_its_recorded_numbers(tmp_path, recorded, prefixed):
    checkpoint, expected = recorded
    if prefixed:
        checkpoint = with_module_prefix(torch.load(checkpoint, weights_only=True))
    classes = [f"class {index}" for index in range(7)]
    assert main(arguments(tmp_path, checkpoint, classes)) == 0
    model = VidPrismForVideoClassification.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        output = model(expected["pixel_values"])
        features = model.vidprism.get_frame_features(expected["pixel_values"])
    for ours, name in (
        (output.logits, "logits"),
        (output.expert_weights, "expert_weights"),
        (features, "frame_features"),
    ):
        torch.testing.assert_close(ours, expected[name].view_as(ours), atol=1e-5, rtol=0)


class Attack:
    """A pickle that runs code when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (type(self.folder).mkdir, (self.folder,))


def test_code_in_a_pickle_does_not_run(tmp_path, capsys):
    marker = tmp_path / "attacked"
    assert main(arguments(tmp_path, {"model_state_dict": Attack(marker)})) == 1
    assert "not a checkpoint of the released trainer" in complaint(capsys)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no checkpoint", "released.pt: not a checkpoint"),
        (b"", "released.pt: not a checkpoint"),
        (None, "released.pt: cannot be read (No such file"),
    ],
    ids=["text", "empty", "missing"],
)
def test_no_checkpoint(tmp_path, capsys, content, message):
    file = tmp_path / "released.pt"
    if content is not None:
        file.write_bytes(content)
    assert main(arguments(tmp_path, file)) == 1
    assert message in complaint(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("head.weight", "the checkpoint has no head.weight"),
        ("visual.proj", "the checkpoint has no visual.proj"),
        ("mote.experts.1.ln_2.bias", "1 weights are missing"),
    ],
)
def test_missing_weight(tmp_path, checkpoint, capsys, lost, message):
    for part in ("model_state_dict", "fusion_model_state_dict"):
        checkpoint[part].pop(lost, None)
    assert main(arguments(tmp_path, checkpoint)) == 1
    assert message in complaint(capsys)
    assert not (tmp_path / "out").exists()


def test_weight_of_another_shape(tmp_path, checkpoint, capsys):
    checkpoint["fusion_model_state_dict"]["mote.experts.1.ln_2.bias"] = torch.zeros(3)
    assert main(arguments(tmp_path, checkpoint)) == 1
    assert "experts.1.mlp_norm.bias" in complaint(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": "2 4"}, "--rates: the checkpoint has 4 streams, not 2"),
        ({"rates": "16 8 4 2"}, "rates must be positive integers that do not decrease"),
        ({"num-frames": 0}, "num_frames and kept_per_window must be at least 1"),
    ],
)
def test_bad_option(tmp_path, checkpoint, capsys, options, message):
    assert main(arguments(tmp_path, checkpoint, **options)) == 1
    assert message in complaint(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("id,name\n0,jump\n1,run\n", "--labels: the checkpoint has 5 classes, the file names 2"),
        ("index,label\n0,jump\n", "--labels: the checkpoint has 5 classes, the file names 1"),
        ("id,name\nzero,jump\n", "every line below the header needs a number and a name"),
        ("id,name\n0\n", "label name '' is empty"),
        ("id,name\n0,jump\n0,run\n1,sit\n2,skip\n3,wave\n", "must count from 0 or 1 without gaps or repeats"),
        ("id,name\n1,jump\n2,run\n3,sit\n4,skip\n5,wave\n", "ids must be 0 to 4, each once"),
        (None, "labels.csv: cannot be read"),
    ],
    ids=["too-few", "columns", "not-a-number", "short-line", "twice", "from-one", "missing"],
)
def test_bad_labels(tmp_path, checkpoint, capsys, csv, message):
    command = arguments(tmp_path, checkpoint)
    labels = tmp_path / "labels.csv"
    labels.unlink() if csv is None else labels.write_text(csv)
    assert main(command) == 1
    assert message in complaint(capsys)
    assert not (tmp_path / "out").exists()


def test_folder_of_something_else_stays(tmp_path, checkpoint, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert main(arguments(tmp_path, checkpoint)) == 1
    assert "exists and is not an exported model" in complaint(capsys)
    assert files_of(tmp_path / "out") == {"thesis.tex": b"years of work"}
