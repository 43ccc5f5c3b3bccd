"""python benchmarks/training_loop.py --root ../shared/data/camvid --json training_loop.json

Networks: ours and transformers' in one bare training loop on CamVid, from the same initial weights, with the same
batches, optimiser and schedule. Trainer: the loop of train.py against a bare one, on batches that lie in memory, with
the same network, optimiser and draws. Both in bfloat16, and both by turns, step by step: a noisy machine is noisy for
either.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pairs
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from segformer import kinds, loggers, resume, states, stops
from segformer.config import VARIANTS
from segformer.data.datamodule import SegmentationData
from segformer.data.dataset import collate
from segformer.data.sampler import TrainingBatches, mix
from segformer.metrics import Scores, confusion_matrix
from segformer.model import SegformerForSemanticSegmentation
from segformer.networks import build_segformer
from segformer.optim import warmup_poly
from segformer.pixels import normalize
from segformer.task import SegmentationTask

CONFIGS = Path(__file__).parent.parent / "configs"
BOTH = ("transformers", "segformer")
bf16 = partial(pairs.precision, "bf16", "cpu")
HELD = 8  # batches in memory, taken in turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", nargs="+", choices=("networks", "trainer"), default=["networks", "trainer"])
    parser.add_argument("--root", required=True, help="CamVid's folder")
    parser.add_argument("--model", choices=VARIANTS, default="b0")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the networks")
    parser.add_argument("--batch", type=int, help="instead of the configuration's")
    parser.add_argument("--crop", type=int, nargs=2, help="instead of the configuration's")
    parser.add_argument("--json", type=Path, help="where to write the figures, after each seed")
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    sections: dict[str, Any] = {}
    for figures in (figures for name in options.section for figures in SECTIONS[name](options)):
        sections |= figures
        pairs.publish("Training loop", sections, options)


# -- our network and transformers' in the same loop


def networks(options: Any) -> Iterator[dict[str, Any]]:
    """The figures until now, after each seed."""
    config = composed("camvid", options.root, options)
    data = SegmentationData(**config["data"]).opened("train", "val")
    rows: list[dict[str, Any]] = []
    shares: list[float] = []
    for seed in options.seeds:
        row, (theirs, ours) = trained(seed, data, config, options)
        rows.append(row)
        shares += [o / t for t, o in zip(theirs, ours, strict=True)]
        yield {"Networks": rows, "Networks, over seeds": [summary(rows, shares)]}


def trained(seed: int, data: SegmentationData, config: Any, options: Any) -> tuple[dict[str, Any], list[list[float]]]:
    """The figures of one seed, and the seconds of each step of both."""
    both = initial(seed, options.model, data.classes.names)
    steps = [stepper(partial(loss, network), *optimizer(network, config)) for network in both]
    seconds: list[list[float]] = [[], []]
    torch.manual_seed(seed)
    read = batches(data, seed)
    bar = tqdm(range(options.steps), desc=f"seed {seed}", mininterval=10)
    for step in bar:
        batch = next(read)
        pixels, labels = normalize(batch["image"]).contiguous(), batch["mask"].long()
        for turn in (0, 1) if step % 2 else (1, 0):
            start = time.perf_counter()
            steps[turn](pixels, labels)
            seconds[turn].append(time.perf_counter() - start)
        bar.set_postfix(share=f"{pairs.ratio(seconds[1], seconds[0])['median']:.2f}", refresh=False)
    saved = [pairs.saved_mib(partial(loss, network, pixels, labels), network) for network in both]
    scores = [miou(network, data) for network in both]
    return {
        "seed": seed,
        **{f"{name} mIoU": score for name, score in zip(BOTH, scores, strict=True)},
        "difference": scores[1] - scores[0],
        **{f"{name} s": sum(spent) for name, spent in zip(BOTH, seconds, strict=True)},
        "share of the time": pairs.ratio(seconds[1], seconds[0]),
        **{f"{name} saved MiB": size for name, size in zip(BOTH, saved, strict=True)},
        "share of the bytes": saved[1] / saved[0],
    }, seconds


def summary(rows: Sequence[Mapping[str, Any]], shares: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds; the time of all steps."""
    figures: dict[str, Any] = {"seeds": len(rows)}
    for name in (*(f"{name} mIoU" for name in BOTH), "difference"):
        values = [row[name] for row in rows]
        figures[name] = statistics.mean(values)
        figures[f"{name}, deviation"] = statistics.stdev(values) if len(values) > 1 else None
    figures["share of the time"] = {"median": statistics.median(shares), "min": min(shares), "max": max(shares)}
    return figures | {"share of the bytes": statistics.median(row["share of the bytes"] for row in rows)}


