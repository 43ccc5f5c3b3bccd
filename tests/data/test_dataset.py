import re
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from segformer.data.dataset import Encoder, SegmentationDataset, Skipped, StreamedDataset, collate
from segformer.data.pairs import Pairs
from segformer.data.sampler import Draw, Sampling, TrainingBatches
from segformer.data.samples import Foreign, Sample, Source, Stream
from segformer.data.toy import CLASSES, ToyScenes
from segformer.data.transforms import TrainTransform
from segformer.errors import UserError
from segformer.labels import Classes
from tests.conftest import save_pair


def toy(transform: bool) -> SegmentationDataset:
    augment = TrainTransform((64, 64), None, (0.5, 2.0), 0.75) if transform else None
    return SegmentationDataset(ToyScenes(12), Encoder(Classes.from_config(CLASSES)), augment)


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
        loader = iter(
            DataLoader(
                toy(transform=True),
                batch_sampler=TrainingBatches(Sampling().order(0, np.zeros((12, 1))), 4, 0, 0),
                num_workers=count,
            )
        )
        return [next(loader) for _ in range(7)]  # more than two epochs

    for ours, theirs in zip(batches(0), batches(workers), strict=True):
        assert torch.equal(ours["image"], theirs["image"]) and torch.equal(ours["mask"], theirs["mask"])


def test_undeclared_values_are_told_with_the_first_five_files(tmp_path) -> None:
    for index in range(9):
        mask = np.zeros((8, 8), np.uint8)
        if index not in (1, 3):
            mask[0, :2] = 3 + index
        save_pair(tmp_path, "val", f"scene {index}", np.zeros((8, 8, 3), np.uint8), mask)
    data = SegmentationDataset(Pairs(tmp_path, "images/val/*", "masks/val/*"), Encoder(Classes.from_config(["a", "b"])))
    with pytest.raises(UserError) as told:
        data[8]
    named = re.findall(r"scene (\d).png \((\d+) in 2 of 64 pixels\)", str(told.value))
    assert named == [("0", "3"), ("2", "5"), ("4", "7"), ("5", "8"), ("8", "11")]
    assert str(told.value).startswith("values that none of the 2 classes declares, in ")
    assert str(told.value).endswith("list them under data.classes or in data.ignore")
    assert data[1]["mask"].max() == 0


def test_a_source_of_the_users_own_is_told_too() -> None:
    data = SegmentationDataset(ToyScenes(2), Encoder(Classes.from_config(CLASSES[:-1])))
    with pytest.raises(UserError, match=r"values that none of the 7 classes declares, in scene_0_0000"):
        [data[index] for index in range(2)]


TABLE = {"road": {"ids": [7]}, "car": {"ids": [26]}}


def test_masks_named_as_train_ids_are_read_as_they_are(tmp_path) -> None:
    for name, values in (("a_labelIds", [7, 26, 0]), ("b_labelTrainIds", [0, 1, 255])):
        save_pair(tmp_path, "val", name, np.zeros((1, 3, 3), np.uint8), np.array([values], np.uint8))
    source = Pairs(tmp_path, "images/val/*", "masks/val/*")
    data = SegmentationDataset(source, Encoder(Classes.from_config(TABLE, [0]), "*_labelTrainIds.png"))
    assert data[0]["mask"].tolist() == data[1]["mask"].tolist() == [[0, 1, 255]]


def test_train_ids_under_the_name_of_raw_ids_are_noticed(tmp_path) -> None:
    save_pair(tmp_path, "val", "a_labelIds", np.zeros((1, 3, 3), np.uint8), np.array([[0, 1, 255]], np.uint8))
    source, classes = Pairs(tmp_path, "images/val/*", "masks/val/*"), Classes.from_config(TABLE, [0, 1, 255])
    with pytest.raises(UserError, match=r"a_labelIds.png looks like train ids .* add 'data.train_ids=\"\*\"'"):
        SegmentationDataset(source, Encoder(classes, "*_labelTrainIds.png"))[0]
    assert SegmentationDataset(source, Encoder(classes, "*"))[0]["mask"].tolist() == [[0, 1, 255]]
    assert SegmentationDataset(source, Encoder(classes))[0]["mask"].tolist() == [[255, 255, 255]]  # raw after all


