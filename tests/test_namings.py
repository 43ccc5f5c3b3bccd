import copy

import pytest
import torch
from torch import Tensor

from segformer.config import VARIANTS, SegformerConfig
from segformer.errors import UserError
from segformer.model import SegformerForSemanticSegmentation, SegformerModel
from segformer.namings import TABLE, from_ours, from_tensorflow, infer_config, recognise, to_ours, unwrap
from tests.conftest import TINY, randomize

Weights = dict[str, Tensor]
LEAVES = ("weight", "bias")


def as_nvlabs(disk: Weights, encoder: str = "backbone.") -> Weights:
    """Hugging Face's files -> NVlabs' names, written down a second time and block by block."""
    out: Weights = {}
    depths = [len({key.split(".")[4] for key in disk if f"encoder.block.{i}." in key}) for i in range(4)]
    for i, depth in enumerate(depths):
        for leaf in LEAVES:
            theirs, base = f"{encoder}patch_embed{i + 1}", f"segformer.encoder.patch_embeddings.{i}"
            out[f"{theirs}.proj.{leaf}"] = disk[f"{base}.proj.{leaf}"]
            out[f"{theirs}.norm.{leaf}"] = disk[f"{base}.layer_norm.{leaf}"]
            out[f"{encoder}norm{i + 1}.{leaf}"] = disk[f"segformer.encoder.layer_norm.{i}.{leaf}"]
            if f"decode_head.linear_c.{i}.proj.{leaf}" in disk:
                out[f"decode_head.linear_c{i + 1}.proj.{leaf}"] = disk[f"decode_head.linear_c.{i}.proj.{leaf}"]
            for j in range(depth):
                theirs, base = f"{encoder}block{i + 1}.{j}", f"segformer.encoder.block.{i}.{j}"
                own = f"{base}.attention.self"
                out[f"{theirs}.norm1.{leaf}"] = disk[f"{base}.layer_norm_1.{leaf}"]
                out[f"{theirs}.norm2.{leaf}"] = disk[f"{base}.layer_norm_2.{leaf}"]
                out[f"{theirs}.attn.q.{leaf}"] = disk[f"{own}.query.{leaf}"]
                out[f"{theirs}.attn.kv.{leaf}"] = torch.cat([disk[f"{own}.key.{leaf}"], disk[f"{own}.value.{leaf}"]])
                out[f"{theirs}.attn.proj.{leaf}"] = disk[f"{base}.attention.output.dense.{leaf}"]
                if f"{own}.sr.{leaf}" in disk:
                    out[f"{theirs}.attn.sr.{leaf}"] = disk[f"{own}.sr.{leaf}"]
                    out[f"{theirs}.attn.norm.{leaf}"] = disk[f"{own}.layer_norm.{leaf}"]
                out[f"{theirs}.mlp.fc1.{leaf}"] = disk[f"{base}.mlp.dense1.{leaf}"]
                out[f"{theirs}.mlp.fc2.{leaf}"] = disk[f"{base}.mlp.dense2.{leaf}"]
                out[f"{theirs}.mlp.dwconv.dwconv.{leaf}"] = disk[f"{base}.mlp.dwconv.dwconv.{leaf}"]
    if "decode_head.linear_fuse.weight" in disk:
        out["decode_head.linear_fuse.conv.weight"] = disk["decode_head.linear_fuse.weight"]
        for leaf in (*LEAVES, "running_mean", "running_var", "num_batches_tracked"):
            out[f"decode_head.linear_fuse.bn.{leaf}"] = disk[f"decode_head.batch_norm.{leaf}"]
        for leaf in LEAVES:
            out[f"decode_head.linear_pred.{leaf}"] = disk[f"decode_head.classifier.{leaf}"]
        classes = len(disk["decode_head.classifier.bias"])
        out |= {"decode_head.conv_seg.weight": torch.randn(classes, 128, 1, 1)}
        out |= {"decode_head.conv_seg.bias": torch.randn(classes)}
    return out


