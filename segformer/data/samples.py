"""What a source of samples is: it gives (image, raw mask) by number, or one after another."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from segformer.errors import UserError
from segformer.labels import palette, read_mask
from segformer.pixels import MAX_PIXELS, Readable, image_size, orientation, read_image


class Own(Protocol):
    """What a source class of a user's own has to have."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The image, uint8 (H, W, bands), and the raw mask: ids (H, W) or colours (H, W, 3)."""

    def name(self, index: int) -> str:
        """What to call the sample in errors and reports: its file, where it has one."""


class Hints(NamedTuple):
    """palette: (N, 3) colours of a palette mask. turned: EXIF turns or mirrors the image, and not its mask."""

    palette: np.ndarray | None = None
    turned: bool = False


class Source:
    """Samples by number, and what is cheaper to ask for than a whole sample."""

    labelled = True  # False: images without masks

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The image, uint8 (H, W, bands), and the raw mask of its size: ids (H, W) or colours (H, W, 3)."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call the sample in errors and reports: its image file, where it has one."""
        raise NotImplementedError

    def mask_name(self, index: int) -> str:
        return self.name(index)

    def mask(self, index: int) -> np.ndarray:
        """The raw mask without its image."""
        return self[index][1]

    def image(self, index: int) -> np.ndarray:
        """The image without its mask."""
        return self[index][0]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the image, from its header where it has one."""
        height, width = self.image(index).shape[:2]
        return height, width

    def hints(self, index: int) -> Hints:
        """What the files tell beside their pixels."""
        return Hints()

    def stamp(self, index: int) -> str | None:
        """Text that changes when the content of the sample may have changed; None where nobody can say."""
        return None

    def image_bytes(self, index: int) -> bytes | None:
        """The content of the image's file, by which the same image is found in two places."""
        return None


class Samples(Source):
    """Pairs of an image and a mask file; a mask of None is an image without label.

    max_pixels: of one file. bands: channels of an image.
    """

    def __init__(
        self, files: Sequence[tuple[Readable, Readable | None]], max_pixels: int = MAX_PIXELS, bands: int = 3
    ) -> None:
        self.files, self.max_pixels, self.bands = files, max_pixels, bands
        self.labelled = all(mask is not None for _, mask in files)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index][0])

    def mask_name(self, index: int) -> str:
        image, mask = self.files[index]
        return str(mask or image)

    def mask(self, index: int) -> np.ndarray:
        mask = self.files[index][1]
        if mask is None:
            raise UserError(f"image {self.name(index)} has no mask: it can be predicted, not scored or trained on")
        return read_mask(mask, self.max_pixels)

    def image(self, index: int) -> np.ndarray:
        return read_image(self.files[index][0], self.max_pixels, self.bands)

    def size(self, index: int) -> tuple[int, int]:
        return image_size(self.files[index][0], self.max_pixels, self.bands)

    def hints(self, index: int) -> Hints:
        image, mask = self.files[index]
        if mask is None or self.bands != 3:
            return Hints()
        return Hints(palette(mask), orientation(image) != 1 and orientation(mask) == 1)

    def image_bytes(self, index: int) -> bytes | None:
        return self.files[index][0].read_bytes()

    def stamp(self, index: int) -> str | None:
        return "\n".join([f"{self.bands} bands", *(_stamp(file) for file in self.files[index] if file is not None)])

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = self.image(index), self.mask(index)
        require_equal_sizes(image, mask, self.name(index), self.mask_name(index))
        return image, mask


