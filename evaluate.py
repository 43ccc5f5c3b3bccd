"""python evaluate.py checkpoint=runs/b0_toy/2026-11-20_12-00-00/best.ckpt"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from segformer.errors import build, explained

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises what `explained` tells in one sentence


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
@explained()
def main(settings: DictConfig) -> float:
    """Scores a checkpoint by its dataset's protocol, writes the report, returns the mIoU."""
    config: Any = OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
    return evaluate(config, own_data=HydraConfig.get().runtime.choices["data"])  # NAME of data=NAME, or None


def evaluate(config: dict[str, Any], own_data: str | None) -> float:
    from lightning.pytorch import Trainer  # not above: --help and a misspelt key need no torch

    from segformer import callbacks, checkpoints, files, launch, report, states
    from segformer.data import check, datamodule
    from segformer.inference import Protocol
    from segformer.model import SegformerForSemanticSegmentation
    from segformer.task import SegmentationTask

    source, (_, options) = files.absolute(config["checkpoint"]), states.Steering.split(config["trainer"])
    trained = checkpoints.training_config(source, needed=own_data is None)
    section = instantiate(config["data"], _convert_="all") if own_data else trained["data"]
    data = check.quick(build("data", datamodule.SegmentationData, section).opened("val"))
    model = SegformerForSemanticSegmentation.from_pretrained(source)
    data.classes.require(model.config.id2label.values(), source)
    if options["precision"] == "checkpoint":
        options["precision"] = trained.get("trainer", {}).get("precision", "32-true")
    changes = {key: value for key, value in config["protocol"].items() if value != "dataset"}
    task = SegmentationTask(model, build("protocol", Protocol, asdict(data.protocol) | changes))
    own = {"callbacks": [callbacks.Progress(1)], "logger": False, "use_distributed_sampler": False}
    trainer = build("trainer", Trainer, options, **own)
    trainer.validate(task, data, verbose=False)
    launch.disconnect()
    if trainer.is_global_zero:
        name = own_data or trained["choices"]["data"]
        facts = {"checkpoint": str(source), "data": name, "precision": options["precision"]}
        facts["split_images"] = data.images("val")
        folder = files.new_folder(Path(config["output"], f"{checkpoints.model_name(source, trained)}_{name}"))
        report.write_report(folder, task.scores, data.classes.names, task.images_scored, task.protocol, facts)
    return task.scores.miou


if __name__ == "__main__":
    with explained():
        main()
