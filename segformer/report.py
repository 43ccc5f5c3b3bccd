"""Counts -> report.json (a contract), images.json beside it, report.md, and report.html."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segformer import bootstrap
from segformer.cityscapes import category_iou, mean_score
from segformer.config import VARIANTS, SegformerConfig
from segformer.counts import Counts
from segformer.errors import printable
from segformer.files import write_atomically
from segformer.inference import Protocol
from segformer.labels import Classes
from segformer.metrics import IMAGES, Scores, iou_of, mean_of
from segformer.page import SCORES, Example, write_page

VERSION = 1  # of report.json
_HEADLINE = {"miou": "mIoU", **SCORES}


def build_report(
    counts: Counts, classes: Classes, protocol: Protocol | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What report.json holds; scores are fractions 0..1, null where a class (or every class) is absent.

    protocol: None = the label maps were read from files. facts: further plain values for the top level (checkpoint,
    data, precision, ...).
    """
    confusion, parts = counts.tally.confusion(), counts.tally.parts()
    scores, intervals = Scores.from_confusion(confusion), bootstrap.intervals(parts)
    contours = iou_of(*counts.boundary)
    return {
        "version": VERSION,
        **{key: _number(getattr(scores, key)) for key in _HEADLINE if hasattr(scores, key)},
        "boundary_miou": _number(float(mean_of(contours))),
        "intervals": {
            "level": intervals.level,
            "resamples": intervals.resamples,
            "miou": [*map(_number, intervals.miou)],
        },
        "per_class": [
            {
                "name": name,
                "color": classes.colors[index].tolist(),
                "iou": _number(scores.iou[index]),
                "interval": _range(intervals.iou[index]),
                "acc": _number(scores.acc[index]),
                "precision": _number(scores.precision[index]),
                "dice": _number(scores.dice[index]),
                "boundary_iou": _number(contours[index]),
                "pixels": int(scores.pixels[index]),
                "predicted_pixels": int(scores.predicted[index]),
                "images": int(np.count_nonzero(parts[1][:, index])),
                "predicted_images": int(np.count_nonzero(parts[2][:, index])),
            }
            for index, name in enumerate(classes.names)
        ],
        "confusion": [[*map(int, cell), int(confusion[tuple(cell)])] for cell in np.argwhere(confusion)],
        "cityscapes": _cityscapes(counts, classes, confusion),
        "images": len(counts.tally),
        "duplicates": 0,  # an image that comes twice is an error
        "protocol": None if protocol is None else asdict(protocol),
        "protocol_line": "label maps read from files" if protocol is None else describe(protocol),
        **facts,
        "per_image": IMAGES,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "segformer": _own_version(),
        },
    }


def write_report(
    folder: Path, report: Mapping[str, Any], counts: Counts, gallery: Sequence[Example], classes: Classes
) -> Path:
    """Writes `report.json`, `report.md`, `report.html` and `images.json`, shows the second; returns the first."""
    path = folder / "report.json"
    text, images = printable(_markdown(report), lines=True), json.dumps(counts.tally.to_json(), separators=(",", ":"))
    values = json.dumps(report, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / IMAGES, lambda file: file.write(images.encode()))
    write_atomically(path.with_suffix(".md"), lambda file: file.write(text.encode()))
    write_page(path.with_suffix(".html"), report, gallery, classes)
    write_atomically(path, lambda file: file.write(values.encode()))
    print(text, path, sep="\n")
    return path


def _cityscapes(counts: Counts, classes: Classes, confusion: np.ndarray) -> dict[str, Any] | None:
    """The scores of Cityscapes' own script beside class IoU, where the classes have categories."""
    if not classes.categories:
        return None
    names = [classes.categories[name] for name in classes.names]
    iou, iiou, class_iiou = category_iou(confusion, names), {}, {}
    if counts.instances is not None and counts.instances.shares.any():
        iiou, class_iiou = counts.instances.category_iiou(confusion), counts.instances.class_iiou(confusion)
    return {
        "category_iou": _number(mean_score(iou)),
        "iiou": _number(mean_score(class_iiou)),
        "category_iiou": _number(mean_score(iiou)),
        "per_category": {
            name: {"iou": _number(value), "iiou": _number(iiou.get(name, math.nan))} for name, value in iou.items()
        },
        "per_class": {name: _number(value) for name, value in class_iiou.items()},
    }


