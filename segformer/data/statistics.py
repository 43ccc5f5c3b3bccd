"""One look at every sample of a split: sizes, raw mask values, damage, and the same picture met twice.

What is kept of a sample is a `Record` of a few hundred bytes, so a split of a million masks fits in memory.
"""

import hashlib
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from tqdm import tqdm

from segformer.data.dataset import Encoder
from segformer.data.samples import Sample, Source, Stream, require_equal_sizes
from segformer.data.transforms import scaled_size
from segformer.errors import UserError
from segformer.labels import IGNORE, Classes, WrongKind, code
from segformer.launch import outlast, process

MAX_VALUES = 4096  # different values kept of one mask, the commonest: a photograph in place of a mask has more
MAX_PROCESSES = 8
FEW = 32  # samples that one process has read before others have started
TIMEOUT = 600.0  # seconds without a record, after which a process counts as hung
STRIDE = 4  # the network's label map has a quarter of its input's sides

Images = Literal["none", "header", "decoded"]  # how closely images are looked at


@dataclass
class Record:
    """What one sample is like.

    size, mask_size: (height, width), of the image upright; None = could not be read. values: raw value -> pixels, at
    most `MAX_VALUES`; colours as 0xRRGGBB, where `colors`. distinct: how many different values there are. indices: the
    mask's name says that it holds train ids. lost: train ids that are in the mask, but not in it at the size of the
    network's label map (see `at_cells`). palette: colours, 0xRRGGBB, that a palette file gives its values. turned: see
    `samples.Hints`. digest: of the image's content. pixels, sums, squares: of the bytes of each
    band, exact. errors: sentences about what cannot be used.
    """

    name: str
    mask_name: str
    indices: bool = False
    size: tuple[int, int] | None = None
    mask_size: tuple[int, int] | None = None
    colors: bool = False
    values: dict[int, int] = field(default_factory=dict)
    distinct: int = 0
    lost: tuple[int, ...] = ()
    digest: bytes | None = None
    pixels: int = 0
    sums: tuple[int, ...] = ()
    squares: tuple[int, ...] = ()
    palette: dict[int, int] = field(default_factory=dict)
    turned: bool = False
    errors: list[str] = field(default_factory=list)


@dataclass
class Survey:
    """The records of a split. samples: how many there are in all; None = a stream that does not tell."""

    split: str
    records: list[Record]
    samples: int | None

    @property
    def whole(self) -> bool:
        return self.samples == len(self.records)

    def moments(self) -> tuple[list[float], list[float]] | None:
        """Mean and standard deviation of each band on the 0..255 scale; None where no image was decoded."""
        seen = [record for record in self.records if record.pixels]
        if not seen or len({len(record.sums) for record in seen}) != 1:
            return None
        # Python's integers hold the sums exactly, so nothing is rounded before the one division
        count = sum(record.pixels for record in seen)
        sums = [sum(band) for band in zip(*(record.sums for record in seen), strict=True)]
        squares = [sum(band) for band in zip(*(record.squares for record in seen), strict=True)]
        deviations = [(count * two - one * one) ** 0.5 / count for one, two in zip(sums, squares, strict=True)]
        return [one / count for one in sums], deviations

    def twins(self) -> list[list[str]]:
        """Names of images of one and the same content, group by group."""
        groups = defaultdict(list)
        for record in self.records:
            if record.digest:
                groups[record.digest].append(record.name)
        return [names for names in groups.values() if len(names) > 1]


class Look(Dataset[Record]):
    """`look[i]` is the record of the i-th of some samples of a source. encoder None: only what needs no classes."""

    def __init__(
        self,
        source: Source,
        places: Sequence[int],
        encoder: Encoder | None,
        images: Images,
        base_size: tuple[int, int] | None = None,
    ) -> None:
        self.source, self.places, self.encoder, self.images, self.base_size = source, places, encoder, images, base_size

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Record:
        index = self.places[number]
        record = Record(self.source.name(index), self.source.mask_name(index))
        image = _told(record, lambda: self._image(record, index))
        mask = _told(record, lambda: self.source.mask(index)) if self.source.labelled else None
        _examine(record, image, mask, self.encoder, self.base_size)
        hints = self.source.hints(index)
        record.turned = hints.turned
        if hints.palette is not None:
            record.palette = {
                value: code(hints.palette[value]) for value in record.values if value < len(hints.palette)
            }
        return record

    def _image(self, record: Record, index: int) -> np.ndarray | None:
        """The image, or one value that stands for all of its pixels where only its size is asked for."""
        if self.images == "none":
            return None
        if self.images == "header":
            return np.broadcast_to(np.uint8(0), (*self.source.size(index), 1))
        image = self.source.image(index)
        content = self.source.image_bytes(index)
        record.digest = _digest(image if content is None else content)
        _measure(record, image)
        return image


