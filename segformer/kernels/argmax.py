"""The label map of logits (bilinear, align_corners False) and its confusion matrix in one pass: no logits are written.

The twins are `segformer.bilinear.upsample_argmax` and, of what it gives, `segformer.metrics.confusion_matrix`.

An output pixel lies between four logits of each class: the corners of its cell. A thread owns a patch of at most 4 x 4
pixels of one cell, reads the corners once for all of them and keeps the best class so far of each in registers. No
class can exceed its highest corner, so a chunk of classes that is nowhere above the worst pixel of its patch is passed
over before it is interpolated.

Bytes: the floor is the logits read once and the labels written, at 150 classes in bf16 4.9 + 0.26 MB for an image of
512 x 512. Each logit is a corner of four cells and is asked for four times, by neighbouring threads and blocks: the
other three meet the caches. Beyond the floor nothing is moved. What bounds it is arithmetic, not bytes: compiled for
sm_90, a class costs a pixel 8 to 10 instructions, 2 to 4 where it is passed over.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from segformer.bilinear import label_type
from segformer.kernels.cells import first_index

BLOCK = 32  # patches a program: one warp, so that a reduction needs no barrier
CHUNK = 8  # classes read at a time: 16 bytes of a pixel's logits in bf16 where channels are last
SIDE = 4  # pixels of a patch along either axis at most
ROUNDS = 8  # pairs of label and class that a program counts itself; most see fewer
LOWEST = torch.finfo(torch.float32).min / 2**20  # as `segformer.bilinear.finite` has it
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit  # type: ignore[untyped-decorator]
def _axis(patch, pieces, source, target, PIXELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One axis of (N,) patches: the sources on both sides (N,), output indices, weights of the latter source, validity.

    The last three are (PIXELS, N). Positions are whole numbers in units of 1 / (2 target): a weight is rounded once.
    """
    cell = patch // pieces
    low = tl.minimum(tl.maximum(cell - 1, 0), source - 1)
    high = tl.minimum(cell, source - 1)
    index = (first_index(cell, source, target) + patch % pieces * PIXELS)[None, :] + tl.arange(0, PIXELS)[:, None]
    position = (2 * index + 1) * source - target - 2 * target * (cell - 1)[None, :]
    weight = tl.div_rn(position.to(tl.float32), tl.zeros_like(position).to(tl.float32) + 2 * target)
    weight = tl.where((low == high)[None, :], 0.0, tl.minimum(weight, 1.0))  # 1: of indices past the cell
    index = index.to(tl.int32)  # held to the end: half the registers
    return low, high, index, weight, index < first_index(cell + 1, source, target)[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _corner(pointer, known, LOWEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits in float32, nothing infinite; what is no number or no class is the lowest."""
    value = tl.load(pointer, mask=known, other=float("-inf")).to(tl.float32)
    return tl.minimum(tl.where(value > LOWEST, value, LOWEST), -LOWEST)  # no NaN exceeds anything


@triton.jit(do_not_specialize=["rows", "columns", "height", "width", "down", "along"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    found,
    confusion,
    rows,
    columns,
    height,
    width,
    down,
    along,
    stride_image,
    stride_class,
    stride_row,
    stride_column,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    CLASSES: tl.constexpr,
    CHUNK: tl.constexpr,
    ROUNDS: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """down, along: patches to a cell. Threads run along the last axis, of patches: all others lie in registers."""
    image = tl.program_id(1).to(tl.int64)
    patch = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    across = (columns + 1) * along
    top, bottom, y, low, in_y = _axis(patch // across, down, rows, height, ROWS)
    left, right, x, far, in_x = _axis(patch % across, along, columns, width, COLUMNS)

    best = tl.full([ROWS, COLUMNS, BLOCK], float("-inf"), tl.float32)
    winner = tl.zeros([ROWS, COLUMNS, BLOCK], tl.int32)
    for start in range(0, CLASSES, CHUNK):
        k = start + tl.arange(0, CHUNK)
        plane = logits + image * stride_image + k.to(tl.int64)[:, None] * stride_class
        known = (k < CLASSES)[:, None]
        top_left = _corner(plane + (top * stride_row + left * stride_column)[None, :], known, LOWEST)
        top_right = _corner(plane + (top * stride_row + right * stride_column)[None, :], known, LOWEST)
        low_left = _corner(plane + (bottom * stride_row + left * stride_column)[None, :], known, LOWEST)
        low_right = _corner(plane + (bottom * stride_row + right * stride_column)[None, :], known, LOWEST)
        highest = tl.maximum(tl.maximum(top_left, top_right), tl.maximum(low_left, low_right))
        worst = tl.min(tl.min(best, axis=0), axis=0)
        if tl.max((tl.max(highest, axis=0) > worst).to(tl.int32), axis=0) > 0:
            near = tl.fma((low_left - top_left)[:, None, :], low[None, :, :], top_left[:, None, :])
            past = tl.fma((low_right - top_right)[:, None, :], low[None, :, :], top_right[:, None, :])
            # (CHUNK, ROWS, COLUMNS, BLOCK)
            value = tl.fma((past - near)[:, :, None, :], far[None, None, :, :], near[:, :, None, :])
            most = tl.max(value, axis=0)
            which = tl.min(tl.where(value == most[None, :, :, :], k[:, None, None, None], CLASSES), axis=0)
            winner = tl.where(most > best, which, winner)
            best = tl.maximum(best, most)

    place = (image * height + y[:, None, :]) * width + x[None, :, :]
    valid = in_y[:, None, :] & in_x[None, :, :]
    tl.store(found + place, winner.to(found.dtype.element_ty), mask=valid)
    if COUNT:
        label = tl.load(labels + place, mask=valid, other=0).to(tl.int64)
        pair = (label * CLASSES + winner).to(tl.int32)
        pair = tl.where(valid & (label >= 0) & (label < CLASSES), pair, -1)
        # neighbours mostly agree: counted together, not all threads wait for the same few cells of the matrix
        for _ in range(ROUNDS):
            one = tl.max(pair)
            number = tl.sum((pair == one).to(tl.int32))
            tl.atomic_add(confusion + one, number.to(tl.int64), mask=one >= 0, sem="relaxed")
            pair = tl.where(pair == one, -1, pair)
        tl.atomic_add(confusion + pair, tl.full(pair.shape, 1, tl.int64), mask=pair >= 0, sem="relaxed")


def _launch(logits: Tensor, found: Tensor, labels: Tensor | None, confusion: Tensor | None) -> None:
    (batch, classes, rows, columns), (height, width) = logits.shape, found.shape[1:]
    if found.numel() == 0:
        return
    pixels = [triton.cdiv(height, rows), triton.cdiv(width, columns)]  # of a cell, at most
    sides = [min(SIDE, triton.next_power_of_2(most)) for most in pixels]
    down, along = (triton.cdiv(most, side) for most, side in zip(pixels, sides, strict=True))
    patches = (rows + 1) * down * (columns + 1) * along
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        _kernel[triton.cdiv(patches, BLOCK), batch](
            *(logits, labels, found, confusion, rows, columns, height, width, down, along),
            *logits.stride(),
            COUNT=confusion is not None,
            ROWS=sides[0],
            COLUMNS=sides[1],
            BLOCK=BLOCK,
            CLASSES=classes,
            CHUNK=CHUNK,
            ROUNDS=ROUNDS,
            LOWEST=LOWEST,
            num_warps=1,
        )


def _check(logits: Tensor) -> None:
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits are {logits.dtype}, expected one of {DTYPES}: the twin takes any other")


@torch.library.custom_op("segformer::upsample_argmax", mutates_args=())
def upsample_argmax(logits: Tensor, height: int, width: int) -> Tensor:
    """argmax over classes of bilinearly resized logits, compared in float32.

    logits: (B, K, h, w) float32, bfloat16 or float16 of any strides, read where they lie. Returns (B, height, width)
    uint8, int16 above 255 classes. Of equal logits the first class wins; NaN and -inf win nowhere, and what lies beyond
    3.2e32 counts as infinite. Equal to the twin except where two classes are as close as float32 rounds: within
    1.2e-6 (10 eps) of the largest logit.

    Raises:
        TypeError: logits are of another type.
    """
    _check(logits)
    found = logits.new_empty(len(logits), height, width, dtype=label_type(logits.shape[1]))
    _launch(logits, found, None, None)
    return found


@upsample_argmax.register_fake
def _(logits: Tensor, height: int, width: int) -> Tensor:
    return logits.new_empty(logits.shape[0], height, width, dtype=label_type(logits.shape[1]))


@torch.library.custom_op("segformer::upsample_argmax_confusion", mutates_args=())
def upsample_argmax_confusion(logits: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """`upsample_argmax` to the size of labels, and (K, K) int64 counts: row = label, column = prediction.

    labels: (B, H, W) of any integer type (made contiguous where they are not); outside 0..K-1 (255 = ignore) they do
    not count. classes: K. Counts are integers, so the order in which they are added leaves no trace.

    Raises:
        TypeError: logits are of another type.
        ValueError: classes is not K, or labels and logits differ in B.
    """
    _check(logits)
    if classes != logits.shape[1] or labels.ndim != 3 or len(labels) != len(logits):
        shapes = f"{tuple(logits.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(f"logits {shapes} of {classes} classes, expected (B, {classes}, h, w) and (B, H, W)")
    found = logits.new_empty(labels.shape, dtype=label_type(classes))
    confusion = logits.new_zeros(classes, classes, dtype=torch.int64)
    _launch(logits, found, labels.contiguous(), confusion)
    return found, confusion


@upsample_argmax_confusion.register_fake
def _(logits: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    return (
        logits.new_empty(labels.shape, dtype=label_type(classes)),
        logits.new_empty(classes, classes, dtype=torch.int64),
    )
