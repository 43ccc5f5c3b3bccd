"""Things that yield (image, raw mask): pairs of files, found by two patterns."""

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from segformer.errors import UserError, build
from segformer.labels import read_mask
from segformer.pixels import MAX_PIXELS, read_image


class Source(Protocol):
    """What a dataset reads from; a class of your own needs no more than this."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """RGB uint8 (H, W, 3) and raw mask ids (H, W)."""

    def name(self, index: int) -> str:
        """What to call the sample in errors and reports: its file, where it has one."""


class Pairs:
    """Image and mask files below `root`, matched by what the stars of two patterns stand for.

    images="leftImg8bit/val/*/*_leftImg8bit.png" and masks="gtFine/val/*/*_gtFine_labelIds.png" pair frames by city and
    frame name. A pattern that ends in a star takes any extension: "images/train/*" goes with "masks/train/*". Of a list
    of mask patterns the first one that finds files is read. max_pixels: of one file, see `pixels.opened`.
    """

    def __init__(
        self, root: str | Path | None, images: str, masks: str | Sequence[str], max_pixels: int = MAX_PIXELS
    ) -> None:
        if root is None:
            raise UserError("data.root is not set: add data.root=FOLDER, the folder that holds the images and masks")
        root, choices = Path(root).expanduser(), [masks] if isinstance(masks, str) else masks
        if not isinstance(choices, Sequence) or not choices or any(not isinstance(one, str) for one in choices):
            raise UserError(f"masks is {masks!r}, expected a pattern below data.root or a list of patterns")
        for pattern in (images, *choices):
            if any(sign in pattern for sign in ("**", "?", "[")) or Path(pattern).is_absolute():
                raise UserError(
                    f"pattern {pattern!r}: expected a path below data.root in which only single stars stand"
                )
            if pattern.count("*") != images.count("*"):
                raise UserError(
                    f"{images!r} and {pattern!r} have different numbers of stars, "
                    "expected one mask star for each image star"
                )
        if not os.path.isdir(root):
            raise UserError(
                f"data.root={root} is not a folder, or not readable: give the folder that holds "
                f"{images} and {choices[0]}"
            )
        found_images = _find(root, images)
        if not found_images:
            raise UserError(f"no images at {root / images}: check data.root and the pattern")
        pattern, found_masks = next(
            ((choice, found) for choice in choices if (found := _find(root, choice))), (choices[0], {})
        )
        for files, partners, what, wanted in (
            (found_images, found_masks, "mask", pattern),
            (found_masks, found_images, "image", images),
        ):
            lonely = sorted(files.keys() - partners.keys())
            if lonely:
                expected = root / _fill(wanted, lonely[0])
                raise UserError(
                    f"{len(lonely)} of {len(files)} files have no {what}, first {files[lonely[0]]}: expected {expected}"
                )
        self.files = [(found_images[key], found_masks[key]) for key in sorted(found_images)]
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index][0])

    def mask_name(self, index: int) -> str:
        return str(self.files[index][1])

    def mask(self, index: int) -> np.ndarray:
        """The raw mask without its image."""
        return read_mask(self.files[index][1], self.max_pixels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image_path, mask_path = self.files[index]
        image, mask = read_image(image_path, self.max_pixels), self.mask(index)
        if image.shape[:2] != mask.shape:
            (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape
            turned = " upright, as its EXIF orientation says," if mask.shape == (width, height) else ""
            raise UserError(
                f"image {image_path} is{turned} {width}x{height} but its mask {mask_path} is {mask_width}x"
                f"{mask_height}, expected equal sizes: export the mask again at the image's size"
            )
        return image, mask


def open_source(split: str, spec: Any, root: str | None, max_pixels: int = MAX_PIXELS) -> Source:
    """The source of one split: {images, masks} patterns, {scenes, seed} of the toy dataset, or a source object."""
    if spec is None or isinstance(spec, str | int | float | list):
        raise UserError(f"data.{split} is {spec!r}, expected {{images: pattern, masks: pattern}}")
    if not isinstance(spec, Mapping):
        return spec  # built by the user's own `_target_`
    if "scenes" in spec:
        from segformer.data.toy import ToyScenes

        return build(f"data.{split}", ToyScenes, spec)
    return build(f"data.{split}", Pairs, spec, root=root, max_pixels=max_pixels)


def _find(root: Path, pattern: str) -> dict[tuple[str, ...], Path]:
    """Files below `root` that match, by what the stars stand for; of a final star without the extension."""
    expression = re.compile("(.+)".join(re.escape(part) for part in pattern.split("*")), re.DOTALL)
    found: dict[tuple[str, ...], Path] = {}
    for path in sorted(_walk(root, pattern.split("/"))):
        match = expression.fullmatch(path.relative_to(root).as_posix())
        if not match:
            continue
        # one name has two spellings in Unicode, and archives made on a Mac hold the other one
        key = tuple(unicodedata.normalize("NFC", star) for star in match.groups())
        if pattern.endswith("*"):
            key = (*key[:-1], str(Path(key[-1]).with_suffix("")))
        if key in found:
            raise UserError(f"{found[key]} and {path} match the same sample of {pattern!r}: keep one of them")
        found[key] = path
    return found


def _walk(folder: Path, parts: list[str]) -> Iterator[Path]:
    """Files that match a pattern; `Path.glob` would take a folder that it may not read for an empty one."""
    first, *rest = parts
    try:
        if "*" in first:
            with os.scandir(folder) as entries:
                shown = [entry for entry in entries if fnmatchcase(entry.name, first) and entry.name[0] != "."]
                paths = [Path(entry.path) for entry in shown if rest or not _is_folder(entry)]
        else:
            paths = [folder / first] if rest or (folder / first).is_file() else []
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"cannot read folder {folder}: {error.strerror}; make it readable") from error
    for path in paths:
        yield from _walk(path, rest) if rest else [path]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere: told when it is opened, by its own name
        return False


def _fill(pattern: str, key: tuple[str, ...]) -> str:
    parts = pattern.split("*")
    filled = parts[0] + "".join(star + part for star, part in zip(key, parts[1:], strict=True))
    return filled + ".*" if pattern.endswith("*") else filled
