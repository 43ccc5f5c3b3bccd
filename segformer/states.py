"""What a run keeps of itself: checkpoints that are whole or not there, the best, the last ones, averaged weights."""

import errno
import io
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from segformer.errors import SharedError, UserError, build
from segformer.files import write_atomically
from segformer.secrets import redacted

LAST = "last.ckpt"


def last_checkpoints(run: Path) -> list[Path]:
    """The last states that a run kept, the newest first: last.ckpt, last-1.ckpt, ..."""
    older = [path for path in run.glob("last-*.ckpt") if path.stem.removeprefix("last-").isdigit()]
    older.sort(key=lambda path: int(path.stem.removeprefix("last-")))
    return [path for path in (run / LAST, *older) if path.is_file()]


@dataclass(frozen=True)
class Steering:
    """The keys of the config section `trainer` that are not Lightning's.

    checkpoint_interval: optimiser steps between writes of last.ckpt. keep_last: how many of it stay. ema_decay: of the
    moving average of the weights (`Averaging`), None = no average. patience: validations without a better score after
    which the run ends, None = at max_steps only.
    """

    checkpoint_interval: int
    keep_last: int = 2
    ema_decay: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("checkpoint_interval", "keep_last", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"trainer.{name} is {value}, expected an integer of at least 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(
                f"trainer.ema_decay is {self.ema_decay}, expected more than 0 and less than 1, such as 0.999"
            )

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple["Steering", dict[str, Any]]:
        """The section `trainer` as this and what is left for Lightning."""
        own = [field.name for field in fields(cls)]
        left = {name: value for name, value in options.items() if name not in own}
        return build("trainer", cls, {name: options[name] for name in own if name in options}), left

    def callbacks(self, monitor: str) -> list[pl.Callback]:
        """What averages the weights, and what ends a run that no longer gets better in the score `monitor`."""
        callbacks: list[pl.Callback] = [] if self.ema_decay is None else [Averaging(self.ema_decay)]
        if self.patience is not None:
            callbacks.append(EarlyStopping(monitor, patience=self.patience, mode="max"))
        return callbacks


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and replaces it; of `last.ckpt` the `keep` newest stay.

    Lightning's own save goes through the system's temporary folder and copies: a full disk then destroys the previous
    good file. Here a full disk costs nothing but the checkpoint at hand: training goes on, the next one may find room.
    """

    def __init__(self, keep: int = 1) -> None:
        super().__init__()
        self.keep = keep
        self.unwritten: dict[str, str] = {}  # name of a checkpoint that the disk has no room for -> what was said

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_atomically(
                path, lambda file: torch.save(checkpoint, file), self._older if path.name == LAST else None
            )
        except (OSError, RuntimeError) as error:
            system = error if isinstance(error, OSError) else error.__context__  # torch's own error comes on top
            if not isinstance(system, OSError) or system.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            needed, free = _size(checkpoint), shutil.disk_usage(path.parent).free
            kept = "the one before is as it was" if path.is_file() else "there is none before it"
            self.unwritten[path.name] = (
                f"the disk is full: {path} needs {needed / 2**20:.1f} MiB, but {free / 2**20:.1f} MiB are free; {kept}"
            )
            print(f"warning: {self.unwritten[path.name]}. Training goes on: make room", file=sys.stderr)
        else:
            self.unwritten.pop(path.name, None)

    def _older(self, path: Path) -> None:
        """last-1.ckpt becomes last-2.ckpt, and so on; the present file gets a second name, so it never goes missing."""
        names = [path, *(path.with_name(f"last-{number}.ckpt") for number in range(1, self.keep))]
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            if newer != path and newer.is_file():
                newer.replace(older)
            elif newer.is_file():
                older.unlink(missing_ok=True)
                try:
                    os.link(newer, older)
                except OSError:  # a file system without hard links
                    newer.replace(older)


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`, the checkpoint of the highest score, also when the run folder has moved since."""

    lost = False  # there was one when the run was cut off

    def __init__(self, run: Path, monitor: str) -> None:
        super().__init__(
            run,
            filename="best",
            monitor=monitor,
            mode="max",
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        path = str(Path(str(self.dirpath), "best.ckpt"))
        if not Path(path).is_file():  # there was no room for it, or someone took it away: the next one is the best
            self.lost = bool(state_dict["best_model_path"])
            return
        moved = {**state_dict, "dirpath": self.dirpath}  # of another folder Lightning forgets the best score
        for key in ("best_model_path", "kth_best_model_path"):
            moved[key] = path if moved[key] else ""
        moved["best_k_models"] = dict.fromkeys([path][: len(moved["best_k_models"])], moved["best_model_score"])
        super().load_state_dict(moved)


class LastCheckpoint(Checkpoint):
    """Keeps what a run needs to go on: `config.yaml` from the start, `last.ckpt` every `checkpoint_interval` steps,
    before every step that a validation follows, and after that validation.

    Every checkpoint stands between two steps, with all that is due after the first of them done. So a run that goes on
    repeats what came later, bit for bit, and never has to take up a validation in its middle.
    """

    def __init__(self, run: Path, steering: Steering, config: dict[str, Any]) -> None:
        self.path, self.interval, self.config, self.saved_at = run / LAST, steering.checkpoint_interval, config, -1
        self.lock: IO[str] | None = None

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
            if not self._locked():
                return f"another process trains in {folder}: stop it, or give a new folder"
            # a run that was cut off before its first checkpoint left nothing to go on from
            if new and not (self.config.get("resume") == "auto" and not last_checkpoints(folder)):
                claim.open("x").close()
            for left in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                left.unlink(missing_ok=True)
            text = yaml.safe_dump(redacted(self.config), sort_keys=False, allow_unicode=True)
            write_atomically(claim, lambda file: file.write(text.encode()))
        except FileExistsError:
            resume = f", or resume={folder}" if last_checkpoints(folder) else ""
            return f"{folder} holds a run already: give a new folder{resume}"
        except OSError as error:
            return f"cannot write {claim}: {error.strerror}; give another folder"
        return None

    def _locked(self) -> bool:
        """Takes the folder for this process; the system frees it whatever the process dies of."""
        try:
            import fcntl
        except ImportError:  # Windows
            return True
        self.lock = (self.path.parent / ".lock").open("a")
        try:
            fcntl.lockf(
                self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # of this process alone: forked readers do not hold it
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)  # a file system without locks
        return True

    def teardown(self, trainer: pl.Trainer, task: pl.LightningModule, stage: str) -> None:
        if self.lock is not None:
            self.lock.close()

    def on_load_checkpoint(self, trainer: pl.Trainer, task: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning counts micro-batches, of which another number of devices may need more or fewer a step
        step, loops = checkpoint["global_step"], checkpoint["loops"]["fit_loop"]
        batches = step * trainer.accumulate_grad_batches
        for counters in (loops["epoch_loop.batch_progress"][name] for name in ("current", "total")):
            counters.update(dict.fromkeys(counters, batches))
        # the step that loggers are told: Lightning adds one where it leaves out a validation that was due here
        validated = trainer.enable_validation and batches % int(trainer.val_check_interval) == 0
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step - validated

    def on_train_batch_start(self, trainer: pl.Trainer, task: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        step, parts = trainer.global_step, trainer.accumulate_grad_batches
        if batch_idx % parts:
            return
        validates = trainer.enable_validation and (
            (batch_idx + parts) % (trainer.val_check_batch or 1) == 0 or step + 1 == trainer.max_steps
        )
        if (step and step % self.interval == 0) or validates:
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step != self.saved_at and not self.debug:
            trainer.save_checkpoint(self.path)
            self.saved_at = trainer.global_step


class Averaging(WeightAveraging):
    """Exponential moving average of weights and of BatchNorm's statistics: what is scored, and what checkpoints hold.

    decay: share of the average that stays at each optimiser step; at step n no more than (1 + n) / (10 + n), so that a
    short run forgets its random start.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._average)
        self.decay = decay
        self.broken: Tensor | None = None  # 1 where the step was not finite, known to the device alone (`stops.Stops`)

    def on_train_batch_end(self, trainer: pl.Trainer, *others: Any) -> None:
        self.broken = getattr(trainer.optimizers[0], "found_inf", None)
        super().on_train_batch_end(trainer, *others)

    @torch.no_grad()
    def _average(self, averaged: Sequence[Tensor], current: Sequence[Tensor], _: Any) -> None:
        done, now = self._latest_update_step, list(current)
        share = 1 - min(self.decay, (1 + done) / (10 + done))
        assert self._average_model is not None
        if self.broken is not None:  # the weights are as they were, but BatchNorm has seen the batch
            seen = {buffer.data_ptr() for buffer in self._average_model.module.buffers()}
            pairs = zip(averaged, now, strict=True)
            now = [torch.where(self.broken > 0, old, new) if old.data_ptr() in seen else new for old, new in pairs]
        if not averaged[0].is_floating_point():  # counters
            torch._foreach_copy_(list(averaged), now)
        elif self.broken is None:
            torch._foreach_lerp_(list(averaged), now, share)
        else:  # nothing of it, where the step was not finite
            way = torch._foreach_sub(now, list(averaged))
            torch._foreach_mul_(way, share * (1 - self.broken))
            torch._foreach_add_(list(averaged), way)

    def undo(self, steps: int) -> None:
        """Forgets that it counted the latest steps, none of which was finite."""
        self._latest_update_step -= steps
        if steps and self._average_model is not None:
            self._average_model.n_averaged -= steps


class _Counter(io.BytesIO):
    """A file that only counts what is written."""

    size = 0

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)


def _size(checkpoint: dict[str, Any]) -> int:
    counter = _Counter()
    torch.save(checkpoint, counter)
    return counter.size
