"""The augmentation against a literal restatement of the recipe: one form bit by bit, the other in distribution."""

import random
import subprocess
import sys
import warnings
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from scipy.stats import chi2_contingency, ks_2samp

from segformer.data.sampler import mix
from segformer.data.transforms import TrainTransform, distort, scaled_size
from segformer.errors import UserError
from segformer.pixels import PAD
from tests.conftest import ROOT

BOTH = pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])


def same(raw: np.ndarray) -> np.ndarray:
    """The labels of masks that hold train ids."""
    return raw.astype(np.uint8)


def sample(height: int = 60, width: int = 90, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(0, classes, (height, width), np.uint8)


def transform(**options) -> TrainTransform:
    return TrainTransform(
        **{"crop_size": (48, 64), "base_size": None, "scale": (0.5, 2.0), "cat_max_ratio": 0.75} | options
    )


@BOTH
def test_the_seed_decides_everything(exact) -> None:
    image, mask = sample()
    augment = transform(exact=exact)
    first, second, other = (augment(image, mask, seed, same) for seed in (1, 1, 2))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[0], other[0])


@BOTH
def test_crops_have_the_crop_size_and_padding_is_mean_colour_and_ignore(exact) -> None:
    image, mask = sample(30, 40)
    out_image, out_mask = transform(scale=(0.5, 0.5), exact=exact)(image, mask, 0, same)  # 15 x 20 inside 48 x 64
    assert out_image.shape == (48, 64, 3) and out_mask.shape == (48, 64)
    assert (out_image[15:] == PAD).all() and (out_image[:, 20:] == PAD).all()
    assert (out_mask[15:] == 255).all() and (out_mask[:, 20:] == 255).all() and (out_mask[:15, :20] != 255).all()


@BOTH
def test_image_and_mask_move_together_through_the_whole_chain(exact) -> None:
    blocks = np.kron(np.random.default_rng(0).integers(0, 4, (8, 10)), np.ones((12, 12))).astype(np.uint8)
    painted = np.repeat(blocks[..., None] * 60 + 30, 3, axis=2).astype(np.uint8)  # grey: no hue, no saturation
    compared = 0
    for seed in range(20):
        image, mask = transform(exact=exact)(painted, blocks, seed, same)
        inner = np.ones_like(mask, bool)  # inside a block, where resizing blends nothing
        for shift in ((2, 0), (-2, 0), (0, 2), (0, -2), (2, 2), (-2, -2), (2, -2), (-2, 2)):
            inner &= np.roll(mask, shift, (0, 1)) == mask
        inner[:2], inner[-2:], inner[:, :2], inner[:, -2:] = False, False, False, False
        # brightness and contrast give each class one grey, and keep the greys in their order
        greys = [np.unique(image[inner & (mask == label)]) for label in range(4)]
        assert all(len(grey) <= 1 for grey in greys)
        assert (np.diff(np.concatenate(greys).astype(int)) >= 0).all() and len(np.concatenate(greys)) > 1
        compared += (inner & (mask != 255)).sum()
    assert compared > 10_000


@pytest.mark.parametrize(
    ("shape", "base", "ratio", "expected"),
    [
        ((512, 683), (2048, 512), 1.0, (512, 683)),
        ((1024, 2048), (2048, 1024), 0.5, (512, 1024)),
        ((300, 3000), (2048, 512), 1.0, (205, 2048)),  # limited by the long side
        ((300, 400), None, 2.0, (600, 800)),
        ((300, 400), (2048, 512), 0.5, (256, 341)),
        ((1, 400), None, 0.5, (1, 1)),  # at least a pixel
    ],
)
def test_scale_follows_the_published_arithmetic(shape, base, ratio, expected) -> None:
    assert scaled_size(shape, base, ratio) == expected


