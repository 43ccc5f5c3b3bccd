import json

import numpy as np
import pytest

from segformer.config import SegformerConfig
from segformer.counts import Counts
from segformer.files import new_folder
from segformer.inference import Protocol
from segformer.labels import Classes
from segformer.metrics import Tally
from segformer.report import build_report, describe, published, write_report

NAMES = ("road", "a|b <c>", "absent")
WHOLE = Protocol()


def counted(*matrices, names=NAMES) -> tuple[Counts, Classes]:
    classes = Classes.from_config(list(names))
    counts = Counts(classes)
    for index, matrix in enumerate(matrices):
        counts.tally.add(f"{index}.png", np.array(matrix))
    return counts, classes


def written(folder, counts, classes, protocol=WHOLE, **facts):
    report = build_report(counts, classes, protocol, facts)
    return write_report(folder, report, counts, [], classes)


def test_absent_classes_are_null_in_json_and_a_dash_in_markdown(tmp_path, capsys) -> None:
    counts, classes = counted([[3, 1, 0], [0, 2, 0], [0, 0, 0]], [[0, 0, 0], [0, 2, 0], [0, 0, 0]])
    counts.boundary += [[1, 2, 0], [2, 2, 0], [1, 3, 0]]
    protocol = Protocol(size=(2048, 512), align=32)
    path = written(tmp_path, counts, classes, protocol, data="toy", precision="32", checkpoint="best.ckpt")
    report = json.loads(path.read_text())
    shares = dict.fromkeys(("iou", "interval", "acc", "precision", "dice", "boundary_iou"))
    pixels = dict.fromkeys(("pixels", "predicted_pixels", "images", "predicted_images"), 0)
    assert report["per_class"][2] == {"name": "absent", "color": classes.colors[2].tolist(), **shares, **pixels}
    road = {"iou": 0.75, "acc": 0.75, "precision": 1.0, "dice": 6 / 7, "boundary_iou": 0.5, "interval": [0.75, 0.75]}
    road |= {"pixels": 4, "predicted_pixels": 3, "images": 1, "predicted_images": 1}
    assert report["per_class"][0] == {"name": "road", "color": classes.colors[0].tolist(), **road}
    assert report["miou"] == (0.75 + 0.8) / 2 and report["aacc"] == 7 / 8 and report["images"] == 2
    assert report["boundary_miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert report["confusion"] == [[0, 0, 3], [0, 1, 1], [1, 1, 4]] and report["cityscapes"] is None
    assert report["intervals"]["miou"] == pytest.approx([(0.75 + 2 / 3) / 2, 1])  # one image each, twice
    assert report["protocol"]["size"] == [2048, 512] and Protocol(**report["protocol"]) == protocol
    assert Tally.from_json(json.loads((tmp_path / "images.json").read_text())).names == ["0.png", "1.png"]
    page = path.with_suffix(".md").read_text()
    assert "# mIoU 77.50 on toy" in page
    assert "| road | 75.00 | 75.00 | 100.00 | 85.71 | 50.00 | 75.00 to 75.00 | 4 | 3 | 1 |" in page
    assert r"| a\|b \<c\> | 80.00" in page  # nothing a name holds ends a cell or becomes markup
    assert "| absent | - | - | - | - | - | - | 0 | 0 | 0 |" in page
    assert "77.50" in path.with_suffix(".html").read_text()
    assert capsys.readouterr().out.strip().endswith("report.json")


def test_a_report_without_any_label_says_so_instead_of_failing(tmp_path) -> None:
    path = written(tmp_path, *counted(np.zeros((3, 3), int)))
    assert json.loads(path.read_text())["miou"] is None
    assert "# mIoU - on" in path.with_suffix(".md").read_text() and path.with_suffix(".html").is_file()


def test_pixels_of_no_class_are_in_every_report(tmp_path) -> None:
    path = written(tmp_path, *counted([[3, 1, 0, 4], [0, 2, 0, 0], [0, 0, 0, 0]]), protocol=None, predictions="a.zip")
    report = json.loads(path.read_text())
    assert report["per_class"][0]["iou"] == 3 / 8 and [0, 3, 4] in report["confusion"] and report["protocol"] is None
    assert "label maps read from files.\nScored: `a.zip`" in path.with_suffix(".md").read_text()


def test_the_papers_figure_is_that_of_the_same_network_and_number_of_scales() -> None:
    figures = {"single_scale": {"b0": 37.4}, "multi_scale": {"b0": 38.0}}
    b0, b1, other = (SegformerConfig.from_variant(*own) for own in (("b0",), ("b1",), ("b0",)))
    other.decoder_hidden_size = 128
    usual = Protocol(size=512)
    found = published(figures, b0, usual, usual)
    assert found["miou"] == pytest.approx(0.374) and "B0, single scale" in found["source"]
    several = Protocol(size=512, scales=(0.5, 1.0), flip=True)
    assert published(figures, b0, several, usual)["miou"] == pytest.approx(0.38)
    assert published(figures, b1, usual, usual) is published(figures, other, usual, usual) is None
    assert published({}, b0, usual, usual) is published({"single_scale": None}, b0, usual, usual) is None
    for unusual in (Protocol(), Protocol(size=512, flip=True), Protocol(size=512, scales=(0.5, 1.0))):
        assert published(figures, b0, unusual, usual) is None


def test_names_that_control_a_terminal_reach_none(tmp_path, capsys) -> None:
    path = written(tmp_path, *counted(np.eye(3, dtype=int), names=("a\x1b]0;pwn\x07", "b", "c")), checkpoint="\x1b[31m")
    assert "\x1b" not in capsys.readouterr().out and "\x1b" not in path.with_suffix(".md").read_text()


def test_folders_are_never_shared(tmp_path) -> None:
    folders = {new_folder(tmp_path / "b0_toy") for _ in range(3)}
    assert len(folders) == 3 and all(folder.parent == tmp_path / "b0_toy" for folder in folders)


def test_the_protocol_is_told_in_words() -> None:
    assert describe(Protocol()) == "images at their own size, whole image, scored at the label's own size"
    assert "windows of 1024 x 1024 every 768 x 768, logits averaged" in describe(Protocol(window=1024, stride=768))
    assert "kept within 2048 x 512, sides aligned to 32" in describe(Protocol(size=(2048, 512), align=32))
    assert describe(Protocol(size=512)).startswith("short side 512, ")
    assert "at a quarter of the resolution" in describe(Protocol(window=64, stitch="quarter"))
    many = describe(Protocol(scales=(0.5, 1), flip=True, resize_logits="twice"))
    assert "averaged over scales 0.5, 1 and their mirror images, logits resized to the network's input" in many
