"""Tables of images and masks: local parquet, arrow and saved folders made here; the hub itself is out of reach."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageColumn
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader, IterableDataset

from segformer.data.hub import PARQUET, RowStream, open_hub
from segformer.data.samples import Samples
from segformer.errors import UserError

COLUMNS = Features({"image": ImageColumn(), "annotation": ImageColumn(), "scene": ClassLabel(names=["indoor", "out"])})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the home folder; the environment is read only once, when `datasets` is imported."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def pixels(number: int, height: int = 6, width: int = 7) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def ids(number: int) -> np.ndarray:
    return np.random.default_rng(1000 + number).integers(0, 9, (6, 7), np.uint8)


def table(numbers: range, mask: str = "annotation", **more: list[Any]) -> Dataset:
    """Row r holds pixels(r) and ids(r); the first pixel of the image tells r, so that a row is known again."""
    images = [pixels(number) for number in numbers]
    for number, image in zip(numbers, images, strict=True):
        image[0, 0] = number
    features = Features({mask if name == "annotation" else name: kind for name, kind in COLUMNS.items()})
    columns = {"image": [Image.fromarray(one) for one in images], mask: [Image.fromarray(ids(n)) for n in numbers]}
    return Dataset.from_dict({**columns, "scene": [0] * len(numbers)} | more, features=features)


def layout(root: Path, files: int, rows: int, split: str = "train") -> Path:
    """A folder as on the hub: `rows` rows in so many parquet files of unequal sizes."""
    (root / "data").mkdir(parents=True, exist_ok=True)
    edges = [rows * number**2 // files**2 for number in range(files + 1)]
    for number in range(files):
        part = table(range(edges[number], edges[number + 1]))
        part.to_parquet(root / "data" / f"{split}-{number:05d}-of-{files:05d}.parquet")
    return root


def opened(*arguments: Any, **options: Any) -> Samples:
    source = open_hub(*arguments, **options)
    assert isinstance(source, Samples)
    return source


def streamed(*arguments: Any, **options: Any) -> RowStream:
    stream = open_hub(*arguments, streaming=True, **options)
    assert isinstance(stream, RowStream)
    return stream


def numbers(stream: RowStream, index: int, count: int, epoch: int | None = None) -> list[int]:
    """Which rows a part holds."""
    return [int(sample.read()[0][0, 0, 0]) for sample in stream.shard(index, count, epoch)]


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_hub(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_folder(tmp_path: Path) -> Path:
    DatasetDict(train=table(range(5)), validation=table(range(5, 7))).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def save_one(tmp_path: Path) -> Path:
    table(range(5)).save_to_disk(tmp_path / "one")
    return tmp_path / "one"


def save_arrow(tmp_path: Path) -> Path:
    return next(save_one(tmp_path).glob("*.arrow"))


def save_parquet(tmp_path: Path) -> Path:
    table(range(5)).to_parquet(tmp_path / "potholes.parquet")
    return tmp_path / "potholes.parquet"


@pytest.mark.parametrize(
    "make", [lambda path: layout(path / "own", 3, 5), save_folder, save_one, save_arrow, save_parquet]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_table_gives_its_rows(tmp_path: Path, make: Any, streaming: bool) -> None:
    root = make(tmp_path)
    source = open_hub(str(root), "train", streaming=streaming)
    if isinstance(source, RowStream):
        assert source.known_length() == (None if root.suffix == ".arrow" else 5)  # an arrow file has to be read for it
        found = [sample.read() for sample in source.shard(0, 1)]
    else:
        found = [source[index] for index in range(len(source))]  # type: ignore[arg-type, index]
    assert len(found) == 5
    for number, (image, mask) in enumerate(found):
        expected = pixels(number)
        expected[0, 0] = number
        np.testing.assert_array_equal(image, expected)
        np.testing.assert_array_equal(mask, ids(number))


def test_a_folder_of_images_and_masks_with_metadata_is_read(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / "own" / "train" / kind).mkdir(parents=True)
    Image.fromarray(pixels(0)).save(tmp_path / "own/train/images/a.png")
    Image.fromarray(ids(0)).save(tmp_path / "own/train/masks/a.png")
    (tmp_path / "own/train/metadata.csv").write_text("file_name,mask_file_name\nimages/a.png,masks/a.png\n")
    source = opened(str(tmp_path / "own"), "train")
    np.testing.assert_array_equal(source[0][0], pixels(0))
    np.testing.assert_array_equal(source[0][1], ids(0))
    Image.fromarray(ids(1)).save(tmp_path / "own/train/masks/a.png")
    assert opened(str(tmp_path / "own"), "train").stamp(0) != source.stamp(0)
    (tmp_path / "own/train/masks/a.png").unlink()
    with pytest.raises(UserError, match=r"cannot read mask .* train\[0\].mask: .*No such file"):
        opened(str(tmp_path / "own"), "train")[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_masks_are_read_as_they_were_stored_not_as_they_look(tmp_path: Path, streaming: bool) -> None:
    small, large = ids(0), ids(0).astype(np.uint16) * 300
    palette = Image.frombytes("P", (7, 6), small.tobytes())
    palette.putpalette([255 - value for value in range(256) for _ in range(3)])
    equal = small[..., None].repeat(3, 2)
    masks = []
    for mask in (Image.fromarray(small), palette, Image.fromarray(large), Image.fromarray(equal)):
        mask.save(tmp_path / "mask.png")
        masks.append({"bytes": (tmp_path / "mask.png").read_bytes(), "path": None})
    image = Image.fromarray(pixels(0))
    features = Features({"image": ImageColumn(), "label": ImageColumn()})
    rows = Dataset.from_dict({"image": [image] * 4, "label": masks}, features=features)
    rows.to_parquet(tmp_path / "own.parquet")
    source = open_hub(str(tmp_path / "own.parquet"), "train", streaming=streaming)
    if isinstance(source, RowStream):
        found = [sample.read()[1] for sample in source.shard(0, 1)]
    else:
        found = [source[index][1] for index in range(4)]  # type: ignore[index]
    for mask, expected in zip(found, (small, small, large, equal), strict=True):
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("kind", [Array2D((6, 7), "uint8"), List(List(Value("int32")))])
@pytest.mark.parametrize("streaming", [False, True])
def test_masks_stored_as_numbers_are_read(tmp_path: Path, kind: Any, streaming: bool) -> None:
    features = Features({"image": ImageColumn(), "labels": kind})
    columns = {"image": [Image.fromarray(pixels(n)) for n in range(3)], "labels": [ids(n).tolist() for n in range(3)]}
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "own.parquet")
    source = open_hub(str(tmp_path / "own.parquet"), "train", streaming=streaming)
    if isinstance(source, RowStream):
        found = [sample.read()[1] for sample in source.shard(0, 1)]
    else:
        found = [source.mask(index) for index in range(3)]  # type: ignore[union-attr]
    for number, mask in enumerate(found):
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, ids(number))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([[1, 2], [3]], "expected (H, W) of integers"),
        ([[-1, 70000]], "holds values from -1 to 70000, expected 0 to 65535"),
        ([], "expected (H, W) of integers"),
    ],
)
def test_numbers_that_are_no_mask_are_one_sentence(tmp_path: Path, values: Any, told: str) -> None:
    features = Features({"image": ImageColumn(), "labels": List(List(Value("int32")))})
    rows = Dataset.from_dict({"image": [Image.fromarray(pixels(0))], "labels": [values]}, features=features)
    rows.to_parquet(tmp_path / "own.parquet")
    with pytest.raises(UserError) as caught:
        opened(str(tmp_path / "own.parquet"), "train").mask(0)
    assert f"{tmp_path}/own.parquet train[0].labels" in str(caught.value) and told in str(caught.value)


def test_bytes_that_another_program_wrote_are_images(tmp_path: Path) -> None:
    """Pandas and others write no column types of `datasets`: plain bytes, or a struct of bytes and path."""
    Image.fromarray(pixels(0)).save(tmp_path / "a.png")
    Image.fromarray(ids(0)).save(tmp_path / "b.png")
    image, mask = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    features = Features({"img": Value("binary"), "mask": {"bytes": Value("binary"), "path": Value("string")}})
    rows = Dataset.from_dict({"img": [image], "mask": [{"bytes": mask, "path": "b.png"}]}, features=features)
    rows.to_parquet(tmp_path / "own.parquet")
    found = opened(str(tmp_path / "own.parquet"), "train")[0]
    np.testing.assert_array_equal(found[0], pixels(0))
    np.testing.assert_array_equal(found[1], ids(0))


def test_names_stamps_and_sizes_tell_rows_apart(tmp_path: Path) -> None:
    root = layout(tmp_path / "own", 1, 3)
    source = opened(str(root), "train")
    assert source.name(1) == f"{root} train[1].image" and source.mask_name(1) == f"{root} train[1].annotation"
    assert source.size(1) == (6, 7) and source.labelled
    assert source.stamp(1) == opened(str(root), "train").stamp(1) != source.stamp(2)
    np.testing.assert_array_equal(source.mask(2), ids(2))
    assert source.image_bytes(0) != source.image_bytes(1)


def test_a_table_that_was_written_anew_is_read_anew_and_has_another_stamp(tmp_path: Path) -> None:
    path = tmp_path / "own.parquet"
    table(range(2)).to_parquet(path)
    before = opened(str(path), "train").stamp(0)
    table(range(7, 12)).to_parquet(path)
    after = opened(str(path), "train")
    assert len(after) == 5 and after.stamp(0) != before
    np.testing.assert_array_equal(after.mask(0), ids(7))


def test_workers_of_a_loader_read_rows(tmp_path: Path) -> None:
    source = opened(str(layout(tmp_path / "own", 2, 6)), "train")
    loader = DataLoader(source, batch_size=None, num_workers=2)  # type: ignore[arg-type, var-annotated]
    for number, (_, mask) in enumerate(loader):
        np.testing.assert_array_equal(mask, ids(number))


def test_tables_and_streams_travel_to_other_processes(tmp_path: Path) -> None:
    """As where workers are spawned; what travels is where the rows lie, not the rows."""
    root = str(layout(tmp_path / "own", 2, 60))
    source = pickle.dumps(opened(root, "train"))
    np.testing.assert_array_equal(pickle.loads(source).mask(5), ids(5))
    assert len(source) < 10_000
    assert numbers(pickle.loads(pickle.dumps(streamed(root, "train"))), 1, 2) == numbers(streamed(root, "train"), 1, 2)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_row_is_one_sentence_that_names_it_and_the_others_are_read(tmp_path: Path, streaming: bool) -> None:
    whole = table(range(3)).cast_column("annotation", ImageColumn(decode=False))
    masks = [row["annotation"]["bytes"] for row in whole]
    masks[1] = masks[1][: len(masks[1]) // 2]
    rows = {"image": whole["image"], "annotation": [{"bytes": one, "path": None} for one in masks]}
    features = Features({name: COLUMNS[name] for name in rows})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "own.parquet")
    source = open_hub(str(tmp_path / "own.parquet"), "train", streaming=streaming)
    if isinstance(source, RowStream):
        reads = [sample.read for sample in source.shard(0, 1)]
    else:
        reads = [lambda number=number: source[number] for number in range(3)]  # type: ignore[misc, index]
    place = r"\[file 0, row 1\]" if streaming else r"\[1\]"
    with pytest.raises(UserError, match=rf"cannot read mask .*own.parquet train{place}\.annotation: "):
        reads[1]()
    np.testing.assert_array_equal(reads[2]()[1], ids(2))


def test_a_row_without_a_mask_and_one_of_another_size_are_one_sentence_each(tmp_path: Path) -> None:
    masks = [None, Image.fromarray(np.zeros((7, 6), np.uint8))]
    images = [Image.fromarray(pixels(number)) for number in range(2)]
    features = Features({"image": ImageColumn(), "label": ImageColumn()})
    Dataset.from_dict({"image": images, "label": masks}, features=features).to_parquet(tmp_path / "own.parquet")
    source = opened(str(tmp_path / "own.parquet"), "train")
    with pytest.raises(UserError, match=r"train\[0\]\.label is empty: "):
        source[0]
    with pytest.raises(UserError, match=r"train\[1\]\.image .*7x6 but its mask .*train\[1\]\.label is 6x7"):
        source[1]
    samples = list(streamed(str(tmp_path / "own.parquet"), "train").shard(0, 1))
    with pytest.raises(UserError, match=r"row 1\]\.image .*7x6 but its mask .*row 1\]\.label is 6x7"):
        samples[1].read()


@pytest.mark.parametrize("files", [1, 3, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("epoch", [None, 0, 7])
def test_the_parts_of_a_stream_hold_each_row_once(tmp_path: Path, files: int, count: int, epoch: int | None) -> None:
    stream = streamed(str(layout(tmp_path / "own", files, 41)), "train")
    parts = [[sample.name for sample in stream.shard(index, count, epoch)] for index in range(count)]
    names = [name for part in parts for name in part]
    assert len(names) == len(set(names)) == 41 == stream.known_length()


def test_as_many_parts_as_files_read_one_file_each_and_more_parts_share_them(tmp_path: Path) -> None:
    stream = streamed(str(layout(tmp_path / "own", 4, 32)), "train")

    def files(index: int, count: int) -> set[str]:
        return {sample.name.partition(", row")[0] for sample in stream.shard(index, count)}

    assert [len(files(index, 4)) for index in range(4)] == [1] * 4
    assert [len(files(index, 2)) for index in range(2)] == [2] * 2
    assert [len(files(index, 8)) for index in range(8)] == [1] * 8
    alike = [len(list(stream.shard(index, 5))) for index in range(5)]  # no files go round: every fifth row
    assert max(alike) - min(alike) <= 1


class Part(IterableDataset[int]):
    """What a training process hands its loader: the part follows from the process and the worker."""

    def __init__(self, stream: RowStream, rank: int, epoch: int | None) -> None:
        self.stream, self.rank, self.epoch = stream, rank, epoch

    def __iter__(self) -> Iterator[int]:
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        assert worker is not None
        return iter(numbers(self.stream, self.rank * worker.num_workers + worker.id, 4, self.epoch))


@pytest.mark.parametrize("files", [1, 3, 5])
@pytest.mark.parametrize("epoch", [None, 3])
def test_two_processes_with_two_workers_each_see_every_row_once(tmp_path: Path, files: int, epoch: int | None) -> None:
    """`datasets` deals its files out to the workers of a DataLoader by itself: it must not happen twice."""
    stream = streamed(str(layout(tmp_path / "own", files, 23)), "train")
    seen = [
        number
        for rank in range(2)
        for number in DataLoader(Part(stream, rank, epoch), batch_size=None, num_workers=2)  # type: ignore[var-annotated]
    ]
    assert sorted(seen) == list(range(23))


def test_an_epoch_has_its_own_order_which_comes_again(tmp_path: Path) -> None:
    root = str(layout(tmp_path / "own", 3, 200))
    first, again = streamed(root, "train"), streamed(root, "train")
    assert numbers(first, 0, 2, 4) == numbers(again, 0, 2, 4)
    orders = {tuple(numbers(first, 0, 1, epoch)) for epoch in (None, 0, 1)}
    assert len(orders) == 3 and tuple(range(200)) in orders


def test_the_length_is_that_of_the_parquet_files_else_what_the_card_says(tmp_path: Path) -> None:
    root = layout(tmp_path / "own", 2, 6)
    splits = "dataset_info:\n  splits:\n  - name: train\n    num_bytes: 9\n    num_examples: 99\n"
    (root / "README.md").write_text(f"---\n{splits}---\n")
    assert streamed(str(root), "train").known_length() == 6
    save_arrow(tmp_path).rename(tmp_path / "train.arrow")
    for path in (root / "data").iterdir():
        path.unlink()
    (tmp_path / "train.arrow").rename(root / "data" / "train.arrow")
    stream = streamed(str(root), "train")
    assert stream.known_length() == 99 and numbers(stream, 0, 1) == list(range(5))


def test_a_stream_cut_short_is_one_sentence(tmp_path: Path) -> None:
    root = layout(tmp_path / "own", 2, 8)
    stream = streamed(str(root), "train")
    path = root / "data/train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cannot read file 1 of .*own train: .*; try again"):
        list(stream.shard(0, 1))
    assert len(list(stream.shard(0, 2))) == 2  # its file is whole


def test_a_damaged_parquet_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "own.parquet"
    table(range(4)).to_parquet(path)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-30])
    assert f"cannot load {path}: " in refused(str(path), "train")
    content[4:60] = bytes(56)  # of a page; the footer is whole
    path.write_bytes(content)
    assert f"cannot load {path}: " in refused(str(path), "train")


def test_an_unknown_split_is_one_sentence_that_lists_those_there_are(tmp_path: Path) -> None:
    layout(tmp_path / "own", 1, 2)
    root = str(layout(tmp_path / "own", 1, 2, "validation"))
    for streaming in (False, True):
        told = refused(root, "validatoin", streaming=streaming)
        assert told == (f"{root} has no split 'validatoin' (did you mean 'validation'?): it has train, validation")


def test_the_columns_are_found_by_name_and_type(tmp_path: Path) -> None:
    rows = table(range(2), mask="segmentation_mask").add_column("label", [3, 4])  # numbers are no mask
    rows.to_parquet(tmp_path / "own.parquet")
    np.testing.assert_array_equal(opened(str(tmp_path / "own.parquet"), "train").mask(1), ids(1))


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_by_other_names_are_refused_and_can_be_named(tmp_path: Path, streaming: bool) -> None:
    rows = table(range(2)).rename_columns({"image": "imageA", "annotation": "imageB"})
    rows.to_parquet(tmp_path / "own.parquet")
    root = str(tmp_path / "own.parquet")
    assert refused(root, "train", streaming=streaming) == (
        f"{root} train: no column may be the image, expected one Image column; it has imageA (Image), imageB (Image), "
        "scene (ClassLabel): name yours, data.train.image=... data.train.mask=..., and the same for data.val"
    )
    assert "no column is called 'ImageA' (did you mean 'imageA'?)" in refused(root, "train", image="ImageA")
    assert "column 'scene', a ClassLabel, is no mask" in refused(root, "train", image="imageA", mask="scene")
    open_hub(root, "train", image="imageA", mask="imageB", streaming=streaming)


def test_two_masks_are_refused(tmp_path: Path) -> None:
    rows = table(range(2))
    rows = rows.add_column("label", rows.cast_column("annotation", ImageColumn(decode=False))["annotation"])
    rows.cast_column("label", ImageColumn()).to_parquet(tmp_path / "own.parquet")
    assert "annotation and label may be the mask, expected one Image column" in refused(
        str(tmp_path / "own.parquet"), "train"
    )
    opened(str(tmp_path / "own.parquet"), "train", mask="label")[0]


def test_subsets_of_a_card_are_chosen_by_name(tmp_path: Path) -> None:
    root = tmp_path / "own"
    for name, numbers_ in (("scenes", range(3)), ("instances", range(3, 5))):
        (root / name).mkdir(parents=True)
        table(numbers_).to_parquet(root / name / "train.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/**\n" for name in ("scenes", "instances"))
    (root / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert refused(str(root), "train") == (
        f"{root} comes in several subsets: choose data.train.subset and data.val.subset from scenes, instances"
    )
    assert f"{root} has no subset 'scene' (did you mean 'scenes'?): choose" in refused(str(root), "train", "scene")
    source = opened(str(root), "train", "instances")
    assert len(source) == 2 and source.name(0) == f"{root} instances train[0].image"


def test_a_subset_of_the_hubs_parquet_copy_is_a_folder(tmp_path: Path) -> None:
    for name, numbers_ in (("scene_parsing", range(3)), ("instance_segmentation", range(3, 5))):
        (tmp_path / "own" / name / "train").mkdir(parents=True)
        table(numbers_).to_parquet(tmp_path / "own" / name / "train" / "0000.parquet")
    source = opened(str(tmp_path / "own"), "train", "scene_parsing", PARQUET)
    assert len(source) == 3


def test_what_cannot_be_opened_is_one_sentence_each(tmp_path: Path) -> None:
    assert refused(None, "train").startswith("data.root is not set: ")
    assert "cannot reach owner/name on the hub (" in refused("owner/name", "train")
    assert "cannot reach owner/name on the hub (" in refused("owner/name", "train", streaming=True)
    for missing in ("scene_parse_150", str(tmp_path / "nowhere"), "data/nowhere.parquet"):
        assert refused(missing, "train").startswith(f"data.root={missing} holds no dataset: expected a hub id")
    (tmp_path / "empty").mkdir()
    assert f"cannot load {tmp_path}/empty: " in refused(str(tmp_path / "empty"), "train")


def test_a_folder_that_is_not_whole_is_one_sentence(tmp_path: Path) -> None:
    root = layout(tmp_path / "own", 2, 6)
    splits = "dataset_info:\n  splits:\n  - name: train\n    num_bytes: 9\n    num_examples: 99\n"
    (root / "README.md").write_text(f"---\n{splits}---\n")
    assert f"{root} does not hold what its README declares (" in refused(str(root), "train")


def test_a_script_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert refused(str(tmp_path / "own"), "train") == (
        f"{tmp_path}/own is a dataset script, and code of a dataset is never run: read the parquet copy that the hub "
        f"keeps, data.train.revision={PARQUET} data.val.revision={PARQUET}, with a subset where it has several"
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "named", ["outside.png", "../outside.png", "http://127.0.0.1:9/a.png", "hf://datasets/a/b/c.png"]
)
def test_a_table_reads_no_file_that_is_not_its_own(tmp_path, named, streaming) -> None:
    (tmp_path / "table").mkdir()
    for folder in (tmp_path, tmp_path / "table"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "outside.png")
    path = str(tmp_path / "outside.png") if named == "outside.png" else named
    own = {"bytes": None, "path": str(tmp_path / "table" / "outside.png")}
    file = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])  # `datasets` itself embeds files
    columns = [pyarrow.array([one], file) for one in (own, {"bytes": None, "path": path})]
    parquet.write_table(pyarrow.table(columns, ["image", "label"]), tmp_path / "table" / "train.parquet")
    source = open_hub(tmp_path / "table", "train", streaming=streaming)
    with pytest.raises(UserError, match=r"label names the file '.*', expected one of data.root="):
        next(source.shard(0, 1)).read() if streaming else source[0]
    if not streaming:
        assert source.image(0).shape == (4, 4, 3)
