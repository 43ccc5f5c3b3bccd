"""python benchmarks/data.py --json data.json

Files to training samples on one core, against what a user would write with albumentations or torchvision, and the
augmentation alone against the published steps done one after another. Images are noise of the spectrum of photographs
in the sizes and formats of ADE20K and Cityscapes. Every sample of every round is another draw; times are per sample.

albumentations and torchvision normalise on the processor and hand out floats; here bytes go out, and the network's
device normalises them. Neither draws a window again that one class fills, and they change the colours of half as many
images. The published steps do all that is done here.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pairs
import torch
from PIL import Image
from torch.utils.data import DataLoader

from segformer.config import VARIANTS, SegformerConfig
from segformer.data.cache import Cached
from segformer.data.dataset import Encoder, SegmentationDataset, collate
from segformer.data.sampler import Draw
from segformer.data.samples import Samples
from segformer.data.transforms import TrainTransform
from segformer.labels import Classes
from segformer.model import SegformerForSemanticSegmentation
from segformer.pixels import MEAN, PAD, STD, normalize


class Data(NamedTuple):
    """Files like a dataset's, and its recipe."""

    name: str
    files: list[tuple[Path, Path]]
    classes: Classes
    relabel: Callable[[np.ndarray], np.ndarray]  # ids of the files -> train ids, as one writes it in a line
    crop: int
    base: tuple[int, int]

    def training(self, cache: Path | None = None) -> SegmentationDataset:
        source = Samples(self.files)
        transform = TrainTransform((self.crop, self.crop), self.base, (0.5, 2.0), 0.75)
        return SegmentationDataset(Cached(source, cache) if cache else source, Encoder(self.classes), transform)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="the shorter side of the smaller images, and their crop")
    parser.add_argument("--files", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photographs, streets = ade20k(Path(folder), options), cityscapes(Path(folder), options)
        sections = {
            "Files to samples, times faster": whole(photographs, options) + whole(streets, options, Path(folder)),
            "Augmentation alone, times faster": [alone(photographs, options), alone(streets, options)],
            "Two workers, and the training step they feed": [feeding(photographs, options)],
            "With": [{name: version(name) for name in ("albumentations", "torchvision", "opencv-python-headless")}],
            "Files": [
                {"like": data.name, "image KB": kilobytes(data, 0), "mask KB": kilobytes(data, 1)}
                for data in (photographs, streets)
            ],
        }
    pairs.publish("Data", sections, options)


# -- the files


def ade20k(folder: Path, options: Any) -> Data:
    size = options.size
    files = write(folder / "ade", options.files, (size, round(size * 4 / 3)), ".jpg", range(151))
    classes = Classes.from_config([str(index) for index in range(150)], reduce_zero_label=True)
    return Data("ADE20K", files, classes, lambda ids: ids - np.uint8(1), size, (4 * size, size))


def cityscapes(folder: Path, options: Any) -> Data:
    height, width = 2 * options.size, 4 * options.size
    files = write(folder / "streets", options.files // 2, (height, width), ".png", range(34))
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    classes = Classes.from_config({str(index): {"ids": [index]} for index in ids}, ignore="rest")
    table = classes.lookup[:256].astype(np.uint8)
    return Data("Cityscapes", files, classes, lambda ids: table[ids], height, (width, height))


def write(folder: Path, count: int, size: tuple[int, int], suffix: str, ids: range) -> list[tuple[Path, Path]]:
    """Image and mask files; labels are regions of an organic outline."""
    folder.mkdir()
    files = []
    for index in range(count):
        rng = np.random.default_rng(index)
        image, mask = folder / f"{index}{suffix}", folder / f"{index}_mask.png"
        Image.fromarray(photograph(size, rng)).save(image, quality=90)
        areas = np.stack([spectrum(size, rng, 2) for _ in range(12)]).argmax(0)
        Image.fromarray(rng.choice(np.array(ids, np.uint8), 12, replace=False)[areas]).save(mask)
        files.append((image, mask))
    return files


def spectrum(size: tuple[int, int], rng: np.random.Generator, falloff: float) -> np.ndarray:
    """Noise whose amplitude falls with the frequency, of unit variance."""
    rows, columns = np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])
    amplitude = np.maximum(np.hypot(rows, columns), 1 / max(size)) ** -falloff
    noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=size)) * amplitude, size)
    return noise / noise.std()


