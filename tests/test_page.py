"""The page is read back by Python's own parser, and used by a mouse and a keyboard in a headless Chromium."""

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segformer.labels import Classes
from segformer.page import Example, write_page
from segformer.visualize import colorize
from tests.browser import Page, Reader, browser, needs_chromium

EVIL = "<script>alert(1)</script>"


def classes_of(*names: str) -> Classes:
    colors = np.random.default_rng(5).integers(0, 256, (len(names), 3)).astype(np.uint8)
    return Classes(names, colors, np.zeros(65536, np.int16))


def report_of(matrix: np.ndarray, classes: Classes) -> dict[str, Any]:
    """A report with everything in it, its scores from a confusion matrix."""
    hits, labelled, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    rows: list[dict[str, Any]] = []
    for k, name in enumerate(classes.names):
        union = labelled[k] + predicted[k] - hits[k]
        iou = float(hits[k] / union) if union else None
        shares = dict.fromkeys(("acc", "precision", "dice", "boundary_iou"), iou)
        counts = {"pixels": int(labelled[k]), "predicted_pixels": int(predicted[k]), "images": k, "predicted_images": 2}
        interval = None if iou is None else [iou / 2, (1 + iou) / 2]
        rows.append({"name": name, "color": [0, 0, 0], "iou": iou, "interval": interval, **shares, **counts})
    known = [row["iou"] for row in rows if row["iou"] is not None]
    means = dict.fromkeys(("miou", "macc", "aacc", "fwiou", "mdice", "mprecision", "boundary_miou"))
    return {
        "version": 1,
        **means,
        "miou": sum(known) / len(known) if known else None,
        "intervals": {"level": 0.95, "resamples": 2000, "miou": [0.25, 0.75]},
        "published": {"miou": 0.374, "source": "a paper, its first table"},
        "per_class": rows,
        "confusion": [[int(i), int(j), int(matrix[i, j])] for i, j in zip(*np.nonzero(matrix), strict=True)],
        "images": 7,
        "split_images": 9,
        "protocol": {"size": None, "align": 32},
        "protocol_line": "whole images",
        "checkpoint": "runs/best.ckpt",
        "data": "toy",
        "seconds": 3.5,
        "versions": {"torch": "2.11"},
        "cityscapes": {
            "category_iou": 0.5,
            "iiou": None,
            "category_iiou": 0.25,
            "per_category": {"flat": {"iou": 0.5}},
        },
    }


def example(name: str, rank: Any = "worst", shape: tuple[int, int] = (30, 40), classes: int = 3) -> Example:
    rng = np.random.default_rng(len(name))
    label, prediction = (rng.integers(0, classes, shape).astype(np.uint8) for _ in range(2))
    label[:5] = 255
    photo = Image.fromarray(rng.integers(0, 256, (*shape, 3)).astype(np.uint8))
    return {"name": name, "miou": 0.5, "rank": rank, "image": photo, "label": label, "prediction": prediction}


SMALL = np.array([[50, 0, 50], [10, 30, 0], [0, 0, 0]])  # the third class is predicted, never labelled


@pytest.fixture
def small(tmp_path: Path) -> Path:
    classes = classes_of("road", "car", "sky")
    gallery = [example(f"{rank} {index}", rank) for rank in ("worst", "median", "best") for index in range(2)]
    write_page(tmp_path / "report.html", report_of(SMALL, classes), gallery, classes)
    return tmp_path / "report.html"


def test_the_headline_has_the_interval_and_the_published_figure(small: Path) -> None:
    text = " ".join(Reader(small).text.split())
    miou = 100 * (50 / 110 + 30 / 40 + 0) / 3
    assert f"{miou:.2f}% mIoU 95 % interval25.00 – 75.00 published37.40 ours minus published+{miou - 37.4:.2f}" in text
    for told in ("Whole images.", "a paper, its first table", "7 of 9", "2.00 images/s"):
        assert told in text


