"""The one door for inference: validation, evaluation, prediction and export take their label maps from `segment`."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from segformer.bilinear import (
    band_rows,
    bilinear_matrix,
    finite,
    label_type,
    rows_needed,
    upsample_argmax,
    upsample_band,
)
from segformer.errors import UserError, nearest
from segformer.kernels import recording, usable
from segformer.metrics import confusion_matrix
from segformer.pixels import MEAN, STD, normalize, resize

# Pixels from which a CPU takes the images of a batch one after the other: their activations then stay below the size
# (32 MB) from which the C library gives memory back at once and has every page of it faulted in again.
ONE_BY_ONE = 512 * 512
# Pixels of windows that a GPU sees at once; a CPU, for the reason above, takes one window after the other.
WINDOW_PIXELS = 4 * 1024 * 1024
REDUCTION = 4  # of pixels to logits, per side
MAX_SIDE, MAX_SCALE = 2**20, 100  # beyond these it is a mistake
FEWEST_ROWS = 16  # of a band, however wide it is: fewer are made too slowly

Stitch = Literal["exact", "quarter"]
ResizeLogits = Literal["once", "twice"]


def pair(name: str, value: Any) -> tuple[int, int]:
    """A setting that is one side or a list of two, as two positive integers."""
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
        raise UserError(f"{name} is {value!r}, expected a positive integer or a list of two, at most {MAX_SIDE}")
    return sides[0], sides[1]


@dataclass(frozen=True)
class Protocol:
    """How an image becomes a label map.

    size: None keeps the image's size. (long, short) resizes keeping the ratio so that neither side exceeds its bound,
    by min(long / longer side, short / shorter side) as NVlabs and mmseg have it: with (2048, 512) the shorter side
    becomes 512 unless the image is more than four times as long as wide. One integer is the shorter side alone; the
    longer one is free.
    align: then rounds both sides up to a multiple (32 lets no reduction window drop border tokens).
    window, stride: slide windows of (height, width) or one side over the resized image, averaging logits; the last
    window is shifted back to end at the border. window None feeds the whole image.
    scales, flip: the image at `size` times each scale, and its mirror image at each, are segmented as above; the mean
    of their softmax maps at the image's own size decides. Published: 0.5 to 2 by 0.25 for Cityscapes, 0.75 to 1.25 by
    0.125 for ADE20K, 0.5 to 1.75 by 0.25 for the rest, all with flip.
    stitch: "exact" adds up windows upsampled to pixels, as mmseg does; "quarter" adds up the logits as the network
    gives them, at a quarter of the size, and upsamples once, which differs within 2 pixels of the windows' borders.
    resize_logits: "once" from the network's size to the image's own; "twice" by way of the size the network saw, as
    NVlabs does. Exact windows have been at that size, so it is the same for them.
    """

    size: int | tuple[int, int] | None = None
    align: int = 1
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    stitch: Stitch = "exact"
    resize_logits: ResizeLogits = "once"

    def __post_init__(self) -> None:
        window = pair("protocol.window", self.window) if self.window is not None else None
        stride = pair("protocol.stride", self.stride) if self.stride is not None else None
        if self.size is not None:
            size = pair("protocol.size", self.size)
            object.__setattr__(self, "size", size[0] if isinstance(self.size, int) else (max(size), min(size)))
        if type(self.align) is not int or self.align < 1:
            raise UserError(f"protocol.align is {self.align!r}, expected an integer of at least 1")
        if stride and not window:
            raise UserError(f"protocol.stride is {self.stride} without a window: add protocol.window")
        if window and stride and (stride[0] > window[0] or stride[1] > window[1]):
            raise UserError(
                f"protocol.stride {self.stride} is larger than protocol.window {self.window}: pixels would be missed"
            )
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "stride", stride or window)
        object.__setattr__(self, "scales", _scales(self.scales))
        if not isinstance(self.flip, bool):
            raise UserError(f"protocol.flip is {self.flip!r}, expected true or false")
        _require_choice("protocol.stitch", self.stitch, get_args(Stitch))
        _require_choice("protocol.resize_logits", self.resize_logits, get_args(ResizeLogits))
        if self.stitch == "quarter" and any(side % REDUCTION for side in (self.window or ()) + (self.stride or ())):
            raise UserError(
                f"protocol.window {self.window} and protocol.stride {self.stride} are not all multiples of {REDUCTION},"
                " as protocol.stitch=quarter needs: change them or take protocol.stitch=exact"
            )

    def sizes(self, height: int, width: int, scale: float = 1.0) -> list[tuple[int, int]]:
        """The (height, width) an image is resized to, one after the other: keep-ratio, then aligned.

        Two steps, as the published protocol does it: the second one bends the aspect ratio a little.
        """
        steps = []
        if self.size or scale != 1:
            factor = self._factor(max(height, width), min(height, width), scale)
            height, width = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
            steps.append((height, width))
        steps.append((math.ceil(height / self.align) * self.align, math.ceil(width / self.align) * self.align))
        return steps

    def _factor(self, longer: int, shorter: int, scale: float) -> float:
        if self.size is None:
            return scale
        if isinstance(self.size, int):
            return self.size * scale / shorter
        return min(self.size[0] * scale / longer, self.size[1] * scale / shorter)  # the bounds are scaled

    def whole(self, height: int, width: int) -> bool:
        """Whether an image resized to this size goes through the network at once."""
        return self.window is None or (self.window[0] >= height and self.window[1] >= width)


def _scales(value: Any) -> tuple[float, ...]:
    scales = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not scales or not all(type(scale) in (int, float) and 0 < scale <= MAX_SCALE for scale in scales):
        raise UserError(
            f"protocol.scales is {value!r}, expected a list of numbers above 0, at most {MAX_SCALE}, like "
            "[0.75, 1.0, 1.25]"
        )
    return tuple(float(scale) for scale in scales)


def _require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}{nearest(str(value), choices)}: choose from {', '.join(choices)}")


def segment(model: nn.Module, images: Tensor, protocol: Protocol = Protocol()) -> Tensor:
    """Label maps of a batch of images at the images' own size.

    model: maps normalised (B, 3, h, w) to an output whose `.logits` are (B, K, h/4, w/4); run in eval mode.
    images: uint8 RGB (B, 3, H, W) on the model's device. Returns (B, H, W) uint8, int16 above 255 classes. An autocast
    around the call is honoured for the network; logits are resized and compared in float32. They are never whole at the
    images' size: of windows those are kept that reach the rows at hand, of whole images the network's own logits.
    """
    if images.device.type == "cpu" and len(images) > 1 and images[0, 0].numel() >= ONE_BY_ONE:
        return torch.cat([segment(model, image[None], protocol) for image in images])
    with _inference(model):
        return _segment(model, images, protocol, _label_map)


def score(
    model: nn.Module, images: Tensor, labels: Tensor, classes: int, protocol: Protocol = Protocol()
) -> tuple[Tensor, Tensor]:
    """What `segment` finds, and its confusion matrix with labels (B, H, W): (K, K) int64, row = label.

    Labels outside 0..K-1 (255 = ignore) do not count. A kernel that makes the label map counts in the same pass, and
    the host does not wait for the GPU.
    """
    if labels.shape != images[:, 0].shape:
        sizes = [" x ".join(map(str, each.shape)) for each in (labels, images[:, 0])]
        raise UserError(f"labels are {sizes[0]}, expected the images' own size, {sizes[1]}")
    if not usable(next(model.parameters())):
        found = segment(model, images, protocol)
        return found, confusion_matrix(found, labels, classes)
    counts: list[Tensor] = []

    def counted(logits: Tensor, height: int, width: int) -> Tensor:
        from segformer.kernels.argmax import upsample_argmax_confusion

        found, matrix = upsample_argmax_confusion(logits, labels, classes)
        counts.append(matrix)
        return found

    with _inference(model):
        found = _segment(model, images, protocol, counted)
        return found, counts[0] if counts else confusion_matrix(found, labels, classes)


def graphed(model: nn.Module, images: Tensor, protocol: Protocol = Protocol()) -> Callable[[Tensor], Tensor]:
    """`segment` for images like these, recorded as a CUDA graph and replayed by a single launch.

    A GPU is done with a small batch sooner than the host has launched the hundreds of kernels that it takes. images:
    uint8 RGB (B, 3, H, W) on the GPU, an example. Returns a function of images of that shape, whose label maps are
    `segment`'s but for ties of rounding. Weights may change in place, not by others. An autocast around this call is
    recorded, too.

    Raises:
        UserError: the images are not on a CUDA device; or, by the function, are of another shape.
    """
    if not images.is_cuda:
        raise UserError(f"images are on {images.device}, but a CUDA graph needs them on a GPU: use segment")
    kept = images.clone()
    half = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    # a cast weight that autocast remembers would lie in the graph's own memory
    with torch.cuda.device(images.device), torch.autocast("cuda", *half, cache_enabled=False), recording():
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # what is done once, such as compiling kernels, is not recorded
                segment(model, kept, protocol)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            labels = segment(model, kept, protocol)

    def replay(images: Tensor) -> Tensor:
        if images.shape != kept.shape:
            found, expected = (" x ".join(map(str, each.shape)) for each in (images, kept))
            raise UserError(f"images are {found}, expected {expected}, as they were recorded: record them anew")
        with torch.inference_mode():  # it may have been recorded in it
            kept.copy_(images)
        graph.replay()
        return labels.clone()

    return replay


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, nothing learnt; afterwards it is as it was."""
    modes = [(module, module.training) for module in model.modules()]  # a caller may keep parts of it in eval mode
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _label_map(logits: Tensor, height: int, width: int) -> Tensor:
    """`bilinear.upsample_argmax`, by a kernel where one can take the logits."""
    if not usable(logits):
        return upsample_argmax(logits, height, width)
    from segformer.kernels import argmax

    found: Tensor = argmax.upsample_argmax(logits, height, width)
    return found


