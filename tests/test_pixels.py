import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from segformer.errors import UserError
from segformer.pixels import MEAN, PAD, STD, decoded_fast, image_size, normalize, read_image, resize
from tests.conftest import grey_png


def test_normalised_pixels_are_those_of_imagenet() -> None:
    image = torch.randint(0, 256, (1, 3, 2, 2), dtype=torch.uint8)
    found = normalize(image)
    for channel in range(3):
        expected = (image[0, channel].double() - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(found[0, channel].double(), expected, atol=1e-6, rtol=0)
    padded = normalize(torch.tensor(PAD, dtype=torch.uint8).view(1, 3, 1, 1))
    assert padded.abs().max() <= 0.0082  # "pad after normalising" would give 0: half a grey level at most


def test_resize_follows_opencv_within_a_grey_level() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    expected = cv2.resize(image, (71, 53), interpolation=cv2.INTER_LINEAR).astype(int)
    found = resize(torch.from_numpy(image).permute(2, 0, 1)[None], 53, 71)[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - expected).max() <= 1


def test_images_of_any_mode_come_as_rgb_and_upright(tmp_path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = (255, 0, 0)
    for mode in ("L", "RGBA", "CMYK", "P", "RGB"):
        suffix = "tif" if mode == "CMYK" else "png"
        Image.fromarray(pixels).convert(mode).save(tmp_path / f"{mode}.{suffix}")
        assert read_image(tmp_path / f"{mode}.{suffix}").shape == (4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").shape == (6, 4, 3)


def test_sixteen_bits_are_scaled_to_eight_and_thirty_two_refused(tmp_path) -> None:
    Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16)).save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png")[0, :, 0].tolist() == [0, 0, 1, 255]
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"float.tif has F pixels of 32 bits, expected 8 or 16"):
        read_image(tmp_path / "float.tif")


def test_grey_cmyk_and_transparent_photographs_keep_their_colours(tmp_path) -> None:
    pixels = np.full((16, 16, 3), (200, 120, 40), np.uint8)
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "cmyk.jpg").astype(int) - pixels).max() <= 8
    Image.fromarray(np.dstack([pixels, np.zeros((16, 16), np.uint8)])).save(tmp_path / "clear.png")
    assert np.array_equal(read_image(tmp_path / "clear.png"), pixels)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png"), pixels[..., :1].repeat(3, 2))


