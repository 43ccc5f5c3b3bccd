"""SegformerImageProcessor: pictures and masks of any kind -> pixel values and labels, and logits -> label maps.

Keywords, defaults, numbers and `preprocessor_config.json` are those of transformers 5.
"""

import copy
import os
import warnings
from collections import UserDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from segformer.bilinear import upsample_argmax
from segformer.errors import UserError, nearest
from segformer.files import locate, read_json, to_json, write_json
from segformer.inputs import channels_last, read_images, read_maps
from segformer.labels import IGNORE
from segformer.pixels import MEAN, STD

FILE = "preprocessor_config.json"

_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"height": 512, "width": 512},
    "resample": Image.Resampling.BILINEAR,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": tuple(round(value / 255, 3) for value in MEAN),
    "image_std": tuple(round(value / 255, 3) for value in STD),
    "do_reduce_labels": False,
}
_PER_CALL = ("return_tensors", "data_format", "input_data_format", "device")
# keywords of the peer's call that change nothing for SegFormer, there as here
_INERT = ("default_to_square", "disable_grouping", "do_convert_rgb", "image_seq_length", "crop_size", "pad_size")
# what files say of the class that wrote them
_STAMPS = ("image_processor_type", "feature_extractor_type", "processor_class", "_valid_processor_keys")
# options of the peer's from_pretrained that steer its download or choose a class, and none of the settings
_LOADING = ("backend", "cache_dir", "force_download", "local_files_only", "proxies", "token", "use_fast")
_SIZES = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"})
_MODES = {0: "nearest-exact", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers -> torch's names


class Size(dict[str, int]):
    """A size as a dictionary whose keys can be read as attributes too; those it does not have are None."""

    def __getattr__(self, name: str) -> int | None:
        if any(name in keys for keys in _SIZES):
            return self.get(name)
        raise AttributeError(name)

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that an image of `height` x `width` is resized to."""
        if "height" in self:
            return self["height"], self["width"]
        if "max_height" in self:
            factor = min(self["max_height"] / height, self["max_width"] / width)
            return max(1, int(height * factor)), max(1, int(width * factor))
        short, long = sorted((height, width))
        edge: float = self["shortest_edge"]
        if "longest_edge" in self and long / short * edge > self["longest_edge"]:
            edge = self["longest_edge"] * short / long
        if round(edge) == short:
            return height, width
        sides = max(1, round(edge)), int(edge * long / short)
        return sides if height <= width else sides[::-1]


class BatchFeature(UserDict[str, Any]):
    """What a processor returns: a mapping whose values are attributes too, ready for `model(**features)`.

    tensor_type: "pt" or "np" stack the lists in `data`, None leaves them.

    Raises:
        UserError: the values of one key differ in shape, or another tensor_type.
    """

    def __init__(self, data: Mapping[str, Any] | None = None, tensor_type: Any = None) -> None:
        super().__init__(data)
        kind = getattr(tensor_type, "value", tensor_type)
        if kind not in (None, "pt", "np"):
            raise UserError(
                f"return_tensors is {kind!r}, expected 'pt', 'np' or None: take 'np' and convert the arrays yourself"
            )
        for name, values in self.data.items():
            if kind and isinstance(values, list):
                self.data[name] = _stack(name, values, kind)

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:  # `data` itself is asked for while an instance is unpickled
            raise AttributeError(f"no {name!r} here{nearest(name, () if name == 'data' else self.data)}")
        return self.data[name]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves all tensors as `Tensor.to` would and casts those of floats; changes and returns this instance."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(value: Any) -> Any:
            if isinstance(value, list):
                return [move(item) for item in value]
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None, non_blocking)

        self.data = {name: move(value) for name, value in self.data.items()}
        return self


class SegformerImageProcessor:
    """Prepares images and segmentation maps, with the numbers of transformers' torchvision-backed class.

    do_resize, size, resample: images are resized with antialiasing, label maps by nearest neighbour. size is an int (a
    square), (height, width), {"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"} or
    {"max_height", "max_width"}; resample is Pillow's number of a filter.
    do_rescale, rescale_factor, do_normalize, image_mean, image_std: (image * factor - mean) / std per channel. With
    other than three means, arrays of that many channels are taken as they are.
    do_reduce_labels: 0 becomes 255 (ignored), 255 stays, any other id is lowered by one; `reduce_labels` is its former
    name. Images are never reduced.

    None stands for the default. Unknown keywords are kept as attributes and written back, as its peer does.

    Raises:
        UserError: a value that no image could be prepared with.
    """

    model_input_names = ["pixel_values"]
    do_resize: bool
    size: Size
    resample: Image.Resampling
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | tuple[float, ...]
    image_std: float | tuple[float, ...]
    do_reduce_labels: bool
    return_tensors: Any = None
    data_format: Any = None
    input_data_format: Any = None
    device: Any = None

    def __init__(
        self,
        do_resize: bool | None = None,
        size: int | Sequence[int] | Mapping[str, int] | None = None,
        resample: int | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        do_reduce_labels: bool | None = None,
        **kwargs: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _DEFAULTS}
        vars(self).update(_settings(_DEFAULTS) | _settings({**kwargs, **given}))

    def __setattr__(self, name: str, value: Any) -> None:
        """An assignment is checked as the constructor's argument is."""
        vars(self).update(_settings({name: value}) or {name: value})

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **overrides: Any) -> Self:
        """The settings in a folder's `preprocessor_config.json`, in such a file itself, or of a hub id.

        overrides replace settings of the file.

        Raises:
            UserError: nothing there, or a file that is no such configuration.
        """
        for name, plain in (("revision", "main"), ("subfolder", "")):
            if overrides.pop(name, None) not in (None, plain):
                raise UserError(f"{name} cannot be chosen here: download the files and pass their folder")
        path = Path(source)
        if not path.is_file():
            path = locate(source, wanted=[FILE]) / FILE
        values = read_json(path)
        if values is None:
            raise UserError(
                f"no {FILE} in {source}, expected one beside the weights: write it with "
                "SegformerImageProcessor().save_pretrained(folder)"
            )
        return cls.from_dict(values, **{name: value for name, value in overrides.items() if name not in _LOADING})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """From the content of a `preprocessor_config.json`, of any age; overrides replace its settings."""
        return cls(**_settings(values) | _settings(overrides))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to `preprocessor_config.json`; what is None is left out."""
        values = copy.deepcopy({name: value for name, value in vars(self).items() if value is not None})
        return {
            **values,
            "size": dict(self.size),
            "resample": int(self.resample),
            "image_processor_type": "SegformerImageProcessor",
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> list[str]:
        """Writes `preprocessor_config.json`, which transformers loads, and returns its path in a list."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_dict())
        return [str(path)]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {to_json(self.to_dict())}"

    def __call__(self, images: Any, segmentation_maps: Any = None, **options: Any) -> BatchFeature:
        """As `preprocess`."""
        return self.preprocess(images, segmentation_maps, **options)

    def preprocess(self, images: Any, segmentation_maps: Any = None, **options: Any) -> BatchFeature:
        """`pixel_values` of one image or many and, where maps are given, their `labels` in int64.

        images: Pillow images, paths, arrays or tensors (H, W), (H, W, C) or (C, H, W), or a list or 4-D batch of them.
        Files and Pillow images become upright RGB of 8 bits; grey arrays are repeated, alpha is dropped.
        segmentation_maps: one for each image and of its size: Pillow images of one channel (a palette's indices are
        the ids), paths, or arrays and tensors (H, W) of any integers. What is passed in is never written to.
        options: any setting of the constructor for this call; return_tensors ("pt", "np" or None: lists), data_format
        and input_data_format ("channels_first" or "channels_last"), device (where the work is done).

        Raises:
            UserError: something that is no image or no map, or maps that do not belong to the images.
        """
        call = self._for_call(options)
        pictures = call.load(images)
        sizes = [(image.shape[1], image.shape[2]) for image in pictures]
        last = channels_last("data_format", call.data_format)
        pixels = [call._scale(call._resize(image, *call._target(*image.shape[-2:]))) for image in pictures]
        data = {"pixel_values": [image.permute(1, 2, 0) if last else image for image in pixels]}
        if segmentation_maps is not None:
            maps = read_maps(segmentation_maps, sizes)
            data["labels"] = [call._label(mask, index).to(pixels[0].device) for index, mask in enumerate(maps)]
        return BatchFeature(data, call.return_tensors)

    def load(self, images: Any, input_data_format: Any = None, first: int = 0) -> list[Tensor]:
        """The images as upright tensors (C, H, W), uint8 or float, before anything is resized.

        first: the number that the first of them has in messages.
        """
        last = channels_last("input_data_format", input_data_format or self.input_data_format)
        channels = len(self.image_mean) if isinstance(self.image_mean, tuple) else 3
        if isinstance(self.image_std, tuple) and len(self.image_std) != channels:
            raise UserError(
                f"image_std has {len(self.image_std)} values and image_mean {channels}, expected one a channel in each"
            )
        bytes_expected = self.do_rescale and abs(self.rescale_factor * 255 - 1) < 1e-3
        return read_images(images, channels, last, self.device, bytes_expected, first)

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[Sequence[int]] | Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Any]:
        """Logits (B, K, h, w) of a model's output -> B label maps (height, width) of int64, on the logits' device.

        target_sizes: the (height, width) of each map; None keeps (h, w). return_segmentation_scores: each map as a
        mapping of `segmentation` and `segmentation_scores`, the logits (K, height, width) at that size.

        Raises:
            UserError: as many sizes as images are needed, each of two positive integers.
        """
        logits: Tensor = outputs.logits
        wanted = [logits.shape[-2:]] * len(logits) if target_sizes is None else target_sizes
        sizes = [tuple(int(side) for side in size) for size in wanted]
        if len(sizes) != len(logits) or any(len(size) != 2 or min(size) < 1 for size in sizes):
            raise UserError(f"target_sizes is {sizes}, expected (height, width) for each of {len(logits)} images")
        if not return_segmentation_scores:
            return [upsample_argmax(logits[i : i + 1], *size)[0].long() for i, size in enumerate(sizes)]
        options: Any = {"mode": "bilinear", "align_corners": False}
        scores = [F.interpolate(logits[i : i + 1], size=size, **options)[0] for i, size in enumerate(sizes)]
        return [BatchFeature({"segmentation": item.argmax(0), "segmentation_scores": item}) for item in scores]

    def _for_call(self, options: Mapping[str, Any]) -> Self:
        """This processor with the options of one call; their None means "as constructed"."""
        known = (*_DEFAULTS, "reduce_labels", *_PER_CALL, *_INERT)
        for name, value in options.items():
            if name not in known and not (name in ("do_center_crop", "do_pad") and not value):
                raise UserError(f"unknown option {name!r}{nearest(name, known)}: expected one of {', '.join(known)}")
        call = copy.copy(self)
        vars(call).update(_settings(options))
        return call

    def _target(self, height: int, width: int) -> tuple[int, int]:
        return self.size.target(height, width) if self.do_resize else (height, width)

    def _resize(self, image: Tensor, height: int, width: int) -> Tensor:
        """(C, H, W) -> (C, height, width) of the same type, which is rounded to where it is uint8."""
        if image.shape[-2:] == (height, width):
            return image
        mode = _MODES.get(self.resample, "")
        smooth = {"antialias": True, "align_corners": False} if self.resample else {}
        native = image.is_floating_point() or image.device.type == "cpu" or not smooth
        batch = (image if native else image.float())[None]
        try:
            resized = F.interpolate(batch, size=(height, width), mode=mode, **smooth)[0]
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"resample is {self.resample.value} ({self.resample.name.lower()}), which torch {torch.__version__} "
                f"does not offer on {image.device.type}: use bilinear (2), bicubic (3) or SegformerImageProcessorPil"
            ) from error
        return resized if native else resized.clamp(0, 255).round().to(image.dtype)

    def _nearest(self, source: int, target: int) -> np.ndarray:
        """(target,) indices into `source` rows or columns: a nearest-neighbour resize that is exact for any label."""
        indices = torch.arange(source, dtype=torch.float32)[None, None]
        return F.interpolate(indices, size=target, mode="nearest-exact")[0, 0].long().numpy()

    def _scale(self, image: Tensor) -> Tensor:
        """Rescaling and normalising in one step, as the peer rounds it."""
        if not self.do_normalize:
            return image * self.rescale_factor if self.do_rescale else image
        unit = 1.0 / self.rescale_factor if self.do_rescale else 1.0
        mean, std = (torch.tensor(v, device=image.device) * unit for v in (self.image_mean, self.image_std))
        return (image.to(torch.float32) - mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))

    def _label(self, mask: np.ndarray, index: int) -> Tensor:
        """(H, W) raw ids -> int64 labels of the image's new size."""
        if self.do_reduce_labels and mask.dtype != np.uint8 and (mask == IGNORE + 1).any():
            raise UserError(
                f"segmentation map {index} holds {IGNORE + 1}, which do_reduce_labels would lower to {IGNORE}, the "
                "ignored value: lower the ids yourself and ignore another value"
            )
        height, width = self._target(*mask.shape)
        rows, columns = self._nearest(mask.shape[0], height), self._nearest(mask.shape[1], width)
        labels = mask[rows][:, columns].astype(np.int64)
        if self.do_reduce_labels:
            labels = np.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1)
        return torch.from_numpy(labels)