@BOTH
def test_a_crop_that_one_class_fills_is_drawn_again(exact) -> None:
    mask = np.zeros((100, 400), np.uint8)
    mask[:, 300:] = 1  # a window of width 100 is mixed enough only between 225 and 275
    augment = transform(crop_size=(100, 100), scale=(1.0, 1.0), exact=exact)
    image, passed = np.zeros((100, 400, 3), np.uint8), []
    for seed in range(400):
        counts = np.bincount(augment(image, mask, seed, same)[1].ravel(), minlength=2)
        passed.append(counts.max() / counts.sum() < 0.75)
    chance = 49 / 301  # of the 301 offsets, those that pass
    assert np.mean(passed) == pytest.approx(1 - (1 - chance) ** 11, abs=0.06)


@BOTH
def test_ignored_pixels_do_not_count_in_the_share_of_a_class(exact) -> None:
    augment = transform(crop_size=(10, 10), scale=(1.0, 1.0), exact=exact)
    mask = np.full((10, 10), 255, np.uint8)
    mask[0, :5], mask[1, :5] = 0, 1  # half and half of what is labelled
    seen = []
    augment(np.zeros((10, 10, 3), np.uint8), mask, 0, lambda raw: seen.append(raw) or raw)
    assert len(seen) == 1 + 1  # accepted at once; then the crop itself
    seen.clear()
    augment(np.zeros((10, 10, 3), np.uint8), np.full_like(mask, 255), 0, lambda raw: seen.append(raw) or raw)
    assert len(seen) == 10 + 1  # nothing labelled: every redraw is used up


def test_only_the_window_is_read() -> None:
    side = 1_000_000  # three terabytes, all of them one pixel
    image = as_strided(np.array([10, 20, 30], np.uint8), (side, side, 3), (0, 0, 1), writeable=False)
    raw = as_strided(np.zeros(1, np.uint16), (side, side), (0, 0), writeable=False)
    looked_up = []
    out_image, out_mask = transform()(image, raw, 0, lambda part: looked_up.append(part.size) or same(part))
    assert out_image.shape == (48, 64, 3) and (out_mask == 0).all()
    assert max(looked_up) <= 48 * 64 * 4  # of a window at half the scale
    looked_up.clear()
    transform(crop_size=(1000, 1000))(image, raw, 0, lambda part: looked_up.append(part.size) or same(part))
    assert len(looked_up) == 10 + 1 and max(looked_up[:-1]) <= 256 * 256  # a grid tells whether one class fills it


@BOTH
@pytest.mark.parametrize(("scale", "crop"), [(9.0, (2, 3)), (1 / 9, (48, 64)), (0.001, (1, 1))])
def test_a_window_shows_something_at_any_scale(scale, crop, exact) -> None:
    image, mask = sample(20, 30)
    for seed in range(100):
        out_image, out_mask = transform(scale=(scale, scale), crop_size=crop, exact=exact)(image, mask, seed, same)
        assert out_image.shape == (*crop, 3) and out_mask.shape == crop and out_mask[0, 0] < 4


@BOTH
def test_what_comes_in_is_left_alone(exact) -> None:
    image, mask = sample(48, 64)
    image.setflags(write=False)
    mask.setflags(write=False)
    out_image, out_mask = transform(scale=(1.0, 1.0), exact=exact)(image, mask, 0, same)  # nothing to resize or to pad
    assert out_image.flags.writeable and out_image.flags.c_contiguous and out_mask.flags.c_contiguous
    assert not np.shares_memory(out_image, image) and not np.shares_memory(out_mask, mask)


@BOTH
@pytest.mark.parametrize("kind", ["ids of 16 bits", "colours"])
def test_masks_of_other_kinds_are_looked_up_after_the_crop(kind, exact) -> None:
    image, mask = sample()
    colours = np.random.default_rng(1).integers(0, 256, (4, 3), np.uint8)

    def from_colours(raw: np.ndarray) -> np.ndarray:
        return (raw[..., None, :] == colours).all(-1).argmax(-1).astype(np.uint8)

    raw, encode = (colours[mask], from_colours) if kind == "colours" else (mask * np.uint16(1000), lambda r: r // 1000)
    for seed in range(10):
        expected = transform(exact=exact)(image, mask, seed, same)
        found = transform(exact=exact)(image, raw, seed, lambda part: same(encode(part)))
        assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])


