"""What an image is: RGB uint8 (H, W, 3) outside the network, normalised float (B, 3, H, W) inside.

Pixels travel as uint8 and are normalised on the device, so a 512 x 512 sample weighs 1 MB with its label, not 5.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from segformer.errors import UserError

MEAN = (123.675, 116.28, 103.53)  # of ImageNet, RGB, on the 0..255 scale
STD = (58.395, 57.12, 57.375)
PAD = tuple(round(value) for value in MEAN)  # "pad after normalising" in uint8: at most 0.009 off zero

MAX_PIXELS = 178_956_970  # of one file, where Pillow too sees a decompression bomb


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) in 0..255 -> float32 of the same shape, zero mean and unit variance over ImageNet."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1)
    return (images.float() - mean) / std


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, height, width): bilinear without antialiasing, as the published protocol."""
    if images.shape[-2:] == (height, width):
        return images
    resized = F.interpolate(images.float(), size=(height, width), mode="bilinear", align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image file as RGB uint8 (H, W, 3), turned as its EXIF orientation says.

    Grey, palette and CMYK files become RGB, an alpha channel is dropped, of 16 bits the upper eight are kept.

    Raises:
        UserError: the file is missing, empty, truncated, no image, too large, or of a kind that has no bytes.
    """
    with opened("image", path, max_pixels) as image:
        return to_rgb(image, f"image {path}")


def to_rgb(image: Image.Image, name: str) -> np.ndarray:
    """A decoded Pillow image as RGB uint8 (H, W, 3); name: what to call it in the error, which is `read_image`'s."""
    if image.mode.startswith("I;16"):  # Pillow would clip instead of scale
        grey = (np.array(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise UserError(f"{name} has {image.mode} pixels of 32 bits, expected 8 or 16 bits: export it as 8-bit RGB")
    return np.array(image.convert("RGB"))


@contextmanager
def opened(what: str, path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """The decoded, upright file; every way in which a file can be broken is one UserError.

    what: "image" or "mask", for the sentence. max_pixels: a larger one is refused before it is decoded.
    """
    try:
        with _bomb_limit(max_pixels), Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except Image.DecompressionBombError as error:
        raise UserError(f"cannot read {what} {path}: {error} If you trust the file, raise data.max_pixels") from error
    except UnidentifiedImageError as error:
        reason = "the file holds no image that Pillow knows" if path.stat().st_size else "the file is empty"
        raise UserError(f"cannot read {what} {path}: {reason}; replace or remove it") from error
    except PermissionError as error:
        raise UserError(f"cannot read {what} {path}: permission denied; make it readable") from error
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        reason = str(error) or type(error).__name__
        raise UserError(f"cannot read {what} {path}: {reason}; replace or remove the file") from error
    yield image


@contextmanager
def _bomb_limit(max_pixels: int) -> Iterator[None]:
    """Pillow refuses what is above twice a global number, and warns above it: ours stands there during the opening."""
    own, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels // 2
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = own
