"""COCO's instance json: masks painted by hand, and by pycocotools where run lengths are packed."""

import json
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as pycoco

from segformer.data.coco import CocoJson
from segformer.errors import UserError
from tests.conftest import save

HEIGHT, WIDTH = 20, 30
Box = tuple[int, int, int, int]  # left, top, right, bottom


def polygon(*boxes: Box) -> list[list[int]]:
    return [[left, top, right, top, right, bottom, left, bottom] for left, top, right, bottom in boxes]


def filled(*boxes: Box) -> np.ndarray:
    """(HEIGHT, WIDTH) uint8, 1 inside: whole pixels, on which COCO and NumPy agree."""
    region = np.zeros((HEIGHT, WIDTH), np.uint8)
    for left, top, right, bottom in boxes:
        region[top:bottom, left:right] = 1
    return region


def packed(region: np.ndarray) -> dict[str, Any]:
    found = pycoco.encode(np.asfortranarray(region))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


def unpacked(region: np.ndarray) -> dict[str, Any]:
    """Run lengths by hand: down the columns, outside first."""
    counts, inside = [0], 0
    for pixel in region.T.ravel():
        if pixel != inside:
            counts.append(0)
            inside = pixel
        counts[-1] += 1
    return {"size": list(region.shape), "counts": counts}


def annotation(segmentation: Any, category: int = 1, image: int = 7, **more: Any) -> dict[str, Any]:
    return {"id": 50, "image_id": image, "category_id": category, "segmentation": segmentation} | more


