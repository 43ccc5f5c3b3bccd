"""Things that yield (image, raw mask): pairs of files, found by two globs."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from segformer.errors import UserError, build
from segformer.labels import read_mask
from segformer.pixels import read_image


class Source(Protocol):
    """What a dataset reads from; a class of your own needs no more than this."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """RGB uint8 (H, W, 3) and raw mask ids (H, W)."""

    def name(self, index: int) -> str:
        """What to call the sample in errors and reports: its file, where it has one."""


class Pairs:
    """Image and mask files below `root`, matched by what the stars of the two globs stand for.

    images="leftImg8bit/val/*/*_leftImg8bit.png" and masks="gtFine/val/*/*_gtFine_labelIds.png" pair frames by city and
    frame name. A pattern that ends in a star takes any extension: "images/train/*" goes with "masks/train/*".
    """

    def __init__(self, root: str | Path | None, images: str, masks: str) -> None:
        if root is None:
            raise UserError("data.root is not set: add data.root=FOLDER, the folder that holds the images and masks")
        root = Path(root).expanduser()
        for pattern in (images, masks):
            if any(sign in pattern for sign in ("**", "?", "[")) or Path(pattern).is_absolute():
                raise UserError(
                    f"pattern {pattern!r}: expected a path below data.root in which only single stars stand"
                )
        if not root.is_dir():
            raise UserError(f"data.root={root} is not a folder: give the folder that holds {images} and {masks}")
        if images.count("*") != masks.count("*"):
            raise UserError(
                f"{images!r} and {masks!r} have different numbers of stars, expected one mask star for each image star"
            )
        found_images, found_masks = _find(root, images), _find(root, masks)
        if not found_images:
            raise UserError(f"no images at {root / images}: check data.root and the pattern")
        for files, partners, what, pattern in (
            (found_images, found_masks, "mask", masks),
            (found_masks, found_images, "image", images),
        ):
            lonely = sorted(files.keys() - partners.keys())
            if lonely:
                expected = root / _fill(pattern, lonely[0])
                raise UserError(
                    f"{len(lonely)} of {len(files)} files have no {what}, first {files[lonely[0]]}: expected {expected}"
                )
        self.files = [(found_images[key], found_masks[key]) for key in sorted(found_images)]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index][0])

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image_path, mask_path = self.files[index]
        image, mask = read_image(image_path), read_mask(mask_path)
        if image.shape[:2] != mask.shape:
            (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape
            raise UserError(
                f"image {image_path} is {width}x{height} but its mask {mask_path} is {mask_width}x{mask_height}, "
                "expected equal sizes: export the mask again at the image's size"
            )
        return image, mask


def open_source(split: str, spec: Any, root: str | None) -> Source:
    """The source of one split: {images, masks} globs, {scenes, seed} of the toy dataset, or a source object itself."""
    if spec is None or isinstance(spec, str | int | float | list):
        raise UserError(f"data.{split} is {spec!r}, expected {{images: pattern, masks: pattern}}")
    if not isinstance(spec, Mapping):
        return spec  # built by the user's own `_target_`
    if "scenes" in spec:
        from segformer.data.toy import ToyScenes

        return build(f"data.{split}", ToyScenes, spec)
    return build(f"data.{split}", Pairs, spec, root=root)


def _find(root: Path, pattern: str) -> dict[tuple[str, ...], Path]:
    """Files below `root` that match, by what the stars stand for; of a final star without the extension."""
    expression = re.compile("(.+)".join(re.escape(part) for part in re.split(r"\*+", pattern)))
    found: dict[tuple[str, ...], Path] = {}
    for path in sorted(root.glob(pattern)):
        match = expression.fullmatch(path.relative_to(root).as_posix())
        if not match or not path.is_file() or path.name.startswith("."):
            continue
        key = match.groups()
        if pattern.endswith("*"):
            key = (*key[:-1], str(Path(key[-1]).with_suffix("")))
        if key in found:
            raise UserError(f"{found[key]} and {path} match the same sample of {pattern!r}: keep one of them")
        found[key] = path
    return found


def _fill(pattern: str, key: tuple[str, ...]) -> str:
    parts = re.split(r"\*+", pattern)
    filled = parts[0] + "".join(star + part for star, part in zip(key, parts[1:], strict=True))
    return filled + ".*" if pattern.endswith("*") else filled
