"""`feature_norm: running`: channels in their own units, learned in training, the same for every clip afterwards."""

import torch
from small import tiny_model

from vidprism_hf import VidPrismForVideoClassification

CHANNELS = 64


def batches(count=6, clips=4):
    """Features whose channels have very different means and deviations; the last one is constant."""
    generator = torch.Generator().manual_seed(0)
    mean, deviation = torch.linspace(-20, 20, CHANNELS), torch.logspace(-1.5, 1, CHANNELS)
    deviation[-1] = 0
    return [mean + deviation * torch.randn(clips, 8, CHANNELS, generator=generator) for _ in range(count)]


def trained():
    model = tiny_model(feature_norm="running").train()
    for features in batches():
        model(frame_features=features)
    return model.eval()


def test_it_comes_to_the_mean_and_deviation_of_all_that_was_seen():
    norm = trained().vidprism.temporal_model.feature_norm
    seen = torch.cat(batches()).flatten(0, 1)
    frames = norm(seen[None])[0]
    torch.testing.assert_close(frames.mean(dim=0), torch.zeros(CHANNELS), atol=2e-3, rtol=0)
    torch.testing.assert_close(frames[:, :-1].std(dim=0), torch.ones(CHANNELS - 1), atol=5e-2, rtol=0)
    assert frames[:, -1].abs().max() < 0.1  # the constant channel stays one


def test_in_evaluation_a_clip_is_alone_and_nothing_changes():
    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    features = batches()[0]
    together = model(frame_features=features).logits
    alone = torch.cat([model(frame_features=clip[None]).logits for clip in features])
    torch.testing.assert_close(together, alone)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_units_and_offsets_of_channels_no_longer_matter():
    scale, shift = torch.logspace(1, -1, CHANNELS), torch.linspace(5, -5, CHANNELS)
    logits = []
    for change in (lambda x: x, lambda x: x * scale + shift):
        model = tiny_model(feature_norm="running").train()
        for features in batches():
            model(frame_features=change(features))
        logits.append(model.eval()(frame_features=change(batches()[0])).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-2, rtol=1e-2)


def test_it_is_saved_and_the_paper_has_none(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    again = VidPrismForVideoClassification.from_pretrained(tmp_path)
    assert again.config.feature_norm == "running"
    features = batches()[0]
    torch.testing.assert_close(again(frame_features=features).logits, model(frame_features=features).logits)
    assert tiny_model().vidprism.temporal_model.feature_norm is None
