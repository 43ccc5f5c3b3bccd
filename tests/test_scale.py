"""Many processes, many nodes, many runs: one folder, one set of weights, one score."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.survival import ONE_THREAD, SMALL, Nursery, Ranks, only_run
from tests.test_survival import LIFE, rows


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.close()


def free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def two_nodes(here: Path, *command: str) -> list[str]:
    """Starts a script as the user of two machines does, each with its own torchrun; what each printed."""
    port, started = free_port(), []
    for node in (0, 1):
        launcher = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"]
        launcher += ["--master-addr", "127.0.0.1", "--master-port", port]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *launcher, *command], cwd=here, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | ONE_THREAD,
            )
        )  # fmt: skip
        time.sleep(1.1)  # so that the clocks of the two would name two folders
    texts = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], texts
    return texts


def test_two_nodes_write_one_run_and_their_score_is_that_of_one_process(tmp_path) -> None:
    nodes = ["trainer.num_nodes=2", "trainer.devices=1", "trainer.strategy=ddp"]
    first, second = two_nodes(tmp_path, str(ROOT / "train.py"), *LIFE, *nodes)
    assert "run folder: " in first and "run folder: " not in second
    folder = only_run(tmp_path)
    alone = [sys.executable, str(ROOT / "evaluate.py"), f"checkpoint={folder / 'best.ckpt'}", "trainer.accelerator=cpu"]
    done = subprocess.run(
        alone, cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | ONE_THREAD
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(Path(tmp_path, done.stdout.strip().splitlines()[-1]).read_text())
    assert report["miou"] == pytest.approx(max(score for _, score in rows(folder, "val/miou")), abs=1e-6)
    assert report["images"] == 5


@pytest.mark.slow  # the run above has gone through the same processes
def test_two_nodes_end_with_the_same_weights(tmp_path) -> None:
    two_nodes(tmp_path, str(ROOT / "tests/processes.py"), str(tmp_path / "out.json"), "7", "5")
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["weights"]) == 2 and len(set(found["weights"])) == 1
    assert found["scores"]["7"]["images"] == 7


class Job(Ranks):
    """Two tasks of a SLURM job, one on each of two nodes, as `srun` starts them."""

    def __init__(self, nursery: Nursery, here: Path, *overrides: str, path: Path) -> None:
        shared = {
            "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NNODES": "2",
            "SLURM_NTASKS_PER_NODE": "1", "SLURM_LOCALID": "0", "SLURM_NODELIST": "127.0.0.1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "PATH": f"{path}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        tasks = [shared | {"SLURM_PROCID": str(task), "SLURM_NODEID": str(task)} for task in (0, 1)]
        super().__init__(
            nursery, 1, here, *overrides, "trainer.num_nodes=2", "trainer.devices=1", "trainer.strategy=ddp",
            environments=tasks,
        )  # fmt: skip


def test_a_slurm_job_that_is_told_to_end_is_requeued_and_goes_on_by_the_same_command(nursery, tmp_path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tools / "scontrol").chmod(0o755)
    command = [*LIFE, "resume=auto"]
    job = Job(nursery, tmp_path, *command, path=tools)
    job.wait_for("mIoU")
    job.hit(signal.SIGUSR1)
    assert job.end(20) == [143, 143], job.text
    assert "stopped by SIGUSR1" in job.text and "job 4711 was requeued" in job.text
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    step = torch.load(only_run(tmp_path) / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 40
    job = Job(nursery, tmp_path, *command, path=tools)
    assert job.end(300) == [0, 0], job.text
    assert f"goes on from {only_run(tmp_path)}/last.ckpt" in job.text  # one folder still
    assert [step for step, _ in rows(only_run(tmp_path), "train/loss")] == list(range(40))


def test_a_sweep_is_a_run_for_each_value_and_is_refused_on_several_devices(nursery, tmp_path) -> None:
    short = [*SMALL, "trainer.max_steps=2", "data.workers=0"]
    sweep = Ranks(nursery, 1, tmp_path, "--multirun", "optim.lr=1e-3,2e-3", *short)
    assert sweep.end(200) == [0], sweep.text
    folders = sorted(tmp_path.glob("runs/sweeps/*/[0-9]*"))
    assert [folder.name for folder in folders] == ["0", "1"]
    assert all((folder / "best.ckpt").is_file() for folder in folders)
    several = Ranks(nursery, 2, tmp_path, "--multirun", "optim.lr=1e-3,2e-3", *short)
    assert several.end(200) == [1, 1]
    (line,) = [line for line in several.text.splitlines() if line.startswith("error: ")]
    assert "--multirun trains on one device, but there are 2 processes: use a shell loop" in line
    assert sorted(tmp_path.glob("runs/sweeps/*/[0-9]*")) == folders


def test_quotes_and_blanks_in_overrides_reach_every_process(nursery, tmp_path) -> None:
    folder = tmp_path / "a run, ü"
    run = Ranks(nursery, 2, tmp_path, *SMALL, "trainer.max_steps=2", "data.workers=0", f'hydra.run.dir="{folder}"')
    assert run.end(200) == [0, 0], run.text
    assert (folder / "best.ckpt").is_file()


def test_wandb_on_two_processes_is_one_record(nursery, tmp_path) -> None:
    run = Ranks(nursery, 2, tmp_path, *SMALL, "trainer.max_steps=2", "data.workers=0", "logger=wandb")
    assert run.end(200) == [0, 0], run.text
    assert len(list(only_run(tmp_path).glob("wandb/offline-run-*"))) == 1


@pytest.mark.slow  # four commands
def test_an_optuna_study_survives_a_failing_trial_and_goes_on(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "docs/optuna_sweep.py"), "--study", "study", *SMALL, "data.workers=0"]
    for steps, count in (("-1", "1"), ("2", "2")):
        done = subprocess.run(
            [*command, f"trainer.max_steps={steps}", "--trials", count], cwd=tmp_path, capture_output=True, text=True,
            check=False, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "best val/miou" in done.stdout
    assert sorted(path.name for path in (tmp_path / "study").iterdir()) == ["1", "2", "journal.log"]
