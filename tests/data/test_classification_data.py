"""Folders of classes and tables of labels, as the training loop of a classifier sees them."""

import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import v2

from segformer.data.classification import Augmentation, Centre, ClassificationData, Mix
from segformer.data.sampler import Draw
from segformer.errors import SharedError, UserError, build
from segformer.inference import normalized
from segformer.networks import build_classifier
from tests.conftest import save
from tests.test_task import quiet

CLASSES = ["bird", "cat ü", "dog"]
PLAIN = {
    "train": {"images": "train/*/*"},
    "val": {"images": "val/*/*"},
    "batch_size": 6,
    "crop_size": 32,
    "workers": 0,
}
STRONG = {"randaugment": {"num_ops": 2, "magnitude": 9}, "random_erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}


def picture(kind: int, draw: np.random.Generator) -> Image.Image:
    """A red disc, a green box or a blue cross on grey noise."""
    width, height = (int(side) for side in draw.integers(40, 70, 2))
    image = Image.fromarray(draw.integers(90, 160, (height, width, 3), np.uint8))
    pen, x, y = ImageDraw.Draw(image), width // 2, height // 2
    if kind == 0:
        pen.ellipse((x - 15, y - 15, x + 15, y + 15), (220, 30, 30))
    elif kind == 1:
        pen.rectangle((x - 15, y - 15, x + 15, y + 15), (30, 200, 30))
    else:
        pen.line((x - 18, y - 18, x + 18, y + 18), (30, 30, 220), 9)
        pen.line((x - 18, y + 18, x + 18, y - 18), (30, 30, 220), 9)
    return image


def shapes(root: Path, train: int = 6, val: int = 4) -> Path:
    draw = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture(kind, draw).save(folder / f"{number}.{'png' if number % 2 else 'jpg'}")
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return shapes(tmp_path / "shapes")


def opened(root: Path | str | None, *splits: str, **change) -> ClassificationData:
    return build("data", ClassificationData, PLAIN | {"root": root and str(root)} | change, seed=0).opened(*splits)


def batches(root: Path, count: int, start: int = 0, **change) -> list[dict[str, torch.Tensor]]:
    data = opened(root, "train", **change)
    data.trainer = quiet(max_steps=1)
    data.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = start
    found = iter(data.train_dataloader())
    return [next(found) for _ in range(count)]


def test_the_class_is_the_folder_and_the_order_the_alphabets(tree) -> None:
    data = opened(tree, "train", "val")
    assert list(data.classes) == CLASSES and data.summary() == "18 train images, 12 val images, 3 classes, batch of 6"
    source = data.datasets["train"].source
    names = [source.name(index) for index in range(18)]
    assert names == sorted(str(path) for path in (tree / "train").glob("*/*"))
    assert [CLASSES[label] for label in source.labels] == [Path(name).parent.name for name in names]
    model, told = build_classifier(**data.network, variant="b0")
    assert model.config.id2label == dict(enumerate(CLASSES)) and told == "all weights start fresh"
    assert data.scoring == {}


def test_named_classes_give_the_order(tree) -> None:
    data = opened(tree, "train", classes=["dog", "bird", "cat ü"])
    source = data.datasets["train"].source
    assert source.labels.tolist() == [1] * 6 + [2] * 6 + [0] * 6
    assert data.network["names"] == ["dog", "bird", "cat ü"]


def test_a_zip_file_is_read_where_it_lies(tree, tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "shapes.zip", "w") as archive:
        for path in sorted(tree.rglob("*.*")):
            archive.write(path, path.relative_to(tree))
    packed, plain = opened(tmp_path / "shapes.zip", "train", "val"), opened(tree, "train", "val")
    assert packed.classes == plain.classes and packed.images("train") == 18
    for index in range(12):
        ours, theirs = packed.datasets["val"][index], plain.datasets["val"][index]
        assert ours["label"] == theirs["label"] and torch.equal(ours["image"], theirs["image"])
    assert packed.datasets["val"].source.name(0) == f"{tmp_path}/shapes.zip/val/bird/0.jpg"


def test_one_class_may_lie_in_folders_of_several_parts(tree) -> None:
    split = opened(tree, "val", val={"images": "*/*/*"})
    assert list(split.classes) == CLASSES and split.images("val") == 30
    assert split.datasets["val"].source.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10


def test_the_list_of_a_million_files_weighs_little(tmp_path) -> None:
    """Each worker would otherwise have a copy of every path as soon as it counts references to it."""
    data = opened(shapes(tmp_path / "many", train=50), "train")
    assert len(pickle.dumps(data.datasets["train"].source)) / 150 < 40


@pytest.fixture
def table(tmp_path: Path) -> Path:
    draw = np.random.default_rng(1)
    rows = {"image": [picture(number % 3, draw) for number in range(9)], "label": [number % 3 for number in range(9)]}
    rows["word"] = [CLASSES[label] for label in rows["label"]]
    rows["fine"] = [label + 5 for label in rows["label"]]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "bird", "cat ü"])}
    features |= {"word": datasets.Value("string"), "fine": datasets.Value("int64")}
    split = datasets.Dataset.from_dict(rows, datasets.Features(features))
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "table")
    return tmp_path / "table"


