"""The kernels of the GPU benchmark, checked against their twins and timed against PyTorch's operations."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from gpu_bench import TINY, Bench, Row, Run, defaults, judged, scenes
from torch import Tensor
from torch.utils._pytree import tree_leaves

from segformer import bilinear, kernels
from segformer.config import VARIANTS
from segformer.losses import pixel_cross_entropy

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
