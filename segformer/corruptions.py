"""How a network bears bad pictures: the 16 corruptions of Cityscapes-C at five severities, on any source of samples.

Kamann & Rother, "Benchmarking the Robustness of Semantic Segmentation Models" (CVPR 2020), after Hendrycks &
Dietterich (ICLR 2019). The pixels are those of the package imagecorruptions-imaug.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from segformer.data.samples import Elsewhere, Source
from segformer.errors import UserError, nearest

FAMILIES = {
    "blur": ("motion_blur", "defocus_blur", "glass_blur", "gaussian_blur"),
    "noise": ("gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"),
    "digital": ("brightness", "contrast", "saturate", "jpeg_compression"),
    "weather": ("snow", "spatter", "fog", "frost"),
}
CORRUPTIONS = {name: family for family, names in FAMILIES.items() for name in names}
SEVERITIES = (1, 2, 3, 4, 5)
_OWN_GENERATOR = ("glass_blur", "impulse_noise")  # they draw from one of their own, seeded by an argument


def counted(corruption: str) -> tuple[int, ...]:
    """The severities whose mean is its score: all; of noise the first three, the custom ascribed to Kamann & Rother."""
    return SEVERITIES[:3] if CORRUPTIONS[corruption] == "noise" else SEVERITIES


def corrupt(image: np.ndarray, corruption: str, severity: int, seed: int = 0, name: str = "image") -> np.ndarray:
    """The image, uint8 RGB (H, W, 3) of any size, as it looks after one of CORRUPTIONS at severity 1 to 5.

    The same pixels, corruption, severity and seed always give the same result, in whatever process or order; numpy's
    global generator, which the package draws from, is left as it was (so not from two threads at once).
    name: what to call the image in errors. Raises UserError for anything else, or without the package.
    """
    known = _checked(corruption, severity)
    function = _functions()[known]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(
            f"{name} is {image.dtype} of {image.shape}, expected uint8 RGB (H, W, 3): only such images can be corrupted"
        )
    drawn = _draw(image, corruption, severity, seed)
    options = {"seed": drawn} if corruption in _OWN_GENERATOR else {}
    # spatter divides by its largest drop, and on a tiny image none may fall
    with _numpy_seeded(drawn), np.errstate(invalid="ignore"):
        changed = np.asarray(function(Image.fromarray(image), severity, **options))
    return np.where(np.isnan(changed), image, changed).astype(np.uint8)


class Corrupted(Elsewhere):
    """The samples of a source with their images corrupted and their masks as they are."""

    def __init__(self, source: Source, corruption: str, severity: int, seed: int = 0) -> None:
        _checked(corruption, severity)
        _functions()  # a missing package is told here and not by a data worker
        self.source, self.corruption, self.severity, self.seed = source, corruption, severity, seed
        self.labelled = source.labelled

    def __len__(self) -> int:
        return len(self.source)

    def at(self, index: int) -> tuple[Source, int]:
        return self.source, index

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = self.source[index]
        return self._corrupted(image, index), mask

    def image(self, index: int) -> np.ndarray:
        return self._corrupted(self.source.image(index), index)

    def stamp(self, index: int) -> str | None:
        clean = self.source.stamp(index)
        return clean and f"{clean}\n{self.corruption} {self.severity} seed {self.seed}"

    def _corrupted(self, image: np.ndarray, index: int) -> np.ndarray:
        return corrupt(image, self.corruption, self.severity, self.seed, f"image {self.name(index)}")


class Plan:
    """Which corruptions are scored, at which severities: the config section `corruptions`."""

    def __init__(self, names: Sequence[str], severities: Sequence[int], seed: int = 0) -> None:
        for key, value in (("names", names), ("severities", severities)):
            plain = isinstance(value, list | tuple) and all(type(one) in (str, int) for one in value)
            if not plain or not value or len(set(value)) < len(value):
                raise UserError(f"corruptions.{key} is {value!r}, expected a list of different ones")
        self.pairs = [(name, severity) for name in names for severity in severities]
        self.seed = seed
        for name, severity in self.pairs:
            _checked(name, severity)
        _functions()  # a missing package is told before the clean images are scored

    def sources(self, source: Source) -> Iterator[Corrupted]:
        return (Corrupted(source, name, severity, self.seed) for name, severity in self.pairs)


class Row(NamedTuple):
    """One line of the table. scores: at severities 1 to 5, None where not measured. mean: over `counted` severities,
    None where none of them was measured. relative: the mean as a part of the clean score, None where that is 0."""

    name: str
    scores: tuple[float | None, ...]
    mean: float | None
    relative: float | None


def table(clean: float, results: Mapping[tuple[str, int], float]) -> list[Row]:
    """The rows of each measured family: its corruptions, then the family's mean; last the mean of all corruptions.

    clean: the score without corruption. results: (corruption, severity) -> score; all in the same unit, higher is
    better. A mean of fewer corruptions than the family has, or of fewer severities than count, says so in its name.
    """
    for corruption, severity in results:
        _checked(corruption, severity)
    rows, measured = [], []
    for family, names in FAMILIES.items():
        lines = [_row(name, clean, results) for name in names if any((name, s) in results for s in SEVERITIES)]
        if lines:
            rows += [*lines, _mean_row(family, len(names), clean, lines)]
            measured += lines
    return [*rows, _mean_row("all corruptions", len(CORRUPTIONS), clean, measured)]


def markdown(clean: float, rows: Sequence[Row]) -> str:
    """The table as Markdown, for scores that are fractions of 1: percent."""
    head = ["corruption", *map(str, SEVERITIES), "mean", "of clean"]
    lines = [head, ["---", *["--:"] * (len(head) - 1)], ["clean", *[""] * 5, _percent(clean), _percent(1.0)]]
    lines += [[row.name, *map(_percent, row.scores), _percent(row.mean), _percent(row.relative)] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(name: str, clean: float, results: Mapping[tuple[str, int], float]) -> Row:
    scores = tuple(results.get((name, severity)) for severity in SEVERITIES)
    severities = counted(name)
    used = [score for severity in severities if (score := results.get((name, severity))) is not None]
    partial = "" if len(used) == len(severities) else f" ({len(used)} of {len(severities)} severities)"
    mean = fmean(used) if used else None
    return Row(name + partial, scores, mean, _part(mean, clean))


def _mean_row(name: str, whole: int, clean: float, rows: Sequence[Row]) -> Row:
    used = [row.mean for row in rows if row.mean is not None]
    mean = fmean(used) if used else None
    if len(used) < whole:
        name += f" ({len(used)} of {whole})"
    elif any("(" in row.name for row in rows):
        name += " (not all severities)"
    return Row(name, (None,) * len(SEVERITIES), mean, _part(mean, clean))


def _part(mean: float | None, clean: float) -> float | None:
    return mean / clean if mean is not None and clean else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _checked(corruption: str, severity: int) -> str:
    if corruption not in CORRUPTIONS:
        close = nearest(corruption, CORRUPTIONS)
        raise UserError(f"no corruption {corruption!r}{close}: choose from {', '.join(CORRUPTIONS)}")
    if type(severity) is not int or severity not in SEVERITIES:
        raise UserError(f"severity {severity!r} of {corruption}, expected 1, 2, 3, 4 or 5")
    return corruption


def _functions() -> Mapping[str, Callable[..., Any]]:
    try:
        from imagecorruptions import corruption_dict
    except ImportError as error:
        raise UserError(f'corruptions need imagecorruptions: pip install "segformer[robust]" ({error})') from error
    return corruption_dict


def _draw(image: np.ndarray, corruption: str, severity: int, seed: int) -> int:
    """The seed of one corruption of one image; from its pixels, as names and numbers change with the machine."""
    told = f"{image.shape} {corruption} {severity} {seed}".encode()
    return int.from_bytes(blake2b(told + image.tobytes(), digest_size=4).digest(), "big")


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
