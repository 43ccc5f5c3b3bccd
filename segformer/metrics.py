"""The confusion matrix of a segmentation and everything that follows from it.

Pixels are summed over the whole dataset and divided once, as mmsegmentation and Cityscapes do; a mean over images
(`torchmetrics.segmentation.MeanIoU`) is another number.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def confusion_matrix(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """(K, K) int64: row = label, column = prediction. Pixels labelled outside 0..K-1 (255 = ignore) do not count.

    prediction and label: equal shapes; predictions lie in 0..K-1. Stays on the device.
    """
    # one row for each of the 256 values a label byte can hold: cheaper than masking the ignored pixels out first
    key = label.to(torch.int32) * classes + prediction.to(torch.int32)
    if key.device.type == "cpu":  # torch.bincount is slow on CPU above a million numbers
        counts = torch.from_numpy(np.bincount(key.flatten().numpy(), minlength=256 * classes))
    else:
        counts = torch.bincount(key.flatten(), minlength=256 * classes)
    return counts.view(256, classes)[:classes]


@dataclass(frozen=True)
class Scores:
    """Scores of one dataset, fractions 0..1; NaN where a class (or every class) is absent.

    miou: mean IoU over the classes that occur in labels or predictions. macc: mean recall over those that occur in
    labels. aacc: share of right pixels. fwiou: IoU weighted by label frequency. mdice: mean of 2I / (label +
    prediction) over the classes of miou. iou, acc, dice: (K,) float64. pixels: (K,) int64 label pixels.

    Source: mmsegmentation's IoUMetric, whose nanmean leaves absent classes out.
    """

    miou: float
    macc: float
    aacc: float
    fwiou: float
    mdice: float
    iou: np.ndarray
    acc: np.ndarray
    dice: np.ndarray
    pixels: np.ndarray

    @classmethod
    def from_confusion(cls, confusion: Tensor) -> "Scores":
        """confusion: (K, K) integer counts, row = label, column = prediction."""
        matrix = confusion.cpu().numpy()
        hits, labelled, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
        iou = _ratio(hits, labelled + predicted - hits)
        acc = _ratio(hits, labelled)
        dice = _ratio(2 * hits, labelled + predicted)
        total = labelled.sum()
        fwiou = float((np.nan_to_num(iou) * labelled).sum() / total) if total else float("nan")
        aacc = float(hits.sum() / total) if total else float("nan")
        return cls(_mean(iou), _mean(acc), aacc, fwiou, _mean(dice), iou, acc, dice, labelled)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")
