"""The augmentation against literal restatements of the recipe's steps."""

import warnings

import cv2
import numpy as np
import pytest

from segformer.data.transforms import PhotoMetricDistortion, RandomCropMaxRatio, RandomScale, TrainTransform
from segformer.pixels import PAD


def sample(height: int = 60, width: int = 90, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(0, classes, (height, width), np.uint8)


def transform(**options) -> TrainTransform:
    return TrainTransform(
        **{"crop_size": (48, 64), "base_size": None, "scale": (0.5, 2.0), "cat_max_ratio": 0.75} | options
    )


def test_the_seed_decides_everything() -> None:
    image, mask = sample()
    augment = transform()
    first, second, other = (augment(image, mask, seed) for seed in (1, 1, 2))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[0], other[0])


def test_crops_have_the_crop_size_and_padding_is_mean_colour_and_ignore() -> None:
    image, mask = sample(30, 40)
    out_image, out_mask = transform(scale=(0.5, 0.5))(image, mask, 0)  # 15 x 20 inside 48 x 64
    assert out_image.shape == (48, 64, 3) and out_mask.shape == (48, 64)
    assert (out_image[15:] == PAD).all() and (out_image[:, 20:] == PAD).all()
    assert (out_mask[15:] == 255).all() and (out_mask[:, 20:] == 255).all() and (out_mask[:15, :20] != 255).all()


def test_image_and_mask_move_together_through_the_whole_chain() -> None:
    blocks = np.kron(np.random.default_rng(0).integers(0, 4, (8, 10)), np.ones((12, 12))).astype(np.uint8)
    painted = np.repeat(blocks[..., None] * 60 + 30, 3, axis=2).astype(np.uint8)
    augment = transform()
    augment.compose.transforms[3].p = 0  # colours carry the label here
    compared = 0
    for seed in range(20):
        image, mask = augment(painted, blocks, seed)
        same = np.ones_like(mask, bool)  # inside a block, where resizing blends nothing
        for shift in ((2, 0), (-2, 0), (0, 2), (0, -2), (2, 2), (-2, -2), (2, -2), (-2, 2)):
            same &= np.roll(mask, shift, (0, 1)) == mask
        same[:2], same[-2:], same[:, :2], same[:, -2:] = False, False, False, False
        same &= mask != 255
        assert np.array_equal(image[same], np.repeat(mask[same][:, None] * 60 + 30, 3, axis=1))
        compared += same.sum()
    assert compared > 10_000


def test_a_crop_keeps_the_crop_size() -> None:
    image, mask = sample(40, 60)
    crop = RandomCropMaxRatio((20, 30), 1.1)
    crop.set_random_seed(3)
    moved = crop(image=image, mask=mask)
    assert moved["mask"].shape == (20, 30) and moved["image"].shape == (20, 30, 3)


@pytest.mark.parametrize(
    ("shape", "base", "ratio", "expected"),
    [
        ((512, 683), (2048, 512), 1.0, (683, 512)),
        ((1024, 2048), (2048, 1024), 0.5, (1024, 512)),
        ((300, 3000), (2048, 512), 1.0, (2048, 205)),  # limited by the long side
        ((300, 400), None, 2.0, (800, 600)),
        ((300, 400), (2048, 512), 0.5, (341, 256)),
    ],
)
def test_scale_follows_the_published_arithmetic(shape, base, ratio, expected) -> None:
    scale = RandomScale(base, (ratio, ratio))
    assert scale.get_params_dependent_on_data({}, {"image": np.zeros((*shape, 3), np.uint8)})["size"] == expected


def test_a_crop_that_one_class_fills_is_drawn_again() -> None:
    mask = np.zeros((100, 400), np.uint8)
    mask[:, 300:] = 1  # a window of width 100 is mixed enough only between 225 and 275
    crop = RandomCropMaxRatio((100, 100), 0.75)
    shares = []
    for seed in range(400):
        crop.set_random_seed(seed)
        window = crop.get_params_dependent_on_data({}, {"mask": mask})["window"]
        counts = np.bincount(mask[window].ravel(), minlength=2)
        shares.append(counts.max() / counts.sum() < 0.75)
    chance = 49 / 301  # of the 301 offsets, those that pass
    assert np.mean(shares) == pytest.approx(1 - (1 - chance) ** 11, abs=0.06)


def test_ignored_pixels_do_not_count_in_the_share_of_a_class() -> None:
    mask = np.full((10, 10), 255, np.uint8)
    mask[0, :5], mask[1, :5] = 0, 1  # half and half of what is labelled
    drawn = []
    crop = RandomCropMaxRatio((10, 10), 0.75)
    crop._draw, draw = lambda shape: drawn.append(shape) or draw(shape), crop._draw
    crop.get_params_dependent_on_data({}, {"mask": mask})
    assert len(drawn) == 1  # accepted at once
    crop.get_params_dependent_on_data({}, {"mask": np.full((10, 10), 255, np.uint8)})
    assert len(drawn) == 1 + 11  # nothing labelled: every redraw is used up


class _Script:
    """Stands in for the random stream: returns the given numbers in order."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)

    def uniform(self, low: float, high: float) -> float:
        value = self.numbers.pop(0)
        assert low <= value <= high
        return value

    randint = uniform


def literal(image, brightness, contrast, saturation, hue, contrast_first) -> np.ndarray:
    def linear(x, factor, shift):
        return np.clip(x.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)

    image = linear(image, 1, brightness)
    if contrast_first:
        image = linear(image, contrast, 0)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = linear(hsv[..., 1], saturation, 0)
    image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 180
    image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if contrast_first else linear(image, contrast, 0)


@pytest.mark.parametrize("contrast_first", [True, False])
def test_colours_are_distorted_in_the_published_order_and_rounding(contrast_first) -> None:
    image, _ = sample()
    distort = PhotoMetricDistortion()
    yes, first = 0.1, 0.1 if contrast_first else 0.9
    contrast, rest = [yes, 1.3], [yes, 0.7, yes, -11]
    numbers = [yes, 20.5, first, *(contrast + rest if contrast_first else rest + contrast)]
    distort.py_random = _Script(*numbers)
    np.testing.assert_array_equal(distort.apply(image), literal(image, 20.5, 1.3, 0.7, -11, contrast_first))
    assert distort.py_random.numbers == []


def test_unknown_arguments_of_a_library_transform_are_errors_not_warnings() -> None:
    import albumentations as A

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform()
    with pytest.raises(ValueError, match="value"):
        A.Compose([A.PadIfNeeded(8, 8, value=0)], strict=True)
