"""Label mistakes that train without a word: each is made here in a small tree, and its one sentence is expected."""

import html
import json
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from segformer.__main__ import main
from segformer.data.check import check, quick, write
from segformer.data.datamodule import SegmentationData
from segformer.errors import SharedError, build
from tests.conftest import ROOT, TOY, save_pair

FOLDER = {
    "train": {"images": "images/train/*", "masks": "masks/train/*"},
    "val": {"images": "images/val/*", "masks": "masks/val/*"},
    "batch_size": 2,
    "crop_size": 32,
}
VOC = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]], np.uint8)

Make = Callable[[int], np.ndarray]


def names_of(data: str) -> list[str]:
    return list(yaml.safe_load((ROOT / "configs" / "data" / f"{data}.yaml").read_text())["data"]["classes"])


def tree(root: Path, make: Make, stem: str = "x{}", counts: tuple[int, int] = (3, 2)) -> Path:
    """Pairs in images/ and masks/, of which the masks are `make(number)`."""
    for split, first, count in (("train", 0, counts[0]), ("val", counts[0], counts[1])):
        for number in range(first, first + count):
            mask = make(number)
            image = np.random.default_rng(number).integers(0, 256, (*mask.shape[:2], 3)).astype(np.uint8)
            save_pair(root, split, stem.format(number), image, mask)
    return root


def blocks(values: list[int]) -> Make:
    """Masks of 48 x 64 in blocks of 8 pixels; each value is in every mask, as far as there is room."""

    def make(number: int) -> np.ndarray:
        return np.resize(np.roll(np.array(values, np.uint8), 3 * number), (6, 8)).repeat(8, 0).repeat(8, 1)

    return make


def painted(colors: np.ndarray, values: list[int]) -> Make:
    return lambda number: colors[blocks(values)(number)]


