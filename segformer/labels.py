"""What a mask is: raw ids in a file -> train ids 0..K-1 through one lookup table, 255 = ignore."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import cv2
import numpy as np

from segformer.errors import UserError
from segformer.pixels import MAX_PIXELS, Readable, decoded_fast, header, upright

IGNORE = 255
MAX_CLASSES = 255  # ids 0..254 fit a byte beside the ignore value
_UNDECLARED = -1
_SPARE = 254  # stands for undeclared where a byte has room for it
_RAW_VALUES = 65536  # masks hold 8 or 16 bits
_COLORS = 2**24


@dataclass(frozen=True)
class Classes:
    """The label contract of a dataset.

    names: K class names in train-id order. colors: (K, 3) uint8 RGB. lookup: int16 from raw mask value to train id, 255
    where ignored, -1 where the contract says nothing (which is an error when met in a mask); (65536,) where masks hold
    ids, (2**24,) where they hold colours, whose value is 0xRRGGBB. categories: of each class, where the dataset groups
    them. instance_sizes: mean pixels of an instance, of the classes that have instances (Cityscapes' iIoU).
    """

    names: tuple[str, ...]
    colors: np.ndarray
    lookup: np.ndarray
    categories: Mapping[str, str] = field(default_factory=dict)
    instance_sizes: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_config(
        cls,
        classes: Sequence[str] | Mapping[str, Any],
        ignore: Sequence[Any] | str = (IGNORE,),
        mask_values: str = "ids",
        reduce_zero_label: bool = False,
    ) -> "Classes":
        """`classes` is a list of names (raw value = index) or {name: {color: [r, g, b], ids: [raw, ...]}}.

        A class may also have a `category` (then every one has) and an `instance_size`.

        mask_values: what masks hold: "ids", or "colors", of which a class has its `color` or lists several `colors`.
        ignore: the raw values (or colours) that count as "no label", or "rest": every value not listed.
        reduce_zero_label: raw value = index + 1, and 0 counts as "no label", for classes without ids of their own.
        """
        if not isinstance(classes, Sequence | Mapping) or isinstance(classes, str):
            raise UserError(
                f"data.classes is {classes!r}, expected a list of names or {{name: {{color: ..., ids: ...}}}}"
            )
        table = classes if isinstance(classes, Mapping) else dict.fromkeys(classes)
        if not 1 <= len(table) <= MAX_CLASSES or len(set(map(str, table))) != len(classes):
            raise UserError(f"data.classes holds {len(classes)} names, expected 1 to {MAX_CLASSES} different ones")
        if mask_values not in ("ids", "colors"):
            raise UserError(f"data.mask_values is {mask_values!r}, expected ids or colors")
        entries = {str(name): _entry(str(name), value, mask_values) for name, value in table.items()}
        palette = distinct_colors(len(entries))
        for index, (name, entry) in enumerate(entries.items()):
            if "color" in entry:
                palette[index] = _color(f"data.classes.{name}.color", entry["color"])
            elif "colors" in entry:
                palette[index] = _color(f"data.classes.{name}.colors", next(iter(entry["colors"] or ()), None))
        names = tuple(entries)
        groups = _groups(entries)
        if mask_values == "colors":
            if reduce_zero_label:
                raise UserError("data.reduce_zero_label is for masks of ids, but data.mask_values is colors")
            return cls(names, palette, _lookup(_COLORS, _colors_of(entries, palette), ignore, "color"), *groups)
        if reduce_zero_label and any("ids" in entry for entry in entries.values()):
            raise UserError(
                "data.reduce_zero_label counts from the place in the list: leave out the ids of data.classes"
            )
        ids = {
            name: _raw_ids(f"data.classes.{name}.ids", entry.get("ids", [index + reduce_zero_label]))
            for index, (name, entry) in enumerate(entries.items())
        }
        if reduce_zero_label and ignore != "rest":
            ignore = [*_raw_ids("data.ignore", ignore), 0]
        return cls(names, palette, _lookup(_RAW_VALUES, ids, ignore, "raw mask value"), *groups)

    @property
    def of_colors(self) -> bool:
        """Whether masks hold colours."""
        return len(self.lookup) == _COLORS

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
        """Raw ids (H, W) or colours (H, W, 3) -> (H, W) uint8 train ids with 255 = ignore.

        indices: the mask holds train ids already.

        Raises:
            UndeclaredValues: the mask holds values that the contract does not declare.
            WrongKind: the mask holds colours where ids are declared, or ids where colours are.
        """
        raw = self.values(raw, indices)
        if raw.dtype == np.uint8 and len(self) < _SPARE:
            mask = cv2.LUT(raw, self._bytes[indices])
            undeclared = mask == _SPARE
        else:
            wide = (self._indices if indices else self.lookup)[raw]
            mask, undeclared = wide.astype(np.uint8), wide == _UNDECLARED
        if undeclared.any():
            raise UndeclaredValues(raw[undeclared], mask.size, colors=self.of_colors and not indices)
        return mask

    def values(self, raw: np.ndarray, indices: bool = False) -> np.ndarray:
        """(H, W) values as `lookup` is asked for them: ids as they are, colours as int32 0xRRGGBB.

        Raises:
            WrongKind: see `encode`.
        """
        wanted = self.of_colors and not indices
        if raw.ndim == 2 and wanted:
            raise WrongKind("holds ids, expected colours: add data.mask_values=ids")
        if wanted:
            return raw[..., 0].astype(np.int32) << 16 | raw[..., 1].astype(np.int32) << 8 | raw[..., 2]
        if (one := one_channel(raw)) is None:
            raise WrongKind(
                "holds RGB colours, expected one channel of class ids: save it as an 8-bit or 16-bit grey or palette "
                "PNG, or give each class its color and add data.mask_values=colors"
            )
        return one

    @cached_property
    def _bytes(self) -> tuple[np.ndarray, np.ndarray]:
        """Of raw values and of train ids: the lookup of a byte as bytes."""
        raw, indices = (np.where(table == _UNDECLARED, _SPARE, table) for table in (self.lookup[:256], self._indices))
        return raw.astype(np.uint8), indices[:256].astype(np.uint8)

    @cached_property
    def _indices(self) -> np.ndarray:
        lookup = np.full(_RAW_VALUES, _UNDECLARED, np.int16)
        lookup[: len(self)], lookup[IGNORE] = np.arange(len(self)), IGNORE
        return lookup

    def looks_encoded(self, raw: np.ndarray) -> bool:
        """Whether a mask holds train ids by the look of it: 255 as ignore and nothing else beyond the classes.

        Not told where some train id is no raw value at all, so that the contract itself would refuse such masks.
        """
        if (self.lookup[: len(self)] == _UNDECLARED).any():
            return False
        return bool((raw == IGNORE).any() and not ((raw >= len(self)) & (raw != IGNORE)).any())


class WrongKind(UserError):
    """A mask of colours where ids are declared, or of ids where colours are."""


class UndeclaredValues(UserError):
    """Values of one mask that no class declares; the message says which and how much of the mask they fill."""

    def __init__(self, pixels: np.ndarray, size: int, colors: bool = False) -> None:
        values = np.unique(pixels)
        listed = ", ".join(map(rgb if colors else str, values[:5].tolist())) + (", ..." if len(values) > 5 else "")
        super().__init__(f"{listed} in {pixels.size} of {size} pixels")


def rgb(value: int) -> str:
    """0xRRGGBB as a configuration writes it: [r, g, b]."""
    return str([value >> 16, value >> 8 & 255, value & 255])


def read_mask(file: Readable, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A mask file as raw ids (H, W), uint8 or uint16, or as RGB uint8 (H, W, 3) where it holds colours.

    Palette PNGs are read as indices, never as colours. What Pillow's header does not call 8-bit grey or RGB is decoded
    by Pillow too: OpenCV turns palette indices into grey levels and 16-bit ids into 8-bit ones.

    Raises:
        UserError: the file is missing, empty, truncated, too large, or of a kind that is no mask.
    """
    with header("mask", file, max_pixels) as (image, data):
        flag = cv2.IMREAD_COLOR_RGB if image.mode == "RGB" else cv2.IMREAD_GRAYSCALE
        pixels = decoded_fast(image, data, flag)
        if pixels is not None:
            return pixels
        bits = data[24] if image.format == "PNG" else 8  # after the signature, chunk length and name, width and height
        upright(image)
        if image.mode == "RGBA" and np.ptp(np.array(image.getchannel("A"))) > 0:
            raise UserError(
                f"mask {file} is partly transparent, so what it means is not told by its colours: "
                "save it without alpha, as ids or as colours"
            )
        if image.mode in ("RGB", "RGBA"):
            return np.array(image.convert("RGB"))
        if image.mode not in ("L", "P", "1", "I") and not image.mode.startswith("I;16"):
            raise UserError(
                f"mask {file} is a {image.mode} image, expected one channel of class ids: "
                "save it as an 8-bit or 16-bit grey or palette PNG"
            )
        raw = np.array(image)
        if image.mode == "L" and bits < 8:
            raw //= 255 // (2**bits - 1)  # Pillow stretches 2 and 4 bits to bytes
    if raw.dtype == np.int32:  # Pillow widens some 16-bit files
        if raw.min() < 0 or raw.max() >= _RAW_VALUES:
            raise UserError(
                f"mask {file} holds values from {raw.min()} to {raw.max()}, expected 0 to {_RAW_VALUES - 1}"
            )
        return raw.astype(np.uint16)
    return raw.astype(np.uint8 if raw.itemsize == 1 else np.uint16)


def palette(file: Readable) -> np.ndarray | None:
    """(N, 3) uint8 colours of a mask file that has a palette, by index; None of any other."""
    with suppress(UserError), header("mask", file, MAX_PIXELS) as (image, _):
        colors = image.getpalette("RGB") if image.mode == "P" else None
        return None if colors is None else np.array(colors, np.uint8).reshape(-1, 3)
    return None


def distinct_colors(count: int) -> np.ndarray:
    """(count, 3) uint8: the bit-reversal palette of Pascal VOC, without its black first entry."""
    ids = np.arange(1, count + 1)
    colors = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colors


def one_channel(raw: np.ndarray) -> np.ndarray | None:
    """(H, W) ids; three equal channels hold ids too, which someone saved as RGB. None where they differ."""
    if raw.ndim == 3 and ((raw[..., 0] != raw[..., 1]).any() or (raw[..., 0] != raw[..., 2]).any()):
        return None
    return np.ascontiguousarray(raw if raw.ndim == 2 else raw[..., 0])


def _entry(name: str, value: Any, mask_values: str) -> Mapping[str, Any]:
    entry = value or {}
    if not isinstance(entry, Mapping):
        raise UserError(f"data.classes.{name} is {entry!r}, expected {{color: [r, g, b], ids: [raw, ...]}}")
    known = ("color", "colors", "ids", "category", "instance_size")
    if unknown := set(entry) - set(known):
        raise UserError(f"data.classes.{name} has the key {sorted(unknown)[0]!r}, expected one of {', '.join(known)}")
    other = "colors" if mask_values == "ids" else "ids"
    if other in entry:
        raise UserError(
            f"data.classes.{name} lists {other}, but data.mask_values is {mask_values}: add data.mask_values={other} "
            f"or leave {other} out"
        )
    return entry


def _groups(entries: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, float]]:
    """The category of every class, or of none, and the instance sizes there are."""
    categories = {name: str(entry["category"]) for name, entry in entries.items() if "category" in entry}
    if categories and len(categories) < len(entries):
        missing = next(name for name in entries if name not in categories)
        raise UserError(f"data.classes.{missing} has no category, but other classes have: give each class one")
    sizes = {name: entry["instance_size"] for name, entry in entries.items() if "instance_size" in entry}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size < float("inf"):
            raise UserError(f"data.classes.{name}.instance_size is {size!r}, expected mean pixels above 0")
    return categories, sizes


