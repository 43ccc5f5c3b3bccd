from collections import Counter
from itertools import islice

import numpy as np
import pytest

from segformer.data.sampler import EvaluationShard, Sampling, TrainingBatches, mix
from segformer.errors import UserError


def uniform(length: int, seed: int):
    return Sampling().order(seed, np.zeros((length, 1)))


def steps(count: int, *, start: int = 0, **layout: int) -> list[set]:
    """The samples of each optimiser step over all processes and accumulated batches."""
    world, accumulate = layout.get("world", 1), layout.get("accumulate", 1)
    found: list[set] = [set() for _ in range(count)]
    for rank in range(world):
        batches = TrainingBatches(uniform(10, 3), 8, 3, start, rank, world, accumulate)
        for index, batch in enumerate(islice(batches, count * accumulate)):
            found[index // accumulate].update(batch)
    return found


def test_each_epoch_shows_every_sample_once_in_an_order_of_its_own() -> None:
    draws = [draw for batch in islice(TrainingBatches(uniform(10, 0), 5, 0, 0), 6) for draw in batch]
    epochs = [[draw.sample for draw in draws[start : start + 10]] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({draw.seed for draw in draws}) == 30


def test_a_resumed_order_is_the_unbroken_one() -> None:
    assert steps(7, start=0)[4:] == steps(3, start=4)


@pytest.mark.parametrize("layout", [{"world": 2}, {"world": 4}, {"accumulate": 4}, {"world": 2, "accumulate": 2}])
def test_a_step_holds_the_same_samples_on_any_layout(layout) -> None:
    assert steps(6, **layout) == steps(6)
    assert all(len(step) == 8 for step in steps(6, **layout))


@pytest.mark.parametrize(("length", "world"), [(7, 2), (8, 3), (9, 3), (1, 4)])
def test_each_validation_image_is_scored_once_on_any_number_of_processes(length, world) -> None:
    shards = [list(EvaluationShard(length, rank, world)) for rank in range(world)]
    assert sorted(index for shard in shards for index in shard) == list(range(length))
    assert [len(EvaluationShard(length, rank, world)) for rank in range(world)] == [len(shard) for shard in shards]


def test_seeds_are_mixed_well_and_stay_the_same() -> None:
    assert len({mix(0, position) for position in range(10_000)}) > 9_990
    assert mix(1, 2) == mix(1, 2) != mix(2, 1)


PIXELS = np.array([[90, 10, 0], [100, 0, 0], [100, 0, 0], [99, 0, 1]])  # class 1 in one image, class 2 hardly anywhere


def test_rare_classes_come_as_often_as_their_rarity_says() -> None:
    order = Sampling("rare_class", temperature=0.05).order(0, PIXELS)
    found = Counter(order(position) for position in range(4000))
    weights = np.exp(-PIXELS.sum(0) / PIXELS.sum() / 0.05)  # of the classes; the common one is in all four images
    common, second, third = weights / weights.sum()
    assert found[0] / 4000 == pytest.approx(second + common / 4, abs=0.03)
    assert found[3] / 4000 == pytest.approx(third + common / 4, abs=0.03)
    assert found[0] + found[3] > 3900


def test_an_image_comes_as_often_as_its_rarest_class_asks_for() -> None:
    order = Sampling("repeat_factor", threshold=1.0).order(0, PIXELS)
    factors = np.array([2, 1, 1, 2])  # sqrt(1 / 0.25) where a class is in one image of four
    found = Counter(order(position) for position in range(4 * 600))
    for index, factor in enumerate(factors):
        assert found[index] / 2400 == pytest.approx(factor / factors.sum(), abs=0.005)
    epoch = Counter(order(position) for position in range(4))  # no weight of 4 / 6 or 8 / 6 is off by one draw or more
    assert all(epoch[index] in (0, 1) if factors[index] == 1 else epoch[index] in (1, 2) for index in range(4))


@pytest.mark.parametrize("name", ["rare_class", "repeat_factor"])
def test_what_comes_when_follows_from_seed_and_position_alone(name) -> None:
    first, second = (Sampling(name, threshold=1.0).order(5, PIXELS) for _ in range(2))
    assert [first(position) for position in range(40)] == [second(position) for position in reversed(range(40))][::-1]
    other = Sampling(name, threshold=1.0).order(6, PIXELS)
    assert [first(position) for position in range(40)] != [other(position) for position in range(40)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "rare"}, "data.sampling.name is 'rare'.*choose from uniform, rare_class, repeat_factor"),
        ({"temperature": 0.0}, "temperature is 0.0, expected more than 0"),
        ({"threshold": 2.0}, "threshold is 2.0, expected more than 0 and at most 1"),
    ],
)
def test_sampling_that_cannot_be_is_told(options, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        Sampling(**options)


def test_rare_classes_need_labels() -> None:
    with pytest.raises(UserError, match="the training masks hold none"):
        Sampling("rare_class").order(0, np.zeros((3, 2)))
