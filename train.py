"""python train.py model=b2 data=cityscapes data.root=/data/cityscapes"""

import os
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from segformer.errors import build, explained

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises what `explained` tells in one sentence


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
@explained()
def main(settings: DictConfig) -> float:
    """Composes the configuration, trains, and returns the best val/miou, which is what a sweep maximises."""
    launch = HydraConfig.get()
    config: dict[str, Any] = OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    config |= {"run": launch.runtime.output_dir, "choices": dict(launch.runtime.choices)}

    from lightning.pytorch import Trainer  # here, so that --help and a misspelt key are answered without torch

    from segformer import callbacks, resume
    from segformer.data.datamodule import SegmentationData
    from segformer.model import build_segformer
    from segformer.task import SegmentationTask

    callbacks.hush()
    with resume.run_folder(config, launch.overrides.task) as (run, config, checkpoint):
        own_sources = {split: instantiate(config["data"][split]) for split in ("train", "val")}
        data = build("data", SegmentationData, config["data"] | own_sources, seed=config["seed"])
        data.prepare("train", "val")
        model, origin = build("model", build_segformer, config["model"], names=data.classes.names)
        options = dict(config["trainer"])
        task = SegmentationTask(
            model, data.protocol, config["optim"], options["max_steps"], config["seed"], resume.record(model, config)
        )
        best, last = resume.best_checkpoint(run), resume.LastCheckpoint(run, options.pop("checkpoint_interval"), config)
        trainer = Trainer(
            callbacks=[callbacks.Progress(data.batch_size), callbacks.Previews(run, data.classes), best, last],
            logger=[callbacks.MetricsFile(run), *(instantiate(logger, save_dir=run) for logger in config["logger"].values())],
            plugins=[resume.AtomicCheckpointIO()],
            check_val_every_n_epoch=None,  # the order of samples is endless: intervals count steps
            use_distributed_sampler=False,  # ours neither pads nor repeats
            num_sanity_val_steps=0,
            enable_model_summary=False,
            **options,
        )
        print(f"{data.summary()}\n{origin}\nrun folder: {run}")
        trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
        return resume.closing_words(trainer, best)


if __name__ == "__main__":
    with explained():
        main()
