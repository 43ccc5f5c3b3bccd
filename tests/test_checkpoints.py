import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from segformer.checkpoints import (
    WEIGHTS_LICENSE,
    load_checkpoint,
    read,
    save_nvlabs,
    start_from,
    to_disk,
    training_config,
)
from segformer.config import SegformerConfig
from segformer.errors import UserError
from segformer.files import write_atomically
from segformer.model import SegformerForSemanticSegmentation, SegformerModel
from tests.conftest import ROOT, TINY
from tests.test_namings import as_mmseg, as_nvlabs, as_tensorflow

PIXELS = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


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


def published(model: SegformerForSemanticSegmentation, folder: Path) -> Path:
    """A folder with the config.json of `model` alone."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    """transformers' own network in the published sizes of B0, random weights, eval."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=5))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2) if name.endswith("running_var") else tensor.normal_(0, 0.1)
    return model.eval()


def disk(theirs: torch.nn.Module, folder: Path) -> dict[str, Tensor]:
    theirs.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def close(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    torch.testing.assert_close(ours(PIXELS).logits, theirs(PIXELS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["their.pth", "their.pt", "their.bin", "their.ckpt", "their.safetensors"])
def test_names_in_memory_of_transformers_give_equal_logits(theirs, tmp_path, name) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(theirs.state_dict(), path)
    else:
        weights = {f"model.{name}": tensor for name, tensor in theirs.state_dict().items()}
        torch.save({"state_dict": weights, "epoch": 3} if path.suffix == ".ckpt" else theirs.state_dict(), path)
    close(SegformerForSemanticSegmentation.from_pretrained(path), theirs)


def test_a_pth_of_nvlabs_gives_equal_logits_and_its_class_names(theirs, tmp_path, capsys) -> None:
    names = ("wall", "floor", "sky", "tree", "road")
    content = {"meta": {"CLASSES": names, "PALETTE": [[0, 0, 0]] * 5}, "state_dict": as_nvlabs(disk(theirs, tmp_path))}
    folder = tmp_path / "alone"
    folder.mkdir()
    torch.save(content, folder / "segformer.b0.pth")
    model = SegformerForSemanticSegmentation.from_pretrained(folder / "segformer.b0.pth")
    close(model, theirs)
    assert tuple(model.config.id2label.values()) == names
    assert capsys.readouterr().err.count("NVIDIA publishes under its own licence") == 1


def test_a_tensorflow_folder_gives_equal_logits(theirs, tmp_path) -> None:
    h5py = pytest.importorskip("h5py")
    arrays = as_tensorflow(disk(theirs, tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with h5py.File(tmp_path / "tf_model.h5", "w") as file:
        for name, array in arrays.items():
            file[name] = array.numpy()
        file.attrs["layer_names"] = ["segformer", "decode_head"]
    close(SegformerForSemanticSegmentation.from_pretrained(tmp_path), theirs)
    close(SegformerForSemanticSegmentation.from_pretrained(tmp_path / "tf_model.h5"), theirs)
    (tmp_path / "cut.h5").write_bytes((tmp_path / "tf_model.h5").read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot read weights .*cut.h5"):
        SegformerForSemanticSegmentation.from_pretrained(tmp_path / "cut.h5")


def test_without_h5py_the_command_that_brings_it_is_named(tmp_path) -> None:
    (tmp_path / "tf_model.h5").write_bytes(b"")
    code = (
        "import sys; sys.modules['h5py'] = None\n"
        "from segformer.checkpoints import read\n"
        f"try: read({str(tmp_path)!r})\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip().endswith('needs h5py: pip install "segformer[tf]"')


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_mmsegmentation_gives_its_encoder_and_its_head_is_refused(theirs, tmp_path, prefix) -> None:
    weights, path = disk(theirs, tmp_path), tmp_path / "mmseg.pth"
    torch.save({"state_dict": as_mmseg(weights, prefix, head=prefix != "")}, path)
    encoder = SegformerModel.from_pretrained(path)
    expected = theirs.segformer(PIXELS).last_hidden_state
    torch.testing.assert_close(encoder(PIXELS).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=3)).eval()
    assert f"loaded the encoder from {path}" in start_from(model, path)
    torch.testing.assert_close(model.segformer(PIXELS)[0], expected, rtol=1e-4, atol=1e-4)
    if prefix:
        assert start_from(model, path).endswith("starts fresh (its decode head is mmsegmentation's)")
        with pytest.raises(UserError, match="mmsegmentation's decode head, another network .BatchNorm and ReLU"):
            SegformerForSemanticSegmentation.from_pretrained(path)
    else:
        with pytest.warns(UserWarning, match="decode_head starts fresh"):
            SegformerForSemanticSegmentation.from_pretrained(path)


def test_a_file_takes_the_configuration_beside_it_only_where_it_fits(tiny, theirs, tmp_path) -> None:
    published(tiny, tmp_path)
    torch.save(tiny.state_dict(), tmp_path / "tiny.pt")
    torch.save(theirs.state_dict(), tmp_path / "b0.pt")
    again = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "tiny.pt")
    assert torch.equal(again(PIXELS).logits, tiny(PIXELS).logits)
    close(SegformerForSemanticSegmentation.from_pretrained(tmp_path / "b0.pt"), theirs)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    close(SegformerForSemanticSegmentation.from_pretrained(tmp_path / "b0.pt"), theirs)
    with pytest.raises(UserError, match="tiny.pt: hidden sizes .* put config.json beside it"):
        SegformerForSemanticSegmentation.from_pretrained(tmp_path / "tiny.pt")
    given = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "tiny.pt", config=tiny.config)
    assert torch.equal(given(PIXELS).logits, tiny(PIXELS).logits)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        SegformerForSemanticSegmentation.from_pretrained(tmp_path / "tiny.pt")


def test_a_fresh_classifier_for_other_classes_is_asked_for_and_told(tiny, tmp_path) -> None:
    tiny.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="to start a fresh classifier pass ignore_mismatched_sizes=True"):
        SegformerForSemanticSegmentation.from_pretrained(tmp_path, num_labels=3)
    with pytest.warns(UserWarning, match="decode_head.classifier starts fresh for 3 classes"):
        model = SegformerForSemanticSegmentation.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert model(PIXELS).logits.shape[1] == 3
    assert torch.equal(model.decode_head.linear_fuse.weight, tiny.decode_head.linear_fuse.weight)
    with pytest.raises(UserError, match="expects .* another variant"):
        SegformerForSemanticSegmentation.from_pretrained(
            tmp_path, hidden_sizes=[8, 16, 24, 36], ignore_mismatched_sizes=True
        )


def test_a_head_that_is_absent_as_a_whole_starts_fresh_and_a_torn_one_is_refused(tiny, tmp_path) -> None:
    weights = {name: tensor for name, tensor in to_disk(tiny.state_dict()).items() if name.startswith("segformer.")}
    imagenet = {**weights, "classifier.weight": torch.zeros(1000, 32), "classifier.bias": torch.zeros(1000)}
    published(tiny, tmp_path)
    values = {**tiny.config.to_dict(), "reshape_last_stage": False}  # as in the published ImageNet folders
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(imagenet, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"decode_head starts fresh .the checkpoint has none.: train it before use"):
        model = SegformerForSemanticSegmentation.from_pretrained(tmp_path, num_labels=4)
    assert model.config.reshape_last_stage and model.config.num_labels == 4
    assert torch.equal(model.segformer(PIXELS)[0], tiny.segformer(PIXELS)[0])
    save_file({**imagenet, "decode_head.classifier.bias": torch.zeros(7)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lacks 15 tensor.*first 'decode_head.batch_norm.bias'"):
        SegformerForSemanticSegmentation.from_pretrained(tmp_path)


def test_an_rgb_stem_is_adapted_to_other_bands_on_request(tiny, tmp_path) -> None:
    tiny.save_pretrained(tmp_path)
    encoder = tiny.segformer
    with pytest.raises(UserError, match="has 3 bands, the model has 1; to adapt its kernels pass ignore_mismatched"):
        SegformerModel.from_pretrained(tmp_path, num_channels=1)
    with pytest.warns(UserWarning, match="RGB kernels were summed for one band"):
        grey = SegformerModel.from_pretrained(tmp_path, num_channels=1, ignore_mismatched_sizes=True)
    image = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(grey(image)[0], encoder(image.expand(-1, 3, -1, -1))[0], rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="repeated over 6 bands and scaled by 3/6"):
        twice = SegformerModel.from_pretrained(tmp_path, num_channels=6, ignore_mismatched_sizes=True)
    torch.testing.assert_close(twice(torch.cat([PIXELS, PIXELS], 1))[0], encoder(PIXELS)[0], rtol=1e-4, atol=1e-4)
    four = SegformerForSemanticSegmentation(SegformerConfig(**TINY, num_labels=7, num_channels=4))
    assert "repeated over 4 bands" in start_from(four, tmp_path)
    kernels = encoder.stages[0].patch_embeddings.proj.weight
    torch.testing.assert_close(four.segformer.stages[0].patch_embeddings.proj.weight[:, 3], kernels[:, 0] * 0.75)


def test_keywords_of_transformers_are_taken_or_told(tiny, tmp_path) -> None:
    tiny.half().save_pretrained(tmp_path)
    load = SegformerForSemanticSegmentation.from_pretrained
    model = load(
        tmp_path, low_cpu_mem_usage=True, device_map=None, trust_remote_code=False, use_safetensors=True,
        revision="main", local_files_only=True, cache_dir=tmp_path, token=None, weights_only=True,
        output_loading_info=False, drop_path_rate=0.3, output_hidden_states=True,
    )  # fmt: skip
    assert model.config.drop_path_rate == 0.3 and len(model(PIXELS).hidden_states) == 4
    assert not hasattr(model.config, "token") and not hasattr(model.config, "device_map")
    kinds = {None: torch.float32, "auto": torch.float16, "bfloat16": torch.bfloat16, torch.float64: torch.float64}
    for wanted, found in kinds.items():
        assert load(tmp_path, dtype=wanted).decode_head.classifier.weight.dtype == found
        assert load(tmp_path, torch_dtype=wanted).decode_head.classifier.weight.dtype == found
    with pytest.raises(UserError, match="dtype is 'float15', expected 'auto'"):
        load(tmp_path, dtype="float15")
    with pytest.raises(UserError, match="does not take output_loading_info"):
        load(tmp_path, output_loading_info=True)
    with pytest.raises(UserError, match=r"does not take device_map: call .to.device."):
        load(tmp_path, device_map="auto")


def test_the_licence_of_nvidias_weights_goes_where_they_go(tiny, tmp_path, capsys) -> None:
    whole = published(tiny, tmp_path / "whole")
    torch.save({"state_dict": as_nvlabs(to_disk(tiny.state_dict())), "meta": {}}, whole / "segformer.tiny.pth")
    model = SegformerForSemanticSegmentation.from_pretrained(whole / "segformer.tiny.pth")
    assert model.config.weights_license == WEIGHTS_LICENSE and WEIGHTS_LICENSE in capsys.readouterr().err
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "NOTICE").read_text() == f"{WEIGHTS_LICENSE}\n"
    again = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "saved")
    assert again.config.weights_license == WEIGHTS_LICENSE and capsys.readouterr().err == ""  # told once
    tuned = SegformerForSemanticSegmentation(SegformerConfig(**TINY, num_labels=3))
    start_from(tuned, tmp_path / "saved")
    facts = {"model": tuned.config.to_dict(), "config": {}}
    weights = {f"model.{name}": tensor for name, tensor in tuned.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": facts}, tmp_path / "best.ckpt")
    best = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "best.ckpt")
    assert best.config.weights_license == WEIGHTS_LICENSE
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "saved")
    assert theirs.config.weights_license == WEIGHTS_LICENSE


def test_weights_of_nobody_elses_carry_no_licence(tiny, tmp_path, capsys) -> None:
    tiny.save_pretrained(tmp_path / "own")
    save_nvlabs(tiny, tmp_path / "own" / "own.pth")  # NVlabs' names, and yet not NVIDIA's weights
    assert read(tmp_path / "own").license is None and read(tmp_path / "own" / "own.pth").license is None
    assert not (tmp_path / "own" / "NOTICE").exists() and capsys.readouterr().err == ""


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


class _Settings:
    """What mmcv's `meta` may hold: an object of some class."""


@pytest.mark.parametrize(("what", "name"), [(_Settings(), "_Settings"), (np.zeros(3), "numpy")])
def test_a_file_with_objects_beside_its_tensors_needs_the_flag_and_warns(tiny, tmp_path, what, name) -> None:
    path = published(tiny, tmp_path) / "segformer.pth"
    torch.save({"meta": {"config": what}, "state_dict": as_nvlabs(to_disk(tiny.state_dict()))}, path)
    with pytest.raises(UserError, match=f"safely: it holds .*{name}.* can run any code; .*allow_pickle=True"):
        SegformerForSemanticSegmentation.from_pretrained(path)
    for flag in ({"allow_pickle": True}, {"weights_only": False}):
        with pytest.warns(UserWarning, match="allow_pickle: whatever code .*segformer.pth holds RUNS NOW"):
            model = SegformerForSemanticSegmentation.from_pretrained(path, **flag)
        assert torch.equal(model(PIXELS).logits, tiny(PIXELS).logits)


def test_damaged_files_are_told(tiny, tmp_path) -> None:
    path = published(tiny, tmp_path) / "weights.pth"
    for content in (b"", b"hello world", pickle.dumps(3)[:-3]):
        path.write_bytes(content)
        for flag in (False, True):
            with pytest.raises(UserError, match="cannot read checkpoint .*weights.pth"):
                SegformerForSemanticSegmentation.from_pretrained(path, allow_pickle=flag)
    torch.save([1], path)
    with pytest.raises(UserError, match="weights.pth: found a list instead of a dict of tensors"):
        SegformerForSemanticSegmentation.from_pretrained(path)


def test_only_runs_of_ours_have_a_training_configuration(tiny, tmp_path) -> None:
    for name in ("other.ckpt", "other.pth"):
        torch.save({"state_dict": tiny.state_dict()}, tmp_path / name)
        assert training_config(tmp_path / name, needed=False) == {}
        with pytest.raises(UserError, match="not a checkpoint of this project"):
            training_config(tmp_path / name, needed=True)


def test_what_is_no_checkpoint_is_told(tmp_path) -> None:
    with pytest.raises(UserError, match="expected a folder, a checkpoint file or a hub id"):
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


def test_a_full_disk_names_the_file_and_the_longest_name_fits(tmp_path) -> None:
    def full(file) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / ("a" * 250 + ".json")
    with pytest.raises(OSError, match="No space left") as told:
        write_atomically(path, full)
    assert told.value.filename == str(path)  # of which `errors.explained` makes a sentence
    write_atomically(path, lambda file: file.write(b"{}"))
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs"),
        (b"<!doctype html><html>", "a web page"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "a safetensors file: name it so"),
        (b"nothing of that kind", "no checkpoint, or a damaged one"),
    ],
)
def test_a_broken_download_is_no_reason_to_allow_pickle(start, message, tmp_path) -> None:
    (tmp_path / "b0.pth").write_bytes(start)
    with pytest.raises(UserError, match=message) as told:
        read(tmp_path / "b0.pth")
    assert "allow_pickle" not in str(told.value)


