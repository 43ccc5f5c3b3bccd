"""The loaders of a dataset; its constructor is the schema of the config section `data`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader

from segformer.data.cache import Cached
from segformer.data.dataset import Encoder, SegmentationDataset, Skipped, StreamedDataset, collate
from segformer.data.loaders import Loaders
from segformer.data.sampler import Sampling
from segformer.data.samples import Source, Stream
from segformer.data.sources import open_source
from segformer.data.statistics import class_pixels, cores
from segformer.data.transforms import TrainTransform
from segformer.errors import SharedError, UserError, build
from segformer.inference import Protocol, pair
from segformer.labels import IGNORE, Classes
from segformer.launch import process
from segformer.pixels import MAX_PIXELS, MEAN, STD

MAX_BANDS = 128


class SegmentationData(Loaders):
    """Training and validation data of one dataset.

    root: folder, archive or hub dataset in which `train` and `val` look; their kinds stand in `sources.open_source`.
    classes, ignore, mask_values, reduce_zero_label: the label contract (`labels.Classes`). train_ids: file names of
    masks that hold class indices instead of raw ids. batch_size: samples per optimiser step over all devices.
    micro_batch_size: most samples that a device takes at once, the rest of its share being accumulated; None = all of
    it, "auto" = as many as fit (`memory.settle_micro_batch`). crop_size: int or [height, width]. base_size: [long,
    short] that the scale multiplies, None = the image's own. exact, augment: see `transforms.TrainTransform`. sampling:
    keywords of `sampler.Sampling`. protocol: `inference.Protocol`. bands: channels of an image. mean, std: of each band
    on the scale 0 to 255, None = ImageNet's.
    workers: processes that read samples for each training process, "auto" = its share of the cores, at most 8.
    worker_timeout: seconds without a batch after which a worker counts as hung. max_pixels: of one file. cache: folder
    for decoded samples. instances: {end of a mask's file name: that of the instance map beside it}, for Cityscapes'
    iIoU. published: {"single_scale" and "multi_scale": {model: mIoU in percent}} of the paper, to be shown beside one's
    own. check: samples of each split that are looked at before training. on_bad_sample: "error", or
    "skip" what cannot be read in training, up to max_bad_share of the samples. seed: of order and augmentation.
    """

    classes: Classes

    def __init__(
        self,
        classes: Sequence[str] | Mapping[str, Any],
        train: Any,
        val: Any,
        batch_size: int,
        crop_size: int | Sequence[int],
        root: str | None = None,
        ignore: Sequence[Any] | str = (IGNORE,),
        base_size: Sequence[int] | None = None,
        scale: Sequence[float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        protocol: Mapping[str, Any] | None = None,
        workers: int | str = "auto",
        seed: int = 0,
        micro_batch_size: int | str | None = None,
        worker_timeout: int = 300,
        max_pixels: int = MAX_PIXELS,
        train_ids: str | None = None,
        mask_values: str = "ids",
        reduce_zero_label: bool = False,
        bands: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        exact: bool = False,
        augment: Sequence[Any] = (),
        sampling: Mapping[str, Any] | None = None,
        cache: str | None = None,
        check: int = 0,
        on_bad_sample: str = "error",
        max_bad_share: float = 0.01,
        instances: Mapping[str, str] | None = None,
        published: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        super().__init__(batch_size, micro_batch_size, workers, worker_timeout, max_pixels, seed)
        if bands < 1:
            raise UserError(f"data.bands is {bands}, expected at least 1")
        if bands > MAX_BANDS:
            raise UserError(
                f"data.bands is {bands}, expected at most {MAX_BANDS}, which OpenCV can resize: choose bands"
            )
        if check < 0:
            raise UserError(f"data.check is {check}, expected a number of samples of at least 0")
        if not 0 < cat_max_ratio <= 1:
            raise UserError(f"data.cat_max_ratio is {cat_max_ratio}, expected more than 0 and at most 1")
        if on_bad_sample not in ("error", "skip"):
            raise UserError(f"data.on_bad_sample is {on_bad_sample!r}, expected error or skip")
        if not 0 <= max_bad_share <= 1:
            raise UserError(f"data.max_bad_share is {max_bad_share}, expected a share from 0 to 1")
        self.classes = Classes.from_config(classes, ignore, mask_values, reduce_zero_label)
        self.encoder = Encoder(self.classes, train_ids)
        self.protocol = build("data.protocol", Protocol, protocol or {})
        self.sampling = build("data.sampling", Sampling, sampling or {})
        self.bands = bands
        self.mean, self.std = _statistics("mean", mean, bands, MEAN), _statistics("std", std, bands, STD)
        self.crop_size = pair("data.crop_size", crop_size)
        base = sorted(pair("data.base_size", base_size)) if base_size is not None else None
        fill = tuple(min(255, max(0, round(value))) for value in self.mean)
        self.transform = TrainTransform(
            self.crop_size, (base[1], base[0]) if base else None, _range(scale), cat_max_ratio, exact, augment, fill
        )
        self.specs = {"train": train, "val": val}
        self.root, self.cache, self.check = root, cache, check
        self.labels_needed = True  # False: images without masks may be predicted
        self.on_bad_sample, self.max_bad_share = on_bad_sample, max_bad_share
        self.instances, self.published = dict(instances or {}), dict(published or {})

    def source(self, split: str) -> Source | Stream:
        """The raw samples of "train" or "val"."""
        source = open_source(split, self.specs[split], self.root, self.max_pixels, self.bands)
        if isinstance(source, Stream):
            self._require_plain_reading(split)
            return source
        if not len(source):
            raise UserError(f"data.{split} holds no samples: check its patterns")
        if self.cache and source.stamp(0) is None:
            raise UserError(
                f"data.cache={self.cache} is for files, whose changes are seen, but data.{split} has none: "
                "take data.cache=null"
            )
        return Cached(source, Path(self.cache)) if self.cache else source

    def _require_plain_reading(self, split: str) -> None:
        for name, value, plain in (
            ("cache", self.cache, None),
            ("sampling.name", self.sampling.name, "uniform"),
            ("on_bad_sample", self.on_bad_sample, "error"),
        ):
            if value != plain:
                raise UserError(
                    f"data.{name}={value} needs samples by number, but data.{split} streams them: "
                    f"take data.{split}.streaming=false"
                )

    def dataset(self, split: str) -> SegmentationDataset | Stream:
        source = self.source(split)
        if isinstance(source, Stream):
            return source
        if not source.labelled and (self.labels_needed or split == "train"):
            raise UserError(f"data.{split} has images without masks: they can be predicted, not scored or trained on")
        if split != "train":
            return SegmentationDataset(source, self.encoder)
        skipped = Skipped(len(source), self.max_bad_share) if self.on_bad_sample == "skip" else None
        return SegmentationDataset(source, self.encoder, self.transform, skipped)

    @property
    def network(self) -> dict[str, Any]:
        """What the network has to know of the data: the names of the classes, and the statistics of unusual images."""
        numbers = {"num_channels": self.bands, "pixel_mean": list(self.mean), "pixel_std": list(self.std)}
        usual = (self.bands, self.mean, self.std) == (3, MEAN, STD)
        return {"names": self.classes.names, "statistics": {} if usual else numbers}

    @property
    def scoring(self) -> dict[str, Any]:
        return {"protocol": self.protocol}

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        dataset = self.datasets["train"]
        if not isinstance(dataset, Stream):
            order = self.sampling.order(self.seed, self._class_pixels(dataset, trainer))
            return self.training_loader(trainer, order, collate)
        self._require_rows(trainer.world_size)
        micro = self.micro_batch(trainer)
        streamed = StreamedDataset(
            dataset,
            self.encoder,
            self.transform,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
            start=trainer.global_step * trainer.accumulate_grad_batches,
            batch_size=micro,
        )
        return DataLoader(streamed, batch_size=micro, **self.loader_options(trainer, collate))

    def state_dict(self) -> dict[str, Any]:
        """What the order of a stream follows from beside the seed: processes, their workers and micro-batches."""
        return {"readers": self._readers()} if isinstance(self.datasets["train"], Stream) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before, now = state_dict["readers"], self._readers()
        if before != now and process() == 0:
            changed = "; ".join(
                f"{name} {before[name]} then, {now[name]} now" for name in now if before[name] != now[name]
            )
            print(
                f"warning: data.train is a stream, whose order follows from its readers ({changed}): samples come in "
                "another order, and some again",
                file=sys.stderr,
            )

    def _readers(self) -> dict[str, int]:
        trainer = self.trainer
        assert trainer is not None
        workers = self.loader_options(trainer, collate)["num_workers"]
        return {"processes": trainer.world_size, "workers": workers, "micro_batch_size": self.micro_batch(trainer)}

    def _require_rows(self, processes: int) -> None:
        rows = self.images("train")
        if rows is not None and rows < processes:
            raise SharedError(
                f"data.train streams {rows} samples for {processes} processes, expected at least one for each: "
                f"use trainer.devices={max(rows, 1)}"
            )

    def _class_pixels(self, dataset: SegmentationDataset, trainer: pl.Trainer) -> np.ndarray:
        if self.sampling.name == "uniform":
            return np.zeros((len(dataset), 1))
        return class_pixels(dataset.source, self.encoder, cores(trainer.num_devices))

    def val_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        self.require_images(trainer.world_size)
        dataset = self.datasets["val"]
        # one image a batch: images keep their own sizes
        if not isinstance(dataset, Stream):
            return self.scoring_loader(trainer, 1, collate)
        streamed = StreamedDataset(dataset, self.encoder, None, 0, trainer.global_rank, trainer.world_size)
        return DataLoader(streamed, batch_size=1, **self.loader_options(trainer, collate))


def _statistics(name: str, values: Any, bands: int, usual: Sequence[float]) -> tuple[float, ...]:
    """The mean or deviation of each band; ImageNet's where nothing is given and the bands are three."""
    if values is None and bands == len(usual):
        return tuple(usual)
    if (
        not isinstance(values, Sequence)
        or len(values) != bands
        or not all(isinstance(value, int | float) for value in values)
        or (name == "std" and min(values) <= 0)
    ):
        raise UserError(
            f"data.{name} is {values!r}, expected {bands} numbers on the scale 0 to 255, one a band: "
            "`python -m segformer check ... --full` measures them"
        )
    return tuple(float(value) for value in values)


def _range(scale: Any) -> tuple[float, float]:
    ends = list(scale) if isinstance(scale, Sequence) and not isinstance(scale, str) else []
    if len(ends) != 2 or not all(isinstance(end, int | float) for end in ends) or not 0 < ends[0] <= ends[1]:
        raise UserError(f"data.scale is {scale!r}, expected [low, high] with 0 < low <= high")
    return ends[0], ends[1]
