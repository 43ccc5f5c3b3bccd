import dataclasses
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, randomize
from torch.utils._python_dispatch import TorchDispatchMode

from segformer import bilinear, inference
from segformer.config import SegformerConfig
from segformer.errors import UserError
from segformer.inference import Protocol, graphed, score, segment
from segformer.model import SegformerForSemanticSegmentation
from segformer.pixels import normalize, resize


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


def test_one_number_bounds_the_shorter_side_alone() -> None:
    assert Protocol(size=40).sizes(70, 100)[0] == (40, 57)
    assert Protocol(size=40).sizes(70, 1000)[0] == (40, 571)  # a bound for the longer side would bend this
    assert Protocol(size=(400, 40)).sizes(70, 1000)[0] == (28, 400)
    assert Protocol(size=140).sizes(100, 70)[0] == (200, 140)  # enlarged, upright


def test_scales_multiply_the_size_before_it_is_aligned() -> None:
    scales = [0.75, 0.875, 1.0, 1.125, 1.25]  # published for ADE20K
    protocol = Protocol(size=(2048, 512), align=32, scales=scales)
    short = [protocol.sizes(480, 640, scale)[0] for scale in protocol.scales]
    assert short == [(384, 512), (448, 597), (512, 683), (576, 768), (640, 853)]
    assert [protocol.sizes(480, 640, scale)[1] for scale in scales[:2]] == [(384, 512), (448, 608)]
    assert protocol.sizes(100, 1000, 0.75)[0] == (154, 1536)  # the bound of the longer side is scaled, too
    assert Protocol().sizes(1024, 2048, 1.75) == [(1792, 3584), (1792, 3584)]
    assert Protocol(size=40).sizes(70, 100, 0.5)[0] == (20, 29)


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


