import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from segformer.__main__ import main
from segformer.config import SegformerConfig
from segformer.model import SegformerForSemanticSegmentation
from segformer.processor import SegformerImageProcessor
from tests.conftest import randomize
from tests.test_checkpoints import PIXELS
from tests.test_namings import as_mmseg, as_nvlabs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """B0 in its published sizes, saved as Hugging Face's."""
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(SegformerConfig.from_variant("b0", num_labels=150))
    randomize(model)
    path = tmp_path_factory.mktemp("b0") / "model"
    model.save_pretrained(path)
    return path


def told(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["convert", *map(str, arguments)])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_convert_to_nvlabs_and_back_is_bit_identical(folder, tmp_path, capsys) -> None:
    pth, back = tmp_path / "new" / "b0.pth", tmp_path / "back"
    main(["convert", str(folder), str(pth), "--to", "nvlabs"])
    out = capsys.readouterr().out
    assert "found 208 tensors in the names of Hugging Face's files: SegformerForSemanticSegmentation of 150" in out
    assert f"wrote {pth}: 194 tensors" in out and "filled decode_head.conv_seg" in out
    content = torch.load(pth, weights_only=True)
    assert len(content["state_dict"]) == 194 and content["meta"]["CLASSES"][149] == "LABEL_149"
    main(["convert", str(pth), str(back)])
    out = capsys.readouterr().out
    assert "found 194 tensors in the names of NVlabs" in out and "dropped decode_head.conv_seg" in out
    assert f"wrote {back}: config.json, model.safetensors, preprocessor_config.json; 208 tensors" in out
    before, after = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_folder_tells_transformers_how_images_are_prepared(folder, tmp_path, tiny) -> None:
    main(["convert", str(folder), str(tmp_path / "usual")])
    assert SegformerImageProcessor.from_pretrained(tmp_path / "usual").size == {"height": 512, "width": 512}
    kept = shutil.copytree(folder, tmp_path / "kept")
    SegformerImageProcessor(size=(320, 640), do_reduce_labels=True).save_pretrained(kept)
    main(["convert", str(kept), str(tmp_path / "again")])
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path / "again")
    assert dict(again.size) == {"height": 320, "width": 640} and again.do_reduce_labels is True
    run = {"model": tiny.config.to_dict(), "config": {"data": {"crop_size": 128, "train": {}, "val": {}}}}
    weights = {f"model.{name}": tensor for name, tensor in tiny.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": run}, tmp_path / "best.ckpt")
    main(["convert", str(tmp_path / "best.ckpt"), str(tmp_path / "trained")])
    assert SegformerImageProcessor.from_pretrained(tmp_path / "trained").size == {"height": 128, "width": 128}


def test_half_precision_stays_half_precision(folder, tmp_path) -> None:
    half = {
        name: t.half() if t.is_floating_point() else t for name, t in load_file(folder / "model.safetensors").items()
    }
    torch.save(half, tmp_path / "half.pt")
    main(["convert", str(tmp_path / "half.pt"), str(tmp_path / "half")])
    after = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in half.items())


def test_an_encoder_stays_an_encoder(folder, tmp_path, capsys) -> None:
    disk = {n: t for n, t in load_file(folder / "model.safetensors").items() if n.startswith("segformer.")}
    torch.save(as_mmseg(disk, ""), tmp_path / "mmseg.pth")
    main(["convert", str(tmp_path / "mmseg.pth"), str(tmp_path / "mit.pth"), "--to", "nvlabs"])
    assert "in the names of mmsegmentation: SegformerModel\n" in capsys.readouterr().out
    written, expected = torch.load(tmp_path / "mit.pth", weights_only=True), as_nvlabs(disk, "")
    assert written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in expected)


