"""The layout of a published model, the same for the end of a run, kept checkpoints, conversions and pushes.

| file                                      | what                                                              |
| ----------------------------------------- | ----------------------------------------------------------------- |
| model.safetensors                         | the weights; past a size in shards with an index                  |
| config.json                               | architecture, labels, frames, and `auto_map` for all Auto classes |
| video_preprocessor_config.json            | the processor of the evaluation input                             |
| *_vidprism.py                             | the code that trust_remote_code runs                              |
| README.md, figures/*.png                  | the model card                                                    |
| recipe.yaml, split.json, train_clips.txt  | the run's settings and the clips that it trained on               |
| .eval_results/*.yaml                      | its results, where the dataset is one of the Hub                  |
"""

import copy
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import ModelCard, save_torch_state_dict
from safetensors import SafetensorError, safe_open

from ..errors import UserError, first_line
from ..model import VidPrismConfig, VidPrismForVideoClassification, VidPrismVideoProcessor
from ..model.loading import empty_model
from ..util import preview
from .card import UNKNOWN, merge_card
from .own_files import NotOwn, read_own

WEIGHTS = "model.safetensors"
README = "README.md"
MAX_SHARD_SIZE = "5GB"
REPLACED = "replaced"  # ends the name of an export that was moved aside for a new one
Precision = Literal["float32", "bfloat16", "float16"]
# Every file that an export has ever had, by its path within: a folder with any other entry is not ours to replace.
EXPORT_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|config\.json|video_preprocessor_config\.json|README\.md|\w+_vidprism\.py"
    r"|figures/\w+\.png|recipe\.yaml|split\.json|train_clips\.txt|\.eval_results/[\w-]+\.yaml"
)
FOLDERS = frozenset({"figures", ".eval_results"})


class ExportError(UserError):
    """An export that could not be written, or does not hold what was to be written."""


