from pathlib import Path

import numpy as np
import pytest
import torch

from segformer.data.datamodule import SegmentationData
from segformer.data.samples import Sample, Stream
from segformer.errors import SharedError, UserError, build
from segformer.inference import normalized
from segformer.networks import build_segformer
from tests.conftest import TOY, save_pair
from tests.test_task import quiet


def test_training_samples_are_augmented_and_validation_samples_are_not() -> None:
    data = build("data", SegmentationData, TOY).opened("train", "val")
    assert data.datasets["train"].transform is not None and data.datasets["val"].transform is None
    assert data.summary().startswith("24 train images, 9 val images, 8 classes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"micro_batch_size": 0}, "data.micro_batch_size is 0"),
        ({"worker_timeout": -1}, "data.worker_timeout is -1"),
        ({"max_pixels": 0}, "data.max_pixels is 0"),
        ({"workers": -1}, "data.workers is -1"),
        ({"workers": "many"}, "data.workers is 'many'"),
        ({"batch_size": 2.5}, "data.batch_size is 2.5, expected an integer"),
        ({"val": {"scenes": 0, "seed": 1}}, "data.val holds no samples"),
        ({"protocol": {"windows": 5}}, "unknown key 'data.protocol.windows'"),
        ({"crop_size": "big"}, "data.crop_size is 'big'"),
        ({"crop_size": [64, 64, 3]}, "data.crop_size is"),
        ({"scale": [2.0, 0.5]}, "data.scale is"),
        ({"scale": 2}, "data.scale is"),
        ({"base_size": [2048]}, "data.base_size is"),
        ({"cat_max_ratio": 0}, "data.cat_max_ratio is 0"),
        ({"check": -1}, "data.check is -1"),
        ({"on_bad_sample": "ignore"}, "data.on_bad_sample is 'ignore', expected error or skip"),
        ({"max_bad_share": 2.0}, "data.max_bad_share is 2.0, expected a share from 0 to 1"),
        ({"bands": 0}, "data.bands is 0"),
        ({"bands": 129}, "data.bands is 129, expected at most 128"),
        ({"cache": "decoded"}, "data.cache=decoded is for files, .* but data.train has none"),
        ({"bands": 5}, "data.mean is None, expected 5 numbers on the scale 0 to 255, one a band: `python -m"),
        ({"mean": [1, 2]}, r"data.mean is \[1, 2\], expected 3 numbers"),
        ({"std": [1, 0, 1]}, r"data.std is \[1, 0, 1\], expected 3 numbers"),
        ({"sampling": {"kind": "uniform"}}, "unknown key 'data.sampling.kind'"),
        ({"sampling": {"name": "rare"}}, "data.sampling.name is 'rare'"),
        ({"mask_values": "rgb"}, "data.mask_values is 'rgb', expected ids or colors"),
    ],
)
def test_impossible_settings_are_told(change, message) -> None:
    with pytest.raises(UserError, match=message):
        build("data", SegmentationData, TOY | change).opened("train", "val")


@pytest.mark.parametrize(
    ("batch_size", "micro", "processes", "parts"),
    [
        *((16, None, 1, 1), (16, None, 8, 1), (16, 8, 1, 2), (16, 4, 2, 2)),
        *((16, 4, 8, 1), (16, 6, 1, 4), (6, 4, 1, 2), (7, 3, 1, 7)),
    ],
)
def test_accumulation_follows_from_batch_devices_and_what_fits_on_one(batch_size, micro, processes, parts) -> None:
    data = build("data", SegmentationData, TOY | {"batch_size": batch_size, "micro_batch_size": micro})
    assert data.accumulated(processes) == parts


def test_a_batch_that_cannot_be_shared_is_told() -> None:
    data = build("data", SegmentationData, TOY | {"batch_size": 8})
    with pytest.raises(SharedError, match="data.batch_size=8 cannot be shared evenly by 3 processes: use a multiple"):
        data.accumulated(3)


