import json
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil as TheirPil
from transformers.models.segformer.image_processing_segformer import SegformerImageProcessor as Theirs

from segformer.errors import UserError
from segformer.pixels import read_image
from segformer.processor import (
    BatchFeature,
    SegformerFeatureExtractor,
    SegformerImageProcessor,
    SegformerImageProcessorFast,
    SegformerImageProcessorPil,
)

PAIRS = [(SegformerImageProcessor, Theirs), (SegformerImageProcessorPil, TheirPil)]
BOTH = [SegformerImageProcessor, SegformerImageProcessorPil]
SMALL = {"height": 24, "width": 40}


def photo(height: int = 37, width: int = 53, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def ids(height: int = 37, width: int = 53, high: int = 256) -> np.ndarray:
    return np.random.default_rng(1).integers(0, high, (height, width)).astype(np.uint8)


def untouched(**settings) -> SegformerImageProcessor:
    """Pixels and labels as they were read: nothing is resized, rescaled or normalised."""
    return SegformerImageProcessor(do_resize=False, do_rescale=False, do_normalize=False, **settings)


def pixels(image, **options) -> np.ndarray:
    """(H, W, C) of one image that nothing is done to but reading it."""
    return untouched()(image, return_tensors="np", data_format="channels_last", **options).pixel_values[0]


def labels(maps, image=None, kind=SegformerImageProcessor, **options) -> np.ndarray:
    processor = kind(do_resize=False, **options)
    return processor(photo() if image is None else image, maps, return_tensors="np").labels


def torch_has_lanczos() -> bool:
    try:
        torch.nn.functional.interpolate(torch.zeros(1, 1, 4, 4), size=(2, 2), mode="lanczos", antialias=True)
    except (NotImplementedError, ValueError):
        return False
    return True


# --- the numbers are those of transformers


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("shape", [(37, 53), (24, 40), (900, 700), (11, 13)])
@pytest.mark.parametrize("reduce", [False, True])
def test_pixels_and_labels_are_those_of_transformers(ours, theirs, shape, reduce) -> None:
    settings = {"size": SMALL, "do_reduce_labels": reduce}
    image, mask = photo(*shape), ids(*shape)
    expected = theirs(**settings)(Image.fromarray(image), Image.fromarray(mask.copy()), return_tensors="pt")
    found = ours(**settings)(Image.fromarray(image), Image.fromarray(mask), return_tensors="pt")
    assert found.pixel_values.dtype == torch.float32 and found.labels.dtype == torch.int64
    torch.testing.assert_close(found.pixel_values, expected.pixel_values, rtol=0, atol=0)
    assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_every_pixel_of_a_default_photograph_is_transformers(ours, theirs) -> None:
    expected = theirs()(photo(480, 640), return_tensors="pt").pixel_values
    found = ours()(photo(480, 640), return_tensors="pt").pixel_values
    assert found.shape == (1, 3, 512, 512)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_real_photographs_give_the_pixels_of_transformers_to_the_last_bit(shared, ours, theirs) -> None:
    path = shared / "coco_000000039769.png"
    with Image.open(path) as image:
        expected = theirs()(image.convert("RGB"), return_tensors="pt").pixel_values
    assert torch.equal(ours()(path, return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize(
    "settings",
    [
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": (0.5, 0.25, 2.0)},
        {"image_mean": 0.5, "image_std": 0.5},
        {"resample": 0},
        {"resample": Image.Resampling.BICUBIC},
        {"resample": 1},
    ],
    ids=str,
)
def test_each_setting_means_what_it_means_to_transformers(ours, theirs, settings) -> None:
    if settings.get("resample") == 1 and theirs is Theirs and not torch_has_lanczos():
        pytest.skip("this torch has no Lanczos filter, and the peer takes another one silently")
    settings = {"size": SMALL, **settings}
    if theirs is TheirPil and settings.get("image_mean") == 0.5:
        settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    expected = theirs(**settings)(photo(), return_tensors="pt").pixel_values
    found = ours(**settings)(photo(), return_tensors="pt").pixel_values
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    called = ours()(photo(), return_tensors="pt", **settings).pixel_values
    torch.testing.assert_close(called, found, rtol=0, atol=0)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize(
    "size",
    [
        30,
        [20, 30],
        {"shortest_edge": 30},
        {"shortest_edge": 30, "longest_edge": 41},
        {"shortest_edge": 37, "longest_edge": 52},
        {"max_height": 30, "max_width": 90},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (40, 40)])
def test_a_size_in_any_notation_gives_the_shape_of_transformers(ours, theirs, size, shape) -> None:
    # its bare number would be a shortest edge in version 5 but is a square in version 4 and in every published file
    peer = {"height": size, "width": size} if isinstance(size, int) else size
    expected = theirs(size=peer)(photo(*shape), ids(*shape), return_tensors="pt")
    found = ours(size=size)(photo(*shape), ids(*shape), return_tensors="pt")
    torch.testing.assert_close(found.pixel_values, expected.pixel_values, rtol=0, atol=0)
    assert torch.equal(found.labels, expected.labels)


def test_a_size_can_be_read_by_key_and_by_attribute() -> None:
    processor = SegformerImageProcessor(size=(20, 30))
    assert processor.size == {"height": 20, "width": 30}
    assert (processor.size.height, processor.size["width"], processor.size.shortest_edge) == (20, 30, None)
    assert SegformerImageProcessor(size=20, default_to_square=False).size == {"shortest_edge": 20}


@pytest.mark.parametrize("source", [(37, 53), (512, 683), (1024, 2048), (5, 1000), (375, 1242)])
@pytest.mark.parametrize("target", [(512, 512), (24, 40), (1, 7), (641, 1001)])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_labels_are_taken_from_the_pixels_that_transformers_takes(ours, theirs, source, target) -> None:
    size, tiny = {"height": target[0], "width": target[1]}, {"do_rescale": False, "do_normalize": False}
    mask = ids(*source)
    image = np.zeros((*source, 3), np.uint8)
    expected = theirs(size=size, **tiny)(image, mask, return_tensors="np")["labels"]
    assert np.array_equal(ours(size=size, **tiny)(image, mask, return_tensors="np").labels, expected)


# --- every kind of input


def kinds(tmp_path) -> dict[str, object]:
    array = photo()
    Image.fromarray(array).save(tmp_path / "x.png")
    return {
        "pillow": Image.fromarray(array),
        "path": tmp_path / "x.png",
        "name": str(tmp_path / "x.png"),
        "HWC": array,
        "CHW": array.transpose(2, 0, 1),
        "tensor": torch.from_numpy(array).permute(2, 0, 1),
        "tensor HWC": torch.from_numpy(array),
        "floats": array.astype(np.float32),
        "doubles": array.astype(np.float64),
        "integers": array.astype(np.int64),
        "16-bit integers": array.astype(np.uint16),
        "other byte order": array.astype(">u2"),
        "mirrored view": array[:, ::-1].copy()[:, ::-1],
        "list": [array],
        "tuple": (Image.fromarray(array),),
        "nested": [[array]],
        "batch": array[None],
        "batch tensor": torch.from_numpy(array).permute(2, 0, 1)[None],
        "list of batches": [array[None]],
        "with alpha": np.dstack([array, np.zeros(array.shape[:2], np.uint8)]),
    }


@pytest.mark.parametrize("kind", BOTH)
def test_an_image_gives_the_same_pixels_however_it_comes(tmp_path, kind) -> None:
    expected = Theirs(do_resize=False)(photo(), return_tensors="pt").pixel_values
    for name, image in kinds(tmp_path).items():
        found = kind(do_resize=False)(image, return_tensors="pt").pixel_values
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "I;16", "RGB"])
def test_a_pillow_image_and_its_file_become_the_same_rgb_bytes(tmp_path, mode) -> None:
    array = photo(6, 4)
    image = Image.fromarray(array[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(array)
    image = image if image.mode == mode else image.convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    assert np.array_equal(pixels(image), read_image(path))
    assert np.array_equal(pixels(path), read_image(path))


def test_photographs_stand_upright_and_the_caller_s_image_stays_as_it_was(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(photo(4, 6)).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(pixels(image), np.rot90(photo(4, 6), -1))
        assert image.size == (6, 4) and image.getexif()[0x0112] == 6
    with Image.open(tmp_path / "x.png") as image, Image.open(tmp_path / "x.png") as mask:
        turned = labels(mask.convert("L"), image)  # a mask drawn with the same orientation
    assert turned.shape == (1, 6, 4)


@pytest.mark.parametrize("grey", [photo()[..., 0], photo()[..., :1], photo()[..., 0][None], photo()[..., [0, 1]]])
def test_grey_arrays_are_repeated_and_their_alpha_dropped(grey) -> None:
    assert np.array_equal(pixels(grey), photo()[..., [0, 0, 0]])


@pytest.mark.parametrize("shape", [(1, 6), (3, 5), (4, 3)])
def test_a_pillow_image_of_few_rows_is_not_taken_for_channels(shape) -> None:
    assert np.array_equal(pixels(Image.fromarray(photo(*shape))), photo(*shape))


def test_the_side_of_the_channels_can_be_said() -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    assert np.array_equal(pixels(array, input_data_format="channels_last"), array)
    assert np.array_equal(pixels(array, input_data_format="channels_first"), array.transpose(1, 2, 0))
    assert np.array_equal(pixels(array), array.transpose(1, 2, 0))  # what transformers takes it for


@pytest.mark.parametrize("channels", [1, 2, 5, 12])
@pytest.mark.parametrize("kind", BOTH)
def test_images_of_other_bands_are_taken_as_they_are(kind, channels) -> None:
    bands = np.random.default_rng(0).integers(0, 4000, (37, 53, channels)).astype(np.uint16)
    mean, std = list(range(1, channels + 1)), [2.0] * channels
    processor = kind(do_resize=False, image_mean=mean, image_std=std, rescale_factor=1 / 4000)
    expected = (bands / 4000 - np.array(mean)) / 2
    for array in (bands, bands.transpose(2, 0, 1), torch.from_numpy(bands.astype(np.float32))):
        found = processor(array, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(UserError, match=rf"image 0 has shape .*, expected {channels} channels: give image_mean"):
        processor(photo())
    assert kind(size=8, image_mean=mean, image_std=std)(bands, return_tensors="pt").pixel_values.shape[1] == channels


def test_floats_that_are_scaled_already_are_told() -> None:
    with pytest.warns(
        UserWarning, match="image 0 holds floats up to 1, which are divided by 255: pass do_rescale=False"
    ):
        SegformerImageProcessor()(np.ones((8, 8, 3), np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SegformerImageProcessor(do_rescale=False)(np.ones((8, 8, 3), np.float32))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images is empty, expected at least one image"),
        (None, "image 0 is a NoneType, expected a Pillow image, a path, or a numeric array or tensor"),
        ([photo(), {"image": 1}], "image 1 is a dict, expected a Pillow image"),
        (np.array([["a"]]), "image 0 is an array of <U1, expected a Pillow image"),
        (np.zeros(5), r"image 0 has shape \(5,\), expected \(height, width\) or three dimensions"),
        (np.zeros((0, 5, 3)), r"image 0 has shape \(0, 5, 3\), expected"),
        (
            np.zeros((7, 8, 9), np.uint8),
            r"image 0 has shape \(7, 8, 9\), expected 1 to 4 channels: .*input_data_format",
        ),
        (np.zeros((7, 8, 3), bool), "image 0 holds torch.bool values, expected uint8 in 0..255 or floats"),
        (np.full((7, 8, 3), 4095, np.uint16), "image 0 holds torch.uint16 values from 4095 to 4095, expected 0 to 255"),
        (Image.fromarray(np.ones((2, 2), np.float32)), "image 0 has F pixels of 32 bits, expected 8 or 16 bits"),
        ("https://example.org/x.jpg", "image https://example.org/x.jpg is an address, expected a file: download it"),
        ("nowhere.jpg", "cannot read image nowhere.jpg: .*No such file"),
    ],
)
def test_what_is_no_image_is_told(images, message) -> None:
    with pytest.raises(UserError, match=message):
        SegformerImageProcessor()(images)


def test_a_file_that_breaks_off_is_told_when_pillow_meets_it(tmp_path) -> None:
    Image.fromarray(photo(64, 64)).save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:-800])
    with Image.open(tmp_path / "x.jpg") as image, pytest.raises(UserError, match="cannot read image 0: .*truncated"):
        SegformerImageProcessor()(image)


# --- segmentation maps


@pytest.mark.parametrize("kind", BOTH)
def test_label_maps_give_the_same_labels_however_they_come(tmp_path, kind) -> None:
    mask = ids(high=150)
    palette = Image.fromarray(mask).convert("P")
    palette.putpalette(list(range(255, -1, -1)) * 3)  # index and colour differ everywhere
    palette.putdata(mask.ravel().tolist())
    palette.save(tmp_path / "palette.png")
    Image.fromarray(mask).save(tmp_path / "grey.png")
    maps = [mask, mask[None], mask[..., None], torch.from_numpy(mask), torch.from_numpy(mask)[None, None],
            Image.fromarray(mask), palette, Image.fromarray(mask.astype(np.uint16)), str(tmp_path / "palette.png"),
            tmp_path / "grey.png", [mask], (palette,), [mask[None]], [mask[..., None]]]  # fmt: skip
    maps += [mask.astype(kind_) for kind_ in (np.int32, np.int64, np.uint16, np.float32, np.float64)]
    for form in maps:
        found = labels(form, kind=kind)
        assert found.dtype == np.int64 and np.array_equal(found, mask[None])
    assert np.array_equal(labels(mask > 70, kind=kind)[0], mask > 70)


REDUCED = {0: 255, 1: 0, 150: 149, 254: 253, 255: 255}


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, np.float32])
@pytest.mark.parametrize("keyword", ["do_reduce_labels", "reduce_labels"])
def test_reducing_keeps_ignored_pixels_and_lowers_the_others_under_either_keyword(kind, dtype, keyword) -> None:
    mask = np.array([list(REDUCED)], dtype)
    image = Image.fromarray(photo(1, len(REDUCED)))
    expected = [[list(REDUCED.values())]]
    assert labels(mask, image, kind, **{keyword: True}).tolist() == expected
    assert kind(do_resize=False)(image, mask, return_tensors="np", **{keyword: True}).labels.tolist() == expected
    assert labels(mask, image, kind, **{keyword: False}).tolist() == [mask.tolist()]


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_reducing_twice_starts_from_the_same_mask_and_writes_to_nothing_of_the_caller(kind, dtype) -> None:
    mask, image = ids(high=151).astype(dtype), photo().astype(np.float32)
    before = mask.copy(), image.copy()
    processor = kind(do_reduce_labels=True, do_resize=False, do_rescale=False)
    first, second = (processor(image, mask, return_tensors="np") for _ in range(2))
    assert np.array_equal(first.labels, second.labels) and np.array_equal(first.pixel_values, second.pixel_values)
    assert np.array_equal(mask, before[0]) and np.array_equal(image, before[1])
    mask.flags.writeable = image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(processor(image, mask, return_tensors="np").labels, first.labels)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_wide_label_values_do_not_collide(kind, dtype) -> None:
    mask, image = np.array([[0, 255, 256, 257, 1000, 32767]], dtype), Image.fromarray(photo(1, 6))
    found = kind(size=(2, 12))(image, mask, return_tensors="np").labels
    assert found.tolist() == [np.repeat(np.repeat(mask, 2, 0), 2, 1).tolist()]
    with pytest.raises(UserError, match="segmentation map 0 holds 256, which do_reduce_labels would lower to 255"):
        labels(mask, image, kind, do_reduce_labels=True)
    assert labels(mask[:, 3:], image.crop((3, 0, 6, 1)), kind, do_reduce_labels=True).tolist() == [[[256, 999, 32766]]]


@pytest.mark.parametrize("kind", BOTH)
def test_every_label_map_of_a_batch_comes_back_and_only_labels_are_reduced(kind) -> None:
    masks = [np.full((37, 53), value, np.uint8) for value in (1, 2, 3)]
    images = [photo(seed=seed) for seed in range(3)]
    plain, reduced = (kind(do_reduce_labels=reduce)(images, masks, return_tensors="np") for reduce in (False, True))
    assert [np.unique(label).tolist() for label in reduced.labels] == [[0], [1], [2]]
    assert np.array_equal(reduced.pixel_values, plain.pixel_values)
    assert np.array_equal(kind()(np.stack(images), np.stack(masks), return_tensors="np").labels, plain.labels)


def test_maps_of_images_of_unequal_sizes_are_resized_each_with_its_image() -> None:
    images, masks = [photo(20, 30), photo(40, 25)], [ids(20, 30), ids(40, 25)]
    found = SegformerImageProcessor(size=16)(images, masks, return_tensors="pt")
    expected = Theirs(size={"height": 16, "width": 16})(images, masks, return_tensors="pt")
    assert torch.equal(found.labels, expected.labels) and torch.equal(found.pixel_values, expected.pixel_values)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([], r"0 segmentation map\(s\) for 1 image\(s\), expected one of ids for each image"),
        ([ids(), ids()], r"2 segmentation map\(s\) for 1 image"),
        (ids(53, 37), r"map 0 is 53 x 37 \(height x width\), image 0 is 37 x 53: give the map of this image"),
        (
            photo(),
            r"map 0 is an array of uint8 and shape \(37, 53, 3\), expected one channel .* turn a mask of colours",
        ),
        (Image.fromarray(photo()), "segmentation map 0 is a RGB image, expected one channel of whole class ids"),
        (ids() / 7, "segmentation map 0 is an array of float64 with fractions, expected one channel of whole"),
        (np.array([["a"]]), r"segmentation map 0 is an array of <U1 and shape \(1, 1\)"),
        ([3], "segmentation map 0 is a int, expected one channel"),
        ("http://example.org/x.png", "segmentation map http://example.org/x.png is an address, expected a file"),
        ("nowhere.png", "cannot read mask nowhere.png"),
    ],
)
def test_what_is_no_map_of_the_image_is_told(maps, message) -> None:
    with pytest.raises(UserError, match=message):
        SegformerImageProcessor()(photo(), maps)


