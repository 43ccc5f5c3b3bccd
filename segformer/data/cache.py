"""Decoded samples in a folder: what a PNG costs to decode is paid once, and a crop then reads only its own pixels."""

import shutil
import tempfile
import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from segformer.data.samples import Elsewhere, Source, require_equal_sizes
from segformer.errors import UserError
from segformer.files import reason, write_atomically

DECODING = 1  # raised when what `pixels` and `labels` read from the same file changes
SPARE = 2**30  # bytes that are left for what a run itself writes


class Cached(Elsewhere):
    """A source whose images and raw masks are decoded once and then mapped from `folder`, read-only.

    A sample is found again by its stamp, so a changed file is decoded anew, and a source without stamps is not cached.
    Length and header of what lies in the folder are checked at each access, and what is damaged is written again.
    Several processes may share the folder. A full disk ends the writing with one warning, not the run.

    Raises:
        UserError: the folder cannot be made or written to.
    """

    def __init__(self, source: Source, folder: Path) -> None:
        self.source, self.folder, self.labelled = source, folder, source.labelled
        self._stopped = torch.zeros(1).share_memory_()  # type: ignore[no-untyped-call]  # by all data workers
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(
                f"data.cache={folder} cannot be written ({(error.strerror or '').lower()}), expected a folder with "
                "space for the decoded samples: give another one, or data.cache=null"
            ) from error

    def __len__(self) -> int:
        return len(self.source)

    def at(self, index: int) -> tuple[Source, int]:
        return self.source, index

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        stamp = self.stamp(index)
        if stamp is None:
            return self.source[index]
        image, mask = self._kept("image", index, stamp), self._kept("mask", index, stamp)
        require_equal_sizes(image, mask, self.name(index), self.mask_name(index))
        return image, mask

    def mask(self, index: int) -> np.ndarray:
        return self._kept("mask", index, self.stamp(index))

    def image(self, index: int) -> np.ndarray:
        return self._kept("image", index, self.stamp(index))

    def _kept(self, what: str, index: int, stamp: str | None) -> np.ndarray:
        decode: Callable[[int], np.ndarray] = getattr(self.source, what)
        if stamp is None:
            return decode(index)
        path = self.folder / f"{sha256(repr((DECODING, what, stamp)).encode()).hexdigest()[:40]}.npy"
        array = _mapped(path)
        if array is None:
            array = decode(index)
            self._write(path, array)
        return array

    def _write(self, path: Path, array: np.ndarray) -> None:
        if self._stopped:
            return
        try:
            disk = shutil.disk_usage(self.folder)
            if disk.free < min(SPARE, disk.total // 20):
                raise OSError("its disk is all but full")
            write_atomically(path, lambda file: np.save(file, np.ascontiguousarray(array), allow_pickle=False))
        except OSError as error:
            self._stopped.fill_(1)
            warnings.warn(
                f"cannot write to data.cache={self.folder} ({reason(error)}): the samples that are not in it are "
                "decoded each time; make space on its disk, or give another folder",
                stacklevel=2,
            )


def _mapped(path: Path) -> np.ndarray | None:
    """The array in a file, read-only and unread as yet; None where there is none, or not all of it."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        whole = array.offset + array.nbytes == path.stat().st_size
    except Exception:  # no file, or whatever a damaged one leads to
        return None
    return array if whole and array.dtype in (np.uint8, np.uint16) and array.ndim in (2, 3) else None
