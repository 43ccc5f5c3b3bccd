"""The benchmarks run and count; what they time is for a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import trees
from tests.conftest import ROOT

SMALL = "--models b0 --batch 1 --precision fp32 --size 64 --classes 19 --rounds 1 --device cpu"


def figures(script: str, folder: Path) -> dict[str, Any]:
    target = folder / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script), *SMALL.split(), "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text())


def test_inference_is_compared_and_operations_are_counted(tmp_path) -> None:
    found = figures("inference.py", tmp_path)
    (row,), sizes = found["Times faster"], found["Size"]
    assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
    assert row["agree"] >= 0.9999 and row["logits max error, fp32"] < 2e-5
    assert sizes[-1]["M parameters"] == pytest.approx(84.708694)
    assert [row["GMAC, literal decode"] for row in sizes] == pytest.approx(
        [8.39, 15.88, 62.34, 78.96, 95.57, 183.14], abs=0.01
    )


def test_a_training_step_is_compared_and_the_loss_alone(tmp_path) -> None:
    found = figures("training_step.py", tmp_path)
    (step,), (loss,) = found["Step, times faster"], found["Loss alone, times faster"]
    assert step["segformer saved MiB"] < step["transformers saved MiB"]
    assert loss["gradient error, of the largest"] < 1e-5


def test_loading_is_compared_with_what_users_write_and_with_the_step_it_feeds(tmp_path) -> None:
    target = tmp_path / "figures.json"
    command = f"benchmarks/data.py --size 32 --files 2 --rounds 1 --json {target}"
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    rows = found["Files to samples, times faster"] + found["Augmentation alone, times faster"]
    assert [(row["files like"], row["of"], row["against"]) for row in rows] == [
        ("ADE20K", "segformer", "albumentations"),
        ("ADE20K", "segformer", "torchvision"),
        ("Cityscapes", "segformer", "albumentations"),
        ("Cityscapes", "segformer, cached", "albumentations"),
        ("ADE20K", "segformer", "step by step"),
        ("Cityscapes", "segformer", "step by step"),
    ]
    assert all(row["ratio"]["min"] > 0 for row in [*rows, *found["Two workers, and the training step they feed"]])


def test_a_training_loop_is_compared_with_transformers_and_with_a_bare_one(tmp_path) -> None:
    root, target = trees.camvid(tmp_path / "CamVid").root, tmp_path / "figures.json"
    command = f"benchmarks/training_loop.py --root {root} --steps 3 --seeds 4 --batch 2 --crop 64 64 --json {target}"
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    (row,), (summary,) = found["Networks"], found["Networks, over seeds"]
    assert row["difference"] == pytest.approx(row["segformer mIoU"] - row["transformers mIoU"])
    assert row["segformer saved MiB"] < row["transformers saved MiB"]
    assert row["share of the bytes"] == pytest.approx(row["segformer saved MiB"] / row["transformers saved MiB"])
    assert [summary[name] for name in ("seeds", "difference", "share of the time")] == [
        1,
        row["difference"],
        row["share of the time"],
    ]
    assert [line["data"] for line in found["Trainer"]] == ["toy", "camvid"]
    # the same network, batches and draws: both loops end at the same weights, bit for bit
    assert [line["largest difference of a weight"] for line in found["Trainer"]] == [0, 0]


def test_the_update_of_the_confusion_matrix_is_compared_and_counts_the_same(tmp_path) -> None:
    target = tmp_path / "figures.json"
    command = f"benchmarks/evaluation.py --scale 0.1 --rounds 1 --device cpu --json {target}"
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())["confusion"]
    assert [(row["classes"], row["size"]) for row in rows] == [(150, "51 x 68"), (19, "102 x 205")]
    assert all(0 < row["mIoU"] < 1 and row["ratio"]["min"] > 0 for row in rows)


def test_sliding_windows_are_compared_with_mmsegmentations_way_and_agree(tmp_path) -> None:
    pytest.importorskip("transformers", reason="the base of the comparison is transformers' network")
    target = tmp_path / "figures.json"
    command = f"benchmarks/evaluation.py --section sliding memory --scale 0.1 --rounds 1 --device cpu --json {target}"
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    exact, *others = found["sliding"]
    assert exact["stitching"] == "exact" and exact["agree"] > 0.9999 and exact["size"] == "104 x 204"
    assert [row["stitching"] for row in others] == ["quarter", "exact, bf16 weights", "quarter, bf16 weights"]
    # with random weights nearly all classes are equally likely, which 8 bits of a mantissa do not always decide
    assert others[0]["agree"] > 0.98 and all(row["agree"] > 0.5 and row["ratio"]["min"] > 0 for row in others)
    assert [row["stitching"] for row in found["memory"]] == ["exact", "quarter"]