class SegformerImageProcessorPil(SegformerImageProcessor):
    """The same with Pillow's resize and unfused rounding, as transformers' class of this name; works on the CPU.

    Floats are resized as floats, where the peer rounds them to 8 bits. Lists hold arrays, not tensors.
    """

    def preprocess(self, images: Any, segmentation_maps: Any = None, **options: Any) -> BatchFeature:
        features = super().preprocess(images, segmentation_maps, **{**options, "device": "cpu"})
        for name, values in features.items():
            if isinstance(values, list):
                features[name] = [value.numpy() for value in values]
        return features

    def _resize(self, image: Tensor, height: int, width: int) -> Tensor:
        bands = (image if image.dtype == torch.uint8 else image.float()).numpy()
        resized = [Image.fromarray(band).resize((width, height), self.resample) for band in bands]
        return torch.from_numpy(np.stack([np.array(band) for band in resized]))

    def _nearest(self, source: int, target: int) -> np.ndarray:
        column = Image.fromarray(np.arange(source, dtype=np.int32)[:, None])
        return np.array(column.resize((1, target), Image.Resampling.NEAREST))[:, 0]

    def _scale(self, image: Tensor) -> Tensor:
        if self.do_rescale:
            image = (image.double() * self.rescale_factor).float()
        if not self.do_normalize:
            return image
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.image_mean, self.image_std))
        return (image.float() - mean) / std


