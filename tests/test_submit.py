import random
import shutil
import unicodedata
import zipfile
from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segformer.data.pairs import Pairs
from segformer.data.samples import Source
from segformer.errors import UserError
from segformer.labels import Classes
from segformer.metrics import confusion_matrix
from segformer.submit import KINDS, Predictions, Writer
from tests.conftest import ROOT, save
from tests.trees import with_palette

RAINBOW = Classes.from_config({"sky": {"color": [0, 0, 255], "ids": [4]}, "road": {"color": [9, 8, 7], "ids": [2, 300]},
                               "car": {"color": [255, 0, 0], "ids": [7]}}, ignore=[0, 255])  # fmt: skip
WIDE = Classes.from_config({"low": {"ids": [44]}, "high": {"ids": [300]}})


def shipped(data: str) -> Classes:
    """The classes of a YAML of ours."""
    settings = yaml.safe_load((ROOT / "configs" / "data" / f"{data}.yaml").read_text())["data"]
    return Classes.from_config(settings["classes"], settings["ignore"])


STREET, ADE = shipped("cityscapes"), shipped("ade20k")
LABEL_IDS = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33], np.uint8)


def label_map(classes: int, height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, (height, width)).astype(np.uint8)


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def listed(folder: Path) -> list[str]:
    """Every file below, hidden and temporary ones too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def written(folder: Path, names: list[str], kind: str = "ids", classes: Classes = RAINBOW) -> Writer:
    writer = Writer(kind, folder, names, classes)
    for seed, name in enumerate(names):
        writer.write(name, label_map(len(classes), seed=seed))
    return writer


def names_of(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def lonely(folder: Path, array: np.ndarray, classes: Classes = RAINBOW, values: str = "raw") -> Predictions:
    """Predictions of the one sample `a.jpg`."""
    save(folder / "a.png", array)
    return Predictions(folder, ["a.jpg"], classes, values)


# -- writing


def street_names(root: Path) -> list[str]:
    return names_of(Pairs(root, "leftImg8bit/val/*/*_leftImg8bit.png", "gtFine/val/*/*_gtFine_labelIds.png"))


def test_cityscapes_files_are_label_ids_in_the_folders_of_their_cities(tmp_path, cityscapes) -> None:
    names = street_names(cityscapes)
    folder = written(tmp_path / "out", names, "cityscapes", STREET).finish()
    assert folder == tmp_path / "out"
    assert listed(folder) == [
        f"{city}/{city}_{frame:06d}_000019_pred_labelIds.png" for city in ("lindau", "munster") for frame in range(2)
    ]
    for seed, name in enumerate(names):
        path = folder / Path(name).parent.name / Path(name).name.replace("leftImg8bit", "pred_labelIds")
        found = pixels(path)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, LABEL_IDS[label_map(19, seed=seed)])


def official(predictions: Path, labels: list[Path]) -> dict[str, float]:
    """Class IoU as Cityscapes' own script finds, reads and scores the files."""
    script = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    args = copy(script.args)  # which other tests read, too
    args.predictionPath, args.predictionWalk = str(predictions), None
    args.quiet, args.JSONOutput, args.evalInstLevelScore = True, False, False
    truths = [str(path) for path in labels]
    return script.evaluateImgLists([script.getPrediction(args, truth) for truth in truths], truths, args)["classScores"]


def test_the_official_script_finds_and_scores_each_cityscapes_file(tmp_path, cityscapes) -> None:
    names, labels = street_names(cityscapes), sorted((cityscapes / "gtFine" / "val").rglob("*_labelIds.png"))
    writer, hits, union = Writer("cityscapes", tmp_path / "out", names, STREET), np.zeros(19), np.zeros(19)
    for seed, (name, path) in enumerate(zip(names, labels, strict=True)):
        truth, prediction = pixels(path), label_map(19, 64, 128, seed)
        writer.write(name, prediction)
        for index, raw in enumerate(LABEL_IDS.tolist()):
            wanted, found = truth == raw, (prediction == index) & np.isin(truth, LABEL_IDS)
            hits[index] += (wanted & found).sum()
            union[index] += (wanted | found).sum()
    scores = official(writer.finish(), labels)
    assert [scores[name] for name in STREET.names] == pytest.approx((hits / union).tolist(), abs=1e-12)


