"""Whether an interval holds what it says it holds, and whether two models are told apart as often as they should be."""

import numpy as np
import pytest

from segformer.bootstrap import intervals, paired
from segformer.errors import UserError
from segformer.metrics import Parts, iou_of, mean_of

CLASSES = 5
SIZES = np.array([4000.0, 2000, 1000, 500, 250])  # mean pixels of a class in an image


def drawn(images: int, seed: int, skill: float = 0.8) -> Parts:
    """Images of a made-up population: how much of a class they hold, and how hard they are, is chance."""
    rng = np.random.default_rng(seed)
    labelled = (rng.gamma(0.7, SIZES / 0.7, (images, CLASSES)) + 1).astype(np.int64)
    hard = rng.beta(2, 2, (images, 1)) - 0.5  # of the whole image
    hits = (labelled * np.clip(skill - 0.3 * hard + rng.normal(0, 0.05, (images, CLASSES)), 0, 1)).astype(np.int64)
    missed = labelled - hits
    return hits, labelled, hits + np.roll(missed, 1, axis=1)  # what one class loses the next one gains


def score(parts: Parts) -> float:
    return float(mean_of(iou_of(*(part.sum(axis=0) for part in parts))))


def share_that_holds(trials: int, images: int, resamples: int) -> tuple[float, float]:
    """Of the trials whose intervals hold the population's mIoU, and the IoU of its first class."""
    population = drawn(400_000, seed=10**6)
    truth, first = score(population), float(iou_of(*(part.sum(axis=0)[0] for part in population)))
    held = []
    for trial in range(trials):
        found = intervals(drawn(images, trial), resamples, seed=trial)
        low, high = found.miou
        held.append((low <= truth <= high, found.iou[0, 0] <= first <= found.iou[0, 1]))
    whole, one = np.mean(held, axis=0)
    return float(whole), float(one)


def test_in_a_thousand_trials_95_percent_intervals_hold_the_truth_in_93_to_97() -> None:
    shares = share_that_holds(1000, 200, 1000)
    print(f"share of the intervals that hold the truth: mIoU {shares[0]:.3f}, a class {shares[1]:.3f}")
    assert all(0.93 <= share <= 0.97 for share in shares)


def test_a_resample_is_a_sum_over_drawn_images() -> None:
    """With one resample both ends are its score, which a loop over the drawn images gives, too."""
    parts = drawn(30, 0)
    found = intervals(parts, resamples=1, seed=7)
    times = np.random.default_rng(7).multinomial(30, np.full(30, 1 / 30), size=1)[0]
    again: list[np.ndarray] = [sum(part[index] * times[index] for index in range(30)) for part in parts]
    expected = iou_of(*again)
    assert found.miou == pytest.approx((expected.mean(),) * 2, abs=1e-12)
    np.testing.assert_allclose(found.iou, np.stack([expected, expected], axis=1), atol=1e-12)


def test_a_class_that_no_image_holds_has_no_interval() -> None:
    parts = tuple(np.pad(part, ((0, 0), (0, 1))) for part in drawn(20, 0))
    found = intervals(parts)
    assert np.isnan(found.iou[-1]).all() and not np.isnan(found.iou[:-1]).any()
    assert found.miou == intervals(drawn(20, 0)).miou


def test_a_planted_point_is_found_and_none_where_models_are_equal() -> None:
    before = drawn(500, 3)
    better = (before[0] + (before[1] - before[0]) // 14, before[1], before[2])
    gain = score(better) - score(before)
    assert 0.009 < gain < 0.02
    found = paired(before, better)
    assert found.miou[0] == pytest.approx(gain, abs=1e-12)
    assert 0 < found.miou[1] < gain < found.miou[2] and found.p < 0.01
    assert (found.iou[:, 1] > 0).all() and (found.iou[:, 1] <= found.iou[:, 0]).all()
    same = paired(before, before)
    assert same.miou == (0, 0, 0) and same.p == 1 and not same.iou.any()


def test_models_of_equal_skill_are_rarely_told_apart() -> None:
    """The same images, two models that err independently: in about one of twenty pairs the interval leaves zero out."""
    apart = 0
    for trial in range(200):
        first = drawn(150, trial)
        rng = np.random.default_rng(10**5 + trial)
        hits = np.minimum(first[1], (first[0] * rng.normal(1, 0.05, first[0].shape)).clip(0).astype(np.int64))
        other = np.minimum(first[1], (first[0] * rng.normal(1, 0.05, first[0].shape)).clip(0).astype(np.int64))
        found = paired((hits, *first[1:]), (other, *first[1:]), resamples=300, seed=trial)
        apart += not found.miou[1] <= 0 <= found.miou[2]
    assert 1 <= apart <= 20


def test_what_cannot_be_drawn_or_compared_is_one_sentence() -> None:
    parts = drawn(10, 0)
    with pytest.raises(UserError, match="no images were scored"):
        intervals(tuple(part[:0] for part in parts))
    with pytest.raises(UserError, match="level is 95, expected a share between 0 and 1"):
        intervals(parts, level=95)
    with pytest.raises(UserError, match="resamples is 0"):
        intervals(parts, resamples=0)
    with pytest.raises(UserError, match="are of different labels: compare models on the same images"):
        paired(parts, drawn(10, 1))
    with pytest.raises(UserError, match="are of different labels"):
        paired(parts, drawn(9, 0))
