"""What every cell of the GPU benchmark needs: inputs, time, memory, and a place for what was measured."""

import argparse
import functools
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pairs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segformer import kernels
from segformer.files import write_atomically

SECTIONS = ("checks", "roofline", "training", "inference", "kernels", "decode", "profiles")
TINY = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 3, 4],
    "decoder_hidden_size": 24,
}
# those that tell the most first: a budget cuts the end off
VARIANTS_OF = {
    "training": (
        *("transformers", "segformer", "segformer compiled", "segformer graphs", "segformer twins"),
        *("transformers compiled", "segformer every kernel"),
    ),
    "inference": (
        *("transformers", "segformer", "segformer graphs", "segformer compiled", "transformers compiled"),
        "segformer every kernel",
    ),
}
SIDES, PASSES = ("transformers", "segformer"), ("forward + backward", "forward")
SHORTEST = 0.1  # seconds of a timing on a GPU

Run = Callable[[], Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One row of a section; `measure` fills it."""

    section: str
    key: Row
    measure: Callable[[Row], None]

    @property
    def title(self) -> str:
        return " ".join(map(str, (self.section, *self.key.values())))


class Bench:
    """What was asked for and what is known so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.gpu = options.device != "cpu"
        self.deadline = math.inf if options.budget is None else time.monotonic() + options.budget
        where = pairs.environment(self.device) | {"python": sys.version.split()[0], "driver": _driver()}
        with suppress(ModuleNotFoundError):
            where["triton"] = version("triton")
        self.results: Row = {"environment": where, "options": vars(options), "headline": [], "left_out": []}
        self.results |= {section: [] for section in SECTIONS}

    def late(self, seconds: float = 0) -> bool:
        """Whether what takes so long would end after the budget."""
        return time.monotonic() + seconds >= self.deadline

    def save(self) -> None:
        if self.options.json:
            content = json.dumps(self.results, indent=2, default=str) + "\n"
            self.options.json.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.options.json, lambda file: file.write(content.encode()))

    def run(self, cell: Cell) -> None:
        if self.late():
            self.results["left_out"].append(cell.title)
        else:
            row = dict(cell.key)
            self.results[cell.section].append(row)
            begun = time.monotonic()
            try:
                cell.measure(row)
            except Exception as error:  # of memory, a compiler, a driver: the other cells have a right to theirs
                row["error"] = told(error)
                if cell.section == "checks" and not isinstance(error, torch.OutOfMemoryError):
                    row.setdefault("found", []).append(judged("it raised an error", math.nan, 0.0))
            row["cell s"] = time.monotonic() - begun
            self.save()
            kernels.enable(True)
            torch._dynamo.reset()
            with suppress(RuntimeError):  # of a device that answers nothing any more
                self.release()
        self.save()

    def release(self) -> None:
        if self.gpu:
            gc.collect()
            torch.cuda.empty_cache()

    # -- time and memory

    def timed(self, run: Run, steps: int = 1, wait: bool = False) -> float:
        """Seconds a step; wait: each begins when the device has done the last."""
        if not self.gpu:
            start = time.perf_counter()
            for _ in range(steps):
                run()
            return (time.perf_counter() - start) / steps
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        before.record()
        for _ in range(steps):
            run()
            if wait:
                torch.cuda.synchronize()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after) / 1e3 / steps

    def alone(self, build: Callable[[], Run], figures: Row, captures: bool) -> tuple[Run, Any]:
        """Builds a variant, warms it up and measures its memory; the call and what it gave.

        captures: building it captures a graph, whose memory no later call asks for.
        """
        self.release()
        if self.gpu:
            torch.mm(*torch.ones(2, 8, 8, device=self.device, dtype=torch.bfloat16))  # cuBLAS keeps a workspace
            torch.cuda.synchronize()
            held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run = build()
        run()
        if self.gpu:
            torch.cuda.synchronize()
        figures["first call s"] = time.perf_counter() - start
        if self.gpu and not captures:
            self.release()  # of what compilation and the choice of algorithms took
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):  # a compiled graph is captured in the second call
            found = run()
        if self.gpu:
            torch.cuda.synchronize()
            figures["peak MiB"] = (torch.cuda.max_memory_allocated() - held) / pairs.MIB
            figures["reserved MiB"] = (torch.cuda.max_memory_reserved() - reserved) / pairs.MIB
        return run, found

    def side_by_side(
        self,
        row: Row,
        builders: Mapping[str, Callable[[], Run]],
        wait: bool = False,
        calls: int = 1,
        captures: Sequence[str] = (),
        observe: Callable[[Any], Row] = lambda found: {},
    ) -> dict[str, Run]:
        """Fills row["variants"]; ratios are to the first variant. calls: what one run makes of them.

        Returns the runs, still warm.
        """
        variants: dict[str, Row] = row.setdefault("variants", {})
        runs, steps, longest, base = {}, {}, 0.0, next(iter(builders))
        for name, build in builders.items():
            figures = variants.setdefault(name, {})
            try:
                if self.late(longest if "compiled" in name or "graphs" in name else 0):
                    raise TimeoutError("left out, the budget is spent or would be")
                runs[name], found = self.alone(build, figures, name in captures)
                figures |= observe(found)
                del found
                step = min(self.timed(runs[name], wait=wait) for _ in range(2))
                figures["ms"] = spread([1e3 * step / calls])  # what is known if the run is cut off before the rounds
                longest = max(longest, figures["first call s"])
                if base in runs:
                    figures["ratio"] = spread([variants[base]["ms"]["median"] / figures["ms"]["median"]])
                steps[name] = self.options.steps or (min(1000, math.ceil(SHORTEST / step)) if self.gpu else 1)
            except Exception as error:
                figures["error"] = told(error)
                runs.pop(name, None)
            self.save()
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for lap in range(self.options.rounds):
            if self.late() and lap >= 3:
                break
            for name in [*runs]:
                try:
                    seconds[name].append(self.timed(runs[name], steps[name], wait) / calls)
                except Exception as error:
                    variants[name]["error"] = told(error)
                    del runs[name]
                    self.release()
        for name in runs:
            variants[name]["ms"] = spread([1e3 * value for value in seconds[name]])
            variants[name]["ratio"] = pairs.ratio(seconds[base], seconds[name]) if base in runs else None
        return runs

    @property
    def ceilings(self) -> tuple[float, float] | None:
        """Bytes and operations a second, where they were measured."""
        for row in self.results["roofline"]:
            if "error" not in row:
                return 1e9 * row["copy GB/s"]["median"], 1e12 * row["bf16 matmul TFLOP/s"]["median"]
        return None


