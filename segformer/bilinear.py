"""Bilinear resizing of logits (align_corners False) that never holds them whole, and the label map it leads to.

Upsampling 150-class logits to 512 x 512 makes 157 MB an image. What is wanted of them is a loss or a label map, so they
are made a band of rows at a time, or not made at all where they cannot matter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers in one band of upsampled logits: few enough to stay in a CPU's cache, many enough that launching a kernel
# does not show.
BAND_NUMBERS = {"cpu": 2**20, "cuda": 2**26}


def bilinear_matrix(
    source: int, target: int, device: torch.device, dtype: torch.dtype = torch.float32, rows: slice = slice(None)
) -> Tensor:
    """(target, source) weights of one axis of a bilinear resize (align_corners False): each row sums to one.

    rows: which of the target's rows are wanted.
    """
    exact = torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs have no float64
    wanted = torch.arange(*rows.indices(target), device=exact, dtype=torch.float64)
    centre = ((wanted + 0.5) * source / target - 0.5).clamp(min=0)
    low = centre.floor().long().clamp(max=source - 1)
    high = (low + 1).clamp(max=source - 1)
    weight = (centre - low).to(dtype)
    index = torch.arange(len(wanted), device=exact)
    matrix = torch.zeros(len(wanted), source, device=exact, dtype=dtype)
    matrix[index, low] = 1 - weight
    return matrix.index_put_((index, high), weight, accumulate=True).to(device)


def rows_needed(source: int, target: int, rows: slice) -> slice:
    """The rows of `source` that `rows` of its resize to `target` rows are made of."""
    first = int((rows.start + 0.5) * source / target - 0.5)  # int() takes what lies above row 0 to row 0
    last = int((rows.stop - 0.5) * source / target - 0.5) + 2
    return slice(first, min(last, source))


def row_bands(source: int, target: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Cuts an upsampling of `source` to `target` rows into bands of at most `rows`: (output rows, rows they need)."""
    for top in range(0, target, rows):
        band = slice(top, min(top + rows, target))
        yield band, rows_needed(source, target, band)


