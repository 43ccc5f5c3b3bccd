import pytest

from segformer.data.datamodule import SegmentationData
from segformer.errors import SharedError, UserError, build
from tests.conftest import TOY


def test_training_samples_are_augmented_and_validation_samples_are_not() -> None:
    data = build("data", SegmentationData, TOY).opened("train", "val")
    assert data.datasets["train"].transform is not None and data.datasets["val"].transform is None
    assert data.summary().startswith("24 train images, 9 val images, 8 classes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"micro_batch_size": 0}, "data.micro_batch_size is 0"),
        ({"worker_timeout": -1}, "data.worker_timeout is -1"),
        ({"max_pixels": 0}, "data.max_pixels is 0"),
        ({"workers": -1}, "data.workers is -1"),
        ({"workers": "many"}, "data.workers is 'many'"),
        ({"batch_size": 2.5}, "data.batch_size is 2.5, expected an integer"),
        ({"val": {"scenes": 0, "seed": 1}}, "data.val holds no samples"),
        ({"protocol": {"windows": 5}}, "unknown key 'data.protocol.windows'"),
        ({"crop_size": "big"}, "data.crop_size is 'big'"),
        ({"crop_size": [64, 64, 3]}, "data.crop_size is"),
        ({"scale": [2.0, 0.5]}, "data.scale is"),
        ({"scale": 2}, "data.scale is"),
        ({"base_size": [2048]}, "data.base_size is"),
        ({"cat_max_ratio": 0}, "data.cat_max_ratio is 0"),
    ],
)
def test_impossible_settings_are_told(change, message) -> None:
    with pytest.raises(UserError, match=message):
        build("data", SegmentationData, TOY | change).opened("train", "val")


@pytest.mark.parametrize(
    ("batch_size", "micro", "processes", "parts"),
    [
        *((16, None, 1, 1), (16, None, 8, 1), (16, 8, 1, 2), (16, 4, 2, 2)),
        *((16, 4, 8, 1), (16, 6, 1, 4), (6, 4, 1, 2), (7, 3, 1, 7)),
    ],
)
def test_accumulation_follows_from_batch_devices_and_what_fits_on_one(batch_size, micro, processes, parts) -> None:
    data = build("data", SegmentationData, TOY | {"batch_size": batch_size, "micro_batch_size": micro})
    assert data.accumulated(processes) == parts


def test_a_batch_that_cannot_be_shared_is_told() -> None:
    data = build("data", SegmentationData, TOY | {"batch_size": 8})
    with pytest.raises(SharedError, match="data.batch_size=8 cannot be shared evenly by 3 processes: use a multiple"):
        data.accumulated(3)


def test_the_shares_of_a_step_are_told() -> None:
    data = build("data", SegmentationData, TOY | {"batch_size": 8, "micro_batch_size": 2}).opened("train", "val")
    assert data.summary(2).endswith("batch of 8 = 2 processes x 2 accumulated x 2")
    assert data.summary(4).endswith("batch of 8 = 4 processes x 2")
    assert data.summary(1).endswith("batch of 8 = 4 accumulated x 2")
    assert build("data", SegmentationData, TOY).opened("train").summary().endswith("batch of 2")


def test_a_split_of_fewer_images_than_processes_is_told() -> None:
    data = build("data", SegmentationData, TOY | {"val": {"scenes": 2, "seed": 1}}).opened("val")
    data.require_images(2)
    with pytest.raises(SharedError, match="data.val holds 2 images for 3 processes.*: use trainer.devices=2"):
        data.require_images(3)
