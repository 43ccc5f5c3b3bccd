"""The one door for inference: validation, evaluation, prediction and export take their label maps from `segment`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from segformer.bilinear import upsample_argmax
from segformer.errors import UserError
from segformer.pixels import MEAN, STD, normalize, resize

# Pixels from which a CPU takes the images of a batch one after the other: their activations then stay below the size
# (32 MB) from which the C library gives memory back at once and has every page of it faulted in again.
ONE_BY_ONE = 512 * 512


def pair(name: str, value: Any) -> tuple[int, int]:
    """A setting that is one side or a list of two, as two positive integers."""
    sides = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise UserError(f"{name} is {value!r}, expected a positive integer or a list of two")
    return sides[0], sides[1]


@dataclass(frozen=True)
class Protocol:
    """How an image becomes a label map.

    size: None keeps the image's size, (long, short) resizes keeping the ratio so that neither side exceeds its bound.
    align: then rounds both sides up to a multiple (32 lets no reduction window drop border tokens).
    window, stride: slide windows of (height, width) or one side over the resized image, averaging logits; the last
    window is shifted back to end at the border. window None feeds the whole image.
    """

    size: tuple[int, int] | None = None
    align: int = 1
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        window = pair("protocol.window", self.window) if self.window is not None else None
        stride = pair("protocol.stride", self.stride) if self.stride is not None else None
        size = pair("protocol.size", self.size) if self.size is not None else None
        if not isinstance(self.align, int) or self.align < 1:
            raise UserError(f"protocol.align is {self.align!r}, expected an integer of at least 1")
        if stride and not window:
            raise UserError(f"protocol.stride is {self.stride} without a window: add protocol.window")
        if window and stride and (stride[0] > window[0] or stride[1] > window[1]):
            raise UserError(
                f"protocol.stride {self.stride} is larger than protocol.window {self.window}: pixels would be missed"
            )
        object.__setattr__(self, "size", (max(size), min(size)) if size else None)
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "stride", stride or window)

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """The (height, width) an image is resized to, one after the other: keep-ratio, then aligned.

        Two steps, as the published protocol does it: the second one bends the aspect ratio a little.
        """
        steps = []
        if self.size:
            factor = min(self.size[0] / max(height, width), self.size[1] / min(height, width))
            height, width = int(height * factor + 0.5), int(width * factor + 0.5)
            steps.append((height, width))
        steps.append((math.ceil(height / self.align) * self.align, math.ceil(width / self.align) * self.align))
        return steps


def segment(model: nn.Module, images: Tensor, protocol: Protocol = Protocol()) -> Tensor:
    """Label maps of a batch of images at the images' own size.

    model: maps normalised (B, 3, h, w) to an output whose `.logits` are (B, K, h/4, w/4); run in eval mode.
    images: uint8 RGB (B, 3, H, W) on the model's device. Returns (B, H, W) uint8, int16 above 255 classes. An autocast
    around the call is honoured for the network; logits are resized and compared in float32.
    """
    if images.device.type == "cpu" and len(images) > 1 and images[0, 0].numel() >= ONE_BY_ONE:
        return torch.cat([segment(model, image[None], protocol) for image in images])
    modes = [(module, module.training) for module in model.modules()]  # a caller may keep parts of it in eval mode
    model.eval()
    try:
        with torch.inference_mode():
            height, width = images.shape[-2:]
            for size in protocol.sizes(height, width):
                images = resize(images, *size)
            pixels = normalized(model, images)
            logits = _logits(model, pixels, protocol)
            return upsample_argmax(logits, height, width)
    finally:
        for module, training in modes:
            module.training = training


def normalized(model: nn.Module, images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) as the network takes them: by the means and deviations it was trained with, in its dtype."""
    config = getattr(model, "config", None)
    mean, std = getattr(config, "pixel_mean", MEAN), getattr(config, "pixel_std", STD)
    return normalize(images, mean, std).to(next(model.parameters()).dtype)  # half weights take half pixels


def _logits(model: nn.Module, pixels: Tensor, protocol: Protocol) -> Tensor:
    """(B, 3, H, W) -> logits at a quarter of that size, or averaged over windows at the full size."""
    height, width = pixels.shape[-2:]
    if protocol.window is None or (protocol.window[0] >= height and protocol.window[1] >= width):
        logits: Tensor = model(pixels).logits
        return logits
    assert protocol.stride is not None
    tops = _offsets(height, protocol.window[0], protocol.stride[0])
    lefts = _offsets(width, protocol.window[1], protocol.stride[1])
    total, count = pixels.new_zeros(()), pixels.new_zeros(height, width)
    for top in tops:
        for left in lefts:
            at = (..., slice(top, top + protocol.window[0]), slice(left, left + protocol.window[1]))
            view = pixels[at]
            logits = model(view).logits.float()
            logits = torch.nn.functional.interpolate(logits, size=view.shape[-2:], mode="bilinear", align_corners=False)
            if not total.ndim:  # the number of classes is known now
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[at] += logits
            count[at] += 1
    return total.div_(count)


def _offsets(length: int, window: int, stride: int) -> list[int]:
    """Window starts that cover `length`; the last window ends at the border."""
    steps = max(0, math.ceil((length - window) / stride))
    return [max(0, min(step * stride, length - window)) for step in range(steps + 1)]