def photograph(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    light, colours = spectrum(size, rng, 1.45), [spectrum(size, rng, 1.65) for _ in range(3)]
    return np.clip(118 + 45 * light[..., None] + 15 * np.stack(colours, -1), 0, 255).astype(np.uint8)


def kilobytes(data: Data, part: int) -> float:
    return statistics.mean(pair[part].stat().st_size for pair in data.files) / 1e3


# -- what is compared


def whole(data: Data, options: Any, cache: Path | None = None) -> list[dict[str, Any]]:
    """From files to samples: this package, where a folder is given with a cache of decoded files too, and others."""
    theirs = {"albumentations": albumentations(data), "torchvision": torchvision(data)}
    ours = {"segformer": from_dataset(data.training())}
    if cache is not None:
        ours["segformer, cached"] = from_dataset(data.training(cache / "cache"))
        del theirs["torchvision"]
    seconds = pairs.interleave({**theirs, **ours}, options.rounds, "cpu")
    return [row(data, own, other, seconds) for own in ours for other in theirs]


def alone(data: Data, options: Any) -> dict[str, Any]:
    """Augmentation of decoded images; the published steps are given train ids, and are spared to look them up."""
    source = Samples(data.files)
    decoded = [source[index] for index in range(len(source))]
    ids = [data.classes.encode(raw) for _, raw in decoded]
    transform = data.training().transform
    assert transform is not None
    theirs, ours = counted(), counted()

    def stepwise() -> None:
        for (image, _), labels in zip(decoded, ids, strict=True):
            published(image, labels, (data.crop, data.crop), data.base, random.Random(next(theirs)))

    def cropped_first() -> None:
        for image, raw in decoded:
            transform(image, raw, next(ours), data.classes.encode)

    runs = {"step by step": repeated(stepwise), "segformer": repeated(cropped_first)}
    return row(data, "segformer", "step by step", pairs.interleave(runs, options.rounds, "cpu"))


def row(data: Data, own: str, other: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    samples = REPEATS * len(data.files)
    return {
        "files like": data.name,
        "of": own,
        "against": other,
        "theirs ms": 1e3 * statistics.median(seconds[other]) / samples,
        "ours ms": 1e3 * statistics.median(seconds[own]) / samples,
        "ratio": pairs.ratio(seconds[other], seconds[own]),
    }


REPEATS = 4  # of every file in a round, each time drawn anew


def repeated(run: Callable[[], object]) -> Callable[[], None]:
    def several() -> None:
        for _ in range(REPEATS):
            run()

    return several


def counted() -> Iterator[int]:
    """A seed for each sample."""
    seed = 0
    while True:
        yield seed
        seed += 1


def from_dataset(dataset: SegmentationDataset) -> Callable[[], None]:
    seeds = counted()

    def run() -> None:
        for index in range(len(dataset)):
            dataset[Draw(index, next(seeds))]

    return repeated(run)


def albumentations(data: Data) -> Callable[[], None]:
    import albumentations as A

    crop = data.crop
    augment = A.Compose(
        [
            A.RandomScale(scale_limit=(-0.5, 1.0), p=1),
            A.PadIfNeeded(crop, crop, position="top_left", fill=PAD, fill_mask=255),
            A.RandomCrop(crop, crop),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(p=0.5),
            A.Normalize(),
            A.ToTensorV2(),
        ],
        seed=0,
    )

    def run() -> None:
        for image, mask in data.files:
            pixels = cv2.imread(str(image), cv2.IMREAD_COLOR_RGB)
            labels = data.relabel(cv2.imread(str(mask), cv2.IMREAD_GRAYSCALE))
            sample = augment(image=pixels, mask=labels)
            sample["mask"].long()

    return repeated(run)


def torchvision(data: Data) -> Callable[[], None]:
    from torchvision import tv_tensors
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    crop = data.crop
    fill = {tv_tensors.Image: list(PAD), tv_tensors.Mask: 255}
    augment = v2.Compose(
        [
            v2.RandomResize(data.base[1] // 2, 2 * data.base[1]),
            v2.RandomCrop(crop, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.125, 0.5, 0.5, 0.1)], p=0.5),
            v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}, scale=True),
            v2.Normalize([value / 255 for value in MEAN], [value / 255 for value in STD]),
        ]
    )

    def run() -> None:
        for image, mask in data.files:
            pixels = tv_tensors.Image(decode_image(str(image), ImageReadMode.RGB))
            ids = decode_image(str(mask), ImageReadMode.GRAY)[0].numpy()
            augment(pixels, tv_tensors.Mask(data.relabel(ids)))

    return repeated(run)


