import os

import numpy as np
import pytest
from PIL import Image

from segformer.data.sources import Pairs, open_source
from segformer.errors import UserError


def test_pairs_are_matched_by_stem_whatever_the_extension(potholes) -> None:
    pairs = Pairs(potholes, "images/train/*", "masks/train/*")
    assert len(pairs) == 4 and pairs.name(0).endswith("road 0 ü.jpg")
    image, mask = pairs[1]
    assert (
        image.shape == (61, 80, 3)
        and image.dtype == np.uint8
        and mask.shape == (61, 80)
        and set(np.unique(mask)) == {0, 1}
    )


def test_pairs_are_matched_by_what_the_stars_stand_for(tmp_path) -> None:
    for city, frame in (("ulm", "000_1"), ("ulm", "000_2"), ("bonn", "000_1")):
        for kind, suffix, mode in (("leftImg8bit", "_leftImg8bit.png", "RGB"), ("gtFine", "_gtFine_labelIds.png", "L")):
            folder = tmp_path / kind / "val" / city
            folder.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (8, 4)).save(folder / f"{city}_{frame}{suffix}")
    pairs = Pairs(tmp_path, "leftImg8bit/val/*/*_leftImg8bit.png", "gtFine/val/*/*_gtFine_labelIds.png")
    assert [pairs.files[index][1].name for index in range(3)] == [
        "bonn_000_1_gtFine_labelIds.png", "ulm_000_1_gtFine_labelIds.png", "ulm_000_2_gtFine_labelIds.png"
    ]  # fmt: skip


def test_an_unpaired_file_is_named_with_what_was_expected(potholes) -> None:
    (potholes / "masks/train/road 2 ü.png").unlink()
    with pytest.raises(
        UserError, match=r"1 of 4 files have no mask, first .*road 2 ü.jpg: expected .*masks/train/road 2 ü"
    ):
        Pairs(potholes, "images/train/*", "masks/train/*")
    Image.new("L", (4, 4)).save(potholes / "masks/val/stray.png")
    with pytest.raises(UserError, match=r"1 of 4 files have no image, first .*stray.png"):
        Pairs(potholes, "images/val/*", "masks/val/*")


def test_wrong_roots_and_patterns_are_told(potholes) -> None:
    with pytest.raises(UserError, match="data.root is not set"):
        open_source("train", {"images": "*", "masks": "*"}, None)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        Pairs(potholes / "nowhere", "*", "*")
    with pytest.raises(UserError, match=r"no images at .*pictures/\*"):
        Pairs(potholes, "pictures/*", "masks/train/*")
    with pytest.raises(UserError, match="different numbers of stars"):
        Pairs(potholes, "images/*/*", "masks/train/*")
    for pattern in ("images/**/*.png", "images/a?.png", "/images/*.png"):
        with pytest.raises(UserError, match="only single stars"):
            Pairs(potholes, pattern, "masks/train/*")
    for masks in (None, 5, [], [5]):
        with pytest.raises(UserError, match=r"masks is .*, expected a pattern below data.root or a list"):
            open_source("train", {"images": "images/train/*", "masks": masks}, str(potholes))
    for spec in (None, "images"):
        with pytest.raises(UserError, match="data.train is .*expected {images: pattern, masks: pattern}"):
            open_source("train", spec, str(potholes))
    with pytest.raises(UserError, match="data.train.scenes is 'many', expected an integer"):
        open_source("train", {"scenes": "many"}, None)
    with pytest.raises(UserError, match="unknown key 'data.train.mask'"):
        open_source("train", {"images": "*", "mask": "*"}, str(potholes))


def test_two_images_of_one_stem_are_told(potholes) -> None:
    Image.new("RGB", (80, 60)).save(potholes / "images/train/road 0 ü.png")
    with pytest.raises(UserError, match="match the same sample"):
        Pairs(potholes, "images/train/*", "masks/train/*")


def test_an_image_and_mask_of_unequal_sizes_are_told(potholes) -> None:
    Image.new("L", (10, 10)).save(potholes / "masks/train/road 0 ü.png")
    with pytest.raises(UserError, match=r"road 0 ü.jpg is 80x60 but its mask .* is 10x10"):
        Pairs(potholes, "images/train/*", "masks/train/*")[0]


def test_hidden_files_are_no_samples(potholes) -> None:
    (potholes / "images/train/.DS_Store").write_bytes(b"x")
    assert len(Pairs(potholes, "images/train/*", "masks/train/*")) == 4


def test_the_first_mask_pattern_that_finds_files_is_read(potholes) -> None:
    pairs = Pairs(potholes, "images/val/*", ["ids/val/*", "masks/val/*"])
    assert pairs.mask_name(0).endswith("masks/val/road 0 ü.png")
    with pytest.raises(UserError, match="3 of 3 files have no mask, .*expected .*ids/val/road 0"):
        Pairs(potholes, "images/val/*", ["ids/val/*", "other/val/*"])


def test_an_image_turned_by_its_exif_and_a_mask_that_is_not_are_told(potholes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = potholes / "images/train/road 0 ü.jpg"
    Image.open(path).save(path, exif=exif)
    with pytest.raises(UserError, match=r"is upright, as its EXIF orientation says, 60x80 but its mask .* is 80x60"):
        Pairs(potholes, "images/train/*", "masks/train/*")[0]


def test_the_two_spellings_of_an_umlaut_are_one_name(potholes) -> None:
    composed, decomposed = "road 0 \u00fc.png", "road 0 u\u0308.png"
    (potholes / "masks/val" / composed).rename(potholes / "masks/val" / decomposed)
    assert len(Pairs(potholes, "images/val/*", "masks/val/*")) == 3


@pytest.mark.parametrize("folder", ["", "images", "images/train", "masks/train"])
def test_a_folder_that_may_not_be_read_is_not_an_empty_one(potholes, folder) -> None:
    (potholes / folder).chmod(0)
    user = os.geteuid()
    for parent in potholes.parents[:3]:  # pytest's own folders, closed to others
        if user == 0:
            parent.chmod(0o755)
    try:
        if user == 0:
            os.seteuid(65534)  # nobody: root may read everything
        with pytest.raises(UserError, match="Permission denied; make it readable|not readable"):
            Pairs(potholes, "images/train/*", "masks/train/*")
    finally:
        os.seteuid(user)
        (potholes / folder).chmod(0o755)


def test_a_link_that_leads_nowhere_is_told_by_its_own_name(potholes) -> None:
    for index, target in enumerate(("nowhere.jpg", "road 1 ü.jpg")):  # a dead link, and one that leads to itself
        path = potholes / f"images/train/road {index} ü.jpg"
        path.unlink()
        path.symlink_to(target)
        with pytest.raises(UserError, match=f"cannot read image .*road {index} ü.jpg: "):
            Pairs(potholes, "images/train/*", "masks/train/*")[index]


def test_cityscapes_and_ade20k_are_found_in_their_native_trees(cityscapes, ade20k) -> None:
    frames = Pairs(cityscapes, "leftImg8bit/val/*/*_leftImg8bit.png", "gtFine/val/*/*_gtFine_labelIds.png")
    assert len(frames) == 4 and frames.mask_name(3).endswith("munster_000001_000019_gtFine_labelIds.png")
    scenes = Pairs(ade20k, "images/validation/*.jpg", "annotations/validation/*.png")
    assert len(scenes) == 3 and scenes[0][0].shape == (66, 96, 3)
