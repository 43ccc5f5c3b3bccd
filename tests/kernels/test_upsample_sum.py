"""The fused upsampling and sum of maps against PyTorch's own, values and gradients."""

import os
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from segformer.kernels import upsample_sum as module
from segformer.kernels.upsample_sum import BACKWARD, FORWARD, upsample_sum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANDOM = random.Random(8)


def _some(most: int) -> tuple[int, int]:
    return RANDOM.randint(1, most), RANDOM.randint(1, most)


CASES = [  # B, D, fine (H, W), coarse (h, w)
    (2, 3, (1, 1), [(1, 1), (2, 3), (1, 4)]),
    (1, 4, (8, 2), [(4, 1), (2, 1), (1, 1)]),  # ratios of a SegFormer
    (1, 3, (5, 9), [(3, 5), (2, 3), (1, 2)]),  # and of its odd sides
    (1, 24, (4, 3), [(4, 3)]),  # the size it has
    (1, 2, (3, 4), [(5, 9), (6, 8)]),  # downwards: cells without a fine pixel
    (1, 2, (3, 11), [(3, 2), (1, 11), (7, 1)]),  # one axis only, each in its own way
    (1, BACKWARD[1] + 3, (1, FORWARD[0] + 2), [(1, BACKWARD[0] + 1)]),  # several blocks of columns and of channels
    *((1, RANDOM.randint(1, 9), _some(5), [_some(7) for _ in range(1 + i % 3)]) for i in range(4)),
]


def twin(fine: Tensor, coarse: list[Tensor], relu: bool = False) -> Tensor:
    for x in coarse:
        resized = F.interpolate(x.permute(0, 3, 1, 2), fine.shape[1:3], mode="bilinear", align_corners=False)
        fine = fine + resized.permute(0, 2, 3, 1)
    return fine.relu() if relu else fine


def example(case, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """A fine map and coarse ones, and an incoming gradient."""
    batch, channels, fine, coarse = case
    generator = torch.Generator().manual_seed(channels + sum(fine))
    sizes = [fine, *coarse, fine]
    *maps, grad = (torch.randn(batch, *size, channels, generator=generator).to(DEVICE, dtype) for size in sizes)
    return [x.requires_grad_() for x in maps], grad


def everything(function, maps: list[Tensor], grad: Tensor, relu: bool = False) -> list[Tensor]:
    """The result, then the maps' gradients."""
    result = function(maps[0], maps[1:], relu)
    return [result, *torch.autograd.grad(result, maps, grad)]


def in_float64(maps: list[Tensor], grad: Tensor, relu: bool = False) -> list[Tensor]:
    return everything(twin, [x.detach().double().requires_grad_() for x in maps], grad.double(), relu)


def assert_near(found: Tensor, expected: Tensor, relative: float, least: float | None = None) -> None:
    """Within `relative` of each value, and within `least` of the largest where values cancel."""
    assert found.shape == expected.shape
    least = (relative if least is None else least) * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected, rtol=relative, atol=least)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_values_and_gradients_equal_the_twins(number) -> None:
    maps, grad = example(CASES[number])
    relu = number % 2 == 1
    found = everything(upsample_sum, maps, grad, relu)
    assert found[0].is_contiguous()
    for one, other in zip(found, in_float64(maps, grad, relu), strict=True):
        assert one.dtype == torch.float32
        assert_near(one, other, 1e-5)


def test_many_bands_of_rows(monkeypatch) -> None:
    """More of them than the coarsest map has rows; then all rows in one, as large inputs are cut."""
    maps, grad = example((1, 2, (6, 1), [(3, 1), (2, 1)]))
    for least in (1, 32):
        monkeypatch.setattr(module, "ROWS", (least, least))
        for one, other in zip(everything(upsample_sum, maps, grad), in_float64(maps, grad), strict=True):
            assert_near(one, other, 1e-5)


# half a unit in the last place; where the interpreter cuts bfloat16 off instead of rounding, a whole one
UNITS = [(torch.bfloat16, 2.0**-8 if DEVICE == "cuda" else 2.0**-7), (torch.float16, 2.0**-11)]


@pytest.mark.parametrize(("dtype", "unit"), UNITS)
def test_half_precision_rounds_once_on_the_way_out(dtype, unit) -> None:
    """Every value and gradient against the twin in float64 of the same numbers."""
    maps, grad = example((1, 24, (3, 5), [(2, 3), (1, 2)]), dtype)
    for one, other in zip(everything(upsample_sum, maps, grad), in_float64(maps, grad), strict=True):
        assert one.dtype == dtype
        assert_near(one, other, unit, least=1e-6)


