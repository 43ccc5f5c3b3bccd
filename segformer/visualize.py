"""Label maps as pictures."""

import numpy as np

from segformer.labels import IGNORE, Classes

VOID = (0, 0, 0)  # how ignored pixels are drawn


def colorize(mask: np.ndarray, classes: Classes) -> np.ndarray:
    """(H, W) train ids -> RGB uint8 (H, W, 3) in the dataset's colours; ignored pixels black."""
    table = np.full((IGNORE + 1, 3), VOID, np.uint8)
    table[: len(classes)] = classes.colors
    return table[mask]


def as_rgb(image: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 -> (H, W, 3): the first three bands, or the first one as grey."""
    return image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2)


def overlay(image: np.ndarray, mask: np.ndarray, classes: Classes, opacity: float = 0.55) -> np.ndarray:
    """The image under its coloured label map; opacity 0 shows the image alone."""
    blend = as_rgb(image) * (1 - opacity) + colorize(mask, classes) * opacity
    return blend.round().astype(np.uint8)


def panel(image: np.ndarray, label: np.ndarray, prediction: np.ndarray, classes: Classes) -> np.ndarray:
    """Image, label and prediction side by side: RGB uint8 (H, 3W + gaps, 3)."""
    gap = np.full((image.shape[0], 4, 3), 255, np.uint8)
    return np.hstack([as_rgb(image), gap, overlay(image, label, classes), gap, overlay(image, prediction, classes)])
