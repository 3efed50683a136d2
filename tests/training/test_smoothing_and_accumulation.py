"""What a step is made of: smoothed and mixed labels, batches put together, gradients cut to a length."""

import lightning as L
import pytest
import torch
from small import LABELS, NUM_FRAMES
from synthetic import random_batches, trainer
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader

from vidprism_hf import VidPrismLightningModule
from vidprism_hf.errors import UserError

LOSSES = ("classification_loss", "rank_loss", "gate_loss", "diversity_loss", "loss")


def module(gate_loss_weight: float = 0.01, labels=LABELS, **settings) -> VidPrismLightningModule:
    """With rates that leave no stream of a single frame, whose attention has no gradient but rounding."""
    torch.manual_seed(0)
    settings = {"warmup_epochs": 0, "backbone_lr_scale": 1.0} | settings
    config = {"rates": [2, 4], "gate_loss_weight": gate_loss_weight}
    labels = dict(enumerate(labels))
    return VidPrismLightningModule("tiny", id2label=labels, num_frames=NUM_FRAMES, config=config, **settings)


class Step(L.Callback):
    """Losses of each batch; gradients before they are clipped, and those of the step, by parameter."""

    def __init__(self):
        self.losses: list[dict[str, float]] = []
        self.raw: list[dict[str, torch.Tensor]] = []
        self.used: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.raw.append(gradients(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append({name: trainer.callback_metrics[f"train/{name}"].item() for name in LOSSES})
        if trainer.global_step > len(self.used):
            self.used.append(gradients(pl_module))  # they stay until the next backward pass


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def flat(grads: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([grad.flatten() for grad in grads.values()])


def fit(folder, model, batches, **settings) -> Step:
    seen = Step()
    trainer(folder, callbacks=[seen], **settings).fit(model, DataLoader(batches, batch_size=None))
    return seen


def halves(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{name: value[part] for name, value in batch.items()} for part in (slice(0, 2), slice(2, 4))]


SOFT = torch.tensor([[0.7, 0.3, 0], [1, 0, 0], [0, 1, 0], [0, 0.4, 0.6]])


@pytest.mark.parametrize("mixed", [False, True], ids=["labels", "mixed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_timms_targets(tmp_path, smoothing, mixed):
    """timm smooths each label, on = 1 - s + s / K and off = s / K, and mixes what comes out."""
    model, (batch,) = module(labels=tuple("abc"), label_smoothing=smoothing), random_batches(1, num_labels=3)
    model.configure_model()
    with torch.no_grad():
        output = model.model(batch["pixel_values_videos"], labels=batch["labels"])
    shares = SOFT if mixed else one_hot(batch["labels"], 3).float()
    target = shares @ (torch.eye(3) * (1 - smoothing) + smoothing / 3)
    torch.testing.assert_close(target.sum(1), torch.ones(4))
    expected = -(target * output.logits.log_softmax(-1)).sum(-1).mean().item()

    (seen,) = fit(tmp_path, model, [batch | {"soft_labels": SOFT} if mixed else batch]).losses
    assert seen["classification_loss"] == pytest.approx(expected, rel=1e-5)
    # The other losses look at the clips, not at their labels.
    for name in ("rank_loss", "gate_loss", "diversity_loss"):
        assert seen[name] == pytest.approx(output[name].item(), rel=1e-5)
    others = model.model.total_loss(0, *(seen[name] for name in LOSSES[1:4]))
    assert seen["loss"] == pytest.approx(seen["classification_loss"] + others, rel=1e-5)


def test_losses_of_evaluations_are_not_smoothed(tmp_path):
    model, batches = module(label_smoothing=0.3), random_batches(1)
    ((result,), (batch,)) = trainer(tmp_path).validate(model, batches, verbose=False), batches
    with torch.no_grad():
        logits = model.model(batch["pixel_values_videos"]).logits
    assert result["val/classification_loss"] == pytest.approx(cross_entropy(logits, batch["labels"]).item(), rel=1e-5)


def sharp(gate_loss_weight: float) -> VidPrismLightningModule:
    """With a read-out that attends to other experts in each clip, as a trained one does."""
    model = module(gate_loss_weight)
    model.configure_model()
    with torch.no_grad():
        model.model.vidprism.temporal_model.readout.query.mul_(1000)
    return model


@pytest.mark.parametrize("weight", [0.0, 50.0])
def test_two_half_batches_make_the_step_of_the_whole(tmp_path, weight):
    """All losses but the gates' are means over clips. Theirs is of a batch's mean weights: of each half's own here."""
    (batch,) = random_batches(1)
    whole = fit(tmp_path, sharp(weight), [batch])
    parts = fit(tmp_path, sharp(weight), halves(batch), accumulate_grad_batches=2)
    assert len(whole.used) == len(parts.used) == 1
    one, other = flat(whole.used[0]), flat(parts.used[0])
    distance = ((one - other).norm() / one.norm()).item()
    assert distance < 1e-5 if weight == 0 else distance > 1e-2
    for name in ("classification_loss", "rank_loss", "diversity_loss"):
        mean = sum(losses[name] for losses in parts.losses) / 2
        assert mean == pytest.approx(whole.losses[0][name], rel=1e-5)
    # A square of means is below the mean of squares: each half is asked for a balance of its own.
    assert sum(losses["gate_loss"] for losses in parts.losses) / 2 > whole.losses[0]["gate_loss"] + 1e-3


def test_clipping_is_by_the_norm_over_all_parameters(tmp_path):
    """Of the whole step, after its batches are put together; the direction stays."""
    (batch,) = random_batches(1)
    seen = fit(tmp_path, module(), halves(batch), accumulate_grad_batches=2, gradient_clip_val=1e-2)
    free = fit(tmp_path, module(), halves(batch), accumulate_grad_batches=2)
    assert {name.split(".")[2] for name in seen.used[0]} >= {"vision_tower", "temporal_model"}
    (raw,), (used,) = map(flat, seen.raw), map(flat, seen.used)
    assert torch.equal(raw, flat(free.used[0]))
    assert raw.norm() > 1e-2
    torch.testing.assert_close(used, raw * (1e-2 / raw.norm()), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("ema_decay", 0.0),
        ("ema_decay", 1.0),
        ("layer_decay", 0.0),
        ("layer_decay", 1.1),
        ("layer_decay", float("nan")),
        ("reference_batch_size", 0),
    ],
)
def test_refuses_values_out_of_range(name, value):
    with pytest.raises(UserError, match=rf"model\.{name}={value}: must be") as caught:
        module(**{name: value})
    assert len(str(caught.value).splitlines()) == 1
