"""The two scripts as a user runs them: train, evaluate, break, resume."""

import csv
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from tests.conftest import ROOT, save

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


def test_train_then_evaluate_gives_the_same_number(here, run) -> None:
    code, out, _ = run(train, *SMALL)
    assert code == 0
    folder = only_run(here)
    assert {path.name for path in folder.iterdir()} == FILES
    scores = rows(folder, "val/miou")
    assert list(scores) == [2, 5, 7]  # after 3, 6 and the last of 8 steps
    assert sorted(rows(folder, "train/loss")) == list(range(8))
    assert len(list((folder / "previews").iterdir())) == 3 * 4

    last_line = out.strip().splitlines()[-1]
    assert f"best val/miou {max(scores.values()):.4f}: " in last_line
    command = last_line.partition(": ")[2].split()
    assert Path(command[-2]).name == "evaluate.py"
    code, out, _ = run(evaluate, command[-1])
    assert code == 0
    path = here / out.strip().splitlines()[-1]
    report = json.loads(path.read_text())
    assert report["miou"] == pytest.approx(max(scores.values()), abs=1e-6)
    assert report["images"] == report["split_images"] == 5
    assert report["protocol"] == {"size": None, "align": 1, "window": None, "stride": None}
    assert {
        "miou",
        "macc",
        "aacc",
        "fwiou",
        "mdice",
        "per_class",
        "images",
        "protocol",
        "checkpoint",
        "versions",
    } <= report.keys()
    assert [row["name"] for row in report["per_class"]][:2] == ["sky", "building"]
    assert set(report["per_class"][0]) == {"name", "iou", "acc", "dice", "pixels"}
    assert path.with_suffix(".md").read_text().startswith("# mIoU ")
    assert path.parent.parent.name == "b0_toy" and path.parent.parent.parent.name == "reports"

    # from another folder, with another protocol
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    checkpoint = os.path.relpath(folder / "best.ckpt")
    code, out, _ = run(evaluate, f"checkpoint={checkpoint}")
    again = json.loads(Path(out.strip().splitlines()[-1]).read_text())
    assert again["miou"] == report["miou"] and again["per_class"] == report["per_class"]
    code, out, _ = run(evaluate, f"checkpoint={checkpoint}", "protocol.window=96", "protocol.stride=64")
    slid = json.loads(Path(out.strip().splitlines()[-1]).read_text())
    assert slid["protocol"]["window"] == [96, 96] and slid["images"] == 5
    assert "windows of 96 x 96 every 64 x 64" in Path(out.strip().splitlines()[-1]).with_suffix(".md").read_text()


def test_a_users_own_dataset_is_three_lines_of_yaml(here, run, potholes) -> None:
    (here / "my_configs" / "data").mkdir(parents=True)
    (here / "my_configs" / "data" / "potholes.yaml").write_text(
        f"defaults: [folder, _self_]\nroot: {potholes.name}\nclasses: [background, pothole]\n"
    )
    code, out, err = run(train, "-cd", "my_configs", "data=potholes", "model.pretrained=null", *SHORT)
    assert code == 0, err
    folder = only_run(here)
    assert folder.parent.name == "b0_potholes"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["data"]["root"] == str(potholes)  # made absolute
    code, out, _ = run(evaluate, f"checkpoint={folder / 'best.ckpt'}")  # no -cd: the checkpoint knows its data
    assert code == 0 and json.loads(Path(out.strip().splitlines()[-1]).read_text())["images"] == 3


NATIVE = ["model.pretrained=null", "data.crop_size=128", "data.batch_size=2", "data.workers=0", "trainer.max_steps=2"]


def report_of(result: tuple[int, str, str]) -> dict:
    code, out, err = result
    assert code == 0, err
    return json.loads(Path(out.strip().splitlines()[-1]).read_text())


def test_ade20k_trains_and_is_scored_by_its_protocol(here, run, ade20k) -> None:
    code, out, err = run(train, "data=ade20k", f"data.root={ade20k}", *NATIVE)
    assert code == 0, err
    assert "4 train images, 3 val images, 150 classes, batch of 2" in out
    report = report_of(run(evaluate, f"checkpoint={only_run(here) / 'best.ckpt'}"))
    assert report["protocol"] == {"size": [2048, 512], "align": 32, "window": None, "stride": None}
    assert report["images"] == 3 and len(report["per_class"]) == 150


