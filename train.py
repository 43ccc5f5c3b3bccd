"""python train.py model=b2 data=cityscapes data.root=/data/cityscapes"""

import os
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from segformer.errors import build, explained, tidy

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises what `explained` tells in one sentence


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
@explained()
def main(settings: DictConfig) -> float:
    """Composes the configuration, trains, and returns the best val/miou, which is what a sweep maximises."""
    launch = HydraConfig.get()
    with tidy(launch.runtime.output_dir):
        config: Any = OmegaConf.to_container(settings, resolve=True, throw_on_missing=not settings.resume)
        config |= {"run": launch.runtime.output_dir, "choices": dict(launch.runtime.choices)}
        return train(config, launch.overrides.task)


def train(config: Any, overrides: list[str]) -> float:
    from lightning.pytorch import Trainer, seed_everything  # not above: --help and a misspelt key need no torch

    from segformer import callbacks, resume
    from segformer.data import check, datamodule
    from segformer.model import build_segformer
    from segformer.task import SegmentationTask

    run, config, checkpoint = resume.run_folder(config, overrides)
    seed, options, optim = seed_everything(config["seed"], verbose=False), dict(config["trainer"]), config["optim"]
    section = instantiate(config["data"], _convert_="all")  # builds a `_target_` of the user's own, if there is one
    data = check.quick(build("data", datamodule.SegmentationData, section, seed=seed).opened("train", "val"))
    model, origin = build("model", build_segformer, resume.start(config, checkpoint), **data.network)
    task = SegmentationTask(model, data.protocol, optim, options["max_steps"], seed, resume.record(model, config))
    best, last = resume.BestCheckpoint(run), resume.LastCheckpoint(run, options.pop("checkpoint_interval"), config)
    loggers = [instantiate(log, _convert_="all", save_dir=run) for log in config["logger"].values()]
    own = {
        "callbacks": [callbacks.Progress(data.batch_size), callbacks.Previews(run, data.classes), best, last],
        "logger": [callbacks.MetricsFile(run), *loggers],
        "plugins": [resume.AtomicCheckpointIO()],
    }
    trainer = build("trainer", Trainer, options, **own, **resume.LOOP)
    resume.share_batches(trainer, data)
    if trainer.is_global_zero:
        print(data.summary(trainer.world_size), task.summary(), sep="\n")
        print(f"goes on from {checkpoint}" if checkpoint else origin, f"run folder: {run}", sep="\n")
    trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
    return resume.closing_words(trainer, best)


if __name__ == "__main__":
    with explained():
        main()
