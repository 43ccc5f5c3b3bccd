"""What there is to tell about a dataset beside its label contract, and all of it together."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from segformer.data.contract import NAMED, Evidence, Finding, Level, broken_contract, named
from segformer.data.dataset import Encoder
from segformer.data.statistics import Survey, fits, label_of
from segformer.data.transforms import TrainTransform, scaled_size
from segformer.labels import IGNORE, rgb


def findings(
    encoder: Encoder, surveys: Sequence[Survey], transform: TrainTransform, skippable: float = 0.0
) -> list[Finding]:
    """All that there is to tell. transform: of training. skippable: share of its samples that may be broken."""
    told, evidence = broken_contract(encoder, surveys), Evidence(encoder, surveys)
    if not told:  # else what the classes say is not what the masks mean
        told += [
            found
            for rule in (_palettes, _turned, _ignored, _unlabelled_masks, _lossy, _lost)
            if (found := rule(evidence))
        ]
        told += _missing_classes(encoder, surveys)
    for survey in surveys:
        each = (_unreadable(survey, skippable), _twice(survey), _small(survey, transform))
        told += [found for found in each if found]
    told += [found for found in [_shared(surveys)] if found]
    return told


def _unreadable(survey: Survey, skippable: float) -> Finding | None:
    broken = [record for record in survey.records if record.errors]
    if not broken:
        return None
    sentences = "; ".join(record.errors[0] for record in broken[:NAMED])
    more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    count = f"{len(broken)} of {len(survey.records)} samples of data.{survey.split} cannot be used: "
    skipped = survey.split == "train" and (len(broken) <= skippable * len(survey.records) or not survey.whole)
    level: Level = "warning" if skipped and skippable else "error"
    return Finding(level, "unreadable", f"{count if len(broken) > 1 else ''}{sentences}{more}")


def _twice(survey: Survey) -> Finding | None:
    groups = survey.twins()
    if not groups:
        return None
    extra = sum(len(group) - 1 for group in groups)
    pairs = named([" = ".join(group[:2]) for group in groups])
    level: Level = "warning" if extra > 0.01 * len(survey.records) else "note"
    return Finding(level, "twice", f"data.{survey.split} holds {_images(extra)} twice: {pairs}", "remove one of each")


def _shared(surveys: Sequence[Survey]) -> Finding | None:
    if len(surveys) < 2:
        return None
    train, val = surveys[0], surveys[1]
    known = {record.digest: record.name for record in train.records if record.digest}
    both = [f"{known[one.digest]} = {one.name}" for one in val.records if one.digest in known]
    if not both:
        return None
    sentence = f"data.{val.split} shares {_images(len(both))} with data.{train.split}, so val/miou is too good"
    return Finding("warning", "leak", f"{sentence}: {named(both)}", "remove them from one of the two")


def _small(survey: Survey, transform: TrainTransform) -> Finding | None:
    height, width = transform.crop_size
    sizes = [scaled_size(one.size, transform.base_size, 1.0) for one in survey.records if one.size is not None]
    small = [size for size in sizes if size[0] < height and size[1] < width]
    if survey.split != "train" or len(small) <= 0.5 * len(sizes):
        return None
    sentence = f"{len(small)} of {len(sizes)} training images are smaller than the crop of {height} x {width}"
    return Finding("note", "small", f"{sentence}, which is filled up with ignored pixels", "a smaller data.crop_size")


def _ignored(evidence: Evidence) -> Finding | None:
    total = evidence.counts.sum(axis=0)
    if not total[-1] or total[-1] <= 0.5 * total.sum():
        return None
    share, shares = total[-1] / total.sum(), evidence.counts[:, -1] / np.maximum(evidence.counts.sum(axis=1), 1)
    files = named(evidence.masks[place].mask_name for place in np.argsort(-shares, kind="stable"))
    if share == 1:
        sentence = f"every pixel of all {len(evidence.masks)} masks means no label, so nothing would be trained"
        return Finding("error", "all-ignored", f"{sentence}: {files}", "check data.classes and data.ignore")
    sentence = f"{share:.0%} of the pixels mean no label, and are neither trained nor scored: {files}"
    return Finding("warning", "mostly-ignored", sentence, "check data.classes and data.ignore")


def _unlabelled_masks(evidence: Evidence) -> Finding | None:
    unlabelled = (evidence.counts[:, -1] > 0) & (evidence.counts[:, :-1].sum(axis=1) == 0)
    if not unlabelled.any() or unlabelled.all():
        return None
    empty = [one.mask_name for one, empty in zip(evidence.masks, unlabelled, strict=True) if empty]
    level: Level = "warning" if unlabelled.mean() > 0.01 else "note"
    sentence = f"{len(empty)} of {len(unlabelled)} masks mean no label in every pixel: {named(empty)}"
    return Finding(level, "empty-masks", sentence, "leave them out")


def _palettes(evidence: Evidence) -> Finding | None:
    """Where each file has a palette in an order of its own, an index is another class in each."""
    known: dict[int, tuple[int, str]] = {}
    for record in evidence.masks:
        for value, color in record.palette.items():
            other, name = known.setdefault(value, (color, record.mask_name))
            if other != color and IGNORE not in (evidence.label(value), value):
                return Finding(
                    "error",
                    "palettes",
                    f"the palettes of the masks differ: {value} is {rgb(other)} in {name} and {rgb(color)} in "
                    f"{record.mask_name}, so that it may be another class in each",
                    "export all masks with one palette, or as RGB and add data.mask_values=colors; data.check=0 if "
                    "only the colours differ",
                )
    return None


def _turned(evidence: Evidence) -> Finding | None:
    turned = [one.name for one in evidence.masks if one.turned]
    if not turned:
        return None
    sentence = f"{len(turned)} images are turned or mirrored by their EXIF orientation, and their masks are not"
    return Finding("warning", "turned", f"{sentence}: {named(turned)}", "save them upright, if the masks do not fit")


def _lossy(evidence: Evidence) -> Finding | None:
    """JPEG invents values along the edges: other classes, or ignored ones under data.ignore=rest."""
    lossy = [one.mask_name for one in evidence.masks if one.mask_name.lower().endswith((".jpg", ".jpeg"))]
    if not lossy:
        return None
    sentence = f"{len(lossy)} masks are JPEG files, whose compression changes values along the edges: {named(lossy)}"
    return Finding("warning", "lossy", sentence, "export them as PNG")


def _missing_classes(encoder: Encoder, surveys: Sequence[Survey]) -> list[Finding]:
    """Declared classes that no mask has, or none of a split; a part of the masks says nothing for certain."""
    names = encoder.classes.names
    seen = {survey.split: Evidence(encoder, [survey]).counts[:, :-1].any(axis=0) for survey in surveys}
    if not any(one.any() for one in seen.values()):
        return []
    whole, told = all(survey.whole for survey in surveys), []
    if (never := ~np.logical_or.reduce([*seen.values()])).any():
        sentence = f"{_some(names, never)} in {'no mask' if whole else 'none of the masks looked at'}"
        fix = "take out of data.classes what is not meant"
        told.append(Finding("warning" if whole else "note", "never", sentence, fix))
    if len(seen) == 2 and whole:
        (train, in_train), (val, in_val) = seen.items()
        if (only := in_val & ~in_train).any():
            told.append(Finding("warning", "only-val", f"{_some(names, only)} in data.{val}, but not in data.{train}"))
        if (only := in_train & ~in_val).any():
            told.append(Finding("note", "only-train", f"{_some(names, only)} in data.{train}, but not in data.{val}"))
    return told


def _lost(evidence: Evidence) -> Finding | None:
    """Classes that are too small for a label map of a quarter of the sides."""
    there, lost = Counter[int](), Counter[int]()
    for one in evidence.masks:
        values = one.values if fits(one, evidence.classes) else {}
        labels = {label_of(value, evidence.classes, one.indices) for value in values}
        there.update(label for label in labels if label is not None and label != IGNORE)
        lost.update(one.lost)
    often = {label: count / there[label] for label, count in lost.items() if count > 0.2 * there[label] and count > 1}
    if not often:
        return None
    shown = sorted(often, key=lambda label: -often[label])[:10]
    listed = ", ".join(f"{evidence.classes.names[label]!r} in {often[label]:.0%}" for label in shown)
    more = f" and {len(often) - 10} more" if len(often) > 10 else ""
    return Finding(
        "warning" if any(often[label] > 0.5 and there[label] >= 10 for label in often) else "note",
        "lost",
        "the network's label map has a quarter of the sides, and some classes are so small that they fall between its "
        f"points: {listed}{more} of the masks that have them",
        "larger data.base_size or data.scale",
    )


def _some(names: Sequence[str], chosen: Any) -> str:
    found = [repr(name) for name, one in zip(names, chosen, strict=True) if one]
    more = f" and {len(found) - 10} more" if len(found) > 10 else ""
    return f"class{'es' * (len(found) > 1)} {', '.join(found[:10])}{more} occur{'s' * (len(found) == 1)}"


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"