def run(capsys, root: Path, *overrides: str) -> tuple[int, list[str]]:
    """The exit code of the command and what it printed, with ROOT for the tree."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["check", *overrides, f"data.root={root}", "--output", str(root.parent / "checks")])
    return int(stop.value.code or 0), capsys.readouterr().out.replace(str(root), "ROOT").splitlines()


def mended(command: list[str], fix: str) -> list[str]:
    """The command with what a fix says behind it, as a shell would split it."""
    return [*command, *shlex.split(fix)]


def listed(names: list[str]) -> str:
    return f"data.classes=[{','.join(names)}]"


PLACES = [("train", 0), ("train", 1), ("train", 2), ("val", 3), ("val", 4)]
FIVE = ", ".join(f"ROOT/masks/{split}/x{number}.png" for split, number in PLACES)
ADE_FILES = FIVE.replace("/x", "/ADE_train_")
STREET_FILES = FIVE.replace("/x", "/ulm_").replace(".png", "_gtFine_labelIds.png")
ADE = (
    "in ADE20K's masks 0 means no label and 'wall' is 1, but data.classes counts its names from 0, so that every class "
    "is off by one: 0 is in 5 of 5 masks, "
)
STREET = (
    "the masks hold Cityscapes' label ids, of which road is 7, but data.classes counts its names from 0, so that 7 "
    "would be trained as 'traffic sign': "
)
TWICE = (
    "0 means no label and class 'background' is 1, but 0 fills 33% of the pixels and 'b', which is 3, never occurs: "
    f"'background' is 0, and every class off by one: {FIVE}"
)
BLOCKS_150 = [0, *range(1, 150, 4)]
TRAPS = {
    "a: ADE20K's 0 as a class, 150 occurs": (
        blocks([*BLOCKS_150, 150]), "ADE_train_{}", [listed(names_of("ade20k"))],
        ADE + ADE_FILES, "data.reduce_zero_label=true",
    ),
    "a: ADE20K's 0 as a class, told by the files": (
        blocks(BLOCKS_150), "ADE_train_{}", [listed([f"c{place}" for place in range(150)])],
        ADE.replace("wall", "c0") + ADE_FILES, "data.reduce_zero_label=true",
    ),
    "a: ADE20K's 0 as a class, told by the names": (
        blocks(BLOCKS_150), "x{}", [listed(names_of("ade20k"))],
        ADE + FIVE, "data.reduce_zero_label=true",
    ),
    "b: Cityscapes' label ids without their mapping": (
        blocks([*range(34)]), "x{}", [listed(names_of("cityscapes"))],
        STREET + FIVE, "data=cityscapes knows the label ids",
    ),
    "b: Cityscapes' label ids up to 18": (
        blocks([*range(19)]), "ulm_{}_gtFine_labelIds", [listed(names_of("cityscapes"))],
        STREET + STREET_FILES, "data=cityscapes knows the label ids",
    ),
    "d: a mask of colours": (
        painted(np.array([[10, 20, 30], [200, 0, 50]], np.uint8), [0, 1, 1]), "x{}", ["data.classes=[a,b]"],
        f"5 of 5 masks hold RGB colours, expected class ids (2 of them: [200, 0, 50] 67%, [10, 20, 30] 33%): {FIVE}",
        "data.mask_values=colors '~data.classes' '+data.classes={NAME0: {color: [200, 0, 50]}, "
        "NAME1: {color: [10, 20, 30]}}' with your names",
    ),
    "e: a palette PNG converted to RGB": (
        painted(VOC, [0, 1, 2]), "x{}", ["data.classes=[background,cat,dog]"],
        "5 of 5 masks hold RGB colours, expected class ids (Pascal VOC's palette, so palette PNGs were converted to "
        f"RGB: [0, 0, 0] = background, [128, 0, 0] = cat, [0, 128, 0] = dog): {FIVE}",
        "data.mask_values=colors '~data.classes' '+data.classes={background: {color: [0, 0, 0]}, "
        "cat: {color: [128, 0, 0]}, dog: {color: [0, 128, 0]}}'",
    ),
    "e: the colours of the classes": (
        painted(np.array([[0, 0, 0], [9, 9, 200], [70, 70, 70]], np.uint8), [0, 1, 2]), "x{}",
        ["data.classes={road: {color: [9, 9, 200]}, wall: {color: [70, 70, 70]}}"],
        "5 of 5 masks hold RGB colours, expected class ids (those of data.classes: [9, 9, 200] = road, "
        f"[70, 70, 70] = wall): {FIVE}",
        "data.mask_values=colors 'data.ignore=[[0, 0, 0]]'",
    ),
    "f: a mask of 0 and 255": (
        blocks([0, 0, 0, 255]), "x{}", ["data.classes=[background,pothole]"],
        f"the masks hold 0 and 255 only, and 255 means no label, so 'pothole' would never be trained: {FIVE}",
        "'~data.classes' '+data.classes={background: {ids: [0]}, pothole: {ids: [255]}}' 'data.ignore=[]'",
    ),
    "g: the background counted twice": (
        blocks([0, 1, 2]), "x{}", ["data.classes=[background,a,b]", "data.reduce_zero_label=true"],
        TWICE, "data.reduce_zero_label=false '~data.classes' '+data.classes=[background, a, b]' 'data.ignore=[255]'",
    ),
    "g: the background counted twice by ids": (
        blocks([0, 1, 2]), "x{}",
        ["data.classes={background: {ids: [1]}, a: {ids: [2]}, b: {ids: [3]}}", "data.ignore=[0,255]"],
        TWICE, "data.reduce_zero_label=false '~data.classes' '+data.classes=[background, a, b]' 'data.ignore=[255]'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_a_label_mistake_is_one_sentence_with_its_fix(trap, tmp_path, capsys) -> None:
    make, stem, overrides, sentence, fix = TRAPS[trap]
    root, command = tree(tmp_path / "tree", make, stem), ["data=folder", "data.crop_size=32", *overrides]
    code, lines = run(capsys, root, *command, "--show", "1")
    assert code == 1 and [line for line in lines if line.startswith("error: ")] == [f"error: {sentence}"]
    assert f"  fix: {fix}" in lines
    if fix.startswith("data=cityscapes"):
        return
    pasted = mended(command, fix.replace("NAME", "class_").removesuffix(" with your names"))
    code, lines = run(capsys, root, *pasted, "--show", "0")
    assert code == 0, lines


def test_missing_train_ids_are_told_with_what_is_there(cityscapes, capsys) -> None:
    """Trap c: csCreateTrainIdLabelImgs was never run."""
    wanted = [f"data.{split}.masks=gtFine/{split}/*/*_gtFine_labelTrainIds.png" for split in ("train", "val")]
    code, lines = run(capsys, cityscapes, "data=cityscapes", *wanted)
    assert code == 1
    errors = [line for line in lines if line.startswith("error: ")]
    assert [line.partition(": no masks at ")[0] for line in errors] == [
        "error: data.train cannot be opened",
        "error: data.val cannot be opened",
    ]
    assert all("data=cityscapes reads the *_labelIds.png that are there" in line for line in errors)


@pytest.mark.parametrize("dataset", ["ade20k", "cityscapes", "toy"])
def test_datasets_as_their_owners_ship_them_have_no_mistake(dataset, request, capsys, tmp_path) -> None:
    root = request.getfixturevalue(dataset) if dataset != "toy" else tmp_path / "none"
    scenes = ["data.train.scenes=4", "data.val.scenes=3"] if dataset == "toy" else []
    code, lines = run(capsys, root, f"data={dataset}", *scenes, "--full")
    assert code == 0, lines
    assert not [line for line in lines if line.startswith("error: ")]


def test_real_images_have_no_mistake(shared, capsys, tmp_path) -> None:
    camvid, ade, street = (
        shared / "camvid",
        shared / "ade20k_sample" / "ADEChallengeData2016",
        shared / "cityscapes_sample",
    )
    data = build("data", SegmentationData, FOLDER | _section("camvid") | {"root": str(camvid)})
    report = check(data, samples=20)
    assert not report.failed and not report.findings
    for name, root in (("ade20k", ade), ("cityscapes", street)):
        section = _section(name)
        data = build("data", SegmentationData, FOLDER | section | {"root": str(root), "train": section["val"]})
        report = check(data)
        assert {found.what for found in report.findings} <= {"never", "leak", "small", "lost"}, report.lines()


def _section(name: str) -> dict:
    return yaml.safe_load((ROOT / "configs" / "data" / f"{name}.yaml").read_text())["data"]


def judged(root: Path, make: Make, stem: str = "x{}", **section) -> dict[str, str]:
    """The findings of a tree, by rule."""
    tree(root, make, stem)
    data = build("data", SegmentationData, FOLDER | section | {"root": str(root)})
    return {found.what: f"{found.level}: {found}".replace(str(root), "ROOT") for found in check(data).findings}


def test_other_mistakes_of_values_are_told_too(tmp_path) -> None:
    grey = judged(tmp_path / "1", blocks([0, 128, 255]), classes=["road", "car", "sky"])
    assert "+data.classes={road: {ids: [0]}, car: {ids: [128]}, sky: {ids: [255]}}'" in grey["grey-levels"]
    one = judged(tmp_path / "2", blocks([1, 2]), classes=["a", "b"])
    assert one["counts-from-one"].startswith("error: the masks count classes from 1 to 2 and data.classes from 0")
    more = judged(tmp_path / "3", blocks([0, 1, 2]), classes=["a", "b"])
    assert "'+data.classes=[background, a, b]', or data.reduce_zero_label=true" in more["one-value-more"]
    only = judged(tmp_path / "4", blocks([0, 1]), classes=["pothole"])
    assert only["one-value-more"].endswith("; '~data.classes' '+data.classes=[background, pothole]'")
    odd = judged(tmp_path / "5", blocks([0, 1, 7]), classes=["a", "b"])
    assert (
        "values that none of the 2 classes declares, in ROOT/masks/train/x0.png (7 in 1024 of"
        in odd["undeclared-values"]
    )
    assert "'data.ignore=[255, 7]'" in odd["undeclared-values"]
    every = judged(tmp_path / "6", blocks([7, 9]), classes=["a", "b"], ignore="rest")
    assert every["all-ignored"].startswith("error: every pixel of all 5 masks means no label")
    kind = judged(tmp_path / "7", blocks([0, 1]), classes={"a": {"color": [1, 2, 3]}}, mask_values="colors")
    assert (
        kind["ids"].startswith("error: 5 of 5 masks hold one channel of ids") and "data.mask_values=ids" in kind["ids"]
    )


def test_train_ids_and_raw_ids_are_not_mixed_up(tmp_path) -> None:
    street = _section("cityscapes")
    contract = {"classes": street["classes"], "ignore": street["ignore"]}
    places = judged(tmp_path / "1", blocks([*range(19), 255]), **contract)
    assert (
        places["train-ids"].startswith("error: the masks hold train ids (0 to 18")
        and "train_ids" in places["train-ids"]
    )
    named = judged(
        tmp_path / "2", blocks([*range(19), 255]), "x{}_labelIds", **contract, train_ids="*_labelTrainIds.png"
    )
    assert "x0_labelIds.png looks like train ids (255, and no other value above 18)" in named["train-ids"]
    raw = judged(tmp_path / "3", blocks([*range(34)]), "x{}_labelTrainIds", **contract, train_ids="*_labelTrainIds.png")
    assert "are named as train ids" in raw["raw-ids"] and raw["raw-ids"].endswith(
        "data.train_ids=null if they hold raw ids"
    )
    reduced = judged(
        tmp_path / "4", blocks([*range(0, 150, 4), 255]), classes=_section("ade20k")["classes"], ignore=[0]
    )
    assert reduced["train-ids"].startswith("error: the masks hold train ids (0 to 149")
    good = judged(
        tmp_path / "5", blocks([*range(19), 255]), "x{}_labelTrainIds", **contract, train_ids="*_labelTrainIds.png"
    )
    assert not [one for one in good.values() if one.startswith("error")]


def test_photographs_in_place_of_masks_are_told(tmp_path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    assert "up to 3072 RGB colours" in judged(tmp_path / "1", lambda _: noise, classes=["a", "b"])["photographs"]
    grey = judged(tmp_path / "2", lambda _: noise[..., 0], classes=["a", "b"])
    assert "5 of 5 masks hold up to 256 different values" in grey["no-classes"]


@pytest.mark.parametrize(
    ("values", "section"),
    [
        ([0, 1, 255], {"classes": ["background", "pothole"]}),  # 255 is a border
        ([0, 1, 2], {"classes": ["a", "b", "c"]}),
        ([1, 2, 3], {"classes": ["a", "b", "c"], "reduce_zero_label": True}),  # nobody left anything unlabelled
        ([0, 1, 2, 3], {"classes": ["background", "a", "b"], "reduce_zero_label": True}),  # the last class is there
        ([0, 1, 2], {"classes": {"a": {"ids": [0, 1]}, "b": {"ids": [2]}}}),
        ([0, 255], {"classes": {"background": {"ids": [0]}, "pothole": {"ids": [255]}}, "ignore": []}),
        ([*range(0, 150, 4), 255], {"classes": names_of("ade20k")}),  # counted down before
        ([*range(19), 255], {"classes": names_of("cityscapes")}),  # train ids
        ([*range(34)], {"classes": [f"label {number}" for number in range(34)]}),  # all label ids as classes
    ],
)
def test_nothing_is_said_of_masks_that_are_right(values, section, tmp_path) -> None:
    found = judged(tmp_path, blocks(values), **section)
    assert not {"error", "warning"} & {one.partition(":")[0] for one in found.values() if "occur" not in one}, found


SHIPPED = sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml") if isinstance(
    yaml.safe_load(path.read_text())["data"].get("classes"), dict))  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_no_label_contract_of_ours_is_taken_for_a_mistake(name, tmp_path) -> None:
    keys = ("classes", "ignore", "mask_values", "reduce_zero_label", "train_ids")
    contract = {key: value for key, value in _section(name).items() if key in keys}
    lookup = build("data", SegmentationData, FOLDER | contract).classes.lookup
    values = np.flatnonzero(lookup >= 0)[:256]

    def make(number: int) -> np.ndarray:
        raw = np.resize(np.roll(values, number), (16, 16)).repeat(4, 0).repeat(4, 1)
        return (raw[..., None] >> [16, 8, 0] & 255 if len(lookup) > 65536 else raw).astype(np.uint8)

    errors = [one for one in judged(tmp_path, make, **contract).values() if one.startswith("error")]
    assert not errors


def test_a_class_that_a_small_split_lacks_makes_no_mistake_of_it(tmp_path) -> None:
    """0 = no label beside a background at 1: only as one, no split tells that the last class never occurs."""

    def make(number: int) -> np.ndarray:
        return blocks([0, 1, 2, 3] if number < 3 else [0, 1, 2])(number)

    found = judged(tmp_path, make, classes=["background", "a", "b"], reduce_zero_label=True)
    assert "background-twice" not in found and "occurs in data.train, but not in data.val" in found["only-train"]


def test_a_mistake_of_one_split_is_told_of_its_files(tmp_path) -> None:
    def make(number: int) -> np.ndarray:
        return blocks([0, 1] if number < 3 else [0, 255])(number)

    found = judged(tmp_path, make, classes=["background", "pothole"])
    assert found["grey-levels"].partition(": ROOT")[2] == (
        "/masks/val/x3.png, ROOT/masks/val/x4.png; "
        "'~data.classes' '+data.classes={background: {ids: [0]}, pothole: {ids: [255]}}' 'data.ignore=[]'"
    )


def test_broken_files_the_same_image_twice_and_leaks_are_told(potholes) -> None:
    train = sorted((potholes / "images" / "train").iterdir())
    copy = potholes / "images" / "val" / "road 0 ü.jpg"
    copy.write_bytes(train[0].read_bytes())
    (potholes / "images" / "train" / "road 3 ü.jpg").write_bytes(train[1].read_bytes())
    (potholes / "masks" / "train" / "road 2 ü.png").write_bytes(b"")
    data = build("data", SegmentationData, FOLDER | {"classes": ["a", "b"], "root": str(potholes)})
    found = {one.what: f"{one.level}: {one}" for one in check(data, full=True).findings}
    assert found["leak"].startswith("warning: data.val shares 1 image with data.train") and str(copy) in found["leak"]
    assert found["twice"].startswith("warning: data.train holds 1 image twice")
    assert "2 of 4 samples of data.train cannot be used" in found["unreadable"]  # road 3 now has another size too
    assert "the file is empty" in found["unreadable"] and "expected equal sizes" in found["unreadable"]
    lenient = {"classes": ["a", "b"], "root": str(potholes), "on_bad_sample": "skip", "max_bad_share": 0.5}
    data = build("data", SegmentationData, FOLDER | lenient)
    assert [one.level for one in check(data, full=True).findings if one.what == "unreadable"] == ["warning"]


def test_the_files_hold_every_number_and_nothing_is_overwritten(potholes, tmp_path, capsys) -> None:
    command = ["data=folder", "data.classes=[background,pothole]", "data.crop_size=64", "--full", "--show", "2"]
    folders = []
    for _ in range(2):
        code, lines = run(capsys, potholes, *command)
        folders.append(Path(lines[-1].replace("ROOT", str(potholes))))
        assert code == 0 and "0 errors, 0 warnings, 0 notes" in lines
    assert folders[0] != folders[1] and {path.parent.name for path in folders} == {"folder"}
    assert sorted(path.name for path in folders[0].iterdir()) == ["check.html", "check.json"]
    facts = json.loads((folders[0] / "check.json").read_text())
    masks = [np.array(Image.open(path)) for path in sorted((potholes / "masks" / "train").iterdir())]
    one = sum(int((mask == 1).sum()) for mask in masks)
    assert facts["splits"]["train"]["values"][1] == {"value": 1, "pixels": one, "masks": 4, "means": "pothole"}
    assert facts["classes"][1]["train"] == {
        "pixels": one, "masks": 4, "share": pytest.approx(one / sum(mask.size for mask in masks)),
    }  # fmt: skip
    assert facts["splits"]["train"]["heights"] == {"min": 60, "median": 61.5, "max": 63}
    assert len(facts["splits"]["val"]["mean"]) == 3 and facts["full"] is True


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]


def test_the_page_is_one_file_and_no_name_becomes_markup(tmp_path) -> None:
    root = tree(tmp_path / "tree", blocks([0, 1, 7]), stem="<script>alert({})<!script>")
    data = build("data", SegmentationData, FOLDER | {"classes": ["<b>road</b>", "'\"&"], "root": str(root)})
    folder = write(check(data), data, "own", str(tmp_path / "out"), shown=2)
    text = (folder / "check.html").read_text()
    page = _Page(text)
    assert "script" not in page.tags and "b" in page.tags  # our own <b>
    assert "<b>road" not in text and html.escape("<b>road</b>") in text and "&lt;script&gt;alert(0)" in text
    assert len(page.links) == 2 * 2 + 2 * 2  # image and raw mask
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)


def test_the_page_shows_label_and_crop_of_each_sample(potholes, tmp_path) -> None:
    data = build("data", SegmentationData, FOLDER | {"classes": ["a", "b"], "root": str(potholes)})
    page = _Page((write(check(data), data, "own", str(tmp_path), shown=2) / "check.html").read_text())
    assert page.tags.count("img") == 2 * 4 + 2 * 2  # image, label, crop, its label; of val no crops


def test_a_quick_look_stops_a_training_by_the_first_error(tmp_path, capsys) -> None:
    root = tree(tmp_path / "tree", blocks([0, 0, 255]))
    section = FOLDER | {"classes": ["background", "pothole"], "root": str(root)}
    data = build("data", SegmentationData, section).opened("train", "val")
    with pytest.raises(SharedError, match="so 'pothole' would never be trained: .*; '~data.classes' "):
        quick(data, 3)
    quick(data, 0)  # asked for nothing
    assert capsys.readouterr() == ("", "")


def test_a_quick_look_prints_warnings_on_the_first_process_only(tmp_path, capsys, monkeypatch) -> None:
    root = tree(tmp_path / "tree", blocks([0, 1, 255, 255, 255]))
    section = FOLDER | {"classes": ["background", "pothole"], "root": str(root)}
    data = build("data", SegmentationData, section).opened("train", "val")
    quick(data, 32)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 60% of the pixels mean no label, and are neither trained nor scored: ")
    monkeypatch.setenv("RANK", "1")
    quick(data, 32)
    assert capsys.readouterr().err == ""


def test_a_quick_look_says_nothing_of_a_good_dataset(capsys) -> None:
    quick(build("data", SegmentationData, TOY).opened("train", "val"), 5)
    assert capsys.readouterr() == ("", "")


def test_published_colours_in_place_of_ids_are_told_by_their_classes(tmp_path) -> None:
    """Cityscapes' *_color.png: the classes have ids, so the masks of ids are what to read."""
    colors = np.array([entry["color"] for entry in _section("cityscapes")["classes"].values()], np.uint8)
    found = judged(
        tmp_path / "t", painted(colors, [*range(19)]), classes=_section("cityscapes")["classes"], ignore="rest"
    )
    assert "[128, 64, 128] = road" in found["colors"] and "export the masks as one channel" in found["colors"]


