import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from segformer import metrics
from segformer.errors import UserError
from segformer.metrics import Scores, Tally, confusion_matrix, iou_of, mean_of


def literal(prediction: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    matrix = np.zeros((classes, classes), np.int64)
    for found, expected in zip(prediction.flat, label.flat, strict=True):
        if expected != 255:
            matrix[expected, found] += 1
    return matrix


@pytest.mark.parametrize("classes", [2, 11, 255])
def test_counts_equal_a_loop_over_pixels(classes) -> None:
    rng = np.random.default_rng(0)
    prediction = rng.integers(0, classes, (3, 20, 30)).astype(np.uint8)
    label = rng.integers(0, classes, (3, 20, 30)).astype(np.uint8)
    label[:, :4] = 255
    found = confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(label), classes)
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found.numpy(), literal(prediction, label, classes))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int64])
def test_every_type_of_integers_is_counted_alike_and_parts_add_up(kind, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    prediction, label = rng.integers(0, 9, (2, 31, 17)), rng.integers(0, 9, (2, 31, 17))
    label[:, :4] = 255
    monkeypatch.setattr(metrics, "EXACT", 100)
    found = confusion_matrix(torch.from_numpy(prediction).to(kind), torch.from_numpy(label).to(kind), 9)
    np.testing.assert_array_equal(found.numpy(), literal(prediction, label, 9))


def test_scores_by_hand_with_an_absent_a_missed_and_an_invented_class() -> None:
    #            prediction:  0  1  2  3 (3 occurs nowhere, 1 is never predicted, 2 has no label)
    matrix = torch.tensor([[6, 0, 2, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = Scores.from_confusion(matrix)
    np.testing.assert_allclose(scores.iou, [6 / 10, 0, 0, np.nan])
    np.testing.assert_allclose(scores.acc, [6 / 8, 0, np.nan, np.nan])
    np.testing.assert_allclose(scores.dice, [12 / 16, 0, 0, np.nan])
    np.testing.assert_allclose(scores.precision, [6 / 8, 0, 0, np.nan])  # mmsegmentation: the second is NaN
    assert scores.mprecision == pytest.approx(0.25) and scores.predicted.tolist() == [8, 0, 2, 0]
    assert scores.miou == pytest.approx(0.6 / 3)
    assert scores.macc == pytest.approx(0.375)
    assert scores.mdice == pytest.approx(0.25)
    assert scores.aacc == pytest.approx(0.6)
    assert scores.fwiou == pytest.approx(0.6 * 8 / 10)
    assert scores.pixels.tolist() == [8, 2, 0, 0]


def test_miou_equals_torchmetrics() -> None:
    torch.manual_seed(1)
    prediction, label = torch.randint(0, 8, (2, 64, 64)), torch.randint(0, 7, (2, 64, 64))
    label[label == 3] = 255  # 3 is predicted but never labelled
    judge = MulticlassJaccardIndex(9, average="macro", ignore_index=255)
    ours = Scores.from_confusion(confusion_matrix(prediction, label, 9))
    assert ours.miou == pytest.approx(judge(prediction, label).item(), abs=1e-6)


def test_nothing_labelled_gives_nan_not_an_error() -> None:
    scores = Scores.from_confusion(torch.zeros(3, 3, dtype=torch.int64))
    assert all(np.isnan(value) for value in (scores.miou, scores.macc, scores.aacc, scores.fwiou, scores.mdice))


def matrices(count: int, classes: int = 6) -> dict[str, np.ndarray]:
    """Sparse ones; the last class occurs nowhere, the second image is all ignored."""
    rng = np.random.default_rng(0)
    found = {}
    for index in range(count):
        matrix = rng.integers(0, 9, (classes, classes)) * (rng.random((classes, classes)) < 0.3) * (index != 1)
        matrix[-1] = matrix[:, -1] = 0
        found[f"{index % 3}/{index}.png"] = matrix
    return found


def test_images_add_up_to_the_matrix_in_whatever_order_and_by_however_many_processes() -> None:
    found = matrices(20)
    one = Tally(6)
    for name, matrix in found.items():
        one.add(name, torch.from_numpy(matrix))
    parts = [Tally(6) for _ in range(3)]
    for index, name in enumerate(reversed(found)):
        parts[index % 3].add(name, found[name])
    together = parts[2].merged(parts[:2])
    np.testing.assert_array_equal(one.confusion(), np.pad(sum(found.values()), ((0, 0), (0, 1))))
    np.testing.assert_array_equal(together.confusion(), one.confusion())
    assert len(together) == 20 and together.to_json() == one.to_json()
    for ours, theirs in zip(together.parts(), one.parts(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_parts_of_each_image_are_its_matrix_sums() -> None:
    found, tally = matrices(5), Tally(6)
    for name, matrix in found.items():
        tally.add(name, matrix)
    hits, labelled, predicted = tally.parts()
    for index, name in enumerate(tally.names):
        np.testing.assert_array_equal(hits[index], np.diag(found[name]))
        np.testing.assert_array_equal(labelled[index], found[name].sum(axis=1))
        np.testing.assert_array_equal(predicted[index], found[name].sum(axis=0))
    scores = Scores.from_confusion(torch.from_numpy(tally.confusion()))
    sums = [part.sum(axis=0) for part in (hits, labelled, predicted)]
    np.testing.assert_array_equal(iou_of(*sums), scores.iou)
    assert mean_of(iou_of(*sums)) == pytest.approx(scores.miou, abs=1e-15)


def test_pixels_predicted_as_no_class_count_against_the_labelled_class_and_for_nobody() -> None:
    tally = Tally(2)
    tally.add("a", np.array([[6, 1, 3], [0, 0, 2]]))
    tally.add("b", np.array([[4, 0], [0, 5]]))
    tally = Tally.from_json(json.loads(json.dumps(tally.to_json())))
    scores = Scores.from_confusion(tally.confusion())
    np.testing.assert_allclose(scores.iou, [10 / 14, 5 / 8])
    np.testing.assert_allclose(scores.acc, [10 / 14, 5 / 7])
    assert (scores.pixels.tolist(), scores.predicted.tolist()) == ([14, 7], [10, 6])
    assert scores.aacc == pytest.approx(15 / 21)
    hits, labelled, predicted = (part.tolist() for part in tally.parts())
    assert (hits, labelled, predicted) == ([[6, 0], [4, 5]], [[10, 2], [4, 5]], [[6, 1], [4, 5]])


def test_an_image_that_is_counted_twice_is_refused() -> None:
    tally, other = Tally(2), Tally(2)
    tally.add("a", np.eye(2, dtype=int))
    other.add("a", np.eye(2, dtype=int))
    with pytest.raises(UserError, match="two images are called 'a'"):
        tally.add("a", np.eye(2, dtype=int))
    with pytest.raises(UserError, match="image 'a' was scored twice"):
        tally.merged([other])
    with pytest.raises(UserError, match="one part has 2 classes, another 3"):
        tally.merged([Tally(3)])


def test_written_scores_of_images_are_read_back_or_told_to_be_damaged() -> None:
    tally = Tally(300)
    matrix = np.zeros((300, 300), int)
    matrix[299, 7] = 10**10
    tally.add("ü <script>.png", matrix)
    tally.add("all ignored", np.zeros((300, 300), int))
    text = json.dumps(tally.to_json())
    again = Tally.from_json(json.loads(text))
    assert again.to_json() == tally.to_json() and again.confusion()[299, 7] == 10**10 and len(again) == 2
    with pytest.raises(UserError, match="are of version 2, expected 1"):
        Tally.from_json({"version": 2})
    cells = ([["a", [[1, 2]]]], [["a", [[300, 0, 1]]]], [["a", [[0, 301, 1]]]], [["a", []]] * 2, 3)
    for harm in ({"images": images} for images in cells):
        with pytest.raises(UserError, match="scores of images are damaged .*: evaluate again"):
            Tally.from_json(tally.to_json() | harm)


def mmsegmentation(predictions: list[np.ndarray], labels: list[np.ndarray], classes: int) -> dict[str, float | list]:
    """Its IoUMetric, restated: three histograms an image, summed, divided once, means by nanmean."""
    sums = np.zeros((3, classes))
    edges = np.arange(classes + 1) - 0.5
    for whole_prediction, whole_label in zip(predictions, labels, strict=True):
        prediction, label = whole_prediction[whole_label != 255], whole_label[whole_label != 255]
        sums += [np.histogram(values, edges)[0] for values in (prediction[prediction == label], prediction, label)]
    both, found, expected = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, acc, dice = both / (found + expected - both), both / expected, 2 * both / (found + expected)
        means = [np.nanmean(values) if not np.isnan(values).all() else np.nan for values in (iou, acc, dice)]
        aacc = both.sum() / expected.sum()
    return {
        "iou": iou,
        "acc": acc,
        "dice": dice,
        **dict(zip(("miou", "macc", "mdice"), means, strict=True)),
        "aacc": aacc,
    }


CASES = ("random", "absent", "predicted only", "never predicted", "all ignored", "one image ignored", "one class")


def case(name: str, classes: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(1)
    labels = [rng.integers(0, classes, (23, 31)) for _ in range(4)]
    predictions = [np.where(rng.random((23, 31)) < 0.6, label, rng.integers(0, classes, (23, 31))) for label in labels]
    for number, (prediction, label) in enumerate(zip(predictions, labels, strict=True)):
        label[rng.random(label.shape) < 0.1] = 255
        if name in ("absent", "predicted only"):
            label[label == 1] = 0
        if name in ("absent", "never predicted"):
            prediction[prediction == 1] = 0
        if name == "all ignored" or (name == "one image ignored" and number == 2):
            label[:] = 255
        if name == "one class":
            label[label != 255] = 2
    return [prediction.astype(np.uint8) for prediction in predictions], [label.astype(np.uint8) for label in labels]


@pytest.mark.parametrize("classes", [3, 19, 150])
@pytest.mark.parametrize("name", CASES)
def test_scores_are_mmsegmentations_whatever_is_absent_missed_or_ignored(name, classes) -> None:
    predictions, labels = case(name, classes)
    tally = Tally(classes)
    for index, (prediction, label) in enumerate(zip(predictions, labels, strict=True)):
        tally.add(str(index), confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(label), classes))
    scores = Scores.from_confusion(torch.from_numpy(tally.confusion()))
    for key, expected in mmsegmentation(predictions, labels, classes).items():
        np.testing.assert_allclose(getattr(scores, key), expected, rtol=1e-12, equal_nan=True, err_msg=key)
    jaccard = MulticlassJaccardIndex(classes, average="macro", ignore_index=255)
    for prediction, label in zip(predictions, labels, strict=True):
        jaccard.update(torch.from_numpy(prediction).long(), torch.from_numpy(label).long())
    np.testing.assert_allclose(jaccard.compute().item(), scores.miou, rtol=1e-6, equal_nan=True)


HUGGING_FACE = """
import sys, numpy as np, evaluate
cases = np.load(sys.argv[2])
metric, found = evaluate.load(sys.argv[1]), {}
for number in range(len(cases.files) // 2):
    predictions, labels = cases[f"p{number}"], cases[f"l{number}"]
    classes = int(sys.argv[3].split(",")[number])
    scores = metric.compute(predictions=[*predictions], references=[*labels], num_labels=classes, ignore_index=255)
    for key in ("mean_iou", "mean_accuracy", "overall_accuracy", "per_category_iou", "per_category_accuracy"):
        found[f"{key}{number}"] = scores[key]
np.savez(sys.argv[4], **found)
"""


def test_scores_are_those_of_hugging_faces_evaluate(tmp_path) -> None:
    script = os.environ.get("MEAN_IOU")
    if not script:
        pytest.skip("MEAN_IOU names no copy of metrics/mean_iou of Hugging Face's evaluate, which its wheel lacks")
    inputs = [(name, classes, *case(name, classes)) for name in CASES for classes in (3, 19, 150)]
    arrays = {f"p{number}": np.stack(entry[2]) for number, entry in enumerate(inputs)}
    np.savez(
        tmp_path / "cases.npz", **arrays, **{f"l{number}": np.stack(entry[3]) for number, entry in enumerate(inputs)}
    )
    words = [script, tmp_path / "cases.npz", ",".join(str(entry[1]) for entry in inputs), tmp_path / "found.npz"]
    # -P and another folder: our own evaluate.py has the same name
    subprocess.run([sys.executable, "-P", "-c", HUGGING_FACE, *map(str, words)], check=True, cwd=tmp_path)
    found = np.load(tmp_path / "found.npz")
    names = {"miou": "mean_iou", "macc": "mean_accuracy", "aacc": "overall_accuracy"}
    names |= {"iou": "per_category_iou", "acc": "per_category_accuracy"}
    for number, (name, classes, predictions, labels) in enumerate(inputs):
        pairs = [
            (torch.from_numpy(found), torch.from_numpy(label)) for found, label in zip(predictions, labels, strict=True)
        ]
        scores = Scores.from_confusion(sum(confusion_matrix(*pair, classes) for pair in pairs))
        for ours, theirs in names.items():
            told = f"{name}, {classes} classes: {theirs}"
            np.testing.assert_allclose(getattr(scores, ours), found[f"{theirs}{number}"], rtol=1e-12, err_msg=told)


@pytest.mark.parametrize(
    ("classes", "kind"), [(3, torch.int64), (255, torch.int16), (300, torch.int16), (300, torch.uint8)]
)
def test_labels_of_any_integer_type_are_counted(classes, kind) -> None:
    low = 0 if kind == torch.uint8 else -2
    label = torch.randint(low, min(classes + 9, torch.iinfo(kind).max + 1), (40, 50)).to(kind)
    label[0, 0] = min(2**32, torch.iinfo(kind).max)  # 0 to who looks at 32 bits
    prediction = torch.randint(classes, (40, 50), dtype=torch.int16)
    expected = torch.zeros(classes, classes, dtype=torch.int64)
    for row, column in zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        if 0 <= row < classes:
            expected[row, column] += 1
    assert torch.equal(confusion_matrix(prediction, label, classes), expected)
