"""Source + label contract + transform -> {"image": (3, H, W) uint8, "mask": (H, W) uint8 with 255 = ignore}."""

import time
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from segformer.data.sampler import Draw
from segformer.data.sources import Pairs, Source
from segformer.data.transforms import TrainTransform
from segformer.errors import UserError
from segformer.labels import Classes, UndeclaredValues

NAMED_FILES = 5  # with undeclared values, in one error
SEARCH_SECONDS = 10.0  # at most, for the others of them


class SegmentationDataset(Dataset[dict[str, Tensor]]):
    """Samples by `Draw(sample, seed)` for training, by plain index for evaluation (no transform).

    train_ids: masks whose file name matches this pattern hold train ids, so no raw ids apply to them.
    """

    def __init__(
        self,
        source: Source,
        classes: Classes,
        transform: TrainTransform | None = None,
        train_ids: str | None = None,
    ) -> None:
        self.source, self.classes, self.transform, self.train_ids = source, classes, transform, train_ids

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Draw | int) -> dict[str, Tensor]:
        index = key.sample if isinstance(key, Draw) else key
        image, raw = self.source[index]
        try:
            mask = self._encode(index, raw)
        except UndeclaredValues as error:
            raise self._undeclared(index, error) from error
        if self.transform is not None:
            assert isinstance(key, Draw), "training samples need a seed"
            image, mask = self.transform(image, mask, key.seed)
        channels_first = np.ascontiguousarray(image.transpose(2, 0, 1))
        return {"image": torch.from_numpy(channels_first), "mask": torch.from_numpy(np.ascontiguousarray(mask))}

    def _encode(self, index: int, raw: np.ndarray) -> np.ndarray:
        indices = self._holds_train_ids(index)
        if self.train_ids is not None and not indices and self.classes.looks_encoded(raw):
            raise UserError(
                f"mask {self._mask_name(index)} looks like train ids (255, and no other value above "
                f"{len(self.classes) - 1}) but its name says raw ids: add 'data.train_ids=\"*\"' if it holds train "
                "ids, else data.train_ids=null"
            )
        return self.classes.encode(raw, indices)

    def _holds_train_ids(self, index: int) -> bool:
        return self.train_ids is not None and fnmatchcase(Path(self._mask_name(index)).name, self.train_ids)

    def _mask_name(self, index: int) -> str:
        return self.source.mask_name(index) if isinstance(self.source, Pairs) else self.source.name(index)

    def _undeclared(self, index: int, first: UndeclaredValues) -> UserError:
        """One error for all masks like this one: the first five of the split, as far as they are found in time."""
        found, stop = {index: first}, time.monotonic() + SEARCH_SECONDS
        for other in range(len(self)):
            if len(found) == NAMED_FILES or time.monotonic() > stop:
                break
            try:
                self._encode(
                    other, self.source.mask(other) if isinstance(self.source, Pairs) else self.source[other][1]
                )
            except UndeclaredValues as error:
                found[other] = error
            except UserError:  # damaged in another way: told when it is its turn
                continue
        files = "; ".join(f"{self._mask_name(number)} ({found[number]})" for number in sorted(found))
        fix = "list them under data.classes or in data.ignore"
        if self._holds_train_ids(index):
            fix = "their names say train ids, so add data.train_ids=null if they hold raw ids"
        return UserError(f"values that none of the {len(self.classes)} classes declares, in {files}: {fix}")