def test_ade_files_count_from_one_in_one_folder_and_in_a_zip_that_is_the_same_every_time(tmp_path) -> None:
    names = [f"/data/release_test/{part}/ADE_test_{index:08d}.jpg" for part in ("testing", "more") for index in (2, 1)]
    names[2:] = [name.replace("0000000", "0000001") for name in names[2:]]
    archives = [written(tmp_path / folder, names, "ade", ADE).finish() for folder in ("one", "two")]
    assert archives[0] == tmp_path / "one.zip" and archives[0].read_bytes() == archives[1].read_bytes()
    with zipfile.ZipFile(archives[0]) as archive:
        assert archive.namelist() == sorted(Path(name).with_suffix(".png").name for name in names)
        assert all(info.external_attr >> 16 & 0o444 == 0o444 for info in archive.infolist())  # readable when unpacked
        for seed, name in enumerate(names):
            found = np.array(Image.open(archive.open(f"{Path(name).stem}.png")))
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, label_map(150, seed=seed) + 1)


def test_ids_are_the_smallest_raw_id_of_a_class_and_16_bits_where_one_needs_them(tmp_path) -> None:
    labels = label_map(3)
    found = pixels(Writer("ids", tmp_path / "8", ["a.jpg"], RAINBOW).write("a.jpg", labels))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.choose(labels, [4, 2, 7]))
    found = pixels(Writer("ids", tmp_path / "16", ["a.jpg"], WIDE).write("a.jpg", labels % 2))
    np.testing.assert_array_equal(found, np.choose(labels % 2, [44, 300]))
    assert found.dtype == np.uint16


def test_train_ids_and_colours_are_written_as_they_are(tmp_path) -> None:
    labels = label_map(3)
    found = pixels(Writer("train_ids", tmp_path / "t", ["a.jpg"], RAINBOW).write("a.jpg", labels))
    np.testing.assert_array_equal(found, labels)
    found = pixels(Writer("color", tmp_path / "c", ["a.jpg"], RAINBOW).write("a.jpg", labels))
    np.testing.assert_array_equal(found, np.array([[0, 0, 255], [9, 8, 7], [255, 0, 0]])[labels])


def test_files_lie_in_the_folders_in_which_the_samples_differ(tmp_path) -> None:
    names = ["/d/images/val/day/1.jpg", "/d/images/val/night/1.jpg", "/d/images/val/night/late/x.v2.JPG"]
    assert listed(written(tmp_path, names).finish()) == ["day/1.png", "night/1.png", "night/late/x.v2.png"]
    assert [*Writer("ids", tmp_path, ["/d/a/only.tif"], RAINBOW).files.values()] == ["only.png"]
    scenes = ["scene_1_00000", "rows train[3].image"]
    assert [*Writer("ids", tmp_path, scenes, RAINBOW).files.values()] == [
        "scene_1_00000.png",
        "rows train[3].image.png",
    ]


def test_members_of_an_archive_are_called_by_their_names_inside_it(tmp_path) -> None:
    for split in ("a", "b"):
        save(tmp_path / "data" / "images" / split / "1.png", label_map(3)[..., None].repeat(3, 2))
    archive = shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / "data")
    names = names_of(Pairs(archive, "images/*/*.png", None))
    assert listed(written(tmp_path / "out", names).finish()) == ["a/1.png", "b/1.png"]


@pytest.mark.parametrize("name", ["../../etc/x.jpg", "/etc/x.jpg", "C:\\x.jpg", "a/../../../x.jpg", "..\\..\\x.jpg",
                                  "x\0.jpg", "a/.. /x.jpg", "\ud800.jpg", "line\nbreak.jpg"])  # fmt: skip
def test_no_name_leads_out_of_the_folder(tmp_path, name) -> None:
    folder = tmp_path / "a" / "b" / "c" / "out"
    assert len(listed(written(folder, [name, "here/y.jpg", "there/y.jpg"]).finish())) == 3
    assert len(listed(tmp_path)) == 3


