import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segformer.corruptions import CORRUPTIONS, FAMILIES, SEVERITIES, Corrupted, corrupt, counted, markdown, table
from segformer.data.samples import Selected, Source
from segformer.data.toy import ToyScenes
from segformer.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def robust() -> None:
    pytest.importorskip("imagecorruptions", reason='needs `pip install "segformer[robust]"`')


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture with edges."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def gray(value: int = 128) -> np.ndarray:
    return np.full((200, 300, 3), value, np.uint8)


def test_there_are_four_corruptions_in_each_of_four_families() -> None:
    assert [len(names) for names in FAMILIES.values()] == [4] * 4 and len(CORRUPTIONS) == 16


@pytest.mark.usefixtures("robust")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_every_corruption_runs_at_every_severity_and_size_without_a_warning_or_a_print(corruption, capfd) -> None:
    for size in ((64, 97), (240, 320), (33, 700), (1, 5)):
        image = picture(*size)
        before = image.copy()
        for severity in SEVERITIES:
            changed = corrupt(image, corruption, severity)
            assert changed.shape == image.shape and changed.dtype == np.uint8
            assert min(size) < 64 or not np.array_equal(changed, image), f"{size} severity {severity} changes nothing"
        np.testing.assert_array_equal(image, before)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("robust")
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_severity_five_moves_the_picture_further_than_severity_one(corruption) -> None:
    image = picture(240, 320)
    far, near = (np.abs(corrupt(image, corruption, s).astype(float) - image).mean() for s in (5, 1))
    assert far > near


@pytest.mark.usefixtures("robust")
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_draw_depends_on_seed_and_image_alone_and_leaves_numpys_generator_as_it_was(corruption) -> None:
    image = picture(64, 97)
    np.random.seed(1)
    first = corrupt(image, corruption, 2, seed=7)
    assert np.random.randint(10**6) == np.random.RandomState(1).randint(10**6)
    corrupt(picture(64, 97, seed=3), corruption, 5)
    np.testing.assert_array_equal(corrupt(image[::-1].copy()[::-1], corruption, 2, seed=7), first)
    if corruption not in {"defocus_blur", "gaussian_blur", *FAMILIES["digital"]}:  # which draw nothing
        assert not np.array_equal(corrupt(image, corruption, 2, seed=8), first)


@pytest.mark.usefixtures("robust")
def test_two_images_of_one_size_do_not_share_their_noise() -> None:
    first, second = (corrupt(gray(value), "gaussian_noise", 1).astype(float).ravel() for value in (120, 121))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


@pytest.mark.usefixtures("robust")
@pytest.mark.parametrize("corruption", ["defocus_blur", "gaussian_blur", *FAMILIES["digital"]])
def test_what_draws_nothing_equals_the_packages_own_call(corruption) -> None:
    import imagecorruptions

    image = picture(64, 97)
    for severity in SEVERITIES:
        expected = imagecorruptions.corrupt(image, severity, corruption)
        np.testing.assert_array_equal(corrupt(image, corruption, severity), expected)