class SegformerImageProcessorFast(SegformerImageProcessor):
    """Former name of `SegformerImageProcessor`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        text = f"{type(self).__name__} is deprecated: use SegformerImageProcessor, which is the same"
        warnings.warn(text, FutureWarning, stacklevel=2)
        super().__init__(*args, **kwargs)


class SegformerFeatureExtractor(SegformerImageProcessorFast):
    """Former name of `SegformerImageProcessor`."""


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Checked settings in one notation; None is left out, the former names are read."""
    values = {name: value for name, value in given.items() if value is not None and name not in _STAMPS}
    former = values.pop("reduce_labels", None)
    if former is not None and values.setdefault("do_reduce_labels", former) != former:
        found = f"do_reduce_labels {values['do_reduce_labels']} and its former name reduce_labels {former} disagree"
        warnings.warn(f"{found}: the first counts; pass do_reduce_labels to choose", stacklevel=3)
    for name, value in values.items():
        if isinstance(_DEFAULTS.get(name), bool) and not isinstance(value, bool):
            raise UserError(f"{name} is {value!r}, expected True or False")
        if name == "rescale_factor" and not (_is_number(value) and value > 0):
            raise UserError(f"rescale_factor is {value!r}, expected a positive number such as 1/255")
        if name == "size":
            values[name] = _size(value, values.get("default_to_square", True))
        elif name == "resample":
            values[name] = _resampling(value)
        elif name in ("image_mean", "image_std"):
            values[name] = _statistic(name, value)
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _statistic(name: str, value: Any) -> float | tuple[float, ...]:
    value = value.tolist() if isinstance(value, np.ndarray | Tensor) else value
    numbers = value if isinstance(value, list | tuple) else [value]
    if not numbers or not all(map(_is_number, numbers)) or (name == "image_std" and 0 in numbers):
        raise UserError(f"{name} is {value!r}, expected a number for each channel{', not 0' * (name == 'image_std')}")
    return tuple(numbers) if isinstance(value, list | tuple) else value