def label_train_ids(root: Path, folder: str = "gtFine", suffix: str = "labelTrainIds") -> None:
    """What csCreateTrainIdLabelImgs adds, here in place of the labelIds."""
    table = np.full(256, 255, np.uint8)
    table[[7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]] = range(19)
    for path in root.glob("gtFine/*/*/*_labelIds.png"):
        name = path.name.replace("labelIds", suffix)
        save(root / folder / path.parent.relative_to(root / "gtFine") / name, table[np.array(Image.open(path))])
        path.unlink()


def test_cityscapes_scores_the_same_from_label_ids_and_label_train_ids(here, run, cityscapes) -> None:
    code, out, err = run(train, "data=cityscapes", f"data.root={cityscapes}", *NATIVE)
    assert code == 0, err
    assert "4 train images, 4 val images, 19 classes" in out
    checkpoint = f"checkpoint={only_run(here) / 'best.ckpt'}"
    first = report_of(run(evaluate, checkpoint))
    assert first["protocol"] == {"size": None, "align": 1, "window": [1024, 1024], "stride": [768, 768]}
    label_train_ids(cityscapes)
    second = report_of(run(evaluate, checkpoint))
    assert second["images"] == 4 and second["per_class"] == first["per_class"] and second["miou"] == first["miou"]
    assert sum(row["pixels"] for row in first["per_class"]) > 0


def test_train_ids_under_another_name_are_not_taken_for_label_ids(here, run, cityscapes) -> None:
    label_train_ids(cityscapes, suffix="ids")
    command = ["data=cityscapes", f"data.root={cityscapes}", *NATIVE]
    command += [f"data.{split}.masks=gtFine/{split}/*/*_gtFine_ids.png" for split in ("train", "val")]
    assert "looks like train ids (255, and no other value above 18)" in told(run(train, *command))
    code, _, err = run(train, *command, 'data.train_ids="*"', "hydra.run.dir=again")
    assert code == 0, err


def test_the_samples_of_both_datasets_train(here, run, shared) -> None:
    roots = {"ade20k": shared / "ade20k_sample" / "ADEChallengeData2016", "cityscapes": shared / "cityscapes_sample"}
    for data, root in roots.items():
        code, _, err = run(train, f"data={data}", f"data.root={root}", "data.train=${data.val}", *NATIVE)
        assert code == 0, err
        (checkpoint,) = here.glob(f"runs/b0_{data}/*/best.ckpt")
        report = report_of(run(evaluate, f"checkpoint={checkpoint}"))
        assert report["images"] == {"ade20k": 2, "cityscapes": 1}[data]


def test_real_photographs_train(here, run, shared) -> None:
    limits = ["trainer.limit_val_batches=2", "data.crop_size=96"]
    code, _, err = run(train, "data=camvid", f"data.root={shared / 'camvid'}", *SHORT, *limits)
    assert code == 0, err
    assert rows(only_run(here), "val/miou")


class Bomb(CSVLogger):
    """A logger that brings the run down when it hears of the step it was given."""

    def __init__(self, save_dir: str, step: int) -> None:
        super().__init__(save_dir, name="bomb")
        self.step = step

    def log_metrics(self, metrics, step=None) -> None:
        if step == self.step:
            raise ConnectionError("power cut")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize(("cut", "resumes_at"), [(4, 4), (5, 5), (6, 6)])
