"""Pixel cross-entropy at label size that never holds full-resolution logits.

Upsampling 150-class logits to 512 x 512 costs 157 MB an image in float32, log_softmax as much again and their gradient
twice that. Here a band of rows at a time is upsampled, scored and its exact gradient folded back to the logits' own
size in the forward pass, so only a tensor of that size is kept for backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from segformer.bilinear import band_rows, bilinear_matrix, row_bands, upsample_band
from segformer.errors import UserError
from segformer.labels import IGNORE


def pixel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE,
    denominator: Literal["valid", "all"] = "valid",
    class_weights: Sequence[float] | Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of bilinearly upsampled logits (align_corners False) against labels; a float32 scalar.

    logits: (B, K, h, w) of any float type, at least two classes. labels: (B, H, W) of any integer type, 0..K-1 or
    `ignore_index`. denominator: "valid" divides by the pixels that are not ignored (Hugging Face), "all" by every
    pixel (NVlabs, mmsegmentation). class_weights: K factors on the classes' losses; as in torch, "valid" then divides
    by the sum of the factors. label_smoothing: share of the target, 0 to 1, spread evenly over all classes, as in
    torch. A batch of ignored pixels only gives 0 with a zero gradient, never NaN.

    Not twice differentiable: the gradient is made in the forward pass.
    """
    classes = logits.shape[1]
    if classes < 2:
        raise UserError(f"logits have {classes} class, expected at least 2: declare the background as a class")
    if denominator not in ("valid", "all"):
        raise UserError(f"loss denominator is {denominator!r}, expected 'valid' or 'all'")
    if labels.ndim != 3 or len(labels) != len(logits):
        raise UserError(f"labels have shape {tuple(labels.shape)}, expected (batch {len(logits)}, height, width)")
    if not 0 <= label_smoothing <= 1:
        raise UserError(f"label_smoothing is {label_smoothing}, expected 0 to 1")
    if class_weights is not None:
        known = not isinstance(class_weights, Tensor) or class_weights.device.type == "cpu"  # no waiting for a GPU
        if len(class_weights) != classes or (known and min(class_weights) < 0):
            raise UserError(f"class_weights are {class_weights}, expected {classes} factors of at least 0")
        class_weights = torch.as_tensor(class_weights, device=logits.device)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to be waited for
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise UserError(
                f"labels hold {int(wrong[0])}, expected 0 to {classes - 1} or {ignore_index}: the model has {classes} "
                "classes; do the labels start at 1, or is the ignored value another one?"
            )
    return _PixelCrossEntropy.apply(logits, labels, ignore_index, denominator, class_weights, label_smoothing)


def binary_pixel_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Binary cross-entropy of one upsampled logit against labels 0 and 1; a float32 scalar.

    logits: (B, 1, h, w). labels: (B, H, W), 0, 1 or `ignore_index`. The mean is over all pixels, ignored ones counting
    zero, as transformers has it; other labels, which make its loss negative, are refused here.
    """
    scored = (labels >= 0) & (labels != ignore_index)
    if not torch.compiler.is_compiling() and bool((scored & (labels > 1)).any()):
        raise UserError(
            f"labels hold {int(labels[scored].max())}, expected 0, 1 or {ignore_index} for a model of one class: "
            "declare two classes, or map the object's value to 1"
        )
    exact = logits if logits.dtype == torch.float64 else logits.float()
    upsampled = F.interpolate(exact, size=labels.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    losses = F.binary_cross_entropy_with_logits(upsampled, labels.to(upsampled.dtype), reduction="none")
    return (losses * scored).mean()


class _PixelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        denominator: str,
        weights: Tensor | None,
        smoothing: float,
    ) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
            maps = logits.detach().to(dtype).permute(0, 2, 3, 1).contiguous()  # classes side by side for the softmax
            target = _Target(ignore_index, None if weights is None else weights.to(dtype), smoothing)
            total, gradient = _bands(maps, labels, target, with_gradient=ctx.needs_input_grad[0])
            count = target.count(labels) if denominator == "valid" else torch.full_like(total, labels.numel())
            if gradient is not None:  # divided in backward: a loss scale must come before the rounding to half
                ctx.save_for_backward(gradient.to(logits.dtype).permute(0, 3, 1, 2), count)
            return (total / count).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradient, count = ctx.saved_tensors
        return gradient * (grad_output / count), None, None, None, None, None


@dataclass(frozen=True)
class _Target:
    """What a pixel's logits are compared with."""

    ignore_index: int
    weights: Tensor | None  # (K,)
    smoothing: float

    def count(self, labels: Tensor) -> Tensor:
        """What the sum of the losses is divided by to make a mean over valid pixels; 1 where there is none."""
        scored = labels != self.ignore_index
        if self.weights is None:
            return scored.sum().clamp(min=1)
        total = self.weights[labels.long().masked_fill(~scored, 0)].masked_fill(~scored, 0).sum()
        return torch.where(total > 0, total, torch.ones_like(total))

    def score(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """logits (P, K) -> the pixels' losses (P,) and their gradient (P, K), both zero where ignored.

        Without weights and smoothing the gradient is softmax - onehot. In general the target is t: `1 - smoothing`, and
        the same share as everyone, at the label; the loss is -sum(w t log p), its gradient p sum(w t) - w t.
        """
        ignored = labels == self.ignore_index
        index = labels.long().masked_fill(ignored, 0).unsqueeze(1)  # (P, 1)
        log_probability = logits.log_softmax(dim=1)
        hit = torch.full_like(index, 1 - self.smoothing, dtype=logits.dtype)
        if self.weights is not None:
            hit = hit * self.weights[index]
        loss = -hit * log_probability.gather(1, index)
        share = None
        if self.smoothing:
            weights = torch.ones_like(logits[0]) if self.weights is None else self.weights
            share = self.smoothing / logits.shape[1] * weights  # (K,)
            loss = loss - (log_probability @ share)[:, None]
        slope = log_probability.exp_()
        if self.weights is not None or share is not None:
            slope *= hit if share is None else hit + share.sum()
        slope.scatter_add_(1, index, -hit)
        if share is not None:
            slope -= share
        return loss.squeeze(1).masked_fill(ignored, 0), slope.mul_(~ignored[:, None])


def _bands(maps: Tensor, labels: Tensor, target: _Target, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the pixel losses (float64 scalar) and its gradient by maps (B, h, w, K)."""
    height, width, classes = maps.shape[1:]
    rows, columns = labels.shape[1:]
    vertical = bilinear_matrix(height, rows, maps.device, maps.dtype)  # (H, h)
    across = bilinear_matrix(width, columns, maps.device, maps.dtype)  # (W, w)
    band = band_rows(columns * classes, maps.device)
    wide = torch.float32 if maps.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    total = torch.zeros((), dtype=wide, device=maps.device)
    gradients = []
    folded = maps.new_zeros(height, columns * classes) if with_gradient else None  # rows are back at their number
    for image, label in zip(maps, labels, strict=True):
        for out, source in row_bands(height, rows, band):
            logits = upsample_band(image[source], vertical[out, source], columns)  # (R, W, K)
            losses, slope = target.score(logits.reshape(-1, classes), label[out].reshape(-1))
            total += losses.sum(dtype=wide)
            if folded is not None:
                folded[source].addmm_(vertical[out, source].T, slope.view(-1, columns * classes))
        if folded is not None:
            gradients.append(across.T @ folded.view(height, columns, classes))  # (h, w, K)
            folded.zero_()
    return total, torch.stack(gradients) if with_gradient else None