def test_no_name_made_of_dangerous_parts_leads_out_of_the_folder(tmp_path) -> None:
    parts, rng = ["..", ".", "", "/", "\\", "C:", "a", "\0", " ..", ".. ", "...", "x.jpg", "é", "~"], random.Random(0)
    for _ in range(2000):
        names = ["".join(rng.choices(parts, k=5)) + "".join(rng.choices("/\\", k=1)) + "end.png", "b.jpg"]
        if rng.random() < 0.5:
            names[1] = "".join(rng.choices(parts, k=5)) + "/b.jpg"
        for file in Writer("ids", tmp_path, names, RAINBOW).files.values():
            pieces = file.split("/")
            assert all(piece.strip(". ") for piece in pieces), (names, file)
            assert not set("\0:\\") & set(file) and file.endswith((".png",)), (names, file)


@pytest.mark.parametrize("name", ["", "..", "/", "a/..", "..."])
def test_a_name_that_no_file_may_have_is_refused(tmp_path, name) -> None:
    with pytest.raises(UserError, match="expected a name that a file may have"):
        Writer("ids", tmp_path, [name], RAINBOW)


@pytest.mark.parametrize(
    ("kind", "classes", "names", "file"),
    [
        ("ids", RAINBOW, ["x/a.jpg", "x/a.png"], "a.png"),
        ("ids", RAINBOW, ["x/a.jpg", "x/a.jpg"], "a.png"),
        ("ids", RAINBOW, ["x/a.jpg", "x/y/../a.jpg"], "a.png"),
        ("ids", RAINBOW, [unicodedata.normalize(form, "ü.jpg") for form in ("NFC", "NFD")], "ü.png"),
        ("ade", ADE, ["x/a.jpg", "y/a.jpg"], "a.png"),
        ("cityscapes", STREET, ["x/ulm_000001_000019_leftImg8bit.png", "y/ulm_000001_000019.png"],
         "ulm_000001_000019_pred_labelIds.png"),
    ],
)  # fmt: skip
def test_two_samples_that_would_share_a_file_are_refused(tmp_path, kind, classes, names, file) -> None:
    with pytest.raises(UserError, match="would share the file") as told:
        Writer(kind, tmp_path, names, classes)
    assert f"samples {names[0]} and {names[1]} would share the file {file}:" in str(told.value)


def test_no_file_is_replaced_and_none_is_left_half_written(tmp_path) -> None:
    writer = written(tmp_path / "out", ["a.jpg", "b.jpg"])
    before = (tmp_path / "out" / "a.png").read_bytes()
    with pytest.raises(UserError, match=r"a\.png is there already, and submissions replace no file"):
        writer.write("a.jpg", label_map(3, seed=5))
    assert (tmp_path / "out" / "a.png").read_bytes() == before
    assert listed(tmp_path) == ["out/a.png", "out/b.png"]
    archived = Writer("ade", tmp_path / "ade", ["a.jpg"], ADE)
    (tmp_path / "ade.zip").write_bytes(b"mine")
    archived.write("a.jpg", label_map(150))
    with pytest.raises(UserError, match=r"ade\.zip is there already"):
        archived.finish()
    assert (tmp_path / "ade.zip").read_bytes() == b"mine"


def test_several_processes_write_what_one_writes(tmp_path) -> None:
    names = [f"/d/{city}/{index}.jpg" for city in ("x", "y") for index in range(4)]
    alone = written(tmp_path / "alone", names).finish()
    writers = [Writer("ids", tmp_path / "shared", names, RAINBOW) for _ in range(3)]
    for index in reversed(range(len(names))):
        writers[index % 3].write(names[index], label_map(3, seed=index))
    shared = writers[0].finish()
    assert listed(shared) == listed(alone)
    assert all((shared / file).read_bytes() == (alone / file).read_bytes() for file in listed(alone))


def test_a_submission_that_lacks_images_is_told(tmp_path) -> None:
    writer = Writer("ade", tmp_path / "out", ["a.jpg", "b.jpg", "c.jpg"], ADE)
    writer.write("b.jpg", label_map(150))
    with pytest.raises(UserError, match=r"2 of 3 label maps were not written to .*, first that of a\.jpg"):
        writer.finish()
    assert listed(tmp_path) == ["out/b.png"]


