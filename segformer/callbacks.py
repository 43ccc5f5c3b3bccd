"""They watch a run and never steer it: progress, metrics, pictures, and the facts that a result goes back to."""

import logging
import math
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from PIL import Image
from tqdm import tqdm

from segformer.curves import draw_curves
from segformer.errors import UserError
from segformer.files import read_json, reason, write_json
from segformer.labels import Classes
from segformer.metrics import Scores
from segformer.provenance import provenance
from segformer.secrets import redacted
from segformer.task import Task
from segformer.visualize import panel

PREVIEWS = 4  # panels drawn at each validation
NAMES = {"val/miou": "mIoU", "val/top1": "top-1"}
PLURAL = {"image": "images", "batch": "batches"}
LINE_SECONDS = 15  # between two lines of progress where there is no terminal to redraw


# What does not concern a user is kept off the terminal.
for _logger in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_logger).setLevel(logging.WARNING)  # advertisements, one banner a device
logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)  # "experiment not found, creating it"
for _message in (
    r".*treespec, LeafSpec.*",  # Lightning 2.6 calls a helper that torch deprecated
    r".*recommended to use `self.log\('val/.*sync_dist=True.*",  # the matrix is summed over processes before
    r".*does not have many workers.*",  # `data.workers` is the user's choice, printed at the start
    r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run goes on in its own folder
):
    warnings.filterwarnings("ignore", message=_message)


