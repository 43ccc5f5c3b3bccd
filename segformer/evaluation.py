"""Scores a checkpoint, or label maps that lie in files, on the validation split of a dataset."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image
from tqdm import tqdm

from segformer.checkpoints import model_name, training_config, weights_sha256
from segformer.corruptions import Plan, markdown, table
from segformer.counts import Counted, Counts, short_names
from segformer.data.archives import Member
from segformer.data.datamodule import SegmentationData
from segformer.data.dataset import SegmentationDataset
from segformer.data.samples import Elsewhere, Samples, Source
from segformer.errors import SharedError, UserError, build
from segformer.files import absolute, new_folder, write_atomically, write_json
from segformer.inference import segment
from segformer.labels import Classes, UndeclaredValues
from segformer.launch import STOPPED, process
from segformer.metrics import Tally, iou_of, mean_of
from segformer.model import SegformerForSemanticSegmentation
from segformer.page import SHOWN, Example
from segformer.pixels import Readable
from segformer.report import build_report, published, write_report
from segformer.submit import Predictions, Writer
from segformer.task import SegmentationTask
from segformer.visualize import as_rgb

THREADS = 2  # that count while the network works on the next image
AHEAD = 8  # label maps that wait to be counted: more would fill the memory


class Job:
    """One call of evaluate.py: what is scored, what the scored data is called, where the report goes.

    trained: the configuration of the checkpoint, empty where it has none.

    Raises:
        UserError: keys that do not go together, or no checkpoint.
    """

    def __init__(self, config: Mapping[str, Any], own_data: str | None) -> None:
        source, predictions = config["checkpoint"] or None, config["predictions"] or None
        if source is None and predictions is None:
            raise SharedError(
                "'checkpoint' is not set: add checkpoint=PATH to score a network, or predictions=FOLDER and data=NAME "
                "to score label maps that lie in files"
            )
        if source is not None and predictions is not None:
            raise SharedError(f"checkpoint={source} and predictions={predictions} are two things: score one of them")
        if predictions and (own_data is None or config["submission"] or "corruptions" in config):
            raise SharedError(
                "predictions=FOLDER needs data=NAME, and no submission or corruptions, which are made with a network"
            )
        limited = config["trainer"].get("limit_val_batches", 1.0) != 1.0
        if predictions and (limited or {*config["protocol"].values()} != {"dataset"}):
            raise SharedError(
                "predictions=FOLDER are scored as they are, all of them: leave out protocol.* and limit_val_batches"
            )
        self.source = None if source is None else absolute(source)
        self.trained = {} if self.source is None else training_config(self.source, needed=own_data is None)
        self.data = own_data or self.trained["choices"]["data"]
        name = "predictions" if self.source is None else model_name(self.source, self.trained)
        self.output = Path(config["output"], f"{name}_{self.data}")
        self.precision = config["trainer"]["precision"]
        if self.precision == "checkpoint":
            self.precision = self.trained.get("trainer", {}).get("precision", "32-true")
        self.facts = {"checkpoint": self.source, "predictions": predictions, "data": self.data}

    def network(self, classes: Classes) -> SegformerForSemanticSegmentation:
        """The checkpoint, which has to be of these classes."""
        assert self.source is not None
        model = SegformerForSemanticSegmentation.from_pretrained(self.source)
        classes.require(model.config.id2label.values(), self.source)
        self.facts |= {"weights_sha256": weights_sha256(model), "precision": self.precision}
        return model

    def report(self, counting: "Counting", task: SegmentationTask | None = None) -> float | None:
        """Writes and shows what was counted, on the first process; the mIoU, None where nothing is labelled."""
        data, counts, whole = counting.data, counting.counts, counting.data.images("val")
        scored = len(counts.tally)
        if not scored:
            raise SharedError("no image was scored, expected at least one: look at trainer.limit_val_batches")
        if process() == 0:
            self.folder = counting.folder or new_folder(self.output)
            if counting.writer is not None:
                if scored != whole:
                    told = f"{scored} of {whole} label maps were written: a submission needs all of them"
                    print(f"warning: {told}", file=sys.stderr)
                print(counting.writer.finish() if scored == whole else counting.writer.folder)
        if not counting.labelled:
            return None  # the label maps are what was asked for
        facts = {**self.facts, "split_images": whole, "seconds": counting.seconds}
        if task is not None and whole in (None, scored):
            facts["published"] = published(data.published, task.model.config, task.protocol, data.protocol)
        report = build_report(counts, data.classes, task.protocol if task else None, facts)
        if process() == 0:
            write_report(self.folder, report, counts, counting.gallery, data.classes)
        miou: float | None = report["miou"]
        return miou

    def robustness(self, results: Iterable[tuple[str, int, float]], clean: float | None) -> None:
        """Writes corruptions.json and corruptions.md anew after each score, then shows the latter.

        Raises:
            SharedError: there is no clean score to compare with.
        """
        if clean is None:
            raise SharedError("no pixel is labelled, so corruptions have no score to lower: give images with masks")
        found: dict[tuple[str, int], float] = {}
        for corruption, severity, miou in results:
            found[corruption, severity] = miou
            if process() != 0:
                continue
            print(f"{corruption} {severity}: mIoU {100 * miou:.2f}", file=sys.stderr)
            rows = table(clean, found)
            told = {"version": 1, "clean": clean, "rows": [row._asdict() for row in rows]}
            write_json(self.folder / "corruptions.json", told)
            text = markdown(clean, rows)
            write_atomically(self.folder / "corruptions.md", methodcaller("write", text.encode()))
        if process() == 0:
            print(text, self.folder / "corruptions.json", self.folder / "report.json", sep="\n")


class Counting(pl.Callback):
    """Counts what is predicted of the validation split, image by image, and keeps a few images to be shown.

    After validation every process has the counts of all. submission: kind of the label maps (`submit.Writer`) that
    every process writes of its own images into a new folder below `output`; None = none.
    """

    def __init__(self, data: SegmentationData, submission: str | None = None, output: Path = Path()) -> None:
        self.data, self.output = data, output
        self.counts = Counts(data.classes)
        self.gallery: list[Example] = []
        self.done = False  # then what is validated further does not concern it
        self.seconds = 0.0
        self.folder: Path | None = None  # of the submission and, beside it, the report
        self.names: dict[str, str] = {}  # of the samples, and what a report calls them; a stream tells none beforehand
        self.instances: dict[str, Readable] = {}
        self.source = data.datasets["val"].source if isinstance(data.datasets["val"], SegmentationDataset) else None
        self.labelled = self.source is None or self.source.labelled
        if self.source is not None:
            self.names = short_names(self.source.name(index) for index in range(len(self.source)))
            self.instances = dict(_instance_maps(self.source, data.instances))
        elif submission:
            raise SharedError(f"submission={submission} needs the names of all samples: take data.val.streaming=false")
        # made here, so that what it refuses is told before anything is scored
        self.writer = Writer(submission, output, list(self.names), data.classes) if submission else None
        self._pending: deque[tuple[str, Future[Counted]]] = deque()

    def on_validation_start(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if self.done:
            return
        if self.writer is not None:
            self.folder = Path(trainer.strategy.broadcast(new_folder(self.output) if trainer.is_global_zero else ""))
            self.writer.folder = self.folder / "submission"
        self._pool, self._start = ThreadPoolExecutor(THREADS), time.monotonic()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, task: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self.done:
            return
        for name, prediction, label in zip(batch["name"], outputs.cpu(), batch["mask"].cpu(), strict=True):
            self._pending.append((name, self._pool.submit(self._count, name, prediction.numpy(), label.numpy())))
        self._take(AHEAD)

    def on_validation_end(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if self.done:
            return
        assert isinstance(task, SegmentationTask)
        self._take(0)
        self._pool.shutdown()
        self.counts = _gathered(self.counts)
        if self.source is None:
            self.counts.tally = self.counts.tally.renamed(short_names(self.counts.tally.names))
        self.seconds = time.monotonic() - self._start
        scored, whole, limit = len(self.counts.tally), self.data.images("val"), trainer.limit_val_batches
        if isinstance(limit, float) and limit == 1 and whole not in (None, scored):  # the number 1 means one batch
            raise RuntimeError(f"{scored} of {whole} images were scored")
        # on every process, as a network that is spread over them answers to all or to none
        with trainer.precision_plugin.val_step_context(), task.uncompiled():
            self.show(lambda _, image: _label_map(task, image))

    def show(self, predict: Callable[[str, np.ndarray], np.ndarray]) -> None:
        """Fills the gallery; predict: (sample, image) -> label map, once more. A stream is not read twice for it."""
        chosen = _chosen(self.counts.tally)
        numbers = {short: index for index, short in enumerate(self.names.values())}
        for name, (rank, miou) in chosen.items() if self.source is not None else ():
            sample = self.data.datasets["val"][numbers[name]]
            image = sample["image"].permute(1, 2, 0).numpy()
            self.gallery.append(
                Example(
                    name=name,
                    miou=miou,
                    rank=rank,
                    image=Image.fromarray(as_rgb(image)),
                    label=sample["mask"].numpy(),
                    prediction=predict(sample["name"], image),
                )
            )

    def add(self, name: str, counted: Counted) -> None:
        self.counts.add(self.names.get(name, name), counted)

    def _count(self, name: str, prediction: np.ndarray, label: np.ndarray) -> Counted:
        if self.writer is not None:
            self.writer.write(name, prediction)
        return self.counts.count(prediction, label, self.instances.get(name))

    def _take(self, left: int) -> None:
        """Adds what is counted until no more than `left` images wait."""
        while len(self._pending) > left:
            name, counted = self._pending.popleft()
            self.add(name, counted.result())


def read(data: SegmentationData, folder: str, values: str) -> Counting:
    """Counts the label maps of a folder or zip file, whoever made them; see `submit.Predictions`."""
    counting, start = Counting(data), time.monotonic()
    source, counts = counting.source, counting.counts
    if source is None:
        raise UserError(f"predictions={folder} needs the names of all samples: take data.val.streaming=false")
    found = Predictions(folder, list(counting.names), data.classes, values, data.max_pixels)

    def counted(index: int) -> tuple[str, Counted]:
        name = source.name(index)
        try:
            label = data.encoder.whole(source.mask(index), source.mask_name(index))
        except UndeclaredValues as error:  # which does not know its file
            raise data.encoder.explained({source.mask_name(index): error}) from error
        return name, counts.count(found.read(name, label.shape), label, counting.instances.get(name))

    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(counted, range(len(source)))
        often = 0.1 if sys.stderr.isatty() else 15
        for name, one in tqdm(results, total=len(source), desc="score", unit="image", mininterval=often):
            counting.add(name, one)
    counting.seconds = time.monotonic() - start
    counting.show(lambda name, image: found.read(name, image.shape[:2]))
    return counting


def plan(config: Mapping[str, Any], data: SegmentationData) -> Plan | None:
    """What the config section `corruptions` asks for, if there is one; raises UserError where it cannot be had."""
    if "corruptions" not in config:
        return None
    dataset = data.datasets["val"]
    if not isinstance(dataset, SegmentationDataset):
        raise SharedError("corruptions need samples by number: take data.val.streaming=false")
    if not dataset.source.labelled:
        raise SharedError("corruptions lower a score, but data.val has images without masks: leave out corruptions")
    if data.bands != 3:
        raise SharedError(f"data.bands is {data.bands}, but only images of 3 bands can be corrupted: leave them out")
    return build("corruptions", Plan, config["corruptions"])


def validate(trainer: pl.Trainer, task: SegmentationTask, data: SegmentationData) -> None:
    """Lightning's, but a signal to stop is told and ends the command with the exit code of one."""
    try:
        trainer.validate(task, data, verbose=False)
    except SIGTERMException:  # it would exit with 0
        print("stopped by a signal before all images were scored", file=sys.stderr)
        sys.exit(STOPPED)


