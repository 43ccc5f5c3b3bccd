"""Miniature datasets on disk, each laid out as the real one is, with the train ids that its masks stand for.

What a mask means is told here in another way than in the YAML under test: by names, by counting, by hand.
"""

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image

from tests.conftest import ROOT, save

BLOCK = 8  # pixels of one painted value
IGNORE = 255


class Tree(NamedTuple):
    """samples: of each split the train ids by how the names of samples end; None = image without mask."""

    data: str  # the YAML that reads it
    root: Path
    samples: dict[str, dict[str, np.ndarray | None]]
    overrides: Sequence[str] = ()


def photo(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    return rng.integers(0, 256, (*mask.shape[:2], 3), np.uint8)


def painted(rng: np.random.Generator, values: Sequence[int], height: int = 64, width: int = 96) -> np.ndarray:
    """A mask of blocks in which each value occurs, if there is room."""
    rows, columns = height // BLOCK, width // BLOCK
    blocks = np.resize(rng.permutation(np.array(values, np.uint8)), (rows, columns))
    return blocks.repeat(BLOCK, 0).repeat(BLOCK, 1)


def by_table(raw: np.ndarray, meaning: dict[int, int]) -> np.ndarray:
    """Train ids, value by value; what has no meaning is ignored."""
    return np.array([meaning.get(value, IGNORE) for value in raw.ravel().tolist()], np.uint8).reshape(raw.shape)


def with_palette(mask: np.ndarray) -> Image.Image:
    image = Image.fromarray(mask)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    return image


def save_palette(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with_palette(mask).save(path)


def write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


# -- trees of two patterns


def folder(root: Path) -> Tree:
    """A user's own: two classes, unequal sizes, names with blanks and letters beyond ASCII."""
    rng = np.random.default_rng(1)
    samples: dict[str, dict[str, np.ndarray | None]] = {}
    for split, count in (("train", 4), ("val", 3)):
        samples[split] = {}
        for index in range(count):
            mask, stem = painted(rng, [0, 1, 255], 64 + BLOCK * index), f"road {index} ü"
            save(root / "images" / split / f"{stem}.jpg", photo(rng, mask))
            save(root / "masks" / split / f"{stem}.png", mask)
            samples[split][f"images/{split}/{stem}.jpg"] = mask
    return Tree("folder", root, samples, ["data.classes=[background,pothole]"])


def zipped(root: Path) -> Tree:
    tree = folder(root)
    archive = Path(shutil.make_archive(str(root), "zip", root))
    shutil.rmtree(root)
    return tree._replace(root=archive)


def binary(root: Path) -> Tree:
    """Masks to be looked at: 0 and 255."""
    classes = "data.classes={background: {ids: [0]}, crack: {ids: [255]}}"
    return _single(root, [0, 1], np.array([0, 255], np.uint8), [classes, "data.ignore=[]"])


def one_bit(root: Path) -> Tree:
    """The same at one bit a pixel, where a set bit is 1."""
    return _single(root, [0, 1], np.array([False, True]), ["data.classes=[background,crack]"])


def wide(root: Path) -> Tree:
    """Masks of 16 bits: 300 is not 300 - 256."""
    classes = "data.classes={low: {ids: [44]}, high: {ids: [300]}}"
    return _single(root, [0, 1, 255], np.array([44, 300, *[0] * 254], np.uint16), [classes, "data.ignore=[0]"])


def counted_from_one(root: Path) -> Tree:
    raw = np.roll(np.arange(256, dtype=np.uint8), -1)
    return _single(root, [0, 1, 2, 255], raw, ["data.classes=[a,b,c]", "data.reduce_zero_label=true"])


def _single(root: Path, values: Sequence[int], raw: np.ndarray, overrides: Sequence[str]) -> Tree:
    """An image a split. raw: what a mask file holds for each train id."""
    rng, samples = np.random.default_rng(2), {}
    for split in ("train", "val"):
        mask = painted(rng, values)
        save(root / "images" / split / "a.png", photo(rng, mask))
        save(root / "masks" / split / "a.png", raw[mask])
        samples[split] = {f"images/{split}/a.png": mask}
    return Tree("folder", root, samples, overrides)


def table(root: Path) -> Tree:
    """A CSV of pairs that lie anywhere; test rows belong to neither split."""
    rng, samples, rows = np.random.default_rng(5), {"train": {}, "val": {}}, []
    for index, split in enumerate(("train", "train", "train", "val", "val", "test")):
        mask, image = painted(rng, [0, 1]), f"drive {index % 2}/{index}.jpg"
        save(root / image, photo(rng, mask))
        save(root / f"labels/m{index}.png", mask)
        rows.append({"split": split, "image": image, "mask": f"labels/m{index}.png", "weather": "rain, fog"})
        if split in samples:
            samples[split][image] = mask
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    (root / "pairs.csv").write_text(text.getvalue())
    return Tree("csv", root, samples, ["data.classes=[background,pothole]"])


def ade20k(root: Path) -> Tree:
    """Sizes vary, 0 is "other objects", a grey and a CMYK photograph among the images."""
    rng, samples = np.random.default_rng(6), {}
    for split, short, folder, count in (("train", "train", "training", 4), ("val", "val", "validation", 2)):
        samples[split] = {}
        for index in range(1, count + 1):
            mask, name = painted(rng, range(151), 96 + BLOCK * index, 128), f"ADE_{short}_{index:08d}"
            path = root / "images" / folder / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo(rng, mask)).convert({1: "L", 2: "CMYK"}.get(index, "RGB")).save(path)
            save(root / "annotations" / folder / f"{name}.png", mask)
            samples[split][f"images/{folder}/{name}.jpg"] = mask - np.uint8(1)
    return Tree("ade20k", root, samples)


def ade20k_test(root: Path) -> Tree:
    rng, names = np.random.default_rng(7), [f"ADE_test_{index:08d}.jpg" for index in (1, 2)]
    for name in names:
        save(root / "testing" / name, rng.integers(0, 256, (64, 80, 3), np.uint8))
    write(root / "list.txt", names)
    return Tree("ade20k_test", root, {"val": {f"testing/{name}": None for name in names}})


def voc2012(root: Path) -> Tree:
    """Palette masks, for some of the photographs only; lists say which of them are of which split."""
    rng, samples = np.random.default_rng(8), {"train": {}, "val": {}}
    for index, split in enumerate(("train", "val", "train", "", "val", "")):
        name = f"2007_{index:06d}"
        mask = painted(rng, [*range(21), 255], 64 + BLOCK * index % 24)
        save(root / "JPEGImages" / f"{name}.jpg", photo(rng, mask))
        if split:
            save_palette(root / "SegmentationClass" / f"{name}.png", mask)
            save_palette(root / "SegmentationObject" / f"{name}.png", mask)
            samples[split][f"JPEGImages/{name}.jpg"] = mask  # 255 means no label here and there
    for split, one in samples.items():
        write(root / "ImageSets" / "Segmentation" / f"{split}.txt", [Path(name).stem for name in one])
    return Tree("voc2012", root, samples)


def voc2012_aug(root: Path) -> Tree:
    """SBD's masks of more photographs beside VOC's own, and of the same."""
    tree, rng = voc2012(root), np.random.default_rng(9)
    listed = [*tree.samples["train"], "JPEGImages/2007_000003.jpg", "JPEGImages/2007_000005.jpg"]
    train: dict[str, np.ndarray | None] = {}
    for name in listed:
        width, height = Image.open(root / name).size
        mask = painted(rng, [*range(21), 255], height, width)
        save(root / "SegmentationClassAug" / f"{Path(name).stem}.png", mask)
        train[name] = mask
    write(root / "ImageSets" / "Segmentation" / "trainaug.txt", [Path(name).stem for name in listed])
    return Tree("voc2012_aug", root, {"train": train, "val": tree.samples["val"]})


NEVER_ANNOTATED = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91]  # of the published labels 1 to 182