def test_the_type_of_the_weights_is_written_beside_them(tiny, tmp_path) -> None:
    tiny.config.torch_dtype = "float16"
    tiny.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    SegformerForSemanticSegmentation.from_pretrained(tmp_path).half().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["dtype"] == "float16" and "torch_dtype" not in stored
    with pytest.raises(UserError, match="dtype is 'int8', expected"):
        SegformerForSemanticSegmentation.from_pretrained(tmp_path, dtype="int8")
    with pytest.raises(UserError, match="safe_serialization is False"):
        tiny.save_pretrained(tmp_path, safe_serialization=False)


def test_a_notice_of_ones_own_is_kept(tiny, tmp_path) -> None:
    (tmp_path / "NOTICE").write_text("mine\n")
    tiny.config.weights_license = "theirs"
    for _ in range(2):
        tiny.save_pretrained(tmp_path)
    assert (tmp_path / "NOTICE").read_text() == "mine\ntheirs\n"


@pytest.mark.parametrize("parts", [("nvidia", "mit-b0"), ("models--nvidia--mit-b0", "snapshots", "abc")])
def test_downloaded_folders_of_nvidia_are_known_by_their_path(parts, tiny, tmp_path, capsys) -> None:
    folder = tmp_path.joinpath(*parts)
    tiny.save_pretrained(folder)
    assert read(folder).license == WEIGHTS_LICENSE and "NVIDIA" in capsys.readouterr().err