def _colors_of(entries: Mapping[str, Mapping[str, Any]], palette: np.ndarray) -> dict[str, list[int]]:
    """0xRRGGBB of each class: its `colors`, or its one `color`."""
    found = {}
    for (name, entry), own in zip(entries.items(), palette, strict=True):
        if "color" not in entry and "colors" not in entry:
            raise UserError(f"data.classes.{name} has no color, but data.mask_values is colors: add color: [r, g, b]")
        colors = entry.get("colors", [own.tolist()])
        if not isinstance(colors, Sequence) or isinstance(colors, str):
            raise UserError(f"data.classes.{name}.colors is {colors!r}, expected a list of [red, green, blue]")
        found[name] = [code(_color(f"data.classes.{name}.colors", color)) for color in colors]
    return found


def _lookup(values: int, ids: Mapping[str, list[int]], ignore: Any, what: str) -> np.ndarray:
    lookup = np.full(values, IGNORE if ignore == "rest" else _UNDECLARED, np.int16)
    ignored = [] if ignore == "rest" else _ignored(ignore, values)
    lookup[ignored] = IGNORE
    taken: dict[int, str] = {}
    for index, (name, raws) in enumerate(ids.items()):
        for raw in raws:
            shown = rgb(raw) if values == _COLORS else raw
            if raw in taken:
                whom = f"claimed by both {taken[raw]!r} and {name!r}" if taken[raw] != name else f"twice in {name!r}"
                raise UserError(f"{what} {shown} is {whom} in data.classes")
            if raw in ignored:
                raise UserError(f"{what} {shown} is of class {name!r} and in data.ignore: leave it out of one of them")
            taken[raw] = name
            lookup[raw] = index
    return lookup


