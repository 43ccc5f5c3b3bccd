"""What steers a run's life: where it goes on, and checkpoints that are whole or not there."""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from segformer.checkpoints import Pretrained, load_checkpoint
from segformer.data.datamodule import SegmentationData
from segformer.errors import SharedError, UserError
from segformer.files import absolute, write_atomically

# what may differ when a run goes on: where it computes, not what it computes (but for streams, whose order follows from
# the number of readers)
_MAY_CHANGE = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accelerator",
    "data.workers",
    "data.worker_timeout",
    "data.micro_batch_size",
    "data.max_pixels",
    "data.cache",
    "data.check",
    "data.on_bad_sample",
    "data.max_bad_share",
    "logger",
)
# Lightning's own ways that the recipe has no use for
LOOP = {
    "check_val_every_n_epoch": None,  # the order of samples is endless: intervals count steps
    "use_distributed_sampler": False,  # ours neither pads nor repeats
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and replaces it. Lightning's own save goes through the system's temporary folder and
    copies: a full disk then destroys the previous good file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`, the checkpoint of the highest val/miou, also when the run folder has moved since."""

    def __init__(self, run: Path) -> None:
        super().__init__(
            run,
            filename="best",
            monitor="val/miou",
            mode="max",
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        path = str(Path(str(self.dirpath), "best.ckpt"))
        moved = {**state_dict, "dirpath": self.dirpath}  # of another folder Lightning forgets the best score
        for key in ("best_model_path", "kth_best_model_path"):
            moved[key] = path if moved[key] else ""
        moved["best_k_models"] = dict.fromkeys([path][: len(moved["best_k_models"])], moved["best_model_score"])
        super().load_state_dict(moved)


class LastCheckpoint(Checkpoint):
    """Keeps what a run needs to go on: `config.yaml` from the start, `last.ckpt` after every validation and every
    `interval` optimiser steps."""

    def __init__(self, run: Path, interval: int, config: dict[str, Any]) -> None:
        self.path, self.interval, self.config, self.saved_at = run / "last.ckpt", interval, config, -1

    def setup(self, trainer: pl.Trainer, task: pl.LightningModule, stage: str) -> None:
        # torchrun starts every process on its own, each naming the folder by its own clock: the first one's counts
        self.path = trainer.strategy.broadcast(self.path)

    def on_fit_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.debug = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by Lightning's set-up
        refusal = self._claim(new=trainer.ckpt_path is None) if trainer.is_global_zero and not self.debug else None
        if refusal := trainer.strategy.broadcast(refusal):  # or the others would wait for the first one
            raise SharedError(refusal)

    def _claim(self, new: bool) -> str | None:
        """Writes the configuration; what is wrong, if another run was here first or nothing can be written."""
        claim, folder = self.path.with_name("config.yaml"), self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if new:
                claim.open("x").close()
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            write_atomically(claim, lambda file: file.write(text.encode()))
        except FileExistsError:
            resume = f", or resume={folder}" if self.path.is_file() else ""
            return f"{folder} holds a run already: give a new folder{resume}"
        except OSError as error:
            return f"cannot write {claim}: {error.strerror}; give another folder"
        return None

    def on_load_checkpoint(self, trainer: pl.Trainer, task: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning counts micro-batches, of which another number of devices may need more or fewer a step
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        gone = checkpoint["global_step"] * trainer.accumulate_grad_batches - progress["current"]["ready"]
        for counters in (progress["current"], progress["total"]):
            for name in counters:
                counters[name] += gone

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # a resumed run would skip a validation that is due right after the checkpoint: that one is saved after it
        validates = trainer.enable_validation and (
            (batch_idx + 1) % (trainer.val_check_batch or 1) == 0 or trainer.global_step == trainer.max_steps
        )
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole and trainer.global_step % self.interval == 0 and not validates:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step != self.saved_at and not self.debug:
            trainer.save_checkpoint(self.path)
            self.saved_at = trainer.global_step


def run_folder(config: dict[str, Any], overrides: Sequence[str]) -> tuple[Path, dict[str, Any], Path | None]:
    """The folder, the configuration and the checkpoint to go on from (None for a new run)."""
    config = _with_absolute_paths(config)
    run, checkpoint = Path(config["run"]), None
    if config["resume"] and (found := go_on(str(config["resume"]), config, overrides)):
        run, config = found
        checkpoint = run / "last.ckpt"
    for key in ("max_steps", "val_check_interval", "checkpoint_interval"):
        value = config["trainer"][key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"trainer.{key} is {value!r}, expected an integer of at least 1")
    if not isinstance(config["seed"], int) or config["seed"] < 0:
        raise UserError(f"seed is {config['seed']!r}, expected an integer of at least 0")
    if "accumulate_grad_batches" in config["trainer"]:
        raise UserError(
            "trainer.accumulate_grad_batches is derived: data.batch_size is what one optimiser step sees, "
            "data.micro_batch_size the most that a device takes at once"
        )
    return run, config, checkpoint


def start(config: dict[str, Any], checkpoint: Path | None) -> dict[str, Any]:
    """The section `model`; a run that goes on takes its weights from its checkpoint, not from where it once started."""
    return config["model"] | ({"pretrained": None} if checkpoint else {})


def share_batches(trainer: pl.Trainer, data: SegmentationData) -> None:
    """Derives how many micro-batches make one optimiser step, in which Lightning counts whatever it counts."""
    trainer.accumulate_grad_batches = data.accumulated(trainer.world_size)
    if trainer.limit_val_batches:
        data.require_images(trainer.world_size)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning's set-up
        trainer.limit_train_batches *= trainer.accumulate_grad_batches
    else:
        trainer.val_check_interval *= trainer.accumulate_grad_batches


def record(model: Pretrained, config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint must hold to be evaluated on its own: plain values only, so it loads as weights alone."""
    return {"model": model.config.to_dict(), "config": config}


def closing_words(trainer: pl.Trainer, best: ModelCheckpoint) -> float:
    """Prints the best checkpoint and the command that evaluates it; returns its val/miou."""
    if not best.best_model_path or best.best_model_score is None:
        trainer.print("nothing was scored, so there is no best.ckpt")
        return float("nan")
    score = float(best.best_model_score)
    path = _short(best.best_model_path)
    if not re.fullmatch(r"[\w./-]+", path, re.ASCII):  # Hydra's grammar, inside the shell's
        path = shlex.quote('"' + path.replace('"', '\\"') + '"')
    launcher = "uv run" if "UV_RUN_RECURSION_DEPTH" in os.environ else "python"
    script = _short(Path(sys.argv[0]).with_name("evaluate.py"))
    trainer.print(f"best val/miou {score:.4f}: {launcher} {shlex.quote(script)} checkpoint={path}")
    return score


def go_on(resume: str, config: dict[str, Any], overrides: Sequence[str]) -> tuple[Path, dict[str, Any]] | None:
    """The run folder and saved configuration that `resume` names; None if it is "auto" and there is none yet.

    resume: a run folder, its last.ckpt, or "auto" for the newest run of this model and data. config: the composed
    configuration of this command. overrides: what the command line says ("key=value"): anything in it that would
    change what is computed is refused by name.
    """
    if resume == "auto":
        folders = Path(config["run"]).parent.glob("*/config.yaml")
        runs = [path for path in folders if path.with_name("last.ckpt").is_file()]  # others never reached a checkpoint
        if not runs:
            return None
        run = max(runs, key=lambda path: path.stat().st_mtime).parent
    else:
        run = Path(resume).expanduser().absolute()
        if run.name == "last.ckpt":
            run = run.parent
    for name in ("last.ckpt", "config.yaml"):
        if not (run / name).is_file():
            raise UserError(
                f"cannot resume {run}: it has no {name}, expected the folder of a run that reached a checkpoint"
            )
    load_checkpoint(run / "last.ckpt")  # a damaged one is told now
    try:
        saved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        saved["choices"], saved["data"], saved["trainer"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"{run / 'config.yaml'} is damaged: restore it, or start a new run") from error
    for key in (override.partition("=")[0].lstrip("+~") for override in overrides):
        allowed = any(key == name or key.startswith(f"{name}.") for name in _MAY_CHANGE)
        found, stored = _value(config, key), _value(saved, key)
        if allowed:
            _set(saved, key, found)
        elif key != "resume" and found != stored:
            raise UserError(
                f"cannot change {key} from {stored} to {found} when resuming {run}: only {', '.join(_MAY_CHANGE)} may "
                "differ; start a new run with model.pretrained= to change the recipe"
            )
    return run, {**saved, "run": str(run)}


def _value(config: Mapping[str, Any], key: str) -> Any:
    if key in config["choices"] and key != "logger":  # a group such as data=camvid
        return config["choices"][key]
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        config = config.setdefault(part, {})
    config[last] = value


def _short(path: str | os.PathLike[str]) -> str:
    try:
        return os.path.relpath(path)
    except ValueError:  # on another drive
        return os.path.abspath(path)


def _with_absolute_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Paths are relative to where the command starts: made absolute before anything stores them."""
    config = {**config, "data": dict(config["data"]), "model": dict(config["model"])}
    for section, key in (("data", "root"), ("model", "pretrained")):
        if config[section].get(key):
            config[section][key] = absolute(str(config[section][key]))
    if config["data"].get("cache"):  # is made where it is not there yet
        config["data"]["cache"] = os.path.abspath(os.path.expanduser(config["data"]["cache"]))
    return config
