"""Cityscapes' own scores beside class IoU: IoU of categories, and iIoU, in which every instance weighs the same.

Source: the rules of cityscapesScripts' evalPixelLevelSemanticLabeling, in train ids. Pixels whose label is ignored are
no false positives; a class is predicted for every pixel, so that no prediction is ignored.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from segformer.errors import UserError, nearest

_INSTANCE = 1000  # an instance is labelId * 1000 + n; values up to this one are label ids of what has no instances
_ONE = 2**64  # shares of an instance are whole numbers of 1 / _ONE: such sums are equal in any order


def category_iou(confusion: np.ndarray, categories: Sequence[str]) -> dict[str, float]:
    """IoU, 0..1, of each category, in order of first use; confusion inside a category is forgiven. NaN where absent.

    confusion: (K, K + 1) counts, row = label, column = prediction, the last one of no class; (K, K) has no such ones.
    categories: the category of each of the K classes.
    """
    scores = {}
    for category, inside in _members(categories).items():
        hits = confusion[np.ix_(inside, inside)].sum()
        scores[category] = _share(float(hits), float(confusion[inside].sum() + confusion[:, inside].sum() - hits))
    return scores


def mean_score(scores: Mapping[str, float]) -> float:
    """Mean of the scores that are not NaN; NaN if all are."""
    present = [score for score in scores.values() if not np.isnan(score)]
    return sum(present) / len(present) if present else float("nan")


class InstanceCounts:
    """What iIoU needs beside the confusion matrix, summed over images; integers, so equal in any order of images.

    iIoU = iTP / (iTP + FP + iFN): the right and the missed pixels of an instance are scaled to the mean size of its
    class, false positives are not. In a category's iIoU a pixel is right if its category is.

    names: K class names in order of train id. categories: the category of every class. instance_sizes: mean pixels of
    an instance, for the classes that have them: instances of other label ids (Cityscapes: caravan, trailer) do not
    count, and a category has an iIoU if all its classes have a size. ids: label id of each class with a size.

    shares: (K, 3) whole numbers of any size: instances; sum of the share of each that is predicted as its class, and
    as its category, both in units of 2^-64 (each share rounded down to one).
    """

    def __init__(
        self,
        names: Sequence[str],
        categories: Mapping[str, str],
        instance_sizes: Mapping[str, float],
        ids: Mapping[str, int],
    ) -> None:
        _check(names, categories, instance_sizes, ids)
        self.names = tuple(names)
        self.categories = tuple(categories[name] for name in names)
        self.sizes = {self.names.index(name): float(size) for name, size in instance_sizes.items()}
        self.shares = np.zeros((len(names), 3), object)
        self._classes = {ids[self.names[index]]: index for index in self.sizes}
        self._category = np.append(np.unique(self.categories, return_inverse=True)[1], -1)  # the last: of no class

    def add(self, shares: np.ndarray) -> None:
        """Adds what `count` found in an image."""
        self.shares += shares

    def count(self, prediction: np.ndarray, instances: np.ndarray) -> np.ndarray:
        """The shares of one image. prediction: (H, W) train ids 0..K-1, K or above = no class.

        instances: (H, W) uint16, labelId * 1000 + n for an instance; other values up to 1000 (groups: the label id) are
        none. It alone decides what an instance is: its pixels count even where the label is ignored.
        """
        if prediction.shape != instances.shape:
            raise UserError(
                f"prediction and instance map are {prediction.shape} and {instances.shape}, expected equal (height, "
                "width): give the files of one image"
            )
        if instances.dtype != np.uint16:
            raise UserError(
                f"the instance map is {instances.dtype}, expected uint16: give the 16-bit *_instanceIds.png"
            )
        inside = instances > _INSTANCE
        shares = np.zeros_like(self.shares)
        found, values = np.minimum(prediction[inside], len(self.names)), instances[inside]
        for value in np.flatnonzero(np.bincount(values)):
            index = self._classes.get(int(value) // _INSTANCE)
            if index is None:
                continue
            pixels = found[values == value]
            hits = int(np.count_nonzero(pixels == index))
            kin = int(np.count_nonzero(self._category[pixels] == self._category[index]))
            shares[index] += np.array([1, hits * _ONE // pixels.size, kin * _ONE // pixels.size], object)
        return shares

    def merged(self, others: Iterable["InstanceCounts"]) -> "InstanceCounts":
        """The counts of these images and of the others' (same classes), in whatever order; changes none of them."""
        total = copy.copy(self)
        total.shares = np.sum([part.shares for part in (self, *others)], axis=0)
        return total

    def class_iiou(self, confusion: np.ndarray) -> dict[str, float]:
        """iIoU, 0..1, of each class that has instances; NaN where it is neither labelled as such nor predicted.

        confusion: counts of the same images as `category_iou` takes them.
        """
        return {self.names[index]: self._iiou(confusion, [index], share=1) for index in sorted(self.sizes)}

    def category_iiou(self, confusion: np.ndarray) -> dict[str, float]:
        """iIoU, 0..1, of each category all of whose classes have instances; NaN where absent."""
        members = _members(self.categories).items()
        return {
            name: self._iiou(confusion, inside, share=2) for name, inside in members if self.sizes.keys() >= set(inside)
        }

    def _iiou(self, confusion: np.ndarray, inside: list[int], share: int) -> float:
        hits = sum(self.sizes[index] * (self.shares[index, share] / _ONE) for index in inside)
        whole = sum(self.sizes[index] * self.shares[index, 0] for index in inside)
        wrong = confusion[:, inside].sum() - confusion[np.ix_(inside, inside)].sum()
        return _share(hits, whole + float(wrong))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _members(categories: Sequence[str]) -> dict[str, list[int]]:
    """The classes of each category, in order of first use."""
    return {name: [k for k, other in enumerate(categories) if other == name] for name in dict.fromkeys(categories)}


def _check(
    names: Sequence[str], categories: Mapping[str, str], instance_sizes: Mapping[str, float], ids: Mapping[str, int]
) -> None:
    for name in names:
        if name not in categories:
            raise UserError(f"class {name!r} has no category{nearest(name, categories)}: name one for every class")
    for name, size in instance_sizes.items():
        if name not in names:
            raise UserError(
                f"instance sizes name {name!r}, which is no class{nearest(name, names)}: name classes that are scored"
            )
        if not 0 < size < float("inf"):
            raise UserError(f"the instance size of {name!r} is {size}, expected a mean number of pixels above 0")
        if name not in ids:
            raise UserError(f"class {name!r} has an instance size but no label id: give the id its instances carry")
    sized = {ids[name]: name for name in instance_sizes}
    if len(sized) < len(instance_sizes):
        raise UserError(
            f"classes {', '.join(instance_sizes)} share a label id, expected one of its own for each with instances"
        )
