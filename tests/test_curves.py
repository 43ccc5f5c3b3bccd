import csv
import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segformer.curves import draw_curves, read_columns, smooth


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/loss", "val/miou"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_columns_count_done_steps_and_leave_out_what_is_no_number(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "train/loss": "2.5"},
        {"step": 4, "train/loss": "nan", "val/miou": "0.25"},
        {"step": 2, "train/loss": "2.0"},
        {"step": 2, "train/loss": "1.5"},  # of the same step, later in the file
        {"step": "", "train/loss": "9"},
        {"step": 6, "train/loss": "inf", "val/miou": "broken"},
    ]
    loss, score = read_columns(write(tmp_path / "metrics.csv", rows), ("train/loss", "val/miou"))
    assert (loss[0].tolist(), loss[1].tolist()) == ([1, 3], [2.5, 1.5])
    assert (score[0].tolist(), score[1].tolist()) == ([5], [0.25])


def test_smoothing_is_the_mean_of_the_values_around() -> None:
    values = np.random.default_rng(0).random(350)
    expected = [values[max(0, i - 3) : i + 4].mean() for i in range(350)]
    np.testing.assert_allclose(smooth(values), expected, rtol=1e-12)
    np.testing.assert_allclose(smooth(values[:50]), values[:50], rtol=1e-12)


@pytest.mark.parametrize("points", [0, 1, 10, 3000])
def test_a_picture_of_any_number_of_points_shows_both_curves(tmp_path: Path, points: int) -> None:
    rows = [{"step": i * 50, "train/loss": 3 / (i + 1)} for i in range(points)]
    rows += [{"step": i * 50, "val/miou": 1 - 1 / (i + 2)} for i in range(9, points, 100)]
    run = tmp_path / "b0_toy" / "now"
    draw_curves(write(run / "metrics.csv", rows), run / "curves.png")
    assert sorted(path.name for path in run.iterdir()) == ["curves.png", "metrics.csv"]
    with Image.open(run / "curves.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    upper, lower = np.split(pixels, 2)
    blue, orange = (upper[..., 2] - upper[..., 0]) > 40, (lower[..., 0] - lower[..., 2]) > 80
    assert min(pixels.shape[:2]) >= 600
    assert blue.any() == (points > 0) and orange.any() == (points >= 10)


def test_a_curve_that_cannot_be_written_leaves_the_old_one_and_nothing_half_done(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.csv", [{"step": 0, "train/loss": 1}])
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(OSError, match=r"curves\.png"):
        draw_curves(metrics, tmp_path / "curves.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.csv"]


def test_drawing_again_and_again_keeps_no_figure(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.csv", [{"step": i, "train/loss": 1 / (i + 1)} for i in range(100)])
    draw_curves(metrics, tmp_path / "curves.png")
    tracemalloc.start()
    held = []
    for _ in range(3):
        draw_curves(metrics, tmp_path / "curves.png")
        gc.collect()  # a figure and its parts hold each other
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[2] - held[1] < 2**20