# --- what comes back


def test_features_are_a_mapping_with_attributes_that_unpacks_into_the_model(tiny) -> None:
    features = SegformerImageProcessor(size=64)(photo(), ids(high=7), return_tensors="pt")
    assert list(features) == list(features.keys()) == ["pixel_values", "labels"]
    assert features["pixel_values"] is features.pixel_values is features.data["pixel_values"]
    assert tiny(**features).loss > 0
    with pytest.raises(AttributeError, match="no 'label' here .did you mean 'labels'?"):
        _ = features.label
    assert torch.equal(pickle.loads(pickle.dumps(features)).labels, features.labels)


def test_only_floats_are_cast_and_everything_is_moved() -> None:
    features = SegformerImageProcessor(size=8)(photo(), ids(), return_tensors="pt")
    assert features.to(torch.float16) is features
    assert features.pixel_values.dtype == torch.float16 and features.labels.dtype == torch.int64
    features.to("meta")
    assert features.pixel_values.device.type == features.labels.device.type == "meta"
    mixed = BatchFeature({"list": [torch.ones(2), torch.ones(3)], "text": "kept"}).to("cpu", torch.float64)
    assert [item.dtype for item in mixed.list] == [torch.float64] * 2 and mixed.text == "kept"


@pytest.mark.parametrize(("kind", "single"), [(BOTH[0], torch.Tensor), (BOTH[1], np.ndarray)])
def test_tensors_arrays_or_lists_as_asked_for(kind, single) -> None:
    processor = kind(size=8)
    assert isinstance(processor(photo(), return_tensors="pt").pixel_values, torch.Tensor)
    found = processor([photo(), photo()], ids()[None].repeat(2, 0), return_tensors="np")
    assert found.pixel_values.shape == (2, 3, 8, 8) and found.labels.shape == (2, 8, 8)
    found = processor([photo(), photo()], [ids(), ids()])
    assert isinstance(found.pixel_values, list) and isinstance(found.labels, list)
    assert {type(item) for item in [*found.pixel_values, *found.labels]} == {single}


