"""The whole network, its loss and its scores with the kernels in their places, against the same without them."""

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from segformer import kernels
from segformer.config import SegformerConfig
from segformer.inference import Protocol, score, segment
from segformer.losses import segmentation_loss
from segformer.model import DropPath, SegformerForSemanticSegmentation
from segformer.pixels import normalize
from tests.conftest import randomize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEARNING = ("depthwise_gelu", "upsample_cross_entropy", "upsample_sum", "layer_norm", "add_layer_norm")


@pytest.fixture(autouse=True)
def _back_on() -> Iterator[None]:
    yield
    kernels.enable(True)
    kernels._proved.cache_clear()


@pytest.fixture
def street() -> tuple[nn.Module, Tensor, Tensor]:
    """Network, uint8 images of odd sides, labels; as small as it gets, for Triton's interpreter."""
    sizes = {"hidden_sizes": [4, 8], "num_attention_heads": [1, 2], "decoder_hidden_size": 12, "mlp_ratios": [4, 4]}
    grids = {"patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1], "num_encoder_blocks": 2, "depths": [1, 1]}
    model = SegformerForSemanticSegmentation(SegformerConfig(**sizes, **grids, num_labels=7)).eval()
    randomize(model)
    images = torch.randint(256, (2, 3, 29, 37), dtype=torch.uint8)
    labels = torch.randint(7, (2, 29, 37), dtype=torch.uint8)
    labels[:, :9] = 255
    images = images.to(DEVICE)
    assert kernels._works(images.get_device())  # tried out now, not where operations are watched
    return model.to(DEVICE), images, labels.to(DEVICE)


def operations(run) -> set[str]:
    """The kernels that a call came by."""
    with torch.profiler.profile() as profile:
        run()
    return {event.key.partition("::")[2] for event in profile.key_averages() if event.key.startswith("segformer::")}


def learnt(model: nn.Module, images: Tensor, labels: Tensor, **options) -> list[Tensor]:
    """The loss and the gradient of each parameter."""
    loss = segmentation_loss(model(normalize(images)).logits, labels, **options)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss, *torch.autograd.grad(loss, parameters, allow_unused=True)]


def assert_same(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    largest = max(each.abs().max().item() for each in expected if each is not None)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).abs().max() <= bound * max(other.abs().max().item(), 1e-2 * largest)


def test_a_network_learns_the_same_with_kernels_and_without(street) -> None:
    model, images, labels = street
    options = {"denominator": "all", "label_smoothing": 0.1, "dice_weight": 0.5}
    for part in model.modules():  # dropout draws other numbers
        part.training = isinstance(part, nn.BatchNorm2d)
    found = learnt(model, images, labels, **options)
    used = operations(lambda: learnt(model, images, labels, **options))
    assert used == {f"{name}{way}" for name in LEARNING for way in ("", "_backward")} - {"add_layer_norm_backward"}
    kernels.enable(False)
    assert not operations(lambda: learnt(model, images, labels, **options))
    assert_same(found, learnt(model, images, labels, **options), 1e-4)


def test_label_maps_and_scores_are_the_same_with_kernels_and_without(street) -> None:
    model, images, labels = street
    found, counts = score(model, images, labels, 7)
    assert torch.equal(found, segment(model, images))
    used = {"depthwise_gelu", "upsample_sum", "layer_norm", "add_layer_norm"}
    assert operations(lambda: score(model, images, labels, 7)) == used | {"upsample_argmax_confusion"}
    assert operations(lambda: segment(model, images)) == used | {"upsample_argmax"}
    windows = Protocol(window=29, stride=8)
    slid = score(model, images, labels, 7, windows)
    kernels.enable(False)
    expected, numbers = score(model, images, labels, 7)
    assert (found == expected).double().mean() > 0.999
    assert counts.sum() == (labels != 255).sum() == numbers.sum()
    assert (counts - numbers).abs().sum() <= 2 * (found != expected).sum()
    for one, other in zip(slid, score(model, images, labels, 7, windows), strict=True):
        assert (one != other).double().mean() < 1e-2


