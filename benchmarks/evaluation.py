"""python benchmarks/evaluation.py --json evaluation.json

Confusion: what each scored image costs, the update of the confusion matrix, beside torchmetrics' Jaccard index on the
same label maps, by turns. Both count the same; a difference ends the command.
Sliding: a Cityscapes frame in windows of 1024 every 768 pixels. The base is mmsegmentation's way, literally, with
transformers' network of the same weights: the logits of each window upsampled, padded to the whole image and added up,
divided by the count, argmax. Exits with 1 if the exact label maps differ by more than rounding.
Memory: the peak for one large image of many classes.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pairs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from segformer.inference import Protocol, segment
from segformer.metrics import Scores, confusion_matrix
from segformer.pixels import normalize
from segformer.task import Confusion

AGREEMENT = 0.9999  # of the pixels, exact stitching in fp32
WINDOW, STRIDE, FRAME = 1024, 768, (1024, 2048)
SIZES = {"like ADE20K": (150, 512, 683), "like Cityscapes": (19, 1024, 2048)}  # classes, height, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--scale", type=float, default=1.0, help="of the images' sides, for a quick look")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    sections = {name: SECTIONS[name](options) for name in options.section}
    pairs.publish("Evaluation", sections, options)


def confusion(options: Any) -> list[dict[str, Any]]:
    return [_updates(name, *shape, options) for name, shape in SIZES.items()]


def _updates(name: str, classes: int, height: int, width: int, options: Any) -> dict[str, Any]:
    sides = round(height * options.scale), round(width * options.scale)
    prediction, label = label_maps(classes, *sides, options.device)
    ours = Confusion(classes).to(options.device)
    theirs = MulticlassJaccardIndex(classes, average="macro", ignore_index=255).to(options.device)
    wide = prediction.long(), label.long()  # it takes no bytes; widening them is not counted

    def count() -> None:
        ours.update(confusion_matrix(prediction, label, classes), len(label))

    runs = {"torchmetrics": lambda: theirs.update(*wide), "segformer": count}
    seconds = pairs.interleave(runs, options.rounds, options.device)
    counts = Scores.from_confusion(ours.compute()[0])
    if not torch.equal(ours.compute()[0].cpu(), theirs.confmat.cpu()):
        raise SystemExit(f"{name}: the counts differ")
    return {
        "label maps": name,
        "size": f"{sides[0]} x {sides[1]}",
        "classes": classes,
        "mIoU": counts.miou,
        **{f"{peer} ms": 1e3 * statistics.median(times) for peer, times in seconds.items()},
        "ratio": pairs.ratio(seconds["torchmetrics"], seconds["segformer"]),
    }


def label_maps(classes: int, height: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """(1, height, width) uint8: regions of some classes, a few pixels ignored, nine of ten pixels predicted right."""
    rng = np.random.default_rng(0)
    coarse = rng.choice(classes, (height // 64 + 1, width // 64 + 1)).astype(np.uint8)
    label = coarse.repeat(64, 0).repeat(64, 1)[:height, :width].copy()
    wrong = rng.random(label.shape) < 0.1
    prediction = np.where(wrong, rng.integers(0, classes, label.shape), label).astype(np.uint8)
    label[rng.random(label.shape) < 0.05] = 255
    return torch.from_numpy(prediction)[None].to(device), torch.from_numpy(label)[None].to(device)


def sliding(options: Any) -> list[dict[str, Any]]:
    """Each way of ours against the literal one, all of them in every round."""
    theirs, exact = pairs.networks("b0", 19, options.device)
    half = pairs.networks("b0", 19, options.device)[1].bfloat16()
    window, stride = (32 * max(2, round(side * options.scale / 32)) for side in (WINDOW, STRIDE))
    sides = [max(window, 4 * round(side * options.scale / 4)) for side in FRAME]
    images = F.interpolate(pairs.images(1, max(sides), options.device)[0], sides)
    settings = {"window": window, "stride": stride}
    quarter = Protocol(**settings, stitch="quarter")
    ways: dict[str, Callable[[], Tensor]] = {
        "mmsegmentation's, transformers": lambda: literal(theirs, images, window, stride),
        "exact": lambda: segment(exact, images, Protocol(**settings)),
        "quarter": lambda: segment(exact, images, quarter),
        "exact, bf16 weights": lambda: segment(half, images, Protocol(**settings)),
        "quarter, bf16 weights": lambda: segment(half, images, quarter),
    }
    base, *others = pairs.interleave(ways, options.rounds, options.device).items()
    expected = ways[base[0]]()
    rows = [
        {
            "stitching": name,
            "size": f"{sides[0]} x {sides[1]}",
            f"{base[0]} ms": 1e3 * statistics.median(base[1]),
            "segformer ms": 1e3 * statistics.median(seconds),
            "ratio": pairs.ratio(base[1], seconds),
            "agree": (ways[name]() == expected).double().mean().item(),
            "base peak MiB": pairs.peak_mib(ways[base[0]], options.device),
            "segformer peak MiB": pairs.peak_mib(ways[name], options.device),
        }
        for name, seconds in others
    ]
    if rows[0]["agree"] < AGREEMENT:
        raise SystemExit(f"label maps differ: {rows[0]}")
    return rows


@torch.no_grad()
def literal(network: nn.Module, images: Tensor, window: int, stride: int) -> Tensor:
    """(1, 3, H, W) uint8 -> (1, H, W): mmsegmentation's slide_inference, restated."""
    height, width = images.shape[-2:]
    pixels, total = normalize(images), 0
    count = pixels.new_zeros(1, 1, height, width)
    for row in range(max(height - window + stride - 1, 0) // stride + 1):
        for column in range(max(width - window + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + window, height), min(column * stride + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            crop = pixels[..., top:bottom, left:right]
            logits = F.interpolate(network(crop).logits, crop.shape[-2:], mode="bilinear", align_corners=False)
            total = total + F.pad(logits, (left, width - right, top, height - bottom))
            count[..., top:bottom, left:right] += 1
    return (total / count).argmax(dim=1)


def memory(options: Any) -> list[dict[str, Any]]:
    """Above what the network and the image take; beside it what one float map of all classes at that size would."""
    classes, height, width = 150, round(4000 * options.scale), round(6000 * options.scale)
    _, ours = pairs.networks("b0", classes, options.device)
    images = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, device=options.device)
    window, stride = min(512, height), min(384, height)
    rows = []
    for stitch in ("exact", "quarter"):
        protocol = Protocol(window=window, stride=stride, stitch=stitch, align=4)
        alone = pairs.peak_mib(lambda: segment(ours, images[..., :window, :window]), options.device)
        rows.append(
            {
                "image": f"{width} x {height}",
                "classes": classes,
                "stitching": stitch,
                "peak MiB": pairs.peak_mib(lambda way=protocol: segment(ours, images, way), options.device),
                "of one window alone MiB": alone,
                "one map of logits MiB": 4 * classes * height * width / pairs.MIB,
            }
        )
    return rows


SECTIONS: dict[str, Callable[[Any], list[dict[str, Any]]]] = {
    "confusion": confusion,
    "sliding": sliding,
    "memory": memory,
}


if __name__ == "__main__":
    main()
