"""The recipe's augmentation, in its order: scale -> crop -> flip -> colour -> pad.

Flip and pad are albumentations'; scale, crop and colour have no counterpart there that follows the recipe, so they are
transforms of ours in the same frame. Source: the published SegFormer pipeline (arXiv 2105.15203 and its configs).
"""

import random
from typing import Any

import albumentations as A
import cv2
import numpy as np

from segformer.labels import IGNORE
from segformer.pixels import PAD

MAX_REDRAWS = 10  # of a crop that one class fills


class TrainTransform:
    """(image, mask, seed) -> augmented (S, S, 3) uint8 and (S, S) uint8; the seed decides everything."""

    def __init__(
        self,
        crop_size: tuple[int, int],
        base_size: tuple[int, int] | None,
        scale: tuple[float, float],
        cat_max_ratio: float,
    ) -> None:
        height, width = crop_size
        self.compose = A.Compose(
            [
                RandomScale(base_size, scale),
                RandomCropMaxRatio(crop_size, cat_max_ratio),
                A.HorizontalFlip(p=0.5),
                PhotoMetricDistortion(),
                A.PadIfNeeded(
                    height, width, position="top_left", border_mode=cv2.BORDER_CONSTANT, fill=PAD, fill_mask=IGNORE
                ),
            ],
            strict=True,  # albumentations 2 otherwise only warns of arguments it does not know
        )

    def __call__(self, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        # without this, DataLoader workers repeat each other and every epoch repeats the first; one stream for the whole
        # chain, for set_random_seed gives each transform an equal one of its own: a flip would tell the scale
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        sample = self.compose(image=image, mask=mask)
        return sample["image"], sample["mask"]


class RandomScale(A.DualTransform):
    """Keep-ratio resize by a factor r ~ U(scale): of base_size = (long, short), or of the image's own size if None.

    Bilinear without antialiasing for images, nearest for labels.
    """

    def __init__(self, base_size: tuple[int, int] | None, scale: tuple[float, float]) -> None:
        super().__init__(p=1)
        self.base_size, self.scale = base_size, scale

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = data["image"].shape[:2]
        ratio = self.py_random.uniform(*self.scale)
        long, short = self.base_size or (max(height, width), min(height, width))
        factor = min(int(long * ratio) / max(height, width), int(short * ratio) / min(height, width))
        return {"size": (max(1, int(width * factor + 0.5)), max(1, int(height * factor + 0.5)))}

    def apply(self, img: np.ndarray, size: tuple[int, int], **_: Any) -> np.ndarray:
        return cv2.resize(img, size, interpolation=cv2.INTER_LINEAR)

    def apply_to_mask(self, mask: np.ndarray, size: tuple[int, int], **_: Any) -> np.ndarray:
        return cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)


class RandomCropMaxRatio(A.DualTransform):
    """A uniform window of (height, width), drawn again while one class fills `cat_max_ratio` of its labelled pixels.

    At most ten redraws, then the last window is taken. Images smaller than the window stay as they are.
    """

    def __init__(self, crop_size: tuple[int, int], cat_max_ratio: float) -> None:
        super().__init__(p=1)
        self.crop_size, self.cat_max_ratio = crop_size, cat_max_ratio

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        mask = data["mask"]
        window = self._draw(mask.shape)
        for _ in range(MAX_REDRAWS):
            counts = np.bincount(mask[window].ravel(), minlength=IGNORE + 1)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() < self.cat_max_ratio * counts.sum():
                break
            window = self._draw(mask.shape)
        return {"window": window}

    def _draw(self, shape: tuple[int, ...]) -> tuple[slice, slice]:
        starts = [
            self.py_random.randint(0, max(side - crop, 0)) for side, crop in zip(shape[:2], self.crop_size, strict=True)
        ]
        rows, columns = (slice(start, start + crop) for start, crop in zip(starts, self.crop_size, strict=True))
        return rows, columns

    def apply(self, img: np.ndarray, window: tuple[slice, slice], **_: Any) -> np.ndarray:
        return img[window]

    def apply_to_mask(self, mask: np.ndarray, window: tuple[slice, slice], **_: Any) -> np.ndarray:
        return mask[window]


class PhotoMetricDistortion(A.ImageOnlyTransform):
    """Brightness, contrast, saturation and hue, each with probability 0.5, clipped to bytes after every step.

    Contrast comes before saturation and hue or after them, by a fair coin. Hue counts in OpenCV's half degrees.
    """

    BRIGHTNESS = 32.0
    CONTRAST = SATURATION = (0.5, 1.5)
    HUE = 18

    def __init__(self) -> None:
        super().__init__(p=1)

    def apply(self, img: np.ndarray, **_: Any) -> np.ndarray:
        draw = self.py_random
        if draw.random() < 0.5:
            img = _linear(img, shift=draw.uniform(-self.BRIGHTNESS, self.BRIGHTNESS))
        contrast_first = draw.random() < 0.5
        if contrast_first:
            img = self._contrast(img)
        if draw.random() < 0.5:
            img = _hsv(img, 1, _table(draw.uniform(*self.SATURATION)))
        if draw.random() < 0.5:
            img = _hsv(img, 0, ((np.arange(256) + draw.randint(-self.HUE, self.HUE - 1)) % 180).astype(np.uint8))
        return img if contrast_first else self._contrast(img)

    def _contrast(self, img: np.ndarray) -> np.ndarray:
        return _linear(img, factor=self.py_random.uniform(*self.CONTRAST)) if self.py_random.random() < 0.5 else img


def _table(factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return np.clip(np.arange(256, dtype=np.float32) * factor + shift, 0, 255).astype(np.uint8)


def _linear(img: np.ndarray, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return cv2.LUT(np.ascontiguousarray(img), _table(factor, shift))  # a map of bytes to bytes: exact


def _hsv(img: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV)
    hsv[..., channel] = table[hsv[..., channel]]
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
