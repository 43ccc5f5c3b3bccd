"""Folders and files on disk, and in zip archives, which are read where they lie: nothing is ever unpacked."""

import os
import re
import stat
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, Union

from segformer.errors import UserError
from segformer.pixels import MAX_PIXELS

# of one member unpacked: the most pixels of an image that is opened by default, as uncompressed RGBA of 16 bits
MAX_BYTES = 8 * MAX_PIXELS

Place: TypeAlias = Union[Path, "Member"]


class Entry(NamedTuple):
    """What a folder holds: a folder, which a zip file is too, or a file."""

    name: str
    place: Place
    folder: bool


@dataclass(frozen=True, slots=True)
class Member:
    """A file or a folder in an archive; name: from the top of the archive, "" is the top itself."""

    archive: "Archive"
    name: str

    def __str__(self) -> str:
        return f"{self.archive.path}/{self.name}".removesuffix("/")

    def read_bytes(self) -> bytes:
        """The content; raises UserError where it is damaged, too large, or not there."""
        return self.archive.read(self.name)

    def stamp(self) -> str:
        """Text that changes when the content does."""
        info = self.archive.info(self.name)
        return f"{self.archive.path.absolute()}/{self.name}:{info.CRC:08x}:{info.file_size}"


class Archive:
    """A zip file, open once in each process that reads from it; it travels to another process as its path.

    Raises:
        UserError: it is no zip file, is truncated, or holds anything that no archive of images needs: names that lead
            out of it, links, encrypted members, one name twice, packing other than stored and deflated. Who made it
            meant harm or made a mistake, so that none of it is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: _Opened | None = _open(path)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_opened": None}

    def entries(self, folder: str) -> list[Entry]:
        """What a folder holds, by name; nothing where there is no such folder."""
        found = self._folders.get(folder, {})
        start = f"{folder}/" if folder else ""
        return [Entry(name, Member(self, start + name), found[name]) for name in sorted(found)]

    def is_file(self, name: str) -> bool:
        info = self._here().members.get(name)
        return info is not None and not info.is_dir()

    def info(self, name: str) -> zipfile.ZipInfo:
        info = self._here().members.get(name)
        if info is None:
            raise UserError(f"cannot read {self.path}/{name}: the archive has changed and holds it no more; start anew")
        return info

    def read(self, name: str) -> bytes:
        info = self.info(name)
        if info.file_size > MAX_BYTES:
            raise UserError(
                f"cannot read {self.path}/{name}: it would fill {info.file_size} bytes, "
                f"expected up to {MAX_BYTES} of a file in an archive; unpack the archive if you trust it"
            )
        try:
            with self._here().file.open(info) as file:
                content = file.read(info.file_size)  # what lies beyond the size it declares is not unpacked
            if len(content) < info.file_size:
                raise zipfile.BadZipFile("it ends too early")
        except Exception as error:  # zipfile and zlib raise whatever a damaged archive leads them to
            raise UserError(f"cannot read {self.path}/{name}: {_reason(error)}; copy the archive again") from error
        return content

    def _here(self) -> "_Opened":
        """The archive as this very process opened it: two that share one file handle move each other's place in it."""
        opened = self._opened
        if opened is None or opened.process != os.getpid():
            opened = self._opened = _open(self.path)
        return opened

    @cached_property
    def _folders(self) -> dict[str, dict[str, bool]]:
        """Of each folder what it holds, and whether that is a folder."""
        folders: dict[str, dict[str, bool]] = {"": {}}
        for name, info in self._here().members.items():
            is_folder = info.is_dir()
            while name:
                parent, _, own = name.rpartition("/")
                known = own in folders.setdefault(parent, {})
                folders[parent][own] = is_folder or folders[parent].get(own, False)
                if known:
                    break
                name, is_folder = parent, True  # noqa: PLW2901 (climbs: archives need not list their folders)
        return folders


class _Opened(NamedTuple):
    process: int
    file: zipfile.ZipFile
    members: dict[str, zipfile.ZipInfo]


def folder_at(path: Path) -> Place | None:
    """The folder at a path, of which a part may be a zip file; None where there is none."""
    if os.path.isdir(path):
        return path
    archive = next((parent for parent in (path, *path.parents) if _is_zip(parent)), None)
    if archive is None:
        return None
    found: Place | None = Member(_archive(archive), "")
    for name in path.relative_to(archive).parts:
        found = found and child(found, name)
    return None if found is None or _is_file(found) else found


