"""Do masks keep the label contract? Rules, each of which tells one mistake in a sentence, with files and a fix.

A rule that reads values looks at a whole split rather than at a mask, because most mistakes are legal mask by mask:
class 0 where 0 means "no label" trains without a word, and scores badly.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from segformer.data.dataset import Encoder
from segformer.data.statistics import Record, Survey, count_classes, fits, label_of
from segformer.labels import IGNORE, code, distinct_colors, rgb

NAMED = 5  # files in one sentence
PASTED = 25  # classes at most in a fix that lists them
MANY_VALUES = 32  # undeclared ones in a mask, above which it is no mask of classes
MANY_COLORS = 256
BLACK, BORDER = 0x000000, 0xE0E0C0  # what Pascal VOC's palette gives to 0 and to 255

BACKGROUND = {"background", "_background_", "bg", "backgroud", "unlabeled", "unlabelled", "void", "none", "other",
              "others", "rest", "ignore"}  # fmt: skip
STREET = {"road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
          "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"}  # fmt: skip
STREET_IDS = 34  # Cityscapes counts its label ids from 0 to 33
ADE_CLASSES = 150

_SIMPLE = re.compile(r"(?!(null|true|false|nan|inf)$)[A-Za-z_][\w .-]*(?<! )", re.ASCII | re.IGNORECASE)  # to Hydra

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One sentence about the data. what: a short name of the rule. fix: what to add to the command, or to do."""

    level: Level
    what: str
    sentence: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.sentence}; {self.fix}" if self.fix else self.sentence


class Evidence:
    """The masks of one or several splits, as the rules ask about them."""

    def __init__(self, encoder: Encoder, surveys: Sequence[Survey]) -> None:
        self.encoder, self.classes, self.surveys = encoder, encoder.classes, surveys
        self.records = [record for survey in surveys for record in survey.records]
        self.masks = [record for record in self.records if record.mask_size is not None]
        self.plain = [record for record in self.masks if not record.indices]
        self.whole = all(survey.whole for survey in surveys)

    @cached_property
    def values(self) -> Counter[int]:
        """Raw value -> pixels, of the masks that hold raw values of the declared kind."""
        return _sum(record for record in self.plain if fits(record, self.classes))

    @cached_property
    def undeclared(self) -> set[int]:
        return {value for value in self.values if self.label(value) is None}

    @cached_property
    def counts(self) -> np.ndarray:
        """(masks, K + 1) pixels of each class and of what is ignored."""
        return np.stack([count_classes(one, self.encoder) for one in self.masks] or [np.zeros(len(self.classes) + 1)])

    @property
    def counts_from_zero(self) -> bool:
        """Whether the raw value of a class is its place, as a list of names says."""
        return not self.classes.of_colors and all(self.label(place) == place for place in range(len(self.classes)))

    @property
    def counts_from_one(self) -> bool:
        """Whether 0 is ignored and the raw value of a class is its place and one more."""
        places = range(1, len(self.classes) + 1)
        return not self.classes.of_colors and self.label(0) == IGNORE and all(self.label(n) == n - 1 for n in places)

    def label(self, value: int) -> int | None:
        return label_of(value, self.classes)

    def masks_with(self, values: Iterable[int]) -> list[str]:
        wanted = set(values)
        return [one.mask_name for one in self.plain if fits(one, self.classes) and not wanted.isdisjoint(one.values)]


Rule = Callable[[Evidence], Finding | None]


def broken_contract(encoder: Encoder, surveys: Sequence[Survey]) -> list[Finding]:
    """Mistakes in the meaning of the values: once where all splits have them, else split by split."""
    each, together = [_diagnosed(Evidence(encoder, [survey])) for survey in surveys], Evidence(encoder, surveys)
    if not any(each):  # a class that a small split happens to lack says nothing
        told = [found for rule in (_binary, _shifted, _rest_counts_from_one) if (found := rule(together))]
        alone = [found for survey in surveys if (found := _binary(Evidence(encoder, [survey])))]
        # a split of few masks may hold nothing but background and what has no label
        return told or ([replace(found, level="warning") for found in alone] if len(encoder.classes) == 2 else [])
    if len({tuple(found.what for found in one) for one in each}) == 1:
        return _diagnosed(together)
    return [found for one in each for found in one]


