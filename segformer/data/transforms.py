"""The recipe's augmentation: scale -> crop -> flip -> colour -> pad, of which only the crop is ever computed.

Scale and window are drawn first, in coordinates of the scaled image; then the part of the image that the window shows
is resized, and nothing else is read. Source: the published SegFormer pipeline (arXiv 2105.15203 and its configs).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from inspect import isclass
from typing import Any

import cv2
import numpy as np

from segformer.errors import UserError, build, nearest
from segformer.labels import IGNORE
from segformer.pixels import PAD

MAX_REDRAWS = 10  # of a crop that one class fills
SAMPLES = 64  # labels counted along each side of a window, to tell whether one class fills it

BRIGHTNESS = 32.0
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18  # of OpenCV's half degrees
_POINTS = np.arange(256, dtype=np.uint8)  # the point operation that changes nothing

Size = tuple[int, int]  # (height, width)
Window = tuple[slice, slice]  # rows, columns
Encode = Callable[[np.ndarray], np.ndarray]


class TrainTransform:
    """(image, raw mask, seed, encode) -> augmented (h, w, C) uint8 and (h, w) uint8 train ids, 255 = ignore.

    crop_size: (h, w). base_size: (long, short) that the scale multiplies, None = the image's own size. scale: range of
    the uniform factor. cat_max_ratio: a window that one class fills to this share of its labels is drawn again.
    augment: more transforms of albumentations, `[{GaussianBlur: {p: 0.2}}]`, between colours and padding. fill: the
    colour of the padding, one value per channel.

    exact: the published pixels, bit by bit: the whole image is resized, every label of a window counted, and colours
    turn to HSV and back for saturation and again for hue. Else, in half the time or less, a window is rounded to
    whole pixels of the image, which shifts it by less than one, a grid of its labels is counted, one turn to HSV serves
    both, and a part that is enlarged gets its colours before: the same distribution, and colours a grey level apart.
    """

    def __init__(
        self,
        crop_size: Size,
        base_size: tuple[int, int] | None,
        scale: tuple[float, float],
        cat_max_ratio: float,
        exact: bool = False,
        augment: Sequence[Any] = (),
        fill: Sequence[int] = PAD,
    ) -> None:
        self.crop_size, self.base_size, self.scale, self.cat_max_ratio = crop_size, base_size, scale, cat_max_ratio
        self.exact = exact
        # what a crop is where the image ends before it
        self.filled = np.broadcast_to(np.array(fill, np.uint8), (*crop_size, len(fill))).copy()
        self.ignored = np.full(crop_size, IGNORE, np.uint8)
        self.compose: Any = _compose(augment) if augment else None

    def __call__(self, image: np.ndarray, raw: np.ndarray, seed: int, encode: Encode) -> tuple[np.ndarray, np.ndarray]:
        """image: (H, W, C) uint8, may be read-only, as may raw: (H, W) or (H, W, 3) as the mask file holds it.

        encode: part of a raw mask -> train ids of the same height and width. The seed decides everything.
        """
        draw, channels = random.Random(seed), image.shape[2]
        size = scaled_size(image.shape[:2], self.base_size, draw.uniform(*self.scale))
        if self.exact:
            image, raw = _resize(image, size, cv2.INTER_LINEAR), _resize(raw, size, cv2.INTER_NEAREST)
        window = self._window(raw, size, draw, encode)
        image, mask = self._crop(image, raw, window, size, draw, encode)
        if self.compose is not None:
            image, mask = self._augmented(image, mask, seed, draw)
        image = image.reshape(*mask.shape, channels)  # OpenCV drops the axis of a single channel
        return _pad(image, self.filled), _pad(mask, self.ignored)

    def _window(self, raw: np.ndarray, size: Size, draw: random.Random, encode: Encode) -> Window:
        """A uniform window of the scaled image, drawn again while one class fills it, at most ten times."""
        window = self._anywhere(size, draw)
        for _ in range(MAX_REDRAWS if self.cat_max_ratio < 1 else 0):
            labels = encode(raw[_part(raw, window, size, None if self.exact else SAMPLES)])
            counts = np.bincount(labels.ravel(), minlength=IGNORE + 1)[:IGNORE]
            if counts.max() < self.cat_max_ratio * counts.sum():  # so never where there is one class, or none
                break
            window = self._anywhere(size, draw)
        return window

    def _anywhere(self, size: Size, draw: random.Random) -> Window:
        starts = [draw.randint(0, max(side - crop, 0)) for side, crop in zip(size, self.crop_size, strict=True)]
        rows, columns = (
            slice(start, min(start + crop, side))
            for start, side, crop in zip(starts, size, self.crop_size, strict=True)
        )
        return rows, columns

    def _crop(
        self, image: np.ndarray, raw: np.ndarray, window: Window, size: Size, draw: random.Random, encode: Encode
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the window shows, at its size, flipped by a fair coin and with other colours."""
        shown, (height, width) = _part(raw, window, size), (inside.stop - inside.start for inside in window)
        flipped, image = draw.random() < 0.5, image[shown]
        enlarged = image.shape[0] * image.shape[1] < height * width  # never so in the exact form
        if enlarged:
            image = distort(image, draw)
        image = _resize(image, (height, width), cv2.INTER_LINEAR)
        mask = _encoded(raw[shown], (height, width), encode)
        if flipped:
            image, mask = cv2.flip(image, 1), cv2.flip(mask, 1)
        return image if enlarged else distort(image, draw, self.exact), mask

    def _augmented(
        self, image: np.ndarray, mask: np.ndarray, seed: int, draw: random.Random
    ) -> tuple[np.ndarray, np.ndarray]:
        # without this, DataLoader workers repeat each other and every epoch repeats the first; one stream for the whole
        # chain, for set_random_seed gives each transform an equal one of its own: the first draw would tell the second
        self.compose.set_random_state(np.random.default_rng(seed), draw)
        try:
            changed = self.compose(image=image, mask=mask)
        except Exception as error:  # each of its transforms raises what it likes
            raise UserError(f"data.augment fails on a crop of {mask.shape}: {' '.join(str(error).split())}") from error
        image, mask = changed["image"], changed["mask"]
        if not all(isinstance(one, np.ndarray) and one.dtype == np.uint8 for one in (image, mask)):
            raise UserError(
                f"data.augment gives {image.dtype} images, expected uint8: leave out Normalize, ToFloat and "
                "ToTensorV2, the network's input is normalised on its device"
            )
        if image.shape[:2] != mask.shape or np.any(np.greater(mask.shape, self.crop_size)):
            raise UserError(
                f"data.augment gives an image of {image.shape[:2]} and a mask of {mask.shape}, expected both alike "
                f"and within data.crop_size={list(self.crop_size)}: leave out what enlarges or turns"
            )
        return image, mask


