"""They watch a run and never steer it: progress, metrics file, previews."""

import csv
import logging
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from tqdm import tqdm

from segformer.labels import Classes
from segformer.visualize import panel

PREVIEWS = 4  # panels drawn at each validation
LINE_SECONDS = 15  # between two lines of progress where there is no terminal to redraw


# What does not concern a user is kept off the terminal.
for _logger in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_logger).setLevel(logging.WARNING)  # advertisements, one banner a device
for _message in (
    r".*treespec, LeafSpec.*",  # Lightning 2.6 calls a helper that torch deprecated
    r".*recommended to use `self.log\('val/.*sync_dist=True.*",  # the matrix is summed over processes before
    r".*does not have many workers.*",  # `data.workers` is the user's choice, printed at the start
    r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run goes on in its own folder
    r".*Experiment logs directory .* exists and is not empty.*",  # likewise; MetricsFile keeps the rows
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
        # reading the loss waits for the device: once a second, not every step
        self.shown["loss"] = f"{float(trainer.callback_metrics['train/loss']):.4f}"
        self.shown["lr"] = f"{trainer.optimizers[0].param_groups[0]['lr']:.2e}"
        self.shown["images/s"] = f"{(step - self.step) * self.batch_size / max(now - self.since, 1e-6):.1f}"
        self.since, self.step = now, step
        self._show(trainer)

    def on_validation_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.shown["mIoU"] = f"{float(trainer.callback_metrics['val/miou']):.4f}"
            self.since, self.step = time.monotonic(), trainer.global_step  # validation is not training speed
            if self.enabled_:
                self._show(trainer)

    def on_validation_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        hidden = not (self.enabled_ and self.terminal)
        batches = sum(trainer.num_val_batches)  # infinite where a stream does not tell
        total = int(batches) if math.isfinite(batches) else None
        self.scoring = tqdm(total=total, desc="validate", unit="image", leave=False, disable=hidden)
        self.scored, self.line = 0, time.monotonic()

    def on_validation_batch_end(self, *_: Any) -> None:
        self.scored += 1
        self.scoring.update()
        if self.enabled_ and not self.terminal and time.monotonic() - self.line >= LINE_SECONDS:
            self.line = time.monotonic()
            self.print(f"validate: {self.scored} of {self.scoring.total or 'streamed'} images")

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


class MetricsFile(CSVLogger):
    """`metrics.csv` in the run folder; a resumed run goes on in it, where Lightning's logger starts an empty one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder.parent), name="", version=folder.name, flush_logs_every_n_steps=1)
        self._path, self._kept = folder / "metrics.csv", folder / "metrics.before-resume.csv"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None and self._path.is_file() and not self._kept.is_file():
            self._path.replace(self._kept)  # Lightning's writer deletes what it finds
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        writer = self.experiment
        if self._kept.is_file():
            with self._kept.open(newline="") as file:  # rows after the checkpoint are about to be logged again
                rows = [row for row in csv.DictReader(file) if (row["step"] or "").isdigit()]
            writer.metrics = [row for row in rows if step is None or int(row["step"]) < step]
            super().log_metrics(metrics, step)
            self.save()
            self._kept.unlink()
        else:
            super().log_metrics(metrics, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._kept.is_file():  # nothing was logged: the run had ended before
            self._kept.replace(self._path)


class Previews(pl.Callback):
    """Panels of image, label and prediction of the first validation images, one file a validation."""

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
