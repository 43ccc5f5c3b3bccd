"""Runs that are killed, stopped, moved to other hardware or short of disk: what they learn must not depend on it."""

import csv
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from segformer.errors import UserError
from segformer.states import last_checkpoints
from tests.survival import SMALL, Nursery, Ranks, Run, differences, learnt, only_run, running

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes as Linux shows them")

# everything that has a state: dropout, drop-path, accumulation, an average, validations and checkpoints out of step
LIFE = [
    *SMALL,
    *("data.micro_batch_size=1", "data.workers=1", "model.drop_path_rate=0.1", "trainer.ema_decay=0.99"),
    *("trainer.max_steps=40", "trainer.val_check_interval=9", "trainer.checkpoint_interval=4"),
]
SLOW = pytest.mark.slow  # minutes: every moment is a training process


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def unbroken(nursery, tmp_path_factory):
    """`unbroken(ranks, steps)` -> the folder of a run that nothing happened to."""
    done: dict[tuple[int, int], Path] = {}

    def folder(count: int, steps: int = 40) -> Path:
        if (count, steps) not in done:
            here = tmp_path_factory.mktemp(f"unbroken-{count}-{steps}")
            run = Ranks(nursery, count, here, *LIFE, f"trainer.max_steps={steps}")
            assert run.end(300) == [0] * count, run.text
            done[count, steps] = only_run(here)
        return done[count, steps]

    return folder


