"""PYTHONPATH=. python benchmarks/gpu.py --json gpu.json

The GPU benchmark of record, against transformers: checks, training, inference, forms of the decode head, kernels. It
needs torch, triton, transformers and this package. The JSON is written anew after every cell and variant, so that a
run that is killed keeps what it measured; what fails is a row's "error", and the run goes on. Exits with 1 only where
numbers are wrong, never because of time. --budget SECONDS starts nothing new once they have passed.

Time: the variants of a cell run in turn in every round, each for at least 0.1 s; medians over rounds, ratios within
rounds, CUDA events around the work. At batch 1 the next image waits for the last one's label map (latency). "first
call s" holds the compilation. Kernels are timed as CUDA graphs over rotating inputs, which no cache holds.
Memory: what a variant adds to the device from its second call on, inputs, weights, gradients and optimiser state
included; a graph's capture counts. Of the pools of "graphs" only the reserved figure tells what they keep.
Inputs: transformers is given what favours it, normalised float pixels and int64 labels in training, constants on the
device in inference, where its compiled form spans images to label map. Ours starts from uint8 and compiles the network.
Roofline: bytes are those in and out of every operation of one eager step that is no view, over the measured bandwidth
of copies. A fused implementation moves less, so this is the share of the *eager* traffic and may pass 1. FLOP are the
eager forward's by torch's counter, in training three times that: its count of depth-wise backward is too high.
Floor of a kernel: each input, output, and gradient of either moved once. Where backward follows later, inputs have to
be read a second time, which the floor forgives nobody.
"""

import argparse
import copy
import functools
import gc
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pairs
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from segformer import bilinear, kernels
from segformer.checkpoints import to_disk
from segformer.config import VARIANTS
from segformer.files import write_atomically
from segformer.inference import Protocol, normalized, segment
from segformer.losses import pixel_cross_entropy, segmentation_loss
from segformer.model import SegformerForSemanticSegmentation
from segformer.pixels import MEAN, STD, normalize

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
        "transformers compiled",
    ),
    "inference": ("transformers", "segformer", "segformer graphs", "segformer compiled", "transformers compiled"),
}
AIMS = {"training": {"b0": 3.0, "b2": 2.5, "b5": 2.0}, "memory": 0.35, "latency": 4.0, "throughput": 3.0, "loss": 1.5}
SIDES, PASSES = ("transformers", "segformer"), ("forward + backward", "forward")
SHORTEST = 0.1  # seconds of a timing on a GPU

Run = Callable[[], Any]
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if options.tiny:  # the table that both sides' configurations are made from
        VARIANTS.update(dict.fromkeys(options.models, TINY))
    bench = Bench(options)
    bench.save()
    progress = tqdm(list(cells(bench)))
    for cell in progress:
        progress.set_description(cell.title)
        bench.run(cell)
    bench.results["headline"] = headline(bench.results, options.sizes[0])
    bench.save()
    print(report(bench.results))
    sys.exit(1 if wrong(bench.results["checks"]) else 0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("checks", "training", "inference", "kernels", "decode")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=["b0", "b2", "b5"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024], help="the first one is the headline's")
    parser.add_argument("--classes", type=int, help="150, from 1024 on 19")
    parser.add_argument("--batch", type=int, help="of a training step: 16, from 1024 on 4")
    parser.add_argument("--inference-batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--variants", nargs="+", choices=sorted(set().union(*VARIANTS_OF.values())))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, help="that one timing covers; left out, as many as fill 0.1 s on a GPU")
    parser.add_argument("--budget", type=float, help="seconds after which nothing new is started")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tiny", action="store_true", help="a network for tests, whatever its name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args(arguments)
    options.models = sorted(options.models)
    return options


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

    def late(self) -> bool:
        return time.monotonic() >= self.deadline

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
            row["cell s"] = time.monotonic() - begun
            torch._dynamo.reset()
            kernels.enable(True)
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
        runs, steps = {}, {}
        for name, build in builders.items():
            figures = variants.setdefault(name, {})
            try:
                if self.late():
                    raise TimeoutError("left out, the budget is spent")
                runs[name], found = self.alone(build, figures, name in captures)
                figures |= observe(found)
                del found
                step = min(self.timed(runs[name], wait=wait) for _ in range(2))
                figures["alone ms"] = 1e3 * step / calls
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
        base = next(iter(builders))
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


