"""One process among several: trains and scores, then writes what it found. Started by test_processes.py.

python -m torch.distributed.run --nproc-per-node 2 tests/processes.py OUT.json SCENES[,SCENES...] STEPS
"""

import json
import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from segformer.data.datamodule import SegmentationData
from segformer.errors import build
from segformer.evaluation import Counting
from segformer.inference import Protocol
from segformer.launch import disconnect
from segformer.report import build_report
from segformer.task import SegmentationTask
from tests.conftest import TOY, randomize, small
from tests.test_task import PROCESSES, Record, quiet, trained


def scored(scenes: int) -> dict[str, Any]:
    """Images, mIoU, and a digest of the report, of every image's own confusion matrix and of the gallery."""
    data = build("data", SegmentationData, TOY | {"val": {"scenes": scenes, "seed": 1}}).opened("val")
    model = small(data.classes.names)
    randomize(model)
    task, trainer, counting = SegmentationTask(model, Protocol()), quiet(), Counting(data)
    trainer.callbacks.append(counting)
    trainer.validate(task, data, verbose=False)
    report = build_report(counting.counts, data.classes, task.protocol, {})
    digest = sha256(json.dumps([report, counting.counts.tally.to_json()]).encode())
    for example in counting.gallery:
        digest.update(f"{example['name']} {example['rank']}".encode() + example["prediction"].tobytes())
    return {"images": task.images_scored, "miou": task.scores.miou, "everything": digest.hexdigest()}


def losses(steps: int) -> tuple[list[float], list[str]]:
    """The loss of each step, and a digest of the weights that each process ends with."""
    record = Record(frozen=True)
    task = trained(record, steps, batch_size=16)
    assert all(len(images) == 16 // PROCESSES for images, _ in record.batches)
    digest = sha256(b"".join(weight.detach().numpy().tobytes() for weight in task.parameters())).hexdigest()
    digests = [digest] * PROCESSES
    if PROCESSES > 1:
        torch.distributed.all_gather_object(digests, digest)
    return record.losses, digests


if __name__ == "__main__":
    out, scenes, steps = sys.argv[1:]
    torch.manual_seed(0)
    found = {"scores": {number: scored(int(number)) for number in scenes.split(",")}}
    found["losses"], found["weights"] = losses(int(steps)) if int(steps) else ([], [])
    disconnect()
    if int(os.environ.get("RANK", "0")) == 0:
        Path(out).write_text(json.dumps(found))
