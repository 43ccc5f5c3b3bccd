"""What is counted of each image that is scored: all that a report is made of, in whole numbers."""

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch

from segformer.boundary import boundary_parts
from segformer.cityscapes import InstanceCounts
from segformer.errors import UserError
from segformer.labels import Classes, read_mask
from segformer.metrics import Tally, confusion_matrix
from segformer.pixels import Readable


class Counted(NamedTuple):
    """Of one image. matrix: (K, K + 1). boundary: (3, K). shares: (K, 3), where there is an instance map."""

    matrix: np.ndarray
    boundary: np.ndarray
    shares: np.ndarray | None


class Counts:
    """The counts of images, which are added in any order on any number of processes and come to the same.

    tally: the confusion matrix of each. boundary: (3, K) as `boundary.boundary_parts`, summed. instances: for
    Cityscapes' iIoU, None where the classes have no instances.
    """

    def __init__(self, classes: Classes) -> None:
        self.tally = Tally(len(classes))
        self.boundary = np.zeros((3, len(classes)), np.int64)
        self.instances = _instance_counts(classes)

    def count(self, prediction: np.ndarray, label: np.ndarray, instances: Readable | None = None) -> Counted:
        """What is in one image; changes nothing, so that threads may call it.

        prediction: (H, W) integers 0..K-1, or K for no class. label: (H, W) uint8 train ids, 255 = ignore. instances:
        file of its instance map.
        """
        classes = self.tally.classes
        shares = None
        if self.instances is not None and instances is not None:
            try:
                shares = self.instances.count(prediction, read_mask(instances))
            except UserError as error:
                raise UserError(f"instance map {instances}: {error}") from error
        # one row and column more than classes: pixels of no class, and no label is that
        matrix = confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(label), classes + 1)[:classes]
        return Counted(matrix.numpy(), boundary_parts(prediction, label, classes), shares)

    def add(self, name: str, counted: Counted) -> None:
        self.tally.add(name, counted.matrix)
        self.boundary += counted.boundary
        if self.instances is not None and counted.shares is not None:
            self.instances.add(counted.shares)

    def merged(self, others: Sequence[Self]) -> Self:
        """With the images of other processes; changes itself."""
        self.tally = self.tally.merged(other.tally for other in others)
        self.boundary = np.sum([self.boundary, *(other.boundary for other in others)], axis=0)
        if self.instances is not None:
            self.instances = self.instances.merged(other.instances for other in others if other.instances is not None)
        return self


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Full names -> what is left of them behind the folder that holds all: equal on every machine.

    Raises:
        UserError: two samples have one name.
    """
    found: dict[str, str] = {}
    for name in names:
        if name in found:
            raise UserError(
                f"two samples are called {name!r}, expected a name of its own for each: a report names images"
            )
        found[name] = name
    folders = [os.path.dirname(name) for name in found]
    if not folders or not all(map(os.path.isabs, folders)):
        return found
    base = os.path.commonpath(folders)
    return {name: os.path.relpath(name, base).replace(os.sep, "/") for name in found}


def _instance_counts(classes: Classes) -> InstanceCounts | None:
    if not classes.categories or not classes.instance_sizes or classes.of_colors:
        return None
    found = {name: np.flatnonzero(classes.lookup == index) for index, name in enumerate(classes.names)}
    ids = {name: int(raw[0]) for name, raw in found.items() if len(raw)}  # data may lack a class
    sizes = {name: size for name, size in classes.instance_sizes.items() if name in ids}
    return InstanceCounts(classes.names, classes.categories, sizes, ids) if sizes else None
