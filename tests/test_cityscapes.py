import math
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segformer.cityscapes import InstanceCounts, category_iou, mean_score
from segformer.errors import UserError
from segformer.labels import Classes
from segformer.metrics import Scores, confusion_matrix
from tests.conftest import ROOT

CATEGORIES = {
    "flat": ("road", "sidewalk"),
    "construction": ("building", "wall", "fence"),
    "object": ("pole", "traffic light", "traffic sign"),
    "nature": ("vegetation", "terrain"),
    "sky": ("sky",),
    "human": ("person", "rider"),
    "vehicle": ("car", "truck", "bus", "train", "motorcycle", "bicycle"),
}
CATEGORY = {name: category for category, names in CATEGORIES.items() for name in names}
NAMES = tuple(CATEGORY)
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
SIZES = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}
IGNORED = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
Frame = tuple[np.ndarray, np.ndarray, np.ndarray]  # prediction in train ids, label ids, instance ids
RAW = np.array(IDS, np.uint8)
TRAIN = np.full(256, 255, np.uint8)
TRAIN[RAW] = np.arange(19)


def counts(names=NAMES, categories=CATEGORY, sizes=SIZES, ids=None) -> InstanceCounts:
    return InstanceCounts(names, categories, sizes, dict(zip(NAMES, IDS, strict=True)) if ids is None else ids)


def counted(frames: list[Frame]) -> InstanceCounts:
    total = counts()
    for prediction, _, instances in frames:
        total.add(total.count(prediction, instances))
    return total


def confusion_of(frames: list[Frame]) -> np.ndarray:
    """As `metrics.confusion_matrix` counts it."""
    pairs = [(torch.from_numpy(prediction), torch.from_numpy(TRAIN[label])) for prediction, label, _ in frames]
    return sum(confusion_matrix(*pair, 19) for pair in pairs).numpy()


def frame(seed: int, labels=(*IDS, *IGNORED), predicted=tuple(range(19)), right: float = 0.5) -> Frame:
    """Blocks of random labels; those from 24 on are instances, two in three, or groups, which carry the label id."""
    rng = np.random.default_rng(seed)
    label = rng.choice(labels, (6, 9))
    number = rng.integers(0, 4, label.shape)  # 0 is an instance's number too; pieces far apart may share one
    instances = np.where((label >= 24) & (rng.random(label.shape) < 2 / 3), label * 1000 + number, label)
    label, instances = (np.kron(array, np.ones((4, 5), int)) for array in (label, instances))
    hit = (rng.random(label.shape) < right) & np.isin(TRAIN[label], predicted)
    prediction = np.where(hit, TRAIN[label], rng.choice(predicted, label.shape))
    return prediction.astype(np.uint8), label.astype(np.uint8), instances.astype(np.uint16)


def official(frames: list[Frame], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The official script's result for these frames, through the files it reads."""
    script = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
        reason="equality with the official script needs cityscapesscripts",
    )
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # the script still calls what numpy 2.4 has dropped
    truths, predictions = [], []
    for number, (prediction, label, instances) in enumerate(frames):
        stem = folder / f"ulm_{number:06d}_000019"
        truths.append(f"{stem}_gtFine_labelIds.png")
        predictions.append(f"{stem}_prediction.png")
        Image.fromarray(label).save(truths[-1])
        Image.fromarray(instances).save(f"{stem}_gtFine_instanceIds.png")
        Image.fromarray(RAW[prediction]).save(predictions[-1])
    options = copy(script.args)
    options.quiet, options.JSONOutput = True, False
    return script.evaluateImgLists(predictions, truths, options)


def uniform(prediction: int, label: int, instance: int) -> Frame:
    whole = np.ones((3, 4))
    return (whole * prediction).astype(np.uint8), (whole * label).astype(np.uint8), (whole * instance).astype(np.uint16)


def disagreeing() -> Frame:
    """The instance map has things where the labels say road or nothing, and the other way round."""
    prediction, label, instances = frame(7)
    return prediction, np.roll(label, 3, axis=1), instances