def as_mmseg(disk: Weights, encoder: str = "backbone.", head: bool = False) -> Weights:
    """Hugging Face's files -> mmsegmentation's names of the encoder, from NVlabs' above; head: a decode head of its."""
    out: Weights = {}
    for name, tensor in as_nvlabs(disk, "").items():
        if name.startswith("decode_head."):
            continue
        stem, leaf = name.rsplit(".", 1)
        part, *rest = stem.split(".")
        i = int(part[-1]) - 1
        if part.startswith("patch_embed"):
            out[f"{encoder}layers.{i}.0.{'projection' if rest == ['proj'] else 'norm'}.{leaf}"] = tensor
        elif part.startswith("norm"):
            out[f"{encoder}layers.{i}.2.{leaf}"] = tensor
        else:
            base, inner = f"{encoder}layers.{i}.1.{rest[0]}", ".".join(rest[1:])
            if inner == "attn.kv":
                query = disk[f"segformer.encoder.block.{i}.{rest[0]}.attention.self.query.{leaf}"]
                out[f"{base}.attn.attn.in_proj_{leaf}"] = torch.cat([query, tensor])
            elif inner in ("mlp.fc1", "mlp.fc2"):
                number = 0 if inner == "mlp.fc1" else 4
                out[f"{base}.ffn.layers.{number}.{leaf}"] = tensor[..., None, None] if leaf == "weight" else tensor
            elif inner != "attn.q":
                other = {"attn.proj": "attn.attn.out_proj", "mlp.dwconv.dwconv": "ffn.layers.1"}.get(inner, inner)
                out[f"{base}.{other}.{leaf}"] = tensor
    if head:
        out |= {
            "decode_head.convs.0.conv.weight": torch.zeros(8, 8, 1, 1),
            "decode_head.convs.0.bn.weight": torch.ones(8),
        }
        out |= {"decode_head.fusion_conv.conv.weight": torch.zeros(8, 32, 1, 1)}
        out |= {"decode_head.conv_seg.weight": torch.zeros(7, 8, 1, 1), "decode_head.conv_seg.bias": torch.zeros(7)}
    return out


def as_tensorflow(disk: Weights, scope: str = "tf_segformer_for_semantic_segmentation") -> Weights:
    """Hugging Face's files -> the data sets of a tf_model.h5."""
    out: Weights = {}
    for name, tensor in disk.items():
        *parts, leaf = name.split(".")
        path: list[str] = []
        for part in parts:  # patch_embeddings.0 and block.0.1 are one layer name each
            path = [*path[:-1], f"{path[-1]}.{part}"] if part.isdigit() else [*path, part]
        norm = any("norm" in part for part in path[-1:]) or "layer_norm" in path[-1]
        if leaf == "num_batches_tracked":
            continue
        new = {"running_mean": "moving_mean", "running_var": "moving_variance", "bias": "beta" if norm else "bias"}
        new["weight"] = "gamma" if norm else "kernel"
        if leaf == "weight" and tensor.ndim == 2:
            tensor = tensor.T  # noqa: PLW2901
        elif leaf == "weight" and tensor.ndim == 4:
            tensor = tensor.permute(2, 3, 1, 0)  # noqa: PLW2901
        out["/".join([path[0], scope, *path, f"{new[leaf]}:0"])] = tensor
    return out


def hf(model: torch.nn.Module) -> Weights:
    return from_ours(model.state_dict(), "hf")[0]


def same(found: Weights, expected: Weights) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def b0() -> SegformerForSemanticSegmentation:
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(SegformerConfig.from_variant("b0", num_labels=150))
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("size", ["tiny", "b0"])
def test_from_hugging_face_to_nvlabs_and_back_every_tensor_is_bit_identical(request, size) -> None:
    disk = hf(request.getfixturevalue(size))
    ours, naming, notes = to_ours(disk)
    assert naming == "hf" and notes == []
    nvlabs, made = from_ours(ours, "nvlabs")
    assert made == ["filled decode_head.conv_seg from a fixed seed: the original has it and never uses it"]
    back, naming, dropped = to_ours(nvlabs)
    assert naming == "nvlabs" and dropped == ["dropped decode_head.conv_seg: never used in the forward pass"]
    assert same(from_ours(back, "hf")[0], disk)
    if size == "b0":
        assert (len(nvlabs), len(disk)) == (194, 208)


