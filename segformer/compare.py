"""Is B better than A? Two evaluations of the same images, image by image: python -m segformer compare A B"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from segformer.bootstrap import LEVEL, RESAMPLES, Difference, paired
from segformer.errors import UserError, printable
from segformer.files import new_folder, read_json, to_json, write_atomically
from segformer.metrics import IMAGES, Parts, Tally, iou_of, mean_of
from segformer.page import percent, points, render

CHANGED = 10  # images that are listed: the ones that lose most and the ones that gain most
SETTINGS = {"data": "data", "protocol_line": "protocol", "precision": "precision"}  # two models may differ in them
TOLD = {
    "images": "images",
    **SETTINGS,
    "checkpoint": "checkpoint",
    "predictions": "label maps",
    "weights_sha256": "SHA-256 of the weights",
}
SIDES = {"A": "first", "B": "second"}
_TYPED = str.maketrans("–−", "--")  # a terminal may know no other dashes


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation left: its report, and the confusion matrix of each image."""

    path: Path
    report: Mapping[str, Any]
    tally: Tally

    @property
    def names(self) -> list[str]:
        return [str(row["name"]) for row in self.report["per_class"]]

    @cached_property
    def parts(self) -> Parts:
        return self.tally.parts()

    @property
    def miou(self) -> float | None:
        return _number(float(mean_of(self.iou)))

    @property
    def iou(self) -> np.ndarray:
        """(K,) of all images; NaN where a class is absent."""
        hits, labelled, predicted = (part.sum(axis=0) for part in self.parts)
        return iou_of(hits, labelled, predicted)

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """path: report.json, or the folder that holds it; the scores of images lie beside it.

        Raises:
            UserError: one of the two is missing or damaged, or they are not of one evaluation.
        """
        path = path / "report.json" if path.is_dir() else path
        report = _object(path, "report", "give the report.json that evaluate.py wrote")
        beside = path.with_name(IMAGES)
        images = _object(beside, "file of the images' scores", f"it belongs beside {path}: evaluate again")
        try:
            tally = Tally.from_json(images)
        except UserError as error:
            raise UserError(f"{beside}: {error}") from error
        found = cls(path, report, tally)
        found._check(beside)
        return found

    def _check(self, beside: Path) -> None:
        rows = self.report.get("per_class")
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "name" in row for row in rows):
            raise UserError(f"{self.path} has no per_class with names, expected a report.json that evaluate.py wrote")
        if len(rows) != self.tally.classes:
            raise UserError(f"{self.path} has {len(rows)} classes, {beside} {self.tally.classes}: evaluate again")
        miou, told = self.miou, self.report.get("miou")
        if miou is None:
            raise UserError(f"{beside} has no labelled pixel, so there is nothing to compare: evaluate labelled images")
        if not isinstance(told, int | float) or abs(told) > 1 or not math.isclose(miou, told, abs_tol=1e-6):
            raise UserError(
                f"{self.path} says mIoU {told!r}, but the images beside it make {miou:.6f}: the two files are not of "
                "one evaluation; evaluate again"
            )


