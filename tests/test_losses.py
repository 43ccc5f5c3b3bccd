"""The banded loss against interpolate + cross_entropy in float64."""

import pytest
import torch
import torch.nn.functional as F

from segformer import bilinear
from segformer.errors import UserError
from segformer.losses import binary_pixel_cross_entropy, pixel_cross_entropy


def literal(logits, labels, denominator):
    upsampled = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(upsampled, labels.long(), ignore_index=255, reduction="sum")
    return total / (labels.numel() if denominator == "all" else (labels != 255).sum())


@pytest.mark.parametrize("denominator", ["valid", "all"])
@pytest.mark.parametrize("label_type", [torch.uint8, torch.int64])
@pytest.mark.parametrize(
    ("classes", "low", "high"),
    [(2, (8, 8), (32, 32)), (19, (9, 17), (33, 65)), (150, (5, 7), (20, 28)), (3, (6, 6), (6, 6)), (4, (9, 8), (5, 3))],
)
def test_value_and_gradient_equal_the_literal_form(classes, low, high, label_type, denominator, monkeypatch) -> None:
    monkeypatch.setitem(bilinear.BAND_NUMBERS, "cpu", 4 * classes * high[1])  # several bands an image
    logits = torch.randn(2, classes, *low, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, classes, (2, *high)).to(label_type)
    labels[0, : high[0] // 2] = 255
    found, expected = pixel_cross_entropy(logits, labels, denominator=denominator), literal(logits, labels, denominator)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    (found_gradient,) = torch.autograd.grad(3 * found, logits)
    (expected_gradient,) = torch.autograd.grad(3 * expected, logits)
    torch.testing.assert_close(found_gradient, expected_gradient, rtol=1e-10, atol=1e-15)


def test_a_crop_of_pure_ignore_costs_nothing() -> None:
    logits = torch.randn(1, 5, 8, 8, requires_grad=True)
    loss = pixel_cross_entropy(logits, torch.full((1, 32, 32), 255))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.randn(2, 5, 8, 8)
    labels = torch.randint(0, 5, (2, 32, 32))
    half = logits.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = pixel_cross_entropy(half, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, literal(half.detach().float(), labels, "valid"), rtol=1e-6, atol=1e-6)


def test_a_loss_scale_reaches_half_precision_gradients_before_they_are_rounded() -> None:
    """A gradient divided by the pixel count first would vanish in float16."""
    logits = torch.randn(1, 9, 64, 64)
    labels = torch.randint(0, 9, (1, 512, 512))
    exact, half = logits.clone().requires_grad_(), logits.half().requires_grad_()
    (65536 * pixel_cross_entropy(exact, labels)).backward()
    (65536 * pixel_cross_entropy(half, labels)).backward()
    assert (half.grad.float() - exact.grad).abs().sum() < 0.01 * exact.grad.abs().sum()


def test_no_full_resolution_tensor_is_kept_for_backward() -> None:
    saved = []
    logits = torch.randn(2, 19, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        pixel_cross_entropy(logits, torch.randint(0, 19, (2, 128, 128)))
    assert sorted(saved) == [1, logits.numel()]  # and the number of pixels


@pytest.mark.parametrize("value", [5, 254, -100])
def test_a_label_that_is_no_class_is_told_on_a_cpu(value) -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[0, 3, 3] = value
    with pytest.raises(UserError, match=f"labels hold {value}, expected 0 to 4 or 255.*start at 1"):
        pixel_cross_entropy(torch.zeros(1, 5, 2, 2), labels)


@pytest.mark.parametrize("denominator", ["valid", "all"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weights", [None, [0.5, 0.0, 2.0, 1.5, 1.0]])
def test_class_weights_and_label_smoothing_are_torchs(weights, smoothing, denominator) -> None:
    logits = torch.randn(2, 5, 8, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (2, 30, 35))
    labels[:, :7] = 255
    upsampled = F.interpolate(logits, size=(30, 35), mode="bilinear", align_corners=False)
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    options = {"weight": weight, "ignore_index": 255, "label_smoothing": smoothing}
    expected = F.cross_entropy(upsampled, labels, **options)
    if denominator == "all":
        expected = F.cross_entropy(upsampled, labels, reduction="sum", **options) / labels.numel()
    found = pixel_cross_entropy(
        logits, labels, denominator=denominator, class_weights=weights, label_smoothing=smoothing
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (found_gradient,), (expected_gradient,) = (torch.autograd.grad(loss, logits) for loss in (found, expected))
    torch.testing.assert_close(found_gradient, expected_gradient, rtol=1e-9, atol=1e-15)


def test_weighted_pixels_of_no_weight_cost_nothing() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = pixel_cross_entropy(logits, torch.zeros(1, 8, 8, dtype=torch.long), class_weights=[0.0, 1.0])
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_one_class_is_scored_against_zero_and_one_over_all_pixels() -> None:
    logits = torch.randn(2, 1, 8, 8, requires_grad=True)
    labels = torch.randint(0, 2, (2, 32, 32))
    labels[0, :10] = 255
    loss = binary_pixel_cross_entropy(logits, labels)
    loss.backward()
    x = F.interpolate(logits.detach(), size=(32, 32), mode="bilinear", align_corners=False)[:, 0]
    by_hand = torch.where(labels == 1, torch.log1p(torch.exp(-x)), torch.log1p(torch.exp(x)))
    assert loss.item() == pytest.approx(by_hand[labels != 255].sum().item() / labels.numel(), rel=1e-5)
    with pytest.raises(UserError, match="labels hold 7, expected 0, 1 or 255 for a model of one class"):
        binary_pixel_cross_entropy(logits, labels.masked_fill(labels == 1, 7))


@pytest.mark.parametrize(
    ("shape", "labels", "options", "message"),
    [
        ((1, 1, 8, 8), (1, 32, 32), {}, "logits have 1 class"),
        ((2, 3, 8, 8), (1, 32, 32), {}, "expected \\(batch 2, height, width\\)"),
        ((1, 3, 8, 8), (1, 32, 32), {"denominator": "some"}, "expected 'valid' or 'all'"),
        ((1, 3, 8, 8), (1, 32, 32), {"class_weights": [1, 2]}, "class_weights are .1, 2., expected 3 factors"),
        ((1, 3, 8, 8), (1, 32, 32), {"class_weights": [1, 2, -1]}, "expected 3 factors of at least 0"),
        ((1, 3, 8, 8), (1, 32, 32), {"class_weights": torch.tensor([1.0, 2, -1])}, "expected 3 factors of at least 0"),
        ((1, 3, 8, 8), (1, 32, 32), {"class_weights": torch.ones(4)}, "expected 3 factors"),
        ((1, 3, 8, 8), (1, 32, 32), {"label_smoothing": 1.5}, "label_smoothing is 1.5, expected 0 to 1"),
    ],
)
def test_wrong_arguments_are_told(shape, labels, options, message) -> None:
    with pytest.raises(UserError, match=message):
        pixel_cross_entropy(torch.zeros(shape), torch.zeros(labels, dtype=torch.long), **options)