def test_channels_can_stand_last() -> None:
    processor = SegformerImageProcessor(size=SMALL)
    first = processor(photo(), return_tensors="np").pixel_values
    last = processor(photo(), return_tensors="np", data_format="channels_last").pixel_values
    assert last.shape == (1, 24, 40, 3) and np.array_equal(last.transpose(0, 3, 1, 2), first)


def test_images_that_cannot_be_stacked_are_told_and_listed_on_request() -> None:
    processor = untouched()
    with pytest.raises(
        UserError, match=r"pixel_values has the shapes \(3, 20, 30\), \(3, 40, 25\), which cannot be st"
    ):
        processor([photo(20, 30), photo(40, 25)], return_tensors="pt")
    assert [tuple(item.shape) for item in processor([photo(20, 30), photo(40, 25)]).pixel_values] == [
        (3, 20, 30),
        (3, 40, 25),
    ]


@pytest.mark.gpu
def test_the_work_can_be_done_on_the_gpu() -> None:
    features = SegformerImageProcessor(device="cuda")(photo(300, 400), ids(300, 400), return_tensors="pt")
    assert features.pixel_values.is_cuda and features.labels.is_cuda
    expected = SegformerImageProcessor()(photo(300, 400), ids(300, 400), return_tensors="pt")
    assert torch.equal(features.labels.cpu(), expected.labels)
    torch.testing.assert_close(features.pixel_values.cpu(), expected.pixel_values, rtol=0, atol=1.01 / 255 / 0.224)


