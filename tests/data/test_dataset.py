import re

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


def test_undeclared_values_are_told_with_the_first_five_files(tmp_path) -> None:
    for index in range(9):
        mask = np.zeros((8, 8), np.uint8)
        if index not in (1, 3):
            mask[0, :2] = 3 + index
        save_pair(tmp_path, "val", f"scene {index}", np.zeros((8, 8, 3), np.uint8), mask)
    data = SegmentationDataset(Pairs(tmp_path, "images/val/*", "masks/val/*"), Classes.from_config(["a", "b"]))
    with pytest.raises(UserError) as told:
        data[8]
    named = re.findall(r"scene (\d).png \((\d+) in 2 of 64 pixels\)", str(told.value))
    assert named == [("0", "3"), ("2", "5"), ("4", "7"), ("5", "8"), ("8", "11")]
    assert str(told.value).startswith("values that none of the 2 classes declares, in ")
    assert str(told.value).endswith("list them under data.classes or in data.ignore")
    assert data[1]["mask"].max() == 0


def test_a_source_of_the_users_own_is_told_too() -> None:
    data = SegmentationDataset(ToyScenes(2), Classes.from_config(CLASSES[:-1]))
    with pytest.raises(UserError, match=r"values that none of the 7 classes declares, in scene_0_0000"):
        [data[index] for index in range(2)]


TABLE = {"road": {"ids": [7]}, "car": {"ids": [26]}}


def test_masks_named_as_train_ids_are_read_as_they_are(tmp_path) -> None:
    for name, values in (("a_labelIds", [7, 26, 0]), ("b_labelTrainIds", [0, 1, 255])):
        save_pair(tmp_path, "val", name, np.zeros((1, 3, 3), np.uint8), np.array([values], np.uint8))
    source = Pairs(tmp_path, "images/val/*", "masks/val/*")
    data = SegmentationDataset(source, Classes.from_config(TABLE, [0]), train_ids="*_labelTrainIds.png")
    assert data[0]["mask"].tolist() == data[1]["mask"].tolist() == [[0, 1, 255]]


def test_train_ids_under_the_name_of_raw_ids_are_noticed(tmp_path) -> None:
    save_pair(tmp_path, "val", "a_labelIds", np.zeros((1, 3, 3), np.uint8), np.array([[0, 1, 255]], np.uint8))
    source, classes = Pairs(tmp_path, "images/val/*", "masks/val/*"), Classes.from_config(TABLE, [0, 1, 255])
    with pytest.raises(UserError, match=r"a_labelIds.png looks like train ids .* add 'data.train_ids=\"\*\"'"):
        SegmentationDataset(source, classes, train_ids="*_labelTrainIds.png")[0]
    assert SegmentationDataset(source, classes, train_ids="*")[0]["mask"].tolist() == [[0, 1, 255]]
    assert SegmentationDataset(source, classes)[0]["mask"].tolist() == [[255, 255, 255]]  # raw after all


def test_raw_ids_under_the_name_of_train_ids_are_told_with_the_way_out(tmp_path) -> None:
    save_pair(tmp_path, "val", "a_labelTrainIds", np.zeros((1, 3, 3), np.uint8), np.array([[0, 7, 26]], np.uint8))
    source = Pairs(tmp_path, "images/val/*", "masks/val/*")
    data = SegmentationDataset(source, Classes.from_config(TABLE, [0]), train_ids="*_labelTrainIds.png")
    with pytest.raises(
        UserError, match=r"\(7, 26 in 2 of 3 pixels\): their names say train ids, .*data.train_ids=null"
    ):
        data[0]
