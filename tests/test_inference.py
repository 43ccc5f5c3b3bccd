import pytest
import torch
import torch.nn.functional as F

from segformer import inference
from segformer.errors import UserError
from segformer.inference import Protocol, segment
from segformer.pixels import normalize


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 70, 100), dtype=torch.uint8)


def naive(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)


def agreement(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found.long() == expected).double().mean().item()


def test_whole_image_at_its_own_size(tiny, images) -> None:
    found = segment(tiny, images)
    assert agreement(found, naive(tiny(normalize(images)).logits, (70, 100))) > 0.9999
    assert len(found.unique()) >= 3  # there is something to agree on


def test_short_side_then_alignment_then_back_to_the_original_size(tiny, images) -> None:
    protocol = Protocol(size=(2048, 40), align=32)
    assert protocol.sizes(70, 100) == [(40, 57), (64, 64)]
    assert Protocol(size=(60, 60)).sizes(70, 100)[0] == (42, 60)  # limited by the long side
    seen = []
    tiny.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    assert segment(tiny, images, protocol).shape == (2, 70, 100)
    assert seen == [(2, 3, 64, 64)]


def test_large_images_of_a_batch_are_taken_one_by_one_on_a_cpu(tiny) -> None:
    images = torch.randint(0, 256, (2, 3, 512, 512), dtype=torch.uint8)
    seen = []
    tiny.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    found = segment(tiny, images)
    assert seen == [1, 1] and found.shape == (2, 512, 512)
    assert agreement(found, naive(tiny(normalize(images)).logits, (512, 512))) > 0.9999


def test_one_window_equals_the_whole_image(tiny, images) -> None:
    assert torch.equal(segment(tiny, images, Protocol(window=(70, 100))), segment(tiny, images))
    assert torch.equal(segment(tiny, images, Protocol(window=512, stride=384)), segment(tiny, images))


def test_overlapping_windows_average_logits_with_the_last_one_shifted_back(tiny, images) -> None:
    found = segment(tiny, images, Protocol(window=64, stride=48))
    pixels = normalize(images)
    total, count = torch.zeros(2, 7, 70, 100), torch.zeros(70, 100)
    for top in (0, 6):
        for left in (0, 36):
            view = pixels[..., top : top + 64, left : left + 64]
            logits = F.interpolate(tiny(view).logits, size=(64, 64), mode="bilinear", align_corners=False)
            total[..., top : top + 64, left : left + 64] += logits
            count[top : top + 64, left : left + 64] += 1
    assert agreement(found, (total / count).argmax(1)) > 0.9999


@pytest.mark.parametrize(("length", "expected"), [(2048, [0, 768, 1024]), (1024, [0]), (500, [0]), (1792, [0, 768])])
def test_window_offsets_of_the_published_cityscapes_protocol(length, expected) -> None:
    assert inference._offsets(length, 1024, 768) == expected


def test_the_model_keeps_its_mode_and_takes_no_gradient(tiny, images) -> None:
    tiny.train()
    labels = segment(tiny, images)
    assert tiny.training and not labels.requires_grad
    assert torch.equal(labels, segment(tiny.eval(), images))  # inference ran in eval mode both times


def test_parts_that_a_caller_keeps_in_eval_mode_stay_there(tiny, images) -> None:
    tiny.train()
    tiny.decode_head.batch_norm.eval()
    segment(tiny, images)
    assert tiny.training and tiny.decode_head.training and not tiny.decode_head.batch_norm.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "protocol.window is 0"),
        ({"window": "big"}, "protocol.window is 'big'"),
        ({"stride": 5}, "without a window"),
        ({"window": 64, "stride": 65}, "pixels would be missed"),
        ({"align": 0}, "protocol.align is 0"),
        ({"size": [1, 2, 3]}, "list of two"),
    ],
)
def test_impossible_protocols_are_told(options, message) -> None:
    with pytest.raises(UserError, match=message):
        Protocol(**options)
