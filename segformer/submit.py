"""Label maps as files: written as a benchmark's server wants them, and read back from a folder of PNGs of anyone's.

Sources: getPrediction of cityscapesScripts' evalPixelLevelSemanticLabeling, and "Submission format" of the development
kit of the MIT scene parsing benchmark.
"""

import re
import stat
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from segformer.data.archives import Place, composed, entries, folder_at
from segformer.errors import UserError, nearest
from segformer.files import write_atomically
from segformer.labels import IGNORE, Classes, UndeclaredValues, WrongKind, palette, read_mask
from segformer.pixels import MAX_PIXELS
from segformer.visualize import VOID

KINDS = ("cityscapes", "ade", "ids", "train_ids", "color")
VALUES = ("raw", "train", "color")

_STREET_IDS = {7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33}  # the label ids that Cityscapes scores
_STREET_NAME = re.compile(r"([^\W_][^\W_-]*(?:-[^\W_-]+)*_[0-9]{6}_[0-9]{6})(?:_.*)?")
_ADE_CLASSES = 150
_ENDINGS = {"avif", "bmp", "gif", "ico", "jp2", "jpeg", "jpg", "npy", "pcx", "png", "ppm", "sgi", "tga", "tif", "tiff",
            "webp"}  # fmt: skip
_UNSAFE = re.compile(r"[\0-\x1f\x7f:\ud800-\udfff]")  # no file name everywhere; a colon ends a drive's letter
_OF_IMAGES = re.compile(r"(?<=.)_(leftImg8bit|image|img)$")  # what datasets append to the names of images alone
_SHOWN = 3  # files in one sentence


class Writer:
    """Label maps as PNG files below a folder, written by any number of processes, each of which has its own samples.

    kind: "cityscapes" (uint8 label ids, <city>_<sequence>_<frame>_pred_labelIds.png), "ade" (uint8 1..150, named as
    the images, in one folder, and a zip of it), "ids" (the raw ids of the dataset's masks; 16 bits where one is above
    255; of a class with several the smallest), "train_ids" (0..K-1) or "color" (RGB of data.classes).
    names: of all samples (`Source.name`), whoever writes them: a file is called as its sample, behind the folders in
    which the samples differ. Nothing of a name leads out of the folder, and no file is ever replaced.

    Raises:
        UserError: unknown kind; classes or names that the kind does not take; two samples that would share a file.
    """

    def __init__(self, kind: str, folder: Path, names: Sequence[str], classes: Classes) -> None:
        if kind not in KINDS:
            raise UserError(f"submission is {kind!r}{nearest(str(kind), KINDS)}, expected {_any_of(KINDS)}")
        self.kind, self.folder = kind, folder
        self.files = _files(kind, names)  # sample -> path below the folder
        self._table = _table(kind, classes)

    def write(self, name: str, labels: np.ndarray) -> Path:
        """Writes the label map of a sample, (H, W) train ids 0..K-1 of its image's own size; the file's path.

        Raises:
            UserError: the file is there already, or a pixel has no class.
        """
        if labels.max(initial=0) >= len(self._table):
            raise UserError(
                f"the label map of {name} holds {labels.max()}, expected train ids up to {len(self._table) - 1}: "
                "pixels of no class cannot be submitted"
            )
        path = self.folder / self.files[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(self._table[labels])
        write_atomically(path, lambda file: image.save(file, "PNG", compress_level=3), before_replacing=_require_new)
        return path

    def finish(self) -> Path:
        """What is to be uploaded or scored, once all processes have written: the folder; of "ade" FOLDER.zip beside it.

        Raises:
            UserError: a sample has no file, or the zip is there already.
        """
        missing = [name for name, file in self.files.items() if not (self.folder / file).is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(self.files)} label maps were not written to {self.folder}, first that of "
                f"{missing[0]}: let the evaluation go through all images"
            )
        if self.kind != "ade":
            return self.folder
        path = self.folder.with_name(f"{self.folder.name}.zip")
        write_atomically(path, self._zip, before_replacing=_require_new)
        return path

    def _zip(self, file: BinaryIO) -> None:
        """The same bytes for the same label maps: in order of their names, all of one date; PNGs pack no further."""
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted(self.files.values()):
                info = zipfile.ZipInfo(name)
                info.external_attr = (stat.S_IFREG | 0o644) << 16  # else whoever unpacks it may not read it
                archive.writestr(info, (self.folder / name).read_bytes())


