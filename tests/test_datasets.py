"""Each dataset as a user runs it: its YAML and a root, on a tree laid out as the real one is."""

import re
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest

from segformer.__main__ import main
from segformer.data.datamodule import SegmentationData
from segformer.data.sampler import Draw
from segformer.data.samples import Samples, Stream
from segformer.errors import UserError, build
from segformer.processor import SegformerImageProcessor
from tests import scripts, trees
from tests.conftest import ROOT, save
from tests.test_configs import DATASETS, composed
from tests.trees import TREES, Tree

here, run = scripts.here, scripts.run  # how scripts are run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the home folder; the environment is read only once, when `datasets` is imported."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def command(tree: Tree) -> list[str]:
    return [f"data={tree.data}", f"data.root='{tree.root}'", *tree.overrides]


def loaders(tree: Tree, *overrides: str) -> SegmentationData:
    return build("data", SegmentationData, composed(*command(tree), *overrides)["data"], seed=0)


def read(data: SegmentationData, split: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Image and train ids of every sample by its name."""
    opened = data.opened(split).datasets[split]
    if isinstance(opened, Stream):
        samples = [(one.name, one.name, *one.read()) for one in opened.shard(0, 1)]
    else:
        source = opened.source
        samples = [(source.name(index), source.mask_name(index), *source[index]) for index in range(len(source))]
    return {name: (image, data.encoder.whole(raw, mask)) for name, mask, image, raw in samples}


def test_every_dataset_has_a_tree(tmp_path: Path) -> None:
    read_by = {build_tree(tmp_path / name).data for name, build_tree in TREES.items()}
    assert read_by | {"toy", "imagenet"} == set(DATASETS)  # test_classification_data.py has folders of classes


@pytest.mark.parametrize("name", [name for name in TREES if name not in ("ade20k_test", "camvid_rgb")])
def test_a_dataset_is_read_as_its_tree_was_painted(name: str, tmp_path: Path) -> None:
    tree = TREES[name](tmp_path / "a root, ü")
    data = loaders(tree)
    for split, expected in tree.samples.items():
        found = read(data, split)
        assert data.images(split) == len(found) == len(expected)
        for ending, mask in expected.items():
            ((image, ids),) = [sample for sample_name, sample in found.items() if sample_name.endswith(ending)]
            assert image.dtype == ids.dtype == np.uint8 and image.shape == (*ids.shape, 3)
            assert np.array_equal(ids, mask), (ending, np.unique(ids), np.unique(mask))


def test_colours_are_merged_in_the_crops_of_training(tmp_path: Path) -> None:
    small = ["data.crop_size=64", "data.batch_size=2", "data.workers=0", "data.cat_max_ratio=1"]
    data = loaders(trees.camvid_rgb(tmp_path / "camvid"), *small).opened("train", "val")
    drawn = [data.datasets["train"][Draw(index, seed=index)] for index in range(8)]
    assert {(tuple(one["image"].shape), tuple(one["mask"].shape)) for one in drawn} == {((3, 64, 64), (64, 64))}
    assert {value for one in drawn for value in one["mask"].unique().tolist()} == {*range(11), 255}
    assert data.datasets["val"][0]["mask"].shape == (72, 96)


def test_camvids_frames_are_split_by_a_fixed_seed(tmp_path: Path) -> None:
    tree = trees.camvid_rgb(tmp_path / "camvid")
    splits = {split: read(loaders(tree), split) for split in ("train", "val")}
    assert {split: len(found) for split, found in splits.items()} == {"train": 8, "val": 2}
    assert len(splits["train"] | splits["val"]) == trees.FRAMES
    assert read(loaders(tree), "val").keys() == splits["val"].keys()
    for found in splits.values():
        for name, (_, ids) in found.items():
            (expected,) = [mask for ending, mask in tree.samples["train"].items() if name.endswith(ending)]
            assert np.array_equal(ids, expected)


def test_images_without_masks_are_read_and_not_scored(tmp_path: Path) -> None:
    tree = trees.ade20k_test(tmp_path / "release_test")
    data = loaders(tree)
    source = data.source("val")
    assert isinstance(source, Samples) and not source.labelled
    assert [source.image(index).shape for index in range(len(source))] == [(64, 80, 3)] * 2
    assert len(data.classes) == 150
    with pytest.raises(UserError, match=r"data.val has images without masks: they can be predicted, not scored"):
        data.opened("val")
    with pytest.raises(UserError, match=r"data.train is None, expected"):
        data.opened("train")


def test_unannotated_pixels_of_coco_ask_for_a_decision(tmp_path: Path) -> None:
    tree = trees.coco(tmp_path / "coco")
    objects = ["data.classes={person: {ids: [1]}, cat: {ids: [17]}, toothbrush: {ids: [90]}}"]
    with pytest.raises(UserError, match="^0 in 3254 of 5120 pixels"):
        read(loaders(tree._replace(overrides=objects)), "val")
    ignored = loaders(tree._replace(overrides=[*objects, "data.ignore=[0]"]))
    for name, (_, ids) in read(ignored, "val").items():
        (expected,) = [mask for ending, mask in tree.samples["val"].items() if name.endswith(ending)]
        assert np.array_equal(ids, expected - np.uint8(1))  # 0 - 1 = 255 in a byte


def test_segnets_own_lists_name_the_frames(tmp_path: Path) -> None:
    """Their lines are pairs of paths that start in a folder of SegNet's authors."""
    tree = trees.camvid_segnet(tmp_path / "camvid")
    data = loaders(tree, "+data.train.list=train.txt", "+data.val.list=val.txt")
    assert [len(read(data, split)) for split in ("train", "val")] == [3, 2]


SHORT = [*scripts.SHORT, "trainer.max_steps=5", "model=b0", "model.pretrained=null"]


def trained_and_scored(run, here: Path, tree: Tree, *overrides: str) -> dict:
    """The report of five steps of training, which must hold every class and every image of the validation split."""
    code, _, err = run(scripts.train, *command(tree), *SHORT, *overrides)
    assert code == 0, err
    report = scripts.report_of(run(scripts.evaluate, f"checkpoint={scripts.only_run(here) / 'best.ckpt'}"))
    assert [row["name"] for row in report["per_class"]] == list(loaders(tree, *overrides).classes.names)
    if "val" in tree.samples:
        labelled = sum(int((mask != 255).sum()) for mask in tree.samples["val"].values())
        assert report["images"] == len(tree.samples["val"])
        assert sum(row["pixels"] for row in report["per_class"]) == labelled
    return report


@pytest.mark.parametrize("name", ["zipped", "table", "hub_streamed"])
def test_what_is_no_folder_trains_and_is_scored(name: str, here, run, tmp_path: Path) -> None:
    trained_and_scored(run, here, TREES[name](tmp_path / "data"))


@pytest.mark.parametrize("name", ["camvid_segnet", "voc2012", "coco", "hub", "cocostuff164k", "mapillary_cityscapes"])
def test_a_dataset_trains_and_is_scored(name: str, here, run, tmp_path: Path) -> None:
    trained_and_scored(run, here, TREES[name](tmp_path / "data"))


def test_colours_train_and_are_scored(here, run, tmp_path: Path) -> None:
    tree = trees.camvid_rgb(tmp_path / "data")
    assert trained_and_scored(run, here, tree._replace(samples={}))["images"] == 2


@pytest.mark.slow  # half a minute, most of it in 101 frames of CamVid
@pytest.mark.parametrize("data", ["camvid", "ade20k", "cityscapes"])
def test_real_images_train_and_are_scored(data: str, here, run, shared: Path, tmp_path: Path) -> None:
    """Of the samples, which have validation images only, the same ones for training."""
    samples = {
        "camvid": ("camvid", ("images", "annotations"), {"train": "train", "val": "val"}),
        "ade20k": (
            "ade20k_sample/ADEChallengeData2016",
            ("images", "annotations"),
            {"training": "validation", "validation": "validation"},
        ),
        "cityscapes": ("cityscapes_sample", ("leftImg8bit", "gtFine"), {"train": "val", "val": "val"}),
    }
    folder, kinds, splits = samples[data]
    for kind in kinds:
        (tmp_path / "data" / kind).mkdir(parents=True)
        for split, there in splits.items():
            (tmp_path / "data" / kind / split).symlink_to(shared / folder / kind / there)
    report = trained_and_scored(run, here, Tree(data, tmp_path / "data", {}), "trainer.limit_val_batches=2")
    assert report["split_images"] == {"camvid": 101, "ade20k": 2, "cityscapes": 1}[data]
    assert 0 <= report["miou"] <= 1


def test_five_bands_train_are_scored_and_keep_their_statistics(here, run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for index in range(count):
            mask = rng.integers(0, 2, (6, 8)).astype(np.uint8).repeat(10, 0).repeat(10, 1)
            save(tmp_path / f"data/masks/{split}/{index}.png", mask)
            (tmp_path / f"data/images/{split}").mkdir(parents=True, exist_ok=True)
            np.save(
                tmp_path / f"data/images/{split}/{index}.npy", mask[..., None] * 90 + rng.integers(0, 9, 5, np.uint8)
            )
    statistics = ["data.mean=[50,50,50,50,10]", "data.std=[40,40,40,40,8]"]
    tree = Tree("folder", tmp_path / "data", {}, ["data.classes=[a,b]", "data.bands=5", *statistics])
    assert trained_and_scored(run, here, tree)["images"] == 3
    main(["convert", str(scripts.only_run(here) / "best.ckpt"), str(tmp_path / "hf")])
    processor = SegformerImageProcessor.from_pretrained(tmp_path / "hf")
    assert processor.image_mean == pytest.approx([50 / 255] * 4 + [10 / 255])
    assert processor.image_std == pytest.approx([40 / 255] * 4 + [8 / 255])


def test_a_hub_id_is_no_path(here, run) -> None:
    told = scripts.told(run(scripts.train, "data=hub", "data.root=owner/name", "data.classes=[a]", *SHORT))
    assert "cannot reach owner/name on the hub" in told  # HF_HUB_OFFLINE


DATA_PAGE = (ROOT / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", DATA_PAGE, re.DOTALL)


@pytest.mark.parametrize("line", [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()])
def test_the_commands_of_the_page_compose(line: str) -> None:
    words = shlex.split(line)
    overrides = [word for word in words if "=" in word]
    assert words[:2] == ["python", "train.py"] or words[:4] == ["python", "-m", "segformer", "check"]
    classes = [] if "train.py" in words else ["data.classes=[a]"] * ("data=folder" in words)
    build("data", SegmentationData, composed(*overrides, *classes)["data"])


def test_the_settings_of_the_page_build() -> None:
    """What its tables of mask values and of keys tell to add."""
    sections = dict(section.split("\n", 1) for section in DATA_PAGE.split("\n## "))
    tables = sections["What the values of a mask mean"] + sections["How samples are read, drawn and altered"]
    settings = [
        code for row in re.findall(r"^\|.*", tables, re.MULTILINE) for code in re.findall(r"`('?data.*?=.*?)`", row)
    ]
    assert len(settings) == 12
    for code in settings:
        named = [] if "data.classes=" in code else ["data.classes=[a]"]
        section = composed("data=folder", "data.root=x", *shlex.split(code), *named)["data"]
        build("data", SegmentationData, section)


@pytest.mark.parametrize("text", [block for kind, block in BLOCKS if kind == "yaml"])
def test_the_yamls_of_the_page_compose(text: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "own.yaml").write_text(text)
    section = composed("data=own", f"hydra.searchpath=[file://{tmp_path}]")["data"]
    assert section["classes"] == ["background", "pothole"] and section["check"] == 32
    build("data", SegmentationData, section)
