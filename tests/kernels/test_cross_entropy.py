"""The fused loss against the banded one of plain PyTorch, and against the literal form in float64."""

import os

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
pytest.importorskip("triton")

from segformer.kernels import cross_entropy
from segformer.kernels.cross_entropy import upsample_cross_entropy
from segformer.losses import pixel_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# batch, classes, (h, w), (H, W): ratio 4, 1, odd, fractional, unlike on both axes, above 32, below 1; one row
SIZES = [
    (2, 2, (3, 5), (12, 20)),
    (1, 1, (2, 3), (5, 7)),
    (1, 19, (5, 9), (17, 33)),
    (1, 33, (5, 4), (13, 9)),
    (1, 150, (2, 3), (8, 12)),
    (1, 256, (2, 3), (5, 8)),
    (2, 3, (6, 6), (6, 6)),
    (1, 4, (1, 1), (9, 37)),
    (1, 5, (1, 2), (2, 70)),
    (1, 4, (11, 8), (5, 3)),
    (1, 3, (9, 37), (10, 80)),
]
OPTIONS = [("valid", False, 0.0), ("all", True, 0.0), ("valid", True, 0.1), ("all", False, 1.0)]


def batch(batch, classes, low, high, dtype=torch.float32, label_type=torch.int64):
    logits = (4 * torch.randn(batch, classes, *low)).to(DEVICE, dtype)
    labels = torch.randint(0, classes, (batch, *high), device=DEVICE)
    labels[torch.rand(labels.shape, device=DEVICE) < 0.3] = 255
    labels[0, : high[0] // 2] = 255  # whole rows of logits with nothing to learn
    return logits.requires_grad_(), labels.to(label_type)


def literal(logits, labels, ignore_index, denominator, weights, smoothing):
    upsampled = F.interpolate(logits.double(), size=labels.shape[1:], mode="bilinear", align_corners=False)
    weights = None if weights is None else weights.double()
    options = {"ignore_index": ignore_index, "weight": weights, "label_smoothing": smoothing}
    if denominator == "valid":
        return F.cross_entropy(upsampled, labels.long(), **options)
    return F.cross_entropy(upsampled, labels.long(), **options, reduction="sum") / labels.numel()


def assert_close(found, logits, *expected, bound=1e-5):
    """Values relative to themselves; gradients relative to the largest one."""
    gradient = torch.autograd.grad(3 * found, logits)[0]
    assert gradient.dtype == logits.dtype and gradient.stride() == logits.stride()
    for loss in expected:
        torch.testing.assert_close(found.double(), loss.double(), rtol=bound, atol=1e-7)
        right = torch.autograd.grad(3 * loss, logits)[0]
        torch.testing.assert_close(gradient, right, rtol=0, atol=bound * right.abs().max().item() + 1e-9)


@pytest.mark.parametrize(
    ("size", "options"),
    list(zip(SIZES, 3 * OPTIONS, strict=False)),  # they go round: each size has some, and some are left over
    ids=str,
)
def test_equals_the_twin_and_the_literal_form(size, options) -> None:
    torch.manual_seed(0)
    logits, labels = batch(*size)
    denominator, weighted, smoothing = options
    weights = torch.rand(size[1], device=DEVICE) + 0.1 if weighted else None
    arguments = (labels, 255, denominator, weights, smoothing)
    expected = [literal(logits, *arguments)]
    if size[1] > 1:  # the twin asks for two classes
        expected.append(pixel_cross_entropy(logits, *arguments))
    assert_close(upsample_cross_entropy(logits, *arguments), logits, *expected)


@pytest.mark.parametrize("seed", range(4))
def test_random_sizes(seed) -> None:
    torch.manual_seed(seed)
    high, low = torch.randint(1, 40, (2,)).tolist(), torch.randint(1, 9, (2,)).tolist()
    logits, labels = batch(1, int(torch.randint(2, 40, ())), low, high)
    labels[0, -1, -1] = 0  # one at least, lest the literal form divide by none
    arguments = (labels, 255, "valid", None, 0.05)
    assert_close(upsample_cross_entropy(logits, *arguments), logits, literal(logits, *arguments))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_half_types_are_rounded_once_at_the_end(dtype, bound) -> None:
    """The value is float32's; the gradient errs by a unit in the last place: the interpreter cuts off, GPUs round."""
    torch.manual_seed(0)
    logits, labels = batch(2, 19, (5, 6), (20, 24), dtype)
    single = logits.detach().float().requires_grad_()
    found = upsample_cross_entropy(logits, labels, 255, "valid", None, 0.0)
    expected = literal(single, labels, 255, "valid", None, 0.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    (found,), (expected,) = torch.autograd.grad(1024 * found, logits), torch.autograd.grad(1024 * expected, single)
    torch.testing.assert_close(found.float(), expected, rtol=bound, atol=1e-5)


def test_all_ignored_is_zero_with_a_zero_gradient() -> None:
    logits, labels = batch(1, 3, (3, 4), (9, 10))
    weights = torch.tensor([0.0, 1.0, 1.0], device=DEVICE)
    for label, factors in ((255, None), (0, weights)):  # or of no weight
        loss = upsample_cross_entropy(logits, torch.full_like(labels, label), 255, "valid", factors, 0.0)
        assert loss == 0 and not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("label_type", [torch.uint8, torch.int16])
def test_label_types_and_layouts(label_type) -> None:
    torch.manual_seed(0)
    logits, labels = batch(2, 5, (4, 3), (11, 10), label_type=label_type)
    ignored = 255 if label_type != torch.int16 else -100
    labels[labels == 255] = ignored
    expected = literal(logits, labels, ignored, "valid", None, 0.0)
    gradient = torch.autograd.grad(expected, logits)[0]
    padded = torch.zeros(2, 6, 5, 7, device=DEVICE)
    padded[:, :5, 1:, ::2][..., :3] = logits.detach()
    forms = [logits.detach().to(memory_format=torch.channels_last), padded[:, :5, 1:, ::2][..., :3]]
    across = labels.mT.contiguous().mT  # strides swapped
    for form in forms:
        form.requires_grad_()
        loss = upsample_cross_entropy(form, across, ignored, "valid", None, 0.0)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, form)[0], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("label", [3, -1, 2**32])
def test_a_label_that_is_no_class_reaches_the_loss(label) -> None:
    logits, labels = batch(1, 3, (3, 4), (9, 10))
    labels = labels.long()
    labels[0, 8, 9] = label
    loss = upsample_cross_entropy(logits, labels, 255, "valid", None, 0.0)
    gradient = torch.autograd.grad(loss, logits)[0]
    assert loss.isnan() and gradient.isnan().any()


def test_large_logits_stay_finite_and_results_repeat() -> None:
    torch.manual_seed(0)
    logits, labels = batch(1, 20, (3, 3), (10, 11))
    large = (logits.detach() * 1000).requires_grad_()
    runs = []
    for _ in range(2):
        loss = upsample_cross_entropy(large, labels, 255, "valid", None, 0.1)
        runs.append((loss, torch.autograd.grad(loss, large)[0]))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    assert runs[0][0].isfinite() and runs[0][1].isfinite().all()
    torch.testing.assert_close(runs[0][0].double(), literal(large, labels, 255, "valid", None, 0.1), rtol=1e-5, atol=0)


def test_the_operators_keep_torchs_rules() -> None:
    logits, labels = batch(1, 3, (1, 2), (3, 4))
    weights = torch.ones(3, device=DEVICE)
    torch.library.opcheck(cross_entropy._summed, (logits, labels, weights, 255, 0.1))
    with torch.no_grad():
        *_, spread = cross_entropy._summed(logits, labels, weights, 255, 0.1)
        one = torch.ones((), device=DEVICE)
        arguments = (one, logits.detach(), labels, weights, spread, 255, 0.1)
        torch.library.opcheck(cross_entropy._gradient, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_in_one_graph() -> None:
    logits, labels = batch(1, 3, (2, 3), (5, 6))
    compiled = torch.compile(upsample_cross_entropy, fullgraph=True, backend="aot_eager")
    arguments = (labels, 255, "valid", None, 0.0)
    assert_close(compiled(logits, *arguments), logits, upsample_cross_entropy(logits, *arguments), bound=1e-6)
