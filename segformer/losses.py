"""Pixel cross-entropy at label size that never holds full-resolution logits.

Upsampling 150-class logits to 512 x 512 costs 157 MB an image in float32, log_softmax as much again and their gradient
twice that. Here a band of rows at a time is upsampled, scored and its exact gradient folded back to the logits' own
size in the forward pass, so only a tensor of that size is kept for backward.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from segformer.errors import UserError
from segformer.labels import IGNORE
from segformer.pixels import BAND_NUMBERS, bilinear_matrix, row_bands, upsample_rows


def pixel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE,
    denominator: Literal["valid", "all"] = "valid",
) -> Tensor:
    """Cross-entropy of bilinearly upsampled logits (align_corners False) against labels; a float32 scalar.

    logits: (B, K, h, w) of any float type, at least two classes. labels: (B, H, W) of any integer type, 0..K-1 or
    `ignore_index`. denominator: "valid" divides by the pixels that are not ignored (Hugging Face), "all" by every
    pixel (NVlabs, mmsegmentation). A batch of ignored pixels only gives 0 with a zero gradient, never NaN.

    Not twice differentiable: the gradient is made in the forward pass.
    """
    if logits.shape[1] < 2:
        raise UserError(f"logits have {logits.shape[1]} class, expected at least 2: declare the background as a class")
    if denominator not in ("valid", "all"):
        raise UserError(f"loss denominator is {denominator!r}, expected 'valid' or 'all'")
    if labels.ndim != 3 or len(labels) != len(logits):
        raise UserError(f"labels have shape {tuple(labels.shape)}, expected (batch {len(logits)}, height, width)")
    return _PixelCrossEntropy.apply(logits, labels, ignore_index, denominator)


class _PixelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, denominator: str) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
            maps = logits.detach().to(dtype).contiguous()  # class by class: softmax then runs along whole rows
            total, gradient = _bands(maps, labels, ignore_index, with_gradient=ctx.needs_input_grad[0])
            valid = (labels != ignore_index).sum()
            count = valid.clamp(min=1) if denominator == "valid" else torch.full_like(valid, labels.numel())
            if gradient is not None:  # divided in backward: a loss scale must come before the rounding to half
                ctx.save_for_backward(gradient.to(logits.dtype), count)
            return (total / count).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, count = ctx.saved_tensors
        return gradient * (grad_output / count), None, None, None


def _bands(maps: Tensor, labels: Tensor, ignore_index: int, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the pixel losses (float64 scalar) and its gradient by maps (B, K, h, w)."""
    batch, classes, height, width = maps.shape
    rows, columns = labels.shape[1:]
    vertical = bilinear_matrix(height, rows, maps.device, maps.dtype)  # (H, h)
    across = bilinear_matrix(width, columns, maps.device, maps.dtype)  # (W, w)
    band = max(1, BAND_NUMBERS.get(maps.device.type, BAND_NUMBERS["cuda"]) // (columns * classes))
    wide = torch.float32 if maps.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    total = torch.zeros((), dtype=wide, device=maps.device)
    gradient = torch.zeros_like(maps) if with_gradient else None
    for image in range(batch):
        for out, source in row_bands(height, rows, band):
            down = vertical[out, source]  # (R, rows of the source)
            logits = upsample_rows(maps[image, :, source], down, across)  # (K, R, W)
            nll, slope = _score(logits.view(classes, -1), labels[image, out].reshape(-1), ignore_index)
            total += nll.sum(dtype=wide)
            if gradient is not None:
                narrow = (slope.view(-1, columns) @ across).view(classes, -1, width)  # (K, R, w)
                gradient[image, :, source] += down.T @ narrow
    return total, gradient


def _score(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """logits (K, P) -> pixel losses (P,) and their gradient softmax - onehot (K, P), both zero where ignored."""
    ignored = labels == ignore_index
    targets = labels.long().masked_fill(ignored, 0).unsqueeze(0)  # (1, P)
    log_probability = logits.log_softmax(dim=0)
    nll = -log_probability.gather(0, targets).squeeze(0).masked_fill(ignored, 0)
    slope = log_probability.exp_()
    slope.scatter_add_(0, targets, torch.full_like(targets, -1, dtype=slope.dtype))
    return nll, slope.mul_(~ignored)