@dataclass(frozen=True)
class Comparison:
    """difference: B minus A, fractions. images: (name, mIoU in A, mIoU in B), NaN without labels, worst first."""

    first: Evaluation
    second: Evaluation
    difference: Difference
    images: Sequence[tuple[str, float, float]]

    @property
    def losers(self) -> list[tuple[str, float, float]]:
        return [row for row in self.images if row[2] < row[1]][:CHANGED]

    @property
    def winners(self) -> list[tuple[str, float, float]]:
        return [row for row in reversed(self.images) if row[2] > row[1]][:CHANGED]

    def below(self, limit: float) -> bool:
        """Whether B's mIoU lies more than `limit` points below A's: the measured difference, not its interval."""
        gain = 100 * self.difference.miou[0]
        return gain < 0 if limit == 0 else round(gain, 6) < -limit  # 0.745 - 0.75 is a little less than -0.005

    def verdict(self) -> str:
        """One sentence."""
        gain, low, high = self.difference.miou
        told = f"{_points(gain)} points, {100 * self.difference.level:g} % interval {_points(low)} to {_points(high)}"
        if low > 0:
            return f"B is better than A: mIoU {told}, {self.significance}"
        if high < 0:
            return f"B is worse than A: mIoU {told}, {self.significance}"
        return f"no difference is shown: mIoU {told}, {self.significance}"

    def notes(self) -> list[str]:
        """What a reader must know before believing it."""
        apart = int(((self.difference.iou[:, 1] > 0) | (self.difference.iou[:, 2] < 0)).sum())
        present = int((~np.isnan(self.difference.iou[:, 0])).sum())
        chance = present * (1 - self.difference.level)
        told = [f"the intervals of {apart} of {present} classes leave out zero; {chance:.1f} would by chance alone"]
        for key, name in SETTINGS.items():
            one, other = self.first.report.get(key), self.second.report.get(key)
            if one != other:
                told.append(f"the {name} differs: {one} in A, {other} in B")
        return told

    def facts(self) -> dict[str, Any]:
        """Every number, as plain values; differences are fractions."""
        return {
            "version": 1,
            "first": self._side(self.first),
            "second": self._side(self.second),
            "verdict": self.verdict(),
            "notes": self.notes(),
            "miou": dict(zip(("difference", "low", "high"), self.difference.miou, strict=True)),
            "p": self.difference.p,
            "level": self.difference.level,
            "resamples": self.difference.resamples,
            "per_class": self._classes(),
            "images": [[name, _number(before), _number(after)] for name, before, after in self.images],
        }

    def table(self) -> str:
        """The numbers as plain text, for a terminal and for a log."""
        facts, wide = self.facts(), max(5, *(len(printable(name)) for name in self.first.names))
        lines = [
            f"{name}: mIoU {100 * facts[key]['miou']:.2f}  {printable(facts[key]['path'])}"
            for name, key in SIDES.items()
        ]
        lines += ["", f"{'class':{wide}}  {'A':>6}  {'B':>6}   B - A  interval"]
        for row in facts["per_class"]:
            numbers = "  ".join(f"{_percent(row[key]):>6}" for key in ("first", "second"))
            ends = f"{_points(row['low'])} to {_points(row['high'])}"
            lines.append(f"{printable(row['name']):{wide}}  {numbers}  {_points(row['difference']):>6}  {ends}")
        for title, rows in (("lost most", self.losers), ("gained most", self.winners)):
            lines += ["", f"images that {title}:"] if rows else []
            lines += [f"  {_points(after - before):>6}  {printable(name)}" for name, before, after in rows]
        return "\n".join([*lines, "", *(f"note: {printable(note)}" for note in facts["notes"]), facts["verdict"]])

    @property
    def significance(self) -> str:
        """The p-value, in words where no resample was on the other side."""
        least = 2 / self.difference.resamples
        return f"p {self.difference.p:.2g}" if self.difference.p >= least else f"p below {least:g}"

    def _side(self, one: Evaluation) -> dict[str, Any]:
        told = {key: one.report.get(key) for key in TOLD}
        return {**told, "path": str(one.path), "miou": one.miou, "images": len(one.tally)}

    def _classes(self) -> list[dict[str, Any]]:
        before, after, pixels = self.first.iou, self.second.iou, self.first.parts[1].sum(axis=0)
        return [
            {
                "name": name,
                "first": _number(before[index]),
                "second": _number(after[index]),
                **dict(zip(("difference", "low", "high"), map(_number, self.difference.iou[index]), strict=True)),
                "pixels": int(pixels[index]),
            }
            for index, name in enumerate(self.first.names)
        ]


