"""The model in other people's tools, which replace its layers or move their weights: accelerate, PEFT, quantisation."""

import pytest
import torch
from accelerate import init_empty_weights
from accelerate.utils import get_balanced_memory, infer_auto_device_map
from peft import LoraConfig, TaskType, get_peft_model
from small import tiny_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from vidprism_hf import VidPrismConfig, VidPrismForVideoClassification

LABELS = torch.tensor([0, 1])
# Between them, every part that can have weights.
VARIANTS = {
    "default": {},
    "released": {"interaction_pairs": "slow_fast", "interaction_gates": "edge", "interaction_update": "last"},
    "whitened": {"feature_norm": "whitened", "hidden_size": 32, "time_position": "learned"},
    "narrow": {"hidden_size": 32, "aggregation": "mean", "readout": "max"},
}


def clips():
    return torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def model(variant="default"):
    # Rates that differ by more than 8, for edges in every variant, and every gate open: rounding closes none.
    return tiny_model(rates=[2, 4, 8], gate_threshold=0.0, **VARIANTS[variant])


@torch.no_grad()
def logits(module):
    return module(pixel_values_videos=clips()).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_is_used_through_the_call_of_its_module(variant):
    whole, called = model(variant), set()
    owners = [(name, part) for name, part in whole.named_modules() if part._parameters or part._buffers]
    for name, part in owners:
        part.register_forward_hook(lambda _, __, ___, name=name: called.add(name))
    logits(whole)
    assert {name for name, _ in owners} == called


@pytest.mark.parametrize("variant", VARIANTS)
def test_offloaded_weights_give_the_same_logits(variant, tmp_path):
    whole = model(variant)
    whole.save_pretrained(tmp_path / "model")
    expected, places = logits(whole), set()
    size = sum(tensor.nbytes for tensor in whole.state_dict().values())
    for limit in torch.linspace(0.05, 0.95, 7).tolist():
        part = VidPrismForVideoClassification.from_pretrained(
            tmp_path / "model",
            device_map="auto",
            max_memory={"cpu": round(limit * size)},
            offload_folder=tmp_path / f"offload-{limit}",
        )
        places.add(frozenset(map(str, part.hf_device_map.values())))
        torch.testing.assert_close(logits(part), expected)
    assert {"cpu", "disk"} in places


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_what_meets_is_put_on_one_device(devices):
    """Of several GPUs: the temporal blocks stack the weights of their children and join what these give."""
    with init_empty_weights():
        whole = VidPrismForVideoClassification(VidPrismConfig.from_preset("b16"))
    parts = whole._no_split_modules
    memory = get_balanced_memory(whole, dict.fromkeys(range(devices), 10**10), no_split_module_classes=parts)
    place = infer_auto_device_map(whole, memory, no_split_module_classes=parts)
    assert len(set(place.values())) > 1
    for block in ("vidprism.temporal_model", "vidprism.vision_tower.vision_model.embeddings"):
        assert not [name for name in place if name.startswith(f"{block}.")]