def test_raw_ids_under_the_name_of_train_ids_are_told_with_the_way_out(tmp_path) -> None:
    save_pair(tmp_path, "val", "a_labelTrainIds", np.zeros((1, 3, 3), np.uint8), np.array([[0, 7, 26]], np.uint8))
    source = Pairs(tmp_path, "images/val/*", "masks/val/*")
    data = SegmentationDataset(source, Encoder(Classes.from_config(TABLE, [0]), "*_labelTrainIds.png"))
    with pytest.raises(
        UserError, match=r"\(7, 26 in 2 of 3 pixels\): their names say train ids, .*data.train_ids=null"
    ):
        data[0]


class Broken(Source):
    """Ten samples of one value each, of which some cannot be read."""

    def __init__(self, *broken: int) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 10

    def name(self, index: int) -> str:
        return f"file {index}"

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self.broken:
            raise UserError(f"cannot read image file {index}: broken; replace or remove the file")
        return np.full((8, 8, 3), index, np.uint8), np.full((8, 8), index % 2, np.uint8)


def skipping(share: float, *broken: int) -> SegmentationDataset:
    source, encoder = Broken(*broken), Encoder(Classes.from_config(["even", "odd"]))
    return SegmentationDataset(source, encoder, TrainTransform((8, 8), None, (1.0, 1.0), 1.0), Skipped(10, share))


def test_what_cannot_be_read_is_skipped_and_named_once(capsys) -> None:
    data = skipping(0.2, 3, 7)
    first = [data[Draw(3, seed)] for seed in range(5)]
    assert all(sample["image"].shape == (3, 8, 8) for sample in first)
    assert torch.equal(data[Draw(3, 1)]["image"], first[1]["image"])  # the same seed finds the same way out
    data[Draw(7, 0)]
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "skipped, 1 of 10 samples until now: cannot read image file 3: broken; replace or remove the file",
        "skipped, 2 of 10 samples until now: cannot read image file 7: broken; replace or remove the file",
    ]


def test_too_many_skipped_samples_end_the_training() -> None:
    data = skipping(0.1, 3, 7)
    data[Draw(3, 0)]
    with pytest.raises(UserError, match=r"2 of 10 samples cannot be read, more than data.max_bad_share=0.1 allows"):
        data[Draw(7, 0)]


def test_nothing_that_can_be_read_ends_the_training_whatever_share_is_allowed() -> None:
    with pytest.raises(UserError, match="none of the 10 training samples can be read, the last: cannot read image"):
        skipping(1.0, *range(10))[Draw(0, 0)]


def test_what_a_source_of_the_users_own_raises_is_a_sample_that_cannot_be_read(capsys) -> None:
    class Network:
        def __len__(self) -> int:
            return 10

        def name(self, index: int) -> str:
            return f"row {index}"

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            if index == 3:
                raise OSError("stale file handle")
            mask = {4: np.ones((8, 8), bool), 5: np.full((8, 8), 70000), 6: np.zeros((8, 8, 1), np.uint8)}
            return np.zeros((8, 8, 3), np.uint8), mask.get(index, np.zeros((8, 8), np.int64))

    transform, encoder = TrainTransform((8, 8), None, (1.0, 1.0), 1.0), Encoder(Classes.from_config(["a", "b"]))
    data = SegmentationDataset(Foreign(Network()), encoder, transform, Skipped(10, 0.1))
    assert data[Draw(3, 0)]["image"].shape == (3, 8, 8)
    assert "sample row 3 raises OSError: stale file handle" in capsys.readouterr().err
    assert data[4]["mask"].unique().tolist() == [1] and data[0]["mask"].dtype == torch.uint8
    for index in (5, 6):
        with pytest.raises(UserError, match=f"mask row {index} is .*, expected ids .H, W. from 0 to 65535 or uint8"):
            data[index]


def test_workers_count_skipped_samples_together(capfd) -> None:
    data = skipping(0.2, 3, 7)
    draws = [[Draw(index, seed)] for seed in range(3) for index in (3, 7, 1, 2)]
    assert sum(1 for _ in DataLoader(data, batch_sampler=draws, num_workers=2)) == 12
    assert int(data.skipped.flags.sum()) == 2
    told = capfd.readouterr().err
    assert told.count("file 3") <= 2 and "2 of 10 samples until now" in told  # two workers may meet it at once