def test_the_shares_of_a_step_are_told() -> None:
    data = build("data", SegmentationData, TOY | {"batch_size": 8, "micro_batch_size": 2}).opened("train", "val")
    assert data.summary(2).endswith("batch of 8 = 2 processes x 2 accumulated x 2")
    assert data.summary(4).endswith("batch of 8 = 4 processes x 2")
    assert data.summary(1).endswith("batch of 8 = 4 accumulated x 2")
    assert build("data", SegmentationData, TOY).opened("train").summary().endswith("batch of 2")


def test_a_split_of_fewer_images_than_processes_is_told() -> None:
    data = build("data", SegmentationData, TOY | {"val": {"scenes": 2, "seed": 1}}).opened("val")
    data.require_images(2)
    with pytest.raises(SharedError, match="data.val holds 2 images for 3 processes.*: use trainer.devices=2"):
        data.require_images(3)


class Rows(Stream):
    """Nine toy-like samples, one after another."""

    def shard(self, index: int, count: int, epoch: int | None = None):
        for number in range(9)[index::count]:
            yield Sample(str(number), lambda: (np.zeros((40, 50, 3), np.uint8), np.zeros((40, 50), np.uint8)))


class One(Rows):
    def known_length(self) -> int:
        return 1


STREAMED = TOY | {"train": Rows(), "val": Rows()}


@pytest.mark.parametrize(
    "change", [{"cache": "cache"}, {"sampling": {"name": "rare_class"}}, {"on_bad_sample": "skip"}]
)
def test_what_needs_samples_by_number_is_refused_for_streams(change) -> None:
    with pytest.raises(UserError, match="needs samples by number, but data.train streams them"):
        build("data", SegmentationData, STREAMED | change).opened("train")


def test_a_stream_is_trained_on_and_scored_once() -> None:
    data = build("data", SegmentationData, STREAMED).opened("train", "val")
    assert data.summary().startswith("streamed train images, streamed val images, 8 classes")
    data.trainer = quiet(max_steps=1)
    batches = iter(data.train_dataloader())
    assert [next(batches)["image"].shape for _ in range(12)] == [(2, 3, 64, 64)] * 12
    assert sum(1 for _ in data.val_dataloader()) == 9


def test_a_stream_that_goes_on_with_other_readers_is_told(capsys) -> None:
    data = build("data", SegmentationData, STREAMED, seed=0).opened("train", "val")
    data.trainer = quiet(max_steps=1)
    state = data.state_dict()
    assert state == {"readers": {"processes": 1, "workers": 0, "micro_batch_size": 2}}
    data.load_state_dict(state)
    assert not capsys.readouterr().err
    data.workers = 2
    data.load_state_dict(state)
    assert "follows from its readers (workers 0 then, 2 now): samples come in another order" in capsys.readouterr().err
    assert build("data", SegmentationData, TOY, seed=0).opened("train").state_dict() == {}


def test_rare_classes_come_more_often_in_the_batches() -> None:
    def signs(sampling: dict) -> int:
        data = build("data", SegmentationData, TOY | {"sampling": sampling, "crop_size": 200}).opened("train")
        data.trainer = quiet(max_steps=1)
        data.transform.scale = (1.0, 1.0)  # the whole scene stays in sight
        batches = iter(data.train_dataloader())
        return sum(int((mask == 7).any()) for _ in range(20) for mask in next(batches)["mask"])

    assert signs({"name": "rare_class", "temperature": 0.005}) > signs({"name": "uniform"})


