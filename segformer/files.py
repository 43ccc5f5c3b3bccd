"""Files and folders: where a source lies, and writing that leaves nothing half done."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from segformer.errors import UserError

WEIGHTS = {".bin", ".ckpt", ".h5", ".pt", ".pth", ".safetensors"}  # endings that are no part of a hub id


def locate(source: str | os.PathLike[str], wanted: Sequence[str], hub: Mapping[str, Any] | None = None) -> Path:
    """The local folder `source`, or the snapshot folder of the hub id `owner/name`.

    wanted: the file names to download where they exist; of a local folder nothing is asked. hub: keywords of
    huggingface_hub's `snapshot_download`, such as `revision` and `token`.

    Raises:
        UserError: neither a folder nor a hub id, or the hub cannot be reached.
    """
    path, name = Path(source), str(source)
    if path.is_dir():
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix in WEIGHTS:
        raise UserError(f"no checkpoint at {name}: expected a folder, a checkpoint file or a hub id owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(wanted), **(hub or {})))
    except Exception as error:  # offline, unknown repository, no access, no space: each a type of its own
        raise UserError(f"cannot fetch {name} from the hub ({reason(error)}): pass a local folder instead") from error


def absolute(source: str) -> str:
    """A local path, which may lead into an archive, made absolute; a hub id as it is."""
    path = Path(os.path.abspath(os.path.expanduser(source)))
    inside = any(above.suffix.lower() == ".zip" and above.is_file() for above in path.parents)
    return str(path) if path.exists() or inside else source


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested without end
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected an object of settings")
    return values


def to_json(values: Mapping[str, Any]) -> str:
    """Sorted and indented; what JSON cannot hold (a keyword nobody knows may be anything) as its text."""
    return json.dumps(values, indent=2, sort_keys=True, default=str) + "\n"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes `to_json` of the values, atomically."""
    write_atomically(path, lambda file: file.write(to_json(values).encode()))


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], before_replacing: Callable[[Path], object] | None = None
) -> None:
    """Writes a file that is either whole or as it was: temporary file beside it, flush, fsync, replace.

    before_replacing: called with the path once the new file is safe on the disk, if the present one shall be kept.
    """
    # several processes may write the same file; and its own name may be as long as a name can be
    temporary = path.with_name(f".{uuid4().hex[:8]}{path.suffix[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before_replacing:
            before_replacing(path)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)  # a full disk does not say which file had no room
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes the new name survive a power failure, where the system can."""
    with suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def new_folder(parent: Path) -> Path:
    """Makes `parent/timestamp`, never one that exists."""
    stamp = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    for attempt in ("", *(f"_{number}" for number in range(2, 1000))):
        folder = parent / (stamp + attempt)
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise FileExistsError(folder)


def reason(error: Exception) -> str:
    """The first line of an error of a library."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
