"""The LightningModule: a VidPrism classifier with its losses, metrics, optimiser and schedule."""

import dataclasses
import math
from typing import Any

import lightning as L
import torch
from huggingface_hub.errors import StrictDataclassError
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoConfig, get_cosine_schedule_with_warmup

from ..errors import UserError, first_line, why_not_loaded
from ..model import VidPrismConfig, VidPrismForVideoClassification, VidPrismForVideoClassificationOutput
from ..model.temporal_vidprism import gate_balance_loss
from .callbacks import BadClipReport
from .optimization import parameter_groups
from .strategies import shard

LOSS_PARTS = ("classification_loss", "rank_loss", "gate_loss", "diversity_loss")


class VidPrismLightningModule(L.LightningModule):
    """Fine-tunes a VidPrism classifier.

    Args:
        backbone: CLIP checkpoint the tower starts from: a Hub id, a folder, or a preset (b32, b16, l14, tiny;
            tiny has random weights).
        checkpoint: VidPrism checkpoint (folder or Hub id) to start from instead; its labels must be the
            data's.
        id2label: Label name of each class index; the CLI takes it from the data.
        num_frames: Frames per clip.
        config: Any other field of VidPrismConfig, such as `readout: mean`. A checkpoint brings its own.
        freeze_backbone: Whether the tower stays as it is.
        learning_rate: Peak learning rate of everything but the tower.
        backbone_lr_scale: The tower's learning rate as a share of it.
        weight_decay: Weight decay of weights; biases, norms and the global query have none.
        warmup_epochs: Epochs of linear warm-up before the cosine; may be a fraction.
        gradient_checkpointing: Whether activations are recomputed in the backward pass, to save memory.
    """

    def __init__(
        self,
        backbone: str = "b16",
        checkpoint: str | None = None,
        id2label: dict[int, str] | None = None,
        num_frames: int = 32,
        config: dict[str, Any] | None = None,
        freeze_backbone: bool = False,
        learning_rate: float = 5e-5,
        backbone_lr_scale: float = 0.06,
        weight_decay: float = 0.2,
        warmup_epochs: float = 5,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        if not id2label or len(id2label) < 2:
            raise UserError(f"model.id2label has {len(id2label or {})} labels: a classifier needs at least two")
        if checkpoint and config:
            raise UserError("model.config: a checkpoint brings its own configuration; remove one of the two")
        check_config(config or {}, num_frames)
        self.id2label = {int(index): label for index, label in id2label.items()}
        if checkpoint:
            load_checkpoint_config(checkpoint, self.id2label)  # now, before a run's folder is made
        self.model: VidPrismForVideoClassification | None = None
        # Frame features (T, D) by split, view and clip: see _classify. No buffer, so no part of checkpoints.
        self._features: dict[tuple[str, int, int], torch.Tensor] = {}
        # With five classes or fewer the right one is always among the top five.
        top_k = {"top1": 1, "top5": 5} if len(self.id2label) > 5 else {"top1": 1}
        metrics = MetricCollection(
            {
                name: MulticlassAccuracy(num_classes=len(self.id2label), top_k=k, average="micro")
                for name, k in top_k.items()
            }
        )
        self.metrics = nn.ModuleDict({stage: metrics.clone(prefix=f"{stage}/") for stage in ("val", "test")})

    def configure_model(self) -> None:
        """Builds the model, once: Lightning may call this hook for each of fit and test.

        Raises:
            UserError: If backbone or checkpoint cannot be loaded.
        """
        if self.model is not None:
            return
        # Lightning sets the accelerator as default device here, which transformers would take for a device map.
        with torch.device("cpu"):
            self._build_model()
        if self.device_mesh is not None:  # under FSDP2
            shard(self.model, self.device_mesh["data_parallel"], self.trainer.precision)

    def _build_model(self) -> None:
        hparams = self.hparams
        if hparams.checkpoint:
            self.model = load_checkpoint(hparams.checkpoint, self.id2label, hparams.num_frames)
        else:
            try:
                self.model = VidPrismForVideoClassification.from_vision_pretrained(
                    hparams.backbone,
                    id2label=self.id2label,
                    num_frames=hparams.num_frames,
                    **(hparams.config or {}),
                )
            except (OSError, ValueError, StrictDataclassError) as error:
                raise UserError(f"model.backbone {hparams.backbone}: cannot be loaded ({first_line(error)})") from error
        # from_pretrained leaves eval mode, which Lightning would keep.
        self.model.train()
        if hparams.gradient_checkpointing:
            # The name since transformers 5.21; before, only the other one exists.
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable()
        if hparams.freeze_backbone:
            self.model.vidprism.vision_tower.requires_grad_(False).eval()
        if self.model.vidprism.projection_head is not None:
            # Classification does not use it; without a gradient DDP need not look for unused parameters.
            self.model.vidprism.projection_head.requires_grad_(False)

    def forward(
        self, pixel_values_videos: torch.Tensor, labels: torch.Tensor | None = None
    ) -> VidPrismForVideoClassificationOutput:
        """Classifies clips (B, T, 3, H, W)."""
        return self.model(pixel_values_videos, labels=labels)

    def configure_callbacks(self) -> list[L.Callback]:
        """The account of bad clips, unless the trainer has one: whoever trains with this module keeps it."""
        kept = any(isinstance(callback, BadClipReport) for callback in self.trainer.callbacks)
        return [] if kept else [BadClipReport()]

    def on_train_epoch_start(self) -> None:
        """Tells streamed clips the epoch; Lightning tells samplers only."""
        set_epoch = getattr(getattr(self.trainer.train_dataloader, "dataset", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.current_epoch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        output = self._classify("train", batch)
        if "soft_labels" in batch:
            output.classification_loss = nn.functional.cross_entropy(output.logits.float(), batch["soft_labels"])
            output.loss = self.model.total_loss(*(output[part] for part in LOSS_PARTS))
        if self.trainer.world_size > 1:
            self._balance_over_ranks(output)
        self._log_losses("train", output)
        return output.loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        """Gives `expert_weights` (B, N), means over each clip's views, to callbacks."""
        return self._evaluate("test", batch)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW on the parameter groups; linear warm-up and cosine to zero, stepped every step."""
        hparams = self.hparams
        groups = parameter_groups(self.model, hparams.learning_rate, hparams.backbone_lr_scale, hparams.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=hparams.learning_rate, betas=(0.9, 0.999), eps=1e-8)
        total = int(self.trainer.estimated_stepping_batches)
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        warmup = round(steps_per_epoch * hparams.warmup_epochs)
        if warmup >= total:
            rank_zero_warn(
                f"model.warmup_epochs={hparams.warmup_epochs} is the whole run; a tenth of it warms up instead"
            )
            warmup = total // 10
        self.warmup_steps = warmup  # for the model card
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _classify(self, stage: str, batch: dict[str, Any]) -> VidPrismForVideoClassificationOutput:
        """The model's output; a frozen tower runs once for each clip and view that `data.train_views` fixes."""
        if not self.hparams.freeze_backbone or "view" not in batch:
            return self(batch["pixel_values_videos"], batch["labels"])
        split = "train" if stage == "train" else "val"  # test goes over the held-out clips again
        pairs = zip(batch["view"].tolist(), batch["clip_index"].tolist(), strict=True)
        keys = [(split, view, index) for view, index in pairs]
        if any(key not in self._features for key in keys):
            features = self.model.vidprism.get_frame_features(batch["pixel_values_videos"])
            self._features.update(zip(keys, features.detach().cpu(), strict=True))
        features = torch.stack([self._features[key] for key in keys]).to(self.device)
        return self.model(labels=batch["labels"], frame_features=features)

    def _evaluate(self, stage: str, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        labels, num_views = batch["labels"], 1
        if batch["pixel_values_videos"].ndim == 6:  # (B, views, T, 3, H, W)
            num_views = batch["pixel_values_videos"].shape[1]
            views = {
                "pixel_values_videos": batch["pixel_values_videos"].flatten(0, 1),
                "labels": labels.repeat_interleave(num_views),
            }
            output = self._classify(stage, views)
        else:
            output = self._classify(stage, batch)
        logits = output.logits.float().unflatten(0, (-1, num_views)).mean(dim=1)
        if "readable" in batch:
            # A clip without pixels counts as wrong, whatever the model makes of zeros.
            right = nn.functional.one_hot(labels, logits.shape[1]).bool()
            logits = logits.masked_fill(right & ~batch["readable"][:, None], -torch.inf)
        self.metrics[stage].update(logits, labels)
        self.log_dict(self.metrics[stage], on_step=False, on_epoch=True, prog_bar=stage == "val")
        self._log_losses(stage, output)
        weights = output.expert_weights.float().unflatten(0, (-1, num_views)).mean(dim=1)
        for index, (rate, weight) in enumerate(zip(self.model.config.rates, weights.mean(0), strict=True)):
            self._log_mean(f"{stage}/expert_{index}_rate_{rate}_weight", weight, len(output.logits))
        return {"expert_weights": weights}

    def _balance_over_ranks(self, output: VidPrismForVideoClassificationOutput) -> None:
        """Replaces this rank's gate loss by that of the whole batch, over all ranks."""
        mean = self.all_gather(output.expert_weights.float().mean(dim=0), sync_grads=True).mean(dim=0)
        output.gate_loss = gate_balance_loss(mean)
        output.loss = self.model.total_loss(*(output[part] for part in LOSS_PARTS))

    def _log_losses(self, stage: str, output: VidPrismForVideoClassificationOutput) -> None:
        size = len(output.logits)
        self._log_mean(f"{stage}/loss", output.loss.detach(), size, prog_bar=stage == "train")
        for part in LOSS_PARTS:
            self._log_mean(f"{stage}/{part}", output[part].detach(), size)

    def _log_mean(self, name: str, value: torch.Tensor, batch_size: int, prog_bar: bool = False) -> None:
        training = name.startswith("train/")
        self.log(
            name,
            value,
            on_step=training,
            on_epoch=not training,
            # Lightning averages these weights over the processes and rounds down: as multiples they stay exact.
            batch_size=batch_size * self.trainer.world_size,
            prog_bar=prog_bar,
            sync_dist=not training,
        )


def check_config(fields: dict[str, Any], num_frames: int) -> None:
    """Checks the recipe's `model.config`.

    Raises:
        UserError: If a key is no field of `VidPrismConfig` or has an argument of its own, or a value does not
            fit.
    """
    own = {"num_frames", "vision_config", "vision_projection"}
    known = {field.name for field in dataclasses.fields(VidPrismConfig)}
    inherited = {field.name for field in dataclasses.fields(VidPrismConfig.__mro__[1])}
    allowed = known - inherited - own | {"attn_implementation"}
    for name in fields:
        if name not in allowed:
            raise UserError(f"model.config.{name}: no such field; there are {', '.join(sorted(allowed))}")
    try:
        # The real width comes from the tower; any that divides into the heads serves to check the rest.
        width = {"hidden_size": 64 * int(fields.get("num_attention_heads", 4))}
        VidPrismConfig(num_frames=num_frames, **width | fields)
    except StrictDataclassError as error:
        raise UserError(f"model.config: {' '.join(str(error).split())}") from error


def load_checkpoint(name_or_path: str, id2label: dict[int, str], num_frames: int) -> VidPrismForVideoClassification:
    """Loads a VidPrism checkpoint whose labels are the data's.

    Raises:
        UserError: If it is no VidPrism checkpoint or its labels differ.
    """
    config = load_checkpoint_config(name_or_path, id2label)
    if config.time_position == "learned" and config.num_frames != num_frames:
        raise UserError(
            f"model.checkpoint {name_or_path}: has learned positions for {config.num_frames} frames; "
            f"set model.num_frames to that, not {num_frames}"
        )
    config.num_frames = num_frames
    try:
        return VidPrismForVideoClassification.from_pretrained(name_or_path, config=config, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model.checkpoint {name_or_path}: cannot be loaded ({first_line(error)})") from error


def load_checkpoint_config(name_or_path: str, id2label: dict[int, str]) -> VidPrismConfig:
    """Loads the configuration of a VidPrism checkpoint whose labels are the data's.

    Raises:
        UserError: If it is no VidPrism checkpoint or its labels differ.
    """
    config = read_checkpoint_config(name_or_path)
    if config.id2label != id2label:
        theirs, ours = set(config.id2label.values()), set(id2label.values())
        difference = (
            f"only in the checkpoint: {listing(theirs - ours)}; only in the data: {listing(ours - theirs)}"
            if theirs != ours
            else "same names in another order"
        )
        raise UserError(f"model.checkpoint {name_or_path}: its labels are not the data's ({difference})")
    return config


def read_checkpoint_config(name_or_path: str) -> VidPrismConfig:
    """Loads the configuration of a VidPrism checkpoint.

    Raises:
        UserError: If it is no VidPrism checkpoint.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.checkpoint {name_or_path}: cannot be loaded ({why_not_loaded(name_or_path, error)})"
        ) from error
    if not isinstance(config, VidPrismConfig):
        raise UserError(f"model.checkpoint {name_or_path}: a {config.model_type} model; give it as model.backbone")
    return config


def listing(names: set[str], most: int = 5) -> str:
    """The first few names of a set, for an error message."""
    head = ", ".join(sorted(names)[:most]) or "none"
    return head + (f" and {len(names) - most} more" if len(names) > most else "")
