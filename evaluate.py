"""python evaluate.py checkpoint=runs/b0_toy/2026-11-20_12-00-00/best.ckpt"""

import os
from dataclasses import asdict
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from segformer.errors import build, explained
from segformer.launch import end_with_parent

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises what `explained` tells in one sentence


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
@explained()
def main(settings: DictConfig) -> float | None:
    """Scores a checkpoint by its dataset's protocol, writes the report, returns the mIoU."""
    config: Any = OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
    return evaluate(config, own_data=HydraConfig.get().runtime.choices["data"])  # NAME of data=NAME, or None


def evaluate(config: dict[str, Any], own_data: str | None) -> float | None:
    from lightning.pytorch import Trainer  # not above: --help and a misspelt key need no torch

    from segformer import callbacks, evaluation, launch, states
    from segformer.data import check, datamodule
    from segformer.inference import Protocol
    from segformer.task import SegmentationTask

    job, (_, options) = evaluation.Job(config, own_data), states.Steering.split(config["trainer"])
    section = instantiate(config["data"], _convert_="all") if own_data else job.trained["data"]
    data = build("data", datamodule.SegmentationData, section)
    data.labels_needed = not config["submission"]
    check.quick(data.opened("val"))
    if config["predictions"]:
        return job.report(evaluation.read(data, config["predictions"], config["predictions_values"]))
    plan = evaluation.plan(config, data)
    changes = {key: value for key, value in config["protocol"].items() if value != "dataset"}
    protocol = build("protocol", Protocol, asdict(data.protocol) | changes)
    task = SegmentationTask(job.network(data.classes), protocol)
    counting = evaluation.Counting(data, config["submission"], job.output)
    own = {"callbacks": [callbacks.Progress(1), counting], "logger": False, "use_distributed_sampler": False}
    trainer = build("trainer", Trainer, options | {"precision": job.precision}, **own)
    evaluation.validate(trainer, task, data)
    miou = job.report(counting, task)
    if plan:
        counting.done = True  # of corrupted images the score alone is kept
        job.robustness(evaluation.corrupted(trainer, task, data, plan), miou)
    launch.disconnect()
    return miou


if __name__ == "__main__":
    end_with_parent()
    with explained():
        main()
