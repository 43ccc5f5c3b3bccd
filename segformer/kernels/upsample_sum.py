"""A fine map and up to three coarse ones, bilinearly upsampled (align_corners False) and summed in one pass each way.

Bytes, in units of one fine map (B * H * W * D * element size), of coarse maps of H/2, H/4 and H/8, together 0.33:
forward 2.33, the floor (read all maps, write the sum), where three upsamplings and three additions in place move 12.3.
Backward 1.33, again the floor, as the fine map's gradient is the incoming one itself: the programs of all coarse maps
that own the same band of rows run together, so memory is asked for it once and the L2 cache about four times (once a
map, and for the halos of its blocks). A ReLU's mask is applied before: 3 more.

Forward, a program walks down the fine rows and keeps the two rows of each coarse map that surround it, stretched to its
columns: they change only with the cell, the strip between two coarse rows. Backward, a program owns coarse positions
and gathers all fine pixels that touch them, in one order: no atomic additions, the same bits from run to run.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from segformer.kernels.cells import first_index

FORWARD = 16, 64  # columns (half of them in float32) and channels of a program: 16 bytes a thread in 128 threads
BACKWARD = 8, 128
ROWS = 4, 32  # fine rows it walks down: many for a small share of halos, few where programs would be too few
PROGRAMS = 2048  # keep a large GPU busy to the end


def upsample_sum(fine: Tensor, coarse: list[Tensor], relu: bool = False) -> Tensor:
    """`fine` plus each map of `coarse` bilinearly resized to its size, then a ReLU if wanted; float32 throughout.

    fine: (B, H, W, D) float32, bfloat16 or float16; coarse: one to three of (B, h, w, D) and the same type, of any h
    and w of at least 1, larger than H and W too. All are made contiguous. H * h and W * w must be below 2^29, one row
    of a map below 2^31 numbers. Returns contiguous (B, H, W, D) of this type, rounded once. Differentiable once, with
    the same bits every time. ValueError for shapes or types that do not fit, TypeError for other types.
    """
    return _summed(fine, coarse, relu)


@torch.library.custom_op("segformer::upsample_sum", mutates_args=())
def _summed(fine: Tensor, coarse: list[Tensor], relu: bool) -> Tensor:
    """`upsample_sum` with nothing left out: with a default, PyTorch 2.11 loses count of a list's gradients."""
    _check(fine, coarse)
    fine, result = fine.contiguous(), torch.empty_like(fine, memory_format=torch.contiguous_format)
    images, height, width, channels = fine.shape
    columns, lanes = FORWARD[0] * 2 // fine.element_size(), FORWARD[1]  # more would take all registers
    columns, lanes = min(columns, triton.next_power_of_2(width)), min(lanes, triton.next_power_of_2(channels))
    abreast = triton.cdiv(channels, lanes) * triton.cdiv(width, columns)
    rows = _rows(height * abreast * images)
    maps = [x.contiguous() for x in coarse]
    sizes = [size for x in maps for size in x.shape[1:3]]
    spare = 3 - len(maps)
    with torch.cuda.device_of(fine):  # type: ignore[no-untyped-call]
        _forward[abreast, triton.cdiv(height, rows), images](
            *(fine, *maps, *[None] * spare, result, height, width, *sizes, *[0, 0] * spare, rows, channels),
            RELU=relu,
            COLUMNS=columns,
            CHANNELS=lanes,
        )
    return result


@_summed.register_fake
def _(fine: Tensor, coarse: list[Tensor], relu: bool) -> Tensor:
    return fine.new_empty(fine.shape)


