"""python benchmarks/inference.py --models b0 b2 b5 --json inference.json

Image in, label map out, against transformers: the same weights, uint8 images of one size, 150 classes. Theirs is
normalise, network (SDPA), bilinear upsampling, argmax; ours is `segment`. Exits with 1 if the label maps differ.
"""

import sys
from typing import Any

import pairs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from segformer.config import VARIANTS, SegformerConfig
from segformer.inference import segment
from segformer.model import SegformerForSemanticSegmentation
from segformer.pixels import normalize

AGREEMENT = 0.9999  # of the pixels in fp32
# millions of parameters and of multiply-adds at 512 x 512 (B5: 640 x 640) with 150 classes: arXiv 2105.15203, table 1
PUBLISHED = {
    "b0": (3.8, 8.4),
    "b1": (13.7, 15.9),
    "b2": (27.5, 62.4),
    "b3": (47.3, 79.0),
    "b4": (64.1, 95.7),
    "b5": (84.7, 183.3),
}


def main() -> None:
    options = pairs.arguments(__doc__ or "", models=["b0", "b2", "b5"], batches=[1, 4], rounds=9)
    speed = [
        measure(variant, batch, precision, options)
        for variant in options.models
        for batch in options.batch
        for precision in options.precision
    ]
    sections = {"Times faster": speed, "Size": [size(variant) for variant in VARIANTS]}
    pairs.publish("Image in, label map out", sections, options)
    wrong = [row for row in speed if row["precision"] == "fp32" and row["agree"] < AGREEMENT]
    if wrong:
        sys.exit(f"label maps differ: {wrong}")


def measure(variant: str, batch: int, precision: str, options: Any) -> dict[str, Any]:
    device = options.device
    theirs, ours = pairs.networks(variant, options.classes, device)
    images, _ = pairs.images(batch, options.size, device)

    def peer() -> Tensor:
        with torch.no_grad(), pairs.precision(precision, device):
            logits = theirs(normalize(images)).logits
            return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False).argmax(dim=1)

    def own() -> Tensor:
        with pairs.precision(precision, device):
            return segment(ours, images)

    with torch.no_grad():
        exact, found = (network(normalize(images)).logits for network in (theirs, ours))
    seconds = pairs.interleave({"transformers": peer, "segformer": own}, options.rounds, device)
    return {
        "model": variant,
        "batch": batch,
        "precision": precision,
        **pairs.compared(seconds),
        "transformers peak MiB": pairs.peak_mib(peer, device),
        "segformer peak MiB": pairs.peak_mib(own, device),
        "logits max error, fp32": (found - exact).abs().max().item(),
        "agree": (peer() == own()).double().mean().item(),
    }


def size(variant: str) -> dict[str, Any]:
    """Parameters and multiply-adds, merged and literal, beside the paper's."""
    side = 640 if variant == "b5" else 512
    with torch.device("meta"):
        model = SegformerForSemanticSegmentation(SegformerConfig.from_variant(variant, num_labels=150)).eval()
        pixels = torch.empty(1, 3, side, side)
    row: dict[str, Any] = {
        "model": variant,
        "M parameters": model.num_parameters() / 1e6,
        "published": PUBLISHED[variant][0],
        f"GMAC {'at 512 (b5: 640)'}": macs(model, pixels),
    }
    model.decode_head.merged = False
    return row | {"GMAC, literal decode": macs(model, pixels), "published GMAC": PUBLISHED[variant][1]}


def macs(model: nn.Module, pixels: Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels)
    return counter.get_total_flops() / 2e9


if __name__ == "__main__":
    main()
