"""The LightningModule: a VidPrism classifier with losses, metrics, optimiser and schedule."""

import dataclasses
import math
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from huggingface_hub.errors import StrictDataclassError
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from transformers import get_cosine_schedule_with_warmup

from ..data import load_processor
from ..data.features.encoder import FrameEncoder, encoder_of
from ..data.reading.processor import processor_for
from ..distributed import print_once
from ..errors import UserError, first_line
from ..evaluation.checkpoints import fitting_config, load_checkpoint
from ..evaluation.scores import ScoreRecorder
from ..model import (
    VidPrismConfig,
    VidPrismForVideoClassification,
    VidPrismForVideoClassificationOutput,
    VidPrismVideoProcessor,
)
from ..model.temporal_vidprism import gate_balance_loss
from .callbacks.averaging import WeightEMA
from .callbacks.bad_videos import BadClipReport, EpochPlace
from .distributed import shard
from .optim import check_settings, clips_per_step, extend_schedule, parameter_groups, scaled_learning_rate
from .whitening import fit_whitening

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
LOSS_PARTS = ("classification_loss", "rank_loss", "gate_loss", "diversity_loss")
CLIP_LOSSES = ("classification_loss", "rank_loss", "diversity_loss")  # means over clips


class VidPrismLightningModule(L.LightningModule):
    """Fine-tunes a VidPrism classifier.

    Use it with a Lightning Trainer of your own, or pass it to `finetune` to change training settings.

    Args:
        backbone: CLIP checkpoint the tower starts from: a Hub id, a folder, or a preset (b32, b16, l14, tiny;
            tiny has random weights).
        checkpoint: VidPrism checkpoint (folder or Hub id) to start from instead. Its labels must match the data's;
            order, case, blanks and punctuation may differ.
        id2label: Label name of each class index; the CLI takes it from the data.
        num_frames: Frames per clip.
        config: Any other field of VidPrismConfig, such as `readout: mean`. A checkpoint brings its own.
        freeze_backbone: Freezes the whole tower.
        freeze_layers: Number of tower layers to freeze, besides the embeddings; 0 trains the embeddings too.
        learning_rate: Peak learning rate of everything but the tower.
        reference_batch_size: Clips per step that learning_rate is stated for. The rate is multiplied by
            sqrt(clips per step / reference_batch_size). None does not scale it.
        backbone_lr_scale: The tower's learning rate as a fraction of learning_rate.
        layer_decay: Learning rate of each tower layer as a fraction of the layer above it.
        weight_decay: Weight decay; not applied to biases, norms and the global query.
        warmup_epochs: Epochs of linear warm-up before the cosine; may be fractional.
        label_smoothing: Fraction of each training label spread over all classes, after mixing. Evaluation losses
            use the unsmoothed labels.
        ema_decay: Decay of a moving average of the weights. The average is validated, saved and tested instead.
        gradient_checkpointing: Recomputes activations in the backward pass to save memory.

    Example:
        ```python
        module = VidPrismLightningModule("b16", id2label=data.id2label, num_frames=16, freeze_backbone=True)
        run = finetune(module, data, output="runs/mine")
        ```
    """

    def __init__(
        self,
        backbone: str = "b16",
        checkpoint: str | None = None,
        id2label: dict[int, str] | None = None,
        num_frames: int = 32,
        config: dict[str, Any] | None = None,
        freeze_backbone: bool = False,
        freeze_layers: int = 0,
        learning_rate: float = 5e-5,
        reference_batch_size: int | None = None,
        backbone_lr_scale: float = 0.06,
        layer_decay: float = 1.0,
        weight_decay: float = 0.2,
        warmup_epochs: float = 5,
        label_smoothing: float = 0.0,
        ema_decay: float | None = None,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        if not id2label or len(id2label) < 2:
            raise UserError(f"model.id2label has {len(id2label or {})} labels: a classifier needs at least two")
        if checkpoint and config:
            raise UserError("model.config: a checkpoint brings its own configuration; remove one of the two")
        check_config(config or {}, num_frames)
        check_settings(self.hparams)
        self.id2label = {int(index): label for index, label in id2label.items()}
        if checkpoint:
            fitting_config(checkpoint, self.id2label, num_frames)  # fail before the run's folder is created
        self.model: VidPrismForVideoClassification | None = None
        # With five classes or fewer, top-5 accuracy is always 1.
        top_k = {"top1": 1, "top5": 5} if len(self.id2label) > 5 else {"top1": 1}
        metrics = MetricCollection(
            {
                name: MulticlassAccuracy(num_classes=len(self.id2label), top_k=k, average="micro")
                for name, k in top_k.items()
            }
        )
        # Validation only; a ScoreRecorder computes the test metrics.
        self.metrics = metrics.clone(prefix="val/")

    @classmethod
    def from_model(cls, model: VidPrismForVideoClassification, **settings: Any) -> "VidPrismLightningModule":
        """Wraps an existing model for training, in place.

        Args:
            model: From `from_vision_pretrained` or `from_pretrained`.
            settings: Training settings: `learning_rate`, `freeze_backbone`, ...

        Example:
            ```python
            module = VidPrismLightningModule.from_model(model, learning_rate=1e-3, freeze_backbone=True)
            ```
        """
        config = model.config
        own = {"id2label": dict(config.id2label), "num_frames": config.num_frames}
        module = cls(backbone=model.vision_source, config=changed_fields(config), **own, **settings)
        if model.vision_source is None:
            module.hparams.update(checkpoint=config._name_or_path or None, config=None)
        module._prepare(model)
        return module

    def configure_model(self) -> None:
        """Builds the model once; Lightning may call this hook for both fit and test.

        Raises:
            UserError: If backbone or checkpoint cannot be loaded.
        """
        if self.model is not None:
            return
        # Lightning makes the accelerator the default device here, which transformers would read as a device map.
        # Initial weights depend on the seed alone, not on random numbers drawn since it was set.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            self._prepare(self._build_model())
        if self.device_mesh is not None:  # under FSDP2
            shard(self.model, self.device_mesh["data_parallel"], self.trainer.precision)

    def _build_model(self) -> VidPrismForVideoClassification:
        hparams = self.hparams
        if hparams.checkpoint:
            return load_checkpoint(hparams.checkpoint, self.id2label, hparams.num_frames)
        try:
            return VidPrismForVideoClassification.from_vision_pretrained(
                hparams.backbone, id2label=self.id2label, num_frames=hparams.num_frames, **(hparams.config or {})
            )
        except (OSError, ValueError, StrictDataclassError, SafetensorError, UnpicklingError) as error:
            raise UserError(f"model.backbone {hparams.backbone}: cannot be loaded ({first_line(error)})") from error

    def _prepare(self, model: VidPrismForVideoClassification) -> None:
        """Adopts a model and freezes the parts that are not trained."""
        hparams, self.model = self.hparams, model
        # from_pretrained returns a model in eval mode, which Lightning would keep.
        self.model.train()
        if hparams.gradient_checkpointing:
            # Renamed in transformers 5.21.
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable()
        if hparams.freeze_backbone:
            self.model.vidprism.vision_tower.freeze()
        elif hparams.freeze_layers:
            try:
                self.model.vidprism.vision_tower.freeze(hparams.freeze_layers)
            except ValueError as error:
                raise UserError(f"model.freeze_layers: {error}") from error
        if self.model.vidprism.projection_head is not None:
            # Unused in classification; frozen, so that DDP does not have to find unused parameters.
            self.model.vidprism.projection_head.requires_grad_(False)

    def video_processor(self) -> VidPrismVideoProcessor:
        """Returns the model's processor; works before the model is built."""
        name = self.hparams.checkpoint or self.hparams.backbone
        return load_processor(name, self.hparams.num_frames) if name else processor_for(self.model)

    def forward(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
    ) -> VidPrismForVideoClassificationOutput:
        """Classifies clips (B, T, 3, H, W) or their frame features (B, T, D)."""
        return self.model(pixel_values_videos, labels=labels, frame_features=frame_features, return_dict=True)

    def configure_callbacks(self) -> list[L.Callback]:
        """Returns the callbacks the trainer does not have yet: bad videos, test scores, epoch position, EMA if set."""
        wanted: list[L.Callback] = [BadClipReport(), ScoreRecorder(), EpochPlace()]
        if self.hparams.ema_decay is not None:
            wanted.append(WeightEMA(self.hparams.ema_decay))
        return [new for new in wanted if not any(isinstance(old, type(new)) for old in self.trainer.callbacks)]

    def on_fit_start(self) -> None:
        """Prints what is trained."""
        config, parameters = self.model.config, list(self.model.parameters())
        total = sum(parameter.numel() for parameter in parameters) / 1e6
        trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad) / 1e6
        rates = " ".join(map(str, config.rates))
        start = self.hparams.checkpoint or self.hparams.backbone or "its configuration"
        print_once(
            f"Model: VidPrism from {start}, {config.num_frames} frames, rates {rates}; {total:.1f} M parameters, "
            f"{trainable:.1f} M of them trainable"
        )

    def on_train_start(self) -> None:
        """Fits the whitening of frame features, if configured, unless a checkpoint restored it."""
        fit_whitening(self.model, getattr(self.trainer.train_dataloader, "dataset", None))

    def on_train_epoch_start(self) -> None:
        """Sets the epoch of streamed clips, as Lightning does for samplers, and schedules newly unfrozen parameters.

        Raises:
            UserError: If a callback unfroze the tower while its features come from the cache.
        """
        set_epoch = getattr(getattr(self.trainer.train_dataloader, "dataset", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.current_epoch)
        if getattr(getattr(self.trainer.datamodule, "hparams", None), "feature_cache", None):
            check_frozen(not any(p.requires_grad for p in self.model.vidprism.vision_tower.parameters()))
        if isinstance(schedule := self.lr_schedulers(), LambdaLR):
            extend_schedule(schedule)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        name, clips = clip_input(batch)
        output = self(**{name: clips}, labels=batch["labels"])
        smoothing = self.hparams.label_smoothing
        if "soft_labels" in batch or smoothing:
            labels = batch.get("soft_labels", batch["labels"])
            logits = output.logits.float()
            output.classification_loss = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
            output.loss = self._total_loss(output)
        loss = output.loss
        if self.trainer.world_size > 1:
            loss = self._balance_over_ranks(output, batch.get("num_counted", len(batch["labels"])))
        self._log_losses("train", output)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        """Returns `logits` (B, views, K) and `expert_weights` (B, N), averaged over each video's views."""
        return self._evaluate("test", batch)

    def configure_optimizers(self) -> dict[str, Any]:
        """Returns AdamW over the parameter groups, with linear warm-up and cosine decay to zero, stepped every step.

        Raises:
            UserError: If the learning rate is to be scaled and the data has no batch size.
        """
        hparams, rate = self.hparams, self.hparams.learning_rate
        if hparams.reference_batch_size is not None:
            clips = clips_per_step(self.trainer)
            rate = scaled_learning_rate(rate, clips, hparams.reference_batch_size)
            said = f"{hparams.learning_rate:g} x sqrt({clips} / {hparams.reference_batch_size} clips per step)"
            print_once(f"Learning rate: {rate:.4g} = {said}")
        if hparams.layer_decay != 1 and hparams.freeze_backbone:
            rank_zero_warn(f"model.layer_decay={hparams.layer_decay:g} has no effect: the tower is frozen")
        groups = parameter_groups(
            self.model, rate, hparams.backbone_lr_scale, hparams.weight_decay, hparams.layer_decay
        )
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), eps=1e-8, fused=self._fused())
        total = self.trainer.estimated_stepping_batches
        if total == math.inf:
            raise UserError("trainer.max_epochs=-1: the schedule needs a last step; set trainer.max_steps too")
        self.trainer.fit_loop.setup_data()  # with max_epochs=-1 Lightning does not count the batches
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        warmup = round(steps_per_epoch * hparams.warmup_epochs)
        if warmup >= total:
            rank_zero_warn(
                f"model.warmup_epochs={hparams.warmup_epochs} is the whole run; warming up for a tenth of it instead"
            )
            warmup = total // 10
        self.warmup_steps = warmup  # for the model card
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adapts a checkpoint written under other settings to this run."""
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        if self.hparams.ema_decay is None:  # the weights that were trained, not their average
            checkpoint["state_dict"] = checkpoint.get("current_model_state", checkpoint["state_dict"])
        for state in checkpoint["optimizer_states"]:
            for group in state["param_groups"]:
                group["fused"] = self._fused()  # otherwise the old precision's choice is restored

    def _fused(self) -> bool:
        """Returns whether AdamW runs as one fused kernel; with a gradient scaler Lightning cannot clip beside it."""
        return self.trainer.precision != "16-mixed"

    def frame_encoder(self) -> FrameEncoder:
        """Returns the frozen tower for `data.feature_cache`, in the trainer's precision.

        Raises:
            UserError: If the tower is not frozen.
        """
        check_frozen(self.hparams.freeze_backbone)
        return encoder_of(self.model, self.trainer)

    def _evaluate(self, stage: str, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        labels, num_views = batch["labels"], 1
        name, clips = clip_input(batch)
        if clips.ndim == (4 if name == "frame_features" else 6):  # (B, views, T, ...)
            num_views = clips.shape[1]
            output = self(**{name: clips.flatten(0, 1)}, labels=labels.repeat_interleave(num_views))
        else:
            output = self(**{name: clips}, labels=labels)
        logits = output.logits.float().unflatten(0, (-1, num_views))
        if stage == "val":
            self._validate(logits.mean(dim=1), batch)
        self._log_losses(stage, output)
        weights = output.expert_weights.float().unflatten(0, (-1, num_views)).mean(dim=1)
        for index, (rate, weight) in enumerate(zip(self.model.config.rates, weights.mean(0), strict=True)):
            self._log_mean(f"{stage}/expert_{index}_rate_{rate}_weight", weight, len(output.logits))
        return {"logits": logits, "expert_weights": weights}

    def _validate(self, logits: torch.Tensor, batch: dict[str, Any]) -> None:
        """Logs the accuracies of a batch, logits (B, K)."""
        labels = batch["labels"]
        if "readable" in batch:
            # An unreadable video counts as wrong, whatever the model predicts for zeros.
            right = nn.functional.one_hot(labels, logits.shape[1]).bool()
            logits = logits.masked_fill(right & ~batch["readable"][:, None], -torch.inf)
        self.metrics.update(logits, labels)
        self.log_dict(self.metrics, on_step=False, on_epoch=True, prog_bar=True)

    def _balance_over_ranks(self, output: VidPrismForVideoClassificationOutput, num_clips: int) -> torch.Tensor:
        """Replaces this rank's losses in the output by the losses over all ranks' clips.

        Returns:
            The loss this rank minimises. Strategies average gradients over ranks; the average of these losses is the
            exact loss of all clips, even with uneven batches.
        """
        losses = torch.stack([output[name].float() for name in CLIP_LOSSES])
        experts = output.expert_weights.float().mean(dim=0)
        count = losses.new_full((1,), num_clips)
        sums = self.all_gather(torch.cat([count, count * losses.detach(), count * experts]), sync_grads=True).sum(dim=0)
        _, means, experts = (sums / sums[0]).split([1, len(losses), len(experts)])
        weight = count * self.trainer.world_size / sums[0]  # exactly 1 for even batches
        output.gate_loss = gate_balance_loss(experts)
        for name, mean in zip(CLIP_LOSSES, means, strict=True):
            output[name] = mean
        output.loss = self._total_loss(output)
        own = dict(zip(CLIP_LOSSES, losses * weight, strict=True))
        return self.model.total_loss(gate_loss=output.gate_loss, **own)

    def _total_loss(self, output: VidPrismForVideoClassificationOutput) -> torch.Tensor:
        return self.model.total_loss(**{part: output[part] for part in LOSS_PARTS})

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
            # Lightning averages these weights over ranks and rounds down; multiples of the world size stay exact.
            batch_size=batch_size * self.trainer.world_size,
            prog_bar=prog_bar,
            sync_dist=not training,
        )


def clip_input(batch: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """Returns the name and tensor of a batch's input: cached frame features if present, otherwise pixels."""
    name = "frame_features" if "frame_features" in batch else "pixel_values_videos"
    return name, batch[name]