def rows(folder: Path, column: str) -> list[tuple[int, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]


def reached(run: Ranks, folder: Path, kill: int, moments: random.Random) -> str:
    """Waits for a moment to kill: among steps, in a validation or in the writing of a checkpoint, by turns."""
    run.wait_for("step ")  # the first one of this life
    while not last_checkpoints(folder):  # and of the first life the first checkpoint
        assert all(map(running, run.ids)), run.text
    before = set(folder.glob("previews/*"))
    what, deadline = ("steps", "validation", "writing")[kill % 3], time.monotonic() + 10
    time.sleep(moments.uniform(0, 0.5))
    while time.monotonic() < deadline and what != "steps":
        if what == "validation" and set(folder.glob("previews/*")) - before:
            return what
        if what == "writing" and any(folder.glob(".*.ckpt.tmp")):
            return what
    return "steps"


@pytest.mark.parametrize(("count", "kills"), [pytest.param(1, 20, marks=SLOW), (2, 3), pytest.param(2, 20, marks=SLOW)])
def test_a_run_killed_at_any_moment_learns_what_an_unbroken_one_learns(
    nursery, unbroken, tmp_path, count, kills
) -> None:
    """Bit for bit; what reads the samples may change every time, and how often a checkpoint is written."""
    moments, folder = random.Random(count * 100 + kills), tmp_path / "run"
    steps = 40 if kills < 10 else 120
    run = Ranks(
        nursery, count, tmp_path, *LIFE, f"trainer.max_steps={steps}", "hydra.run.dir=run",
        "trainer.checkpoint_interval=1",
    )  # fmt: skip
    killed = []
    for kill in range(kills):
        what = reached(run, folder, kill, moments)
        run.hit(signal.SIGKILL)
        assert run.end(20) == [137] * count, run.text
        step = torch.load(last_checkpoints(folder)[0], weights_only=True)["global_step"]
        killed.append(f"{what} after {step}")
        # some lives are too short for a checkpoint of their own, most get a few steps further
        run = Ranks(
            nursery, count, tmp_path, "resume=run", f"data.workers={kill % 3}",
            f"trainer.checkpoint_interval={4 if kill % 5 == 4 else 1}",
        )  # fmt: skip
    assert run.end(300) == [0] * count, run.text
    print("killed in:", ", ".join(killed))
    assert differences(learnt(unbroken(count, steps)), learnt(folder)) == []
    for column in ("train/loss", "val/miou"):  # the log is that of one run, too: each step once
        assert rows(folder, column) == rows(unbroken(count, steps), column)
    assert {path.name for path in folder.glob("*.ckpt")} == {"best.ckpt", "last.ckpt", "last-1.ckpt"}
    assert not list(folder.glob(".*.tmp"))


@SLOW
def test_four_processes_killed_agree_with_four_unbroken_ones_to_rounding(nursery, unbroken, tmp_path) -> None:
    run = Ranks(nursery, 4, tmp_path, *LIFE, "hydra.run.dir=run")
    run.wait_for("step 10 of")
    run.wait_for("mIoU")
    run.hit(signal.SIGKILL)
    run.end(20)
    run = Ranks(nursery, 4, tmp_path, "resume=run")
    assert run.end(300) == [0] * 4, run.text
    whole, broken = learnt(unbroken(4)), learnt(tmp_path / "run")
    assert whole["global_step"] == broken["global_step"] == 40
    for name, tensor in whole["state_dict"].items():
        torch.testing.assert_close(broken["state_dict"][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(1, 2), pytest.param(2, 1, marks=SLOW)])
def test_a_run_goes_on_with_another_number_of_processes(nursery, unbroken, tmp_path, before, after) -> None:
    run = Ranks(nursery, before, tmp_path, *LIFE, "hydra.run.dir=run")
    run.wait_for("mIoU")
    run.hit(signal.SIGTERM)
    assert run.end(20) == [143] * before, run.text
    steps = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < steps < 40
    run = Ranks(nursery, after, tmp_path, "resume=run")
    assert run.end(300) == [0] * after, run.text
    # dropout draws by process, and BatchNorm sees the micro-batches of the first one: close, not equal
    for (step, loss), (expected_step, expected) in zip(
        rows(tmp_path / "run", "train/loss"), rows(unbroken(before), "train/loss"), strict=True
    ):
        assert step == expected_step and loss == pytest.approx(expected, rel=1e-6 if step < steps else 0.2)


TARGETS = {"all": None, "rank 0": [0], "rank 1": [1]}


@pytest.mark.parametrize(
    ("target", "times"), [("rank 1", 1), *(pytest.param(target, 10, marks=SLOW) for target in TARGETS)]
)
def test_processes_stop_together_wherever_the_signal_goes(nursery, unbroken, tmp_path, target, times) -> None:
    moments = random.Random(times)
    for number in range(times):
        here = tmp_path / str(number)
        here.mkdir()
        run = Ranks(nursery, 2, here, *LIFE, "hydra.run.dir=run")
        run.wait_for("step 1 of")
        time.sleep(moments.uniform(0, 4) if number else 0)
        start = time.monotonic()
        run.hit(signal.SIGTERM, TARGETS[target])
        assert run.end(20) == [143, 143], run.text
        print(f"{target}, {number}: ended after {time.monotonic() - start:.1f} s")
        assert run.text.count("stopped by SIGTERM after step") == 1 and "Traceback" not in run.text
        run = Ranks(nursery, 2, here, "resume=run")
        assert run.end(300) == [0, 0], run.text
        assert differences(learnt(unbroken(2)), learnt(here / "run")) == []


@pytest.mark.parametrize("images", [21, pytest.param(1, marks=SLOW)])
@pytest.mark.parametrize("target", [[0], pytest.param(None, marks=SLOW), pytest.param([1], marks=SLOW)])
def test_a_validation_is_left_by_all_processes(nursery, tmp_path, target, images) -> None:
    """Each has another number of images, or just the one in which DDP hands out buffers."""
    often = [*LIFE, f"data.val.scenes={2 * images - 1 if images > 1 else 2}", "trainer.val_check_interval=1"]
    run = Ranks(nursery, 2, tmp_path, *often, "hydra.run.dir=run")
    run.wait_for("step 3 of")
    time.sleep(random.Random(images).uniform(0, 1))
    start = time.monotonic()
    run.hit(signal.SIGTERM, target)
    assert run.end(20) == [143, 143], run.text
    print(f"ended after {time.monotonic() - start:.1f} s")
    step = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"]
    assert run.text.count("stopped by SIGTERM") == 1 and step >= 2
    run = Ranks(nursery, 2, tmp_path, "resume=run", "trainer.max_time=00:00:00:01")
    assert run.end(100) == [0, 0], run.text  # the limit is over all resumes: it validates and ends
    steps = [step for step, _ in rows(tmp_path / "run", "val/miou")]
    assert steps == list(range(len(steps))) and step <= len(steps) < 40


@pytest.mark.parametrize("target", [None, pytest.param([0], marks=SLOW), pytest.param([1], marks=SLOW)])
def test_processes_that_one_command_started_end_with_code_143(unbroken, tmp_path, target) -> None:
    run = Run(tmp_path, *LIFE, "trainer.devices=2", "trainer.strategy=ddp")
    run.wait_for("step 1 of", 200)
    run.hit(signal.SIGTERM, target)
    assert run.end(20) == 143, run.text
    assert "stopped by SIGTERM" in run.text and "Traceback" not in run.text


@pytest.mark.parametrize("rank", [pytest.param(0, marks=SLOW), 1])
def test_a_process_that_is_stopped_before_training_takes_the_others_along(tmp_path, rank) -> None:
    run = Run(tmp_path, *LIFE, "trainer.devices=2", "trainer.strategy=ddp")
    deadline = time.monotonic() + 200
    while not run.listens(1, signal.SIGTERM):
        assert time.monotonic() < deadline, run.text
        time.sleep(0.05)
    run.hit(signal.SIGTERM, [rank])
    assert run.end(20) in (143, -signal.SIGTERM), run.text  # a shell says 143 for either


class Treacherous:
    """A source that fails in the second process alone."""

    def __len__(self) -> int:
        return 4

    def name(self, index: int) -> str:
        return f"sample {index}"

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if os.environ.get("LOCAL_RANK") == "1":
            raise UserError(f"sample {index} cannot be read: replace it")
        time.sleep(0.2)  # so that the others are in the middle of something
        return np.zeros((64, 64, 3), np.uint8), (np.arange(64) % 2).astype(np.uint8)[None].repeat(64, 0)


def test_a_process_that_fails_alone_says_why_and_the_others_end(tmp_path) -> None:
    source = [f"~data.{split}" for split in ("train", "val")]
    source += [f"+data.{split}._target_=tests.test_survival.Treacherous" for split in ("train", "val")]
    small = [word for word in SMALL if "scenes" not in word] + ["data=folder", "data.root=x", "data.classes=[a,b]"]
    several = ["model.pretrained=null", "data.workers=0", "trainer.devices=2", "trainer.strategy=ddp"]
    run = Run(tmp_path, *small, *source, *several)
    run.wait_for("error in process 1", 200)
    assert run.end(20) != 0
    assert "error in process 1: sample " in run.text and "cannot be read: replace it" in run.text


def test_a_second_signal_ends_a_run_at_once_but_an_echo_does_not(nursery, tmp_path) -> None:
    slow = [*LIFE, "data.micro_batch_size=null", "data.batch_size=12", "data.crop_size=512"]  # seconds a step
    run = Ranks(nursery, 1, tmp_path, *slow)
    run.wait_for("step 1 of")
    run.hit(signal.SIGTERM)
    run.hit(signal.SIGTERM)  # as torchrun passes on what the whole group got
    time.sleep(2.2)
    running = Path(f"/proc/{run.ids[0]}/stat").read_text().split()[2] != "Z"
    run.hit(signal.SIGTERM)
    assert run.end(20) == [143]
    assert not running or "stopped by" not in run.text


def test_ctrl_c_saves_and_ends_with_its_own_code(nursery, tmp_path) -> None:
    run = Ranks(nursery, 1, tmp_path, *LIFE)
    run.wait_for("step 1 of")
    run.hit(signal.SIGINT)
    assert run.end(20) == [130] and "stopped by SIGINT" in run.text
    assert torch.load(only_run(tmp_path) / "last.ckpt", weights_only=True)["global_step"] > 0


def test_a_damaged_last_checkpoint_is_told_and_the_one_before_it_taken(nursery, unbroken, tmp_path) -> None:
    run = Ranks(nursery, 1, tmp_path, *LIFE, "hydra.run.dir=run")
    run.wait_for("mIoU")
    run.hit(signal.SIGTERM)
    assert run.end(20) == [143]
    last = tmp_path / "run" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, which torch.load would not notice
    last.write_bytes(content)
    run = Ranks(nursery, 1, tmp_path, "resume=run")
    assert run.end(300) == [0], run.text
    assert (
        "warning: cannot read checkpoint" in run.text and f"going on from {last.with_name('last-1.ckpt')}" in run.text
    )
    assert differences(learnt(unbroken(1)), learnt(tmp_path / "run")) == []


def test_numbers_that_are_not_finite_stop_all_processes_before_a_weight_changes(nursery, tmp_path) -> None:
    run = Ranks(nursery, 2, tmp_path, *LIFE, "optim.lr=1e25", "hydra.run.dir=run")
    assert run.end(100) == [1, 1], run.text
    (line,) = [line for line in run.text.splitlines() if line.startswith("error: ")]
    assert "scene_0_000" in line and "nonfinite.ckpt takes the same step again" in line
    kept = torch.load(tmp_path / "run" / "nonfinite.ckpt", weights_only=True)
    assert all(
        torch.isfinite(tensor).all() for name, tensor in kept["current_model_state"].items() if "norm" not in name
    )
    step = int(line.partition("at step ")[2].partition(",")[0])
    assert kept["global_step"] == step
    again = Ranks(nursery, 2, tmp_path, "resume=run/nonfinite.ckpt")
    assert again.end(100) == [1, 1]
    assert f"at step {step}, so" in again.text and f"goes on from {tmp_path}/run/nonfinite.ckpt" in again.text


def test_a_stop_in_the_first_validation_leaves_something_to_go_on_from(nursery, tmp_path) -> None:
    early = [*LIFE, "trainer.val_check_interval=1", "data.val.scenes=100"]
    run = Ranks(nursery, 1, tmp_path, *early, "hydra.run.dir=run")
    run.wait_for("step 1 of")
    run.hit(signal.SIGTERM)
    assert run.end(20) == [143] and "goes on with resume=" in run.text, run.text
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] <= 1


