"""Images and masks that lie in files: matched by two patterns, some of them named by a list, or the rows of a table."""

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile, zip_longest
from pathlib import Path, PurePosixPath

from segformer.data.archives import Entry, Place, child, composed, entries, folder_at, walk
from segformer.data.samples import Samples
from segformer.errors import UserError, nearest
from segformer.pixels import MAX_PIXELS

Key = tuple[str, ...]  # what the stars of a pattern stand for

IMAGE_COLUMNS = ("image", "images", "img", "image_path", "file_name", "filename")
MASK_COLUMNS = ("mask", "masks", "label", "labels", "annotation", "mask_path", "label_path", "segmentation")
SPLIT_COLUMNS = ("split", "subset", "set")

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")  # of another file of the same sample, in a list
_SHOWN = 5  # names in an error


class Pairs(Samples):
    """Image and mask files below `root`, matched by what the stars of two patterns stand for.

    images="leftImg8bit/val/*/*_leftImg8bit.png" and masks="gtFine/val/*/*_gtFine_labelIds.png" pair frames by city and
    frame name. A pattern that ends in a star takes any extension: "images/train/*" goes with "masks/train/*". Of a list
    of mask patterns the first one that finds files is read; None: images without masks. A zip file stands for a folder,
    in `root` and in patterns.

    list: a text file below `root` that names the samples to take, in its order, one in a line: by what the stars stand
    for, by a path, or by a file name, with or without extension. Of two columns the second is a mask: none is taken
    from it, but one that belongs to another sample is refused. max_pixels, bands: see `samples.Samples`.
    """

    def __init__(
        self,
        root: str | Path | None,
        images: str,
        masks: str | Sequence[str] | None,
        list: str | None = None,
        max_pixels: int = MAX_PIXELS,
        bands: int = 3,
    ) -> None:
        choices = _checked(images, masks)
        base = _base(root, " and ".join([images, *choices[:1]]))
        found_images = _find(base, images)
        if not found_images:
            raise UserError(f"no images at {base}/{images}: check data.root and the pattern{_held(base, images)}")
        pattern, found_masks = _first_found(base, choices)
        keys = sorted(found_images) if list is None else _listed(base, list, _Names(found_images), _Names(found_masks))
        if choices:
            _require_partners(base, {key: found_images[key] for key in keys}, found_masks, "mask", pattern)
            if list is None:
                _require_partners(base, found_masks, found_images, "image", images)
        super().__init__([(found_images[key], found_masks.get(key)) for key in keys], max_pixels, bands)


class Table(Samples):
    """Image and mask files below `root` that stand side by side in the rows of a CSV file with a header.

    split: keeps the rows that have it in their column `split`. Cells of masks are all filled or all empty: images
    without masks. max_pixels, bands: see `samples.Samples`.
    """

    def __init__(
        self,
        root: str | Path | None,
        csv: str,
        split: str | None = None,
        max_pixels: int = MAX_PIXELS,
        bands: int = 3,
    ) -> None:
        base = _base(root, csv)
        table, rows = f"{base}/{csv}", _rows(base, csv)
        if split is not None:
            rows = _of_split(table, rows, split)
        cells = [(number, _cell(row, IMAGE_COLUMNS), _cell(row, MASK_COLUMNS)) for number, row in rows]
        if not cells:
            raise UserError(f"{table} has no rows below its header: add one of an image and its mask for each sample")
        bare = [number for number, _, mask in cells if not mask]
        if 0 < len(bare) < len(cells):
            raise UserError(
                f"{table}: {len(bare)} of {len(cells)} rows have no mask, first row {bare[0]}: fill them, or empty all"
            )
        super().__init__(_pairs_of_rows(base, table, cells), max_pixels, bands)


