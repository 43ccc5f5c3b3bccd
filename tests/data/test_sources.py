import inspect
from itertools import pairwise

import numpy as np
import pytest

from segformer.data import sources
from segformer.data.pairs import Pairs, Table
from segformer.data.samples import Foreign, Source, Stream
from segformer.data.sources import open_source
from segformer.data.toy import ToyScenes
from segformer.errors import UserError

TRAIN = {"images": "images/train/*", "masks": "masks/train/*"}
VAL = {"images": "images/val/*", "masks": "masks/val/*"}


def names(source) -> list[str]:
    return [source.name(index).rpartition("/")[2] for index in range(len(source))]


def test_the_keys_of_a_section_tell_its_kind(potholes) -> None:
    (potholes / "pairs.csv").write_text("image,mask\nimages/val/road 0 ü.jpg,masks/val/road 0 ü.png\n")
    root = str(potholes)
    assert isinstance(open_source("train", TRAIN, root), Pairs)
    assert isinstance(open_source("train", {"csv": "pairs.csv", "split": None}, root), Table)
    scenes = open_source("train", {"scenes": 3, "seed": 5}, None)
    np.testing.assert_array_equal(scenes[2][0], ToyScenes(3, 5)[2][0])


def test_null_takes_away_the_keys_of_a_section_below(potholes) -> None:
    (potholes / "pairs.csv").write_text("image,mask\nimages/val/road 0 ü.jpg,masks/val/road 0 ü.png\n")
    with pytest.raises(
        UserError, match="unknown key 'data.val.images': expected {csv, split} .*; null takes a key away"
    ):
        open_source("val", {**VAL, "csv": "pairs.csv"}, str(potholes))
    merged = open_source("val", {"images": None, "masks": None, "csv": "pairs.csv"}, str(potholes))
    assert names(merged) == ["road 0 ü.jpg"]


def test_the_keys_told_are_those_that_the_kinds_take() -> None:
    from segformer.data.coco import CocoJson
    from segformer.data.hub import open_hub

    for what, kind in (
        (Pairs, "patterns of files"),
        (Table, "a table of pairs"),
        (CocoJson, "COCO JSON"),
        (ToyScenes, "toy scenes"),
        (open_hub, "a Hugging Face dataset"),
    ):
        taken = [name for name in inspect.signature(what).parameters if name not in ("root", "max_pixels", "bands")]
        assert sorted(taken) == sorted(sources.KINDS[kind])


def test_a_section_of_no_kind_is_told_with_all_kinds(potholes) -> None:
    for spec in (None, "images", 5, []):
        with pytest.raises(UserError, match="data.train is .*expected {images: pattern, masks: pattern}"):
            open_source("train", spec, str(potholes))
    with pytest.raises(
        UserError, match=r"unknown key 'data.train.mask' \(did you mean 'masks'\?\): expected {csv, split} "
    ):
        open_source("train", {"images": "*", "mask": "*"}, str(potholes))
    with pytest.raises(
        UserError, match=r"unknown key 'data.val.imgs' \(did you mean 'images'\?\): expected .*{scenes, seed}"
    ):
        open_source("val", {"imgs": "*", "masks": "*"}, str(potholes))
    with pytest.raises(UserError, match="data.val is {}: expected {csv, split}"):
        open_source("val", {}, str(potholes))
    with pytest.raises(UserError, match="data.train.scenes is 'many', expected an integer"):
        open_source("train", {"scenes": "many"}, None)
    with pytest.raises(UserError, match="'data.train.masks' is not set"):
        open_source("train", {"images": "*"}, str(potholes))
    with pytest.raises(UserError, match="data.root is not set"):
        open_source("train", TRAIN, None)


@pytest.mark.parametrize("shares", [(0, 0.8, 1), (0, 0.29, 0.58, 1), (0, 1 / 3, 2 / 3, 1.0)])
def test_neighbouring_fractions_share_nothing_and_lose_nothing(shares) -> None:
    for count in (10, 100, 37):
        parts = [
            open_source("train", {"scenes": count, "fraction": [start, end]}, None) for start, end in pairwise(shares)
        ]
        assert sorted(name for part in parts for name in names(part)) == names(ToyScenes(count))
        assert all(names(part) == sorted(names(part)) for part in parts)
    assert len(open_source("train", {"scenes": 10, "fraction": [0, 0.8]}, None)) == 8
    assert len(open_source("train", {"scenes": 100, "fraction": [0.29, 0.58]}, None)) == 29  # 0.29 * 100 < 29


def test_a_fraction_is_drawn_by_its_seed() -> None:
    drawn = [
        names(open_source("train", {"scenes": 40, "fraction": [0, 0.5], "fraction_seed": seed}, None))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] != names(ToyScenes(20))


def test_a_wrong_fraction_is_told(potholes) -> None:
    for fraction in (0.8, [0.8], [0.8, 0.2], [0, 1.5], [0, "1"], [False, True], [0, 1, 1], [0.0, float("nan")], "ab"):
        with pytest.raises(
            UserError, match=r"data.train.fraction is .*, expected \[from, to\] with 0 <= from < to <= 1"
        ):
            open_source("train", {**TRAIN, "fraction": fraction}, str(potholes))
    with pytest.raises(UserError, match=r"which leaves none of 4 samples"):
        open_source("train", {**TRAIN, "fraction": [0, 0.2]}, str(potholes))
    for seed in (-1, 0.5, True, "a"):
        with pytest.raises(UserError, match="data.train.fraction_seed is .*, expected a whole number"):
            open_source("train", {**TRAIN, "fraction": [0, 1], "fraction_seed": seed}, str(potholes))


def test_a_list_of_sections_is_joined_in_order(potholes) -> None:
    both = open_source("train", [TRAIN, {**VAL, "fraction": [0, 1]}], str(potholes))
    assert names(both) == [f"road {index} ü.jpg" for index in (0, 1, 2, 3, 0, 1, 2)]
    np.testing.assert_array_equal(both[5][1], Pairs(potholes, **VAL)[1][1])
    assert both.mask_name(5).endswith("masks/val/road 1 ü.png") and both.size(1) == (61, 80)
    with pytest.raises(UserError, match=r"unknown key 'data.train\[1\].mask'"):
        open_source("train", [TRAIN, {"images": "*", "mask": "*"}], str(potholes))
    with pytest.raises(UserError, match="joins images with masks and images without"):
        open_source("train", [TRAIN, {**VAL, "masks": None}], str(potholes))


class Mine:
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index):
        return np.full((2, 3, 3), index, np.uint8), np.full((2, 3), index, np.uint8)

    def name(self, index) -> str:
        return f"mine {index}"


def test_an_object_of_the_user_s_own_is_a_source() -> None:
    source = open_source("train", Mine(), None)
    assert isinstance(source, Foreign) and source.size(1) == (2, 3) and source.mask(1).max() == 1
    assert names(open_source("train", [Mine(), {"scenes": 1}], None)) == ["mine 0", "mine 1", "scene_0_00000"]
    own = Source()
    assert open_source("train", own, None) is own
    with pytest.raises(UserError, match="an object of your own that has __len__, __getitem__ and name"):
        open_source("train", object(), None)


class Endless(Stream):
    pass


def test_a_stream_is_not_joined() -> None:
    stream = Endless()
    assert open_source("train", stream, None) is stream
    with pytest.raises(UserError, match="data.train joins several sources, of which one is a stream"):
        open_source("train", [Mine(), stream], None)
