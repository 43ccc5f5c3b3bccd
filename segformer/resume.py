"""Where a run goes on: its folder, its saved configuration, the newest of its checkpoints that is whole."""

import os
import re
import shlex
import sys
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import yaml

from segformer.checkpoints import Pretrained, load_checkpoint
from segformer.data.loaders import Loaders
from segformer.errors import SharedError, UserError
from segformer.files import absolute
from segformer.launch import disconnect, process
from segformer.secrets import REDACTED, redacted
from segformer.states import BestCheckpoint, last_checkpoints

# what may differ when a run goes on: where and how it computes, not what the recipe is. Another number of devices or
# another micro-batch changes what BatchNorm and dropout see, and the order of a stream follows from its readers
_MAY_CHANGE = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accelerator",
    "trainer.max_time",
    "trainer.checkpoint_interval",
    "trainer.keep_last",
    "trainer.log_every_n_steps",
    "data.workers",
    "data.worker_timeout",
    "data.micro_batch_size",
    "data.max_pixels",
    "data.cache",
    "data.check",
    "data.on_bad_sample",
    "data.max_bad_share",
    "logger",
)
# Lightning's own ways that the recipe has no use for
LOOP = {
    "check_val_every_n_epoch": None,  # the order of samples is endless: intervals count steps
    "use_distributed_sampler": False,  # ours neither pads nor repeats
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


def run_folder(config: dict[str, Any], overrides: Sequence[str]) -> tuple[Path, dict[str, Any], Path | None]:
    """The folder, the configuration and the checkpoint to go on from (None for a new run)."""
    config = _with_absolute_paths(config)
    run, checkpoint = Path(config["run"]), None
    if config["resume"] and (found := go_on(str(config["resume"]), config, overrides)):
        run, config, checkpoint = found
    for key in ("max_steps", "val_check_interval"):
        value = config["trainer"][key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"trainer.{key} is {value!r}, expected an integer of at least 1")
    clip = config["trainer"].get("gradient_clip_val")
    if clip is not None and (not isinstance(clip, int | float) or isinstance(clip, bool) or not clip > 0):
        raise UserError(f"trainer.gradient_clip_val is {clip!r}, expected a norm above 0; null does not clip")
    if not isinstance(config["seed"], int) or config["seed"] < 0:
        raise UserError(f"seed is {config['seed']!r}, expected an integer of at least 0")
    if "accumulate_grad_batches" in config["trainer"]:
        raise UserError(
            "trainer.accumulate_grad_batches is derived: data.batch_size is what one optimiser step sees, "
            "data.micro_batch_size the most that a device takes at once"
        )
    return run, config, checkpoint


def start(config: dict[str, Any], checkpoint: Path | None) -> dict[str, Any]:
    """The section `model`; a run that goes on takes its weights from its checkpoint, not from where it once started."""
    return config["model"] | ({"pretrained": None} if checkpoint else {})


def share_batches(trainer: pl.Trainer, data: Loaders, sweep: Mapping[str, str] = MappingProxyType({})) -> None:
    """Derives how many micro-batches make one optimiser step, in which Lightning counts whatever it counts.

    sweep: the choices of a `--multirun` that this is one run of.
    """
    if (
        sweep.get("hydra/launcher") == "basic" and trainer.world_size > 1
    ):  # the others would run the whole sweep, each in a folder of its own
        raise SharedError(
            f"--multirun trains on one device, but there are {trainer.world_size} processes: use a shell loop, "
            "`for lr in 6e-5 1e-4; do python train.py optim.lr=$lr ...; done`, trainer.devices=1, or a hydra/launcher "
            "that starts a job for each run"
        )
    trainer.accumulate_grad_batches = data.accumulated(trainer.world_size)
    if trainer.limit_val_batches:
        data.require_images(trainer.world_size)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning's set-up
        trainer.limit_train_batches *= trainer.accumulate_grad_batches
    else:
        trainer.val_check_interval *= trainer.accumulate_grad_batches


def record(model: Pretrained, config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint must hold to be evaluated on its own: plain values only, so it loads as weights alone, and no
    secrets."""
    return {"model": model.config.to_dict(), "config": redacted(config)}


def opening_words(trainer: pl.Trainer, run: Path, origin: Path | str, *lines: str) -> None:
    """Prints what is trained on what, where it starts (origin: a checkpoint to go on from), and where it is kept."""
    if trainer.is_global_zero:
        print(*lines, origin if isinstance(origin, str) else f"goes on from {origin}", f"run folder: {run}", sep="\n")


def closing_words(trainer: pl.Trainer, best: BestCheckpoint) -> float:
    """Prints the best checkpoint and the command that evaluates it, when all processes are done; returns its score."""
    disconnect()
    unwritten = getattr(trainer.strategy.checkpoint_io, "unwritten", {})
    if unwritten:
        raise UserError("; ".join(unwritten.values()))
    if not best.best_model_path or best.best_model_score is None:
        trainer.print(f"there is no best.ckpt: {'it was taken away' if best.lost else 'nothing was scored'}")
        return float("nan")
    score = float(best.best_model_score)
    path = _short(best.best_model_path)
    if not re.fullmatch(r"[\w./-]+", path, re.ASCII):  # Hydra's grammar, inside the shell's
        path = shlex.quote('"' + path.replace('"', '\\"') + '"')
    launcher = "uv run" if "UV_RUN_RECURSION_DEPTH" in os.environ else "python"
    script, key = ("evaluate.py", "checkpoint") if best.monitor == "val/miou" else ("train.py", "model.pretrained")
    script = _short(Path(sys.argv[0]).with_name(script))
    trainer.print(f"best {best.monitor} {score:.4f}: {launcher} {shlex.quote(script)} {key}={path}")
    return score


def go_on(resume: str, config: dict[str, Any], overrides: Sequence[str]) -> tuple[Path, dict[str, Any], Path] | None:
    """The run folder, saved configuration and checkpoint that `resume` names; None if it is "auto" and there is none.

    resume: a run folder, one of its last checkpoints or its nonfinite.ckpt, or "auto": this command's own run folder,
    where that holds a run already, or else the newest run of this model and data. config: the composed configuration
    of this command. overrides: what the command line says ("key=value"): anything in it that would change what is
    computed is refused by name.
    """
    if resume == "auto":
        own, choices = Path(config["run"]), config["choices"]
        usual = own.parent.name == f"{choices['model']}_{choices['data']}"  # not a folder of the user's own
        runs = [own] if last_checkpoints(own) else _resumable(own.parent) if usual else []
        if not runs:
            return None
        run, named = max(runs, key=lambda folder: (folder / "config.yaml").stat().st_mtime), None
    else:
        run, named = Path(resume).expanduser().absolute(), None
        if run.suffix == ".ckpt" and (run.stem == "nonfinite" or run.stem.startswith("last")):
            run, named = run.parent, run
    candidates = [named] if named and named.name != "last.ckpt" else last_checkpoints(run)
    for name, found in (("last.ckpt", candidates), ("config.yaml", (run / "config.yaml").is_file())):
        if not found:
            raise UserError(
                f"cannot resume {run}: it has no {name}, expected the folder of a run that reached a checkpoint"
            )
    checkpoint = _whole(candidates)
    try:
        saved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        whole = all(saved[section] and isinstance(saved[section], dict) for section in ("choices", "data", "trainer"))
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError):
        whole = False
    if not whole:
        raise UserError(f"{run / 'config.yaml'} is damaged: restore it, or start a new run")
    saved.setdefault("task", "segmentation")  # of runs that are older than the key
    for key in (override.partition("=")[0].lstrip("+~") for override in overrides):
        allowed = any(key == name or key.startswith(f"{name}.") for name in _MAY_CHANGE)
        found, stored = _value(config, key), _value(saved, key)
        if allowed:
            if key == "data.micro_batch_size" and found != stored and process() == 0:
                print(f"warning: {key} was {stored}: BatchNorm and dropout now see other parts", file=sys.stderr)
            _set(saved, key, found)
        elif key != "resume" and found != stored and REDACTED not in str(stored):
            raise UserError(
                f"cannot change {key} from {redacted(stored)} to {redacted(found)} when resuming {run}: only "
                f"{', '.join(_MAY_CHANGE)} may differ; start a new run with model.pretrained= to change the recipe"
            )
    return run, {**_with_secrets(saved, config), "run": str(run)}, checkpoint


def _resumable(parent: Path) -> list[Path]:
    """The runs that reached a checkpoint."""
    return [path.parent for path in parent.glob("*/config.yaml") if last_checkpoints(path.parent)]


def _whole(candidates: Sequence[Path]) -> Path:
    """The first checkpoint that reads and whose bytes are those that were written; of the others a warning."""
    *others, final = candidates
    for path, older in zip(others, candidates[1:], strict=True):
        try:
            return _require_whole(path)
        except UserError as error:
            if process() == 0:
                print(f"warning: {error}; going on from {older} instead", file=sys.stderr)
    return _require_whole(final)


def _require_whole(path: Path) -> Path:
    load_checkpoint(path)
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as parts:
        if damaged := parts.testzip():  # torch reads tensors without looking at their check sums
            raise UserError(f"cannot read checkpoint {path}: the check sum of {damaged} is wrong")
    return path


def _with_secrets(saved: Any, given: Any, where: str = "") -> Any:
    """The saved configuration with its secrets, which run folders do not keep, out of this command's."""
    if isinstance(saved, Mapping):
        found = given if isinstance(given, Mapping) else {}
        return {key: _with_secrets(value, found.get(key), f"{where}.{key}".lstrip(".")) for key, value in saved.items()}
    if REDACTED not in str(saved):  # of a list, too, whose items cannot be given one by one
        return saved
    if given in (None, "???"):
        raise UserError(f"{where} holds a secret, which a run folder does not keep: give ++{where}=... again")
    return given


def _value(config: Mapping[str, Any], key: str) -> Any:
    if key in config["choices"] and key != "logger":  # a group such as data=camvid
        return config["choices"][key]
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        config = config.setdefault(part, {})
    config[last] = value


def _short(path: str | os.PathLike[str]) -> str:
    try:
        return os.path.relpath(path)
    except ValueError:  # on another drive
        return os.path.abspath(path)


def _with_absolute_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Paths are relative to where the command starts: made absolute before anything stores them."""
    config = {**config, "data": dict(config["data"]), "model": dict(config["model"])}
    for section, key in (("data", "root"), ("model", "pretrained")):
        if config[section].get(key):
            config[section][key] = absolute(str(config[section][key]))
    if config["data"].get("cache"):  # is made where it is not there yet
        config["data"]["cache"] = os.path.abspath(os.path.expanduser(config["data"]["cache"]))
    return config
