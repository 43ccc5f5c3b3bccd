"""Images and the class of each, for training the encoder before any mask is seen: folders of classes, or tables."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from segformer.data.archives import Entry, Member, Place, composed, entries, folder_at
from segformer.data.loaders import Loaders
from segformer.data.sampler import Draw, Sampling, mix
from segformer.errors import SharedError, UserError, build, nearest
from segformer.pixels import MAX_PIXELS, PAD, Readable, read_image

SEEN = 0.875  # share of the shorter side that is scored: the crop of 224 out of 256
LONGEST = 16  # times the shorter side: what of an image lies beyond is never resized
MAX_MAGNITUDE = 30
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Labelled:
    """Images by number and the class of each, of `classes`; file: the number -> what is read."""

    file: Callable[[int], Readable]
    labels: np.ndarray  # (N,) int64
    classes: Sequence[str]

    def name(self, index: int) -> str:
        return str(self.file(index))


class ClassFiles:
    """Files by number, each in the folder of its class: names as one text, so that workers share a million of them."""

    def __init__(self, folders: Sequence[Sequence[Place]]) -> None:
        self.parents = [_parent(files[0]) for files in folders]
        names = [os.fsencode(str(file).rpartition("/")[2]) for files in folders for file in files]
        self.text = b"".join(names)
        self.ends = np.cumsum([len(name) for name in names])
        self.owners = np.repeat(np.arange(len(folders)), [len(files) for files in folders])

    def __call__(self, index: int) -> Readable:
        start = self.ends[index - 1] if index else 0
        name, parent = os.fsdecode(self.text[start : self.ends[index]]), self.parents[self.owners[index]]
        if isinstance(parent, Path):
            return parent / name
        return Member(parent.archive, f"{parent.name}/{name}".removeprefix("/"))


def open_labelled(split: str, spec: Any, root: str | None) -> Labelled:
    """The images of one split and their classes, from folders below `root` or from a table.

    Raises:
        UserError: the section is of neither kind, or what it names cannot be read or has no classes.
    """
    where = f"data.{split}"
    kinds: dict[str, Callable[..., Labelled]] = {"images": class_folders, "split": class_table}
    given = {key: value for key, value in spec.items() if value is not None} if isinstance(spec, Mapping) else {}
    chosen = [kind for key, kind in kinds.items() if key in given]
    if len(chosen) != 1:
        raise UserError(
            f"{where} is {spec!r}, expected {{images: train/*/*}} for a folder of images for each class, or {{split, "
            "subset, revision, image, label} for a Hugging Face dataset, and not both: null takes a key away"
        )
    return build(where, chosen[0], given, section=where, root=root)


def class_folders(section: str, root: str | None, images: str) -> Labelled:
    """Files below `root` that match a pattern, as in ImageFolder: the class is the name of the folder they lie in."""
    if root is None:
        raise UserError("data.root is not set: add data.root=FOLDER, the folder that holds the folders of the classes")
    parts = images.split("/")
    if len(parts) < 2 or {"", ".", ".."} & set(parts) or any(sign in images for sign in ("**", "?", "[")):
        raise UserError(
            f"{section}.images is {images!r}, expected a path below data.root in which single stars stand, "
            "class folder and file last: train/*/*"
        )
    base = folder_at(Path(root).expanduser())
    if base is None:
        raise UserError(f"data.root={root} is not a folder or zip file, or not readable: give what holds {images}")
    groups: list[tuple[str, list[Place]]] = []
    for folder in _folders(base, parts[:-1]):
        files = [entry.place for entry in _matching(folder.place, parts[-1]) if not entry.folder]
        if parts[-1] == "*":  # thumbnail databases and notes lie beside images; a pattern says what it means itself
            files = [file for file in files if str(file).lower().endswith(IMAGES)]
        if not files:
            raise UserError(
                f"class folder {folder.place} holds no {'image' if parts[-1] == '*' else parts[-1]}: add images "
                f"({', '.join(IMAGES)}), or remove the folder"
            )
        groups.append((composed(folder.name), files))
    classes = sorted({name for name, _ in groups})
    if len(classes) < 2:
        held = ", ".join(classes) or "none"
        raise UserError(
            f"{base}/{images.rpartition('/')[0]} names {len(classes)} class folders ({held}), expected two or more, "
            f"each with the images of its class: check data.root and {section}.images"
        )
    groups.sort(key=lambda group: group[0])
    labels = np.repeat([classes.index(name) for name, _ in groups], [len(files) for _, files in groups])
    return Labelled(ClassFiles([files for _, files in groups]), labels, classes)


def class_table(
    section: str,
    root: str | None,
    split: str,
    subset: str | None = None,
    revision: str | None = None,
    image: str | None = None,
    label: str | None = None,
) -> Labelled:
    """A split of a Hugging Face dataset: a hub id, or a folder or file as `hub.open_hub` reads it.

    image: the column of images, None = the only one. label: of class labels, None = the only one; may also hold text or
    integers, each value a class.
    """
    from segformer.data.hub import Cell, Column, holds_files, load_table

    if root is None:
        raise UserError("data.root is not set: add data.root=NAME, a hub id owner/name or a folder of parquet files")
    splits, _ = load_table(root, subset, revision, streaming=False)
    if split not in splits:
        raise UserError(f"{root} has no split {split!r}{nearest(split, splits)}: it has {', '.join(splits)}")
    table, title = splits[split], " ".join(filter(None, (root, subset, split)))
    image = _column(section, title, table.features, "image", image, holds_files)
    label = _column(section, title, table.features, "label", label, _is_class_label, _may_be_label)
    values = np.asarray(Column(table, label, title, root).values[:][label])
    names = getattr(table.features[label], "names", None)
    for row, value in enumerate(values.tolist()):
        if isinstance(value, float | None) or (names and not 0 <= value < len(names)):  # a gap is NaN among integers
            raise UserError(f"{title}[{row}].{label} is {value!r}, which is no class: give a labelled {section}.split")
    if names is None:
        found, values = np.unique(values, return_inverse=True)
        names = [str(value) for value in found]
    if len(names) < 2:
        raise UserError(f"{title}: column {label!r} holds the one class {names}, expected two: set {section}.label")
    return Labelled(partial(Cell, Column(table, image, title, root)), values.astype(np.int64), names)


class ClassificationDataset(Dataset[dict[str, Any]]):
    """Images and their classes by `Draw(sample, seed)` for training, by plain index for evaluation."""

    def __init__(self, source: Labelled, transform: "Augmentation | Centre", max_pixels: int = MAX_PIXELS) -> None:
        self.source, self.transform, self.max_pixels = source, transform, max_pixels

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, key: Draw | int) -> dict[str, Any]:
        index, seed = key if isinstance(key, Draw) else (key, 0)
        pixels = self.transform(read_image(self.source.file(index), self.max_pixels), seed)
        return {"image": pixels, "label": int(self.source.labels[index]), "seed": seed}


class Augmentation:
    """(H, W, 3) uint8 and a seed, which decides everything -> (3, S, S) uint8: random resized crop, flip, RandAugment.

    Last, with probability `random_erasing`, a rectangle becomes ImageNet's mean colour, as does what RandAugment leaves
    empty. Pillow's operations, all on integers: no number of threads changes a bit.
    """

    def __init__(
        self, size: int, scale: Sequence[float], randaugment: Mapping[str, Any] | None, erasing: float
    ) -> None:
        from torchvision.transforms import v2

        steps = [v2.RandomResizedCrop(size, (scale[0], scale[1])), v2.RandomHorizontalFlip()]
        if randaugment is not None:
            steps.append(build("data.randaugment", _randaugment, randaugment))
        self.altered = v2.Compose(steps)
        self.erased = v2.RandomErasing(erasing, value=PAD)

    def __call__(self, image: np.ndarray, seed: int) -> Tensor:
        with drawn_from(seed):
            return self.erased(_pixels(self.altered(Image.fromarray(image))))


class Centre:
    """(H, W, 3) uint8 -> the middle (3, S, S) of the image, whose shorter side was resized to S / 0.875."""

    def __init__(self, size: int) -> None:
        from torchvision.transforms import v2

        self.cut = v2.CenterCrop
        self.chain = v2.Compose([v2.Resize(round(size / SEEN)), v2.CenterCrop(size)])

    def __call__(self, image: np.ndarray, seed: int = 0) -> Tensor:
        picture = Image.fromarray(image)
        if max(picture.size) > LONGEST * min(picture.size):  # a thin line would be resized to gigabytes
            picture = self.cut([min(side, LONGEST * min(picture.size)) for side in image.shape[:2]])(picture)
        return _pixels(self.chain(picture))


class Mix:
    """MixUp (arXiv 1710.09412) or CutMix (1905.04899), by a fair coin where both are on; an alpha of 0 is off.

    Each image is mixed with the one before it in the micro-batch, all to the same share. Another number of processes or
    another micro-batch therefore mixes other pairs.
    """

    def __init__(self, mixup: float, cutmix: float, classes: int) -> None:
        from torchvision.transforms import v2

        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self.choices = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
        self.cut = v2.CutMix

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) uint8 and (B,) int64 -> the same of mixed images and (B, K) float32, probabilities."""
        with drawn_from(seed):
            choice = self.choices[int(torch.randint(len(self.choices), ()))]
            if isinstance(choice, self.cut):
                return choice(images, labels)
            mixed, labels = choice(images.float(), labels)
            return mixed.round_().to(torch.uint8), labels


