import numpy as np

from segformer.labels import Classes
from segformer.visualize import colorize, overlay, panel

CLASSES = Classes.from_config({"a": {"color": [10, 20, 30]}, "b": {"color": [200, 100, 0]}})
MASK = np.array([[0, 1], [255, 1]], np.uint8)


def test_masks_take_the_datasets_colours_and_ignored_pixels_are_black() -> None:
    assert colorize(MASK, CLASSES).tolist() == [[[10, 20, 30], [200, 100, 0]], [[0, 0, 0], [200, 100, 0]]]


def test_opacity_runs_from_the_image_to_the_mask() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    assert np.array_equal(overlay(image, MASK, CLASSES, 0), image)
    assert np.array_equal(overlay(image, MASK, CLASSES, 1), colorize(MASK, CLASSES))
    assert overlay(image, MASK, CLASSES, 0.5)[0, 1].tolist() == [150, 100, 50]


def test_a_panel_shows_image_label_and_prediction_side_by_side() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    drawn = panel(image, MASK, MASK[::-1], CLASSES)
    assert drawn.shape == (2, 2 * 3 + 2 * 4, 3)
    assert np.array_equal(drawn[:, :2], image) and np.array_equal(drawn[:, 6:8], overlay(image, MASK, CLASSES))