def _checked(images: str, masks: str | Sequence[str] | None) -> list[str]:
    """The patterns of masks, in the order in which they are tried."""
    choices = [masks] if isinstance(masks, str) else masks if masks is not None else []
    wrong = not isinstance(choices, Sequence) or any(not isinstance(one, str) for one in choices)
    if wrong or not (choices or masks is None):
        raise UserError(f"masks is {masks!r}, expected a pattern below data.root or a list of patterns, or null")
    for pattern in (images, *choices):
        if any(sign in pattern for sign in ("**", "?", "[")) or not _is_below(pattern):
            raise UserError(f"pattern {pattern!r}: expected a path below data.root in which only single stars stand")
        if pattern.count("*") != images.count("*"):
            raise UserError(
                f"{images!r} and {pattern!r} have different numbers of stars, "
                "expected one mask star for each image star"
            )
    return [*choices]


def _base(root: str | Path | None, holds: str) -> Place:
    if root is None:
        raise UserError("data.root is not set: add data.root=FOLDER, the folder that holds the images and masks")
    base = folder_at(Path(root).expanduser())
    if base is None:
        raise UserError(
            f"data.root={root} is not a folder or zip file, or not readable: give the folder that holds {holds}"
        )
    return base


def _is_below(path: str) -> bool:
    return not os.path.isabs(path) and ".." not in path.split("/")


def _find(base: Place, pattern: str) -> dict[Key, Place]:
    """Files that match, by what the stars stand for; of a final star without the extension."""
    expression = re.compile("(.+)".join(re.escape(composed(part)) for part in pattern.split("*")), re.DOTALL)
    found: dict[Key, Place] = {}
    for name, place in walk(base, PurePosixPath(pattern).as_posix().split("/")):
        match = expression.fullmatch(composed(name))
        if not match:
            continue
        key = match.groups()
        if pattern.endswith("*"):
            key = (*key[:-1], os.path.splitext(key[-1])[0])
        if key in found:
            raise UserError(f"{found[key]} and {place} match the same sample of {pattern!r}: keep one of them")
        found[key] = place
    return found


def _first_found(base: Place, choices: list[str]) -> tuple[str, dict[Key, Place]]:
    for pattern in choices:
        if found := _find(base, pattern):
            return pattern, found
    for pattern in choices:
        raw = pattern.replace("_labelTrainIds", "_labelIds")
        if raw != pattern and _find(base, raw):
            raise UserError(
                f"no masks at {base}/{pattern}: *_labelTrainIds.png is not shipped but made by "
                f"csCreateTrainIdLabelImgs; data=cityscapes reads the *_labelIds.png that are there, "
                f"or give masks={raw} with the ids of each class in data.classes"
            )
    return choices[0] if choices else "", {}


def _require_partners(
    base: Place, files: Mapping[Key, Place], partners: Mapping[Key, Place], what: str, wanted: str
) -> None:
    lonely = sorted(files.keys() - partners.keys())
    if lonely:
        held = "" if partners else _held(base, wanted)
        raise UserError(
            f"{len(lonely)} of {len(files)} files have no {what}, first {files[lonely[0]]}: "
            f"expected {base}/{_fill(wanted, lonely[0])}{held}"
        )


def _fill(pattern: str, key: Key) -> str:
    parts = pattern.split("*")
    filled = parts[0] + "".join(star + part for star, part in zip(key, parts[1:], strict=True))
    return filled + ".*" if pattern.endswith("*") else filled


def _held(base: Place, pattern: str) -> str:
    """What lies in the last folder that does exist: mostly the folder that data.root or the pattern left out."""
    folder = base
    for part in takewhile(lambda part: "*" not in part, pattern.split("/")[:-1]):
        below = child(folder, part)
        if below is None:
            break
        folder = below
    names = [entry.name for entry in entries(folder) if entry.name[0] != "."]
    return f"; {folder} holds {_few(names) or 'nothing'}"


