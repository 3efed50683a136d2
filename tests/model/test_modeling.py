"""The models: building on any CLIP checkpoint, precisions, attention implementations, compile and export."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from vidprism_hf import VidPrismConfig, VidPrismForVideoClassification, VidPrismModel, VidPrismTemporalModel

VISION = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 24,
}
LABELS = {0: "jump", 1: "run", 2: "wave"}


def small(**fields):
    torch.manual_seed(0)
    fields = {"num_frames": 16, "id2label": LABELS, **fields}
    return VidPrismForVideoClassification(VidPrismConfig(vision_config=VISION, **fields))


def clips(batch=2, frames=16):
    return torch.randn(batch, frames, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def enable_checkpointing(model):
    """Under its name since transformers 5.21, or the one before."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def names_of_transformers_4(state):
    """v5 keeps the tower at the top of CLIPVisionModel; v4 had one level more."""
    return {f"vision_model.{name}": value for name, value in state.items()}


@pytest.fixture
def tower():
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection._from_config(CLIPVisionModel.config_class(**VISION)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("layout", ["projection", "vision", "vision-v4", "clip"])
def test_fills_the_tower_from_every_layout(layout, tower, tmp_path):
    if layout == "projection":
        tower.save_pretrained(tmp_path)
    elif layout == "clip":
        text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        text["num_attention_heads"] = 2
        whole = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24))
        whole.vision_model.load_state_dict(tower.vision_model.state_dict())
        whole.visual_projection.load_state_dict(tower.visual_projection.state_dict())
        whole.save_pretrained(tmp_path)
    else:
        tower.vision_model.save_pretrained(tmp_path)
        if layout == "vision-v4":
            file = tmp_path / "model.safetensors"
            save_file(names_of_transformers_4(load_file(file)), file, metadata={"format": "pt"})
    model = VidPrismForVideoClassification.from_vision_pretrained(str(tmp_path), id2label=LABELS, num_frames=16).eval()
    pixels = clips()
    with torch.no_grad():
        features = model.vidprism.get_frame_features(pixels).flatten(0, 1)
        expected = tower(pixels.flatten(0, 1))
    wanted = expected.image_embeds if layout in ("projection", "clip") else expected.last_hidden_state[:, 0]
    if layout not in ("projection", "clip"):
        wanted = tower.vision_model.post_layernorm(wanted)
        assert model.config.hidden_size == VISION["hidden_size"]
    torch.testing.assert_close(features, wanted)
    assert model.config.id2label == LABELS

    # Saved and loaded again, nothing is lost or renamed, and no path of this machine travels.
    model.save_pretrained(tmp_path / "saved", save_original_format=False)
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()
    again, info = VidPrismForVideoClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(pixels).logits, model(pixels).logits)
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)


def test_a_checkpoint_that_is_no_clip_tower_is_refused(tower, tmp_path):
    tower.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({n: v for n, v in state.items() if "layers.1" not in n}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not a CLIP vision tower"):
        VidPrismForVideoClassification.from_vision_pretrained(str(tmp_path), id2label=LABELS)


def test_presets():
    tiny = VidPrismForVideoClassification.from_vision_pretrained("tiny", id2label=LABELS, num_frames=8)
    assert tiny.config.rates == [2, 4, 8]
    assert tiny.config.hidden_size == tiny.config.vision_config.projection_dim
    widths = {name: VidPrismConfig.from_preset(name).hidden_size for name in ("b32", "b16", "l14")}
    assert widths == {"b32": 512, "b16": 512, "l14": 768}
    assert VidPrismConfig.from_preset("b16", num_frames=32).rates == [2, 4, 8, 16]
    with pytest.raises(ValueError, match="No preset"):
        VidPrismConfig.from_preset("h14")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rates": [4, 2]}, "do not decrease"),
        ({"rates": []}, "do not decrease"),
        ({"num_frames": 0}, "at least 1"),
        ({"merge_temperature": 0.0}, "positive"),
        ({"hidden_size": 18}, "multiple of num_attention_heads"),
        ({"readout": "sum"}, "readout"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"gate_threshold": -0.1}, "must not be negative"),
        ({"merge_weight": -1.0}, "must not be negative"),
        ({"merge_weight": float("nan")}, "must not be negative"),
        ({"score_mix": 1.5}, "between 0 and 1"),
        ({"score_mix": -0.5}, "between 0 and 1"),
    ],
)
def test_bad_configurations_say_what_is_wrong(fields, message):
    with pytest.raises(Exception, match=message):
        VidPrismConfig(**fields)


def test_released_switches_can_be_overridden():
    config = VidPrismConfig.released(interaction_update="sum")
    assert (config.interaction_pairs, config.interaction_gates, config.interaction_update) == (
        "slow_fast",
        "edge",
        "sum",
    )