class ClassificationData(Loaders):
    """Training and validation images of a classifier; this signature is the config section `data`.

    root: folder, zip file or Hugging Face dataset in which `train` and `val` look (`class_folders`, `class_table`).
    classes: their names in the network's order, None = those found, sorted. crop_size: side of what the network sees.
    scale: range of the share of the image that a random crop covers. randaugment: {num_ops, magnitude}, None = off.
    random_erasing: probability. mixup, cutmix: alphas of `Mix`. The others: see `datamodule.SegmentationData`.
    """

    bands = 3

    def __init__(
        self,
        train: Any,
        val: Any,
        batch_size: int,
        crop_size: int = 224,
        root: str | None = None,
        classes: Sequence[str] | None = None,
        scale: Sequence[float] = (0.08, 1.0),
        randaugment: Mapping[str, Any] | None = None,
        random_erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        workers: int | str = "auto",
        seed: int = 0,
        micro_batch_size: int | str | None = None,
        worker_timeout: int = 300,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(batch_size, micro_batch_size, workers, worker_timeout, max_pixels, seed)
        if crop_size < 1:
            raise UserError(f"data.crop_size is {crop_size}, expected a side of at least 1 pixel")
        for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            if alpha < 0:
                raise UserError(f"data.{name} is {alpha}, expected an alpha of at least 0, which is off")
        if not 0 <= random_erasing <= 1:
            raise UserError(f"data.random_erasing is {random_erasing}, expected a probability from 0 to 1")
        numbers = isinstance(scale, list | tuple) and all(isinstance(end, int | float) for end in scale)
        if not numbers or len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"data.scale is {scale!r}, expected [low, high] with 0 < low <= high <= 1")
        if classes is not None and (not isinstance(classes, list | tuple) or len({*classes}) < max(2, len(classes))):
            raise UserError(f"data.classes is {classes!r}, expected two or more different names, or null")
        self.classes: Sequence[str] = [str(name) for name in classes or ()]
        self.named_by = "data.classes"
        self.specs, self.root = {"train": train, "val": val}, root
        self.crop_size, self.scale, self.randaugment = (crop_size, crop_size), scale, randaugment
        self.random_erasing, self.mixup, self.cutmix = random_erasing, mixup, cutmix

    def dataset(self, split: str) -> ClassificationDataset:
        found, side = open_labelled(split, self.specs[split], self.root), self.crop_size[0]
        if not self.classes:
            self.classes, self.named_by = found.classes, f"data.{split}"
        source = self._in_order(split, found)
        if split != "train":
            return ClassificationDataset(source, Centre(side), self.max_pixels)
        augmentation = Augmentation(side, self.scale, self.randaugment, self.random_erasing)
        return ClassificationDataset(source, augmentation, self.max_pixels)

    def _in_order(self, split: str, found: Labelled) -> Labelled:
        """The same samples under the numbers that the network gives the classes."""
        for names, whose, others, theirs in (
            (found.classes, f"data.{split}", self.classes, self.named_by),
            (self.classes, self.named_by, found.classes, f"data.{split}"),
        ):
            more = sorted({*names} - {*others})
            if more:
                raise UserError(
                    f"{whose} has {len(more)} classes that {theirs} has not, first {more[0]!r}"
                    f"{nearest(more[0], others)}: expected the same {len(self.classes)} classes"
                )
        order = np.array([[*self.classes].index(name) for name in found.classes])
        return Labelled(found.file, order[found.labels], self.classes)

    @property
    def network(self) -> dict[str, Any]:
        return {"names": [*self.classes]}

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        order = Sampling().order(self.seed, np.zeros((len(self.datasets["train"]), 1)))
        mixing = Mix(self.mixup, self.cutmix, len(self.classes)) if self.mixup or self.cutmix else None
        if mixing and self.micro_batch(trainer) == 1:
            raise SharedError(
                "data.mixup and data.cutmix mix images that a device takes at once, but it takes 1: give more by "
                "data.batch_size or data.micro_batch_size, or set both to 0"
            )
        return self.training_loader(trainer, order, partial(collate, mixing=mixing))

    def val_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        self.require_images(trainer.world_size)
        return self.scoring_loader(trainer, self.micro_batch(trainer), collate)


