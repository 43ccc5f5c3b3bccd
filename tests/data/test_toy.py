import numpy as np

from segformer.data.toy import CLASSES, ToyScenes
from segformer.metrics import Scores

TRAIN, VAL = 200, 48


def test_scenes_depend_on_seed_and_index_alone() -> None:
    first, again, other = ToyScenes(8, 0)[5], ToyScenes(8, 0)[5], ToyScenes(8, 1)[5]
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert first[0].shape != other[0].shape or not np.array_equal(first[0], other[0])


def test_scenes_hold_every_class_some_ignored_pixels_and_many_sizes() -> None:
    samples = [ToyScenes(60)[index] for index in range(60)]
    assert all(image.dtype == mask.dtype == np.uint8 and image.shape[:2] == mask.shape for image, mask in samples)
    counts = sum(np.bincount(mask.ravel(), minlength=256) for _, mask in samples)
    share = counts / counts.sum()
    assert (share[: len(CLASSES)] > 0.01).all()
    assert 0.005 < share[255] < 0.05 and counts[len(CLASSES) : 255].sum() == 0
    assert len({mask.shape for _, mask in samples}) > 40


def test_colour_alone_does_not_tell_the_class() -> None:
    """A classifier that knows the class frequencies of every colour stays far below what a network reaches."""

    def colors(image: np.ndarray) -> np.ndarray:
        cell = (image >> 3).astype(int)  # 32 levels a channel
        return (cell[..., 0] << 10) | (cell[..., 1] << 5) | cell[..., 2]

    k = len(CLASSES)
    seen = np.zeros((32**3, k))
    for index in range(TRAIN):
        image, mask = ToyScenes(TRAIN, 0)[index]
        labelled = mask < k
        np.add.at(seen, (colors(image)[labelled], mask[labelled]), 1)
    best = 0.0
    for table in (seen, seen / seen.sum(axis=0)):  # the likeliest class, or each class weighted alike
        matrix = np.zeros((k, k), np.int64)
        for index in range(VAL):
            image, mask = ToyScenes(VAL, 1)[index]
            labelled = mask < k
            np.add.at(matrix, (mask[labelled], table.argmax(1)[colors(image)[labelled]]), 1)
        import torch

        best = max(best, Scores.from_confusion(torch.from_numpy(matrix)).miou)
    assert 0.1 < best < 0.5
