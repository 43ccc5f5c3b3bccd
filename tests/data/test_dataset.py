import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from segformer.data.dataset import SegmentationDataset
from segformer.data.sampler import TrainingBatches
from segformer.data.sources import Pairs
from segformer.data.toy import CLASSES, ToyScenes
from segformer.data.transforms import TrainTransform
from segformer.errors import UserError
from segformer.labels import Classes
from tests.conftest import save_pair


def toy(transform: bool) -> SegmentationDataset:
    augment = TrainTransform((64, 64), None, (0.5, 2.0), 0.75) if transform else None
    return SegmentationDataset(ToyScenes(12), Classes.from_config(CLASSES), augment)


def test_evaluation_samples_are_the_source_as_it_is() -> None:
    image, mask = ToyScenes(12)[3]
    sample = toy(transform=False)[3]
    assert sample["image"].dtype == sample["mask"].dtype == torch.uint8
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), image) and np.array_equal(
        sample["mask"].numpy(), mask
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_augmentation_does_not_depend_on_the_number_of_workers(workers) -> None:
    def batches(count: int) -> list[dict[str, torch.Tensor]]:
        loader = iter(DataLoader(toy(transform=True), batch_sampler=TrainingBatches(12, 4, 0, 0), num_workers=count))
        return [next(loader) for _ in range(7)]  # more than two epochs

    for ours, theirs in zip(batches(0), batches(workers), strict=True):
        assert torch.equal(ours["image"], theirs["image"]) and torch.equal(ours["mask"], theirs["mask"])


def test_an_undeclared_value_in_a_file_is_told_with_its_name(tmp_path) -> None:
    mask = np.full((8, 8), 3, np.uint8)
    save_pair(tmp_path, "val", "seven", np.zeros((8, 8, 3), np.uint8), mask)
    data = SegmentationDataset(Pairs(tmp_path, "images/val/*", "masks/val/*"), Classes.from_config(["a", "b"]))
    with pytest.raises(UserError, match=r"seven.* holds the value 3 \(100.0%"):
        data[0]