def cells(bench: Bench) -> Iterator[Cell]:
    """In the order of their importance."""
    options = bench.options
    first, *others = options.sizes
    if "checks" in options.only:
        for model in options.models:
            yield Cell("checks", {"of": model}, functools.partial(check_network, bench, model))
        for op in ops(bench):
            yield Cell("checks", {"of": op.name}, functools.partial(check_op, bench, op))
    yield Cell("roofline", {}, functools.partial(roofline, bench))
    for model in options.models:
        yield from network_cells(bench, model, first)
        if model == options.models[0] and "kernels" in options.only:
            for op in ops(bench):
                for name in PASSES if op.learns else PASSES[1:]:
                    yield Cell("kernels", {"kernel": op.name, "pass": name}, functools.partial(time_op, bench, op))
    for task in ("training", "inference"):
        if task in options.only:  # before the larger images, which what a profiler leaves behind concerns less
            yield Cell("profiles", {"task": task, "size": first}, functools.partial(profile, bench, task, first))
    if "decode" in options.only:
        heads = {
            str((VARIANTS[m]["hidden_sizes"], VARIANTS[m]["decoder_hidden_size"])): m for m in options.models[::-1]
        }
        for model, name in itertools.product(sorted(heads.values()), PASSES):
            key = {"model": model, "pass": name, "size": first}
            yield Cell("decode", key, functools.partial(time_decode, bench))
    for size, model in itertools.product(others, options.models):
        yield from network_cells(bench, model, size)


def defaults(options: argparse.Namespace, size: int) -> tuple[int, int]:
    """Classes, and the batch of a training step: ADE20K's and Cityscapes'."""
    return options.classes or (150 if size < 1024 else 19), options.batch or (16 if size < 1024 else 4)


def network_cells(bench: Bench, model: str, size: int) -> Iterator[Cell]:
    options = bench.options
    classes, batch = defaults(options, size)
    batches = {"training": [batch], "inference": options.inference_batches}
    for task in ("training", "inference"):
        for batch in batches[task] if task in options.only else ():
            key = {"model": model, "size": size, "classes": classes, "batch": batch}
            yield Cell(task, key, functools.partial(time_network, bench, task))


# -- inputs


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


# -- checks


def check_network(bench: Bench, model: str, row: Row) -> None:
    """Ours against theirs at the headline's size, float32 without TF32."""
    size, device = bench.options.sizes[0], bench.device
    classes, _ = defaults(bench.options, size)
    theirs, ours = drawn(model, classes, device)
    images, labels = (tensor.to(device) for tensor in scenes(2, size, classes))
    found = row["found"] = []

    def logits(network: nn.Module) -> Tensor:
        with torch.no_grad():
            return network(normalized(network, images)).logits.float()

    def label_map(network: nn.Module) -> Tensor:
        full = F.interpolate(logits(network), size=images.shape[-2:], mode="bilinear", align_corners=False)
        return full.argmax(dim=1)

    exact, wanted = logits(theirs), label_map(theirs)
    error = ((logits(ours) - exact).abs().max() / exact.std()).item()
    found.append(judged("logits, largest difference in standard deviations", error, 1e-4))
    agree = (segment(ours, images) == wanted).double().mean().item()
    found.append(judged("label map, share of pixels that differ", 1 - agree, 1e-4))
    for name, network in (("transformers", theirs), ("segformer", ours)):
        half = copy.deepcopy(network).bfloat16()
        share = (label_map(half) != wanted).double().mean().item()
        found.append(judged(f"label map of {name} in bf16, share that differs", share, None))
    steps = [gradients(network, normalize(images), labels) for network in (theirs, ours)]
    (their_loss, expected), (our_loss, gradient) = steps
    found.append(judged("training loss, relative difference", abs(our_loss / their_loss - 1), 1e-5))
    # Biases ahead of BatchNorm and of keys have a gradient of zero, found as 1e-8 of the whole one's norm: a tensor is
    # measured by its own norm, or 1e-4 of the whole where that is more. An activation that rounding takes across the
    # bend of ReLU changes its gradient by all of it: logits that differ by 5e-6 came with 5e-4 here. One weight that is
    # off by a hundredth makes 6e-2.
    whole = math.hypot(*(tensor.norm().item() for tensor in expected.values()))
    worst, name = max(
        ((gradient[name] - tensor).norm().item() / max(tensor.norm().item(), 1e-4 * whole), name)
        for name, tensor in expected.items()
    )
    found.append(judged("gradients, largest relative difference of a tensor", worst, 5e-3) | {"at": name})