def test_whether_kernels_work_is_found_out_wherever_it_is_asked(street) -> None:
    model, images, _ = street
    for mode in (
        torch.autocast(DEVICE, torch.bfloat16),
        FakeTensorMode(),
        torch.inference_mode(),
        torch.device("meta"),
    ):
        kernels._proved.cache_clear()
        with warnings.catch_warnings(action="error", category=UserWarning), mode:
            assert kernels._works(images.get_device())
    kernels._proved.cache_clear()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert "depthwise_gelu" in operations(lambda: compiled(normalize(images))) and kernels._proved.cache_info().hits


def test_where_kernels_do_not_work_it_is_told_once_and_the_twins_do(street, monkeypatch) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("no C compiler\nfound")

    model, images, _ = street
    expected = model(normalize(images)).logits
    monkeypatch.setattr(kernels, "_try_out", broken)
    kernels._proved.cache_clear()
    with pytest.warns(
        UserWarning, match="GPU kernels are off, PyTorch's own .* take their place: no C compiler$"
    ) as told:
        assert not operations(lambda: model(normalize(images)))
    kernels._proved.cache_clear()
    assert len(told) == 1
    assert (model(normalize(images)).logits - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize(
    "other", [{"padding": 2, "dilation": 2}, {"padding": 1, "padding_mode": "reflect"}, {"padding": 1, "bias": False}]
)
def test_another_convolution_in_its_place_is_called(street, other) -> None:
    model, images, _ = street
    for block in (stage.blocks[0] for stage in model.segformer.stages):
        width = block.mlp.dwconv.in_channels
        block.mlp.dwconv = nn.Conv2d(width, width, 3, groups=width, **other).to(DEVICE)
    found = model(normalize(images)).logits
    assert "depthwise_gelu" not in operations(lambda: model(normalize(images)))
    kernels.enable(False)
    torch.testing.assert_close(found, model(normalize(images)).logits, rtol=1e-4, atol=1e-4)


def test_a_forward_put_into_a_module_is_called(street) -> None:
    model, images, _ = street
    block, seen = model.segformer.stages[0].blocks[0], []
    for part in (block.layernorm_after, block.mlp.dwconv):
        part.forward = lambda x, own=part.forward: seen.append(1) or own(x)
    model(normalize(images))
    assert len(seen) == 2


def test_autocast_keeps_its_types(street) -> None:
    model, images, labels = street
    with torch.autocast(DEVICE, torch.bfloat16):
        found = model(normalize(images), labels=labels)
        kernels.enable(False)
        expected = model(normalize(images), labels=labels)
    assert found.logits.dtype == expected.logits.dtype == torch.bfloat16
    assert found.loss.dtype == expected.loss.dtype == torch.float32
    assert (found.logits - expected.logits).abs().max() < 0.1 * expected.logits.std()


def test_paths_are_dropped_alike(street) -> None:
    model, images, labels = street
    for part in model.modules():
        part.training = isinstance(part, nn.BatchNorm2d | DropPath)
        if isinstance(part, DropPath):
            part.rate = 0.5
    torch.manual_seed(3)
    found = learnt(model, images, labels)
    kernels.enable(False)
    torch.manual_seed(3)
    expected = learnt(model, images, labels)
    assert_same(found, expected, 1e-4)
    assert not torch.isclose(learnt(model, images, labels)[0], expected[0], rtol=1e-4)  # others were dropped


def test_a_double_network_goes_without(street) -> None:
    model, images, _ = street
    assert not operations(lambda: model.double()(normalize(images).double()))


def test_what_is_watched_is_called(street) -> None:
    model, images, _ = street
    seen = []
    for name, part in model.named_modules():
        if not list(part.children()):
            part.register_forward_hook(lambda *_, name=name: seen.append(name))
    assert operations(lambda: model(normalize(images))) == {"layer_norm"}  # which stands inside its module
    assert set(seen) == {name for name, part in model.named_modules() if not list(part.children())}


def test_the_network_compiles_to_one_graph_with_kernels_in_it(street) -> None:
    model, images, labels = street
    torch.compiler.reset()
    expected = learnt(model, images, labels)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    assert_same(learnt(compiled, images, labels), expected, 1e-3)
    assert operations(lambda: compiled(normalize(images))) == {"depthwise_gelu", "upsample_sum"}
    kernels.enable(False)
    assert_same(learnt(compiled, images, labels), expected, 1e-3)
    assert not operations(lambda: compiled(normalize(images)))