def test_what_is_written_for_nvlabs_is_what_a_second_writing_of_its_names_says(tiny) -> None:
    written, expected = from_ours(tiny.state_dict(), "nvlabs")[0], as_nvlabs(hf(tiny))
    unused = {name for name in expected if "conv_seg" in name}
    assert written.keys() == expected.keys() and len(unused) == 2
    assert all(torch.equal(written[name], expected[name]) for name in expected.keys() - unused)
    again = from_ours(tiny.state_dict(), "nvlabs")[0]
    assert all(torch.equal(written[name], again[name]) for name in unused)  # a fixed seed
    assert written["decode_head.conv_seg.weight"].shape == (7, 128, 1, 1)
    assert written["decode_head.conv_seg.weight"].std().item() == pytest.approx(0.01, rel=0.1)


def test_a_bare_encoder_stays_bare(tiny) -> None:
    encoder = tiny.segformer
    assert "patch_embed1.proj.weight" in from_ours(encoder.state_dict(), "nvlabs")[0]
    assert "encoder.patch_embeddings.0.proj.weight" in hf(encoder)
    wanted = {name: tensor for name, tensor in tiny.state_dict().items() if name.startswith("segformer.")}
    for naming in ("hf", "nvlabs"):
        assert same(to_ours(from_ours(encoder.state_dict(), naming)[0])[0], wanted)


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_the_encoder_of_mmsegmentation_is_the_same_encoder(tiny, prefix) -> None:
    ours, naming, _ = to_ours(as_mmseg(hf(tiny), prefix))
    assert naming == "mmseg"
    assert same(ours, {name: tensor for name, tensor in tiny.state_dict().items() if name.startswith("segformer.")})


def test_names_in_memory_of_transformers_are_known(tiny) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**TINY, num_labels=7))
    ours, naming, _ = to_ours(theirs.state_dict())
    assert naming == "memory"
    tiny.load_state_dict(ours)
    encoder, _, _ = to_ours(theirs.segformer.state_dict())  # without the prefix
    assert all(torch.equal(tensor, ours[name]) for name, tensor in encoder.items())


def test_an_imagenet_classifier_of_nvlabs_keeps_its_head(tiny) -> None:
    encoder = {name: tensor for name, tensor in hf(tiny).items() if name.startswith("segformer.")}
    head = {"head.weight": torch.randn(1000, 32), "head.bias": torch.randn(1000)}
    ours, naming, notes = to_ours(as_nvlabs(encoder, "") | head)
    assert naming == "nvlabs" and notes == [] and torch.equal(ours["classifier.weight"], head["head.weight"])
    assert same(from_ours(ours, "nvlabs")[0], as_nvlabs(encoder, "") | head)


def test_tensorflow_arrays_are_turned_and_named(tiny) -> None:
    disk = hf(tiny)
    arrays = as_tensorflow(disk)
    assert arrays[
        "segformer/tf_segformer_for_semantic_segmentation/segformer/encoder/block.0.1/mlp/dwconv/dwconv/kernel:0"
    ].shape == (3, 3, 1, 32)
    assert len(arrays) == len(disk) - 1  # Keras counts no batches
    found = from_tensorflow(arrays)
    assert same(found, disk | {"decode_head.batch_norm.num_batches_tracked": torch.tensor(0)})
    classifier = {name: tensor for name, tensor in disk.items() if name.startswith("segformer.")}
    classifier |= {"classifier.weight": torch.randn(9, 32), "classifier.bias": torch.randn(9)}
    assert same(from_tensorflow(as_tensorflow(classifier, "tf_segformer_for_image_classification")), classifier)


def test_every_row_of_the_table_is_used(tiny) -> None:
    names = [*hf(tiny), "classifier.weight"]
    for row in TABLE:
        stem = row.hf.format(i=0, j=0)
        assert any(name.removeprefix("segformer.").startswith(stem) for name in names), stem
    assert len({row.hf for row in TABLE}) == len(TABLE)  # its files name every part apart


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "net.", "_orig_mod.", "model.net._orig_mod.module."])
def test_wrappers_come_off(tiny, key, prefix) -> None:
    content = prefixed(prefix, hf(tiny))
    found, notes = unwrap(content if key is None else {key: content, "epoch": 3})
    assert same(found, hf(tiny)) and notes == []


