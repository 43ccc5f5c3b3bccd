import os

import numpy as np
import pytest
from PIL import Image

from segformer.data.pairs import Pairs, Table
from segformer.errors import UserError
from tests.conftest import save


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
        Pairs(None, "*", "*")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        Pairs(potholes / "nowhere", "*", "*")
    with pytest.raises(UserError, match=r"no images at .*pictures/\*: .*potholes holds images, masks$"):
        Pairs(potholes, "pictures/*", "masks/train/*")
    with pytest.raises(UserError, match="different numbers of stars"):
        Pairs(potholes, "images/*/*", "masks/train/*")
    for pattern in ("images/**/*.png", "images/a?.png", "/images/*.png", "../images/*.png"):
        with pytest.raises(UserError, match="only single stars"):
            Pairs(potholes, pattern, "masks/train/*")
    for masks in (5, [], [5]):
        with pytest.raises(UserError, match=r"masks is .*, expected a pattern below data.root or a list"):
            Pairs(potholes, "images/train/*", masks)


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
    with pytest.raises(
        UserError, match="3 of 3 files have no mask, .*expected .*ids/val/road 0.*potholes holds images, m"
    ):
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


def test_images_without_masks_are_a_source_without_labels(potholes) -> None:
    pairs = Pairs(potholes, "images/val/*", None)
    assert len(pairs) == 3 and not pairs.labelled and pairs.image(0).shape == (60, 80, 3)
    with pytest.raises(UserError, match="has no mask: it can be predicted"):
        pairs[0]


def test_train_ids_that_nobody_made_yet_are_told_with_what_makes_them(cityscapes) -> None:
    with pytest.raises(
        UserError,
        match=r"made by csCreateTrainIdLabelImgs; data=cityscapes reads .* masks=gtFine/val/\*/\*_gtFine_labelIds",
    ):
        Pairs(cityscapes, "leftImg8bit/val/*/*_leftImg8bit.png", "gtFine/val/*/*_gtFine_labelTrainIds.png")


@pytest.fixture
def voc(tmp_path):
    """The native tree in miniature: five photographs, of which three have masks."""
    for index, stem in enumerate(("2007_000032", "2007_000039", "2008_000001", "2008_000002", "2008_000003")):
        save(tmp_path / f"VOC2012/JPEGImages/{stem}.jpg", np.full((6, 8, 3), index, np.uint8))
        if index not in (1, 3):
            save(tmp_path / f"VOC2012/SegmentationClass/{stem}.png", np.full((6, 8), index, np.uint8))
    return tmp_path / "VOC2012"


def listed(root, text: str, images="JPEGImages/*.jpg", masks="SegmentationClass/*.png") -> Pairs:
    (root / "list.txt").write_bytes(text.encode())
    return Pairs(root, images, masks, "list.txt")


def stems(pairs: Pairs) -> list[str]:
    return [pairs.files[index][0].stem for index in range(len(pairs))]


@pytest.mark.parametrize(
    "text",
    [
        "2008_000003\n2007_000032\n",
        "\ufeff# of mine\r\n2008_000003\r\n\r\n  2007_000032  ",
        "2008_000003.jpg\n2007_000032.png\n",
        "JPEGImages/2008_000003.jpg\nVOC2012/JPEGImages/2007_000032\n",
        "./JPEGImages/2008_000003.jpg\nJPEGImages\\2007_000032.jpg\n",
        "/JPEGImages/2008_000003.jpg /SegmentationClassAug/2008_000003.png\n"
        "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n",
        "JPEGImages/2008_000003.jpg\tSegmentationClass/2008_000003.png\n2007_000032 1\n",
    ],
)
def test_a_list_takes_its_images_in_its_order_however_it_names_them(voc, text) -> None:
    pairs = listed(voc, text)
    assert stems(pairs) == ["2008_000003", "2007_000032"]
    assert [int(pairs.mask(index)[0, 0]) for index in range(2)] == [4, 0]