def test_correct_data_of_few_values_is_no_mistake(tmp_path) -> None:
    def last_is_bare(number: int) -> np.ndarray:
        return blocks([0, 1, 255] if number < 3 else [0, 255])(number)

    two = judged(tmp_path / "two", last_is_bare, classes=["background", "pothole"])
    assert two["grey-levels"].startswith("warning: the masks hold 0 and 255 only")  # it may be what 255 means there
    many = judged(tmp_path / "many", last_is_bare, classes=["background", "cat", "dog"])
    assert "grey-levels" not in many
    bare = judged(tmp_path / "bare", blocks([0, 255]), classes=["background", "cat", "dog"])
    assert bare["grey-levels"].startswith("warning: ")


def test_masks_counted_from_one_are_noticed_although_the_rest_is_ignored(tmp_path) -> None:
    found = judged(tmp_path, blocks([1, 2, 3]), classes=["a", "b", "c"], ignore="rest")
    assert found["counts-from-one"].startswith("warning: 3 is in the masks and is ignored (data.ignore=rest), while 0")


def test_masks_that_were_reduced_before_are_noticed(tmp_path) -> None:
    found = judged(tmp_path / "1", blocks([0, 1, 2]), classes=["road", "grass", "sky"], reduce_zero_label=True)
    assert found["reduced-twice"].startswith(
        "warning: 0 means no label (data.reduce_zero_label), but 'sky', which is 3"
    )
    rare = judged(tmp_path / "2", blocks([0, 1, 3]), classes=list("abcdef"), reduce_zero_label=True)
    assert "reduced-twice" not in rare  # the last class is not the only one that is rare