def compare(first: Path, second: Path, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Comparison:
    """Compares two evaluations of the same images by a paired bootstrap over images.

    first, second: report.json of A and B, or their folders.

    Raises:
        UserError: they are of other classes, other images or other labels, or one of them is damaged.
    """
    before, after = Evaluation.read(first), Evaluation.read(second)
    _require_same_classes(before, after)
    _require_same_images(before, after)
    difference = paired(before.parts, after.parts, resamples, level, seed)
    scores = [mean_of(iou_of(*one.parts)) for one in (before, after)]
    rows = [*zip(before.tally.names, *(score.tolist() for score in scores), strict=True)]
    rows.sort(key=lambda row: 0.0 if math.isnan(row[1]) or math.isnan(row[2]) else row[2] - row[1])
    return Comparison(before, after, difference, rows)


def run(first: Path, second: Path, output: str, fail_below: float | None = None) -> int:
    """Prints the comparison, writes compare.json and compare.html into a new folder of `output`; the exit code.

    fail_below: 1 is returned where B's mIoU lies more than this many points (hundredths) below A's.
    """
    if fail_below is not None and not 0 <= fail_below <= 100:
        raise UserError(f"--fail-below is {fail_below}, expected points of mIoU from 0 (any loss fails) to 100")
    found = compare(first, second)
    folder = write(found, new_folder(Path(output)))
    failed = fail_below is not None and found.below(fail_below)
    print(found.table())
    if failed:
        print(f"failed: B's mIoU lies more than {fail_below:g} points below A's")
    print(folder / "compare.html")
    return int(failed)


def write(found: Comparison, folder: Path) -> Path:
    """Writes compare.json and compare.html into the folder, which it returns."""
    facts = found.facts()
    values = {
        "facts": facts,
        "changed": {"lost most": found.losers, "gained most": found.winners},
        "scale": _scale(facts["per_class"]),
        "told": TOLD,
        "sides": SIDES,
        "p": found.significance,
    }
    page = render("compare.html", values)
    write_atomically(folder / "compare.html", lambda file: file.write(page))
    write_atomically(folder / "compare.json", lambda file: file.write(to_json(facts).encode()))
    return folder


def _object(path: Path, what: str, fix: str) -> dict[str, Any]:
    found = read_json(path)
    if found is None:
        raise UserError(f"there is no readable {what} at {path}: {fix}")
    return found


def _require_same_classes(first: Evaluation, second: Evaluation) -> None:
    if len(first.names) != len(second.names):
        raise UserError(
            f"{first.path} has {len(first.names)} classes, {second.path} has {len(second.names)}: "
            "compare models of the same classes"
        )
    for index, (one, other) in enumerate(zip(first.names, second.names, strict=True)):
        if one != other:
            raise UserError(
                f"class {index} is {one!r} in {first.path} but {other!r} in {second.path}: compare models of the "
                "same classes"
            )


def _require_same_images(first: Evaluation, second: Evaluation) -> None:
    for one, other in ((first, second), (second, first)):
        if missing := sorted(one.tally.cells.keys() - other.tally.cells.keys()):
            raise UserError(
                f"{len(missing)} of {len(one.tally)} images of {one.path} are not in {other.path}, the first is "
                f"{missing[0]!r}: evaluate both on the same images"
            )
    before, after = first.parts[1], second.parts[1]
    for image, label in np.argwhere(before != after)[:1]:
        raise UserError(
            f"image {first.tally.names[image]!r} has {before[image, label]} pixels of {first.names[label]!r} in "
            f"{first.path} but {after[image, label]} in {second.path}: evaluate both on the same labels"
        )


def _scale(rows: Sequence[Mapping[str, Any]]) -> float:
    """What half a bar stands for: the farthest end of an interval."""
    ends = [abs(row[key]) for row in rows for key in ("difference", "low", "high") if row[key] is not None]
    return max([0.001, *ends])


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _percent(share: float | None) -> str:
    return percent(share).translate(_TYPED)


def _points(share: float | None) -> str:
    return points(share).translate(_TYPED)
