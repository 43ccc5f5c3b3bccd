"""What can be trained: which data, network and task belong together, and who watches them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from segformer.callbacks import ClassScores, Curves, Monitor, Previews, Progress, RunFacts
from segformer.classification import ClassificationTask
from segformer.data.check import quick
from segformer.data.classification import ClassificationData
from segformer.data.datamodule import SegmentationData
from segformer.data.loaders import Loaders
from segformer.errors import UserError, nearest
from segformer.networks import build_classifier, build_segformer
from segformer.task import SegmentationTask, Task


@dataclass(frozen=True)
class Kind:
    """A value of the config key `task`.

    data, network: their signatures are the config sections `data` and `model`. check: a look at the data before
    anything is trained on it, which returns it.
    """

    data: type[Loaders]
    network: Callable[..., Any]
    task: type[Task]
    check: Callable[[Any], Any] = lambda data: data

    def watchers(self, run: Path, config: Mapping[str, Any], data: Any) -> list[pl.Callback]:
        """The callbacks that show and log what happens in the run folder `run`."""
        common = [Progress(data.batch_size), Monitor(), Curves(run), RunFacts(run, config, data)]
        if self.task is SegmentationTask:
            return [*common, ClassScores(data.classes.names), Previews(run, data.classes)]
        return common


def kind(name: Any) -> Kind:
    if name not in KINDS:
        raise UserError(f"task is {name!r}{nearest(str(name), KINDS)}: choose from {', '.join(KINDS)}")
    return KINDS[name]


KINDS = {
    "segmentation": Kind(SegmentationData, build_segformer, SegmentationTask, quick),
    "classification": Kind(ClassificationData, build_classifier, ClassificationTask),
}
