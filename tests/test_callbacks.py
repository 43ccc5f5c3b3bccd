import csv

from segformer.callbacks import MetricsFile


def steps(folder) -> list[str]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [row["step"] for row in csv.DictReader(file)]


def test_a_resumed_file_keeps_the_rows_before_its_first_new_step(tmp_path) -> None:
    run = tmp_path / "run"
    first = MetricsFile(run)
    for step in range(5):
        first.log_metrics({"loss": 1.0}, step)
        first.save()
    second = MetricsFile(run)  # went on from a checkpoint at step 3
    second.log_metrics({"loss": 0.5, "val/miou": 0.1}, 3)
    second.save()
    assert steps(run) == ["0", "1", "2", "3"]
    assert [path.name for path in run.iterdir()] == ["metrics.csv"]


def test_rows_survive_a_second_break_before_anything_was_logged(tmp_path) -> None:
    run = tmp_path / "run"
    first = MetricsFile(run)
    first.log_metrics({"loss": 1.0}, 0)
    first.save()
    MetricsFile(run).experiment  # noqa: B018 (opens the file, as a trainer does before it dies)
    third = MetricsFile(run)
    third.log_metrics({"loss": 0.5}, 1)
    third.save()
    assert steps(run) == ["0", "1"]


def test_a_run_that_logs_nothing_more_keeps_its_file(tmp_path) -> None:
    run = tmp_path / "run"
    first = MetricsFile(run)
    first.log_metrics({"loss": 1.0}, 0)
    first.save()
    MetricsFile(run).finalize("success")
    assert steps(run) == ["0"]
