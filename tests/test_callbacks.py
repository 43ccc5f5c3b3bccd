"""What a run leaves behind for its reader, from real runs of a tiny network."""

import csv
import json
import math
import re
import sqlite3
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from PIL import Image

from segformer import callbacks, loggers, resume
from segformer.callbacks import ClassScores, Curves, Monitor, Previews, RunFacts
from segformer.curves import read_columns
from segformer.data.datamodule import SegmentationData
from segformer.data.toy import ToyScenes
from segformer.errors import UserError, build
from segformer.inference import Protocol
from segformer.loggers import LocalMLFlow, MetricsFile
from segformer.task import SegmentationTask
from tests.conftest import TOY, small
from tests.test_task import RECIPE, quiet

UNICORN = "unicorn (wild)"  # a class that is nowhere


class Rates(pl.Callback):
    """What the optimiser was told at each step, read independently of what is logged."""

    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer, task, optimizer) -> None:
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})


def trained(run: Path, *callbacks, loggers=(), steps: int = 6, start: Path | None = None, trainer=None, **data):
    """A task after `steps` of 6 steps, each of two micro-batches, validated every third; the trainer and its task."""
    loaders = build("data", SegmentationData, TOY | {"micro_batch_size": 1} | data).opened("train", "val")
    model = small(loaders.classes.names)
    if UNICORN in loaders.classes.names:
        torch.nn.init.constant_(model.decode_head.classifier.bias[-1:], -1e6)
    task = SegmentationTask(model, Protocol(), RECIPE, 6, hyper_parameters={"model": {}})
    options = {"max_steps": steps, "val_check_interval": 3, "log_every_n_steps": 2} | (trainer or {})
    fitting = pl.Trainer(
        **options, **resume.LOOP, accelerator="cpu", devices=1, logger=[MetricsFile(run), *loggers],
        callbacks=[*callbacks], enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    resume.share_batches(fitting, loaders)
    fitting.fit(task, loaders, ckpt_path=start, weights_only=True)
    return fitting, task


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_half_a_row_of_a_process_that_was_killed_is_left_out(tmp_path) -> None:
    first = MetricsFile(tmp_path)
    for step in (1, 12, 123):
        first.log_metrics({"a": 0.5, "val/iou/a, b": 1.0}, step)
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-8])  # its step now reads 1
    second = MetricsFile(tmp_path)
    second.log_metrics({"b": 2.0}, 100)
    second.log_metrics({"a": 1.0}, 123)
    assert [(row["step"], row["a"], row["b"]) for row in rows(tmp_path)] == [
        ("1", "0.5", ""), ("12", "0.5", ""), ("100", "", "2.0"), ("123", "1.0", "")
    ]  # fmt: skip
    assert rows(tmp_path)[0]["val/iou/a, b"] == "1.0"


def test_rows_without_room_are_kept_until_there_is_some(tmp_path) -> None:
    metrics, path = MetricsFile(tmp_path), tmp_path / "metrics.csv"
    metrics.log_metrics({"a": 1.0}, 0)
    path.rename(tmp_path / "away")
    path.mkdir()  # cannot be written, whoever one is
    with pytest.warns(UserWarning, match="metrics.csv is behind: .*; its rows are kept until it goes"):
        metrics.log_metrics({"a": 2.0}, 1)
    metrics.log_metrics({"a": 3.0}, 2)
    path.rmdir()
    (tmp_path / "away").rename(path)
    path.write_bytes(path.read_bytes() + b"half a r")  # what a full disk left of an attempt
    metrics.log_metrics({"a": 4.0}, 3)
    assert [(row["step"], row["a"]) for row in rows(tmp_path)] == [
        ("0", "1.0"),
        ("1", "2.0"),
        ("2", "3.0"),
        ("3", "4.0"),
    ]


def test_costs_and_rates_stand_in_the_row_of_their_step(tmp_path) -> None:
    rates = Rates()
    trained(tmp_path / "run", Monitor(), rates)
    found = [row for row in rows(tmp_path / "run") if row["train/loss"]]
    assert [row["step"] for row in found] == ["1", "3", "5"]
    for row in found:
        told = {group: float(row[f"lr/{group}"]) for group in ("encoder", "norms", "head")}
        assert told == pytest.approx(rates.rates[int(row["step"])], rel=1e-6)
        assert 0 < float(row["time/data"]) < float(row["time/step"]) < 60
        assert 10 < float(row["memory/peak_mib"]) < 2**20