class Progress(ProgressBar):
    """One bar over all optimiser steps with loss, lr, images/s and the latest mIoU; plain lines without a terminal."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size, self.enabled_ = batch_size, True
        self.terminal = sys.stderr.isatty()
        self.shown: dict[str, str] = {}

    def disable(self) -> None:  # Lightning calls it on every process but the first
        self.enabled_ = False

    def enable(self) -> None:
        self.enabled_ = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.start = self.since = time.monotonic()
        self.first = self.step = trainer.global_step
        hidden = not (self.enabled_ and self.terminal)
        self.bar = tqdm(total=trainer.max_steps, initial=self.first, unit="step", disable=hidden, dynamic_ncols=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step = time.monotonic(), trainer.global_step
        if step == self.step:  # a micro-batch of an accumulated step
            return
        self.bar.update(step - self.bar.n)
        due = now - self.since >= (1 if self.terminal else LINE_SECONDS)
        if not self.enabled_ or not (due or step in (self.first + 1, trainer.max_steps)):
            return
        assert isinstance(task, Task)
        # of this process; reading it waits for the device: once a second, not every step
        self.shown["loss"] = f"{float(task.step_loss):.4f}"
        self.shown["lr"] = f"{trainer.optimizers[0].param_groups[0]['lr']:.2e}"
        self.shown["images/s"] = f"{(step - self.step) * self.batch_size / max(now - self.since, 1e-6):.1f}"
        self.since, self.step = now, step
        self._show(trainer)

    def on_validation_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            score = task.MONITOR
            self.shown[NAMES.get(str(score), str(score))] = f"{float(trainer.callback_metrics[str(score)]):.4f}"
            self.since, self.step = time.monotonic(), trainer.global_step  # validation is not training speed
            if self.enabled_:
                self._show(trainer)

    def on_validation_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        hidden = not (self.enabled_ and self.terminal)
        batches = sum(trainer.num_val_batches)  # infinite where a stream does not tell
        total = int(batches) if math.isfinite(batches) else None
        self.unit = "image" if task.MONITOR == "val/miou" else "batch"  # images keep their own sizes
        self.scoring = tqdm(total=total, desc="validate", unit=self.unit, leave=False, disable=hidden)
        self.scored, self.processes = 0, trainer.world_size
        self.scoring_start = self.line = time.monotonic()

    def on_validation_batch_end(self, *_: Any) -> None:
        self.scored += 1
        self.scoring.update()
        if self.enabled_ and not self.terminal and time.monotonic() - self.line >= LINE_SECONDS:
            self.line = time.monotonic()
            self.print(self._validated(self.line - self.scoring_start))

    def _validated(self, seconds: float) -> str:
        total = self.scoring.total
        whose = f", the first of {self.processes} processes" if self.processes > 1 else ""
        speed = f"{self.processes * self.scored / seconds:.1f} {PLURAL[self.unit]}/s"
        left = f"  {(total - self.scored) * seconds / self.scored / 60:.1f} min left" if total else ""
        return f"validate: {self.scored} of {total or 'streamed'} {PLURAL[self.unit]}{whose}  {speed}{left}"

    def on_validation_epoch_end(self, *_: Any) -> None:
        self.scoring.close()

    def on_train_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.bar.close()

    def _show(self, trainer: pl.Trainer) -> None:
        if self.terminal:
            self.bar.set_postfix(self.shown)
            return
        left = (
            (trainer.max_steps - trainer.global_step)
            * (time.monotonic() - self.start)
            / max(trainer.global_step - self.first, 1)
        )
        words = "  ".join(f"{name} {value}" for name, value in self.shown.items())
        self.print(f"step {trainer.global_step} of {trainer.max_steps}  {words}  {left / 60:.1f} min left")


class Monitor(pl.Callback):
    """Logs the loss of a step and what steps cost, each `trainer.log_every_n_steps` optimiser steps and at the last.

    train/loss: of all samples of that step, on whatever number of devices. train/grad_norm: of all gradients together,
    before clipping. lr/<group>: the learning rate of each parameter group. time/step: seconds of an optimiser step, and
    time/data: those in which it waited for samples and their way to the device, on average since the last log;
    validation and the writing of checkpoints do not count. A GPU may be busy with the step before while the process
    waits. memory/peak_mib: on CUDA the most that tensors took on the first process's device since the last log,
    elsewhere the most that the process itself took since it started. Reads nothing from the device.
    """

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.step, self.rates = trainer.global_step, dict[str, float]()
        self.ended: float | None = None  # of the last batch, unless something came in between
        self._restart()

    def _restart(self) -> None:
        self.busy = self.waited = 0.0
        self.batches = self.waits = self.steps = 0

    def on_train_batch_start(self, trainer: pl.Trainer, task: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.started = time.monotonic()
        if self.ended is not None:
            self.waited += self.started - self.ended
            self.waits += 1

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, task: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # here, for the schedule has moved on when the batch ends
        self.rates = {f"lr/{group.get('name', i)}": group["lr"] for i, group in enumerate(optimizer.param_groups)}

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step = time.monotonic(), trainer.global_step
        self.busy += now - self.started
        self.batches += 1
        if step != self.step:  # not a micro-batch of an accumulated step
            self.step, self.steps = step, self.steps + 1
            every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's set-up
            if every and (step % every == 0 or step == trainer.max_steps):
                assert isinstance(task, Task)
                task.log("train/loss", task.step_loss, sync_dist=True)
                task.log_dict(
                    {"train/grad_norm": task.gradient_norm, **self._costs(), **_peak(task.device), **self.rates}
                )
                self._restart()
        self.ended = now

    def _costs(self) -> dict[str, float]:
        if not self.waits:
            return {"time/step": self.busy / self.steps}
        waiting = self.waited / self.waits * self.batches / self.steps
        return {"time/step": self.busy / self.steps + waiting, "time/data": waiting}

    def on_validation_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self.ended = None

    def on_save_checkpoint(self, trainer: pl.Trainer, task: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.ended = None


def _peak(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {"memory/peak_mib": peak / 2**20}
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # Windows
        return {}
    peak = getrusage(RUSAGE_SELF).ru_maxrss  # KiB, but bytes on a Mac
    return {"memory/peak_mib": peak / (2**20 if sys.platform == "darwin" else 2**10)}


class ClassScores(pl.Callback):
    """Logs `val/iou/<class>` in the row of val/miou, for each class that occurs in labels or predictions."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def on_validation_epoch_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        # the task's own hook comes after this one; the metric keeps what it summed over processes until then
        matrix, _ = task.confusion.compute()  # type: ignore[operator, union-attr]
        scores = zip(self.names, Scores.from_confusion(matrix).iou.tolist(), strict=True)
        task.log_dict({f"val/iou/{name}": iou for name, iou in scores if not math.isnan(iou)})