def corrupted(
    trainer: pl.Trainer, task: SegmentationTask, data: SegmentationData, plan: Plan
) -> Iterator[tuple[str, int, float]]:
    """Corruption, severity and the mIoU under it, as one after the other is measured."""
    clean = data.datasets["val"]
    assert isinstance(clean, SegmentationDataset)
    for source in plan.sources(clean.source):
        data.datasets["val"] = SegmentationDataset(source, clean.encoder)
        validate(trainer, task, data)
        yield source.corruption, source.severity, task.scores.miou
    data.datasets["val"] = clean


def _label_map(task: SegmentationTask, image: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(task.device)
    found: np.ndarray = segment(task.model, pixels, task.protocol)[0].cpu().numpy()
    return found


def _gathered(counts: Counts) -> Counts:
    if not dist.is_initialized():
        return counts
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, counts)
    return counts.merged([part for rank, part in enumerate(parts) if rank != dist.get_rank()])


def _chosen(tally: Tally) -> dict[str, tuple[Literal["worst", "median", "best"], float]]:
    """The images of the lowest, the middle and the highest mIoU of their own: their rank and it."""
    scores = mean_of(iou_of(*tally.parts()))
    order = [int(index) for index in np.argsort(scores, kind="stable") if not np.isnan(scores[index])]
    each = min(SHOWN, -(-len(order) // 3))
    worst, rest = order[:each], order[each:]
    best, rest = rest[-each:] if rest else [], rest[:-each]
    middle = rest[max(0, (len(rest) - each) // 2) :][:each]
    ranks: Iterable[tuple[Literal["worst", "median", "best"], Sequence[int]]] = (
        ("worst", worst),
        ("median", middle),
        ("best", best[::-1]),
    )
    return {tally.names[index]: (rank, float(scores[index])) for rank, indices in ranks for index in indices}


def _instance_maps(source: Source, endings: Mapping[str, str]) -> Iterator[tuple[str, Readable]]:
    """The instance map beside the mask of each sample; none at all where one is missing, which is told."""
    found = []
    for index in range(len(source)) if endings and source.labelled else ():
        file = _beside(source, index, endings)
        if file is None:
            if process() == 0:
                mask = source.mask_name(index)
                print(f"warning: no instance map beside mask {mask}: iIoU is left out", file=sys.stderr)
            return
        found.append((source.name(index), file))
    yield from found


def _beside(source: Source, index: int, endings: Mapping[str, str]) -> Readable | None:
    """The file beside a mask, in a folder or an archive, that is called as it but for the end."""
    while isinstance(source, Elsewhere):
        source, index = source.at(index)
    mask = source.files[index][1] if isinstance(source, Samples) else None
    ending = next((ending for ending in endings if str(mask).endswith(ending)), None)
    if ending is None:
        return None
    if isinstance(mask, Member):
        name = mask.name.removesuffix(ending) + endings[ending]
        return Member(mask.archive, name) if mask.archive.is_file(name) else None
    file = Path(str(mask).removesuffix(ending) + endings[ending])
    return file if file.is_file() else None