@BOTH
@pytest.mark.parametrize("bands", [1, 2, 4, 7])
def test_images_of_other_bands_keep_them_and_change_in_brightness_and_contrast_alone(bands, exact) -> None:
    greys = np.random.default_rng(0).integers(0, 2, (60, 90, bands), np.uint8) * 100 + 50
    augment = transform(fill=range(bands), scale=(1.0, 1.0), crop_size=(48, 100), exact=exact)
    changed = 0
    for seed in range(20):
        image, mask = augment(greys, sample()[1], seed, same)
        assert image.shape == (48, 100, bands) and mask.shape == (48, 100)
        assert len(np.unique(image[:, :90])) == 2  # one table for all bands
        assert (image[:, 90:] == np.arange(bands)).all()
        changed += not np.isin(image[:, :90], (50, 150)).all()
    assert changed > 10


# -- the whole chain against a literal restatement of the published pipeline


def linear(image: np.ndarray, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return np.clip(image.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)


def published(image, mask, draw, crop, base, redraws=10, ratio=0.75, count_ignored=False, hue_end=18, flip=0.5,
              contrast_first=None, scale=(0.5, 2.0), turns=2):  # fmt: skip
    """SPEC: load as BGR, resize with jitter, crop, flip, distort colours, pad; the keywords are mistakes to detect."""
    image = image[..., ::-1]
    r = draw.uniform(*scale)
    height, width = mask.shape
    long, short = base or (max(mask.shape), min(mask.shape))
    factor = min(int(long * r) / max(height, width), int(short * r) / min(height, width))
    size = (int(width * factor + 0.5), int(height * factor + 0.5))
    image, mask = cv2.resize(image, size), cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)

    def box():
        top = draw.randint(0, max(mask.shape[0] - crop[0], 0))
        left = draw.randint(0, max(mask.shape[1] - crop[1], 0))
        return slice(top, top + crop[0]), slice(left, left + crop[1])

    window = box()
    for _ in range(redraws):
        ids, counts = np.unique(mask[window], return_counts=True)
        if not count_ignored:
            counts = counts[ids != 255]
        if len(counts) > 1 and counts.max() / counts.sum() < ratio:
            break
        window = box()
    image, mask = image[window], mask[window]
    if draw.random() < flip:
        image, mask = image[:, ::-1], mask[:, ::-1]

    def half():
        return draw.random() < 0.5

    def contrast(x):
        return linear(x, draw.uniform(0.5, 1.5)) if half() else x

    def turned(x, saturation=None, hue=None):
        if saturation is None and hue is None:
            return x
        hsv = cv2.cvtColor(np.ascontiguousarray(x), cv2.COLOR_BGR2HSV)
        if saturation is not None:
            hsv[..., 1] = linear(hsv[..., 1], saturation)
        if hue is not None:
            hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 180
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)

    if half():
        image = linear(image, shift=draw.uniform(-32, 32))
    first = half() if contrast_first is None else contrast_first
    image = contrast(image) if first else image
    saturation = draw.uniform(0.5, 1.5) if half() else None
    hue = draw.randint(-18, hue_end - 1) if half() else None
    image = turned(turned(image, saturation), hue=hue) if turns == 2 else turned(image, saturation, hue)
    image = image if first else contrast(image)
    padded_image, padded_mask = np.full((*crop, 3), PAD, np.uint8), np.full(crop, 255, np.uint8)
    padded_image[: mask.shape[0], : mask.shape[1]] = image[..., ::-1]
    padded_mask[: mask.shape[0], : mask.shape[1]] = mask
    return padded_image, padded_mask


def photograph(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Noise with the spectrum of natural images: amplitude as one over frequency."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    falloff = 1 / np.maximum(np.hypot(rows, columns), 1 / max(height, width))
    bands = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) * falloff, (height, width)) for _ in range(3)]
    shared = np.stack(bands, -1) * 0.4 + bands[0][..., None]  # little colour
    return np.clip(128 + 50 * (shared - shared.mean()) / shared.std(), 0, 255).astype(np.uint8)