def test_a_hugging_face_table_tells_images_and_labels_by_its_types(table) -> None:
    data = opened(table, "train", "val", train={"split": "train"}, val={"split": "test"})
    assert list(data.classes) == ["dog", "bird", "cat ü"] and data.images("val") == 9
    stored = datasets.load_from_disk(str(table))["test"]
    for index in (0, 4, 8):
        sample = data.datasets["val"][index]
        pixels = np.array(v2.CenterCrop(32)(v2.Resize(37)(stored[index]["image"].convert("RGB"))))
        assert sample["label"] == stored[index]["label"] and np.array_equal(sample["image"].permute(1, 2, 0), pixels)


@pytest.mark.parametrize(("label", "names"), [("word", CLASSES), ("fine", ["5", "6", "7"])])
def test_labels_of_a_table_may_be_words_or_numbers(table, label, names) -> None:
    section = {"split": "train", "label": label}
    data = opened(table, "train", train=section)
    assert list(data.classes) == names
    assert data.datasets["train"].source.labels.tolist() == [0, 1, 2] * 3


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"split": "val"}, "has no split 'val': it has train, test"),
        ({"split": "train", "label": "labels"}, "no column of the label is called 'labels'.*did you mean 'label'"),
        ({"split": "train", "image": "word"}, "no column of the image is called 'word'.*image .Image., label .Class"),
        ({"split": "train", "streaming": True}, "unknown key 'data.train.streaming'"),
    ],
)
def test_a_table_that_does_not_fit_is_told(table, section, message) -> None:
    with pytest.raises(UserError, match=message) as told:
        opened(table, "train", train=section)
    assert "\n" not in str(told.value)