class StreamLook(IterableDataset[Record]):
    """The records of a stream, shared out over the loader's processes. first: only so many, as they are stored."""

    def __init__(
        self,
        stream: Stream,
        encoder: Encoder | None,
        images: Images,
        base_size: tuple[int, int] | None = None,
        first: int | None = None,
    ) -> None:
        self.stream, self.encoder, self.images, self.base_size, self.first = stream, encoder, images, base_size, first

    def __iter__(self) -> Iterator[Record]:
        info = get_worker_info()
        part, parts = (info.id, info.num_workers) if info else (0, 1)
        for sample in islice(self.stream.shard(part, parts), self.first):
            yield self._record(sample)

    def _record(self, sample: Sample) -> Record:
        record = Record(sample.name, sample.name)
        found = _told(record, sample.read)
        if found is not None:
            image, raw = found
            if self.images == "decoded":
                record.digest = _digest(image)
                _measure(record, image)
            _examine(record, image, raw, self.encoder, self.base_size)
        return record


def survey(
    split: str,
    source: Source | Stream,
    encoder: Encoder | None,
    *,
    samples: int | None = None,
    images: Images = "header",
    base_size: tuple[int, int] | None = None,
    processes: int | None = None,
    quiet: bool = False,
) -> Survey:
    """Looks at a split once; a sample that cannot be read is told in its record and ends nothing.

    samples: so many of them, evenly spread over a source and the first ones of a stream; None = all. encoder: None
    where there are no classes yet. images: how closely the images are looked at. base_size: (long, short) of the
    recipe. processes: that read, 0 = this one alone, None = as many as there are cores, at most 8.
    quiet: no bar.
    """
    if isinstance(source, Stream):
        total, processes = source.known_length(), cores() if processes is None else processes
        processes = processes if samples is None else 0  # in order: the first ones are what others would look at
        look: Dataset[Record] = StreamLook(source, encoder, images, base_size, samples)
        expected = total if samples is None else min(samples, total or samples)
    else:
        total = len(source)
        places = spread(total, samples)
        processes = (cores() if len(places) > FEW else 0) if processes is None else processes
        look, expected = Look(source, places, encoder, images, base_size), len(places)
    records = list(_bar(_records(look, processes), expected, split, quiet or process() > 0))
    if isinstance(source, Stream) and (samples is None or len(records) < samples):
        total = len(records)
    return Survey(split, records, total)


def spread(total: int, samples: int | None) -> list[int]:
    """At most `samples` places among `total`, evenly spread: the first, the last and what lies between."""
    if samples is None or samples >= total:
        return list(range(total))
    return sorted({round(place) for place in np.linspace(0, total - 1, samples).tolist()})


def class_pixels(source: Source, encoder: Encoder, processes: int) -> np.ndarray:
    """(N, K) int64: pixels of each class in each mask of a source; a mask that cannot be read has none."""
    found = survey("train", source, encoder, images="none", processes=processes)
    return np.stack([count_classes(record, encoder)[:-1] for record in found.records])


def count_classes(record: Record, encoder: Encoder) -> np.ndarray:
    """(K + 1,) int64 pixels of a mask: of each class, and of what is ignored; undeclared values count nowhere."""
    counts = np.zeros(len(encoder.classes) + 1, np.int64)
    if not fits(record, encoder.classes):
        return counts
    for value, pixels in record.values.items():
        label = label_of(value, encoder.classes, record.indices)
        if label is not None:
            counts[-1 if label == IGNORE else label] += pixels
    return counts


def fits(record: Record, classes: Classes) -> bool:
    """Whether a mask holds what is declared, ids or colours."""
    return record.colors == (classes.of_colors and not record.indices)


def label_of(value: int, classes: Classes, indices: bool = False) -> int | None:
    """The train id of a raw value, 255 = ignored, None = undeclared; indices: of a mask that holds train ids."""
    if indices:
        return value if value < len(classes) or value == IGNORE else None
    label = int(classes.lookup[value])
    return None if label < 0 else label


