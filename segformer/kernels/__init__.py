"""GPU kernels (Triton), each with a twin in plain PyTorch that is its reference and its fallback.

Importing this costs nothing; a module of a kernel is imported once `usable` said yes. `SEGFORMER_KERNELS=0` in the
environment switches all of them off.
"""

import os
from functools import cache
from importlib.util import find_spec

from torch import Tensor


def usable(tensor: Tensor) -> bool:
    """Whether kernels may take this tensor: on an NVIDIA or AMD GPU with Triton; elsewhere by Triton's interpreter."""
    return _installed() and (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


@cache
def _installed() -> bool:
    return os.environ.get("SEGFORMER_KERNELS") != "0" and find_spec("triton") is not None
