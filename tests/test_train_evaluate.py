"""The two scripts as a user runs them: train, evaluate, break, resume."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests import scripts
from tests.conftest import save
from tests.scripts import FILES, SHORT, SMALL, evaluate, only_run, report_of, rows, told, train

here, run = scripts.here, scripts.run
SINGLE = {"scales": [1.0], "flip": False, "stitch": "exact", "resize_logits": "once"}


def test_train_then_evaluate_gives_the_same_number(here, run) -> None:
    code, out, _ = run(train, *SMALL)
    assert code == 0
    folder = only_run(here)
    assert {path.name for path in folder.iterdir()} == FILES
    scores = rows(folder, "val/miou")
    assert list(scores) == [2, 5, 7]  # after 3, 6 and the last of 8 steps
    assert sorted(rows(folder, "train/loss")) == list(range(8))
    assert len(list((folder / "previews").iterdir())) == 3 * 4

    last_line = out.strip().splitlines()[-1]
    assert f"best val/miou {max(scores.values()):.4f}: " in last_line
    command = last_line.partition(": ")[2].split()
    assert Path(command[-2]).name == "evaluate.py"
    code, out, _ = run(evaluate, command[-1])
    assert code == 0
    path = here / out.strip().splitlines()[-1]
    report = json.loads(path.read_text())
    assert report["miou"] == pytest.approx(max(scores.values()), abs=1e-6)
    assert report["images"] == report["split_images"] == 5
    assert report["protocol"] == {"size": None, "align": 1, "window": None, "stride": None} | SINGLE
    assert {
        "miou",
        "macc",
        "aacc",
        "fwiou",
        "mdice",
        "mprecision",
        "per_class",
        "images",
        "protocol",
        "checkpoint",
        "versions",
    } <= report.keys()
    assert [row["name"] for row in report["per_class"]][:2] == ["sky", "building"]
    told = {"name", "color", "iou", "interval", "acc", "precision", "dice", "boundary_iou"}
    assert set(report["per_class"][0]) == told | {"pixels", "predicted_pixels", "images", "predicted_images"}
    low, high = report["intervals"]["miou"]
    assert low <= report["miou"] <= high and report["duplicates"] == 0 and report["published"] is None
    assert {file.name for file in path.parent.iterdir()} == {
        *("report.json", "report.md", "report.html", "images.json"),
    }
    assert path.with_suffix(".md").read_text().startswith("# mIoU ")
    assert path.parent.parent.name == "b0_toy" and path.parent.parent.parent.name == "reports"

    # from another folder, with another protocol
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    checkpoint = os.path.relpath(folder / "best.ckpt")
    code, out, _ = run(evaluate, f"checkpoint={checkpoint}")
    again = json.loads(Path(out.strip().splitlines()[-1]).read_text())
    assert again["miou"] == report["miou"] and again["per_class"] == report["per_class"]
    code, out, _ = run(evaluate, f"checkpoint={checkpoint}", "protocol.window=96", "protocol.stride=64")
    slid = json.loads(Path(out.strip().splitlines()[-1]).read_text())
    assert slid["protocol"]["window"] == [96, 96] and slid["images"] == 5
    assert "windows of 96 x 96 every 64 x 64" in Path(out.strip().splitlines()[-1]).with_suffix(".md").read_text()


def test_a_users_own_dataset_is_three_lines_of_yaml(here, run, potholes) -> None:
    (here / "my_configs" / "data").mkdir(parents=True)
    (here / "my_configs" / "data" / "potholes.yaml").write_text(
        f"defaults: [folder, _self_]\nroot: {potholes.name}\nclasses: [background, pothole]\n"
    )
    code, out, err = run(train, "-cd", "my_configs", "data=potholes", "model.pretrained=null", *SHORT)
    assert code == 0, err
    folder = only_run(here)
    assert folder.parent.name == "b0_potholes"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["data"]["root"] == str(potholes)  # made absolute
    code, out, _ = run(evaluate, f"checkpoint={folder / 'best.ckpt'}")  # no -cd: the checkpoint knows its data
    assert code == 0 and json.loads(Path(out.strip().splitlines()[-1]).read_text())["images"] == 3


NATIVE = ["model.pretrained=null", "data.crop_size=128", "data.batch_size=2", "data.workers=0", "trainer.max_steps=2"]


def test_ade20k_trains_and_is_scored_by_its_protocol(here, run, ade20k) -> None:
    code, out, err = run(train, "data=ade20k", f"data.root={ade20k}", *NATIVE)
    assert code == 0, err
    assert "4 train images, 3 val images, 150 classes, batch of 2" in out
    report = report_of(run(evaluate, f"checkpoint={only_run(here) / 'best.ckpt'}"))
    assert report["protocol"] == {"size": [2048, 512], "align": 32, "window": None, "stride": None} | SINGLE
    assert report["images"] == 3 and len(report["per_class"]) == 150


def label_train_ids(root: Path, folder: str = "gtFine", suffix: str = "labelTrainIds") -> None:
    """What csCreateTrainIdLabelImgs adds, here in place of the labelIds."""
    table = np.full(256, 255, np.uint8)
    table[[7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]] = range(19)
    for path in root.glob("gtFine/*/*/*_labelIds.png"):
        name = path.name.replace("labelIds", suffix)
        save(root / folder / path.parent.relative_to(root / "gtFine") / name, table[np.array(Image.open(path))])
        path.unlink()


def test_cityscapes_scores_the_same_from_label_ids_and_label_train_ids(here, run, cityscapes) -> None:
    code, out, err = run(train, "data=cityscapes", f"data.root={cityscapes}", *NATIVE)
    assert code == 0, err
    assert "4 train images, 4 val images, 19 classes" in out
    checkpoint = f"checkpoint={only_run(here) / 'best.ckpt'}"
    first = report_of(run(evaluate, checkpoint))
    assert first["protocol"] == {"size": None, "align": 1, "window": [1024, 1024], "stride": [768, 768]} | SINGLE
    label_train_ids(cityscapes)
    second = report_of(run(evaluate, checkpoint))
    assert second["images"] == 4 and second["per_class"] == first["per_class"] and second["miou"] == first["miou"]
    assert sum(row["pixels"] for row in first["per_class"]) > 0


def test_train_ids_under_another_name_are_not_taken_for_label_ids(here, run, cityscapes) -> None:
    label_train_ids(cityscapes, suffix="ids")
    command = ["data=cityscapes", f"data.root={cityscapes}", *NATIVE]
    command += [f"data.{split}.masks=gtFine/{split}/*/*_gtFine_ids.png" for split in ("train", "val")]
    assert "looks like train ids (255, and no other value above 18)" in told(run(train, *command))
    code, _, err = run(train, *command, 'data.train_ids="*"', "hydra.run.dir=again")
    assert code == 0, err


def test_the_samples_of_both_datasets_train(here, run, shared) -> None:
    roots = {"ade20k": shared / "ade20k_sample" / "ADEChallengeData2016", "cityscapes": shared / "cityscapes_sample"}
    for data, root in roots.items():
        code, _, err = run(train, f"data={data}", f"data.root={root}", "data.train=${data.val}", *NATIVE)
        assert code == 0, err
        (checkpoint,) = here.glob(f"runs/b0_{data}/*/best.ckpt")
        report = report_of(run(evaluate, f"checkpoint={checkpoint}"))
        assert report["images"] == {"ade20k": 2, "cityscapes": 1}[data]


def test_real_photographs_train(here, run, shared) -> None:
    limits = ["trainer.limit_val_batches=2", "data.crop_size=96"]
    code, _, err = run(train, "data=camvid", f"data.root={shared / 'camvid'}", *SHORT, *limits)
    assert code == 0, err
    assert rows(only_run(here), "val/miou")


def test_a_folder_that_cannot_be_written_is_one_sentence(here, run) -> None:
    (here / "file").touch()  # no folder can be made in a file, whoever one is
    assert "cannot write file/run: not a directory; check the path" in told(
        run(train, *SMALL, "hydra.run.dir=file/run")
    )


def test_debug_takes_two_whole_steps_and_writes_no_checkpoint(here, run) -> None:
    code, _, err = run(train, *SMALL, "trainer=debug", "trainer.max_steps=8", "data.micro_batch_size=1")
    assert code == 0 and "step 2 of 2" in err, err
    assert not list(here.rglob("*.ckpt"))


def test_half_weights_train_and_score(here, run) -> None:
    code, _, err = run(train, *SMALL, "trainer.max_steps=2", "trainer.precision=bf16-true")
    assert code == 0, err


def test_without_validation_the_last_step_is_kept(here, run) -> None:
    code, out, _ = run(train, *SMALL, "trainer.limit_val_batches=0")
    assert code == 0 and "nothing was scored" in out
    assert torch.load(only_run(here) / "last.ckpt", weights_only=True)["global_step"] == 8


BAD = {
    "misspelt key": (["trainer.max_step=3"], "unknown key 'trainer.max_step' (did you mean 'max_steps'?)"),
    "misspelt group": (["data=toyy"], "no config data=toyy (did you mean 'toy'?)"),
    "missing root": (["data=camvid"], "'data.root' is not set: add data.root="),
    "wrong root": (["data=camvid", "data.root=nowhere"], "nowhere is not a folder"),
    "misspelt inner key": (["model.drop_path_rat=0"], "unknown key 'model.drop_path_rat'"),
    "text for a number": (["optim.lr=fast"], "optim.lr is 'fast', expected a number"),
    "wrong crop": (["data.crop_size=big"], "data.crop_size is 'big', expected a positive integer or a list of two"),
    "wrong precision": (["trainer.precision=bf17"], "trainer: Precision 'bf17' is invalid"),
    "no steps": (["trainer.max_steps=0"], "trainer.max_steps is 0, expected an integer of at least 1"),
    "unknown logger": (["+logger.mine._target_=nowhere.Logger"], "nowhere.Logger"),
    "no such weights": (["model.pretrained=nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
    "a fraction of the images that is none": (["trainer.limit_val_batches=0.1"], "0.1 * 5 < 1"),
    "bad schedule": (["optim.loss_denominator=some"], "loss denominator is 'some'"),
    "weights that are one number": (["optim.class_weights=1.0"], "class_weights are 1.0, expected 8 factors"),
    "weights of nothing": (["optim.class_weights=[0,0,0,0,0,0,0,0]"], "not all of them 0"),
    "smoothing that is none": (["optim.label_smoothing=null"], "optim.label_smoothing is None, expected a number"),
    "a switch for a number": (["optim.ohem_threshold=true"], "optim.ohem_threshold is True, expected a number or null"),
    "a negative norm": (["trainer.gradient_clip_val=-1"], "gradient_clip_val is -1, expected a norm above 0"),
    "nothing to learn": (["model.freeze=[encoder,decode_head]"], "leaves nothing to learn"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(here, run, what) -> None:
    overrides, expected = BAD[what]
    sentence = told(run(train, *(SHORT if "data=camvid" in overrides else SMALL), *overrides))
    assert expected in sentence
    if what not in ("bad schedule", "a fraction of the images that is none"):  # found when the run folder stands
        assert not list(here.iterdir())


def test_a_bad_file_in_training_is_one_sentence_that_names_it(here, run, potholes) -> None:
    command = ["data=folder", f"data.root={potholes}", "data.classes=[background,pothole]", "model.pretrained=null"]
    command += [*SHORT, "data.workers=1"]
    path = potholes / "images/train/road 2 ü.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    sentence = told(run(train, *command))
    assert f"cannot read image {path}: " in sentence and "truncated" in sentence and "replace or remove" in sentence
    path.write_bytes(whole)
    save(potholes / "masks/train/road 2 ü.png", np.full((62, 80), 7, np.uint8))
    sentence = told(run(train, *command, "hydra.run.dir=again"))  # a folder is named by the second
    assert f"none of the 2 classes declares, in {potholes}/masks/train/road 2 ü.png (7 in" in sentence


def test_bad_masks_and_lonely_files_are_one_sentence(here, run, potholes) -> None:
    command = ["data=folder", f"data.root={potholes}", "model.pretrained=null", *SHORT]
    assert "none of the 1 classes declares" in told(run(train, *command, "data.classes=[background]"))
    (potholes / "masks/train/road 2 ü.png").unlink()
    assert "1 of 4 files have no mask" in told(run(train, *command, "data.classes=[background,pothole]"))


def test_evaluating_on_other_classes_is_refused(here, run, potholes) -> None:
    run(train, *SMALL, "trainer.max_steps=2")
    checkpoint = f"checkpoint={only_run(here) / 'best.ckpt'}"
    other = ["data=folder", f"data.root={potholes}", "data.classes=[background,pothole]", "data.workers=0"]
    assert "has 8 classes, the data 2" in told(run(evaluate, checkpoint, *other))
    assert "add data=NAME" in told(run(evaluate, checkpoint, f"data.root={potholes}"))
    assert "no checkpoint file at nowhere.ckpt" in told(run(evaluate, "checkpoint=nowhere.ckpt"))
    assert "'checkpoint' is not set" in told(run(evaluate))
    assert not (here / "reports").exists()


def test_a_folder_in_hugging_face_layout_is_scored_with_data(here, run) -> None:
    from segformer.__main__ import main as tools

    run(train, *SMALL, "trainer.max_steps=3")
    best = only_run(here) / "best.ckpt"
    tools(["convert", str(best), "model"])
    toy = ["data=toy", "data.val.scenes=5", "data.workers=0"]
    reports = [run(evaluate, f"checkpoint={source}", *toy)[1].strip().splitlines()[-1] for source in (best, "model")]
    first, second = (json.loads(Path(path).read_text()) for path in reports)
    assert first["miou"] == second["miou"]
    with pytest.raises(SystemExit):
        tools(["convert", str(best), "model"])  # never over an older one


def test_several_loggers_by_name(here, run) -> None:
    for folder in ("one", "two"):  # the second, as of a sweep in one process, does not log into the first
        options = ["trainer.max_steps=2", "logger=[tensorboard,wandb,mlflow]", f"hydra.run.dir={folder}"]
        code, _, err = run(train, *SMALL, *options)
        assert code == 0, err
        assert {"metrics.csv", "tensorboard", "wandb", "mlflow.db"} <= {path.name for path in (here / folder).iterdir()}


def test_debug_runs_two_steps_and_writes_nothing(here, run) -> None:
    code, out, _ = run(train, *SMALL, "trainer=debug")
    assert code == 0 and "nothing was scored" in out and not list(here.iterdir())


def test_a_classifier_is_trained_and_a_segmentation_run_starts_from_it(here, run) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name, colour in (("red", [200, 30, 30]), ("green", [30, 200, 30])):
            for index in range(count):
                picture = np.array(colour) + rng.integers(-25, 25, (48, 64, 3))
                save(here / "pictures" / split / name / f"{index}.png", picture.clip(0, 255).astype(np.uint8))
    short = ["data.root=pictures", "data.crop_size=32", "data.batch_size=6", "data.workers=0", "trainer.max_steps=20"]
    short += ["trainer.val_check_interval=10", "optim.warmup_steps=2", "data.mixup=0", "data.cutmix=0"]
    code, out, err = run(train, "task=classification", "data=imagenet", *short)
    assert code == 0, err
    assert "2 classes" in out and "model.pretrained=runs/b0_imagenet" in out.splitlines()[-1]
    folder = only_run(here)
    assert {path.name for path in folder.iterdir()} == FILES - {"previews"}
    assert list(rows(folder, "val/top5").values()) == [1.0, 1.0]  # two classes
    assert 0 <= rows(folder, "val/top1")[19] <= 1
    code, out, err = run(train, f"resume={folder}")  # it had ended
    assert code == 0, err
    best = folder / "best.ckpt"
    assert f"{best} is a classifier" in told(run(evaluate, f"checkpoint={best}"))
    code, out, err = run(train, *SMALL, "trainer.max_steps=2", f"model.pretrained={best}")
    assert code == 0, err
    assert f"loaded the encoder from {best}" in out and "decode head starts fresh" in out
    assert "task is 'clasification' (did you mean 'classification'?): choose from segmentation" in told(
        run(train, *SMALL, "task=clasification")
    )