@pytest.mark.parametrize(
    ("kind", "classes", "name", "told"),
    [
        ("cityscape", STREET, "a.jpg", "submission is 'cityscape' (did you mean 'cityscapes'?), expected"),
        (None, STREET, "a.jpg", "submission is None"),
        ("ade", STREET, "a.jpg", "submission=ade is for the 150 classes of ADE20K, the data has 19"),
        ("cityscapes", Classes.from_config(STREET.names), "ulm_000000_000019.png",
         "class 'road' is 0 in the masks, which is no label id that Cityscapes scores"),
        ("cityscapes", WIDE, "ulm_000000_000019.png", "class 'low' is 44 in the masks"),
        ("cityscapes", STREET, "ulm_0_19.png", "sample ulm_0_19.png is not called <city>_<6 digits>_<6 digits>"),
        ("cityscapes", STREET, "u*m_000000_000019.png", "is not called <city>"),
        ("ids", Classes.from_config({"a": {"color": [1, 2, 3]}}, [], "colors"), "a.jpg",
         "submission=ids writes raw ids, but the masks of the data hold colours: take color"),
    ],
)  # fmt: skip
def test_what_a_kind_does_not_take_is_refused(tmp_path, kind, classes, name, told) -> None:
    with pytest.raises(UserError) as refused:
        Writer(kind, tmp_path, [name], classes)
    assert told in str(refused.value)


def test_a_pixel_of_no_class_is_not_submitted(tmp_path) -> None:
    writer = Writer("train_ids", tmp_path, ["a.jpg"], RAINBOW)
    with pytest.raises(UserError, match=r"the label map of a\.jpg holds 3, expected train ids up to 2"):
        writer.write("a.jpg", np.array([[0, 3]], np.uint8))
    assert listed(tmp_path) == []


# -- reading back


@pytest.mark.parametrize(
    ("kind", "classes", "values"),
    [("ids", RAINBOW, "raw"), ("ids", WIDE, "raw"), ("train_ids", RAINBOW, "train"), ("color", RAINBOW, "color"),
     ("cityscapes", STREET, "raw"), ("color", STREET, "color"), ("ade", ADE, "raw")],
)  # fmt: skip
def test_what_was_written_is_read_back(tmp_path, kind, classes, values) -> None:
    names = [f"/d/leftImg8bit/{city}/{city}_{i:06d}_000019_leftImg8bit.png" for city in ("ulm", "bonn") for i in (1, 2)]
    folder = written(tmp_path / "out", names, kind, classes).finish()  # a zip file, of ade
    predictions = Predictions(folder, names, classes, values)
    for seed, name in enumerate(names):
        found = predictions.read(name, (24, 32))
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, label_map(len(classes), seed=seed))
    assert kind in KINDS


@pytest.mark.parametrize(
    "names",
    [
        ["images/a.jpg", "images/b/a.jpg"],
        ["x/a.jpg", "y/x/a.jpg"],
        ["images/day/1.jpg", "images/extra/day/1.jpg", "images/night/1.jpg"],
        ["x/a.png", "x/a_png/b.jpg"],
        ["a" * 250 + ".jpg", "b.jpg"],
    ],
)
def test_folders_that_end_as_others_are_told_apart_when_read_back(tmp_path, names) -> None:
    folder = written(tmp_path / "out", names, "ids", RAINBOW).finish()
    predictions = Predictions(folder, names, RAINBOW)
    for seed, name in enumerate(names):
        np.testing.assert_array_equal(predictions.read(name, (24, 32)), label_map(len(RAINBOW), seed=seed))


def test_a_file_that_would_be_a_folder_and_a_class_without_ids_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="x/a.png of sample x/a.jpg would be the folder of others"):
        Writer("ids", tmp_path, ["x/a.jpg", "x/a.png/b.jpg", "c.jpg"], RAINBOW)
    nowhere = Classes.from_config({"a": {"ids": [1]}, "b": {"ids": []}}, "rest")
    with pytest.raises(UserError, match="class 'b' has no raw id in data.classes: take submission=train_ids"):
        Writer("ids", tmp_path, ["c.jpg"], nowhere)