def bomb(path: Path, side: int = 60_000) -> Path:
    """A valid PNG of a few bytes that decodes to side x side pixels."""
    return grey_png(path, side, side, 1, b"\0" * (side * (1 + (side + 7) // 8)))


def test_a_decompression_bomb_is_refused_before_it_is_decoded_unless_the_limit_is_raised(tmp_path) -> None:
    path = bomb(tmp_path / "bomb.png", 14_000)
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match=r"bomb.png: its 196000000 pixels are more than data.max_pixels"):
        read_image(path)
    small = bomb(tmp_path / "small.png", 1_000)
    with pytest.raises(UserError, match="data.max_pixels"):
        read_image(small, max_pixels=999_999)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(small, max_pixels=1_000_000).shape == (1_000, 1_000, 3)
    assert limit == Image.MAX_IMAGE_PIXELS  # the program's own setting is left as it was


@pytest.mark.parametrize(("content", "reason"), [(b"", "the file is empty"), (b"text", "holds no image")])
def test_broken_images_are_told(tmp_path, content, reason) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(UserError, match=rf"cannot read image .*x.jpg: .*{reason}.*; replace or remove it"):
        read_image(tmp_path / "x.jpg")
    with pytest.raises(UserError, match="cannot read image .*nowhere.jpg: .*No such file"):
        read_image(tmp_path / "nowhere.jpg")


def test_a_truncated_image_is_not_half_a_grey_picture(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:-800])
    with pytest.raises(UserError, match="truncated"):
        read_image(tmp_path / "x.jpg")


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.jpg", "RGB", {"quality": 80}),
        ("a.jpg", "RGB", {"quality": 95, "subsampling": 0}),
        ("a.jpg", "RGB", {"progressive": True}),
        ("a.jpg", "L", {}),
        ("a.png", "RGB", {}),
        ("a.png", "L", {}),
    ],
)
def test_the_fast_decoder_gives_the_bytes_of_the_careful_one(tmp_path, name, mode, options) -> None:
    pixels = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8), (0, 0), 1)
    path = tmp_path / name
    Image.fromarray(pixels).convert(mode).save(path, **options)
    data = path.read_bytes()
    with Image.open(path) as image:
        fast = decoded_fast(image, data, cv2.IMREAD_COLOR_RGB)
        assert fast is not None and np.array_equal(fast, np.array(image.convert("RGB")))
        assert np.array_equal(read_image(path), fast)
        # half a file would be half a picture to it
        assert decoded_fast(image, data[: len(data) // 2], cv2.IMREAD_COLOR_RGB) is None


def test_the_size_of_an_image_is_told_upright_without_decoding_it(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    for name, options in (("plain.png", {}), ("plain.jpg", {}), ("turned.jpg", {"exif": exif}),
                          ("turned.png", {"exif": exif})):  # fmt: skip
        pixels.save(tmp_path / name, **options)
        assert image_size(tmp_path / name) == read_image(tmp_path / name).shape[:2]
    whole = (tmp_path / "turned.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    assert image_size(tmp_path / "half.jpg") == (60, 40)


def test_other_numbers_of_bands_are_read_as_they_are(tmp_path) -> None:
    rng = np.random.default_rng(0)
    for mode, bands in (("L", 1), ("LA", 2), ("RGBA", 4)):
        pixels = rng.integers(0, 256, (4, 6, bands), np.uint8)
        Image.fromarray(pixels[..., 0] if bands == 1 else pixels, mode).save(tmp_path / f"{bands}.png")
        assert np.array_equal(read_image(tmp_path / f"{bands}.png", bands=bands), pixels)
    many = rng.integers(0, 256, (4, 6, 7), np.uint8)
    np.save(tmp_path / "many.npy", many)
    assert np.array_equal(read_image(tmp_path / "many.npy", bands=7), many)
    assert image_size(tmp_path / "many.npy", bands=7) == (4, 6)
    np.save(tmp_path / "wide.npy", many.astype(np.uint16) * 256 + 3)
    assert np.array_equal(read_image(tmp_path / "wide.npy", bands=7), many)  # the upper eight bits
    tifffile = pytest.importorskip("tifffile", reason="the extra tiff is not installed")
    tifffile.imwrite(tmp_path / "many.tif", many, photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(
        tmp_path / "planes.tif", np.moveaxis(many, -1, 0), photometric="minisblack", planarconfig="separate"
    )
    for name in ("many.tif", "planes.tif"):
        assert np.array_equal(read_image(tmp_path / name, bands=7), many)
        assert image_size(tmp_path / name, bands=7) == (4, 6)


@pytest.mark.parametrize(
    ("name", "make", "bands", "sentence"),
    [
        ("rgb.png", lambda path: Image.new("RGB", (6, 4)).save(path), 4, "rgb.png is a RGB image, expected 4 bands"),
        ("few.npy", lambda path: np.save(path, np.zeros((4, 6, 2), np.uint8)), 5, r"shape .4, 6, 2., expected .H, W"),
        ("float.npy", lambda path: np.save(path, np.zeros((4, 6, 5))), 5, "holds float64 .* of uint8 or uint16"),
        ("cut.npy", lambda path: path.write_bytes(b"\x93NUMPY"), 5, "cannot read image .*cut.npy: .*; replace"),
        ("pickle.npy", lambda path: np.save(path, np.array([{}]), allow_pickle=True), 5, "cannot read image .*pickle"),
        ("cut.tif", lambda path: path.write_bytes(b"II*\0" + bytes(20)), 5, "cannot read image .*cut.tif"),
        ("none.npy", lambda path: np.save(path, np.zeros((0, 4, 5), np.uint8)), 5, r"shape .0, 4, 5., expected"),
        ("many.npy", lambda path: path.write_bytes(b"PK\3\4" + bytes(40)), 5, "cannot read image .*many.npy"),
    ],
)  # fmt: skip
def test_images_of_other_bands_than_declared_are_told(tmp_path, name, make, bands, sentence) -> None:
    make(tmp_path / name)
    with pytest.raises(UserError, match=sentence):
        read_image(tmp_path / name, bands=bands)


def test_a_postscript_file_starts_no_interpreter(tmp_path) -> None:
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(UserError, match="holds no image that is known here"):
        read_image(tmp_path / "x.png")


def test_a_tiff_of_many_bands_is_refused_by_its_header(tmp_path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="the extra tiff is not installed")
    big, turned = tmp_path / "big.tif", tmp_path / "turned.tif"
    tifffile.imwrite(big, np.zeros((60, 60, 5), np.uint8), photometric="minisblack", planarconfig="contig")
    with pytest.raises(UserError, match=r"shape \(60, 60, 5\): raise data.max_pixels"):
        read_image(big, max_pixels=3599, bands=5)
    assert read_image(big, max_pixels=3600, bands=5).shape == (60, 60, 5)
    turn = [(274, "H", 1, 6, True)]
    tifffile.imwrite(
        turned, np.zeros((6, 4, 5), np.uint8), photometric="minisblack", planarconfig="contig", extratags=turn
    )
    with pytest.raises(UserError, match="turned.tif is turned by its orientation tag: save it upright"):
        read_image(turned, bands=5)
