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
from segformer.errors import SharedError, UserError, build
from segformer.inference import Protocol, pair
from segformer.labels import IGNORE, Classes
from segformer.pixels import MAX_PIXELS

MAX_AUTO_WORKERS = 8


class SegmentationData(pl.LightningDataModule):
    """Training and validation data of one dataset.

    root: folder below which `train` and `val` look: {images, masks} patterns, {scenes, seed} of the toy dataset or
    source objects. classes, ignore: the label contract (`labels.Classes`). train_ids: file names of masks that hold
    class indices instead of raw ids. batch_size: samples per optimiser step over all devices. micro_batch_size: most
    samples that a device takes at once, the rest of its share being accumulated; None = its whole share. crop_size: int
    or [height, width]. base_size: [long, short] that the scale multiplies, None = the image's own. protocol:
    `inference.Protocol`. workers: processes that read samples for each training process, "auto" = its share of the
    cores, at most 8. worker_timeout: seconds without a batch after which a worker counts as hung. max_pixels: of one
    file. seed: of order and augmentation.
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
        micro_batch_size: int | None = None,
        worker_timeout: int = 300,
        max_pixels: int = MAX_PIXELS,
        train_ids: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("micro_batch_size", micro_batch_size),
            ("worker_timeout", worker_timeout),
            ("max_pixels", max_pixels),
        ):
            if value is not None and value < 1:
                raise UserError(f"data.{name} is {value}, expected at least 1")
        if not 0 < cat_max_ratio <= 1:
            raise UserError(f"data.cat_max_ratio is {cat_max_ratio}, expected more than 0 and at most 1")
        self.classes = Classes.from_config(classes, ignore)
        self.protocol = build("data.protocol", Protocol, protocol or {})
        self.batch_size, self.micro_batch_size, self.seed = batch_size, micro_batch_size, seed
        if workers != "auto" and (not isinstance(workers, int) or isinstance(workers, bool) or workers < 0):
            raise UserError(f"data.workers is {workers!r}, expected 'auto' or an integer of at least 0")
        self.workers, self.worker_timeout = workers, worker_timeout
        base = sorted(pair("data.base_size", base_size)) if base_size is not None else None
        self.transform = TrainTransform(
            pair("data.crop_size", crop_size), (base[1], base[0]) if base else None, _range(scale), cat_max_ratio
        )
        self._specs = {"train": train, "val": val}
        self._root, self._max_pixels, self._train_ids = root, max_pixels, train_ids

    def dataset(self, split: str) -> SegmentationDataset:
        """The samples of "train" (augmented) or "val" (as they are)."""
        source = open_source(split, self._specs[split], self._root, self._max_pixels)
        if not len(source):
            raise UserError(f"data.{split} holds no samples: check its patterns")
        transform = self.transform if split == "train" else None
        return SegmentationDataset(source, self.classes, transform, self._train_ids)

    def opened(self, *splits: str) -> "SegmentationData":
        """Itself, with these splits opened, so that a wrong path is told before the network is built."""
        self.datasets = {split: self.dataset(split) for split in splits}
        return self

    def accumulated(self, processes: int) -> int:
        """Micro-batches of one optimiser step: the fewest equal ones that share `batch_size` over the processes."""
        if self.batch_size % processes:
            raise SharedError(
                f"data.batch_size={self.batch_size} cannot be shared evenly by {processes} processes: "
                f"use a multiple of {processes}, or another trainer.devices"
            )
        share = self.batch_size // processes
        most = self.micro_batch_size or share
        return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= most)

    def require_images(self, processes: int) -> None:
        """Raises SharedError unless each process has an image to score: Lightning leaves an idle one out and hangs."""
        images = len(self.datasets["val"])
        if images < processes:
            raise SharedError(
                f"data.val holds {images} image{'s' * (images > 1)} for {processes} processes, expected at least one "
                f"for each: use trainer.devices={images}"
            )

    def summary(self, processes: int = 1) -> str:
        """How many samples of what, and who takes how many of them in one optimiser step."""
        sizes = ", ".join(f"{len(dataset)} {split} images" for split, dataset in self.datasets.items())
        parts = self.accumulated(processes)
        shares = [f"{count} {what}" for count, what in ((processes, "processes"), (parts, "accumulated")) if count > 1]
        batch = f"batch of {self.batch_size}"
        if shares:
            batch += " = " + " x ".join([*shares, str(self.batch_size // (processes * parts))])
        return f"{sizes}, {len(self.classes)} classes, {batch}"

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
        return DataLoader(dataset, batch_sampler=batches, pin_memory=_on_cuda(trainer), **self._worker_options(trainer))

    def val_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        dataset = self.datasets["val"]
        self.require_images(trainer.world_size)
        shard = EvaluationShard(len(dataset), trainer.global_rank, trainer.world_size)
        # one image a batch: images keep their own sizes
        return DataLoader(
            dataset, sampler=shard, batch_size=1, pin_memory=_on_cuda(trainer), **self._worker_options(trainer)
        )

    def _worker_options(self, trainer: pl.Trainer) -> dict[str, Any]:
        workers = _share_of_cores(trainer.num_devices) if self.workers == "auto" else int(self.workers)
        if workers == 0:
            return {"num_workers": 0}
        return {
            "num_workers": workers,
            "persistent_workers": True,
            "timeout": self.worker_timeout,
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


def _share_of_cores(processes: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // processes, MAX_AUTO_WORKERS))