def _resampling(value: Any) -> Image.Resampling:
    try:
        return Image.Resampling(value)
    except ValueError as error:
        filters = ", ".join(f"{item.value} ({item.name.lower()})" for item in sorted(Image.Resampling))
        raise UserError(f"resample is {value!r}, expected one of Pillow's filters: {filters}") from error


def _size(value: Any, square: bool) -> Size:
    if isinstance(value, int):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    elif isinstance(value, Mapping):
        value = dict(value)
    sides = value.values() if isinstance(value, dict) and set(value) in _SIZES else ()
    if not sides or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in sides):
        keys = "; ".join(" and ".join(sorted(keys)) for keys in _SIZES)
        raise UserError(
            f"size is {value!r}, expected a positive integer, (height, width), or a dictionary of positive integers "
            f"with the keys {keys}"
        )
    return Size(value)


def _stack(name: str, values: list[Any], kind: str) -> Any:
    tensors = [torch.as_tensor(value) for value in values]
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise UserError(
            f"{name} has the shapes {', '.join(map(str, shapes))}, which cannot be stacked: give size a height and a "
            "width with do_resize=True, process one image a call, or pass return_tensors=None for lists"
        )
    return torch.stack(tensors) if kind == "pt" else np.stack([tensor.detach().cpu().numpy() for tensor in tensors])
