"""What the data of every task shares: samples dealt out over processes, micro-batches and workers."""

from collections.abc import Callable, Sized
from typing import Any, Self

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from segformer.data.sampler import EvaluationShard, Order, TrainingBatches
from segformer.data.samples import Stream
from segformer.data.statistics import cores, start_worker
from segformer.errors import SharedError, UserError


class Loaders(pl.LightningDataModule):
    """Training and validation data whose order follows from (seed, step) alone, each validation image exactly once.

    A kind of data adds `dataset`, the two loaders, what the network and the task have to know of it (`network`,
    `scoring`), and the constructor that is the schema of the config section `data`. classes: as many as the network
    tells apart. The settings that all share are those of `datamodule.SegmentationData`.
    """

    classes: Sized
    crop_size: tuple[int, int]  # (height, width) of what the network is trained on
    bands: int

    def __init__(
        self,
        batch_size: int,
        micro_batch_size: int | str | None,
        workers: int | str,
        worker_timeout: int,
        max_pixels: int,
        seed: int,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("micro_batch_size", micro_batch_size),
            ("worker_timeout", worker_timeout),
            ("max_pixels", max_pixels),
        ):
            automatic = name == "micro_batch_size" and value == "auto"
            if value is not None and not automatic and (isinstance(value, str) or value < 1):
                raise UserError(f"data.{name} is {value}, expected at least 1")
        if workers != "auto" and (not isinstance(workers, int) or isinstance(workers, bool) or workers < 0):
            raise UserError(f"data.workers is {workers!r}, expected 'auto' or an integer of at least 0")
        self.batch_size, self.micro_batch_size, self.seed = batch_size, micro_batch_size, seed
        self.workers, self.worker_timeout, self.max_pixels = workers, worker_timeout, max_pixels
        self.datasets: dict[str, Any] = {}
        self.order: Order | None = None  # of the training samples, once they are asked for
        self.sending: torch.cuda.Stream | None = None  # to a GPU

    def dataset(self, split: str) -> Any:
        """The samples of "train" or "val": a `Dataset` of known length, or a `Stream`."""
        raise NotImplementedError

    @property
    def network(self) -> dict[str, Any]:
        """What the network has to know of the data: keywords of the function that builds it."""
        raise NotImplementedError

    @property
    def scoring(self) -> dict[str, Any]:
        """What the task has to know of the data: keywords of its constructor."""
        return {}

    def opened(self, *splits: str) -> Self:
        """Itself, with these splits opened, so that a wrong path is told before the network is built."""
        self.datasets = {split: self.dataset(split) for split in splits}
        return self

    def images(self, split: str) -> int | None:
        """The number of samples of an opened split, where it is known."""
        dataset = self.datasets[split]
        return dataset.known_length() if isinstance(dataset, Stream) else len(dataset)

    def accumulated(self, processes: int) -> int:
        """Micro-batches of one optimiser step: the fewest equal ones that share `batch_size` over the processes."""
        if self.batch_size % processes:
            raise SharedError(
                f"data.batch_size={self.batch_size} cannot be shared evenly by {processes} processes: "
                f"use a multiple of {processes}, or another trainer.devices"
            )
        share = self.batch_size // processes
        most = self.micro_batch_size if isinstance(self.micro_batch_size, int) else share
        return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= most)

    def require_images(self, processes: int) -> None:
        """Raises SharedError unless each process has an image to score: Lightning leaves an idle one out and hangs."""
        images = self.images("val")
        if images is not None and images < processes:
            raise SharedError(
                f"data.val holds {images} image{'s' * (images > 1)} for {processes} processes, expected at least one "
                f"for each: use trainer.devices={images}"
            )

    def summary(self, processes: int = 1) -> str:
        """How many samples of what, and who takes how many of them in one optimiser step."""
        counts = {split: self.images(split) for split in self.datasets}
        sizes = ", ".join(f"{'streamed' if count is None else count} {split} images" for split, count in counts.items())
        parts = self.accumulated(processes)
        shares = [f"{count} {what}" for count, what in ((processes, "processes"), (parts, "accumulated")) if count > 1]
        batch = f"batch of {self.batch_size}"
        if shares:
            batch += " = " + " x ".join([*shares, str(self.batch_size // (processes * parts))])
        return f"{sizes}, {len(self.classes)} classes, {batch}"

    def micro_batch(self, trainer: pl.Trainer) -> int:
        """How many samples a process takes at once."""
        return self.batch_size // (trainer.world_size * trainer.accumulate_grad_batches)

    def training_loader(self, trainer: pl.Trainer, order: Order, collate: Callable[..., Any]) -> DataLoader[Any]:
        """Endless micro-batches of this process; the step was restored before this, so a run goes on."""
        self.order = order
        batches = TrainingBatches(
            order,
            self.batch_size,
            self.seed,
            start_step=trainer.global_step,
            rank=trainer.global_rank,
            world=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
        )
        options = self.loader_options(trainer, collate)
        return DataLoader(self.datasets["train"], batch_sampler=batches, **options)

    def scoring_loader(self, trainer: pl.Trainer, batch_size: int, collate: Callable[..., Any]) -> DataLoader[Any]:
        """This process's share of the validation images, each of which exactly one process has."""
        dataset, options = self.datasets["val"], self.loader_options(trainer, collate)
        shard = EvaluationShard(len(dataset), trainer.global_rank, trainer.world_size)
        return DataLoader(dataset, sampler=shard, batch_size=batch_size, **options)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Sends a batch to a GPU by a stream of its own, while it is still at work on the step before."""
        if device.type != "cuda":
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        if self.sending is None:
            self.sending = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.sending):
            batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        using = torch.cuda.current_stream(device)
        using.wait_stream(self.sending)
        for part in tree_leaves(batch):
            if isinstance(part, Tensor):
                part.record_stream(using)  # its memory is not given away before the step is done
        return batch

    def sample_names(self, step: int) -> list[str]:
        """The names of the samples of an optimiser step, over all devices; none of a stream."""
        if self.order is None:
            return []
        source, first = self.datasets["train"].source, step * self.batch_size
        return [source.name(self.order(position)) for position in range(first, first + self.batch_size)]

    def loader_options(self, trainer: pl.Trainer, collate: Callable[..., Any]) -> dict[str, Any]:
        on_cuda = trainer.strategy.root_device.type == "cuda"
        options = {"collate_fn": collate, "pin_memory": on_cuda}
        workers = cores(trainer.num_devices) if self.workers == "auto" else int(self.workers)
        if workers == 0:
            return {**options, "num_workers": 0}
        return {
            **options,
            "num_workers": workers,
            "persistent_workers": True,
            "timeout": self.worker_timeout,
            "worker_init_fn": start_worker,
        }