def _diagnosed(evidence: Evidence) -> list[Finding]:
    """What is wrong with masks of the kind that is declared (the first rule that knows it), and with other masks."""
    known = (_photographs, _street_ids, _zero_as_a_class, _grey_levels, _places, _one_more, _others)
    first = next((found for rule in known if (found := rule(evidence))), None)
    more = (rule(evidence) for rule in (_colors, _ids_for_colors, _raw_ids_named_train_ids))
    return [found for found in (first, *more) if found]


# -- the meaning of values: the first that applies is told


def _photographs(evidence: Evidence) -> Finding | None:
    strange = {
        one.mask_name: one.distinct
        for one in evidence.plain
        if fits(one, evidence.classes) and sum(value in evidence.undeclared for value in one.values) > MANY_VALUES
    }
    if not strange:
        return None
    what = "colours" if evidence.classes.of_colors else "values"
    if evidence.classes.of_colors and len(strange) < len(evidence.plain):
        what = "colours (blended ones along the edges, mostly)"
    return Finding(
        "error",
        "no-classes",
        f"{len(strange)} of {len(evidence.plain)} masks hold up to {max(strange.values())} different {what}, of which "
        f"most are no class, as photographs, JPEG files and maps of instances do: {named(strange)}",
        "data.ignore=rest" if "blended" in what else "export the masks as PNG, or correct the pattern of masks",
    )


def _street_ids(evidence: Evidence) -> Finding | None:
    names = [name.lower().replace("_", " ").strip() for name in evidence.classes.names]
    if not evidence.counts_from_zero or len(names) >= STREET_IDS or len(STREET.intersection(names)) < 15:
        return None
    told = [
        one.mask_name for one in evidence.plain if "_labelids" in one.mask_name.lower() and fits(one, evidence.classes)
    ]
    beyond = set(range(len(names), STREET_IDS))
    if not told and not (evidence.undeclared and evidence.undeclared <= beyond):
        return None
    return Finding(
        "error",
        "label-ids",
        "the masks hold Cityscapes' label ids, of which road is 7, but data.classes counts its names from 0, so that 7 "
        f"would be trained as {evidence.classes.names[7]!r}: {named(told or evidence.masks_with(beyond))}",
        "data=cityscapes knows the label ids",
    )


def _zero_as_a_class(evidence: Evidence) -> Finding | None:
    """ADE20K's masks under a list of its names; masks that were counted down before hold 255, these do not."""
    names = evidence.classes.names
    ade = len(names) == ADE_CLASSES and (
        tuple(names[:3]) == ("wall", "building", "sky")
        or any(re.search(r"ADE_(train|val)_", one.mask_name) for one in evidence.plain)
    )
    if not ade or not evidence.counts_from_zero or 0 not in evidence.values or IGNORE in evidence.values:
        return None
    found = evidence.masks_with([0])
    return Finding(
        "error",
        "zero-is-no-label",
        f"in ADE20K's masks 0 means no label and {names[0]!r} is 1, but data.classes counts its names from 0, so that "
        f"every class is off by one: 0 is in {len(found)} of {len(evidence.plain)} masks, {named(found)}",
        "data.reduce_zero_label=true",
    )


def _grey_levels(evidence: Evidence) -> Finding | None:
    """As many grey levels as there are classes, evenly spaced and undeclared: made to be looked at."""
    levels, names = sorted(evidence.values), evidence.classes.names
    if not evidence.counts_from_zero or not evidence.undeclared or len(levels) < 2:
        return None
    even = np.abs(np.linspace(0, IGNORE, len(levels)) - levels).max() <= 1
    if not even or set(levels[1:-1]) - evidence.undeclared or (len(levels) > 2 and len(levels) != len(names)):
        return None
    return _made_to_be_seen(evidence, "error")


def _binary(evidence: Evidence) -> Finding | None:
    """0 and 255 in all splits; where there are many classes they may be what few masks happen to hold."""
    if not evidence.counts_from_zero or sorted(evidence.values) != [0, IGNORE]:
        return None
    return _made_to_be_seen(evidence, "error" if len(evidence.classes) <= 2 else "warning")