class Elsewhere(Source):
    """Samples that other sources have."""

    def at(self, index: int) -> tuple[Source, int]:
        """Whose sample it is, and its number there."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        source, place = self.at(index)
        return source[place]

    def name(self, index: int) -> str:
        source, place = self.at(index)
        return source.name(place)

    def mask_name(self, index: int) -> str:
        source, place = self.at(index)
        return source.mask_name(place)

    def mask(self, index: int) -> np.ndarray:
        source, place = self.at(index)
        return source.mask(place)

    def image(self, index: int) -> np.ndarray:
        source, place = self.at(index)
        return source.image(place)

    def size(self, index: int) -> tuple[int, int]:
        source, place = self.at(index)
        return source.size(place)

    def hints(self, index: int) -> Hints:
        source, place = self.at(index)
        return source.hints(place)

    def stamp(self, index: int) -> str | None:
        source, place = self.at(index)
        return source.stamp(place)

    def image_bytes(self, index: int) -> bytes | None:
        source, place = self.at(index)
        return source.image_bytes(place)


class Selected(Elsewhere):
    """Samples of one or several sources, in a new order: a part of one, or several joined."""

    def __init__(self, places: Sequence[tuple[Source, int]]) -> None:
        self.places = places
        self.labelled = all(source.labelled for source, _ in places)

    def __len__(self) -> int:
        return len(self.places)

    def at(self, index: int) -> tuple[Source, int]:
        return self.places[index]


class Foreign(Source):
    """A user's own class as a source: what it does not have is made from what it has."""

    def __init__(self, own: Own) -> None:
        self.own = own

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            image, raw = self.own[index]
        except UserError:
            raise
        except Exception as error:  # whatever it likes: a sample that cannot be read, as one of ours
            told = " ".join(str(error).split())
            raise UserError(f"sample {self.name(index)} raises {type(error).__name__}: {told}") from error
        if image.ndim != 3 or image.dtype != np.uint8:
            raise UserError(f"image {self.name(index)} is {image.dtype} of {image.shape}, expected uint8 (H, W, bands)")
        if raw.dtype in (bool, np.int32, np.int64) and raw.size and raw.min() >= 0 and raw.max() < 2**16:
            raw = raw.astype(np.uint8 if raw.max() < 256 else np.uint16)
        kinds = {2: (np.uint8, np.uint16), 3: (np.uint8,)}
        if raw.dtype not in kinds.get(raw.ndim, ()) or (raw.ndim == 3 and raw.shape[2] != 3):
            raise UserError(
                f"mask {self.name(index)} is {raw.dtype} of {raw.shape}, expected ids (H, W) from 0 to 65535 or uint8 "
                "colours (H, W, 3)"
            )
        return image, raw

    def name(self, index: int) -> str:
        return self.own.name(index)


class Sample(NamedTuple):
    """One of a stream; `read` decodes it, so that passing it by costs little."""

    name: str
    read: Callable[[], tuple[np.ndarray, np.ndarray]]


class Stream:
    """Samples that come one after another, dealt out to several readers."""

    def shard(self, index: int, count: int, epoch: int | None = None) -> Iterator[Sample]:
        """Part `index` of `count`: the parts together hold each sample exactly once.

        epoch: a number that decides the order, for training; None = as stored. A resumed run sees the same order.
        """
        raise NotImplementedError

    def known_length(self) -> int | None:
        """The number of samples, where the source tells it without being read."""
        return None


def require_equal_sizes(image: np.ndarray, mask: np.ndarray, name: str, mask_name: str) -> None:
    """Raises UserError where a mask does not lie on its image."""
    if image.shape[:2] == mask.shape[:2]:
        return
    (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape[:2]
    turned = " upright, as its EXIF orientation says," if (mask_height, mask_width) == (width, height) else ""
    raise UserError(
        f"image {name} is{turned} {width}x{height} but its mask {mask_name} is {mask_width}x{mask_height}, "
        "expected equal sizes: export the mask again at the image's size"
    )


def _stamp(file: Readable) -> str:
    if isinstance(file, Path):
        try:
            status = file.stat()
        except OSError:  # whoever reads it tells so in a sentence
            return f"{file.absolute()}: gone"
        return f"{file.absolute()}:{status.st_mtime_ns}:{status.st_size}"
    return str(file.stamp())  # type: ignore[attr-defined]  # every file of ours that is no path has one