def cocostuff164k(root: Path) -> Tree:
    rng, samples = np.random.default_rng(10), {}
    labels = [label for label in range(1, 183) if label not in NEVER_ANNOTATED]
    for split, folder, count in (("train", "train2017", 3), ("val", "val2017", 2)):
        samples[split] = {}
        for index in range(count):
            # most photographs show few of the classes, and none of the last ones
            shown = [label - 1 for label in (labels if index else labels[:5])]
            mask, name = painted(rng, [*shown, 255], 104, 128 + BLOCK * index), f"{index:012d}"
            save(root / "images" / folder / f"{name}.jpg", photo(rng, mask))
            save(root / "annotations" / folder / f"{name}.png", mask)
            meaning = {label - 1: place for place, label in enumerate(labels)}
            samples[split][f"images/{folder}/{name}.jpg"] = by_table(mask, meaning)
    return Tree("cocostuff164k", root, samples)


def cocostuff164k_train_ids(root: Path) -> Tree:
    """After mmsegmentation's converter, which writes beside the masks that are shipped."""
    tree = cocostuff164k(root)
    for split, folder in (("train", "train2017"), ("val", "val2017")):
        for name, ids in tree.samples[split].items():
            save(root / "annotations" / folder / f"{Path(name).stem}_labelTrainIds.png", ids)
    return tree