class Previews(pl.Callback):
    """Panels of image, label and prediction of the first validation images: a file each, and to loggers that show them.

    One that does not get it to the disk, or into a logger, is a warning.
    """

    def __init__(self, folder: Path, classes: Classes) -> None:
        self.folder, self.classes = folder / "previews", classes

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        task: pl.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        debug = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by Lightning's set-up
        if batch_idx >= PREVIEWS or not trainer.is_global_zero or debug:
            return
        image = batch["image"][0].permute(1, 2, 0).cpu().numpy()
        drawn = panel(image, batch["mask"][0].cpu().numpy(), outputs[0].cpu().numpy(), self.classes)
        path = self.folder / f"step_{trainer.global_step:06d}_{batch_idx}.jpg"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn).save(path, quality=90)
        except OSError as error:  # a picture is not worth a run
            warnings.warn(f"preview {path} was not written: {error}", stacklevel=2)
        for logger in trainer.loggers:
            try:
                show(logger, f"previews/{batch_idx}", drawn, trainer.global_step)
            except Exception as error:  # of the network, of a service: each a type of its own
                warnings.warn(f"{type(logger).__name__} did not take a preview: {reason(error)}", stacklevel=2)


def show(logger: Logger, name: str, image: np.ndarray, step: int) -> None:
    """Hands an image, RGB uint8 (H, W, 3), to a logger, by what it can do: W&B's, TensorBoard's, MLflow's; else not."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_image"):
        logger.log_image(name, [image], step=step)
    elif hasattr(experiment, "add_image"):
        experiment.add_image(name, image, step, dataformats="HWC")
    elif hasattr(experiment, "log_image"):
        experiment.log_image(logger.run_id, image, key=name, step=step)  # type: ignore[attr-defined]


class Curves(pl.Callback):
    """Keeps `curves.png` of the whole run, loss and score over steps; redrawn after each validation and at the end."""

    def __init__(self, run: Path) -> None:
        self.run, self.drawn = run, -1  # the step of the picture

    def on_validation_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._draw(trainer, str(task.MONITOR))

    def on_train_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._draw(trainer, str(task.MONITOR))

    def _draw(self, trainer: pl.Trainer, score: str) -> None:
        metrics = self.run / "metrics.csv"
        debug = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by Lightning's set-up
        if not trainer.is_global_zero or debug or not metrics.is_file() or self.drawn == trainer.global_step:
            return
        self.drawn = trainer.global_step
        try:
            draw_curves(metrics, self.run / "curves.png", score)
        except Exception as error:  # no matplotlib, no space, a file that someone edited: a picture is not worth a run
            warnings.warn(f"{self.run / 'curves.png'} was not drawn: {reason(error)}", stacklevel=2)


class RunFacts(pl.Callback):
    """Writes `run.json`, what the run goes back to (`provenance`), and hands it to the loggers with the configuration.

    A run that goes on keeps the facts of its earlier starts under "earlier", and warns where its data has changed.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], data: Any) -> None:
        self.path, self.config, self.data = run / "run.json", redacted(config), data

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        debug = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by Lightning's set-up
        if not trainer.is_global_zero or debug:
            return
        facts = provenance(self.data) | {"processes": trainer.world_size}
        self._write(facts)
        for logger in trainer.loggers:
            try:
                logger.log_hyperparams({"config": _brief(self.config), "run": facts})
            except UserError:  # a service that is not there from the start is told before anything is trained
                raise
            except Exception as error:  # as for pictures
                warnings.warn(f"{type(logger).__name__} did not take the facts: {reason(error)}", stacklevel=2)

    def on_train_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        for logger in trainer.loggers if trainer.is_global_zero else ():
            finish = getattr(getattr(logger, "experiment", None), "finish", None)
            if finish is not None:  # W&B's, or the next run of a sweep would be written into this one
                finish()

    def _write(self, facts: dict[str, Any]) -> None:
        before: dict[str, Any] = {}
        with suppress(UserError, OSError):  # damaged
            before = read_json(self.path) or {}
        for split, now in facts["data"].items():
            then = before.get("data", {}).get(split) or now
            if then["sha256"] and now["sha256"] and then != now:
                warnings.warn(
                    f"data.{split} has changed since this run last started: {then['samples']} samples then, "
                    f"{now['samples']} now, or other file names or sizes",
                    stacklevel=2,
                )
        earlier = [*before.pop("earlier", []), *([before] if before else [])]
        try:
            write_json(self.path, facts | {"earlier": earlier})
        except OSError as error:
            warnings.warn(f"{self.path} was not written: {reason(error)}", stacklevel=2)


def _brief(config: Mapping[str, Any]) -> dict[str, Any]:
    """With the names of the classes alone: a value for each colour of 150 classes would bury the others."""
    data = config.get("data", {})
    return {**config, "data": {**data, "classes": [*map(str, data.get("classes") or ())]}}
