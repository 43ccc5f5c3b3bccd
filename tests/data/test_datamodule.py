import pytest

from segformer.data.datamodule import SegmentationData
from segformer.errors import UserError, build

TOY = {
    "classes": ["sky", "building", "road", "sidewalk", "tree", "car", "person", "sign"],
    "train": {"scenes": 4, "seed": 0},
    "val": {"scenes": 3, "seed": 1},
    "batch_size": 2,
    "crop_size": 64,
}


def test_training_samples_are_augmented_and_validation_samples_are_not() -> None:
    data = build("data", SegmentationData, TOY).opened("train", "val")
    assert data.datasets["train"].transform is not None and data.datasets["val"].transform is None
    assert data.summary().startswith("4 train images, 3 val images, 8 classes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "data.batch_size is 0"),
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