def test_what_lies_beside_the_network_is_left_aside_and_said(tiny) -> None:
    loss, inner = {"loss.weight": torch.ones(7)}, {"model": {"state_dict": prefixed("net.", hf(tiny))}}
    found, notes = unwrap({"state_dict": prefixed("model.", hf(tiny)) | loss})
    assert same(found, hf(tiny)) and notes == ["left aside 1 tensor(s) beside the network's"]
    assert same(unwrap(inner)[0], hf(tiny))


def test_a_prefix_stays_where_nothing_is_known_behind_it(tiny) -> None:
    for content in ({"model.layer1.weight": torch.ones(1)}, {}, {"classifier.weight": torch.ones(2, 2)}):
        with pytest.raises(UserError, match="not the names of a SegFormer|no tensors under"):
            unwrap(content)
    with pytest.raises(UserError, match="found a list"):
        unwrap([1])
    with pytest.raises(UserError, match="not the names of a SegFormer"):
        to_ours({"fc.weight": torch.ones(1)})
    assert recognise([]) is None
    strange = hf(tiny) | {"extra.weight": torch.ones(1)}
    assert "extra.weight" in to_ours(unwrap(strange)[0])[0]  # for strict loading to refuse


def test_halves_odd_halves_and_two_networks_in_one_file_are_told(tiny) -> None:
    disk = hf(tiny)
    key, value = (f"segformer.encoder.block.0.1.attention.self.{part}.weight" for part in ("key", "value"))
    for gone, part in ((key, "key"), (value, "value")):
        with pytest.raises(UserError, match=f"without its {part} projection: the file is incomplete"):
            to_ours({name: tensor for name, tensor in disk.items() if name != gone})
    odd = as_nvlabs(disk) | {"backbone.block1.0.attn.kv.weight": torch.zeros(15, 8)}
    with pytest.raises(UserError, match=r"attn.kv.weight has shape \(15, 8\), expected 2 projections"):
        to_ours(odd)
    with pytest.raises(UserError, match="both there: the file holds two networks"):
        to_ours(disk | hf(tiny.segformer))


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_tell_the_configuration_of_every_variant(variant) -> None:
    config = SegformerConfig.from_variant(variant, num_labels=19, num_channels=4)
    with torch.device("meta"):
        model, encoder = SegformerForSemanticSegmentation(config), SegformerModel(config)
    assert infer_config(model.state_dict()).to_dict() == config.to_dict()
    bare = infer_config(prefixed("segformer.", encoder.state_dict()))  # the decoder's width follows from the depths
    assert bare.to_dict().items() >= {**config.to_dict(), "id2label": bare.id2label, "label2id": bare.label2id}.items()


def test_unusual_sizes_are_inferred_but_for_the_heads() -> None:
    unusual = {"depths": [1, 1, 1, 1], "sr_ratios": [4, 2, 1, 1], "mlp_ratios": [2, 4, 3, 4], "decoder_hidden_size": 64}
    config = SegformerConfig(**unusual, patch_sizes=[7, 5, 3, 3], num_labels=3)
    weights = SegformerForSemanticSegmentation(config).state_dict()
    assert infer_config(weights).to_dict() == config.to_dict()
    assert infer_config(weights, ["a", "b", "c"]).id2label == {0: "a", 1: "b", 2: "c"}
    assert infer_config(weights, ["a", "b"]).id2label[0] == "LABEL_0"
    other = SegformerForSemanticSegmentation(SegformerConfig(**TINY))
    with pytest.raises(UserError, match=r"hidden sizes \[8, 16, 24, 32\] .*attention heads.* put config.json beside"):
        infer_config(other.state_dict())
    cut = {name: tensor for name, tensor in copy.copy(weights).items() if "patch_embeddings" not in name}
    with pytest.raises(UserError, match="lacks segformer.stages.0.patch_embeddings.proj.weight"):
        infer_config(cut)