# --- settings and files


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_the_settings_of_a_call_last_for_the_call(ours, theirs) -> None:
    processor = ours(size=16)
    assert processor(photo(), size=8, do_normalize=False, return_tensors="pt").pixel_values.shape == (1, 3, 8, 8)
    assert processor.size == {"height": 16, "width": 16} and processor.do_normalize is True
    expected = theirs(size={"height": 16, "width": 16})(photo(), return_tensors="pt").pixel_values
    assert torch.equal(processor(photo(), return_tensors="pt", do_resize=None).pixel_values, expected)


def test_a_setting_can_be_assigned_and_is_checked() -> None:
    processor = SegformerImageProcessor()
    processor.size, processor.reduce_labels = 8, True
    assert processor.size.height == 8 and processor.do_reduce_labels is True
    with pytest.raises(UserError, match="do_resize is 'no', expected True or False"):
        processor.do_resize = "no"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size is .*0.*, expected a positive integer, .*shortest_edge"),
        ({"size": {"longest_edge": 8}}, "size is {'longest_edge': 8}, expected .* with the keys height and width;"),
        ({"size": (1, 2, 3)}, r"size is \(1, 2, 3\), expected"),
        ({"size": "512"}, "size is '512', expected"),
        ({"resample": 9}, r"resample is 9, expected one of Pillow's filters: 0 \(nearest\), 1 \(lanczos\), 2 \(bil"),
        ({"do_normalize": 1}, "do_normalize is 1, expected True or False"),
        ({"rescale_factor": 0}, "rescale_factor is 0, expected a positive number such as 1/255"),
        ({"image_std": [1, 0, 1]}, r"image_std is \[1, 0, 1\], expected a number for each channel, not 0"),
        ({"image_mean": "imagenet"}, "image_mean is 'imagenet', expected a number for each channel"),
    ],
)
def test_settings_that_no_image_could_be_prepared_with_are_told(settings, message) -> None:
    with pytest.raises(UserError, match=message):
        SegformerImageProcessor(**settings)
    with pytest.raises(UserError, match=message):
        SegformerImageProcessor()(photo(), **settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_tensors": "tf"}, "return_tensors is 'tf', expected 'pt', 'np' or None: take 'np' and convert"),
        ({"data_format": "NHWC"}, "data_format is 'NHWC', expected 'channels_first' or 'channels_last'"),
        ({"input_data_format": 1}, "input_data_format is 1, expected 'channels_first' or 'channels_last'"),
        ({"do_resise": False}, r"unknown option 'do_resise' \(did you mean 'do_resize'\?\): expected one of"),
        ({"do_pad": True}, "unknown option 'do_pad'"),
        (
            {"resample": 4},
            r"resample is 4 \(box\), which torch .* does not offer on cpu: use .*SegformerImageProcessorPil",
        ),
        ({"image_mean": [0.5] * 4}, "image_std has 3 values and image_mean 4, expected one a channel in each"),
    ],
)
def test_options_of_a_call_that_mean_nothing_are_told(options, message) -> None:
    with pytest.raises(UserError, match=message):
        SegformerImageProcessor()(photo(), **options)


