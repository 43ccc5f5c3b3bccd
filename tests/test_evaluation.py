"""evaluate.py beyond a number: the report of record, label maps in files, corrupted images."""

import json
import shutil
import sys
from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image

from segformer.corruptions import FAMILIES
from segformer.data.datamodule import SegmentationData
from segformer.data.samples import Sample, Stream
from segformer.data.toy import ToyScenes
from segformer.errors import UserError, build
from segformer.evaluation import Counting, _chosen, plan, validate
from segformer.inference import Protocol, segment
from segformer.metrics import Tally
from segformer.task import SegmentationTask
from tests import scripts
from tests.conftest import TOY, randomize, small
from tests.scripts import SMALL, evaluate, only_run, report_of, told, train
from tests.test_task import quiet

here, run = scripts.here, scripts.run


def counted(scenes: int, **more) -> tuple[Counting, SegmentationTask]:
    data = build("data", SegmentationData, TOY | {"val": {"scenes": scenes, "seed": 1}} | more).opened("val")
    model = small(data.classes.names)
    randomize(model)
    task, counting = SegmentationTask(model, Protocol()), Counting(data)
    trainer = quiet()
    trainer.callbacks.append(counting)
    trainer.validate(task, data, verbose=False)
    return counting, task


def test_the_images_add_up_to_the_score_of_validation_and_the_gallery_shows_what_was_scored() -> None:
    counting, task = counted(7)
    np.testing.assert_array_equal(counting.counts.tally.confusion()[:, :-1].sum(axis=1), task.scores.pixels)
    np.testing.assert_array_equal(counting.counts.tally.confusion().sum(axis=0)[:-1], task.scores.predicted)
    assert counting.counts.tally.names == [f"scene_1_{number:05d}" for number in range(7)] and counting.seconds > 0
    assert [example["rank"] for example in counting.gallery] == ["worst"] * 3 + ["median"] + ["best"] * 3
    for example in counting.gallery:
        image = torch.from_numpy(np.array(example["image"])).permute(2, 0, 1)[None]
        np.testing.assert_array_equal(segment(task.model, image)[0], example["prediction"])
        again = Counting(counting.data).counts.count(example["prediction"], example["label"])
        np.testing.assert_array_equal(np.argwhere(again.matrix), counting.counts.tally.cells[example["name"]][:, :2])