CASES = {
    "random": [frame(0)],
    "several images": [frame(seed, right=seed / 5) for seed in range(6)],
    "perfect": [frame(1, labels=IDS, right=1)],
    "all wrong": [frame(1, right=0)],
    "absent classes": [frame(2, labels=(7, 23, 26, 33), predicted=(0, 10, 13, 18))],
    "a class predicted but never labelled": [frame(3, labels=(7, 24, 28), predicted=(0, 11, 12, 15, 16))],
    "labelled but never predicted": [frame(4, predicted=(0, 13))],
    "right category, wrong class": [uniform(12, 24, 24000), uniform(14, 26, 26003)],
    "ignored things alone": [frame(5, labels=(29, 30), predicted=(13, 14))],
    "groups alone": [uniform(13, 26, 26), uniform(11, 24, 24), uniform(13, 24, 24)],
    "an image all ignored": [uniform(13, 0, 0)],
    "an image all ignored among others": [frame(6), uniform(11, 4, 4), uniform(13, 29, 29001)],
    "ids around the first instance": [uniform(0, 1, 1000), uniform(13, 1, 1001), uniform(11, 24, 24999)],
    "one pixel instances": [
        (np.full((1, 3), 13, np.uint8), np.full((1, 3), 26, np.uint8), np.uint16([[26001, 26002, 26]]))
    ],
    "labels and instances that disagree": [disagreeing()],
}


def same(ours: dict[str, float], theirs: dict[str, float], mean: float) -> None:
    """Ours equal theirs, which hold NaN for what we leave out; so do the means."""
    assert ours.keys() <= theirs.keys()
    for name, value in theirs.items():
        assert ours.get(name, math.nan) == pytest.approx(value, rel=0, abs=1e-12, nan_ok=True), name
    assert mean_score(ours) == pytest.approx(mean, rel=0, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_the_official_script(case, tmp_path, monkeypatch) -> None:
    theirs = official(CASES[case], tmp_path, monkeypatch)
    ours, confusion = counted(CASES[case]), confusion_of(CASES[case])
    iou = dict(zip(NAMES, Scores.from_confusion(torch.from_numpy(confusion)).iou.tolist(), strict=True))
    class_iiou, category_iiou = ours.class_iiou(confusion), ours.category_iiou(confusion)
    categories = category_iou(confusion, ours.categories)
    same(iou, theirs["classScores"], theirs["averageScoreClasses"])
    same(class_iiou, theirs["classInstScores"], theirs["averageScoreInstClasses"])
    same(categories, theirs["categoryScores"], theirs["averageScoreCategories"])
    same(category_iiou, theirs["categoryInstScores"], theirs["averageScoreInstCategories"])
    assert categories.keys() == CATEGORIES.keys()
    assert category_iiou.keys() == {"human", "vehicle"}
    assert class_iiou.keys() == SIZES.keys()


def test_a_prediction_of_no_class_counts_against_the_instance_and_for_nobody() -> None:
    prediction, _, instances = frame(0)
    none, total, fewer = np.where(prediction == 13, 255, prediction).astype(np.uint8), counts(), counts()
    total.add(total.count(none, instances))
    fewer.add(
        total.count(np.where(prediction == 13, 0, prediction).astype(np.uint8), instances)
    )  # called road: as wrong
    assert total.shares.tolist() == fewer.shares.tolist()


def test_categories_and_sizes_of_the_configuration_are_these() -> None:
    section = yaml.safe_load((ROOT / "configs/data/cityscapes.yaml").read_text())["data"]
    classes = Classes.from_config(section["classes"], section["ignore"])
    assert classes.categories == CATEGORY and classes.instance_sizes == SIZES


def test_mean_sizes_are_those_of_the_script() -> None:
    script = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
        reason="equality with the official script needs cityscapesscripts",
    )
    sizes = script.args.avgClassSize
    assert {name: size for name, size in sizes.items() if name not in ("caravan", "trailer")} == SIZES