class Saves(pl.Callback):
    """Writes a checkpoint where a run writes its own: after a step, or after the validation that follows it."""

    def __init__(self, path: Path, step: int, after_validation: bool) -> None:
        self.path, self.step, self.after_validation = path, step, after_validation

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step and not self.after_validation and batch_idx % 2:
            trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer, task) -> None:
        if trainer.global_step == self.step and self.after_validation:
            trainer.save_checkpoint(self.path)


class Slow(ToyScenes):
    def __init__(self, scenes: int, seed: int, seconds: float) -> None:
        super().__init__(scenes, seed)
        self.seconds = seconds

    def __getitem__(self, index: int):
        time.sleep(self.seconds)
        return super().__getitem__(index)


def test_waiting_for_samples_is_told_apart_from_validation_and_from_checkpoints(tmp_path) -> None:
    class SlowDisk(TorchCheckpointIO):
        def save_checkpoint(self, *_, **__) -> None:
            time.sleep(1)

    data = {"train": Slow(8, 0, 0.1), "val": Slow(2, 1, 1)}
    options = {"plugins": [SlowDisk()], "log_every_n_steps": 6}
    saves = [Saves(tmp_path / "x.ckpt", step, False) for step in (2, 4)]
    trained(tmp_path / "run", Monitor(), *saves, trainer=options, **data)
    (row,) = [row for row in rows(tmp_path / "run") if row["train/loss"]]
    waited, whole = float(row["time/data"]), float(row["time/step"])
    assert 0.2 <= waited < 0.5  # two samples a step; two validations and two checkpoints took six seconds
    assert waited < whole


def test_the_score_of_each_class_that_occurs_stands_beside_their_mean(tmp_path) -> None:
    _, task = trained(tmp_path / "run", ClassScores((*TOY["classes"], UNICORN)), classes=[*TOY["classes"], UNICORN])
    first, last = [row for row in rows(tmp_path / "run") if row["val/miou"]]
    assert (first["step"], last["step"]) == ("2", "5")
    told = {name.removeprefix("val/iou/"): float(last[name]) for name in last if name.startswith("val/iou/")}
    expected = dict(zip(TOY["classes"], task.scores.iou[:-1].tolist(), strict=True))
    assert math.isnan(task.scores.iou[-1]) and told == pytest.approx(expected, rel=1e-6)
    assert float(last["val/miou"]) == pytest.approx(sum(told.values()) / len(told), rel=1e-6)


@pytest.mark.parametrize(("step", "after_validation"), [(2, False), (3, True), (4, False)])
def test_a_resumed_run_keeps_its_rows_beside_new_columns_and_draws_its_whole_life(
    tmp_path, step, after_validation
) -> None:
    run, checkpoint = tmp_path / "run", tmp_path / "x.ckpt"
    first = [Monitor(), Saves(checkpoint, step, after_validation)]
    trained(run, *first, steps=max(step, 3), trainer={"log_every_n_steps": 1})
    before = [row for row in rows(run) if int(row["step"]) < step]
    watching = [Monitor(), ClassScores(TOY["classes"]), Curves(run)]
    trained(run, *watching, start=checkpoint)  # logs every second step
    after = rows(run)
    kept = [{key: value for key, value in row.items() if key in before[0]} for row in after[: len(before)]]
    assert kept == before and "val/iou/sky" in set(after[0]) - set(before[0])
    losses, scores = read_columns(run / "metrics.csv", ("train/loss", "val/miou"))
    new = [at for at in (2, 4, 6) if at > step]
    assert losses[0].tolist() == [*range(1, step + 1), *new] and scores[0].tolist() == [3, 6]
    costs, rates = read_columns(run / "metrics.csv", ("time/step", "lr/head"))
    assert costs[0].tolist() == rates[0].tolist() == losses[0].tolist()
    with Image.open(run / "curves.png") as picture:
        assert min(picture.size) >= 600
    assert sorted(path.name for path in run.iterdir()) == ["curves.png", "metrics.csv"]


