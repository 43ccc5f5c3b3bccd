"""Every YAML is opened, composed and built into what it configures."""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from segformer.config import VARIANTS
from segformer.data.datamodule import SegmentationData
from segformer.errors import build
from segformer.model import build_segformer
from segformer.optim import adamw
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"
DATASETS = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))
MINIMAL = {"folder": ["data.classes=[background,pothole]"]}


def composed(*overrides: str, name: str = "train", missing: bool = False) -> dict:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        settings = compose(name, list(overrides), return_hydra_config=False)
    return OmegaConf.to_container(settings, resolve=True, throw_on_missing=not missing)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_file_is_reached_by_a_choice(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)
    group = path.parent.name
    if group != "configs":
        overrides = [f"{group}={path.stem}", *(MINIMAL.get(path.stem, []))]
        composed(*overrides, missing=True)


@pytest.mark.parametrize("data", DATASETS)
def test_every_dataset_builds_its_loaders_optimiser_and_network(data: str) -> None:
    config = composed(f"data={data}", "data.root=/data", *MINIMAL.get(data, []), "model.pretrained=null")
    loaders = build("data", SegmentationData, config["data"], seed=config["seed"])
    model, _ = build("model", build_segformer, config["model"], names=loaders.classes.names)
    assert model.config.num_labels == len(config["data"]["classes"])
    options = {key: value for key, value in config["optim"].items() if key != "loss_denominator"}
    build("optim", adamw, options, model=model, max_steps=config["trainer"]["max_steps"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_choices_are_the_variants_with_their_pretrained_encoder(variant: str) -> None:
    model = composed(f"model={variant}", "data=folder", "data.root=x", *MINIMAL["folder"])["model"]
    assert model == {"variant": variant, "pretrained": f"nvidia/mit-{variant}", "drop_path_rate": 0.1}


def test_the_defaults_are_the_papers() -> None:
    config = composed("data=folder", "data.root=x", *MINIMAL["folder"])
    assert config["optim"] == {
        "lr": 6e-5, "betas": [0.9, 0.999], "weight_decay": 0.01, "head_lr_multiplier": 10, "warmup_steps": 1500,
        "warmup_ratio": 1e-6, "power": 1.0, "loss_denominator": "all",
    }  # fmt: skip
    assert config["data"]["scale"] == [0.5, 2.0] and config["data"]["cat_max_ratio"] == 0.75


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
