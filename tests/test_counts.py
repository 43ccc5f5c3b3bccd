import pickle

import numpy as np
import pytest
import torch
import yaml

from segformer.boundary import boundary_parts
from segformer.cityscapes import InstanceCounts
from segformer.counts import Counts, short_names
from segformer.errors import UserError
from segformer.labels import Classes
from segformer.metrics import confusion_matrix
from tests.conftest import ROOT, save

NAMES = ["sky", "road", "car"]


def street() -> Classes:
    section = yaml.safe_load((ROOT / "configs/data/cityscapes.yaml").read_text())["data"]
    return Classes.from_config(section["classes"], section["ignore"])


def frames(count: int, classes: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    pairs = {f"{n}.png": rng.integers(0, classes, (2, 24, 30 + n)).astype(np.uint8) for n in range(count)}
    for _, label in pairs.values():
        label[:5] = 255
    return {name: (pair[0], pair[1]) for name, pair in pairs.items()}


def test_an_image_counts_as_its_confusion_matrix_and_its_contours_say() -> None:
    counts = Counts(Classes.from_config(NAMES))
    for name, (prediction, label) in frames(3, 3).items():
        counts.add(name, counts.count(prediction, label))
    pairs = frames(3, 3).values()
    whole = sum(confusion_matrix(torch.from_numpy(one), torch.from_numpy(label), 3) for one, label in pairs)
    np.testing.assert_array_equal(counts.tally.confusion(), np.pad(whole.numpy(), ((0, 0), (0, 1))))
    np.testing.assert_array_equal(counts.boundary, sum(boundary_parts(one, label, 3) for one, label in pairs))
    assert counts.instances is None


@pytest.mark.parametrize("classes", [3, 254, 255])
def test_pixels_of_no_class_are_missed_by_their_label_and_found_by_nobody(classes) -> None:
    counts = Counts(Classes.from_config([f"class {index}" for index in range(classes)]))
    label = np.full((40, 40), classes - 1, np.uint8)
    prediction = label.copy()
    prediction[:, 20:] = classes
    label[:, 36:] = 255
    counts.add("a", counts.count(prediction, label))
    assert counts.tally.cells["a"].tolist() == [[classes - 1, classes - 1, 800], [classes - 1, classes, 640]]
    hit, labelled, predicted = counts.boundary[:, classes - 1]
    assert 0 < hit < labelled and predicted >= hit and not counts.boundary[:, : classes - 1].any()


def test_any_split_over_processes_counts_the_same(tmp_path) -> None:
    rng, classes = np.random.default_rng(1), street()
    images = frames(7, 19)
    for name, (_, label) in images.items():
        things = rng.choice([7, 24001, 24002, 26005, 33001], label.shape).astype(np.uint16)
        save(tmp_path / name, things)

    def counted(names) -> Counts:
        counts = Counts(classes)
        for name in names:
            counts.add(name, counts.count(*images[name], tmp_path / name))
        return pickle.loads(pickle.dumps(counts))  # as it goes from process to process

    one, names = counted(images), list(images)
    for parts in (names[::2], names[1::2]), (names[2::3], names[::3], names[1::3]):
        first, *others = [counted(part) for part in parts]
        together = first.merged(others)
        assert together.tally.to_json() == one.tally.to_json()
        assert together.boundary.tolist() == one.boundary.tolist()
        assert together.instances.shares.tolist() == one.instances.shares.tolist()
    expected = InstanceCounts(
        classes.names,
        classes.categories,
        classes.instance_sizes,
        dict(zip(classes.names, [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33], strict=True)),
    )
    things = np.random.default_rng(1).choice([7, 24001, 24002, 26005, 33001], images[names[0]][1].shape)
    expected.add(expected.count(images[names[0]][0], things.astype(np.uint16)))
    assert counted(names[:1]).instances.shares.tolist() == expected.shares.tolist()


def test_a_class_that_the_masks_lack_has_no_instances() -> None:
    section = yaml.safe_load((ROOT / "configs/data/cityscapes.yaml").read_text())["data"]
    section["classes"]["train"]["ids"] = []
    counts = Counts(Classes.from_config(section["classes"], "rest"))
    assert counts.instances.class_iiou(np.eye(19, dtype=int)).keys() == street().instance_sizes.keys() - {"train"}


def test_an_instance_map_that_is_none_is_named(tmp_path) -> None:
    counts, (image, *_) = Counts(street()), frames(1, 19).values()
    save(tmp_path / "map.png", np.zeros(image[0].shape, np.uint8))
    with pytest.raises(UserError, match="instance map .*map.png: the instance map is uint8, expected uint16"):
        counts.count(*image, tmp_path / "map.png")


def test_names_are_what_differs_on_every_machine() -> None:
    assert short_names(["/data/val/a/1.png", "/data/val/b/1.png"]) == {
        "/data/val/a/1.png": "a/1.png",
        "/data/val/b/1.png": "b/1.png",
    }
    assert short_names(["/data/val/a/1.png"]) == {"/data/val/a/1.png": "1.png"}
    assert short_names(["scene_1", "scene_2"]) == {"scene_1": "scene_1", "scene_2": "scene_2"}
    assert short_names(["/data/a.png", "row 7"]) == {"/data/a.png": "/data/a.png", "row 7": "row 7"}
    assert short_names([]) == {}
    with pytest.raises(UserError, match="two samples are called 'x', expected a name of its own for each"):
        short_names(["x", "y", "x"])