# -- Cambridge

SEGNET = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
# name and colour of label_colors.txt, and where SegNet puts it
CAMVID = {
    "Animal": ((64, 128, 64), "pedestrian"), "Archway": ((192, 0, 128), "building"),
    "Bicyclist": ((0, 128, 192), "bicyclist"), "Bridge": ((0, 128, 64), "building"),
    "Building": ((128, 0, 0), "building"), "Car": ((64, 0, 128), "car"),
    "CartLuggagePram": ((64, 0, 192), "pedestrian"), "Child": ((192, 128, 64), "pedestrian"),
    "Column_Pole": ((192, 192, 128), "pole"), "Fence": ((64, 64, 128), "fence"),
    "LaneMkgsDriv": ((128, 0, 192), "road"), "LaneMkgsNonDriv": ((192, 0, 64), "road"),
    "Misc_Text": ((128, 128, 64), "sign"), "MotorcycleScooter": ((192, 0, 192), "bicyclist"),
    "OtherMoving": ((128, 64, 64), "car"), "ParkingBlock": ((64, 192, 128), "pavement"),
    "Pedestrian": ((64, 64, 0), "pedestrian"), "Road": ((128, 64, 128), "road"),
    "RoadShoulder": ((128, 128, 192), "pavement"), "SUVPickupTruck": ((64, 128, 192), "car"),
    "Sidewalk": ((0, 0, 192), "pavement"), "SignSymbol": ((192, 128, 128), "sign"),
    "Sky": ((128, 128, 128), "sky"), "TrafficCone": ((0, 0, 64), "pole"), "TrafficLight": ((0, 64, 64), "sign"),
    "Train": ((192, 64, 128), "car"), "Tree": ((128, 128, 0), "tree"), "Truck_Bus": ((192, 128, 192), "car"),
    "Tunnel": ((64, 0, 64), "building"), "VegetationMisc": ((192, 192, 0), "tree"), "Void": ((0, 0, 0), None),
    "Wall": ((64, 192, 0), "building"),
}  # fmt: skip
FRAMES = 10


def camvid(root: Path) -> Tree:
    return _camvid(root, "camvid", "images/{}", "annotations/{}", "jpg")


def camvid_segnet(root: Path) -> Tree:
    """With SegNet's lists, whose paths start where its authors kept the dataset."""
    tree = _camvid(root, "camvid_segnet", "{}", "{}annot", "png")
    for split, names in tree.samples.items():
        stems = [Path(name).name for name in names]
        lines = [f"/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}" for name in stems]
        write(root / f"{split}.txt", lines)
    return tree


def _camvid(root: Path, data: str, images: str, masks: str, extension: str) -> Tree:
    rng, samples = np.random.default_rng(11), {}
    for split, count in (("train", 3), ("val", 2)):
        samples[split] = {}
        for index in range(count):
            mask, name = painted(rng, range(12), 72, 96), f"0001TP_{index:06d}"
            save(root / images.format(split) / f"{name}.{extension}", photo(rng, mask))
            save(root / masks.format(split) / f"{name}.png", mask)
            samples[split][f"{images.format(split)}/{name}.{extension}"] = by_table(mask, {n: n for n in range(11)})
    return Tree(data, root, samples)


def camvid_rgb(root: Path) -> Tree:
    """Both splits hold all frames here: which of them a split takes is decided by its fraction."""
    rng, frames = np.random.default_rng(12), {}
    colors = np.array([color for color, _ in CAMVID.values()], np.uint8)
    places = np.array([SEGNET.index(to) if to else IGNORE for _, to in CAMVID.values()], np.uint8)
    for index in range(FRAMES):
        blocks, name = painted(rng, range(32), 72, 96), f"0001TP_{index:06d}"
        save(root / "701_StillsRaw_full" / f"{name}.png", photo(rng, blocks))
        save(root / "LabeledApproved_full" / f"{name}_L.png", colors[blocks])
        frames[f"701_StillsRaw_full/{name}.png"] = places[blocks]
    write(root / "label_colors.txt", [f"{r} {g} {b}\t{name}" for name, ((r, g, b), _) in CAMVID.items()])
    return Tree("camvid_rgb", root, {"train": frames, "val": frames})


