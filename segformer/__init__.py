"""SegFormer for semantic segmentation: train, evaluate, ship.

The public names are resolved when first used, so `import segformer` costs nothing.
"""

import os
from importlib import import_module
from typing import Any

# albumentations otherwise asks the package index for a newer version when it is imported
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

_HOMES = {
    "SegformerConfig": "segformer.config",
    "VARIANTS": "segformer.config",
    "SegformerModel": "segformer.model",
    "SegformerDecodeHead": "segformer.model",
    "SegformerForSemanticSegmentation": "segformer.model",
    "Protocol": "segformer.inference",
    "segment": "segformer.inference",
}
__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'segformer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
