"""No network, no account: set before anything imports the libraries that would look for one."""

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are the parallelism; and no sum hangs on how many cores there are
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", NO_ALBUMENTATIONS_UPDATE="1")

import numpy as np
import pytest
import torch
from PIL import Image

from segformer.config import SegformerConfig
from segformer.model import SegformerForSemanticSegmentation

ROOT = Path(__file__).parent.parent
# Triton has to be imported as an interpreter, or not: test_kernels.py runs them in a process of their own
collect_ignore = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["kernels"]
TINY = {
    "depths": [2, 1, 2, 1],
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 3, 4],
    "decoder_hidden_size": 24,
}


TOY = {
    "classes": ["sky", "building", "road", "sidewalk", "tree", "car", "person", "sign"],
    "train": {"scenes": 24, "seed": 0},
    "val": {"scenes": 9, "seed": 1},
    "batch_size": 2,
    "crop_size": 64,
    "workers": 0,
}


def small(names: Sequence[str]) -> SegformerForSemanticSegmentation:
    """An untrained network without dropout, the same at every call."""
    torch.manual_seed(0)
    config = SegformerConfig(**TINY, id2label=dict(enumerate(names)), drop_path_rate=0.0, classifier_dropout_prob=0.0)
    return SegformerForSemanticSegmentation(config)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> SegformerForSemanticSegmentation:
    """A real SegFormer of 7 classes, small enough for a test, with every parameter and BatchNorm statistic random."""
    model = SegformerForSemanticSegmentation(SegformerConfig(**TINY, num_labels=7))
    randomize(model)
    return model.eval()


def randomize(model: torch.nn.Module) -> None:
    """Random everywhere, in sizes that let what an image shows through to the logits."""
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif "norm" in name and name.endswith("weight"):
            tensor.normal_(1, 0.2)
        elif "classifier" in name or name.endswith(("bias", "running_mean")):
            tensor.normal_(0, 0.2 if "classifier.bias" not in name else 0.01)
        elif tensor.is_floating_point():
            tensor.normal_(0, tensor[0].numel() ** -0.5)


@pytest.fixture
def shared() -> Path:
    """Real images that may not be copied into the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the folder of real images beside the repository, which is not part of it")
    return folder


@pytest.fixture
def potholes(tmp_path: Path) -> Path:
    """A user's dataset of two classes: 4 training and 3 validation pairs of unequal sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for index in range(count):
            mask = np.zeros((60 + index, 80), np.uint8)
            mask[20:40, 10 + 5 * index : 40] = 1
            image = (rng.integers(0, 60, (*mask.shape, 3)) + mask[..., None] * 120).astype(np.uint8)
            save_pair(tmp_path / "potholes", split, f"road {index} ü", image, mask)
    return tmp_path / "potholes"


def save_pair(root: Path, split: str, stem: str, image: np.ndarray, mask: np.ndarray) -> None:
    for kind, array, suffix in (("images", image, ".jpg"), ("masks", mask, ".png")):
        folder = root / kind / split
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"{stem}{suffix}")


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def grey_png(path: Path, width: int, height: int, bits: int, rows: bytes) -> Path:
    """A grey PNG of 1 to 16 bits from its packed rows, each behind its filter byte: Pillow writes no 2 or 4 bits."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.fixture
def ade20k(tmp_path: Path) -> Path:
    """The native tree in miniature: sizes vary, 0 is "other objects", a grey and a CMYK photograph among the images."""
    rng, root = np.random.default_rng(0), tmp_path / "ADEChallengeData2016"
    for split, short, count in (("training", "train", 4), ("validation", "val", 3)):
        for index in range(1, count + 1):
            mask = rng.integers(0, 151, (6, 8)).astype(np.uint8).repeat(10 + index, 0).repeat(12, 1)
            photo = Image.fromarray(rng.integers(0, 256, (*mask.shape, 3), np.uint8))
            path = root / "images" / split / f"ADE_{short}_{index:08d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo.convert({1: "L", 2: "CMYK"}.get(index, "RGB")).save(path)
            save(root / "annotations" / split / f"{path.stem}.png", mask)
    return root


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """The native tree in miniature, before csCreateTrainIdLabelImgs: labelIds, and files that are no masks beside."""
    rng, root = np.random.default_rng(0), tmp_path / "cityscapes"
    for split, cities in (("train", ("aachen", "ulm")), ("val", ("lindau", "munster"))):
        for city in cities:
            for frame in range(2):
                stem = f"{city}_{frame:06d}_000019"
                ids = rng.integers(0, 34, (8, 16)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
                save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png",
                     rng.integers(0, 256, (*ids.shape, 3), np.uint8))  # fmt: skip
                objects = np.where(ids < 24, ids, ids.astype(int) * 1000 + np.arange(128) // 32).astype(np.uint16)
                for kind, array in (
                    ("labelIds", ids),
                    ("color", ids[..., None].repeat(3, 2)),
                    ("instanceIds", objects),
                ):
                    save(root / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png", array)
    return root