@torch.library.custom_op("segformer::upsample_sum_backward", mutates_args=())
def _gathered(grad: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """The gradients of coarse maps with these numbers of rows and columns, one after the other: (sum of B * h * w, D).

    grad: (B, H, W, D), made contiguous.
    """
    grad = grad.contiguous()
    images, height, width, channels = grad.shape
    gradients = _room(grad, rows, columns)
    block, lanes = BACKWARD
    block, lanes = min(block, triton.next_power_of_2(max(columns))), min(lanes, triton.next_power_of_2(channels))
    abreast = triton.cdiv(channels, lanes) * sum(triton.cdiv(width, block) for width in columns)
    bands = triton.cdiv(height, _rows(height * abreast * images))
    sizes = [size for pair in zip(rows, columns, strict=True) for size in pair]
    with torch.cuda.device_of(grad):  # type: ignore[no-untyped-call]
        _backward[abreast, bands, images](
            *(grad, gradients, height, width, *sizes, *[0] * (6 - len(sizes)), channels),
            COLUMNS=block,
            CHANNELS=lanes,
        )
    return gradients


@_gathered.register_fake
def _room(grad: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    pixels = sum(height * width for height, width in zip(rows, columns, strict=True))
    return grad.new_empty(grad.shape[0] * pixels, grad.shape[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, coarse, relu = inputs
    ctx.shapes = [x.shape for x in coarse]
    ctx.save_for_backward(*[output] * relu)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, list[Tensor], None]:
    for result in ctx.saved_tensors:
        grad = torch.ops.aten.threshold_backward(grad, result, 0)
    gradients = _gathered(grad, [s[1] for s in ctx.shapes], [s[2] for s in ctx.shapes])
    parts = gradients.split([s[0] * s[1] * s[2] for s in ctx.shapes])
    return grad, [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)], None


_summed.register_autograd(_differentiate, setup_context=_save)


def _check(fine: Tensor, coarse: list[Tensor]) -> None:
    if fine.dtype not in {torch.float32, torch.bfloat16, torch.float16}:
        raise TypeError(f"upsample_sum takes float32, bfloat16 and float16, not {fine.dtype}")
    batch, *_, width = fine.shape
    fits = (x.dim() == 4 and (x.shape[0], x.shape[3], x.dtype) == (batch, width, fine.dtype) for x in coarse)
    if fine.dim() != 4 or not 1 <= len(coarse) <= 3 or not all(fits) or any(0 in x.shape[1:3] for x in (fine, *coarse)):
        found = [(*x.shape, x.dtype) for x in (fine, *coarse)]
        raise ValueError(f"maps of {found} do not fit: (B, H, W, D) and one to three of (B, h, w, D), all of one type")


def _rows(everything: int) -> int:
    """How many fine rows a program walks down, of all rows that there are times the programs abreast."""
    least, most = ROWS
    return max(least, min(most, everything // PROGRAMS))


@triton.jit
def _share(place, index, source, target):  # type: ignore[no-untyped-def]
    """The weight of a source at an output index: one minus their distance, not below 0; 1 beyond the outmost sources.

    The distance is a whole number in units of 1 / (2 target): nothing is rounded but the weight.
    """
    distance = (2 * place + 1) * source - (2 * index + 1) * target
    beyond = ((index == 0) & (distance < 0)) | ((index == source - 1) & (distance > 0))
    distance = tl.where(beyond, 0, tl.abs(distance))
    return tl.maximum(2 * target - distance, 0).to(tl.float32) * (1.0 / (2 * target))


@triton.jit
def _sources(x, source, target):  # type: ignore[no-untyped-def]
    """The cell of an output index and the sources on both sides of it, one where there is no other."""
    cell = ((2 * x + 1) * source + target) // (2 * target)
    return cell, tl.minimum(tl.maximum(cell - 1, 0), source - 1), tl.minimum(cell, source - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _place(channels, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's channels, the number of its block of columns, and its image.

    Programs of one neighbourhood run together and share the cache; 2^31 numbers and more are counted.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return channel[None, :], tl.program_id(0) // blocks, tl.program_id(2).to(tl.int64)


@triton.jit
def _stretched(line, x, columns, width, channel, channels):  # type: ignore[no-untyped-def]
    """A coarse row at the fine columns x."""
    cell, left, right = _sources(x, columns, width)
    share = _share(x, cell, columns, width)[:, None]
    real = (channel < channels) & (x >= 0)[:, None]  # of both axes: Triton's interpreter stretches no mask
    near = tl.load(line + (left[:, None] * channels + channel), mask=real, other=0.0).to(tl.float32)
    far = tl.load(line + (right[:, None] * channels + channel), mask=real, other=0.0).to(tl.float32)
    return near * (1 - share) + far * share


@triton.jit
def _row(coarse, image, y, cell, above, below, x, rows, columns, height, width, channel, channels):  # type: ignore[no-untyped-def]
    """A row of the upsampled map, and its cell with the two stretched rows around it, new if it has been left."""
    if (2 * y + 1) * rows + height >= 2 * height * (cell + 1):
        cell, upper, lower = _sources(y, rows, height)
        image *= rows
        above = _stretched(coarse + (image + upper) * columns * channels, x, columns, width, channel, channels)
        below = _stretched(coarse + (image + lower) * columns * channels, x, columns, width, channel, channels)
    share = _share(y, cell, rows, height)
    return above * (1 - share) + below * share, cell, above, below


SIZES = [f"{name}{axis}" for name in ("", "a_", "b_", "c_") for axis in ("height", "width")]


@triton.jit(do_not_specialize=[*SIZES, "rows"])  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    fine, a, b, c, result, height, width, a_height, a_width, b_height, b_width, c_height, c_width, rows, channels,
    RELU: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel, block, image = _place(channels, CHANNELS)
    x = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = (x < width)[:, None] & (channel < channels)
    at = x[:, None] * channels + channel
    top = tl.program_id(1) * rows
    stop = tl.minimum(top + rows, height)
    nothing = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    above_a, below_a, above_b, below_b, above_c, below_c = nothing, nothing, nothing, nothing, nothing, nothing
    cell_a, cell_b, cell_c = top * 0 - 1, top * 0 - 1, top * 0 - 1  # before the first
    step = width.to(tl.int64) * channels
    fine += image * height * step
    result += image * height * step
    ahead = tl.load(fine + top * step + at, mask=inside, other=0.0)
    for y in range(top, stop):
        total = ahead.to(tl.float32)
        # the next row comes while this one is made
        ahead = tl.load(fine + (y + 1) * step + at, mask=inside & (x[:, None] * 0 + y + 1 < stop), other=0.0)
        row, cell_a, above_a, below_a = _row(
            a, image, y, cell_a, above_a, below_a, x, a_height, a_width, height, width, channel, channels
        )
        total += row
        if b is not None:
            row, cell_b, above_b, below_b = _row(
                b, image, y, cell_b, above_b, below_b, x, b_height, b_width, height, width, channel, channels
            )
            total += row
        if c is not None:
            row, cell_c, above_c, below_c = _row(
                c, image, y, cell_c, above_c, below_c, x, c_height, c_width, height, width, channel, channels
            )
            total += row
        if RELU:
            total = tl.where(total < 0, 0.0, total)  # NaN stays
        tl.store(result + y * step + at, total.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    grad, gradients, height, width, a_height, a_width, b_height, b_width, c_height, c_width, channels,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gathers one map's gradient at COLUMNS columns of the rows in one band.

    Down the cells it keeps two sums, of the fine rows times the share of the coarse row above and of that below. When
    a cell is done, the row above it has all.
    """
    channel, block, image = _place(channels, CHANNELS)
    # blocks are counted through the maps
    of_a, of_b = tl.cdiv(a_width, COLUMNS), tl.cdiv(b_width, COLUMNS)
    is_a, is_b = block < of_a, block < of_a + of_b
    rows = tl.where(is_a, a_height, tl.where(is_b, b_height, c_height))
    columns = tl.where(is_a, a_width, tl.where(is_b, b_width, c_width))
    before = tl.where(is_a, 0, a_height * a_width + tl.where(is_b, 0, b_height * b_width))
    block -= tl.where(is_a, 0, of_a + tl.where(is_b, 0, of_b))
    line = columns.to(tl.int64) * channels
    gradients += tl.num_programs(2) * before.to(tl.int64) * channels + image * rows * line

    top = tl.program_id(1) * rows // tl.num_programs(1)
    end = (tl.program_id(1) + 1) * rows // tl.num_programs(1)
    j = block * COLUMNS + tl.arange(0, COLUMNS)
    at, ours = j[:, None] * channels + channel, (j < columns)[:, None] & (channel < channels)
    first = first_index(j, columns, width)
    taps = tl.cdiv(2 * width, columns)  # no column is touched by more
    step = width.to(tl.int64) * channels
    grad += image * height * step
    upper = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for row in range(top, tl.where(top < end, end + 1, top)):
        lower = tl.zeros((COLUMNS, CHANNELS), tl.float32)
        for y in range(first_index(row, rows, height), first_index(row + 1, rows, height)):
            total = tl.zeros((COLUMNS, CHANNELS), tl.float32)
            for start in range(0, taps, 4):
                for tap in tl.static_range(4):
                    x = first + start + tap
                    share = tl.where(x < width, _share(x, j, columns, width), 0.0)[:, None]
                    touched = (share > 0) & (channel < channels)
                    value = tl.load(grad + y * step + (x[:, None] * channels + channel), mask=touched, other=0.0)
                    total += share * value.to(tl.float32)
            upper += _share(y, row - 1, rows, height) * total
            lower += _share(y, row, rows, height) * total
        if row > top:  # the row above the first one is another program's
            tl.store(gradients + (row - 1) * line + at, upper.to(gradients.dtype.element_ty), mask=ours)
        upper = lower