def test_palettes_that_differ_are_told_unless_only_unused_colours_do(tmp_path) -> None:
    orders = {
        True: ([2, 0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2], [1, 2, 0]),
        False: ([0, 1, 2, 7],) + 4 * ([0, 1, 2, 8],),
    }
    for mixed, order in orders.items():
        root = tree(tmp_path / str(mixed), blocks([0, 1, 2]))
        for number, path in enumerate(sorted(root.rglob("masks/*/*.png"))):
            image = Image.open(path).convert("P")
            image.putdata(blocks([0, 1, 2])(number).ravel().tolist())
            image.putpalette([byte for color in order[number] for byte in (color * 30, 99, color * 20)])
            image.save(path)
        data = build("data", SegmentationData, FOLDER | {"classes": ["a", "b", "c"], "root": str(root)})
        told = {found.what: str(found) for found in check(data).findings}
        assert ("palettes" in told) is mixed
    assert check(data).failed is False


def test_images_turned_by_exif_under_masks_that_are_not_are_told(tmp_path) -> None:
    root, exif = tree(tmp_path, blocks([0, 1])), Image.Exif()
    exif[0x0112] = 3  # upside down: both keep their size
    for path in (root / "images" / "train").iterdir():
        Image.open(path).save(path, exif=exif)
    data = build("data", SegmentationData, FOLDER | {"classes": ["a", "b"], "root": str(root)})
    found = {one.what: f"{one.level}: {one}" for one in check(data).findings}
    assert found["turned"].startswith(
        "warning: 3 images are turned or mirrored by their EXIF orientation, and their masks"
    )


