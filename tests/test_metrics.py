import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from segformer.metrics import Scores, confusion_matrix


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


def test_scores_by_hand_with_an_absent_a_missed_and_an_invented_class() -> None:
    #            prediction:  0  1  2  3 (3 occurs nowhere, 1 is never predicted, 2 has no label)
    matrix = torch.tensor([[6, 0, 2, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = Scores.from_confusion(matrix)
    np.testing.assert_allclose(scores.iou, [6 / 10, 0, 0, np.nan])
    np.testing.assert_allclose(scores.acc, [6 / 8, 0, np.nan, np.nan])
    np.testing.assert_allclose(scores.dice, [12 / 16, 0, 0, np.nan])
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