def _made_to_be_seen(evidence: Evidence, level: Level) -> Finding:
    levels, names = sorted(evidence.values), evidence.classes.names
    own = [*names] if len(levels) == len(names) else ["background", names[-1] if len(names) == 1 else "NAME"]
    if len(set(own)) < len(own):
        own[0] = "other"
    known = len(levels) == 2 and own[-1] in names
    lost = f"so {own[-1]!r} would never be trained" if known else "so it would never be trained"
    means = "means no label" if evidence.label(IGNORE) == IGNORE else "is declared nowhere"
    return Finding(
        level,
        "grey-levels",
        f"the masks hold {' and '.join(map(str, levels)) if len(levels) == 2 else ', '.join(map(str, levels))} only, "
        f"and 255 {means}, {lost}: {named(evidence.masks_with([IGNORE]))}",
        _classes_fix({name: f"{{ids: [{level}]}}" for name, level in zip(own, levels, strict=True)})
        + " 'data.ignore=[]'",
    )


def _places(evidence: Evidence) -> Finding | None:
    """Train ids where raw ids are declared."""
    count, classes = len(evidence.classes), evidence.classes
    if classes.of_colors or evidence.counts_from_zero:
        return None
    if evidence.encoder.train_ids is not None and (classes.lookup[:count] >= 0).all():  # what `Encoder.whole` refuses
        look = [one for one in evidence.plain if not one.colors and _of_places(one.values, count, needs_ignore=True)]
        if look:
            return _looks_like_places(look, count)
    if count < 8 or not _of_places(evidence.values, count):  # a few classes may well be what others merged
        return None
    here = {value for value in evidence.values if value < count}
    meant = {label for value in evidence.values if (label := evidence.label(value)) is not None} - {IGNORE}
    if evidence.undeclared != {IGNORE} and (evidence.undeclared or len(here) < 2 * len(meant)):
        return None
    return Finding(
        "error",
        "train-ids",
        f"the masks hold train ids (0 to {count - 1}, and 255 for no label), but data.classes lists raw ids, by which "
        f"they are other classes: {named([one.mask_name for one in evidence.plain])}",
        "'data.train_ids=\"*\"'",
    )


def _looks_like_places(records: Sequence[Record], count: int) -> Finding:
    more = f", as {len(records) - 1} more do" if len(records) > 1 else ""
    return Finding(
        "error",
        "train-ids",
        f"mask {records[0].mask_name} looks like train ids (255, and no other value above {count - 1}) but its name "
        f"says raw ids{more}",
        "add 'data.train_ids=\"*\"' if it holds train ids, else data.train_ids=null",
    )


def _of_places(values: Iterable[int], count: int, needs_ignore: bool = False) -> bool:
    found = set(values)
    return bool(found - {IGNORE}) and (IGNORE in found or not needs_ignore) and max(found - {IGNORE}) < count


def _shifted(evidence: Evidence) -> Finding | None:
    """0 is ignored although it is the first class: the last class is then one that no mask has."""
    names, values = evidence.classes.names, evidence.values
    if not evidence.counts_from_one or 0 not in values or len(names) in values or evidence.undeclared - {IGNORE}:
        return None
    if names[0].lower().strip() not in BACKGROUND:
        # of many classes the last one may well be rare; that it alone is missing is a sign
        alone = values.keys() >= set(range(1, len(names)))
        return _reduced_before(evidence) if alone or IGNORE in values else None
    share = values[0] / values.total()
    listed = "" if len(names) > PASTED else f" {_classes_fix(names)} 'data.ignore=[255]'"
    return Finding(
        "error" if values[0] >= values[1] else "warning",
        "background-twice",
        f"0 means no label and class {names[0]!r} is 1, but 0 fills {share:.0%} of the pixels and {names[-1]!r}, which "
        f"is {len(names)}, never occurs: {names[0]!r} is 0, and every class off by one: "
        f"{named(evidence.masks_with([0]))}",
        f"data.reduce_zero_label=false{listed}",
    )


def _reduced_before(evidence: Evidence) -> Finding:
    return Finding(
        "warning",
        "reduced-twice",
        f"0 means no label (data.reduce_zero_label), but {evidence.classes.names[-1]!r}, which is "
        f"{len(evidence.classes)}, never occurs: the masks may count from 0 already: {named(evidence.masks_with([0]))}",
        "data.reduce_zero_label=false if they are",
    )


def _rest_counts_from_one(evidence: Evidence) -> Finding | None:
    """With data.ignore=rest no value is undeclared, so the one behind the last class is ignored without a word."""
    count = len(evidence.classes)
    rest = evidence.counts_from_zero and evidence.label(IGNORE + 1) == IGNORE
    if not rest or 0 in evidence.values or count not in evidence.values or evidence.label(count) != IGNORE:
        return None
    return Finding(
        "warning",
        "counts-from-one",
        f"{count} is in the masks and is ignored (data.ignore=rest), while 0, which is {evidence.classes.names[0]!r}, "
        f"never occurs: the masks may count classes from 1: {named(evidence.masks_with([count]))}",
        f"{_REDUCED} if they do",
    )