def entries(folder: Place) -> list[Entry]:
    """What a folder or zip file holds, by name; nothing where there is no such folder.

    Raises:
        UserError: a folder that may not be read, which `Path.glob` would take for an empty one.
    """
    if isinstance(folder, Member):
        return folder.archive.entries(folder.name)
    if _is_zip(folder):
        return _archive(folder).entries("")
    try:
        with os.scandir(folder) as found:
            return sorted(Entry(one.name, folder / one.name, _is_folder(one)) for one in found)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"cannot read folder {folder}: {error.strerror}; make it readable") from error


def child(folder: Place, name: str) -> Place | None:
    """What a folder or zip file holds under a name, in either of the two spellings that Unicode has for one name."""
    if isinstance(folder, Path) and not _is_zip(folder):
        try:
            os.lstat(folder / name)
            return folder / name
        except (FileNotFoundError, NotADirectoryError):
            if name.isascii():
                return None
        except OSError as error:
            raise UserError(f"cannot read folder {folder}: {error.strerror}; make it readable") from error
    return next((entry.place for entry in entries(folder) if composed(entry.name) == composed(name)), None)


def walk(folder: Place, parts: list[str], above: str = "") -> Iterator[tuple[str, Place]]:
    """Files that match a pattern of names and stars, each with its name from the first folder on; no hidden ones."""
    first, *rest = parts
    if "*" in first:
        matching = [
            (name, place)
            for name, place, is_folder in entries(folder)
            if name[0] != "." and fnmatchcase(composed(name), first) and (rest or not is_folder)
        ]
    else:
        found = child(folder, first)
        matching = [] if found is None or not (rest or _is_file(found)) else [(first, found)]
    for name, place in matching:
        if rest:
            yield from walk(place, rest, f"{above}{name}/")
        else:
            yield above + name, place


def composed(name: str) -> str:
    """One of the two spellings that Unicode has for a name; archives made on a Mac hold the other one."""
    return unicodedata.normalize("NFC", name)


def _is_zip(path: Path) -> bool:
    return path.name[-4:].lower() == ".zip" and os.path.isfile(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir() or (entry.name[-4:].lower() == ".zip" and entry.is_file())
    except OSError:  # a link that leads nowhere: told when it is opened, by its own name
        return False


def _is_file(found: Place) -> bool:
    return found.archive.is_file(found.name) if isinstance(found, Member) else found.is_file()


def _archive(path: Path) -> Archive:
    status = path.stat()
    return _shared(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=16)
def _shared(path: Path, modified: int, size: int) -> Archive:
    """One archive for all patterns and splits that read from it, as long as the file stays what it is."""
    return Archive(path)


def _open(path: Path) -> _Opened:
    try:
        file = zipfile.ZipFile(path)
    except Exception as error:  # as above
        raise UserError(f"cannot open archive {path}: {_reason(error)}; copy or download it again") from error
    members: dict[str, zipfile.ZipInfo] = {}
    try:
        for info in file.infolist():
            _require_harmless(path, info)
            name = "/".join(part for part in _name(info).split("/") if part not in ("", "."))
            if name in members:
                raise UserError(f"archive {path}: member {name!r} is in it twice, expected different names: {_ANEW}")
            if name and name.split("/")[0] != "__MACOSX":  # a Mac's notes on its files
                members[name] = info
    except UserError:
        file.close()
        raise
    return _Opened(os.getpid(), file, members)


_ANEW = "make the archive anew, from the files"


def _require_harmless(path: Path, info: zipfile.ZipInfo) -> None:
    names = [name.replace("\\", "/") for name in (info.orig_filename, info.filename)]
    kind = stat.S_IFMT(info.external_attr >> 16)
    if any(re.match("/|[A-Za-z]:", name) or "\0" in name or ".." in name.split("/") for name in names):
        trouble = f"is no plain name below its top: {_ANEW}"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        trouble = f"is a link or a device, expected files and folders: {_ANEW}"
    elif info.flag_bits & 1:
        trouble = "is encrypted: unpack the archive with its password and give the folder"
    elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the others are unpacked without bound
        trouble = f"is packed by method {info.compress_type}, expected stored or deflated: {_ANEW}"
    else:
        return
    raise UserError(f"archive {path}: member {info.orig_filename!r} {trouble}")


def _name(info: zipfile.ZipInfo) -> str:
    """The name as it was meant: archives made on a Mac hold UTF-8 without saying so, some of Windows backslashes."""
    name = info.filename.replace("\\", "/")
    try:
        return name if info.flag_bits & 0x800 else name.encode("cp437").decode()
    except UnicodeError:
        return name


def _reason(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "permission denied"
    return " ".join(str(error).split()) or type(error).__name__