def test_the_network_learns_how_its_images_are_normalised() -> None:
    numbers = {"bands": 5, "mean": [10.0, 20.0, 30.0, 40.0, 50.0], "std": [1.0, 2.0, 3.0, 4.0, 5.0]}
    data = build("data", SegmentationData, TOY | numbers)
    model, _ = build_segformer(**data.network, variant="b0")
    images = np.full((1, 5, 32, 32), 60, np.uint8)
    found = normalized(model, torch.from_numpy(images))[0, :, 0, 0]
    assert found.tolist() == pytest.approx(
        [(60 - mean) / std for mean, std in zip(numbers["mean"], numbers["std"], strict=True)]
    )
    assert model(normalized(model, torch.from_numpy(images))).logits.shape == (1, 8, 8, 8)
    assert (
        "pixel_mean"
        not in build_segformer(**build("data", SegmentationData, TOY).network, variant="b0")[0].config.to_dict()
    )


def first_batches(root: Path, change: dict) -> list[tuple[bytes, bytes]]:
    """What the first four batches of training hold."""
    files = {"root": str(root), "train": {"images": "images/train/*", "masks": "masks/train/*"}, "val": TOY["val"]}
    options = TOY | files | {"classes": ["background", "pothole"], "batch_size": 4} | change
    data = build("data", SegmentationData, options, seed=0).opened("train")
    data.trainer = quiet(max_steps=1)
    batches = iter(data.train_dataloader())
    found = [next(batches) for _ in range(4)]
    return [(batch["image"].numpy().tobytes(), batch["mask"].numpy().tobytes()) for batch in found]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"exact": True}, False),
        ({"augment": [{"GaussianBlur": {"p": 1.0}}]}, False),
        ({"sampling": {"name": "rare_class", "temperature": 0.05}}, False),
        ({"sampling": {"name": "repeat_factor", "threshold": 1.0}}, False),
        ({"mean": [1, 2, 3]}, False),  # what is filled up where the image ends
        ({"scale": [1.0, 1.0]}, False),
        ({"cat_max_ratio": 0.55}, False),
        ({"on_bad_sample": "skip"}, True),
        ({"cache": "cache"}, True),
        ({"workers": 2}, True),
    ],
)
def test_each_setting_of_training_samples_reaches_them(potholes, tmp_path, change, same) -> None:
    save_pair(potholes, "train", "bare", np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.uint8))
    if "cache" in change:
        change = {"cache": str(tmp_path / "cache")}
    assert (first_batches(potholes, change) == first_batches(potholes, {})) is same
    if "cache" in change:
        assert len(list((tmp_path / "cache").glob("*.npy"))) == 10
        assert first_batches(potholes, change) == first_batches(potholes, {})


def test_a_damaged_file_is_skipped_when_asked_to(potholes) -> None:
    image = sorted((potholes / "images" / "train").iterdir())[1]
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(UserError, match="cannot read image"):
        first_batches(potholes, {})
    with pytest.raises(UserError, match="1 of 4 samples cannot be read, more than data.max_bad_share=0.01"):
        first_batches(potholes, {"on_bad_sample": "skip"})
    assert len(first_batches(potholes, {"on_bad_sample": "skip", "max_bad_share": 0.3})) == 4


def test_a_stream_of_fewer_samples_than_processes_is_refused() -> None:
    data = build("data", SegmentationData, STREAMED | {"train": One()}).opened("train")
    with pytest.raises(SharedError, match="data.train streams 1 samples for 2 processes.*use trainer.devices=1"):
        data._require_rows(2)


@pytest.mark.gpu
def test_what_is_sent_to_a_gpu_is_there_before_it_is_used() -> None:
    data, device = build("data", SegmentationData, TOY), torch.device("cuda")
    batches = [{"image": torch.full((8, 3, 512, 512), step, dtype=torch.uint8).pin_memory()} for step in range(64)]
    found, busy = [], torch.randn(4096, 4096, device=device)
    for batch in batches:
        image = data.transfer_batch_to_device(batch, device, 0)["image"]
        busy = (busy @ busy).clamp(-1, 1)  # the host is ahead
        found.append(image.double().mean() + 0 * busy[0, 0])
        del image
    assert [value.item() for value in found] == list(range(64))
