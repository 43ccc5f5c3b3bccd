"""python train.py model=b2 data=cityscapes data.root=/data/cityscapes"""

import os
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from segformer.errors import build, explained
from segformer.launch import end_with_parent, tidy

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises what `explained` tells in one sentence


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
@explained()
def main(settings: DictConfig) -> float:
    """Composes the configuration, trains, and returns the best score, which is what a sweep maximises."""
    launch = HydraConfig.get()
    with tidy(launch.runtime.output_dir):
        config: Any = OmegaConf.to_container(settings, resolve=True, throw_on_missing=not settings.resume)
        config |= {"run": launch.runtime.output_dir, "choices": dict(launch.runtime.choices)}
        return train(config, launch.overrides.task, swept=launch.mode is RunMode.MULTIRUN)


def train(config: Any, overrides: list[str], swept: bool) -> float:
    from lightning.pytorch import Trainer, seed_everything  # not above: --help and a misspelt key need no torch

    from segformer import kinds, loggers, memory, resume, states, stops

    run, config, checkpoint = resume.run_folder(config, overrides)
    kind, seed = kinds.kind(config["task"]), seed_everything(config["seed"], verbose=False)
    steering, options = states.Steering.split(config["trainer"])
    section = instantiate(config["data"], _convert_="all")  # builds a `_target_` of the user's own, if there is one
    data = kind.check(build("data", kind.data, section, seed=seed).opened("train", "val"))
    model, origin = build("model", kind.network, resume.start(config, checkpoint), **data.network)
    recipe = {"optim": config["optim"], "max_steps": options["max_steps"], "seed": seed}
    task = kind.task(model, **recipe, **data.scoring, hyper_parameters=resume.record(model, config))
    best, last = states.BestCheckpoint(run, task.MONITOR), states.LastCheckpoint(run, steering, config)
    others = [instantiate(log, _convert_="all", save_dir=run) for log in config["logger"].values()]
    # Stops comes before whoever waits for other processes, which may have left
    watching = [stops.Stops(last), *kind.watchers(run, config, data), *steering.callbacks(task.MONITOR), best, last]
    own = {"callbacks": watching, "logger": [loggers.MetricsFile(run), *others]}
    plugins = [states.AtomicCheckpointIO(steering.keep_last)]
    trainer = build("trainer", Trainer, options, **own, plugins=plugins, **resume.LOOP)
    memory.settle_micro_batch(trainer, task, data, config)
    resume.share_batches(trainer, data, config["choices"] if swept else {})
    resume.opening_words(trainer, run, checkpoint or origin, data.summary(trainer.world_size), task.summary())
    with memory.explained(trainer, data, config):
        trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
    return resume.closing_words(trainer, best)


if __name__ == "__main__":
    end_with_parent()
    with explained():
        main()
