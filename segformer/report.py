"""Scores -> report.json (a contract) and report.md."""

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from segformer.files import write_atomically
from segformer.inference import Protocol
from segformer.metrics import Scores

_HEADLINE = {
    "miou": "mIoU",
    "macc": "mAcc",
    "aacc": "aAcc",
    "fwiou": "fwIoU",
    "mdice": "mDice",
    "mprecision": "mPrecision",
}


def write_report(
    folder: Path, scores: Scores, names: tuple[str, ...], images: int, protocol: Protocol, facts: Mapping[str, Any]
) -> Path:
    """Writes `report.json` and `report.md`, shows the latter and the json's path.

    Scores are fractions 0..1; a class that occurs nowhere has null scores and is left out of the means. facts: further
    plain values for the top level of the json (checkpoint, data, precision, ...).
    """
    report = {
        **{key: _number(getattr(scores, key)) for key in _HEADLINE},
        "per_class": [
            {
                "name": name,
                "iou": _number(scores.iou[index]),
                "acc": _number(scores.acc[index]),
                "precision": _number(scores.precision[index]),
                "dice": _number(scores.dice[index]),
                "pixels": int(scores.pixels[index]),
                "predicted_pixels": int(scores.predicted[index]),
            }
            for index, name in enumerate(names)
        ],
        "images": images,
        "protocol": asdict(protocol),
        **facts,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "segformer": _own_version(),
        },
    }
    path = folder / "report.json"
    page, text = _markdown(report), json.dumps(report, indent=2, allow_nan=False) + "\n"
    write_atomically(path.with_suffix(".md"), lambda file: file.write(page.encode()))
    write_atomically(path, lambda file: file.write(text.encode()))
    print(page, path, sep="\n")
    return path


def describe(protocol: Protocol) -> str:
    """One line: how the label maps were made."""
    parts = [
        "images at their own size"
        if protocol.size is None
        else f"images kept within {protocol.size[0]} x {protocol.size[1]}"
    ]
    if protocol.align > 1:
        parts.append(f"sides aligned to {protocol.align}")
    if protocol.window is None:
        parts.append("whole image")
    else:
        assert protocol.stride is not None
        parts.append(f"windows of {_sides(protocol.window)} every {_sides(protocol.stride)}, logits averaged")
    return ", ".join([*parts, "scored at the label's own size"])


def _markdown(report: Mapping[str, Any]) -> str:
    rows = [
        f"| {_cell(row['name'])} | {' | '.join(_percent(row[key]) for key in ('iou', 'acc', 'precision', 'dice'))} "
        f"| {row['pixels']:,} | {row['predicted_pixels']:,} |"
        for row in report["per_class"]
    ]
    settings = report["protocol"]
    lines = [
        f"# mIoU {_percent(report['miou'])} on {report.get('data', 'the data')}",
        "",
        " | ".join(f"{label} **{_percent(report[key])}**" for key, label in _HEADLINE.items()),
        "",
        f"{_counted(report)}; {describe(Protocol(**settings))}; precision {report.get('precision', 'unknown')}.",
        f"Checkpoint: `{report.get('checkpoint', 'unknown')}`.",
        "",
        "| class | IoU | Acc | Precision | Dice | pixels | predicted |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *rows,
        "",
        "Percent; pixels summed over all images, then divided. A class that occurs nowhere (-) is not in the means; "
        "one that is labelled but never predicted counts as 0.",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in report["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


def _counted(report: Mapping[str, Any]) -> str:
    images, whole = report["images"], report.get("split_images")
    if whole not in (None, images):  # a stream may not know
        return f"only {images} of {whole} images"
    return f"{images} image{'s' * (images != 1)}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


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