def initial(seed: int, variant: str, names: Sequence[str]) -> tuple[nn.Module, nn.Module]:
    """transformers' network with its own initial weights, and ours from the folder it saved."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.SegformerConfig(**VARIANTS[variant], id2label=dict(enumerate(names)))
    theirs = transformers.SegformerForSemanticSegmentation(config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = SegformerForSemanticSegmentation.from_pretrained(folder)
    assert same(theirs.eval(), ours.eval()), "one function before training"
    return theirs.train(), ours.train()


@torch.inference_mode()
def same(theirs: nn.Module, ours: nn.Module) -> bool:
    """Equal logits, up to rounding, equal epsilons, and dropout of the same rates and kind."""

    def fields(network: nn.Module) -> list[list[float]]:
        modules = list(network.modules())
        epsilons = [module.eps for module in modules if isinstance(module, nn.LayerNorm)]
        return [sorted(epsilons), sorted(module.p for module in modules if isinstance(module, nn.Dropout) and module.p)]

    pixels = torch.randn(1, 3, 64, 64)
    expected = theirs(pixels).logits
    close = torch.allclose(ours(pixels).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    return close and fields(theirs) == fields(ours)


def optimizer(network: nn.Module, config: Any) -> tuple[AdamW, LambdaLR]:
    """All parameters in one group: the rules of `segformer.optim` know our names only."""
    optim, steps = config["optim"], config["trainer"]["max_steps"]
    settings = {name: optim[name] for name in ("lr", "betas", "weight_decay")}
    adamw = AdamW(network.parameters(), **settings, fused=True)
    return adamw, LambdaLR(adamw, warmup_poly(steps, optim["warmup_steps"], optim["warmup_ratio"], optim["power"]))


def loss(network: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    with bf16():
        value: Tensor = network(pixels, labels=labels).loss
        return value


@torch.inference_mode()
def miou(network: nn.Module, data: SegmentationData) -> float:
    """Of the validation images at their own size, in float32."""
    matrix = torch.zeros(len(data.classes), len(data.classes), dtype=torch.int64)
    network.eval()
    for index in range(len(data.datasets["val"])):
        sample = data.datasets["val"][index]
        image, mask = sample["image"][None], sample["mask"][None]
        logits = F.interpolate(network(normalize(image)).logits, size=mask.shape[-2:], mode="bilinear")
        matrix += confusion_matrix(logits.argmax(1), mask, len(matrix))
    return Scores.from_confusion(matrix).miou


# -- the trainer's loop and a bare one


def trainer(options: Any) -> Iterator[dict[str, Any]]:
    rows = []
    for name, root in (("toy", "null"), ("camvid", options.root)):
        rows.append(against_bare(name, composed(name, root, options)))
        yield {"Trainer": rows}


def against_bare(name: str, config: Any) -> dict[str, Any]:
    data = SegmentationData(**config["data"]).opened("train")
    steps, held = config["trainer"]["max_steps"], list(islice(batches(data, config["seed"]), HELD))
    with tempfile.TemporaryDirectory() as folder:
        task, loop = as_in_train(config, data, Path(folder))
        turns = Turns(copy.deepcopy(task))
        loop.callbacks.append(turns)
        loop.fit(task, DataLoader([held[step % HELD] for step in range(steps)], batch_size=None))
    both = zip(task.model.state_dict().values(), turns.twin.model.state_dict().values(), strict=True)
    times = {"bare": turns.bare[1:], "trainer": turns.trainer[1:]}  # the first step warms up
    return {
        "data": name,
        "crop": " x ".join(map(str, data.crop_size)),
        "batch": data.batch_size,
        "steps": len(times["bare"]),
        **{f"{name} ms": 1e3 * statistics.median(seconds) for name, seconds in times.items()},
        "ratio": pairs.ratio(times["trainer"], times["bare"]),
        "largest difference of a weight": max(float((a - b).abs().max()) for a, b in both),
    }


def as_in_train(config: Any, data: SegmentationData, run: Path) -> tuple[SegmentationTask, pl.Trainer]:
    """Task and trainer as train.py builds them, but for the validation, which is no part of a step."""
    seed = pl.seed_everything(config["seed"], verbose=False)
    steering, options = states.Steering.split(config["trainer"])
    options |= {"accelerator": "cpu", "precision": "bf16-mixed", "limit_val_batches": 0}
    model, _ = build_segformer(**config["model"], **data.network)
    common = config["optim"], options["max_steps"], seed, resume.record(model, config)
    task = SegmentationTask(model, data.protocol, *common)
    best = states.BestCheckpoint(run, task.MONITOR)
    last = states.LastCheckpoint(run, steering, config)
    watching = kinds.kind("segmentation").watchers(run, config, data)
    own: dict[str, Any] = {
        "callbacks": [*watching, stops.Stops(last), *steering.callbacks(task.MONITOR), best, last],
        "logger": [loggers.MetricsFile(run)],
        "plugins": [states.AtomicCheckpointIO(steering.keep_last)],
    }
    loop = pl.Trainer(**options, **own, **resume.LOOP)
    resume.share_batches(loop, data)
    return task, loop


class Turns(pl.Callback):
    """Takes a bare step of a twin before each step of the trainer, whose time is all that lies between two of them."""

    def __init__(self, twin: SegmentationTask) -> None:
        self.bare: list[float] = []
        self.trainer: list[float] = []
        self.twin, made = twin, twin.configure_optimizers()
        twin.model.train()
        self.step = stepper(self.forward, made["optimizer"], made["lr_scheduler"]["scheduler"])

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        with bf16():
            return self.twin.loss_of(batch)

    def on_train_batch_start(self, trainer: pl.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        start = time.perf_counter()
        if self.bare:
            self.trainer.append(start - self.end)
        torch.manual_seed(mix(task.seed, trainer.global_step, 0, 0))  # the task is about to do so, too
        self.step(batch)
        self.end = time.perf_counter()
        self.bare.append(self.end - start)

    def on_train_end(self, trainer: pl.Trainer, task: Any) -> None:
        self.bare.pop()  # the trainer's last step also ends the run


SECTIONS: dict[str, Callable[[Any], Iterator[dict[str, Any]]]] = {"networks": networks, "trainer": trainer}


# -- what both share


def composed(data: str, root: str, options: Any) -> Any:
    """The configuration as train.py composes it, with the warm-up shortened as the run is."""
    overrides = [f"model={options.model}", f"data={data}", f"data.root={root}", "data.workers=0"]
    overrides += [f"data.batch_size={options.batch}"] if options.batch else []
    overrides += [f"data.crop_size={options.crop}"] if options.crop else []
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("train", overrides), resolve=True)
    optim, run = config["optim"], config["trainer"]
    optim["warmup_steps"] = max(1, optim["warmup_steps"] * options.steps // run["max_steps"])
    run["max_steps"] = options.steps
    return config


def batches(data: SegmentationData, seed: int) -> Iterator[dict[str, Tensor]]:
    """Those of a run with this seed, endless."""
    dataset = data.datasets["train"]
    order = data.sampling.order(seed, np.zeros((len(dataset), 1)))
    drawn = TrainingBatches(order, data.batch_size, seed, start_step=0)
    yield from DataLoader(dataset, batch_sampler=drawn, collate_fn=collate)


def stepper(forward: Callable[..., Tensor], adamw: AdamW, schedule: LambdaLR) -> Callable[..., None]:
    """A bare optimiser step on a batch, whose loss `forward` tells."""

    def run(*batch: Any) -> None:
        adamw.zero_grad()
        forward(*batch).backward()
        adamw.step()
        schedule.step()

    return run


if __name__ == "__main__":
    main()
