"""What ends a run before its last step, in one process; test_survival.py has the processes."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from segformer import resume
from segformer.data.datamodule import SegmentationData
from segformer.errors import SharedError, build
from segformer.inference import Protocol
from segformer.states import LastCheckpoint, Steering
from segformer.stops import SCALER_TRIES, Stops, gradient_norm
from segformer.task import SegmentationTask
from tests.conftest import TOY, small
from tests.test_task import RECIPE


class Steps(pl.Callback):
    """How often the optimiser was about to step, with which loss scale."""

    def __init__(self) -> None:
        self.scales: list[float] = []

    def on_before_optimizer_step(self, trainer, task, optimizer) -> None:
        scaler = trainer.precision_plugin.scaler if hasattr(trainer.precision_plugin, "scaler") else None
        self.scales.append(scaler.get_scale() if scaler else 1.0)


def fit(tmp_path, steps: int, scale: float | None = None, **optim) -> tuple[Steps, SegmentationTask]:
    data = build("data", SegmentationData, TOY, seed=0).opened("train", "val")
    hyper_parameters = {"model": {}, "config": {}}
    task = SegmentationTask(
        small(data.classes.names), Protocol(), RECIPE | optim, steps, hyper_parameters=hyper_parameters
    )
    last, seen = LastCheckpoint(tmp_path, Steering(1000), {}), Steps()
    half = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))] if scale else []
    trainer = pl.Trainer(
        max_steps=steps, val_check_interval=steps, limit_val_batches=0, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, plugins=half, callbacks=[seen, Stops(last), last], **resume.LOOP,
    )  # fmt: skip
    resume.share_batches(trainer, data)
    trainer.fit(task, data)
    return seen, task


def test_the_norm_is_that_of_all_gradients_together(tiny) -> None:
    frozen, *learning = tiny.parameters()
    frozen.requires_grad_(False)
    tiny(torch.randn(1, 3, 64, 64)).logits.square().mean().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in learning]).norm()
    torch.testing.assert_close(gradient_norm(torch.optim.SGD(learning)), expected)


def test_a_loss_that_is_no_number_stops_before_the_weights_change(tmp_path) -> None:
    with pytest.raises(SharedError) as stop:
        fit(tmp_path, 20, lr=1e25, warmup_steps=0)
    sentence = str(stop.value)
    step = int(sentence.partition(" at step ")[2].partition(",")[0])
    assert step < 20 and sentence.startswith("the loss is nan at step")
    assert f"resume={tmp_path}/nonfinite.ckpt takes the same step again. Likely causes: too high a" in sentence
    assert "try a tenth of optim.lr=1e+25" in sentence and "gradient_clip_val=1" in sentence
    assert "precision" not in sentence and "one of the samples: scene_0_000" in sentence
    kept = torch.load(tmp_path / "nonfinite.ckpt", weights_only=True)
    assert kept["global_step"] == step
    assert all(torch.isfinite(t).all() for name, t in kept["state_dict"].items() if "running" not in name)


def test_an_infinite_loss_stops_even_where_its_gradient_is_finite(tmp_path, monkeypatch) -> None:
    plain = SegmentationTask.loss_of
    monkeypatch.setattr(SegmentationTask, "loss_of", lambda task, batch: plain(task, batch) + float("inf"))
    with pytest.raises(SharedError, match="the loss is inf at step 0, so training stopped before the step changed"):
        fit(tmp_path, 3)


def test_fp16_may_overflow_until_its_scale_fits(tmp_path) -> None:
    seen, task = fit(tmp_path, 16, scale=2.0**36)
    assert len(seen.scales) == 16 and seen.scales[-1] < seen.scales[0]  # halved step by step, and trained on
    assert all(torch.isfinite(parameter).all() for parameter in task.parameters())


def test_fp16_that_overflows_whatever_its_scale_is_stopped(tmp_path) -> None:
    with pytest.raises(SharedError, match="not finite|is nan|is inf"):
        fit(tmp_path, 200, scale=2.0**16, lr=1e25, warmup_steps=0)
    assert torch.load(tmp_path / "nonfinite.ckpt", weights_only=True)["global_step"] > SCALER_TRIES
