"""What ends a run before its last step: a signal, or a number that is no number."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Collection
from dataclasses import dataclass
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from segformer.errors import SharedError
from segformer.launch import STOPPED, spawned
from segformer.states import Averaging, LastCheckpoint, last_checkpoints
from segformer.task import Task

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
ECHO = 2.0  # seconds in which a repeated signal counts as the same one: launchers pass on what all processes got anyway
SCALER_TRIES = 20  # overflowing steps in a row that fp16's loss scaler may skip: it halves from 65536 to below 1


class Stopped(SystemExit):
    """The run saved its state and ends because a signal asked it to; `code` is the exit code of this process."""


@dataclass
class Verdict:
    """Whether an optimiser step's numbers are finite, on its way from the device.

    broken: a scalar there, 1 where the loss or the gradient of any process is not, or was not in a step before.
    """

    step: int
    loss: Tensor
    norm: Tensor
    broken: Tensor

    def __post_init__(self) -> None:
        self.told, self.event = self.broken, None
        if self.broken.is_cuda:
            self.told = torch.empty((), pin_memory=True).copy_(self.broken, non_blocking=True)
            self.event = torch.cuda.current_stream(self.broken.device).record_event()

    def bad(self) -> bool:
        """Waits until the device has come to this step, no further."""
        if self.event is not None:
            self.event.synchronize()
        return bool(self.told)


class Stops(pl.Callback):
    """Ends all processes of a run together: at the same optimiser step, with its state saved.

    Lightning's own handlers run a collective operation inside a signal handler, where it meets another one and hangs
    (Lightning-AI/pytorch-lightning#20806). Here a handler sets a flag, which the processes compare once a step; with it
    they compare whether anyone's loss or gradient is not finite, before the step changes a weight.

    late: kinds of devices on which that is looked at a step later, so that the host never waits for a GPU that could
    be at work: till then the fused optimiser itself takes no step that is not finite, nor any after it.
    """

    def __init__(self, last: LastCheckpoint, late: Collection[str] = ("cuda",)) -> None:
        self.last, self.asked, self.agreed, self.since = last, 0, 0, 0.0
        self.late = late
        self.verdict: Verdict | None = None  # that has not been looked at
        self.group: Any = None  # of the CPU, so that nothing waits for a GPU
        self.before: dict[int, Any] = {}
        self.overflows = 0

    def setup(self, trainer: pl.Trainer, task: pl.LightningModule, stage: str) -> None:
        # the one place in Lightning where its handlers come in
        trainer._signal_connector.register_signal_handlers = self._listen  # type: ignore[method-assign]
        if trainer.world_size > 1:
            self.group = dist.new_group(backend="gloo")

    def on_train_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        patient = trainer.early_stopping_callback
        if patient is not None and patient.wait_count >= patient.patience:  # it had ended the run that goes on here
            trainer.should_stop = True

    def teardown(self, trainer: pl.Trainer, task: pl.LightningModule, stage: str) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before.clear()

    def _listen(self) -> None:
        for number in SIGNALS:
            self.before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > ECHO:  # meant: at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _agree(self, *flags: int) -> list[int]:
        """The largest of each flag over all processes."""
        if self.group is None:
            return list(flags)
        largest = torch.tensor(flags)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest.tolist()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, task: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(task, Task)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss, norm = task.step_loss, gradient_norm(optimizer)
        task.gradient_norm, finite = norm, torch.isfinite(norm + loss)
        if norm.device.type in self.late and optimizer.defaults.get("fused"):
            self._guard(trainer, optimizer, loss, norm, finite)
            (self.agreed,) = self._agree(self.asked)
            return
        self.agreed, broken = self._agree(self.asked, not finite)
        self.overflows = self.overflows + 1 if broken else 0
        if broken and (scaler is None or self.overflows > SCALER_TRIES):
            self._not_finite(trainer, task, loss, norm)

    def _guard(
        self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer, loss: Tensor, norm: Tensor, finite: Tensor
    ) -> None:
        """Lets the optimiser step only if this step and the ones before it are finite; looks at the one before it."""
        broken = 1 - finite.float()
        if trainer.world_size > 1:
            dist.all_reduce(broken, dist.ReduceOp.MAX)
        if self.verdict is not None:
            broken = broken.maximum(self.verdict.broken)
        optimizer.found_inf = broken  # type: ignore[attr-defined]  # as a loss scaler tells fused optimisers
        before, self.verdict = self.verdict, Verdict(trainer.global_step, loss, norm, broken)
        self._settle(trainer, before)

    def _settle(self, trainer: pl.Trainer, verdict: Verdict | None) -> None:
        """Raises if a step was not finite, as if it had never been taken: it changed nothing but the count of steps."""
        if verdict is None or not verdict.bad():
            return
        self.verdict = None
        progress, schedule = trainer.fit_loop.epoch_loop, trainer.lr_scheduler_configs[0].scheduler
        steps = progress.automatic_optimization.optim_progress.optimizer.step
        undone = trainer.global_step - verdict.step
        for count in (steps.total, steps.current):
            count.completed -= undone
        if undone:
            schedule.last_epoch -= 1 + undone
            schedule.step()  # type: ignore[call-arg]  # to where it was, the optimiser's rates with it
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's set-up
            if isinstance(callback, Averaging):
                callback.undo(undone)
        assert isinstance(trainer.lightning_module, Task)
        self._not_finite(trainer, trainer.lightning_module, verdict.loss, verdict.norm)

    def _settled(self, trainer: pl.Trainer) -> None:
        verdict, self.verdict = self.verdict, None
        self._settle(trainer, verdict)

    def on_save_checkpoint(self, trainer: pl.Trainer, task: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._settled(trainer)  # nothing is kept, or scored, before it is known to be finite

    def on_train_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._settled(trainer)

    def _not_finite(self, trainer: pl.Trainer, task: Task, loss: Tensor, norm: Tensor) -> None:
        step, replay = trainer.global_step, ""
        if not self.last.debug:
            kept = self.last.path.with_name("nonfinite.ckpt")
            trainer.save_checkpoint(kept)
            replay = f"; resume={kept} takes the same step again" if kept.is_file() else ""
        found = "the loss or its gradient is not finite"  # of some process
        if not torch.isfinite(loss):
            found = f"the loss is {float(loss)}"
        elif not torch.isfinite(norm):
            found = f"the gradient's norm is {float(norm)}"
        names = _listed(trainer.datamodule.sample_names(step))  # type: ignore[attr-defined]
        causes = [f"too high a learning rate (try a tenth of optim.lr={task.optim.get('lr')})"]
        if trainer.gradient_clip_val is None:
            causes.append("a single large gradient (try trainer.gradient_clip_val=1)")
        if "16" in str(trainer.precision):
            causes.append(f"half precision (try trainer.precision=32-true for {trainer.precision})")
        raise SharedError(
            f"{found} at step {step}, so training stopped before the step changed the weights{replay}. Likely causes: "
            f"{', '.join(causes)}, or one of the samples: {names}"
        )

    def on_train_batch_start(self, trainer: pl.Trainer, task: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.agreed and batch_idx % trainer.accumulate_grad_batches == 0:
            self.last.save(trainer)
            raise Stopped(self._code())

    # Validation may take minutes, and the processes do not take it in step. Who is asked to stop says so in the store;
    # all others look there before each image, and everyone compares once: on leaving, or at the end.

    def on_validation_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._settled(trainer)
        if self.agreed:  # the state before the step that led here has been saved
            raise Stopped(self._code())

    def on_validation_batch_start(
        self, trainer: pl.Trainer, task: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and self.group is not None:  # in its forward DDP hands out buffers, for which all must come
            return
        if self.group is not None:
            store = dist.distributed_c10d._get_default_store()
            if self.asked:
                store.set("stop", str(self.asked))
            if store.check(["stop"]):
                self.asked = int(store.get("stop"))
        if self.asked:
            self._leave_validation()

    def on_validation_epoch_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        self._leave_validation()

    def _leave_validation(self) -> None:
        (self.agreed,) = self._agree(self.asked)
        if self.agreed:
            raise Stopped(self._code())

    def _code(self) -> int:
        # Lightning kills the first process where one that it spawned ends with anything but 0
        return 0 if spawned() else 128 + signal.SIGINT if self.agreed == signal.SIGINT else STOPPED

    def on_exception(self, trainer: pl.Trainer, task: pl.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Stopped) or not trainer.is_global_zero:
            return
        name, run = signal.Signals(self.agreed).name, self.last.path.parent
        there = f"goes on with resume={run}" if last_checkpoints(run) else "no checkpoint was written"
        trainer.print(f"stopped by {name} after step {trainer.global_step}; {there}")
        if name == "SIGUSR1" and "SLURM_JOB_ID" in os.environ:
            _requeue()


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The 2-norm of the gradients of all that learns; a scalar, not read from the device."""
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return nn.utils.get_total_norm([parameter.grad for parameter in learning if parameter.grad is not None])


def _requeue() -> None:
    """Asks SLURM to start this job anew: with resume=auto it goes on."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    scontrol = shutil.which("scontrol")
    if scontrol and re.fullmatch(r"[0-9_]+", job):
        done = subprocess.run([scontrol, "requeue", job], check=False)
        print(f"job {job} was {'' if done.returncode == 0 else 'NOT '}requeued")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "streamed, without names"
