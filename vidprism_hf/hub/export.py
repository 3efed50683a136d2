"""The layout of a published model, the same for exports of a run, conversions and pushes.

model.safetensors, config.json (architecture, labels, frames, `auto_map`), the video processor's
configuration, the code files that trust_remote_code needs, and README.md.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers.dynamic_module_utils import custom_object_save

from ..errors import UserError
from ..model import VidPrismConfig, VidPrismForVideoClassification, VidPrismModel, VidPrismVideoProcessor

WEIGHTS = "model.safetensors"
# Every file name that an export has ever had: a folder with any other entry is not ours to replace.
EXPORT_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|config\.json|video_preprocessor_config\.json|README\.md|\w+_vidprism\.py"
)
# What each Auto class finds in the exported code files under trust_remote_code.
AUTO_CLASSES = {
    "AutoConfig": VidPrismConfig,
    "AutoModel": VidPrismModel,
    "AutoModelForVideoClassification": VidPrismForVideoClassification,
    "AutoVideoProcessor": VidPrismVideoProcessor,
}


class ExportError(UserError):
    """An export that could not be written, or does not hold what was to be written."""


def export_model(
    model: VidPrismForVideoClassification,
    processor: VidPrismVideoProcessor,
    folder: str | os.PathLike,
    card: ModelCard,
) -> Path:
    """Writes a model in the Hub's layout: beside the folder, checked, then renamed.

    Args:
        model: The classifier.
        processor: The processor of its evaluation input.
        folder: Where to; an export that stands there is replaced once the new one is whole.
        card: The README.

    Raises:
        ExportError: If the folder cannot be written, or holds anything that is no part of an export; nothing is
            changed then.
    """
    with written_beside(Path(folder)) as partial:
        model.config.auto_map = auto_map()
        model.config.architectures = [type(model).__name__]
        # Keys as they are named here: transformers would undo the renaming of the checkpoint it loaded.
        model.save_pretrained(partial, save_original_format=False)
        processor = VidPrismVideoProcessor(**processor.to_dict() | {"num_frames": model.config.num_frames})
        processor.auto_map = {"AutoVideoProcessor": auto_map()["AutoVideoProcessor"]}
        processor.save_pretrained(partial)
        for part in (model, processor):
            custom_object_save(part, partial)
        card.save(partial / "README.md")
        check_weights(model, partial / WEIGHTS)
    return Path(folder)


def auto_map() -> dict[str, str]:
    """The Auto classes and where trust_remote_code finds each, as config.json states it."""
    return {auto: f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}" for auto, cls in AUTO_CLASSES.items()}


def check_weights(model: torch.nn.Module, file: Path) -> None:
    """Compares the written tensors with the model's.

    Raises:
        ExportError: If one is missing or differs.
    """
    written, expected = load_file(file), model.state_dict()
    wrong = [
        name
        for name in expected.keys() | written.keys()
        if name not in written or name not in expected or not torch.equal(written[name], expected[name].cpu())
    ]
    if wrong or not expected:
        raise ExportError(
            f"{file}: {len(wrong)} of {len(expected)} tensors were not written right: {sorted(wrong)[:3]}"
        )


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its name when the block ends well, and goes when it does not.

    Raises:
        ExportError: If it cannot be written, or `folder` holds anything that is no part of an export. `folder` is
            as it was then.
    """
    try:
        refuse_other_content(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        refuse_other_content(folder)  # again: writing took a while
        put_in_place(partial, folder)
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_other_content(folder: Path) -> None:
    """Lets pass what may be replaced: nothing, an empty folder, or an export and nothing else.

    Raises:
        ExportError: If anything else stands there.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        reason = "it is a file"
    elif foreign := sorted(path.name for path in folder.iterdir() if not is_export_file(path)):
        reason = f"it holds {foreign[0]!r}"
    elif not is_vidprism_config(folder / "config.json"):
        reason = "it has no config.json of a VidPrism"
    else:
        return
    raise ExportError(f"{folder}: exists and is not an exported model ({reason}); choose another folder")


def is_export_file(path: Path) -> bool:
    """Whether an export has a file of this name."""
    return path.is_file() and EXPORT_FILES.fullmatch(path.name) is not None


def is_vidprism_config(file: Path) -> bool:
    """Whether a file is the configuration of a VidPrism."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == VidPrismConfig.model_type


def put_in_place(partial: Path, folder: Path) -> None:
    """Renames `partial` to `folder`; what stood there is removed last, and put back if the renaming fails."""
    replaced = None
    if folder.exists():
        replaced = folder.rename(partial.with_name(f"{partial.name}-replaced"))
    try:
        partial.rename(folder)
    except BaseException:
        if replaced is not None:
            replaced.rename(folder)
        raise
    if replaced is not None:
        # The new export stands whole: remains of the old one must not make it look failed.
        shutil.rmtree(replaced, ignore_errors=True)
