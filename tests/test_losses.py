"""The banded losses against interpolate + a loss of whole pixels in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from segformer import bilinear
from segformer.errors import UserError
from segformer.losses import binary_pixel_cross_entropy, dice_loss, pixel_cross_entropy, segmentation_loss

OHEM_AND_DICE = {"ohem_threshold": 0.3, "ohem_min_kept": 100, "dice_weight": 0.5}


def literal(logits, labels, denominator):
    upsampled = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(upsampled, labels.long(), ignore_index=255, reduction="sum")
    return total / (labels.numel() if denominator == "all" else (labels != 255).sum())


def upsample(logits, labels):
    return F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)


def hard_labels(upsampled, labels, threshold, min_kept):
    """The labels, all but the hard pixels ignored: found by sorting the true class's probabilities."""
    valid = labels != 255
    probability = upsampled.softmax(dim=1).gather(1, labels.masked_fill(~valid, 0)[:, None])[:, 0]
    hard = probability < threshold
    if min_kept:
        hardest = probability[valid].sort().values[:min_kept]
        hard |= probability <= hardest[-1]
    return labels.masked_fill(~hard, 255)


def literal_dice(upsampled, labels, smooth):
    scored, terms = (labels != 255).double(), []
    for number, probability in enumerate(upsampled.softmax(dim=1).unbind(1)):
        true = (labels == number).double()
        if true.any():
            both, either = (probability * true).sum(), (probability * scored).sum() + true.sum()
            terms.append(1 - (2 * both + smooth) / (either + smooth))
    return sum(terms) / len(terms)


def assert_equal_with_gradient(found, expected, logits):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    (found_gradient,), (expected_gradient,) = (torch.autograd.grad(3 * loss, logits) for loss in (found, expected))
    torch.testing.assert_close(found_gradient, expected_gradient, rtol=1e-8, atol=1e-14)


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


