"""The network against transformers' own with random weights, through the files both read.

Outputs are compared in float32 at the published sizes, gradients and random architectures in float64.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from segformer.checkpoints import to_disk
from segformer.config import VARIANTS, SegformerConfig
from segformer.model import SegformerForImageClassification, SegformerForSemanticSegmentation, SegformerModel
from tests.conftest import TINY, randomize

transformers = pytest.importorskip("transformers")


def their_network(kind: str = "SegformerForSemanticSegmentation", **fields: Any) -> torch.nn.Module:
    return getattr(transformers, kind)(transformers.SegformerConfig(**fields)).eval()


def with_statistics(network: torch.nn.Module) -> torch.nn.Module:
    """Keeps initial weights, which let numbers of a real size through all layers, and makes the trivial ones random."""
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith(("bias", "running_mean")) or tensor.ndim == 1:
            tensor.add_(0.1 * torch.randn_like(tensor))
    return network


def both(folder: Path, **fields: Any) -> tuple[torch.nn.Module, SegformerForSemanticSegmentation]:
    """Their network with random weights, in float64 and eval mode, and ours read from the folder that it saved."""
    theirs = their_network(**fields)
    randomize(theirs)
    theirs.save_pretrained(folder)
    return theirs.double(), SegformerForSemanticSegmentation.from_pretrained(folder, dtype=torch.float64)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().max().item()


def same_loss(found: torch.Tensor, expected: torch.Tensor) -> None:
    exact = expected.dtype == torch.float64  # theirs of one class is rounded to float32
    torch.testing.assert_close(found, expected, rtol=1e-10 if exact else 1e-6, atol=0, check_dtype=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_sizes_give_transformers_logits_in_both_directions(variant: str, tmp_path: Path) -> None:
    pixels = torch.randn(1, 3, 160, 192)
    theirs = with_statistics(their_network(**VARIANTS[variant], num_labels=150))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "ours").eval()
    theirs.set_attn_implementation("eager")  # the only one of theirs that returns attentions
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected, found, plain, back = theirs(pixels, **asked), ours(pixels, **asked), ours(pixels), again(pixels)
    assert expected.logits.std() > 0.05
    assert difference(found.logits, expected.logits) <= 2e-5
    assert difference(plain.logits, expected.logits) <= 2e-5  # through the fused attention, a band of rows at a time
    assert difference(back.logits, plain.logits) <= 2e-5
    assert len(found.attentions) == len(expected.attentions) == sum(VARIANTS[variant]["depths"])
    for name in ("hidden_states", "attentions"):
        for ours_one, their_one in zip(found[name], expected[name], strict=True):
            assert ours_one.shape == their_one.shape and difference(ours_one, their_one) <= 2e-5


@pytest.mark.parametrize("fields", [TINY, VARIANTS["b0"]], ids=["tiny", "b0"])
@pytest.mark.parametrize("merged", [True, False])
def test_every_gradient_is_transformers(fields: dict[str, Any], merged: bool, tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, **fields, num_labels=7, drop_path_rate=0, classifier_dropout_prob=0)
    ours.decode_head.merged = merged
    pixels, labels = torch.randn(2, 3, 65, 100).double(), torch.randint(0, 7, (2, 65, 100))
    labels[0, :9] = 255
    for model in (theirs, ours):
        model.train()
        model(pixels, labels=labels).loss.backward()
        with torch.no_grad():  # gradients take the parameters' place, so that files carry them between the two namings
            for parameter in model.parameters():
                parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    expected, found = load_file(tmp_path / "gradients" / "model.safetensors"), to_disk(ours.state_dict())
    assert found.keys() == expected.keys()
    names = [name for name in expected if "running" not in name and "tracked" not in name]
    largest = max(expected[name].abs().max().item() for name in names)
    for name in names:
        size = expected[name].abs().max().item()
        if size < 1e-12 * largest:  # zero but for rounding: biases ahead of BatchNorm, biases of keys
            assert found[name].abs().max().item() < 1e-12 * largest, name
        else:
            assert difference(found[name], expected[name]) <= 1e-10 * size, name


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("side", [*range(29, 37), 45, 63, 65, 71, 97, 100, 111, 127, 129, 150, 161, 201])
def test_odd_sizes_give_transformers_outputs(side: int, merged: bool, tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, **TINY, num_labels=5)
    ours.decode_head.merged = merged
    pixels = torch.randn(1, 3, side, 230 - side).double()
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels).logits, theirs(pixels).logits, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("classes", [7, 2, 1])
@pytest.mark.parametrize("ignored", ["none", "some"])
def test_the_loss_is_transformers(classes: int, ignored: str, tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, **TINY, num_labels=classes)
    pixels, labels = torch.randn(2, 3, 65, 100).double(), torch.randint(0, max(classes, 2), (2, 65, 100))
    if ignored == "some":
        labels[:, :20] = 255
    expected, found = theirs(pixels, labels=labels), ours(pixels, labels=labels)
    same_loss(found.loss, expected.loss)


def test_where_everything_is_ignored_ours_is_zero_and_theirs_is_not_a_number(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, **TINY, num_labels=7)
    pixels, labels = torch.randn(1, 3, 64, 64).double(), torch.full((1, 64, 64), 255)
    assert theirs(pixels, labels=labels).loss.isnan() and ours(pixels, labels=labels).loss == 0
    theirs, ours = both(tmp_path, **TINY, num_labels=1)
    assert theirs(pixels, labels=labels).loss == ours(pixels, labels=labels).loss == 0


@pytest.mark.parametrize(
    ("classes", "problem_type", "labels"),
    [
        (5, None, torch.tensor([3, 0])),
        (1, None, torch.tensor([0.3, -2.0])),
        (5, None, torch.rand(2, 5)),
        (5, "multi_label_classification", torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 1, 1]])),
        (1, "regression", torch.tensor([1.5, 2.5])),
    ],
)
def test_image_classification_is_transformers(classes: int, problem_type: str | None, labels, tmp_path: Path) -> None:
    theirs = their_network("SegformerForImageClassification", **TINY, num_labels=classes, problem_type=problem_type)
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = SegformerForImageClassification.from_pretrained(tmp_path / "theirs")
    pixels = torch.randn(2, 3, 64, 96)
    expected, found = (model(pixels, labels=labels, output_hidden_states=True) for model in (theirs, ours))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-6)
    assert list(found.keys()) == list(expected.keys()) == ["loss", "logits", "hidden_states"]
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.SegformerForImageClassification.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(again(pixels).logits, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"])
def test_what_is_dropped_entirely_is_dropped_where_transformers_drops_it(field: str, tmp_path: Path) -> None:
    """With a probability of one, dropout is no longer random."""
    fields = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | {field: 1.0}
    theirs, ours = both(tmp_path, **TINY, num_labels=5, **fields)
    pixels = torch.randn(2, 3, 64, 96).double()
    untouched = ours(pixels).logits
    expected, found = (model.train()(pixels).logits for model in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found, untouched)


def test_without_the_last_reshape_an_image_classifier_is_the_same(tmp_path: Path) -> None:
    theirs = their_network("SegformerForImageClassification", **TINY, num_labels=5, reshape_last_stage=False)
    theirs.save_pretrained(tmp_path)
    pixels, ours = torch.randn(1, 3, 64, 96), SegformerForImageClassification.from_pretrained(tmp_path)
    expected, found = (model(pixels, output_hidden_states=True) for model in (theirs, ours))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert [state.shape for state in found.hidden_states] == [state.shape for state in expected.hidden_states]


def test_a_state_dict_of_transformers_in_memory_loads_directly(tmp_path: Path) -> None:
    theirs = their_network(**TINY, num_labels=5)
    randomize(theirs)
    pixels = torch.randn(1, 3, 64, 64)
    for kind, network in ((SegformerForSemanticSegmentation, theirs), (SegformerModel, theirs.segformer)):
        ours = kind(SegformerConfig(**TINY, num_labels=5)).eval()
        ours.load_state_dict(network.state_dict())
        torch.testing.assert_close(ours(pixels)[0], network(pixels)[0], rtol=1e-4, atol=1e-5)


def test_without_the_last_reshape_the_encoder_returns_tokens(tmp_path: Path) -> None:
    theirs = their_network("SegformerModel", **TINY, reshape_last_stage=False)
    theirs.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 64, 96)
    expected, found = (
        model(pixels, output_hidden_states=True) for model in (theirs, SegformerModel.from_pretrained(tmp_path))
    )
    assert found.last_hidden_state.shape == (1, 6, 32)
    for ours_map, their_map in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours_map, their_map, rtol=1e-4, atol=1e-5)


@st.composite
def architectures(draw: st.DrawFn) -> dict[str, Any]:
    """Configurations nobody has trained: stages, widths, heads, reductions, kernels, strides, ratios of all kinds."""
    stages = draw(st.integers(1, 4))

    def each(strategy: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(strategy, min_size=stages, max_size=stages))

    heads = each(st.integers(1, 3))
    return {
        "num_encoder_blocks": stages,
        "depths": each(st.integers(1, 2)),
        "num_attention_heads": heads,
        "hidden_sizes": [count * draw(st.sampled_from([4, 6, 8])) for count in heads],
        "sr_ratios": each(st.sampled_from([1, 2, 3])),
        "patch_sizes": each(st.sampled_from([3, 5, 7])),
        "strides": [draw(st.sampled_from([2, 3, 4])), *each(st.sampled_from([1, 2]))[1:]],
        "mlp_ratios": each(st.sampled_from([1, 2, 4])),
        "decoder_hidden_size": draw(st.integers(3, 12)),
        "num_channels": draw(st.sampled_from([1, 3, 4])),
        "num_labels": draw(st.integers(1, 9)),
        "hidden_act": draw(st.sampled_from(["gelu", "relu", "silu", "gelu_new"])),
    }


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=architectures(), height=st.integers(69, 90), width=st.integers(69, 90), merged=st.booleans())
def test_random_architectures_give_transformers_outputs(
    fields: dict[str, Any], height: int, width: int, merged: bool, tmp_path: Path
) -> None:
    theirs, ours = both(tmp_path, **fields)
    ours.decode_head.merged = merged
    pixels = torch.randn(1, fields["num_channels"], height, width).double()
    labels = torch.randint(0, max(2, fields["num_labels"]), (1, height, width))
    asked = {"labels": labels, "output_hidden_states": True}
    with torch.no_grad():
        expected, found = (model(pixels, **asked) for model in (theirs, ours))
        theirs.set_attn_implementation("eager")
        probabilities, ours_probabilities = (m(pixels, output_attentions=True).attentions for m in (theirs, ours))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-11)
    same_loss(found.loss, expected.loss)
    for ours_map, their_map in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours_map, their_map, rtol=1e-9, atol=1e-11)
    for ours_one, their_one in zip(ours_probabilities, probabilities, strict=True):
        torch.testing.assert_close(ours_one, their_one, rtol=0, atol=1e-6)  # their softmax rounds to float32
