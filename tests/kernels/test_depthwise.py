"""The fused depth-wise convolution and GELU against PyTorch's own, values and gradients."""

import os
import random
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from segformer.kernels import depthwise
from segformer.kernels.depthwise import COLUMNS, depthwise_gelu, depthwise_gelu_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANDOM = random.Random(8)
SHAPES = [  # (B, H, W, C)
    (1, 1, 1, 1),
    (2, 1, 5, 3),
    (1, 5, 1, 2),
    (2, 2, 2, 16),
    (1, 9, 3, 2),  # three bands of rows, the last of one
    (2, 3, COLUMNS + 3, 70),  # two blocks of columns (three where they are halved) and of channels
    *((RANDOM.randint(1, 3), RANDOM.randint(1, 12), RANDOM.randint(1, 20), RANDOM.randint(1, 40)) for _ in range(4)),
]


def twin(tokens: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    maps = tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)
    return F.gelu(F.conv2d(maps, weight, bias, padding=1, groups=len(bias))).flatten(2).transpose(1, 2)


def example(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """Tokens, weight, bias and an incoming gradient."""
    batch, height, width, channels = shape
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = [(batch, height * width, channels), (channels, 1, 3, 3), (channels,), (batch, height * width, channels)]
    *inputs, grad = (torch.randn(each, generator=generator).to(DEVICE, dtype) for each in shapes)
    return [tensor.requires_grad_() for tensor in inputs], grad


def everything(function, inputs, grad, shape) -> list[Tensor]:
    """The result, then the gradients of tokens, weight and bias."""
    result = function(*inputs, *shape[1:3])
    return [result, *torch.autograd.grad(result, inputs, grad)]


def assert_near(found: Tensor, expected: Tensor, relative: float) -> None:
    """Within `relative` of each value, and of the largest where values cancel."""
    assert found.shape == expected.shape and found.is_contiguous()
    exact = expected.double()
    torch.testing.assert_close(found.double(), exact, rtol=relative, atol=relative * exact.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_equal_the_twins(shape) -> None:
    inputs, grad = example(shape)
    for found, expected in zip(*(everything(f, inputs, grad, shape) for f in (depthwise_gelu, twin)), strict=True):
        assert found.dtype == torch.float32
        assert_near(found, expected, 1e-5)


def test_long_bands_of_rows(monkeypatch) -> None:
    """As large inputs are cut."""
    monkeypatch.setattr(depthwise, "PROGRAMS", 1)
    shape = (1, 35, 2, 3)
    inputs, grad = example(shape)
    for found, expected in zip(*(everything(f, inputs, grad, shape) for f in (depthwise_gelu, twin)), strict=True):
        assert_near(found, expected, 1e-5)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_half_precision_rounds_once_on_the_way_out(dtype, unit) -> None:
    """Against the twin in float64 of the same numbers.

    The result and the gradients of weight and bias are off by half a unit in the last place (at most `unit` relative),
    the gradient of tokens also by that of nine terms that were rounded between the passes.
    """
    shape = (2, 7, 9, 20)
    inputs, grad = example(shape, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found = everything(depthwise_gelu, inputs, grad, shape)
    expected = everything(twin, exact, grad.double(), shape)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert_near(one, other, unit if one is not found[1] else 3 * unit)
    if dtype == torch.float16 or DEVICE == "cuda":  # the interpreter cuts bfloat16 off instead of rounding
        for one, own, other in zip(found, everything(twin, inputs, grad, shape), expected, strict=True):
            assert (one - other).norm() <= 1.05 * (own - other).norm()  # no further off than PyTorch's own


def test_parameters_may_be_of_another_type_than_tokens() -> None:
    """As in autocast, without a copy of the parameters."""
    shape = (1, 4, 5, 6)
    (tokens, *parameters), grad = example(shape)
    tokens = tokens.detach().bfloat16().requires_grad_()
    found = everything(depthwise_gelu, [tokens, *parameters], grad.bfloat16(), shape)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 2 + [torch.float32] * 2
    expected = everything(twin, [tokens.detach().float().requires_grad_(), *parameters], grad.bfloat16().float(), shape)
    for one, other, bound in zip(found, expected, [2**-8, 3 * 2**-8, 1e-5, 1e-5], strict=True):
        assert_near(one, other, bound)


def test_any_strides_and_nothing_is_changed() -> None:
    shape = (2, 3, 4, 6)
    (tokens, weight, bias), grad = example(shape)
    strided = [
        tokens.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_(),
        weight.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).requires_grad_(),
        bias.detach().repeat_interleave(2)[::2].requires_grad_(),
    ]
    assert not any(tensor.is_contiguous() for tensor in strided)
    before = [tensor.clone() for tensor in strided]
    spread = grad[:, :1].expand_as(grad)  # of stride 0, as a mean's gradient
    found = everything(depthwise_gelu, strided, spread, shape)
    assert all(map(torch.equal, strided, before))
    for one, other in zip(found, everything(twin, [tokens, weight, bias], spread, shape), strict=True):
        assert_near(one, other, 1e-5)


def test_the_same_bits_every_time() -> None:
    shape = (2, 6, 5, 3)
    inputs, grad = example(shape)
    assert all(map(torch.equal, *(everything(depthwise_gelu, inputs, grad, shape) for _ in range(2))))


def test_large_and_empty_inputs() -> None:
    """Far from zero GELU is the identity or zero, and its slope 1 or 0: no NaN."""
    shape = (1, 2, 3, 2)
    inputs, grad = example(shape)
    with torch.no_grad():
        inputs[0].mul_(1e18)
    for one, other in zip(*(everything(f, inputs, grad, shape) for f in (depthwise_gelu, twin)), strict=True):
        assert one.isfinite().all()
        assert_near(one, other, 1e-5)
    inputs = [torch.zeros(0, 6, 2, device=DEVICE, requires_grad=True), *inputs[1:]]
    result, *gradients = everything(depthwise_gelu, inputs, grad[:0], shape)
    assert result.shape == (0, 6, 2) and not any(gradient.any() for gradient in gradients)


def test_operator_is_well_formed() -> None:
    """Schema, fake tensors, autograd registration and tracing with dynamic shapes."""
    shape = (2, 3, 4, 5)
    inputs, grad = example(shape)
    torch.library.opcheck(depthwise_gelu, (*inputs, 3, 4))
    torch.library.opcheck(depthwise_gelu_backward, (grad, *(tensor.detach() for tensor in inputs), 3, 4))


def test_compiles_into_one_graph() -> None:
    shape = (2, 3, 4, 5)
    inputs, grad = example(shape)
    compiled = torch.compile(depthwise_gelu, fullgraph=True, backend="aot_eager")
    for one, other in zip(*(everything(f, inputs, grad, shape) for f in (compiled, depthwise_gelu)), strict=True):
        assert torch.equal(one, other)


def test_what_does_not_fit_is_refused() -> None:
    (tokens, weight, bias), _ = example((2, 3, 4, 5))
    _, *wrong = product((tokens, tokens[0]), (weight, weight[:, 0]), (bias, bias[:4]), (3, 4))  # the first is right
    for inputs in wrong:
        with pytest.raises(ValueError, match="do not fit a grid of"):
            depthwise_gelu(*inputs, 4)
    with pytest.raises(TypeError, match="not torch.float64"):
        depthwise_gelu(tokens.double(), weight, bias, 3, 4)


@pytest.mark.gpu
def test_more_numbers_than_int32_counts() -> None:
    batch, side, channels = 129, 128, 1024  # 2^31 + 2^24
    tokens = torch.zeros(batch, side * side, channels, device=DEVICE, dtype=torch.bfloat16)
    (last, weight, bias), grad = example((1, side, side, channels), torch.bfloat16)
    tokens[-1:] = last.detach()
    tokens.requires_grad_()
    result = depthwise_gelu(tokens, weight, bias, side, side)
    assert_near(result[-1:], twin(last, weight, bias, side, side), 2**-7)
    everywhere = torch.zeros_like(tokens)
    everywhere[-1:] = grad
    found = torch.autograd.grad(result, (tokens, weight, bias), everywhere)
    expected = everything(twin, [last, weight, bias], grad, (1, side, side, channels))[1:]
    for one, other in zip((found[0][-1:], *found[1:]), expected, strict=True):
        assert_near(one, other, 2**-5)
