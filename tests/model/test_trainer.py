"""transformers' own Trainer around the model: the loss of accumulated batches, metrics, checkpoints, adapters."""

import numpy as np
import pytest
import torch
from small import LABELS, tiny_model, tiny_processor
from transformers import (
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Clips(torch.utils.data.Dataset):
    """Random clips of alternating classes; the second class is brighter."""

    def __init__(self, count: int = 4):
        self.clips = torch.randn(count, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.clips[1::2] += 0.5

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        return {"pixel_values_videos": self.clips[index], "labels": index % 2}


class Gradients(TrainerCallback):
    """The gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.last = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def arguments(folder, **settings) -> TrainingArguments:
    settings = {"save_strategy": "no", "per_device_train_batch_size": 4, "max_grad_norm": 0} | settings
    return TrainingArguments(folder, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, **settings)


def accuracy(prediction) -> dict[str, float]:
    """As transformers' recipe for video classification has it."""
    return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


def test_accumulated_batches_have_the_gradient_of_one(tmp_path):
    losses, gradients = [], []
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        watch = Gradients()
        # The loss of balance is one of a batch as a whole: its square does not add up.
        model = tiny_model(gate_loss_weight=0.0)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 1}
        trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=Clips(), callbacks=[watch])
        losses.append(trainer.train().training_loss)
        gradients.append(watch.last)
    assert losses == pytest.approx(losses[:1] * 3)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-5)


def test_metrics_see_logits_and_the_loss_is_the_models(tmp_path):
    model = tiny_model()
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=Clips(), compute_metrics=accuracy)
    found = trainer.evaluate()
    pixels, labels = Clips().clips, torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        expected = model(pixels, labels=labels)
    assert found["eval_loss"] == pytest.approx(expected.loss.item())
    assert found["eval_accuracy"] == (expected.logits.argmax(-1) == labels).float().mean().item()
    predicted = trainer.predict(Clips())
    np.testing.assert_allclose(predicted.predictions, expected.logits, rtol=1e-5, atol=1e-5)
    alone = Trainer(model, arguments(tmp_path, prediction_loss_only=True), eval_dataset=Clips()).evaluate()
    assert alone["eval_loss"] == pytest.approx(expected.loss.item())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trains_keeps_the_best_resumes_and_loads(tmp_path, smoothing):
    settings = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "learning_rate": 1e-3,
        "label_smoothing_factor": smoothing,
    }

    def trainer(folder, epochs):
        args = arguments(folder, num_train_epochs=epochs, lr_scheduler_type="constant", **settings)
        data = {"train_dataset": Clips(8), "eval_dataset": Clips(8), "processing_class": tiny_processor()}
        return Trainer(tiny_model(), args, compute_metrics=accuracy, **data)

    whole = trainer(tmp_path / "whole", 3)
    whole.train()
    trainer(tmp_path / "parts", 2).train()
    resumed = trainer(tmp_path / "parts", 3)
    resumed.train(resume_from_checkpoint=True)
    assert whole.state.best_metric == resumed.state.best_metric
    for log, again in zip(whole.state.log_history, resumed.state.log_history, strict=True):
        assert log.get("loss") == again.get("loss")
        assert log.get("eval_loss") == pytest.approx(again.get("eval_loss"))
    assert whole.evaluate()["eval_accuracy"] == whole.state.best_metric

    whole.save_model(tmp_path / "saved")
    model = AutoModelForVideoClassification.from_pretrained(tmp_path / "saved")
    assert tuple(model.config.id2label.values()) == LABELS
    assert AutoVideoProcessor.from_pretrained(tmp_path / "saved").num_frames == 8
    with torch.no_grad():
        logits = model(Clips(8).clips).logits
    np.testing.assert_allclose(whole.predict(Clips(8)).predictions, logits, rtol=1e-5, atol=1e-5)