def normalized(model: nn.Module, images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) as the network takes them: by the means and deviations it was trained with, in its dtype."""
    config = getattr(model, "config", None)
    mean, std = getattr(config, "pixel_mean", MEAN), getattr(config, "pixel_std", STD)
    return normalize(images, mean, std).to(next(model.parameters()).dtype)  # half weights take half pixels


# Rows of logits: (first, last) -> (B, last - first, W, K) in float32 or float64. They are asked for from the top down,
# a band at a time, and bands may overlap.
Rows = Callable[[int, int], Tensor]
Network = Callable[[Tensor], Tensor]  # uint8 (B, 3, h, w) -> logits (B, h/4, w/4, K)


def _segment(
    model: nn.Module, images: Tensor, protocol: Protocol, label_map: Callable[[Tensor, int, int], Tensor]
) -> Tensor:
    """label_map: of logits (B, K, h, w) and the height and width wanted, where the network sees all in one view."""
    height, width = images.shape[-2:]
    single = len(protocol.scales) == 1 and not protocol.flip
    views = []
    for scale in protocol.scales:
        resized = images
        for size in protocol.sizes(height, width, scale):
            resized = resize(resized, *size)
        direct = protocol.resize_logits == "once" or resized.shape == images.shape
        if single and direct and protocol.whole(*resized.shape[-2:]):
            return label_map(_network(model, False)(resized).permute(0, 3, 1, 2), height, width)
        mirrored = (False, True)[: 1 + protocol.flip]
        views += [_view(model, resized, protocol, (height, width), flip) for flip in mirrored]
    batch, _, _, classes = views[0](0, 1).shape  # the number of classes is known now
    labels = torch.empty(batch, height, width, dtype=label_type(classes), device=images.device)
    rows = max(FEWEST_ROWS, band_rows(batch * width * classes, images.device))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        labels[:, top:bottom] = _scores(views, top, bottom).argmax(dim=-1)
    return labels


def _scores(views: Sequence[Rows], first: int, last: int) -> Tensor:
    """Logits of the only view, or the sum of the softmax maps of several."""
    if len(views) == 1:
        return views[0](first, last)
    total = views[0](first, last).softmax(dim=-1)
    for view in views[1:]:
        total += view(first, last).softmax(dim=-1)
    return total


def _network(model: nn.Module, flip: bool) -> Network:
    """The model; flip: its logits of the mirror image, mirrored back."""

    def logits(images: Tensor) -> Tensor:
        found: Tensor = model(normalized(model, images.flip(-1) if flip else images)).logits
        return (found.flip(-1) if flip else found).permute(0, 2, 3, 1)

    return logits


def _view(model: nn.Module, images: Tensor, protocol: Protocol, own: tuple[int, int], flip: bool) -> Rows:
    """Logits at the images' own size from resized images."""
    network, size = _network(model, flip), (images.shape[-2], images.shape[-1])
    if protocol.whole(*size):
        maps = network(images)
        rows, at = _kept(maps), (maps.shape[1], maps.shape[2])
    else:
        windows = _Windows(network, images, *_grid(protocol, size, flip))
        rows, at = windows.rows, windows.size
    if protocol.resize_logits == "twice":
        rows, at = _resized(rows, at, size), size
    return _resized(rows, at, own)


