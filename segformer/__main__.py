"""python -m segformer convert runs/b0_toy/2026-11-20_12-00-00/best.ckpt my-model"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from segformer.errors import UserError, explained

if TYPE_CHECKING:  # --help needs no torch
    from segformer.checkpoints import Checkpoint, Pretrained
    from segformer.processor import SegformerImageProcessor


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m segformer", description="Tools around a trained SegFormer.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    convert = verbs.add_parser("convert", help="rewrite a checkpoint of any library in Hugging Face's or NVlabs' form")
    convert.add_argument("source", help="a .ckpt, .pth, .safetensors or .h5 file, a folder, or a hub id")
    convert.add_argument("target", help="hf: a new or empty folder, which transformers loads too; nvlabs: a new .pth")
    convert.add_argument("--to", choices=("hf", "nvlabs"), default="hf", help="whose names to write (default: hf)")
    convert.add_argument(
        "--allow-pickle", action="store_true", help="read a file that holds Python objects; IT CAN RUN ANY CODE"
    )
    options = parser.parse_args(arguments)
    with explained():
        _convert(options.source, Path(options.target), options.to, options.allow_pickle)


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
    return SegformerImageProcessor(size=checkpoint.training.get("data", {}).get("crop_size"))


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
