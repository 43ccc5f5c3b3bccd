"""The config section `model` as a network."""

import lightning.pytorch as pl
import pytest

from segformer import resume
from segformer.data.datamodule import SegmentationData
from segformer.errors import SharedError, UserError, build
from segformer.inference import Protocol
from segformer.networks import COMPILE_MODES, build_classifier, build_segformer
from segformer.task import SegmentationTask
from tests.conftest import TOY
from tests.test_task import RECIPE


@pytest.mark.parametrize("make", [build_segformer, build_classifier])
@pytest.mark.parametrize("mode", [False, True, *COMPILE_MODES])
def test_a_network_is_compiled_as_told(make, mode) -> None:
    model, _ = make(["road", "sky"], "b0", compile=mode)
    assert (model._compiled_call_impl is not None) == bool(mode)
    assert model.recorded == (mode in ("reduce-overhead", "max-autotune"))


def test_a_mode_that_does_not_exist_is_told() -> None:
    with pytest.raises(UserError, match="model.compile is 'reduce_overhead'.*'reduce-overhead'") as told:
        build_segformer(["road", "sky"], "b0", compile="reduce_overhead")
    assert "choose from true, false, default, reduce-overhead" in str(told.value)


def test_cuda_graphs_are_not_recorded_of_accumulated_gradients() -> None:
    data = build("data", SegmentationData, TOY | {"micro_batch_size": 1}, seed=0).opened("train", "val")
    model, _ = build_segformer(variant="b0", compile="reduce-overhead", **data.network)
    task = SegmentationTask(model, Protocol(), RECIPE, 2)
    trainer = pl.Trainer(max_steps=2, val_check_interval=2, accelerator="cpu", logger=False, **resume.LOOP)
    resume.share_batches(trainer, data)
    with pytest.raises(SharedError, match="cannot add up the gradients of 2 micro-batches: leave out data.micro_batch"):
        trainer.fit(task, data)