def test_an_imagenet_classifier_stays_a_classifier(folder, tmp_path, capsys) -> None:
    disk = {n: t for n, t in load_file(folder / "model.safetensors").items() if n.startswith("segformer.")}
    head = {"head.weight": torch.randn(1000, 256), "head.bias": torch.randn(1000)}
    torch.save(as_nvlabs(disk, "") | head, tmp_path / "mit_b0.pth")
    main(["convert", str(tmp_path / "mit_b0.pth"), str(tmp_path / "mit-b0")])
    assert "SegformerForImageClassification of 1000 classes" in capsys.readouterr().out
    written = load_file(tmp_path / "mit-b0" / "model.safetensors")
    assert torch.equal(written["classifier.weight"], head["head.weight"]) and len(written) == len(disk) + 2
    main(["convert", str(tmp_path / "mit-b0"), str(tmp_path / "again.pth"), "--to", "nvlabs"])
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    expected = as_nvlabs(disk, "") | head
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in expected)
    theirs = transformers.SegformerForImageClassification.from_pretrained(tmp_path / "mit-b0").eval()
    from segformer.model import SegformerForImageClassification

    ours = SegformerForImageClassification.from_pretrained(tmp_path / "mit-b0")
    torch.testing.assert_close(ours(PIXELS).logits, theirs(PIXELS).logits, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="classifier starts fresh .the checkpoint has none"):
        SegformerForImageClassification.from_pretrained(folder)  # of a segmentation model
    with pytest.raises(ValueError, match="classifier: .* has 1000 classes, the model has 3; to start a fresh"):
        SegformerForImageClassification.from_pretrained(tmp_path / "mit-b0", num_labels=3)


def test_nothing_is_overwritten(folder, tmp_path, capsys) -> None:
    taken = tmp_path / "taken.pth"
    taken.write_text("mine")
    assert "is there already" in told(capsys, folder, taken, "--to", "nvlabs")
    assert "is named like a file" in told(capsys, folder, taken)
    assert "is there already" in told(capsys, folder, tmp_path)
    assert "expected one that ends in .pth" in told(capsys, folder, tmp_path / "new", "--to", "nvlabs")
    assert taken.read_text() == "mine" and list(tmp_path.iterdir()) == [taken]


class _Settings:
    """What mmcv's `meta` may hold."""


def test_convert_reads_objects_only_when_told_to(folder, tmp_path, capsys) -> None:
    weights = as_nvlabs(load_file(folder / "model.safetensors"))
    torch.save({"meta": {"config": _Settings()}, "state_dict": weights}, tmp_path / "b0.pth")
    sentence = told(capsys, tmp_path / "b0.pth", tmp_path / "out")
    assert "can run any code" in sentence and "--allow-pickle" in sentence
    with pytest.warns(UserWarning, match="RUNS NOW"):
        main(["convert", str(tmp_path / "b0.pth"), str(tmp_path / "out"), "--allow-pickle"])
    assert (tmp_path / "out" / "NOTICE").is_file()


def test_what_cannot_be_converted_is_one_sentence(folder, tmp_path, capsys) -> None:
    torch.save({"state_dict": as_mmseg(load_file(folder / "model.safetensors"), head=True)}, tmp_path / "mmseg.pth")
    assert "mmsegmentation's decode head" in told(capsys, tmp_path / "mmseg.pth", tmp_path / "out")
    save_file({"fc.weight": torch.zeros(1)}, tmp_path / "resnet.safetensors")
    assert "not the names of a SegFormer" in told(capsys, tmp_path / "resnet.safetensors", tmp_path / "out")
    assert "name one, or add --to nvlabs" in told(capsys, folder, tmp_path / "b0.pth")
    assert not (tmp_path / "out").exists()