def watched(run: Path, config: dict, loggers) -> None:
    """A run with every callback, as the script has it."""
    data = build("data", SegmentationData, TOY).opened("train", "val")
    trained(
        run, Previews(run, data.classes), Monitor(), ClassScores(data.classes.names), Curves(run),
        RunFacts(run, config, data), loggers=loggers, trainer={"val_check_interval": 6},
    )  # fmt: skip


SECRETS = {"seed": 7, "logger": {"x": {"api_key": "hunter2"}}, "data": {"root": "https://me:hunter2@host/x"}}


def test_tensorboard_and_wandb_get_pictures_numbers_and_facts_and_no_secret(tmp_path, monkeypatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(sys, "argv", ["train.py", "seed=7", "logger.x.api_key=hunter2"])
    run = tmp_path / "run"
    settings = {"x_disable_meta": True}  # as in configs/logger/wandb.yaml
    both = [
        TensorBoardLogger(run, name="", version="tensorboard"),
        WandbLogger(project="x", save_dir=run, offline=True, settings=settings),
    ]
    watched(run, SECRETS, both)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == [f"previews/{index}" for index in range(4)]
    assert {"train/loss", "val/iou/sky", "time/step", "lr/head"} <= set(events.Tags()["scalars"])
    assert events.Images("previews/0")[0].step == 6
    assert len(list(run.glob("wandb/offline-run-*/files/media/images/previews/*.png"))) == 4
    assert b"hunter2" not in everything(tmp_path)
    assert all(b"config/seed" in path.read_bytes() for path in run.glob("tensorboard/events*"))
    facts = json.loads((run / "run.json").read_text())
    assert facts["command"] == "train.py seed=7 'logger.x.api_key=<redacted>'" and facts["processes"] == 1
    assert facts["data"]["train"]["samples"] == 24 and facts["data"]["val"]["samples"] == 9


def test_mlflow_keeps_pictures_numbers_and_facts_in_the_run_folder_and_no_secret(tmp_path, monkeypatch) -> None:
    pytest.importorskip("mlflow", reason='needs `pip install "segformer[mlflow]"`')
    monkeypatch.setattr(loggers, "MLFLOW_SERVER", None)
    monkeypatch.chdir(tmp_path)
    LocalMLFlow(tmp_path / "run 0").log_metrics({"x": 1.0}, 0)  # an earlier one of this process keeps to itself
    run = tmp_path / "run 1"
    logger = LocalMLFlow(run)
    assert not run.exists()  # other processes make one too
    watched(run, SECRETS, [logger])
    with sqlite3.connect(run / "mlflow.db") as base:
        parameters = dict(base.execute("select key, value from params"))
        metrics = {key for (key,) in base.execute("select key from metrics")}
        ((state, name),) = base.execute("select status, name from runs").fetchall()
    assert (state, name) == ("FINISHED", "run 1") and parameters["config/seed"] == "7"
    assert parameters["run/data/train/samples"] == "24"
    assert {"train/loss", "val/miou", "val/iou/sky", "time/data", "lr/norms"} <= metrics
    assert len(list((run / "mlflow").rglob("*.png"))) == 4
    assert b"hunter2" not in everything(tmp_path) and {path.name for path in tmp_path.iterdir()} == {"run 0", "run 1"}


def test_an_mlflow_server_that_is_away_is_one_sentence_or_a_warning(tmp_path, monkeypatch) -> None:
    pytest.importorskip("mlflow", reason='needs `pip install "segformer[mlflow]"`')
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    logger = LocalMLFlow(tmp_path, tracking_uri="http://127.0.0.1:9")
    with pytest.raises(UserError, match="MLflow does not answer at http://127.0.0.1:9: .*; start its server, or take"):
        logger.log_hyperparams({"a": 1})
    with pytest.warns(UserWarning, match="MLflow did not take the numbers of step 3"):
        logger.log_metrics({"a": 1.0}, 3)


def test_mlflow_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r'pip install "segformer\[mlflow\]"'):
        LocalMLFlow(tmp_path)


class Broken(CSVLogger):
    """A logger whose service is gone."""

    def log_hyperparams(self, params=None) -> None:
        raise ConnectionError("no service")

    def log_image(self, *_, **__) -> None:
        raise ConnectionError("no service")