def test_keywords_of_transformers_that_change_nothing_are_accepted() -> None:
    options = {"do_convert_rgb": True, "disable_grouping": True, "do_center_crop": False, "do_pad": None}
    SegformerImageProcessor()(photo(), **options)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_settings_are_written_as_transformers_writes_them(ours, theirs) -> None:
    assert ours().to_dict() == theirs().to_dict()
    settings = {
        "size": {"shortest_edge": 30},
        "resample": 3,
        "image_mean": [0.5] * 3,
        "do_reduce_labels": True,
        "note": 3,
    }
    assert ours(**settings).to_dict() == theirs(**settings).to_dict()


def test_a_saved_processor_is_loaded_by_transformers_and_back(tmp_path) -> None:
    processor = SegformerImageProcessor(size=(24, 40), do_reduce_labels=True, note=[1, 2])
    assert processor.save_pretrained(tmp_path / "ours") == [str(tmp_path / "ours" / "preprocessor_config.json")]
    for loaded in (Theirs.from_pretrained(tmp_path / "ours"), AutoImageProcessor.from_pretrained(tmp_path / "ours")):
        assert type(loaded).__name__ == "SegformerImageProcessor"
        expected, found = (p(photo(), ids(), return_tensors="pt") for p in (loaded, processor))
        assert torch.equal(found.pixel_values, expected.pixel_values) and torch.equal(found.labels, expected.labels)
    loaded.save_pretrained(tmp_path / "theirs")
    for source in ("ours", "theirs", "theirs/preprocessor_config.json"):
        again = SegformerImageProcessor.from_pretrained(tmp_path / source)
        assert again.to_dict() == processor.to_dict() and again.note == [1, 2]
    changed = SegformerImageProcessor.from_pretrained(str(tmp_path / "ours"), size=8, use_fast=True, token=None)
    assert changed.size == {"height": 8, "width": 8} and changed.do_reduce_labels and not hasattr(changed, "use_fast")