def drawn(model: str, classes: int, device: str) -> tuple[nn.Module, nn.Module]:
    """Theirs and ours without dropout, of weights that let what an image shows, and a mistake, through to the logits.

    In an untrained network, whose weights are all small, a block does next to nothing.
    """
    theirs, _ = pairs.networks(model, classes, "cpu", drop_path_rate=0.0, classifier_dropout_prob=0.0)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for name, tensor in theirs.named_parameters():
            if tensor.dim() > 1:
                tensor.normal_(0, tensor[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                tensor.normal_(1, 0.2)
            else:
                tensor.normal_(0, 0.1)
        theirs.save_pretrained(folder)
        return theirs.to(device), SegformerForSemanticSegmentation.from_pretrained(folder).to(device)


def gradients(network: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradient of every parameter by its name in files; takes the weights' place."""
    loss = network.train()(pixels, labels=labels.long()).loss
    loss.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.grad)
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(network, "frozen"):
            values = {name: tensor.cpu() for name, tensor in to_disk(network.state_dict()).items()}
        else:
            network.save_pretrained(folder)
            values = load_file(Path(folder) / "model.safetensors")
    return loss.item(), {n: t.double() for n, t in values.items() if "running" not in n and "tracked" not in n}


def judged(what: str, value: float | None, bound: float | None) -> Row:
    return {
        "check": what,
        "value": value,
        "bound": bound,
        "passed": None if value is None or bound is None else value <= bound,
    }


def wrong(rows: Sequence[Row]) -> list[Row]:
    """What was measured and is out of its bound; what raised was not measured."""
    return [found for row in rows for found in row.get("found", ()) if found["passed"] is False]


# -- training and inference


def training_step(bench: Bench, variant: str, row: Row) -> Run:
    """Forward, loss, backward, AdamW, in bf16 autocast with drop-path and dropout."""
    device, own = bench.device, variant.startswith("segformer")
    network = copy.deepcopy(networks(row["model"], row["classes"])[own]).to(device).train()
    images, labels = (tensor.to(device) for tensor in scenes(row["batch"], row["size"], row["classes"]))
    optimizer = torch.optim.AdamW(network.parameters(), lr=6e-5, fused=True if variant != "transformers" else None)
    if variant.endswith(("compiled", "graphs")):
        network.compile(mode="reduce-overhead" if variant.endswith("graphs") else None)
    if not own:
        images, labels = normalize(images), labels.long()

    def run() -> Tensor:
        kernels.enable(variant != "segformer twins")
        if variant.endswith("graphs"):
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device, torch.bfloat16):
            if own:  # as `task.SegmentationTask` has it
                loss = segmentation_loss(network(normalized(network, images)).logits, labels)
            else:
                loss = network(images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


def inference_step(bench: Bench, variant: str, row: Row) -> Run:
    """uint8 images on the device in, label map out, weights in bf16."""
    device, own = bench.device, variant.startswith("segformer")
    network = copy.deepcopy(networks(row["model"], row["classes"])[own]).bfloat16().to(device)
    images = scenes(row["batch"], row["size"], row["classes"])[0].to(device)
    if variant == "segformer graphs":
        from segformer.inference import graphed

        replay = graphed(network, images, Protocol())
        return lambda: replay(images)
    if own:
        if variant.endswith("compiled"):
            network.compile()
        return lambda: segment(network, images)
    shift, scale = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (MEAN, STD))

    def peer(images: Tensor) -> Tensor:
        logits = network(((images.float() - shift) / scale).bfloat16()).logits
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False).argmax(dim=1)

    if variant.endswith("compiled"):
        peer = torch.compile(peer, mode="reduce-overhead" if row["batch"] == 1 else None)

    def run() -> Tensor:
        if variant.endswith("compiled"):
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return peer(images)

    return run


