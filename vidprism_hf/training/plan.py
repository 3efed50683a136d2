"""What a run is made of: a module, data and settings; and its recipe, by which it can be repeated."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import yaml

from ..data import VideoDataModule
from ..evaluation.testing import EvaluationSettings, callbacks_of
from ..stalls import COLLECTIVE_TIMEOUT, check_timeout
from .allowed import is_allowed
from .checkpoint.files import CheckpointSettings
from .checks import check_callbacks, check_trainer
from .exporting import ExportSettings
from .module import VidPrismLightningModule

# Arguments of Lightning's Trainer where nothing else is asked for.
TRAINER_DEFAULTS = {
    "max_epochs": 30,
    "log_every_n_steps": 10,
    "enable_model_summary": False,  # a line of our own says what trains
    # The samplers divide an epoch among ranks themselves: every validation video once, none twice.
    "use_distributed_sampler": False,
}
PLAIN = (str, int, float, bool, type(None))


@dataclass
class RunPlan:
    """A run before it starts.

    Attributes:
        module: The classifier with its losses and optimiser.
        data: Where the videos come from.
        output: Folder of the run.
        resume: See `finetune`.
        seed: Of the initial weights and of everything random in training that the data's own seed does not cover.
        checkpoint: How often checkpoints are written.
        export: How the weights are published.
        evaluation: How the final test is done.
        trainer: Arguments of Lightning's Trainer.
        trainer_recipe: The same as YAML has them; None derives it from the values.
        collective_timeout: Seconds that a rank waits for another one in a step before all end.
        command: What a user repeats to resume the run.
    """

    module: VidPrismLightningModule
    data: VideoDataModule
    output: Path
    resume: str = "auto"
    seed: int = 0
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    trainer_recipe: Mapping[str, Any] | None = None
    collective_timeout: float = COLLECTIVE_TIMEOUT
    command: str = "call finetune() again"

    def __post_init__(self):
        self.output = Path(self.output)
        if self.output.name in ("", ".."):  # it may have to be renamed
            self.output = self.output.resolve()
        self.trainer = TRAINER_DEFAULTS | dict(self.trainer)
        check_trainer(self.trainer)
        callbacks = callbacks_of(self.trainer)
        others = not all(is_allowed(class_path(callback)) for callback in callbacks)
        check_callbacks(callbacks, len(self.module.id2label), others)
        check_timeout(self.collective_timeout)

    def recipe(self) -> dict[str, Any]:
        """Returns all settings of the run as a recipe's keys and plain values.

        The number of frames and the processor are the model's, whose keys are under `model`.
        """
        trainer = TRAINER_DEFAULTS | dict(self.trainer if self.trainer_recipe is None else self.trainer_recipe)
        sections = {
            "model": settings_of(self.module),
            "data": settings_of(self.data),
            "checkpoint": dataclasses.asdict(self.checkpoint),
            "export": dataclasses.asdict(self.export),
            "evaluation": dataclasses.asdict(self.evaluation),
            "trainer": trainer,
        }
        head = {"seed_everything": self.seed, "output": str(self.output), "resume": "auto"}
        head["collective_timeout"] = self.collective_timeout
        return head | {name: plain(section) for name, section in sections.items()}

    def to_yaml(self) -> str:
        """Returns the recipe as YAML, as `vidprism finetune --config` reads it."""
        return yaml.safe_dump(self.recipe(), sort_keys=False, allow_unicode=True)


def settings_of(module: L.LightningModule | L.LightningDataModule) -> dict[str, Any]:
    """Returns the arguments of a module without those that follow from others, and without Lightning's own notes."""
    derived = ("id2label",) if isinstance(module, L.LightningModule) else ("processor", "num_frames")
    return {name: value for name, value in module.hparams.items() if name not in derived and name[0] != "_"}


def plain(value: Any) -> Any:
    """Returns a setting as YAML has it; objects become their class path."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Path):
        return str(value)
    return {"class_path": class_path(value)}


def class_path(value: Any) -> str:
    """Returns the path by which the class of an object, or a class, is imported."""
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
