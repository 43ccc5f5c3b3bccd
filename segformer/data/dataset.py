"""Source + label contract + transform -> {"image": (C, H, W) uint8, "mask": (H, W) uint8 with 255 = ignore}.

A sample of an evaluation has its "name", too.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from segformer.data.sampler import Draw, mix
from segformer.data.samples import Sample, Source, Stream
from segformer.data.transforms import TrainTransform
from segformer.errors import UserError
from segformer.labels import IGNORE, Classes, UndeclaredValues, WrongKind

NAMED_FILES = 5  # with undeclared values, in one error
SEARCH_SECONDS = 10.0  # at most, for the others of them


class Encoder:
    """Raw masks -> train ids, by the classes and by what the mask's name says.

    train_ids: masks whose file name matches this pattern hold train ids, so no raw ids apply to them.
    """

    def __init__(self, classes: Classes, train_ids: str | None = None) -> None:
        self.classes, self.train_ids = classes, train_ids

    def holds_train_ids(self, name: str) -> bool:
        return self.train_ids is not None and fnmatchcase(Path(name).name, self.train_ids)

    def part(self, raw: np.ndarray, name: str) -> np.ndarray:
        """A window of the mask `name`, raw -> (h, w) uint8 train ids.

        Raises:
            UndeclaredValues: values that no class declares; the message says how many, not yet where.
            UserError: colours where ids are declared, or the other way round.
        """
        try:
            return self.classes.encode(raw, self.holds_train_ids(name))
        except WrongKind as error:
            raise UserError(f"mask {name} {error}") from error

    def whole(self, raw: np.ndarray, name: str) -> np.ndarray:
        """As `part`, and train ids under the name of raw ids are noticed, which takes the whole mask."""
        if self.train_ids is not None and not self.holds_train_ids(name) and self.classes.looks_encoded(raw):
            raise UserError(
                f"mask {name} looks like train ids (255, and no other value above {len(self.classes) - 1}) but its "
                "name says raw ids: add 'data.train_ids=\"*\"' if it holds train ids, else data.train_ids=null"
            )
        return self.part(raw, name)

    def explained(self, errors: dict[str, UndeclaredValues]) -> UserError:
        """One error for the undeclared values of several masks, by their names."""
        files = "; ".join(f"{name} ({error})" for name, error in errors.items())
        fix = "list them under data.classes or in data.ignore"
        if self.holds_train_ids(next(iter(errors))):
            fix = "their names say train ids, so add data.train_ids=null if they hold raw ids"
        return UserError(f"values that none of the {len(self.classes)} classes declares, in {files}: {fix}")


class Skipped:
    """Samples that could not be read, each told once; shared by the workers of a process.

    max_share: of the samples, above which the training stops.
    """

    def __init__(self, length: int, max_share: float) -> None:
        self.flags, self.max_share = _shared(length), max_share

    def add(self, index: int, error: UserError) -> None:
        if self.flags[index]:
            return
        self.flags[index] = 1
        count, length = int(self.flags.sum()), len(self.flags)
        print(f"skipped, {count} of {length} samples until now: {error}", file=sys.stderr)
        if count > self.max_share * length:
            raise UserError(
                f"{count} of {length} samples cannot be read, more than data.max_bad_share={self.max_share} allows; "
                f"the last: {error}"
            )


def _shared(length: int) -> Tensor:
    flags: Tensor = torch.zeros(length, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
    return flags


class SegmentationDataset(Dataset[dict[str, Any]]):
    """Samples by `Draw(sample, seed)` for training, by plain index for evaluation (no transform).

    skipped: takes what cannot be read while training goes on with another sample; None = the error is raised.
    """

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        transform: TrainTransform | None = None,
        skipped: Skipped | None = None,
    ) -> None:
        self.source, self.encoder, self.transform, self.skipped = source, encoder, transform, skipped

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Draw | int) -> dict[str, Any]:
        if not isinstance(key, Draw):
            return self._encoded(key, partial(self._whole_sample, key)) | {"name": self.source.name(key)}
        index, image, raw = self._readable(key)
        assert self.transform is not None, "a draw asks for a training sample"
        encode = partial(self.encoder.part, name=self.source.mask_name(index))
        transform = partial(self.transform, image, raw, key.seed, encode)
        return self._encoded(index, transform)

    def _whole_sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not self.source.labelled:
            image = self.source.image(index)
            return image, np.full(image.shape[:2], IGNORE, np.uint8)
        image, raw = self.source[index]
        return image, self.encoder.whole(raw, self.source.mask_name(index))

    def _readable(self, draw: Draw) -> tuple[int, np.ndarray, np.ndarray]:
        """The sample drawn, or the next one by the same seed that can be read."""
        index = draw.sample
        attempt = 0
        while True:
            try:
                return index, *self.source[index]
            except UserError as error:
                if self.skipped is None:
                    raise
                self.skipped.add(index, error)
                if self.skipped.flags.all():
                    raise UserError(
                        f"none of the {len(self)} training samples can be read, the last: {error}"
                    ) from error
                index, attempt = mix(draw.seed, attempt) % len(self), attempt + 1

    def _encoded(self, index: int, make: Callable[[], tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
        try:
            return tensors(*make())
        except UndeclaredValues as error:
            raise self._undeclared(index, error) from error

    def _undeclared(self, index: int, first: UndeclaredValues) -> UserError:
        """One error for all masks like this one: the first five of the split, as far as they are found in time."""
        found, stop = {index: first}, time.monotonic() + SEARCH_SECONDS
        for other in range(len(self)):
            if len(found) == NAMED_FILES or time.monotonic() > stop:
                break
            try:
                self.encoder.part(self.source.mask(other), self.source.mask_name(other))
            except UndeclaredValues as error:
                found[other] = error
            except UserError:  # damaged in another way: told when it is its turn
                continue
        return self.encoder.explained({self.source.mask_name(number): found[number] for number in sorted(found)})


class StreamedDataset(IterableDataset[dict[str, Any]]):
    """The samples of a stream, shared out over processes and workers: endless for training, once for evaluation.

    seed: of order and augmentation. start: batches of `batch_size` that this process has taken before, so that a run
    that resumes with the same processes and workers sees what an unbroken run sees.
    """

    def __init__(
        self,
        stream: Stream,
        encoder: Encoder,
        transform: TrainTransform | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        batch_size: int = 1,
    ) -> None:
        self.stream, self.encoder, self.transform, self.seed = stream, encoder, transform, seed
        self.rank, self.world, self.start, self.batch_size = rank, world, start, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if self.transform is None:
            yield from self._whole(self.rank * workers + worker, self.world * workers)
            return
        worker = (worker + self.start) % workers  # a loader asks its workers in turn: the next one is the first now
        taken = self.start // workers + (worker < self.start % workers)
        yield from self._drawn(self.rank * workers + worker, self.world * workers, taken * self.batch_size)

    def _whole(self, part: int, parts: int) -> Iterator[dict[str, Any]]:
        for sample in self.stream.shard(part, parts):
            yield self._encoded(sample.name, partial(self._whole_sample, sample)) | {"name": sample.name}

    def _whole_sample(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        image, raw = sample.read()
        return image, self.encoder.whole(raw, sample.name)

    def _drawn(self, part: int, parts: int, taken: int) -> Iterator[dict[str, Tensor]]:
        assert self.transform is not None
        position = 0
        for epoch in itertools.count():
            before = position
            for sample in self.stream.shard(part, parts, mix(self.seed, epoch)):
                position += 1
                if position <= taken:
                    continue
                image, raw = sample.read()
                encode = partial(self.encoder.part, name=sample.name)
                transform = partial(self.transform, image, raw, mix(self.seed, part, position), encode)
                yield self._encoded(sample.name, transform)
            if position == before:  # fewer samples than readers: the others have them
                return

    def _encoded(self, name: str, make: Callable[[], tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
        try:
            return tensors(*make())
        except UndeclaredValues as error:
            raise self.encoder.explained({name: error}) from error


def tensors(image: np.ndarray, mask: np.ndarray) -> dict[str, Tensor]:
    """(H, W, C) and (H, W) arrays as a sample: the image is seen as (C, H, W) and lies in memory as it did."""
    if not image.flags.writeable:  # a view of a cached file
        image = image.copy()
    return {"image": torch.from_numpy(image).permute(2, 0, 1), "mask": torch.from_numpy(np.ascontiguousarray(mask))}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch whose images lie in memory band by band last, as they were read: nothing is transposed on the way."""
    images: Tensor = default_collate([sample["image"].permute(1, 2, 0) for sample in samples])
    batch = {"image": images.permute(0, 3, 1, 2), "mask": default_collate([sample["mask"] for sample in samples])}
    return batch | {"name": [sample["name"] for sample in samples]} if "name" in samples[0] else batch
