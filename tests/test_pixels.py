import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from segformer.errors import UserError
from segformer.pixels import MEAN, PAD, STD, bilinear_matrix, normalize, read_image, resize, row_bands


def test_normalised_pixels_are_those_of_imagenet() -> None:
    image = torch.randint(0, 256, (1, 3, 2, 2), dtype=torch.uint8)
    found = normalize(image)
    for channel in range(3):
        expected = (image[0, channel].double() - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(found[0, channel].double(), expected, atol=1e-6, rtol=0)
    padded = normalize(torch.tensor(PAD, dtype=torch.uint8).view(1, 3, 1, 1))
    assert padded.abs().max() <= 0.0082  # "pad after normalising" would give 0: half a grey level at most


@pytest.mark.parametrize(("source", "target"), [(8, 32), (7, 20), (20, 7), (5, 5), (1, 4)])
def test_bilinear_matrix_is_torchs_resize(source, target) -> None:
    x = torch.randn(1, 1, source, source, dtype=torch.float64)
    matrix = bilinear_matrix(source, target, x.device, x.dtype)
    expected = F.interpolate(x, size=(target, target), mode="bilinear", align_corners=False)
    torch.testing.assert_close(matrix @ x[0, 0] @ matrix.T, expected[0, 0])
    torch.testing.assert_close(matrix.sum(1), torch.ones(target, dtype=torch.float64))


@pytest.mark.parametrize(("source", "target", "rows"), [(8, 32, 5), (7, 20, 1), (20, 7, 3), (5, 5, 2), (128, 683, 17)])
def test_bands_cover_every_row_and_hold_what_it_needs(source, target, rows) -> None:
    matrix = bilinear_matrix(source, target, torch.device("cpu"))
    covered = []
    for out, needed in row_bands(source, target, rows):
        covered += range(target)[out]
        outside = matrix[out].clone()
        outside[:, needed] = 0
        assert not outside.any()
    assert covered == list(range(target))


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


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_broken_images_are_told(tmp_path, content) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(UserError, match="cannot read image .*x.jpg"):
        read_image(tmp_path / "x.jpg")


def test_a_truncated_image_is_not_half_a_grey_picture(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:-800])
    with pytest.raises(UserError, match="truncated"):
        read_image(tmp_path / "x.jpg")
