"""SegformerConfig: the fields, names and defaults of Hugging Face's, and the table of sizes B0..B5."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segformer.errors import UserError, nearest
from segformer.files import locate, read_json, to_json, write_json

# depths, hidden sizes and decoder width as published (arXiv 2105.15203)
VARIANTS: dict[str, dict[str, Any]] = {
    "b0": {"depths": [2, 2, 2, 2], "hidden_sizes": [32, 64, 160, 256], "decoder_hidden_size": 256},
    "b1": {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 256},
    "b2": {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768},
    "b3": {"depths": [3, 4, 18, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768},
    "b4": {"depths": [3, 8, 27, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768},
    "b5": {"depths": [3, 6, 40, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768},
}


class SegformerConfig:
    """Architecture of a SegFormer; keywords, attributes and `config.json` are Hugging Face's.

    `num_labels`, `id2label` and `label2id` describe the classes (two when nothing is given). Keywords this class does
    not know are kept as attributes and written back, as its peer does. Carried for compatibility only: `layer_norm_eps`
    (transformers' model never reads it either) and `initializer_range` (weights start as the original's, see
    `model._init_encoder`).

    Where the original and Hugging Face differ, this project has switches: `layer_norm_eps_kind` "hf" (1e-5 everywhere)
    or "nvlabs" (1e-6 in blocks and stages), `classifier_dropout_kind` "element" (Hugging Face) or "channel" (NVlabs),
    and `merged_decode`, False for the decode head in its literal order of operations.

    Source: transformers' configuration_segformer (fields and defaults); the paper for their meaning.
    """

    model_type = "segformer"

    def __init__(
        self,
        num_channels: int = 3,
        num_encoder_blocks: int = 4,
        depths: Sequence[int] = (2, 2, 2, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        hidden_sizes: Sequence[int] = (32, 64, 160, 256),
        patch_sizes: Sequence[int] = (7, 3, 3, 3),
        strides: Sequence[int] = (4, 2, 2, 2),
        num_attention_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        classifier_dropout_prob: float = 0.1,
        initializer_range: float = 0.02,
        drop_path_rate: float = 0.1,
        layer_norm_eps: float = 1e-6,
        decoder_hidden_size: int = 256,
        semantic_loss_ignore_index: int = 255,
        reshape_last_stage: bool = True,
        layer_norm_eps_kind: str = "hf",
        classifier_dropout_kind: str = "element",
        merged_decode: bool = True,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        problem_type: str | None = None,
        num_labels: int | None = None,
        id2label: Mapping[int | str, str] | None = None,
        label2id: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_channels = num_channels
        self.num_encoder_blocks = num_encoder_blocks
        self.depths = list(depths)
        self.sr_ratios = list(sr_ratios)
        self.hidden_sizes = list(hidden_sizes)
        self.patch_sizes = list(patch_sizes)
        self.strides = list(strides)
        self.num_attention_heads = list(num_attention_heads)
        self.mlp_ratios = list(mlp_ratios)
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.classifier_dropout_prob = classifier_dropout_prob
        self.initializer_range = initializer_range
        self.drop_path_rate = drop_path_rate
        self.layer_norm_eps = layer_norm_eps
        self.decoder_hidden_size = decoder_hidden_size
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        self.reshape_last_stage = reshape_last_stage
        self.layer_norm_eps_kind = layer_norm_eps_kind
        self.classifier_dropout_kind = classifier_dropout_kind
        self.merged_decode = merged_decode
        self.output_hidden_states = output_hidden_states
        self.output_attentions = output_attentions
        self.return_dict = return_dict
        self.problem_type = problem_type
        if num_labels is not None and id2label is not None and len(id2label) != num_labels:
            raise UserError(f"num_labels is {num_labels} but id2label names {len(id2label)} classes")
        self.num_labels = 2 if num_labels is None else num_labels
        if id2label is not None:
            self.id2label = dict(sorted((int(key), name) for key, name in id2label.items()))
            if list(self.id2label) != list(range(len(id2label))):
                raise UserError(f"id2label has the ids {list(self.id2label)}, expected 0 to {len(id2label) - 1}")
            self.label2id = {name: index for index, name in self.id2label.items()}
        if label2id:
            self.label2id = dict(label2id)
        self.update(kwargs)
        self._validate()

    @classmethod
    def from_variant(cls, variant: str, **overrides: Any) -> "SegformerConfig":
        """The configuration of `variant` ("b0" to "b5"), with any field overridden."""
        if variant not in VARIANTS:
            raise UserError(
                f"unknown variant {variant!r}{nearest(variant, VARIANTS)}: choose from {', '.join(VARIANTS)}"
            )
        return cls(**{**VARIANTS[variant], **overrides})

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        self.id2label = {index: f"LABEL_{index}" for index in range(count)}
        self.label2id = {name: index for index, name in self.id2label.items()}

    @property
    def num_hidden_layers(self) -> int:
        """transformers' other name for `num_encoder_blocks`."""
        return self.num_encoder_blocks

    @num_hidden_layers.setter
    def num_hidden_layers(self, count: int) -> None:
        self.num_encoder_blocks = count

    @property
    def use_return_dict(self) -> bool:
        """transformers' other name for `return_dict`."""
        return self.return_dict

    def update(self, values: Mapping[str, Any]) -> None:
        """Sets fields by name."""
        for name, value in values.items():
            setattr(self, name, value)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **overrides: Any) -> "SegformerConfig":
        """From a `config.json`, the folder that holds it, or a hub id, with any field overridden."""
        path = Path(source)
        path = path if path.is_file() else locate(source, ["config.json"]) / "config.json"
        values = read_json(path)
        if values is None:
            raise UserError(f"no config.json in {source}: expected a folder that save_pretrained wrote, or a hub id")
        return cls.from_dict(values, **overrides)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `config.json`, which transformers reads too."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "config.json", self.to_dict())

    def to_json_string(self) -> str:
        return to_json(self.to_dict())

    def __repr__(self) -> str:
        return f"SegformerConfig {self.to_json_string()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SegformerConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to `config.json`."""
        return {"model_type": self.model_type, **copy.deepcopy(vars(self))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> "SegformerConfig":
        """From the content of a `config.json`; refuses another architecture's."""
        found = values.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise UserError(f"config.json describes a {found!r} model, expected 'segformer'")
        values = {key: value for key, value in values.items() if key != "model_type"}
        count = overrides.get("num_labels")
        if "id2label" in overrides or (count is not None and count != len(values.get("id2label") or {})):
            values = {key: value for key, value in values.items() if key not in ("id2label", "label2id", "num_labels")}
        try:
            return cls(**{**values, **overrides})
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"config.json does not describe a SegFormer: {error}") from error

    def _validate(self) -> None:
        stages = self.num_encoder_blocks
        for name in (
            "depths",
            "sr_ratios",
            "hidden_sizes",
            "patch_sizes",
            "strides",
            "num_attention_heads",
            "mlp_ratios",
        ):
            if len(getattr(self, name)) != stages:
                raise UserError(f"{name} is {getattr(self, name)}, expected {stages} values, one for each stage")
        for width, heads in zip(self.hidden_sizes, self.num_attention_heads, strict=True):
            if width % heads:
                raise UserError(f"hidden size {width} is not a multiple of its {heads} attention heads")
