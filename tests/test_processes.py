"""Several processes: real ones, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # exact equality needs the same arithmetic in every process


def launched(out: Path, count: int, scenes: str, steps: int) -> dict:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *launcher, str(ROOT / "tests/processes.py"), str(out), scenes, str(steps)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | ONE_THREAD, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("processes")
    plan = {1: ("7,8,9", 50), 2: ("7,8,9", 50), 3: ("7,8,9", 0)}
    return {count: launched(folder / f"{count}.json", count, *work) for count, work in plan.items()}


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("images", [7, 8, 9])
def test_each_validation_image_is_scored_once_and_the_score_is_that_of_one_process(found, processes, images) -> None:
    alone, shared_out = found[1]["scores"][str(images)], found[processes]["scores"][str(images)]
    assert shared_out == alone  # bit for bit
    assert alone["images"] == images and 0 < alone["miou"] < 1


def test_two_processes_train_like_one_with_the_same_total_batch(found) -> None:
    assert len(found[1]["losses"]) == 50
    assert found[2]["losses"] == pytest.approx(found[1]["losses"], rel=1e-5)
