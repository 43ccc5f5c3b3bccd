"""What a result goes back to: command, versions, machine, the state of the code, the data; and no secret of anyone."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from segformer.data.archives import Member
from segformer.data.hub import Cell, Column
from segformer.data.samples import Elsewhere, Samples, Stream

REDACTED = "<redacted>"
PACKAGES = (
    "segformer",
    "torch",
    "lightning",
    "torchvision",
    "torchmetrics",
    "triton",
    "numpy",
    "albumentations",
    "opencv-python-headless",
    "pillow",
    "datasets",
    "hydra-core",
    "omegaconf",
    "huggingface-hub",
    "safetensors",
    "wandb",
    "tensorboard",
    "mlflow-skinny",
)
GIT_SECONDS = 5  # for all that git is asked: it may look at every file of a folder on a slow network disk
SIZED = 20_000  # samples of which file sizes count in a fingerprint: a million files on a network disk take minutes

_SECRET = re.compile(
    r"\w*(token|secrets?|passwords?|passwd|passphrase|apikeys?)|key|pwd|credentials?|auth(entication|orization)?|bearer"
)
_SECRET_PAIRS = {(kind, key) for kind in ("access", "api", "private", "secret") for key in ("key", "keys")}
_SIGNED = {"sig", "signature"}  # of an address that opens a file without a password
_NAMED = re.compile(r"([\w.@-]+)[\"']?\s*[:=]")
_QUERY = re.compile(r"(?<=[?&])(?P<key>[\w.-]+)=(?P<value>[^\s&#]+)")
# up to the last @ before the path; a password that holds a slash is told from a port by not being a number
_USER = re.compile(r"(?<=://)(?:[^\s/?#]*@|[^\s/?#:@]+:(?!\d+(?:/|$))[^\s@]+@)")


def redacted(values: Any) -> Any:
    """A copy of nested plain values in which every secret reads "<redacted>".

    A secret is the text or number under a key that names one, and whatever lies below such a key: `api_key`, `apiKey`,
    `hf-token`, `password`, `auth`, a `key` of any kind, but not `monitor`, `tokens_per_batch` or `keyframe`. Users and
    passwords in addresses are removed from every text. Switches, null and empty text stay.
    """
    return _redacted(values, secret=False)


def redacted_arguments(arguments: Sequence[str]) -> list[str]:
    """The same for the words of a command line: `logger.wandb.api_key=abc`, `+a={token:abc}`, `--token abc`.

    Of a value that holds a secret somewhere nothing is kept.
    """
    hidden: list[str] = []
    for previous, word in pairwise(["", *arguments]):
        key, sign, value = word.partition("=")
        if any(names_secret(match[1]) for match in _NAMED.finditer(word)):
            hidden.append(f"{key}={REDACTED}" if sign and value and not _NAMED.search(key) else REDACTED)
        elif previous.startswith("-") and "=" not in previous and names_secret(previous):
            hidden.append(REDACTED)
        else:
            hidden.append(_without_address(word))
    return hidden


def names_secret(key: str) -> bool:
    """Whether a key names a secret, by its words: parts between _ and -, and between small and capital letters."""
    words = re.findall("[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", key).lower())
    return any(_SECRET.fullmatch(word) for word in words) or not _SECRET_PAIRS.isdisjoint(pairwise(words))


def _redacted(values: Any, secret: bool) -> Any:
    if isinstance(values, Mapping):
        return {key: _redacted(value, secret or names_secret(str(key))) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_redacted(value, secret) for value in values]
    if secret and not isinstance(values, bool) and values not in (None, ""):
        return REDACTED
    return _without_address(values) if isinstance(values, str) else values


def _without_address(text: str) -> str:
    """Without users, passwords and keys in the addresses that it holds."""
    if "://" not in text:
        return text
    return _QUERY.sub(_without_query_value, _USER.sub(f"{REDACTED}@", text))


def _without_query_value(match: re.Match[str]) -> str:
    secret = names_secret(match["key"]) or not _SIGNED.isdisjoint(re.split("[^a-z]", match["key"].lower()))
    return f"{match['key']}={REDACTED}" if secret else match[0]


def provenance(data: Any) -> dict[str, Any]:
    """What can be told of a run that starts now, as plain values; what is unknown is None.

    data: a data module whose splits are opened: `datasets` by split, and their `root`. Asks for the names of GPUs, so
    it is called in the process that uses them, not in one that forks.
    """
    return {
        "command": shlex.join(redacted_arguments(sys.argv)),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": {"name": _cpu(), "cores": os.cpu_count()},
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "git": git_state(Path(__file__).parent),
        "data": {split: fingerprint(dataset, data.root) for split, dataset in data.datasets.items()},
    }


def versions() -> dict[str, str | None]:
    """Of Python, CUDA and the packages a result may hang on, as they are installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """{"commit": hash, "dirty": whether tracked files differ from it}; None where the code is in no repository."""
    until = monotonic() + GIT_SECONDS
    try:
        # a package that is installed somewhere inside a repository of another project is not of its commit
        _git(folder, until, "ls-files", "--error-unmatch", ".")
        commit = _git(folder, until, "rev-parse", "HEAD")
        dirty = bool(_git(folder, until, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):  # no git, no repository, not ours to read, too slow
        return None
    return {"commit": commit, "dirty": dirty}


def _git(folder: Path, until: float, *words: str) -> str:
    return subprocess.run(
        ["git", *words],
        cwd=folder,
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},  # whoever works in the repository is not disturbed
        capture_output=True,
        text=True,
        check=True,
        timeout=max(until - monotonic(), 0.01),
    ).stdout.strip()


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def fingerprint(dataset: Any, root: str | Path | None) -> dict[str, Any]:
    """{"samples": how many, "sha256": of their names below `root` and the sizes of their files}; None = nobody knows.

    Equal in a copy of the folder, and in a zip file of it; the bytes of the files are not read. Of more than `SIZED`
    samples every second, third, ... one counts with its sizes, all of them with their names. Rows of a table count by
    the size of the whole table, samples without files by their names, a stream by its length alone. dataset: one of
    the data module's, or a source.
    """
    if isinstance(dataset, Stream):
        return {"samples": dataset.known_length(), "sha256": None}
    source, digest, count = getattr(dataset, "source", dataset), sha256(), len(dataset)
    base, step = f"{Path(root).expanduser()}{os.sep}" if root else "", -(-count // SIZED)
    try:
        for index in range(count):
            for name, size in _files(source, index, sized=index % step == 0):
                relative = name.removeprefix(base).replace(os.sep, "/")
                digest.update(f"{relative}\0{size}\n".encode(errors="surrogateescape"))
    except Exception:  # of a class of the user's own, which may have no names or raise whatever it likes
        return {"samples": count, "sha256": None}
    return {"samples": count, "sha256": digest.hexdigest()}


def _files(source: Any, index: int, sized: bool) -> list[tuple[str, int | None]]:
    """The names of a sample's files with their bytes."""
    while isinstance(source, Elsewhere):
        source, index = source.at(index)
    if isinstance(source, Samples):
        files = [file for file in source.files[index] if file is not None]
    elif hasattr(source, "file"):  # an image whose class is its folder
        files = [source.file(index)]
    else:
        return [(source.name(index), None)]
    return [
        (f"{file.column.name}[{file.index}]", _table_bytes(file.column))
        if isinstance(file, Cell)
        else (str(file), _bytes(file) if sized else None)
        for file in files
    ]


def _bytes(file: Any) -> int | None:
    if isinstance(file, Member):
        return file.archive.info(file.name).file_size
    try:
        return os.stat(file).st_size
    except (OSError, TypeError):  # it went away since the folder was listed; it is no path
        return None


@lru_cache(maxsize=8)
def _table_bytes(column: Column) -> int | None:
    size: int | None = getattr(getattr(column.values, "data", None), "nbytes", None)
    return size