def collate(samples: Sequence[Mapping[str, Any]], mixing: Mix | None = None) -> dict[str, Tensor]:
    """{"image": (B, 3, S, S) uint8, "label": (B,) int64, or (B, K) float32 where images are mixed}."""
    images: Tensor = default_collate([sample["image"].permute(1, 2, 0) for sample in samples])  # as they lie in memory
    images, labels = images.permute(0, 3, 1, 2), torch.tensor([sample["label"] for sample in samples])
    if mixing is not None:  # by a stream of its own, apart from the first image's crop
        images, labels = mixing(images, labels, mix(samples[0]["seed"], 0))
    return {"image": images, "label": labels}


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Inside the block torch's generator of the CPU, which is all that torchvision draws from, starts at the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would set those of the GPUs, which stay set
        yield


def _randaugment(num_ops: int = 2, magnitude: int = 9) -> Any:
    from torchvision.transforms import v2

    if num_ops < 1 or not 0 <= magnitude <= MAX_MAGNITUDE:
        raise UserError(
            f"data.randaugment is {{num_ops: {num_ops}, magnitude: {magnitude}}}, expected at least 1 operation of a "
            f"magnitude from 0 to {MAX_MAGNITUDE}; null = off"
        )
    return v2.RandAugment(num_ops, magnitude, MAX_MAGNITUDE + 1, fill=PAD)


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _matching(folder: Place, pattern: str) -> list[Entry]:
    found = entries(folder)
    return [entry for entry in found if entry.name[0] != "." and fnmatchcase(composed(entry.name), composed(pattern))]


