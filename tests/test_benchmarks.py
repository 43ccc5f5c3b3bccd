"""The benchmarks run and count; what they time is for a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
