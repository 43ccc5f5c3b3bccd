"""python -m segformer convert runs/b0_toy/2026-11-20_12-00-00/best.ckpt my-model

python -m segformer check data=folder data.root=/data/potholes 'data.classes=[background, pothole]'
python -m segformer compare reports/b0_toy/A/report.json reports/b0_toy/B/report.json
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segformer.errors import UserError, build, explained

if TYPE_CHECKING:  # --help needs no torch
    from segformer.checkpoints import Checkpoint, Pretrained
    from segformer.processor import SegformerImageProcessor


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m segformer", description="Tools around training a SegFormer.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    convert = verbs.add_parser("convert", help="rewrite a checkpoint of any library in Hugging Face's or NVlabs' form")
    convert.add_argument("source", help="a .ckpt, .pth, .safetensors or .h5 file, a folder, or a hub id")
    convert.add_argument("target", help="hf: a new or empty folder, which transformers loads too; nvlabs: a new .pth")
    convert.add_argument("--to", choices=("hf", "nvlabs"), default="hf", help="whose names to write (default: hf)")
    convert.add_argument(
        "--allow-pickle", action="store_true", help="read a file that holds Python objects; IT CAN RUN ANY CODE"
    )
    check = verbs.add_parser("check", help="look for label mistakes in a dataset, before anything is trained on it")
    check.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of train.py: data=NAME data.root=... ...")
    check.add_argument("--full", action="store_true", help="look at all samples, not at 200 of each split")
    check.add_argument(
        "--show", type=int, default=8, metavar="N", help="samples of each split as pictures (default: 8)"
    )
    check.add_argument("--output", default="checks", metavar="DIR", help="where a new folder is made (default: checks)")
    check.add_argument(
        "-cd", "--config-dir", metavar="FOLDER", help="adds a folder of your own choices, as of train.py"
    )
    compare = verbs.add_parser("compare", help="tell whether one evaluation is better than another, or chance")
    compare.add_argument("first", type=Path, help="report.json of A, which evaluate.py wrote, or its folder")
    compare.add_argument("second", type=Path, help="report.json of B, on the same images")
    compare.add_argument(
        "--fail-below", type=float, metavar="X", help="exit with 1 where B's mIoU is more than X points below A's"
    )
    compare.add_argument(
        "--output", default="comparisons", metavar="DIR", help="where a new folder is made (default: comparisons)"
    )
    # overrides may stand between the options, which argparse gives back as what it does not know
    options, more = parser.parse_known_args(arguments)
    if options.verb != "check" or any(word.startswith("-") for word in more):
        options, more = parser.parse_args(arguments), []
    with explained():
        if options.verb == "check":
            try:
                sys.exit(_check([*options.overrides, *more], options))
            except KeyboardInterrupt:  # its readers have stopped by then
                print("stopped", file=sys.stderr)
                sys.exit(130)
        if options.verb == "compare":
            from segformer.compare import run

            sys.exit(run(options.first, options.second, options.output, options.fail_below))
        _convert(options.source, Path(options.target), options.to, options.allow_pickle)


def _check(overrides: Sequence[str], options: argparse.Namespace) -> int:
    """Prints and writes what there is to tell about a dataset; 1 where there are errors."""
    if options.show < 0:
        raise UserError(f"--show is {options.show}, expected a number of samples of at least 0")
    section, name = _composed(overrides, options.config_dir)
    from segformer.data.check import check, suggest, write  # not above: a misspelt key needs no torch
    from segformer.data.datamodule import SegmentationData

    if section.get("bands", 3) != 3:  # so that what they should be can be measured
        section |= {key: section[key] or [1.0] * section["bands"] for key in ("mean", "std")}
    if section["classes"] is None:
        stand_in = {"class_0": {"color": [0, 0, 0]}}
        raise suggest(build("data", SegmentationData, section | {"classes": stand_in, "ignore": "rest"}), options.full)
    data = build("data", SegmentationData, section)
    report = check(data, options.full)
    print(report.table())
    print(write(report, data, name, options.output, options.show))
    return int(report.failed)


def _composed(overrides: Sequence[str], config_dir: str | None) -> tuple[dict[str, Any], str]:
    """The section `data` as train.py composes it, with classes of None where there are none yet, and data=NAME."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # as in train.py
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    configs = Path(__file__).parent.parent / "configs"
    if not configs.is_dir():
        raise UserError(
            f"there are no configurations at {configs}: run it in a checkout, which has train.py and configs"
        )
    if config_dir and not Path(config_dir).is_dir():
        raise UserError(f"{config_dir} is not a folder, expected one of configurations")
    search = [f"hydra.searchpath=[{Path(config_dir).absolute().as_uri()}]"] if config_dir else []
    with initialize_config_dir(str(configs), version_base="1.3"):
        settings = compose("train", [*overrides, *search], return_hydra_config=True)
    if OmegaConf.is_missing(settings.data, "classes"):
        settings.data.classes = None
    section = OmegaConf.to_container(settings.data, resolve=True, throw_on_missing=True)
    return instantiate(section, _convert_="all"), str(settings.hydra.runtime.choices.data)