def test_rows_of_the_confusion_matrix_are_normalised_and_those_that_lose_most_come_first(small: Path) -> None:
    head, *rows = Reader(small).tables["Confusion matrix"]
    assert head == ["label ╲ prediction", "road", "car", "sky", "lostpixels"]
    assert rows == [["road", "50.0", "", "50.0", "50"], ["car", "25.0", "75.0", "", "10"]]


def test_pairs_are_told_with_their_share_of_the_label_and_of_all_errors(small: Path) -> None:
    _, *rows = Reader(small).tables["Most confused pairs"]
    assert rows == [["road", "sky", "50", "50.00", "83.33"], ["car", "road", "10", "25.00", "16.67"]]


def test_pixels_predicted_as_no_class_are_told(tmp_path: Path) -> None:
    """A report of label maps from files may have them: their prediction is the number after the last class."""
    classes = classes_of("road", "car", "sky")
    report = report_of(SMALL, classes)
    report["confusion"].append([1, 3, 60])
    write_page(tmp_path / "r.html", report, [], classes)
    tables = Reader(tmp_path / "r.html").tables
    assert tables["Confusion matrix"][0] == ["label ╲ prediction", "car", "road", "sky", "none of these", "lostpixels"]
    assert tables["Confusion matrix"][1] == ["car", "30.0", "10.0", "", "60.0", "70"]
    assert tables["Most confused pairs"][1] == ["car", "no class", "60", "60.00", "50.00"]


def test_cityscapes_own_scores_are_told(tmp_path: Path) -> None:
    classes = classes_of("road", "car", "sky")
    report = report_of(SMALL, classes)
    report["cityscapes"] |= {"per_class": {"car": 0.625}}
    write_page(tmp_path / "r.html", report, [], classes)
    page = Reader(tmp_path / "r.html")
    assert page.tables["Scores of categories"] == [["Category", "IoU", "iIoU"], ["flat", "50.00", "–"]]
    place = page.tables["Scores of classes"][0].index("iIoU")
    assert [row[place] for row in page.tables["Scores of classes"][1:]] == ["–", "62.50", "–"]
    assert "category IoU50.00 category iIoU25.00" in " ".join(page.text.split())


def test_of_many_classes_the_worst_are_shown_and_the_others_are_summed(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).integers(1, 1000, (150, 150))
    classes = classes_of(*(f"class {k}" for k in range(150)))
    write_page(tmp_path / "r.html", report_of(matrix, classes), [], classes)
    head, *rows = Reader(tmp_path / "r.html").tables["Confusion matrix"]
    lost = sorted(range(150), key=lambda k: matrix[k, k] - matrix[k].sum())[:20]
    assert [row[0] for row in rows] == [f"class {k}" for k in lost] == head[1:21]
    for k, row in zip(lost, rows, strict=True):
        assert float(row[21]) == pytest.approx(100 * (1 - matrix[k, lost].sum() / matrix[k].sum()), abs=0.051)
        assert int(row[22].replace(",", "")) == matrix[k].sum() - matrix[k, k]
    assert "130 more are left out" in " ".join(Reader(tmp_path / "r.html").text.split())
    assert len(Reader(tmp_path / "r.html").tables["Scores of classes"]) == 151


def test_a_bar_is_as_long_as_its_score(small: Path) -> None:
    styles = [own["style"] for tag, own in Reader(small).tags if tag == "i"]
    assert styles == [f"width: {100 * share:.2f}%" for share in (50 / 110, 30 / 40, 0)]


def test_what_a_report_lacks_is_left_out(tmp_path: Path) -> None:
    classes = classes_of("road", "car")
    row = {"iou": None, "acc": None, "precision": None, "dice": None, "pixels": 0, "predicted_pixels": 0}
    report = {"miou": None, "per_class": [{"name": name, **row} for name in classes.names], "images": 1}
    write_page(tmp_path / "r.html", report, [], classes)
    page = Reader(tmp_path / "r.html")
    assert "None" not in page.text and "nan" not in page.text and "published" not in page.text
    assert page.tables == {
        "Scores of classes": [
            ["Class", "IoU", "Pixels", "Predicted px"],
            ["road", "–", "0", "0"],
            ["car", "–", "0", "0"],
        ]
    }