def _kept(maps: Tensor) -> Rows:
    maps = maps.contiguous()
    return lambda first, last: finite(maps[:, first:last])


def _resized(rows: Rows, source: tuple[int, int], target: tuple[int, int]) -> Rows:
    """Bilinear (align_corners False), from (height, width) to (height, width)."""
    if source == target:
        return rows

    def band(first: int, last: int) -> Tensor:
        wanted = slice(first, last)
        needed = rows_needed(source[0], target[0], wanted)
        maps = rows(needed.start, needed.stop)
        vertical = bilinear_matrix(source[0], target[0], maps.device, maps.dtype, wanted)[:, needed]
        with torch.autocast(maps.device.type, enabled=False):
            return upsample_band(maps, vertical, target[1])

    return band


def _grid(protocol: Protocol, size: tuple[int, int], flip: bool) -> tuple[tuple[int, int], list[int], list[int], int]:
    """What `_Windows` takes beside the network and images of this size; flip: where the mirror image's windows lie."""
    assert protocol.window is not None and protocol.stride is not None
    window = min(protocol.window[0], size[0]), min(protocol.window[1], size[1])
    tops, lefts = (_offsets(*axis) for axis in zip(size, window, protocol.stride, strict=True))
    if flip:
        lefts = [size[1] - window[1] - left for left in lefts]
    unit = REDUCTION if protocol.stitch == "quarter" else 1
    if any(offset % unit for offset in tops + lefts):
        raise UserError(
            f"an image resized to {size[0]} x {size[1]} has windows that start at rows {tops} and columns {lefts}, "
            f"not all multiples of {unit}, as protocol.stitch=quarter needs: add protocol.align={unit}"
        )
    return window, tops, lefts, unit


