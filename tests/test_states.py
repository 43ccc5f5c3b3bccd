"""What a run keeps of itself."""

import errno

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from segformer import resume, states
from segformer.data.datamodule import SegmentationData
from segformer.errors import UserError, build
from segformer.inference import Protocol
from segformer.states import AtomicCheckpointIO, Averaging, Steering, last_checkpoints
from segformer.task import SegmentationTask
from tests.conftest import TOY, small
from tests.test_task import RECIPE, quiet


class _Unsaveable:
    def __reduce__(self):
        raise OSError("the network disk is gone")


def test_a_failing_save_keeps_the_previous_checkpoint(tmp_path) -> None:
    path = tmp_path / "run" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(OSError, match="the network disk is gone"):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "weights": torch.zeros(10**5), "bad": _Unsaveable()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


class _FullForAMoment:
    """Has no room for the second thing written to it; torch then covers the system's error with one of its own."""

    def __init__(self, file) -> None:
        self.file, self.writes = file, 0

    def write(self, content) -> int:
        self.writes += 1
        if self.writes == 2:
            raise OSError(errno.ENOSPC, "no room")
        return self.file.write(content)


def test_a_disk_that_was_full_for_a_moment_is_told_and_goes_by(tmp_path, monkeypatch, capfd) -> None:
    path, writer, save = tmp_path / "last.ckpt", AtomicCheckpointIO(), torch.save
    writer.save_checkpoint({"step": 1}, path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda checkpoint, file: save(checkpoint, _FullForAMoment(file)))
        patch.setattr(states, "_size", lambda checkpoint: 4 * 2**20)  # is measured by a save
        writer.save_checkpoint({"step": 2, "weights": torch.zeros(10**6)}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert f"the disk is full: {path} needs 4.0 MiB" in writer.unwritten["last.ckpt"]
    assert "the one before is as it was" in capfd.readouterr().err
    writer.save_checkpoint({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 3} and not writer.unwritten


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_last_ones_stay_the_newest_first(tmp_path, keep) -> None:
    for step in range(1, 7):
        AtomicCheckpointIO(keep).save_checkpoint({"step": step}, tmp_path / "last.ckpt")
        AtomicCheckpointIO(keep).save_checkpoint({"step": step}, tmp_path / "best.ckpt")
        kept = [torch.load(path, weights_only=True)["step"] for path in last_checkpoints(tmp_path)]
        assert kept == list(range(step, max(0, step - keep), -1))
    assert len(list(tmp_path.iterdir())) == keep + 1


class Weights(pl.Callback):
    """The weights after each optimiser step, before anything is averaged."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        if trainer.global_step > len(self.seen):
            self.seen.append({name: tensor.clone() for name, tensor in task.state_dict().items()})


def fitted(tmp_path, steps: int, callbacks: list[pl.Callback], **more) -> tuple[pl.Trainer, SegmentationTask]:
    loaders = build("data", SegmentationData, TOY | {"micro_batch_size": 1}, seed=0).opened("train", "val")
    task = SegmentationTask(small(loaders.classes.names), Protocol(), RECIPE | more.pop("optim", {}), steps)
    options = {"max_steps": steps, "val_check_interval": steps, "log_every_n_steps": 1, "default_root_dir": tmp_path}
    trainer = quiet(**(options | more), callbacks=callbacks)
    resume.share_batches(trainer, loaders)
    trainer.fit(task, loaders)
    return trainer, task


def test_the_average_is_the_recursion_written_out_and_what_is_kept_and_scored(tmp_path) -> None:
    weights, averaging = Weights(), Averaging(0.25)
    trainer, task = fitted(tmp_path, 6, [weights, averaging], optim={"lr": 1e-2})
    expected = {name: tensor.double() for name, tensor in weights.seen[0].items()}
    for step, current in enumerate(weights.seen[1:], 1):
        decay = min(0.25, (1 + step) / (10 + step))
        for name, tensor in current.items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    assert any(not torch.equal(weights.seen[-1][name].double(), tensor) for name, tensor in expected.items())
    for name, tensor in task.state_dict().items():  # after training the average is what is there
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(tensor, weights.seen[-1][name])  # counters are not averaged
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(torch.equal(tensor, task.state_dict()[name]) for name, tensor in kept["state_dict"].items())


class Validated(pl.Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer, task) -> None:
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("steps", "interval", "expected"),
    [(10, 4, [4, 8, 10]), (8, 4, [4, 8]), (3, 5, [3]), (1, 1, [1]), (5, 1, [1, 2, 3, 4, 5])],
)
def test_every_interval_and_the_last_step_are_validated_once(tmp_path, steps, interval, expected) -> None:
    validated = Validated()
    fitted(tmp_path, steps, [validated], val_check_interval=interval, limit_val_batches=1)  # two micro-batches a step
    assert validated.steps == expected


def test_a_run_without_a_better_score_ends_early(tmp_path) -> None:
    validated, steering = Validated(), Steering(checkpoint_interval=1, patience=2)
    (early,) = steering.callbacks("val/miou")
    assert isinstance(early, EarlyStopping)
    still = {"lr": 0.0, "warmup_steps": 0}
    fitted(tmp_path, 10, [validated, early], val_check_interval=2, limit_val_batches=1, optim=still)
    assert validated.steps[-1] < 10 and len(validated.steps) >= 3


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_gradient_is_clipped_to_the_norm_that_is_asked_for(tmp_path, precision) -> None:
    norms = []

    class Norm(pl.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
            norms.append(float(torch.cat([p.grad.flatten() for p in task.parameters()]).norm()))

    fitted(tmp_path, 3, [Norm()], gradient_clip_val=0.01, limit_val_batches=0, precision=precision)
    stepped = norms[1::2]  # two micro-batches a step
    assert len(stepped) == 3 and all(norm == pytest.approx(0.01, rel=1e-3) for norm in stepped)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"checkpoint_interval": 0}, "trainer.checkpoint_interval is 0, expected an integer of at least 1"),
        ({"keep_last": 0}, "trainer.keep_last is 0, expected an integer of at least 1"),
        ({"patience": 0}, "trainer.patience is 0, expected an integer of at least 1"),
        ({"patience": "two"}, "trainer.patience is 'two', expected an integer or null"),
        ({"ema_decay": 1}, "trainer.ema_decay is 1, expected more than 0 and less than 1, such as 0.999"),
    ],
)
def test_a_wrong_setting_is_one_sentence(options, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        Steering.split({"checkpoint_interval": 1, "devices": 1} | options)


def test_what_is_not_lightnings_is_split_off() -> None:
    steering, left = Steering.split({"checkpoint_interval": 7, "devices": 2, "ema_decay": 0.9})
    assert steering == Steering(7, 2, 0.9, None) and left == {"devices": 2}
    assert isinstance(steering.callbacks("val/miou")[0], Averaging)
