"""Layer normalisation, with and without the addition before it, against PyTorch's own in float64."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
pytest.importorskip("triton")

from segformer.kernels import layer_norm as module
from segformer.kernels.layer_norm import add_layer_norm, layer_norm, layer_norm_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
SHAPES = [  # one row, few, an odd number, several tiles; one channel up to the most
    (1,),
    (32,),
    (2, 7, 1),
    (5, 3),
    (3, 11, 5, 8),
    (2, 3, 100),
    (2, 9, 160),
    (3, 5, 512),
    (2, 2, 1024),
]
HALVES = [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)]  # one unit: the interpreter cuts off, GPUs round


def example(shape, dtype=torch.float32, parameters=None) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """x, branch, weight and bias, and the gradients of sum and normalised."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, branch, *grads = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(4))
    weight, bias = (torch.randn(shape[-1], generator=generator).to(DEVICE, parameters or dtype) for _ in range(2))
    inputs = (tensor.requires_grad_() for tensor in (1 + 2 * x, branch, 1 + weight / 2, bias))
    return *(tensor.detach().requires_grad_() for tensor in inputs), grads


def per_sample(scale: Tensor, x: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (x.dim() - 1))


def norm(x, weight, bias, grad, eps=EPS, dtype=None) -> list[Tensor]:
    """The kernel's result and the gradients of x, weight and bias."""
    result = layer_norm(x, weight, bias, eps, dtype or x.dtype)
    return [result, *torch.autograd.grad(result, (x, weight, bias), grad)]


def twin(x, weight, bias, grad, eps=EPS) -> list[Tensor]:
    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    result = F.layer_norm(inputs[0], inputs[1].shape, *inputs[1:], eps)
    return [result, *torch.autograd.grad(result, inputs, grad.double())]


def add_norm(x, branch, scale, weight, bias, grads, dtype=None, function=add_layer_norm) -> list[Tensor]:
    """The kernel's sum, normalised and the gradients of x, branch, weight and bias."""
    results = function(x, branch, scale, weight, bias, EPS, dtype or x.dtype)
    return [*results, *torch.autograd.grad(results, (x, branch, weight, bias), grads)]


def add_twin(x, branch, scale, weight, bias, grads) -> list[Tensor]:
    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, branch, weight, bias)]
    added = inputs[1] if scale is None else inputs[1] * per_sample(scale.double(), x)
    summed = inputs[0] + added
    results = summed, F.layer_norm(summed, weight.shape, *inputs[2:], EPS)
    return [*results, *torch.autograd.grad(results, inputs, [grad.double() for grad in grads])]


def assert_near(found: Tensor, expected: Tensor, relative: float, floor: float = 1e-12) -> None:
    """Within `relative` of each value, and of the largest where values cancel; all of them cancel within `floor`."""
    assert found.shape == expected.shape and found.is_contiguous()
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=relative, atol=relative * largest + floor)


def assert_all_near(found: list[Tensor], expected: list[Tensor], relative: float, floor: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, relative, floor)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_equal_the_twins(shape) -> None:
    x, branch, weight, bias, grads = example(shape)
    found = norm(x, weight, bias, grads[1])
    assert all(tensor.dtype == torch.float32 for tensor in found)
    floor = 1e-4 if shape[-1] == 1 else 1e-12  # one channel: a rounding over the root of eps, instead of 0
    assert_all_near(found, twin(x, weight, bias, grads[1]), 1e-5, floor)
    scales = [None, torch.arange(shape[0], device=DEVICE) / 0.9] if len(shape) > 1 else [None]  # the first is dropped
    for scale in scales:
        found = add_norm(x, branch, scale, weight, bias, grads)
        assert_all_near(found, add_twin(x, branch, scale, weight, bias, grads), 1e-5, floor)
        if scale is not None:
            assert torch.equal(found[0][0], x[0]) and not found[3][0].any()