# -- streets

LABEL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def cityscapes(root: Path) -> Tree:
    """Before csCreateTrainIdLabelImgs: labelIds, and files that are no masks beside."""
    rng, samples = np.random.default_rng(13), {}
    for split, cities in (("train", ("aachen", "ulm")), ("val", ("lindau",))):
        samples[split] = _street(rng, root, "gtFine", split, cities)
    return Tree("cityscapes", root, samples)


def cityscapes_coarse(root: Path) -> Tree:
    rng, train = np.random.default_rng(14), {}
    for split, cities in (("train", ("aachen",)), ("train_extra", ("augsburg", "bayreuth"))):
        train |= _street(rng, root, "gtCoarse", split, cities)
    return Tree("cityscapes_coarse", root, {"train": train, "val": _street(rng, root, "gtFine", "val", ("lindau",))})


def _street(
    rng: np.random.Generator, root: Path, kind: str, split: str, cities: Iterable[str]
) -> dict[str, np.ndarray | None]:
    samples = {}
    for city in cities:
        for frame in range(2):
            stem = f"{split}/{city}/{city}_{frame:06d}_000019"
            ids = painted(rng, [*range(34), 255], 64, 128)
            save(root / "leftImg8bit" / f"{stem}_leftImg8bit.png", photo(rng, ids))
            for what, array in (("labelIds", ids), ("color", ids[..., None].repeat(3, 2)), ("instanceIds", ids)):
                save(root / kind / f"{stem}_{kind}_{what}.png", array)
            samples[f"{stem}_leftImg8bit.png"] = by_table(ids, {raw: place for place, raw in enumerate(LABEL_IDS)})
    return samples


# which of Vistas' classes are what in Cityscapes
STREET = {
    "road": ["Bike Lane", "Crosswalk - Plain", "Road", "Service Lane", "Lane Marking - Crosswalk",
             "Lane Marking - General", "Catch Basin", "Manhole", "Pothole"],
    "sidewalk": ["Curb", "Curb Cut", "Pedestrian Area", "Sidewalk"],
    "building": ["Building"], "wall": ["Wall"], "fence": ["Fence"], "pole": ["Pole", "Utility Pole"],
    "traffic light": ["Traffic Light"], "traffic sign": ["Traffic Sign (Front)"], "vegetation": ["Vegetation"],
    "terrain": ["Terrain", "Sand"], "sky": ["Sky"], "person": ["Person"],
    "rider": ["Bicyclist", "Motorcyclist", "Other Rider"], "car": ["Car"], "truck": ["Truck"], "bus": ["Bus"],
    "train": ["On Rails"], "motorcycle": ["Motorcycle"], "bicycle": ["Bicycle"],
}  # fmt: skip


def mapillary(root: Path) -> Tree:
    return _vistas(root, "mapillary", "labels", {value: value for value in range(65)})


def mapillary_cityscapes(root: Path) -> Tree:
    """In the layout of the release that holds the labels of both versions."""
    classes = yaml.safe_load((ROOT / "configs/data/mapillary.yaml").read_text())["data"]["classes"]
    places = {name: place for place, names in enumerate(STREET.values()) for name in names}
    meaning = {value: places[name] for value, name in enumerate(classes) if name in places}
    return _vistas(root, "mapillary_cityscapes", "v1.2/labels", meaning)


def _vistas(root: Path, data: str, labels: str, meaning: dict[int, int]) -> Tree:
    rng, samples = np.random.default_rng(15), {}
    for split, folder, count in (("train", "training", 3), ("val", "validation", 2)):
        samples[split] = {}
        for index in range(count):
            mask, name = painted(rng, range(66), 80, 96 + BLOCK * index), f"zI8-PX6bPQF0Xw_{index}"
            save(root / folder / "images" / f"{name}.jpg", photo(rng, mask))
            save_palette(root / folder / labels / f"{name}.png", mask)
            save_palette(root / folder / labels.replace("labels", "instances") / f"{name}.png", mask)
            samples[split][f"{folder}/images/{name}.jpg"] = by_table(mask, meaning)
    return Tree(data, root, samples)


# -- objects