def coco(root: Path, *annotations: dict[str, Any], **changes: Any) -> Path:
    """Two images, 7 and 3, of which the second has no objects, and a json of these annotations."""
    images = []
    for number, name in ((7, "a.png"), (3, "city/b ü.png")):
        save(root / "images" / name, np.full((HEIGHT, WIDTH, 3), number, np.uint8))
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
    categories = [{"id": 1, "name": "person"}, {"id": 300, "name": "car"}]
    content = {"images": images, "annotations": list(annotations), "categories": categories} | changes
    (root / "own.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return root


def opened(root: Path) -> CocoJson:
    return CocoJson(str(root), "own.json", "images")


def refused(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        opened(root).mask(0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_polygons_become_masks_of_category_ids(tmp_path: Path) -> None:
    boxes = ((2, 3, 9, 8), (12, 10, 29, 19))
    source = opened(coco(tmp_path, annotation(polygon(*boxes), 300), annotation(polygon((20, 1, 25, 4)))))
    image, mask = source[0]
    np.testing.assert_array_equal(image, 7)
    np.testing.assert_array_equal(mask, filled(*boxes) * np.uint16(300) + filled((20, 1, 25, 4)))
    assert len(source) == 2 and source.labelled and source.categories() == {1: "person", 300: "car"}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside pycocotools
def test_polygons_are_painted_as_pycocotools_paints_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points = [(rng.random((4, 2)) * [WIDTH, HEIGHT]).ravel().tolist() for _ in range(3)]
    expected = pycoco.decode(pycoco.merge(pycoco.frPyObjects(points, HEIGHT, WIDTH)))
    np.testing.assert_array_equal(opened(coco(tmp_path, annotation(points))).mask(0), expected)


@pytest.mark.parametrize("encode", [packed, unpacked])
def test_run_lengths_become_masks(tmp_path: Path, encode: Any) -> None:
    rng = np.random.default_rng(0)
    for region in (rng.integers(0, 2, (HEIGHT, WIDTH), np.uint8), filled((0, 0, 30, 20)), filled((5, 5, 25, 9))):
        source = opened(coco(tmp_path, annotation(encode(region), iscrowd=1)))
        np.testing.assert_array_equal(source.mask(0), region)


def test_packed_run_lengths_of_a_large_image_are_read(tmp_path: Path) -> None:
    """Numbers of several characters, and falling ones, which are stored as negative differences."""
    region = np.zeros((400, 500), np.uint8)
    region[150:170, 100:130], region[10:390, 300:320], region[399, 499] = 1, 1, 1
    root = coco(tmp_path, annotation(packed(region)))
    content = json.loads((root / "own.json").read_text())
    content["images"][0] |= {"height": 400, "width": 500}
    (root / "own.json").write_text(json.dumps(content))
    np.testing.assert_array_equal(opened(root).mask(0), region)


def test_small_objects_lie_on_top_of_large_ones_in_any_order(tmp_path: Path) -> None:
    large, small = (1, 1, 28, 18), (10, 5, 15, 9)
    expected = filled(large) * np.uint16(300) * (1 - filled(small)) + filled(small)
    objects = [annotation(packed(filled(large)), 300, iscrowd=1), annotation(polygon(small), 1)]
    for order in (objects, objects[::-1]):
        np.testing.assert_array_equal(opened(coco(tmp_path, *order)).mask(0), expected)


def test_an_image_without_objects_is_all_zero(tmp_path: Path) -> None:
    source = opened(coco(tmp_path, annotation(polygon((1, 1, 5, 5)))))
    np.testing.assert_array_equal(source[1][1], np.zeros((HEIGHT, WIDTH)))
    assert source.name(1) == str(tmp_path / "images/city/b ü.png")
    assert source.mask_name(1) == f"{tmp_path}/own.json (image {tmp_path}/images/city/b ü.png)"


def test_the_stamp_follows_the_image_and_the_json(tmp_path: Path) -> None:
    before = opened(coco(tmp_path, annotation(polygon((1, 1, 5, 5)))))
    stamps = [before.stamp(0), before.stamp(1)]
    after = opened(coco(tmp_path, annotation(polygon((1, 1, 5, 6)))))
    assert len({*stamps, after.stamp(0), after.stamp(1)}) == 4


def test_another_process_does_not_read_the_json_again(tmp_path: Path) -> None:
    source = opened(coco(tmp_path, annotation(polygon((1, 1, 5, 5)))))
    (tmp_path / "own.json").unlink()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).mask(0), filled((1, 1, 5, 5)))


def test_images_and_json_are_read_from_archives(tmp_path: Path) -> None:
    root = coco(tmp_path, annotation(polygon((1, 1, 5, 5))))
    with zipfile.ZipFile(root / "all.zip", "w") as archive:
        for path in (root / "own.json", root / "images/a.png", root / "images/city/b ü.png"):
            archive.write(path, f"top/{path.relative_to(root)}")
    source = CocoJson(str(root), "all.zip/top/own.json", "all.zip/top/images")
    np.testing.assert_array_equal(source[0][1], filled((1, 1, 5, 5)))
    np.testing.assert_array_equal(source[1][0], 3)
    assert source.stamp(0)


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    opened(coco(tmp_path, annotation(polygon((1, 1, 5, 5))))).mask(0)
    assert capfd.readouterr() == ("", "")


def test_an_image_of_another_size_than_the_json_says_is_one_sentence(tmp_path: Path) -> None:
    root = coco(tmp_path, annotation(polygon((1, 1, 5, 5))))
    save(root / "images" / "a.png", np.zeros((WIDTH, HEIGHT, 3), np.uint8))
    with pytest.raises(UserError, match=r"a\.png is upright, .* 20x30 but its mask .*own\.json .* is 30x20, expected"):
        opened(root)[0]


def test_missing_images_are_counted_and_five_are_named(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.png", "height": 4, "width": 4} for n in range(9)]
    assert refused(coco(tmp_path, images=images)) == (
        f"9 of 9 images of {tmp_path}/own.json are missing: "
        + ", ".join(f"{tmp_path}/images/{n}.png" for n in range(5))
        + ", ...: check data.root and images"
    )


@pytest.mark.parametrize("name", ["../own.json", "/etc/passwd", "city/../../own.json"])
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    images = [{"id": 7, "file_name": name, "height": 4, "width": 4}]
    told = refused(coco(tmp_path, images=images))
    assert f"has the file_name {name!r}, expected a file below {tmp_path}/images" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"images": None}, "has no list of images, expected COCO's"),
        ({"annotations": None}, "has no list of annotations, expected COCO's"),
        ({"annotations": {"a": 1}}, "has no list of annotations, expected COCO's"),
        ({"categories": None}, "has no list of categories, expected COCO's"),
        ({"categories": [{"id": 1}]}, "entry 0 of categories in {json} has the name None, expected a number or text"),
        ({"images": [{"id": 7, "file_name": "a.png", "width": 3}]}, "entry 0 of images in {json} has the height None"),
        (
            {"images": [{"id": 7, "file_name": "a.png", "width": 3, "height": 0}]},
            "image 7 of {json} is 3x0, expected integers of at least 1",
        ),
        (
            {"images": [{"id": 7, "file_name": "a.png", "width": 3, "height": 3}] * 2},
            "{json} has the image id 7 twice, expected it once",
        ),
        ({"annotations": [annotation([], image=99)]}, "annotation 50 of {json} is of image 99, expected one of"),
        (
            {"annotations": [annotation(polygon((1, 1, 5, 5)), 0)]},
            "annotation 50 of {json} has the category_id 0, expected 1 to 65535",
        ),
        ({"annotations": [annotation(polygon((1, 1, 5, 5)), 65536)]}, "has the category_id 65536, expected 1 to 65535"),
        (
            {"annotations": [annotation(None), annotation([])]},
            "2 annotations of {json} have no segmentation, first annotation 50: a box is no mask",
        ),
    ],
)
def test_a_json_that_breaks_the_rules_is_one_sentence(tmp_path: Path, changes: Any, told: str) -> None:
    assert told.format(json=tmp_path / "own.json") in refused(coco(tmp_path, **changes))