def test_the_fine_gradient_is_no_copy() -> None:
    maps, grad = example((1, 3, (2, 2), [(1, 1)]))
    assert everything(upsample_sum, maps, grad)[1].data_ptr() == grad.data_ptr()


def test_any_strides_and_nothing_is_changed() -> None:
    maps, grad = example((2, 4, (3, 4), [(2, 3), (1, 2)]))
    strided = [x.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_() for x in maps]
    assert not any(x.is_contiguous() for x in strided)
    before = [x.clone() for x in strided]
    spread = grad[:, :1, :1].expand_as(grad)  # of stride 0, as a mean's gradient
    found = everything(upsample_sum, strided, spread)
    assert all(map(torch.equal, strided, before))
    for one, other in zip(found, in_float64(maps, spread), strict=True):
        assert_near(one, other, 1e-5)


def test_the_same_bits_every_time() -> None:
    maps, grad = example((1, 3, (3, 2), [(2, 3), (1, 2)]))
    assert all(map(torch.equal, *(everything(upsample_sum, maps, grad, relu=True) for _ in range(2))))


def test_what_is_not_finite_stays_where_it_belongs() -> None:
    """NaN passes the ReLU; an infinite gradient reaches the coarse positions that its pixel touches and no other."""
    maps, grad = example((1, 2, (4, 8), [(2, 4)]))
    with torch.no_grad():
        maps[1][0, 0, 0, 0] = torch.nan
    grad[0, 0, -1] = torch.inf
    for one, other in zip(everything(upsample_sum, maps, grad, True), in_float64(maps, grad, True), strict=True):
        assert torch.equal(one.isnan(), other.isnan()) and torch.equal(one.isinf(), other.isinf())
    maps, _ = example((0, 2, (4, 8), [(2, 4)]))
    assert [x.shape[0] for x in everything(upsample_sum, maps, grad[:0])] == [0, 0, 0]


@pytest.mark.parametrize("relu", [False, True])
def test_operators_are_well_formed(relu) -> None:
    """Schema, fake tensors, autograd registration and tracing with dynamic shapes, backward too."""
    (fine, *coarse), _ = example((1, 2, (1, 2), [(1, 1), (1, 2)]))
    torch.library.opcheck(torch.ops.segformer.upsample_sum.default, (fine, coarse[: 1 + relu], relu))
    torch.library.opcheck(torch.ops.segformer.upsample_sum_backward.default, (fine.detach(), [1, 1], [1, 2]))


def test_compiles_into_one_graph() -> None:
    maps, grad = example((1, 2, (1, 3), [(1, 2), (1, 1)]))
    compiled = torch.compile(upsample_sum, fullgraph=True, backend="aot_eager")
    for relu in (False, True):
        for one, other in zip(*(everything(f, maps, grad, relu) for f in (compiled, upsample_sum)), strict=True):
            assert torch.equal(one, other)


def test_what_does_not_fit_is_refused() -> None:
    (fine, coarse), _ = example((2, 3, (4, 4), [(2, 2)]))
    wrong = [
        (fine, []),
        (fine, [coarse] * 4),
        (fine[0], [coarse]),
        (fine, [coarse[0]]),
        (fine, [coarse, coarse[:1]]),
        (fine, [coarse[..., :2]]),
        (fine, [coarse.half()]),
        (fine, [coarse[:, :0]]),
        (fine[:, :, :0], [coarse]),
    ]
    for inputs in wrong:
        with pytest.raises(ValueError, match="do not fit"):
            upsample_sum(*inputs)
    with pytest.raises(TypeError, match="not torch.float64"):
        upsample_sum(fine.double(), [coarse.double()])


@pytest.mark.gpu
def test_more_numbers_than_int32_counts() -> None:
    batch, side, channels = 129, 128, 1024  # 2^31 + 2^24
    (last, coarse), grad = example((1, channels, (side, side), [(side, side // 2)]), torch.bfloat16)
    maps = [torch.zeros(batch, *x.shape[1:], device=DEVICE, dtype=x.dtype) for x in (last, coarse)]
    for x, image in zip(maps, (last, coarse), strict=True):
        x[-1:] = image.detach()
    everywhere = torch.zeros_like(maps[0])
    everywhere[-1:] = grad
    found = everything(upsample_sum, [x.requires_grad_() for x in maps], everywhere)
    for one, other in zip(found, in_float64([last, coarse], grad), strict=True):
        assert_near(one[-1:], other, 2**-8, least=1e-6)