@dataclass
class _Windows:
    """Logits averaged over windows: the network sees a row of windows when the first of its rows is asked for, and it
    is forgotten after the last.

    tops, lefts: where windows start. unit: pixels, per side, of one place of the plane on which windows are added up:
    1, or REDUCTION for logits as the network gives them.
    """

    network: Network
    images: Tensor
    window: tuple[int, int]
    tops: list[int]
    lefts: list[int]
    unit: int

    def __post_init__(self) -> None:
        height, width = self.images.shape[-2:]
        self.size = math.ceil(height / self.unit), math.ceil(width / self.unit)
        self.extent = math.ceil(self.window[0] / self.unit), math.ceil(self.window[1] / self.unit)
        self.waiting = list(self.tops)
        self.open: list[tuple[int, int, Rows]] = []  # top, left, the window's own rows
        self.down = self._cover(self.tops, 0)[:, None, None]
        self.across = self._cover(self.lefts, 1)[:, None]

    def _cover(self, starts: list[int], axis: int) -> Tensor:
        """How many windows cover each place of an axis."""
        count = torch.zeros(self.size[axis], device=self.images.device)
        for start in starts:
            count[start // self.unit :][: self.extent[axis]] += 1
        return count

    def rows(self, first: int, last: int) -> Tensor:
        self.open = [window for window in self.open if window[0] + self.extent[0] > first]
        while self.waiting and self.waiting[0] // self.unit < last:
            top = self.waiting.pop(0)
            if top // self.unit + self.extent[0] > first:  # a tiny image is enlarged over whole windows
                self.open += self._seen(top)
        total = None
        for top, left, rows in self.open:
            begin, end = max(first, top), min(last, top + self.extent[0])
            part = rows(begin - top, end - top)
            if total is None:
                total = part.new_zeros(len(part), last - first, self.size[1], part.shape[-1])
            total[:, begin - first : end - first, left : left + self.extent[1]] += part
        assert total is not None
        return total.div_(self.down[first:last] * self.across)

    def _seen(self, top: int) -> Iterator[tuple[int, int, Rows]]:
        """Feeds a row of windows to the network."""
        height, width = self.window
        views = [self.images[..., top : top + height, left : left + width] for left in self.lefts]
        count = 1 if self.images.device.type == "cpu" else max(1, WINDOW_PIXELS // views[0][:, 0].numel())
        batches = [torch.cat(views[start : start + count]) for start in range(0, len(views), count)]
        seen = [maps for batch in batches for maps in torch.split(self.network(batch), len(self.images))]
        for left, maps in zip(self.lefts, seen, strict=True):
            rows = _resized(_kept(maps), (maps.shape[1], maps.shape[2]), self.extent)
            yield top // self.unit, left // self.unit, rows


def _offsets(length: int, window: int, stride: int) -> list[int]:
    """Window starts that cover `length`; the last window ends at the border."""
    steps = max(0, math.ceil((length - window) / stride))
    return [max(0, min(step * stride, length - window)) for step in range(steps + 1)]
