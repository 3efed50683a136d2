"""The classes that a recipe may name without being trusted: what they do runs no code of the recipe's."""

from collections.abc import Iterator
from typing import Any

# Each with all that is below it. Loggers of services are not among them: they send what a run says elsewhere.
ALLOWED = (
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.pytorch.loggers.csv_logs",
    "lightning.pytorch.loggers.tensorboard",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.fabric.plugins",
    "vidprism_hf.training.callbacks.averaging.WeightEMA",
    "vidprism_hf.training.callbacks.push.PushToHub",
)
# Of these, what is nothing but functions of others.
DENIED = ("lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.lambda_function")


def own_classes(value: Any) -> Any:
    """A setting of the trainer without classes that a recipe may not name by itself; None where nothing is left."""
    if isinstance(value, list):
        return [kept for kept in map(own_classes, value) if kept is not None] or None
    return None if any(not is_allowed(name) for name in _class_paths(value)) else value


def is_allowed(class_path: str) -> bool:
    """Whether a recipe may name a class without being trusted."""

    def below(names: tuple[str, ...]) -> bool:
        return any(class_path == name or class_path.startswith(f"{name}.") for name in names)

    return below(ALLOWED) and not below(DENIED)


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "class_path" in value:
            yield value["class_path"]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _class_paths(part)