def defaults(options: argparse.Namespace, size: int) -> tuple[int, int]:
    """Classes, and the batch of a training step: ADE20K's and Cityscapes'."""
    return options.classes or (150 if size < 1024 else 19), options.batch or (16 if size < 1024 else 4)


def wanted(bench: Bench, task: str) -> list[str]:
    """Variants that were asked for and that this device can run."""
    compiles = bench.options.compile
    graphs = bench.gpu and (compiles or task == "inference")
    barred = (() if compiles else ("compiled",)) + (() if graphs else ("graphs",))
    names = VARIANTS_OF[task]
    return [name for name in names if name in (bench.options.variants or names) and not name.endswith(barred)]


@functools.lru_cache(maxsize=1)
def networks(model: str, classes: int) -> tuple[nn.Module, nn.Module]:
    """Theirs and ours on the CPU, of the same weights, to be copied."""
    return pairs.networks(model, classes, "cpu")


@functools.lru_cache(maxsize=2)
def scenes(batch: int, size: int, classes: int) -> tuple[Tensor, Tensor]:
    """Smooth random images (B, 3, size, size) and blocks of labels (B, size, size), some of them 255; both uint8."""
    generator = torch.Generator().manual_seed(7)
    coarse = max(2, size // 16)
    noise = torch.rand(batch, 3, coarse, coarse, generator=generator)
    blocks = torch.randint(0, classes, (batch, 1, coarse, coarse), generator=generator)
    blocks[torch.rand(blocks.shape, generator=generator) < 0.05] = 255
    images = F.interpolate(noise, size=(size, size), mode="bicubic").mul(255).clamp(0, 255).byte()
    labels = F.interpolate(blocks.float(), size=(size, size), mode="nearest")[:, 0].byte()
    return images, labels


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _driver() -> str | None:
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    return None


def judged(what: str, value: float | None, bound: float | None) -> Row:
    return {
        "check": what,
        "value": value,
        "bound": bound,
        "passed": None if value is None or bound is None else value <= bound,
    }
