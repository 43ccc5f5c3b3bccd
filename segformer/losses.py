"""Losses, of pixels at label size without full-resolution logits: cross-entropy, its hard pixels (OHEM), Dice.

Upsampling 150-class logits to 512 x 512 costs 157 MB an image in float32, log_softmax as much again and their gradient
twice that. Here a band of rows at a time is upsampled, scored and its exact gradient folded back to the logits' own
size in the forward pass, so only a tensor of that size is kept for backward. OHEM and Dice need something of the whole
batch before a pixel's gradient is known: they go over the bands twice.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from segformer.bilinear import band_rows, bilinear_matrix, row_bands, upsample_band
from segformer.errors import UserError, nearest
from segformer.kernels import usable
from segformer.labels import IGNORE


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE,
    denominator: Literal["valid", "all"] = "valid",
    class_weights: Sequence[float] | Tensor | None = None,
    label_smoothing: float = 0.0,
    ohem_threshold: float | None = None,
    ohem_min_kept: int = 100_000,
    dice_weight: float = 0.0,
) -> Tensor:
    """`pixel_cross_entropy` with all its options plus dice_weight (at least 0) times `dice_loss`; a float32 scalar."""
    if not 0 <= dice_weight < math.inf:
        raise UserError(f"dice_weight is {dice_weight}, expected a number of at least 0; 0 trains without Dice")
    loss = pixel_cross_entropy(
        logits, labels, ignore_index, denominator, class_weights, label_smoothing, ohem_threshold, ohem_min_kept
    )
    return loss + dice_weight * dice_loss(logits, labels, ignore_index) if dice_weight else loss


def pixel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE,
    denominator: Literal["valid", "all"] = "valid",
    class_weights: Sequence[float] | Tensor | None = None,
    label_smoothing: float = 0.0,
    ohem_threshold: float | None = None,
    ohem_min_kept: int = 100_000,
) -> Tensor:
    """Cross-entropy of bilinearly upsampled logits (align_corners False) against labels; a float32 scalar.

    logits: (B, K, h, w) of any float type, at least two classes. labels: (B, H, W) of any integer type, 0..K-1 or
    `ignore_index`. denominator: "valid" divides by the pixels that are not ignored (Hugging Face), "all" by every
    pixel (NVlabs, mmsegmentation). class_weights: K factors on the classes' losses; as in torch, "valid" then divides
    by the sum of the factors. label_smoothing: share of the target, 0 to 1, spread evenly over all classes, as in
    torch. A batch of ignored pixels only gives 0 with a zero gradient, never NaN.

    ohem_threshold: above 0, at most 1; online hard example mining keeps the pixels whose probability of the true class
    is below it, the others cost nothing. ohem_min_kept: so many of the hardest labelled pixels of this batch are kept
    in any case (mmsegmentation counts them per image), all where there are fewer, and all that are as hard as the last
    of them; neither class weights nor smoothing change what is hard. "valid" then divides by the pixels kept (by the
    sum of their factors), "all" still by every pixel, so that easy pixels count as zeros.

    Not twice differentiable: the gradient is made in the forward pass (by a kernel, where one can take the logits and
    nothing is mined, in the backward pass).
    """
    classes = logits.shape[1]
    if denominator not in ("valid", "all"):
        raise UserError(f"loss denominator is {denominator!r}, expected 'valid' or 'all'")
    if not 0 <= label_smoothing <= 1:
        raise UserError(f"label_smoothing is {label_smoothing}, expected 0 to 1")
    if ohem_threshold is not None and not 0 < ohem_threshold <= 1:
        raise UserError(
            f"ohem_threshold is {ohem_threshold}, expected a probability above 0, at most 1; null keeps every pixel"
        )
    if not isinstance(ohem_min_kept, int) or ohem_min_kept < 0:
        raise UserError(f"ohem_min_kept is {ohem_min_kept}, expected a whole number of pixels of at least 0")
    labels = _checked(logits, labels, ignore_index)
    if class_weights is not None:
        _check_factors(class_weights, classes)
        class_weights = _exact(torch.as_tensor(class_weights, device=logits.device), like=logits)
    if ohem_threshold is None and usable(logits):
        from segformer.kernels.cross_entropy import fits, upsample_cross_entropy

        if fits(logits, labels):
            return upsample_cross_entropy(logits, labels, ignore_index, denominator, class_weights, label_smoothing)
    objective = _CrossEntropy(ignore_index, denominator, class_weights, label_smoothing, ohem_threshold, ohem_min_kept)
    return _BandedLoss.apply(logits, labels, objective)


def dice_loss(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE, smooth: float = 1.0) -> Tensor:
    """1 - soft Dice, the mean over the classes that the batch's labels hold; a float32 scalar, 0 to 1.

    logits, labels: as in `pixel_cross_entropy`. A class's Dice is (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth),
    p its softmax probability at label size, t 1 where it is the label, summed over the labelled pixels of all images
    of this process's batch at once. smooth: in pixels, at least 0; 1 as in mmsegmentation 0.x. Classes without a
    labelled pixel are left out: their Dice says nothing but "predict less". A batch of ignored pixels only gives 0
    with a zero gradient. The linear sums are Drozdzal et al. 2016's, the squared ones V-Net's (Milletari et al. 2016).

    Not twice differentiable: the gradient is made in the forward pass.
    """
    if not 0 <= smooth < math.inf:
        raise UserError(f"smooth is {smooth}, expected a number of pixels of at least 0")
    labels = _checked(logits, labels, ignore_index)
    return _BandedLoss.apply(logits, labels, _Dice(ignore_index, smooth))


def binary_pixel_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Binary cross-entropy of one upsampled logit against labels 0 and 1; a float32 scalar.

    logits: (B, 1, h, w). labels: (B, H, W), 0, 1 or `ignore_index`. The mean is over all pixels, ignored ones counting
    zero, as transformers has it; other labels, which make its loss negative, are refused here.
    """
    labels = _comparable(labels, ignore_index)
    scored = (labels >= 0) & (labels != ignore_index)
    if not torch.compiler.is_compiling() and bool((scored & (labels > 1)).any()):
        raise UserError(
            f"labels hold {int(labels[scored].max())}, expected 0, 1 or {ignore_index} for a model of one class: "
            "declare two classes, or map the object's value to 1"
        )
    upsampled = F.interpolate(_exact(logits), size=labels.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    losses = F.binary_cross_entropy_with_logits(upsampled, labels.to(upsampled.dtype), reduction="none")
    return (losses * scored).mean()


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None = None) -> Tensor:
    """The loss of whole images by transformers' rules; a scalar.

    logits: (B, K). labels: (B,) numbers or class ids, (B, K) floats for several classes at once. problem_type:
    "regression" (squared error), "single_label_classification" (cross-entropy) or "multi_label_classification" (binary
    cross-entropy); None: regression of one class, else floats are several at once.
    """
    kinds = ("regression", "single_label_classification", "multi_label_classification")
    guess = kinds[0] if logits.shape[1] == 1 else kinds[2 if labels.is_floating_point() else 1]
    kind = problem_type or guess
    if kind == "regression":
        return F.mse_loss(logits.flatten(), labels.to(logits.dtype).flatten())
    if kind == "single_label_classification":
        return F.cross_entropy(logits, labels.long().view(-1))
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    raise UserError(f"problem_type is {kind!r}{nearest(kind, kinds)}: choose from {', '.join(kinds)}")