def up(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def starts(length: int, window: int, stride: int) -> list[int]:
    return sorted({min(start, length - window) for start in range(0, length - window + stride, stride)})


def stitched(model, pixels: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """Logits averaged over windows, whole: at the pixels' size, or at a quarter of it."""
    size = tuple(pixels.shape[-2:])
    (height, width), unit = map(min, protocol.window, size), 4 if protocol.stitch == "quarter" else 1
    plane = [-(-side // unit) for side in size]
    total, count = torch.zeros((), dtype=pixels.dtype), torch.zeros(plane, dtype=pixels.dtype)
    for top in starts(size[0], height, protocol.stride[0]):
        for left in starts(size[1], width, protocol.stride[1]):
            logits = model(pixels[..., top : top + height, left : left + width]).logits
            if unit == 1:
                logits = up(logits, (height, width))
            a, b = top // unit, left // unit
            frame = (b, plane[1] - b - logits.shape[3], a, plane[0] - a - logits.shape[2])
            total, count = total + F.pad(logits, frame), count + F.pad(torch.ones_like(logits[0, 0]), frame)
    return total / count


def restated(model, images: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """The protocol to the letter, with full-size logits and softmax maps, in float64."""
    own, maps = tuple(images.shape[-2:]), []
    for scale in protocol.scales:
        resized = images
        for size in protocol.sizes(*own, scale):
            resized = resize(resized, *size)
        size = tuple(resized.shape[-2:])
        for flip in {False, protocol.flip}:
            pixels = normalize(resized.flip(-1) if flip else resized).double()
            covered = protocol.window is None or (protocol.window[0] >= size[0] and protocol.window[1] >= size[1])
            logits = model(pixels).logits if covered else stitched(model, pixels, protocol)
            logits = up(up(logits, size) if protocol.resize_logits == "twice" else logits, own)
            maps.append((logits.flip(-1) if flip else logits).softmax(dim=1))
    return torch.stack(maps).mean(dim=0).argmax(dim=1)


def network(classes: int) -> SegformerForSemanticSegmentation:
    model = SegformerForSemanticSegmentation(SegformerConfig(**TINY, num_labels=classes))
    randomize(model)
    return model.eval().double()


@pytest.mark.parametrize("bands", [1, 3, 100])
@pytest.mark.parametrize(
    "options",
    [
        {"scales": [0.5, 1.0, 1.25]},
        {"flip": True},
        {"scales": [0.75, 1.5], "flip": True, "size": 60},
        {"scales": [1.0, 1.75], "window": 64, "stride": 48},
        {"scales": [0.5, 1.25], "flip": True, "window": 64, "stride": 48},
        {"scales": [1.0, 1.5], "flip": True, "window": 64, "stride": 40, "stitch": "quarter", "align": 4},
        {"scales": [0.75, 1.25], "flip": True, "align": 32, "resize_logits": "twice"},
        {"window": [40, 200], "stride": 33},  # lower than the image, and wider
        {"window": [200, 33], "stride": [200, 29], "flip": True},
        {"window": 37, "stride": 11},  # up to sixteen windows over a place
        {"window": 64, "stride": 64, "size": 200},
        {"window": 64, "stride": 44, "stitch": "quarter", "align": 4},
        {"window": 64, "stride": 44, "stitch": "quarter", "align": 32, "resize_logits": "twice"},
        {"window": [64, 400], "stride": 60, "stitch": "quarter", "size": [400, 96], "align": 4},
        {"resize_logits": "twice", "size": 45},
        {"resize_logits": "twice", "size": [200, 120], "align": 32},
    ],
)
def test_label_maps_are_those_of_the_protocol_restated_with_full_size_maps(options, bands, images, monkeypatch) -> None:
    """In float64, where rounding decides no pixel; images of odd sizes, a batch of two."""
    images, model, protocol = images[..., :69, :97], network(7), Protocol(**options)
    monkeypatch.setattr(inference, "FEWEST_ROWS", 69 // bands + 1)
    monkeypatch.setitem(bilinear.BAND_NUMBERS, "cpu", 1)
    found, expected = segment(model, images, protocol), restated(model, images, protocol)
    assert torch.equal(found.long(), expected) and len(expected.unique()) >= 3


@pytest.mark.parametrize("classes", [2, 19, 150, 300])
def test_any_number_of_classes_is_stitched_and_averaged(classes, images) -> None:
    model = network(classes)
    for options in ({}, {"scales": [0.75, 1.0], "flip": True}):
        protocol = Protocol(window=64, stride=48, **options)
        found = segment(model, images, protocol)
        assert found.dtype == (torch.uint8 if classes <= 255 else torch.int16)
        assert torch.equal(found.long(), restated(model, images, protocol))


def test_one_scale_without_flip_compares_logits(tiny, images) -> None:
    for options in ({}, {"window": 64, "stride": 48}):
        assert Protocol(**options, scales=[1]) == Protocol(**options)
        assert torch.equal(segment(tiny, images, Protocol(**options, scales=1.0)),
                           segment(tiny, images, Protocol(**options)))  # fmt: skip


def test_with_flip_a_mirrored_image_has_the_mirrored_label_map(images) -> None:
    model, protocol = network(7), Protocol(window=64, stride=40, flip=True)
    mirrored = segment(model, images.flip(-1), protocol)
    assert torch.equal(mirrored.flip(-1), segment(model, images, protocol))
    assert not torch.equal(mirrored.flip(-1), segment(model, images, dataclasses.replace(protocol, flip=False)))


def test_quarter_stitching_differs_from_exact_only_within_two_pixels_of_a_windows_border() -> None:
    images, model = torch.randint(0, 256, (1, 3, 96, 160), dtype=torch.uint8), network(7)
    exact = segment(model, images, Protocol(window=64, stride=48))
    quarter = segment(model, images, Protocol(window=64, stride=48, stitch="quarter"))
    near = torch.zeros(96, 160, dtype=torch.bool)
    for edge in (32, 64):  # windows start at 0 and 32
        near[edge - 2 : edge + 2] = True
    for edge in (48, 64, 96, 112):  # at 0, 48 and 96
        near[:, edge - 2 : edge + 2] = True
    differs = exact != quarter
    assert differs.any() and not differs[0, ~near].any()


def test_stitching_at_a_quarter_keeps_one_window_and_windows_side_by_side_as_they_are(tiny) -> None:
    images = torch.randint(0, 256, (1, 3, 64, 128), dtype=torch.uint8)
    assert torch.equal(segment(tiny, images, Protocol(window=128, stitch="quarter")), segment(tiny, images))
    found = segment(tiny.double(), images, Protocol(window=64, stitch="quarter"))
    logits = torch.cat([tiny(normalize(half).double()).logits for half in images.chunk(2, dim=3)], dim=3)
    assert torch.equal(found.long(), naive(logits, (64, 128)))


def test_each_window_is_seen_once_and_one_after_the_other_on_a_cpu(tiny, images) -> None:
    seen = []
    tiny.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    segment(tiny, images, Protocol(window=64, stride=48, flip=True))
    assert seen == [(2, 3, 64, 64)] * 8


def test_windows_are_stitched_in_float32_under_autocast(tiny, images) -> None:
    protocol = Protocol(window=64, stride=48)
    with torch.autocast("cpu", torch.bfloat16):
        found = segment(tiny, images, protocol)
        halves = lambda pixels: SimpleNamespace(logits=tiny(pixels.float()).logits.double())  # noqa: E731
        with torch.no_grad():
            expected = restated(halves, images, protocol)
    assert agreement(found, expected) > 0.9999
    assert agreement(found, segment(tiny, images, protocol).long()) < 0.9999  # half precision was at work


class Ruled(torch.nn.Module):
    """A network that has been told that class 3 is impossible."""

    def __init__(self, model: torch.nn.Module, value: float) -> None:
        super().__init__()
        self.model, self.value = model, value

    def forward(self, pixels: torch.Tensor) -> SimpleNamespace:
        logits = self.model(pixels).logits
        logits[:, 3] = self.value
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
@pytest.mark.parametrize("more", [{}, {"stitch": "quarter", "align": 4}, {"scales": [0.75, 1], "flip": True}])
def test_a_class_that_is_ruled_out_wins_nowhere_and_changes_no_other(value, more, images) -> None:
    model, protocol = network(7), Protocol(window=40, stride=12, **more)
    found = segment(Ruled(model, value), images, protocol)
    assert torch.equal(found, segment(Ruled(model, -1e6), images, protocol)) and not (found == 3).any()


class Memory(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: Counter[int] = Counter()
        self.held = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.hold(storage.data_ptr(), storage.nbytes(), 1)
                weakref.finalize(tensor, self.hold, storage.data_ptr(), storage.nbytes(), -1)
        return found

    def hold(self, place: int, size: int, change: int) -> None:
        before = self.holders[place] > 0
        self.holders[place] += change
        self.held += size * ((self.holders[place] > 0) - before)
        self.peak = max(self.peak, self.held)


class Cheap(torch.nn.Module):
    """Logits of 150 classes from colours alone."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = torch.nn.Linear(3, 150)

    def forward(self, pixels: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.classes(pixels[..., ::4, ::4].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("options", "bytes_a_pixel"),
    [
        ({}, 8),  # the label map and how many windows cover a place; the image was there before
        ({"stitch": "quarter"}, 8),
        ({"flip": True}, 8),
        ({"resize_logits": "twice"}, 8),
        ({"size": 192}, 24),  # resizing an image takes some copies of its three channels, in float32
        ({"scales": [0.5, 1.5]}, 64),
    ],
)
def test_memory_does_not_grow_with_classes_times_pixels(options, bytes_a_pixel, monkeypatch) -> None:
    """Whole, the logits of 150 classes take 600 bytes a pixel, and 37 at a quarter of the size."""
    monkeypatch.setitem(bilinear.BAND_NUMBERS, "cpu", 1)
    model, peaks = Cheap(), []
    for height in (384, 1536):
        images = torch.zeros(1, 3, height, 256, dtype=torch.uint8)
        with Memory() as memory:
            segment(model, images, Protocol(window=128, stride=96, **options))
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] < bytes_a_pixel * (1536 - 384) * 256
    assert peaks[1] < 150 * 4 * 1536 * 256 / 4


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
        ({"align": True}, "protocol.align is True"),
        ({"size": b"ab"}, "protocol.size is b'ab'"),
        ({"size": 10**30}, "at most 1048576"),
        ({"scales": 10**400}, "expected a list of numbers above 0, at most 100"),
        ({"size": [1, 2, 3]}, "list of two"),
        ({"size": 0}, "protocol.size is 0"),
        ({"size": True}, "protocol.size is True"),
        ({"scales": []}, r"protocol.scales is \[\]"),
        ({"scales": "1.0"}, "protocol.scales is '1.0'"),
        ({"scales": [1.0, 0]}, "expected a list of numbers above 0, at most 100"),
        ({"scales": [1.0, True]}, "expected a list of numbers above 0, at most 100"),
        ({"scales": [float("nan")]}, "expected a list of numbers above 0, at most 100"),
        ({"scales": [float("inf")]}, "expected a list of numbers above 0, at most 100"),
        ({"flip": 1}, "protocol.flip is 1, expected true or false"),
        ({"stitch": "quater"}, r"'quater' \(did you mean 'quarter'\?\): choose from exact, quarter"),
        ({"resize_logits": 2}, "protocol.resize_logits is 2: choose from once, twice"),
        ({"stitch": "quarter", "window": 66}, "not all multiples of 4"),
        ({"stitch": "quarter", "window": 64, "stride": [48, 47]}, "take protocol.stitch=exact"),
    ],
)
def test_impossible_protocols_are_told(options, message) -> None:
    with pytest.raises(UserError, match=message):
        Protocol(**options)


def test_quarter_stitching_of_windows_between_the_places_of_logits_is_told(tiny, images) -> None:
    with pytest.raises(UserError, match=r"resized to 70 x 100 .* rows \[0, 6\] .* add protocol.align=4"):
        segment(tiny, images, Protocol(window=64, stride=48, stitch="quarter"))


def test_an_image_of_a_few_pixels_is_enlarged_over_whole_windows(tiny) -> None:
    image = torch.randint(0, 256, (1, 3, 2, 6), dtype=torch.uint8)
    protocol = Protocol(size=300, window=64, stride=48)
    model = tiny.double()
    assert (segment(model, image, protocol) == restated(model, image, protocol)).all()


def test_a_score_is_of_the_images_own_size(tiny) -> None:
    images, labels = torch.zeros(1, 3, 64, 96, dtype=torch.uint8), torch.zeros(1, 64, 96, dtype=torch.uint8)
    found, counts = score(tiny, images, labels, 7)
    assert torch.equal(found, segment(tiny, images)) and torch.equal(
        counts[0], torch.bincount(found.flatten(), minlength=7)
    )
    with pytest.raises(UserError, match="labels are 1 x 32 x 48, expected the images' own size, 1 x 64 x 96"):
        score(tiny, images, labels[:, ::2, ::2], 7)


def test_a_graph_needs_a_gpu(tiny) -> None:
    with pytest.raises(UserError, match="images are on cpu, but a CUDA graph needs them on a GPU: use segment"):
        graphed(tiny, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.gpu
def test_a_graph_does_what_segment_does(tiny) -> None:
    model, images = tiny.cuda(), [torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8).cuda() for _ in range(3)]
    for protocol in (Protocol(), Protocol(window=48, stride=32), Protocol(scales=[0.5, 1.0], flip=True)):
        replay = graphed(model, images[0], protocol)
        for one in images:  # kernels take small tensors in a graph alone, and round otherwise
            assert (replay(one) == segment(model, one, protocol)).double().mean() > 0.999
    with pytest.raises(UserError, match="images are 1 x 3 x 64 x 96, expected 2 x 3 x 64 x 96"):
        replay(images[0][:1])
