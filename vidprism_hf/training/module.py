"""The LightningModule: a VidPrism classifier with its losses, metrics, optimiser and schedule."""

import dataclasses
import math
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from huggingface_hub.errors import StrictDataclassError
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoConfig, get_cosine_schedule_with_warmup

from ..data import normalize_clips
from ..data.frame_encoder import FrameEncoder, tower_digest
from ..errors import UserError, first_line, why_not_loaded
from ..evaluation.labels import matched_labels
from ..evaluation.scores import ScoreRecorder
from ..model import VidPrismConfig, VidPrismForVideoClassification, VidPrismForVideoClassificationOutput
from ..model.loading import load_classifier
from ..model.temporal_vidprism import gate_balance_loss
from .averaging import WeightEMA
from .callbacks import BadClipReport, EpochPlace
from .optimization import check_settings, clips_per_step, extend_schedule, parameter_groups, scaled_learning_rate
from .strategies import shard
from .whitening import fit_whitening

LOSS_PARTS = ("classification_loss", "rank_loss", "gate_loss", "diversity_loss")
CLIP_LOSSES = ("classification_loss", "rank_loss", "diversity_loss")  # means over clips


class VidPrismLightningModule(L.LightningModule):
    """Fine-tunes a VidPrism classifier.

    Args:
        backbone: CLIP checkpoint the tower starts from: a Hub id, a folder, or a preset (b32, b16, l14, tiny;
            tiny has random weights).
        checkpoint: VidPrism checkpoint (folder or Hub id) to start from instead; its labels must be the data's, but
            for order, case, blanks and signs.
        id2label: Label name of each class index; the CLI takes it from the data.
        num_frames: Frames per clip.
        config: Any other field of VidPrismConfig, such as `readout: mean`. A checkpoint brings its own.
        freeze_backbone: Whether the tower stays as it is.
        freeze_layers: Layers of the tower that stay as they are, from the embeddings up; 0 trains the embeddings too.
        learning_rate: Peak learning rate of everything but the tower.
        reference_batch_size: Clips a step that learning_rate is stated for; it is then multiplied with the square
            root of clips a step / reference_batch_size. None takes it as it is.
        backbone_lr_scale: The tower's learning rate as a share of it.
        layer_decay: Learning rate of each layer of the tower as a share of that of the layer above it.
        weight_decay: Weight decay of weights; biases, norms and the global query have none.
        warmup_epochs: Epochs of linear warm-up before the cosine; may be a fraction.
        label_smoothing: Share of each training label that is spread over all classes, after mixing. Losses of
            evaluations are of the labels as they are.
        ema_decay: Decay of a moving average of the weights, which is then validated, kept and tested in their place.
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
            fitting_config(checkpoint, self.id2label, num_frames)  # now, before a run's folder is made
        self.model: VidPrismForVideoClassification | None = None
        # With five classes or fewer the right one is always among the top five.
        top_k = {"top1": 1, "top5": 5} if len(self.id2label) > 5 else {"top1": 1}
        metrics = MetricCollection(
            {
                name: MulticlassAccuracy(num_classes=len(self.id2label), top_k=k, average="micro")
                for name, k in top_k.items()
            }
        )
        # Of the validations; a ScoreRecorder has those of a test.
        self.metrics = metrics.clone(prefix="val/")

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
            except (OSError, ValueError, StrictDataclassError, SafetensorError, UnpicklingError) as error:
                raise UserError(f"model.backbone {hparams.backbone}: cannot be loaded ({first_line(error)})") from error
        # from_pretrained leaves eval mode, which Lightning would keep.
        self.model.train()
        if hparams.gradient_checkpointing:
            # The name since transformers 5.21; before, only the other one exists.
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
            # Classification does not use it; without a gradient DDP need not look for unused parameters.
            self.model.vidprism.projection_head.requires_grad_(False)

    def forward(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        frame_features: torch.Tensor | None = None,
    ) -> VidPrismForVideoClassificationOutput:
        """Classifies clips (B, T, 3, H, W), or frame features of clips (B, T, D)."""
        return self.model(pixel_values_videos, labels=labels, frame_features=frame_features, return_dict=True)

    def configure_callbacks(self) -> list[L.Callback]:
        """What the trainer lacks of these: the account of bad clips, the scores of a test, the place in an epoch, and
        the average of the weights if asked for.
        """
        wanted: list[L.Callback] = [BadClipReport(), ScoreRecorder(), EpochPlace()]
        if self.hparams.ema_decay is not None:
            wanted.append(WeightEMA(self.hparams.ema_decay))
        return [new for new in wanted if not any(isinstance(old, type(new)) for old in self.trainer.callbacks)]

    def on_train_start(self) -> None:
        """Fits the whitening of frame features, where there is one, unless a checkpoint has brought it."""
        fit_whitening(self.model, getattr(self.trainer.train_dataloader, "dataset", None))

    def on_train_epoch_start(self) -> None:
        """Tells streamed clips the epoch, as Lightning does samplers, and allows for what a callback has unfrozen.

        Raises:
            UserError: If that is the tower, and its features come from the cache.
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
        """Gives `logits` (B, views, K) and `expert_weights` (B, N), means over each clip's views, to callbacks."""
        return self._evaluate("test", batch)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW on the parameter groups; linear warm-up and cosine to zero, stepped with each of its steps.

        Raises:
            UserError: If the learning rate is to be scaled and the data do not tell their batch size.
        """
        hparams, rate = self.hparams, self.hparams.learning_rate
        if hparams.reference_batch_size is not None:
            clips = clips_per_step(self.trainer)
            rate = scaled_learning_rate(rate, clips, hparams.reference_batch_size)
            said = f"{hparams.learning_rate:g} x sqrt({clips} / {hparams.reference_batch_size} clips a step)"
            rank_zero_info(f"Learning rate: {rate:.4g} = {said}")
        if hparams.layer_decay != 1 and hparams.freeze_backbone:
            rank_zero_warn(f"model.layer_decay={hparams.layer_decay:g} changes nothing: the tower is frozen")
        groups = parameter_groups(
            self.model, rate, hparams.backbone_lr_scale, hparams.weight_decay, hparams.layer_decay
        )
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), eps=1e-8, fused=self._fused())
        total = self.trainer.estimated_stepping_batches
        if total == math.inf:
            raise UserError("trainer.max_epochs=-1: the learning rate falls to an end; set trainer.max_steps, too")
        self.trainer.fit_loop.setup_data()  # with max_epochs=-1 Lightning has not counted the batches
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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fits what another run's settings have left in a checkpoint to this one that goes on."""
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        if self.hparams.ema_decay is None:  # the other one's average is not what its optimiser was moving
            checkpoint["state_dict"] = checkpoint.get("current_model_state", checkpoint["state_dict"])
        for state in checkpoint["optimizer_states"]:
            for group in state["param_groups"]:
                group["fused"] = self._fused()  # else that of the other precision would be restored

    def _fused(self) -> bool:
        """One kernel, not a dozen passes over all weights; Lightning does not clip beside it where a scaler is."""
        return self.trainer.precision != "16-mixed"

    def frame_encoder(self) -> FrameEncoder:
        """The frozen tower as `data.feature_cache` needs it, in the trainer's precision.

        Raises:
            UserError: If the tower is trained.
        """
        check_frozen(self.hparams.freeze_backbone)
        tower, config = self.model.vidprism.vision_tower, self.model.config.vision_config
        return FrameEncoder(tower_digest(tower, config), str(self.trainer.precision), self._encode_frames)

    @torch.no_grad()
    def _encode_frames(self, pixels: torch.Tensor) -> torch.Tensor:
        """Frame features (B, T', D) of uint8 pixels (B, T, 3, H, W)."""
        pixels = normalize_clips(pixels.to(self.device), self.trainer.datamodule.video_processor)
        with self.trainer.precision_plugin.forward_context():
            return self.model.vidprism.get_frame_features(pixels)

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
            # A clip without pixels counts as wrong, whatever the model makes of zeros.
            right = nn.functional.one_hot(labels, logits.shape[1]).bool()
            logits = logits.masked_fill(right & ~batch["readable"][:, None], -torch.inf)
        self.metrics.update(logits, labels)
        self.log_dict(self.metrics, on_step=False, on_epoch=True, prog_bar=True)

    def _balance_over_ranks(self, output: VidPrismForVideoClassificationOutput, num_clips: int) -> torch.Tensor:
        """Replaces the losses of this rank's clips, of which so many count, by those of the clips of all ranks.

        Returns:
            What this rank minimises: its mean over the ranks, as strategies average gradients, is the loss of all
            clips, however many each rank has.
        """
        losses = torch.stack([output[name].float() for name in CLIP_LOSSES])
        experts = output.expert_weights.float().mean(dim=0)
        count = losses.new_full((1,), num_clips)
        sums = self.all_gather(torch.cat([count, count * losses.detach(), count * experts]), sync_grads=True).sum(dim=0)
        _, means, experts = (sums / sums[0]).split([1, len(losses), len(experts)])
        weight = count * self.trainer.world_size / sums[0]  # exactly 1 where all have as many
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
            # Lightning averages these weights over the processes and rounds down: as multiples they stay exact.
            batch_size=batch_size * self.trainer.world_size,
            prog_bar=prog_bar,
            sync_dist=not training,
        )


