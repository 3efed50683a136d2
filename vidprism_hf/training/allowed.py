"""Allowlist of classes that a recipe may name without --trust-recipe: they run no code from the recipe."""

from collections.abc import Iterator
from typing import Any

# Modules and classes, with everything below them. Loggers of services are excluded: they send a run's data elsewhere.
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
# Exceptions within ALLOWED: these run arbitrary functions.
DENIED = ("lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.lambda_function")


def own_classes(value: Any) -> Any:
    """Returns a trainer setting without classes that are not allowed; None if nothing is left."""
    if isinstance(value, list):
        return [kept for kept in map(own_classes, value) if kept is not None] or None
    return None if any(not is_allowed(name) for name in _class_paths(value)) else value


def is_allowed(class_path: str) -> bool:
    """Returns whether a recipe may name a class without being trusted."""

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
