"""A run breaks, moves, goes on; on one process and on two."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from tests import scripts
from tests.scripts import FILES, SHORT, SMALL, evaluate, only_run, rows, told, train

here, run = scripts.here, scripts.run


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
    code, _, err = run(train, *SMALL, "+logger.bomb._target_=tests.test_runs.Bomb", f"+logger.bomb.step={cut}")
    assert code == 1 and "ConnectionError: power cut" in err
    broken = only_run(here)
    assert torch.load(broken / "last.ckpt", weights_only=True)["global_step"] == resumes_at
    saved = yaml.safe_load((broken / "config.yaml").read_text())
    saved["logger"] = {}
    (broken / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))

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
    bomb = ["+logger.bomb._target_=tests.test_runs.Bomb", "+logger.bomb.step=5"]
    code, _, err = run(train, *command, "data.micro_batch_size=2", *bomb)
    assert code == 1 and "ConnectionError: power cut" in err
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
    code, _, err = run(train, *command, "+logger.bomb._target_=tests.test_runs.Bomb", "+logger.bomb.step=6")
    assert code == 1 and "ConnectionError: power cut" in err
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
    code, out, err = run(train, *command[:-1], "hydra.run.dir=another", "seed=1")  # beside it: none of its business
    assert code == 0 and "all weights start fresh" in out, err


def test_a_run_of_an_older_version_or_without_its_best_goes_on(here, run) -> None:
    run(train, *SMALL, "trainer.max_steps=4", "trainer.max_time=00:00:00:01", "data.val.scenes=50")
    folder = only_run(here)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    del saved["task"], saved["trainer"]["keep_last"], saved["trainer"]["ema_decay"], saved["trainer"]["patience"]
    (folder / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    (folder / "best.ckpt").unlink()
    code, out, err = run(train, f"resume={folder}", "trainer.max_time=null")
    assert code == 0, err
    assert (folder / "best.ckpt").is_file() == ("best val/miou" in out)


def test_a_run_that_lost_its_patience_does_not_get_it_back(here, run) -> None:
    still = ["trainer.patience=1", "optim.lr=1e-12", "trainer.max_steps=40", "trainer.checkpoint_interval=50"]
    code, _, err = run(train, *SMALL, *still)
    assert code == 0, err
    ended = torch.load(only_run(here) / "last.ckpt", weights_only=True)["global_step"]
    assert ended < 40
    (only_run(here) / "best.ckpt").unlink()
    code, out, err = run(train, "resume=auto")
    assert code == 0 and "there is no best.ckpt: it was taken away" in out, err
    assert torch.load(only_run(here) / "last.ckpt", weights_only=True)["global_step"] == ended


def test_more_validation_images_can_be_decoded_when_a_run_goes_on(here, run) -> None:
    run(train, *SMALL, "trainer.max_steps=2")
    changes = ["data.max_pixels=400000000", "data.worker_timeout=60"]
    code, _, err = run(train, f"resume={only_run(here)}", *changes)
    assert code == 0, err
    saved = yaml.safe_load((only_run(here) / "config.yaml").read_text())
    assert (saved["data"]["max_pixels"], saved["data"]["worker_timeout"]) == (400_000_000, 60)


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
        source += [f"+data.{split}._target_=tests.test_runs.Moody", f"+data.{split}.way={way}"]
    short = [override for override in SHORT if "workers" not in override]
    command = ["data=folder", "data.root=x", "data.classes=[a,b]", "model.pretrained=null", *short, *source]
    assert WORKERS[way] in told(run(train, *command, "data.workers=1", "data.worker_timeout=3"))


class Account(CSVLogger):
    """A logger that wants a secret."""

    def __init__(self, save_dir: Path, token: str, others: list[dict[str, str]]) -> None:
        assert [token, *(other["password"] for other in others)] == ["hunter2hunter2"] * 2
        super().__init__(save_dir, name="account")


def test_secrets_stand_nowhere_in_a_run_and_are_asked_for_again(here, run) -> None:
    account = ["+logger.mine._target_=tests.test_runs.Account", "+logger.mine.token=hunter2hunter2"]
    account += ["+logger.mine.others=[{password:hunter2hunter2}]"]
    code, _, err = run(train, *SMALL, "trainer.max_steps=2", *account)
    assert code == 0, err
    folder = only_run(here)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(b"hunter2" in path.read_bytes() for path in files)
    assert (
        "logger.mine.token holds a secret, which a run folder does not keep: give ++logger.mine.token=... again"
        in told(run(train, f"resume={folder}"))
    )
    token, others = "++logger.mine.token=hunter2hunter2", "++logger.mine.others=[{password:hunter2hunter2}]"
    assert "give ++logger.mine.others=... again" in told(run(train, f"resume={folder}", token))
    code, _, err = run(train, f"resume={folder}", token, others)
    assert code == 0, err
