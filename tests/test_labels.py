import struct

import numpy as np
import pytest
from PIL import Image

from segformer.errors import UserError
from segformer.labels import Classes, UndeclaredValues, WrongKind, distinct_colors, read_mask
from tests.conftest import grey_png
from tests.test_pixels import bomb


def test_a_list_of_names_means_raw_value_is_the_index() -> None:
    classes = Classes.from_config(["a", "b"])
    raw = np.array([[0, 1, 255]], np.uint8)
    assert classes.encode(raw).tolist() == [[0, 1, 255]]
    assert classes.names == ("a", "b")


def test_raw_ids_merge_and_ignore() -> None:
    classes = Classes.from_config({"road": {"ids": [7, 9], "color": [1, 2, 3]}, "car": {"ids": [300]}}, ignore=[0])
    raw = np.array([[7, 9, 300, 0]], np.uint16)
    assert classes.encode(raw).tolist() == [[0, 0, 1, 255]]
    assert classes.colors[0].tolist() == [1, 2, 3]


def test_ignore_rest_takes_every_value_not_listed() -> None:
    classes = Classes.from_config({"road": {"ids": [7]}}, ignore="rest")
    assert classes.encode(np.arange(9, dtype=np.uint8)[None]).tolist() == [[255] * 7 + [0, 255]]


def test_undeclared_values_are_counted() -> None:
    with pytest.raises(UndeclaredValues, match=r"^2, 9 in 3 of 4 pixels$"):
        Classes.from_config(["a", "b"]).encode(np.array([[0, 2], [9, 9]], np.uint8))


def test_masks_of_class_indices_pass_by_the_raw_ids() -> None:
    classes = Classes.from_config({"road": {"ids": [7]}, "car": {"ids": [26]}})
    assert classes.encode(np.array([[0, 1, 255]], np.uint8), indices=True).tolist() == [[0, 1, 255]]
    with pytest.raises(UndeclaredValues, match="^7 in"):
        classes.encode(np.array([[7]], np.uint8), indices=True)


@pytest.mark.parametrize(
    ("values", "expected"), [([0, 1, 255], True), ([0, 7, 255], False), ([0, 1], False), ([26], False)]
)
def test_the_look_of_train_ids_is_the_ignore_value_without_higher_ids(values, expected) -> None:
    table = {"road": {"ids": [7]}, "car": {"ids": [26]}}
    classes = Classes.from_config(table, [0, 1, 255])
    assert classes.looks_encoded(np.array([values], np.uint8)) is expected
    # where a train id is no raw value the contract refuses such a mask by itself
    assert not Classes.from_config(table).looks_encoded(np.array([values], np.uint8))


@pytest.mark.parametrize(
    ("classes", "ignore", "message"),
    [
        ([], [255], "holds 0 names"),
        (["a", "a"], [255], "different ones"),
        ({"a": {"ids": [1]}, "b": {"ids": [1]}}, [255], "claimed by both 'a' and 'b'"),
        ({"a": {"colour": [1, 2, 3]}}, [255], "key 'colour', expected one of color, colors, ids, category"),
        (["a"], 255, "data.ignore is 255, expected a list"),
        (["a"], [70000], "expected a list of raw mask values"),
        ("road", [255], "data.classes is 'road', expected a list of names"),
        (None, [255], "data.classes is None"),
        ({"a": 7}, [255], "data.classes.a is 7"),
        ({"a": {"ids": 7}}, [255], "data.classes.a.ids is 7"),
        ({"a": {"color": "red"}}, [255], "data.classes.a.color is 'red'"),
        ({"a": {"color": [300, 0, 0]}}, [255], "from 0 to 255"),
        ({"a": {"category": "flat"}, "b": {}}, [255], "data.classes.b has no category, but other classes have"),
        ({"a": {"instance_size": 0}}, [255], "data.classes.a.instance_size is 0, expected mean pixels above 0"),
    ],
)
def test_contradictory_contracts_are_told(classes, ignore, message) -> None:
    with pytest.raises(UserError, match=message):
        Classes.from_config(classes, ignore)


def test_a_model_of_other_classes_is_refused() -> None:
    classes = Classes.from_config(["a", "b"])
    classes.require(["a", "b"], "model")
    with pytest.raises(UserError, match="has 3 classes, the data 2"):
        classes.require(["a", "b", "c"], "model")
    with pytest.raises(UserError, match="class 1 is 'c' in model but 'b' in the data"):
        classes.require(["a", "c"], "model")


