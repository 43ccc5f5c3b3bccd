"""What is told of a run."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from segformer import provenance
from segformer.data.cache import Cached
from segformer.data.classification import ClassificationDataset, open_labelled
from segformer.data.pairs import Pairs
from segformer.data.samples import Foreign, Selected
from segformer.data.sources import open_source
from segformer.data.toy import ToyScenes
from segformer.provenance import fingerprint, git_state, versions

PATTERNS = {"images": "images/*", "masks": "masks/*"}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        (tmp_path / "first" / kind).mkdir(parents=True)
        for index in range(4):
            pixels = rng.integers(0, 9, (8, 8 + index), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "first" / kind / f"{index} ü.{suffix}")
    return tmp_path / "first"


def of(root: Path) -> dict:
    return fingerprint(open_source("train", PATTERNS, str(root)), str(root))


def test_a_fingerprint_is_of_names_and_sizes_and_not_of_the_place(pairs: Path) -> None:
    first = of(pairs)
    assert first["samples"] == 4 and len(first["sha256"]) == 64
    moved = pairs.parent / "second place"
    shutil.copytree(pairs, moved)
    with zipfile.ZipFile(pairs.parent / "packed.zip", "w") as archive:
        for path in sorted(pairs.rglob("*.*")):
            archive.write(path, path.relative_to(pairs))
    assert of(moved) == of(pairs.parent / "packed.zip") == first
    mask = moved / "masks" / "2 ü.png"
    mask.write_bytes(mask.read_bytes() + b"\0")
    assert of(moved)["sha256"] != first["sha256"] and of(moved)["samples"] == 4
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        (moved / kind / f"3 ü.{suffix}").unlink()
    assert of(moved)["samples"] == 3


def test_a_part_a_cache_and_a_join_are_told_apart_from_the_whole(pairs: Path, tmp_path: Path) -> None:
    whole = Pairs(pairs, **PATTERNS)
    part = Selected([(whole, 0), (whole, 2)])
    told = [fingerprint(source, pairs)["sha256"] for source in (whole, part, Cached(whole, tmp_path / "cache"))]
    assert told[0] == told[2] != told[1]


def test_images_in_folders_of_classes_are_told_like_pairs(pairs: Path) -> None:
    section = {"images": "*/*"}
    first = fingerprint(ClassificationDataset(open_labelled("train", section, str(pairs)), None), pairs)
    moved = shutil.copytree(pairs, pairs.parent / "moved")
    assert fingerprint(ClassificationDataset(open_labelled("train", section, str(moved)), None), moved) == first
    shutil.move(moved / "images" / "1 ü.jpg", moved / "masks")
    other = fingerprint(ClassificationDataset(open_labelled("train", section, str(moved)), None), moved)
    assert first["samples"] == other["samples"] == 8 and first["sha256"] != other["sha256"]


def test_what_has_no_files_is_told_by_its_names_or_not_at_all() -> None:
    scenes = [fingerprint(ToyScenes(5, seed), None) for seed in (0, 0, 1)]
    assert scenes[0] == scenes[1] != scenes[2]

    class Nameless:
        def __len__(self) -> int:
            return 3

        def name(self, index: int) -> str:
            raise RuntimeError("no names")

    assert fingerprint(Foreign(Nameless()), None) == {"samples": 3, "sha256": None}


def test_rows_of_a_table_are_told_by_its_size_and_a_stream_by_its_length(tmp_path: Path) -> None:
    from datasets import Dataset
    from datasets import Image as Picture

    def table(place: Path, rows: int) -> dict:
        place.mkdir()
        pixels = [np.full((4, 4, 3), row, np.uint8) for row in range(rows)]
        found = Dataset.from_dict({"image": pixels, "mask": pixels})
        found.cast_column("image", Picture()).cast_column("mask", Picture()).to_parquet(place / "train.parquet")
        specs = ({"split": "train", "streaming": streaming} for streaming in (False, True))
        return [fingerprint(open_source("train", spec, str(place)), place) for spec in specs]

    first, second, longer = (table(tmp_path / name, rows) for name, rows in (("a", 5), ("b", 5), ("c", 6)))
    assert first == second and first[0]["samples"] == 5 and first[0]["sha256"] != longer[0]["sha256"]
    assert first[1] == {"samples": 5, "sha256": None}


def test_of_very_many_samples_every_name_counts_and_some_sizes(pairs: Path, monkeypatch) -> None:
    monkeypatch.setattr(provenance, "SIZED", 2)  # the first and the third of four
    first = of(pairs)
    image = pairs / "images" / "1 ü.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    assert of(pairs) == first
    image.rename(image.with_name("1 u.jpg"))
    (pairs / "masks" / "1 ü.png").rename(pairs / "masks" / "1 u.png")
    assert of(pairs)["sha256"] != first["sha256"]


def git(folder: Path, *words: str) -> str:
    options = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *options, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_is_told_and_whether_tracked_files_differ_from_it(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    assert git_state(code) is None
    git(tmp_path, "init", "-q")
    (code / "a.py").write_text("1")
    assert git_state(code) is None  # not of this repository: an installed package, for one
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (code / "new.py").write_text("1")
    assert git_state(code) == {"commit": commit, "dirty": False}
    (code / "a.py").write_text("2")
    assert git_state(code) == {"commit": commit, "dirty": True}


def test_a_git_that_hangs_or_is_not_there_stops_nothing(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setattr(provenance, "GIT_SECONDS", 0.3)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    start = time.monotonic()
    assert git_state(tmp_path) is None and time.monotonic() - start < 5
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert git_state(tmp_path) is None


def test_the_facts_of_a_run_are_plain_and_hold_no_secret(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "+logger.x.token=hunter2", "data.root=https://me:hunter2@h/x", "a b"])
    data = SimpleNamespace(datasets={"train": ToyScenes(3), "val": [1, 2]}, root=None)
    facts = provenance.provenance(data)
    text = json.dumps(facts)  # raises on what is not plain
    assert "hunter2" not in text
    assert facts["command"] == "train.py '+logger.x.token=<redacted>' 'data.root=https://<redacted>@h/x' 'a b'"
    assert facts["data"]["train"]["samples"] == 3 and facts["data"]["val"] == {"samples": 2, "sha256": None}
    assert facts["started"].endswith("+00:00") and facts["cpu"]["cores"] == os.cpu_count() and facts["cpu"]["name"]
    assert str(versions()["torch"]).partition("+")[0] == torch.__version__.partition("+")[0]
