"""Whether an optimiser step fits on the device: the largest micro-batch that does, what to change where none does."""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from segformer.data.loaders import Loaders
from segformer.errors import SharedError, UserError
from segformer.labels import IGNORE
from segformer.task import Task

GIB = 2**30


def settle_micro_batch(trainer: pl.Trainer, task: Task, data: Loaders, config: dict[str, Any]) -> None:
    """Replaces `data.micro_batch_size=auto` by the largest size that fits, in the configuration that is stored too."""
    if data.micro_batch_size != "auto":
        return
    if trainer.world_size > 1:
        raise SharedError(
            f"data.micro_batch_size=auto measures one device, but there are {trainer.world_size} processes: run with "
            "trainer.devices=1 trainer=debug once, which prints the size, and give that number"
        )
    device = trainer.strategy.root_device
    if device.type == "cuda":
        size = largest_that_fits(data.batch_size, lambda count: _step(trainer, task, data, count))
        peak, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        why = f"the largest part of {data.batch_size} that fits ({peak / GIB:.1f} of {whole / GIB:.1f} GiB)"
    else:
        size, why = data.batch_size, f"all at once: the memory of {device} has no limit to try"
    data.micro_batch_size = config["data"]["micro_batch_size"] = size
    task.hyper_parameters["config"]["data"]["micro_batch_size"] = size
    trainer.print(f"data.micro_batch_size={size}, {why}")


def largest_that_fits(share: int, fits: Callable[[int], bool]) -> int:
    """The largest equal part of `share` samples for which `fits` is true, tried from the whole downwards."""
    for parts in range(1, share + 1):
        if share % parts == 0 and fits(share // parts):
            return share // parts
    raise UserError("out of memory with a single sample: use a smaller data.crop_size or model=b0")


def _step(trainer: pl.Trainer, task: Task, data: Loaders, count: int) -> bool:
    """Whether forward, backward and an update of a copy of the network go through with so many samples."""
    device = trainer.strategy.root_device
    model = task.model
    try:
        with torch.random.fork_rng(devices=[device]):
            task.model = copy.deepcopy(model).to(device).train()
            optimizer = task.configure_optimizers()["optimizer"]
            for _ in range(2):  # the optimiser's state is there from the second step on
                with trainer.precision_plugin.forward_context():
                    loss = task.loss_of(_blank(data, count, device))
                torch.autograd.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        task.model = model
        gc.collect()
        torch.cuda.empty_cache()
    return True


def _blank(data: Loaders, count: int, device: torch.device) -> dict[str, Tensor]:
    return {
        "image": torch.zeros(count, data.bands, *data.crop_size, dtype=torch.uint8, device=device),
        "mask": torch.full((count, *data.crop_size), IGNORE, dtype=torch.uint8, device=device),
        "label": torch.zeros(count, dtype=torch.int64, device=device),  # of classification
    }


@contextmanager
def explained(trainer: pl.Trainer, data: Loaders, config: dict[str, Any]) -> Iterator[None]:
    """Turns "out of memory" into what was taken and the settings that take less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        device = trainer.strategy.root_device
        taken = ""
        if device.type == "cuda":
            peak, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
            taken = f" ({peak / GIB:.1f} GiB taken at most, of {whole / GIB:.1f})"
        share = data.batch_size // (trainer.world_size * trainer.accumulate_grad_batches)
        ways = [f"data.micro_batch_size={share // 2} (was {share})"] if share > 1 else []
        if not config["model"].get("gradient_checkpointing"):
            ways.append("model.gradient_checkpointing=true (a third more time)")
        if device.type == "cuda" and str(trainer.precision) == "32-true":
            ways.append("trainer.precision=bf16-mixed")
        height, width = data.crop_size
        smaller, now = (f"[{h},{w}]" if h != w else str(h) for h, w in ((height // 2, width // 2), (height, width)))
        ways.append(f"data.crop_size={smaller} (was {now})")
        raise UserError(f"out of memory on {device}{taken}: try {', or '.join(ways[:3])}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the system refused memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
