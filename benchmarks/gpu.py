"""PYTHONPATH=. python benchmarks/gpu.py --json gpu.json

The GPU benchmark of record, against transformers: checks, training, inference, forms of the decode head, kernels. It
needs torch, triton, transformers and this package. The JSON is written anew after every cell and variant, so that a
run that is killed keeps what it measured; what fails is a row's "error", and the run goes on. Exits with 1 only where
numbers are wrong, or a check of them failed to run, never because of time. --budget SECONDS starts nothing new once
they have passed, and nothing to be compiled that would outlast them.

Time: the variants of a cell run in turn in every round, each for at least 0.1 s; medians over rounds, ratios within
rounds, CUDA events around the work. At batch 1 the next image waits for the last one's label map (latency). "first
call s" holds the compilation. Kernels are timed as CUDA graphs over rotating inputs, which no cache holds.
Memory: what a variant adds to the device from its second call on, inputs, weights, gradients and optimiser state
included; a graph's capture counts. Of the pools of "graphs" only the reserved figure tells what they keep.
Inputs: transformers is given what favours it, normalised float pixels and int64 labels in training, constants on the
device in inference, where its compiled form spans images to label map. Ours starts from uint8 and compiles the network.
Its eager optimiser is AdamW as it comes, its compiled form is the default mode's (at batch 1 reduce-overhead); ours is
the fused AdamW everywhere.
Roofline: bytes are those in and out of every operation of one eager step that is no view, over the measured bandwidth
of copies. A fused implementation moves less, so this is the share of the *eager* traffic and may pass 1. FLOP are the
eager forward's by torch's counter, in training three times that: its count of depth-wise backward is too high.
Floor of a kernel: each input, output, and gradient of either moved once. Where backward follows later, inputs have to
be read a second time, which the floor forgives nobody.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from gpu_bench import PASSES, TINY, VARIANTS_OF, Bench, Cell, defaults
from gpu_kernels import check_op, ops, time_op
from gpu_networks import check_network, profile, roofline, time_decode, time_network
from gpu_report import headline, report, wrong
from tqdm import tqdm

from segformer.config import VARIANTS


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
    sys.exit(1 if wrong(bench.results) else 0)


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
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected at least 1")
    options.models = sorted(options.models)
    return options


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


def network_cells(bench: Bench, model: str, size: int) -> Iterator[Cell]:
    options = bench.options
    classes, batch = defaults(options, size)
    batches = {"training": [batch], "inference": options.inference_batches}
    for task in ("training", "inference"):
        for batch in batches[task] if task in options.only else ():
            key = {"model": model, "size": size, "classes": classes, "batch": batch}
            yield Cell(task, key, functools.partial(time_network, bench, task))


if __name__ == "__main__":
    main()
