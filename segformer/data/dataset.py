"""Source + label contract + transform -> {"image": (3, H, W) uint8, "mask": (H, W) uint8 with 255 = ignore}."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from segformer.data.sampler import Draw
from segformer.data.sources import Source
from segformer.data.transforms import TrainTransform
from segformer.labels import Classes


class SegmentationDataset(Dataset[dict[str, Tensor]]):
    """Samples by `Draw(sample, seed)` for training, by plain index for evaluation (no transform)."""

    def __init__(self, source: Source, classes: Classes, transform: TrainTransform | None = None) -> None:
        self.source, self.classes, self.transform = source, classes, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Draw | int) -> dict[str, Tensor]:
        index = key.sample if isinstance(key, Draw) else key
        image, raw = self.source[index]
        mask = self.classes.encode(raw, self.source.name(index))
        if self.transform is not None:
            assert isinstance(key, Draw), "training samples need a seed"
            image, mask = self.transform(image, mask, key.seed)
        channels_first = np.ascontiguousarray(image.transpose(2, 0, 1))
        return {"image": torch.from_numpy(channels_first), "mask": torch.from_numpy(np.ascontiguousarray(mask))}