def test_rows_without_a_class_are_told(tmp_path) -> None:
    rows = {"image": [picture(0, np.random.default_rng(0))] * 3, "label": [0, 1, -1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "table")
    with pytest.raises(UserError, match=r"table train\[2\].label is -1, which is no class: give a labelled data.train"):
        opened(tmp_path / "table", "train", train={"split": "train"})


def bare(root: Path) -> None:
    for path in sorted((root / "train").glob("*/*")):
        path.replace(root / "train" / f"{path.parent.name}{path.name}")
    for name in CLASSES:
        (root / "train" / name).rmdir()


@pytest.mark.parametrize(
    ("harm", "change", "message"),
    [
        (bare, {}, r"shapes/train/\* names 0 class folders .none., expected two or more, each with the images of its"),
        (lambda root: (root / "train" / "empty").mkdir(), {}, r"class folder .*train/empty holds no image: add images"),
        (lambda root: (root / "val" / "dog").rename(root / "val" / "dogs"), {},
         "data.val has 1 classes that data.train has not, first 'dogs' .did you mean 'dog'..: expected the same 3"),
        (lambda root: [path.unlink() for path in (root / "val" / "dog").iterdir()], {}, "val/dog holds no"),
        (lambda root: save(root / "val" / "eel" / "1.png", np.zeros((9, 9, 3), np.uint8)), {}, "first 'eel'"),
        (lambda root: save(root / "train" / "eel" / "1.png", np.zeros((9, 9, 3), np.uint8)), {},
         "data.train has 1 classes that data.val has not, first 'eel': expected the same 4 classes"),
        (None, {"classes": ["bird", "dog"]}, "data.train has 1 classes that data.classes has not, first 'cat ü'"),
        (None, {"classes": [*CLASSES, "eel"]}, "data.classes has 1 classes that data.train has not, first 'eel'"),
        (None, {"classes": ["bird", "bird"]}, "data.classes is .'bird', 'bird'., expected two or more different"),
        (None, {"train": {"images": "train/*/*.tif"}}, r"class folder .*train/bird holds no \*.tif"),
        (None, {"train": {"images": "train/dog/*"}}, "names 1 class folders .dog., expected two"),
        (None, {"train": {"images": "*"}}, r"data.train.images is '\*', expected a path below data.root"),
        (None, {"train": {"images": "../*/*"}}, "data.train.images is '../"),
        (None, {"train": {"images": "train/*/*", "split": "train"}}, "for a Hugging Face dataset, and not both: null"),
        (None, {"train": {"masks": "masks/*"}}, "data.train is {'masks': .*expected {images: train.*, label} for"),
        (None, {"train": {"images": "train/*/*", "masks": "masks/*"}}, "unknown key 'data.train.masks'"),
        (None, {"root": "/nowhere"}, "data.root=/nowhere is not a folder or zip file"),
        (None, {"root": None}, "data.root is not set: add data.root=FOLDER"),
        (None, {"root": None, "train": {"split": "train"}}, "data.root is not set: add data.root=NAME"),
        (None, {"batch_size": 0}, "data.batch_size is 0"),
        (None, {"crop_size": 0}, "data.crop_size is 0"),
        (None, {"crop_size": [224, 224]}, "data.crop_size is .224, 224., expected an integer"),
        (None, {"workers": -1}, "data.workers is -1"),
        (None, {"scale": [0.5, 2.0]}, "data.scale is .0.5, 2.0., expected .low, high. with 0 < low <= high <= 1"),
        (None, {"scale": 0.5}, "data.scale is 0.5"),
        (None, {"mixup": -1.0}, "data.mixup is -1.0, expected an alpha of at least 0"),
        (None, {"random_erasing": 2}, "data.random_erasing is 2, expected a probability"),
        (None, {"randaugment": {"magnitude": 31}}, "magnitude: 31}, expected at least 1 operation of a magnitude from"),
        (None, {"randaugment": {"ops": 2}}, "unknown key 'data.randaugment.ops'"),
    ],
)  # fmt: skip
def test_bad_trees_and_settings_are_one_sentence_each(tree, harm, change, message) -> None:
    if harm:
        harm(tree)
    with pytest.raises(UserError, match=message) as told:
        opened(change.get("root", tree), "train", "val", **{key: change[key] for key in change if key != "root"})
    assert "\n" not in str(told.value)


def test_a_file_that_is_no_image_is_told_by_its_name(tree) -> None:
    (tree / "val" / "dog" / "Thumbs.db").write_text("not a dog")
    assert len(opened(tree, "val").datasets["val"]) == 12
    assert len(opened(tree, "val", val={"images": "val/*/*.*"}).datasets["val"]) == 13  # asked for
    (tree / "val" / "dog" / "notes.PNG").write_text("not a dog")
    data = opened(tree, "val")
    with pytest.raises(UserError, match="cannot read image .*val/dog/notes.PNG: the file holds no image"):
        [data.datasets["val"][index] for index in range(13)]


def test_photographs_lie_as_their_exif_says(tree) -> None:
    image, turned = Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint8).reshape(40, 60, 3)), Image.Exif()
    turned[0x0112] = 6
    image.save(tree / "val" / "bird" / "a.png", exif=turned)
    image.transpose(Image.Transpose.ROTATE_270).save(tree / "val" / "bird" / "b.png")
    names = [Path(name := opened(tree, "val").datasets["val"].source.name(index)).name for index in range(6)]
    data = opened(tree, "val").datasets["val"]
    assert torch.equal(data[names.index("a.png")]["image"], data[names.index("b.png")]["image"]) and name


def equal(some: list[dict], others: list[dict]) -> bool:
    return all(torch.equal(a[key], b[key]) for a, b in zip(some, others, strict=True) for key in ("image", "label"))


@pytest.mark.parametrize("change", [{}, STRONG], ids=["plain", "strong"])
def test_batches_follow_from_seed_and_step_alone(tree, change) -> None:
    """Whatever else drew before, for 0, 1 and 2 workers, and where a run goes on."""
    whole = batches(tree, 5, **change)
    torch.manual_seed(99)
    assert equal(whole, batches(tree, 5, **change))
    assert equal(whole, batches(tree, 5, workers=1, **change)) and equal(whole, batches(tree, 5, workers=2, **change))
    assert equal(whole[3:], batches(tree, 2, start=3, **change))
    assert whole[0]["image"].shape == (6, 3, 32, 32) and whole[0]["image"].dtype == torch.uint8
    assert not equal(whole[:1], whole[3:4])  # the same images an epoch later


