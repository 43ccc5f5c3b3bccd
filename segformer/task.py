"""What is done with a batch: loss in training, a confusion matrix in validation."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from segformer.checkpoints import Pretrained
from segformer.data.sampler import mix
from segformer.errors import SharedError, build
from segformer.inference import Protocol, normalized, score
from segformer.losses import segmentation_loss
from segformer.metrics import Scores
from segformer.optim import adamw


class Confusion(Metric):
    """(K, K) counts and the number of images behind them, summed over processes."""

    full_state_update = False
    matrix: Tensor
    images: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.add_state("matrix", torch.zeros(classes, classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, matrix: Tensor, images: int) -> None:
        self.matrix += matrix
        self.images += images

    def compute(self) -> tuple[Tensor, Tensor]:
        return self.matrix, self.images


def synchronized(model: Pretrained, device: str, processes: int) -> Pretrained:
    """BatchNorm over the samples of all processes, as the recipe has it; PyTorch offers that on CUDA alone."""
    if device != "cuda" or processes == 1:
        return model
    together: Pretrained = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return together


class Task(pl.LightningModule):
    """What training is, whatever is learnt: a loss a step, the recipe's optimiser, chance that follows from the step.

    optim: keywords of `optim.adamw` and of the loss (`LOSS`). hyper_parameters: plain values written into every
    checkpoint. A kind of task adds `loss_of`, what validation scores, and the names of both.
    """

    MONITOR = ""  # the logged score that decides which checkpoint is best
    LOSS: Mapping[str, str] = {}  # keys of the config section `optim` -> arguments of the loss

    def __init__(
        self,
        model: Pretrained,
        optim: dict[str, Any] | None = None,
        max_steps: int = 1,
        seed: int = 0,
        hyper_parameters: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.max_steps, self.seed = model, max_steps, seed
        self.optim = dict(optim or {})
        self.loss: dict[str, Any] = {name: self.optim.pop(key) for key, name in self.LOSS.items() if key in self.optim}
        self.hyper_parameters = hyper_parameters or {}
        self.step_losses: list[Tensor] = []  # of the micro-batches of the optimiser step at hand
        self.step_loss = torch.zeros(())  # of all of them on this process
        self.gradient_norm = torch.zeros(())  # before clipping

    def loss_of(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss of a batch; a float32 scalar."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        if stage == "fit":
            parts = self.trainer.accumulate_grad_batches
            if parts > 1 and getattr(self.model, "recorded", False):
                # the second part's gradients overwrite the first's: pytorch/pytorch#169545
                raise SharedError(
                    f"model.compile records CUDA graphs, which cannot add up the gradients of {parts} micro-batches: "
                    "leave out data.micro_batch_size, or use model.compile=true"
                )
            self.model = synchronized(self.model, self.trainer.strategy.root_device.type, self.trainer.world_size)

    def configure_optimizers(self) -> Any:
        # fused AdamW undoes fp16's loss scale itself, after gradients were clipped and measured: not with a scaler
        scaled = self._trainer is not None and getattr(self.trainer.precision_plugin, "scaler", None) is not None
        more = {"model": self.model, "max_steps": self.max_steps, "fused": not scaled}
        optimizer, schedule = build("optim", adamw, self.optim, **more)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning's own, which refuses fused optimisers under bf16-mixed, though nothing is scaled there."""
        if gradient_clip_val:
            clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
            clip([parameter for group in optimizer.param_groups for parameter in group["params"]], gradient_clip_val)

    def summary(self) -> str:
        """How many parameters learn at which rate: a line a group."""
        lines = []
        for group in self.configure_optimizers()["optimizer"].param_groups:
            count = sum(parameter.numel() for parameter in group["params"])
            lines.append(
                f"{group['name']}: {count:,} parameters in {len(group['params'])} tensors, "
                f"lr {group['initial_lr']:g}, weight decay {group['weight_decay']:g}"
            )
        return "\n".join(lines)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        accumulated = batch_idx % self.trainer.accumulate_grad_batches
        if accumulated == 0:  # Lightning would keep the last step's gradients until this step's forward pass is done
            self.trainer.optimizers[0].zero_grad()
        # dropout and drop-path follow from (seed, step, process): a resumed run draws what an unbroken one draws
        torch.manual_seed(mix(self.seed, self.global_step, accumulated, self.global_rank))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss_of(batch)
        self.step_losses.append(loss.detach())
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch:
            self.step_loss = torch.stack(self.step_losses).mean()
            self.step_losses.clear()
        return loss

    def uncompiled(self) -> AbstractContextManager[Any]:
        """In validation: every image may have a size of its own, and each would be compiled for."""
        compiled = self.model._compiled_call_impl is not None
        return torch.compiler.set_stance("force_eager") if compiled else nullcontext()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Lightning validates every interval and, once told to stop, after the step at hand: never missing the last
        if self.global_step == self.max_steps:
            self.trainer.should_stop = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # a run that goes on does not open its pretrained weights again: what is known of them stands here
        trained = checkpoint["hyper_parameters"]["model"]
        if "id2label" in trained:
            _require_same_classes(trained["id2label"].values(), self.model.config.id2label.values())
        self.hyper_parameters["model"] = trained

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hyper_parameters"] = self.hyper_parameters


