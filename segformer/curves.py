"""The picture of a run: loss and score over optimiser steps."""

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from segformer.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOSS, SMOOTHED = "#4878a8", "#1f3b57"
SCORE = "#b3541e"
FEW = 60  # points that are read one by one; more of them are noise around a mean


def draw_curves(metrics: Path, path: Path, score: str = "val/miou") -> None:
    """Draws `train/loss` and `score` of a metrics.csv as a PNG, written atomically.

    A row counts at the optimiser steps that were done when it was logged; of a step that is there twice the last row
    does. A file without either column gives a picture that says so.

    Raises:
        ImportError: matplotlib is missing. OSError: a file cannot be read or written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    loss, scores = read_columns(metrics, ("train/loss", score))
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(f"{path.parent.parent.name} / {path.parent.name}", fontsize=11)
    _draw_loss(upper, *loss)
    _draw_score(lower, *scores, score)
    for axes, steps in ((upper, loss[0]), (lower, scores[0])):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if not len(steps):
            axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", va="center", color="0.5")
    lower.set_xlabel("optimiser step")
    lower.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    lower.xaxis.set_major_formatter(EngFormatter(sep=""))
    lower.set_xlim(0, max([1, *loss[0][-1:], *scores[0][-1:]]) * 1.02)
    write_atomically(path, FigureCanvasAgg(figure).print_png)


def read_columns(metrics: Path, names: tuple[str, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(steps, values) of each column, steps ascending; cells that are empty or no finite number are left out."""
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    with metrics.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = row.get("step") or ""
            for name in names if step.isdigit() else ():
                value = _number(row.get(name))
                if value is not None:
                    found[name][int(step) + 1] = value  # the first step is logged as 0
    columns = []
    for values in found.values():
        steps = sorted(values)
        columns.append((np.array(steps, np.int64), np.array([values[step] for step in steps], np.float64)))
    return columns


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a fiftieth of the values around each, over those that are there at the ends."""
    half, place = len(values) // 100, np.arange(len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first, last = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _draw_loss(axes: "Axes", steps: np.ndarray, values: np.ndarray) -> None:
    axes.set_ylabel("training loss")
    if not len(steps):
        return
    if len(steps) <= FEW:
        axes.plot(steps, values, color=LOSS, marker="o", markersize=3.5, linewidth=1.4)
    else:
        axes.plot(steps, values, color=LOSS, alpha=0.35, linewidth=0.7, label="logged")
        axes.plot(steps, smooth(values), color=SMOOTHED, linewidth=1.6, label="running mean")
        axes.legend(frameon=False, loc="upper right", fontsize=9)
    top = float(np.quantile(values, 0.995))  # a single spike would press the rest to the ground
    axes.set_ylim(min(0.0, float(values.min()) * 1.05), top * 1.08 if top > 0 else None)


def _draw_score(axes: "Axes", steps: np.ndarray, values: np.ndarray, name: str) -> None:
    axes.set_ylabel(
        {"val/miou": "validation mIoU", "val/top1": "validation top-1"}.get(name, name.replace("val/", "validation "))
    )
    if not len(steps):
        return
    axes.plot(steps, values, color=SCORE, marker="o" if len(steps) <= FEW else "", markersize=3.5, linewidth=1.4)
    best = int(values.argmax())
    told = f"best {values[best]:.4f} at step {steps[best]:,}"
    axes.plot(steps[best], values[best], "*", markersize=13, color=SCORE, markeredgecolor="white", label=told)
    axes.legend(frameon=False, loc="lower right", fontsize=9, handletextpad=0.2)
    axes.set_ylim(0, min(1.0, float(values.max()) * 1.15 + 0.01))
