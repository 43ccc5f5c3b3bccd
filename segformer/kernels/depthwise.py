"""Depth-wise 3x3 convolution, bias and GELU in one pass over channels-last tokens: the middle of the Mix-FFN.

Bytes, in units of one token tensor (B * N * C * element size; weights and halos are read from cache): forward 2, its
floor (read tokens, write the result), where a convolution and a GELU move 4. Backward 5: the first pass reads tokens
and the incoming gradient, makes the pre-activation anew and writes its gradient; the second turns that into the
tokens' gradient. The floor of 3 would need both in one pass, which evaluates erf three times a value and is then bound
by arithmetic. Saving the pre-activation moves as much over the step (3 + 4) and keeps one more tensor of the widest
kind a block; saving nothing but the inputs is the better bargain.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

CHANNELS = 64  # of one program: 128 bytes in half precision, a full cache line
COLUMNS = 16  # half of them where the nine sums of the weight's gradient take the registers (16 would spill)
ROWS = 4, 32  # it walks down: many for a small share of halos and partial sums, few where programs would be too few
PROGRAMS = 1024  # keep a large GPU busy


@torch.library.custom_op("segformer::depthwise_gelu", mutates_args=())
def depthwise_gelu(tokens: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """GELU (erf) of a depth-wise 3x3 convolution with stride 1 and one ring of zeros, computed in float32.

    tokens: (B, H * W, C) float32, bfloat16 or float16, made contiguous. weight: (C, 1, 3, 3), bias: (C,), of the same
    or another of these types. Returns contiguous (B, H * W, C) of the tokens' type. Differentiable once, with the same
    bits every time. ValueError for shapes that do not fit, TypeError for other types.
    """
    _check(tokens, weight, bias, height, width)
    return _convolve(tokens, weight, bias, height, width, forward=True)


@depthwise_gelu.register_fake
def _(tokens: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    return tokens.new_empty(tokens.shape)


@torch.library.custom_op("segformer::depthwise_gelu_backward", mutates_args=())
def depthwise_gelu_backward(
    grad: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of tokens, weight and bias, each in the type of what it belongs to.

    Between the two passes the pre-activation's gradient lies in the tokens' type, as PyTorch's own would; the sums for
    weight and bias take it before it is rounded.
    """
    grad, tokens, weight = grad.contiguous(), tokens.contiguous(), weight.contiguous()
    channels = tokens.shape[2]
    grid, tile = _tiles(tokens, height, width, COLUMNS // 2)
    inner = torch.empty_like(tokens)
    # no atomic additions, whose order would differ from run to run: a place for each program's sums
    sums = tokens.new_empty(len(tokens), grid[1], triton.cdiv(width, tile[1]), 10, channels, dtype=torch.float32)
    with torch.cuda.device_of(tokens):  # type: ignore[no-untyped-call]
        _inner_gradient[grid](grad, tokens, weight, bias.contiguous(), inner, sums, height, width, channels, *tile)
    total = sums.sum(dim=(0, 1, 2))  # (10, C): nine taps, then the bias
    grad_weight = weight.new_empty(channels, 9).copy_(total[:9].t()).view(weight.shape)
    grad_bias = bias.new_empty(channels).copy_(total[9])
    return _convolve(inner, weight, bias, height, width, forward=False), grad_weight, grad_bias


@depthwise_gelu_backward.register_fake
def _(
    grad: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.height, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return *depthwise_gelu_backward(grad, *ctx.saved_tensors, ctx.height, ctx.width), None, None


depthwise_gelu.register_autograd(_backward, setup_context=_save)


def _check(tokens: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> None:
    shapes = [tuple(tensor.shape) for tensor in (tokens, weight, bias)]
    channels = shapes[0][-1] if tokens.dim() == 3 else -1
    if shapes != [(*shapes[0][:1], height * width, channels), (channels, 1, 3, 3), (channels,)]:
        raise ValueError(f"tokens, weight and bias of shapes {shapes} do not fit a grid of {height} x {width}")
    for tensor in (tokens, weight, bias):
        if tensor.dtype not in {torch.float32, torch.bfloat16, torch.float16}:
            raise TypeError(f"depthwise_gelu takes float32, bfloat16 and float16, not {tensor.dtype}")


def _tiles(tokens: Tensor, height: int, width: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The grid of programs, and the rows, columns and channels of one: the last two powers of two, as small as do."""
    images, _, channels = tokens.shape
    columns, lanes = min(columns, triton.next_power_of_2(width)), min(CHANNELS, triton.next_power_of_2(channels))
    abreast = triton.cdiv(channels, lanes) * triton.cdiv(width, columns)
    least, most = ROWS
    rows = max(least, min(most, height * abreast * images // PROGRAMS))
    return (abreast, triton.cdiv(height, rows), images), (rows, columns, lanes)


def _convolve(tokens: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, forward: bool) -> Tensor:
    tokens, weight, bias = tokens.contiguous(), weight.contiguous(), bias.contiguous()
    grid, tile = _tiles(tokens, height, width, COLUMNS)
    result = torch.empty_like(tokens)
    with torch.cuda.device_of(tokens):  # type: ignore[no-untyped-call]
        _convolution[grid](tokens, weight, bias, result, height, width, tokens.shape[2], *tile, FORWARD=forward)
    return result


@triton.jit  # type: ignore[untyped-decorator]
def _place(width, channels, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's columns, channels and image. Programs of one neighbourhood run together and share the cache."""
    blocks = tl.cdiv(channels, CHANNELS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    column = tl.program_id(0) // blocks * COLUMNS + tl.arange(0, COLUMNS)
    return column, channel, tl.program_id(2).to(tl.int64)  # 2^31 numbers and more are counted


@triton.jit
def _spot(image, row, column, channel, height, width, channels):  # type: ignore[no-untyped-def]
    """Offsets (COLUMNS, CHANNELS) in one row of one image, and which of them exist."""
    offset = (image * height + row) * width * channels + (column[:, None] * channels + channel[None, :])
    stop = tl.where((row >= 0) & (row < height), width, 0)
    inside = (column >= 0) & (column < stop)
    return offset, inside[:, None] & (channel < channels)[None, :]


@triton.jit
def _load(tensor, image, row, column, channel, height, width, channels):  # type: ignore[no-untyped-def]
    offset, inside = _spot(image, row, column, channel, height, width, channels)
    return tl.load(tensor + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load3(tensor, image, row, column, channel, height, width, channels):  # type: ignore[no-untyped-def]
    """A row seen from the left, from its place and from the right: two of three reads hit the nearest cache."""
    left = _load(tensor, image, row, column - 1, channel, height, width, channels)
    middle = _load(tensor, image, row, column, channel, height, width, channels)
    return left, middle, _load(tensor, image, row, column + 1, channel, height, width, channels)


@triton.jit  # type: ignore[untyped-decorator]
def _taps(weight, channel, channels, FIRST: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Three weights of each channel, (1, CHANNELS) each."""
    at, inside = weight + 9 * channel[None, :] + FIRST, (channel < channels)[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + STEP, mask=inside, other=0.0).to(tl.float32)
    return first, second, tl.load(at + 2 * STEP, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _normal_cdf(x):  # type: ignore[no-untyped-def]
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # 1 / sqrt 2


@triton.jit  # type: ignore[untyped-decorator]
def _convolution(  # type: ignore[no-untyped-def]
    tokens, weight, bias, result, height, width, channels, rows,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, FORWARD: tl.constexpr,
):  # fmt: skip
    """GELU(convolution + bias); not FORWARD: the convolution's gradient, which is one with the taps in reverse."""
    column, channel, image = _place(width, channels, COLUMNS, CHANNELS)
    top = tl.program_id(1) * rows
    START: tl.constexpr = 0 if FORWARD else 8
    STEP: tl.constexpr = 1 if FORWARD else -1
    a0, a1, a2 = _taps(weight, channel, channels, START, STEP)
    b0, b1, b2 = _taps(weight, channel, channels, START + 3 * STEP, STEP)
    c0, c1, c2 = _taps(weight, channel, channels, START + 6 * STEP, STEP)
    start = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    if FORWARD:
        start += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    # each row is read once and added to the three results it belongs to: `above` waits for its last row, `here` for two
    above, here = start, start
    for step in range(tl.minimum(rows, height - top) + 2):
        row = top - 1 + step
        left, middle, right = _load3(tokens, image, row, column, channel, height, width, channels)
        done = above + c0 * left + c1 * middle + c2 * right
        above = here + b0 * left + b1 * middle + b2 * right
        here = start + a0 * left + a1 * middle + a2 * right
        if row > top:
            if FORWARD:
                done = done * _normal_cdf(done)
            offset, inside = _spot(image, row - 1, column, channel, height, width, channels)
            tl.store(result + offset, done.to(result.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _inner_gradient(  # type: ignore[no-untyped-def]
    grad, tokens, weight, bias, inner, sums, height, width, channels, rows,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The pre-activation's gradient, and this program's share of the weight's and the bias's."""
    column, channel, image = _place(width, channels, COLUMNS, CHANNELS)
    top = tl.program_id(1) * rows
    wa0, wa1, wa2 = _taps(weight, channel, channels, 0, 1)
    wb0, wb1, wb2 = _taps(weight, channel, channels, 3, 1)
    wc0, wc1, wc2 = _taps(weight, channel, channels, 6, 1)
    start = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    sa0, sa1, sa2, sb0, sb1, sb2, sc0, sc1, sc2, total = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    a0, a1, a2 = _load3(tokens, image, top - 1, column, channel, height, width, channels)
    b0, b1, b2 = _load3(tokens, image, top, column, channel, height, width, channels)
    for step in range(tl.minimum(rows, height - top)):
        row = top + step
        c0, c1, c2 = _load3(tokens, image, row + 1, column, channel, height, width, channels)
        pre = start + wa0 * a0 + wa1 * a1 + wa2 * a2 + wb0 * b0 + wb1 * b1 + wb2 * b2 + wc0 * c0 + wc1 * c1 + wc2 * c2
        slope = _normal_cdf(pre) + pre * tl.exp(-0.5 * pre * pre) * 0.3989422804014327  # 1 / sqrt(2 pi)
        offset, inside = _spot(image, row, column, channel, height, width, channels)
        value = slope * tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(inner + offset, value.to(inner.dtype.element_ty), mask=inside)
        sa0, sa1, sa2 = sa0 + value * a0, sa1 + value * a1, sa2 + value * a2
        sb0, sb1, sb2 = sb0 + value * b0, sb1 + value * b1, sb2 + value * b2
        sc0, sc1, sc2 = sc0 + value * c0, sc1 + value * c1, sc2 + value * c2
        total += value
        a0, a1, a2, b0, b1, b2 = b0, b1, b2, c0, c1, c2
    across = tl.cdiv(width, COLUMNS)
    block = tl.program_id(0) // tl.cdiv(channels, CHANNELS)
    at = sums + ((image * tl.num_programs(1) + tl.program_id(1)) * across + block) * 10 * channels + channel
    shares = (sa0, sa1, sa2, sb0, sb1, sb2, sc0, sc1, sc2, total)
    for tap in tl.static_range(10):
        tl.store(at + tap * channels, tl.sum(shares[tap], axis=0), mask=channel < channels)
