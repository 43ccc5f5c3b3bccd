import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from segformer.checkpoints import (
    RENAMES,
    from_disk,
    load_checkpoint,
    start_from,
    to_disk,
    training_config,
    write_atomically,
)
from segformer.config import SegformerConfig
from segformer.errors import UserError
from segformer.model import SegformerForSemanticSegmentation
from tests.conftest import TINY


def test_names_survive_the_way_to_disk_and_back(tiny) -> None:
    weights = tiny.state_dict()
    disk = to_disk(weights)
    back = from_disk(disk)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert not any(name.startswith("segformer.stages") or "linear_projections" in name for name in disk)


def test_every_rename_is_used(tiny) -> None:
    names = [name.replace(".kv_proj.", part) for name in tiny.state_dict() for part in (".k_proj.", ".v_proj.")]
    for ours, _ in RENAMES:
        stem = ours.replace("{i}", "0").replace("{j}", "0")
        assert any(stem in name for name in names), ours


def test_a_folder_gives_back_the_same_network(tiny, tmp_path) -> None:
    tiny.save_pretrained(tmp_path)
    again = SegformerForSemanticSegmentation.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(tiny(pixels).logits, again(pixels).logits)
    assert again.config.to_dict().items() >= tiny.config.to_dict().items()


def test_another_class_count_is_refused_naming_both(tiny, tmp_path) -> None:
    tiny.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has 7 classes, the model has 3"):
        SegformerForSemanticSegmentation.from_pretrained(tmp_path, num_labels=3)


def test_missing_left_over_and_misshapen_tensors_are_refused(tiny, tmp_path) -> None:
    tiny.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        save_file(changed, path)
        with pytest.raises(UserError, match=message):
            SegformerForSemanticSegmentation.from_pretrained(tmp_path)

    fuse = "decode_head.linear_fuse.weight"
    refused({name: tensor for name, tensor in weights.items() if name != fuse}, f"lacks 1 tensor.*{fuse}")
    refused({**weights, "extra.weight": torch.zeros(1)}, "unknown 1 tensor.*extra.weight")
    refused({**weights, fuse: torch.zeros(2, 8, 1, 1)}, "has shape .*another variant")
    refused(
        {name: t for name, t in weights.items() if not name.endswith("self.value.bias")}, "without its value projection"
    )
    path.write_bytes(b"\x08")
    with pytest.raises(UserError, match="cannot read weights"):
        SegformerForSemanticSegmentation.from_pretrained(tmp_path)


def test_training_starts_from_an_encoder_and_says_what_became_of_the_head(tiny, tmp_path) -> None:
    tiny.save_pretrained(tmp_path)
    same = SegformerForSemanticSegmentation(SegformerConfig(**TINY, num_labels=7))
    assert start_from(same, tmp_path) == f"loaded encoder and decode head from {tmp_path}"
    assert torch.equal(same.decode_head.classifier.weight, tiny.decode_head.classifier.weight)
    other = SegformerForSemanticSegmentation(SegformerConfig(**TINY, num_labels=3))
    fresh = other.decode_head.linear_fuse.weight.clone()
    assert start_from(other, tmp_path).endswith("starts fresh (the checkpoint has 7 classes, the data 3)")
    assert torch.equal(other.decode_head.linear_fuse.weight, fresh)
    wanted = tiny.segformer.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in other.segformer.state_dict().items())


def test_an_imagenet_classifier_gives_its_encoder(tiny, tmp_path) -> None:
    disk = {name: tensor for name, tensor in to_disk(tiny.state_dict()).items() if name.startswith("segformer.")}
    save_file({**disk, "classifier.weight": torch.zeros(1000, 32)}, tmp_path / "model.safetensors")
    model = SegformerForSemanticSegmentation(SegformerConfig(**TINY, num_labels=3))
    assert start_from(model, tmp_path).endswith("starts fresh (the checkpoint has none)")


class _Malicious:
    def __init__(self, witness: str) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (self.witness,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "evil.ckpt"])
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tiny, tmp_path, name) -> None:
    witness = tmp_path / "ran"
    (tmp_path / "config.json").write_text(json.dumps(tiny.config.to_dict()))
    with (tmp_path / name).open("wb") as file:
        pickle.dump({"state_dict": _Malicious(str(witness))}, file)
    source = tmp_path if name.endswith(".bin") else tmp_path / name
    with pytest.raises(UserError, match="cannot read"):
        SegformerForSemanticSegmentation.from_pretrained(source)
    assert not witness.exists()


def test_what_is_no_checkpoint_is_told(tmp_path) -> None:
    with pytest.raises(UserError, match="expected a folder, a .ckpt file or a hub id"):
        SegformerForSemanticSegmentation.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no weights in .*expected model.safetensors"):
        SegformerForSemanticSegmentation.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot fetch nobody/nothing from the hub"):
        SegformerForSemanticSegmentation.from_pretrained("nobody/nothing")
    for content in ({"weights": 1}, {"state_dict": {}, "hyper_parameters": {"lr": 1}}, [1]):
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(UserError, match="not a checkpoint of this project"):
            load_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="cannot fetch owner/segformer-v1.5"):  # a dot is no file ending
        SegformerForSemanticSegmentation.from_pretrained("owner/segformer-v1.5")
    with pytest.raises(UserError, match="no checkpoint file at"):
        training_config(tmp_path / "nowhere.ckpt", needed=True)


def test_a_failing_write_leaves_the_previous_file_as_it_was(tmp_path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"good")

    def half(file) -> None:
        file.write(b"ba")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]
