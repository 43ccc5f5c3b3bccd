"""The recipe as the training loop applies it: rates, losses and batches step by step."""

import os

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from segformer import resume
from segformer.callbacks import Monitor
from segformer.data.datamodule import SegmentationData
from segformer.errors import SharedError, build
from segformer.inference import Protocol
from segformer.losses import pixel_cross_entropy
from segformer.pixels import normalize
from segformer.task import SegmentationTask, synchronized
from tests.conftest import TOY, small

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
RECIPE = {
    "lr": 6e-5,
    "betas": [0.9, 0.999],
    "weight_decay": 0.01,
    "head_lr_multiplier": 10,
    "warmup_steps": 4,
    "warmup_ratio": 1e-6,
    "power": 1.0,
    "loss_denominator": "all",
}


class Record(pl.Callback):
    """What every optimiser step saw and logged; keeps BatchNorm frozen when asked to."""

    def __init__(self, frozen: bool = False) -> None:
        self.frozen, self.rates, self.losses, self.batches = frozen, [], [], []

    def on_train_batch_start(self, trainer, task, batch, batch_idx) -> None:
        if self.frozen:
            task.model.decode_head.batch_norm.eval()
        self.batches.append((batch["image"].clone(), batch["mask"].clone()))

    def on_before_optimizer_step(self, trainer, task, optimizer) -> None:
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        if trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def trained(record: Record, steps: int, optim: dict | None = None, **data) -> SegmentationTask:
    loaders = build("data", SegmentationData, TOY | data, seed=0).opened("train", "val")
    task = SegmentationTask(small(loaders.classes.names), Protocol(), RECIPE | (optim or {}), steps)
    options = {"max_steps": steps, "val_check_interval": steps, "limit_val_batches": 0, "log_every_n_steps": 1}
    trainer = quiet(**options, callbacks=[Monitor(), record])
    resume.share_batches(trainer, loaders)
    trainer.fit(task, loaders)
    return task


