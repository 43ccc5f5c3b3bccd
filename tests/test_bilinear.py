"""Label maps and bands against plain interpolation."""

import pytest
import torch
import torch.nn.functional as F

from segformer import bilinear
from segformer.bilinear import bilinear_matrix, row_bands, upsample_argmax, upsample_band


def naive(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)


def agreement(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found.long() == expected).double().mean().item()


def smooth(classes: int, height: int, width: int, noise: float = 0.05) -> torch.Tensor:
    """Logits in float64 whose winners form regions, as a trained network's do."""
    coarse = torch.randn(1, classes, 4, 4, dtype=torch.float64)
    fine = F.interpolate(coarse, size=(height, width), mode="bicubic")
    return fine + noise * torch.randn_like(fine)


@pytest.mark.parametrize(("source", "target"), [(8, 32), (7, 20), (20, 7), (5, 5), (1, 4)])
def test_bilinear_matrix_is_torchs_resize(source, target) -> None:
    x = torch.randn(1, 1, source, source, dtype=torch.float64)
    matrix = bilinear_matrix(source, target, x.device, x.dtype)
    expected = F.interpolate(x, size=(target, target), mode="bilinear", align_corners=False)
    torch.testing.assert_close(matrix @ x[0, 0] @ matrix.T, expected[0, 0])
    torch.testing.assert_close(matrix.sum(1), torch.ones(target, dtype=torch.float64))
    middle = slice(target // 3, target - 1)
    assert torch.equal(bilinear_matrix(source, target, x.device, x.dtype, middle), matrix[middle])


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


@pytest.mark.parametrize(("low", "high"), [((8, 9), (32, 36)), ((7, 5), (20, 33)), ((6, 6), (6, 6))])
def test_a_band_is_a_part_of_the_whole(low, high) -> None:
    maps = torch.randn(*low, 3, dtype=torch.float64)
    vertical = bilinear_matrix(low[0], high[0], maps.device, maps.dtype)
    whole = F.interpolate(maps.permute(2, 0, 1)[None], size=high, mode="bilinear", align_corners=False)[0]
    for out, source in row_bands(low[0], high[0], 5):
        band = upsample_band(maps[source], vertical[out, source], high[1])
        torch.testing.assert_close(band, whole.permute(1, 2, 0)[out])


@pytest.mark.parametrize("width", [33, 9])
@pytest.mark.parametrize("channels", [1, 5])
def test_bands_of_a_batch_are_those_of_its_images(width, channels) -> None:
    maps = torch.randn(3, 8, 9, channels, dtype=torch.float64)
    vertical = bilinear_matrix(8, 30, maps.device, maps.dtype, slice(4, 11))
    together = upsample_band(maps, vertical, width)
    assert together.shape == (3, 7, width, channels)
    torch.testing.assert_close(together, torch.stack([upsample_band(image, vertical, width) for image in maps]))


@pytest.mark.parametrize("size", [(70, 100), (33, 65), (18, 25)])
def test_label_maps_are_upsampled_logits_argmax_in_bands(size, monkeypatch) -> None:
    logits = torch.randn(2, 7, 18, 25)
    whole = upsample_argmax(logits, *size)
    monkeypatch.setitem(bilinear.BAND_NUMBERS, "cpu", 7 * size[1] * 3)
    banded = upsample_argmax(logits, *size)
    assert whole.dtype == torch.uint8 and whole.shape == (2, *size)
    assert agreement(whole, naive(logits, size)) > 0.9999
    assert agreement(banded, whole.long()) > 0.9999


def test_many_classes_need_a_wider_type() -> None:
    logits = torch.randn(1, 256, 4, 4)
    found = upsample_argmax(logits, 8, 8)
    assert found.dtype == torch.int16
    assert agreement(found, naive(logits, (8, 8))) == 1


@pytest.mark.parametrize("method", [bilinear._argmax_dense, bilinear._argmax_pruned])
@pytest.mark.parametrize(
    ("low", "high"),
    [((16, 16), (64, 64)), ((17, 23), (50, 81)), ((9, 30), (90, 61)), ((1, 2), (4, 9))],
)
@pytest.mark.parametrize("classes", [1, 2, 19, 150])
@pytest.mark.parametrize("noise", [0.05, 0.5, 50])
def test_both_ways_give_the_winner_of_every_pixel(method, low, high, classes, noise) -> None:
    """In float64, where rounding decides no pixel; from a few wide regions to pure noise."""
    logits = smooth(classes, *low, noise)
    assert torch.equal(method(logits[0].permute(1, 2, 0).contiguous(), *high), naive(logits, high)[0])


def test_a_class_that_wins_no_corner_of_a_cell_still_wins_inside_it() -> None:
    logits = torch.zeros(1, 3, 1, 2, dtype=torch.float64)
    logits[0, 0, 0], logits[0, 1, 0], logits[0, 2, 0] = torch.tensor([[10.0, 0], [0, 10], [6, 6]], dtype=torch.float64)
    found = bilinear._argmax_pruned(logits[0].permute(1, 2, 0).contiguous(), 2, 20)
    assert found[0].unique().tolist() == [0, 1, 2] and torch.equal(found, naive(logits, (2, 20))[0])


def test_cells_with_more_candidates_than_are_tried_at_first_are_solved_too() -> None:
    """60 classes, each the winner of a narrow strip between two corners: the tangents of a parabola."""
    place = torch.linspace(0, 1, 60, dtype=torch.float64)
    left, right = -(place**2), 2 * place - place**2
    logits = torch.stack([left, right], dim=1)[None, :, None]  # (1, 60, 1, 2)
    plain = torch.zeros(1, 60, 1, 30, dtype=torch.float64)
    plain[:, 0] = 9
    logits = torch.cat([plain, logits], dim=3)  # most cells are settled, so that the open one is pruned
    found = bilinear._argmax_pruned(logits[0].permute(1, 2, 0).contiguous(), 2, 32 * 200)
    assert torch.equal(found, naive(logits, (2, 32 * 200))[0]) and len(found.unique()) > 50


def test_where_all_logits_are_equal_the_first_class_wins() -> None:
    assert not upsample_argmax(torch.zeros(1, 150, 128, 128), 512, 512).any()


def test_large_maps_agree_with_the_naive_way_in_float32() -> None:
    logits = smooth(150, 128, 128).float()
    for order in (torch.contiguous_format, torch.channels_last):
        found = upsample_argmax(logits.contiguous(memory_format=order), 512, 512)
        assert agreement(found, naive(logits, (512, 512))) > 0.99999


def test_a_logit_that_is_no_number_does_not_win_at_the_size_it_has() -> None:
    logits = torch.zeros(1, 3, 4, 4)
    logits[0, 1], logits[0, 2] = torch.nan, 1
    assert (upsample_argmax(logits, 4, 4) == 2).all() and (upsample_argmax(logits, 8, 8) == 2).all()


@pytest.mark.parametrize("low", [(16, 16), (128, 128)])  # dense and pruned
@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_classes_that_are_ruled_out_win_nowhere(low, value) -> None:
    logits = smooth(150, *low).float()
    high = (4 * low[0], 4 * low[1])
    expected = naive(logits[:, :100], high)
    logits[:, 100:] = value
    assert agreement(upsample_argmax(logits, *high), expected) > 0.9999
    logits[:, 0, :4, :4] = torch.inf
    assert (upsample_argmax(logits, *high)[0, :12, :12] == 0).all()
