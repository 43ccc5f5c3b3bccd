"""What a survey counts, against plain numpy over the same files."""

import pickle
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from segformer.data.dataset import Encoder
from segformer.data.pairs import Pairs
from segformer.data.samples import Sample, Samples, Source, Stream
from segformer.data.statistics import Look, at_cells, class_pixels, spread, survey
from segformer.errors import UserError
from segformer.labels import Classes
from tests.conftest import save

TWO = Encoder(Classes.from_config(["background", "pothole"]))


@pytest.fixture
def pairs(potholes) -> Samples:
    return Pairs(potholes, "images/train/*", "masks/train/*")


@pytest.mark.parametrize("processes", [0, 2])
def test_values_sizes_and_names_are_those_of_the_files(pairs, processes) -> None:
    found = survey("train", pairs, TWO, processes=processes, quiet=True)
    assert (found.samples, found.whole, found.split) == (4, True, "train")
    for index, record in enumerate(found.records):
        mask = np.array(Image.open(pairs.mask_name(index)))
        assert record.values == {value: int((mask == value).sum()) for value in (0, 1)}
        assert (record.name, record.mask_name) == (pairs.name(index), pairs.mask_name(index))
        assert record.size == record.mask_size == mask.shape and record.distinct == 2 and not record.errors


@pytest.mark.parametrize("processes", [0, 2])
def test_mean_and_deviation_are_numpys_over_all_pixels(pairs, processes) -> None:
    found = survey("train", pairs, TWO, images="decoded", processes=processes, quiet=True)
    pixels = np.concatenate([pairs.image(index).reshape(-1, 3) for index in range(len(pairs))]).astype(np.float64)
    mean, std = found.moments()
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=0), rtol=1e-12)
    assert survey("train", pairs, TWO, quiet=True).moments() is None  # headers tell nothing of it


def test_class_pixels_are_those_of_the_encoded_masks(pairs) -> None:
    expected = [np.bincount(TWO.whole(pairs.mask(i), pairs.mask_name(i)).ravel(), minlength=2) for i in range(4)]
    counts = class_pixels(pairs, TWO, 0)
    assert counts.dtype == np.int64 and counts.tolist() == np.stack(expected).tolist()


def test_ids_that_stand_for_one_class_are_added_and_the_ignored_and_undeclared_are_left_out(tmp_path) -> None:
    save(tmp_path / "m.png", np.array([[7, 8, 8, 0], [9, 9, 9, 255]], np.uint8))
    save(tmp_path / "i.png", np.zeros((2, 4, 3), np.uint8))
    encoder = Encoder(Classes.from_config({"a": {"ids": [7, 8]}, "b": {"ids": [9]}}, [255]))
    assert class_pixels(Samples([(tmp_path / "i.png", tmp_path / "m.png")]), encoder, 0).tolist() == [[3, 3]]


def test_masks_named_as_train_ids_are_counted_as_such(tmp_path) -> None:
    save(tmp_path / "m_trainIds.png", np.array([[0, 1, 1, 255]], np.uint8))
    encoder = Encoder(Classes.from_config({"a": {"ids": [7]}, "b": {"ids": [8]}}), "*_trainIds.png")
    source = Samples([(tmp_path / "m_trainIds.png", tmp_path / "m_trainIds.png")])
    assert class_pixels(source, encoder, 0).tolist() == [[1, 2]]


def test_colours_are_counted_by_their_code(tmp_path) -> None:
    mask = np.zeros((2, 3, 3), np.uint8)
    mask[0], mask[1] = (1, 2, 3), (255, 0, 16)
    save(tmp_path / "m.png", mask)
    source = Samples([(tmp_path / "m.png", tmp_path / "m.png")])
    (record,) = survey("train", source, TWO, quiet=True).records
    assert record.colors and record.values == {0x010203: 3, 0xFF0010: 3}
    classes = Classes.from_config({"a": {"color": [1, 2, 3]}, "b": {"color": [255, 0, 16]}}, mask_values="colors")
    assert class_pixels(source, Encoder(classes), 0).tolist() == [[3, 3]]


