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
from torch.utils._python_dispatch import _disable_current_modes

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
    if torch.compiler._is_exporting_flag:  # is_exporting() is always true to the compiler of torch 2.11
        return False
    compiling = torch.compiler.is_compiling()
    worth = _INTERPRETED or _recorded or compiling or tensor.numel() >= least
    return worth and (tensor.is_cuda or _INTERPRETED) and _works(tensor.get_device())


def _works(device: int) -> bool:
    """Whether kernels do on this GPU (-1: on the CPU, interpreted)."""
    try:
        return _proved(device)
    except _NotNow:
        return False


# as `torch.compiler.assume_constant_result` does, which imports the whole compiler for it
_works._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _NotNow(Exception):
    """Nothing can be tried while a CUDA graph is recorded; it is not said that it would fail."""


@cache  # beneath what the compiler calls as it stands: through a cache it would look, and trace the example
def _proved(device: int) -> bool:
    if device >= 0 and torch.cuda.is_current_stream_capturing():
        raise _NotNow
    try:
        with _disable_current_modes(), torch.inference_mode():  # of tensors without numbers, say
            _try_out(torch.device("cpu" if device < 0 else f"cuda:{device}"))
    except Exception as error:  # of a compiler, a driver, Triton itself: each a type of its own
        told = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"GPU kernels are off, PyTorch's own operations take their place: {told}", stacklevel=2)
        return False
    return True


def _try_out(device: torch.device) -> None:
    """Raises unless a small example is right: Triton needs a C compiler, and no GPU that is too old for it."""
    from segformer.kernels.depthwise import depthwise_gelu

    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        raise RuntimeError("they need a GPU of compute capability 8.0 (A100, RTX 30), which has bfloat16")
    with torch.autocast(device.type, enabled=False):
        tokens = torch.linspace(-1, 1, 24, device=device, dtype=torch.float32).view(2, 3, 4)
        weight = torch.linspace(1, -1, 36, device=device, dtype=torch.float32).view(4, 1, 3, 3)
        bias = tokens[0, 0]
        found = depthwise_gelu(tokens, weight, bias, 1, 3)
        maps = F.conv2d(tokens.mT.unsqueeze(2), weight, bias, padding=1, groups=4)  # (B, C, 1, 3)
        torch.testing.assert_close(found, F.gelu(maps)[:, :, 0].mT, atol=1e-2, rtol=1e-2)  # it may be in TF32
