"""The kernel that upsamples, takes the argmax and counts, against float64 and against its twin."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from segformer import bilinear
from segformer.kernels.argmax import upsample_argmax, upsample_argmax_confusion
from segformer.metrics import confusion_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
SIZES = [  # classes, (h, w), (H, W)
    (19, (6, 8), (24, 32)),
    (1, (3, 2), (12, 8)),
    (2, (1, 1), (5, 7)),
    (150, (3, 4), (12, 16)),
    (256, (3, 3), (11, 13)),  # int16
    (7, (5, 9), (23, 31)),  # odd sides, two patches to a cell
    (9, (6, 7), (6, 7)),  # the size they have
    (5, (4, 3), (4, 14)),  # one axis only
    (6, (9, 11), (5, 4)),  # downwards
    (8, (7, 6), (8, 11)),  # less than doubled
    (3, (2, 3), (41, 9)),
    (17, (9, 9), (1, 1)),
]


def made(classes: int, low: tuple[int, int], batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, classes, *low, generator=generator).to(DEVICE)


def exact(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False)


def assert_wins(found: Tensor, logits: Tensor) -> None:
    """At each pixel the class found is the highest in float64, or below it by no more than float32 rounds.

    With M the largest logit: along either axis a difference rounds by M eps, its weight by as much, the sum by half of
    it, so a value by 5 M eps and two of them by 10.
    """
    values = exact(logits, (found.shape[1], found.shape[2]))
    behind = values.amax(dim=1) - values.gather(1, found.long()[:, None])[:, 0]
    bound = 10 * EPS * logits.abs().max()
    assert behind.max() <= bound
    top = values.topk(min(2, values.shape[1]), dim=1).values
    clear = (top[:, 0] - top[:, -1] > bound) | (values.shape[1] == 1)
    assert clear.double().mean() > 0.99  # so nearly all pixels are held to the very class
    assert torch.equal(found.long()[clear], values.argmax(dim=1)[clear])
    twin = bilinear.upsample_argmax(logits, found.shape[1], found.shape[2])
    assert found.dtype == twin.dtype and torch.equal(found[clear], twin[clear])


@pytest.mark.parametrize(("classes", "low", "high"), SIZES)
def test_the_class_is_that_of_exact_arithmetic_wherever_no_rounding_decides(classes, low, high) -> None:
    logits = made(classes, low)
    assert_wins(upsample_argmax(logits, *high), logits)


@pytest.mark.parametrize("seed", range(3))
def test_random_sizes(seed) -> None:
    draw = torch.Generator().manual_seed(seed)
    classes, h, w, height, width = (int(torch.randint(1, most, (), generator=draw)) for most in (40, 8, 8, 40, 40))
    logits = made(classes, (h, w), seed=seed)
    assert_wins(upsample_argmax(logits, height, width), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(dtype) -> None:
    """Logits of 8 bits often tie at their own size, and there the first class wins; nothing is rounded to 8 bits."""
    logits = made(19, (6, 5)).to(dtype)
    found = upsample_argmax(logits, 24, 20)
    assert torch.equal(found, upsample_argmax(logits.float(), 24, 20))
    values = exact(logits, (24, 20))  # weights of eighths and 8 to 11 bits: float32 rounds none of the products
    assert torch.equal(found.long(), values.argmax(dim=1))


def test_logits_of_any_strides_are_read_where_they_lie() -> None:
    logits = made(13, (5, 6))
    found = upsample_argmax(logits, 20, 24)
    last = logits.contiguous(memory_format=torch.channels_last)
    padded = torch.full((2, 20, 8, 9), 99.0, device=DEVICE)
    padded[:, 3:16, 1:6, 2:8] = logits
    flipped = logits.transpose(2, 3).contiguous().transpose(2, 3)
    for view in (last, padded[:, 3:16, 1:6, 2:8], flipped, logits[:1].expand(2, -1, -1, -1)):
        assert torch.equal(upsample_argmax(view, 20, 24)[0], found[0])
    assert torch.equal(upsample_argmax(last, 20, 24), found)


def test_where_logits_are_equal_the_first_class_wins() -> None:
    assert not upsample_argmax(torch.full((1, 20, 3, 3), 0.3, device=DEVICE), 13, 11).any()
    logits = made(20, (3, 4))
    twice = torch.cat([logits, logits, logits], dim=1)  # within a chunk of classes and beyond it
    assert torch.equal(upsample_argmax(twice, 12, 16), upsample_argmax(logits, 12, 16))
    assert not (upsample_argmax(logits.repeat_interleave(3, dim=1), 12, 16) % 3).any()


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
@pytest.mark.parametrize("size", [(4, 5), (16, 20)])
def test_classes_that_are_ruled_out_win_nowhere(size, value) -> None:
    logits = made(12, (4, 5))
    expected = upsample_argmax(logits[:, 4:], *size) + 4
    logits[:, :4] = value
    assert torch.equal(upsample_argmax(logits, *size), expected)
    logits[:, 1:3, :2] = torch.inf
    found = upsample_argmax(logits, *size)
    assert torch.equal(found, bilinear.upsample_argmax(logits, *size)) and (found[:, 0] == 1).all()
    logits[:] = value
    assert not upsample_argmax(logits, *size).any()


def test_a_class_that_wins_no_corner_still_wins_between_them() -> None:
    logits = torch.tensor([[10.0, 0], [0, 10], [6, 6]], device=DEVICE)[None, :, None]
    assert upsample_argmax(logits, 2, 20)[0].unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize(
    ("classes", "low", "high"), [(5, (4, 5), (17, 19)), (60, (2, 2), (9, 8)), (256, (1, 1), (4, 7))]
)
def test_the_confusion_is_that_of_the_label_map(classes, low, high, dtype) -> None:
    """60 and 256 classes of noise: more pairs in a program than it counts itself."""
    logits = made(classes, low)
    labels = torch.randint(0, min(classes + 3, 256), (2, *high)).to(DEVICE, dtype)
    labels[:, :2] = 255 if dtype == torch.uint8 else -1
    labels[0, 3] = torch.iinfo(dtype).max
    found, confusion = upsample_argmax_confusion(logits, labels, classes)
    assert torch.equal(found, upsample_argmax(logits, *high))
    truth = labels.long()  # 256 is no uint8
    counted = (truth >= 0) & (truth < classes)
    expected = confusion_matrix(found[counted].long(), truth[counted], classes)
    assert confusion.dtype == torch.int64 and torch.equal(confusion, expected)
    turned = labels.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(upsample_argmax_confusion(logits, turned, classes)[1], confusion)


def test_labels_that_are_all_ignored_count_nothing() -> None:
    labels = torch.full((2, 8, 8), 255, dtype=torch.uint8, device=DEVICE)
    assert not upsample_argmax_confusion(made(4, (2, 2)), labels, 4)[1].any()


def test_no_image_and_wrong_arguments() -> None:
    assert upsample_argmax(made(3, (2, 2), batch=0), 4, 4).shape == (0, 4, 4)
    with pytest.raises(TypeError, match=r"logits are torch.float64"):
        upsample_argmax(made(3, (2, 2)).double(), 4, 4)
    labels = torch.zeros(2, 4, 4, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match=r"labels \(2, 4, 4\) of 4 classes, expected \(B, 4, h, w\)"):
        upsample_argmax_confusion(made(3, (2, 2)), labels, 4)
    with pytest.raises(ValueError, match="expected"):
        upsample_argmax_confusion(made(3, (2, 2)), labels[:1], 3)


@pytest.mark.parametrize("gradient", [False, True])
def test_they_are_operators_that_compile(gradient) -> None:
    logits = made(5, (3, 2)).requires_grad_(gradient)
    labels = torch.randint(0, 5, (2, 12, 8)).to(DEVICE)
    torch.library.opcheck(torch.ops.segformer.upsample_argmax.default, (logits, 12, 8))
    torch.library.opcheck(torch.ops.segformer.upsample_argmax_confusion.default, (logits, labels, 5))
    assert not upsample_argmax(logits, 12, 8).requires_grad


def test_compiled_it_is_one_graph() -> None:
    logits = made(5, (3, 2))

    def shifted(maps: Tensor) -> Tensor:
        return upsample_argmax(maps * 2, 12, 8).long() + 1

    assert torch.equal(torch.compile(shifted, fullgraph=True, backend="aot_eager")(logits), shifted(logits))