def scenes() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(seed, image, labels): smooth or of hard edges, of any size, most with a class that fills many windows."""
    rng = np.random.default_rng(5)
    for seed in range(150):
        height, width = (int(side) for side in rng.integers(8, 200, 2))
        labels = np.kron(rng.choice(5, (7, 7), p=[0.7, 0.1, 0.1, 0.05, 0.05]), np.ones((29, 29)))[:height, :width]
        labels[rng.random(labels.shape) < 0.05] = 255
        edges = rng.choice(np.array([0, 255], np.uint8), (height, width, 3))
        yield seed, photograph(height, width, rng) if seed % 2 else edges, labels.astype(np.uint8)


@pytest.mark.parametrize("base", [None, (170, 60), (400, 300)], ids=["own size", "smaller", "larger"])
def test_the_exact_form_is_the_recipe_bit_by_bit(base) -> None:
    crop, padded, cropped = (48, 64), 0, 0
    augment = transform(base_size=base, exact=True)
    for seed, image, labels in scenes():
        expected = published(image, labels, random.Random(seed), crop, base)
        found = augment(image, labels, seed, same)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
        padded += bool((found[0][-1, -1] == PAD).all())
        cropped += not (found[0][-1, -1] == PAD).all()
    assert padded > 5 and cropped > 20


@BOTH
def test_colours_are_the_recipes_in_one_turn_to_hsv_or_in_two(exact) -> None:
    image, labels = sample(48, 64)
    augment = transform(scale=(1.0, 1.0), exact=exact)  # the crop is the image
    for seed in range(100):
        expected = published(image, labels, random.Random(seed), (48, 64), None, scale=(1, 1), turns=1 + exact)
        np.testing.assert_array_equal(augment(image, labels, seed, same)[0], expected[0])


def test_one_turn_to_hsv_differs_from_two_by_rounding_alone() -> None:
    image = photograph(200, 200, np.random.default_rng(0))
    distances = []
    for seed in range(200):
        one, two = (distort(image, random.Random(seed), exact).astype(int) for exact in (False, True))
        distances.append(np.abs(one - two))
    assert np.mean(distances) < 0.5 and np.quantile(distances, 0.99) <= 5


def test_the_fast_form_takes_the_scales_and_places_of_the_exact_one() -> None:
    image = np.zeros((60, 90, 3), np.uint8)
    places = np.arange(60 * 90, dtype=np.uint16).reshape(60, 90)
    boxes: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for exact, seeds in ((False, range(3000)), (True, range(3000, 6000))):
        augment = transform(crop_size=(40, 40), exact=exact)
        for seed in seeds:
            seen: list[np.ndarray] = []
            augment(image, places, seed, lambda raw, seen=seen: seen.append(raw) or (raw % 4).astype(np.uint8))
            assert len(seen) == 2  # the grid accepts it, and the crop is what it was a grid of
            rows, columns = np.divmod(seen[-1].astype(int), 90)
            boxes[exact].append(np.array([rows.min(), rows.max(), columns.min(), columns.max()]))
    noise = np.random.default_rng(0).random((2, 3000, 4))  # pixels are whole: spread what is tied
    fast, exact = (np.array(boxes[kind]) + noise[int(kind)] for kind in (False, True))
    features = [*zip(fast.T, exact.T, strict=True)]
    features += [
        (fast[:, 1] - fast[:, 0], exact[:, 1] - exact[:, 0]),
        (fast[:, 3] - fast[:, 2], exact[:, 3] - exact[:, 2]),
    ]
    assert min(ks_2samp(*pair).pvalue for pair in features) > 0.001


@pytest.mark.parametrize("shape", [(60, 90), (17, 33), (300, 47)])
def test_the_fast_form_is_the_exact_one_within_a_pixel(shape) -> None:
    ramp = np.zeros((*shape, 3), np.uint8)  # tells where each pixel comes from
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 240, shape[0])[:, None], np.linspace(0, 240, shape[1])
    labels = np.random.default_rng(0).integers(0, 4, shape, np.uint8)  # no window is drawn again
    fast, exact = (
        np.array([transform(exact=kind)(ramp, labels, seed, same)[0].astype(int) for seed in range(60)])
        for kind in (False, True)
    )
    steepest = 1.5 * 240 / min(shape)  # grey levels from a pixel to the next, after the strongest contrast
    assert np.quantile(np.abs(fast - exact), 0.99) <= steepest + 3


@pytest.mark.parametrize(
    "mistake",
    [{"redraws": 9}, {"ratio": 0.76}, {"count_ignored": True}, {"hue_end": 19}, {"flip": 0.49},
     {"contrast_first": True}, {"scale": (0.5, 1.99)}],
    ids=lambda mistake: next(iter(mistake)),
)  # fmt: skip
def test_the_comparison_would_notice(mistake) -> None:
    image, labels = street(1)
    augment = transform(crop_size=(32, 32), base_size=(64, 40), exact=True)
    for seed in range(2000):
        expected = published(image, labels, random.Random(seed), (32, 32), (64, 40), **mistake)
        if not all(map(np.array_equal, augment(image, labels, seed, same), expected)):
            return
    pytest.fail("no difference in 2000 samples")


# -- the fast form: in another place by less than a pixel, so equal in distribution


def street(size: int) -> tuple[np.ndarray, np.ndarray]:
    """One colour; labels of which few windows hold enough of a second class, beside a stripe of ignored pixels."""
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 43:50], mask[:, 50:], mask[34:, :5] = 1, 255, 2
    return np.full((40 * size, 60 * size, 3), (240, 190, 60), np.uint8), mask.repeat(size, 0).repeat(size, 1)


def streets(exact: bool, seeds: range) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    image, mask = street(4)
    augment = transform(crop_size=(128, 128), base_size=(256, 160), exact=exact)
    return (augment(image, mask, mix(0, seed), same) for seed in seeds)


def test_the_fast_form_takes_the_window_of_the_exact_one() -> None:
    alike, near = [], []
    for (image, mask), (exact_image, exact_mask) in zip(
        *(streets(exact, range(1000)) for exact in (0, 1)), strict=True
    ):
        alike.append((mask == exact_mask).mean() > 0.97)  # three pixels along one edge of the crop
        near.append(np.abs(image[0, 0].astype(int) - exact_image[0, 0]).max() <= 4)
    assert np.mean(alike) > 0.95 and np.mean(near) > 0.95  # the others: shares so near the limit that the grid differs


def features(image: np.ndarray, mask: np.ndarray) -> dict[str, object]:
    colour, labelled = image[0, 0], mask[mask != 255]
    counts = np.bincount(labelled, minlength=3)
    return {
        "rows": int((mask != 255).any(1).sum()) // 8,  # scale and padding
        "share of the largest class": int(10 * counts.max() / max(len(labelled), 1)),
        "ignored": int((mask == 255).sum()) // 2048,
        "corner": int(mask[0, 0]),
        "sides": (int(mask[:, 0].max()), int(mask[0].argmin()) // 32),  # flip and horizontal place
        "third class": int(counts[2]) // 512,  # vertical place
        "rgb": tuple((colour // 43).tolist()),
    }


def test_the_fast_form_is_distributed_as_the_exact_one() -> None:
    fast, exact = (
        [features(*pair) for pair in streets(kind, range(2000 * kind, 2000 * kind + 2000))] for kind in (False, True)
    )
    found = {}
    for name in fast[0]:
        seen = [[str(row[name]) for row in rows] for rows in (fast, exact)]
        values, counts = np.unique([*seen[0], *seen[1]], return_counts=True)
        kept = values[counts >= 20]
        table = [[np.count_nonzero(np.array(column) == value) for value in kept] for column in seen]
        table = np.array([[*row, 2000 - sum(row)] for row in table])
        found[name] = chi2_contingency(table[:, table.sum(0) > 0]).pvalue
    assert min(found.values()) > 0.001, found


# -- more transforms, by name


def test_transforms_of_albumentations_are_added_between_colours_and_padding() -> None:
    image, mask = sample(30, 40)
    flipped = transform(scale=(1.0, 1.0), augment=[{"VerticalFlip": {"p": 1}}])
    for seed in range(5):
        expected, found = transform(scale=(1.0, 1.0))(image, mask, seed, same), flipped(image, mask, seed, same)
        for before, after in zip(expected, found, strict=True):
            np.testing.assert_array_equal(after[:30], before[:30][::-1])
            np.testing.assert_array_equal(after[30:], before[30:])


def test_the_seed_decides_the_added_transforms_too_and_none_tells_another() -> None:
    image, mask = sample()
    augment = transform(augment=[{"VerticalFlip": None}, {"CoarseDropout": {"p": 0.5}}, {"GaussNoise": {"p": 1}}])
    for seed in range(10):
        first, second = augment(image, mask, seed, same), augment(image, mask, seed, same)
        assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    both, dark = np.zeros((2, 2), int), np.full((8, 8, 3), 50, np.uint8)  # at most 123 after brightness and contrast
    half = np.arange(8, dtype=np.uint8)[:, None].repeat(8, 1) // 4
    augment = transform(crop_size=(8, 8), scale=(1.0, 1.0), augment=[{"VerticalFlip": None}, {"InvertImg": None}])
    for seed in range(1000):
        image, mask = augment(dark, half, seed, same)
        both[mask[0, 0], int(image.mean() > 127)] += 1
    assert both.min() > 200, both


@pytest.mark.parametrize(
    "name",
    ["Affine", "ElasticTransform", "GridDistortion", "MaskDropout", "OpticalDistortion", "Perspective", "Rotate",
     "SafeRotate", "ShiftScaleRotate", "ThinPlateSpline", "TimeMasking", "FrequencyMasking", "CoarseDropout"],
)  # fmt: skip
def test_what_a_transform_fills_is_ignored_never_the_first_class(name) -> None:
    image, mask = sample(48, 64)[0], np.full((48, 64), 7, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ShiftScaleRotate recommends Affine
        augment = transform(augment=[{name: {"p": 1}}])
    values = {value for seed in range(10) for value in np.unique(augment(image, mask, seed, same)[1])}
    assert values <= {7, 255}


def test_a_fill_of_the_users_own_stays() -> None:
    image, mask = sample(48, 64)[0], np.full((48, 64), 7, np.uint8)
    augment = transform(scale=(1.0, 1.0), augment=[{"Rotate": {"p": 1, "limit": [45, 45], "fill_mask": 3}}])
    assert set(np.unique(augment(image, mask, 0, same)[1])) == {3, 7}


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"GausianBlur": {}}, r"data.augment: albumentations has no transform 'GausianBlur' \(did you mean 'Gauss"),
        ({"GaussianBlur": {"blurlimit": 3}}, r"unknown key 'data.augment.GaussianBlur.blurlimit' .*'blur_limit'"),
        ({"GaussianBlur": {"p": 3.0}}, "data.augment.GaussianBlur: .*less than or equal to 1"),
        ("GaussianBlur", "data.augment holds 'GaussianBlur', expected {NAME: {argument: value}}"),
        ({"GaussianBlur": 3}, "data.augment holds .*expected {NAME: {argument: value}}"),
        ({"GaussianBlur": {}, "Rotate": {}}, "data.augment holds .*expected {NAME: {argument: value}}"),
    ],
)
def test_a_wrong_entry_of_augment_is_one_sentence(entry, sentence) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=sentence):
            transform(augment=[entry])


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"Normalize": {"p": 1}}, "data.augment gives float32 images, expected uint8"),
        ({"Resize": {"height": 100, "width": 100, "p": 1}}, r"data.augment gives an image of \(100, 100\)"),
        ({"FDA": {"p": 1}}, "data.augment fails on a crop of .*fda_metadata"),
    ],
)
def test_an_augmentation_that_breaks_the_sample_is_one_sentence(entry, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        transform(augment=[entry])(*sample(), 0, same)


def test_albumentations_is_loaded_only_for_those_who_ask_for_it() -> None:
    code = (
        "import sys; from segformer.data.transforms import TrainTransform as T;"
        "T((8, 8), None, (1, 1), 0.75); assert 'albumentations' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
