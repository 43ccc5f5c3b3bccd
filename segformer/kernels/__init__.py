"""GPU kernels (Triton), each with a twin in plain PyTorch that is its reference and its fallback.

Importing this costs nothing; a module of a kernel is imported once `usable` said yes. `SEGFORMER_KERNELS=0` in the
environment, or `enable(False)`, switches all of them off: for forward-mode or second derivatives, which only the twins
have.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

_FOUND = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what all kernels read; they compute in float32
_enabled = os.environ.get("SEGFORMER_KERNELS") != "0"
_recorded = False


def enable(on: bool) -> None:
    """Switches the kernels on or off for the whole process. What `torch.compile` made is made anew."""
    global _enabled  # noqa: PLW0603 (a switch is one)
    _enabled = on


@contextmanager
def recording() -> Iterator[None]:
    """What is launched in here is recorded as a CUDA graph: launching costs nothing, and no tensor is too small."""
    global _recorded  # noqa: PLW0603
    before, _recorded = _recorded, True
    try:
        yield
    finally:
        _recorded = before


def usable(tensor: Tensor, least: int = 0) -> bool:
    """Whether kernels may take this tensor: of 16 or 32 bits, on an NVIDIA or AMD GPU on which Triton works.

    Elsewhere where Triton is an interpreter (`TRITON_INTERPRET=1`, for tests). Never while a graph is exported: what
    reads it does not know these operations. least: numbers that make it worth while. A call from Python takes the host
    some 30 microseconds, PyTorch's own operations 5, and a GPU that is not busy for as long only waits for the next.
    """
    if not (_enabled and _FOUND) or tensor.dtype not in _DTYPES:
        return False
    if torch.compiler.is_exporting():
        return False
    if not tensor.is_cuda:
        return _INTERPRETED
    worth = _recorded or torch.compiler.is_compiling() or tensor.numel() >= least
    return worth and _works(tensor.get_device())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@cache
def _works(device: int) -> bool:
    """Whether a small example is right on this GPU. Triton needs a C compiler, and no GPU that is too old for it."""
    try:
        from segformer.kernels.depthwise import depthwise_gelu

        with torch.inference_mode():
            tokens = torch.linspace(-1, 1, 24, device=f"cuda:{device}").view(2, 3, 4)
            weight, bias = torch.linspace(1, -1, 36, device=tokens.device).view(4, 1, 3, 3), tokens[0, 0]
            found = depthwise_gelu(tokens, weight, bias, 1, 3)
            maps = F.conv2d(tokens.mT.unsqueeze(2), weight, bias, padding=1, groups=4)  # (B, C, 1, 3)
            torch.testing.assert_close(found, F.gelu(maps)[:, :, 0].mT, atol=1e-2, rtol=1e-2)  # it may be in TF32
    except Exception as error:  # of a compiler, a driver, Triton itself: each a type of its own
        told = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"GPU kernels are off, PyTorch's own operations take their place: {told}", stacklevel=2)
        return False
    return True