def test_masks_that_are_jpeg_files_are_told(tmp_path) -> None:
    root = tree(tmp_path, blocks([0, 1]))
    for path in list(root.rglob("masks/*/*.png")):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    data = build("data", SegmentationData, FOLDER | {"classes": ["a", "b"], "ignore": "rest", "root": str(root)})
    assert "compression changes values" in {one.what: str(one) for one in check(data).findings}["lossy"]


def test_names_that_a_command_line_cannot_write_are_given_as_yaml(tmp_path) -> None:
    found = judged(tmp_path / "1", blocks([0, 255]), classes=["background", "straße"])
    assert found["grey-levels"].endswith(
        "; in a YAML of yours classes: {background: {ids: [0]}, \"straße\": {ids: [255]}} 'data.ignore=[]'"
    )
    longer = judged(tmp_path / "2", blocks([0, 1, 2]), classes=["background", "it's"])
    assert "'~data.classes' '+data.classes=[background, \"it'\"'\"'s\", NAME]'" in longer["one-value-more"]


def test_the_values_of_colour_masks_are_suggested_as_colours(tmp_path, capsys) -> None:
    root = tree(tmp_path / "tree", painted(np.array([[10, 20, 30], [200, 0, 50]], np.uint8), [0, 1]))
    with pytest.raises(SystemExit):
        main(["check", "data=folder", f"data.root={root}", "data.mask_values=colors"])
    assert "class_0: {color: [10, 20, 30]}, class_1: {color: [200, 0, 50]}" in capsys.readouterr().err
