"""Damaged files of every kind: a sample or one clear sentence, in bounded time, and never the end of the process."""

import multiprocessing
import struct
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from segformer.data.pairs import Pairs
from segformer.errors import UserError
from segformer.labels import read_mask
from segformer.pixels import read_image

SECONDS = 20.0  # for one file: a header may ask for as many pixels as `max_pixels` allows
SENTENCES = ("cannot read ", "mask ", "image ", "archive ", "member ")


class Bytes:
    """A file that lies in memory."""

    def __init__(self, name: str, content: bytes) -> None:
        self.name, self.content = name, content

    def read_bytes(self) -> bytes:
        return self.content

    def __str__(self) -> str:
        return self.name


def originals() -> list[tuple[str, str, bytes]]:
    """(name, "image" or "mask", content) of one whole file of each kind."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8).repeat(4, 0).repeat(4, 1))
    ids = Image.fromarray(rng.integers(0, 5, (12, 10), np.uint8).repeat(4, 0).repeat(4, 1))
    palette = ids.copy()
    palette.putpalette(list(range(256)) * 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    files: list[tuple[str, str, Image.Image, dict]] = [
        ("a.jpg", "image", photo, {"quality": 90}), ("progressive.jpg", "image", photo, {"progressive": True}),
        ("turned.jpg", "image", photo, {"exif": exif}), ("grey.jpg", "image", photo.convert("L"), {}),
        ("cmyk.jpg", "image", photo.convert("CMYK"), {}), ("a.png", "image", photo, {}), ("a.webp", "image", photo, {}),
        ("a.bmp", "image", photo, {}), ("a.gif", "image", photo, {}), ("a.tif", "image", photo, {}),
        ("lzw.tif", "image", photo, {"compression": "tiff_lzw"}), ("a.jp2", "image", photo, {}),
        ("grey.png", "mask", ids, {}), ("palette.png", "mask", palette, {}), ("rgb.png", "mask", photo, {}),
        ("bilevel.png", "mask", ids.convert("1"), {}), ("grey.tif", "mask", ids, {}), ("grey.bmp", "mask", ids, {}),
        ("wide.png", "mask", Image.fromarray(np.array(ids).astype(np.uint16) * 300), {}),
    ]  # fmt: skip
    made = []
    for name, kind, image, options in files:
        file = BytesIO()
        ending = name.rpartition(".")[2]
        image.save(file, {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(ending, ending), **options)
        made.append((name, kind, file.getvalue()))
    return made


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bits, a cut, a random header, random sizes under a right checksum, or bytes put in and taken out."""
    data, how = bytearray(content), rng.integers(6)
    if how == 0:
        for place in rng.integers(0, len(data), rng.integers(1, 20)):
            data[place] ^= 1 << int(rng.integers(8))
    elif how == 1:
        del data[rng.integers(0, len(data)) :]
    elif how == 2:
        length = min(len(data), int(rng.integers(1, 64)))
        data[:length] = rng.bytes(length)
    elif how == 3:
        place = int(rng.integers(0, len(data)))
        data[place : place + int(rng.integers(0, 30))] = rng.bytes(int(rng.integers(0, 30)))
    elif how == 4 and content.startswith(b"\x89PNG"):
        data[16:29] = struct.pack(">IIBBBBB", *rng.integers(0, 70000, 2), *rng.integers(0, 9, 2), 0, 0, rng.integers(2))
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    else:  # the header stays and the rest is noise that ends as the file did
        half = min(len(data) // 2, 200)
        data[half:-12] = rng.bytes(len(data) - half - 12)
    return bytes(data)


def outcomes(seeds: range) -> list[tuple[str, float, str]]:
    """(what came of it, seconds, which file) of each damaged file."""
    found, files = [], originals()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        name, kind, content = files[rng.integers(len(files))]
        file, start = Bytes(name, damaged(content, rng)), time.monotonic()
        try:
            pixels = (read_image if kind == "image" else read_mask)(file)
            kinds = (np.uint8,) if kind == "image" else (np.uint8, np.uint16)
            sound = pixels.dtype in kinds and (pixels.ndim == 3 or kind == "mask") and pixels.size
            outcome = "sample" if sound else f"array {pixels.dtype} {pixels.shape}"
        except UserError as error:
            sentence = str(error)
            outcome = (
                "sentence" if sentence.startswith(SENTENCES) and name in sentence and "\n" not in sentence else sentence
            )
        found.append((outcome, time.monotonic() - start, f"{name} of seed {seed}"))
    return found


def run(count: int) -> Counter[str]:
    """Counts outcomes; in a process of its own, so that a crash is a failure and not the end of all tests."""
    parts = [range(start, min(start + 250, count)) for start in range(0, count, 250)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = [one for part in pool.map(outcomes, parts) for one in part]
    slowest = max(found, key=lambda one: one[1])
    assert slowest[1] < SECONDS, slowest
    strange = [one for one in found if one[0] not in ("sample", "sentence")]
    assert not strange, strange[:5]
    return Counter(outcome for outcome, _, _ in found)


def test_ten_thousand_damaged_files_give_a_sample_or_a_sentence() -> None:
    counts = run(10_000)
    assert counts.total() == 10_000 and counts["sentence"] > 3000 and counts["sample"] > 1000


def sentence_of(read: Callable[[], object], names: str) -> str | None:
    """What was told, None where it could be read; anything but one line that names the file fails."""
    try:
        read()
    except UserError as error:
        return str(error) if names in str(error) and "\n" not in str(error) else f"STRANGE {error}"
    return None


def test_damaged_archives_give_samples_or_a_sentence(tmp_path: Path) -> None:
    whole, (photo, mask) = tmp_path / "whole.zip", (originals()[5][2], originals()[12][2])
    with zipfile.ZipFile(whole, "w") as archive:
        for index in range(20):
            archive.writestr(f"images/{index}.png", photo)
            archive.writestr(f"masks/{index}.png", mask)
    told, samples = [], 0
    for seed in range(150):
        path = tmp_path / f"{seed}.zip"
        path.write_bytes(damaged(whole.read_bytes(), np.random.default_rng(seed)))
        opened = sentence_of(partial(Pairs, path, "images/*", "masks/*"), str(path))
        if opened is None:
            source = Pairs(path, "images/*", "masks/*")
            read = [sentence_of(partial(source.__getitem__, index), str(path)) for index in range(len(source))]
            told += [sentence for sentence in read if sentence]
            samples += read.count(None)
        else:
            told.append(opened)
        path.unlink()
    assert not [sentence for sentence in told if sentence.startswith("STRANGE")]
    assert len(told) > 100 and samples > 300