def test_a_broken_run_goes_on_as_if_unbroken(here, run, cut, resumes_at) -> None:
    code, _, _ = run(train, *SMALL)
    unbroken = only_run(here).rename(here / "unbroken")
    with pytest.raises(ConnectionError):
        run(train, *SMALL, "+logger.bomb._target_=tests.test_train_evaluate.Bomb", f"+logger.bomb.step={cut}")
    broken = only_run(here)
    assert torch.load(broken / "last.ckpt", weights_only=True)["global_step"] == resumes_at
    saved = yaml.safe_load((broken / "config.yaml").read_text())
    saved["logger"] = {}
    (broken / "config.yaml").write_text(yaml.safe_dump(saved))

    code, out, err = run(train, f"resume={broken}")
    assert code == 0, err
    assert only_run(here) == broken  # no second folder
    for column in ("train/loss", "lr/encoder", "val/miou"):
        assert rows(broken, column) == rows(unbroken, column), column
    expected = weights(unbroken / "last.ckpt")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(broken / "last.ckpt").items())
    assert (broken / "best.ckpt").is_file()
    best = [
        next(iter(torch.load(f / "last.ckpt", weights_only=True)["callbacks"].values())) for f in (broken, unbroken)
    ]
    assert best[0]["best_model_score"] == best[1]["best_model_score"]

    # a finished run has nothing left to do and loses nothing
    code, out, _ = run(train, "resume=auto")
    assert code == 0 and "best val/miou" in out and rows(broken, "val/miou") == rows(unbroken, "val/miou")