def _ignored(ignore: Any, values: int) -> list[int]:
    if values == _RAW_VALUES:
        return _raw_ids("data.ignore", ignore)
    if not isinstance(ignore, Sequence) or isinstance(ignore, str):
        raise UserError(f"data.ignore is {ignore!r}, expected a list of [red, green, blue], or rest")
    # the usual 255 of masks of ids says nothing of colours
    return [code(_color("data.ignore", color)) for color in ignore if color != IGNORE]


def _color(where: str, color: Any) -> Sequence[int]:
    if (
        not isinstance(color, Sequence)
        or len(color) != 3
        or any(not isinstance(byte, int) or byte not in range(256) for byte in color)
    ):
        raise UserError(f"{where} is {color!r}, expected [red, green, blue] from 0 to 255")
    return color


def code(color: Iterable[int]) -> int:
    """A colour as 0xRRGGBB."""
    red, green, blue = map(int, color)
    return red << 16 | green << 8 | blue


def _raw_ids(where: str, ids: Any) -> list[int]:
    if (
        not isinstance(ids, Sequence)
        or isinstance(ids, str)
        or any(not isinstance(raw, int) or not 0 <= raw < _RAW_VALUES for raw in ids)
    ):
        raise UserError(f"{where} is {ids!r}, expected a list of raw mask values from 0 to {_RAW_VALUES - 1}")
    return list(ids)