def test_scores_by_hand() -> None:
    # two persons of 1 and 4 pixels (mean size 10): the small one right, of the large one 1 right and 1 rider; 1 road
    # pixel is called person
    prediction = np.array([[0, 0, 1, 2, 2, 0]], np.uint8)
    label = np.array([[0, 0, 0, 0, 0, 2]], np.uint8)
    instances = np.array([[24000, 24001, 24001, 24001, 24001, 7]], np.uint16)
    categories = {"person": "human", "rider": "human", "road": "flat"}
    total = InstanceCounts(
        ("person", "rider", "road"), categories, {"person": 10, "rider": 20}, {"person": 24, "rider": 25}
    )
    total.add(total.count(prediction, instances))
    confusion = confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(label), 3).numpy()
    assert total.class_iiou(confusion) == pytest.approx({"person": (10 + 2.5) / (20 + 1), "rider": 0})
    assert category_iou(confusion, total.categories) == pytest.approx({"human": 3 / 6, "flat": 0})
    assert total.category_iiou(confusion) == pytest.approx({"human": (10 + 5) / (20 + 1)})


def test_any_order_and_any_split_of_the_images_gives_the_same_bits() -> None:
    frames = [frame(seed) for seed in range(9)]
    whole, backwards = counted(frames), counted(frames[::-1])
    first = counted(frames[::3])
    before = first.shares.copy()
    split = first.merged([counted(frames[2::3]), counts(), counted(frames[1::3])])
    for other in (backwards, split):
        assert other.shares.tolist() == whole.shares.tolist()
    split.add(split.count(frames[0][0], frames[0][2]))
    first.merged([]).add(first.count(frames[0][0], frames[0][2]))
    assert (first.shares == before).all()


def test_a_category_of_which_one_class_has_no_size_has_no_iiou() -> None:
    total = counts(sizes={name: size for name, size in SIZES.items() if name != "rider"})
    nothing = np.zeros((19, 19), np.int64)
    assert total.category_iiou(nothing).keys() == {"vehicle"}
    assert "rider" not in total.class_iiou(nothing)


def test_values_up_to_1000_are_no_instance_of_any_class() -> None:
    total = InstanceCounts(("a", "b"), {"a": "x", "b": "x"}, {"a": 1, "b": 1}, {"a": 0, "b": 1})
    blank = np.zeros((1, 5), np.uint8)
    total.add(total.count(blank, np.array([[0, 1, 999, 1000, 1001]], np.uint16)))
    assert total.shares[:, 0].tolist() == [0, 1]


def test_category_iou_needs_the_matrix_alone() -> None:
    confusion = np.array([[3, 1, 2, 0], [0, 4, 0, 0], [1, 0, 5, 0], [0, 0, 0, 0]])
    found = category_iou(confusion, ("a", "b", "a", "none"))
    assert found == pytest.approx({"a": 11 / 12, "b": 4 / 5, "none": math.nan}, nan_ok=True)


def test_nothing_counted_is_nan_everywhere() -> None:
    total, nothing = counts(), np.zeros((19, 20), np.int64)
    scored = total.class_iiou(nothing), category_iou(nothing, total.categories), total.category_iiou(nothing)
    for scores in scored:
        assert all(map(math.isnan, scores.values())) and math.isnan(mean_score(scores))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"names": ("cars",)}, "class 'cars' has no category .did you mean 'car'"),
        ({"sizes": {"cat": 5.0}}, "'cat', which is no class .did you mean 'car'"),
        ({"sizes": {"car": 0.0}}, "size of 'car' is 0.0, expected"),
        ({"sizes": {"car": math.nan}}, "size of 'car' is nan, expected"),
        ({"ids": {"car": 26}}, "'person' has an instance size but no label id"),
        ({"sizes": {"car": 5.0, "bus": 6.0}, "ids": {"car": 26, "bus": 26}}, "car, bus share a label id"),
    ],
)
def test_a_wrong_description_is_refused_in_a_sentence(change, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        counts(**change)


def test_a_wrong_image_is_refused_in_a_sentence_and_counts_nothing() -> None:
    prediction, _, instances = frame(0)
    total = counts()
    with pytest.raises(UserError, match=r"are \(24, 45\) and \(24, 44\), expected equal"):
        total.count(prediction, instances[:, 1:])
    with pytest.raises(UserError, match="instance map is uint8, expected uint16"):
        total.count(prediction, instances.astype(np.uint8))
    assert not total.shares.any()