class Predictions:
    """The label maps of samples as PNG files below a folder or in a zip file, whoever wrote them.

    A sample's file is called as its image (without _leftImg8bit, _image or _img, if need be), or so and then _, - or .
    and anything: aachen_000000_000019_pred_labelIds.png. Of several the one whose folders agree most with the image's,
    then the one in the fewest others, then the one without an addition, is meant; other files are left alone.
    values: what they hold: "raw" (what the dataset's masks hold), "train" (train ids) or "color" (the colours of
    data.classes). names: of all samples (`Source.name`). max_pixels: of one file.

    Raises:
        UserError: no such folder, unknown values, colours that two classes share, or samples that have no file, several
            that fit equally well, or one together.
    """

    def __init__(
        self,
        folder: str | Path,
        names: Sequence[str],
        classes: Classes,
        values: str = "raw",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if values not in VALUES:
            raise UserError(
                f"predictions_values is {values!r}{nearest(str(values), VALUES)}, expected {_any_of(VALUES)}"
            )
        found = folder_at(Path(folder).expanduser())
        if found is None:
            raise UserError(f"predictions={folder} is not a folder or zip file, or not readable: give that of the PNGs")
        self.files, self.values, self.max_pixels = _matched(found, names), values, max_pixels
        self.classes = _in_colors(classes) if values == "color" else classes

    @property
    def nothing(self) -> int:
        """The train id K of pixels of no class.

        Such are the values that the dataset ignores: 255 of train ids, "unlabeled" of raw ids, black of colours. Where
        the label has a class they are wrong, a miss of that class and of no other, as cityscapesScripts counts them:
        who predicts nothing where it is hard must not gain by it. mmsegmentation drops them from its histogram of
        predictions but not from that of labels, which comes to the same IoU.
        """
        return len(self.classes)

    def read(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """The label map of a sample, (H, W) uint8: train ids 0..K-1, and `nothing`. size: (H, W) of its label.

        Raises:
            UserError: the file is damaged, of another size or kind, or holds values that no class declares.
        """
        file = self.files[name]
        raw = read_mask(file, self.max_pixels)
        if raw.shape[:2] != size:
            raise UserError(
                f"prediction {file} is {raw.shape[1]}x{raw.shape[0]} but the label of {name} is {size[1]}x{size[0]}, "
                "expected equal sizes: save predictions at the image's own size"
            )
        try:
            found = self.classes.encode(self._painted(raw, file), indices=self.values == "train")
        except WrongKind as error:
            kinds = ("one channel", "colours") if self._of_colors else ("colours", "one channel of ids")
            raise UserError(f"prediction {file} holds {kinds[0]}, expected {kinds[1]}: {self._others()}") from error
        except UndeclaredValues as error:
            raise UserError(
                f"prediction {file} holds {error}, expected {self._expected()}: {self._others()}"
            ) from error
        return np.where(found == IGNORE, np.uint8(self.nothing), found)

    @property
    def _of_colors(self) -> bool:
        return self.classes.of_colors and self.values != "train"

    def _painted(self, raw: np.ndarray, file: Place) -> np.ndarray:
        """The colours of a palette PNG, where colours are meant."""
        if raw.ndim == 3 or not self._of_colors or (colors := palette(file)) is None:
            return raw
        table = np.zeros((256, 3), np.uint8)  # a palette may be shorter than what its indices could reach
        table[: len(colors)] = colors
        return table[raw]

    def _expected(self) -> str:
        if self.values == "train":
            return f"train ids 0 to {len(self.classes) - 1}, or {IGNORE}"
        return "what data.classes and data.ignore list" if self.values == "raw" else "the colours of data.classes"

    def _others(self) -> str:
        return f"add {' or '.join(f'predictions_values={value}' for value in VALUES if value != self.values)}"


# -- names


def _files(kind: str, names: Sequence[str]) -> dict[str, str]:
    """The file of each sample below the folder of a submission; no two have one."""
    parts = [_parts(name) for name in names]
    folders = [own[:-1] for own in parts]
    common = _agreeing(min(folders), max(folders)) if folders else 0
    files: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name, own in zip(names, parts, strict=True):
        file = _called(kind, name, own[-1])
        path = file if kind == "ade" else "/".join([*own[common:-1], file])
        key = file if kind == "cityscapes" else path  # the script looks for a file in all folders
        if key in taken:
            raise UserError(f"samples {taken[key]} and {name} would share the file {key}: rename one of them")
        files[name], taken[key] = path, name
    above = {str(parent) for path in files.values() for parent in PurePosixPath(path).parents}
    for name, path in files.items():
        if path in above:
            raise UserError(f"the file {path} of sample {name} would be the folder of others, too: rename one of them")
    return files


def _parts(name: str) -> list[str]:
    """The folders and the stem of a name, none of which leads anywhere else."""
    found: list[str] = []
    for part in re.split(r"[/\\]", composed(name)):
        if part == "..":
            del found[-1:]
        elif part.strip(". "):  # Windows takes "..  " for ".."
            found.append(_UNSAFE.sub("_", part))
    if not found:
        raise UserError(f"a sample is called {name!r}, expected a name that a file may have: change what `name` gives")
    stem, dot, ending = found[-1].rpartition(".")
    return [*found[:-1], stem if dot and stem and ending.lower() in _ENDINGS else found[-1]]


def _called(kind: str, name: str, stem: str) -> str:
    if kind != "cityscapes":
        return f"{stem}.png"
    match = _STREET_NAME.fullmatch(stem)
    if match is None:
        raise UserError(
            f"sample {name} is not called <city>_<6 digits>_<6 digits>, by which Cityscapes' script finds a file: "
            "take data=cityscapes, or submission=ids"
        )
    return f"{match[1]}_pred_labelIds.png"


def _require_new(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} is there already, and submissions replace no file: give a new folder")


# -- values


def _table(kind: str, classes: Classes) -> np.ndarray:
    """(K,) or (K, 3): what stands in the file for each train id."""
    if kind == "color":
        return classes.colors
    if kind == "train_ids":
        return np.arange(len(classes), dtype=np.uint8)
    if kind == "ade":
        if len(classes) != _ADE_CLASSES:
            raise UserError(
                f"submission=ade is for the {_ADE_CLASSES} classes of ADE20K, the data has {len(classes)}: "
                "take data=ade20k, or submission=ids"
            )
        return np.arange(1, _ADE_CLASSES + 1, dtype=np.uint8)
    if classes.of_colors:
        raise UserError(f"submission={kind} writes raw ids, but the masks of the data hold colours: take color")
    raws = [np.flatnonzero(classes.lookup == index)[:1] for index in range(len(classes))]
    for name, raw in zip(classes.names, raws, strict=True):
        if not len(raw):
            raise UserError(f"class {name!r} has no raw id in data.classes: take submission=train_ids or color")
    table = np.concatenate(raws)
    if kind == "cityscapes" and not set(table.tolist()) <= _STREET_IDS:
        index = next(index for index, raw in enumerate(table.tolist()) if raw not in _STREET_IDS)
        raise UserError(
            f"class {classes.names[index]!r} is {table[index]} in the masks, which is no label id that Cityscapes "
            "scores (road is 7, bicycle 33): take data=cityscapes, or submission=ids"
        )
    return table.astype(np.uint8 if table.max() < 256 else np.uint16)


def _in_colors(classes: Classes) -> Classes:
    """The same classes, by their colours; black, as ignored pixels are drawn, is none of them unless one is black."""
    entries = {name: {"color": color.tolist()} for name, color in zip(classes.names, classes.colors, strict=True)}
    free = (classes.colors != VOID).any(axis=1).all()
    try:
        colored = Classes.from_config(entries, [list(VOID)] if free else [], "colors")
    except UserError as error:
        raise UserError(f"predictions_values=color cannot tell the classes apart, {error}: save ids instead") from error
    return replace(classes, lookup=colored.lookup)


# -- the files of a folder


class _Candidate(NamedTuple):
    folders: int  # how many of the last ones are those of the image
    others: int  # how many it has beside these, as a negative number
    exact: int  # 2: called as the image, 1: without what stands for images alone, 0: with an addition
    place: Place


def _matched(folder: Place, names: Sequence[str]) -> dict[str, Place]:
    """The file of each sample."""
    samples = {name: _parts(name) for name in names}
    stems: defaultdict[str, list[str]] = defaultdict(list)
    for name, parts in samples.items():
        for stem in {parts[-1], _OF_IMAGES.sub("", parts[-1])}:
            stems[stem].append(name)
    found: defaultdict[str, list[_Candidate]] = defaultdict(list)
    shown: list[str] = []
    for path, place in _pngs(folder):
        own = _parts(path)
        shown.append(path)
        meant = next((stem for stem in _shortened(own[-1]) if stem in stems), None)
        for name in stems[meant] if meant is not None else ():
            exact = (own[-1] == meant) + (own[-1] == samples[name][-1])
            folders = _agreeing(own[-2::-1], samples[name][-2::-1])
            found[name].append(_Candidate(folders, folders - len(own) + 1, exact, place))
    missing = [name for name in samples if name not in found]
    if missing:
        stem = _OF_IMAGES.sub("", samples[missing[0]][-1])
        raise UserError(
            f"{len(missing)} of {len(samples)} samples have no prediction in {folder}, first {missing[0]}: expected "
            f"{stem}.png or {stem}_*.png below it, which holds {_few(shown) or 'no PNG'}"
        )
    return _one_each({name: _best(name, found[name]) for name in samples})


def _pngs(folder: Place, above: str = "") -> Iterator[tuple[str, Place]]:
    """All PNG files, by their paths below the folder; no hidden ones, and none of archives that lie in it."""
    for entry in entries(folder):
        archive = isinstance(entry.place, Path) and entry.folder and not entry.place.is_dir()
        if entry.name[0] == "." or archive:
            continue
        if entry.folder:
            yield from _pngs(entry.place, f"{above}{entry.name}/")
        elif entry.name[-4:].lower() == ".png":
            yield above + entry.name, entry.place


def _shortened(stem: str) -> Iterator[str]:
    """The stem, and what stands before each of its separators, the longest first: `img_1_2` is of no sample `img_1`,
    where there is a sample `img_1_2`."""
    yield stem
    for match in reversed([*re.finditer(r"[_.-]", stem)]):
        yield stem[: match.start()]


def _agreeing(first: Sequence[str], second: Sequence[str]) -> int:
    """How many of the first items are equal."""
    pairs = zip(first, second, strict=False)  # one may have more folders than the other
    return len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])


def _best(name: str, candidates: Sequence[_Candidate]) -> Place:
    most = max(candidate[:3] for candidate in candidates)
    best = [candidate.place for candidate in candidates if candidate[:3] == most]
    if len(best) > 1:
        raise UserError(
            f"sample {name} has {len(best)} predictions, {_few(map(str, best))}, expected one: "
            "give the folder that holds the label maps alone"
        )
    return best[0]


def _one_each(files: dict[str, Place]) -> dict[str, Place]:
    taken: dict[str, str] = {}
    for name, place in files.items():
        other = taken.setdefault(str(place), name)
        if other != name:
            raise UserError(
                f"samples {other} and {name} have one prediction together, {place}, expected one each: "
                "lay the predictions in folders called as those of the images"
            )
    return files


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _any_of(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