@pytest.mark.parametrize(
    ("name", "files", "found"),
    [
        ("a.jpg", ["a.png"], "a.png"),
        ("a.jpg", ["deep/er/a_pred.PNG", "b.png", "notes.txt"], "deep/er/a_pred.PNG"),
        ("a.jpg", ["a.jpg.png"], "a.jpg.png"),
        ("a.jpg", ["a.png", "a_color.png"], "a.png"),
        ("a.jpg", ["a.png", ".a.png", ".cache/a.png"], "a.png"),
        ("a_img.jpg", ["a.png", "a_img.png"], "a_img.png"),
        ("a_1.jpg", ["a_1.png", "a_10.png", "a.png"], "a_1.png"),
        ("/d/ulm_000001_000019_leftImg8bit.png", ["ulm_000001_000019_gtFine_labelTrainIds.png"],
         "ulm_000001_000019_gtFine_labelTrainIds.png"),
        ("/d/ulm_000001_000019_leftImg8bit.png", ["ulm_000001_000019_leftImg8bit.png", "ulm_000001_000019_x.png"],
         "ulm_000001_000019_leftImg8bit.png"),
        ("/d/val/a.jpg", ["train/a.png", "val/a.png"], "val/a.png"),
        ("/d/val/a.jpg", ["color/a.png", "val/a_ids.png"], "val/a_ids.png"),
        (unicodedata.normalize("NFC", "é.jpg"), [unicodedata.normalize("NFD", "é") + "_x.png"],
         unicodedata.normalize("NFD", "é") + "_x.png"),
    ],
)  # fmt: skip
def test_the_file_of_a_sample_is_found_by_its_stem(tmp_path, name, files, found) -> None:
    for file in files:
        save(tmp_path / file, label_map(3)) if file.lower().endswith("png") else (tmp_path / file).write_text("")
    assert str(Predictions(tmp_path, [name], RAINBOW).files[name]) == str(tmp_path / found)


def test_a_longer_name_is_not_taken_for_the_suffix_of_a_shorter_one(tmp_path) -> None:
    files = {
        "img_1": "img_1_pred.png",
        "img_1_2": "img_1_2_pred.png",
        "img": "img-pred.png",
        "img_image": "img_image.png",
    }
    for file in files.values():
        save(tmp_path / file, label_map(3))
    found = Predictions(tmp_path, [*files], RAINBOW).files
    assert {name: Path(str(place)).name for name, place in found.items()} == files


def test_predictions_in_a_zip_are_read_where_they_lie_and_archives_beside_them_are_left_alone(tmp_path) -> None:
    folder = written(tmp_path / "out", ["x/a.jpg", "y/a.jpg"]).finish()
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder))
    shutil.copy(archive, folder / "backup.zip")
    for where in (folder, archive, str(archive)):
        predictions = Predictions(where, ["x/a.jpg", "y/a.jpg"], RAINBOW)
        np.testing.assert_array_equal(predictions.read("y/a.jpg", (24, 32)), label_map(3, seed=1))


@pytest.mark.parametrize(
    ("names", "files", "told"),
    [
        (["a.jpg", "b.jpg", "c.jpg"], ["b.png"],
         "2 of 3 samples have no prediction in FOLDER, first a.jpg: expected a.png or a_*.png below it, which holds b"),
        (["a.jpg"], [], "below it, which holds no PNG"),
        (["a.jpg"], ["w.png", "x.png", "y.png", "z.png", "ab.png"], "which holds ab.png, w.png, x.png and 2 more"),
        (["a.jpg"], ["a_x.png", "a_y.png"], "sample a.jpg has 2 predictions, FOLDER/a_x.png, FOLDER/a_y.png, expected"),
        (["a.jpg"], ["x/a.png", "y/a.png"], "sample a.jpg has 2 predictions"),
        (["x/a.jpg", "y/a.jpg"], ["a.png"], "samples x/a.jpg and y/a.jpg have one prediction together, FOLDER/a.png"),
        (["x/a.jpg", "y/a.jpg"], ["y/a.png"], "have one prediction together, FOLDER/y/a.png"),
    ],
)  # fmt: skip
def test_a_sample_without_a_file_of_its_own_is_told_before_anything_is_scored(tmp_path, names, files, told) -> None:
    for file in files:
        save(tmp_path / file, label_map(3))
    with pytest.raises(UserError) as refused:
        Predictions(tmp_path, names, RAINBOW)
    assert told.replace("FOLDER", str(tmp_path)) in str(refused.value)