@pytest.mark.usefixtures("robust")
def test_another_process_draws_the_same() -> None:
    code = (
        "from tests.test_corruptions import picture, corrupt, CORRUPTIONS; from zlib import crc32;"
        "print([crc32(corrupt(picture(64, 97), name, 3, 5)) for name in reversed(CORRUPTIONS)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    from zlib import crc32

    assert done.stdout.strip() == str([crc32(corrupt(picture(64, 97), name, 3, 5)) for name in CORRUPTIONS][::-1])


@pytest.mark.usefixtures("robust")
def test_noise_has_the_published_strengths() -> None:
    """Hendrycks & Dietterich's constants, measured on gray pictures whose noise is not clipped."""
    for severity, scale in enumerate((0.08, 0.12), start=1):
        noise = corrupt(gray(), "gaussian_noise", severity).astype(float) / 255
        assert noise.std() == pytest.approx(scale, rel=0.02) and noise.mean() == pytest.approx(0.5, abs=0.005)
    for severity, amount in enumerate((0.03, 0.06, 0.09, 0.17, 0.27), start=1):
        assert (corrupt(gray(), "impulse_noise", severity) != 128).mean() == pytest.approx(amount, rel=0.05)
    for severity, photons in enumerate((60, 25), start=1):  # Poisson: variance = mean / photons
        noise = corrupt(gray(64), "shot_noise", severity).astype(float) / 255
        assert noise.var() == pytest.approx(64 / 255 / photons, rel=0.05)
    assert corrupt(gray(64), "speckle_noise", 1).std() == pytest.approx(64 * 0.15, rel=0.02)


@pytest.mark.usefixtures("robust")
def test_digital_corruptions_equal_their_formulas() -> None:
    image = picture(64, 97)
    for severity, factor in enumerate((0.4, 0.3, 0.2, 0.1, 0.05), start=1):
        mean = image.mean((0, 1))
        expected = (image - mean) * factor + mean
        assert np.abs(corrupt(image, "contrast", severity) - expected).max() <= 1  # the package rounds down
        added = 255 * severity / 10
        assert np.abs(corrupt(gray(60), "brightness", severity) - (60 + added)).max() <= 1
    for severity, quality in enumerate((25, 18, 15, 10, 7), start=1):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        np.testing.assert_array_equal(corrupt(image, "jpeg_compression", severity), np.asarray(Image.open(buffer)))


@pytest.mark.usefixtures("robust")
def test_the_red_and_the_blue_band_stay_in_their_places() -> None:
    """A red picture is corrupted to one that is still more red than blue: nothing swaps RGB and BGR."""
    red = np.tile(np.uint8([200, 60, 20]), (64, 97, 1))
    for corruption in CORRUPTIONS:
        means = corrupt(red, corruption, 1).mean((0, 1))
        assert means[0] > means[2], corruption


@pytest.mark.usefixtures("robust")
@pytest.mark.filterwarnings("error")
def test_spatter_of_which_no_drop_falls_leaves_a_tiny_picture_as_it_is() -> None:
    images = [picture(4, 5, seed) for seed in range(20)]
    changed = [corrupt(image, "spatter", 1) for image in images]
    untouched = sum(np.array_equal(a, b) for a, b in zip(images, changed, strict=True))
    assert untouched  # the package alone divides nothing by nothing there


@pytest.mark.usefixtures("robust")
@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)],
)
def test_an_image_that_is_not_rgb_bytes_is_refused_by_name(image) -> None:
    with pytest.raises(UserError, match="road.png is .* expected uint8 RGB"):
        corrupt(image, "fog", 1, name="road.png")


def test_an_unknown_corruption_or_severity_is_refused() -> None:
    with pytest.raises(UserError, match="no corruption 'motion_blurr' .did you mean 'motion_blur'"):
        corrupt(gray(), "motion_blurr", 1)
    with pytest.raises(UserError, match="no corruption 'zoom_blur'"):
        Corrupted(ToyScenes(1, 0), "zoom_blur", 1)
    for severity in (0, 6, 2.0, True, "3", None):
        with pytest.raises(UserError, match="severity .* of fog, expected 1, 2, 3, 4 or 5"):
            corrupt(gray(), "fog", severity)
    with pytest.raises(UserError, match="no corruption 'rain'"):
        table(0.5, {("rain", 1): 0.4})


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(UserError, match=r'pip install "segformer\[robust\]"'):
        Corrupted(ToyScenes(1, 0), "fog", 1)


@pytest.mark.usefixtures("robust")
def test_a_corrupted_source_keeps_masks_names_sizes_and_length() -> None:
    scenes = ToyScenes(3, 5)
    snowy = Corrupted(scenes, "snow", 3, seed=2)
    assert len(snowy) == 3 and snowy.labelled
    for index in range(3):
        image, mask = snowy[index]
        np.testing.assert_array_equal(mask, scenes[index][1])
        np.testing.assert_array_equal(snowy.mask(index), mask)
        np.testing.assert_array_equal(image, corrupt(scenes[index][0], "snow", 3, 2))
        np.testing.assert_array_equal(snowy.image(index), image)
        assert (snowy.name(index), snowy.size(index)) == (scenes.name(index), scenes.size(index))


