"""The networks of the GPU benchmark: checked, timed in training and inference, looked into."""

import copy
import functools
import itertools
import math
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pairs
import torch
import torch.nn.functional as F
from gpu_bench import SIDES, Bench, Row, Run, defaults, judged, networks, scenes, spread, wanted
from gpu_report import ours
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from segformer import kernels
from segformer.checkpoints import to_disk
from segformer.config import VARIANTS
from segformer.inference import Protocol, normalized, segment
from segformer.losses import segmentation_loss
from segformer.model import SegformerForSemanticSegmentation
from segformer.pixels import MEAN, STD, normalize


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
        with torch.autocast(device, torch.bfloat16), every(variant):
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

        def found() -> Tensor:
            with every(variant):
                return segment(network, images)

        return found
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


def likeness(task: str, variants: Row, name: str) -> Row:
    """Whether what was timed came to what the first variant came to: bf16, dropout, and steps of its own apart."""
    if task == "training":
        first = next(iter(variants.values())).get("loss", math.nan)
        return judged(f"{name}, loss of a step, relative difference", abs(variants[name]["loss"] / first - 1), 0.2)
    differs = 1 - variants[name]["labels as the first variant's"]
    return judged(f"{name}, label map, share of pixels that differ", differs, 0.1)


def every(variant: str) -> AbstractContextManager[None]:
    """Kernels for tensors of any size: what the sizes from which on they are called cost and save."""
    return kernels.recording() if variant.endswith("every kernel") else nullcontext()


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
    row["found"] = [likeness(task, row["variants"], name) for name in runs if name.startswith("segformer")]
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


class Traffic(TorchDispatchMode):
    """Bytes in and out of every operation that is no view, and how many there are."""

    bytes = operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if "upsample" not in name:  # one kernel, though there is a recipe for it
            with self:  # in inference mode nobody has taken apart what is made of others: dropout that drops nothing
                found = func.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        found = func(*args, **(kwargs or {}))
        aliases = [value.alias_info for value in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        if not view and name not in ("aten::_unsafe_view", "aten::_reshape_alias") and "empty" not in name:
            self.operations += 1
            inputs = () if name.startswith("aten::new_") else (args, kwargs)  # they give a type, and are not read
            for leaf in tree_leaves((inputs, found)):
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
