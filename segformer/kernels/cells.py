"""Cells, which the kernels that upsample share: cell c of an axis holds what lies between its sources c - 1 and c."""

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit
def first_index(cell, source, target):  # type: ignore[no-untyped-def]
    """The first output index whose centre lies in a cell or behind it (align_corners False).

    In whole numbers, none below zero: Triton's division goes to zero.
    """
    return tl.minimum(tl.maximum((2 * cell - 1) * target + source - 1, 0) // (2 * source), target)
