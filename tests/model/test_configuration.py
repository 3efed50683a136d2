"""The configuration: which labels, sizes and numbers it takes, whoever gives them."""

import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st

from vidprism_hf import VidPrismConfig, VidPrismForVideoClassification


def small(**fields):
    return VidPrismConfig.from_preset("tiny", num_frames=4, **fields)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"id2label": {0: 0, 1: 1, 2: 2}}, ["0", "1", "2"]),
        ({"id2label": {"1": "b", "0": "a"}}, ["a", "b"]),
        ({"label2id": {"b": 1, "a": 0}}, ["a", "b"]),
        ({"label2id": {"a": "0", "b": "1"}}, ["a", "b"]),
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}, ["a", "b"]),
        ({"id2label": {0: "a", 1: "b"}, "num_labels": 2}, ["a", "b"]),
        ({"num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
    ],
)
def test_labels_are_names_in_the_order_of_their_indices(fields, names, tmp_path):
    small(**fields).save_pretrained(tmp_path)
    for config in (small(**fields), VidPrismConfig.from_pretrained(tmp_path)):
        assert config.id2label == dict(enumerate(names))
        assert config.label2id == {name: index for index, name in enumerate(names)}
        assert config.num_labels == len(names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {0: "a", 1: "a"}}, "id2label: several indices have the name 'a'; names must differ"),
        ({"id2label": {0: "1", 1: 1}}, "several indices have the name '1'"),
        ({"id2label": {0: "a", 2: "b"}}, "id2label: indices must be 0 to 1, got 0, 2"),
        ({"id2label": {1: "a", 2: "b"}}, "id2label: indices must be 0 to 1, got 1, 2"),
        ({"id2label": {-1: "a", 0: "b"}}, "id2label: -1 is no index"),
        ({"id2label": {"0": "a", 0: "b"}}, "id2label: indices must be 0 to 1"),
        ({"id2label": {"first": "a"}}, "id2label: 'first' is no index"),
        ({"id2label": {0: "a", 1: None}}, "id2label: the name of 1 must be text, got None"),
        ({"id2label": {0: "a", 1: True}}, "id2label: the name of 1 must be text, got True"),
        ({"id2label": {0: "a", 1: 1.5}}, "id2label: the name of 1 must be text, got 1.5"),
        ({"id2label": ["a", "b"]}, "id2label must map indices to names, got list"),
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"a": 1, "b": 0}}, "label2id says 1 for 'a', id2label 'b'"),
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"c": 5}}, "label2id says 5 for 'c', id2label None"),
        ({"id2label": {0: "a", 1: "b"}, "num_labels": 3}, "num_labels is 3, but id2label names 2"),
        ({"num_labels": 10**9}, "num_labels must be 0 to 100000, got 1000000000"),
    ],
)
def test_labels_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


def test_labels_of_numbers_classify_and_come_back(tmp_path):
    numbers = {index: index for index in range(3)}
    VidPrismForVideoClassification.from_vision_pretrained("tiny", id2label=numbers, num_frames=4).save_pretrained(
        tmp_path
    )
    model = VidPrismForVideoClassification.from_pretrained(tmp_path)
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"}


def test_labels_that_are_set_later_are_saved_with_their_inverse(tmp_path):
    config = small(num_labels=2)
    config.id2label = {0: "jump", 1: "run"}
    config.save_pretrained(tmp_path)
    assert VidPrismConfig.from_pretrained(tmp_path).label2id == {"jump": 0, "run": 1}
    assert VidPrismConfig.from_pretrained(tmp_path, num_labels=2).id2label == {0: "jump", 1: "run"}
    assert VidPrismConfig.from_pretrained(tmp_path, num_labels=3).id2label[2] == "LABEL_2"
    other = VidPrismConfig.from_pretrained(tmp_path, id2label={0: "sit", 1: "stand"})
    other.save_pretrained(tmp_path)
    assert VidPrismConfig.from_pretrained(tmp_path).label2id == {"sit": 0, "stand": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rates": [0]}, "rates must be positive integers"),
        ({"rates": [1, 10**9]}, "rates must be positive integers"),
        ({"rates": list(range(1, 2000))}, "rates must be 1 to 16 .*, got 1999"),
        ({"num_frames": -1}, "num_frames and kept_per_window must be at least 1, got -1"),
        ({"num_frames": 10**9}, "num_frames must be at least 1 and at most 1024"),
        ({"kept_per_window": 10**9}, "kept_per_window must be at least 1"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"hidden_size": 10**7}, "hidden_size must be at least 1 and at most 16384"),
        ({"slow_rate": 0}, "slow_rate must be at least 1"),
        ({"head_dropout": 2.0}, "head_dropout must be between 0 and 1"),
        ({"rank_loss_weight": -1.0}, "rank_loss_weight must not be negative"),
    ],
)
def test_sizes_that_no_model_has_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        VidPrismConfig(**{"num_frames": 8, **fields})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 10**6),
        ("image_size", 0),
        ("image_size", [224, 224]),
        ("patch_size", 0),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**5),
        ("intermediate_size", 10**9),
        ("projection_dim", -1),
        ("num_attention_heads", 0),
        ("num_attention_heads", 7),
        ("layer_norm_eps", math.nan),
    ],
)
def test_sizes_that_no_tower_has_are_refused(field, value):
    with pytest.raises((StrictDataclassError, ZeroDivisionError)):
        VidPrismConfig(vision_config={field: value})


NUMBERS = [name for name, value in vars(VidPrismConfig()).items() if isinstance(value, float)]


@given(st.sampled_from(NUMBERS), st.sampled_from([math.nan, math.inf, -math.inf]))
@settings(max_examples=60, deadline=None)
def test_numbers_are_finite(field, value):
    with pytest.raises(StrictDataclassError, match=field):
        VidPrismConfig(**{field: value})
