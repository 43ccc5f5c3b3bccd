import shutil
import warnings

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from segformer.errors import UserError
from segformer.predict import SemanticSegmentationPipeline, pipeline
from segformer.processor import SegformerImageProcessor


def photo(height: int = 45, width: int = 70, seed: int = 0) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(cells).resize((width, height))


@pytest.fixture
def folder(tiny, tmp_path):
    """A model of several classes an image and its processor, as both libraries read them."""
    pixels = SegformerImageProcessor(size=64)(photo(), return_tensors="pt").pixel_values
    with torch.no_grad():
        tiny.decode_head.classifier.bias -= tiny(pixels).logits.mean((0, 2, 3))  # so that no class wins everywhere
    tiny.config.id2label = dict(enumerate(["wall", "sky", "tree", "road", "car", "door", "lamp"]))
    tiny.save_pretrained(tmp_path / "model")
    SegformerImageProcessor(size=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def as_arrays(found: list[dict]) -> dict[str, np.ndarray]:
    assert all(entry.keys() == {"score", "label", "mask"} and entry["score"] is None for entry in found)
    assert all(entry["mask"].mode == "L" for entry in found)
    return {entry["label"]: np.array(entry["mask"]) for entry in found}


@pytest.mark.parametrize("task", ["image-segmentation", "semantic-segmentation"])
def test_the_masks_are_those_of_transformers(folder, tmp_path, task) -> None:
    photo().save(tmp_path / "x.png")
    expected = transformers.pipeline("image-segmentation", model=str(folder), device="cpu")(str(tmp_path / "x.png"))
    segmenter = pipeline(task, model=folder, device="cpu")
    for image in (photo(), tmp_path / "x.png", str(tmp_path / "x.png"), np.array(photo())):
        found = segmenter(image)
        assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
        for name, mask in as_arrays(expected).items():
            assert (as_arrays(found)[name] == mask).mean() > 0.999  # a tie may fall either way
    assert len(expected) > 2


def test_every_pixel_belongs_to_exactly_one_class_and_classes_ascend(folder) -> None:
    found = pipeline("image-segmentation", model=folder)(images=photo())
    masks = np.stack([np.array(entry["mask"]) for entry in found])
    assert masks.shape[1:] == (45, 70) and set(np.unique(masks)) == {0, 255}
    assert (masks.astype(int).sum(0) == 255).all()
    order = ["wall", "sky", "tree", "road", "car", "door", "lamp"]
    assert [entry["label"] for entry in found] == sorted((entry["label"] for entry in found), key=order.index)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_list_gives_a_list_in_its_order_whatever_the_batch(folder, batch_size) -> None:
    images = [photo(45, 70, 0), photo(30, 90, 1), photo(64, 64, 2)]
    segmenter = pipeline("image-segmentation", model=folder)
    together = segmenter(images, batch_size=batch_size)
    assert len(together) == 3 and segmenter([]) == []
    for image, found in zip(images, together, strict=True):
        assert found[0]["mask"].size == image.size
        alone = as_arrays(segmenter(image))
        for name, mask in as_arrays(found).items():
            assert (alone[name] == mask).mean() > 0.999
    again = pipeline("image-segmentation", model=folder, batch_size=batch_size)(tuple(images))
    assert [len(found) for found in again] == [len(found) for found in together]


def test_the_masks_of_a_turned_photograph_stand_upright(folder, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter
    photo(45, 70).save(tmp_path / "turned.png", exif=exif)
    found = pipeline("image-segmentation", model=folder)(tmp_path / "turned.png")
    assert {entry["mask"].size for entry in found} == {(45, 70)}
    upright = as_arrays(pipeline("image-segmentation", model=folder)(photo(45, 70).rotate(-90, expand=True)))
    assert all(np.array_equal(mask, upright[name]) for name, mask in as_arrays(found).items())


def test_a_model_at_hand_takes_a_processor_or_the_default_settings(tiny, folder) -> None:
    segmenter = pipeline("image-segmentation", tiny.train(), image_processor=SegformerImageProcessor(size=64))
    assert isinstance(segmenter, SemanticSegmentationPipeline) and segmenter.model is tiny and not tiny.training
    expected = as_arrays(pipeline("image-segmentation", model=folder)(photo()))
    assert as_arrays(segmenter(photo())).keys() == expected.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segmenter = pipeline("image-segmentation", model=tiny)
    assert segmenter.image_processor.to_dict() == SegformerImageProcessor().to_dict()
    segmenter = pipeline("image-segmentation", model=tiny, image_processor=folder)
    assert segmenter.image_processor.size == {"height": 64, "width": 64}


def test_a_folder_without_processor_settings_gets_the_default_ones_with_a_warning(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("preprocessor_config.json"))
    with pytest.warns(UserWarning, match="no preprocessor_config.json beside .*bare: images are resized to 512 x 512"):
        segmenter = pipeline("image-segmentation", model=str(tmp_path / "bare"))
    assert segmenter.image_processor.size == {"height": 512, "width": 512}


def test_half_precision_and_the_number_of_the_cpu_are_understood(folder) -> None:
    segmenter = pipeline("image-segmentation", model=folder, device=-1, dtype="bfloat16")
    assert segmenter.device.type == "cpu" and next(segmenter.model.parameters()).dtype == torch.bfloat16
    assert segmenter(photo())[0]["mask"].size == (70, 45)


def test_what_transformers_takes_for_other_tasks_changes_nothing(folder) -> None:
    segmenter = pipeline("image-segmentation", model=folder)
    plain = as_arrays(segmenter(photo()))
    found = as_arrays(segmenter(photo(), subtask="semantic", threshold=0.9, mask_threshold=0.5, timeout=None))
    assert found.keys() == plain.keys() and all(np.array_equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"task": "image-segmentations"},
            "task is 'image-segmentations' .did you mean 'image-segmentation'.., expected 'i",
        ),
        ({"task": "depth"}, "task is 'depth', expected 'image-segmentation' or 'semantic-segmentation'"),
        ({"model": None}, "model is a NoneType, expected a model, a folder, a checkpoint file or a hub id"),
        ({"image_processor": 3}, "image_processor is a int, expected a SegformerImageProcessor"),
        ({"batch_size": 0}, "batch_size is 0, expected a positive integer"),
        ({"batchsize": 2}, r"unknown option 'batchsize' \(did you mean 'batch_size'\?\): expected one of"),
        ({"dtype": "float"[:3]}, "dtype is 'flo', expected a type of floats"),
        ({"subtask": "panoptic"}, "subtask is 'panoptic', expected 'semantic': SegFormer labels pixels, not objects"),
    ],
)
def test_what_makes_no_pipeline_is_told(tiny, options, message) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(**{"task": "image-segmentation", "model": tiny, **options})


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (None, {}, "image 0 is a NoneType, expected a Pillow image, a path"),
        ([photo(), photo(), "https://example.org/x.jpg"], {}, "image https://example.org/x.jpg is an address"),
        ([photo(), photo(), 3], {}, "image 2 is a int, expected a Pillow image"),
        (np.zeros((2, 8, 8, 3), np.uint8), {}, "input 0 holds 2 images, expected one: pass them as a list"),
        (photo(), {"subtask": "instance"}, "subtask is 'instance', expected 'semantic'"),
        (photo(), {"batch_size": "2"}, "batch_size is '2', expected a positive integer"),
    ],
)
def test_what_is_no_image_to_segment_is_told(tiny, inputs, options, message) -> None:
    with pytest.raises(UserError, match=message):
        pipeline("image-segmentation", tiny, SegformerImageProcessor(size=32))(inputs, **options)


def test_images_that_keep_their_sizes_go_one_by_one_or_are_told(tiny) -> None:
    segmenter = pipeline("image-segmentation", tiny, SegformerImageProcessor(do_resize=False))
    images = [photo(), photo(30, 90)]
    assert [found[0]["mask"].size for found in segmenter(images)] == [(70, 45), (90, 30)]
    with pytest.raises(UserError, match="pixel_values has the shapes .*, which cannot be stacked"):
        segmenter(images, batch_size=2)