def test_pictures_show_image_label_prediction_and_error(tmp_path: Path) -> None:
    classes = classes_of("road", "car", "sky")
    one = example("one", shape=(400, 1280))
    write_page(tmp_path / "r.html", report_of(SMALL, classes), [one], classes)
    sources = [str(own["src"]) for tag, own in Reader(tmp_path / "r.html").tags if tag == "img"]
    photo, *maps = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]
    assert [source[: source.index(",")] for source in sources] == ["data:image/jpeg;base64"] + 3 * [
        "data:image/png;base64"
    ]
    assert {picture.size for picture in (photo, *maps)} == {(640, 200)}
    assert all(picture.mode == "P" for picture in maps)
    label, prediction, error = (np.array(picture.convert("RGBA")) for picture in maps)
    rows, columns = np.arange(200) * 2 + 1, np.arange(640) * 2 + 1  # of every four pixels one, the same in all maps
    truth, guess = one["label"][np.ix_(rows, columns)], one["prediction"][np.ix_(rows, columns)]
    np.testing.assert_array_equal(label[..., 3] == 0, truth == 255)
    np.testing.assert_array_equal(label[truth != 255][:, :3], colorize(truth, classes)[truth != 255])
    np.testing.assert_array_equal(prediction[..., :3], colorize(guess, classes))
    np.testing.assert_array_equal(error[..., 3] == 0, truth == guess)
    wrong = np.unique(error[(truth != guess) & (truth != 255)], axis=0)
    unlabelled = np.unique(error[truth == 255], axis=0)
    assert len(wrong) == len(unlabelled) == 1 and (wrong != unlabelled).any()


def test_the_page_stays_small_whatever_is_shown(tmp_path: Path) -> None:
    """Noise of 255 classes in more images than there is room for is the worst that can come."""
    classes = classes_of(*(f"class {k}" for k in range(255)))
    gallery = [
        example(f"{rank} {index}", rank, (700, 700), 255) for rank in ("worst", "median", "best") for index in range(6)
    ]
    write_page(tmp_path / "r.html", report_of(np.full((255, 255), 10**9), classes), gallery, classes)
    page = Reader(tmp_path / "r.html")
    assert sum(tag == "figure" for tag, _ in page.tags) == 12
    assert (tmp_path / "r.html").stat().st_size < 20 * 2**20


