"""The kernels by Triton's interpreter, where there is no GPU; `pytest tests/kernels` on one runs them as they are."""

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT

CODE = "import torch, segformer.kernels as k, sys; print(k.usable(torch.zeros(1)), 'triton' in sys.modules)"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "False False"),  # a CPU, and nothing was imported to say so
        ({"TRITON_INTERPRET": "1"}, "True True"),  # tried out
        ({"TRITON_INTERPRET": "1", "SEGFORMER_KERNELS": "0"}, "False False"),
    ],
)
def test_kernels_are_for_gpus_and_can_be_switched_off(settings, told) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")
    plain = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "SEGFORMER_KERNELS")}
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, cwd=ROOT, env=plain | settings
    )
    assert done.stdout.strip() == told


@pytest.mark.parametrize("kernel", ["argmax", "cross_entropy", "depthwise", "layer_norm", "upsample_sum", "network"])
def test_a_kernel_does_what_its_twin_does(kernel) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")
    if torch.cuda.is_available():
        pytest.skip("tests/kernels are collected themselves where there is a GPU")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", f"tests/kernels/test_{kernel}.py"]
    interpreted = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=interpreted, timeout=300, check=False)
    assert done.returncode == 0 and " passed" in done.stdout and "failed" not in done.stdout, done.stdout + done.stderr