def test_only_listed_images_need_a_mask(voc) -> None:
    with pytest.raises(UserError, match="1 of 2 files have no mask, first .*2007_000039.jpg"):
        listed(voc, "2007_000032\n2007_000039\n")
    with pytest.raises(UserError, match="2 of 5 files have no mask"):
        Pairs(voc, "JPEGImages/*.jpg", "SegmentationClass/*.png")


def test_a_list_that_names_what_is_not_there_is_told_by_line(voc) -> None:
    with pytest.raises(
        UserError, match=r"list.txt:3: '2009_1' is none of the 5 images found \(2 such lines in all\): looked"
    ):
        listed(voc, "2007_000032\n\n2009_1\nPNGImages/2008_000001.jpg\n")
    with pytest.raises(UserError, match=r"list.txt:3: .*2007_000032.jpg is listed already in line 1"):
        listed(voc, "2007_000032\n#\nJPEGImages/2007_000032.jpg\n")
    with pytest.raises(UserError, match="list.txt:1: .*2007_000032.jpg stands beside mask .*2008_000001.png, which"):
        listed(voc, "2007_000032.jpg SegmentationClass/2008_000001.png")
    for line in ("/JPEGImages/2007_000032.jpg /Aug/2008_000001.png", "/JPEGImages/2007_000032.jpg Aug/2008_000001.png"):
        with pytest.raises(
            UserError, match="list.txt:1: .*2007_000032.jpg stands beside mask .*2008_000001.png, which"
        ):
            listed(voc, line)
    with pytest.raises(UserError, match="list.txt lists no samples"):
        listed(voc, "# none\n")
    (voc / "list.txt").write_bytes(b"\xff\xfe2\0")
    with pytest.raises(UserError, match="is no UTF-8 text"):
        Pairs(voc, "JPEGImages/*.jpg", "SegmentationClass/*.png", "list.txt")
    with pytest.raises(
        UserError, match=r"list=lists/val.txt: no such file in .*VOC2012 holds JPEGImages, SegmentationC"
    ):
        Pairs(voc, "JPEGImages/*.jpg", "SegmentationClass/*.png", "lists/val.txt")
    with pytest.raises(UserError, match=r"'../list.txt' leads out of data.root"):
        Pairs(voc, "JPEGImages/*.jpg", "SegmentationClass/*.png", "../list.txt")


def test_the_lists_of_the_segnet_copy_are_read_with_their_author_s_folders(tmp_path) -> None:
    for split in ("train", "val"):
        for stem in ("0001TP", "0002 TP"):
            save(tmp_path / f"images/{split}/{stem}.png", np.zeros((4, 4, 3), np.uint8))
            save(tmp_path / f"masks/{split}/{stem}.png", np.zeros((4, 4), np.uint8))
    patterns = ("images/*/*.png", "masks/*/*.png")
    root, own = "/SegNet/CamVid", str(tmp_path).lstrip("/")
    for line in (
        f"{root}/val/0002 TP.png {root}/valannot/0002 TP.png",
        f"{root}/val/0002 TP.png\t{root}/valannot/0002 TP.png",
        f"{root}/val/0002 TP.png",
        f"/{own}/images/val/0002 TP.png",
        "/val/0002 TP.png",
    ):
        pairs = listed(tmp_path, f"{root}/train/0001TP.png {root}/trainannot/0001TP.png\n{line}", *patterns)
        assert [pairs.name(0), pairs.name(1)] == [f"/{own}/images/train/0001TP.png", f"/{own}/images/val/0002 TP.png"]
    with pytest.raises(UserError, match=r"list.txt:1: '0001TP' may be .*/train/0001TP.png or .*/val/0001TP.png: write"):
        listed(tmp_path, "0001TP", *patterns)


def test_stars_of_two_folders_name_a_sample(cityscapes) -> None:
    images, masks = "leftImg8bit/val/*/*_leftImg8bit.png", "gtFine/val/*/*_gtFine_labelIds.png"
    pairs = listed(cityscapes, "munster/munster_000001_000019\nlindau_000000_000019\n", images, masks)
    assert stems(pairs) == ["munster_000001_000019_leftImg8bit", "lindau_000000_000019_leftImg8bit"]
    frame = "munster/munster_000001_000019"  # the mask of the list is of another kind, but of the same frame
    line = f"leftImg8bit/val/{frame}_leftImg8bit.png gtFine/val/{frame}_gtFine_labelTrainIds.png"
    assert stems(listed(cityscapes, line, images, masks)) == ["munster_000001_000019_leftImg8bit"]


