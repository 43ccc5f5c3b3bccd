"""COCO's instance files as a source: outlines of objects in one json, painted into masks when they are asked for."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from segformer.data.archives import Place, child, composed, entries, folder_at
from segformer.data.samples import Samples
from segformer.errors import UserError
from segformer.pixels import MAX_PIXELS

NAMED_FILES = 5  # missing ones, in one error
_MAX_ID = 65535  # masks hold 16 bits


class CocoJson(Samples):
    """Images below `root`/`images` and the json `root`/`coco` with the outlines of what they show.

    A zip file stands for a folder: images="train2017.zip/train2017".
    A mask has the value `category_id` where an object lies and 0 where nothing is annotated. Outlines are polygons and
    run lengths, of single objects and of crowds. Where objects overlap the smaller one is on top, whatever their order
    in the file. max_pixels, bands: see `samples.Samples`.

    Raises:
        UserError: pycocotools or a file is missing, or the json breaks COCO's rules.
    """

    def __init__(
        self, root: str | Path | None, coco: str, images: str, max_pixels: int = MAX_PIXELS, bands: int = 3
    ) -> None:
        if root is None:
            raise UserError("data.root is not set: add data.root=FOLDER, the folder that holds the images and the json")
        _require_pycocotools()
        self.path = Path(root).expanduser() / coco
        source = _place(self.path)
        content = _parsed(source)
        self._names = {entry["id"]: str(entry["name"]) for entry in _entries(self.path, content, "categories", "name")}
        pictures = _pictures(self.path, content)
        objects = _objects(self.path, content, pictures)
        self._sizes = [(picture["height"], picture["width"]) for picture in pictures.values()]
        # as text: a worker shares it with its parent, while numbers by the million are copied as soon as they are read
        self._objects = [json.dumps(objects[id_]).encode() for id_ in pictures]
        files = _files(self.path, Path(root).expanduser() / images, pictures)
        super().__init__([(file, source) for file in files], max_pixels, bands)

    def categories(self) -> dict[int, str]:
        """Category ids, which are the values of the masks, and their names."""
        return dict(self._names)

    def mask_name(self, index: int) -> str:
        return f"{self.path} (image {self.files[index][0]})"

    def mask(self, index: int) -> np.ndarray:
        (height, width), objects = self._sizes[index], json.loads(self._objects[index])
        if height * width > self.max_pixels:
            raise UserError(
                f"{self.mask_name(index)} is {width}x{height}, more than data.max_pixels={self.max_pixels}: "
                "raise it if you trust the file"
            )
        return _painted(objects, height, width, self.path)


def _require_pycocotools() -> None:
    try:
        import pycocotools.mask  # noqa: F401 (whether it is there)
    except ImportError as error:
        raise UserError('COCO json needs pycocotools: pip install "segformer[coco]"') from error


def _place(path: Path) -> Place:
    folder = folder_at(path.parent)
    place = folder and child(folder, path.name)
    if place is None:
        raise UserError(f"no file {path}: check data.root and coco")
    return place


def _parsed(path: Place) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {(error.strerror or '').lower()}; check data.root and coco") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}; fetch or export it again") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}, expected COCO's object of images, annotations and categories"
        )
    return content


def _entries(path: Path, content: Mapping[str, Any], key: str, *fields: str) -> list[dict[str, Any]]:
    """The list `key` of the json, of entries that have an id and these fields."""
    entries = content.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(
            f"{path} has no list of {key}, expected COCO's images, annotations and categories: "
            "give an instances file, such as annotations/instances_train2017.json"
        )
    for number, entry in enumerate(entries):
        for field in ("id", *fields):
            if not isinstance(entry.get(field), int | str):
                raise UserError(
                    f"entry {number} of {key} in {path} has the {field} {entry.get(field)!r}, "
                    "expected a number or text: export the file again"
                )
    return entries


def _pictures(path: Path, content: Mapping[str, Any]) -> dict[Any, dict[str, Any]]:
    """The images of the json by their ids."""
    pictures: dict[Any, dict[str, Any]] = {}
    for entry in _entries(path, content, "images", "file_name", "height", "width"):
        if entry["id"] in pictures:
            raise UserError(f"{path} has the image id {entry['id']} twice, expected it once: number the images anew")
        if not all(type(entry[side]) is int and entry[side] >= 1 for side in ("height", "width")):
            raise UserError(
                f"image {entry['id']} of {path} is {entry['width']}x{entry['height']}, expected integers of at least 1"
            )
        pictures[entry["id"]] = entry
    return pictures


def _objects(path: Path, content: Mapping[str, Any], pictures: Mapping[Any, Any]) -> dict[Any, list[Any]]:
    """(annotation id, category id, outline) of every object, by the id of its image."""
    objects: dict[Any, list[Any]] = {id_: [] for id_ in pictures}
    boxes = []
    for entry in _entries(path, content, "annotations", "image_id", "category_id"):
        name, category = entry["id"], entry["category_id"]
        if entry["image_id"] not in objects:
            raise UserError(
                f"annotation {name} of {path} is of image {entry['image_id']}, expected one of the images in the file"
            )
        if not isinstance(category, int) or not 1 <= category <= _MAX_ID:
            raise UserError(
                f"annotation {name} of {path} has the category_id {category!r}, expected 1 to {_MAX_ID}, "
                "for 0 is where nothing is annotated: number the categories from 1"
            )
        if not entry.get("segmentation"):
            boxes.append(name)
        objects[entry["image_id"]].append((name, category, entry.get("segmentation")))
    if boxes:
        raise UserError(
            f"{len(boxes)} annotations of {path} have no segmentation, first annotation {boxes[0]}: "
            "a box is no mask, so export outlines or remove them"
        )
    return objects


def _files(path: Path, folder: Path, pictures: Mapping[Any, Mapping[str, Any]]) -> list[Place]:
    files: list[Place] = []
    missing: list[Path] = []
    listed: dict[PurePosixPath, dict[str, Place]] = {}  # a look at each folder, not at each of 100,000 files
    for id_, picture in pictures.items():
        name = PurePosixPath(str(picture["file_name"]))
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"image {id_} of {path} has the file_name {str(name)!r}, expected a file below {folder}")
        if name.parent not in listed:
            above = folder_at(folder / name.parent)
            listed[name.parent] = {composed(entry.name): entry.place for entry in (entries(above) if above else ())}
        place = listed[name.parent].get(composed(name.name))
        if place is None:
            missing.append(folder / name)
        else:
            files.append(place)
    if missing:
        named = ", ".join(map(str, missing[:NAMED_FILES])) + (", ..." if len(missing) > NAMED_FILES else "")
        raise UserError(
            f"{len(missing)} of {len(pictures)} images of {path} are missing: {named}: check data.root and images"
        )
    return files


def _painted(objects: Sequence[Any], height: int, width: int, path: Path) -> np.ndarray:
    """The mask (height, width) of an image's objects: large ones first, so that small ones stay on top."""
    columns = np.zeros(width * height, np.uint16)  # COCO counts down the columns
    runs = [
        (category, _runs(outline, height, width, f"annotation {name} of {path}")) for name, category, outline in objects
    ]
    for category, lengths in sorted(runs, key=lambda one: -sum(one[1][1::2])):
        ends = np.cumsum(lengths).tolist()
        for start, end in zip(ends[::2], ends[1::2], strict=False):  # the last run may lie outside, and have no partner
            columns[start:end] = category
    mask = np.ascontiguousarray(columns.reshape(width, height).T)
    return mask if mask.max() > 255 else mask.astype(np.uint8)