def clip_input(batch: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """What a batch holds of its clips, and its name: kept frame features, or else pixels."""
    name = "frame_features" if "frame_features" in batch else "pixel_values_videos"
    return name, batch[name]


def check_frozen(frozen: bool) -> None:
    """Looks whether features of the tower can be kept.

    Raises:
        UserError: If it is trained.
    """
    if not frozen:
        raise UserError("data.feature_cache: a tower that learns has no features to keep; set model.freeze_backbone")


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
    """Loads a VidPrism checkpoint, with its classes in the data's order and under the data's names.

    Raises:
        UserError: If it is no VidPrism checkpoint, its classes are others or it cannot take so many frames.
    """
    config, order = fitting_config(name_or_path, id2label, num_frames)
    config.num_frames = num_frames
    place = f"model.checkpoint {name_or_path}"
    model = load_classifier(name_or_path, config=config, dtype=torch.float32, place=place)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter[order])
    model.config.id2label = dict(id2label)
    model.config.label2id = {label: index for index, label in id2label.items()}
    return model


def fitting_config(name_or_path: str, id2label: dict[int, str], num_frames: int) -> tuple[VidPrismConfig, list[int]]:
    """Loads the configuration of a VidPrism checkpoint, and finds its index of each class of the data.

    Raises:
        UserError: If it is no VidPrism checkpoint, its classes are others or it cannot take so many frames.
    """
    config = read_checkpoint_config(name_or_path)
    if config.time_position == "learned" and config.num_frames != num_frames:
        raise UserError(
            f"model.checkpoint {name_or_path}: has learned positions for {config.num_frames} frames; "
            f"set model.num_frames to that, not {num_frames}"
        )
    return config, matched_labels(f"model.checkpoint {name_or_path}", config.id2label, id2label)


def read_checkpoint_config(name_or_path: str) -> VidPrismConfig:
    """Loads the configuration of a VidPrism checkpoint.

    Raises:
        UserError: If it is no VidPrism checkpoint.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # what a file holds decides how transformers fails at it
        raise UserError(
            f"model.checkpoint {name_or_path}: cannot be loaded ({why_not_loaded(name_or_path, error)})"
        ) from error
    if not isinstance(config, VidPrismConfig):
        raise UserError(f"model.checkpoint {name_or_path}: a {config.model_type} model; give it as model.backbone")
    return config