def _readable(values: Tensor) -> bool:
    """Whether values can be looked at for errors: a GPU would have to be waited for, a compiler breaks its graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_factors(factors: Any, classes: int) -> None:
    try:
        values = torch.as_tensor(factors)
    except (TypeError, ValueError, RuntimeError):  # words, gaps
        values = torch.zeros(0)
    right = values.shape == (classes,)
    if right and _readable(values):
        right = bool(values.isfinite().all() and (values >= 0).all() and (values > 0).any())
    if not right:
        raise UserError(f"class_weights are {factors}, expected {classes} factors of at least 0, not all of them 0")


def _comparable(labels: Tensor, *numbers: int) -> Tensor:
    """Labels of a type that holds these numbers: a byte takes -100 for 156, and 256 for 0."""
    if labels.is_floating_point():
        return labels
    labels = labels.byte() if labels.dtype == torch.bool else labels
    for kind in (labels.dtype, torch.int32):
        limits = torch.iinfo(kind)
        if all(limits.min <= number <= limits.max for number in numbers):
            return labels.to(kind)
    return labels.long()


def _checked(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """The labels, of a type that they can be compared in."""
    classes = logits.shape[1]
    if classes < 2:
        raise UserError(f"logits have {classes} class, expected at least 2: declare the background as a class")
    if labels.ndim != 3 or len(labels) != len(logits):
        raise UserError(f"labels have shape {tuple(labels.shape)}, expected (batch {len(logits)}, height, width)")
    labels = _comparable(labels, ignore_index, classes)
    if _readable(labels):
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise UserError(
                f"labels hold {int(wrong[0])}, expected 0 to {classes - 1} or {ignore_index}: the model has {classes} "
                "classes; do the labels start at 1, or is the ignored value another one?"
            )
    return labels


def _exact(values: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or in float64 where `like` (the values themselves) already is."""
    return values.to(torch.float64 if (values if like is None else like).dtype == torch.float64 else torch.float32)


