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


# looked at before the step, as on a CPU, or one step later, as on a GPU
LATE = pytest.mark.parametrize("late", [(), ("cpu",)], ids=["at once", "a step later"])


def fit(
    tmp_path, steps: int, scale: float | None = None, late=(), every: int = 1000, average=None, resumed=None, **optim
) -> tuple[Steps, SegmentationTask]:
    data = build("data", SegmentationData, TOY, seed=0).opened("train", "val")
    hyper_parameters = {"model": {}, "config": {}}
    task = SegmentationTask(
        small(data.classes.names), Protocol(), RECIPE | optim, steps, hyper_parameters=hyper_parameters
    )
    last, seen = LastCheckpoint(tmp_path, Steering(every), {}), Steps()
    half = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))] if scale else []
    trainer = pl.Trainer(
        max_steps=steps, val_check_interval=steps, limit_val_batches=0, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, plugins=half, **resume.LOOP,
        callbacks=[seen, Stops(last, late), *Steering(every, ema_decay=average).callbacks("val/miou"), last],
    )  # fmt: skip
    resume.share_batches(trainer, data)
    trainer.fit(task, data, ckpt_path=resumed, weights_only=True)
    return seen, task


def test_the_norm_is_that_of_all_gradients_together(tiny) -> None:
    frozen, *learning = tiny.parameters()
    frozen.requires_grad_(False)
    tiny(torch.randn(1, 3, 64, 64)).logits.square().mean().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in learning]).norm()
    torch.testing.assert_close(gradient_norm(torch.optim.SGD(learning)), expected)


@LATE
def test_a_loss_that_is_no_number_stops_before_the_weights_change(tmp_path, late) -> None:
    with pytest.raises(SharedError) as stop:
        fit(tmp_path, 20, late=late, lr=1e25, warmup_steps=0)
    sentence = str(stop.value)
    step = int(sentence.partition(" at step ")[2].partition(",")[0])
    assert step < 20 and sentence.startswith("the loss is nan at step")
    assert f"resume={tmp_path}/nonfinite.ckpt takes the same step again. Likely causes: too high a" in sentence
    assert "try a tenth of optim.lr=1e+25" in sentence and "gradient_clip_val=1" in sentence
    assert "precision" not in sentence and "one of the samples: scene_0_000" in sentence
    kept = torch.load(tmp_path / "nonfinite.ckpt", weights_only=True)
    assert kept["global_step"] == step
    assert all(torch.isfinite(t).all() for name, t in kept["state_dict"].items() if "running" not in name)


def broken_at(step: int, monkeypatch) -> None:
    """The loss of this step is infinite, its gradient is not."""
    plain = SegmentationTask.loss_of
    extra = lambda task: float("inf") if task.global_step == step else 0.0  # noqa: E731
    monkeypatch.setattr(SegmentationTask, "loss_of", lambda task, batch: plain(task, batch) + extra(task))


@LATE
@pytest.mark.parametrize("steps", [1, 3])  # the last step of all, too
def test_an_infinite_loss_stops_even_where_its_gradient_is_finite(tmp_path, monkeypatch, steps, late) -> None:
    broken_at(0, monkeypatch)
    with pytest.raises(SharedError, match="the loss is inf at step 0, so training stopped before the step changed"):
        fit(tmp_path, steps, late=late)


@pytest.mark.parametrize("average", [None, 0.9])
@pytest.mark.parametrize("every", [1000, 3])  # found in the next step, or before a checkpoint is written
def test_what_is_seen_a_step_later_leaves_the_state_that_is_seen_at_once(tmp_path, monkeypatch, every, average) -> None:
    broken_at(2, monkeypatch)
    kept = {}
    for late in ((), ("cpu",)):
        run = tmp_path / f"late{len(late)}"
        with pytest.raises(SharedError, match="the loss is inf at step 2, .* one of the samples: scene_"):
            fit(run, 6, late=late, every=every, average=average)
        kept[late] = torch.load(run / "nonfinite.ckpt", weights_only=True)
        assert not (run / "last.ckpt").exists()
    at_once, later = kept.values()
    assert later["global_step"] == at_once["global_step"] == 2
    for name, tensor in at_once["state_dict"].items():
        if "running" not in name and "num_batches" not in name:  # of BatchNorm, which has seen one batch more
            torch.testing.assert_close(later["state_dict"][name], tensor, rtol=1e-6 if average else 0, atol=1e-8)
    if average:
        assert later["averaging_state"]["n_averaged"] == at_once["averaging_state"]["n_averaged"] == 2
        assert later["callbacks"]["Averaging"] == at_once["callbacks"]["Averaging"]
    assert later["lr_schedulers"][0]["last_epoch"] == at_once["lr_schedulers"][0]["last_epoch"]
    (mine,), (other,) = later["optimizer_states"], at_once["optimizer_states"]
    assert mine["param_groups"] == other["param_groups"]
    torch.testing.assert_close(mine["state"], other["state"], rtol=0, atol=0)


@pytest.mark.parametrize("average", [None, 0.9])
def test_a_run_that_stays_finite_is_the_same_looked_at_later(tmp_path, average) -> None:
    found = [fit(tmp_path / f"late{len(late)}", 5, late=late, average=average)[1] for late in ((), ("cpu",))]
    weights = [task.model.state_dict() for task in found]
    torch.testing.assert_close(*weights, rtol=1e-6 if average else 0, atol=1e-8 if average else 0)


def test_a_run_goes_on_from_what_was_not_finite_as_if_nothing_had_happened(tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        broken_at(2, patch)
        with pytest.raises(SharedError):
            fit(tmp_path / "run", 5, late=("cpu",), average=0.9)
    _, again = fit(tmp_path / "again", 5, late=("cpu",), average=0.9, resumed=tmp_path / "run" / "nonfinite.ckpt")
    _, unbroken = fit(tmp_path / "unbroken", 5, late=("cpu",), average=0.9)
    for (name, found), expected in zip(again.model.named_parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_fp16_may_overflow_until_its_scale_fits(tmp_path) -> None:
    seen, task = fit(tmp_path, 16, scale=2.0**36)
    assert len(seen.scales) == 16 and seen.scales[-1] < seen.scales[0]  # halved step by step, and trained on
    assert all(torch.isfinite(parameter).all() for parameter in task.parameters())


def test_fp16_that_overflows_whatever_its_scale_is_stopped(tmp_path) -> None:
    with pytest.raises(SharedError, match="not finite|is nan|is inf"):
        fit(tmp_path, 200, scale=2.0**16, lr=1e25, warmup_steps=0)
    assert torch.load(tmp_path / "nonfinite.ckpt", weights_only=True)["global_step"] > SCALER_TRIES
