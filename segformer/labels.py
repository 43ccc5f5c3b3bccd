"""What a mask is: raw ids in a file -> train ids 0..K-1 through one lookup table, 255 = ignore."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from segformer.errors import UserError
from segformer.pixels import MAX_PIXELS, opened

IGNORE = 255
MAX_CLASSES = 255  # ids 0..254 fit a byte beside the ignore value
_UNDECLARED = -1
_RAW_VALUES = 65536  # masks hold 8 or 16 bits


@dataclass(frozen=True)
class Classes:
    """The label contract of a dataset.

    names: K class names in train-id order. colors: (K, 3) uint8 RGB. lookup: (65536,) int16 from raw mask value to
    train id, 255 where ignored, -1 where the contract says nothing (which is an error when met in a mask).
    """

    names: tuple[str, ...]
    colors: np.ndarray
    lookup: np.ndarray

    @classmethod
    def from_config(
        cls, classes: Sequence[str] | Mapping[str, Any], ignore: Sequence[int] | str = (IGNORE,)
    ) -> "Classes":
        """`classes` is a list of names (raw value = index) or {name: {color: [r, g, b], ids: [raw, ...]}}.

        `ignore` lists the raw values that count as "no label", or is "rest": every value not listed.
        """
        if not isinstance(classes, Sequence | Mapping) or isinstance(classes, str):
            raise UserError(
                f"data.classes is {classes!r}, expected a list of names or {{name: {{color: ..., ids: ...}}}}"
            )
        table = classes if isinstance(classes, Mapping) else dict.fromkeys(classes)
        if not 1 <= len(table) <= MAX_CLASSES or len(table) != len(classes):
            raise UserError(f"data.classes holds {len(classes)} names, expected 1 to {MAX_CLASSES} different ones")
        palette = distinct_colors(len(table))
        lookup = np.full(_RAW_VALUES, IGNORE if ignore == "rest" else _UNDECLARED, np.int16)
        if ignore != "rest":
            lookup[_raw_ids("data.ignore", ignore)] = IGNORE
        taken: dict[int, str] = {}
        for index, (name, value) in enumerate(table.items()):
            entry = value or {}
            if not isinstance(entry, Mapping):
                raise UserError(f"data.classes.{name} is {entry!r}, expected {{color: [r, g, b], ids: [raw, ...]}}")
            if unknown := set(entry) - {"color", "ids"}:
                raise UserError(f"data.classes.{name} has the key {sorted(unknown)[0]!r}, expected color and ids")
            for raw in _raw_ids(f"data.classes.{name}.ids", entry.get("ids", [index])):
                if raw in taken:
                    raise UserError(
                        f"raw mask value {raw} is claimed by both {taken[raw]!r} and {name!r} in data.classes"
                    )
                taken[raw] = str(name)
                lookup[raw] = index
            color = entry.get("color", palette[index].tolist())
            if not isinstance(color, Sequence) or len(color) != 3 or any(byte not in range(256) for byte in color):
                raise UserError(f"data.classes.{name}.color is {color!r}, expected [red, green, blue] from 0 to 255")
            palette[index] = color
        return cls(tuple(str(name) for name in table), palette, lookup)

    def __len__(self) -> int:
        return len(self.names)

    def require(self, names: Iterable[str], source: object) -> None:
        """Raises UserError unless `source` was trained on these very classes, in this order."""
        found = tuple(names)
        if len(found) != len(self):
            raise UserError(
                f"{source} has {len(found)} classes, the data {len(self)}: give the dataset it was trained on"
            )
        for index, (theirs, ours) in enumerate(zip(found, self.names, strict=True)):
            if theirs != ours:
                raise UserError(
                    f"class {index} is {theirs!r} in {source} but {ours!r} in the data: give the same classes"
                )

    def encode(self, raw: np.ndarray, indices: bool = False) -> np.ndarray:
        """(H, W) raw ids -> (H, W) uint8 train ids with 255 = ignore; `indices`: the mask holds train ids already.

        Raises:
            UndeclaredValues: the mask holds values that the contract does not declare.
        """
        mask = (self._indices if indices else self.lookup)[raw]
        if (mask == _UNDECLARED).any():
            raise UndeclaredValues(raw[mask == _UNDECLARED], mask.size)
        return mask.astype(np.uint8)

    @cached_property
    def _indices(self) -> np.ndarray:
        lookup = np.full(_RAW_VALUES, _UNDECLARED, np.int16)
        lookup[: len(self)], lookup[IGNORE] = np.arange(len(self)), IGNORE
        return lookup

    def looks_encoded(self, raw: np.ndarray) -> bool:
        """Whether a mask holds train ids by the look of it: 255 as ignore and nothing else beyond the classes."""
        return bool((raw == IGNORE).any() and not ((raw >= len(self)) & (raw != IGNORE)).any())


class UndeclaredValues(UserError):
    """Values of one mask that no class declares; the message says which and how much of the mask they fill."""

    def __init__(self, pixels: np.ndarray, size: int) -> None:
        values = np.unique(pixels)
        listed = ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
        super().__init__(f"{listed} in {pixels.size} of {size} pixels")


def read_mask(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A mask file as raw ids (H, W), uint8 or uint16. Palette PNGs are read as indices, never as colours.

    Pillow only: OpenCV turns palette indices into grey levels and 16-bit ids into 8-bit ones.

    Raises:
        UserError: the file is missing, empty, truncated, too large, or holds colours instead of ids.
    """
    with opened("mask", path, max_pixels) as image:
        if image.mode not in ("L", "P", "1", "I") and not image.mode.startswith("I;16"):
            raise UserError(
                f"mask {path} is a {image.mode} image, expected one channel of class ids: "
                "save it as an 8-bit or 16-bit grey or palette PNG"
            )
        raw = np.array(image)
        if image.format == "PNG" and image.mode == "L" and (bits := _png_depth(path)) < 8:
            raw //= 255 // (2**bits - 1)  # Pillow stretches 2 and 4 bits to bytes
    if raw.dtype == np.int32:  # Pillow widens some 16-bit files
        if raw.min() < 0 or raw.max() >= _RAW_VALUES:
            raise UserError(
                f"mask {path} holds values from {raw.min()} to {raw.max()}, expected 0 to {_RAW_VALUES - 1}"
            )
        return raw.astype(np.uint16)
    return raw.astype(np.uint8 if raw.itemsize == 1 else np.uint16)


def _png_depth(path: Path) -> int:
    with path.open("rb") as file:
        return file.read(25)[24]  # after the signature, chunk length and name, width and height


def distinct_colors(count: int) -> np.ndarray:
    """(count, 3) uint8: the bit-reversal palette of Pascal VOC, without its black first entry."""
    ids = np.arange(1, count + 1)
    colors = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colors


def _raw_ids(where: str, ids: Any) -> list[int]:
    if (
        not isinstance(ids, Sequence)
        or isinstance(ids, str)
        or any(not isinstance(raw, int) or not 0 <= raw < _RAW_VALUES for raw in ids)
    ):
        raise UserError(f"{where} is {ids!r}, expected a list of raw mask values from 0 to {_RAW_VALUES - 1}")
    return list(ids)