@pytest.mark.parametrize(("channels", "samples"), [(3, 1), (8, 5), (16, 53)])
def test_many_tiles_and_long_walks(channels, samples, monkeypatch) -> None:
    """As large inputs are cut: programs that walk over tiles, the last of them ragged, and samples across tiles."""
    monkeypatch.setattr(module, "FORWARD", 64)
    monkeypatch.setattr(module, "BACKWARD", 32)
    monkeypatch.setattr(module, "PROGRAMS", 3)
    x, branch, weight, bias, grads = example((samples, 53 // samples, channels))
    assert_all_near(norm(x, weight, bias, grads[1]), twin(x, weight, bias, grads[1]), 1e-5)
    scale = torch.rand(samples, device=DEVICE)
    found, expected = (f(x, branch, scale, weight, bias, grads) for f in (add_norm, add_twin))
    assert_all_near(found, expected, 1e-5)


@pytest.mark.parametrize(("dtype", "unit"), HALVES)
def test_half_precision_rounds_once_on_the_way_out(dtype, unit) -> None:
    """The normalised and every gradient: float32's of the rows as they were rounded, within one unit."""
    x, branch, weight, bias, grads = example((3, 7, 160), dtype)
    found = norm(x, weight, bias, grads[1])
    assert all(tensor.dtype == dtype for tensor in found)
    assert_all_near(found, twin(x, weight, bias, grads[1]), unit)
    scale = torch.tensor([0.0, 1.25, 1.0], device=DEVICE, dtype=dtype)
    summed, *found = add_norm(x, branch, scale, weight, bias, grads)
    assert_near(summed, x + branch * per_sample(scale, x), 2 * unit)  # rounded twice
    normed, grad, *others = twin(summed, weight, bias, grads[1])
    grad += grads[0]
    assert_all_near(found, [normed, grad, grad * per_sample(scale, x), *others], unit)
    if dtype == torch.float16 or DEVICE == "cuda":  # the interpreter cuts bfloat16 off instead of rounding
        assert torch.equal(summed, x + branch * per_sample(scale, x))


@pytest.mark.parametrize("scaled", [False, True])
def test_every_input_and_result_has_its_own_type(scaled) -> None:
    """As under autocast: rows in float32, branch and result in bfloat16, parameters in float32."""
    x, branch, weight, bias, grads = example((2, 7, 32))
    branch, grads[1] = branch.detach().bfloat16().requires_grad_(), grads[1].bfloat16()
    scale = torch.tensor([0.0, 1.1], device=DEVICE) if scaled else None
    found = add_norm(x, branch, scale, weight, bias, grads, torch.bfloat16)
    single, half = torch.float32, torch.bfloat16
    assert [tensor.dtype for tensor in found] == [single, half, single, half, single, single]
    summed, *found = found
    added = branch if scale is None else (branch * per_sample(scale, x)).bfloat16()
    assert_near(summed, x + added, 2**-7 if scaled else 1e-6)
    normed, grad, *others = twin(summed, weight, bias, grads[1])
    grad += grads[0]
    expected = [normed, grad, grad if scale is None else grad * per_sample(scale, x), *others]
    for one, other, bound in zip(found, expected, [2**-7, 1e-5, 2**-7, 1e-5, 1e-5], strict=True):
        assert_near(one, other, bound)
    weight = weight.detach().half().requires_grad_()
    found, expected = norm(branch, weight, bias, grads[0], dtype=single), twin(branch, weight, bias, grads[0])
    assert [tensor.dtype for tensor in found] == [single, half, torch.float16, single]
    for one, other, bound in zip(found, expected, [1e-5, 2**-7, 2**-10, 1e-5], strict=True):
        assert_near(one, other, bound)


def test_a_large_mean_and_constant_rows() -> None:
    """Variance is that of centred values: what is lost is the rounding of the mean, 1e3 * 2^-24 or 3 * 2^-24."""
    x, _, weight, bias, grads = example((40, 160))
    large = (x.detach() / 2 + 1e3).requires_grad_()
    assert_all_near(norm(large, weight, bias, grads[1]), twin(large, weight, bias, grads[1]), 1e-4)
    one = torch.ones_like(weight)
    error = layer_norm(large, one, 0 * one, EPS, torch.float32).double() - twin(large, one, 0 * one, grads[1])[0]
    assert error.abs().max() < 2e-4  # of values of deviation 1
    flat = torch.full_like(x, 3.0).requires_grad_()
    found, expected = norm(flat, weight, bias, grads[1]), twin(flat, weight, bias, grads[1])
    assert_near(found[0], expected[0], 3 * 2**-23 * EPS**-0.5)
    assert_near(found[1], expected[1], 1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of a deviation of 0
def test_without_eps() -> None:
    """Rows past the last have no deviation at all, and must not reach the sums."""
    x, _, weight, bias, grads = example((5, 3))
    assert_all_near(norm(x, weight, bias, grads[1], eps=0.0), twin(x, weight, bias, grads[1], eps=0.0), 1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (0, 8)])
def test_no_rows(shape) -> None:
    x, branch, weight, bias, grads = example(shape)
    for scale in (None, torch.ones(shape[0], device=DEVICE)):
        *found, grad_weight, grad_bias = add_norm(x, branch, scale, weight, bias, grads)
        assert all(tensor.shape == shape for tensor in found)
        assert grad_weight.shape == grad_bias.shape == (8,) and not grad_weight.any() and not grad_bias.any()
    assert not any(tensor.any() for tensor in norm(x, weight, bias, grads[1]))


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_both_results_is_enough(used) -> None:
    x, branch, weight, bias, grads = example((2, 3, 8))
    grads[1 - used] = torch.zeros_like(x)
    expected = add_twin(x, branch, None, weight, bias, grads)
    result = add_layer_norm(x, branch, None, weight, bias, EPS, torch.float32)[used]
    found = torch.autograd.grad(result, (x, branch, weight, bias), grads[used])
    assert_all_near(list(found), expected[2:], 1e-5)


def test_gradients_that_share_a_tensor_accumulate_apart() -> None:
    x, branch, weight, bias, _ = example((2, 3, 8))
    for _ in range(2):
        add_layer_norm(x, branch, None, weight, bias, EPS, torch.float32)[0].sum().backward()
    x.grad.zero_()
    assert torch.equal(branch.grad, torch.full_like(branch, 2.0))
    summed = add_layer_norm(x, x, None, weight, bias, EPS, torch.float32)[0]
    assert torch.equal(torch.autograd.grad(summed.sum(), x)[0], torch.full_like(x, 2.0))


def test_any_strides_and_nothing_is_changed() -> None:
    x, branch, weight, bias, grads = example((2, 5, 6, 12))
    maps = [tensor.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for tensor in (x, branch)]
    strided = [*maps, *(tensor.detach().repeat_interleave(2)[::2] for tensor in (weight, bias))]
    assert not any(tensor.is_contiguous() for tensor in strided)
    before = [tensor.clone() for tensor in strided]
    scale = torch.rand(4, device=DEVICE)[::2]
    spread = [grad[:, :1].expand_as(grad) for grad in grads]  # of stride 0, as a mean's gradient
    inputs = [tensor.requires_grad_() for tensor in strided]
    found = add_norm(*inputs[:2], scale, *inputs[2:], spread)
    assert all(map(torch.equal, strided, before))
    assert_all_near(found, add_twin(x, branch, scale, weight, bias, spread), 1e-5)
    assert_all_near(norm(inputs[0], *inputs[2:], spread[1]), twin(x, weight, bias, spread[1]), 1e-5)


def test_the_same_bits_every_time() -> None:
    x, branch, weight, bias, grads = example((3, 70, 100))
    scale = torch.rand(3, device=DEVICE)
    assert all(map(torch.equal, *(add_norm(x, branch, scale, weight, bias, grads) for _ in range(2))))


def test_operators_are_well_formed() -> None:
    """Schema, fake tensors, autograd registration and tracing with dynamic shapes."""
    x, branch, weight, bias, grads = example((2, 3, 8))
    scale = torch.tensor([0.0, 1.25], device=DEVICE)
    torch.library.opcheck(layer_norm, (x, weight, bias, EPS, torch.bfloat16))
    torch.library.opcheck(layer_norm, (x.mT.contiguous().mT, weight, bias, EPS, torch.float32))
    for scales, dtype in ((None, torch.float32), (scale, torch.bfloat16)):
        torch.library.opcheck(add_layer_norm, (x, branch, scales, weight, bias, EPS, dtype))
    x, weight, bias = (tensor.detach() for tensor in (x, weight, bias))
    for grad, scales, branch_dtype in ((None, None, None), (grads[0], scale, torch.float16)):
        arguments = (grads[1], grad, x, scales, weight, bias, EPS, torch.float32, branch_dtype)
        torch.library.opcheck(layer_norm_backward, arguments)


@pytest.mark.parametrize("scale", [None, torch.tensor([0.0, 1.25], device=DEVICE)])
def test_compiles_into_one_graph(scale) -> None:
    x, branch, weight, bias, grads = example((2, 3, 8))
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")
    found = add_norm(x, branch, scale, weight, bias, grads, function=compiled)
    assert all(map(torch.equal, found, add_norm(x, branch, scale, weight, bias, grads)))
    only = torch.autograd.grad(compiled(x, branch, scale, weight, bias, EPS, torch.float32)[1], x, grads[1])[0]
    assert_near(only, add_twin(x, branch, scale, weight, bias, [0 * grads[0], grads[1]])[2], 1e-5)


def test_what_does_not_fit_is_refused() -> None:
    x, branch, weight, bias, _ = example((2, 3, 8))
    scale = torch.ones(2, device=DEVICE)
    wide, none = (torch.ones(2, channels, device=DEVICE) for channels in (1025, 0))
    for wrong in ((x, weight[:7], bias), (x, weight, bias[:7]), (x[0, 0, 0], weight, bias)):
        with pytest.raises(ValueError, match="do not fit"):
            layer_norm(*wrong, EPS, torch.float32)
    for rows in (wide, none):
        with pytest.raises(ValueError, match="rows of 1 to 1024 channels"):
            layer_norm(rows, rows[0], rows[0], EPS, torch.float32)
    for wrong in ((x, branch[:1], scale), (x, branch, scale[:1]), (x, branch, scale[:, None]), (bias, bias, scale)):
        with pytest.raises(ValueError, match="do not fit"):
            add_layer_norm(*wrong, weight, bias, EPS, torch.float32)
    for position in range(5):
        inputs = [x, branch, scale, weight, bias]
        inputs[position] = inputs[position].double()
        with pytest.raises(TypeError, match="not torch.float64"):
            add_layer_norm(*inputs, EPS, torch.float32)
    with pytest.raises(TypeError, match="not torch.float64"):
        layer_norm(x, weight, bias, EPS, torch.float64)


@pytest.mark.gpu
def test_more_numbers_than_int32_counts() -> None:
    samples, channels = 2**18 + 1, 64
    last, branch, weight, bias, grads = example((1, 128, channels), torch.bfloat16)
    x, added, grad = (torch.zeros(samples, 128, channels, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    x[-1:], added[-1:], grad[-1:] = last.detach(), branch.detach(), grads[1]
    scale = torch.full((samples,), 1.5, device=DEVICE)
    summed, normed = add_layer_norm(x.requires_grad_(), added.requires_grad_(), scale, weight, bias, EPS, x.dtype)
    found = [summed, normed, *torch.autograd.grad(normed, (x, added, weight, bias), grad)]
    expected = add_norm(last, branch, scale[:1], weight, bias, [0 * grads[0], grads[1]])
    for one, other in zip(found, expected, strict=True):
        assert_near(one[-1:] if one.dim() == 3 else one, other, 2**-7)
