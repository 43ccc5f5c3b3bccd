"""The loaders of a dataset; its constructor is the schema of the config section `data`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import lightning.pytorch as pl
from torch.utils.data import DataLoader

from segformer.data.dataset import SegmentationDataset
from segformer.data.sampler import EvaluationShard, TrainingBatches
from segformer.data.sources import open_source
from segformer.data.transforms import TrainTransform
from segformer.errors import UserError, build
from segformer.inference import Protocol, pair
from segformer.labels import IGNORE, Classes

MAX_AUTO_WORKERS = 8
WORKER_TIMEOUT = 300  # seconds without a batch before a hung worker becomes an error


class SegmentationData(pl.LightningDataModule):
    """Training and validation data of one dataset.

    root: folder below which `train` and `val` look: {images, masks} globs, {scenes, seed} of the toy dataset or
    source objects. classes, ignore: the label contract (`labels.Classes`). batch_size: samples per optimiser step over
    all devices. crop_size: int or [height, width]. base_size: [long, short] that the scale multiplies, None = the
    image's own. protocol: `inference.Protocol`. workers: processes that load training data, "auto" = one a core, at
    most 8. seed: of order and augmentation.
    """

    def __init__(
        self,
        classes: Sequence[str] | Mapping[str, Any],
        train: Any,
        val: Any,
        batch_size: int,
        crop_size: int | Sequence[int],
        root: str | None = None,
        ignore: Sequence[int] | str = (IGNORE,),
        base_size: Sequence[int] | None = None,
        scale: Sequence[float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        protocol: Mapping[str, Any] | None = None,
        workers: int | str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size is {batch_size}, expected at least 1")
        if not 0 < cat_max_ratio <= 1:
            raise UserError(f"data.cat_max_ratio is {cat_max_ratio}, expected more than 0 and at most 1")
        self.classes = Classes.from_config(classes, ignore)
        self.protocol = build("data.protocol", Protocol, protocol or {})
        self.batch_size, self.seed = batch_size, seed
        self.workers = _workers(workers)
        base = sorted(pair("data.base_size", base_size)) if base_size is not None else None
        self.transform = TrainTransform(
            pair("data.crop_size", crop_size), (base[1], base[0]) if base else None, _range(scale), cat_max_ratio
        )
        self._specs = {"train": train, "val": val}
        self._root = root

    def dataset(self, split: str) -> SegmentationDataset:
        """The samples of "train" (augmented) or "val" (as they are)."""
        source = open_source(split, self._specs[split], self._root)
        if not len(source):
            raise UserError(f"data.{split} holds no samples: check its patterns")
        return SegmentationDataset(source, self.classes, self.transform if split == "train" else None)

    def opened(self, *splits: str) -> "SegmentationData":
        """Itself, with these splits opened, so that a wrong path is told before the network is built."""
        self.datasets = {split: self.dataset(split) for split in splits}
        return self

    def summary(self) -> str:
        """One line: how many samples of what."""
        sizes = ", ".join(f"{len(dataset)} {split} images" for split, dataset in self.datasets.items())
        return f"{sizes}, {len(self.classes)} classes, {self.workers} workers"

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        dataset = self.datasets["train"]
        batches = TrainingBatches(
            len(dataset),
            self.batch_size,
            self.seed,
            start_step=trainer.global_step,  # restored before this is called, so a resumed run goes on where it was
            rank=trainer.global_rank,
            world=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
        )
        return DataLoader(dataset, batch_sampler=batches, pin_memory=_on_cuda(trainer), **self._worker_options())

    def val_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        dataset = self.datasets["val"]
        shard = EvaluationShard(len(dataset), trainer.global_rank, trainer.world_size)
        # one image a batch: images keep their own sizes
        return DataLoader(dataset, sampler=shard, batch_size=1, pin_memory=_on_cuda(trainer), **self._worker_options())

    def _worker_options(self) -> dict[str, Any]:
        if self.workers == 0:
            return {"num_workers": 0}
        return {
            "num_workers": self.workers,
            "persistent_workers": True,
            "timeout": WORKER_TIMEOUT,
            "worker_init_fn": _start_worker,
        }


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # workers are the parallelism; threads inside them fight for the same cores


def _on_cuda(trainer: pl.Trainer) -> bool:
    return trainer.strategy.root_device.type == "cuda"


def _range(scale: Any) -> tuple[float, float]:
    ends = list(scale) if isinstance(scale, Sequence) and not isinstance(scale, str) else []
    if len(ends) != 2 or not all(isinstance(end, int | float) for end in ends) or not 0 < ends[0] <= ends[1]:
        raise UserError(f"data.scale is {scale!r}, expected [low, high] with 0 < low <= high")
    return ends[0], ends[1]


def _workers(workers: int | str) -> int:
    if workers == "auto":
        return min(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MAX_AUTO_WORKERS
        )
    if not isinstance(workers, int) or workers < 0:
        raise UserError(f"data.workers is {workers!r}, expected 'auto' or an integer of at least 0")
    return workers
