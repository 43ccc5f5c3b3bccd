"""python -m segformer convert runs/b0_toy/2026-11-20_12-00-00/best.ckpt my-model"""

import argparse
from collections.abc import Sequence

from segformer.errors import explained


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m segformer", description="Tools around a trained SegFormer.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    convert = verbs.add_parser("convert", help="write a checkpoint as a folder that transformers loads too")
    convert.add_argument("source", help="best.ckpt or last.ckpt of a run, a folder, or a hub id")
    convert.add_argument("folder", help="where config.json and model.safetensors go; must be new or empty")
    options = parser.parse_args(arguments)
    with explained():
        _convert(options.source, options.folder)


def _convert(source: str, folder: str) -> None:
    from pathlib import Path

    from segformer.errors import UserError
    from segformer.model import SegformerForSemanticSegmentation

    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise UserError(f"{folder} is not empty: give a new folder, nothing is overwritten")
    model = SegformerForSemanticSegmentation.from_pretrained(source)
    model.save_pretrained(folder)
    print(f"{folder}: {len(model.config.id2label)} classes, config.json and model.safetensors")


if __name__ == "__main__":
    main()
