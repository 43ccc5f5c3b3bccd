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
        config: Any = OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
        config |= {"run": launch.runtime.output_dir, "choices": dict(launch.runtime.choices)}
        return train(config, launch.overrides.task)


def train(config: Any, overrides: list[str]) -> float:
    from lightning.pytorch import Trainer, seed_everything  # not above: --help and a misspelt key need no torch

    from segformer import callbacks, resume
    from segformer.data.datamodule import SegmentationData
    from segformer.model import build_segformer
    from segformer.task import SegmentationTask

    run, config, checkpoint = resume.run_folder(config, overrides)
    seed, options = seed_everything(config["seed"], verbose=False), dict(config["trainer"])
    own_sources = {split: instantiate(config["data"][split]) for split in ("train", "val")}
    data = build("data", SegmentationData, config["data"] | own_sources, seed=seed).opened("train", "val")
    model, origin = build("model", build_segformer, config["model"], names=data.classes.names)
    record = resume.record(model, config)
    task = SegmentationTask(model, data.protocol, config["optim"], options["max_steps"], seed, record)
    best, last = resume.best_checkpoint(run), resume.LastCheckpoint(run, options.pop("checkpoint_interval"), config)
    own = {
        "callbacks": [callbacks.Progress(data.batch_size), callbacks.Previews(run, data.classes), best, last],
        "logger": [callbacks.MetricsFile(run), *(instantiate(log, save_dir=run) for log in config["logger"].values())],
        "plugins": [resume.AtomicCheckpointIO()],
        "check_val_every_n_epoch": None,  # the order of samples is endless: intervals count steps
        "use_distributed_sampler": False,  # ours neither pads nor repeats
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
    }
    trainer = build("trainer", Trainer, options, **own)
    trainer.print(f"{data.summary()}\n{origin}\nrun folder: {run}")
    trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
    return resume.closing_words(trainer, best)


if __name__ == "__main__":
    with explained():
        main()