def _require_same_classes(trained: Iterable[str], found: Iterable[str]) -> None:
    """Raises SharedError where folders or columns, which name a dataset's classes, changed since the run began."""
    before, now = [*trained], [*found]
    if before != now:
        other = next(pair for pair in zip_longest(before, now, fillvalue="no class") if pair[0] != pair[1])
        raise SharedError(
            f"the data has {len(now)} classes, but the run learns {len(before)}, and where it has {other[0]!r}, the "
            f"data has {other[1]!r}: restore the classes of data.train, or start a new run with model.pretrained="
        )


class SegmentationTask(Task):
    """Trains and scores a SegFormer; protocol: how validation turns images into label maps."""

    MONITOR = "val/miou"
    LOSS = {
        "loss_denominator": "denominator",
        "class_weights": "class_weights",
        "label_smoothing": "label_smoothing",
        "ohem_threshold": "ohem_threshold",
        "ohem_min_kept": "ohem_min_kept",
        "dice_weight": "dice_weight",
    }

    def __init__(
        self,
        model: Pretrained,
        protocol: Protocol,
        optim: dict[str, Any] | None = None,
        max_steps: int = 1,
        seed: int = 0,
        hyper_parameters: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, optim, max_steps, seed, hyper_parameters)
        self.loss = {"denominator": "all", **self.loss}  # the recipe's, where a configuration is silent
        anything = torch.zeros(1, model.config.num_labels, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long)
        build("optim", segmentation_loss, self.loss, logits=anything[0], labels=anything[1])  # refuses what is wrong
        factors = self.loss.pop("class_weights", None)
        self.class_weights = None if factors is None else torch.tensor(factors, dtype=torch.float32)
        self.protocol = protocol
        self.confusion = Confusion(model.config.num_labels)
        self.scores = Scores.from_confusion(self.confusion.matrix)  # of the latest validation; all absent before it
        self.images_scored = 0

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.class_weights is not None:  # sent at each step, they would have the host wait for the device
            self.class_weights = self.class_weights.to(self.trainer.strategy.root_device)

    def loss_of(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(normalized(self.model, batch["image"])).logits
        return segmentation_loss(logits, batch["mask"], class_weights=self.class_weights, **self.loss)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # DDP hands the first process's BatchNorm statistics to all before their first image: one network is scored
        with self.uncompiled():
            found = score(self.model, batch["image"], batch["mask"], len(self.confusion.matrix), self.protocol)
        labels, matrix = found
        self.confusion.update(matrix, len(labels))
        return labels

    def on_validation_epoch_end(self) -> None:
        matrix, images = self.confusion.compute()
        self.confusion.reset()
        self.scores, self.images_scored = Scores.from_confusion(matrix), int(images)
        self.log_dict({"val/miou": self.scores.miou, "val/macc": self.scores.macc, "val/aacc": self.scores.aacc})