def export_model(
    model: VidPrismForVideoClassification,
    processor: VidPrismVideoProcessor,
    folder: str | os.PathLike,
    card: ModelCard,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    dtype: Precision | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Writes a model in the Hub's layout: beside the folder, checked, then renamed.

    The bytes depend on the arguments alone, not on the strategy or the device that the weights come from.

    Args:
        model: The classifier; it stays as it is.
        processor: The processor of its evaluation input.
        folder: Where to; an export that stands there is replaced once the new one is whole. Of its README only the
            generated part changes.
        card: The README.
        state_dict: All weights by the names of the model, gathered from all processes; None takes the model's.
        dtype: Of the written weights; None keeps theirs.
        max_shard_size: Size of a file of weights, such as "5GB", past which they are written in several.
        files: Contents of further files by their path within, such as figures/curves.png.

    Raises:
        ExportError: If the folder cannot be written, or holds anything that is no part of an export, or the weights
            are not all there or not finite, or its whitening is not fitted; nothing is changed then.
    """
    folder = Path(folder)
    state = prepare_weights(model.state_dict() if state_dict is None else state_dict, model.config, dtype)
    with written_beside(folder) as partial:
        save_torch_state_dict(state, partial, max_shard_size=max_shard_size)
        save_configuration(model.config, next(t.dtype for t in state.values() if t.is_floating_point()), partial)
        save_processor(processor, model.config.num_frames, partial)
        for name, content in (files or {}).items():
            if not EXPORT_FILES.fullmatch(name):
                raise ValueError(f"{name}: no file of an export")
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        (partial / README).write_bytes(readme(folder, card).encode())
        check_weights(state, partial)
    return folder


def prepare_weights(
    state: Mapping[str, torch.Tensor], config: VidPrismConfig, dtype: Precision | None
) -> dict[str, torch.Tensor]:
    """The weights as they are written: on the CPU, in the precision that a model of the one asked for has them in.

    Raises:
        ExportError: If there are none, or one has no finite value in that precision, or the whitening is not fitted.
    """
    precisions: dict[str, torch.dtype] = {}
    if dtype:
        model = empty_model(config).to(getattr(torch, dtype))
        precisions = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    prepared = {}
    for name, tensor in state.items():
        if name.endswith("feature_norm.num_frames") and not tensor:
            raise ExportError(
                "feature_norm: whitened is not fitted, nothing is exported; give frame features of training clips to "
                "model.vidprism.temporal_model.feature_norm.fit, and train the model after that"
            )
        kept = tensor.detach().to("cpu", precisions.get(name))
        if not torch.isfinite(kept).all():
            raise ExportError(f"{name}: holds values that are not finite as {kept.dtype}; nothing is exported")
        prepared[name] = kept
    if not any(tensor.is_floating_point() for tensor in prepared.values()):
        raise ExportError("there are no weights to export: were they gathered from all processes?")
    return prepared


def save_configuration(config: VidPrismConfig, dtype: torch.dtype, folder: Path) -> None:
    """Writes config.json, whatever class a strategy wraps the model in, and the code that it names."""
    config = copy.deepcopy(config)
    config.architectures = [VidPrismForVideoClassification.__name__]
    config.dtype = dtype
    config.save_pretrained(folder)


def save_processor(processor: VidPrismVideoProcessor, num_frames: int, folder: Path) -> None:
    """Writes the processor's configuration with the model's number of frames."""
    processor = VidPrismVideoProcessor(**processor.to_dict() | {"num_frames": num_frames})
    processor.save_pretrained(folder)


def readme(folder: Path, card: ModelCard) -> str:
    """The card; where there is one already, that one with its generated part refreshed, and the licence if stated."""
    text = str(card).rstrip("\n") + "\n"
    try:
        existing = read_own(folder, README).decode()
    except (FileNotFoundError, NotADirectoryError):
        return text
    except NotOwn as error:
        raise ExportError(str(error)) from error
    except UnicodeDecodeError as error:
        raise ExportError(f"{folder / README}: is no UTF-8 text; save it as such, or remove it") from error
    stated = card.data.license not in (None, UNKNOWN)
    return merge_card(existing, text, anew={"license"} if stated else ())


def check_weights(state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Compares the written tensors with those that were to be written, and with what the configuration asks for.

    Raises:
        ExportError: If one is missing or differs.
    """
    model = empty_model(VidPrismConfig.from_pretrained(folder, trust_remote_code=False))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = set(shapes.keys() ^ state.keys())
    unread = set(state)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as written:
            for name in written.keys():  # noqa: SIM118 (not a mapping)
                tensor, expected = written.get_tensor(name), state.get(name)
                same = expected is not None and tensor.dtype == expected.dtype and torch.equal(tensor, expected)
                if not same or tensor.shape != shapes.get(name) or name not in unread:
                    wrong.add(name)
                unread.discard(name)
    wrong |= unread
    if wrong:
        raise ExportError(f"{len(wrong)} of {len(shapes)} tensors were not written right: {preview(sorted(wrong), 3)}")


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its name when the block ends well, and goes when it does not.

    Of a process that is killed, or a machine that stops, the unfinished folder `.<name>-<8 characters>` stays, and
    `folder` is as it was, or at worst stands aside: see `recover_export`.

    Raises:
        ExportError: If it cannot be written, or `folder` holds anything that is no part of an export. `folder` is
            as it was then.
    """
    try:
        recover_export(folder)
        refuse_other_content(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
        partial.mkdir()
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        yield partial
        open_to_others(partial)
        refuse_other_content(folder)  # again: writing took a while
        put_in_place(partial, folder)
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written ({error.strerror or error})") from error
    except SafetensorError as error:  # a full disk, as safetensors tells it
        raise ExportError(f"{folder}: cannot be written ({first_line(error)})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_other_content(folder: Path) -> None:
    """Lets pass what may be replaced: nothing, an empty folder, or an export and nothing else.

    Raises:
        ExportError: If anything else stands there.
    """
    if is_vacant(folder):
        return
    if not folder.is_dir():
        reason = "it is a file"
    elif foreign := foreign_content(folder):
        reason = f"it holds {foreign[0]!r}"
    elif not is_vidprism_config(folder / "config.json"):
        reason = "it has no config.json of a VidPrism"
    else:
        return
    raise ExportError(
        f"{folder}: exists and is not an exported model ({reason}); choose another folder, or move that away"
    )


def is_vacant(folder: Path) -> bool:
    """Whether nothing stands there, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def foreign_content(folder: Path) -> list[str]:
    """Files and folders that are no part of an export, sorted."""
    foreign = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if not (name in FOLDERS if path.is_dir() else path.is_file() and EXPORT_FILES.fullmatch(name)):
            foreign.append(name)
    return sorted(foreign)


def is_vidprism_config(file: Path) -> bool:
    """Whether a file is the configuration of a VidPrism."""
    if not file.is_file():  # of a pipe reading may never end
        return False
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == VidPrismConfig.model_type


def put_in_place(partial: Path, folder: Path) -> None:
    """Renames `partial` to `folder`; what stood there is moved aside before, and put back if the renaming fails.

    At every moment `folder` holds the old export or the new one, but for the one between the two renamings: a process
    that is killed right then leaves the old one aside, whole, for `recover_export`.
    """
    for path in (*partial.rglob("*"), partial):
        write_through(path)
    replaced = None
    if folder.exists():
        replaced = folder.rename(partial.with_name(f"{partial.name}-{REPLACED}"))
    try:
        partial.rename(folder)
    except BaseException:
        recover_export(folder)
        raise
    write_through(folder.parent)
    if replaced is not None:
        remove_replaced(replaced)


def recover_export(folder: Path) -> None:
    """Puts back an export that a killed process had moved aside to make room for a new one.

    If an export stands in its place, that is the new one, and the old one goes.
    """
    aside = re.compile(rf"\.{re.escape(folder.name)}-[a-z0-9_]{{8}}-{REPLACED}")  # as `written_beside` draws names
    if not folder.parent.is_dir():
        return
    found = [path for path in folder.parent.iterdir() if aside.fullmatch(path.name)]
    for replaced in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if is_vacant(folder):
            replaced.rename(folder)
        elif is_vidprism_config(folder / "config.json"):
            remove_replaced(replaced)


def remove_replaced(replaced: Path) -> None:
    """Removes an export that another has replaced; remains of it are no failure of the new one."""
    with suppress(OSError):
        # Under another name: what is half gone must not be put back by `recover_export`.
        replaced = replaced.rename(replaced.with_name(replaced.name.removesuffix(REPLACED) + "removed"))
        shutil.rmtree(replaced, ignore_errors=True)


def open_to_others(folder: Path) -> None:
    """Gives the files below a new folder the mode of new files: safetensors makes its own private."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def write_through(path: Path) -> None:
    """Has a file's content, or a folder's list of files, written to the disk itself before the call returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # not every file system can do it for folders
            raise
    finally:
        os.close(handle)
