"""Two evaluations are written as evaluate.py writes them, from label maps whose scores a loop over pixels knows."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segformer.compare import Evaluation, compare, run, write
from segformer.counts import Counts
from segformer.errors import UserError
from segformer.labels import Classes
from segformer.metrics import Tally
from segformer.report import build_report, write_report
from tests.browser import Reader, browser, needs_chromium
from tests.conftest import ROOT

Maps = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> label, prediction
NAMES = ("road", "car", "sky")


def maps(wrong: float, seed: int = 0, images: int = 30) -> Maps:
    """Labels do not depend on `wrong`, the share of pixels that is predicted at random."""
    rng, found = np.random.default_rng(seed), {}
    for index in range(images):
        label = rng.integers(0, 3, (20, 20)).astype(np.uint8)
        chance, guess = rng.random(label.shape), rng.integers(0, 3, label.shape).astype(np.uint8)
        label[0] = 255
        found[f"image {index:03d}.png"] = label, np.where(chance < wrong, guess, label % 3)
    return found


def scores(pairs: Maps, classes: int = 3) -> list[float]:
    """IoU of each class, pixel by pixel; NaN where it is absent."""
    label, prediction = (np.concatenate([pair[k].ravel() for pair in pairs.values()]) for k in (0, 1))
    prediction = prediction[label != 255]
    label = label[label != 255]
    found = []
    for k in range(classes):
        union = ((label == k) | (prediction == k)).sum()
        found.append(((label == k) & (prediction == k)).sum() / union if union else float("nan"))
    return found


def save(folder: Path, pairs: Maps, names: tuple[str, ...] = NAMES, more: Mapping[str, Any] | None = None) -> Path:
    tally = Tally(len(names))
    for name, (label, prediction) in pairs.items():
        matrix = np.zeros((len(names), len(names)), np.int64)
        for truth, guess in zip(label.ravel(), prediction.ravel(), strict=True):
            if truth != 255:
                matrix[truth, guess] += 1
        tally.add(name, matrix)
    report = {"miou": float(np.nanmean(scores(pairs, len(names)))), "per_class": [{"name": name} for name in names]}
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report | dict(more or {})))
    (folder / "images.json").write_text(json.dumps(tally.to_json()))
    return folder / "report.json"


def test_the_differences_are_those_of_the_scores(tmp_path: Path) -> None:
    worse, better = maps(0.5), maps(0.4)
    found = compare(save(tmp_path / "a", worse), save(tmp_path / "b", better)).facts()
    single = np.array(scores(better)) - np.array(scores(worse))
    assert found["miou"]["difference"] == pytest.approx(single.mean())
    assert [row["difference"] for row in found["per_class"]] == pytest.approx(single.tolist())
    assert [row["second"] for row in found["per_class"]] == pytest.approx(scores(better))
    assert [row["pixels"] for row in found["per_class"]] == [
        sum((label == k).sum() for label, _ in worse.values()) for k in range(3)
    ]
    assert all(row["low"] <= row["difference"] <= row["high"] for row in found["per_class"])


def test_a_planted_point_is_found(tmp_path: Path) -> None:
    first, second = maps(0.2, images=100), maps(0.2, images=100)
    rng = np.random.default_rng(9)
    for label, prediction in second.values():
        mended = rng.random(label.shape) < 0.06
        prediction[mended] = label[mended] % 3
    found = compare(save(tmp_path / "a", first), save(tmp_path / "b", second))
    gain, low, high = found.difference.miou
    assert 0.008 < gain < 0.02 and 0 < low < gain < high
    assert found.verdict().startswith("B is better than A: mIoU +1.") and "p below 0.001" in found.verdict()
    back = compare(tmp_path / "b", tmp_path / "a")
    assert back.verdict().startswith("B is worse than A: mIoU -1.") and back.difference.miou[0] == -gain


def test_between_equal_models_there_is_no_difference(tmp_path: Path) -> None:
    found = compare(save(tmp_path / "a", maps(0.3)), save(tmp_path / "b", maps(0.3)))
    assert found.difference.miou == (0, 0, 0) and found.losers == found.winners == []
    assert found.verdict() == "no difference is shown: mIoU +0.00 points, 95 % interval +0.00 to +0.00, p 1"
    assert not found.below(0)


def test_a_difference_that_chance_may_have_made_is_not_called_one(tmp_path: Path) -> None:
    first = maps(0.3)
    rng, second = np.random.default_rng(4), {}
    for name, (label, _) in first.items():  # as many errors, elsewhere
        second[name] = label, np.where(rng.random(label.shape) < 0.3, rng.integers(0, 3, label.shape), label % 3)
    found = compare(save(tmp_path / "a", first), save(tmp_path / "b", second))
    gain, low, high = found.difference.miou
    assert low < 0 < high and abs(gain) > 0.0005
    for verdict in (found.verdict(), compare(tmp_path / "b", tmp_path / "a").verdict()):
        assert verdict.startswith("no difference is shown: mIoU ") and "p 0." in verdict


def test_the_page_and_the_text_have_the_numbers_of_the_json(tmp_path: Path) -> None:
    found = compare(save(tmp_path / "a", maps(0.3)), save(tmp_path / "b", maps(0.28)))
    page = Reader(write(found, tmp_path) / "compare.html")
    facts, text = json.loads((tmp_path / "compare.json").read_text()), found.table()
    sorted_by = [own["data-value"] for tag, own in page.tags if tag == "td"]
    keys = ("difference", "low", "high", "first", "second", "pixels")
    assert sorted_by[:18] == [str(row[key]) for row in facts["per_class"] for key in keys]
    for row, shown in zip(facts["per_class"], page.tables["Differences of classes"][1:], strict=True):
        low, high, gain = (f"{100 * row[key]:+.2f}" for key in ("low", "high", "difference"))
        one, other = (f"{100 * row[key]:.2f}" for key in ("first", "second"))
        assert shown == [
            row["name"],
            *(n.replace("-", "−") for n in (gain, low, high)),
            one,
            other,
            f"{row['pixels']:,}",
        ]
        line = next(line for line in text.splitlines() if line.startswith(row["name"]))
        assert line.split() == [row["name"], one, other, gain, low, "to", high]
    assert f"mIoU {100 * facts['second']['miou']:.2f}  {tmp_path / 'b' / 'report.json'}" in text
    assert f"{100 * facts['miou']['difference']:+.2f}points of mIoU, B minus A" in page.text


def one_class(share: float) -> Maps:
    """1,000 pixels of one class, of which the rest is predicted as another that counts as 0."""
    label = np.zeros((1, 1000), np.uint8)
    return {"one": (label, (np.arange(1000) >= 1000 * share).astype(np.uint8)[None])}


@pytest.mark.parametrize(
    ("limit", "code"), [(None, 0), (0, 1), (0.24, 1), (0.25, 0), (0.26, 0), (100, 0)]
)  # IoU 0.75 and 0.745 of one of two classes: mIoU falls by 0.25 points
def test_more_than_so_many_points_below_fail(tmp_path: Path, capsys: Any, limit: float | None, code: int) -> None:
    first, second = save(tmp_path / "a", one_class(0.75)), save(tmp_path / "b", one_class(0.745))
    assert run(first, second, str(tmp_path / "out"), limit) == code
    told = capsys.readouterr().out
    assert ("failed: B's mIoU lies more than" in told) == bool(code)
    assert run(second, first, str(tmp_path / "out"), limit) == 0  # a gain never fails
    assert len(list((tmp_path / "out").iterdir())) == 2  # nothing is overwritten


def test_images_that_changed_most_are_named(tmp_path: Path) -> None:
    first, second = maps(0.3), maps(0.3)
    for name, step in (("image 004.png", 40), ("image 009.png", 80)):
        label, prediction = second[name]
        prediction.ravel()[20 : 20 + step] = (label.ravel()[20 : 20 + step] + 1) % 3
    label, prediction = second["image 017.png"]
    prediction[:] = label % 3
    label, prediction = second["image 021.png"]
    prediction[:10] = label[:10] % 3
    found = compare(save(tmp_path / "a", first), save(tmp_path / "b", second))
    assert [name for name, _, _ in found.losers] == ["image 009.png", "image 004.png"]
    assert [name for name, _, _ in found.winners] == ["image 017.png", "image 021.png"]
    assert found.winners[0][1:] == (pytest.approx(alone(first, "image 017.png")), 1.0)
    assert found.losers[0][2] == pytest.approx(alone(second, "image 009.png"))
    text = found.table()
    assert text.index("image 009.png") < text.index("image 004.png") < text.index("image 017.png")


def alone(pairs: Maps, name: str) -> float:
    return float(np.mean(scores({name: pairs[name]})))


def test_an_absent_class_and_an_unlabelled_image_have_no_score(tmp_path: Path) -> None:
    names = (*NAMES, "absent")
    pairs = maps(0.3) | {"unlabelled": (np.full((4, 4), 255, np.uint8), np.zeros((4, 4), np.uint8))}
    other = maps(0.2) | {"unlabelled": pairs["unlabelled"]}
    found = compare(save(tmp_path / "a", pairs, names), save(tmp_path / "b", other, names))
    folder = write(found, tmp_path)
    facts = json.loads((folder / "compare.json").read_text(), parse_constant=pytest.fail)  # no NaN
    nothing = dict.fromkeys(("first", "second", "difference", "low", "high"))
    assert facts["per_class"][3] == {"name": "absent", **nothing, "pixels": 0}
    assert ["unlabelled", None, None] in facts["images"] and len(facts["images"]) == 31
    assert "of 3 classes leave out zero; 0.2 would by chance alone" in facts["notes"][0]
    assert Reader(folder / "compare.html").tables["Differences of classes"][4] == ["absent", *"–––––", "0"]


def test_other_settings_are_told_not_refused(tmp_path: Path) -> None:
    first = save(tmp_path / "a", maps(0.3), more={"protocol_line": "whole", "precision": "32-true", "data": "toy"})
    second = save(tmp_path / "b", maps(0.2), more={"protocol_line": "windows", "precision": "32-true", "data": "toy"})
    assert compare(first, second).notes()[1:] == ["the protocol differs: whole in A, windows in B"]


def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path) -> None:
    pairs = maps(0.3)
    first = save(tmp_path / "a", pairs)
    fewer = {name: pair for name, pair in pairs.items() if name != "image 003.png"}
    label, prediction = pairs["image 005.png"]
    relabelled = pairs | {"image 005.png": (np.where(label == 0, 1, label), prediction)}
    for other, sentence in (
        (save(tmp_path / "names", pairs, ("road", "bus", "sky")), "class 1 is 'car' in .*a/report.json but 'bus' in"),
        (save(tmp_path / "count", pairs, (*NAMES, "tree")), "has 3 classes, .*count/report.json has 4"),
        (save(tmp_path / "fewer", fewer), "1 of 30 images of .*a/report.json are not in .* first is 'image 003.png'"),
        (
            save(tmp_path / "labels", relabelled),
            f"'image 005.png' has {(label == 0).sum()} pixels of 'road' .* but 0 in",
        ),
        (tmp_path / "nowhere" / "report.json", "there is no readable report at .*nowhere"),
    ):
        with pytest.raises(UserError, match=sentence):
            compare(first, other)
    with pytest.raises(UserError, match="1 of 30 images of .*a/report.json are not in .*fewer"):
        compare(tmp_path / "fewer", first)


def test_a_damaged_evaluation_is_one_sentence(tmp_path: Path) -> None:
    def sentence() -> str:
        with pytest.raises(UserError) as told:
            Evaluation.read(tmp_path / "a")
        return str(told.value)

    path = save(tmp_path / "a", maps(0.3))
    images = path.with_name("images.json")
    whole, report = images.read_text(), json.loads(path.read_text())
    images.write_text(whole[:-40])
    assert "images.json is not valid JSON" in sentence()
    images.write_text(whole.replace('"version": 1', '"version": 7'))
    assert "images.json: scores of images are of version 7, expected 1" in sentence()
    images.unlink()
    assert "there is no readable file of the images' scores at" in sentence() and "evaluate again" in sentence()
    images.write_text(json.dumps({"version": 1, "classes": 2, "images": []}))
    assert "report.json has 3 classes" in sentence()
    images.write_text(json.dumps({"version": 1, "classes": 3, "images": [["one", []]]}))
    assert "images.json has no labelled pixel" in sentence()
    images.write_text(whole)
    path.write_text(json.dumps(report | {"miou": 0.9}))
    assert "says mIoU 0.9, but the images beside it make 0.6" in sentence()
    path.write_text(json.dumps(report | {"miou": 10**400}))
    assert "says mIoU 1000" in sentence()
    path.write_text("[" * 100_000)
    assert "report.json is not valid JSON" in sentence()
    path.write_text("null")
    assert "there is no readable report at" in sentence()
    path.write_text(json.dumps(report | {"per_class": ["road"]}))
    assert "has no per_class with names" in sentence()
    path.write_text("[]")
    assert "holds a list" in sentence()


def test_any_loss_is_below_zero_points(tmp_path: Path) -> None:
    matrix = np.array([[10**9, 0], [0, 10**9]])
    for name, lost in (("a", 0), ("b", 1)):
        counts = Counts(Classes.from_config(["x", "y"]))
        counts.tally.add("1.png", matrix - [[lost, -lost], [0, 0]])
        (tmp_path / name).mkdir()
        report = build_report(counts, Classes.from_config(["x", "y"]), None, {})
        write_report(tmp_path / name, report, counts, [], Classes.from_config(["x", "y"]))
    assert run(tmp_path / "a", tmp_path / "b", str(tmp_path / "out"), 0) == 1
    assert run(tmp_path / "a", tmp_path / "a", str(tmp_path / "out"), 0) == 0


def test_a_terminal_that_cannot_show_a_name_ends_no_command(tmp_path: Path) -> None:
    save(tmp_path / "a", maps(0.3), ("Straße", "道路", "sky"))
    command = [sys.executable, "-m", "segformer", "compare", "a", "a", "--fail-below", "0"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=ascii_only, capture_output=True, check=False)
    assert done.returncode == 0 and b"Stra?e" in done.stdout, done.stderr


@pytest.mark.parametrize("limit", [-0.1, float("nan"), 101])
def test_a_limit_that_means_nothing_is_refused(tmp_path: Path, limit: float) -> None:
    with pytest.raises(UserError, match="--fail-below is .*, expected points of mIoU from 0"):
        run(tmp_path, tmp_path, str(tmp_path / "out"), limit)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """compare.html of names that try to run."""
    names = ("<script>alert(1)</script>", "\"'><img src=x onerror=alert(2)>", "\x1b[2Jsky\n{{ 7 * 7 }}")
    pairs, other = ({f"{names[0]}{name}\udce9": pair for name, pair in maps(wrong).items()} for wrong in (0.3, 0.2))
    more = {"data": names[0], "checkpoint": names[1]}
    first, second = save(tmp_path / "a", pairs, names, more), save(tmp_path / "b", other, names)
    found = compare(first, second)
    assert all(line.isprintable() for line in found.table().splitlines()) and "?[2Jsky?{{ 7 * 7 }}" in found.table()
    return write(found, tmp_path) / "compare.html"


def test_names_are_text_whatever_they_hold(evil: Path) -> None:
    page = Reader(evil)
    assert sum(tag == "script" for tag, _ in page.tags) == 1 and not any("onerror" in own for _, own in page.tags)
    rows = page.tables["Differences of classes"]
    assert rows[1][0] == "<script>alert(1)</script>" and rows[3][0].endswith("{{ 7 * 7 }}")


@needs_chromium
def test_the_page_sorts_and_asks_for_nothing(evil: Path, tmp_path: Path) -> None:
    values = "[...document.querySelectorAll('#classes tbody td:nth-child(2)')].map(one => Number(one.dataset.value))"
    with browser(tmp_path / "profile") as page:
        page.look(360, 740, scheme="dark")
        page.open(evil)
        page.click("#classes th:nth-child(2) button")
        found = page.run(values)
        page.press("Enter")
        assert found == sorted(found, reverse=True) and page.run(values) == sorted(found) and len(found) == 3
        assert page.run("document.documentElement.scrollWidth") == 360
        assert page.complaints == [] and {url.partition(":")[0] for url in page.requests} == {"file"}