class _BandedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, objective: "_CrossEntropy | _Dice") -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            maps = _exact(logits.detach()).permute(0, 2, 3, 1).contiguous()  # classes side by side for the softmax
            loss, gradient = objective(maps, labels, ctx.needs_input_grad[0])
            if gradient is not None:  # kept with largest value 1: a loss scale must come before the rounding to half
                peak = gradient.abs().amax().clamp(min=torch.finfo(gradient.dtype).tiny)
                ctx.save_for_backward((gradient / peak).to(logits.dtype).permute(0, 3, 1, 2), peak)
            return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradient, peak = ctx.saved_tensors
        return gradient * (grad_output * peak), None, None


@dataclass(frozen=True)
class _CrossEntropy:
    """Called with maps (B, h, w, K) and labels (B, H, W): the mean loss and, if wanted, its gradient by the maps."""

    ignore_index: int
    denominator: str
    weights: Tensor | None  # (K,)
    smoothing: float
    threshold: float | None
    min_kept: int

    def __call__(self, maps: Tensor, labels: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        if self.threshold is not None:
            labels = self.hard(maps, labels, self.threshold)
        losses, gradient = _bands(maps, labels, self.score, with_gradient)
        count = self.count(labels) if self.denominator == "valid" else labels.numel()
        loss = torch.stack(losses).sum() / count
        return loss.to(maps.dtype), None if gradient is None else gradient / count

    def hard(self, maps: Tensor, labels: Tensor, threshold: float) -> Tensor:
        """The labels, every easy pixel ignored."""

        def read(logits: Tensor, label: Tensor) -> tuple[Tensor, None]:
            return F.cross_entropy(logits, label.long(), ignore_index=self.ignore_index, reduction="none"), None

        losses = torch.cat(_bands(maps, labels, read)[0]).view(labels.shape)  # -log p, 0 where ignored: none is easier
        easy = losses <= -math.log(threshold)  # a NaN is not easy: it must reach the loss
        if self.min_kept:
            easy &= losses < losses.flatten().topk(min(self.min_kept, losses.numel()), sorted=False).values.amin()
        return labels.int().masked_fill(easy, self.ignore_index)

    def count(self, labels: Tensor) -> Tensor:
        """What the sum of the losses is divided by to make a mean over valid pixels; 1 where there is none."""
        scored = labels != self.ignore_index
        if self.weights is None:
            return scored.sum().clamp(min=1)
        total = self.weights[labels.long().masked_fill(~scored, 0)].masked_fill(~scored, 0).sum()
        return torch.where(total > 0, total, torch.ones_like(total))

    def score(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """logits (P, K) -> the sum of the pixels' losses and their gradient (P, K), both zero where ignored.

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
        return loss.masked_fill(ignored[:, None], 0).sum(dtype=_wide(loss)), slope.mul_(~ignored[:, None])


@dataclass(frozen=True)
class _Dice:
    """Called as `_CrossEntropy` is: one pass for the sums over the batch, one for the gradient that they lead to."""

    ignore_index: int
    smooth: float

    def __call__(self, maps: Tensor, labels: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        sums, _ = _bands(maps, labels, self.overlap)
        hits, predicted, true = torch.stack(sums).sum(dim=0)  # (K,) each
        held = true > 0
        share = held.to(true.dtype) / held.sum().clamp(min=1)  # of each class in the mean
        whole = torch.where(held, predicted + true, 1) + self.smooth
        dice = (2 * hits + self.smooth) / whole
        loss = (share * (1 - dice)).sum().to(maps.dtype)
        if not with_gradient:
            return loss, None
        miss, hit = (share * dice / whole).to(maps.dtype), (2 * share / whole).to(maps.dtype)

        def score(logits: Tensor, label: Tensor) -> tuple[None, Tensor]:
            """By the probabilities the gradient is miss - hit * onehot; by the logits p (that - its mean under p)."""
            ignored = label == self.ignore_index
            index = label.long().masked_fill(ignored, 0).unsqueeze(1)  # (P, 1)
            probability = logits.softmax(dim=1)
            pull = probability.gather(1, index) * hit[index]
            slope = probability.mul_(miss + (pull - (probability @ miss)[:, None]))
            return None, slope.scatter_add_(1, index, -pull).mul_(~ignored[:, None])

        return loss, _bands(maps, labels, score, with_gradient=True)[1]

    def overlap(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        """logits (P, K) -> (3, K) sums over the labelled pixels: p where the class is true, p, and 1 where it is."""
        scored = labels != self.ignore_index
        index = labels.long().masked_fill(~scored, 0)
        probability = logits.softmax(dim=1).mul_(scored[:, None])
        predicted = probability.sum(dim=0)
        true = torch.zeros_like(predicted).index_add_(0, index, scored.to(predicted.dtype))
        # index_add_ suits whole numbers alone: a GPU adds in any order, and fractions would differ from run to run
        hit = probability.gather(1, index[:, None])
        hits = probability.zero_().scatter_(1, index[:, None], hit).sum(dim=0)
        return torch.stack([hits, predicted, true]).to(_wide(logits)), None


def _wide(values: Tensor) -> torch.dtype:
    """What sums of a batch are made in: Apple's GPUs have no float64."""
    return torch.float32 if values.device.type == "mps" else torch.float64


# logits (P, K) and labels (P,) of a band -> what is read from it, and the gradient (P, K) of what is sought
_Score = Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


def _bands(
    maps: Tensor, labels: Tensor, score: _Score, with_gradient: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    """Upsamples maps (B, h, w, K) a band at a time: what `score` reads of each, in order, and its gradient by maps."""
    height, width, classes = maps.shape[1:]
    rows, columns = labels.shape[1:]
    vertical = bilinear_matrix(height, rows, maps.device, maps.dtype)  # (H, h)
    across = bilinear_matrix(width, columns, maps.device, maps.dtype)  # (W, w)
    band = band_rows(columns * classes, maps.device)
    found, gradients = [], []
    folded = maps.new_zeros(height, columns * classes) if with_gradient else None  # rows are back at their number
    for image, label in zip(maps, labels, strict=True):
        for out, source in row_bands(height, rows, band):
            logits = upsample_band(image[source], vertical[out, source], columns)  # (R, W, K)
            value, slope = score(logits.reshape(-1, classes), label[out].reshape(-1))
            if value is not None:
                found.append(value)
            if folded is not None and slope is not None:
                folded[source].addmm_(vertical[out, source].T, slope.view(-1, columns * classes))
        if folded is not None:
            gradients.append(across.T @ folded.view(height, columns, classes))  # (h, w, K)
            folded.zero_()
    return found, torch.stack(gradients) if with_gradient else None