@pytest.mark.parametrize("part", ["classifier", "model", "temporal"])
def test_temporal_model_loads_from_every_checkpoint(part, tmp_path):
    whole = small(projection_head=True)
    trained = whole.vidprism.temporal_model
    {"classifier": whole, "model": whole.vidprism, "temporal": trained}[part].save_pretrained(tmp_path / "whole")
    loaded, info = VidPrismTemporalModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    loaded.save_pretrained(tmp_path / "part")
    for model in (loaded, VidPrismTemporalModel.from_pretrained(tmp_path / "part")):
        torch.testing.assert_close(dict(model.state_dict()), dict(trained.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("frames", [1, 7, 16, 33])
def test_any_number_of_frames(frames, batch):
    output = small()(clips(batch, frames), labels=torch.zeros(batch, dtype=torch.long))
    assert output.logits.shape == (batch, 3)
    assert output.loss.isfinite()


def test_the_loss_is_the_weighted_sum_of_its_parts():
    model = small(rank_loss_weight=0.3, gate_loss_weight=0.2, diversity_loss_weight=0.1)
    labels = torch.tensor([0, 2])
    output = model(clips(), labels=labels)
    parts = output.classification_loss + 0.3 * output.rank_loss + 0.2 * output.gate_loss
    torch.testing.assert_close(output.loss, parts + 0.1 * output.diversity_loss)
    torch.testing.assert_close(output.classification_loss, torch.nn.functional.cross_entropy(output.logits, labels))
    assert model(clips()).loss is None


def test_auxiliary_losses_without_labels():
    model, labels = small().eval(), torch.tensor([0, 2])
    names = ("rank_loss", "gate_loss", "diversity_loss")
    assert not set(names) & model(clips()).keys()
    asked, labelled = model(clips(), output_losses=True), model(clips(), labels=labels, output_losses=False)
    assert (asked.loss, asked.classification_loss) == (None, None)
    for name in names:
        torch.testing.assert_close(asked[name], labelled[name])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fields", [{}, {"merge_normalization": "rest"}, {"readout": "max", "aggregation": "max"}])
def test_every_parameter_gets_a_gradient(fields, checkpointing):
    model = small(**fields).train()
    if checkpointing:
        enable_checkpointing(model)
    model(clips(16), labels=torch.arange(16) % 3).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias cancels in a softmax: its gradient is zero by mathematics, and rounding may make it exactly so.
    assert [name for name in without if not name.endswith(("k_proj.bias", "position_embedding.weight"))] == []


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = small().train()
        if checkpointing:
            enable_checkpointing(model)
        model(clips(), labels=torch.tensor([0, 2])).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_eager_and_sdpa_agree():
    sdpa, eager = small(attn_implementation="sdpa").eval(), small(attn_implementation="eager").eval()
    eager.load_state_dict(sdpa.state_dict())
    assert sdpa.vidprism.temporal_model.config._attn_implementation == "sdpa"
    assert eager.vidprism.temporal_model.config._attn_implementation == "eager"
    with torch.no_grad():
        a, b = sdpa(clips()), eager(clips(), output_attentions=True)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-5)
    assert [x.shape[-1] for x in b.attentions] == [8, 4, 2, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_full(dtype):
    model = small().eval()
    with torch.no_grad():
        full = model(clips()).logits
        half = model.to(dtype)(clips().to(dtype)).logits
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("frames", [1, 16])  # at one frame the CPU's bfloat16 convolution has a wrong gradient
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype, frames):
    model = small().train()
    with torch.autocast("cpu", dtype=dtype):
        loss = model(clips(frames=frames), labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "fields"),
    [
        ("inductor", {}),
        ("aot_eager", {"interaction_gates": "edge", "interaction_update": "last"}),
        ("aot_eager", {"merge_normalization": "rest", "kept_per_window": 2, "time_position": "learned"}),
        ("aot_eager", {"feature_norm": "whitened", "zero_init_residual": True}),
    ],
)
def test_compiles_as_one_graph_forward_and_backward(backend, fields):
    torch.compiler.reset()
    model, labels = small(**fields).train(), torch.tensor([0, 2])
    plain = model(clips(), labels=labels)
    plain.loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend=backend)(clips(), labels=labels)
    compiled.loss.backward()
    torch.testing.assert_close(compiled.logits, plain.logits, rtol=1e-4, atol=1e-4)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "fields"), [(13, {}), (16, {}), (16, {"feature_norm": "whitened"})])
def test_exports(frames, fields):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small(**fields).eval()

        def forward(self, pixel_values_videos):
            return self.model(pixel_values_videos).logits

    module = Logits()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (clips(2, frames),), dynamic_shapes=({0: batch},), strict=False)
    with torch.no_grad():
        other = clips(5, frames)
        torch.testing.assert_close(program.module()(other), module(other), rtol=1e-5, atol=1e-5)


def test_the_projection_head_stays_out_of_the_classifier():
    model = small(projection_head=True)
    model(clips(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is None for p in model.vidprism.projection_head.parameters())
    assert model.vidprism.get_text_aligned_features(clips()).shape == (2, 24)
    with pytest.raises(ValueError, match="no projection head"):
        small().vidprism.get_text_aligned_features(clips())


def test_wrong_pixel_shape_says_the_right_one():
    with pytest.raises(ValueError, match=r"\(clips, frames, 3, height, width\)"):
        VidPrismModel(small().config)(clips()[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_forward_and_backward_never_wait_for_the_device():
    model, pixels = small().cuda().train(), clips().cuda()
    labels = torch.tensor([0, 2], device="cuda")
    model(pixels, labels=labels).loss.backward()  # libraries set themselves up at the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(pixels, labels=labels, output_streams=True).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
