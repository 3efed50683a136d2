"""What tests do as clients of the test Hub: raw requests, pushes from another process, comparisons."""

import http.client
import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in Path(folder).rglob("*") if file.is_file() and ".cache" not in file.parts)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def published(api, name, folder, revision=None) -> dict[str, bytes]:
    """What a client downloads, without the file that the Hub adds itself."""
    found = contents(api.snapshot_download(name, revision=revision, cache_dir=folder))
    found.pop(".gitattributes", None)
    return found


def ask(url: str, method: str = "GET", body=None, token: str | None = None, timeout: float = 10, **headers):
    """A raw request: status, headers, body."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=timeout)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection.request(method, parts.path + ("?" + parts.query if parts.query else ""), body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def refused(call, error=HfHubHTTPError) -> tuple[int, str | None]:
    """Status and X-Error-Code of a refusal."""
    with pytest.raises(error) as caught:
        call()
    return caught.value.response.status_code, caught.value.response.headers.get("X-Error-Code")


def add(path: str, content: bytes = b"text") -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, content)]


PUSH = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("alice/m", exist_ok=True)
print(api.upload_folder(repo_id="alice/m", folder_path=sys.argv[1]).oid)
"""


def push(hub, token, folder, home, xet=False) -> subprocess.Popen:
    """Push from another process."""
    environment = hub.environment(home, token, xet) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", PUSH, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