def test_a_process_that_waits_for_another_one_in_validation_is_stopped_too(nursery, tmp_path) -> None:
    """The first has scored its images and waits for the second, which is then asked to stop."""
    run = Ranks(nursery, 2, tmp_path, *LIFE, "data.val.scenes=60", "trainer.val_check_interval=2", "hydra.run.dir=run")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("previews/step_000002_1.jpg")):
        assert time.monotonic() < deadline, run.text
        time.sleep(0.005)
    run.hit(signal.SIGSTOP, [1])
    time.sleep(5)
    run.hit(signal.SIGTERM, [1])
    run.hit(signal.SIGCONT, [1])
    assert run.end(20) == [143, 143], run.text


def test_two_commands_do_not_train_in_one_folder(nursery, tmp_path) -> None:
    first = Ranks(nursery, 1, tmp_path, *LIFE, "hydra.run.dir=run", "trainer.checkpoint_interval=1")
    first.wait_for("step 1 of")
    while not (tmp_path / "run" / "last.ckpt").is_file():
        time.sleep(0.02)
    second = Ranks(nursery, 1, tmp_path, *LIFE, "hydra.run.dir=run", "resume=run")
    assert second.end(60) == [1] and f"another process trains in {tmp_path}/run: stop it" in second.text, second.text
    assert first.end(300) == [0], first.text


def test_a_full_disk_costs_a_checkpoint_not_the_run(nursery, unbroken, tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs a small disk of its own, and may not mount one: {mounted.stderr.decode().strip()}")
    try:
        run = Ranks(nursery, 1, disk, *LIFE, "hydra.run.dir=run", "trainer.log_every_n_steps=1")
        run.wait_for("mIoU")
        with suppress(OSError), (disk / "ballast").open("wb") as ballast:  # until there is no space left
            while True:
                ballast.write(bytes(2**20))
        before = torch.load(disk / "run" / "last.ckpt", weights_only=True)["global_step"]
        run.wait_for("the disk is full")
        assert torch.load(disk / "run" / "last.ckpt", weights_only=True)["global_step"] >= before  # as it was: whole
        (disk / "ballast").unlink()
        assert run.end(300) == [0], run.text
        line = next(line for line in run.text.splitlines() if "the disk is full" in line and "last.ckpt" in line)
        assert "needs" in line and "MiB are free; the one before is as it was" in line and "Training goes on" in line
        assert differences(learnt(unbroken(1)), learnt(disk / "run")) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