def test_broken_files_are_told_and_end_nothing(pairs) -> None:
    image, mask = (name for name in (pairs.name(1), pairs.mask_name(2)))
    for name, left in ((image, 200), (mask, 0)):
        with open(name, "r+b") as file:
            file.truncate(left)
    turned = Image.open(pairs.name(3))
    turned.getexif()[0x0112] = 6
    turned.save(pairs.name(3), exif=turned.getexif())
    found = survey("train", pairs, TWO, images="decoded", processes=2, quiet=True)
    assert [len(record.errors) for record in found.records] == [0, 1, 1, 1]
    for record, text in zip(
        found.records[1:], (image, "the file is empty", "as its EXIF orientation says"), strict=True
    ):
        assert text in record.errors[0]
    assert found.records[1].values and found.records[3].values  # the masks of broken images still count


def test_the_same_image_under_two_names_is_found(pairs) -> None:
    with open(pairs.name(0), "rb") as one, open(pairs.name(3), "wb") as other:
        other.write(one.read())
    found = survey("train", pairs, TWO, images="decoded", quiet=True)
    assert found.twins() == [[pairs.name(0), pairs.name(3)]]


def test_a_class_is_lost_where_no_point_of_the_label_map_meets_it() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[8:16, 8:16], mask[:, 40] = 1, 2  # a block of two cells a side, and a line between the middles of cells
    assert set(np.unique(at_cells(mask, None))) == {0, 1}
    mask[:, 42] = 2  # now one lies on a middle: columns 2, 6, ..., 42, ...
    assert set(np.unique(at_cells(mask, None))) == {0, 1, 2}
    assert at_cells(mask, None).tolist() == mask[2::4, 2::4].tolist()
    assert at_cells(mask, (128, 128)).shape == (32, 32)  # the recipe enlarges: nothing is lost


def test_lost_classes_are_told_by_train_id(tmp_path) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 40] = 9
    save(tmp_path / "m.png", mask)
    encoder = Encoder(Classes.from_config({"a": {"ids": [0]}, "b": {"ids": [9]}}))
    source = Samples([(tmp_path / "m.png", tmp_path / "m.png")])
    assert survey("train", source, encoder, quiet=True).records[0].lost == (1,)
    assert survey("train", source, encoder, base_size=(256, 256), quiet=True).records[0].lost == ()


def test_a_part_is_spread_evenly_and_always_the_same() -> None:
    assert spread(10, None) == spread(10, 99) == list(range(10))
    assert spread(101, 5) == [0, 25, 50, 75, 100]
    assert len(spread(20_210, 32)) == 32 and spread(3, 1) == [0]


class _Numbers(Stream):
    """Ten samples, of which the sixth cannot be read."""

    def shard(self, index: int, count: int, epoch: int | None = None) -> Iterator[Sample]:
        for number in range(index, 10, count):
            yield Sample(f"row {number}", partial(_row, number))


def _row(number: int) -> tuple[np.ndarray, np.ndarray]:
    if number == 5:
        raise UserError("cannot read image row 5: broken")
    return np.full((4, 4, 3), number, np.uint8), np.full((4, 4), number % 2, np.uint8)


def test_a_stream_is_read_in_order_or_whole() -> None:
    first = survey("train", _Numbers(), TWO, samples=4, images="decoded", quiet=True)
    assert [record.name for record in first.records] == [f"row {number}" for number in range(4)]
    assert first.samples is None and not first.whole
    whole = survey("train", _Numbers(), TWO, images="decoded", processes=2, quiet=True)
    assert sorted(record.name for record in whole.records) == [f"row {number}" for number in range(10)]
    assert whole.whole and [record.errors for record in whole.records if record.errors] == [
        ["cannot read image row 5: broken"]
    ]


class _Own(Source):
    def __len__(self) -> int:
        return 3

    def name(self, index: int) -> str:
        return f"own {index}"

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return (np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8)) if index else {}["missing"]


def test_whatever_a_users_own_source_raises_is_told() -> None:
    found = survey("train", _Own(), TWO, quiet=True)
    assert found.records[0].errors[0] == "sample own 0 raises KeyError: 'missing'"
    assert [bool(record.errors) for record in found.records] == [True, False, False]


def test_a_look_leaves_the_random_numbers_of_the_training_alone_and_can_be_spawned(pairs) -> None:
    before = torch.random.get_rng_state()
    survey("train", pairs, TWO, processes=2, quiet=True)
    assert torch.equal(before, torch.random.get_rng_state())
    again = pickle.loads(pickle.dumps(Look(pairs, [1, 2], TWO, "header")))
    assert again[0] == Look(pairs, [1, 2], TWO, "header")[0]