_REDUCED = "data.reduce_zero_label=true with classes that list no ids"


def _one_more(evidence: Evidence) -> Finding | None:
    """Exactly the value after the last class is undeclared."""
    names, count = evidence.classes.names, len(evidence.classes)
    if not evidence.counts_from_zero or evidence.undeclared != {count}:
        return None
    files = named(evidence.masks_with([count]))
    if 0 not in evidence.values:
        sentence = (
            f"the masks count classes from 1 to {count} and data.classes from 0, so that every class is off by one"
        )
        return Finding("error", "counts-from-one", f"{sentence}: {files}", _REDUCED)
    longer = [*names, "NAME"] if names[0].lower() in BACKGROUND else ["background", *names]
    longer_fix = _classes_fix(longer if count < PASTED else ["background", "NAME"])
    sentence = (
        f"value {count}, which none of the {count} classes declares, is in the masks: they hold one value more than "
        "data.classes has names"
    )
    fix = f"{longer_fix}, or {_REDUCED} if 0 means no label" if count > 1 else longer_fix
    return Finding("error", "one-value-more", f"{sentence}: {files}", fix)


def _others(evidence: Evidence) -> Finding | None:
    if not evidence.undeclared:
        return None
    shown = rgb if evidence.classes.of_colors else str
    wrong = [one for one in evidence.plain if not evidence.undeclared.isdisjoint(one.values)]
    wrong = [one for one in wrong if fits(one, evidence.classes)]
    ignored = np.flatnonzero(evidence.classes.lookup == IGNORE).tolist()
    values = [*ignored, *sorted(evidence.undeclared)]
    fix = "data.ignore=rest" if len(values) > PASTED else f"'data.ignore=[{', '.join(map(shown, values))}]'"
    fix += " if they mean no label, else list them under data.classes"
    if any(one.mask_name.lower().endswith((".jpg", ".jpeg")) for one in wrong):
        fix = "export the masks as PNG: JPEG's compression invents values"
    files = "; ".join(f"{one.mask_name} ({_counted(one, evidence.undeclared, shown)})" for one in wrong[:NAMED])
    more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    sentence = f"values that none of the {len(evidence.classes)} classes declares, in {files}{more}"
    return Finding("error", "undeclared-values", sentence, fix)


def _counted(record: Record, undeclared: set[int], shown: Callable[[int], str]) -> str:
    found = sorted(undeclared & record.values.keys())
    listed = ", ".join(map(shown, found[:NAMED])) + (", ..." if len(found) > NAMED else "")
    pixels = sum(record.values[value] for value in found)
    return f"{listed} in {pixels} of {sum(record.values.values())} pixels"


# -- masks of another kind than the declared one


def _colors(evidence: Evidence) -> Finding | None:
    """RGB where ids are declared: palette files that were converted, maps made to be looked at, photographs."""
    wrong = [one for one in evidence.masks if one.colors and not fits(one, evidence.classes)]
    if not wrong:
        return None
    files, colors = named([one.mask_name for one in wrong]), _sum(wrong)
    if max(one.distinct for one in wrong) > MANY_COLORS:
        most = max(one.distinct for one in wrong)
        count = f"{len(wrong)} of {len(evidence.masks)} masks hold up to {most} RGB colours"
        sentence = f"{count}, as photographs and JPEG files do: {files}"
        return Finding("error", "photographs", sentence, "export the masks as PNG, or correct the pattern of masks")
    told, fix = _palette(evidence, set(colors)) or _unknown_colors(colors)
    sentence = f"{len(wrong)} of {len(evidence.masks)} masks hold RGB colours, expected class ids ({told}): {files}"
    return Finding("error", "colors", sentence, fix)


def _unknown_colors(colors: Counter[int]) -> tuple[str, str]:
    shares = [f"{rgb(color)} {pixels / colors.total():.0%}" for color, pixels in colors.most_common(NAMED)]
    more = f" and {len(colors) - NAMED} more" if len(colors) > NAMED else ""
    entries = {f"NAME{place}": f"{{color: {rgb(color)}}}" for place, (color, _) in enumerate(colors.most_common())}
    fix = f"data.mask_values=colors {_classes_fix(entries)} with your names"
    if len(entries) > PASTED:
        fix = "data.mask_values=colors and under data.classes the color of each class"
    return f"{len(colors)} of them: {', '.join(shares)}{more}", fix


