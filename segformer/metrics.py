"""The confusion matrix of a segmentation and everything that follows from it.

Pixels are summed over the whole dataset and divided once, as mmsegmentation and Cityscapes do; a mean over images
(`torchmetrics.segmentation.MeanIoU`) is another number.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from segformer.errors import UserError
from segformer.files import reason

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # (N, K) int64 pixels of each image: hit, labelled, predicted
EXACT = 2**24  # OpenCV counts in float32: a part of no more pixels loses none
VERSION = 1  # of the scores of images as they are written
IMAGES = "images.json"  # the file of them, beside report.json


def confusion_matrix(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """(K, K) int64: row = label, column = prediction. Pixels labelled outside 0..K-1 (255 = ignore) do not count.

    prediction and label: equal shapes; predictions lie in 0..K-1. Stays on the device.
    """
    if label.device.type == "cpu" and label.dtype == prediction.dtype == torch.uint8:
        return _counted(prediction.flatten(), label.flatten(), classes)
    if label.dtype == torch.uint8 and classes <= 256:
        # one row for each value a byte can hold is cheaper than telling the ignored pixels first
        rows, row = 256, label.to(torch.int32)
    else:
        wide = label.long()
        rows, row = classes + 1, torch.where((wide >= 0) & (wide < classes), wide, classes).to(torch.int32)
    key = row * classes + prediction.to(torch.int32)
    if key.device.type == "cpu":  # torch.bincount is slow on CPU above a million numbers
        counts = torch.from_numpy(np.bincount(key.flatten().numpy(), minlength=rows * classes))
    else:
        counts = torch.bincount(key.flatten(), minlength=rows * classes)
    return counts.view(rows, classes)[:classes]


def _counted(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """The same of bytes by a histogram of two images, which reads each byte once and builds no keys."""
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for part in zip(torch.split(label, EXACT), torch.split(prediction, EXACT), strict=True):
        pair = [values.numpy()[None] for values in part]
        found = cv2.calcHist(pair, [0, 1], None, [classes, classes], [0, classes, 0, classes])
        counts += torch.from_numpy(found).long()
    return counts


@dataclass(frozen=True)
class Scores:
    """Scores of one dataset, fractions 0..1; NaN where a class (or every class) is absent.

    miou: mean IoU over the classes that occur in labels or predictions. macc: mean recall over those that occur in
    labels. aacc: share of right pixels. fwiou: IoU weighted by label frequency. mdice: mean of 2I / (label +
    prediction), which is F1, and mprecision: mean of I / prediction, both over the classes of miou: one that is
    labelled but never predicted counts as 0, as it does for miou. (mmsegmentation's mPrecision and mFscore leave it out
    and come out higher the more classes a model misses altogether.) iou, acc (recall), precision, dice: (K,) float64.
    pixels, predicted: (K,) int64 pixels of labels and of predictions; what is ignored counts in neither.

    Source: mmsegmentation's IoUMetric, whose nanmean leaves absent classes out.
    """

    miou: float
    macc: float
    aacc: float
    fwiou: float
    mdice: float
    mprecision: float
    iou: np.ndarray
    acc: np.ndarray
    precision: np.ndarray
    dice: np.ndarray
    pixels: np.ndarray
    predicted: np.ndarray

    @classmethod
    def from_confusion(cls, confusion: Tensor | np.ndarray) -> "Scores":
        """confusion: (K, K) integer counts, row = label, column = prediction; a column more is of no class."""
        matrix = confusion.cpu().numpy() if isinstance(confusion, Tensor) else confusion
        hits, labelled, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)[: len(matrix)]
        iou = iou_of(hits, labelled, predicted)
        acc = _ratio(hits, labelled)
        precision = np.where((labelled > 0) & (predicted == 0), 0.0, _ratio(hits, predicted))
        dice = _ratio(2 * hits, labelled + predicted)
        total = labelled.sum()
        return cls(
            miou=float(mean_of(iou)),
            macc=float(mean_of(acc)),
            aacc=float(_ratio(hits.sum(), total)),
            fwiou=float(_ratio((np.nan_to_num(iou) * labelled).sum(), total)),
            mdice=float(mean_of(dice)),
            mprecision=float(mean_of(precision)),
            iou=iou,
            acc=acc,
            precision=precision,
            dice=dice,
            pixels=labelled,
            predicted=predicted,
        )


class Tally:
    """The confusion matrix of each image, of which only the cells that are not zero are kept.

    Its columns are the K classes and, where predictions come from elsewhere, K for pixels predicted as none of them.

    Integers, in order of the images' names: neither the order in which images arrive nor the number of processes that
    score them leaves a trace.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.cells: dict[str, np.ndarray] = {}  # name -> (n, 3) int64: label, prediction, pixels

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def names(self) -> list[str]:
        return sorted(self.cells)

    def add(self, name: str, matrix: Tensor | np.ndarray) -> None:
        """matrix: (K, K) or (K, K + 1) integer counts of the image, row = label, column = prediction.

        Raises:
            UserError: an image of this name was added before.
        """
        if name in self.cells:
            raise UserError(f"two images are called {name!r}, expected a name of its own for each: rename one of them")
        counts = matrix.cpu().numpy() if isinstance(matrix, Tensor) else matrix
        label, prediction = np.nonzero(counts)
        self.cells[name] = np.stack([label, prediction, counts[label, prediction]], axis=1).astype(np.int64)

    def merged(self, others: Iterable["Tally"]) -> "Tally":
        """With the images of others, as those of other processes."""
        whole = Tally(self.classes)
        for tally in (self, *others):
            if tally.classes != self.classes:
                raise UserError(f"one part has {self.classes} classes, another {tally.classes}: expected the same")
            for name in whole.cells.keys() & tally.cells.keys():
                raise UserError(f"image {name!r} was scored twice, expected each image once")
            whole.cells |= tally.cells
        return whole

    def confusion(self) -> np.ndarray:
        """(K, K + 1) int64 of all images: row = label, column = prediction, the last one of no class."""
        matrix = np.zeros((self.classes, self.classes + 1), np.int64)
        for cells in self.cells.values():
            matrix[cells[:, 0], cells[:, 1]] += cells[:, 2]
        return matrix

    def parts(self) -> Parts:
        """Of each image in order of `names` and each class the pixels hit, labelled and predicted."""
        hits, labelled, predicted = np.zeros((3, len(self), self.classes + 1), np.int64)
        for index, name in enumerate(self.names):
            label, prediction, pixels = self.cells[name].T
            right = label == prediction
            hits[index, label[right]] = pixels[right]
            np.add.at(labelled[index], label, pixels)
            np.add.at(predicted[index], prediction, pixels)
        return hits[:, :-1], labelled[:, :-1], predicted[:, :-1]

    def renamed(self, names: Mapping[str, str]) -> "Tally":
        """The same images by other names."""
        tally = Tally(self.classes)
        tally.cells = {names[name]: cells for name, cells in self.cells.items()}
        return tally

    def to_json(self) -> dict[str, Any]:
        """Plain values: {"version", "classes", "images": [[name, [[label, prediction, pixels], ...]], ...]}."""
        images = [[name, self.cells[name].tolist()] for name in self.names]
        return {"version": VERSION, "classes": self.classes, "images": images}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Tally":
        """What `to_json` made.

        Raises:
            UserError: it is of another version, or damaged.
        """
        if values.get("version") != VERSION:
            raise UserError(f"scores of images are of version {values.get('version')!r}, expected {VERSION}")
        try:
            tally = cls(int(values["classes"]))
            for name, cells in values["images"]:
                found = np.array(cells or np.zeros((0, 3), int))
                if found.dtype != np.int64 or found.ndim != 2 or found.shape[1] != 3 or name in tally.cells:
                    raise ValueError(repr(name))
                if found.size and (found.min() < 0 or (found.max(axis=0)[:2] - [0, 1] >= tally.classes).any()):
                    raise ValueError(repr(name))
                tally.cells[str(name)] = found
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"scores of images are damaged ({reason(error)}): evaluate again") from error
        return tally


def iou_of(hits: np.ndarray, labelled: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Intersection over union of pixel counts of any shape; NaN where a class is in neither labels nor predictions."""
    return _ratio(hits, labelled + predicted - hits)


def mean_of(values: np.ndarray) -> np.ndarray:
    """(..., K) -> (...): the mean over the classes that are not NaN; NaN where all are."""
    present = ~np.isnan(values)
    return _ratio(np.where(present, values, 0).sum(axis=-1), present.sum(axis=-1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)
