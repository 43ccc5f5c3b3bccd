"""What both benchmarks share: two networks of the same weights, runs side by side, and what they cost.

Machines are noisy, so nothing is compared across time: each round runs every variant once, a ratio is taken within the
round, and the median over rounds is reported with its spread.
"""

import argparse
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from segformer.config import VARIANTS
from segformer.data.toy import ToyScenes
from segformer.files import write_atomically
from segformer.model import SegformerForSemanticSegmentation

MIB = 2**20


def arguments(description: str, models: Sequence[str], batches: Sequence[int], rounds: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=models)
    parser.add_argument("--batch", nargs="+", type=int, default=batches)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args()


def networks(variant: str, classes: int, device: str, **fields: Any) -> tuple[nn.Module, nn.Module]:
    """(transformers' network with SDPA and its own initial weights, ours from the folder it saved), in eval mode."""
    import transformers

    torch.manual_seed(0)
    config = transformers.SegformerConfig(**VARIANTS[variant], num_labels=classes, **fields)
    theirs = transformers.SegformerForSemanticSegmentation(config).eval()
    for name, tensor in theirs.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)  # so that what is folded is not trivial
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs.to(device), SegformerForSemanticSegmentation.from_pretrained(folder).to(device)


def images(count: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Rendered street scenes: (B, 3, size, size) uint8 and their labels (B, size, size)."""
    import cv2

    pictures, masks = [], []
    for index in range(count):
        image, mask = ToyScenes(count, seed=7)[index]
        pictures.append(torch.from_numpy(cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)))
        masks.append(torch.from_numpy(cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST)))
    return torch.stack(pictures).permute(0, 3, 1, 2).contiguous().to(device), torch.stack(masks).to(device)


def interleave(variants: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for lap in tqdm(range(rounds + 1), leave=False):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if lap:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(base: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times faster `other` is, within rounds."""
    pairs = [b / o for b, o in zip(base, other, strict=True)]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}


def compared(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The columns of a comparison: both medians and the ratio."""
    theirs, ours = seconds["transformers"], seconds["segformer"]
    return {
        "transformers ms": 1e3 * statistics.median(theirs),
        "segformer ms": 1e3 * statistics.median(ours),
        "ratio": ratio(theirs, ours),
    }


def peak_mib(run: Callable[[], object], device: str) -> float | None:
    """Most memory above what was held before; None where the system does not tell (Linux and CUDA do)."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    try:
        _trim()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _resident("VmRSS")
        run()
        return (_resident("VmHWM") - before) / 1024
    except OSError:
        return None


def saved_mib(run: Callable[[], object], network: nn.Module) -> float:
    """Bytes that a forward pass keeps for backward, parameters apart."""
    kept = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # an address freed and given again would be counted once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values()) / MIB


@contextmanager
def precision(name: str, device: str):
    with torch.autocast(device, torch.bfloat16, enabled=name == "bf16"):
        yield


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on."""
    with suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else _processor(),
        "threads": torch.get_num_threads(),
        "commit": locals().get("commit"),
        **{package: version(package) for package in ("torch", "transformers")},
        "malloc": os.environ.get("MALLOC_MMAP_MAX_"),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of rows that share their keys."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row.values())) + " |" for row in rows)])


def publish(title: str, sections: Mapping[str, Sequence[Mapping[str, Any]]], options: argparse.Namespace) -> None:
    """Prints the tables and writes the JSON."""
    where = environment(options.device)
    print(f"\n# {title}\n\n" + ", ".join(f"{key} {value}" for key, value in where.items() if value is not None))
    for heading, rows in sections.items():
        print(f"\n{heading}\n\n{table(rows)}")
    if options.json:
        content = json.dumps({"environment": where, "options": vars(options), **sections}, indent=2, default=str) + "\n"
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.json, lambda file: file.write(content.encode()))
        print(f"\nwrote {options.json}")


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"**{value['median']:.2f}** [{value['min']:.2f}, {value['max']:.2f}]"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
    return "-" if value is None else str(value)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"no {field}")
    return int(found[1])


def _trim() -> None:
    """Gives freed memory back, so that what one variant freed does not hide what the next one takes."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _processor() -> str:
    with suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor()