def _palette(evidence: Evidence, colors: set[int]) -> tuple[str, str] | None:
    """Which class has which colour and what to do, where the colours are those of the classes or of Pascal VOC."""
    names, own = evidence.classes.names, [code(color) for color in evidence.classes.colors]
    usual = np.array_equal(evidence.classes.colors, distinct_colors(len(names)))
    indexed = [BLACK, *map(code, distinct_colors(max(len(names) - 1, 1)))][: len(names)]
    if not usual and colors <= {*own, BLACK}:
        table, whose = own, "those of data.classes"
    elif colors <= {*indexed, BORDER}:
        table, whose = indexed, "Pascal VOC's palette, so palette PNGs were converted to RGB"
    elif colors <= {*own, BLACK}:
        table, whose = own, "the usual ones of data.classes"
    else:
        return None
    found = [f"{rgb(color)} = {name}" for name, color in zip(names, table, strict=True) if color in colors]
    listed = ", ".join(found[:NAMED]) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")
    if len(set(table)) < len(table) or len(names) > PASTED or (not usual and not evidence.counts_from_zero):
        return f"{whose}: {listed}", "export the masks as one channel of class ids: 8-bit grey or palette PNG"
    fix = "data.mask_values=colors"
    if usual:
        fix += " " + _classes_fix({name: f"{{color: {rgb(color)}}}" for name, color in zip(names, table, strict=True)})
    if spare := sorted(colors - set(table)):
        fix += f" 'data.ignore=[{', '.join(map(rgb, spare))}]'"
    return f"{whose}: {listed}", fix


def _ids_for_colors(evidence: Evidence) -> Finding | None:
    wrong = [one.mask_name for one in evidence.plain if not one.colors and evidence.classes.of_colors]
    if not wrong:
        return None
    sentence = f"{len(wrong)} of {len(evidence.masks)} masks hold one channel of ids, but data.mask_values is colors"
    return Finding("error", "ids", f"{sentence}: {named(wrong)}", "data.mask_values=ids")


def _raw_ids_named_train_ids(evidence: Evidence) -> Finding | None:
    named_so = [one for one in evidence.masks if one.indices and not one.colors]
    wrong = [one for one in named_so if any(label_of(value, evidence.classes, True) is None for value in one.values)]
    if not wrong:
        return None
    beyond = sorted({value for one in wrong for value in one.values if value >= len(evidence.classes)} - {IGNORE})
    return Finding(
        "error",
        "raw-ids",
        f"{len(wrong)} of {len(evidence.masks)} masks are named as train ids (data.train_ids) but hold "
        f"{', '.join(map(str, beyond[:10]))}, "
        f"which no train id of {len(evidence.classes)} classes is: {named([one.mask_name for one in wrong])}",
        "data.train_ids=null if they hold raw ids",
    )


def named(names: Iterable[str]) -> str:
    """The first five, and how many more."""
    listed = list(names)
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more


def _sum(records: Iterable[Record]) -> Counter[int]:
    total = Counter[int]()
    for record in records:
        total.update(record.values)
    return total


def _classes_fix(classes: dict[str, str] | Sequence[str]) -> str:
    """Other classes as a shell takes them, of names or of names with what stands under each.

    The old ones are taken away first: Hydra cannot turn a list into a mapping, and merges mappings.
    """
    plain = all(map(_SIMPLE.fullmatch, classes))
    quoted = [name if _SIMPLE.fullmatch(name) else json.dumps(name, ensure_ascii=False) for name in classes]
    if isinstance(classes, dict):
        entries = [f"{name}: {what}" for name, what in zip(quoted, classes.values(), strict=True)]
        if not plain:  # the command line has no way to write such a name
            return f"in a YAML of yours classes: {{{', '.join(entries)}}}"
        return "'~data.classes' " + shlex.quote(f"+data.classes={{{', '.join(entries)}}}")
    if any("\\" in name for name in quoted):
        return f"in a YAML of yours classes: [{', '.join(quoted)}]"
    return "'~data.classes' " + shlex.quote(f"+data.classes=[{', '.join(quoted)}]")