def test_a_run_goes_on_with_other_micro_batches(here, run) -> None:
    command = [*SMALL, "data.batch_size=4", "model.drop_path_rate=0", "optim.lr=1e-4"]
    code, _, err = run(train, *command, "data.micro_batch_size=1")
    assert code == 0, err
    unbroken = only_run(here).rename(here / "unbroken")
    bomb = ["+logger.bomb._target_=tests.test_train_evaluate.Bomb", "+logger.bomb.step=5"]
    with pytest.raises(ConnectionError):
        run(train, *command, "data.micro_batch_size=2", *bomb)
    broken = only_run(here)
    assert torch.load(broken / "last.ckpt", weights_only=True)["global_step"] == 5  # before the step to validation
    code, _, err = run(train, f"resume={broken}", "data.micro_batch_size=1", "logger={}")
    assert code == 0, err
    assert list(rows(broken, "val/miou")) == list(rows(unbroken, "val/miou")) == [2, 5, 7]
    assert rows(broken, "lr/encoder") == rows(unbroken, "lr/encoder") and list(rows(broken, "train/loss")) == list(
        range(8)
    )
    saved = torch.load(broken / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 8
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 32


def test_what_every_process_meets_is_told_once(here, run) -> None:
    several = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu"]
    (here / "mine").mkdir()
    (here / "mine/config.yaml").touch()
    command = [sys.executable, str(train), *SMALL, *several, "hydra.run.dir=mine"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, check=False)
    assert done.returncode == 1
    assert done.stderr.count("error") == 1 and "mine holds a run already" in done.stderr


def test_two_processes_write_one_run_and_score_as_one(here, run) -> None:
    several = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu"]
    options = {"capture_output": True, "text": True, "cwd": here, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    scenes = ["data.train.scenes=12", "data.val.scenes=7"]
    done = subprocess.run([sys.executable, str(train), *SHORT, *scenes, *several], check=False, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: ") == done.stdout.count("best val/miou") == 1
    assert "batch of 2 = 2 processes x 1\n" in done.stdout and "warn" not in done.stderr.lower()
    folder = only_run(here)
    assert {path.name for path in folder.iterdir()} == FILES
    command = [sys.executable, str(evaluate), f"checkpoint={folder / 'best.ckpt'}"]
    reports = []
    for more in (several, ["trainer.devices=1", "trainer.accelerator=cpu"]):
        done = subprocess.run([*command, *more], check=False, **options)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads((here / done.stdout.strip().splitlines()[-1]).read_text()))
    together, alone = reports
    assert together["images"] == alone["images"] == 7
    assert together["miou"] == alone["miou"] and together["per_class"] == alone["per_class"]
    assert max(rows(folder, "val/miou").values()) == pytest.approx(alone["miou"], abs=1e-6)


def test_a_moved_run_keeps_its_best_and_a_relative_root_resumes(here, run, potholes) -> None:
    command = [
        "data=folder",
        "data.root=potholes",
        "data.classes=[background,pothole]",
        "model.pretrained=null",
        *SHORT,
    ]
    with pytest.raises(ConnectionError):
        run(train, *command, "+logger.bomb._target_=tests.test_train_evaluate.Bomb", "+logger.bomb.step=6")
    moved = only_run(here).rename(here / "moved")
    before = torch.load(moved / "best.ckpt", weights_only=True)["callbacks"]
    score = next(state["best_model_score"] for state in before.values() if "best_model_score" in state)
    saved = yaml.safe_load((moved / "config.yaml").read_text())
    (moved / "config.yaml").write_text(yaml.safe_dump({**saved, "logger": {}}))
    code, out, err = run(train, *command, "resume=moved")
    assert code == 0, err
    assert float(out.partition("best val/miou ")[2][:6]) >= round(float(score), 4)
    assert "checkpoint=moved/best.ckpt" in out


def test_damaged_runs_are_told_before_anything_starts(here, run) -> None:
    run(train, *SMALL, "trainer.max_steps=2")
    folder = only_run(here)
    text = (folder / "config.yaml").read_text()
    for damage in (b"", b"\xff\xfe\x80", b"choices: 1\ndata: {a: 1}\ntrainer: {a: 1}", b"choices: {}\ndata: {}"):
        (folder / "config.yaml").write_bytes(damage)
        assert "config.yaml is damaged" in told(run(train, f"resume={folder}"))
    (folder / "config.yaml").write_text(text)
    assert "has no last.ckpt" in told(run(train, f"resume={folder / 'best.ckpt'}"))
    for name in ("last.ckpt", "last-1.ckpt"):
        (folder / name).write_bytes((folder / name).read_bytes()[:5000])
    assert "cannot read checkpoint" in told(run(train, f"resume={folder}"))


def test_a_folder_that_holds_a_run_is_not_written_over(here, run) -> None:
    run(train, *SMALL, "trainer.max_steps=2", "hydra.run.dir=mine")
    before = (here / "mine" / "best.ckpt").read_bytes()
    assert "holds a run already" in told(run(train, *SMALL, "trainer.max_steps=2", "hydra.run.dir=mine"))
    assert (here / "mine" / "best.ckpt").read_bytes() == before and rows(here / "mine", "val/miou")


def test_a_run_that_reached_no_checkpoint_is_not_offered_to_go_on(here, run) -> None:
    run(train, *SMALL, "trainer.max_steps=2", "hydra.run.dir=runs/b0_toy/older")
    (here / "runs/b0_toy/newer").mkdir()
    (here / "runs/b0_toy/newer/config.yaml").write_text("")
    sentence = told(run(train, *SMALL, "hydra.run.dir=runs/b0_toy/newer"))
    assert "newer holds a run already: give a new folder" in sentence and "resume=" not in sentence
    code, out, _ = run(train, *SMALL, "trainer.max_steps=2", "resume=auto")  # the newest that can
    assert code == 0 and f"goes on from {here / 'runs/b0_toy/older/last.ckpt'}" in out


def test_a_folder_of_ones_own_with_resume_auto_starts_anew_until_there_is_a_checkpoint(here, run) -> None:
    command = [*SMALL, "trainer.max_steps=2", "resume=auto", "hydra.run.dir=mine"]
    (here / "mine").mkdir()
    (here / "mine/config.yaml").touch()  # of a run that was killed at once
    code, out, err = run(train, *command)
    assert code == 0 and "all weights start fresh" in out, err
    code, out, err = run(train, *command)
    assert code == 0 and f"goes on from {here / 'mine/last.ckpt'}" in out, err


def test_a_run_of_an_older_version_or_without_its_best_goes_on(here, run) -> None:
    run(train, *SMALL, "trainer.max_steps=4", "trainer.max_time=00:00:00:01", "data.val.scenes=50")
    folder = only_run(here)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    del saved["task"], saved["trainer"]["keep_last"], saved["trainer"]["ema_decay"], saved["trainer"]["patience"]
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    (folder / "best.ckpt").unlink()
    code, out, err = run(train, f"resume={folder}", "trainer.max_time=null")
    assert code == 0, err
    assert (folder / "best.ckpt").is_file() == ("best val/miou" in out)


def test_a_folder_that_cannot_be_written_is_one_sentence(here, run) -> None:
    (here / "file").touch()  # no folder can be made in a file, whoever one is
    assert "cannot write file/run: not a directory; check the path" in told(
        run(train, *SMALL, "hydra.run.dir=file/run")
    )


def test_debug_takes_two_whole_steps_and_writes_no_checkpoint(here, run) -> None:
    code, _, err = run(train, *SMALL, "trainer=debug", "trainer.max_steps=8", "data.micro_batch_size=1")
    assert code == 0 and "step 2 of 2" in err, err
    assert not list(here.rglob("*.ckpt"))


def test_more_validation_images_can_be_decoded_when_a_run_goes_on(here, run) -> None:
    run(train, *SMALL, "trainer.max_steps=2")
    changes = ["data.max_pixels=400000000", "data.worker_timeout=60"]
    code, _, err = run(train, f"resume={only_run(here)}", *changes)
    assert code == 0, err
    saved = yaml.safe_load((only_run(here) / "config.yaml").read_text())
    assert (saved["data"]["max_pixels"], saved["data"]["worker_timeout"]) == (400_000_000, 60)


def test_half_weights_train_and_score(here, run) -> None:
    code, _, err = run(train, *SMALL, "trainer.max_steps=2", "trainer.precision=bf16-true")
    assert code == 0, err


def test_without_validation_the_last_step_is_kept(here, run) -> None:
    code, out, _ = run(train, *SMALL, "trainer.limit_val_batches=0")
    assert code == 0 and "nothing was scored" in out
    assert torch.load(only_run(here) / "last.ckpt", weights_only=True)["global_step"] == 8


def test_resuming_with_another_recipe_is_refused_by_name(here, run) -> None:
    run(train, *SMALL, "trainer.max_steps=2")
    folder = only_run(here)
    sentence = told(run(train, f"resume={folder}", "optim.lr=1"))
    assert "cannot change optim.lr from 0.006 to 1 when resuming" in sentence
    assert "cannot change data from toy to folder" in told(
        run(train, f"resume={folder}", "data=folder", "data.root=x", "data.classes=[a]")
    )
    assert "has no last.ckpt" in told(run(train, f"resume={here}"))
    code, _, err = run(train, f"resume={folder / 'last.ckpt'}", "data.workers=1", "trainer.accelerator=cpu")
    assert code == 0, err
    assert only_run(here) == folder


def test_a_killed_process_resumes_and_its_last_line_is_a_command(here) -> None:
    here = here / "a folder, ü"  # the printed command goes through a shell and Hydra's grammar
    here.mkdir()
    command = [sys.executable, str(train), *SMALL, "trainer.max_steps=60", "trainer.val_check_interval=20"]
    process = subprocess.Popen(command, cwd=here, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(here.glob("runs/*/*/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = only_run(here)
    step = torch.load(folder / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 60
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("UV_RUN_RECURSION_DEPTH", None)  # python, not uv run, is what this environment offers
    options = {"capture_output": True, "text": True, "env": environment}
    done = subprocess.run([sys.executable, str(train), f"resume='{folder}'"], cwd=here, check=False, **options)
    assert done.returncode == 0, done.stderr
    # the checkpoint is written before the row of its last step, which may be what the kill came in between
    assert set(range(60)) - set(rows(folder, "train/loss")) <= {step - 1}
    os.chdir(here.parent)  # so that the path in the command has a blank in it
    shown = subprocess.run([sys.executable, str(train), f"resume='{folder}'"], cwd=here.parent, check=False, **options)
    told_command = shown.stdout.strip().splitlines()[-1].partition(": ")[2]
    assert "a folder" in told_command
    scored = subprocess.run(told_command, shell=True, cwd=here.parent, check=False, **options)
    assert scored.returncode == 0, scored.stderr


BAD = {
    "misspelt key": (["trainer.max_step=3"], "unknown key 'trainer.max_step' (did you mean 'max_steps'?)"),
    "misspelt group": (["data=toyy"], "no config data=toyy (did you mean 'toy'?)"),
    "missing root": (["data=camvid"], "'data.root' is not set: add data.root="),
    "wrong root": (["data=camvid", "data.root=nowhere"], "nowhere is not a folder"),
    "misspelt inner key": (["model.drop_path_rat=0"], "unknown key 'model.drop_path_rat'"),
    "text for a number": (["optim.lr=fast"], "optim.lr is 'fast', expected a number"),
    "wrong crop": (["data.crop_size=big"], "data.crop_size is 'big', expected a positive integer or a list of two"),
    "wrong precision": (["trainer.precision=bf17"], "trainer: Precision 'bf17' is invalid"),
    "no steps": (["trainer.max_steps=0"], "trainer.max_steps is 0, expected an integer of at least 1"),
    "unknown logger": (["+logger.mine._target_=nowhere.Logger"], "nowhere.Logger"),
    "no such weights": (["model.pretrained=nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
    "a fraction of the images that is none": (["trainer.limit_val_batches=0.1"], "0.1 * 5 < 1"),
    "bad schedule": (["optim.loss_denominator=some"], "loss denominator is 'some'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(here, run, what) -> None:
    overrides, expected = BAD[what]
    sentence = told(run(train, *(SHORT if "data=camvid" in overrides else SMALL), *overrides))
    assert expected in sentence
    if what not in ("bad schedule", "a fraction of the images that is none"):  # found when the run folder stands
        assert not list(here.iterdir())


class Moody:
    """A source whose third sample brings its worker down, or keeps it for ever."""

    def __init__(self, way: str) -> None:
        self.way, self.home = way, os.getpid()

    def __len__(self) -> int:
        return 4

    def name(self, index: int) -> str:
        return f"moody {index}"

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index == 2 and os.getpid() != self.home:
            if self.way == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return np.zeros((64, 64, 3), np.uint8), (np.arange(64) % 2).astype(np.uint8)[None].repeat(64, 0)


WORKERS = {
    "dies": "a data worker died, mostly for want of memory or shared memory; use fewer data.workers",
    "hangs": "timed out after 3 seconds: a data worker hangs, often on a slow or lost network disk; raise data.",
}


@pytest.mark.parametrize("way", WORKERS)
def test_a_worker_that_dies_or_hangs_is_one_sentence(here, run, way) -> None:
    source = [f"~data.{split}" for split in ("train", "val")]
    for split in ("train", "val"):
        source += [f"+data.{split}._target_=tests.test_train_evaluate.Moody", f"+data.{split}.way={way}"]
    short = [override for override in SHORT if "workers" not in override]
    command = ["data=folder", "data.root=x", "data.classes=[a,b]", "model.pretrained=null", *short, *source]
    assert WORKERS[way] in told(run(train, *command, "data.workers=1", "data.worker_timeout=3"))


def test_a_bad_file_in_training_is_one_sentence_that_names_it(here, run, potholes) -> None:
    command = ["data=folder", f"data.root={potholes}", "data.classes=[background,pothole]", "model.pretrained=null"]
    command += [*SHORT, "data.workers=1"]
    path = potholes / "images/train/road 2 ü.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    sentence = told(run(train, *command))
    assert f"cannot read image {path}: " in sentence and "truncated" in sentence and "replace or remove" in sentence
    path.write_bytes(whole)
    save(potholes / "masks/train/road 2 ü.png", np.full((62, 80), 7, np.uint8))
    sentence = told(run(train, *command, "hydra.run.dir=again"))  # a folder is named by the second
    assert f"none of the 2 classes declares, in {potholes}/masks/train/road 2 ü.png (7 in" in sentence


def test_bad_masks_and_lonely_files_are_one_sentence(here, run, potholes) -> None:
    command = ["data=folder", f"data.root={potholes}", "model.pretrained=null", *SHORT]
    assert "none of the 1 classes declares" in told(run(train, *command, "data.classes=[background]"))
    (potholes / "masks/train/road 2 ü.png").unlink()
    assert "1 of 4 files have no mask" in told(run(train, *command, "data.classes=[background,pothole]"))


def test_evaluating_on_other_classes_is_refused(here, run, potholes) -> None:
    run(train, *SMALL, "trainer.max_steps=2")
    checkpoint = f"checkpoint={only_run(here) / 'best.ckpt'}"
    other = ["data=folder", f"data.root={potholes}", "data.classes=[background,pothole]", "data.workers=0"]
    assert "has 8 classes, the data 2" in told(run(evaluate, checkpoint, *other))
    assert "add data=NAME" in told(run(evaluate, checkpoint, f"data.root={potholes}"))
    assert "no checkpoint file at nowhere.ckpt" in told(run(evaluate, "checkpoint=nowhere.ckpt"))
    assert "'checkpoint' is not set" in told(run(evaluate))
    assert not (here / "reports").exists()


def test_a_folder_in_hugging_face_layout_is_scored_with_data(here, run) -> None:
    from segformer.__main__ import main as tools

    run(train, *SMALL, "trainer.max_steps=3")
    best = only_run(here) / "best.ckpt"
    tools(["convert", str(best), "model"])
    toy = ["data=toy", "data.val.scenes=5", "data.workers=0"]
    reports = [run(evaluate, f"checkpoint={source}", *toy)[1].strip().splitlines()[-1] for source in (best, "model")]
    first, second = (json.loads(Path(path).read_text()) for path in reports)
    assert first["miou"] == second["miou"]
    with pytest.raises(SystemExit):
        tools(["convert", str(best), "model"])  # never over an older one


def test_several_loggers_by_name(here, run) -> None:
    code, _, err = run(train, *SMALL, "trainer.max_steps=2", "logger=[tensorboard,wandb,mlflow]")
    assert code == 0, err
    assert {"metrics.csv", "tensorboard", "wandb", "mlflow.db"} <= {path.name for path in only_run(here).iterdir()}


class Account(CSVLogger):
    """A logger that wants a secret."""

    def __init__(self, save_dir: Path, token: str) -> None:
        assert token == "hunter2hunter2"
        super().__init__(save_dir, name="account")


def test_secrets_stand_nowhere_in_a_run_and_are_asked_for_again(here, run) -> None:
    account = ["+logger.mine._target_=tests.test_train_evaluate.Account", "+logger.mine.token=hunter2hunter2"]
    code, _, err = run(train, *SMALL, "trainer.max_steps=2", *account)
    assert code == 0, err
    folder = only_run(here)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(b"hunter2" in path.read_bytes() for path in files)
    assert "logger.mine.token is a secret, which a run folder does not keep: give logger.mine.token=... again" in told(
        run(train, f"resume={folder}")
    )
    code, _, err = run(train, f"resume={folder}", *account)
    assert code == 0, err


def test_debug_runs_two_steps_and_writes_nothing(here, run) -> None:
    code, out, _ = run(train, *SMALL, "trainer=debug")
    assert code == 0 and "nothing was scored" in out and not list(here.iterdir())


def test_a_classifier_is_trained_and_a_segmentation_run_starts_from_it(here, run) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name, colour in (("red", [200, 30, 30]), ("green", [30, 200, 30])):
            for index in range(count):
                picture = np.array(colour) + rng.integers(-25, 25, (48, 64, 3))
                save(here / "pictures" / split / name / f"{index}.png", picture.clip(0, 255).astype(np.uint8))
    short = ["data.root=pictures", "data.crop_size=32", "data.batch_size=6", "data.workers=0", "trainer.max_steps=20"]
    short += ["trainer.val_check_interval=10", "optim.warmup_steps=2", "data.mixup=0", "data.cutmix=0"]
    code, out, err = run(train, "task=classification", "data=imagenet", *short)
    assert code == 0, err
    assert "2 classes" in out and "model.pretrained=runs/b0_imagenet" in out.splitlines()[-1]
    folder = only_run(here)
    assert {path.name for path in folder.iterdir()} == FILES - {"previews"}
    assert list(rows(folder, "val/top5").values()) == [1.0, 1.0]  # two classes
    assert 0 <= rows(folder, "val/top1")[19] <= 1
    code, out, err = run(train, f"resume={folder}")  # it had ended
    assert code == 0, err
    best = folder / "best.ckpt"
    assert f"{best} is a classifier" in told(run(evaluate, f"checkpoint={best}"))
    code, out, err = run(train, *SMALL, "trainer.max_steps=2", f"model.pretrained={best}")
    assert code == 0, err
    assert f"loaded the encoder from {best}" in out and "decode head starts fresh" in out
    assert "task is 'clasification' (did you mean 'classification'?): choose from segmentation" in told(
        run(train, *SMALL, "task=clasification")
    )