def test_keywords_that_would_load_something_else_are_refused(tiny, tmp_path) -> None:
    tiny.save_pretrained(tmp_path)
    for key, value in (
        ("subfolder", "sub"),
        ("load_in_8bit", True),
        ("variant", "fp16"),
        ("quantization_config", {1: 2}),
    ):
        with pytest.raises(UserError, match=f"does not take {key}"):
            SegformerForSemanticSegmentation.from_pretrained(tmp_path, **{key: value})
    loaded = SegformerForSemanticSegmentation.from_pretrained(
        tmp_path, attn_implementation="eager", force_download=False
    )
    assert not hasattr(loaded.config, "attn_implementation")
    again = SegformerForSemanticSegmentation.from_pretrained(tmp_path, config=str(tmp_path))
    assert again.config == loaded.config


def test_what_is_no_description_of_a_model_is_one_sentence(tiny, tmp_path) -> None:
    tiny.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="config.json holds a list, expected an object"):
        SegformerForSemanticSegmentation.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="shards are not read"):
        read(tmp_path)
    torch.save({"teacher": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "ema.pt")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="found the keys 'teacher', 'epoch'"):
        read(tmp_path / "ema.pt")
    foreign = {"state_dict": tiny.state_dict(), "hyper_parameters": {"model": "b0", "config": {"lr": 1}}}
    torch.save(foreign, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="no published variant's"):  # TINY's sizes
        SegformerForSemanticSegmentation.from_pretrained(tmp_path / "foreign.ckpt")
