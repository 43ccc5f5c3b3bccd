import multiprocessing
import os
import pickle
import stat
import struct
import threading
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from segformer.data.archives import Archive, walk
from segformer.data.pairs import Pairs, Table
from segformer.errors import UserError
from tests.conftest import save

TRAIN = ("images/train/*", "masks/train/*")


def packed(folder: Path, path: Path, top: str = "", method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, top + file.relative_to(folder).as_posix())
    return path


def contents(pairs) -> list[tuple[bytes, bytes]]:
    return [(image.read_bytes(), mask.read_bytes()) for image, mask in pairs.files]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_is_read_as_the_folder_it_was_made_of(potholes, tmp_path, method) -> None:
    path = packed(potholes, tmp_path / "Potholes.ZIP", "top/", method)
    disk, pairs = Pairs(potholes, *TRAIN), Pairs(path / "top", *TRAIN)
    assert contents(pairs) == contents(disk)
    assert pairs.name(1) == f"{path}/top/images/train/road 1 ü.jpg" and pairs.size(1) == (61, 80)
    for ours, theirs in zip(pairs[1], disk[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not (tmp_path / "top").exists()


def test_an_archive_may_stand_anywhere_in_a_pattern(potholes, tmp_path) -> None:
    packed(potholes / "images", tmp_path / "images.zip")
    packed(potholes / "masks", tmp_path / "part.masks.zip", "deep/er/")
    pairs = Pairs(tmp_path, "images.zip/*/*", "part.masks.zip/deep/er/*/*")
    assert len(pairs) == 7 and pairs.mask_name(6) == f"{tmp_path}/part.masks.zip/deep/er/val/road 2 ü.png"
    assert len(Pairs(tmp_path, "*.zip/train/*.jpg", None)) == 4


def test_lists_and_tables_lie_in_archives_too(potholes, tmp_path) -> None:
    (potholes / "val.txt").write_text("road 2 ü\nroad 0 ü\n")
    (potholes / "val.csv").write_text("image,mask\nimages/val/road 2 ü.jpg,masks/val/road 2 ü.png\n")
    path = packed(potholes, tmp_path / "a.zip")
    pairs = Pairs(path, "images/val/*", "masks/val/*", "val.txt")
    assert [pairs.size(index)[0] for index in range(2)] == [62, 60]
    assert contents(Table(path, "val.csv")) == contents(pairs)[:1]
    (tmp_path / "all.csv").write_text("image,mask\na.zip/images/val/road 2 ü.jpg,a.zip/masks/val/road 2 ü.png\n")
    assert contents(Table(tmp_path, "all.csv")) == contents(pairs)[:1]


def test_what_a_mac_adds_is_no_sample_and_its_spelling_is_no_other_name(potholes, tmp_path) -> None:
    path = tmp_path / "mac.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(potholes.rglob("*.*")):
            name = file.relative_to(potholes).as_posix()
            archive.write(file, name.replace("ü", "u\u0308") if "masks" in name else name)
            archive.writestr(f"__MACOSX/{name}", b"x")
            archive.writestr(f"{Path(name).parent}/._{Path(name).name}", b"x")
    assert contents(Pairs(path, *TRAIN)) == contents(Pairs(potholes, *TRAIN))
    assert len(Pairs(path, "*/train/*.jpg", None)) == 4


def test_a_name_in_utf8_that_is_not_marked_as_such_is_read_as_meant(tmp_path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ue.jpg", b"x")
    path.write_bytes(path.read_bytes().replace(b"ue.jpg", "ü.jpg".encode()))
    pairs = Pairs(path, "*.jpg", None)
    assert pairs.name(0) == f"{path}/ü.jpg" and pairs.image_bytes(0) == b"x"


def test_a_root_above_the_top_folder_of_an_archive_is_told(potholes, tmp_path) -> None:
    path = packed(potholes, tmp_path / "a.zip", "top/")
    with pytest.raises(UserError, match=r"no images at .*a.zip/images/train/\*: .*a.zip holds top$"):
        Pairs(path, *TRAIN)
    with pytest.raises(UserError, match=r"a.zip/bottom is not a folder or zip file"):
        Pairs(path / "bottom", *TRAIN)


def entry(name: str, attributes: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = attributes << 16
    return info


@pytest.mark.parametrize(
    ("name", "attributes", "told"),
    [
        ("../evil.png", 0, "is no plain name below its top"),
        ("images/../../evil.png", 0, "is no plain name below its top"),
        ("/etc/evil.png", 0, "is no plain name below its top"),
        ("images\\..\\..\\evil.png", 0, "is no plain name below its top"),
        ("C:/evil.png", 0, "is no plain name below its top"),
        ("link.png", stat.S_IFLNK | 0o777, "is a link or a device, expected files and folders"),
        ("pipe.png", stat.S_IFIFO | 0o666, "is a link or a device"),
    ],
)
def test_an_archive_with_a_member_that_harms_is_refused_as_a_whole(tmp_path, name, attributes, told) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images/good.png", b"good")
        archive.writestr(entry(name, attributes), b"/etc/passwd")
    with pytest.raises(UserError, match=f"archive .*a.zip: member .* {told}"):
        Pairs(path, "images/*", None)


def test_a_name_that_hides_its_end_is_refused(tmp_path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images/a.pngX.exe", b"x")
    path.write_bytes(path.read_bytes().replace(b"a.pngX", b"a.png\0"))
    with pytest.raises(UserError, match=r"member 'images/a.png\\x00.exe' is no plain name"):
        Pairs(path, "images/*", None)


@pytest.mark.parametrize("second", ["images/b.png", "./images/a.png", "images//a.png"])
def test_one_name_twice_is_refused(tmp_path, second) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images/a.png", b"x")
        archive.writestr(second, b"y")
    path.write_bytes(path.read_bytes().replace(b"b.png", b"a.png"))  # the writer would warn of the very same name
    with pytest.raises(UserError, match="member 'images/a.png' is in it twice"):
        Pairs(path, "images/*", None)


def patched(path: Path, offset: int, value: bytes) -> None:
    """Overwrites a field of the only member's entry in the table of contents."""
    data = bytearray(path.read_bytes())
    start = data.rindex(b"PK\x01\x02") + offset
    data[start : start + len(value)] = value
    path.write_bytes(bytes(data))


@pytest.fixture
def single(tmp_path) -> Path:
    with zipfile.ZipFile(tmp_path / "single.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"0123456789" * 1000)
    return tmp_path / "single.zip"


def test_encrypted_and_oddly_packed_members_are_refused(single) -> None:
    patched(single, 8, struct.pack("<H", 1))
    with pytest.raises(
        UserError, match="single.zip: member 'a.png' is encrypted: unpack the archive with its password"
    ):
        Pairs(single, "*", None)
    patched(single, 8, struct.pack("<HH", 0, zipfile.ZIP_LZMA))
    with pytest.raises(UserError, match="member 'a.png' is packed by method 14, expected stored or deflated"):
        Pairs(single, "*", None)


@pytest.mark.parametrize(
    ("size", "told"), [(17, "Bad CRC-32"), (20_000, "Bad CRC-32|ends too early"), (2**31, "would fill")]
)
def test_a_member_that_lies_about_its_size_is_not_unpacked_beyond_it(single, size, told) -> None:
    patched(single, 24, struct.pack("<I", size))
    with pytest.raises(UserError, match=f"cannot read .*single.zip/a.png: .*({told})"):
        Pairs(single, "*", None).image_bytes(0)


def test_a_member_as_long_as_it_says_but_longer_in_truth_ends_where_it_says(single) -> None:
    patched(single, 16, struct.pack("<I", zipfile.crc32(b"0123")))
    patched(single, 24, struct.pack("<I", 4))
    assert Pairs(single, "*", None).image_bytes(0) == b"0123"


def test_damaged_archives_are_one_sentence(single, tmp_path) -> None:
    data = single.read_bytes()
    for content, told in (
        (data[:-30], "File is not a zip file"),
        (b"", "File is not a zip file"),
        (b"x" * 99, "File is not a zip file"),
    ):
        (tmp_path / "bad.zip").write_bytes(content)
        with pytest.raises(UserError, match=f"cannot open archive .*bad.zip: {told}.*; copy or download it again"):
            Pairs(tmp_path / "bad.zip", "*", None)
    middle = bytearray(data)
    middle[45] ^= 0xFF
    (tmp_path / "flipped.zip").write_bytes(bytes(middle))
    with pytest.raises(UserError, match="cannot read .*flipped.zip/a.png: .*; copy the archive again"):
        Pairs(tmp_path / "flipped.zip", "*", None).image_bytes(0)


def test_a_broken_image_in_an_archive_is_told_by_its_place(single) -> None:
    with pytest.raises(UserError, match="cannot read image .*single.zip/a.png: "):
        Pairs(single, "*", None).image(0)


def read(task) -> tuple[int, list[bytes]]:
    pairs, order = task
    return os.getpid(), [pairs.image_bytes(index) for index in order]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_that_read_one_archive_do_not_disturb_each_other(tmp_path, method) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "a.zip"
    expected = [rng.bytes(20_000 + index) for index in range(60)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for index, content in enumerate(expected):
            archive.writestr(f"images/{index:02d}.png", content)
    pairs = Pairs(path, "images/*", None)
    assert pairs.image_bytes(0) == expected[0]  # open here too
    orders = [rng.permutation(60).tolist() for _ in range(4)]
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        results = list(pool.map(read, [(pairs, order) for order in orders]))
    for (process, found), order in zip(results, orders, strict=True):
        assert process != os.getpid() and found == [expected[index] for index in order]


def test_threads_that_read_one_archive_do_not_disturb_each_other(potholes, tmp_path) -> None:
    pairs, expected = Pairs(packed(potholes, tmp_path / "a.zip"), *TRAIN), contents(Pairs(potholes, *TRAIN))
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.extend(contents(pairs) == expected for _ in range(20))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


def test_a_stamp_changes_with_the_content_and_with_nothing_else(tmp_path) -> None:
    stamps = []
    for content in (b"one", b"one", b"two"):
        (tmp_path / "a.zip").unlink(missing_ok=True)
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("a.png", content)
            archive.writestr("b.png", os.urandom(4))
        stamps.append(Pairs(tmp_path / "a.zip", "a*", None).stamp(0))
    assert stamps[0] == stamps[1] != stamps[2]


def test_an_archive_replaced_while_it_is_used_is_told(tmp_path) -> None:
    save(tmp_path / "old/a.png", np.zeros((4, 4), np.uint8))
    save(tmp_path / "new/b.png", np.zeros((4, 4), np.uint8))
    path = packed(tmp_path / "old", tmp_path / "a.zip")
    opened = pickle.loads(pickle.dumps(Archive(path)))  # as a worker gets it, which opens it later
    packed(tmp_path / "new", path)
    with pytest.raises(UserError, match="a.zip/a.png: the archive has changed and holds it no more"):
        opened.read("a.png")


def test_backslashes_of_windows_are_folders(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("images\\train\\a.png", b"x")
    found = list(walk(tmp_path / "a.zip", ["images", "train", "*"]))
    assert [(name, place.read_bytes()) for name, place in found] == [("images/train/a.png", b"x")]