def test_nothing_comes_from_outside_and_only_our_script_may_run(small: Path) -> None:
    page = Reader(small)
    for tag, own in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "a")
        assert not any(name.startswith("on") for name in own)
        assert all(str(own[name]).startswith("data:image/") for name in ("src", "href", "srcset") if name in own)
    policy = next(str(own["content"]) for tag, own in page.tags if own.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"script-src 'sha256-{digest}'" in policy
    assert sum(tag == "script" for tag, _ in page.tags) == 1 and "eval" not in page.scripts[0]


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """Every text that comes from outside tries to run."""
    names = (EVIL, "\"'><img src=x onerror=alert(2)>", 'red; position: fixed"{{ 7 * 7 }}')
    classes = classes_of(*names)
    report = report_of(np.full((3, 3), 5), classes)
    for key in ("data", "checkpoint", "protocol_line", "precision"):
        report[key] = EVIL
    report |= {"versions": {EVIL: EVIL}, "published": {"miou": 0.5, "source": EVIL}}
    report["cityscapes"]["per_category"] = {EVIL: {"iou": 0.5}}
    write_page(tmp_path / "evil.html", report, [example(names[0]), example(names[1])], classes)
    return tmp_path / "evil.html"


def test_names_are_text_whatever_they_hold(evil: Path) -> None:
    page = Reader(evil)
    assert sum(tag == "script" for tag, _ in page.tags) == 1 and not any("onerror" in own for _, own in page.tags)
    assert (
        page.text.count(EVIL) > 10 and "{{ 7 * 7 }}" in page.text and "49" not in page.tables["Scores of classes"][3][0]
    )
    assert any(own.get("alt") == EVIL for _, own in page.tags)


def test_a_name_that_is_no_text_does_not_stop_the_page(tmp_path: Path) -> None:
    classes = classes_of("road", "car", "sky")
    write_page(tmp_path / "r.html", report_of(SMALL, classes), [example("caf\udce9.jpg")], classes)
    assert "caf?.jpg" in Reader(tmp_path / "r.html").text


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        page.look(1280)
        yield page


@pytest.fixture
def used(chromium: Page) -> Iterator[Page]:
    """A browser that afterwards must have met no error and asked for nothing but the file and what is inside it."""
    chromium.complaints.clear()
    chromium.requests.clear()
    yield chromium
    assert chromium.complaints == []
    assert chromium.requests and all(url.startswith(("file:", "data:")) for url in chromium.requests)
    chromium.look(1280)


FIRST = "[...document.querySelectorAll('#classes tbody th')].map(one => one.textContent)"
SORTED = "[...document.querySelectorAll('#classes thead th')].map(one => one.getAttribute('aria-sort'))"
OPACITIES = (
    "['label', 'prediction', 'error'].map(one => getComputedStyle(document.querySelector(`WHERE .${one}`)).opacity)"
)


@needs_chromium
def test_the_table_sorts_by_mouse_and_by_keyboard(used: Page, small: Path) -> None:
    used.open(small)
    assert used.run(FIRST) == ["road", "car", "sky"] and set(used.run(SORTED)) == {None}
    used.click("#classes th:nth-child(2) button")
    assert used.run(FIRST) == ["car", "road", "sky"] and used.run(SORTED)[:2] == [None, "descending"]
    used.press("Enter")  # the button has the focus
    assert used.run(FIRST) == ["sky", "road", "car"] and used.run(SORTED)[1] == "ascending"
    used.run("document.querySelector('#classes th button').focus()")
    used.press("Space")
    assert used.run(FIRST) == ["car", "road", "sky"] and used.run(SORTED)[:2] == ["ascending", None]


@needs_chromium
def test_absent_scores_stay_last_in_either_direction(used: Page, tmp_path: Path) -> None:
    classes = classes_of("absent", "b", "a10", "a9")
    matrix = np.diag([0, 8, 5, 3])
    matrix[1, 2] = 4
    write_page(tmp_path / "r.html", report_of(matrix, classes), [], classes)
    used.open(tmp_path / "r.html")
    used.click("#classes th:nth-child(2) button")
    assert used.run(FIRST) == ["a9", "b", "a10", "absent"]
    used.click("#classes th:nth-child(2) button")
    assert used.run(FIRST) == ["a10", "b", "a9", "absent"]
    used.click("#classes th button")
    assert used.run(FIRST) == ["a9", "a10", "absent", "b"]  # by number inside a name


@needs_chromium
def test_views_and_opacity_change_what_lies_over_an_image(used: Page, small: Path) -> None:
    used.open(small)
    shown = OPACITIES.replace("WHERE", ".gallery")
    assert used.run(shown) == ["0", "0.65", "0"]
    used.click("input[value=label] + span")
    assert used.run(shown) == ["0.65", "0", "0"]
    used.press("ArrowRight")
    assert used.run(shown) == ["0", "0.65", "0"]
    used.click("input[value=error] + span")
    used.run("document.querySelector('[type=range]').focus()")
    for _ in range(5):
        used.press("ArrowRight")
    assert used.run(shown) == ["0", "0", "0.7"]
    used.click("input[value=image] + span")
    assert used.run(shown) == ["0", "0", "0"]


@needs_chromium
def test_an_image_opens_large_and_closes(used: Page, small: Path) -> None:
    used.open(small)
    large = "document.querySelector('dialog .photo')"
    dialog = f"[document.querySelector('dialog').open, {large}?.alt, {large}?.clientWidth]"
    assert used.run(dialog)[0] is False
    before = used.run("document.querySelector('.gallery .photo').clientWidth")
    assert before == used.run("document.querySelector('.shot').clientWidth")  # however small the image is
    used.click(".shot button")
    opened, name, width = used.run(dialog)
    assert opened and name == "worst 0" and width > 2 * before
    used.click("[data-step='1']")
    used.press("ArrowRight")
    assert used.run(dialog)[1] == "median 0"
    used.click("dialog input[value=error] + span")
    assert used.run(OPACITIES.replace("WHERE", "dialog")) == ["0", "0", "0.65"]
    used.press("Escape")
    used.until("!document.querySelector('dialog .toolbar')")
    assert used.run(dialog)[0] is False
    used.run("document.querySelector('.shot button').focus()")
    used.press("Enter")
    assert used.run(dialog)[:2] == [True, "worst 0"]
    used.click("[data-close]")
    assert used.run(dialog)[0] is False


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_phone_light_and_dark(used: Page, tmp_path: Path, scheme: str) -> None:
    classes = classes_of(*(f"class {k}" for k in range(20)))
    right = np.diag(np.arange(20) * 5)  # every depth of colour
    wrong = np.roll(np.diag(100 - np.arange(20) * 5), 1, axis=1)
    write_page(tmp_path / "r.html", report_of(right + wrong, classes), [example("one")], classes)
    used.look(360, 740, scheme=scheme)
    used.open(tmp_path / "r.html")
    assert used.run("document.documentElement.scrollWidth") == 360  # tables scroll by themselves
    assert used.run("parseFloat(getComputedStyle(document.body).fontSize)") >= 14
    for selector in ("body", ".note", "thead button", ".figure small", ".views :checked + span", "figcaption"):
        assert used.run(CONTRAST % json.dumps(selector)) >= 4.5, selector  # WCAG AA
    numbers = "[...document.querySelectorAll('.matrix td')].filter(one => one.textContent)"
    cells = used.run(f"{numbers}.map((one, place) => one.id = `cell${{place}}`)")
    assert len(cells) >= 57
    assert min(used.run(CONTRAST % json.dumps(f"#{cell}")) for cell in cells) >= 4.5


# of an element's text on all the backgrounds that lie behind it (WCAG 2.2)
CONTRAST = """(selector => {
  const element = document.querySelector(selector), layers = [];
  for (let one = element; one; one = one.parentElement) layers.unshift(getComputedStyle(one).backgroundColor);
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const over = (below, [r, g, b, a = 1]) => [r, g, b].map((v, k) => v * a + below[k] * (1 - a));
  const linear = v => v <= 10.31 ? v / 3294.6 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const behind = light(layers.map(numbers).reduce(over, [255, 255, 255]));
  const text = light(numbers(getComputedStyle(element).color));
  return (Math.max(behind, text) + .05) / (Math.min(behind, text) + .05);
})(%s)"""


@needs_chromium
def test_paper_is_white_wide_enough_and_has_no_switches(used: Page, small: Path) -> None:
    used.look(718, media="print", scheme="dark")  # A4 within margins of 1 cm
    used.open(small)
    assert used.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert used.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert used.run("getComputedStyle(document.querySelector('.toolbar')).display") == "none"


@needs_chromium
def test_a_class_and_a_file_that_are_scripts_do_nothing(used: Page, evil: Path) -> None:
    used.open(evil)
    used.click("#classes th button")
    used.click(".shot button")
    assert used.run("document.querySelector('dialog .photo').alt") == EVIL
    assert used.run("document.scripts.length") == 1 and not used.run("!!document.querySelector('[onerror]')")


@needs_chromium
def test_the_policy_stops_what_would_get_past_the_escaping(chromium: Page, small: Path) -> None:
    """And the browser's log tells of it, so that a clean log means something."""
    page = small.read_text(encoding="utf-8")
    small.write_text(
        page.replace("</header>", "</header><script>window.ran = 1</script><img src='http://127.0.0.1:9/x'>"), "utf-8"
    )
    chromium.complaints.clear()
    chromium.open(small)
    assert chromium.run("window.ran ?? null") is None
    told = " ".join(chromium.complaints)
    assert "script-src" in told and "img-src" in told
    chromium.complaints.clear()