@pytest.mark.parametrize(
    ("outline", "told"),
    [
        ([[1, 1, 5, 5]], "has an outline that is no polygon"),  # pycocotools would take it for a box
        ([[1, 1, 5, 1, 5, 5, 1]], "has an outline that is no polygon"),
        ([1, 1, 5, 1, 5, 5], "has an outline that is no polygon"),
        ([[1, 1, "x", 1, 5, 5]], "has an outline that is no polygon"),
        ([[1, 1, 1e9, 1, 5, 5]], "reaches the coordinate 1e+09 in an image of 30x20"),
        ([[1, 1, 5, 1, 5, 5], [1, 1, float("nan"), 1, 5, 5]], "reaches the coordinate nan in an image of 30x20"),
        ({"size": [30, 20], "counts": [600]}, "has run lengths of size [30, 20], expected the size of its image, [20"),
        ("outline", "has run lengths of size None, expected the size of its image"),
        ({"size": [20, 30]}, "has run lengths of size [20, 30]"),
        # these four end pycocotools by a segmentation fault, or read what is no mask
        ({"size": [20, 30], "counts": [100]}, "has run lengths that do not add up to its image's 600 pixels"),
        ({"size": [20, 30], "counts": [700, -100]}, "has run lengths that do not add up to its image's 600 pixels"),
        ({"size": [20, 30], "counts": "nonsense ü"}, "has run lengths that do not add up to its image's 600 pixels"),
        ({"size": [20, 30], "counts": [599.5, 0.5]}, "has run lengths that do not add up to its image's 600 pixels"),
    ],
)
def test_a_broken_outline_is_one_sentence_that_names_the_annotation(tmp_path: Path, outline: Any, told: str) -> None:
    assert refused(coco(tmp_path, annotation(outline))).startswith(f"annotation 50 of {tmp_path}/own.json {told}")


def test_files_that_are_no_coco_json_are_one_sentence_each(tmp_path: Path) -> None:
    root = coco(tmp_path, annotation(polygon((1, 1, 5, 5))))
    (root / "own.json").write_text("[1, 2")
    assert f"{root}/own.json is not valid JSON: " in refused(root)
    (root / "own.json").write_text("[]")
    assert f"{root}/own.json holds a list, expected COCO's object of images, annotations" in refused(root)
    (root / "own.json").write_bytes(b"\xff\x00")
    assert f"{root}/own.json is not valid JSON: " in refused(root)
    (root / "own.json").unlink()
    assert refused(root) == f"no file {root}/own.json: check data.root and coco"
    with pytest.raises(UserError, match="data.root is not set: add data.root=FOLDER"):
        CocoJson(None, "own.json", "images")


def test_without_pycocotools_the_way_to_install_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)  # as where it is not installed
    assert refused(coco(tmp_path)) == 'COCO json needs pycocotools: pip install "segformer[coco]"'


def test_an_image_larger_than_max_pixels_is_not_painted(tmp_path: Path) -> None:
    root = coco(tmp_path, annotation(polygon((1, 1, 5, 5))))
    with pytest.raises(UserError, match="is 30x20, more than data.max_pixels=599: raise it"):
        CocoJson(str(root), "own.json", "images", max_pixels=599).mask(0)