@pytest.mark.filterwarnings("always::UserWarning")
def test_what_cannot_be_drawn_or_handed_over_is_a_warning(tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (run / "run.json").mkdir(parents=True)
    (run / "previews").write_text("a file")
    with pytest.warns(UserWarning, match="no service") as told:
        watched(run, SECRETS, [Broken(tmp_path / "broken")])
    texts = [str(warning.message) for warning in told]
    for part in ("Broken did not take a preview: no service", "Broken did not take the facts", "curves.png was not",
                 "run.json was not written", "step_000006_0.jpg was not written"):  # fmt: skip
        assert any(part in text for text in texts), part
    assert rows(run)[-1]["val/miou"]


def test_a_second_start_keeps_the_facts_of_the_first_and_tells_that_the_data_has_changed(tmp_path) -> None:
    def facts(scenes: int) -> dict:
        data = build("data", SegmentationData, TOY | {"train": {"scenes": scenes}}).opened("train", "val")
        trained(tmp_path, RunFacts(tmp_path, {}, data), steps=1)
        return json.loads((tmp_path / "run.json").read_text())

    first, second = facts(5), facts(5)
    with pytest.warns(UserWarning, match=r"data\.train has changed since this run last started: 5 samples then, 4 now"):
        third = facts(4)
    assert [one["data"]["train"]["samples"] for one in third.pop("earlier")] == [5, 5] and first["earlier"] == []
    assert second["earlier"] == [{key: value for key, value in first.items() if key != "earlier"}]
    assert third["data"]["train"]["samples"] == 4


def test_a_trial_of_two_steps_writes_nothing(tmp_path) -> None:
    run = tmp_path / "run"
    data = build("data", SegmentationData, TOY).opened("train", "val")
    watching = [Previews(run, data.classes), Monitor(), Curves(run), RunFacts(run, SECRETS, data)]
    trained(run, *watching, trainer={"fast_dev_run": 2, "limit_val_batches": 2})
    assert not list(tmp_path.rglob("*"))


def steps(folder) -> list[str]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [row["step"] for row in csv.DictReader(file)]


def test_a_resumed_file_keeps_the_rows_before_its_first_new_step(tmp_path) -> None:
    run = tmp_path / "run"
    first = MetricsFile(run)
    for step in range(5):
        first.log_metrics({"loss": 1.0}, step)
        first.save()
    second = MetricsFile(run)  # went on from a checkpoint at step 3
    second.log_metrics({"loss": 0.5, "val/miou": 0.1}, 3)
    second.save()
    assert steps(run) == ["0", "1", "2", "3"]
    assert [path.name for path in run.iterdir()] == ["metrics.csv"]


def test_rows_survive_a_second_break_before_anything_was_logged(tmp_path) -> None:
    run = tmp_path / "run"
    first = MetricsFile(run)
    first.log_metrics({"loss": 1.0}, 0)
    first.save()
    MetricsFile(run).log_hyperparams({})  # as a trainer does before it dies
    third = MetricsFile(run)
    third.log_metrics({"loss": 0.5}, 1)
    third.save()
    assert steps(run) == ["0", "1"]


def test_a_run_that_logs_nothing_more_keeps_its_file(tmp_path) -> None:
    run = tmp_path / "run"
    first = MetricsFile(run)
    first.log_metrics({"loss": 1.0}, 0)
    first.save()
    MetricsFile(run).finalize("success")
    assert steps(run) == ["0"]


def test_a_validation_without_a_terminal_tells_its_speed_and_what_is_left(monkeypatch, capsys) -> None:
    monkeypatch.setattr(callbacks, "LINE_SECONDS", 0)
    data = build("data", SegmentationData, TOY | {"val": {"scenes": 4, "seed": 1}}).opened("val")
    trainer = quiet()
    trainer.callbacks.append(callbacks.Progress(1))
    trainer.validate(SegmentationTask(small(data.classes.names), Protocol()), data, verbose=False)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert re.fullmatch(r"validate: 1 of 4 images  \d+\.\d images/s  \d+\.\d min left", lines[0])
    assert lines[-1].endswith("images/s  0.0 min left")
