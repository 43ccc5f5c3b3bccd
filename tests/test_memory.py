"""Whether a step fits, and what is said where it does not."""

from types import SimpleNamespace

import pytest
import torch

from segformer.data.datamodule import SegmentationData
from segformer.errors import UserError, build
from segformer.memory import explained, largest_that_fits, out_of_memory
from tests.conftest import TOY
from tests.test_task import quiet


@pytest.mark.parametrize(("most", "expected", "tried"), [(16, 16, [16]), (5, 4, [16, 8, 4]), (1, 1, [16, 8, 4, 2, 1])])
def test_the_largest_equal_part_that_fits_is_found_from_above(most, expected, tried) -> None:
    asked = []
    assert largest_that_fits(16, lambda count: asked.append(count) or count <= most) == expected
    assert asked == tried


def test_parts_are_equal_ones_and_one_sample_must_fit() -> None:
    assert largest_that_fits(12, lambda count: count <= 5) == 4
    with pytest.raises(UserError, match="out of memory with a single sample: use a smaller data.crop_size"):
        largest_that_fits(12, lambda count: False)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_refusal_of_memory_names_three_settings_with_numbers(error) -> None:
    assert out_of_memory(error)
    data = build("data", SegmentationData, TOY | {"batch_size": 8, "micro_batch_size": 4})
    trainer = quiet(max_steps=1)
    trainer.accumulate_grad_batches = data.accumulated(1)
    with pytest.raises(UserError) as told, explained(trainer, data, {"model": {}}):
        raise error
    assert str(told.value) == (
        "out of memory on cpu: try data.micro_batch_size=2 (was 4), or model.gradient_checkpointing=true (a third more "
        "time), or data.crop_size=32 (was 64)"
    )
    data.batch_size = 2
    with pytest.raises(UserError) as told, explained(trainer, data, {"model": {"gradient_checkpointing": True}}):
        raise error
    assert str(told.value) == "out of memory on cpu: try data.crop_size=32 (was 64)"


def test_other_errors_are_not_called_memory() -> None:
    with pytest.raises(RuntimeError, match="something else"), explained(SimpleNamespace(), SimpleNamespace(), {}):
        raise RuntimeError("something else")
