"""Tables of images and masks: Hugging Face hub ids, parquet and arrow files, `save_to_disk` folders, and streams."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segformer.data.samples import Sample, Samples, Stream, require_equal_sizes
from segformer.errors import UserError, nearest
from segformer.files import reason
from segformer.labels import read_mask
from segformer.pixels import MAX_PIXELS, read_image

PARQUET = "refs/convert/parquet"  # the revision in which the hub keeps a parquet copy of a dataset
BUFFER = 128  # samples among which a reader of a stream draws: 2.5 MB each in Cityscapes, so 320 MB in each worker

_IMAGES = {"image", "pixel_values", "img"}
_MASKS = {
    "annotation",
    "label",
    "labels",
    "mask",
    "segmentation",
    "semantic_segmentation",
    "labels_map",
    "segmentation_mask",
}
_FILES = {".parquet": "parquet", ".arrow": "arrow"}  # to the builder that reads it


def open_hub(
    root: str | Path | None,
    split: str,
    subset: str | None = None,
    revision: str | None = None,
    image: str | None = None,
    mask: str | None = None,
    streaming: bool = False,
    max_pixels: int = MAX_PIXELS,
    bands: int = 3,
) -> Samples | Stream:
    """One split of a table whose rows hold an image and a mask.

    root: a hub id `owner/name`, a folder laid out as on the hub, a `save_to_disk` folder, or one .parquet or .arrow
    file, whose only split is "train". subset: a configuration of the dataset. image, mask: the columns, None = told by
    their names and types. streaming: rows come one after another and nothing is stored on this machine.

    Raises:
        UserError: it cannot be reached, needs code to be run, or has no such subset, split or columns.
    """
    if root is None:
        raise UserError("data.root is not set: add data.root=NAME, a hub id owner/name or a folder of parquet files")
    splits, files = load_table(str(root), subset, revision, streaming)
    if split not in splits:
        raise UserError(f"{root} has no split {split!r}{nearest(split, splits)}: it has {', '.join(splits)}")
    dataset, title = splits[split], " ".join(filter(None, (str(root), subset, split)))
    columns = _resolve(dataset.features or {}, image, mask, title)
    if not streaming:
        image_column, mask_column = (Column(dataset, column, title, str(root)) for column in columns)
        return Rows(image_column, mask_column, max_pixels, bands)
    length = _length(dataset, files.get(split, ()))
    return RowStream(_iterable(dataset), columns, title, str(root), length, max_pixels, bands)


class Column:
    """One column of a split: its values, undecoded. title: what to call the split in errors. root: data.root."""

    def __init__(self, dataset: Any, name: str, title: str, root: str) -> None:
        self.name, self.title, self.root, self.fingerprint = name, title, root, dataset._fingerprint
        self.holds_files = holds_files(dataset.features[name])
        self.values = _undecoded(dataset.select_columns([name]))  # alone, so that a mask is read without its image
        if not self.holds_files:
            self.values = self.values.with_format("numpy")  # nested lists of a mask's size are slow


@dataclass(frozen=True, slots=True)
class Cell:
    """The file in one row of a column, a `pixels.Readable`."""

    column: Column
    index: int

    def value(self) -> Any:
        return self.column.values[self.index][self.column.name]

    def read_bytes(self) -> bytes:
        return _content(self.value(), str(self), self.column.root)

    def stamp(self) -> str:
        return f"{self.column.fingerprint}:{self}"

    def __str__(self) -> str:
        return f"{self.column.title}[{self.index}].{self.column.name}"


class _Cells(Sequence[tuple[Cell, Cell]]):
    """The pairs of a split, made when they are asked for: a million of them take no memory."""

    def __init__(self, image: Column, mask: Column) -> None:
        self.image, self.mask = image, mask

    def __len__(self) -> int:
        return len(self.image.values)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return Cell(self.image, index % len(self)), Cell(self.mask, index % len(self))


class Rows(Samples):
    """A split whose rows are read by number."""

    def __init__(self, image: Column, mask: Column, max_pixels: int = MAX_PIXELS, bands: int = 3) -> None:
        super().__init__(_Cells(image, mask), max_pixels, bands)
        self.mask_column = mask

    def mask(self, index: int) -> np.ndarray:
        if self.mask_column.holds_files:
            return super().mask(index)
        return _ids(Cell(self.mask_column, index).value(), self.mask_name(index))


class _Loose(NamedTuple):
    """A value that has left its table, a `pixels.Readable`."""

    value: Any
    name: str
    root: str

    def read_bytes(self) -> bytes:
        return _content(self.value, self.name, self.root)

    def __str__(self) -> str:
        return self.name


class RowStream(Stream):
    """A split whose rows come one after another.

    A part reads whole files; files that do not go round are shared, each by as few parts as come out even.
    """

    def __init__(
        self,
        dataset: Any,
        columns: tuple[str, str],
        title: str,
        root: str,
        length: int | None,
        max_pixels: int,
        bands: int,
    ) -> None:
        self.holds_files = holds_files(dataset.features[columns[1]])
        self.rows = _undecoded(dataset.select_columns(list(columns)))
        self.columns, self.title, self.root, self.length = columns, title, root, length
        self.max_pixels, self.bands = max_pixels, bands

    def known_length(self) -> int | None:
        return self.length

    def shard(self, index: int, count: int, epoch: int | None = None) -> Iterator[Sample]:
        rows = self._dealt(index, count, epoch)
        if epoch is not None:
            rows = _shuffled(rows, np.random.default_rng((epoch, index, count)))
        for name, row in rows:
            image, mask = (_Loose(row[column], f"{name}.{column}", self.root) for column in self.columns)
            yield Sample(image.name, partial(self._decoded, image, mask))

    def _dealt(self, index: int, count: int, epoch: int | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        number = self.rows.num_shards
        files = range(number) if epoch is None else np.random.default_rng(epoch).permutation(number).tolist()
        whole = number - number % count
        yield from self._read(files[index:whole:count])
        groups = gcd(number - whole, count)  # of parts, each of which takes as many of the files left over
        shared = self._read(files[whole + index % groups :: groups])
        yield from islice(shared, index // groups, None, count // groups)

    def _read(self, files: Iterable[int]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Rows of these files and their names; images stay as they are stored, so that skipping one is cheap."""
        for file in files:
            rows = self.rows.shard(num_shards=self.rows.num_shards, index=file)
            try:
                # not `iter(rows)`: inside a worker of a DataLoader that one deals the files out a second time
                for row, batch in enumerate(rows.iter(batch_size=1)):
                    yield f"{self.title}[file {file}, row {row}]", {name: batch[name][0] for name in self.columns}
            except Exception as error:  # of the network, of pyarrow: each a type of its own
                raise UserError(
                    f"cannot read file {file} of {self.title}: {reason(error)}; try again, or fetch the dataset anew"
                ) from error

    def _decoded(self, image: _Loose, mask: _Loose) -> tuple[np.ndarray, np.ndarray]:
        pixels = read_image(image, self.max_pixels, self.bands)
        raw = read_mask(mask, self.max_pixels) if self.holds_files else _ids(mask.value, mask.name)
        require_equal_sizes(pixels, raw, image.name, mask.name)
        return pixels, raw


