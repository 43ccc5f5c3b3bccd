"""How far a score may move with the images it is measured on: the bootstrap over images (Efron 1979), percentiles.

Images are drawn with replacement, as many as there are; pixels are summed over the drawn ones and divided once, as for
the score itself. What it does not tell is how far another training run would move it. Percentile intervals are a little
too narrow below about 100 images, and for classes that only a few images hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from segformer.errors import UserError
from segformer.metrics import Parts, iou_of, mean_of

RESAMPLES = 2000
LEVEL = 0.95
NUMBERS = 2**24  # weights drawn at once: 128 MB


@dataclass(frozen=True)
class Intervals:
    """miou: (low, high). iou: (K, 2), NaN for a class that no image holds. Fractions 0..1; level: that they cover."""

    miou: tuple[float, float]
    iou: np.ndarray
    level: float = LEVEL
    resamples: int = RESAMPLES


@dataclass(frozen=True)
class Difference:
    """The second minus the first model's. miou: (difference, low, high). iou: (K, 3), NaN where no image holds a class.

    p: two-sided, the share of resamples on the other side of zero, twice; 1 for equal models.
    """

    miou: tuple[float, float, float]
    iou: np.ndarray
    p: float
    level: float = LEVEL
    resamples: int = RESAMPLES


def intervals(parts: Parts, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Intervals:
    """Of mIoU and of each class's IoU. parts: (N, K) int64 pixels of each image: hits, labelled, predicted."""
    _check(parts, resamples, level)
    iou = _resampled(parts, resamples, seed)
    low, high = _ends(mean_of(iou), level)
    return Intervals((float(low), float(high)), np.stack(_ends(iou, level), axis=1), level, resamples)


def paired(first: Parts, second: Parts, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Difference:
    """Of two models on the same images, which are drawn together: what both find hard cancels out.

    Raises:
        UserError: the labels of the two differ, so they were not measured on the same images.
    """
    _check(first, resamples, level)
    if first[1].shape != second[1].shape or not np.array_equal(first[1], second[1]):
        raise UserError("the two scores are of different labels: compare models on the same images and classes")
    before, after = _resampled(first, resamples, seed), _resampled(second, resamples, seed)
    found = mean_of(after) - mean_of(before)
    now, then = (iou_of(*(part.sum(axis=0) for part in parts)) for parts in (second, first))
    single = np.stack([now - then, *_ends(after - before, level)], axis=1)
    p = min(1.0, 2 * min(float((found <= 0).mean()), float((found >= 0).mean())))
    low, high = _ends(found, level)
    whole = float(mean_of(now) - mean_of(then)), float(low), float(high)
    return Difference(whole, single, p, level, resamples)


def _resampled(parts: Parts, resamples: int, seed: int) -> np.ndarray:
    """(resamples, K) IoU of each class; NaN where no drawn image holds it."""
    exact = [part.astype(np.float64) for part in parts]  # sums stay below 2^53; integers would go without BLAS
    draws = _draws(len(parts[0]), resamples, seed)
    return np.concatenate([iou_of(*(weights @ part for part in exact)) for weights in draws])


def _draws(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn: (some resamples, images) float64."""
    rng, at_once = np.random.default_rng(seed), max(1, NUMBERS // images)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        yield rng.multinomial(images, np.full(images, 1 / images), size=count).astype(np.float64)


def _ends(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the middle `level` of the resamples, which lie along the first axis; NaN where all of them are."""
    absent = np.isnan(values).all(axis=0)
    known = np.where(absent, 0, values)  # numpy warns of columns that are all NaN
    low, high = np.nanpercentile(known, [50 * (1 - level), 50 * (1 + level)], axis=0)
    return np.where(absent, np.nan, low), np.where(absent, np.nan, high)


def _check(parts: Parts, resamples: int, level: float) -> None:
    if not len(parts[0]):
        raise UserError("no images were scored, expected at least one")
    if resamples < 1:
        raise UserError(f"resamples is {resamples}, expected at least 1")
    if not 0 < level < 1:
        raise UserError(f"level is {level}, expected a share between 0 and 1, such as 0.95")