def test_a_list_and_a_table_may_be_long(tmp_path) -> None:
    names = [f"{index:05d}" for index in range(20_000)]
    (tmp_path / "images").mkdir()
    for name in names:
        os.close(os.open(tmp_path / "images" / f"{name}.jpg", os.O_CREAT | os.O_WRONLY))
    pairs = listed(tmp_path, "\n".join(reversed(names)), "images/*", None)
    assert stems(pairs) == names[::-1]
    rows = "".join(f"images/{name}.jpg,\n" for name in reversed(names))
    assert table(tmp_path, "image,mask\n" + rows).files == pairs.files


def table(root, text: str, **more) -> Table:
    (root / "pairs.csv").write_bytes(text.encode())
    return Table(root, "pairs.csv", **more)


def test_the_rows_of_a_table_are_pairs_in_its_order(voc) -> None:
    rows = [("JPEGImages/2008_000003.jpg", "SegmentationClass/2008_000003.png"),
            (f"{voc}/JPEGImages/2007_000032.jpg", "./SegmentationClass\\2007_000032.png")]  # fmt: skip
    for delimiter in (",", ";", "\t"):
        for end in ("\n", "\r\n"):
            text = "".join(
                delimiter.join(row) + end
                for row in [("Id", "file_name", " Mask "), *((f'"a{delimiter}"', *row) for row in rows)]
            )
            for pairs in (table(voc, text), table(voc, "\ufeff" + text + end)):
                assert stems(pairs) == ["2008_000003", "2007_000032"] and pairs.labelled
                assert [int(pairs[index][1][0, 0]) for index in range(2)] == [4, 0]


def test_a_split_column_says_which_rows_are_read(voc) -> None:
    text = "image,label,split\nJPEGImages/2008_000003.jpg,,train\nJPEGImages/2007_000032.jpg,,val\n"
    assert stems(table(voc, text, split="val")) == ["2007_000032"] and len(table(voc, text)) == 2
    assert not table(voc, text).labelled
    with pytest.raises(
        UserError, match=r"no rows of split 'vol' \(did you mean 'val'\?\): its column split holds train, val"
    ):
        table(voc, text, split="vol")
    with pytest.raises(UserError, match="has no column split, subset, set, expected one"):
        table(voc, text.replace("split", "part"), split="val")


def test_a_table_that_cannot_be_read_is_told(voc) -> None:
    image, mask = "JPEGImages/2007_000032.jpg", "SegmentationClass/2007_000032.png"
    with pytest.raises(UserError, match=r"columns picture, mask, expected one of image, .* and one of mask"):
        table(voc, f"picture,mask\n{image},{mask}\n")
    with pytest.raises(UserError, match="no rows below its header"):
        table(voc, "image,mask\n")
    with pytest.raises(UserError, match="1 of 2 rows have no mask, first row 3"):
        table(voc, f"image,mask\n{image},{mask}\n{image}\n")
    rows = "".join(f"{index}.jpg,{mask}\n" for index in range(7))
    with pytest.raises(UserError, match=r"7 of 8 rows .*\(line 3: 0.jpg, line 4: 1.jpg, .*line 7: 4.jpg and 2 more\)"):
        table(voc, f"image,mask\n{image},{mask}\n{rows}")
    for path in ("../JPEGImages/2007_000032.jpg", "/etc/passwd", "..\\a.jpg"):
        with pytest.raises(UserError, match=r"pairs.csv:2: .* leads out of data.root="):
            table(voc, f"image,mask\n{path},{mask}\n")
    with pytest.raises(UserError, match="csv=no.csv: no such file"):
        Table(voc, "no.csv")
    with pytest.raises(UserError, match="data.root is not set"):
        Table(None, "no.csv")