def at_cells(values: np.ndarray, base_size: tuple[int, int] | None) -> np.ndarray:
    """The values of a mask (H, W) at the middles of the cells of the network's label map.

    That map has a quarter of the input's sides; the input is the image at the recipe's size, without random scaling. A
    class of which no pixel lies at such a point is lost: the network says it, if at all, between two of its answers.
    """
    rows, columns = (
        ((np.arange(cells) + 0.5) * side / cells).astype(int)
        for side, cells in zip(
            values.shape, (-(-s // STRIDE) for s in scaled_size(values.shape, base_size, 1.0)), strict=True
        )
    )
    return values[np.ix_(rows, columns)]


def _told(record: Record, read: Callable[[], Any]) -> Any:
    """What `read` gives, or None with its error among the record's."""
    try:
        return read()
    except UserError as error:
        record.errors.append(str(error))
    except Exception as error:  # a source of the user's own raises what it likes
        record.errors.append(f"sample {record.name} raises {type(error).__name__}: {' '.join(str(error).split())}")
    return None


def _examine(
    record: Record,
    image: np.ndarray | None,
    mask: np.ndarray | None,
    encoder: Encoder | None,
    base_size: tuple[int, int] | None,
) -> None:
    if image is not None:
        record.size = image.shape[0], image.shape[1]
    if mask is None:
        return
    record.mask_size = mask.shape[0], mask.shape[1]
    if image is not None:
        _told(record, lambda: require_equal_sizes(image, mask, record.name, record.mask_name))
    record.indices = encoder is not None and encoder.holds_train_ids(record.mask_name)
    values = _values(record, mask, encoder)
    counts = _counted(values)
    record.distinct, record.values = len(counts), dict(counts.most_common(MAX_VALUES))
    if encoder is not None and fits(record, encoder.classes) and record.distinct <= MAX_VALUES:
        labels = {value: label_of(value, encoder.classes, record.indices) for value in record.values}
        kept = {labels[value] for value in np.unique(at_cells(values, base_size)).tolist()}
        record.lost = tuple(sorted({label for label in labels.values() if label is not None} - kept - {IGNORE}))


def _values(record: Record, mask: np.ndarray, encoder: Encoder | None) -> np.ndarray:
    """(H, W) ids, or colours as 0xRRGGBB, which sets `record.colors`."""
    if mask.ndim == 2:
        return mask
    if encoder is not None:
        try:
            values = encoder.classes.values(mask, record.indices)
            record.colors = encoder.classes.of_colors and not record.indices
            return values
        except WrongKind:
            pass
    elif (mask == mask[..., :1]).all():
        return mask[..., 0]
    record.colors = True
    parts = mask.astype(np.int32)
    return parts[..., 0] << 16 | parts[..., 1] << 8 | parts[..., 2]


def _counted(values: np.ndarray) -> Counter[int]:
    if values.dtype in (np.uint8, np.uint16):
        counts = np.bincount(values.ravel())
        found = np.flatnonzero(counts)
        return Counter(dict(zip(found.tolist(), counts[found].tolist(), strict=True)))
    found, counts = np.unique(values, return_counts=True)
    return Counter(dict(zip(found.tolist(), counts.tolist(), strict=True)))


def _measure(record: Record, image: np.ndarray) -> None:
    bands = image.reshape(-1, image.shape[2])
    counts = [np.bincount(bands[:, band], minlength=256) for band in range(bands.shape[1])]
    bytes_ = np.arange(256)
    record.pixels = len(bands)
    record.sums = tuple(int(count @ bytes_) for count in counts)
    record.squares = tuple(int(count @ bytes_**2) for count in counts)


def _digest(content: bytes | np.ndarray) -> bytes:
    if isinstance(content, np.ndarray):
        content = repr(content.shape).encode() + content.tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _records(look: Dataset[Record], processes: int) -> Iterable[Record]:
    options: dict[str, Any] = {"generator": torch.Generator()}  # the training's own random numbers stay as they were
    if processes:
        options |= {"timeout": TIMEOUT, "prefetch_factor": 8, "worker_init_fn": start_worker}
    return DataLoader(look, batch_size=None, num_workers=processes, collate_fn=_as_it_is, **options)


def start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # workers are the parallelism; threads inside them fight for the same cores
    outlast()


def cores(processes: int = 1) -> int:
    """How many workers suit each of so many processes on this machine, from 1 to `MAX_PROCESSES`."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(here // processes, MAX_PROCESSES))


def _as_it_is(record: Any) -> Any:
    return record


def _bar(records: Iterable[Record], total: int | None, split: str, quiet: bool) -> Iterable[Record]:
    often = 0.1 if sys.stderr.isatty() else 30.0  # a log keeps every line
    return tqdm(records, f"look at {split}", total, disable=quiet, unit="sample", mininterval=often, dynamic_ncols=True)
