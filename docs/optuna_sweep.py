"""python docs/optuna_sweep.py --trials 20 --study runs/study data=camvid data.root=/data/camvid

Searches learning rate, the head's multiplier and drop-path with Optuna (`pip install "segformer[optuna]"`). Each trial
is a `train.py` of its own, so that one that fails costs one trial; a study that was broken off goes on, and several
copies of this command on one folder share it, each with a GPU of its own (CUDA_VISIBLE_DEVICES).
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

TRAIN = Path(__file__).parent.parent / "train.py"


def main() -> None:
    parser = argparse.ArgumentParser(description="Search hyper-parameters of train.py.")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--study", type=Path, default=Path("runs/study"), help="folder of the study and its runs")
    options, overrides = parser.parse_known_args()
    options.study.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(options.study / "journal.log")))
    study = optuna.create_study(storage=storage, study_name="segformer", direction="maximize", load_if_exists=True)
    study.optimize(
        lambda trial: trained(trial, options.study, overrides),
        n_trials=options.trials,
        catch=(subprocess.CalledProcessError,),
    )
    print(f"best val/miou {study.best_value:.4f}: {options.study / str(study.best_trial.number)}, {study.best_params}")


def trained(trial: optuna.Trial, folder: Path, overrides: list[str]) -> float:
    """The best val/miou of a run with the trial's settings."""
    chosen = {
        "optim.lr": trial.suggest_float("optim.lr", 1e-5, 1e-3, log=True),
        "optim.head_lr_multiplier": trial.suggest_categorical("optim.head_lr_multiplier", [1, 3, 10]),
        "model.drop_path_rate": trial.suggest_float("model.drop_path_rate", 0.0, 0.3, step=0.1),
    }
    run = folder / str(trial.number)
    settings = [f"{key}={value}" for key, value in chosen.items()]
    subprocess.run([sys.executable, str(TRAIN), *overrides, *settings, f"hydra.run.dir={run}"], check=True)
    with (run / "metrics.csv").open(newline="") as file:
        return max(float(row["val/miou"]) for row in csv.DictReader(file) if row["val/miou"])


if __name__ == "__main__":
    main()