def test_a_file_of_the_first_years_keeps_its_meaning(tmp_path) -> None:
    values = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "SegformerFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "reduce_labels": True,
        "resample": 2,
        "size": 512,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    processor = SegformerImageProcessor.from_pretrained(tmp_path)
    assert processor.to_dict() == Theirs(do_reduce_labels=True).to_dict()
    assert SegformerImageProcessor.from_pretrained(tmp_path, reduce_labels=False).do_reduce_labels is False
    assert SegformerImageProcessor.from_pretrained(tmp_path, do_reduce_labels=False).do_reduce_labels is False


def test_a_file_whose_two_names_disagree_is_told() -> None:
    with pytest.warns(UserWarning, match="do_reduce_labels False and its former name reduce_labels True disagree"):
        processor = SegformerImageProcessor.from_dict({"do_reduce_labels": False, "reduce_labels": True})
    assert processor.do_reduce_labels is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no preprocessor_config.json in .*, expected one beside the weights: write it with .*save_pretrained"),
        ("{", "preprocessor_config.json is not valid JSON"),
        ("[]", "preprocessor_config.json holds a list, expected an object of settings"),
    ],
)
def test_a_folder_without_readable_settings_is_told(tmp_path, content, message) -> None:
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        SegformerImageProcessor.from_pretrained(tmp_path)


