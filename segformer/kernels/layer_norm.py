"""Layer normalisation of narrow rows, alone or with the residual addition before it, in one kernel each way.

PyTorch's own takes one block of threads a row, which idles at SegFormer's 32 to 512 channels, and gives float32 under
autocast, which every Linear after it casts anew. Here a program owns a tile of rows, and the result has the type asked
for.

Bytes, in units of one tensor of rows: forward 2 (read, write), with the addition 4 (read both, write the sum and the
normalised), each its floor. Backward 3 (read rows and gradient, write the rows' gradient), with the addition 4, and 5
where the branch's gradient is not x's (other type, or scaled): the floor but for the partial sums of weight and bias.
Mean and deviation are made anew from the row, which is read anyway: saving them would be 8 bytes a row each way.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

CHANNELS = 1024  # at most: a row lies in the registers of one program
FORWARD, BACKWARD = 2048, 1024  # numbers a tile, 16 a thread; fewer where sums of two more are kept in registers
PROGRAMS = 528  # of the backward pass at most: four for each of an H100's 132 multiprocessors, all resident at once
STEPS = 4  # tiles that each of them walks over, at least, lest partial sums outweigh the rows
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("segformer::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Layer normalisation over the last dimension, computed in float32 and rounded once, to `dtype`.

    x: (..., C) with C in 1..1024, made contiguous; weight, bias: (C,); each float32, bfloat16 or float16, as is dtype.
    eps: added to the (biased) variance. Returns contiguous (..., C) of `dtype`. Differentiable once, each gradient in
    the type of what it belongs to, with the same bits every time. ValueError for other shapes, TypeError for other
    types. The twin is `torch.nn.functional.layer_norm`.
    """
    _check(x, None, None, weight, bias, dtype)
    return _normalized(x, None, None, weight, bias, eps, dtype)[1]


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("segformer::add_layer_norm", mutates_args=())
def add_layer_norm(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum x + branch * scale, and `layer_norm` of it as it was rounded.

    branch: as x, of the same or another type; the sum has the type both promote to. scale: (B,) for x (B, ..., C), of
    the same types, one factor a sample (dropped paths; of fewer than 2^31 rows), without a gradient; None is 1. The
    product is rounded to the branch's type, as PyTorch's own. Else as `layer_norm`. Returns the sum and the normalised,
    both contiguous and differentiable; where the sum has no gradient none is read, where the normalised has none it is
    made of zeros.
    """
    _check(x, branch, scale, weight, bias, dtype)
    return _normalized(x, branch, scale, weight, bias, eps, dtype)


@add_layer_norm.register_fake
def _(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    return summed, x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("segformer::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of what was normalised (`dtype`), the branch (`branch_dtype`; None: empty), weight and bias.

    grad: of the normalised; grad_sum: of the sum (None: zero); x: what was normalised.
    """
    grad, x = grad.contiguous(), x.contiguous()
    grad_sum, scale = (None if tensor is None else tensor.contiguous() for tensor in (grad_sum, scale))
    rows, channels, share, block = _sizes(x)
    grad_x = torch.empty_like(x, dtype=dtype)
    grad_branch = None if branch_dtype is None else torch.empty_like(x, dtype=branch_dtype)
    tile = BACKWARD // block
    programs = min(PROGRAMS, triton.cdiv(rows, tile * STEPS))
    # no atomic additions, whose order would differ from run to run: a place for each program's sums
    sums = x.new_empty(2, programs, channels, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            _gradients[(programs,)](
                grad, grad_sum, x, scale, weight.contiguous(), grad_x, grad_branch, sums, rows, channels, share, eps,
                tile, block,
            )  # fmt: skip
    grad_weight, grad_bias = sums[0].sum(dim=0).to(weight.dtype), sums[1].sum(dim=0).to(bias.dtype)
    return grad_x, x.new_empty(0) if grad_branch is None else grad_branch, grad_weight, grad_bias


@layer_norm_backward.register_fake
def _(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_branch = x.new_empty(0) if branch_dtype is None else x.new_empty(x.shape, dtype=branch_dtype)
    return x.new_empty(x.shape, dtype=dtype), grad_branch, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, bias = ctx.saved_tensors
    grad_x, _, *grads = layer_norm_backward(grad, None, x, None, weight, bias, ctx.eps, x.dtype, None)
    return grad_x, *grads, None, None


def _save_sum(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, branch, scale, weight, bias, ctx.eps, ctx.dtype = inputs
    ctx.types = x.dtype, branch.dtype
    ctx.save_for_backward(output[0], scale, weight, bias)
    ctx.set_materialize_grads(False)


def _backward_sum(ctx, grad_sum, grad):  # type: ignore[no-untyped-def]
    summed, scale, weight, bias = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(summed, dtype=ctx.dtype)
    type_x, type_branch = ctx.types
    other = None if scale is None and type_x == type_branch else type_branch
    grad_x, grad_branch, *grads = layer_norm_backward(
        grad, grad_sum, summed, scale, weight, bias, ctx.eps, type_x, other
    )
    return grad_x, grad_x if other is None else grad_branch, None, *grads, None, None


layer_norm.register_autograd(_backward, setup_context=_save)
add_layer_norm.register_autograd(_backward_sum, setup_context=_save_sum)


def _check(
    x: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> None:
    tensors = [tensor for tensor in (x, branch, scale, weight, bias) if tensor is not None]
    fits = x.dim() > 0 and 0 < x.shape[-1] <= CHANNELS and weight.shape == bias.shape == x.shape[-1:]
    fits = fits and (branch is None or branch.shape == x.shape)
    if not fits or (scale is not None and (x.dim() < 2 or scale.shape != x.shape[:1])):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(f"shapes {shapes} do not fit each other or rows of 1 to {CHANNELS} channels")
    for found in (dtype, *(tensor.dtype for tensor in tensors)):
        if found not in DTYPES:
            raise TypeError(f"layer_norm takes float32, bfloat16 and float16, not {found}")


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Rows, channels, rows of one sample, and the power of two that holds a row."""
    channels = x.shape[-1]
    rows = x.numel() // channels
    return rows, channels, rows // max(len(x), 1), triton.next_power_of_2(channels)


def _normalized(
    x: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Any, Tensor]:
    """The sum (None without a branch) and the normalised."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    branch, scale = (None if tensor is None else tensor.contiguous() for tensor in (branch, scale))
    rows, channels, share, block = _sizes(x)
    normed = torch.empty_like(x, dtype=dtype)
    summed = None if branch is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype))
    tile = FORWARD // block
    if rows:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            _normalize[(triton.cdiv(rows, tile),)](
                x, branch, scale, weight, bias, summed, normed, rows, channels, share, eps, tile, block
            )
    return summed, normed


@triton.jit  # type: ignore[untyped-decorator]
def _tile(start, rows, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets (ROWS, BLOCK) from the row `start`, which of them exist, and the channels (BLOCK,)."""
    row, channel = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows - start)[:, None] & (channel < channels)[None, :]
    return row[:, None] * channels + channel[None, :], inside, channel


@triton.jit  # type: ignore[untyped-decorator]
def _scales(scale, start, rows, share, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The factors of rows (ROWS, 1). Only their start is divided in 64 bits, which is slow: a sample has fewer rows."""
    row = tl.arange(0, ROWS)
    sample = ((start % share).to(tl.int32) + row) // share
    return tl.load(scale + start // share + sample, mask=row < rows - start, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _standard(value, inside, channels, eps):  # type: ignore[no-untyped-def]
    """Rows less their mean and over their deviation, 0 outside; and the inverse of the deviation (ROWS, 1)."""
    mean = tl.sum(value, axis=1) / channels
    value = tl.where(inside, value - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / channels + eps)[:, None]
    return tl.where(inside, value * inverse, 0.0), inverse  # without eps, rows outside would be 0 * infinity


@triton.jit  # type: ignore[untyped-decorator]
def _normalize(  # type: ignore[no-untyped-def]
    x, branch, scale, weight, bias, summed, normed, rows, channels, share, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * ROWS  # 2^31 numbers and more are counted
    base = start * channels
    offset, inside, channel = _tile(start, rows, channels, ROWS, BLOCK)
    value = tl.load(x + base + offset, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + base + offset, mask=inside, other=0.0).to(tl.float32)
        if scale is not None:
            added = added * _scales(scale, start, rows, share, ROWS)
            added = added.to(branch.dtype.element_ty).to(tl.float32)
        value = (value + added).to(summed.dtype.element_ty)
        tl.store(summed + base + offset, value, mask=inside)
        value = value.to(tl.float32)
    value, _ = _standard(value, inside, channels, eps)
    value = value * tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    value += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + base + offset, value.to(normed.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gradients(  # type: ignore[no-untyped-def]
    grad, grad_sum, x, scale, weight, grad_x, grad_branch, sums, rows, channels, share, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows' gradients, tile after tile, and this program's share of the weight's and the bias's."""
    first, stride = tl.program_id(0).to(tl.int64) * ROWS, tl.num_programs(0).to(tl.int64) * ROWS
    channel = tl.arange(0, BLOCK)
    factor = tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    weights = tl.zeros((ROWS, BLOCK), tl.float32)  # summed over rows once, at the end
    biases = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in tl.range(tl.cdiv(rows - first, stride), num_stages=3):  # the next two tiles are on their way
        start = first + step * stride
        base = start * channels
        offset, inside, _ = _tile(start, rows, channels, ROWS, BLOCK)
        value = tl.load(x + base + offset, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(grad + base + offset, mask=inside, other=0.0).to(tl.float32)
        if grad_sum is not None:
            passed = tl.load(grad_sum + base + offset, mask=inside, other=0.0).to(tl.float32)
        value, inverse = _standard(value, inside, channels, eps)
        weights += slope * value
        biases += slope
        slope *= factor
        along = tl.sum(slope * value, axis=1) / channels
        mean = tl.sum(slope, axis=1) / channels
        slope = inverse * (slope - mean[:, None] - value * along[:, None])
        if grad_sum is not None:
            slope += passed
        tl.store(grad_x + base + offset, slope.to(grad_x.dtype.element_ty), mask=inside)
        if grad_branch is not None:
            if scale is not None:
                slope *= _scales(scale, start, rows, share, ROWS)
            tl.store(grad_branch + base + offset, slope.to(grad_branch.dtype.element_ty), mask=inside)
    at = sums + tl.program_id(0) * channels + channel
    tl.store(at, tl.sum(weights, axis=0), mask=channel < channels)
    tl.store(at + tl.num_programs(0) * channels, tl.sum(biases, axis=0), mask=channel < channels)
