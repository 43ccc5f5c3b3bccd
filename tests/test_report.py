import json

import torch

from segformer.files import new_folder
from segformer.inference import Protocol
from segformer.metrics import Scores
from segformer.report import describe, write_report


def test_absent_classes_are_null_in_json_and_a_dash_in_markdown(tmp_path, capsys) -> None:
    scores = Scores.from_confusion(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    protocol = Protocol(size=(2048, 512), align=32)
    path = write_report(
        tmp_path, scores, ("road", "a|b <c>", "absent"), 2, protocol, {"data": "toy", "precision": "32"}
    )
    report = json.loads(path.read_text())
    shares = dict.fromkeys(("iou", "acc", "precision", "dice"))
    assert report["per_class"][2] == {"name": "absent", **shares, "pixels": 0, "predicted_pixels": 0}
    road = {"iou": 0.75, "acc": 0.75, "precision": 1.0, "dice": 6 / 7, "pixels": 4, "predicted_pixels": 3}
    assert report["per_class"][0] == {"name": "road", **road}
    assert report["miou"] == (0.75 + 0.8) / 2 and report["aacc"] == 7 / 8 and report["images"] == 2
    assert report["protocol"] == {"size": [2048, 512], "align": 32, "window": None, "stride": None}
    page = path.with_suffix(".md").read_text()
    assert "# mIoU 77.50 on toy" in page
    assert "| road | 75.00 | 75.00 | 100.00 | 85.71 | 4 | 3 |" in page
    assert r"| a\|b \<c\> | 80.00" in page  # nothing a name holds ends a cell or becomes markup
    assert "| absent | - | - | - | - | 0 | 0 |" in page
    assert capsys.readouterr().out.strip().endswith("report.json")


def test_a_report_without_any_label_says_so_instead_of_failing(tmp_path) -> None:
    path = write_report(tmp_path, Scores.from_confusion(torch.zeros(2, 2).long()), ("a", "b"), 1, Protocol(), {})
    assert json.loads(path.read_text())["miou"] is None


def test_folders_are_never_shared(tmp_path) -> None:
    folders = {new_folder(tmp_path / "b0_toy") for _ in range(3)}
    assert len(folders) == 3 and all(folder.parent == tmp_path / "b0_toy" for folder in folders)


def test_the_protocol_is_told_in_words() -> None:
    assert describe(Protocol()) == "images at their own size, whole image, scored at the label's own size"
    assert "windows of 1024 x 1024 every 768 x 768, logits averaged" in describe(Protocol(window=1024, stride=768))
    assert "kept within 2048 x 512, sides aligned to 32" in describe(Protocol(size=(2048, 512), align=32))
