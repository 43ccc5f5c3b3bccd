"""Opens what a split is read from: the keys of its section tell which kind of source it is."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np

from segformer.data.samples import Foreign, Selected, Source, Stream
from segformer.errors import UserError, build, nearest
from segformer.pixels import MAX_PIXELS

# the keys of each kind; the first one is its own, or is it where none of the kinds above is meant
KINDS = {
    "a table of pairs": ("csv", "split"),
    "COCO JSON": ("coco", "images"),
    "patterns of files": ("images", "masks", "list"),
    "toy scenes": ("scenes", "seed"),
    "a Hugging Face dataset": ("split", "subset", "revision", "image", "mask", "streaming"),
}
PART = ("fraction", "fraction_seed")  # of any kind


def open_source(
    split: str, spec: Any, root: str | None, max_pixels: int = MAX_PIXELS, bands: int = 3
) -> Source | Stream:
    """The source of one split: what `data.{split}` names, a list of such sections joined, or an object of the user's.

    A section may ask for a part: fraction [from, to] of the samples in an order shuffled by fraction_seed, so that
    [0, 0.8] and [0.8, 1] have no sample in common and leave none out. max_pixels, bands: see `samples.Samples`.

    Raises:
        UserError: the section is of no kind, or what it names cannot be read.
    """
    where = f"data.{split}"
    if isinstance(spec, Source | Stream):
        return spec
    if isinstance(spec, Mapping):
        return _section(where, {str(key): value for key, value in spec.items()}, root, max_pixels, bands)
    if isinstance(spec, list | tuple) and spec:
        parts = [open_source(f"{split}[{index}]", one, root, max_pixels, bands) for index, one in enumerate(spec)]
        return _joined(where, parts)
    if all(hasattr(spec, name) for name in ("__len__", "__getitem__", "name")):
        return Foreign(spec)  # built by the user's own `_target_`
    raise UserError(
        f"{where} is {spec!r}, expected {{images: pattern, masks: pattern}} or another section ({_kinds()}), a list of "
        "them, or an object of your own that has __len__, __getitem__ and name"
    )


def _section(where: str, spec: dict[str, Any], root: str | None, max_pixels: int, bands: int) -> Source | Stream:
    given = {key for key, value in spec.items() if value is not None}
    kind = next((kind for kind, keys in KINDS.items() if keys[0] in given), None)
    known = [*(KINDS[kind] if kind else [keys[0] for keys in KINDS.values()]), *PART]
    # null takes away a key of a section that this one was merged with
    options = {key: value for key, value in spec.items() if key in known or value is not None}
    wrong = next((key for key in options if key not in known), None)
    if wrong or kind is None:
        told = f"unknown key '{where}.{wrong}'{nearest(wrong, known)}" if wrong else f"{where} is {spec!r}"
        raise UserError(f"{told}: expected {_kinds()}; null takes a key away")
    fraction, seed = options.pop("fraction", None), options.pop("fraction_seed", None)
    source = _opened(where, options, root, max_pixels, bands)
    if fraction is None:
        return source
    if isinstance(source, Stream):
        raise UserError(f"{where}.fraction cannot cut a stream, which is not shuffled as a whole: leave out streaming")
    return _part(where, source, fraction, 0 if seed is None else seed)


def _opened(where: str, options: dict[str, Any], root: str | None, max_pixels: int, bands: int) -> Source | Stream:
    if "csv" in options:
        from segformer.data.pairs import Table

        return build(where, Table, options, root=root, max_pixels=max_pixels, bands=bands)
    if "coco" in options:
        from segformer.data.coco import CocoJson

        return build(where, CocoJson, options, root=root, max_pixels=max_pixels, bands=bands)
    if "images" in options:
        from segformer.data.pairs import Pairs

        return build(where, Pairs, options, root=root, max_pixels=max_pixels, bands=bands)
    if "scenes" in options:
        from segformer.data.toy import ToyScenes

        return build(where, ToyScenes, options)
    from segformer.data.hub import open_hub

    return build(where, open_hub, options, root=root, max_pixels=max_pixels, bands=bands)


def _kinds() -> str:
    listed = [f"{{{', '.join(keys)}}} for {kind}" for kind, keys in KINDS.items()]
    return f"{', '.join(listed[:-1])} or {listed[-1]}, any of them with {' and '.join(PART)}"


def _joined(where: str, parts: Sequence[Source | Stream]) -> Selected:
    sources = [part for part in parts if isinstance(part, Source)]
    if len(sources) < len(parts):
        raise UserError(f"{where} joins several sources, of which one is a stream: leave out its streaming")
    if len({source.labelled for source in sources}) > 1:
        raise UserError(f"{where} joins images with masks and images without: give them in splits of their own")
    return Selected([(source, index) for source in sources for index in range(len(source))])


def _part(where: str, source: Source, fraction: Any, seed: Any) -> Selected:
    """The samples from one share to another of a shuffled order, themselves in the source's order."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UserError(f"{where}.fraction_seed is {seed!r}, expected a whole number from 0 on")
    numbers = isinstance(fraction, list | tuple) and [
        one for one in fraction if isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one <= 1
    ]
    if not numbers or len(numbers) != 2 or len(fraction) != 2 or numbers[0] >= numbers[1]:
        raise UserError(f"{where}.fraction is {fraction!r}, expected [from, to] with 0 <= from < to <= 1")
    # as they are written: 0.8 cuts ten samples after eight, whatever the float is
    start, end = (floor(Fraction(str(share)) * len(source)) for share in numbers)
    if start == end:
        raise UserError(f"{where}.fraction is {fraction!r}, which leaves none of {len(source)} samples: widen it")
    order = np.random.RandomState(seed).permutation(len(source))  # the stream that NumPy promises never to change
    return Selected([(source, int(index)) for index in sorted(order[start:end])])