def band_rows(numbers: int, device: torch.device) -> int:
    """How many rows of `numbers` values make a band."""
    return max(1, BAND_NUMBERS.get(device.type, BAND_NUMBERS["cuda"]) // numbers)


def upsample_band(maps: Tensor, vertical: Tensor, width: int) -> Tensor:
    """(..., h, w, C) maps and (R, h) weights of `bilinear_matrix` -> (..., R, width, C).

    Rows by a product, columns by a kernel: a product for both would cost width operations a value where a bilinear
    kernel needs two.
    """
    *batch, rows, columns, channels = maps.shape
    tall = (vertical @ maps.reshape(*batch, rows, -1)).view(-1, len(vertical), columns, channels)
    if columns == width:
        return tall.view(*batch, len(vertical), columns, channels)
    size = (len(vertical), width)
    band = F.interpolate(tall.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
    return band.permute(0, 2, 3, 1).reshape(*batch, *size, channels)


def finite(maps: Tensor) -> Tensor:
    """Logits as they are resized and compared: float32 (float64 stays), nothing infinite.

    A class ruled out by -inf must not turn its neighbours into NaN, which wins every argmax; nor does a NaN win.
    """
    maps = maps if maps.dtype == torch.float64 else maps.float()
    lowest = torch.finfo(maps.dtype).min / 2**20  # sums of many stay finite
    return torch.nan_to_num(maps, nan=lowest, neginf=lowest, posinf=-lowest)


def label_type(classes: int) -> torch.dtype:
    """Of a label map: uint8, int16 above 255 classes."""
    return torch.uint8 if classes <= 255 else torch.int16


def upsample_argmax(logits: Tensor, height: int, width: int) -> Tensor:
    """argmax over classes of bilinearly resized logits, in real arithmetic; ties of rounding may fall either way.

    logits: (B, K, h, w) -> (B, height, width) uint8, int16 above 255 classes. Compared in float32 (float64 stays). A
    class whose logit is -inf or NaN at a place does not win there.
    """
    classes, rows, columns = logits.shape[1:]
    dtype = label_type(classes)
    if (rows, columns) == (height, width):
        return finite(logits).argmax(dim=1).to(dtype)
    with torch.autocast(logits.device.type, enabled=False):
        maps = finite(logits.permute(0, 2, 3, 1).contiguous())
        # pruning pays for many values on a CPU, several pixels a cell; a GPU would wait for the count of open cells
        many = classes * height * width > 8 * BAND_NUMBERS["cpu"]
        prune = logits.device.type == "cpu" and many and height >= 2 * rows and width >= 2 * columns
        method = _argmax_pruned if prune else _argmax_dense
        return torch.stack([method(image, height, width).to(dtype) for image in maps])


def _argmax_dense(maps: Tensor, height: int, width: int) -> Tensor:
    """(h, w, K) -> (height, width): upsample a band of rows, take the argmax, forget the band."""
    rows, _, classes = maps.shape
    vertical = bilinear_matrix(rows, height, maps.device, maps.dtype)
    labels = torch.empty(height, width, dtype=torch.long, device=maps.device)
    for out, source in row_bands(rows, height, band_rows(width * classes, maps.device)):
        labels[out] = upsample_band(maps[source], vertical[out, source], width).argmax(dim=2)
    return labels


@dataclass(frozen=True)
class _Cells:
    """One axis of an upsampling, cut where the source index steps: cell c lies between sources low[c] and high[c].

    of: (target,) the cell of each output index. low, high: (source + 1,) source indices, equal at both borders.
    index, weight: (source + 1, P) output indices in each cell and the weight of `high` there, padded by repetition.
    """

    of: Tensor
    low: Tensor
    high: Tensor
    index: Tensor
    weight: Tensor

    @classmethod
    def of_axis(cls, source: int, target: int, dtype: torch.dtype) -> "_Cells":
        assert target >= 2 * source  # no cell is empty
        centre = (torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5
        cell = centre.floor().long() + 1
        count = torch.bincount(cell, minlength=source + 1)
        place = torch.arange(int(count.max())).minimum(count[:, None] - 1)  # (source + 1, P)
        index = (count.cumsum(0) - count)[:, None] + place
        weight = (centre - centre.floor()).to(dtype)[index]
        border = torch.arange(source + 1)
        return cls(cell, (border - 1).clamp(min=0), border.clamp(max=source - 1), index, weight)


CANDIDATES = 8  # classes compared inside a cell at first; natural images rarely need more
CELL_NUMBERS = 2**19  # logits of open cells looked at in one go: they stay in a CPU's cache


def _argmax_pruned(maps: Tensor, height: int, width: int) -> Tensor:
    """(h, w, K) -> (height, width), interpolating only what can decide.

    Inside a cell all logits are convex combinations of its four corners. So a class that wins all corners wins the
    whole cell, and one that another beats at all corners wins nowhere in it: the rest, mostly two or three classes,
    are the candidates. Where they are many (noise), the dense way is the faster one.
    """
    rows, columns, classes = maps.shape
    vertical, across = (_Cells.of_axis(*axis, maps.dtype) for axis in ((rows, height), (columns, width)))
    ends = [(row, column) for row in (vertical.low, vertical.high) for column in (across.low, across.high)]
    winner = maps.argmax(dim=2)
    corners = [winner[row][:, column] for row, column in ends]  # (h + 1, w + 1) each
    labels = corners[0][vertical.of][:, across.of]
    settled = (corners[0] == corners[1]) & (corners[0] == corners[2]) & (corners[0] == corners[3])
    flat, unsettled = maps.view(-1, classes), (~settled).nonzero()
    if 2 * len(unsettled) > settled.numel():
        return _argmax_dense(maps, height, width)
    for cells in torch.split(unsettled, max(1, CELL_NUMBERS // classes)):
        i, j = cells.T
        values = torch.stack([flat.index_select(0, row[i] * columns + column[j]) for row, column in ends])  # (4, n, K)
        leader = values.sum(dim=0).argmax(dim=1, keepdim=True)
        lead = (values - values.gather(2, leader.expand(4, -1, -1))).amax(dim=0)  # (n, K), above 0 where not beaten
        count = (lead > 0).sum(dim=1) + 1
        if count.double().mean() > 3 * CANDIDATES:
            return _argmax_dense(maps, height, width)
        lead.scatter_(1, leader, torch.inf)
        most, done = min(CANDIDATES, classes), 0
        while True:
            few = ((count > done) & (count <= most)).nonzero()[:, 0]
            if len(few):
                candidates = lead[few].topk(most, dim=1, sorted=False).indices.sort(dim=1).values.T  # (m, n)
                a, b = i[few], j[few]
                best = _best(values[:, few], candidates, vertical.weight[a], across.weight[b])
                labels[vertical.index[a][:, :, None], across.index[b][:, None]] = best
            if most == classes:
                break
            most, done = min(4 * most, classes), most
    return labels


def _best(values: Tensor, candidates: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """The winning class at each pixel of n cells.

    values: (4, n, K) logits at the corners. candidates: (m, n) class ids. down: (n, P), right: (n, Q) weights of the
    lower and the right corners. Returns (n, P, Q) class ids.
    """
    top_left, top_right, low_left, low_right = (corner.T.gather(0, candidates)[..., None] for corner in values)
    left, far = top_left.lerp(low_left, down), top_right.lerp(low_right, down)  # (m, n, P)
    place = left[..., None].lerp(far[..., None], right[:, None]).argmax(dim=0)  # (n, P, Q)
    return candidates.T.gather(1, place.flatten(1)).view(place.shape)
