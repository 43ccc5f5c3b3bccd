"""Boundary IoU (Cheng et al., CVPR 2021, arXiv 2103.16562): how well contours are found, not areas.

Of each class only the pixels that lie within d of its contour count, d being 2 % of the image's diagonal: a large
object no longer outweighs its own outline, nor the small objects beside it.
"""

import math

import cv2
import numpy as np

from segformer.labels import IGNORE

RATIO = 0.02  # of the diagonal
OUTSIDE = 0  # beside every class: the image's border is a contour, as the paper's code has it


def boundary_parts(prediction: np.ndarray, label: np.ndarray, classes: int, ratio: float = RATIO) -> np.ndarray:
    """(3, K) int64 contour pixels of each class: hit, labelled, predicted; `metrics.iou_of` of their sums is its score.

    prediction: (H, W), 0..K-1, or K where it is of no class. label: (H, W), 0..K-1 or 255, which counts nowhere; where
    it ends, a contour runs in both, so that a prediction that goes on below it is not to blame. All classes at once: a
    pixel is near a contour of its own class where the least and the largest value of the square around it differ.
    """
    labelled = label != IGNORE
    kind = np.uint8 if classes + 2 <= 255 else np.int16  # a filter of bytes is three times as fast
    prediction, label = (
        np.where(labelled, values.astype(np.int16) + 1, classes + 2).astype(kind) for values in (prediction, label)
    )
    distance = max(1, round(ratio * math.hypot(*label.shape)))
    expected, found = _near_contour(label, distance) & labelled, _near_contour(prediction, distance) & labelled
    hits = expected & found & (label == prediction)
    counted = (label[hits], label[expected], prediction[found])
    return np.stack([np.bincount(values, minlength=classes + 1)[1 : classes + 1] for values in counted])


def _near_contour(values: np.ndarray, distance: int) -> np.ndarray:
    square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    least = cv2.erode(values, square, borderType=cv2.BORDER_CONSTANT, borderValue=OUTSIDE)
    return least != cv2.dilate(values, square)