@pytest.mark.parametrize("images", range(1, 30))
def test_the_gallery_holds_the_worst_the_middle_and_the_best_each_once(images) -> None:
    tally = Tally(2)
    for index in np.random.default_rng(0).permutation(images):
        tally.add(f"{index:02d}", np.array([[index, images - index], [0, 0]]))  # IoU grows with the index
    tally.add("nothing labelled", np.zeros((2, 2), int))
    chosen = _chosen(tally)
    ranks = {
        rank: [int(name) for name, (own, _) in chosen.items() if own == rank] for rank in ("worst", "median", "best")
    }
    each = min(4, -(-images // 3))
    assert ranks["worst"] == list(range(each)) and len(chosen) == min(images, 12)
    assert ranks["best"] == list(range(images - 1, max(images - 1 - each, each - 1), -1))
    if images >= 12:
        assert ranks["median"] == list(range(images // 2 - 2, images // 2 + 2))


def test_without_instance_maps_iiou_is_left_out_and_told(cityscapes, capsys) -> None:
    gone = sorted(cityscapes.glob("gtFine/val/*/*_instanceIds.png"))[1]
    gone.unlink()
    from tests.test_configs import composed

    section = composed("data=cityscapes", f"data.root={cityscapes}")["data"]
    data = build("data", SegmentationData, section).opened("val")
    assert Counting(data).instances == {}
    mask = str(gone).replace("instanceIds", "labelIds")
    assert f"no instance map beside mask {mask}: iIoU is left out" in capsys.readouterr().err


NATIVE = ["model.pretrained=null", "data.crop_size=128", "data.batch_size=2", "data.workers=0", "trainer.max_steps=2"]


def official(root: Path, submission: Path, monkeypatch) -> dict:
    """What Cityscapes' own script makes of the files."""
    script = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
        reason="equality with the official script needs cityscapesscripts",
    )
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # the script still calls what numpy 2.4 has dropped
    options = copy(script.args)
    options.quiet, options.JSONOutput, options.predictionPath, options.predictionWalk = (
        True,
        False,
        str(submission),
        None,
    )
    truths = sorted(map(str, root.glob("gtFine/val/*/*_labelIds.png")))
    return script.evaluateImgLists([script.getPrediction(options, truth) for truth in truths], truths, options)


def test_a_cityscapes_submission_is_scored_alike_by_the_official_script(here, run, cityscapes, monkeypatch) -> None:
    code, _, err = run(train, "data=cityscapes", f"data.root={cityscapes}", *NATIVE)
    assert code == 0, err
    checkpoint = only_run(here) / "best.ckpt"
    report = report_of(run(evaluate, f"checkpoint={checkpoint}", "submission=cityscapes"))
    (folder,) = here.glob("reports/*/*/submission")
    theirs = official(cityscapes, folder, monkeypatch)
    ours = report["cityscapes"]
    assert report["miou"] == pytest.approx(theirs["averageScoreClasses"], abs=1e-12)
    assert ours["category_iou"] == pytest.approx(theirs["averageScoreCategories"], abs=1e-12)
    assert ours["iiou"] == pytest.approx(theirs["averageScoreInstClasses"], abs=1e-12)
    assert ours["category_iiou"] == pytest.approx(theirs["averageScoreInstCategories"], abs=1e-12)
    assert ours["per_class"] == pytest.approx({name: theirs["classInstScores"][name] for name in ours["per_class"]})
    assert report["published"]["miou"] == 0.762 and len(report["weights_sha256"]) == 64

    data = ["data=cityscapes", f"data.root={cityscapes}"]
    shutil.make_archive(str(here / "packed"), "zip", cityscapes)
    packed = report_of(run(evaluate, f"checkpoint={checkpoint}", data[0], "data.root=packed.zip", "data.workers=0"))
    assert packed["cityscapes"] == ours  # instance maps are found in an archive, too
    refused = told(run(evaluate, f"predictions={folder}", *data, "data.ignore=[255]"))
    assert "values that none of the 19 classes declares, in " in refused and "_gtFine_labelIds.png (" in refused
    again = report_of(run(evaluate, f"predictions={folder}", *data))
    same = ("miou", "per_class", "cityscapes", "confusion", "boundary_miou", "intervals", "images")
    assert all(again[key] == report[key] for key in same) and again["checkpoint"] is None


def test_label_maps_come_back_from_files_with_the_same_scores_image_by_image(here, run) -> None:
    run(train, *SMALL, "trainer.max_steps=3")
    checkpoint = f"checkpoint={only_run(here) / 'best.ckpt'}"
    code, out, err = run(evaluate, checkpoint, "submission=train_ids", "protocol.flip=true", "protocol.scales=[0.5,1]")
    assert code == 0, err
    first = Path(out.strip().splitlines()[-1])
    report = json.loads(first.read_text())
    assert report["protocol"]["flip"] and "scales 0.5, 1 and their mirror images" in report["protocol_line"]
    toy = ["data=toy", "data.val.scenes=5", "predictions_values=train"]
    code, out, err = run(evaluate, f"predictions={first.parent / 'submission'}", *toy)
    second = Path(out.strip().splitlines()[-1])
    assert second.parent.parent.name == "predictions_toy"
    assert second.with_name("images.json").read_text() == first.with_name("images.json").read_text()
    page = second.with_name("report.html").read_text()
    assert page.count("scene_1_0000") >= 5 and f"{first.parent / 'submission'}" in page

    code, out, err = run(evaluate, checkpoint, "submission=ids", "trainer.limit_val_batches=2")
    assert code == 0 and "warning: 2 of 5 label maps were written" in err
    assert json.loads(Path(out.strip().splitlines()[-1]).read_text())["images"] == 2
    assert report_of(run(evaluate, checkpoint, "trainer.limit_val_batches=1"))["images"] == 1


def test_images_without_masks_are_submitted_and_not_scored(here, run, ade20k) -> None:
    run(train, "data=ade20k", f"data.root={ade20k}", *NATIVE)
    checkpoint = f"checkpoint={only_run(here) / 'best.ckpt'}"
    (ade20k / "testing").mkdir()
    for index in range(2):
        Image.fromarray(np.full((40, 60 + index, 3), 99, np.uint8)).save(ade20k / f"testing/ADE_test_{index:08d}.jpg")
    test = ["data=ade20k_test", f"data.root={ade20k}", "data.workers=0"]
    assert "has images without masks" in told(run(evaluate, checkpoint, *test))
    code, out, err = run(evaluate, checkpoint, *test, "submission=ade")
    assert code == 0, err
    archive = Path(out.strip().splitlines()[-1])
    code, out, err = run(evaluate, checkpoint, *test, "submission=ade", "trainer.limit_val_batches=1")
    assert code == 0 and out.strip().endswith("/submission") and "1 of 2 label maps were written" in err
    assert archive.name == "submission.zip" and archive.is_file() and not list(archive.parent.glob("report.*"))
    with Image.open(archive.parent / "submission/ADE_test_00000001.png") as image:
        assert image.size == (61, 40) and np.array(image).min() >= 1


def test_the_table_of_corruptions_starts_from_the_clean_score(here, run) -> None:
    pytest.importorskip("imagecorruptions", reason="corruptions need the extra robust")
    run(train, *SMALL, "trainer.max_steps=3")
    checkpoint = f"checkpoint={only_run(here) / 'best.ckpt'}"
    few = ["corruptions=cityscapes_c", "corruptions.names=[contrast,fog]", "corruptions.severities=[1,5]"]
    code, out, err = run(evaluate, checkpoint, *few)
    assert code == 0, err
    path = Path(out.strip().splitlines()[-1])
    report, table = json.loads(path.read_text()), json.loads(path.with_name("corruptions.json").read_text())
    assert table["clean"] == report["miou"] and "contrast 5: mIoU" in err
    rows = {row["name"].partition(" (")[0]: row for row in table["rows"]}
    assert set(rows) == {"contrast", "digital", "fog", "weather", "all corruptions"}
    scores = [score for score in rows["fog"]["scores"] if score is not None]
    assert rows["fog"]["mean"] == pytest.approx(np.mean(scores)) and len(scores) == 2 and report["images"] == 5
    assert rows["fog"]["relative"] == pytest.approx(rows["fog"]["mean"] / report["miou"])
    assert path.with_name("corruptions.md").read_text() in out


BAD = {
    "nothing to score": ([], "'checkpoint' is not set: add checkpoint=PATH"),
    "two things": (["checkpoint=a.ckpt", "predictions=b"], "are two things: score one of them"),
    "predictions of what": (["predictions=b"], "predictions=FOLDER needs data=NAME"),
    "predictions and a submission": (["predictions=b", "data=toy", "submission=ids"], "no submission or corruptions"),
    "an empty name": (["predictions="], "'checkpoint' is not set: add checkpoint=PATH"),
    "a part of predictions": (["predictions=b", "data=toy", "trainer.limit_val_batches=2"], "scored as they are"),
    "predictions by a protocol": (["predictions=b", "data=toy", "protocol.flip=true"], "scored as they are"),
    "no such folder": (["predictions=b", "data=toy"], "predictions=b is not a folder or zip file"),
    "unknown values": (["predictions=.", "data=toy", "predictions_values=rgb"], "predictions_values is 'rgb'"),
}


@pytest.mark.parametrize("what", BAD)
def test_keys_that_do_not_go_together_are_one_sentence(here, run, what) -> None:
    overrides, sentence = BAD[what]
    assert sentence in told(run(evaluate, *overrides))
    assert not list(here.iterdir())


def test_what_cannot_be_done_with_a_checkpoint_is_one_sentence(here, run, monkeypatch) -> None:
    run(train, *SMALL, "trainer.max_steps=2")
    checkpoint = f"checkpoint={only_run(here) / 'best.ckpt'}"
    assert "submission is 'adee' (did you mean 'ade'?)" in told(run(evaluate, checkpoint, "submission=adee"))
    assert "submission=ade is for the 150 classes" in told(run(evaluate, checkpoint, "submission=ade"))
    plan = [checkpoint, "corruptions=cityscapes_c"]
    assert "corruptions.names is [], expected a list" in told(run(evaluate, *plan, "corruptions.names=[]"))
    assert "unknown key 'corruptions.sevrities'" in told(run(evaluate, *plan, "+corruptions.sevrities=[1]"))
    assert "no corruption 'fogg' (did you mean 'fog'?)" in told(run(evaluate, *plan, "corruptions.names=[fogg]"))
    assert "severity 6 of fog" in told(run(evaluate, *plan, "corruptions.names=[fog]", "corruptions.severities=[6]"))
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    assert 'pip install "segformer[robust]"' in told(run(evaluate, *plan))
    assert not list(here.glob("reports/*/*"))


def test_corruptions_that_cannot_be_are_refused_before_anything_is_scored(ade20k) -> None:
    from tests.test_configs import composed

    section = composed("data=ade20k", f"data.root={ade20k}")["data"]
    asked = {"corruptions": {"names": ["fog"], "severities": [1]}}
    unlabelled = section | {"val": {"images": "images/validation/*.jpg", "masks": None}}
    bands = section | {"bands": 4, "mean": [0.0] * 4, "std": [1.0] * 4}
    for own, sentence in ((unlabelled, "images without masks: leave out corruptions"), (bands, "data.bands is 4, but")):
        data = build("data", SegmentationData, own)
        data.labels_needed = False
        with pytest.raises(UserError, match=sentence):
            plan(asked, data.opened("val"))
        assert plan({}, data) is None
    data = build("data", SegmentationData, section).opened("val")
    for names in ([["fog"]], [None], ["fog", "fog"], "fog"):
        with pytest.raises(UserError, match="corruptions.names is .*, expected a list of different ones"):
            plan({"corruptions": {"names": names, "severities": [1]}}, data)


def test_a_signal_to_stop_is_no_success(capsys) -> None:
    class Stopped:
        def validate(self, *_, **__) -> None:
            raise SIGTERMException

    with pytest.raises(SystemExit) as stop:
        validate(Stopped(), None, None)
    assert stop.value.code == 143 and "stopped by a signal before all images were scored" in capsys.readouterr().err


def test_two_samples_of_one_name_are_told_before_any_is_scored() -> None:
    class Twins:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int):
            return np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)

        def name(self, index: int) -> str:
            return "twin"

    data = build("data", SegmentationData, TOY | {"val": Twins()}).opened("val")
    with pytest.raises(UserError, match="two samples are called 'twin'"):
        Counting(data)


def test_the_configuration_lists_all_corruptions() -> None:
    import yaml

    from tests.test_configs import CONFIGS

    names = yaml.safe_load((CONFIGS / "corruptions/cityscapes_c.yaml").read_text())["names"]
    assert names == [name for family in FAMILIES.values() for name in family]


def test_samples_of_a_stream_are_called_as_on_any_other_machine(tmp_path) -> None:
    class Rows(Stream):
        def shard(self, index: int, count: int, epoch: int | None = None):
            for number in range(index, 4, count):
                scene = ToyScenes(4, 1)[number]
                yield Sample(f"{tmp_path}/part[{number}].png", lambda scene=scene: scene)

    counting, _ = counted(0, val=Rows())
    assert counting.counts.tally.names == [f"part[{number}].png" for number in range(4)]
    assert not counting.gallery  # a stream is not read twice