def _folders(base: Place, parts: Sequence[str]) -> list[Entry]:
    """The folders whose path below `base` matches these names and stars."""
    found = [Entry("", base, True)]
    for part in parts:
        found = [entry for above in found for entry in _matching(above.place, part) if entry.folder]
    return found


def _parent(file: Place) -> Place:
    return file.parent if isinstance(file, Path) else Member(file.archive, file.name.rpartition("/")[0])


def _is_class_label(feature: Any) -> bool:
    return hasattr(feature, "names")


def _may_be_label(feature: Any) -> bool:
    return _is_class_label(feature) or str(getattr(feature, "dtype", "")).startswith(("int", "uint", "string"))


def _column(
    section: str,
    title: str,
    features: Mapping[str, Any],
    what: str,
    chosen: str | None,
    fits: Callable[[Any], bool],
    may: Callable[[Any], bool] | None = None,
) -> str:
    """The column that is named, or the only one that fits; may: what one that is named may hold instead."""
    found = [chosen] if chosen else [name for name, feature in features.items() if fits(feature)]
    if len(found) == 1 and found[0] in features and (may if chosen and may else fits)(features[found[0]]):
        return found[0]
    problem = f"{' and '.join(found) or 'no column'} may be the {what}"
    if chosen:
        problem = f"no column of the {what} is called {chosen!r}{nearest(chosen, features)}"
    columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    raise UserError(f"{title}: {problem}; it has {columns}: name yours, {section}.{what}=...")