def _shuffled(rows: Iterator[Any], generator: np.random.Generator) -> Iterator[Any]:
    """The rows in random order, each drawn among `BUFFER` of them."""
    held = list(islice(rows, BUFFER))
    for row in rows:
        place = int(generator.integers(len(held)))
        yield held[place]
        held[place] = row
    yield from (held[place] for place in generator.permutation(len(held)))


def load_table(
    root: str, subset: str | None, revision: str | None, streaming: bool
) -> tuple[dict[str, Any], Mapping[str, Sequence[str]]]:
    """The splits, and the files of each, where they are known."""
    path = Path(root).expanduser()
    hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", root) and path.suffix not in _FILES
    if not (path.is_dir() or (path.is_file() and path.suffix in _FILES) or (hub_id and not path.exists())):
        raise UserError(
            f"data.root={root} holds no dataset: expected a hub id owner/name, a folder of parquet files, "
            "a save_to_disk folder, or a .parquet or .arrow file"
        )
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _saved(path), {}
        builder = _builder(root, path, subset, revision)
        files = builder.config.data_files or {}
        if streaming:
            return dict(builder.as_streaming_dataset()), files
        builder.download_and_prepare()
        return dict(builder.as_dataset()), files
    except Exception as error:  # offline, no access, not found, damaged, no space: each a type of its own
        raise _refusal(root, error) from error


