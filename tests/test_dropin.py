"""The examples of the model's public documentation, with the import changed and a local folder for the hub id."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segformer
from segformer.config import VARIANTS, SegformerConfig
from segformer.model import SegformerForImageClassification, SegformerForSemanticSegmentation
from segformer.processor import SegformerImageProcessor


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as the hub has them, of real sizes and random weights, and a photograph."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    ade, imagenet = (SegformerConfig(**VARIANTS["b0"], num_labels=count) for count in (150, 1000))
    SegformerForSemanticSegmentation(ade).save_pretrained(root / "segformer-b0-finetuned-ade-512-512")
    SegformerForImageClassification(imagenet).save_pretrained(root / "mit-b0")
    for folder in list(root.iterdir()):
        SegformerImageProcessor().save_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).resize((640, 480)).save(root / "your_image.png")
    return root


def test_pipeline(hub: Path) -> None:
    from segformer import pipeline

    segmenter = pipeline("semantic-segmentation", model=str(hub / "segformer-b0-finetuned-ade-512-512"))
    outputs = segmenter(str(hub / "your_image.png"))

    assert {"score", "label", "mask"} == set(outputs[0])
    assert sum(np.array(found["mask"], dtype=int) for found in outputs).tolist() == [[255] * 640] * 480


def test_automodel(hub: Path) -> None:
    from segformer import SegformerForSemanticSegmentation, SegformerImageProcessor

    image = Image.open(hub / "your_image.png")
    processor = SegformerImageProcessor.from_pretrained(hub / "segformer-b0-finetuned-ade-512-512")
    model = SegformerForSemanticSegmentation.from_pretrained(hub / "segformer-b0-finetuned-ade-512-512")
    inputs = processor(images=image, return_tensors="pt")
    outputs = model(**inputs)
    logits = outputs.logits

    assert list(logits.shape) == [1, 150, 128, 128]
    (labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])
    assert labels.shape == (480, 640)


def test_labels_that_start_at_one() -> None:
    from segformer import SegformerImageProcessor

    processor = SegformerImageProcessor(do_reduce_labels=True)
    mask = np.array([[0, 1], [150, 255]], np.uint8)
    inputs = processor(np.zeros((2, 2, 3), np.uint8), mask, size={"height": 2, "width": 2}, return_tensors="pt")
    assert inputs.labels.tolist() == [[[255, 0], [149, 255]]]


def test_configuration() -> None:
    from segformer import SegformerConfig, SegformerModel

    configuration = SegformerConfig()
    model = SegformerModel(configuration)
    configuration = model.config
    assert configuration.hidden_sizes == [32, 64, 160, 256]


def test_bare_encoder(hub: Path) -> None:
    from segformer import AutoImageProcessor, SegformerModel

    image = Image.open(hub / "your_image.png")
    image_processor = AutoImageProcessor.from_pretrained(hub / "mit-b0")
    model = SegformerModel.from_pretrained(hub / "mit-b0")
    inputs = image_processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    last_hidden_states = outputs.last_hidden_state
    assert list(last_hidden_states.shape) == [1, 256, 16, 16]


def test_image_classification(hub: Path) -> None:
    from segformer import AutoImageProcessor, SegformerForImageClassification

    image = Image.open(hub / "your_image.png")
    image_processor = AutoImageProcessor.from_pretrained(hub / "mit-b0")
    model = SegformerForImageClassification.from_pretrained(hub / "mit-b0")
    inputs = image_processor(image, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_label = logits.argmax(-1).item()
    assert model.config.id2label[predicted_label] == f"LABEL_{predicted_label}"


def test_fine_tuning_an_imagenet_encoder_on_classes_of_ones_own(hub: Path) -> None:
    from segformer import AutoModelForSemanticSegmentation

    id2label = {0: "background", 1: "pothole"}
    label2id = {name: index for index, name in id2label.items()}
    with pytest.warns(UserWarning, match="decode_head starts fresh"):
        model = AutoModelForSemanticSegmentation.from_pretrained(hub / "mit-b0", id2label=id2label, label2id=label2id)
    labels = torch.randint(0, 2, (1, 64, 64))
    outputs = model(pixel_values=torch.randn(1, 3, 64, 64), labels=labels)
    outputs.loss.backward()
    loss, logits = outputs[:2]
    assert loss.ndim == 0 and logits.shape == (1, 2, 16, 16)


def test_deprecated_names_say_what_to_use() -> None:
    for name in ("SegformerFeatureExtractor", "SegformerImageProcessorFast"):
        with pytest.warns(FutureWarning, match="use SegformerImageProcessor"):
            assert isinstance(getattr(segformer, name)(), SegformerImageProcessor)


def test_tensorflow_names_say_how_to_bring_the_weights() -> None:
    with pytest.raises(ImportError, match="python -m segformer convert"):
        from segformer import TFSegformerForSemanticSegmentation  # noqa: F401
