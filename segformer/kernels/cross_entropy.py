"""Bilinear upsampling (align_corners False) and cross-entropy in one kernel each way: no full-resolution logits.

Output pixels are taken cell by cell: cell c of an axis holds the pixels that lie between sources c - 1 and c, so all of
its rows are mixed from the same two rows of logits, which are stretched to the pixels' columns once. The forward pass
keeps the logarithm of each pixel's sum of exponentials, 4 bytes a pixel; with it the backward pass makes each class's
gradient without the others. There a program owns a block of logits and goes over all pixels that any of them touches:
nothing is added by two programs, so results are the same from run to run.

Exponents are to base 2, what GPUs have an instruction for: logits are multiplied by log2(e) as they are read.
"""

from typing import Any, Literal

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from segformer.kernels.cells import first_index

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# products of float32 in three passes of the tensor cores, exact to about 2^-21; AMD's have their own float32
PRECISION = "ieee" if torch.version.hip else "tf32x3"


def upsample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    denominator: Literal["valid", "all"],
    class_weights: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    """`segformer.losses.pixel_cross_entropy` without OHEM, float32 throughout; a float32 scalar.

    logits: (B, K, h, w) float32, bfloat16 or float16 of any strides, K at least 1; the gradient has their type and
    layout. labels: (B, H, W) of any integer type, copied if not contiguous; any size that `fits`, though the kernels
    are made for H >= h and W >= w. class_weights: (K,) or None.

    The caller checks the arguments, but for the labels' values, which would have to be waited for: one that is neither
    0..K-1 nor `ignore_index` makes the loss NaN, and the gradient where it lies. Float64 is for the plain twin.
    """
    weights = logits.new_ones(logits.shape[1], dtype=torch.float32) if class_weights is None else class_weights.float()
    total, mass, _ = _summed(logits, labels, weights, ignore_index, label_smoothing)
    if denominator == "all":
        return total / labels.numel()
    mass = mass.detach()
    return total / torch.where(mass > 0, mass, 1)


def fits(logits: Tensor, labels: Tensor) -> bool:
    """Whether every place can be counted in 32 bits: else the twin has to take them."""
    rows, columns = logits.shape[2:]
    height, width = labels.shape[1:]
    one = logits.shape[1] * rows * columns
    return one < 2**31 and height * width < 2**31 and max(height * rows, width * columns) < 2**30


