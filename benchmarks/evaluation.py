"""python benchmarks/evaluation.py --json evaluation.json

Confusion: what each scored image costs, the update of the confusion matrix, beside torchmetrics' Jaccard index on the
same label maps, by turns. Both count the same; a difference ends the command.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pairs
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from segformer.metrics import Scores
from segformer.task import Confusion

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
    seconds = pairs.interleave(
        {"torchmetrics": lambda: theirs.update(*wide), "segformer": lambda: ours.update(prediction, label)},
        options.rounds,
        options.device,
    )
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


SECTIONS: dict[str, Callable[[Any], list[dict[str, Any]]]] = {"confusion": confusion}


if __name__ == "__main__":
    main()
