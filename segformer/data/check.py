"""Does this dataset keep its label contract? `check` looks at a part or all of it, `quick` before every training."""

import base64
import io
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image
from tqdm import tqdm

from segformer.data.contract import LEVELS, Evidence, Finding
from segformer.data.datamodule import SegmentationData
from segformer.data.findings import findings
from segformer.data.sampler import mix
from segformer.data.samples import Sample, Source, Stream
from segformer.data.statistics import Survey, label_of, spread, survey
from segformer.errors import SharedError, UserError
from segformer.files import new_folder, to_json, write_atomically
from segformer.labels import IGNORE, Classes, UndeclaredValues, distinct_colors, rgb
from segformer.launch import process
from segformer.visualize import as_rgb, overlay

SPLITS = ("train", "val")
TEMPLATES = Path(__file__).parent.parent / "templates"
SIDE = 360  # pixels of the longer side of a picture in the page
LEGEND = 8  # classes named beside one picture
VALUES = 300  # different raw values that are listed


@dataclass
class Report:
    """What was looked at and found. counts: per split (samples, K + 1) pixels of each class and of what is ignored."""

    findings: list[Finding]
    surveys: list[Survey]
    classes: Classes
    full: bool
    counts: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return any(found.level == "error" for found in self.findings)

    def facts(self) -> dict[str, Any]:
        """Every number, as plain values."""
        return {
            "full": self.full,
            "findings": [asdict(found) for found in self.findings],
            "splits": {one.split: self._split(one) for one in self.surveys},
            "classes": self._classes(),
        }

    def _split(self, found: Survey) -> dict[str, Any]:
        sizes = [record.size for record in found.records if record.size is not None]
        counts = self.counts[found.split].sum(axis=0)
        moments = found.moments() if self.full else None
        return {
            "samples": found.samples,
            "looked_at": len(found.records),
            "heights": _spread([size[0] for size in sizes]),
            "widths": _spread([size[1] for size in sizes]),
            "bands": sorted({len(record.sums) for record in found.records if record.sums}),
            "masks": dict(Counter(_kind(record.colors) for record in found.records if record.mask_size)),
            "values": self._values(found),
            "ignored": _share(counts[-1], counts.sum()),
            "mean": moments and moments[0],
            "std": moments and moments[1],
            "unreadable": {record.name: record.errors for record in found.records if record.errors},
        }

    def _values(self, found: Survey) -> list[dict[str, Any]]:
        """Raw values by their number, or the commonest ones of very many, and what they are declared as."""
        pixels, masks = Counter[tuple[bool, bool, int]](), Counter[tuple[bool, bool, int]]()
        for record in found.records:
            for value, count in record.values.items():
                pixels[record.colors, record.indices, value] += count
                masks[record.colors, record.indices, value] += 1
        listed = sorted(key for key, _ in pixels.most_common(VALUES))
        return [
            {
                "value": rgb(value) if colors else value,
                "pixels": pixels[colors, indices, value],
                "masks": masks[colors, indices, value],
                "means": self._meaning(colors, indices, value),
            }
            for colors, indices, value in listed
        ]

    def _meaning(self, colors: bool, indices: bool, value: int) -> str:
        """The name of the class, or that the value is ignored or undeclared."""
        understood = colors == (self.classes.of_colors and not indices)
        label = label_of(value, self.classes, indices) if understood else None
        return "undeclared" if label is None else "no label" if label == IGNORE else self.classes.names[label]

    def _classes(self) -> list[dict[str, Any]]:
        """A row for each class: its share of the labelled pixels and the masks that have it, split by split."""
        rows = []
        for place, name in enumerate(self.classes.names):
            row: dict[str, Any] = {"name": name, "color": self.classes.colors[place].tolist()}
            for split, counts in self.counts.items():
                pixels = int(counts[:, place].sum())
                share, masks = _share(pixels, counts[:, :-1].sum()), int((counts[:, place] > 0).sum())
                row[split] = {"pixels": pixels, "share": share, "masks": masks}
            rows.append(row)
        return rows

    def table(self) -> str:
        """The numbers and findings as plain text, for a terminal and for a log."""
        facts = self.facts()
        head = [["split", "samples", "looked at", "width", "height", "masks", "no label"]]
        for split, one in facts["splits"].items():
            masks = ", ".join(f"{count} of {kind}" for kind, count in one["masks"].items())
            sizes = [_range(one["widths"]), _range(one["heights"])]
            samples = "?" if one["samples"] is None else str(one["samples"])
            head.append([split, samples, str(one["looked_at"]), *sizes, masks or "-", _percent(one["ignored"])])
        rows = [["class", *(title for split in self.counts for title in (f"{split} pixels", f"{split} masks"))]]
        for row in facts["classes"]:
            cells = [(_percent(row[split]["share"]), str(row[split]["masks"])) for split in self.counts]
            rows.append([" ".join(row["name"].split()), *(cell for pair in cells for cell in pair)])
        moments = [
            f"{split}: data.mean={_rounded(one['mean'])} data.std={_rounded(one['std'])}"
            for split, one in facts["splits"].items()
            if one["mean"]
        ]
        tables = [*_aligned(head), "", *_aligned(rows), "", *moments] if self.surveys else []
        return "\n".join([*tables, *self.lines()])

    def lines(self) -> list[str]:
        """The findings, each with its fix below it, and how many there are."""
        told = []
        for found in self.findings:
            told.append(f"{found.level}: {found.sentence}")
            told += [f"  fix: {found.fix}"] if found.fix else []
        levels = Counter(found.level for found in self.findings)
        counts = [f"{levels[level]} {level}{'s' * (levels[level] != 1)}" for level in LEVELS]
        return [*told, ", ".join(counts)]