def test_what_is_neither_folder_nor_id_or_asks_for_a_revision_is_told(tmp_path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        SegformerImageProcessor.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="revision cannot be chosen here: download the files and pass their folder"):
        SegformerImageProcessor.from_pretrained("nvidia/mit-b0", revision="refs/pr/1")


@pytest.mark.parametrize("former", [SegformerImageProcessorFast, SegformerFeatureExtractor])
def test_former_names_work_and_name_their_successor(former) -> None:
    with pytest.warns(FutureWarning, match=f"{former.__name__} is deprecated: use SegformerImageProcessor, which"):
        processor = former(size=8)
    assert processor.to_dict() == SegformerImageProcessor(size=8).to_dict()


# --- from logits to label maps


@pytest.mark.parametrize("sizes", [None, [(37, 53), (20, 9)], torch.tensor([[37, 53], [20, 9]])])
def test_label_maps_and_scores_are_those_of_transformers(sizes) -> None:
    outputs = SimpleNamespace(logits=torch.randn(2, 7, 10, 14))
    peer = [tuple(size) for size in sizes.tolist()] if isinstance(sizes, torch.Tensor) else sizes
    expected = Theirs().post_process_semantic_segmentation(outputs, peer, return_segmentation_scores=True)
    maps = SegformerImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=sizes)
    scored = SegformerImageProcessor().post_process_semantic_segmentation(outputs, sizes, True)
    for found, full, reference in zip(maps, scored, expected, strict=True):
        assert found.dtype == torch.int64 and found.shape == reference.segmentation.shape
        assert (found == reference.segmentation).double().mean() > 0.999  # a tie may fall either way
        assert torch.equal(full.segmentation, reference.segmentation)
        assert torch.equal(full["segmentation_scores"], reference.segmentation_scores)


def test_the_logits_at_full_size_are_never_held_for_a_label_map() -> None:
    outputs = SimpleNamespace(logits=torch.randn(1, 150, 16, 16))
    with torch.profiler.profile(profile_memory=True) as profile:
        SegformerImageProcessor().post_process_semantic_segmentation(outputs, [(512, 512)])
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 150 * 512 * 512 * 4 / 4  # a quarter of what F.interpolate takes


@pytest.mark.parametrize("sizes", [[(8, 8)], [(8, 8), (0, 8)], [(8, 8), (8, 8, 3)]])
def test_target_sizes_that_fit_no_batch_are_told(sizes) -> None:
    outputs = SimpleNamespace(logits=torch.zeros(2, 7, 4, 4))
    with pytest.raises(UserError, match=r"target_sizes is .*, expected \(height, width\) for each of 2 images"):
        SegformerImageProcessor().post_process_semantic_segmentation(outputs, sizes)