@pytest.mark.usefixtures("robust")
def test_an_image_is_corrupted_alike_wherever_it_stands_in_a_source() -> None:
    scenes = ToyScenes(3, 5)
    turned = Selected([(scenes, 2), (scenes, 0)])
    np.testing.assert_array_equal(Corrupted(turned, "frost", 1)[0][0], Corrupted(scenes, "frost", 1)[2][0])


class Stamped(Source):
    def __init__(self, stamp: str | None) -> None:
        self.own = stamp

    def stamp(self, index: int) -> str | None:
        return self.own


@pytest.mark.usefixtures("robust")
def test_the_stamp_tells_corruptions_apart_and_stays_unknown_where_it_was() -> None:
    settings = [("fog", 1, 0), ("fog", 2, 0), ("snow", 1, 0), ("fog", 1, 1)]
    stamps = {Corrupted(Stamped("a.png:1"), *setting).stamp(0) for setting in settings}
    assert len(stamps) == 4 and all("a.png:1" in stamp for stamp in stamps)
    assert Corrupted(Stamped(None), "fog", 1).stamp(0) is None


def test_the_full_table_means_noise_over_three_severities_and_all_else_over_five() -> None:
    scores = np.random.default_rng(0).uniform(0.1, 0.9, (16, 5))
    order = [name for names in FAMILIES.values() for name in names]
    results = {(name, s): scores[i, s - 1] for i, name in enumerate(order) for s in SEVERITIES}
    rows = {row.name: row for row in table(0.8, results)}
    means = np.concatenate([scores[:4].mean(1), scores[4:8, :3].mean(1), scores[8:].mean(1)])
    assert list(rows) == [
        *(name for family, names in FAMILIES.items() for name in [*names, family]),
        "all corruptions",
    ]
    assert [rows[name].mean for name in order] == pytest.approx(means)
    assert [rows[family].mean for family in FAMILIES] == pytest.approx(means.reshape(4, 4).mean(1))
    assert rows["all corruptions"].mean == pytest.approx(means.mean())
    assert rows["all corruptions"].relative == pytest.approx(means.mean() / 0.8)
    assert rows["shot_noise"].scores == pytest.approx(scores[6]) and counted("shot_noise") == (1, 2, 3)


def test_a_partial_table_says_what_is_missing() -> None:
    rows = table(0.5, {("fog", 1): 0.4, ("fog", 3): 0.2, ("shot_noise", 4): 0.1})
    assert [row.name for row in rows] == [
        *("shot_noise (0 of 3 severities)", "noise (0 of 4)"),
        *("fog (2 of 5 severities)", "weather (1 of 4)", "all corruptions (1 of 16)"),
    ]
    assert rows[0][1:] == ((None, None, None, 0.1, None), None, None)
    assert rows[-1].mean == pytest.approx(0.3) and rows[-1].relative == pytest.approx(0.6)
    one = table(0.5, {(name, 3): 0.4 for name in CORRUPTIONS})
    assert one[-1].name == "all corruptions (not all severities)" and one[-1].mean == pytest.approx(0.4)
    assert table(0.0, {("fog", 1): 0.0})[0].relative is None


def test_the_markdown_has_one_line_a_row_in_percent() -> None:
    lines = markdown(0.5, table(0.5, {("fog", severity): 0.4 for severity in SEVERITIES})).splitlines()
    assert lines[0] == "| corruption | 1 | 2 | 3 | 4 | 5 | mean | of clean |"
    assert lines[2] == "| clean |  |  |  |  |  | 50.00 | 100.00 |"
    assert lines[3] == "| fog | 40.00 | 40.00 | 40.00 | 40.00 | 40.00 | 40.00 | 80.00 |"
    assert lines[-1] == "| all corruptions (1 of 16) |  |  |  |  |  | 40.00 | 80.00 |"
    assert len({line.count("|") for line in lines}) == 1
