import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from segformer.errors import UserError
from segformer.pixels import MEAN, PAD, STD, normalize, read_image, resize
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
    with pytest.raises(UserError, match=r"bomb.png: Image size \(196000000 pixels\) exceeds .* data.max_pixels"):
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