def check(data: SegmentationData, full: bool = False, samples: int = 200) -> Report:
    """Looks at `samples` of each split, or at all of them, with several processes; nothing that it finds ends it."""
    told, surveys, unopened = [], [], defaultdict[str, list[str]](list)
    for split in SPLITS:
        if data.specs[split] is None:  # a dataset to be scored only
            continue
        try:
            source = data.source(split)
            if isinstance(source, Source) and not source.labelled:
                told.append(_without_masks(data, split))
            only = None if full else samples
            base = data.transform.base_size
            surveys.append(survey(split, source, data.encoder, samples=only, images="decoded", base_size=base))
        except UserError as error:
            unopened[str(error)].append(f"data.{split}")
    told += [
        Finding("error", "unopened", f"{' and '.join(which)} cannot be opened: {error}")
        for error, which in unopened.items()
    ]
    told += findings(data.encoder, surveys, data.transform, _skippable(data))
    counts = {one.split: Evidence(data.encoder, [one]).counts for one in surveys}
    return Report(sorted(told, key=lambda one: LEVELS.index(one.level)), surveys, data.classes, full, counts)


def quick(data: SegmentationData, samples: int | None = None) -> SegmentationData:
    """Looks at the masks and at the sizes of the images of some samples of each opened split, in about a second.

    samples: of each split; None = `data.check`, and 0 looks at none. They are the same ones in every process and at
    every start. Warnings are printed by the first process. Returns the data.

    Raises:
        SharedError: the first error's sentence.
    """
    samples = data.check if samples is None else samples
    if not samples:
        return data
    surveys = []
    for split, dataset in data.datasets.items():
        source = dataset if isinstance(dataset, Stream) else dataset.source
        base = data.transform.base_size
        surveys.append(survey(split, source, data.encoder, samples=samples, base_size=base, processes=0, quiet=True))
    told = findings(data.encoder, surveys, data.transform, _skippable(data))
    errors = [found for found in told if found.level == "error"]
    if errors:
        more = f" ({len(errors) - 1} more: see them all by python -m segformer check)" if len(errors) > 1 else ""
        raise SharedError(f"{errors[0]}{more}")
    for found in told:
        if found.level == "warning" and not process():
            print(f"warning: {found}", file=sys.stderr)
    return data


def suggest(data: SegmentationData, full: bool = False, samples: int = 200) -> UserError:
    """Prints the raw values of masks whose classes nobody has named yet; the error says how they could be named."""
    only = None if full else samples
    surveys = [survey(split, data.source(split), None, samples=only, images="none") for split in SPLITS]
    records = [record for one in surveys for record in one.records if record.mask_size]
    colors = any(record.colors for record in records)
    pixels, masks, first = Counter[int](), Counter[int](), dict[int, str]()
    for record in records:
        for value, count in record.values.items():
            own = value * 0x010101 if colors and not record.colors else value  # a grey among the colours
            pixels[own] += count
            masks[own] += 1
            first.setdefault(own, record.mask_name)
    rows = [["colour" if colors else "value", "pixels", "masks", "first"]]
    for value in sorted(pixels)[:VALUES]:
        share = _percent(pixels[value] / pixels.total())
        rows.append([rgb(value) if colors else str(value), share, str(masks[value]), first[value]])
    print(*_aligned(rows), sep="\n")
    looked = f"the {len(records)} masks looked at hold {len(pixels)} {'colours' if colors else 'values'}"
    return UserError(f"'data.classes' is not set: {looked}; {_naming(sorted(pixels), colors)}")


def _naming(values: Sequence[int], colors: bool) -> str:
    """How masks of these values could be declared."""
    if set(values) <= {IGNORE}:
        return "there is nothing to name"
    if len(values) > 254:
        return "they are photographs or JPEG files: export the masks as PNG, or correct the pattern of masks"
    if colors:
        entries = ", ".join(f"class_{place}: {{color: {rgb(value)}}}" for place, value in enumerate(values))
        return f"name them by data.mask_values=colors 'data.classes={{{entries}}}'"
    meant = [value for value in values if value != IGNORE] if len(values) > 2 or values != [0, IGNORE] else list(values)
    if meant == list(range(len(meant))):
        return f"name them by 'data.classes=[{', '.join(f'class_{value}' for value in meant)}]'"
    if meant == list(range(1, len(meant) + 1)):
        names = ", ".join(f"class_{value}" for value in meant)
        return f"name them by 'data.classes=[{names}]' data.reduce_zero_label=true"
    entries = ", ".join(f"class_{place}: {{ids: [{value}]}}" for place, value in enumerate(meant))
    none = "" if IGNORE not in meant else " 'data.ignore=[]'"
    return f"name them by 'data.classes={{{entries}}}'{none}"


