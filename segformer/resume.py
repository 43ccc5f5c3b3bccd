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

from segformer.checkpoints import Pretrained, write_atomically
from segformer.errors import UserError

# what may differ when a run goes on: where it computes, never what it computes
_MAY_CHANGE = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accelerator",
    "data.workers",
    "logger",
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and replaces it. Lightning's own save goes through the system's temporary folder and
    copies: a full disk then destroys the previous good file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


def best_checkpoint(run: Path) -> ModelCheckpoint:
    """Keeps `best.ckpt`, the checkpoint of the highest val/miou."""
    return ModelCheckpoint(
        run,
        filename="best",
        monitor="val/miou",
        mode="max",
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )


class LastCheckpoint(Checkpoint):
    """Keeps what a run needs to go on: `config.yaml` from the start, `last.ckpt` after every validation and every
    `interval` optimiser steps."""

    def __init__(self, run: Path, interval: int, config: dict[str, Any]) -> None:
        self.path, self.interval, self.config, self.saved_at = run / "last.ckpt", interval, config, -1

    def on_fit_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.debug = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by Lightning's set-up
        if trainer.is_global_zero and not self.debug:
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path.with_name("config.yaml"), lambda file: file.write(text.encode()))

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # a resumed run would skip a validation that is due right after the checkpoint: that one is saved after it
        validates = (batch_idx + 1) % (trainer.val_check_batch or 1) == 0 or trainer.global_step == trainer.max_steps
        if trainer.global_step % self.interval == 0 and not validates:
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
    if config["resume"] and (found := go_on(config["resume"], config, overrides)):
        run, saved = found
        return run, saved, run / "last.ckpt"
    return Path(config["run"]), _with_absolute_paths(config), None


def record(model: Pretrained, config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint must hold to be evaluated on its own: plain values only, so it loads as weights alone."""
    return {"model": model.config.to_dict(), "config": config}


def closing_words(trainer: pl.Trainer, best: ModelCheckpoint) -> float:
    """Prints the best checkpoint and the command that evaluates it; returns its val/miou."""
    if not best.best_model_path or best.best_model_score is None:
        trainer.print("nothing was saved")
        return float("nan")
    score = float(best.best_model_score)
    path = os.path.relpath(best.best_model_path)
    if not re.fullmatch(r"[\w./-]+", path):  # Hydra's grammar, inside the shell's
        path = shlex.quote('"' + path.replace('"', '\\"') + '"')
    launcher = "uv run" if "UV_RUN_RECURSION_DEPTH" in os.environ else "python"
    script = os.path.relpath(Path(sys.argv[0]).with_name("evaluate.py"))
    trainer.print(f"best val/miou {score:.4f}: {launcher} {shlex.quote(script)} checkpoint={path}")
    return score


def go_on(resume: str, config: dict[str, Any], overrides: Sequence[str]) -> tuple[Path, dict[str, Any]] | None:
    """The run folder and saved configuration that `resume` names; None if it is "auto" and there is none yet.

    resume: a run folder, its last.ckpt, or "auto" for the newest run of this model and data. config: the composed
    configuration of this command. overrides: what the command line says ("key=value"): anything in it that would
    change what is computed is refused by name.
    """
    if resume == "auto":
        parent = Path(config["run"]).parent
        candidates = sorted(parent.glob("*/last.ckpt"), key=lambda path: path.stat().st_mtime)
        if not candidates:
            return None
        run = candidates[-1].parent
    else:
        run = Path(resume) if Path(resume).is_dir() else Path(resume).parent
    run = run.absolute()
    for name in ("last.ckpt", "config.yaml"):
        if not (run / name).is_file():
            raise UserError(
                f"cannot resume {run}: it has no {name}, expected the folder of a run that reached a checkpoint"
            )
    saved = yaml.safe_load((run / "config.yaml").read_text())
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


def _with_absolute_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Paths are relative to where the command starts: made absolute before anything stores them."""
    config = {**config, "data": dict(config["data"]), "model": dict(config["model"])}
    if config["data"].get("root"):
        config["data"]["root"] = os.path.abspath(os.path.expanduser(config["data"]["root"]))
    if config["model"].get("pretrained") and Path(config["model"]["pretrained"]).exists():
        config["model"]["pretrained"] = os.path.abspath(config["model"]["pretrained"])
    return config