def _convert(source: str, target: Path, to: str, allow_pickle: bool) -> None:
    from segformer.checkpoints import read, save_nvlabs, to_disk
    from segformer.namings import NAMINGS

    _require_new(target, to)
    checkpoint = read(source, allow_pickle)
    model, processor = _model(checkpoint), _processor(checkpoint)
    print(f"found {checkpoint.tensors} tensors in the names of {NAMINGS[checkpoint.naming]}: {_describe(model)}")
    print(*checkpoint.notes, sep="\n", end="\n" if checkpoint.notes else "")
    if to == "hf":
        model.save_pretrained(target)
        processor.save_pretrained(target)
        files = ", ".join(sorted(path.name for path in target.iterdir()))
        print(f"wrote {target}: {files}; {len(to_disk(model.state_dict()))} tensors")
    else:
        count, notes = save_nvlabs(model, target)
        print(*notes, f"wrote {target}: {count} tensors", sep="\n")


def _processor(checkpoint: "Checkpoint") -> "SegformerImageProcessor":
    """The settings beside the weights; of a training checkpoint its crop's size, and the usual ones otherwise."""
    from segformer.files import locate
    from segformer.processor import FILE, SegformerImageProcessor

    source = Path(checkpoint.source)
    folder = source.parent if source.is_file() else locate(source, [FILE])
    if (folder / FILE).is_file():
        return SegformerImageProcessor.from_pretrained(folder)
    bands: dict[str, Any] = {}
    for name in ("mean", "std"):  # of images that are not ImageNet's; a processor counts from 0 to 1
        if numbers := (checkpoint.config or {}).get(f"pixel_{name}"):
            bands[f"image_{name}"] = [number / 255 for number in numbers]
    return SegformerImageProcessor(size=checkpoint.training.get("data", {}).get("crop_size"), **bands)


def _require_new(target: Path, to: str) -> None:
    from segformer.files import WEIGHTS

    if to == "nvlabs" and target.suffix != ".pth":
        raise UserError(f"{target} is no name for NVlabs' weights, expected one that ends in .pth")
    if to == "hf" and target.suffix in WEIGHTS:
        raise UserError(
            f"{target} is named like a file, but Hugging Face's form is a folder: name one, or add --to nvlabs"
        )
    if target.exists() and (to == "nvlabs" or not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already: give a new name, nothing is overwritten")


def _model(checkpoint: "Checkpoint") -> "Pretrained":
    """The class that the tensors are of: the first whose head is there."""
    from segformer.model import SegformerForImageClassification, SegformerForSemanticSegmentation, SegformerModel
    from segformer.namings import under

    kinds: dict[str, type[Pretrained]] = {
        "decode_head.": SegformerForSemanticSegmentation,
        "classifier.": SegformerForImageClassification,
        "": SegformerModel,
    }
    kind = next(kinds[head] for head in kinds if under(checkpoint.weights, head))
    return kind.from_checkpoint(checkpoint, dtype="auto")


def _describe(model: "Pretrained") -> str:
    name = type(model).__name__
    return name if name == "SegformerModel" else f"{name} of {model.config.num_labels} classes"


if __name__ == "__main__":
    main()