STEPS = {"training": training_step, "inference": inference_step}


def time_network(bench: Bench, task: str, row: Row) -> None:
    first: list[Tensor] = []

    def observe(found: Tensor) -> Row:
        if task == "training":
            return {"loss": found.item()}
        if not first:
            first.append(found.cpu())
        return {"labels as the first variant's": (found.cpu() == first[0]).double().mean().item()}

    captures = ["segformer graphs"] if task == "inference" else []
    builders = {name: functools.partial(STEPS[task], bench, name, row) for name in wanted(bench, task)}
    latency = task == "inference" and row["batch"] == 1
    runs = bench.side_by_side(row, builders, wait=latency, captures=captures, observe=observe)
    for name in runs:
        row["variants"][name]["images/s"] = 1e3 * row["batch"] / row["variants"][name]["ms"]["median"]
    kernels.enable(True)
    for own, side in enumerate(SIDES):
        if side in runs:
            with Traffic() as traffic:
                runs[side]()
            flop = flops(networks(row["model"], row["classes"])[own], row["size"])
            row[f"{side} eager GB"] = traffic.bytes / 1e9
            row[f"{side} GFLOP"] = flop * row["batch"] * (3 if task == "training" else 1) / 1e9
    for name in runs:
        figures, side = row["variants"][name], name.split()[0]
        seconds = figures["ms"]["median"] / 1e3
        if bench.ceilings and f"{side} GFLOP" in row:
            bandwidth, rate = bench.ceilings
            figures["share of memory roofline"] = 1e9 * row[f"{side} eager GB"] / bandwidth / seconds
            figures["share of matmul rate"] = 1e9 * row[f"{side} GFLOP"] / rate / seconds


def wanted(bench: Bench, task: str) -> list[str]:
    """Variants that were asked for and that this device can run."""
    compiles = bench.options.compile
    graphs = bench.gpu and (compiles or task == "inference")
    barred = (() if compiles else ("compiled",)) + (() if graphs else ("graphs",))
    names = VARIANTS_OF[task]
    return [name for name in names if name in (bench.options.variants or names) and not name.endswith(barred)]


class Traffic(TorchDispatchMode):
    """Bytes in and out of every operation that is no view."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        aliases = [value.alias_info for value in func._schema.returns]
        name = func._schema.name
        view = any(alias is not None and not alias.is_write for alias in aliases)
        if not view and name not in ("aten::_unsafe_view", "aten::_reshape_alias") and "empty" not in name:
            for leaf in tree_leaves((args, kwargs, found)):
                if isinstance(leaf, Tensor):  # what is expanded lies there once
                    self.bytes += min(leaf.numel() * leaf.element_size(), leaf.untyped_storage().nbytes())
        return found


@functools.lru_cache(maxsize=8)
def flops(network: nn.Module, size: int) -> int:
    """Of one image's forward pass; nothing is computed."""
    network = copy.deepcopy(network).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


