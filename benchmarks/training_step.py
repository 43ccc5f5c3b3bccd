"""python benchmarks/training_step.py --models b0 b2 --json training_step.json

One optimiser step against transformers: the same weights and images, forward, loss, backward, AdamW; drop-path and
dropout on. Then the loss alone: upsampling and cross-entropy of 150 classes, forward and backward.
"""

from collections.abc import Callable
from typing import Any

import pairs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segformer.losses import pixel_cross_entropy
from segformer.pixels import normalize


def main() -> None:
    options = pairs.arguments(__doc__ or "", models=["b0", "b2"], batches=[2], rounds=7)
    steps = [
        step(variant, batch, precision, options)
        for variant in options.models
        for batch in options.batch
        for precision in options.precision
    ]
    losses = [loss_alone(batch, options) for batch in options.batch]
    pairs.publish("Training step", {"Step, times faster": steps, "Loss alone, times faster": losses}, options)


def step(variant: str, batch: int, precision: str, options: Any) -> dict[str, Any]:
    device = options.device
    theirs, ours = pairs.networks(variant, options.classes, device)
    images, masks = pairs.images(batch, options.size, device)
    pixels, labels = normalize(images), masks.long()

    def forward(network: nn.Module) -> Tensor:
        with pairs.precision(precision, device):
            loss: Tensor = network(pixels, labels=labels).loss
            return loss

    def stepper(network: nn.Module, fused: bool) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(network.train().parameters(), lr=6e-5, fused=fused)

        def run() -> None:
            optimizer.zero_grad()
            forward(network).backward()
            optimizer.step()

        return run

    runs = {"transformers": stepper(theirs, False), "segformer": stepper(ours, True)}
    seconds = pairs.interleave(runs, options.rounds, device)
    return {
        "model": variant,
        "batch": batch,
        "precision": precision,
        **pairs.compared(seconds),
        "transformers peak MiB": pairs.peak_mib(runs["transformers"], device),
        "segformer peak MiB": pairs.peak_mib(runs["segformer"], device),
        "transformers saved MiB": pairs.saved_mib(lambda: forward(theirs), theirs),
        "segformer saved MiB": pairs.saved_mib(lambda: forward(ours), ours),
    }


def loss_alone(batch: int, options: Any) -> dict[str, Any]:
    side = options.size // 4
    torch.manual_seed(0)
    logits = torch.randn(batch, options.classes, side, side, device=options.device, requires_grad=True)
    labels = pairs.images(batch, options.size, options.device)[1].long()

    def naive() -> Tensor:
        upsampled = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return torch.autograd.grad(F.cross_entropy(upsampled, labels, ignore_index=255), logits)[0]

    def banded() -> Tensor:
        return torch.autograd.grad(pixel_cross_entropy(logits, labels), logits)[0]

    seconds = pairs.interleave({"naive": naive, "banded": banded}, options.rounds, options.device)
    exact = naive()
    return {
        "batch": batch,
        "interpolate + cross_entropy ms": 1e3 * pairs.statistics.median(seconds["naive"]),
        "pixel_cross_entropy ms": 1e3 * pairs.statistics.median(seconds["banded"]),
        "ratio": pairs.ratio(seconds["naive"], seconds["banded"]),
        "share of its time": pairs.statistics.median(
            b / n for n, b in zip(seconds["naive"], seconds["banded"], strict=True)
        ),
        "naive extra MiB": pairs.peak_mib(naive, options.device),
        "banded extra MiB": pairs.peak_mib(banded, options.device),
        "gradient error, of the largest": ((banded() - exact).abs().max() / exact.abs().max()).item(),
    }


if __name__ == "__main__":
    main()
