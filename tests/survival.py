"""Starting, hitting and comparing real training processes. Used by test_survival.py.

Run as a script it is a nursery: it imports what train.py needs once, and forks a fresh process for each command that it
reads from its input, which starts in a tenth of the time. Two ranks are two such processes under torchrun's variables.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SMALL = [
    *("data.train.scenes=12", "data.val.scenes=5", "data.crop_size=64", "data.batch_size=4", "data.check=0"),
    *("trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "optim.warmup_steps=5"),
]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # exact equality needs the same arithmetic everywhere


class Run:
    """A `train.py` of its own in a session of its own, so that a signal can be sent to all of its processes."""

    def __init__(self, here: Path, *overrides: str, environment: dict[str, str] | None = None) -> None:
        self.here, self.log = here, here / f"log-{time.monotonic_ns()}.txt"
        command = [sys.executable, str(ROOT / "train.py"), *overrides]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=here, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | ONE_THREAD | (environment or {}),
            )  # fmt: skip

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        if number == 0:
            return self.process.pid
        for pid in _children(self.process.pid):
            if f"LOCAL_RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
        raise LookupError(f"rank {number} is not there")

    def listens(self, rank: int, number: int) -> bool:
        """Whether a rank is there and has a handler of its own for a signal."""
        try:
            caught = Path(f"/proc/{self.rank(rank)}/status").read_text().partition("SigCgt:")[2].split()[0]
        except (LookupError, OSError):
            return False
        return bool(int(caught, 16) >> (number - 1) & 1)

    def hit(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Sends a signal to these ranks, or to every process of the session."""
        if ranks is None:
            os.killpg(self.process.pid, number)
        else:
            for rank in ranks:
                os.kill(self.rank(rank), number)

    def wait_for(self, words: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.text and self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)

    def end(self, seconds: float) -> int:
        """The exit code; fails where a process of the run is still there after so many seconds."""
        try:
            code = self.process.wait(seconds)
            deadline = time.monotonic() + 10  # the others follow
            while _alive(self.process.pid):
                assert time.monotonic() < deadline, "processes were left behind"
                time.sleep(0.05)
            return code
        finally:
            if _alive(self.process.pid):
                os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def text(self) -> str:
        return self.log.read_text()


class Nursery:
    """Forks ranks of `train.py` that have imported everything already."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | ONE_THREAD,
        )  # fmt: skip

    def ask(self, **question: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


class Ranks:
    """A training run of forked ranks, with the interface of `Run`."""

    def __init__(
        self, nursery: Nursery, count: int, here: Path, *overrides: str, environments: Sequence[dict[str, str]] = ()
    ) -> None:
        self.nursery, self.log = nursery, here / f"log-{time.monotonic_ns()}.txt"
        self.log.touch()
        if count > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
            shared |= {"TORCHELASTIC_RUN_ID": "survival", "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
            environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
            overrides = (*overrides, f"trainer.devices={count}", "trainer.strategy=ddp")
        self.ids = [
            nursery.ask(arguments=list(overrides), here=str(here), log=str(self.log), environment=environment)
            for environment in environments or [{}]
        ]

    def hit(self, number: int, ranks: Sequence[int] | None = None) -> None:
        for rank in ranks if ranks is not None else range(len(self.ids)):
            os.kill(self.ids[rank], number)

    def wait_for(self, words: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.text and any(running(pid) for pid in self.ids):
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)

    def end(self, seconds: float) -> list[int]:
        """The exit codes as a shell gives them; fails where a rank is still there after so many seconds."""
        codes = [self.nursery.ask(wait=pid, seconds=seconds) for pid in self.ids]
        assert None not in codes, f"still running after {seconds} s:\n{self.text}"
        return codes

    @property
    def text(self) -> str:
        return self.log.read_text()


def _serve() -> None:
    """Answers each line of input: the pid of a new process, or the exit code of one (None = killed for being late)."""
    import lightning.pytorch  # noqa: F401
    import omegaconf  # noqa: F401

    from segformer import callbacks, kinds, memory, resume, states, stops  # noqa: F401

    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            print(json.dumps(_waited(question["wait"], question["seconds"])), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            log = os.open(question["log"], os.O_WRONLY | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(question["here"])
            os.environ.update(question["environment"])
            sys.argv = [str(ROOT / "train.py"), *question["arguments"]]
            code = 0
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            os._exit(code)


def _waited(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.02)


def running(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(session: int) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, owner = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(owner) == session and state != "Z":
            found.append(folder.name)
    return found


def only_run(here: Path) -> Path:
    (folder,) = here.glob("runs/*/*")
    return folder


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested structures of tensors and plain values are not equal to the last bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() ^ other.keys()
        pairs = [(f"{where}.{key}", one[key], other[key]) for key in one.keys() & other.keys()]
        return [*(f"{where}.{key}" for key in keys), *(found for at, a, b in pairs for found in differences(a, b, at))]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, (a, b) in pairs for found in differences(a, b, f"{where}[{index}]")]
    return [] if one == other else [where]


def learnt(folder: Path) -> dict[str, Any]:
    """All that a finished run computed: weights, their average, the optimiser, the schedule, the best score."""
    last = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)
    best = next(value for key, value in last["callbacks"].items() if "Best" in key)
    kept = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step")
    return {key: last.get(key) for key in kept} | {"best": best["best_model_score"]}


if __name__ == "__main__":
    _serve()