def quiet(**options) -> pl.Trainer:
    """A trainer on as many CPU processes as a launcher started, or on this one."""
    return pl.Trainer(
        **options, **resume.LOOP, accelerator="cpu", devices=PROCESSES, strategy="ddp" if PROCESSES > 1 else "auto",
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip


def test_the_rates_of_both_groups_follow_warm_up_times_decay_at_every_step() -> None:
    record = Record()
    trained(record, 10, batch_size=2, micro_batch_size=1)
    assert len(record.rates) == 10 and len(record.batches) == 20
    for step, rates in enumerate(record.rates):
        expected = 6e-5 * (1 - step / 10)
        if step < 4:
            expected *= 1 - (1 - step / 4) * (1 - 1e-6)
        assert rates["encoder"] == rates["norms"] == pytest.approx(expected, rel=1e-12)
        assert rates["head"] == pytest.approx(10 * expected, rel=1e-12)


def test_the_loss_is_divided_by_every_pixel_and_logged_for_the_whole_step() -> None:
    record = Record(frozen=True)
    trained(record, 1, batch_size=4, micro_batch_size=2, crop_size=160)
    torch.manual_seed(0)
    model = small([str(index) for index in range(8)]).train()
    model.decode_head.batch_norm.eval()
    images, masks = (torch.cat(parts) for parts in zip(*record.batches, strict=True))
    logits = model(normalize(images)).logits
    full = nn.functional.interpolate(logits, size=masks.shape[1:], mode="bilinear", align_corners=False)
    losses = nn.functional.cross_entropy(full, masks.long(), ignore_index=255, reduction="none")
    assert (masks == 255).any()
    assert record.losses == [pytest.approx((losses.sum() / masks.numel()).item(), rel=1e-5)]
    assert pixel_cross_entropy(logits, masks, denominator="valid").item() > record.losses[0] * 1.001


@pytest.mark.parametrize("micro", [8, 4])
def test_accumulated_micro_batches_train_like_the_whole_batch(micro) -> None:
    whole, parts = Record(frozen=True), Record(frozen=True)
    first = trained(whole, 50, batch_size=16)
    second = trained(parts, 50, batch_size=16, micro_batch_size=micro)
    assert len(whole.batches) == 50 and len(parts.batches) == 50 * 16 // micro
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_a_forward_pass_holds_no_gradients_but_those_it_adds_to(monkeypatch) -> None:
    held = []

    def loss_of(task, batch):
        held.append(any(parameter.grad is not None for parameter in task.model.parameters()))
        return original(task, batch)

    original = SegmentationTask.loss_of
    monkeypatch.setattr(SegmentationTask, "loss_of", loss_of)
    trained(Record(), 3, batch_size=4, micro_batch_size=2)
    assert held == [False, True] * 3


def test_a_run_that_goes_on_still_says_whose_weights_it_started_from(tiny) -> None:
    """It does not open the pretrained weights again, so the note must come out of its own checkpoint."""
    tiny.config.weights_license = "NVIDIA's own"
    before = {"hyper_parameters": {"model": tiny.config.to_dict(), "config": {"seed": 0}}}
    again = SegmentationTask(tiny, Protocol(), hyper_parameters={"model": {}, "config": {"seed": 0}})
    again.on_load_checkpoint(before)
    after: dict = {}
    again.on_save_checkpoint(after)
    assert after["hyper_parameters"] == before["hyper_parameters"]


def test_a_run_whose_classes_changed_does_not_go_on(tiny) -> None:
    names = dict(enumerate(["bird", "cat", "dog"]))
    checkpoint = {"hyper_parameters": {"model": {"id2label": names}, "config": {}}}
    model = small(["cat", "dog", "puma"])
    with pytest.raises(SharedError, match="where it has 'bird', the data has 'cat': restore the classes"):
        SegmentationTask(model, Protocol()).on_load_checkpoint(checkpoint)
    with pytest.raises(SharedError, match="has 2 classes, but the run learns 3, and where it has 'dog', the data has"):
        SegmentationTask(small(["bird", "cat"]), Protocol()).on_load_checkpoint(checkpoint)
    SegmentationTask(small(list(names.values())), Protocol()).on_load_checkpoint(checkpoint)


def test_the_recipes_denominator_holds_where_a_configuration_is_silent(tiny) -> None:
    assert SegmentationTask(tiny, Protocol()).loss == {"denominator": "all"}
    assert SegmentationTask(tiny, Protocol(), {"loss_denominator": "valid"}).loss == {"denominator": "valid"}


def test_class_weights_and_smoothing_of_the_configuration_reach_the_loss() -> None:
    record, weights = Record(frozen=True), [5.0, 1, 1, 1, 0.5, 1, 1, 2]
    trained(record, 1, {"class_weights": weights, "label_smoothing": 0.1}, batch_size=2, crop_size=160)
    torch.manual_seed(0)
    model = small([str(index) for index in range(8)]).train()
    model.decode_head.batch_norm.eval()
    ((images, masks),) = record.batches
    logits = model(normalize(images)).logits
    full = nn.functional.interpolate(logits, size=masks.shape[1:], mode="bilinear", align_corners=False)
    options = {"weight": torch.tensor(weights), "label_smoothing": 0.1, "ignore_index": 255, "reduction": "sum"}
    expected = nn.functional.cross_entropy(full, masks.long(), **options) / masks.numel()
    assert record.losses == [pytest.approx(expected.item(), rel=1e-5)]


def test_group_sizes_are_told_and_add_up() -> None:
    model = small([str(index) for index in range(8)])
    lines = SegmentationTask(model, Protocol(), RECIPE, 10).summary().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["encoder", "norms", "head"]
    assert "lr 6e-05, weight decay 0.01" in lines[0] and "weight decay 0" in lines[1] and "lr 0.0006" in lines[2]
    counts = [int(line.split()[1].replace(",", "")) for line in lines]
    assert sum(counts) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("device", "processes", "expected"), [("cuda", 2, 1), ("cuda", 1, 0), ("cpu", 2, 0)])
def test_batch_norm_spans_processes_on_cuda_only(device, processes, expected, tiny) -> None:
    names = list(tiny.state_dict())
    model = synchronized(tiny, device, processes)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) == expected
    assert list(model.state_dict()) == names
