from itertools import islice

import pytest

from segformer.data.sampler import EvaluationShard, TrainingBatches, mix


def steps(count: int, *, start: int = 0, **layout: int) -> list[set]:
    """The samples of each optimiser step over all processes and accumulated batches."""
    world, accumulate = layout.get("world", 1), layout.get("accumulate", 1)
    found: list[set] = [set() for _ in range(count)]
    for rank in range(world):
        batches = TrainingBatches(10, 8, 3, start, rank, world, accumulate)
        for index, batch in enumerate(islice(batches, count * accumulate)):
            found[index // accumulate].update(batch)
    return found


def test_each_epoch_shows_every_sample_once_in_an_order_of_its_own() -> None:
    draws = [draw for batch in islice(TrainingBatches(10, 5, 0, 0), 6) for draw in batch]
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