def scaled_size(shape: tuple[int, ...], base_size: tuple[int, int] | None, ratio: float) -> Size:
    """(height, width) of a keep-ratio resize into `ratio` times base_size = (long, short), or times the image's own."""
    height, width = shape
    long, short = base_size or (max(height, width), min(height, width))
    factor = min(int(long * ratio) / max(height, width), int(short * ratio) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def distort(image: np.ndarray, draw: random.Random, exact: bool = False) -> np.ndarray:
    """Brightness, contrast, saturation and hue of a uint8 image, each with probability 0.5, in bytes after every step.

    Contrast comes before saturation and hue or after them, by a fair coin. What has not three channels has neither.
    exact: saturation and hue each turn to HSV and back, with its rounding, as published; else they share one turn.
    """
    points = _linear(_POINTS, shift=draw.uniform(-BRIGHTNESS, BRIGHTNESS)) if draw.random() < 0.5 else _POINTS
    contrast_first = draw.random() < 0.5
    if contrast_first:
        points = _contrast(points, draw)
    if image.ndim == 3 and image.shape[2] == 3:
        tables: dict[int, np.ndarray] = {}
        if draw.random() < 0.5:
            tables[1] = _linear(_POINTS, factor=draw.uniform(*SATURATION))
        if draw.random() < 0.5:
            tables[0] = ((np.arange(256) + draw.randint(-HUE, HUE - 1)) % 180).astype(np.uint8)
        if tables:
            image, points = _points(image, points), _POINTS
            for turn in [{channel: tables[channel]} for channel in tables] if exact else [tables]:
                image = _hsv(image, turn)
    return _points(image, points if contrast_first else _contrast(points, draw))


def _contrast(points: np.ndarray, draw: random.Random) -> np.ndarray:
    return _linear(points, factor=draw.uniform(*CONTRAST)) if draw.random() < 0.5 else points


def _linear(points: np.ndarray, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return np.clip(points.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)


def _points(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Each byte through a table: exact, for brightness and contrast map bytes to bytes, and so do several at once."""
    return image if points is _POINTS else cv2.LUT(image, points)


def _hsv(image: np.ndarray, tables: Mapping[int, np.ndarray]) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    for channel, table in tables.items():
        cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, channel), table), hsv, channel)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _part(raw: np.ndarray, window: Window, size: Size, samples: int | None = None) -> Window:
    """What a window of the image scaled to `size` shows of the image itself; samples: a grid of so many a side."""
    parts = []
    for inside, scaled, side in zip(window, size, raw.shape[:2], strict=True):
        start = min(int(inside.start * side / scaled + 0.5), side - 1)
        stop = max(int(inside.stop * side / scaled + 0.5), start + 1)
        step = max(1, (stop - start) // samples) if samples else 1
        parts.append(slice(start, stop, step))
    return parts[0], parts[1]


def _resize(image: np.ndarray, size: Size, interpolation: int) -> np.ndarray:
    """A copy at another size: bilinear without antialiasing, or nearest."""
    return cv2.resize(image, (size[1], size[0]), interpolation=interpolation)


def _encoded(raw: np.ndarray, size: Size, encode: Encode) -> np.ndarray:
    """Train ids of a raw mask at another size, looked up where there are fewer of them: nearest only picks."""
    if raw.shape[0] * raw.shape[1] < size[0] * size[1]:
        return _resize(encode(raw), size, cv2.INTER_NEAREST)
    return encode(_resize(raw, size, cv2.INTER_NEAREST))


def _pad(image: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """Fills up at the bottom and on the right with what an empty crop holds there."""
    if image.shape == empty.shape:
        return image
    padded = empty.copy()
    padded[: image.shape[0], : image.shape[1]] = image
    return padded


def _compose(augment: Sequence[Any]) -> Any:
    """albumentations' transforms by their names; where one fills pixels without a label, these are to be ignored."""
    import albumentations as A  # seconds, and only who asks for more pays them

    known = {name for name, kind in vars(A).items() if isclass(kind) and issubclass(kind, A.BasicTransform)}
    known -= {"BasicTransform", "DualTransform", "ImageOnlyTransform", "Transform3D"}  # abstract
    steps = []
    for entry in augment:
        if not isinstance(entry, Mapping) or [isinstance(one, Mapping | None) for one in entry.values()] != [True]:
            raise UserError(f"data.augment holds {entry!r}, expected {{NAME: {{argument: value}}}} of albumentations")
        ((name, options),) = entry.items()
        if name not in known:
            raise UserError(f"data.augment: albumentations has no transform {name!r}{nearest(str(name), known)}")
        step = build(f"data.augment.{name}", getattr(A, name), options or {})
        if "fill_mask" not in (options or {}) and getattr(step, "fill_mask", None) == 0:
            step.fill_mask = IGNORE  # 0 would be the first class
        steps.append(step)
    return A.Compose(steps, strict=True)
