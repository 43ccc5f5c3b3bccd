"""The host never waits for a GPU: read from what a step does to tensors that only pretend to lie on one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segformer import kernels
from segformer.config import SegformerConfig
from segformer.inference import Protocol, score, segment
from segformer.model import SegformerForSemanticSegmentation
from segformer.optim import adamw
from segformer.pixels import normalize
from segformer.stops import gradient_norm
from segformer.task import SegmentationTask
from tests.conftest import TINY

pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")


class Sent(TorchDispatchMode):
    """Which operations move numbers between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
        # a number of the host, without a dimension, is an argument of a launch; but a copy is a copy
        copies = any(name in func._schema.name for name in ("copy", "::to", "lift"))
        if len({tensor.device.type for tensor in tensors if tensor.dim() or copies}) > 1:
            self.by.append(str(func))
        return found


@pytest.fixture(autouse=True)
def _a_gpu_where_kernels_work(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "_works", lambda device: True)
    yield
    kernels.enable(True)


@contextmanager
def on_gpu(**loss) -> Iterator[tuple[SegmentationTask, dict[str, Tensor]]]:
    """A task and a batch there, of shapes without numbers: what would read one raises."""
    with torch.device("meta"):
        model = SegformerForSemanticSegmentation(SegformerConfig(**TINY, num_labels=7))
    task = SegmentationTask(model, Protocol(), loss).train()
    weights = task.class_weights
    with FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty(2, 3, 64, 96, dtype=torch.uint8, device="cuda")
        task.class_weights = None if weights is None else torch.empty(7, device="cuda")  # as `setup` has it
        yield task.to_empty(device="cuda"), {"image": image, "mask": image[:, 0]}


@pytest.mark.parametrize(
    "loss", [{}, {"class_weights": [1.0] * 7, "dice_weight": 1.0}, {"ohem_threshold": 0.7}], ids=str
)
@pytest.mark.parametrize("on", [True, False], ids=["kernels", "twins"])
def test_a_training_step_reads_nothing_and_sends_nothing(loss, on) -> None:
    kernels.enable(on)
    with on_gpu(**loss) as (task, batch):
        optimizer, schedule = adamw(task.model, 10, 6e-5, (0.9, 0.999), 0.01, 10, 2, 1e-6)
        with Sent() as sent, kernels.recording():  # of all sizes
            for _ in range(2):
                with torch.autocast("cuda", torch.bfloat16):
                    task.loss_of(batch)
                for parameter in task.model.parameters():  # there is no device whose autograd could be asked
                    parameter.grad = torch.empty_like(parameter)
                optimizer.found_inf = 1 - torch.isfinite(gradient_norm(optimizer)).float()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    assert sent.by == []


def test_a_label_map_and_its_score_read_nothing_and_send_nothing() -> None:
    with on_gpu() as (task, batch), Sent() as sent:
        found, counts = score(task.model, batch["image"], batch["mask"], 7)
    assert sent.by == [] and found.shape == (2, 64, 96) and counts.shape == (7, 7)


@pytest.mark.parametrize("on", [True, False], ids=["kernels", "twins"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"size": [200, 80], "align": 32}, {"window": 48, "stride": 32}, {"scales": [0.5, 1.5], "flip": True}],
    ids=str,
)
def test_a_protocol_reads_nothing_and_sends_nothing(settings, on) -> None:  # so it can be recorded as a CUDA graph
    kernels.enable(on)
    with on_gpu() as (task, batch), Sent() as sent:
        assert segment(task.model, batch["image"], Protocol(**settings)).shape == (2, 64, 96)
    assert sent.by == []


def test_a_kernel_is_called_where_it_pays() -> None:
    with FakeTensorMode():
        few = torch.empty(100, device="cuda")
        assert kernels.usable(few) and kernels.usable(few, least=100) and not kernels.usable(few, least=101)
        with kernels.recording():
            assert kernels.usable(few, least=101)
        assert not kernels.usable(few, least=101)
        assert not kernels.usable(few.double()) and not kernels.usable(torch.empty(100))


def test_this_sees_what_is_sent_and_what_is_read() -> None:
    with FakeTensorMode(), Sent() as sent:
        image = torch.empty(1, 3, 4, 4, dtype=torch.uint8, device="cuda")
        normalize(image)
        assert sent.by == []
        for sending in (
            lambda: torch.tensor([1.0, 2.0], device="cuda"),
            lambda: torch.tensor(5.0, device="cuda"),
            lambda: image.sum().cpu(),
            lambda: image.sum().to("cpu", non_blocking=True),
            lambda: torch.zeros(()).copy_(image.float().sum()),
        ):
            sent.by.clear()
            sending()
            assert sent.by
        with pytest.raises(Exception, match="local_scalar_dense"):
            bool(normalize(image).sum() > 0)
