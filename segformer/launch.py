"""Which process of a command this is, who started it, and that what it started ends with it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STOPPED = 143  # the exit code of a run that saved its state because a signal asked it to stop: 128 + SIGTERM
GRACE = 20  # seconds that a reader of samples works on after a signal to stop


def process() -> int:
    """The number of this process among those that a launcher started, from its environment; 0 without one."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # in Lightning's order
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)


def spawned() -> bool:
    """Whether the first process of this very command started this one, as Lightning does without a launcher."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and {"RANK", "SLURM_PROCID"}.isdisjoint(os.environ)


def end_with_parent() -> None:
    """Binds a spawned process to the first one: neither waits for a connection to the other when that is gone."""
    if not spawned():
        return
    parent = os.getppid()

    def stop(*_: object) -> None:  # asked to stop before training listens for it: so is the whole command
        with suppress(OSError):
            os.kill(parent, signal.SIGTERM)
        os._exit(STOPPED)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(STOPPED)

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=watch, daemon=True, name="parent watch").start()


def outlast() -> None:
    """Lets a reader of samples work on after a signal that was sent to all processes: the run takes its last step."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def disconnect() -> None:
    """Ends the connection to the other processes when all is done: its threads must not outlive the interpreter.

    Lightning does so for NCCL; a process on CPUs would now and then abort after its last line.
    """
    import torch.distributed as dist  # not above: a misspelt key needs no torch

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def tidy(folder: str) -> Iterator[None]:
    """A command that stops before it writes anything leaves no empty folder behind, nor its two empty parents.

    Only the first of several processes writes: of those that torchrun or SLURM started, the others have folders of
    their own, which go at once.
    """
    try:
        if process() and not {"RANK", "SLURM_PROCID"}.isdisjoint(os.environ):
            with suppress(OSError):
                Path(folder).rmdir()
        yield
    finally:
        here = Path.cwd()
        for empty in (Path(folder), *list(Path(folder).parents)[:2]):
            if here.is_relative_to(empty):  # where the command was started is not ours to remove
                break
            with suppress(OSError):  # not empty, or gone already
                empty.rmdir()
