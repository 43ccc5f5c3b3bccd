"""What a result goes back to: command, versions, machine, the state of the code, the data."""

import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from segformer.data.archives import Member
from segformer.data.hub import Cell, Column
from segformer.data.samples import Elsewhere, Samples, Stream
from segformer.secrets import redacted_arguments

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
