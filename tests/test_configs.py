"""Every YAML is opened, composed and built into what it configures."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from segformer import kinds
from segformer.config import VARIANTS
from segformer.data.datamodule import SegmentationData
from segformer.data.sampler import Sampling
from segformer.errors import build
from segformer.labels import Classes, UndeclaredValues
from segformer.networks import build_segformer
from segformer.optim import adamw
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"
DATASETS = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))
PAPER = {
    "lr": 6e-5, "betas": [0.9, 0.999], "weight_decay": 0.01, "head_lr_multiplier": 10, "warmup_steps": 1500,
    "warmup_ratio": 1e-6, "power": 1.0, "loss_denominator": "all",
    "class_weights": None, "label_smoothing": 0.0, "ohem_threshold": None, "ohem_min_kept": 100_000, "dice_weight": 0.0,
}  # fmt: skip
NETWORK = {"classifier_dropout_kind": "channel", "layer_norm_eps_kind": "hf", "merged_decode": True, "freeze": []}
NETWORK |= {"gradient_checkpointing": False, "compile": False}
MINIMAL = {name: ["data.classes=[background,pothole]"] for name in ("folder", "csv", "hub", "coco", "imagenet")}


def composed(*overrides: str, name: str = "train", missing: bool = False) -> dict:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        settings = compose(name, list(overrides), return_hydra_config=False)
    return OmegaConf.to_container(settings, resolve=True, throw_on_missing=not missing)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_file_is_reached_by_a_choice(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)
    group = path.parent.name
    if group != "configs":
        overrides = [f"{group}={path.stem}", *(MINIMAL.get(path.stem, []) if group == "data" else [])]
        name = "evaluate" if group == "corruptions" else "train"
        composed(*overrides, name=name, missing=True)


@pytest.mark.parametrize("data", DATASETS)
def test_every_dataset_builds_its_loaders_optimiser_and_network(data: str) -> None:
    config = composed(f"data={data}", "data.root=/data", *MINIMAL.get(data, []), "model.pretrained=null")
    kind = kinds.kind(config["task"])
    loaders = build("data", kind.data, config["data"], seed=config["seed"])
    model, _ = build("model", kind.network, config["model"], **loaders.network)
    assert model.config.num_labels == len(config["data"]["classes"])
    options = {key: value for key, value in config["optim"].items() if key not in kind.task.LOSS}
    build("optim", adamw, options, model=model, max_steps=config["trainer"]["max_steps"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_choices_are_the_variants_with_their_pretrained_encoder(variant: str) -> None:
    model = composed(f"model={variant}", "data=folder", "data.root=x", *MINIMAL["folder"])["model"]
    assert model == {"variant": variant, "pretrained": f"nvidia/mit-{variant}", "drop_path_rate": 0.1, **NETWORK}


def test_the_defaults_are_the_papers() -> None:
    config = composed("data=folder", "data.root=x", *MINIMAL["folder"])
    assert config["optim"] == PAPER
    assert config["data"]["scale"] == [0.5, 2.0] and config["data"]["cat_max_ratio"] == 0.75


# the paper's recipe and protocol: crop, base (long, short), protocol size, align, window, stride
ADE = {"crop": 512, "base": [2048, 512], "protocol": {"size": [2048, 512], "align": 32, "window": None, "stride": None}}
ADE_B5 = {"crop": 640, "base": [2048, 640], "protocol": ADE["protocol"] | {"size": [2048, 640]}}
STREET = {
    "crop": 1024, "base": [2048, 1024], "protocol": {"size": None, "align": 1, "window": 1024, "stride": 768}
}  # fmt: skip
BATCH = {"ade20k": 16, "cityscapes": 8}
EVERY = {"ade20k": 16_000, "cityscapes": 4_000}  # steps between validations


@pytest.mark.parametrize("data", BATCH)
@pytest.mark.parametrize("variant", VARIANTS)
def test_model_and_data_by_one_word_each_are_the_papers_recipe(variant, data) -> None:
    config = composed(f"model={variant}", f"data={data}", "data.root=/data")
    expected = STREET if data == "cityscapes" else ADE_B5 if variant == "b5" else ADE
    section = config["data"]
    assert {"crop": section["crop_size"], "base": section["base_size"], "protocol": section["protocol"]} == expected
    assert (section["batch_size"], section["scale"], section["cat_max_ratio"]) == (BATCH[data], [0.5, 2.0], 0.75)
    network = {"variant": variant, "pretrained": f"nvidia/mit-{variant}", "drop_path_rate": 0.1, **NETWORK}
    assert config["model"] == network
    assert config["optim"] == PAPER
    trainer = config["trainer"]
    assert (trainer["max_steps"], trainer["val_check_interval"], trainer["checkpoint_interval"]) == (
        160_000, EVERY[data], 4_000
    )  # fmt: skip
    assert (trainer["precision"], trainer["fast_dev_run"], trainer["limit_val_batches"]) == ("32-true", False, 1.0)


def test_how_samples_are_read_by_default_is_the_same_in_python_and_yaml() -> None:
    schema = inspect.signature(SegmentationData).parameters
    loading = yaml.safe_load((CONFIGS / "loading.yaml").read_text())
    silent = {"augment": (), "sampling": None, "check": 0}  # what a script of one's own gets
    assert loading == {key: schema[key].default for key in loading} | {key: loading[key] for key in silent}
    assert silent == {key: schema[key].default for key in silent}
    assert build("data.sampling", Sampling, loading["sampling"]) == Sampling()


def test_the_head_of_a_training_run_drops_whole_channels() -> None:
    model, _ = build("model", build_segformer, {"variant": "b0"}, names=["a", "b"])
    assert isinstance(model.decode_head.dropout, torch.nn.Dropout2d) and model.decode_head.dropout.p == 0.1


PUBLISHED = {
    "ade20k": "ADE20KDataset", "cityscapes": "CityscapesDataset", "cityscapes_coarse": "CityscapesDataset",
    "mapillary_cityscapes": "CityscapesDataset", "voc2012": "PascalVOCDataset", "voc2012_aug": "PascalVOCDataset",
    "cocostuff164k": "COCOStuffDataset", "mapillary": "MapillaryDataset_v1",
}  # fmt: skip
LABEL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


@pytest.mark.parametrize("data", PUBLISHED)
def test_class_tables_are_the_published_ones(data, shared) -> None:
    table = json.loads((shared.parent / "classes.json").read_text())[PUBLISHED[data]]
    classes = composed(f"data={data}", "data.root=/data")["data"]["classes"]
    count = len(table["classes"]) - (data == "mapillary")  # whose last one is Unlabeled
    assert list(classes) == table["classes"][:count]
    assert [entry["color"] for entry in classes.values()] == table["palette"][:count]


def test_raw_ids_are_the_published_ones() -> None:
    ade = Classes.from_config(*contract("ade20k"))
    assert len(ade) == 150
    assert ade.encode(np.arange(151)[None]).tolist() == [[255, *range(150)]]
    street = Classes.from_config(*contract("cityscapes"))
    expected = [LABEL_IDS.index(raw) if raw in LABEL_IDS else 255 for raw in range(34)]
    assert len(street) == 19 and street.encode(np.arange(34)[None]).tolist() == [expected]
    assert street.encode(np.array([[255]])).tolist() == [[255]]  # the licence plate, -1 in a byte
    voc = Classes.from_config(*contract("voc2012"))
    assert voc.encode(np.array([[*range(21), 255]])).tolist() == [[*range(21), 255]]
    vistas = Classes.from_config(*contract("mapillary"))
    assert vistas.encode(np.arange(66)[None]).tolist() == [[*range(65), 255]]


def test_the_ids_of_coco_stuff_leave_out_what_was_never_annotated() -> None:
    """Things are the 80 categories of COCO, less one; stuff follows without a gap."""
    stuff = Classes.from_config(*contract("cocostuff164k"))
    ids = [int(np.flatnonzero(stuff.lookup == place)[0]) for place in range(len(stuff))]
    gaps = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
    assert len(stuff) == 171 and ids == [raw for raw in range(182) if raw not in gaps]
    label = dict(zip(stuff.names, ids, strict=True))
    known = {"person": 1, "stop sign": 13, "backpack": 27, "dining table": 67, "toothbrush": 90, "banner": 92,
             "sky-other": 157, "wood": 182}  # fmt: skip
    assert {name: label[name] + 1 for name in known} == known
    with pytest.raises(UndeclaredValues, match="11 in 1 of 1 pixels"):
        stuff.encode(np.array([[11]]))


def test_the_colours_of_camvid_are_merged_once_each() -> None:
    section = composed("data=camvid_rgb", "data.root=/data")["data"]
    listed = [tuple(color) for entry in section["classes"].values() for color in entry["colors"]]
    assert len(listed) == len(set(listed)) == 31 and (0, 0, 0) not in listed  # 32 with Void
    assert list(section["classes"]) == list(composed("data=camvid", "data.root=/data")["data"]["classes"])


@pytest.mark.parametrize(
    ("data", "base", "changed"),
    [
        ("voc2012_aug", "voc2012", {"train"}),
        ("ade20k_test", "ade20k", {"train", "val"}),
        ("cityscapes_coarse", "cityscapes", {"train"}),
        ("camvid_segnet", "camvid", {"train", "val"}),
        (
            "mapillary_cityscapes",
            "cityscapes",
            {"train", "val", "train_ids", "ignore", "protocol", "classes", "instances", "published"},
        ),
        ("hub", "folder", {"train", "val"}),
        ("csv", "folder", {"train", "val"}),
        ("coco", "folder", {"train", "val"}),
    ],
)
def test_a_dataset_is_another_one_but_for_what_it_says(data: str, base: str, changed: set[str]) -> None:
    ours, theirs = (composed(f"data={name}", "data.root=/data", *MINIMAL.get(name, [])) for name in (data, base))
    assert {key for key, value in ours["data"].items() if value != theirs["data"][key]} == changed
    assert {key: ours[key] for key in ours if key != "data"} == {key: theirs[key] for key in theirs if key != "data"}


def contract(data: str) -> tuple:
    section = composed(f"data={data}", "data.root=/data")["data"]
    return section["classes"], section["ignore"]


def test_the_command_line_beats_the_dataset_and_the_dataset_the_defaults() -> None:
    assert (
        composed()["trainer"]["max_steps"]
        == yaml.safe_load((CONFIGS / "data/toy.yaml").read_text())["trainer"]["max_steps"]
    )
    assert composed("trainer.max_steps=7")["trainer"]["max_steps"] == 7
    assert composed("trainer=debug")["trainer"]["fast_dev_run"] == 2


def test_a_run_folder_is_named_by_model_and_data() -> None:
    text = (CONFIGS / "train.yaml").read_text()
    assert "runs/${hydra:runtime.choices.model}_${hydra:runtime.choices.data}/" in text