def _runs(outline: Any, height: int, width: int, where: str) -> list[int]:
    """An outline as lengths of runs outside and inside by turns; together they fill the image."""
    if isinstance(outline, list):
        return _polygon_runs(outline, height, width, where)
    counts = outline.get("counts") if isinstance(outline, dict) else None
    if not isinstance(counts, list | str) or outline.get("size") != [height, width]:
        size = outline.get("size") if isinstance(outline, dict) else None
        raise UserError(f"{where} has run lengths of size {size}, expected the size of its image, [{height}, {width}]")
    # pycocotools reads beyond its memory where they do not add up
    runs = _unpacked(counts) if isinstance(counts, str) else counts
    if not all(isinstance(run, int) and run >= 0 for run in runs) or sum(runs) != height * width:
        raise UserError(
            f"{where} has run lengths that do not add up to its image's {height * width} pixels: export it again"
        )
    return runs


def _unpacked(text: str) -> list[int]:
    """COCO's packed run lengths: five bits a character, and from the fourth on the change since the last but one."""
    runs: list[int] = []
    value = shift = 0
    for byte in text.encode():
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of a number, whose highest bit is the sign
            value -= (bits & 16) << (shift - 4)
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return runs


def _polygon_runs(polygons: list[Any], height: int, width: int, where: str) -> list[int]:
    from pycocotools import mask

    try:
        points = [np.asarray(polygon, np.float64) for polygon in polygons]
    except (ValueError, TypeError):
        points = []
    if not points or any(one.ndim != 1 or len(one) < 6 or len(one) % 2 for one in points):
        raise UserError(f"{where} has an outline that is no polygon, expected [[x1, y1, x2, y2, x3, y3, ...], ...]")
    far = float(np.abs(np.concatenate(points)).max())
    if not far <= 2 * max(height, width):  # NaN too
        raise UserError(f"{where} reaches the coordinate {far:g} in an image of {width}x{height}: export it again")
    packed = mask.merge(mask.frPyObjects([one.tolist() for one in points], height, width))["counts"]
    return _unpacked(packed.decode())