@pytest.mark.parametrize("task_type", [None, TaskType.SEQ_CLS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_on_all_linear_layers(variant, task_type):
    whole = model(variant)
    expected = logits(whole)
    adapted = get_peft_model(whole, LoraConfig(target_modules="all-linear", task_type=task_type))
    torch.testing.assert_close(logits(adapted), expected)
    adapted(pixel_values_videos=clips(), labels=LABELS).loss.backward()
    added = {name: p for name, p in adapted.named_parameters() if "lora_B" in name}
    assert len(added) > 15
    assert [name for name, p in added.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    with torch.no_grad():
        for parameter in added.values():
            parameter.normal_(std=0.05)
    changed = logits(adapted)
    assert (changed - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(adapted.merge_and_unload()), changed, rtol=1e-4, atol=1e-5)


def test_lora_reaches_a_tower_that_was_frozen():
    whole = model()
    whole.vidprism.vision_tower.freeze()
    adapted = get_peft_model(whole, LoraConfig(target_modules=["q_proj", "v_proj"]))
    adapted(pixel_values_videos=clips(), labels=LABELS).loss.backward()
    added = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert added
    assert all(p.grad.abs().sum() > 0 for p in added)


def test_lora_says_that_fused_layers_cannot_be_adapted():
    with pytest.raises(ValueError, match="VidPrismWeights"):
        get_peft_model(model(), LoraConfig(target_modules=["metric_proj"]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("variant", VARIANTS)
def test_linear_layers_in_int8(variant):
    whole = model(variant)
    expected = logits(whole)
    small = torch.ao.quantization.quantize_dynamic(whole, {nn.Linear}, dtype=torch.qint8)
    assert not [name for name, part in small.named_modules() if type(part) is nn.Linear]
    torch.testing.assert_close(logits(small), expected, rtol=0.05, atol=0.05)
    assert not torch.equal(logits(small), expected)


class Scaled(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


@pytest.mark.parametrize("variant", VARIANTS)
def test_parametrised_weights(variant):
    plain, scaled, normed = model(variant), model(variant), model(variant)
    expected = logits(plain)
    for name, part in plain.named_modules():
        if isinstance(getattr(part, "weight", None), nn.Parameter):
            part.weight.data.mul_(1.5)
            parametrize.register_parametrization(scaled.get_submodule(name), "weight", Scaled())
            parametrizations.weight_norm(normed.get_submodule(name))
    torch.testing.assert_close(logits(scaled), logits(plain), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(normed), expected, rtol=1e-4, atol=1e-5)


def test_arguments_of_text_models_are_accepted_where_they_are_none():
    whole = model()
    expected = logits(whole)
    nothing = dict.fromkeys(("input_ids", "attention_mask", "inputs_embeds", "output_attentions", "return_dict"))
    torch.testing.assert_close(whole(clips(), **nothing).logits, expected)
    torch.testing.assert_close(whole.vidprism(clips(), **nothing).pooler_output, whole.vidprism(clips()).pooler_output)
    for unknown in ("attention_mask", "input_ids", "lables"):
        with pytest.raises(TypeError, match=f"VidPrism takes no {unknown}: it reads pixel_values_videos"):
            whole(clips(), **{unknown: torch.ones(2, 8)})
    adapted = get_peft_model(whole, LoraConfig(target_modules="all-linear", task_type=TaskType.SEQ_CLS))
    with pytest.raises(TypeError, match="with PEFT pass them by name"):
        adapted(clips())


@pytest.mark.parametrize("everywhere", [False, True])
def test_tuples_have_what_outputs_have(everywhere):
    whole = model()
    parts = (whole, {"labels": LABELS}), (whole.vidprism, {}), (whole.vidprism.temporal_model, {})
    inputs = clips(), clips(), whole.vidprism.get_frame_features(clips()).detach()
    expected = [part(x, **more).to_tuple() for x, (part, more) in zip(inputs, parts, strict=True)]
    asked = {} if everywhere else {"return_dict": False}
    if everywhere:
        for part, _ in parts:
            part.config.return_dict = part.config.vision_config.return_dict = False
    for x, (part, more), values in zip(inputs, parts, expected, strict=True):
        found = part(x, **more, **asked)
        assert isinstance(found, tuple)
        torch.testing.assert_close(found, values)
        assert not isinstance(part(x, **more, return_dict=True), tuple)


@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_a_tuple_begins_with_the_loss(how):
    model = tiny_model()
    model.config.return_dict = how == "argument"
    inputs = {"pixel_values_videos": torch.randn(2, 8, 3, 32, 32), "labels": torch.tensor([0, 1])}
    found = model(**inputs, **({"return_dict": False} if how == "argument" else {}))
    whole = model(**inputs, return_dict=True)
    assert torch.equal(found[0], whole.loss)
    assert torch.equal(found[1], whole.logits)
