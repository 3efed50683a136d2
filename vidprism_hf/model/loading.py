"""Loading a classifier of others, whose files may be damaged: what is wrong is said before memory is asked for."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from ..errors import UserError, why_not_loaded
from .configuration_vidprism import VidPrismConfig
from .modeling_vidprism import VidPrismForVideoClassification


def load_config(name_or_path: str, revision: str | None = None, place: str | None = None) -> VidPrismConfig:
    """Loads the configuration of a VidPrism.

    Args:
        name_or_path: Folder or Hub id.
        revision: Branch, tag or commit on the Hub; main if None.
        place: How an error names it, if not by name and revision.

    Raises:
        UserError: If there is none, or it is damaged or that of another model.
    """
    place = place or named(name_or_path, revision)
    with one_line(name_or_path, place, "config.json"):
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    if not isinstance(config, VidPrismConfig):
        raise UserError(f"{place}: a {config.model_type} model, not a VidPrism")
    check_attention(config, place)
    return config


def check_attention(config: VidPrismConfig, place: str) -> None:
    """Checks that a configuration names no kernel of the Hub, which is code.

    Raises:
        UserError: If it does.
    """
    for each in (config, config.vision_config):
        if "/" in str(getattr(each, "_attn_implementation", None)):
            raise UserError(
                f"{place}: its config.json names the attention kernel {each._attn_implementation!r}, which is code of "
                "the Hub; change it to sdpa or eager"
            )


def load_classifier(
    name_or_path: str,
    revision: str | None = None,
    *,
    config: VidPrismConfig | None = None,
    dtype: torch.dtype | None = None,
    place: str | None = None,
) -> VidPrismForVideoClassification:
    """Loads a classifier from safetensors; no code of others runs.

    Args:
        name_or_path: Folder or Hub id.
        revision: Branch, tag or commit on the Hub; main if None.
        config: Its configuration, where it is known or changed.
        dtype: Of the weights; as they are in the file if None.
        place: How an error names it, if not by name and revision.

    Raises:
        UserError: If weights are missing, damaged, not finite or not those of the configuration.
    """
    place = place or named(name_or_path, revision)
    config = config or load_config(name_or_path, revision, place)
    with one_line(name_or_path, place, "config.json"):
        shapes = shapes_of(config)
    with one_line(name_or_path, place, SAFE_WEIGHTS_NAME):
        check_shapes(place, shapes, shapes_in(weight_files(name_or_path, revision)))
        precision = {} if dtype is None else {"dtype": dtype}
        model = VidPrismForVideoClassification.from_pretrained(
            name_or_path,
            revision=revision,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            **precision,
        )
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{place}: {name} holds values that are not finite; the file is damaged, get another one")
    return model


@contextmanager
def one_line(name_or_path: str, place: str, file: str) -> Iterator[None]:
    """Turns whatever transformers raises at a file into an error of one line: what the file holds decides which."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
        raise UserError(f"{place}: cannot be loaded (its {file} is damaged: {type(error).__name__} {error})") from error
    except Exception as error:
        raise UserError(f"{place}: cannot be loaded ({why_not_loaded(name_or_path, error)})") from error


def named(name_or_path: str, revision: str | None) -> str:
    """A model as a message names it."""
    return name_or_path if revision is None else f"{name_or_path} at {revision}"


def empty_model(config: VidPrismConfig) -> VidPrismForVideoClassification:
    """A model without weights, which has their names, shapes and precisions."""
    with torch.device("meta"):
        return VidPrismForVideoClassification(copy.deepcopy(config))


def shapes_of(config: VidPrismConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that a configuration asks for."""
    return {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}


def weight_files(name_or_path: str, revision: str | None) -> Iterator[str]:
    """The files of weights; those of a model on the Hub are fetched.

    Raises:
        OSError: If there are none.
    """
    one, index = (
        cached_file(name_or_path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if one is not None:
        return iter([one])
    if index is None:
        raise OSError(f"it has no {SAFE_WEIGHTS_NAME}; other formats of weights are not read, since they can hold code")
    return iter(get_checkpoint_shard_files(name_or_path, index, revision=revision)[0])


def shapes_in(files: Iterator[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights in files, of which only the headers are read."""
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            found |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118 (not a mapping)
    return found


def check_shapes(place: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Compares the weights that are to be loaded with those that a configuration asks for.

    Raises:
        UserError: If they differ.
    """
    prefix = f"{VidPrismForVideoClassification.base_model_prefix}."
    if not any(name.startswith(prefix) for name in found):  # a VidPrismModel's
        found = {prefix + name: shape for name, shape in found.items()}
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"{place}: incomplete classifier, {len(missing)} weights are missing ({missing[0]})")
    if unknown := sorted(found.keys() - wanted.keys()):
        raise UserError(
            f"{place}: not the weights of its config.json, which has no place for {len(unknown)} of them ({unknown[0]})"
        )
    if other := sorted(name for name, shape in wanted.items() if found[name] != shape):
        name = other[0]
        raise UserError(
            f"{place}: not the weights of its config.json, by which {name} has shape {wanted[name]}, not {found[name]}"
        )