class _Names:
    """Finds the file that a line of a list means, whatever spelling its author chose."""

    def __init__(self, found: Mapping[Key, Place]) -> None:
        self.found = found

    def meant(self, text: str, loose: bool) -> list[Key]:
        """The samples that a text may stand for: a single one, if all is well.

        loose: the last folders of a path decide, as far as they are here; else all of them have to be here.
        """
        parts = [part for part in composed(text).replace("\\", "/").split("/") if part not in ("", ".")]
        if not parts:
            return []
        *folders, name = parts
        if (*folders, name) in self.found:
            return [(*folders, name)]
        stem, extension = os.path.splitext(name)
        keys = self._keys.get(name) or (self._keys.get(stem, []) if extension.lower() in _EXTENSIONS else [])
        agreeing = [self._agreeing(key, folders) for key in keys]
        least = max(agreeing, default=0) if loose else len(folders)
        return [key for key, count in zip(keys, agreeing, strict=True) if count == least]

    @cached_property
    def _keys(self) -> dict[str, list[Key]]:
        keys: defaultdict[str, list[Key]] = defaultdict(list)
        for key, place in self.found.items():
            name = composed(str(place).rpartition("/")[2])
            for spelling in {name, os.path.splitext(name)[0], *key[-1:]}:
                keys[spelling].append(key)
        return keys

    def _agreeing(self, key: Key, folders: Sequence[str]) -> int:
        """How many of the last folders are those in which the file lies."""
        if not folders:
            return 0
        own = composed(os.path.abspath(str(self.found[key]))).split("/")[:-1]
        pairs = zip(reversed(folders), reversed(own), strict=False)  # either may have more folders than the other
        return len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])


def _listed(base: Place, file: str, images: _Names, masks: _Names) -> list[Key]:
    """The samples that a list names, in its order."""
    listed: dict[Key, int] = {}
    unknown: list[tuple[int, str]] = []
    for number, text in _lines(base, file):
        where = f"{base}/{file}:{number}"
        keys, mask = _meant(images, text)
        if not keys:
            unknown.append((number, text))
            continue
        image = images.found[keys[0]]
        if len(keys) > 1:
            raise UserError(
                f"{where}: {text!r} may be {image} or {images.found[keys[1]]}: "
                "write as much of the path as tells them apart"
            )
        if keys[0] in listed:
            raise UserError(
                f"{where}: {image} is listed already in line {listed[keys[0]]}: remove one of the two lines"
            )
        others = masks.meant(mask, loose=True)
        if others and keys[0] not in others:
            raise UserError(
                f"{where}: image {image} stands beside mask {masks.found[others[0]]}, which the patterns give to "
                "another image: correct the list or the patterns"
            )
        listed[keys[0]] = number
    if unknown:
        number, text = unknown[0]
        raise UserError(
            f"{base}/{file}:{number}: {text!r} is none of the {len(images.found)} images found "
            f"({len(unknown)} such lines in all): looked for it as what the stars of the pattern stand for, as a path, "
            "and as a file name, each with and without extension"
        )
    if not listed:
        raise UserError(f"{base}/{file} lists no samples: name one image in each line")
    return [*listed]


