"""report.json and a few pictures -> report.html: one file that works offline and asks nobody for anything.

Its size does not grow with the dataset: at most 255 rows of classes, 20 x 20 cells and 12 images, each as four pictures
of at most 640 pixels. Photographs make 1 to 2 MB, pure noise would make 20.
"""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from segformer.files import write_atomically
from segformer.labels import IGNORE, Classes

TEMPLATES = Path(__file__).parent / "templates"
SIDE = 640  # pixels of the longer side of a picture
SHOWN = 4  # images of each rank
LEGEND = 6  # classes named below an image
CELLS = 20  # rows and columns of the confusion matrix
PAIRS = 15
RANKS = ("worst", "median", "best")
SCORES = {
    "macc": "mAcc",
    "aacc": "aAcc",
    "fwiou": "fwIoU",
    "mdice": "mDice",
    "mprecision": "mPrecision",
    "boundary_miou": "boundary mIoU",
}
SHARES = {
    "acc": "Acc",
    "precision": "Precision",
    "dice": "Dice (F1)",
    "boundary_iou": "Boundary IoU",
    "iiou": "iIoU",
}
COUNTS = {
    "pixels": "Pixels",
    "predicted_pixels": "Predicted px",
    "images": "Images",
    "predicted_images": "Predicted in",
}
FACTS = {
    "data": "Data",
    "checkpoint": "Checkpoint",
    "predictions": "Label maps",
    "weights_sha256": "SHA-256 of the weights",
    "precision": "Precision",
    "duplicates": "Images scored twice",
    "per_image": "Scores of each image",
}
# of the picture of errors: right (seen through), wrong, not labelled
ERRORS = np.array([[0, 0, 0], [230, 0, 110], [120, 120, 120]], np.uint8)


class Example(TypedDict):
    """An image of the gallery. image: of any size and mode. label, prediction: (H, W) train ids up to 255 = ignore."""

    name: str
    miou: float | None
    rank: Literal["worst", "median", "best"]
    image: Image.Image
    label: np.ndarray
    prediction: np.ndarray


def write_page(path: Path, report: Mapping[str, Any], gallery: Sequence[Example], classes: Classes) -> None:
    """Writes the report as one HTML file. report: what report.json holds; what it lacks or has as null is left out.

    Of each rank of the gallery the first four are shown. Text of any origin is shown as text.
    """
    instances = (report.get("cityscapes") or {}).get("per_class") or {}
    rows = [{**row, "iiou": instances.get(row["name"])} for row in report["per_class"]]
    values = {
        "report": report,
        "rows": rows,
        "scores": _present(SCORES, [report]),
        "shares": _present(SHARES, rows),
        "counts": _present(COUNTS, rows),
        "intervals": any(row.get("interval") for row in rows),
        "colors": classes.colors.tolist(),
        "matrix": _matrix(report, classes),
        "pairs": _pairs(report, classes),
        "gallery": {rank: [_shown(one, classes) for one in _ranked(gallery, rank)] for rank in RANKS},
        "error_colors": ERRORS.tolist(),
        "facts": _facts(report),
    }
    page = render("report.html", values)
    write_atomically(path, lambda file: file.write(page))


def render(template: str, values: Mapping[str, Any]) -> bytes:
    """A page of `templates`, escaped; its policy allows the one script of ours, by hash, and nothing from elsewhere."""
    pages = Environment(
        autoescape=True, loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True
    )
    pages.filters |= {"percent": percent, "points": points}
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = pages.get_template(template).render(values, script=Markup(script), digest=digest)
    return html.encode("utf-8", "replace")  # names of files may hold bytes that are no text


