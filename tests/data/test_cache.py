"""The cache of decoded samples: what the source gives, whatever lies in the folder."""

import os
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from segformer.data.cache import Cached
from segformer.data.samples import Samples, Selected
from segformer.errors import UserError
from tests.conftest import save


@pytest.fixture
def source(tmp_path) -> Samples:
    """Three images of unequal sizes, with masks of 8 bits, of 16 bits and in colours."""
    rng, files = np.random.default_rng(0), []
    for index, mask in enumerate(
        [rng.integers(0, 256, (40, 50), np.uint8), rng.integers(0, 9999, (41, 50), np.uint16),
         rng.integers(0, 256, (42, 50, 3), np.uint8)]
    ):  # fmt: skip
        image, label = tmp_path / f"{index}.png", tmp_path / f"{index} mask.png"
        save(image, rng.integers(0, 256, (*mask.shape[:2], 3), np.uint8))
        save(label, mask)
        files.append((image, label))
    return Samples(files)


class Counted(Samples):
    """Counts what it decodes."""

    def __init__(self, source: Samples) -> None:
        super().__init__(source.files)
        self.decoded: list[str] = []

    def image(self, index: int) -> np.ndarray:
        self.decoded.append(f"image {index}")
        return super().image(index)

    def mask(self, index: int) -> np.ndarray:
        self.decoded.append(f"mask {index}")
        return super().mask(index)


def require_equal(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_sample_is_decoded_once_and_mapped_read_only_afterwards(source, tmp_path) -> None:
    counted = Counted(source)
    for _ in range(2):  # a second run finds what the first one left
        cached = Cached(counted, tmp_path / "deep" / "cache")
        for index in (0, 1, 2, 0):
            require_equal(cached[index], source[index])
            require_equal((cached.image(index), cached.mask(index)), source[index])
    assert counted.decoded == [f"{what} {index}" for index in range(3) for what in ("image", "mask")]
    image, mask = cached[1]
    assert isinstance(image, np.memmap) and isinstance(mask, np.memmap)
    assert not image.flags.writeable and not mask.flags.writeable


def test_everything_else_is_the_sources(source, tmp_path) -> None:
    cached = Cached(source, tmp_path / "cache")
    assert len(cached) == 3 and cached.labelled == source.labelled
    for index in range(3):
        for ask in ("name", "mask_name", "size", "stamp", "image_bytes"):
            assert getattr(cached, ask)(index) == getattr(source, ask)(index)


def test_a_file_that_changed_is_decoded_again(source, tmp_path) -> None:
    cached = Cached(source, tmp_path / "cache")
    before = cached[0][0].copy()
    path, _ = source.files[0]
    save(path, 255 - before)
    os.utime(path, ns=(1, 1))
    require_equal(cached[0], (255 - before, source.mask(0)))


def _spoilt(content: bytes) -> Iterator[bytes]:
    yield b""
    yield content[:5]
    yield content[:100]
    yield content[: len(content) // 2]
    yield content[:-1]
    yield content + b"\0"
    yield b"PK\x03\x04" + content[4:]
    yield b"\x80\x04]\x94." + content  # a pickle
    yield bytes(len(content))
    for part in (b"'descr'", b"|u1", b"<u2", b"shape", b"(4"):
        yield content.replace(part, b"?" * len(part), 1)
    yield content.replace(b"|u1", b"|b1", 1)
    yield content.replace(b"|u1", b"|O8", 1)
    yield content.replace(b"(4", b"(9", 1)


def test_a_damaged_file_is_never_believed_and_written_again(source, tmp_path) -> None:
    cached = Cached(source, tmp_path / "cache")
    expected = [source[index] for index in range(3)]
    for index in range(3):
        assert cached[index]
    whole = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert len(whole) == 6
    for contents in zip(*(_spoilt(content) for content in whole.values()), strict=True):
        for path, content in zip(whole, contents, strict=True):
            path.unlink()
            path.write_bytes(content)
        for index in range(3):
            require_equal(cached[index], expected[index])
        assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == whole


def test_a_source_without_stamps_is_not_cached(source, tmp_path) -> None:
    class Unstamped(Counted):
        def stamp(self, index: int) -> None:
            return None

    counted = Unstamped(source)
    cached = Cached(counted, tmp_path / "cache")
    for _ in range(2):
        require_equal(cached[0], source[0])
        assert cached.mask(0).shape == (40, 50)
    assert len(counted.decoded) == 6 and not list((tmp_path / "cache").iterdir())


def test_one_file_in_two_sources_is_cached_once(source, tmp_path) -> None:
    twice = Cached(Selected([(source, 1), (source, 1)]), tmp_path / "cache")
    require_equal(twice[0], twice[1])
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_missing_file_and_unequal_sizes_are_told_as_without_a_cache(source, tmp_path) -> None:
    (image, mask), (other, _), _ = source.files
    for files in ([(other, mask)], [(tmp_path / "none.png", mask)]):
        plain, sentences = Samples(files), []
        for one in (plain, Cached(plain, tmp_path / "cache"), Cached(plain, tmp_path / "cache")):
            with pytest.raises(UserError) as told:
                one[0]
            sentences.append(str(told.value))
        assert len(set(sentences)) == 1
    assert image.exists()


def _read(cached: Cached, times: int, answers) -> None:
    sums = [int(cached[index][0].sum()) for _ in range(times) for index in range(len(cached))]
    answers.put(set(sums))


def test_several_processes_share_a_folder(source, tmp_path) -> None:
    spread = get_context("fork")
    answers = spread.SimpleQueue()
    cached = Cached(source, tmp_path / "cache")
    processes = [spread.Process(target=_read, args=(cached, 20, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    expected = {int(source[index][0].sum()) for index in range(3)}
    assert all(answers.get() == expected for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list((tmp_path / "cache").iterdir())) == 6  # nothing half done beside them


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files end at this size, as they do where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_warning_and_nothing_is_lost(source, tmp_path) -> None:
    cached = Cached(source, tmp_path / "cache")
    kept = cached[0]
    expected = [source[index] for index in range(3)]
    with full_disk(3000), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            for index in range(3):
                require_equal(cached[index], expected[index])
    (warning,) = told
    assert str(warning.message).startswith(f"cannot write to data.cache={tmp_path / 'cache'} (")
    assert len(list((tmp_path / "cache").iterdir())) == 2 and isinstance(cached[0][0], np.memmap)
    require_equal(kept, expected[0])


def test_a_folder_that_cannot_be_one_is_told_before_the_first_sample(source, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/dev/null/cache")):
        with pytest.raises(UserError, match=f"data.cache={folder} cannot be written .*expected a folder"):
            Cached(source, folder)