@pytest.mark.parametrize("options", [{}, OHEM_AND_DICE, {"ohem_threshold": 0.7, "ohem_min_kept": 0}])
@pytest.mark.parametrize("denominator", ["valid", "all"])
def test_a_crop_of_pure_ignore_costs_nothing(denominator, options) -> None:
    logits = torch.randn(1, 5, 8, 8, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 32, 32), 255), denominator=denominator, **options)
    loss.backward()
    assert loss.item() == 0 and logits.grad.eq(0).all()


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.randn(2, 5, 8, 8)
    labels = torch.randint(0, 5, (2, 32, 32))
    half = logits.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = pixel_cross_entropy(half, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, literal(half.detach().float(), labels, "valid"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [pixel_cross_entropy, dice_loss])
def test_a_loss_scale_reaches_half_precision_gradients_before_they_are_rounded(loss) -> None:
    """A gradient divided by the pixel count first would vanish in float16."""
    logits = torch.randn(1, 9, 64, 64)
    labels = torch.randint(0, 9, (1, 512, 512))
    exact, half = logits.clone().requires_grad_(), logits.half().requires_grad_()
    (65536 * loss(exact, labels)).backward()
    (65536 * loss(half, labels)).backward()
    assert (half.grad.float() - exact.grad).abs().sum() < 0.01 * exact.grad.abs().sum()


@pytest.mark.parametrize(
    ("options", "times"), [({}, 1), ({"ohem_threshold": 0.7, "ohem_min_kept": 100}, 1), (OHEM_AND_DICE, 2)]
)
def test_no_full_resolution_tensor_is_kept_for_backward(options, times) -> None:
    saved = []
    logits = torch.randn(2, 19, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        segmentation_loss(logits, torch.randint(0, 19, (2, 128, 128)), **options)
    assert sorted(saved) == [1] * times + [logits.numel()] * times  # the gradient and its largest value


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


@pytest.mark.parametrize("denominator", ["valid", "all"])
@pytest.mark.parametrize(
    ("weights", "smoothing"), [(None, 0.0), ([0.5, 0.0, 2.0, 1.5, 1.0], 0.0), ([0.5, 3.0, 2.0, 1.5, 1.0], 0.1)]
)
@pytest.mark.parametrize(
    ("threshold", "min_kept"), [(0.7, 0), (0.05, 0), (0.05, 700), (0.3, 50), (1.0, 0), (1e-9, 1), (1e-9, 10**6)]
)
def test_only_hard_pixels_are_scored(threshold, min_kept, weights, smoothing, denominator, monkeypatch) -> None:
    monkeypatch.setitem(bilinear.BAND_NUMBERS, "cpu", 4 * 5 * 35)  # several bands an image
    logits = (2 * torch.randn(2, 5, 8, 9, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 5, (2, 30, 35))
    labels[:, :7] = 255
    full = upsample(logits, labels)
    kept = hard_labels(full, labels, threshold, min_kept)
    count = (kept != 255).sum().item()
    assert count >= min(min_kept, 2 * 23 * 35) and (count == 2 * 23 * 35 or threshold < 1)
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    options = {"weight": weight, "ignore_index": 255, "label_smoothing": smoothing}
    expected = F.cross_entropy(full, kept, **options)
    if denominator == "all":
        expected = F.cross_entropy(full, kept, reduction="sum", **options) / labels.numel()
    found = pixel_cross_entropy(logits, labels.byte(), 255, denominator, weights, smoothing, threshold, min_kept)
    assert_equal_with_gradient(found, expected, logits)


@pytest.mark.parametrize("denominator", ["valid", "all"])
def test_a_batch_without_hard_pixels_costs_nothing(denominator) -> None:
    labels = torch.randint(0, 5, (1, 8, 8))
    logits = (9.0 * F.one_hot(labels, 5).permute(0, 3, 1, 2)).requires_grad_()
    loss = pixel_cross_entropy(logits, labels, denominator=denominator, ohem_threshold=0.7, ohem_min_kept=0)
    loss.backward()
    assert loss.item() == 0 and logits.grad.eq(0).all()


def test_pixels_as_hard_as_the_last_that_must_be_kept_are_kept_too() -> None:
    labels = torch.randint(0, 5, (2, 8, 8), dtype=torch.uint8)
    options = {"ignore_index": 300, "denominator": "all", "ohem_threshold": 0.1}  # 300 does not fit uint8
    found = [pixel_cross_entropy(torch.zeros(2, 5, 2, 2), labels, **options, ohem_min_kept=n).item() for n in (0, 1)]
    assert found == [0, pytest.approx(math.log(5), rel=1e-6)]


@pytest.mark.parametrize(
    "options", [{"ohem_threshold": 0.7, "ohem_min_kept": 0}, {"ohem_threshold": 0.7, "ohem_min_kept": 9}, OHEM_AND_DICE]
)
def test_a_logit_that_is_no_number_is_never_mined_away(options) -> None:
    logits = torch.randn(1, 5, 8, 8)
    logits[0, 2, 3, 3] = torch.nan
    assert segmentation_loss(logits, torch.randint(0, 5, (1, 32, 32)), **options).isnan()


@pytest.mark.parametrize("smooth", [0.0, 1.0, 100.0])
@pytest.mark.parametrize(
    ("classes", "low", "high"),
    [(2, (8, 8), (32, 32)), (19, (9, 17), (33, 65)), (3, (6, 6), (6, 6)), (4, (9, 8), (5, 3))],
)
def test_dice_is_the_mean_over_the_classes_that_are_there(classes, low, high, smooth, monkeypatch) -> None:
    monkeypatch.setitem(bilinear.BAND_NUMBERS, "cpu", 4 * classes * high[1])
    logits = torch.randn(2, classes, *low, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, classes, (2, *high))
    labels[labels == 1] = 0  # an absent class
    labels[0, : high[0] // 2] = 255
    expected = literal_dice(upsample(logits, labels), labels, smooth)
    assert_equal_with_gradient(dice_loss(logits, labels.byte(), smooth=smooth), expected, logits)


def test_dice_of_an_undecided_network_by_hand() -> None:
    """p is 1/2 everywhere: class 0 has (2 * 1.5 + 1) / (2 + 3 + 1), class 1 has (2 * 0.5 + 1) / (2 + 1 + 1)."""
    labels = torch.tensor([[[0, 0], [0, 1]]])
    assert dice_loss(torch.zeros(1, 2, 2, 2), labels).item() == pytest.approx(1 - (4 / 6 + 2 / 4) / 2)
    sure = 50.0 * F.one_hot(labels, 2).permute(0, 3, 1, 2)
    assert dice_loss(sure, labels).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_of_a_segmentation_is_cross_entropy_plus_weighted_dice() -> None:
    logits = torch.randn(2, 5, 8, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (2, 30, 35))
    labels[:, :7] = 255
    full = upsample(logits, labels)
    expected = F.cross_entropy(full, hard_labels(full, labels, 0.3, 100), ignore_index=255)
    expected = expected + 0.5 * literal_dice(full, labels, 1)
    assert_equal_with_gradient(segmentation_loss(logits, labels, **OHEM_AND_DICE), expected, logits)
    assert torch.equal(segmentation_loss(logits, labels), pixel_cross_entropy(logits, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hard_pixels_and_dice_of_half_precision_logits_are_found_in_float32(dtype) -> None:
    half = torch.randn(2, 5, 8, 8).to(dtype).requires_grad_()
    exact = half.detach().double().requires_grad_()
    labels = torch.randint(0, 5, (2, 32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        loss = segmentation_loss(half, labels, **OHEM_AND_DICE)
    expected = segmentation_loss(exact, labels, **OHEM_AND_DICE)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    difference = (half.grad - exact.grad).abs().max() / exact.grad.abs().max()
    assert half.grad.dtype == dtype and difference < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("options", [{}, {**OHEM_AND_DICE, "class_weights": torch.arange(5.0), "label_smoothing": 0.1}])
def test_the_loss_compiles_to_one_graph(options) -> None:
    logits, labels = torch.randn(2, 5, 8, 9, requires_grad=True), torch.randint(0, 5, (2, 32, 36))
    torch.compiler.reset()
    compiled = torch.compile(segmentation_loss, fullgraph=True, backend="aot_eager")
    found, expected = compiled(logits, labels, **options), segmentation_loss(logits, labels, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))


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
        ((1, 3, 8, 8), (1, 32, 32), {"ohem_threshold": 0}, "ohem_threshold is 0, expected .*null keeps every pixel"),
        ((1, 3, 8, 8), (1, 32, 32), {"ohem_threshold": 1.1}, "ohem_threshold is 1.1, expected a probability"),
        ((1, 3, 8, 8), (1, 32, 32), {"ohem_min_kept": -1}, "ohem_min_kept is -1, expected a whole number of pixels"),
        ((1, 3, 8, 8), (1, 32, 32), {"ohem_min_kept": 1e5}, "ohem_min_kept is 100000.0, expected a whole number"),
        ((1, 3, 8, 8), (1, 32, 32), {"dice_weight": -0.5}, "dice_weight is -0.5, expected .*0 trains without Dice"),
    ],
)
def test_wrong_arguments_are_told(shape, labels, options, message) -> None:
    with pytest.raises(UserError, match=message):
        segmentation_loss(torch.zeros(shape), torch.zeros(labels, dtype=torch.long), **options)


@pytest.mark.parametrize(
    ("shape", "value", "smooth", "message"),
    [
        ((1, 1, 8, 8), 0, 1, "logits have 1 class"),
        ((2, 3, 8, 8), 0, 1, "expected \\(batch 2, height, width\\)"),
        ((1, 3, 8, 8), 3, 1, "labels hold 3, expected 0 to 2 or 255"),
        ((1, 3, 8, 8), 0, -1, "smooth is -1, expected a number of pixels of at least 0"),
    ],
)
def test_wrong_arguments_of_dice_are_told(shape, value, smooth, message) -> None:
    with pytest.raises(UserError, match=message):
        dice_loss(torch.zeros(shape), torch.full((1, 32, 32), value), smooth=smooth)


def test_bytes_are_compared_with_numbers_that_no_byte_holds() -> None:
    """A byte would take -100 for 156, 256 for 0 and 300 for 44."""
    labels = torch.tensor([[[156, 3], [44, 255]]], dtype=torch.uint8)
    for classes, ignore in ((200, -100), (256, 255), (300, -1)):
        logits = torch.randn(1, classes, 2, 2)
        if classes == 200:
            with pytest.raises(UserError, match="labels hold 255, expected 0 to 199 or -100"):
                pixel_cross_entropy(logits, labels, ignore)
            labels[labels == 255] = 199
        expected = torch.nn.functional.cross_entropy(logits, labels.long(), ignore_index=ignore)
        torch.testing.assert_close(pixel_cross_entropy(logits, labels, ignore), expected)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore", [255, 0, -100, 256, -256, 2**32])
@pytest.mark.parametrize("classes", [2, 127, 256])
def test_labels_of_any_integer_type_are_what_they_say(kind, ignore, classes) -> None:
    labels, logits = torch.tensor([[[0, 1], [1, 0]]]), torch.randn(1, classes, 2, 2)
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=ignore)
    torch.testing.assert_close(pixel_cross_entropy(logits, labels.to(kind), ignore), expected)
    single = torch.randn(1, 1, 2, 2)
    found = binary_pixel_cross_entropy(single, labels.to(kind), ignore)
    torch.testing.assert_close(found, binary_pixel_cross_entropy(single, labels.float(), ignore))
