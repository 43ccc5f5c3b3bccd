"""The network against transformers' own, through the files both read."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from segformer.checkpoints import to_disk
from segformer.config import VARIANTS, SegformerConfig
from segformer.errors import UserError
from segformer.model import DropPath, SegformerForSemanticSegmentation, SegformerModel
from tests.conftest import TINY

# encoder, total with 150 and with 19 classes, tensors on disk: counted from the published architectures
SIZES = {
    "b0": (3_319_392, 3_752_694, 3_719_027, 208),
    "b1": (13_151_424, 13_715_798, 13_682_131, 208),
    "b2": (24_196_288, 27_461_974, 27_361_235, 380),
    "b3": (44_072_128, 47_337_814, 47_237_075, 644),
    "b4": (60_842_688, 64_108_374, 64_007_635, 930),
    "b5": (81_443_008, 84_708_694, 84_607_955, 1172),
}


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_counts_are_the_published_ones(variant: str) -> None:
    encoder, ade, cityscapes, tensors = SIZES[variant]
    with torch.device("meta"):
        models = [
            SegformerForSemanticSegmentation(SegformerConfig.from_variant(variant, num_labels=k)) for k in (150, 19)
        ]
    assert parameters(models[0].segformer) == encoder
    assert [parameters(model) for model in models] == [ade, cityscapes]
    split = sum(2 if ".kv_proj." in name else 1 for name in models[0].state_dict())
    assert split == tensors


def test_merged_decode_is_the_literal_one_in_training_too(tiny) -> None:
    tiny.double().train()
    tiny.decode_head.dropout.p = 0.0
    for module in tiny.modules():
        if isinstance(module, DropPath):
            module.rate = 0.0
    pixels = torch.randn(2, 3, 64, 64).double()
    found = []
    for merged in (True, False):
        tiny.decode_head.merged = merged
        tiny.zero_grad()
        tiny(pixels).logits.square().mean().backward()
        found.append([parameter.grad.clone() for parameter in tiny.parameters()])
    scale = max(gradient.abs().max() for gradient in found[1])
    for merged_gradient, literal in zip(*found, strict=True):
        torch.testing.assert_close(merged_gradient, literal, rtol=1e-8, atol=1e-12 * float(scale))


def test_outputs_answer_by_name_index_slice_and_as_tuple(tiny) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    output = tiny(pixels)
    assert len(output) == 1 and output[0] is output.logits and output["logits"] is output.logits
    labelled = tiny(pixels, labels=torch.zeros(1, 64, 64, dtype=torch.long))
    assert list(labelled.keys()) == ["loss", "logits"] and labelled[:2] == labelled.to_tuple()
    (logits,) = tiny(pixels, return_dict=False)
    assert torch.equal(logits, output.logits)
    encoder = tiny.segformer(pixels, output_hidden_states=True)
    assert encoder.last_hidden_state.shape == (1, 32, 2, 2) and len(encoder.hidden_states) == 4


def test_too_small_an_image_is_refused_with_the_smallest_side(tiny) -> None:
    with pytest.raises(UserError, match="28 x 64 pixels, expected sides of at least 29"):
        tiny(torch.zeros(1, 3, 28, 64))


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    drop = DropPath(0.25).train()
    out = drop(torch.ones(20_000, 1, 1, 2))
    assert sorted(out.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(out[..., 0], out[..., 1])
    assert out.mean() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(out), out)


def test_drop_path_ramps_linearly_over_all_blocks(tiny) -> None:
    rates = [module.rate for module in tiny.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1 * index / 5 for index in range(6)])


def test_an_unknown_dropout_kind_is_told() -> None:
    with pytest.raises(UserError, match="classifier_dropout_kind is 'chanel'"):
        SegformerForSemanticSegmentation(SegformerConfig(**TINY, classifier_dropout_kind="chanel"))


def test_channel_dropout_drops_whole_channels() -> None:
    model = SegformerForSemanticSegmentation(SegformerConfig(**TINY, classifier_dropout_kind="channel"))
    assert isinstance(model.decode_head.dropout, torch.nn.Dropout2d)
    assert not isinstance(
        SegformerForSemanticSegmentation(SegformerConfig(**TINY)).decode_head.dropout, torch.nn.Dropout2d
    )


def test_initialisation_follows_the_original() -> None:
    model = SegformerForSemanticSegmentation(SegformerConfig.from_variant("b0", num_labels=19))
    block = model.segformer.stages[2].blocks[0]
    assert block.attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)  # fan-out of one channel: 9
    stem = model.segformer.stages[0].patch_embeddings.proj
    assert stem.weight.std().item() == pytest.approx((2 / (49 * 32)) ** 0.5, rel=0.05)
    fuse = model.decode_head.linear_fuse.weight
    assert fuse.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert not block.attention.q_proj.bias.any() and not stem.bias.any()


def test_every_parameter_has_a_gradient_after_one_step(tiny) -> None:
    tiny.train()
    tiny(torch.randn(2, 3, 64, 64), labels=torch.randint(0, 7, (2, 64, 64))).loss.backward()
    assert [name for name, parameter in tiny.named_parameters() if parameter.grad is None] == []


def test_bare_encoder_loads_from_a_segmentation_folder_and_the_other_way_round(tiny, tmp_path) -> None:
    tiny.save_pretrained(tmp_path / "whole")
    encoder = SegformerModel.from_pretrained(tmp_path / "whole")
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(encoder(pixels)[0], tiny.segformer(pixels)[0])
    encoder.save_pretrained(tmp_path / "bare")
    assert "encoder.patch_embeddings.0.proj.weight" in load_file(tmp_path / "bare" / "model.safetensors")
    save_file(to_disk(tiny.state_dict()), tmp_path / "bare" / "model.safetensors")
    assert torch.equal(SegformerModel.from_pretrained(tmp_path / "bare")(pixels)[0], encoder(pixels)[0])
