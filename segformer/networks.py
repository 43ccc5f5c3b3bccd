"""The network of a training run, made from the config section `model`."""

from collections.abc import Mapping, Sequence
from typing import Any

from segformer.base import SegformerPreTrainedModel
from segformer.checkpoints import start_from
from segformer.config import SegformerConfig
from segformer.errors import UserError, nearest
from segformer.model import SegformerForImageClassification, SegformerForSemanticSegmentation

# of torch.compile: whether it records what it made as CUDA graphs
COMPILE_MODES = {
    "default": False,
    "reduce-overhead": True,
    "max-autotune": True,
    "max-autotune-no-cudagraphs": False,
}


def build_segformer(
    names: Sequence[str],
    variant: str,
    pretrained: str | None = None,
    drop_path_rate: float = 0.1,
    classifier_dropout_kind: str = "channel",
    layer_norm_eps_kind: str = "hf",
    merged_decode: bool = True,
    freeze: Sequence[str] = (),
    gradient_checkpointing: bool = False,
    compile: bool | str = False,
    statistics: Mapping[str, Any] | None = None,
) -> tuple[SegformerForSemanticSegmentation, str]:
    """The network of a training run, whose config section `model` this signature is, and what was loaded into it.

    names: of the classes. compile: by `torch.compile`, in place, so that the names of the weights stay; a name is its
    mode, True the default one. statistics: fields of the configuration that follow from the images
    (`SegmentationData.network`).
    """
    config = SegformerConfig.from_variant(
        variant,
        id2label=dict(enumerate(names)),
        drop_path_rate=drop_path_rate,
        classifier_dropout_kind=classifier_dropout_kind,
        layer_norm_eps_kind=layer_norm_eps_kind,
        merged_decode=merged_decode,
        **(statistics or {}),
    )
    model = SegformerForSemanticSegmentation(config)
    return model, _prepared(model, pretrained, freeze, gradient_checkpointing, compile)


def build_classifier(
    names: Sequence[str],
    variant: str,
    pretrained: str | None = None,
    drop_path_rate: float = 0.1,
    classifier_dropout_kind: str = "channel",
    layer_norm_eps_kind: str = "hf",
    merged_decode: bool = True,
    freeze: Sequence[str] = (),
    gradient_checkpointing: bool = False,
    compile: bool | str = False,
) -> tuple[SegformerForImageClassification, str]:
    """As `build_segformer`, a network that names whole images; what concerns decode heads its configuration keeps."""
    config = SegformerConfig.from_variant(
        variant,
        id2label=dict(enumerate(names)),
        drop_path_rate=drop_path_rate,
        classifier_dropout_kind=classifier_dropout_kind,
        layer_norm_eps_kind=layer_norm_eps_kind,
        merged_decode=merged_decode,
    )
    model = SegformerForImageClassification(config)
    return model, _prepared(model, pretrained, freeze, gradient_checkpointing, compile)


def _prepared(
    model: SegformerPreTrainedModel,
    pretrained: str | None,
    freeze: Sequence[str],
    gradient_checkpointing: bool,
    compile: bool | str,
) -> str:
    """Makes a fresh network ready to be trained; what was loaded into it."""
    if isinstance(compile, str) and compile not in COMPILE_MODES:
        choices = ", ".join(["true", "false", *COMPILE_MODES])
        raise UserError(f"model.compile is {compile!r}{nearest(compile, COMPILE_MODES)}: choose from {choices}")
    loaded = start_from(model, pretrained) if pretrained else "all weights start fresh"
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if compile:
        mode = compile if isinstance(compile, str) else "default"
        model.compile(mode=mode)
        model.recorded = COMPILE_MODES[mode]
    model.freeze(*freeze)
    return loaded
