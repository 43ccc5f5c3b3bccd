"""pipeline(): images in, one black and white mask for each class found in them out."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from segformer.errors import UserError, nearest
from segformer.files import locate
from segformer.model import SegformerForSemanticSegmentation
from segformer.processor import FILE, SegformerImageProcessor

TASKS = ("image-segmentation", "semantic-segmentation")
# keywords of the peer's pipeline that mean nothing to a label map of files on this machine
_MEANINGLESS = ("threshold", "mask_threshold", "overlap_mask_area_threshold", "timeout", "num_workers", "framework",
                "use_fast", "trust_remote_code")  # fmt: skip

Source = str | os.PathLike[str]


class SemanticSegmentationPipeline:
    """A model and its image processor in one call; images go through the processor's settings.

    model: in eval mode, wherever it is. batch_size: images that go through it at once.
    """

    def __init__(self, model: nn.Module, image_processor: SegformerImageProcessor, batch_size: int = 1) -> None:
        self.model = model.eval()
        self.image_processor = image_processor
        self.batch_size = _batch_size(batch_size)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def __call__(self, inputs: Any = None, *, images: Any = None, **options: Any) -> list[Any]:
        """The classes found in an image, or in each of a list of images.

        inputs (or `images`): a Pillow image, a path, an array or tensor, or a list or tuple of them.
        options: batch_size for this call; subtask, "semantic" or None; what the peer takes for other tasks.

        Returns for an image a list with one dictionary for each class present, in ascending order of ids: "score"
        (None), "label" (its name) and "mask" (a Pillow image of mode L, 255 where the class is, of the upright image's
        size); for a list of images a list of such lists.

        Raises:
            UserError: something that is no image, another subtask, or images that cannot share a batch.
        """
        batch_size = _batch_size(_checked(options).get("batch_size", self.batch_size))
        inputs = images if inputs is None else inputs
        items = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        found = []
        for first in range(0, len(items), batch_size):
            label_maps = self._label_maps(items[first : first + batch_size], first)
            found += [self._masks(labels.cpu().numpy()) for labels in label_maps]
        return found if isinstance(inputs, list | tuple) else found[0]

    def _label_maps(self, items: list[Any], first: int) -> list[Tensor]:
        """(H, W) class ids of each item, at its own upright size."""
        loaded = [self.image_processor.load(item, first=first + index) for index, item in enumerate(items)]
        for index, of_item in enumerate(loaded, first):
            if len(of_item) != 1:
                raise UserError(f"input {index} holds {len(of_item)} images, expected one: pass them as a list")
        pixels = [image for of_item in loaded for image in of_item]
        features = self.image_processor(pixels, return_tensors="pt", input_data_format="channels_first")
        with torch.inference_mode():
            outputs = self.model(features.pixel_values.to(self.device, next(self.model.parameters()).dtype))
        sizes = [image.shape[-2:] for image in pixels]
        return self.image_processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)

    def _masks(self, labels: np.ndarray) -> list[dict[str, Any]]:
        names: Mapping[int, str] = self.model.config.id2label  # type: ignore[assignment, union-attr]
        return [
            {"score": None, "label": names[index], "mask": Image.fromarray(np.uint8(255) * (labels == index))}
            for index in np.unique(labels)
        ]


def pipeline(
    task: str,
    model: Source | nn.Module | None = None,
    image_processor: Source | SegformerImageProcessor | None = None,
    device: int | str | torch.device | None = None,
    **options: Any,
) -> SemanticSegmentationPipeline:
    """A `SemanticSegmentationPipeline`, as transformers' function of this name builds it.

    task: "image-segmentation" or "semantic-segmentation", which are the same here.
    model: a model, or a folder, checkpoint file or hub id.
    image_processor: the same of a processor; None is the one beside the weights, and the default settings for a model
    that was passed as an object. device: as torch has it, or a number of a GPU, -1 the CPU; None leaves a model where
    it is and puts a loaded one on the GPU where there is one.
    options: batch_size, dtype of the weights, and what `SemanticSegmentationPipeline` takes when called.

    Raises:
        UserError: another task, nothing that could be loaded, or an unknown option.
    """
    if task not in TASKS:
        raise UserError(f"task is {task!r}{nearest(str(task), TASKS)}, expected {' or '.join(map(repr, TASKS))}")
    dtype = _dtype(options.pop("dtype", None) or options.pop("torch_dtype", None))
    batch_size = _checked(options).get("batch_size", 1)
    if isinstance(image_processor, str | os.PathLike):
        image_processor = SegformerImageProcessor.from_pretrained(image_processor)
    if isinstance(model, str | os.PathLike):
        source, model = model, SegformerForSemanticSegmentation.from_pretrained(model)
        image_processor = image_processor or _processor_beside(source)
        device = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    image_processor = image_processor or SegformerImageProcessor()
    if not isinstance(model, nn.Module):
        raise UserError(f"model is a {type(model).__name__}, expected a model, a folder, a checkpoint file or a hub id")
    if not isinstance(image_processor, SegformerImageProcessor):
        raise UserError(f"image_processor is a {type(image_processor).__name__}, expected a SegformerImageProcessor")
    place = device if not isinstance(device, int) or device >= 0 else "cpu"
    return SemanticSegmentationPipeline(model.to(device=place, dtype=dtype), image_processor, batch_size)


def _processor_beside(source: Source) -> SegformerImageProcessor:
    """The settings stored with the weights, or the default ones with a warning."""
    folder = Path(source).parent if Path(source).is_file() else locate(source, wanted=[FILE])
    if (folder / FILE).is_file():
        return SegformerImageProcessor.from_pretrained(folder)
    processor = SegformerImageProcessor()
    size = f"{processor.size.height} x {processor.size.width}"
    warnings.warn(f"no {FILE} beside {source}: images are resized to {size}; pass image_processor=...", stacklevel=3)
    return processor


def _checked(options: Mapping[str, Any]) -> Mapping[str, Any]:
    known = ("batch_size", "subtask", *_MEANINGLESS)
    for name in options:
        if name not in known:
            raise UserError(f"unknown option {name!r}{nearest(name, known)}: expected one of {', '.join(known)}")
    if options.get("subtask") not in (None, "semantic"):
        raise UserError(f"subtask is {options['subtask']!r}, expected 'semantic': SegFormer labels pixels, not objects")
    return options


def _batch_size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"batch_size is {value!r}, expected a positive integer")
    return value


def _dtype(value: Any) -> torch.dtype | None:
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if value in (None, "auto"):
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype is {value!r}, expected a type of floats such as torch.float16")
    return found