def roofline(bench: Bench, row: Row) -> None:
    """Rotating buffers of random numbers: nothing fits a cache, and zeros are faster to move and to multiply."""
    count, side = (2**28, 8192) if bench.gpu else (2**22, 256)  # 512 MiB in bf16
    buffers = [torch.randn(count, device=bench.device, dtype=torch.bfloat16) for _ in range(4)]
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    turns = itertools.cycle(range(4))
    runs: dict[str, tuple[Run, float]] = {
        "copy GB/s": (lambda: buffers[(turn := next(turns)) - 1].copy_(buffers[turn]), 4e-9 * count),
        "bf16 matmul TFLOP/s": (lambda: a @ b, 2e-12 * side**3),
    }
    for name, (run, amount) in runs.items():
        bench.timed(run, 4)
        row[name] = spread([amount / bench.timed(run, 20 if bench.gpu else 1) for _ in range(bench.options.rounds)])


# -- parts


Inputs = Callable[[torch.dtype], tuple[list[Tensor], list[Tensor]]]


@dataclass(frozen=True)
class Op:
    """What a kernel does. inputs: made anew in a type, those that learn and others. plain: in PyTorch's operations."""

    name: str
    module: str
    inputs: Inputs
    plain: Callable[..., Any]
    call: Callable[..., Any]  # of the kernel and the inputs
    other: Callable[..., Any] | None = None  # the package's own twin, where it is not `plain`
    learns: bool = True

    @property
    def twin(self) -> Callable[..., Any]:
        return self.other or self.plain

    def kernel(self, *tensors: Tensor) -> Any:
        return self.call(getattr(import_module(f"segformer.kernels.{self.module}"), self.name), *tensors)


def ops(bench: Bench) -> list[Op]:
    """The kernels at the shapes of B2's first stage, decode head and loss."""
    size, device = bench.options.sizes[0], bench.device
    classes, batch = defaults(bench.options, size)
    sizes = TINY if bench.options.tiny else VARIANTS["b2"]
    side, width, decoder = size // 4, sizes["hidden_sizes"][0], sizes["decoder_hidden_size"]

    def shaped(*shapes: tuple[int, ...]) -> Inputs:
        return lambda dtype: ([torch.randn(shape, device=device).to(dtype) for shape in shapes], [])

    def maps(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        logits = torch.randn(batch, side, side, classes, device=device).mul(3).to(dtype)
        return [logits.permute(0, 3, 1, 2)], [scenes(batch, size, classes)[1].to(device)]

    def larger(x: Tensor, target: int) -> Tensor:
        return F.interpolate(x, size=(target, target), mode="bilinear", align_corners=False)

    def entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(larger(logits, size).float(), labels.long(), ignore_index=255)

    def largest(logits: Tensor, labels: Tensor) -> Tensor:
        return larger(logits, size).argmax(dim=1)

    def convolved(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = tokens.view(batch, side, side, -1).permute(0, 3, 1, 2)
        return F.gelu(F.conv2d(x, weight, bias, padding=1, groups=len(bias)).permute(0, 2, 3, 1)).flatten(1, 2)

    def summed(fine: Tensor, *coarse: Tensor) -> Tensor:
        return fine + sum(larger(x.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1) for x in coarse)

    def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, 1e-5)

    def added(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return x + branch, normed(x + branch, weight, bias)

    rows, one = (batch, side, side, width), (width,)
    hidden = shaped((batch, side**2, 4 * width), (4 * width, 1, 3, 3), (4 * width,))
    pyramid = shaped(*((batch, math.ceil(side / n), math.ceil(side / n), decoder) for n in (1, 2, 4, 8)))
    single, double = shaped(rows, one, one), shaped(rows, rows, one, one)
    loss = Op("upsample_cross_entropy", "cross_entropy", maps, entropy, lambda k, *t: k(*t, 255, "valid", None, 0.0))
    label_map = Op("upsample_argmax", "argmax", maps, largest, lambda k, logits, _: k(logits, size, size))
    return [
        replace(loss, other=pixel_cross_entropy),
        replace(label_map, other=lambda logits, _: bilinear.upsample_argmax(logits, size, size), learns=False),
        Op("depthwise_gelu", "depthwise", hidden, convolved, lambda k, *t: k(*t, side, side)),
        Op("upsample_sum", "upsample_sum", pyramid, summed, lambda k, fine, *coarse: k(fine, list(coarse), False)),
        Op("layer_norm", "layer_norm", single, normed, lambda k, *t: k(*t, 1e-5, t[0].dtype)),
        Op("add_layer_norm", "layer_norm", double, added, lambda k, x, y, *t: k(x, y, None, *t, 1e-5, x.dtype)),
    ]


def called(form: Callable[..., Any], learning: Sequence[Tensor], rest: Sequence[Tensor], grads: Any) -> list[Tensor]:
    """The outputs; given their gradients, also the gradients of what learns."""
    if grads is None:
        with torch.no_grad():
            return tree_leaves(form(*learning, *rest))
    outputs = tree_leaves(form(*learning, *rest))
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, learning, grads)]