def test_evaluation_skips_nothing() -> None:
    source, encoder = Broken(3), Encoder(Classes.from_config(["even", "odd"]))
    with pytest.raises(UserError, match="cannot read image file 3"):
        SegmentationDataset(source, encoder, None, Skipped(10, 1.0))[3]


class Numbers(Stream):
    """Samples that are as high as their number, which cropping and colours keep; each epoch in an order of its own."""

    def __init__(self, count: int) -> None:
        self.count = count

    def shard(self, index: int, count: int, epoch: int | None = None):
        order = range(self.count) if epoch is None else np.random.default_rng(epoch).permutation(self.count)
        for number in list(order)[index::count]:
            yield Sample(f"row {number}", partial(_high, number))


def _high(number: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((number + 1, 1, 3), np.uint8), np.zeros((number + 1, 1), np.uint8)


def numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    return ((batch["mask"] == 0).sum((1, 2)) - 1).tolist()


def streamed(stream: Stream, train: bool, **place: int) -> StreamedDataset:
    transform = TrainTransform((64, 1), None, (1.0, 1.0), 1.0) if train else None
    return StreamedDataset(stream, Encoder(Classes.from_config(["a"])), transform, **place)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (3, 1)])
def test_a_streamed_evaluation_sees_every_sample_once_on_any_layout(world, workers) -> None:
    seen = [
        number
        for rank in range(world)
        for batch in DataLoader(
            streamed(Numbers(23), False, rank=rank, world=world), num_workers=workers, collate_fn=collate
        )
        for number in numbers(batch)
    ]
    assert sorted(seen) == list(range(23))


def first(batch: dict[str, torch.Tensor]) -> bytes:
    return batch["image"].numpy().tobytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_training_goes_on_with_the_augmentation_of_the_unbroken_one(workers) -> None:
    def batches(start: int, count: int, rank: int = 0) -> list[bytes]:
        encoder, transform = Encoder(Classes.from_config(CLASSES)), TrainTransform((48, 48), None, (0.5, 2.0), 0.75)
        data = StreamedDataset(Scenes(), encoder, transform, seed=1, rank=rank, world=2, start=start, batch_size=2)
        loader = iter(DataLoader(data, batch_size=2, num_workers=workers, collate_fn=collate))
        return [first(next(loader)) for _ in range(count)]

    unbroken = batches(0, 9)
    assert batches(5, 4) == unbroken[5:]
    assert len(set(unbroken)) == 9 and not set(unbroken) & set(batches(0, 9, rank=1))


class Scenes(Stream):
    """One scene, again and again: what differs is the augmentation."""

    def shard(self, index: int, count: int, epoch: int | None = None):
        for number in range(8)[index::count]:
            yield Sample(str(number), partial(ToyScenes(1).__getitem__, 0))


def taken(stream: Stream, batches: int, start: int = 0, workers: int = 2) -> list[list[int]]:
    data = streamed(stream, True, seed=5, world=2, rank=1, start=start, batch_size=3)
    loader = iter(DataLoader(data, batch_size=3, num_workers=workers, collate_fn=collate))
    return [numbers(next(loader)) for _ in range(batches)]


@pytest.mark.parametrize("start", [1, 4, 11])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_streamed_training_goes_on_where_it_was(start, workers) -> None:
    unbroken = taken(Numbers(40), start + 6, workers=workers)
    assert taken(Numbers(40), 6, start, workers) == unbroken[start:]


def test_a_streamed_training_shows_every_sample_of_an_epoch_before_the_next_one() -> None:
    seen = [number for batch in taken(Numbers(12), 4, workers=0) for number in batch]
    assert sorted(seen[:6]) == sorted(set(seen[:6])) and len(seen) == 12  # rank 1 of 2 has six of the twelve
    assert seen[:6] != seen[6:]


def test_batches_lie_in_memory_as_images_do() -> None:
    batch = collate([toy(transform=True)[Draw(index, index)] for index in range(2)])
    assert batch["image"].shape == (2, 3, 64, 64) and batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch["image"][1], toy(transform=True)[Draw(1, 1)]["image"])
    assert batch["mask"].shape == (2, 64, 64)