def check_frozen(frozen: bool) -> None:
    """Checks that the tower is frozen, so that its features can be cached.

    Raises:
        UserError: If it is not.
    """
    if not frozen:
        raise UserError("data.feature_cache: features of a trained tower cannot be cached; set model.freeze_backbone")


def check_config(fields: dict[str, Any], num_frames: int) -> None:
    """Checks the recipe's `model.config`.

    Raises:
        UserError: If a key is not a field of `VidPrismConfig` or has its own argument, or a value is invalid.
    """
    allowed = config_fields() | {"attn_implementation"}
    if (attention := fields.get("attn_implementation", "sdpa")) not in ATTENTION:
        raise UserError(f"model.config.attn_implementation={attention}: must be one of {', '.join(ATTENTION)}")
    for name in fields:
        if name not in allowed:
            raise UserError(f"model.config.{name}: no such field; there are {', '.join(sorted(allowed))}")
    try:
        # The real width comes from the tower; any multiple of the number of heads will do here.
        width = {"hidden_size": 64 * int(fields.get("num_attention_heads", 4))}
        VidPrismConfig(num_frames=num_frames, **width | fields)
    except StrictDataclassError as error:
        raise UserError(f"model.config: {' '.join(str(error).split())}") from error


def changed_fields(config: VidPrismConfig) -> dict[str, Any] | None:
    """Returns a configuration's non-default fields, as a recipe's `model.config` has them; None if there are none."""
    default = VidPrismConfig(
        num_frames=config.num_frames,
        vision_config=config.vision_config.to_dict(),  # a copy: the configuration takes ownership
        vision_projection=config.vision_projection,
    )
    names = sorted(config_fields())
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)} or None


def config_fields() -> set[str]:
    """Returns the fields of `VidPrismConfig` that a recipe may set in `model.config`."""
    own = {"num_frames", "vision_config", "vision_projection"}
    known = {field.name for field in dataclasses.fields(VidPrismConfig)}
    return known - {field.name for field in dataclasses.fields(VidPrismConfig.__mro__[1])} - own