def _saved(folder: Path) -> dict[str, Any]:
    from datasets import Dataset, load_from_disk

    saved = load_from_disk(str(folder))
    return {str(saved.split or "train"): saved} if isinstance(saved, Dataset) else dict(saved)


def _builder(root: str, path: Path, subset: str | None, revision: str | None) -> Any:
    from datasets import load_dataset_builder

    if path.is_file():
        return load_dataset_builder(_FILES[path.suffix], data_files={"train": str(path)})
    # in the hub's parquet copy, and in a download of it, a subset is a folder that no card tells of
    bare = path.is_dir() and not (path / "README.md").is_file() and (path / (subset or "")).is_dir()
    chosen = {"data_dir" if bare or revision == PARQUET else "name": subset}
    return load_dataset_builder(str(path) if path.is_dir() else root, revision=revision, **chosen)


def _refusal(root: str, error: Exception) -> UserError:
    told = str(error)
    if "scripts are no longer supported" in told:
        return UserError(
            f"{root} is a dataset script, and code of a dataset is never run: read the parquet copy that the hub "
            f"keeps, data.train.revision={PARQUET} data.val.revision={PARQUET}, with a subset where it has several"
        )
    if isinstance(error, ConnectionError):
        return UserError(
            f"cannot reach {root} on the hub ({reason(error)}): check the network and HF_HUB_OFFLINE, "
            "or give a local copy, data.root=FOLDER"
        )
    if "BuilderConfig" in told or "Config name is missing" in told:
        found = re.findall("'([^']+)'", told.partition("vailable")[2].partition("\n")[0])
        asked = re.search("BuilderConfig '([^']+)' not found", told)
        problem = f"has no subset {asked[1]!r}{nearest(asked[1], found)}" if asked else "comes in several subsets"
        return UserError(f"{root} {problem}: choose data.train.subset and data.val.subset from {', '.join(found)}")
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None
    why = reason(cause if isinstance(cause, Exception) else error).rstrip(".")
    if type(error).__name__.startswith("NonMatching"):
        return UserError(f"{root} does not hold what its README declares ({why}): fetch the rest, or mend dataset_info")
    return UserError(f"cannot load {root}: {why}; check data.root, and `hf auth login` if it is private or gated")


def _resolve(features: Mapping[str, Any], image: str | None, mask: str | None, title: str) -> tuple[str, str]:
    """The columns of image and mask."""
    return (
        _column(features, "image", image, _IMAGES, holds_files, title),
        _column(features, "mask", mask, _MASKS, lambda feature: holds_files(feature) or _holds_ids(feature), title),
    )


def _column(
    features: Mapping[str, Any],
    what: str,
    chosen: str | None,
    names: set[str],
    fits: Callable[[Any], bool],
    title: str,
) -> str:
    found = [chosen] if chosen else [name for name, kind in features.items() if name.lower() in names and fits(kind)]
    if len(found) == 1 and found[0] in features and fits(features[found[0]]):
        return found[0]
    if chosen and chosen in features:
        problem = f"column {chosen!r}, a {_kind(features[chosen])}, is no {what}"
    elif chosen:
        problem = f"no column is called {chosen!r}{nearest(chosen, features)}"
    else:
        problem = f"{' and '.join(found) or 'no column'} may be the {what}"
    columns = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
    raise UserError(
        f"{title}: {problem}, expected one Image column; it has {columns or 'columns without types'}: "
        "name yours, data.train.image=... data.train.mask=..., and the same for data.val"
    )


