"""The augmentation against literal restatements of the recipe's steps."""

import warnings

import cv2
import numpy as np
import pytest
from scipy.stats import chi2_contingency

from segformer.data.sampler import mix
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


# -- the whole chain against a literal restatement of the published pipeline, drawn from another random stream

DRAWS = 20_000
CROP, LONG, SHORT = 32, 64, 40


def street() -> tuple[np.ndarray, np.ndarray]:
    """One colour; labels of which few windows hold enough of a second class, beside a stripe of ignored pixels."""
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 43:50], mask[:, 50:], mask[34:, :5] = 1, 255, 2
    return np.full((40, 60, 3), (240, 190, 60), np.uint8), mask


def published(image, mask, rng, redraws=10, ratio=0.75, count_ignored=False, hue_end=18, flip=0.5, contrast_first=None):
    """SPEC: load as BGR, resize with jitter, crop, flip, distort colours, pad; the keywords are mistakes to detect."""
    image = image[..., ::-1]
    r = rng.uniform(0.5, 2.0)
    height, width = mask.shape
    factor = min(int(LONG * r) / max(height, width), int(SHORT * r) / min(height, width))
    size = (int(width * factor + 0.5), int(height * factor + 0.5))
    image, mask = cv2.resize(image, size), cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)

    def box():
        top = rng.integers(0, max(mask.shape[0] - CROP, 0) + 1)
        left = rng.integers(0, max(mask.shape[1] - CROP, 0) + 1)
        return slice(top, top + CROP), slice(left, left + CROP)

    window = box()
    for _ in range(redraws):
        ids, counts = np.unique(mask[window], return_counts=True)
        if not count_ignored:
            counts = counts[ids != 255]
        if len(counts) > 1 and counts.max() / counts.sum() < ratio:
            break
        window = box()
    image, mask = image[window], mask[window]
    if rng.random() < flip:
        image, mask = image[:, ::-1], mask[:, ::-1]

    def convert(x, alpha=1.0, beta=0.0):
        return np.clip(x.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    def contrast(x):
        return convert(x, alpha=rng.uniform(0.5, 1.5)) if rng.integers(2) else x

    def saturation(x):
        if not rng.integers(2):
            return x
        x = cv2.cvtColor(np.ascontiguousarray(x), cv2.COLOR_BGR2HSV)
        x[..., 1] = convert(x[..., 1], alpha=rng.uniform(0.5, 1.5))
        return cv2.cvtColor(x, cv2.COLOR_HSV2BGR)

    def hue(x):
        if not rng.integers(2):
            return x
        x = cv2.cvtColor(np.ascontiguousarray(x), cv2.COLOR_BGR2HSV)
        x[..., 0] = (x[..., 0].astype(int) + rng.integers(-18, hue_end)) % 180
        return cv2.cvtColor(x, cv2.COLOR_HSV2BGR)

    if rng.integers(2):
        image = convert(image, beta=rng.uniform(-32, 32))
    first = rng.integers(2) if contrast_first is None else contrast_first
    image = contrast(image) if first else image
    image = hue(saturation(image))
    image = image if first else contrast(image)
    padded = np.full((CROP, CROP), 255, np.uint8)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return image[0, 0, ::-1], padded


def features(colour: np.ndarray, mask: np.ndarray) -> dict[str, object]:
    labelled = mask[mask != 255]
    counts = np.bincount(labelled, minlength=3)
    return {
        "rows": int((mask != 255).any(1).sum()),  # scale and padding
        "share of the largest class": int(20 * counts.max() / max(len(labelled), 1)),
        "ignored": int((mask == 255).sum()) // 64,
        "corner": int(mask[0, 0]),
        "sides": (int(mask[:, 0].max()), int(mask[0].argmin()) // 4),  # flip and horizontal place
        "third class": int(counts[2]) // 8,  # vertical place
        **{channel: int(colour[index]) // 8 for index, channel in enumerate("rgb")},
        "rgb": tuple((colour // 43).tolist()),  # order of the distortions
    }


def p_values(ours: list[dict[str, object]], theirs: list[dict[str, object]]) -> dict[str, float]:
    """Of the hypothesis that both come from one distribution, feature by feature (rare values pooled)."""
    found = {}
    for name in ours[0]:
        seen = [[str(row[name]) for row in rows] for rows in (ours, theirs)]
        values, counts = np.unique([*seen[0], *seen[1]], return_counts=True)
        kept = values[counts >= 20]
        table = [[np.count_nonzero(np.array(column) == value) for value in kept] for column in seen]
        table = np.array([[*row, DRAWS - sum(row)] for row in table])
        found[name] = chi2_contingency(table[:, table.sum(0) > 0]).pvalue
    return found


@pytest.fixture(scope="module")
def drawn() -> list[dict[str, object]]:
    image, mask = street()
    augment = transform(crop_size=(CROP, CROP), base_size=(LONG, SHORT))
    rows = []
    for seed in range(DRAWS):
        colours, labels = augment(image, mask, mix(0, seed))
        rows.append(features(colours[0, 0], labels))
    return rows


def restated(**mistake) -> list[dict[str, object]]:
    rng = np.random.default_rng(1)
    return [features(*published(*street(), rng, **mistake)) for _ in range(DRAWS)]


def test_augmentation_is_distributed_as_published(drawn) -> None:
    found = p_values(drawn, restated())
    assert min(found.values()) > 0.001, found


@pytest.mark.parametrize(
    "mistake",
    [
        {"redraws": 9},
        {"ratio": 0.8},
        {"count_ignored": True},
        {"hue_end": 22},
        {"flip": 0.45},
        {"contrast_first": True},
    ],
    ids=lambda mistake: next(iter(mistake)),
)
def test_the_comparison_would_notice(drawn, mistake) -> None:
    assert min(p_values(drawn, restated(**mistake)).values()) < 0.001