def test_a_folder_that_is_not_there_and_unknown_values_are_told(tmp_path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder or zip file"):
        Predictions(tmp_path / "nowhere", ["a.jpg"], RAINBOW)
    with pytest.raises(
        UserError, match=r"predictions_values is 'colour' \(did you mean 'color'\?\), expected raw, train"
    ):
        lonely(tmp_path, label_map(3), values="colour")


def test_raw_ids_of_a_class_are_one_class_and_ignored_ones_none(tmp_path) -> None:
    raw = np.array([[4, 2, 300], [7, 0, 255]], np.uint16)
    found = lonely(tmp_path, raw).read("a.jpg", (2, 3))
    assert found.tolist() == [[0, 1, 1], [2, 3, 3]] and lonely(tmp_path, raw).nothing == 3


def test_train_ids_are_read_whatever_the_masks_of_the_data_hold(tmp_path) -> None:
    raw = np.array([[0, 1, 2, 255]], np.uint8)
    colored = Classes.from_config({"a": {"color": [1, 2, 3]}, "b": {"color": [3, 2, 1]}, "c": {"color": [5, 5, 5]}}, [],
                                  "colors")  # fmt: skip
    for classes in (RAINBOW, colored):
        assert lonely(tmp_path, raw, classes, "train").read("a.jpg", (1, 4)).tolist() == [[0, 1, 2, 3]]
        with_palette(raw).save(tmp_path / "a.png")
        assert Predictions(tmp_path, ["a.jpg"], classes, "train").read("a.jpg", (1, 4)).tolist() == [[0, 1, 2, 3]]


def test_255_classes_leave_room_for_no_class(tmp_path) -> None:
    many = Classes.from_config([f"c{index}" for index in range(255)])
    found = lonely(tmp_path, np.array([[0, 254, 255]], np.uint8), many).read("a.jpg", (1, 3))
    assert found.dtype == np.uint8 and found.tolist() == [[0, 254, 255]]


def test_colours_are_read_from_rgb_and_palette_files_and_black_is_no_class(tmp_path) -> None:
    colors = np.array([[[0, 0, 255], [9, 8, 7], [255, 0, 0], [0, 0, 0]]], np.uint8)
    assert lonely(tmp_path, colors, values="color").read("a.jpg", (1, 4)).tolist() == [[0, 1, 2, 3]]
    image = Image.fromarray(np.array([[2, 1, 0]], np.uint8))
    image.putpalette([255, 0, 0, 9, 8, 7, 0, 0, 255])
    image.save(tmp_path / "a.png")
    assert Predictions(tmp_path, ["a.jpg"], RAINBOW, "color").read("a.jpg", (1, 3)).tolist() == [[0, 1, 2]]
    black = Classes.from_config({"void": {"color": [0, 0, 0]}, "road": {"color": [9, 8, 7]}})
    assert lonely(tmp_path, colors[:, 1::2], black, "color").read("a.jpg", (1, 2)).tolist() == [[1, 0]]


def test_masks_of_colours_are_raw_values_of_which_a_class_may_have_several(tmp_path) -> None:
    classes = Classes.from_config(
        {"a": {"colors": [[1, 2, 3], [4, 5, 6]]}, "b": {"color": [7, 7, 7]}}, [[9, 9, 9]], "colors"
    )
    raw = np.array([[[1, 2, 3], [4, 5, 6], [7, 7, 7], [9, 9, 9]]], np.uint8)
    assert lonely(tmp_path, raw, classes).read("a.jpg", (1, 4)).tolist() == [[0, 0, 1, 2]]


def test_ids_in_palette_files_are_their_indices(tmp_path) -> None:
    with_palette(np.array([[4, 7, 2]], np.uint8)).save(tmp_path / "a.png")
    assert Predictions(tmp_path, ["a.jpg"], RAINBOW).read("a.jpg", (1, 3)).tolist() == [[0, 2, 1]]


GREY, PICTURE = np.full((2, 3), 9, np.uint8), np.arange(18, dtype=np.uint8).reshape(2, 3, 3)


@pytest.mark.parametrize(
    ("array", "values", "told"),
    [
        (GREY, "raw", "a.png holds 9 in 6 of 6 pixels, expected what data.classes and data.ignore list: add "
                      "predictions_values=train or predictions_values=color"),
        (GREY, "train", "a.png holds 9 in 6 of 6 pixels, expected train ids 0 to 2, or 255: add predictions_values=r"),
        (PICTURE, "color", "a.png holds [0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14], ... in 6 of 6 "
                           "pixels, expected the colours of data.classes"),
        (PICTURE, "raw", "a.png holds colours, expected one channel of ids: add predictions_values=train or"),
        (PICTURE, "train", "a.png holds colours, expected one channel of ids"),
        (GREY, "color", "a.png holds one channel, expected colours: add predictions_values=raw or"),
        (np.zeros((3, 2), np.uint8), "raw", "a.png is 2x3 but the label of a.jpg is 3x2, expected equal sizes"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_prediction_is_told_with_its_file(tmp_path, array, values, told) -> None:
    with pytest.raises(UserError) as refused:
        lonely(tmp_path, array, values=values).read("a.jpg", (2, 3))
    assert told in str(refused.value)


def test_a_damaged_prediction_and_a_bomb_are_told(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"a\.png"):
        Predictions(tmp_path, ["a.jpg"], RAINBOW).read("a.jpg", (2, 3))
    save(tmp_path / "a.png", label_map(3))
    with pytest.raises(UserError, match="decompression bomb"):
        Predictions(tmp_path, ["a.jpg"], RAINBOW, max_pixels=100).read("a.jpg", (24, 32))


def test_colours_that_two_classes_share_cannot_be_read_back(tmp_path) -> None:
    with pytest.raises(
        UserError, match=r"cannot tell the classes apart, color \[140, 140, 140\] .* 'road' and 'skyscraper'"
    ):
        lonely(tmp_path, label_map(3), ADE, "color")


def test_a_pixel_of_no_class_is_a_miss_of_its_label_and_nothing_else_as_in_the_official_script(tmp_path) -> None:
    """Equal class IoU: ours with a column for no class, Cityscapes' script, and mmsegmentation's histograms."""
    rng, name = np.random.default_rng(1), "ulm_000000_000019"
    truth, raw = rng.integers(0, 34, (2, 64, 128)).astype(np.uint8)  # ignored ids in both
    save(tmp_path / "gt" / f"{name}_gtFine_labelIds.png", truth)
    save(tmp_path / "peer" / f"{name}_peer.png", raw)
    predictions = Predictions(tmp_path / "peer", [f"{name}_leftImg8bit.png"], STREET)
    found, label = predictions.read(f"{name}_leftImg8bit.png", (64, 128)), STREET.encode(truth)
    assert (found == predictions.nothing).mean() > 0.3

    counts = confusion_matrix(torch.from_numpy(found), torch.from_numpy(label), 20)[:19].numpy()
    hits, labelled, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)[:19]
    ours = hits / (labelled + predicted - hits)

    scored = label != 255
    areas = [np.histogram(values, bins=19, range=(0, 18))[0] for values in
             (found[scored & (found == label)], np.where(found == 19, 255, found)[scored], label[scored])]  # fmt: skip
    np.testing.assert_allclose(ours, areas[0] / (areas[1] + areas[2] - areas[0]), rtol=0, atol=1e-12)
    scores = official(tmp_path / "peer", [tmp_path / "gt" / f"{name}_gtFine_labelIds.png"])
    assert [scores[name] for name in STREET.names] == pytest.approx(ours.tolist(), abs=1e-12)
