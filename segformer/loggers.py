"""Where logged numbers go beside the loggers that Lightning has: a file that survives, and MLflow in the run folder."""

import csv
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from segformer.errors import UserError
from segformer.files import reason, write_atomically
from segformer.secrets import redacted_text

# as the user set it: MLflow writes its first run's database there, and the next run of a sweep would join that one
MLFLOW_SERVER = os.environ.get("MLFLOW_TRACKING_URI")


class MetricsFile(Logger):
    """`metrics.csv` in the run folder: a row for each time something is logged, the columns in alphabetical order.

    A resumed run goes on in it, from the rows before its first step. Rows that find no room on the disk are kept and
    written with the next ones: numbers are not worth a run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self.columns: list[str] = []  # of the file, once something was logged
        self.size = 0  # of its whole rows
        self.waiting: list[dict[str, Any]] = []  # rows that are not in it yet
        self.told = False

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return self.path.parent.name

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: config.yaml and run.json beside the file hold more."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self.waiting.append({**values, "step": step})
        try:
            self._write()
        except OSError as error:
            if not self.told:
                warnings.warn(f"{self.path} is behind: {reason(error)}; its rows are kept until it goes", stacklevel=2)
            self.told = True
        else:
            self.waiting, self.told = [], False

    def _write(self) -> None:
        columns = sorted({*self.columns}.union(*self.waiting))
        if columns == self.columns:
            text = _csv(columns, self.waiting).encode()
            with self.path.open("r+b") as file:
                file.truncate(self.size)  # what an attempt without room left
                file.seek(self.size)
                file.write(text)
            self.size += len(text)
            return
        before = self._rows()
        if not self.columns:  # of an earlier life: what came after the checkpoint is about to be logged again
            before = [row for row in before if int(row["step"]) < int(self.waiting[0]["step"] or 0)]
        columns = sorted({*columns}.union(*before))
        text = _csv(columns, [dict(zip(columns, columns, strict=True)), *before, *self.waiting]).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, lambda file: file.write(text))
        self.columns, self.size = columns, len(text)

    def _rows(self) -> list[dict[str, Any]]:
        """The whole rows of the file: a process that was killed may have left half of one."""
        if not self.path.is_file():
            return []
        whole = self.path.read_bytes()[: self.size or None]
        lines = whole[: whole.rfind(b"\n") + 1].decode().splitlines()
        return [row for row in csv.DictReader(lines) if (row["step"] or "").isdigit()]


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()


class LocalMLFlow(Logger):
    """MLflow in the run folder, `mlflow.db` and pictures below `mlflow`; a tracking server where one is named.

    Lightning's own logger opens its database as soon as it is made, in every process; this one when the first process
    logs something. tracking_uri: of a server, None = MLFLOW_TRACKING_URI or the run folder.
    """

    def __init__(self, save_dir: Path, experiment_name: str = "segformer", tracking_uri: str | None = None) -> None:
        super().__init__()
        if find_spec("mlflow") is None or find_spec("sqlalchemy") is None:
            raise UserError('logger=mlflow needs MLflow and a database: pip install "segformer[mlflow]"')
        self.folder, self.experiment_name = Path(save_dir), experiment_name
        self.tracking_uri = tracking_uri or MLFLOW_SERVER

    @cached_property
    def _logger(self) -> MLFlowLogger:
        for name, value in (
            ("MLFLOW_LOGGING_LEVEL", "WARNING"),
            ("MLFLOW_DISABLE_TELEMETRY", "true"),  # a local record is nobody else's business
            ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"),  # seconds without a word, not the quarter of an hour of its 7
        ):
            os.environ.setdefault(name, value)
        pictures = None if self.tracking_uri else (self.folder / "mlflow").absolute().as_uri()
        address = self.tracking_uri or f"sqlite:///{self.folder.absolute() / 'mlflow.db'}"
        return MLFlowLogger(self.experiment_name, self.folder.name, address, artifact_location=pictures)

    @property
    def name(self) -> str:
        return self.experiment_name

    @property
    def version(self) -> str:
        return self.folder.name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        try:
            return self._logger.experiment
        except Exception as error:  # of the network, of the service: each a type of its own
            raise UserError(
                f"MLflow does not answer at {self._logger._tracking_uri}: {reason(error)}; start its server, or take "
                "logger.mlflow.tracking_uri=null without MLFLOW_TRACKING_URI, which keeps the record in the run folder"
            ) from error

    @property
    def run_id(self) -> str | None:
        return self._logger.run_id

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        try:
            self._logger.log_metrics(metrics, step)
        except Exception as error:  # a server that is away for a moment is not worth a run; metrics.csv has the numbers
            warnings.warn(
                f"MLflow did not take the numbers of step {step}: {redacted_text(reason(error))}", stacklevel=2
            )

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        _ = self.experiment  # the first word to a server: whether it is there
        self._logger.log_hyperparams(params)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if "_logger" in self.__dict__:
            self._logger.finalize(status)