def arguments_of(op: Op, dtype: torch.dtype, learn: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    learning, rest = op.inputs(dtype)
    if not learn:
        return learning, rest, None
    with torch.no_grad():
        outputs = tree_leaves(op.twin(*learning, *rest))
    grads = [torch.randn_like(output) if output.dim() else torch.ones_like(output) for output in outputs]
    return [tensor.requires_grad_() for tensor in learning], rest, grads


def check_op(bench: Bench, op: Op, row: Row) -> None:
    """A kernel against the package's twin; bf16 against what the twin makes of the same numbers in float32."""
    row["found"] = []
    for dtype, bound in ((torch.float32, 2e-4), (torch.bfloat16, 2e-2)):
        learning, rest, grads = arguments_of(op, dtype, op.learns)
        if not kernels.usable(learning[0]):
            row["found"].append(judged("no kernels on this device", None, None))
            return
        found = called(op.kernel, learning, rest, grads)
        kernels.enable(False)
        exact = [tensor.detach().float().requires_grad_(op.learns) for tensor in learning]
        wide = grads and [grad.float() for grad in grads]
        expected = called(op.twin, exact, rest, wide)
        kernels.enable(True)
        kind = str(dtype).removeprefix("torch.")
        if not op.learns:
            share = (found[0] != expected[0]).double().mean().item()
            row["found"].append(judged(f"{kind}, share that differs", share, 1e-4 if bound < 1e-3 else 1e-3))
            continue
        for index, (value, reference) in enumerate(zip(found, expected, strict=True)):
            error = (value.double() - reference.double()).norm() / reference.double().norm()
            what = f"output {index}" if index < len(grads or ()) else f"gradient {index - len(grads or ())}"
            row["found"].append(judged(f"{kind}, {what}, relative difference", error.item(), bound))
        del found, exact, expected


def time_op(bench: Bench, op: Op, row: Row) -> None:
    learn = row["pass"] != "forward"
    sample = arguments_of(op, torch.bfloat16, learn)
    results = called(op.twin, *sample)
    labels = sample[1] if op.learns else ()  # of the label map's they tell the size alone
    used = [*sample[0], *labels, *(sample[2] or ()), *results]
    size = sum(tensor.numel() * tensor.element_size() for tensor in used if tensor.dim())
    row["MB"] = size / 1e6
    row["floor us"] = floor = 1e6 * size / bench.ceilings[0] if bench.ceilings else None
    sets = [sample] + [arguments_of(op, torch.bfloat16, learn) for _ in range(min(3, 2**28 // size))]
    del results, used
    calls = 8 if bench.gpu else 1

    def build(form: Callable[..., Any], on: bool) -> Run:
        def run() -> None:
            kernels.enable(on)
            for index in range(calls):
                called(form, *sets[index % len(sets)])

        return captured(run) if bench.gpu else run

    forms = {"plain": (op.plain, False)}
    if kernels.usable(sample[0][0]):
        forms["kernel"] = (op.kernel, True)
    if op.other:
        forms["twin"] = (op.other, False)
    if bench.options.compile:
        forms["plain compiled"] = (torch.compile(op.plain), False)
    bench.side_by_side(row, {name: functools.partial(build, *form) for name, form in forms.items()}, calls=calls)
    for figures in row["variants"].values():
        figures.pop("peak MiB", None), figures.pop("reserved MiB", None)  # of a graph of many calls
        if "ms" in figures:
            figures["us"] = {name: 1e3 * value for name, value in figures.pop("ms").items()}
            figures["times the floor"] = figures["us"]["median"] / floor if floor else None


def captured(run: Run) -> Run:
    """As a CUDA graph, so that launching does not show."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def time_decode(bench: Bench, row: Row) -> None:
    """The decode head alone: bf16 autocast and BatchNorm in training, bf16 weights in inference."""
    model, size, learn = row["model"], row["size"], row["pass"] != "forward"
    classes, batch = defaults(bench.options, size)
    row["batch"], widths = batch, VARIANTS[model]["hidden_sizes"]
    grids = [size // stride for stride in (4, 8, 16, 32)]
    maps = [
        torch.randn(batch, grid, grid, width, device=bench.device, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        for grid, width in zip(grids, widths, strict=True)
    ]
    if learn:
        maps = [x.requires_grad_() for x in maps]

    def build(merged: bool, compiled: bool) -> Run:
        head = copy.deepcopy(networks(model, classes)[1].decode_head).to(bench.device).train(learn)
        head.merged = merged
        if not learn:
            head.bfloat16()
        if compiled:
            head.compile()

        def run() -> None:
            with torch.autocast(bench.device, torch.bfloat16, enabled=learn), torch.set_grad_enabled(learn):
                logits = head(maps)
            if learn:
                torch.autograd.grad(logits, [*maps, *head.parameters()], torch.ones_like(logits))

        return run

    forms = {"merged": (True, False), "literal": (False, False)}
    if bench.options.compile:
        forms |= {"merged compiled": (True, True), "literal compiled": (False, True)}
    bench.side_by_side(row, {name: functools.partial(build, *form) for name, form in forms.items()})


def profile(bench: Bench, task: str, size: int, row: Row) -> None:
    """What takes the time of one step of the largest model that was measured."""
    rows = [r for r in bench.results[task] if r["size"] == size and ours(r)]
    if not rows:
        raise LookupError("nothing was measured that could be profiled")
    measured = rows[-1]
    row |= {name: measured[name] for name in ("model", "batch", "classes")}
    activity = torch.profiler.ProfilerActivity.CUDA if bench.gpu else torch.profiler.ProfilerActivity.CPU
    cost = "self_device_time_total" if bench.gpu else "self_cpu_time_total"
    for variant in ("transformers", ours(measured)):
        run = STEPS[task](bench, variant, row)
        for _ in range(4):
            run()
        bench.timed(run)
        with torch.profiler.profile(activities=[activity]) as recorded:
            bench.timed(run)
        events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, cost))
        total = sum(getattr(event, cost) for event in events) or 1
        row[variant] = [
            {
                "name": event.key[:80],
                "calls": event.count,
                "ms": getattr(event, cost) / 1e3,
                "share": getattr(event, cost) / total,
            }
            for event in events[:10]
        ]
        del run, recorded, events
        bench.release()


# -- results


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ours(row: Row) -> str | None:
    """The fastest of our variants in a row of training or inference; None unless transformers' was timed, too."""
    timed = {name: figures["ms"]["median"] for name, figures in row.get("variants", {}).items() if "ms" in figures}
    own = [name for name in timed if name.startswith("segformer")]
    return min(own, key=lambda name: timed[name]) if own and "transformers" in timed else None


def headline(results: Row, size: int) -> list[Row]:
    """Aims, at the first size, and what was measured; whether they are met is a question for a GPU at 512."""
    judge = size == 512 and results["options"]["device"] != "cpu"
    lines: list[Row] = []

    def line(aim: str, bound: float, value: Any, variant: str | None, least: bool = True) -> None:
        middle = value["median"] if isinstance(value, dict) else value
        met = None if middle is None or not judge else "met" if (middle >= bound) == least else "not"
        sign = ">=" if least else "<="
        lines.append({"aim": aim, "bound": f"{sign} {bound}", "measured": value, "variant": variant, "met": met})

    def found(section: str, model: str) -> list[Row]:
        return [row for row in results[section] if row["model"] == model and row["size"] == size and ours(row)]

    for model, bound in AIMS["training"].items():
        row = next(iter(found("training", model)), {"variants": {}})
        name = ours(row)
        own, theirs = (row["variants"].get(key, {}) for key in (name, "transformers"))
        line(f"training {model}, times transformers", bound, own.get("ratio"), name)
        share = own["peak MiB"] / theirs["peak MiB"] if "peak MiB" in own else None
        line(f"training {model}, peak memory, share of transformers'", AIMS["memory"], share, name, least=False)
    for model in AIMS["training"]:
        rows = found("inference", model)
        name = "segformer graphs"
        ratios = [row["variants"].get(name, {}).get("ratio") for row in rows if row["batch"] == 1]
        line(f"inference {model}, batch 1, times transformers", AIMS["latency"], next(iter(ratios), None), name)
        speeds = [
            (figures["images/s"], f"{name}, batch {row['batch']}")
            for row in rows
            for name, figures in row["variants"].items()
            if "images/s" in figures
        ]
        best, theirs = (max([s for s in speeds if s[1].startswith(side)], default=None) for side in SIDES[::-1])
        share = best[0] / theirs[0] if best and theirs else None
        note = f"{best[1]} to {theirs[1]}" if best and theirs else None
        line(f"inference {model}, best batch, times transformers", AIMS["throughput"], share, note)
    for learn in PASSES:
        key = {"kernel": "upsample_cross_entropy", "pass": learn}
        rows = [row for row in results["kernels"] if row.items() >= key.items()]
        times = rows[0].get("variants", {}).get("kernel", {}).get("times the floor") if rows else None
        line(f"loss kernel, {learn}, times its byte floor", AIMS["loss"], times, None, least=False)
    return lines


COLUMNS = (
    *("first call s", "ms", "us", "images/s", "ratio", "peak MiB", "reserved MiB", "share of memory roofline"),
    *("share of matmul rate", "times the floor", "labels as the first variant's", "error"),
)


def report(results: Row) -> str:
    """Markdown: what was run where, then a table a section."""
    lines = ["# GPU benchmark", ", ".join(f"{key} {value}" for key, value in results["environment"].items() if value)]
    tables: dict[str, list[Row]] = {"Roofline": results["roofline"]}
    tables["Checks"] = [
        {"of": row["of"], **dict.fromkeys(("check", "value", "bound", "passed", "error")), **found}
        for row in results["checks"]
        for found in [*row.get("found", ()), *([{"error": row["error"]}] if "error" in row else ())]
    ]
    for row in tables["Checks"]:
        row.pop("at", None)
    for section in ("training", "inference", "kernels", "decode"):
        flat = [
            {key: value for key, value in row.items() if not isinstance(value, dict)} | {"variant": name, **figures}
            for row in results[section]
            for name, figures in (row.get("variants") or {"-": {}}).items()
        ]
        first = ("model", "kernel", "pass", "size", "batch", "floor us", "variant")
        columns = [name for name in (*first, *COLUMNS) if any(row.get(name) is not None for row in flat)]
        tables[section.capitalize()] = [{name: row.get(name) for name in columns} for row in flat]
    for row in results["profiles"]:
        if "error" in row:
            lines.append(f"No profile of {row['task']}: {row['error']}")
        for variant, top in row.items():
            if isinstance(top, list):
                tables[f"Top kernels, {row['task']}, {row['model']}, batch {row['batch']}, {variant}"] = top
    tables["Aims"] = results["headline"]
    lines += [f"## {heading}\n\n{pairs.table(rows)}" for heading, rows in tables.items() if rows]
    if results["left_out"]:
        lines.append("Left out, the budget was spent: " + "; ".join(results["left_out"]))
    return "\n\n".join(lines)


def _driver() -> str | None:
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    return None


if __name__ == "__main__":
    main()
