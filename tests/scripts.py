"""The two scripts as a user runs them, and what they leave behind."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from tests.conftest import ROOT

train, evaluate = ROOT / "train.py", ROOT / "evaluate.py"
SCENES = ["data.train.scenes=12", "data.val.scenes=5"]
SHORT = [
    *("data.crop_size=64", "data.batch_size=2", "data.workers=0", "trainer.max_steps=8"),
    *("trainer.val_check_interval=3", "trainer.checkpoint_interval=2", "trainer.log_every_n_steps=1"),
]
SMALL = [*SCENES, *SHORT]
FILES = {  # of a run
    ".lock",
    *("best.ckpt", "last.ckpt", "last-1.ckpt", "config.yaml", "run.json", "metrics.csv", "curves.png", "previews"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`run(script, *arguments)` -> exit code, stdout, stderr, as the command line would give."""

    def script(path: Path, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        GlobalHydra.instance().clear()
        code = 0
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return script


def told(result: tuple[int, str, str]) -> str:
    """The one sentence of a refused command."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("warning: ")]
    assert code == 1 and len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def only_run(here: Path) -> Path:
    (folder,) = here.glob("runs/*/*")
    return folder


def rows(folder: Path, column: str) -> dict[int, float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row[column]}


def report_of(result: tuple[int, str, str]) -> dict:
    code, out, err = result
    assert code == 0, err
    return json.loads(Path(out.strip().splitlines()[-1]).read_text())