def describe(protocol: Protocol) -> str:
    """One line: how the label maps were made."""
    if protocol.size is None:
        size = "images at their own size"
    elif isinstance(protocol.size, int):
        size = f"short side {protocol.size}"
    else:
        size = f"images kept within {_sides(protocol.size)}"
    parts = [size]
    if protocol.align > 1:
        parts.append(f"sides aligned to {protocol.align}")
    if protocol.window is None:
        parts.append("whole image")
    else:
        assert protocol.stride is not None
        at = " at a quarter of the resolution" if protocol.stitch == "quarter" else ""
        parts.append(f"windows of {_sides(protocol.window)} every {_sides(protocol.stride)}, logits averaged{at}")
    if len(protocol.scales) > 1 or protocol.scales[0] != 1 or protocol.flip:
        flip = " and their mirror images" if protocol.flip else ""
        parts.append(f"probabilities averaged over scales {', '.join(f'{scale:g}' for scale in protocol.scales)}{flip}")
    if protocol.resize_logits == "twice":
        parts.append("logits resized to the network's input and then to the image")
    return ", ".join([*parts, "scored at the label's own size"])


def published(
    figures: Mapping[str, Mapping[str, float]], config: SegformerConfig, protocol: Protocol, usual: Protocol
) -> Any:
    """{"miou", "source"}: what the paper has for this network, one scale or several; None where it has nothing.

    figures: `data.published`. Only a variant of the paper is compared with it, by its depths and widths, and only by
    the dataset's `usual` protocol, to which several scales with flip may be added.
    """
    if protocol.flip != (len(protocol.scales) > 1) or replace(protocol, scales=usual.scales, flip=usual.flip) != usual:
        return None
    variant = next((name for name, row in VARIANTS.items() if all(getattr(config, key) == row[key] for key in row)), "")
    several = len(protocol.scales) > 1
    miou = (figures.get("multi_scale" if several else "single_scale") or {}).get(variant)
    if miou is None:
        return None
    how = "multi-scale with flip" if several else "single scale"
    return {"miou": miou / 100, "source": f"SegFormer paper (arXiv 2105.15203), {variant.upper()}, {how}"}


def _markdown(report: Mapping[str, Any]) -> str:
    keys = ("iou", "acc", "precision", "dice", "boundary_iou")
    rows = [
        f"| {_cell(row['name'])} | {' | '.join(_percent(row[key]) for key in keys)} "
        f"| {_interval(row['interval'])} | {row['pixels']:,} | {row['predicted_pixels']:,} | {row['images']:,} |"
        for row in report["per_class"]
    ]
    interval, told = report["intervals"], report.get("published")
    lines = [
        f"# mIoU {_percent(report['miou'])} on {report.get('data', 'the data')}",
        "",
        f"{100 * interval['level']:g} % interval {_interval(interval['miou'])}, a bootstrap over images."
        + (f" Published: {_percent(told['miou'])} ({told['source']})." if told else ""),
        "",
        " | ".join(f"{label} **{_percent(report[key])}**" for key, label in _HEADLINE.items()),
        "",
        *_official(report),
        f"{_counted(report)}; {report['protocol_line']}"
        + (f"; precision {report['precision']}." if report.get("precision") else "."),
        f"Scored: `{report.get('checkpoint') or report.get('predictions') or 'unknown'}`.",
        "",
        "| class | IoU | Acc | Precision | Dice | boundary IoU | interval of IoU | pixels | predicted | images |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *rows,
        "",
        "Percent; pixels summed over all images, then divided. A class that occurs nowhere (-) is not in the means; "
        "one that is labelled but never predicted counts as 0. Dice is F1, Acc is recall.",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in report["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


def _official(report: Mapping[str, Any]) -> list[str]:
    scores = report.get("cityscapes")
    if not scores:
        return []
    names = {"category_iou": "category IoU", "iiou": "iIoU", "category_iiou": "category iIoU"}
    shown = " | ".join(f"{label} **{_percent(scores[key])}**" for key, label in names.items())
    return [f"As Cityscapes' own script: {shown}", ""]


def _counted(report: Mapping[str, Any]) -> str:
    images, whole = report["images"], report.get("split_images")
    if whole not in (None, images):  # a stream may not know
        return f"only {images} of {whole} images"
    return f"{images} image{'s' * (images != 1)}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _range(ends: np.ndarray) -> list[float] | None:
    return None if np.isnan(ends).any() else [float(end) for end in ends]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _interval(ends: Sequence[float | None] | None) -> str:
    return "-" if ends is None or None in ends else " to ".join(map(_percent, ends))


def _own_version() -> str:
    try:
        return version("segformer")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "not installed"


def _cell(text: str) -> str:
    """Text inside a Markdown table: no bar ends the cell, no markup starts."""
    return "".join(f"\\{sign}" if sign in r"\`*_{}[]<>#|~" else sign for sign in " ".join(text.split()))


def _sides(pair: tuple[int, int]) -> str:
    return f"{pair[0]} x {pair[1]}"