@torch.library.custom_op("segformer::upsample_cross_entropy", mutates_args=())
def _summed(
    logits: Tensor, labels: Tensor, weights: Tensor, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the pixels' losses, that of their labels' weights, and (B, H, W) log2 sums of exponentials."""
    batch, classes, rows, columns = logits.shape
    labels, weights = labels.contiguous(), weights.contiguous()
    height, width = labels.shape[1:]
    block = 64
    grid = (triton.cdiv(width, block), rows + 1, batch)
    spread = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    sums = torch.empty((2, grid[0] * grid[1] * grid[2]), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        _forward[grid](
            logits, labels, weights, spread, sums, sums.shape[1],
            classes, rows, columns, height, width, *logits.stride(), ignore_index, smoothing,
            SMOOTH=smoothing > 0,
            CLASSES=min(16, triton.next_power_of_2(classes)),
            ROWS=min(4, triton.next_power_of_2(triton.cdiv(height, rows))),
            COLUMNS=block,
            num_warps=4,
        )  # fmt: skip
    total, mass = sums.sum(dim=1, dtype=torch.float64).float().unbind()
    return total.clone(), mass.clone(), spread  # an op's outputs may not share memory


@_summed.register_fake
def _(logits: Tensor, labels: Tensor, weights: Tensor, ignore_index: int, smoothing: float) -> tuple[Tensor, ...]:
    scalar = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
    return *scalar, torch.empty(labels.shape, dtype=torch.float32, device=logits.device)


@torch.library.custom_op("segformer::upsample_cross_entropy_backward", mutates_args=())
def _gradient(
    scale: Tensor, logits: Tensor, labels: Tensor, weights: Tensor, spread: Tensor, ignore_index: int, smoothing: float
) -> Tensor:
    """The gradient of `scale` times the sum of the losses by the logits, rounded to their type after scaling."""
    batch, classes, rows, columns = logits.shape
    labels, weights, gradient = labels.contiguous(), weights.contiguous(), torch.empty_like(logits)
    height, width = labels.shape[1:]
    # n columns of logits touch the pixels of n + 1 cells, which hold no more than ceil((n + 1) * width / columns)
    block = max(32, triton.next_power_of_2(triton.cdiv(4 * width, columns)))
    owned_columns, owned_rows = min(16, block * columns // width - 1), 8
    chunk = 16 if classes <= 16 else 32
    tiles = triton.cdiv(columns, owned_columns)
    grid = (tiles * triton.cdiv(classes, chunk), triton.cdiv(rows, owned_rows), batch)
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        _backward[grid](
            scale, logits, labels, weights, spread, gradient, tiles, owned_columns,
            classes, rows, columns, height, width, *logits.stride(), *gradient.stride(), ignore_index, smoothing,
            SMOOTH=smoothing > 0,
            CLASSES=chunk,
            ALL_CLASSES=triton.next_power_of_2(classes),
            OWNED_ROWS=owned_rows,
            OWNED_COLUMNS=16,
            COLUMNS=block,
            PRECISION=PRECISION,
            num_warps=4,
        )  # fmt: skip
    return gradient


@_gradient.register_fake
def _(scale: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, weights, *ctx.options = inputs
    ctx.save_for_backward(logits, labels, weights, output[2])
    ctx.set_materialize_grads(False)  # of the sums of exponentials it would be a whole map of zeros


def _differentiate(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_total is None:
        return None, None, None, None, None
    return _gradient(grad_total, *ctx.saved_tensors, *ctx.options), None, None, None, None


_summed.register_autograd(_differentiate, setup_context=_save)


@triton.jit
def _cell(place, source, target):  # type: ignore[no-untyped-def]
    """The cell an output index lies in, and the share that source `cell` has there, `cell - 1` having the rest.

    In whole numbers, which neither round nor (Triton's division goes to zero) fall below zero. Beyond the borders
    there is no source: the share leaves it out.
    """
    offset = (2 * place + 1) * source + target
    cell = offset // (2 * target)
    share = (offset - cell * (2 * target)).to(tl.float32) / (2 * target)
    return cell, tl.where(cell == 0, 1.0, tl.where(cell == source, 0.0, share))


@triton.jit
def _stretched(image, wanted, row, column, share, rows, columns, by_row, by_column):  # type: ignore[no-untyped-def]
    """A row of logits, times log2(e), at pixels of (cell, share) columns; 0 where not wanted or outside.

    image: pointers to the classes' first logits.
    """
    row += tl.zeros_like(column)  # Triton's interpreter makes no mask of a scalar
    wanted = wanted & (row >= 0) & (row < rows)
    places = image + row * by_row + column * by_column
    behind = (column > 0) & (column <= columns)  # a block of pixels may go on where the image has ended
    left = tl.load(places - by_column, mask=wanted & behind, other=0.0).to(tl.float32)
    right = tl.load(places, mask=wanted & (column < columns), other=0.0).to(tl.float32)
    return (left * (1 - share) + right * share) * LOG2_E


@triton.jit
def _read_labels(labels, weights, place, inside, classes, ignore_index):  # type: ignore[no-untyped-def]
    """Labels of pixels, whether they count, whether they are classes, and their weights: 0 ignored, NaN no class."""
    label = tl.load(labels + place, mask=inside, other=0)
    scored = inside & (label != ignore_index)
    known = scored & (label >= 0) & (label < classes)
    label = label.to(tl.int32)  # after that: of 64 bits it would lose those that tell
    weight = tl.load(weights + label, mask=known, other=float("nan"))
    return label, scored, known, tl.where(scored, weight, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    logits, labels, weights, spread, sums, programs,
    classes, rows, columns, height, width, by_image, by_class, by_row, by_column, ignore_index, smoothing,
    SMOOTH: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scores COLUMNS pixels of all rows of one cell; the classes pass by in chunks, ROWS rows of pixels at a time."""
    image, row = tl.program_id(2).to(tl.int64), tl.program_id(1)
    logits += image * by_image
    labels += image * height * width
    spread += image * height * width
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column, across = _cell(x, columns, width)
    column, across = column[None, :], across[None, :]
    end = first_index(row + 1, rows, height)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    mass = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first_index(row, rows, height), end, ROWS):
        y = start + tl.arange(0, ROWS)
        inside = (y < end)[:, None] & (x < width)[None, :]
        down = _cell(y, rows, height)[1][:, None]
        highest = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
        summed = tl.zeros([ROWS, COLUMNS], tl.float32)
        everyone = tl.zeros([ROWS, COLUMNS], tl.float32)  # what label smoothing takes from all classes
        shares = 0.0
        for chunk in range(0, classes, CLASSES):
            k = chunk + tl.arange(0, CLASSES)
            real = k < classes
            places, wanted = (logits + k * by_class)[:, None], real[:, None]
            above = _stretched(places, wanted, row - 1, column, across, rows, columns, by_row, by_column)
            below = _stretched(places, wanted, row, column, across, rows, columns, by_row, by_column)
            value = above[:, None, :] + down[None, :, :] * (below - above)[:, None, :]
            if SMOOTH:
                share = tl.load(weights + k, mask=real, other=0.0) * (smoothing / classes)
                everyone += tl.sum(value * share[:, None, None], axis=0)  # not real: value and share are 0
                shares += tl.sum(share, axis=0)
            value = tl.where(real[:, None, None], value, float("-inf"))
            higher = tl.maximum(highest, tl.max(value, axis=0))
            summed = summed * tl.exp2(highest - higher) + tl.sum(tl.exp2(value - higher[None, :, :]), axis=0)
            highest = higher
        logarithm = highest + tl.log2(summed)
        place = y[:, None] * width + x[None, :]
        tl.store(spread + place, logarithm, mask=inside)
        label, scored, known, weight = _read_labels(labels, weights, place, inside, classes, ignore_index)
        places = logits + label * by_class
        above = _stretched(places, known, row - 1, column, across, rows, columns, by_row, by_column)
        below = _stretched(places, known, row, column, across, rows, columns, by_row, by_column)
        loss = (1 - smoothing) * weight * (logarithm - (above + down * (below - above)))
        if SMOOTH:
            loss += shares * logarithm - everyone
        total += tl.where(scored, loss, 0.0)
        mass += weight
    program = (image * (rows + 1) + row) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + program, tl.sum(total) * LN_2)
    tl.store(sums + programs + program, tl.sum(mass))


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    scale, logits, labels, weights, spread, gradient, tiles, owned,
    classes, rows, columns, height, width, by_image, by_class, by_row, by_column,
    to_image, to_class, to_row, to_column, ignore_index, smoothing,
    SMOOTH: tl.constexpr, CLASSES: tl.constexpr, ALL_CLASSES: tl.constexpr, OWNED_ROWS: tl.constexpr,
    OWNED_COLUMNS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Makes the gradient of CLASSES classes at OWNED_ROWS rows and `owned` (at most OWNED_COLUMNS) columns of logits.

    Down the cells it keeps two sums a class and pixel column, of the slopes times the share of the row above and of
    the row below. When a cell is done, the row above it has all its slopes; a product with the columns' shares folds
    them to the logits' columns.
    """
    image, top = tl.program_id(2).to(tl.int64), tl.program_id(1) * OWNED_ROWS
    left, chunk = tl.program_id(0) % tiles * owned, tl.program_id(0) // tiles
    labels += image * height * width
    spread += image * height * width
    k = chunk * CLASSES + tl.arange(0, CLASSES)
    real = (k < classes)[:, None]
    places = (logits + image * by_image + k * by_class)[:, None]
    x = first_index(left, columns, width) + tl.arange(0, COLUMNS)
    cell, across = _cell(x, columns, width)
    j = left + tl.arange(0, OWNED_COLUMNS)
    fold = tl.where(cell[:, None] == j[None, :], across[:, None], 0.0)
    fold += tl.where(cell[:, None] == j[None, :] + 1, 1 - across[:, None], 0.0)  # (COLUMNS, OWNED_COLUMNS)
    target = (gradient + image * to_image + k * to_class)[:, None] + j[None, :] * to_column
    ours = real & (j < tl.minimum(left + owned, columns))[None, :]
    column, across = cell[None, :], across[None, :]
    factor = tl.load(scale)
    if SMOOTH:
        every = tl.arange(0, ALL_CLASSES)
        shares = tl.sum(tl.load(weights + every, mask=every < classes, other=0.0)) * (smoothing / classes)
        share = tl.load(weights + k, mask=k < classes, other=0.0)[:, None] * (smoothing / classes)
    above = _stretched(places, real, top - 1, column, across, rows, columns, by_row, by_column)
    upper = tl.zeros([CLASSES, COLUMNS], tl.float32)
    for step in range(tl.minimum(rows - top, OWNED_ROWS) + 1):
        row = top + step
        below = _stretched(places, real, row, column, across, rows, columns, by_row, by_column)
        rise = below - above
        lower = tl.zeros([CLASSES, COLUMNS], tl.float32)
        for y in range(first_index(row, rows, height), first_index(row + 1, rows, height)):
            down = _cell(y, rows, height)[1]
            place = y * width + x
            label, scored, _, weight = _read_labels(labels, weights, place, x < width, classes, ignore_index)
            logarithm = tl.load(spread + place, mask=scored, other=float("inf"))  # ignored: a probability of 0
            probability = tl.exp2(above + down * rise - logarithm[None, :])
            hit = (1 - smoothing) * weight
            slope = -tl.where(k[:, None] == label[None, :], hit[None, :], 0.0)
            if SMOOTH:
                slope += probability * (hit + shares)[None, :] - tl.where(scored[None, :], share, 0.0)
            else:
                slope += probability * hit[None, :]
            upper += (1 - down) * slope
            lower += down * slope
        if step > 0:  # the row above the first one is another program's
            found = tl.dot(upper, fold, input_precision=PRECISION) * factor
            tl.store(target + (row - 1) * to_row, found, mask=ours)
        upper, above = lower, below
