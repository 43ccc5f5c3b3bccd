"""SegFormer for semantic segmentation: train, evaluate, ship.

The public names are resolved when first used, so `import segformer` costs nothing.
"""

import os
from importlib import import_module
from typing import Any

# albumentations otherwise asks the package index for a newer version when it is imported
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

_HOMES = {
    "segformer.config": ("SegformerConfig", "VARIANTS"),
    "segformer.model": (
        "SegformerModel",
        "SegformerDecodeHead",
        "SegformerForSemanticSegmentation",
        "SegformerForImageClassification",
    ),
    "segformer.base": ("SegformerPreTrainedModel",),
    "segformer.processor": (
        "SegformerImageProcessor",
        "SegformerImageProcessorPil",
        "SegformerImageProcessorFast",
        "SegformerFeatureExtractor",
        "BatchFeature",
    ),
    "segformer.inference": ("Protocol", "segment"),
    "segformer.predict": ("pipeline",),
}
# transformers' names for "whatever the folder holds": here that is always a SegFormer
_THIN = {
    "AutoConfig": "SegformerConfig",
    "AutoModel": "SegformerModel",
    "AutoModelForSemanticSegmentation": "SegformerForSemanticSegmentation",
    "AutoModelForImageClassification": "SegformerForImageClassification",
    "AutoImageProcessor": "SegformerImageProcessor",
}
_WHERE = {name: home for home, names in _HOMES.items() for name in names}
__all__ = list(_WHERE | _THIN)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name.startswith("TFSegformer"):
        raise ImportError(
            f"{name}: there is no TensorFlow network here; `python -m segformer convert tf_model.h5 FOLDER` brings its "
            "weights to SegformerForSemanticSegmentation"
        )
    name = _THIN.get(name, name)
    if name not in _WHERE:
        raise AttributeError(f"module 'segformer' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