def test_samples_draw_nothing_from_the_generator_of_others(tree) -> None:
    data, mix, state = opened(tree, "train", **STRONG).datasets["train"], Mix(0.8, 1.0, 3), torch.get_rng_state()
    mix(data[Draw(0, 1)]["image"][None], torch.tensor([0]), 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_epoch_holds_each_image_once(tree) -> None:
    labels = torch.cat([batch["label"] for batch in batches(tree, 3)])
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [6, 6, 6]


def test_a_training_image_is_torchvisions(tree) -> None:
    image = np.array(Image.open(tree / "train" / "dog" / "0.jpg"))
    chain = [
        v2.RandomResizedCrop(32, (0.08, 1.0)),
        v2.RandomHorizontalFlip(),
        v2.RandAugment(2, 9, fill=(124, 116, 104)),
    ]
    theirs = v2.Compose([*chain, v2.PILToTensor(), v2.RandomErasing(0.5, value=(124, 116, 104))])
    ours = Augmentation(32, (0.08, 1.0), {"num_ops": 2, "magnitude": 9}, 0.5)
    for seed in range(20):
        torch.manual_seed(seed)
        assert torch.equal(ours(image, seed), theirs(Image.fromarray(image)))


@pytest.mark.parametrize(
    "change", [{"scale": (0.5, 0.5)}, {"randaugment": {}}, {"random_erasing": 1.0}, {"mixup": 1.0}, {"cutmix": 1.0}]
)
def test_each_setting_of_training_reaches_the_batches(tree, change) -> None:
    assert not equal(batches(tree, 1), batches(tree, 1, **change))


def test_the_scored_image_is_the_middle_of_a_resize(tree) -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    theirs = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])(Image.fromarray(image))
    assert torch.equal(Centre(224)(image), theirs)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (3, 900)])
def test_a_thin_line_takes_no_gigabytes(shape) -> None:
    """Resized to a shorter side of 256 the whole of the first would have 1.3 billion pixels."""
    image = np.full((*shape, 3), 77, np.uint8)
    assert Centre(224)(image).unique().tolist() == [77]
    assert Augmentation(224, (0.08, 1.0), None, 0.0)(image, 0).unique().tolist() == [77]


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_images_and_their_probabilities_are_torchvisions(mixup, cutmix) -> None:
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    labels, mix, kinds = torch.tensor([0, 1, 2, 2, 1, 0]), Mix(mixup, cutmix, 4), set()
    for seed in range(12):
        mixed, shares = mix(images, labels, seed)
        torch.manual_seed(seed)
        choices = [kind(alpha=a, num_classes=4) for kind, a in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if a]
        choice = choices[int(torch.randint(len(choices), ()))]
        theirs, expected = choice(images.float(), labels)
        assert torch.equal(mixed, theirs.round().to(torch.uint8)) and torch.equal(shares, expected)
        assert mixed.dtype == torch.uint8 and shares.shape == (6, 4) and shares.dtype == torch.float32
        assert shares.sum(1).tolist() == pytest.approx([1] * 6) and (shares[:, 3] == 0).all()
        kinds.add(type(choice))
    assert len(kinds) == (mixup > 0) + (cutmix > 0)


def test_mixed_batches_carry_probabilities(tree) -> None:
    found = batches(tree, 4, mixup=0.8, cutmix=1.0)
    assert len({tuple(batch["label"].unique().tolist()) for batch in found}) > 1  # each batch draws its own share
    for batch in found:
        assert batch["label"].shape == (6, 3) and batch["label"].sum(1).tolist() == pytest.approx([1] * 6)


def test_images_that_come_alone_cannot_be_mixed(tree) -> None:
    data = opened(tree, "train", mixup=0.2, batch_size=2, micro_batch_size=1)
    data.trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=2)
    with pytest.raises(SharedError, match="mix images that a device takes at once, but it takes 1"):
        data.train_dataloader()


def test_samples_and_mixing_travel_to_a_worker_that_is_started_anew(tree) -> None:
    """As on macOS and Windows, where a worker gets everything pickled."""
    data, mix = opened(tree, "train", **STRONG).datasets["train"], Mix(0.8, 1.0, 3)
    there, mix_there = pickle.loads(pickle.dumps((data, mix)))
    assert torch.equal(there[Draw(3, 7)]["image"], data[Draw(3, 7)]["image"])
    images, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    assert all(map(torch.equal, mix_there(images, labels, 1), mix(images, labels, 1)))


def test_the_network_takes_the_bytes(tree) -> None:
    data = opened(tree, "train")
    model, _ = build_classifier(**data.network, variant="b0")
    batch = batches(tree, 1)[0]
    assert model(normalized(model, batch["image"])).logits.shape == (6, 3)


def test_a_step_names_its_files(tree) -> None:
    data = opened(tree, "train")
    data.trainer = quiet(max_steps=1)
    batch = next(iter(data.train_dataloader()))
    names = data.sample_names(0)
    assert [CLASSES.index(Path(name).parent.name) for name in names] == batch["label"].tolist()
