"""The runs by which strategies are compared: in this process, or in those that torchrun starts of this file.

    torchrun --standalone --nproc-per-node 2 strategy_runs.py FOLDER

FOLDER holds `clips`, `eleven`, `nine`, and what a single process has left of the same runs.
"""

import json
import sys
import warnings
from pathlib import Path

import lightning as L
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]
from small import LABELS, NUM_FRAMES, run_arguments

from vidprism_cli import main
from vidprism_hf import VidPrismLightningModule
from vidprism_hf.data import VideoDataModule
from vidprism_hf.training.distributed import named_strategy

STRATEGIES = ("ddp", "fsdp")
# Settings of the module and of the trainer. Eight clips, or as many as are in FOLDERS, four a step; plain gradient
# descent where it is not adamw.
RUNS = {
    "step": ({"learning_rate": 1.0, "config": {"gate_loss_weight": 5.0}}, {"accumulate_grad_batches": 2}),
    "clipped": ({"learning_rate": 1.0}, {"limit_train_batches": 1, "gradient_clip_val": 0.1}),
    "frozen": ({"learning_rate": 0.1, "freeze_backbone": True}, {"max_epochs": 2}),
    "half": ({"learning_rate": 0.1}, {"limit_train_batches": 1, "precision": "bf16-mixed"}),
    "adamw": ({"learning_rate": 1e-3}, {"limit_train_batches": 1}),
    "adamw-partly": (
        {"learning_rate": 1e-3, "freeze_layers": 1, "layer_decay": 0.5},
        {"limit_train_batches": 1},
    ),
    "adamw-resumed": ({"learning_rate": 1e-3}, {"max_epochs": 2}),  # from the single process's adamw
    # Two processes have two clips and one in the last step, or one and none.
    "uneven": ({"learning_rate": 0.3, "label_smoothing": 0.1, "config": {"gate_loss_weight": 5.0}}, {}),
    "none-left": ({"learning_rate": 0.3, "config": {"gate_loss_weight": 5.0}}, {}),
}
FOLDERS = {"uneven": "eleven", "none-left": "nine"}
# By the command line, with weights that stay as they are.
STILL = (
    "--model.learning_rate=0",
    "--export.checkpoints=true",
    "--trainer.max_epochs=1",
    "--trainer.accumulate_grad_batches=2",
)


class DescentModule(VidPrismLightningModule):
    """Trained by plain gradient descent, so that a step shows the gradients."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=self.hparams.learning_rate)


class AdamModule(VidPrismLightningModule):
    """Trained as ever, but that rounding, in place of a gradient, is not taken to the scale of a step."""

    def configure_optimizers(self):
        chosen = super().configure_optimizers()
        for group in chosen["optimizer"].param_groups:
            group["eps"] = 1e-4
        return chosen


class EvaluateFirst(L.Callback):
    """Evaluates in inference mode before the first step, as Lightning does where it has GPUs."""

    def on_train_start(self, trainer, pl_module):
        with torch.inference_mode():
            trainer.strategy.on_validation_start()
            for _ in range(1 + trainer.global_rank):  # each process as often as it likes
                pl_module.model(torch.zeros(1, NUM_FRAMES, 3, 32, 32))
            trainer.strategy.on_validation_end()


def module(name: str, **more) -> VidPrismLightningModule:
    """What one of RUNS trains, from its first weights on."""
    L.seed_everything(0, verbose=False)
    own = RUNS[name][0] | more
    # No stream of a single frame: its attention has no gradient but rounding.
    own |= {"config": {"rates": [2, 4]} | own.get("config", {})}
    kind = AdamModule if "adamw" in name else DescentModule
    labels = dict(enumerate(LABELS))
    return kind("tiny", id2label=labels, num_frames=NUM_FRAMES, backbone_lr_scale=1.0, warmup_epochs=0, **own)


def run(name: str, folder: Path, strategy: str = "auto", devices: int = 1, start: Path | None = None, **more) -> Path:
    """Does one of RUNS, with more settings of the trainer.

    Returns:
        Its checkpoint; beside it, as .json, are the metrics of the last validation and the losses of the last step.
    """
    settings = {"max_epochs": 1, **RUNS[name][1], **more}
    data = VideoDataModule(
        str(folder / FOLDERS.get(name, "clips")),
        processor="tiny",
        num_frames=NUM_FRAMES,
        batch_size=4 // devices,
        num_workers=0,
        train_views=1 if name == "frozen" else None,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=named_strategy(strategy, settings.get("accumulate_grad_batches", 1) > 1),
        callbacks=[EvaluateFirst()] if strategy == "fsdp" else [],
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    # Recomputed activations must make no difference.
    trained = module(name, gradient_checkpointing=name == "step" and devices > 1)
    trainer.fit(trained, data, ckpt_path=start, weights_only=True)
    left = folder / f"{name}-{strategy}.ckpt"
    trainer.save_checkpoint(left)
    if trainer.is_global_zero:
        metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
        left.with_suffix(".json").write_text(json.dumps(metrics))
    return left


def run_all(folder: Path, strategy: str = "auto", devices: int = 1) -> None:
    """All runs, and one by the command line to `<folder>/run-<strategy>`."""
    for name in RUNS:
        run(name, folder, strategy, devices, start=folder / "adamw-auto.ckpt" if name == "adamw-resumed" else None)
    arguments = run_arguments(folder / "clips", folder / f"run-{strategy}", *STILL)
    shared = (f"--data.batch_size={4 // devices}", f"--trainer.devices={devices}", f"--trainer.strategy={strategy}")
    assert main([*arguments, *shared]) == 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for named in STRATEGIES:
        run_all(Path(sys.argv[1]), named, devices=2)