def _lines(base: Place, file: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(io.StringIO(_text(base, file, "list"), newline=None), 1):
        text = line.strip()
        if text and text[0] != "#":
            yield number, text


def _meant(images: _Names, text: str) -> tuple[list[Key], str]:
    """The samples that a line may stand for, and the column beside them."""
    # names may hold spaces; a slash behind one may belong to the second column, whose name must not be taken for ours
    several = "/" in "".join(text.split(None, 1)[1:])
    foreign = text.startswith("/")  # the first folders of an absolute path are mostly those of the list's author
    if keys := images.meant(text, loose=foreign and not several):
        return keys, ""
    for separator in (r"\s+(?=/)", r"\s*\t\s*", r"\s+"):
        image, *mask = re.split(separator, text, maxsplit=1)
        if mask and (keys := images.meant(image, loose=foreign)):
            return keys, mask[0]
    return [], ""


def _text(base: Place, file: str, key: str) -> str:
    """A text file below data.root, in UTF-8 with or without BOM."""
    try:
        found = _Files(base).at(_path_below(base, file))
        if found is None:
            raise UserError(
                f"{key}={file}: no such file in {base}, expected a text file below data.root{_held(base, file)}"
            )
        return found.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{key} {base}/{file} is no UTF-8 text: save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {key} {base}/{file}: {error.strerror}; make it readable") from error


def _path_below(base: Place, text: str) -> str:
    path = text.replace("\\", "/").removeprefix(os.path.abspath(str(base)) + "/")
    if os.path.isabs(path) or ".." in path.split("/"):
        raise UserError(
            f"{text!r} leads out of data.root={base}, expected a path below it: move the file, or data.root"
        )
    return os.path.normpath(path) if path else ""


class _Files:
    """Finds files by their paths below a folder; each folder is read once."""

    def __init__(self, base: Place) -> None:
        self._base, self._known = base, dict[str, dict[str, Entry]]()

    def at(self, path: str) -> Place | None:
        folder, _, name = composed(path).rpartition("/")
        entry = self._entries(folder).get(name)
        return None if entry is None or entry.folder else entry.place

    def _entries(self, folder: str) -> dict[str, Entry]:
        if folder not in self._known:
            above, _, name = folder.rpartition("/")
            entry = self._entries(above).get(name) if folder else None
            place = entry.place if entry else None if folder else self._base
            self._known[folder] = {composed(one.name): one for one in entries(place)} if place else {}
        return self._known[folder]


def _rows(base: Place, file: str) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV file, each with the number of its line, as cells by the names of their columns."""
    text, table = _text(base, file, "csv"), f"{base}/{file}"
    found: list[str] = []
    for delimiter in ",;\t":
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            columns = [cell.strip().lower() for cell in next(reader, [])]
            if not set(columns).isdisjoint(IMAGE_COLUMNS) and not set(columns).isdisjoint(MASK_COLUMNS):
                cells = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
                return [
                    (number, dict(zip_longest(columns, row[: len(columns)], fillvalue="")))
                    for number, row in cells
                    if any(row)
                ]
        except csv.Error as error:
            raise UserError(f"{table}:{reader.line_num}: {error}; save it as CSV again") from error
        found = max(found, columns, key=len)
    raise UserError(
        f"{table} has the columns {', '.join(found)}, expected one of {', '.join(IMAGE_COLUMNS)} and one of "
        f"{', '.join(MASK_COLUMNS)}: name them so in its first line"
    )


def _cell(row: Mapping[str, str], columns: Iterable[str]) -> str:
    return next(row[column] for column in columns if column in row)


def _of_split(table: str, rows: list[tuple[int, dict[str, str]]], split: str) -> list[tuple[int, dict[str, str]]]:
    names = rows[0][1].keys() if rows else ()
    column = next((name for name in SPLIT_COLUMNS if name in names), None)
    if column is None:
        raise UserError(
            f"{table} has no column {', '.join(SPLIT_COLUMNS)}, expected one that says which rows are of split "
            f"{split!r}: add it, or leave out split"
        )
    kept = [(number, row) for number, row in rows if row[column] == split]
    if not kept:
        splits = sorted({row[column] for _, row in rows})
        raise UserError(
            f"{table} has no rows of split {split!r}{nearest(split, splits)}: its column {column} holds {_few(splits)}"
        )
    return kept


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name or "''" for name in names[:_SHOWN]) + more


def _pairs_of_rows(base: Place, table: str, cells: Sequence[tuple[int, str, str]]) -> list[tuple[Place, Place | None]]:
    files, pairs, missing = _Files(base), [], []
    for number, image, mask in cells:
        paths = [image, *([mask] if mask else [])]
        try:
            found = [files.at(_path_below(base, path)) for path in paths]
        except UserError as error:
            raise UserError(f"{table}:{number}: {error}") from error
        lost = [path for path, file in zip(paths, found, strict=True) if file is None]
        if lost:
            missing.append(f"line {number}: {' and '.join(path or 'no image' for path in lost)}")
        elif found[0]:
            pairs.append((found[0], found[1] if mask else None))
    if missing:
        raise UserError(
            f"{len(missing)} of {len(cells)} rows of {table} name files that do not exist below data.root={base} "
            f"({_few(missing)}): correct the paths, or data.root"
        )
    return pairs