def checked(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `check`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["check", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err.splitlines()[-1] if err else ""


def test_check_takes_options_and_overrides_in_any_order(potholes, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    command = ["data=folder", "--show", 1, "data.classes=[background,pothole]", "--full", f"data.root={potholes}"]
    code, printed, _ = checked(capsys, *command, "--output", out, "data.crop_size=32")
    (folder,) = (out / "folder").iterdir()
    assert code == 0 and printed.splitlines()[-1] == str(folder)
    assert json.loads((folder / "check.json").read_text())["data"] == "folder"


def test_check_reads_choices_and_sources_of_a_users_own(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "configs" / "data").mkdir(parents=True)
    (tmp_path / "own_source.py").write_text(
        "import numpy as np\n\n\nclass Squares:\n"
        "    def __len__(self): return 3\n"
        "    def name(self, index): return f'square {index}'\n"
        "    def __getitem__(self, index):\n"
        "        return np.zeros((40, 40, 3), np.uint8), np.full((40, 40), index, np.uint8)\n"
    )
    (tmp_path / "configs" / "data" / "squares.yaml").write_text(
        "# @package _global_\ndefaults: [/loading@data, _self_]\ndata:\n  classes: [a, b]\n  batch_size: 2\n"
        "  crop_size: 32\n  train: {_target_: own_source.Squares}\n  val: {_target_: own_source.Squares}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, printed, _ = checked(capsys, "-cd", tmp_path / "configs", "data=squares", "--output", tmp_path / "out")
    assert code == 1 and "error: value 2, which none of the 2 classes declares, is in the masks" in printed
    assert "square 2, square 2" in printed


@pytest.mark.parametrize(
    ("make", "suggestion"),
    [
        (lambda mask: mask, "hold 2 values; name them by 'data.classes=[class_0, class_1]'"),
        (lambda mask: mask * 255, "'data.classes={class_0: {ids: [0]}, class_1: {ids: [255]}}' 'data.ignore=[]'"),
        (lambda mask: mask + 1, "'data.classes=[class_1, class_2]' data.reduce_zero_label=true"),
        (lambda mask: mask * 4 + 3, "'data.classes={class_0: {ids: [3]}, class_1: {ids: [7]}}'"),
        (
            lambda mask: np.array([[0, 0, 0], [9, 8, 7]], np.uint8)[mask],
            "2 colours; name them by data.mask_values=colors "
            "'data.classes={class_0: {color: [0, 0, 0]}, class_1: {color: [9, 8, 7]}}'",
        ),
    ],
)
def test_check_suggests_classes_where_none_are_given(make, suggestion, potholes, capsys) -> None:
    for path in potholes.glob("masks/*/*.png"):
        mask = make(np.array(Image.open(path)))
        Image.fromarray(mask).save(path)
    code, printed, error = checked(capsys, "data=folder", f"data.root={potholes}")
    assert code == 1 and error.startswith("error: 'data.classes' is not set: the 7 masks looked at hold ")
    assert error.endswith(suggestion) and len(printed.splitlines()) == 3


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["data=foldr"], "no config data=foldr (did you mean 'folder'?)"),
        (["data=folder", "data.crop_sze=3"], "unknown key 'data.crop_sze' (did you mean 'crop_size'?)"),
        (["data=folder"], "'data.root' is not set: add data.root=... to the command"),
        (["--show", "-1"], "--show is -1, expected a number of samples of at least 0"),
        (["-cd", "nowhere"], "nowhere is not a folder, expected one of configurations"),
        (
            ["data=camvid", "data.root=x", "data.ignore=some"],
            "data.ignore is 'some', expected a list of raw mask values",
        ),
    ],
)
def test_what_check_cannot_do_is_one_sentence(command, sentence, capsys) -> None:
    code, _, error = checked(capsys, *command)
    assert code == 1 and sentence in error


def test_check_measures_the_bands_that_training_asks_for(tmp_path, capsys) -> None:
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
        for number in range(2):
            np.save(tmp_path / "images" / split / f"{number}.npy", np.full((40, 40, 5), 10 * number, np.uint8))
            Image.new("L", (40, 40), number).save(tmp_path / "masks" / split / f"{number}.png")
    command = ["data=folder", f"data.root={tmp_path}", "data.classes=[a,b]", "data.bands=5", "data.crop_size=32"]
    code, printed, _ = checked(capsys, *command, "--full", "--output", tmp_path / "out")
    assert code == 0
    assert f"train: data.mean=[{','.join(['5.000'] * 5)}] data.std=[{','.join(['5.000'] * 5)}]" in printed