def percent(value: float | None, digits: int = 2) -> str:
    """A share as percent without its sign; a dash for what is absent."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    return "–" if value is None else f"{round(100 * value, 2) + 0.0:+.2f}".replace("-", "−")


def _present(names: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {key: name for key, name in names.items() if any(row.get(key) is not None for row in rows)}


def _confusion(report: Mapping[str, Any], classes: Classes) -> np.ndarray:
    """(K, K + 1) int64 pixels, row = label, last column = predicted as no class; zeros where there are no cells."""
    matrix = np.zeros((len(classes), len(classes) + 1), np.int64)
    for label, prediction, pixels in report.get("confusion") or []:
        matrix[label, prediction] = pixels
    return matrix


def _matrix(report: Mapping[str, Any], classes: Classes) -> dict[str, Any]:
    """Rows and columns in order of lost pixels; of many classes the first. rest: predicted as none of these."""
    counts = _confusion(report, classes)
    labelled = counts.sum(axis=1)
    lost = labelled - counts.diagonal()
    present = np.flatnonzero(labelled + counts.sum(axis=0)[:-1])
    order = present[np.argsort(-lost[present], kind="stable")][:CELLS]
    rows = [
        {
            "label": int(row),
            "lost": int(lost[row]),
            "cells": [_cell(counts, row, column) for column in order],
            "rest": float(1 - counts[row, order].sum() / labelled[row]),
        }
        for row in order[labelled[order] > 0]
    ]
    return {"rows": rows, "columns": order.tolist(), "left_out": len(present) - len(order)}


def _cell(counts: np.ndarray, row: int, column: int) -> dict[str, Any]:
    """depth: of the cell's colour, 0..1; errors are drawn deeper than they are, or none would be seen."""
    share = float(counts[row, column] / counts[row].sum())
    hit = bool(row == column)
    depth = share if hit else share**0.5
    return {"column": int(column), "pixels": int(counts[row, column]), "share": share, "hit": hit, "depth": depth}


def _pairs(report: Mapping[str, Any], classes: Classes) -> list[dict[str, Any]]:
    """The commonest errors: label, prediction, their pixels, and these as shares of the label and of all errors."""
    counts = _confusion(report, classes)
    labelled = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    commonest = np.argsort(-counts, axis=None, kind="stable")[:PAIRS]
    return [
        {
            "label": int(label),
            "prediction": int(prediction),
            "pixels": int(counts[label, prediction]),
            "of_label": float(counts[label, prediction] / labelled[label]),
            "of_errors": float(counts[label, prediction] / counts.sum()),
        }
        for label, prediction in zip(*np.unravel_index(commonest, counts.shape), strict=True)
        if counts[label, prediction]
    ]


def _ranked(gallery: Sequence[Example], rank: str) -> list[Example]:
    return [example for example in gallery if example["rank"] == rank][:SHOWN]


def _shown(example: Example, classes: Classes) -> dict[str, Any]:
    """An image of the gallery with its pictures as text."""
    label, prediction = example["label"], example["prediction"]
    height, width = label.shape
    factor = min(1.0, SIDE / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    wrong = np.where(label == IGNORE, 2, label != prediction).astype(np.uint8)
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(classes)] = classes.colors
    return {
        "name": example["name"],
        "miou": example["miou"],
        "size": size,
        "image": _photo(example["image"], size),
        "layers": {
            "label": _map(label, colors, IGNORE, size),
            "prediction": _map(prediction, colors, IGNORE, size),
            "error": _map(wrong, ERRORS, 0, size),
        },
        "legend": _legend(label, prediction, classes),
    }


def _photo(image: Image.Image, size: tuple[int, int]) -> str:
    small = image.convert("RGB").resize(
        size, Image.Resampling.BOX if image.width > size[0] else Image.Resampling.BICUBIC
    )
    return _embedded(small, "JPEG", {"quality": 82, "optimize": True})


def _map(labels: np.ndarray, colors: np.ndarray, clear: int, size: tuple[int, int]) -> str:
    """A PNG with a palette, of which one index is seen through."""
    small = Image.fromarray(labels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    small.putpalette(colors.tobytes())
    return _embedded(small, "PNG", {"optimize": True, "transparency": clear})


def _embedded(image: Image.Image, kind: str, options: Mapping[str, Any]) -> str:
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _legend(label: np.ndarray, prediction: np.ndarray, classes: Classes) -> list[int]:
    """The commonest classes of label and prediction."""
    both = np.concatenate([label.ravel(), prediction.ravel()])
    counts = np.bincount(both, minlength=256)[: len(classes)]
    return [int(index) for index in np.argsort(-counts, kind="stable")[:LEGEND] if counts[index]]


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    images, whole, seconds = report["images"], report.get("split_images"), report.get("seconds")
    facts = [("Images", f"{images:,}" if whole is None else f"{images:,} of {whole:,}")]
    facts += [(name, str(report[key])) for key, name in FACTS.items() if report.get(key) is not None]
    if seconds:
        facts.append(("Time", f"{seconds:,.1f} s, {images / seconds:.2f} images/s"))
    facts.append(("Versions", ", ".join(f"{name} {number}" for name, number in report.get("versions", {}).items())))
    return [(name, text) for name, text in facts if text]