def test_palette_bilevel_and_wide_masks_are_read_as_ids(tmp_path) -> None:
    ids = np.array([[0, 1], [2, 3]], np.uint8)
    palette = Image.fromarray(ids, "P")
    palette.putpalette([200, 0, 0] * 256)
    palette.save(tmp_path / "p.png")
    Image.fromarray(ids.astype(np.uint16) * 300).save(tmp_path / "wide.png")
    Image.fromarray(ids > 1).save(tmp_path / "one.png")
    assert read_mask(tmp_path / "p.png").tolist() == ids.tolist()
    assert read_mask(tmp_path / "wide.png").tolist() == (ids * np.uint16(300)).tolist()
    assert read_mask(tmp_path / "one.png").tolist() == [[0, 0], [1, 1]]
    (tmp_path / "be.tif").write_bytes(big_endian(ids))
    assert read_mask(tmp_path / "be.tif").tolist() == ids.tolist()


def big_endian(ids: np.ndarray) -> bytes:
    """A 16-bit grey TIFF, high byte first: what some microscopes and GIS tools write."""
    tags = [
        (256, ids.shape[1]),
        (257, ids.shape[0]),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, ids.shape[0]),
    ]
    tags += [(279, 2 * ids.size)]
    pixels = ids.astype(">u2").tobytes()
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack(">2sHI", b"MM", 42, 8 + len(pixels)) + pixels + struct.pack(">H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_ids_in_fewer_than_eight_bits_are_not_stretched(tmp_path, bits) -> None:
    values = list(range(2**bits))
    packed = bytes(
        sum(value << (8 - bits * (place + 1)) for place, value in enumerate(values[start : start + 8 // bits]))
        for start in range(0, len(values), 8 // bits)
    )
    path = grey_png(tmp_path / "few.png", len(values), 1, bits, b"\0" + packed)
    assert read_mask(path).tolist() == [values]


def test_unsuitable_truncated_and_missing_masks_are_told(tmp_path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    with pytest.raises(UserError, match="cannot read mask .*cut.png"):
        read_mask(tmp_path / "cut.png")
    with pytest.raises(UserError, match="cannot read mask"):
        read_mask(tmp_path / "nowhere.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(UserError, match="cannot read mask .*empty.png"):
        read_mask(tmp_path / "empty.png")
    for mode in ("LA", "CMYK", "F"):
        Image.new(mode, (4, 4)).save(tmp_path / f"{mode}.tif")
        with pytest.raises(UserError, match=f"{mode}.tif is a {mode} image, expected one channel"):
            read_mask(tmp_path / f"{mode}.tif")
    with pytest.raises(UserError, match="cannot read mask .*pixels.* data.max_pixels"):
        read_mask(bomb(tmp_path / "bomb.png", 1_000), max_pixels=1_000)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter, as its image would be
    Image.new("L", (6, 4)).save(tmp_path / "turned.png", exif=exif)
    assert read_mask(tmp_path / "turned.png").shape == (6, 4)


def test_default_colours_are_distinct() -> None:
    assert len(np.unique(distinct_colors(255), axis=0)) == 255


CAMVID = {"sky": {"color": [128, 128, 128]}, "road": {"colors": [[128, 64, 128], [128, 0, 192]]}}


def test_colour_masks_become_train_ids_several_colours_to_a_class() -> None:
    classes = Classes.from_config(CAMVID, [[0, 0, 0]], "colors")
    raw = np.array([[[128, 128, 128], [128, 64, 128], [128, 0, 192], [0, 0, 0]]], np.uint8)
    assert classes.encode(raw).tolist() == [[0, 1, 1, 255]]
    assert classes.colors.tolist() == [[128, 128, 128], [128, 64, 128]]
    with pytest.raises(UndeclaredValues, match=r"\[1, 2, 3\] in 1 of 4 pixels"):
        classes.encode(np.concatenate([raw[:, :3], [[[1, 2, 3]]]], 1).astype(np.uint8))
    assert Classes.from_config(CAMVID, "rest", "colors").encode(raw + np.uint8(1)).tolist() == [[255] * 4]


@pytest.mark.parametrize(
    ("classes", "options", "sentence"),
    [
        ({"a": {"color": [1, 2, 3]}, "b": {"color": [1, 2, 3]}}, {"mask_values": "colors"},
         r"color \[1, 2, 3\] is claimed by both 'a' and 'b'"),
        ({"a": {"colors": [[1, 2, 3], [1, 2, 3]]}}, {"mask_values": "colors"}, r"\[1, 2, 3\] is twice in 'a'"),
        (["a"], {"mask_values": "colors"}, "data.classes.a has no color, but data.mask_values is colors"),
        ({"a": {"color": [1, 2, 3], "ids": [4]}}, {"mask_values": "colors"}, "lists ids, but data.mask_values is"),
        ({"a": {"colors": [[1, 2, 3]]}}, {}, "lists colors, but data.mask_values is ids: add data.mask_values=colors"),
        ({"a": {"color": [1, 2, 3]}}, {"mask_values": "colors", "ignore": [7]}, "data.ignore is 7, expected .red"),
        (["a"], {"ignore": [0]}, "raw mask value 0 is of class 'a' and in data.ignore: leave it out of one of them"),
        ([1, "1"], {}, "data.classes holds 2 names, expected 1 to 255 different ones"),
        (["a"], {"reduce_zero_label": True, "ignore": None}, "data.ignore is None, expected a list of raw mask values"),
        (["a"], {"reduce_zero_label": True, "ignore": 255}, "data.ignore is 255, expected a list of raw mask values"),
        ({"a": {"colors": []}}, {"mask_values": "colors"}, "data.classes.a.colors is None, expected .red, green, blue"),
        ({"a": {"colors": None}}, {"mask_values": "colors"}, "data.classes.a.colors is None, expected .red"),
        ({"a": {"color": None}}, {}, "data.classes.a.color is None, expected .red, green, blue"),
        (["a"], {"mask_values": "rgb"}, "data.mask_values is 'rgb', expected ids or colors"),
        ({"a": {"ids": [1]}}, {"reduce_zero_label": True}, "leave out the ids"),
        ({"a": {"color": [1, 2, 3]}}, {"mask_values": "colors", "reduce_zero_label": True}, "masks of ids, but"),
    ],
)  # fmt: skip
def test_contracts_of_colours_that_contradict_themselves_are_told(classes, options, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        Classes.from_config(classes, **options)


def test_reducing_the_zero_label_shifts_every_class_by_one_and_ignores_zero() -> None:
    reduced = Classes.from_config(["wall", "building"], reduce_zero_label=True)
    assert reduced.encode(np.array([[0, 1, 2, 255]], np.uint8)).tolist() == [[255, 0, 1, 255]]
    with pytest.raises(UndeclaredValues, match="3 in 1 of 1"):
        reduced.encode(np.array([[3]], np.uint8))


def test_several_raw_ids_merge_and_a_binary_mask_of_0_and_255_is_two_classes() -> None:
    merged = Classes.from_config({"flat": {"ids": [7, 8, 300]}, "rest": {"ids": [0]}}, [])
    assert merged.encode(np.array([[7, 8, 300, 0]], np.uint16)).tolist() == [[0, 0, 0, 1]]
    binary = Classes.from_config({"background": {"ids": [0]}, "pothole": {"ids": [255]}}, [])
    assert binary.encode(np.array([[0, 255]], np.uint8)).tolist() == [[0, 1]]


def test_colours_where_ids_are_declared_and_ids_where_colours_are_are_told() -> None:
    grey = np.array([[[1, 1, 1], [0, 0, 0]]], np.uint8)  # ids that someone saved as RGB
    assert Classes.from_config(["a", "b"]).encode(grey).tolist() == [[1, 0]]
    for odd in np.eye(3, dtype=np.uint8):  # whichever channel differs
        with pytest.raises(WrongKind, match="holds RGB colours, expected one channel of class ids"):
            Classes.from_config(["a", "b"]).encode(grey + odd)
    with pytest.raises(WrongKind, match="holds ids, expected colours: add data.mask_values=ids"):
        Classes.from_config(CAMVID, "rest", "colors").encode(grey[..., 0])


@pytest.mark.parametrize("count", [253, 254, 255])
def test_the_last_ids_of_a_byte_are_classes_too(count) -> None:
    classes = Classes.from_config([f"class {index}" for index in range(count)])
    ids = np.arange(count, dtype=np.uint8)[None]
    assert classes.encode(ids).tolist() == ids.tolist()
    if count < 255:
        with pytest.raises(UndeclaredValues, match=f"{count} in 1 of 1"):
            classes.encode(np.array([[count]], np.uint8))


def test_colour_files_come_as_colours_whatever_alpha_they_have(tmp_path) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    for mode in ("RGB", "RGBA"):
        Image.fromarray(raw).convert(mode).save(tmp_path / f"{mode}.png")
        assert np.array_equal(read_mask(tmp_path / f"{mode}.png"), raw)


def test_a_mask_that_is_partly_transparent_is_refused(tmp_path) -> None:
    raw = np.zeros((4, 4, 4), np.uint8)
    raw[:2, :, 3] = 255
    Image.fromarray(raw).save(tmp_path / "alpha.png")
    with pytest.raises(UserError, match="alpha.png is partly transparent"):
        read_mask(tmp_path / "alpha.png")
