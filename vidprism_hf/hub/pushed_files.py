"""The files of an export as a push reads them, once it is sure that they are a whole export."""

import json
import os
import re
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.lfs import UploadInfo
from huggingface_hub.utils.sha import git_hash
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

from ..errors import UserError, first_line
from ..model import VidPrismConfig, VidPrismForVideoClassification
from ..util import preview
from .export import EXPORT_FILES, FOLDERS, README, WEIGHTS, is_vidprism_config
from .own_files import list_own, open_own, read_own
from .refusals import PushError

INDEX = f"{WEIGHTS}.index.json"
NEEDED = ("config.json", "video_preprocessor_config.json", README)
# What one export has and the next may not: left on the Hub, it would be loaded, or read, as if it were the new one's.
WRITTEN = re.compile(
    rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(INDEX)}"
    r"|recipe\.yaml|split\.json|train_clips\.txt|figures/(curves|experts|confusion)\.png"
)
RESULTS = re.compile(r"\.eval_results/[^/]+\.yaml")  # of which others may have written some


class LocalFile:
    """A file to push: a small one by its bytes, the weights by the file that was opened when the folder was checked."""

    def __init__(self, path: str, source: Path | bytes):
        self.path, self.source = path, source
        is_bytes = isinstance(source, bytes)
        self.info = UploadInfo.from_bytes(source) if is_bytes else UploadInfo.from_path(str(source))

    @classmethod
    def opened(cls, folder: Path, path: str) -> "LocalFile":
        """A file that is sent from where it is open, whatever its name stands for by then."""
        descriptor = open_own(folder, path)
        # Systems without /proc open it by its name again; the Hub compares the hash then.
        own = Path(f"/proc/self/fd/{descriptor}")
        made = cls(path, own if own.exists() else folder / path)
        weakref.finalize(made, os.close, descriptor)
        return made

    def is_same(self, entry: RepoFile) -> bool:
        """Whether the repository has this content."""
        if entry.size != self.info.size:
            return False
        if entry.lfs is not None:
            return entry.lfs.sha256 == self.info.sha256.hex()
        content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return entry.blob_id == git_hash(content)

    def operation(self) -> CommitOperationAdd:
        """A new operation, as the client wears them out; built on no bytes, so that gigabytes are hashed once."""
        made = CommitOperationAdd(self.path, b"")
        made.path_or_fileobj = self.source if isinstance(self.source, bytes) else str(self.source)
        made.upload_info = self.info
        return made


def read_export(folder: Path) -> tuple[dict[str, LocalFile], list[str]]:
    """The files of an export, and what else lies there.

    Raises:
        PushError: If it is none, or not whole.
    """
    if not folder.is_dir():
        raise PushError(f"{folder}: no such folder; give a run's export folder")
    if not os.path.lexists(folder / "config.json"):
        if is_vidprism_config(folder / "export" / "config.json"):
            raise PushError(f"{folder}: a run's folder, not its export; did you mean {folder / 'export'}?")
        raise not_exported(folder)
    names, others = list_own(folder, FOLDERS)
    found = {}
    for path in names:
        if not EXPORT_FILES.fullmatch(path):
            others.append(path)
        elif path.endswith(".safetensors"):
            found[path] = LocalFile.opened(folder, path)
        else:
            found[path] = LocalFile(path, read_own(folder, path))
    if not is_vidprism_config(folder / "config.json"):
        raise not_exported(folder)
    if lacking := missing_files(folder, found):
        raise PushError(f"{folder}: the export is not whole: it lacks {preview(lacking, 20)}; export it again")
    try:
        found[README].source.decode()
    except UnicodeDecodeError as error:
        raise PushError(f"{folder / README}: is no UTF-8 text; save it as such") from error
    check_loadable(folder, [folder / path for path in found if path.endswith(".safetensors")])
    return found, sorted(others)


def not_exported(folder: Path) -> PushError:
    """What to say of another folder."""
    return PushError(f"{folder}: not an exported model (no config.json of a VidPrism); give a run's export folder")


def missing_files(folder: Path, found: Iterable[str]) -> list[str]:
    """What a stranger needs to load the model, and the folder has not got.

    Args:
        folder: Of an export; of an older version too, whose code may lie in other files than today's.
        found: Names of its files.
    """
    lacking = set(NEEDED).difference(found)
    if not any(name.endswith(".safetensors") for name in found):
        lacking.add(WEIGHTS)
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map")
    if not isinstance(auto_map, dict) or not auto_map:
        auto_map, lacking = {}, lacking | {"auto_map in config.json"}
    # `org/name--module.Class` is code of another repository.
    named = [name.partition(".")[0] for name in map(str, auto_map.values()) if "--" not in name]
    modules: set[str] = set()
    while named:
        name = named.pop()
        if name not in modules and f"{name}.py" in found:
            named += get_relative_imports(folder / f"{name}.py")
        modules.add(name)
    return sorted(lacking | {f"{name}.py" for name in modules}.difference(found))


def check_loadable(folder: Path, weights: list[Path]) -> None:
    """Makes sure that the files hold every tensor of the model, by name and shape, and no other.

    Raises:
        PushError: If they do not.
    """
    wrong = f"{folder}: the export is not whole"
    try:
        with torch.device("meta"):
            model = VidPrismForVideoClassification(VidPrismConfig.from_pretrained(folder, trust_remote_code=False))
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        written: dict[str, tuple[int, ...]] = {}
        for file in weights:
            with safe_open(file, framework="pt") as tensors:
                written |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        if (folder / WEIGHTS).is_file() and len(weights) > 1:
            raise PushError(f"{wrong}: weights in one file and in shards; export it again")
        if not (folder / WEIGHTS).is_file() and weights:
            listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            if {folder / name for name in listed.values()} != set(weights) or listed.keys() != written.keys():
                raise PushError(f"{wrong}: the shards are not those that {INDEX} lists; export it again")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise error if isinstance(error, UserError) else PushError(f"{wrong} ({first_line(error)})") from error
    if written != expected:
        names = sorted(name for name in written.keys() | expected.keys() if written.get(name) != expected.get(name))
        raise PushError(f"{wrong}: {len(names)} tensors are missing or wrong, such as {names[0]}; export it again")
