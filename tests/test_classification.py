"""A classifier learns, is scored by hand counts, and its checkpoint starts a segmentation run."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from segformer import resume
from segformer.__main__ import main
from segformer.classification import ClassificationTask, Hits
from segformer.data.classification import ClassificationData
from segformer.errors import build
from segformer.model import SegformerForImageClassification, SegformerForSemanticSegmentation
from segformer.networks import build_classifier, build_segformer
from segformer.pixels import normalize
from tests.conftest import ROOT, randomize
from tests.data.test_classification_data import CLASSES, PLAIN, shapes
from tests.test_task import quiet

OPTIM = {
    "lr": 3e-3,
    "betas": [0.9, 0.999],
    "weight_decay": 0.05,
    "head_lr_multiplier": 1,
    "schedule": "cosine",
    "end_ratio": 0.01,
    "warmup_steps": 5,
    "warmup_ratio": 1e-3,
    "label_smoothing": 0.1,
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return shapes(tmp_path_factory.mktemp("data") / "shapes", train=16, val=7)


def loaders(tree: Path, **change) -> ClassificationData:
    section = PLAIN | {"root": str(tree), "batch_size": 12} | change
    return build("data", ClassificationData, section, seed=0).opened("train", "val")


@pytest.fixture(scope="module")
def run(tree, tmp_path_factory) -> tuple[pl.Trainer, Path]:
    """60 steps with everything on, and what they left behind."""
    torch.manual_seed(0)
    data = loaders(tree, mixup=0.8, cutmix=1.0, randaugment={}, random_erasing=0.25, scale=[0.4, 1.0])
    model, _ = build("model", build_classifier, {"variant": "b0", "drop_path_rate": 0.0}, **data.network)
    record = resume.record(model, {"data": PLAIN | {"root": str(tree)}, "choices": {"model": "b0"}})
    task = ClassificationTask(model, OPTIM, 60, hyper_parameters=record, **data.scoring)
    trainer, path = quiet(max_steps=60, val_check_interval=60), tmp_path_factory.mktemp("run") / "best.ckpt"
    resume.share_batches(trainer, data)
    trainer.fit(task, data)
    trainer.save_checkpoint(path)
    return trainer, path


def test_it_learns(run) -> None:
    trainer, _ = run
    assert trainer.callback_metrics["val/top1"] >= 0.8  # chance: a third
    assert trainer.callback_metrics["val/top5"] == 1  # of three classes
    assert trainer.lightning_module.images_scored == 21
    assert ClassificationTask.MONITOR in trainer.callback_metrics


def test_the_score_is_a_hand_count(run, tree) -> None:
    trainer, path = run
    data, model = loaders(tree).datasets["val"], SegformerForImageClassification.from_pretrained(path)
    with torch.inference_mode():
        logits = [model(normalize(sample["image"][None])).logits for sample in data]
    right = sum(int(one.argmax()) == sample["label"] for one, sample in zip(logits, data, strict=True))
    assert trainer.callback_metrics["val/top1"] == pytest.approx(right / 21)


def test_hits_are_counted_among_the_likeliest_five() -> None:
    logits, label, hits = torch.randn(40, 9), torch.randint(0, 9, (40,)), Hits()
    for part in (slice(0, 7), slice(7, 40)):
        hits.update(logits[part], label[part])
    ranks = [sorted(row.tolist(), reverse=True).index(row[one]) for row, one in zip(logits, label, strict=True)]
    assert hits.compute().tolist() == [40, sum(rank == 0 for rank in ranks), sum(rank < 5 for rank in ranks)]
    hits.reset()
    assert hits.counts.tolist() == [0, 0, 0]


def validated(tree: Path, processes: int) -> dict[str, float]:
    data = loaders(tree)
    model, _ = build_classifier(**data.network, variant="b0")
    randomize(model)
    strategy = {"strategy": "ddp_fork"} if processes > 1 else {}
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(**options, **strategy, **resume.LOOP, devices=processes)
    return trainer.validate(ClassificationTask(model), data, verbose=False)[0]


def test_two_processes_score_each_image_once(tree) -> None:
    """21 images: one process has one more than the other."""
    torch.manual_seed(0)
    alone = validated(tree, 1)
    torch.manual_seed(0)
    assert validated(tree, 2) == alone and 0 < alone["val/top1"] < 1


@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_is_the_smoothed_cross_entropy_with_the_probabilities(soft) -> None:
    model, _ = build_classifier(CLASSES, "b0", drop_path_rate=0.0)
    task = ClassificationTask(model, {"label_smoothing": 0.1})
    images, shares = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.eye(3)[[0, 2, 1, 1]]
    label = shares.argmax(1)
    if soft:
        label = shares = 0.3 * shares + 0.7 * shares.roll(1, 0)
    targets = 0.9 * shares + 0.1 / 3
    expected = -(targets * model(normalize(images)).logits.log_softmax(1)).sum(1).mean()
    with torch.autocast("cpu", torch.bfloat16):
        assert task.loss_of({"image": images, "label": label}).dtype == torch.float32
    assert task.loss_of({"image": images, "label": label}).item() == pytest.approx(expected.item(), rel=1e-5)


def test_its_checkpoint_starts_a_segmentation_run(run) -> None:
    _, path = run
    model, told = build_segformer(["road", "sky"], "b0", pretrained=str(path))
    assert told == f"loaded the encoder from {path}; the decode head starts fresh (the checkpoint has none)"
    stored = torch.load(path, weights_only=True)["state_dict"]
    encoder = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("segformer.")}
    assert len(encoder) > 100 and all(torch.equal(stored[f"model.{name}"], encoder[name]) for name in encoder)
    assert model.decode_head.classifier.out_channels == 2 and not hasattr(model, "classifier")
    with pytest.warns(UserWarning, match="decode_head starts fresh"):
        SegformerForSemanticSegmentation.from_pretrained(path)


def test_a_classifier_starts_from_its_likes(run, tmp_path) -> None:
    """The same classes take the linear layer along; other classes, and an encoder alone, leave it fresh."""
    _, path = run
    stored = torch.load(path, weights_only=True)["state_dict"]
    same, told = build_classifier(CLASSES, "b0", pretrained=str(path))
    assert told == f"loaded encoder and classifier from {path}" and same.training
    assert all(torch.equal(stored[f"model.{name}"], tensor) for name, tensor in same.state_dict().items())
    other, told = build_classifier([*CLASSES, "eel"], "b0", pretrained=str(path))
    assert told.endswith("; the classifier starts fresh (the checkpoint has 3 classes, the data 4)")
    assert other.classifier.out_features == 4
    SegformerForSemanticSegmentation(other.config).save_pretrained(tmp_path / "folder")
    _, told = build_classifier(CLASSES, "b0", pretrained=str(tmp_path / "folder"))
    assert told.endswith("; the classifier starts fresh (the checkpoint has none)")


def test_transformers_loads_what_convert_makes_of_it(run, tmp_path, capsys) -> None:
    _, path = run
    main(["convert", str(path), str(tmp_path / "folder")])
    assert "SegformerForImageClassification of 3 classes" in capsys.readouterr().out
    theirs = transformers.SegformerForImageClassification.from_pretrained(tmp_path / "folder").eval()
    ours = SegformerForImageClassification.from_pretrained(path)
    assert theirs.config.id2label == ours.config.id2label == dict(enumerate(CLASSES))
    pixels = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(ours(pixels).logits, theirs(pixels).logits, rtol=1e-4, atol=1e-4)
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "folder").size["height"] == 32


def test_a_run_that_goes_on_takes_the_same_steps(tree, tmp_path) -> None:
    """With mixing, drop-path and two workers: losses after step 2 of a resumed run are those of the unbroken one."""

    def losses(steps: int, start: Path | None = None) -> list[float]:
        torch.manual_seed(0)
        data = loaders(tree, mixup=0.8, cutmix=1.0, randaugment={}, workers=2 if start else 0)
        model, _ = build_classifier(**data.network, variant="b0")
        task = ClassificationTask(model, OPTIM, 4, hyper_parameters={"model": model.config.to_dict(), "config": {}})
        found: list[float] = []
        seen = Watch(found)
        trainer = quiet(max_steps=steps, val_check_interval=4, limit_val_batches=0, callbacks=[seen])
        resume.share_batches(trainer, data)
        trainer.fit(task, data, ckpt_path=start, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return found

    whole = losses(4)
    assert losses(2) == whole[:2]
    assert losses(4, tmp_path / "2.ckpt") == whole[2:]


IMAGES, BATCH = 1_281_167, 1024  # of ImageNet-1k's training set, of DeiT's recipe


@pytest.mark.parametrize("variant", ["b0", "b5"])
def test_one_word_is_deits_recipe_in_steps(variant) -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        overrides = ["data=imagenet", f"model={variant}", "data.root=/data", "data.classes=[cat,dog]"]
        config = OmegaConf.to_container(compose("train", overrides), resolve=True, throw_on_missing=True)
    data, steps = build("data", ClassificationData, config["data"], seed=0), config["trainer"]["max_steps"]
    assert (data.batch_size, data.crop_size, data.mixup, data.cutmix) == (BATCH, (224, 224), 0.8, 1.0)
    assert (data.random_erasing, data.randaugment) == (0.25, {"num_ops": 2, "magnitude": 9})
    assert steps == round(300 * IMAGES / BATCH) and config["trainer"]["val_check_interval"] == IMAGES // BATCH
    model, told = build("model", build_classifier, config["model"], **data.network)
    assert told == "all weights start fresh" and model.config.drop_path_rate == 0.1 and model.config.num_labels == 2
    task = ClassificationTask(model, config["optim"], steps)
    assert task.loss == {"label_smoothing": 0.1}
    schedule = task.configure_optimizers()["lr_scheduler"]["scheduler"]
    factor, warm = schedule.lr_lambdas[0], round(5 * IMAGES / BATCH)
    assert schedule.base_lrs == [1e-3] * 3 and config["optim"]["warmup_steps"] == warm
    assert factor(0) == pytest.approx(1e-3) and factor(warm) == pytest.approx(1, abs=1e-3)
    assert 1e-3 * factor(steps) == pytest.approx(1e-5)
    assert [group["weight_decay"] for group in schedule.optimizer.param_groups] == [0.05, 0.0, 0.05]


class Watch(pl.Callback):
    def __init__(self, found: list[float]) -> None:
        self.found = found

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        self.found.append(float(task.step_loss))