def _kind(feature: Any) -> str:
    return type(feature).__name__ if type(feature).__name__ != "Value" else feature.dtype


def holds_files(feature: Any) -> bool:
    """Whether a column holds image files: an Image, plain bytes, or {bytes, path} written by something else."""
    from datasets import Image

    plain = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return isinstance(feature, Image) or plain or (isinstance(feature, Mapping) and {"bytes", "path"} <= set(feature))


def _holds_ids(feature: Any) -> bool:
    """Whether a column holds rows of rows of integers."""
    from datasets import Array2D, LargeList, List

    if isinstance(feature, List | LargeList) and isinstance(feature.feature, List | LargeList):
        feature = feature.feature.feature
    elif not isinstance(feature, Array2D):
        return False
    return "int" in str(getattr(feature, "dtype", ""))


def _undecoded(dataset: Any) -> Any:
    """The same rows with images as the bytes that were stored: a palette decoded by others would come as colours."""
    from datasets import Image

    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset


def _content(value: Any, name: str, root: str) -> bytes:
    """The bytes of a cell, or of the file that it names, which has to be the dataset's own."""
    if isinstance(value, Mapping):
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if value is None:
        raise UserError(f"{name} is empty: give a split in which every row has an image and a mask")
    if not isinstance(value, str):
        return value
    if not _is_own(value, root):
        raise UserError(f"{name} names the file {value!r}, expected one of data.root={root}: a table reads no other")
    if "://" not in value:
        return Path(value).read_bytes()
    import fsspec

    with fsspec.open(value, "rb") as file:
        return file.read()


def _is_own(file: str, root: str) -> bool:
    """Whether a file lies where the dataset does: below its folder, on the hub by its name, or in the hub's cache."""
    if "://" in file:
        *inside, place = file.split("::")  # a member of an archive, and the archive
        below = re.match(rf"hf://datasets/{re.escape(root)}(@[^/]+)?/", place)
        return below is not None and ".." not in place and all(one.startswith("zip://") for one in inside)
    from datasets import config

    own = Path(root).expanduser()
    hub = os.environ.get("HF_HUB_CACHE", os.path.join(config.HF_CACHE_HOME, "hub"))
    folders = [own if own.is_dir() else own.parent] if own.exists() else [config.HF_DATASETS_CACHE, hub]
    # the cache of the hub is made of links, so that a path counts as it is written
    path = Path(os.path.normpath(file)) if not own.exists() else Path(file).resolve()
    return any(path.is_relative_to(Path(folder).resolve()) for folder in folders)


def _ids(value: Any, name: str) -> np.ndarray:
    """Nested integers as raw ids (H, W), uint8 or uint16."""
    try:
        raw = np.asarray(value)
    except ValueError:  # rows of unequal lengths
        raw = np.empty(0, object)
    if raw.ndim != 2 or raw.dtype.kind not in "iu" or not raw.size:
        raise UserError(f"mask {name} is an array of {raw.dtype} of shape {raw.shape}, expected (H, W) of integers")
    if raw.min() < 0 or raw.max() > 65535:
        raise UserError(f"mask {name} holds values from {raw.min()} to {raw.max()}, expected 0 to 65535")
    return raw.astype(np.uint8 if raw.max() < 256 else np.uint16)


def _iterable(dataset: Any) -> Any:
    """What is streamed; a `save_to_disk` folder, which lies on this disk, by its files."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        return dataset
    return dataset.to_iterable_dataset(num_shards=max(1, min(len(dataset), len(dataset.cache_files))))


def _length(dataset: Any, files: Sequence[str]) -> int | None:
    """The number of rows, by the footers of local parquet files, else by the card of the dataset."""
    import pyarrow.parquet as pq
    from datasets import Dataset

    if isinstance(dataset, Dataset):
        return len(dataset)
    if files and all(file.endswith(".parquet") and "://" not in file for file in files):
        return sum(pq.read_metadata(file).num_rows for file in files)
    known = (dataset.info.splits or {}).get(str(dataset.split))
    return known.num_examples or None if known else None
