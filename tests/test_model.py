"""The network by itself; `test_parity.py` has it beside transformers' own."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from segformer.bilinear import BAND_NUMBERS
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


def test_pixels_of_another_shape_are_told(tiny) -> None:
    with pytest.raises(UserError, match="have shape \\(1, 4, 64, 64\\), expected \\(batch, 3, height, width\\)"):
        tiny(torch.zeros(1, 4, 64, 64))


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


def test_attentions_and_hidden_states_come_when_asked_by_call_or_configuration(tiny) -> None:
    pixels = torch.randn(2, 3, 64, 96)
    asked = tiny(pixels, output_attentions=True, output_hidden_states=True)
    assert list(asked) == ["logits", "hidden_states", "attentions"] and len(asked.attentions) == sum(TINY["depths"])
    assert asked.attentions[0].shape == (2, 1, 16 * 24, 2 * 3) and asked.attentions[-1].shape == (2, 4, 6, 6)
    assert all(torch.allclose(weights.sum(-1), torch.ones(())) for weights in asked.attentions)
    torch.testing.assert_close(asked.logits, tiny(pixels).logits, rtol=1e-4, atol=1e-5)
    tiny.config.output_attentions = tiny.config.output_hidden_states = True
    assert list(tiny(pixels)) == list(asked) and list(tiny(pixels, output_attentions=False)) == list(asked)[:2]
    tiny.config.return_dict = False
    assert isinstance(tiny(pixels), tuple) and len(tiny(pixels)) == 3


def test_checkpointed_blocks_give_the_same_gradients_and_keep_less(tiny) -> None:
    pixels, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 7, (2, 64, 64))

    def step() -> tuple[int, list[torch.Tensor]]:
        kept = []
        tiny.zero_grad()
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = tiny(pixels, labels=labels).loss
        loss.backward()
        return sum(kept), [parameter.grad.clone() for parameter in tiny.parameters()]

    tiny.train()
    plain, expected = step()
    tiny.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert tiny.is_gradient_checkpointing
    less, found = step()
    assert less < plain / 2
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)
    tiny.gradient_checkpointing_disable()
    assert not tiny.is_gradient_checkpointing and step()[0] == plain


def test_frozen_parts_do_not_learn_drop_or_collect_statistics() -> None:
    model = (
        SegformerForSemanticSegmentation(SegformerConfig(**TINY)).train().freeze("encoder", "decode_head.batch_norm")
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert model.num_parameters(only_trainable=True) == sum(map(torch.numel, learning)) < model.num_parameters()
    assert model.training and model.decode_head.training and not model.segformer.training
    model(torch.randn(2, 3, 64, 64), labels=torch.randint(0, 2, (2, 64, 64))).loss.backward()
    torch.optim.SGD(learning, lr=1.0).step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and not any(name.startswith(("segformer.", "decode_head.batch_norm")) for name in changed)
    assert model.eval().train().decode_head.batch_norm.training is False
    with pytest.raises(UserError, match="cannot freeze 'decodehead' .did you mean 'decode_head'"):
        model.freeze("decodehead")


def test_a_frozen_batchnorm_is_folded_with_gradients_too(tiny) -> None:
    """BatchNorm in eval mode joins the merged weights: outputs and gradients stay those of the literal order."""
    tiny.double()
    pixels, found = torch.randn(1, 3, 64, 64).double(), []
    for merged in (True, False):
        tiny.decode_head.merged = merged
        tiny.zero_grad()
        logits = tiny(pixels).logits
        logits.square().mean().backward()
        found.append([logits.detach(), *(parameter.grad.clone() for parameter in tiny.parameters())])
    scale = float(max(gradient.abs().max() for gradient in found[1]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12 * scale)


@pytest.mark.parametrize("size", [(64, 64), (65, 131), (29, 200)])
def test_the_decode_head_in_bands_is_the_whole_one(tiny, size, monkeypatch) -> None:
    tiny.double()
    pixels = torch.randn(2, 3, *size).double()
    whole = tiny(pixels).logits  # gradients are on: no bands
    monkeypatch.setitem(BAND_NUMBERS, "cpu", 24 * 33 * 3)
    with torch.no_grad():
        torch.testing.assert_close(tiny(pixels).logits, whole, rtol=1e-10, atol=1e-12)


def test_parity_switches_reach_the_layers() -> None:
    model = SegformerForSemanticSegmentation(
        SegformerConfig(**TINY, layer_norm_eps_kind="nvlabs", merged_decode=False, hidden_act="relu")
    )
    eps = {name: module.eps for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    outer = {name for name, value in eps.items() if value == 1e-5}
    assert set(eps.values()) == {1e-5, 1e-6} and not model.decode_head.merged
    assert outer == {name for name in eps if "patch_embeddings" in name or name.endswith("attention.layer_norm")}
    plain = SegformerForSemanticSegmentation(SegformerConfig(**TINY))
    assert {module.eps for module in plain.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-5}
    with pytest.raises(UserError, match="layer_norm_eps_kind is 'nvlab'.*did you mean 'nvlabs'"):
        SegformerModel(SegformerConfig(**TINY, layer_norm_eps_kind="nvlab"))
    with pytest.raises(UserError, match="hidden_act is 'tanh'"):
        SegformerModel(SegformerConfig(**TINY, hidden_act="tanh"))


def test_bfloat16_autocast_stays_near_float32(tiny) -> None:
    pixels, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 7, (2, 64, 64))
    exact = tiny(pixels, labels=labels)
    for graph in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(graph):
            half = tiny(pixels, labels=labels)
        assert half.logits.dtype == torch.bfloat16 and half.loss.dtype == torch.float32
        assert (half.logits - exact.logits).abs().max() < 0.05 * exact.logits.abs().max()
        torch.testing.assert_close(half.loss, exact.loss, rtol=0.05, atol=0)


@pytest.mark.parametrize("train", [False, True])
def test_the_whole_network_is_one_graph_at_any_size(tiny, train) -> None:
    torch.compiler.reset()
    tiny.train(train)
    for module in tiny.modules():
        if isinstance(module, torch.nn.Dropout | DropPath):
            module.eval()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(tiny, fullgraph=True, dynamic=True, backend=backend)
    with torch.set_grad_enabled(train):
        for size in ((64, 64), (65, 100), (96, 133), (128, 77)):
            pixels = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(pixels).logits, tiny(pixels).logits, rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 2  # a square is a case of its own


def test_a_step_of_b0_in_bfloat16_keeps_at_most_265_mib_for_backward() -> None:
    """Peer: 602 MiB. Counted in bytes, so the machine does not matter."""
    model = SegformerForSemanticSegmentation(SegformerConfig.from_variant("b0", num_labels=150)).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    pixels, labels = torch.randn(2, 3, 512, 512), torch.randint(0, 150, (2, 512, 512))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        loss = model(pixels, labels=labels).loss
    assert loss.requires_grad
    assert 100 < sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20 <= 265


def test_the_forward_pass_of_b2_takes_at_most_50_gflop() -> None:
    """Peer and paper: 125 (62.4 G multiply-adds)."""
    with torch.device("meta"):
        model = SegformerForSemanticSegmentation(SegformerConfig.from_variant("b2", num_labels=150)).eval()
        with FlopCounterMode(display=False) as merged, torch.no_grad():
            model(torch.empty(1, 3, 512, 512))
        model.decode_head.merged = False
        with FlopCounterMode(display=False) as literal, torch.no_grad():
            model(torch.empty(1, 3, 512, 512))
    assert merged.get_total_flops() <= 50e9
    assert literal.get_total_flops() == pytest.approx(124.7e9, rel=0.001)


def test_parts_of_the_head_that_were_replaced_watched_or_set_to_train_are_called(tiny) -> None:
    """The merged and banded ways read weights without calling modules: they are for a head as it was built."""
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = tiny(pixels).logits
        seen = []
        handles = [
            module.register_forward_hook(lambda module, inputs, out: seen.append((type(module).__name__, out)))
            for module in tiny.decode_head.modules()
            if module is not tiny.decode_head and not list(module.children())
        ]
        torch.testing.assert_close(tiny(pixels).logits, plain, rtol=1e-4, atol=1e-5)
        assert sorted(name for name, _ in seen) == ["BatchNorm2d", "Conv2d", "Conv2d", "Dropout", *["Linear"] * 4]
        assert dict(seen)["BatchNorm2d"].min() < 0  # what a hook kept is not changed afterwards
        for handle in handles:
            handle.remove()

        tiny.decode_head.dropout.train()  # Monte Carlo dropout
        assert not torch.equal(tiny(pixels).logits, tiny(pixels).logits)
        tiny.decode_head.dropout.eval()
        before = tiny.decode_head.batch_norm.running_mean.clone()
        tiny.decode_head.batch_norm.train()  # adaptation at test time
        adapted = tiny(pixels).logits
        assert (adapted - plain).abs().max() > 0.01
        assert not torch.equal(before, tiny.decode_head.batch_norm.running_mean)
        tiny.decode_head.batch_norm.eval()
        tiny.decode_head.classifier = torch.nn.Sequential(torch.nn.Conv2d(24, 2, 3, padding=1), torch.nn.Sigmoid())
        assert tiny(pixels).logits.shape == (2, 2, 16, 16)
        tiny.decode_head.batch_norm = torch.nn.GroupNorm(4, 24)
        assert not torch.equal(tiny(pixels).logits, adapted[:, :2])


def test_pruned_projections_train(tiny) -> None:
    prune.l1_unstructured(tiny.decode_head.linear_fuse, "weight", 0.5)
    for _ in range(2):
        tiny.train()(torch.randn(2, 3, 64, 64), labels=torch.zeros(2, 64, 64, dtype=torch.long)).loss.backward()


def test_parts_that_were_thawed_learn_again() -> None:
    model = SegformerForSemanticSegmentation(SegformerConfig(**TINY)).freeze("encoder").train()
    assert not model.segformer.stages[0].training
    model.requires_grad_(True)
    assert model.train().segformer.stages[0].training
    encoder = SegformerModel(SegformerConfig(**TINY)).freeze("encoder")
    assert encoder.num_parameters(only_trainable=True) == 0 and not encoder.train().stages[0].training


def test_common_names_of_the_peer_are_there() -> None:
    model = SegformerForSemanticSegmentation.from_config(SegformerConfig(**TINY, num_labels=7))
    assert (
        model.num_labels == 7 and model.base_model is model.segformer and model.segformer.base_model is model.segformer
    )
    assert model.device == torch.device("cpu") and model.half().dtype == torch.float16
