"""What an image is: RGB uint8 (H, W, 3) outside the network, normalised float (B, 3, H, W) inside.

Pixels travel as uint8 and are normalised on the device, so a 512 x 512 sample weighs 1 MB with its label, not 5.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Protocol

import cv2
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
# what is opened of all that Pillow knows: an EPS would start Ghostscript
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")
_BANDS = {1: ("L",), 2: ("LA",), 4: ("RGBA", "CMYK")}  # Pillow's modes of so many bands; more of them: .npy and TIFF


class Readable(Protocol):
    """A file, wherever it lies: a `pathlib.Path`, a member of an archive, a cell of a table."""

    def read_bytes(self) -> bytes: ...

    def __str__(self) -> str:
        """What to call it in errors."""


def normalize(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """uint8 (B, C, H, W) in 0..255 -> float32 of zero mean and unit variance, by the C bands' means and deviations."""
    if images.device.type == "cpu":
        shift, scale = torch.tensor(mean), torch.tensor(std)
    else:  # made there: numbers sent by the host would have it wait for the device, and are refused in a CUDA graph
        numbers = [images.new_full((1,), number, dtype=torch.float32) for number in (*mean, *std)]
        both = torch.cat(numbers)
        shift, scale = both[: len(mean)], both[len(mean) :]
    return (images.float() - shift.view(1, -1, 1, 1)) / scale.view(1, -1, 1, 1)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, height, width): bilinear without antialiasing, as the published protocol."""
    if images.shape[-2:] == (height, width):
        return images
    resized = F.interpolate(images.float(), size=(height, width), mode="bilinear", align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


def read_image(file: Readable, max_pixels: int = MAX_PIXELS, bands: int = 3) -> np.ndarray:
    """An image file as uint8 (H, W, bands), turned as its EXIF orientation says; three bands are RGB.

    Where RGB is wanted, grey, palette and CMYK files become it and an alpha channel is dropped; any other number of
    bands has to be the file's own (grey, grey and alpha, RGBA or CMYK, a .npy array (H, W, bands), a TIFF). Of 16 bits
    the upper eight are kept.

    Raises:
        UserError: the file is missing, empty, truncated, no image, too large, of other bands, or has no bytes.
    """
    if _is_array(file, bands):
        return _array(file, max_pixels, bands)
    with header("image", file, max_pixels) as (image, data):
        if bands == 3:
            pixels = decoded_fast(image, data, cv2.IMREAD_COLOR_RGB)
            return to_rgb(upright(image), f"image {file}") if pixels is None else pixels
        if bands == 1 and image.mode.startswith("I;16"):
            return to_rgb(upright(image), f"image {file}")[..., :1]
        if image.mode not in _BANDS.get(bands, ()):
            raise UserError(f"image {file} is a {image.mode} image, expected {bands} bands: set data.bands to its own")
        return np.array(upright(image)).reshape(image.height, image.width, bands)


def image_size(file: Readable, max_pixels: int = MAX_PIXELS, bands: int = 3) -> tuple[int, int]:
    """(height, width) of an image file, upright, from its header where it has one; raises UserError as `read_image`."""
    if _is_array(file, bands):
        height, width = _array(file, max_pixels, bands).shape[:2]
        return height, width
    with header("image", file, max_pixels) as (image, data):
        turned = _may_be_turned(image, data) and image.getexif().get(_ORIENTATION, 1) >= 5  # by a quarter
        return (image.width, image.height) if turned else (image.height, image.width)


def orientation(file: Readable) -> int:
    """The EXIF orientation of an image file, 1 where it has none or cannot be read."""
    with suppress(UserError), header("image", file, MAX_PIXELS) as (image, data):
        if _may_be_turned(image, data):
            return int(image.getexif().get(_ORIENTATION, 1))
    return 1


def to_rgb(image: Image.Image, name: str) -> np.ndarray:
    """A decoded Pillow image as RGB uint8 (H, W, 3); name: what to call it in the error, which is `read_image`'s."""
    if image.mode.startswith("I;16"):  # Pillow would clip instead of scale
        grey = (np.array(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise UserError(f"{name} has {image.mode} pixels of 32 bits, expected 8 or 16 bits: export it as 8-bit RGB")
    return np.array(image.convert("RGB"))


@contextmanager
def opened(what: str, file: Readable, max_pixels: int) -> Iterator[tuple[Image.Image, bytes]]:
    """The decoded, upright file and its bytes; every way in which it can be broken is one UserError.

    what: "image" or "mask", for the sentence. max_pixels: a larger one is refused before it is decoded.
    """
    with header(what, file, max_pixels) as (image, data):
        yield upright(image), data


@contextmanager
def header(what: str, file: Readable, max_pixels: int) -> Iterator[tuple[Image.Image, bytes]]:
    """The file, not yet decoded, and its bytes; what goes wrong inside the block is told as `opened` says."""
    data = None
    try:
        data = file.read_bytes()
        with _open(data) as image:
            if (pixels := image.width * image.height) > max_pixels:
                raise UserError(
                    f"cannot read {what} {file}: its {pixels} pixels are more than data.max_pixels={max_pixels}, as a "
                    "decompression bomb has; raise it if you trust the file"
                )
            yield image, data
    except UserError:
        raise
    except UnidentifiedImageError as error:
        reason = "the file holds no image that is known here" if data else "the file is empty"
        raise UserError(f"cannot read {what} {file}: {reason}; replace or remove it") from error
    except PermissionError as error:
        raise UserError(f"cannot read {what} {file}: permission denied; make it readable") from error
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {what} {file}: {reason}; replace or remove the file") from error


def _open(data: bytes) -> Image.Image:
    """Without Pillow's own limit, a global number that it compares with the header: ours is per call."""
    own, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = own


def decoded_fast(image: Image.Image, data: bytes, flag: int) -> np.ndarray | None:
    """The pixels by OpenCV, which is faster, for whole and upright files that both libraries read alike; else None.

    The end of the file is looked at because OpenCV before 5 gives half a picture for half a file.
    """
    if image.format == "JPEG" and image.mode in ("L", "RGB"):
        whole = data.endswith(b"\xff\xd9")
    else:
        eight_bits = image.format == "PNG" and image.mode in ("L", "RGB") and data[24] == 8
        whole = eight_bits and data.endswith(b"IEND\xaeB`\x82") and "transparency" not in image.info
    if not whole or _may_be_turned(image, data):
        return None
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    return pixels if pixels is not None and pixels.shape[:2] == (image.height, image.width) else None


_ORIENTATION = 0x0112  # the EXIF tag


def _may_be_turned(image: Image.Image, data: bytes) -> bool:
    """Whether the file may hold an orientation: a PNG tells it after decoding, so the names of its places count."""
    if image.format == "PNG":
        around = data[: data.find(b"IDAT")] + data[data.rfind(b"IDAT") :]  # of the pixels
        return any(word in around for word in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp"))
    if image.format == "JPEG" and image.info.keys().isdisjoint(("exif", "xmp")):
        return False
    return _ORIENTATION in image.getexif()


def upright(image: Image.Image) -> Image.Image:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _is_array(file: Readable, bands: int) -> bool:
    return str(file).lower().endswith((".npy", ".tif", ".tiff") if bands != 3 else ".npy")


def _array(file: Readable, max_pixels: int, bands: int) -> np.ndarray:
    """What Pillow has no mode for: arrays, and TIFF files of any number of bands."""
    pixels = _load_npy(file) if str(file).lower().endswith(".npy") else _load_tiff(file, max_pixels, bands)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] != bands or not pixels.size or pixels.dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"image {file} holds {pixels.dtype} of shape {pixels.shape}, expected (H, W, {bands}) of uint8 or uint16: "
            "set data.bands to its own, or export it anew"
        )
    if pixels.shape[0] * pixels.shape[1] > max_pixels:
        raise UserError(
            f"image {file} has {pixels.shape[0] * pixels.shape[1]} pixels: raise data.max_pixels to trust it"
        )
    return (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels


def _load_npy(file: Readable) -> np.ndarray:
    try:
        return np.lib.format.read_array(BytesIO(file.read_bytes()), allow_pickle=False)
    except Exception as error:  # a header may ask for more memory than there is
        raise UserError(f"cannot read image {file}: {error}; replace or remove the file") from error


def _load_tiff(file: Readable, max_pixels: int, bands: int) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise UserError(f'reading the bands of {file} needs tifffile: pip install "segformer[tiff]"') from error
    try:
        with tifffile.TiffFile(BytesIO(file.read_bytes())) as pages:
            page = pages.series[0]
            if np.prod(page.shape, dtype=float) > max_pixels * bands:
                raise UserError(f"image {file} has the shape {page.shape}: raise data.max_pixels to trust it")
            if page.keyframe.tags.valueof(_ORIENTATION, 1) != 1:
                raise UserError(f"image {file} is turned by its orientation tag: save it upright")
            pixels = page.asarray()
            return np.moveaxis(pixels, 0, -1) if page.axes[:1] in ("S", "C", "I") and pixels.ndim == 3 else pixels
    except UserError:
        raise
    except Exception as error:  # as Pillow's decoders
        raise UserError(f"cannot read image {file}: {error}; replace or remove the file") from error
