"""Images and segmentation maps of any kind -> tensors (C, H, W) and arrays (H, W)."""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from segformer.errors import UserError
from segformer.labels import one_channel, read_mask
from segformer.pixels import MAX_PIXELS, opened, to_rgb


def read_images(
    images: Any, channels: int, last: bool | None, device: Any, bytes_expected: bool, first: int
) -> list[Tensor]:
    """Images of any kind, nested or in batches, as upright tensors (`channels`, H, W), uint8 or float.

    last: whether the channels of arrays stand last, None where their shape tells. bytes_expected: values are going to
    be divided by 255, so that those in 0..1 or far above it are a mistake. first: the number of the first in messages.
    """
    read = []
    for index, item in enumerate(_flatten(images, 3), first):
        name = f"image {item if isinstance(item, str | os.PathLike) else index}"
        decoded = isinstance(item, str | os.PathLike | Image.Image)  # (H, W, C), whatever the arrays are
        image = _channels_first(_read_image(item, name, channels), name, decoded or last, channels)
        read.append(_numeric(image.to(device or image.device), name, bytes_expected))
    if not read:
        raise UserError("images is empty, expected at least one image")
    return read


def read_maps(maps: Any, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """One array (H, W) of raw ids for each image, of its size."""
    items = list(_flatten(maps, 2))
    if len(items) != len(sizes):
        raise UserError(
            f"{len(items)} segmentation map(s) for {len(sizes)} image(s), expected one of ids for each image"
        )
    masks = [_read_map(item, f"segmentation map {index}") for index, item in enumerate(items)]
    for index, (mask, size) in enumerate(zip(masks, sizes, strict=True)):
        if mask.shape != size:
            raise UserError(
                f"segmentation map {index} is {mask.shape[0]} x {mask.shape[1]} (height x width), image {index} is "
                f"{size[0]} x {size[1]}: give the map of this image, at its size"
            )
    return masks


def channels_last(option: str, value: Any) -> bool | None:
    value = getattr(value, "value", value)
    if value not in (None, "channels_first", "channels_last"):
        raise UserError(f"{option} is {value!r}, expected 'channels_first' or 'channels_last'")
    return None if value is None else value == "channels_last"


def _flatten(items: Any, ndim: int) -> Iterator[Any]:
    """The single items of nested lists and of batches, which are arrays of more than `ndim` dimensions."""
    array = isinstance(items, np.ndarray | Tensor)
    if array and items.ndim == ndim + 1 and ndim == 2:  # maps with a channel: one is dropped, colours are refused later
        items = items[..., 0] if items.shape[-1] == 1 else items
        array = items.shape[-1] not in (3, 4)
    if isinstance(items, list | tuple) or (array and items.ndim > ndim):
        for item in items:
            yield from _flatten(item, ndim)
    else:
        yield items


def _path(item: str | os.PathLike[str], what: str) -> Path:
    if "://" in str(item) or str(item).startswith("data:"):
        raise UserError(f"{what} {str(item)[:80]} is an address, expected a file: download it first and pass its path")
    return Path(item).expanduser()


def _read_image(item: Any, name: str, channels: int) -> Tensor:
    """One image as it came: (H, W), (H, W, C) or (C, H, W); of files and Pillow images RGB bytes where C is 3."""
    if isinstance(item, str | os.PathLike):
        with opened("image", _path(item, "image"), MAX_PIXELS) as (picture, _):
            return _decoded(picture, name, channels)
    if isinstance(item, Image.Image):
        return _decoded(_upright(item, name), name, channels)
    if isinstance(item, Tensor):
        return item
    if isinstance(item, np.ndarray) and item.dtype.kind in "buif":
        native = item.astype(item.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.require(native, requirements=["C", "W"]))  # a copy of what torch could not share
    found = f"an array of {item.dtype}" if isinstance(item, np.ndarray) else f"a {type(item).__name__}"
    raise UserError(f"{name} is {found}, expected a Pillow image, a path, or a numeric array or tensor")


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        image.load()
        return ImageOps.exif_transpose(image) if turned else image  # it would copy every image
    except OSError as error:  # Pillow decodes a file only now
        raise UserError(f"cannot read {name}: {error}; replace or remove the file") from error


def _decoded(image: Image.Image, name: str, channels: int) -> Tensor:
    """RGB bytes (H, W, 3), as `pixels.read_image` makes them of a file; the bands as they are where C is not 3."""
    return torch.from_numpy(to_rgb(image, name) if channels == 3 else np.array(image))


def _channels_first(image: Tensor, name: str, last: bool | None, channels: int) -> Tensor:
    """(H, W), (H, W, C) or (C, H, W) -> (`channels`, H, W); grey is repeated to RGB, alpha dropped."""
    shape = tuple(image.shape)
    if len(shape) not in (2, 3) or 0 in shape:
        raise UserError(f"{name} has shape {shape}, expected (height, width) or three dimensions with the channels")
    if len(shape) == 2:
        image, last = image[None], False
    for counts in ((1, 3, 4), (2,)) if channels == 3 else ((channels,),):
        if last is None and (image.shape[0] in counts or image.shape[2] in counts):
            last = image.shape[0] not in counts  # where both could be channels, the first are, as the peer has it
    image = image.permute(2, 0, 1) if last else image
    found = len(image)
    if last is None or (found != channels and not (channels == 3 and found in (1, 2, 4))):
        raise UserError(
            f"{name} has shape {shape}, expected {'1 to 4' if channels == 3 else channels} channels: give image_mean "
            "and image_std a value for each channel, or say with input_data_format where the channels are"
        )
    if channels == 3:
        image = image[:3] if found > 2 else image[:1].expand(3, -1, -1)
    return image.contiguous()


def _numeric(image: Tensor, name: str, bytes_expected: bool) -> Tensor:
    """uint8, float32 and float64 as they are; other integers as uint8 where they fit, else as float32."""
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.bool or image.is_complex():
        raise UserError(f"{name} holds {image.dtype} values, expected uint8 in 0..255 or floats: convert it")
    low, high = (side.item() for side in (image if image.is_floating_point() else image.long()).aminmax())
    if image.is_floating_point():
        if bytes_expected and 0 < high <= 1:
            found = f"{name} holds floats up to {high:.3g}, which are divided by 255"
            warnings.warn(f"{found}: pass do_rescale=False for values in 0..1", stacklevel=4)
        return image if image.dtype == torch.float64 else image.float()
    if low >= 0 and high <= 255:
        return image.to(torch.uint8)
    if bytes_expected and len(image) == 3:
        raise UserError(
            f"{name} holds {image.dtype} values from {low} to {high}, expected 0 to 255: convert it to uint8, or pass "
            "the rescale_factor that takes it to 0..1"
        )
    return image.float()


def _read_map(item: Any, name: str) -> np.ndarray:
    if isinstance(item, str | os.PathLike):
        path = _path(item, "segmentation map")
        ids = one_channel(read_mask(path))
        if ids is None:
            raise UserError(f"{name}, {path}, holds RGB colours, expected one channel of whole class ids")
        return ids
    found, mask = f"a {type(item).__name__}", item
    if isinstance(item, Image.Image):
        found = f"a {item.mode} image"
        plain = item.mode in ("L", "P", "1", "I") or item.mode.startswith("I;16")
        mask = np.array(_upright(item, name)) if plain else None
    elif isinstance(item, Tensor):
        mask = item.detach().cpu().numpy()
    if isinstance(mask, np.ndarray) and mask.ndim == 2 and mask.size and mask.dtype.kind in "buif":
        if mask.dtype.kind != "f" or (mask == np.floor(mask)).all():
            return mask if mask.dtype.kind in "ui" else mask.astype(np.int64)
        found = f"an array of {mask.dtype} with fractions"
    elif isinstance(mask, np.ndarray):
        found = f"an array of {mask.dtype} and shape {mask.shape}"
    raise UserError(
        f"{name} is {found}, expected one channel of whole class ids: (height, width) integers, a grey or palette "
        "image, or a path; turn a mask of colours into ids first"
    )
