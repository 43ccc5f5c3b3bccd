"""Boundary IoU against one class after another, eroded step by step as the paper's code does it."""

import math

import cv2
import numpy as np
import pytest

from segformer.boundary import boundary_parts
from segformer.metrics import iou_of


def contour(mask: np.ndarray, ratio: float) -> np.ndarray:
    """The pixels of a mask that erosion by 3 x 3 squares takes away, outside of the image counting as background."""
    steps = max(1, round(ratio * math.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2)))
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=steps)
    return mask & ~eroded[1:-1, 1:-1].astype(bool)


def literal(prediction: np.ndarray, label: np.ndarray, classes: int, ratio: float) -> list[list[int]]:
    prediction = np.where(label == 255, 255, prediction)
    rows = []
    for index in range(classes):
        expected, found = contour(label == index, ratio), contour(prediction == index, ratio)
        rows.append([(expected & found).sum(), expected.sum(), found.sum()])
    return np.array(rows).T.tolist()


def blobs(rng: np.random.Generator, height: int, width: int, classes: int) -> np.ndarray:
    coarse = rng.integers(0, classes, (height // 7 + 1, width // 9 + 1)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)


@pytest.mark.parametrize("ratio", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("size", [(40, 60), (33, 17), (1, 9), (97, 64)])
def test_contours_of_all_classes_at_once_are_those_of_each_class_alone(size, ratio) -> None:
    rng = np.random.default_rng(0)
    for classes in (2, 5, 200):
        label, prediction = blobs(rng, *size, classes), blobs(rng, *size, classes)
        prediction = np.where(rng.random(size) < 0.7, label, prediction)
        label[rng.random(size) < 0.05] = 255
        label[: size[0] // 4, : size[1] // 3] = 255
        found = boundary_parts(prediction, label, classes, ratio)
        assert found.dtype == np.int64 and found.tolist() == literal(prediction, label, classes, ratio)


def test_a_right_map_scores_one_and_a_shifted_contour_less_than_its_area() -> None:
    label = np.zeros((200, 200), np.uint8)
    label[50:150, 50:150] = 1
    shifted = np.roll(label, 3, axis=1)
    assert iou_of(*boundary_parts(label, label, 3)).tolist()[:2] == [1, 1]
    assert np.isnan(iou_of(*boundary_parts(label, label, 3))[2])  # absent
    area = ((label == 1) & (shifted == 1)).sum() / ((label == 1) | (shifted == 1)).sum()
    assert iou_of(*boundary_parts(shifted, label, 2))[1] < area - 0.2


def test_what_lies_below_ignored_pixels_costs_nothing() -> None:
    label = np.zeros((100, 100), np.uint8)
    label[:, 50:] = 1
    label[40:60] = 255
    careless = np.where(label == 255, 1, label)
    assert iou_of(*boundary_parts(careless, label, 2)).tolist() == [1, 1]
    ignored = np.full((10, 10), 255, np.uint8)
    assert not boundary_parts(np.zeros((10, 10), np.uint8), ignored, 2).any()


def test_more_classes_than_a_byte_holds_are_counted() -> None:
    label = np.full((20, 20), 7, np.int16)
    label[5:, 5:] = 299
    assert boundary_parts(label, label, 300)[0, 299] > 0


@pytest.mark.parametrize("classes", [252, 253, 254, 255])
@pytest.mark.parametrize("kind", [np.uint8, np.int16])
def test_ignored_pixels_are_no_class_however_many_there_are(classes, kind) -> None:
    label = np.zeros((40, 40), np.uint8)
    label[:, 20:] = 255
    prediction = np.zeros((40, 40), kind)
    assert boundary_parts(prediction, label, classes)[:, 0].tolist() == [116] * 3  # the rim of 20 x 40
