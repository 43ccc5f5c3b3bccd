"""Training a classifier, whose encoder a segmentation network then starts from."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from segformer.checkpoints import Pretrained
from segformer.errors import UserError, build
from segformer.inference import normalized
from segformer.task import Task

TOP = 5


class Hits(Metric):
    """How many images have their class among the `TOP` likeliest and as the likeliest, summed over processes."""

    full_state_update = False
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")  # images, top 1, top 5

    def update(self, logits: Tensor, label: Tensor) -> None:
        """logits: (B, K). label: (B,) int64."""
        likeliest = logits.topk(min(TOP, logits.shape[1])).indices
        hits = likeliest == label[:, None]
        self.counts += torch.stack([torch.tensor(len(label), device=hits.device), hits[:, 0].sum(), hits.sum()])

    def compute(self) -> Tensor:
        return self.counts


def class_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """logits: (B, K). labels: (B,) classes, or (B, K) probabilities. label_smoothing: 0 to 1; a float32 scalar."""
    if not 0 <= label_smoothing <= 1:
        raise UserError(f"label_smoothing is {label_smoothing}, expected 0 to 1")
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


class ClassificationTask(Task):
    """Trains and scores a `SegformerForImageClassification`.

    The loss is the cross-entropy with the class, or with the probabilities of mixed images. Logged are `val/top1` and
    `val/top5`: shares of the validation images whose class is the likeliest, or among the five likeliest.
    """

    MONITOR = "val/top1"
    LOSS = {"label_smoothing": "label_smoothing"}

    def __init__(
        self,
        model: Pretrained,
        optim: dict[str, Any] | None = None,
        max_steps: int = 1,
        seed: int = 0,
        hyper_parameters: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, optim, max_steps, seed, hyper_parameters)
        anything = torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
        build("optim", class_cross_entropy, self.loss, logits=anything[0], labels=anything[1])  # refuses what is wrong
        self.hits = Hits()
        self.images_scored = 0

    def loss_of(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(normalized(self.model, batch["image"])).logits
        return class_cross_entropy(logits, batch["label"], **self.loss)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self.model(normalized(self.model, batch["image"])).logits
        self.hits.update(logits.float(), batch["label"])

    def on_validation_epoch_end(self) -> None:
        self.images_scored, top1, top5 = self.hits.compute().tolist()
        self.hits.reset()
        self.log_dict({"val/top1": top1 / self.images_scored, "val/top5": top5 / self.images_scored})