def published(
    image: np.ndarray, mask: np.ndarray, crop: tuple[int, int], base: tuple[int, int], draw: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    """The recipe literally: every step on a whole array, colours in floats, clipped to bytes after each step."""
    height, width = mask.shape
    ratio = draw.uniform(0.5, 2.0)
    long, short = (int(side * ratio) for side in base)
    factor = min(long / max(height, width), short / min(height, width))
    size = int(width * factor + 0.5), int(height * factor + 0.5)
    image, mask = cv2.resize(image, size), cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
    for _ in range(11):
        top, left = (draw.randint(0, max(side - wanted, 0)) for side, wanted in zip(mask.shape, crop, strict=True))
        window = slice(top, top + crop[0]), slice(left, left + crop[1])
        ids, counts = np.unique(mask[window], return_counts=True)
        counts = counts[ids != 255]
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
    image, mask = image[window], mask[window]
    if draw.random() < 0.5:
        image, mask = np.flip(image, 1), np.flip(mask, 1)
    image = distorted(image, draw)
    missing = [wanted - side for side, wanted in zip(mask.shape, crop, strict=True)]
    border = (0, missing[0], 0, missing[1], cv2.BORDER_CONSTANT)
    return cv2.copyMakeBorder(image, *border, value=PAD), cv2.copyMakeBorder(mask, *border, value=255)


def distorted(image: np.ndarray, draw: random.Random) -> np.ndarray:
    def linear(values: np.ndarray, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
        return np.clip(values.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)

    if draw.random() < 0.5:
        image = linear(image, shift=draw.uniform(-32, 32))
    contrast_first = draw.random() < 0.5
    if contrast_first and draw.random() < 0.5:
        image = linear(image, draw.uniform(0.5, 1.5))
    if draw.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = linear(hsv[..., 1], draw.uniform(0.5, 1.5))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if draw.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + draw.randint(-18, 17)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not contrast_first and draw.random() < 0.5:
        image = linear(image, draw.uniform(0.5, 1.5))
    return image


# -- whether the network has to wait


def feeding(data: Data, options: Any) -> dict[str, Any]:
    """Samples a second of two workers with nothing beside them, and of training with all cores."""
    loads, trains = [], []
    train = step(data.crop, len(data.classes))
    for _ in range(options.rounds):
        loads.append(loading(data, batches=options.size // 8))
        torch.set_num_threads(os.cpu_count() or 1)
        start = time.perf_counter()
        train()
        trains.append((time.perf_counter() - start) / BATCH)
        torch.set_num_threads(1)
    return {
        "step": f"B0, batch {BATCH}",
        "loader samples/s": 1 / statistics.median(loads),
        "step samples/s": 1 / statistics.median(trains),
        "ratio": pairs.ratio(trains, loads),
    }


BATCH = 2


def loading(data: Data, batches: int) -> float:
    """Seconds a sample, once both workers are at it."""
    order = [Draw(seed % len(data.files), seed) for seed in range((batches + 8) * BATCH)]
    loader = iter(DataLoader(data.training(), BATCH, sampler=order, num_workers=2, collate_fn=collate))
    for _ in range(4):
        next(loader)
    start = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return (time.perf_counter() - start) / (batches * BATCH)


def step(size: int, classes: int) -> Callable[[], None]:
    config = SegformerConfig(**VARIANTS["b0"], num_labels=classes)
    model = SegformerForSemanticSegmentation(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5, fused=True)
    images, masks = pairs.images(BATCH, size, "cpu")

    def run() -> None:
        optimizer.zero_grad()
        model(normalize(images), labels=masks.long()).loss.backward()
        optimizer.step()

    run()
    return run


if __name__ == "__main__":
    main()
