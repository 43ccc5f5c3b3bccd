import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

CODE = "import torch, segformer.kernels as k, sys; print(k.usable(torch.zeros(1)), 'triton' in sys.modules)"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "False False"),  # a CPU
        ({"TRITON_INTERPRET": "1"}, "True False"),  # and nothing was imported to say so
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