def write(report: Report, data: SegmentationData, name: str, output: str, shown: int = 8) -> Path:
    """Writes check.json and check.html into a new folder `output/name/timestamp`, which it returns."""
    folder = new_folder(Path(output, name))
    facts = {"data": name, **report.facts()}
    sheets = {one.split: _sheet(data, one.split, shown) for one in report.surveys}
    page = Environment(autoescape=True, loader=FileSystemLoader(TEMPLATES)).get_template("check.html")
    html = page.render(**facts, sheets=sheets, lines=report.lines())
    write_atomically(folder / "check.html", lambda file: file.write(html.encode()))
    write_atomically(folder / "check.json", lambda file: file.write(to_json(facts).encode()))
    return folder


def _sheet(data: SegmentationData, split: str, shown: int) -> list[dict[str, Any]]:
    """Pictures of some samples: image, label and, of training samples, what the network is shown of them."""
    source = data.source(split)
    if isinstance(source, Stream):
        chosen = list(islice(source.shard(0, 1), shown))
        names = [sample.name for sample in chosen]
    else:
        places = spread(len(source), shown) if shown else []
        chosen = [Sample(source.name(place), partial(source.__getitem__, place)) for place in places]
        names = [source.mask_name(place) for place in places]
    pairs = tqdm([*zip(chosen, names, strict=True)], f"draw {split}", unit="sample", dynamic_ncols=True)
    return [_drawn(data, split, place, sample, mask_name) for place, (sample, mask_name) in enumerate(pairs)]


def _drawn(data: SegmentationData, split: str, place: int, sample: Sample, mask_name: str) -> dict[str, Any]:
    drawn: dict[str, Any] = {"name": sample.name, "mask_name": mask_name}
    try:
        image, raw = sample.read()
    except Exception as error:  # a source of the user's own raises what it likes
        return drawn | {"error": " ".join(str(error).split()) or type(error).__name__}
    drawn["image"] = _embedded(as_rgb(image))
    try:
        mask = data.encoder.whole(raw, mask_name)
    except UserError as error:  # shown as it is, each value in a colour
        what = "values that no class declares: " if isinstance(error, UndeclaredValues) else ""
        return drawn | {"label": _embedded(_raw_colors(raw)), "error": f"{what}{error}"}
    drawn |= {"label": _embedded(as_rgb(image), mask, data.classes), "legend": _legend(mask, data.classes)}
    if split == "train":
        crop, mask = data.transform(image, raw, mix(data.seed, place), partial(data.encoder.part, name=mask_name))
        drawn |= {"crop": _embedded(as_rgb(crop)), "crop_label": _embedded(as_rgb(crop), mask, data.classes)}
    return drawn


def _embedded(image: np.ndarray, mask: np.ndarray | None = None, classes: Classes | None = None) -> str:
    """A small JPEG as text for a page, of an image or of its label map over it."""
    factor = min(1.0, SIDE / max(image.shape[:2]))
    size = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
    image = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_AREA)
    if mask is not None and classes is not None:
        image = overlay(image, cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST), classes)
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, "JPEG", quality=85)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _raw_colors(raw: np.ndarray) -> np.ndarray:
    """A raw mask as it is, for where its values mean nothing: each value in a colour."""
    return raw if raw.ndim == 3 else np.insert(distinct_colors(255), 0, 0, axis=0)[raw.astype(np.uint8)]


def _legend(mask: np.ndarray, classes: Classes) -> list[dict[str, Any]]:
    counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)
    common = [label for label in np.argsort(-counts)[: LEGEND + 1].tolist() if counts[label]][:LEGEND]
    return [
        {
            "name": "no label" if label == IGNORE else classes.names[label],
            "color": [0, 0, 0] if label == IGNORE else classes.colors[label].tolist(),
            "share": _percent(counts[label] / mask.size),
        }
        for label in common
    ]


def _without_masks(data: SegmentationData, split: str) -> Finding:
    sentence = f"data.{split} has images without masks: they can be predicted, not scored or trained on"
    return Finding("note" if data.specs["train"] is None else "error", "no-masks", sentence)


def _skippable(data: SegmentationData) -> float:
    """The share of the training samples that may be broken."""
    return data.max_bad_share if data.on_bad_sample == "skip" else 0.0


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width: text on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_cell(cell, place, widths[place]) for place, cell in enumerate(row)).rstrip() for row in rows]


def _cell(text: str, place: int, width: int) -> str:
    return text.ljust(width) if place == 0 else text.rjust(width)


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    return {"min": min(values), "median": median(values), "max": max(values)} if values else None


def _range(values: Mapping[str, float] | None) -> str:
    return "-" if values is None else "/".join(f"{values[key]:g}" for key in ("min", "median", "max"))


def _share(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _rounded(values: Sequence[float]) -> str:
    return "[" + ",".join(f"{value:.3f}" for value in values) + "]"


def _kind(colors: bool) -> str:
    return "colours" if colors else "ids"