def coco(root: Path) -> Tree:
    """Category ids with gaps; a polygon, a crowd of run lengths, packed run lengths, an image without an object."""
    from pycocotools import mask as packing

    rng, samples, height, width = np.random.default_rng(16), {}, 64, 80
    categories = {1: "person", 17: "cat", 90: "toothbrush"}
    for split, folder, count in (("train", "train2017", 3), ("val", "val2017", 2)):
        images, objects, samples[split] = [], [], {}
        for index in range(count):
            expected, name = np.zeros((height, width), np.uint8), f"{index:012d}.jpg"
            save(root / folder / name, photo(rng, expected))
            images.append({"id": 100 + index, "file_name": name, "height": height, "width": width})
            samples[split][f"{folder}/{name}"] = expected
            if index == 1:
                continue  # nobody annotated it
            expected[8:40, 10:60] = 1  # place in `classes`, behind background
            polygon = [10, 8, 60, 8, 60, 40, 10, 40]
            expected[30:50, 5:25] = 2
            crowd = np.zeros((width, height), bool)  # column by column, as run lengths are counted
            crowd[5:25, 30:50] = True
            expected[0:4, 0:4] = 3
            corner = np.zeros((height, width), np.uint8, "F")
            corner[0:4, 0:4] = 1
            packed = packing.encode(corner)
            outlines = {
                17: {"size": [height, width], "counts": _runs(crowd.ravel())},
                1: [polygon],
                90: {"size": [height, width], "counts": packed["counts"].decode()},
            }
            for category, outline in outlines.items():
                objects.append(
                    {
                        "id": len(objects) + 1,
                        "image_id": 100 + index,
                        "category_id": category,
                        "segmentation": outline,
                        "iscrowd": int(category == 17),
                    }
                )
        content = {"images": images, "annotations": objects}
        content["categories"] = [{"id": id_, "name": name} for id_, name in categories.items()]
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{folder}.json").write_text(json.dumps(content))
    listed = ", ".join(f"{name}: {{ids: [{id_}]}}" for id_, name in {0: "background", **categories}.items())
    return Tree("coco", root, samples, [f"data.classes={{{listed}}}"])


def _runs(flags: np.ndarray) -> list[int]:
    """Lengths of runs, of zeros first."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8))) + 1
    starts = [0, *edges.tolist(), len(flags)]
    lengths = np.diff(starts).tolist()
    return [0, *lengths] if flags[0] else lengths


# -- tables of the hub


def hub(root: Path) -> Tree:
    """Parquet as on the hub: two files for training, one for validation; palette masks."""
    from datasets import Dataset, Features
    from datasets import Image as Picture

    rng, samples = np.random.default_rng(17), {}
    (root / "data").mkdir(parents=True)
    for split, stem, files in (("train", "train", [3, 2]), ("val", "validation", [2])):
        samples[split], row = {}, 0
        for number, rows in enumerate(files):
            masks = [painted(rng, [0, 1, 2, 255], 64 + BLOCK * index) for index in range(rows)]
            columns = {"image": [], "label": []}
            for mask in masks:
                columns["image"].append(_png(Image.fromarray(photo(rng, mask))))
                columns["label"].append(_png(with_palette(mask)))
                samples[split][f"{stem}[{row}].image"] = mask
                row += 1
            dataset = Dataset.from_dict(columns, features=Features({"image": Picture(), "label": Picture()}))
            dataset.to_parquet(root / "data" / f"{stem}-{number:05d}-of-{len(files):05d}.parquet")
    return Tree("hub", root, samples, ["data.classes=[road,grass,sky]"])


def hub_streamed(root: Path) -> Tree:
    tree = hub(root)
    train, val = ([*tree.samples[split].values()] for split in ("train", "val"))
    files = {"train": [train[:3], train[3:]], "val": [val]}
    samples = {
        split: {
            f"[file {file}, row {row}].image": mask
            for file, masks in enumerate(parts)
            for row, mask in enumerate(masks)
        }
        for split, parts in files.items()
    }
    streaming = [f"data.{split}.streaming=true" for split in ("train", "val")]
    return tree._replace(samples=samples, overrides=[*tree.overrides, *streaming])


def _png(image: Image.Image) -> dict[str, bytes | None]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


TREES: dict[str, Callable[[Path], Tree]] = {
    build.__name__: build
    for build in (
        folder, zipped, binary, one_bit, wide, counted_from_one, table, ade20k, ade20k_test, voc2012, voc2012_aug,
        cocostuff164k, cocostuff164k_train_ids, camvid, camvid_segnet, camvid_rgb, cityscapes, cityscapes_coarse,
        mapillary, mapillary_cityscapes, coco, hub, hub_streamed,
    )
}  # fmt: skip
