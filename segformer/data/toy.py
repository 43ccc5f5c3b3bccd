"""Rendered street scenes: a dataset of 8 classes with nothing to download.

Sizes, light, weather, colours, overlap and noise vary from scene to scene, so colour alone says little about the class
(walls, road, sidewalk and clothes share their greys; cars and signs come in any paint). A scene depends on nothing but
(seed, index). Some pixels are ignored, as in real data: the bonnet of the camera car and unlabelled boxes.
"""

from collections.abc import Callable

import cv2
import numpy as np

from segformer.data.samples import Source
from segformer.labels import IGNORE

CLASSES = ("sky", "building", "road", "sidewalk", "tree", "car", "person", "sign")
SKY, BUILDING, ROAD, SIDEWALK, TREE, CAR, PERSON, SIGN = range(len(CLASSES))

# RGB anchors a scene draws from; every colour is jittered
_SKIES = [((70, 130, 205), (190, 215, 235)), ((150, 155, 165), (205, 205, 208)), ((60, 70, 120), (240, 170, 120))]
_WALLS = [(165, 110, 92), (190, 175, 150), (125, 125, 130), (205, 200, 190), (105, 115, 130), (150, 128, 104)]
_LEAVES = [(60, 105, 45), (85, 130, 55), (45, 85, 50), (70, 115, 40), (150, 125, 45)]
_PAINTS = [(185, 30, 35), (30, 60, 150), (225, 225, 228), (35, 36, 40), (130, 132, 138), (215, 170, 40), (50, 110, 80)]
_PLATES = [(200, 30, 35), (35, 80, 170), (235, 190, 40), (235, 235, 235), (30, 120, 70)]


class ToyScenes(Source):
    """`source[index] -> (image, mask)`: RGB uint8 (H, W, 3) and train ids uint8 (H, W); about 144 x 208 pixels."""

    def __init__(self, scenes: int, seed: int = 0) -> None:
        self.scenes, self.seed = scenes, seed
        self._rendered: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # a scene takes longer to render than to train on

    def __len__(self) -> int:
        return self.scenes

    def name(self, index: int) -> str:
        return f"scene_{self.seed}_{index:05d}"

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index not in self._rendered:
            self._rendered[index] = render(np.random.default_rng((self.seed, index)))
        return self._rendered[index]


def render(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One scene: RGB uint8 (H, W, 3) and train ids uint8 (H, W), 255 = ignore."""
    scene = _Scene(rng, height=int(rng.integers(128, 161)), width=int(rng.integers(176, 241)))
    scene.sky()
    scene.buildings()
    scene.ground()
    near_to_far = [(rng.uniform(0.45, 1), kind) for kind in _crowd(rng)]
    for depth, kind in sorted(near_to_far):  # far things first: near ones cover them
        kind(scene, depth)
    scene.ignored()
    return scene.developed(), scene.mask


def _crowd(rng: np.random.Generator) -> list[Callable[["_Scene", float], None]]:
    counts = {_Scene.tree: (1, 5), _Scene.car: (1, 5), _Scene.person: (2, 7), _Scene.sign: (2, 6)}
    return [kind for kind, (low, high) in counts.items() for _ in range(rng.integers(low, high))]


class _Scene:
    """A canvas and its mask, painted back to front. Depth runs from 0 at the horizon to 1 at the camera."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng, self.height, self.width = rng, height, width
        self.image = np.zeros((height, width, 3), np.float32)
        self.mask = np.full((height, width), IGNORE, np.uint8)
        self.horizon = int(height * rng.uniform(0.36, 0.5))
        self.vanish = width * rng.uniform(0.3, 0.7)
        # half-widths of the road at the bottom edge, left and right of the vanishing point
        self.kerb = width * rng.uniform(0.35, 0.8, 2)
        self.haze = rng.uniform(0, 0.25)
        self.grain = self._noise(3) * 8  # one texture a scene, shared by all surfaces

    # -- surfaces

    def sky(self) -> None:
        top, bottom = (self._vary(color, 15) for color in _SKIES[self.rng.integers(len(_SKIES))])
        self.air = bottom
        ramp = np.linspace(0, 1, self.height, dtype=np.float32)[:, None, None]
        self.image[:] = top * (1 - ramp) + bottom * ramp
        clouds = np.clip(self._noise(24) * 0.6 - self.rng.uniform(-0.2, 0.8), 0, 0.8)[..., None]
        self.image += clouds * (240 - self.image)
        self.mask[:] = SKY

    def buildings(self) -> None:
        left = -int(self.rng.integers(0, 20))
        while left < self.width:
            wide = int(self.rng.integers(18, 60))
            if self.rng.random() < 0.78:
                self._building(left, wide, int(self.horizon * self.rng.uniform(0.25, 1)))
            left += wide

    def _building(self, left: int, wide: int, tall: int) -> None:
        color = self._vary(_pick(self.rng, _WALLS), 18)
        roof = self.horizon - tall
        box = self._box(left, roof, left + wide, self.horizon + 3)
        self._paint(box, BUILDING, color, depth=0.5)
        glass = self._vary((90, 105, 120) if self.rng.random() < 0.7 else (235, 215, 150), 20)
        step, side = int(self.rng.integers(7, 12)), int(self.rng.integers(3, 6))
        windows = np.zeros_like(box)
        for y in range(roof + 4, self.horizon - side, step):
            for x in range(left + 4, left + wide - side, step):
                cv2.rectangle(windows, (x, y), (x + side - 1, y + side), 1, -1)
        self._paint(windows & box, BUILDING, glass, depth=0.5)

    def ground(self) -> None:
        ground = self._box(0, self.horizon, self.width, self.height)
        paving = self._vary((158, 150, 140), 20)
        self._paint(ground, SIDEWALK, paving, depth=0.6)
        joints = np.zeros_like(ground)
        for depth in np.linspace(0.15, 1, 9) ** 2:
            cv2.line(joints, (0, self._y(depth)), (self.width, self._y(depth)), 1)
        for offset in np.arange(-3, 3, 0.16):
            far, near = self._at(offset, 0.05), self._at(offset, 1)
            cv2.line(joints, (int(far[0]), int(far[1])), (int(near[0]), int(near[1])), 1)
        self._paint(joints & ground, SIDEWALK, paving * 0.75, depth=0.6)
        self._paint(self._road(1.08), SIDEWALK, paving * 1.25, depth=0.6)  # the kerb
        asphalt = self._vary((88, 88, 92), 20)
        self._paint(self._road(1.0), ROAD, asphalt, depth=0.6)
        for near in np.linspace(0.2, 1, 6):  # lane markings are road
            dash = self._poly(
                [self._at(0.02, near), self._at(-0.02, near), self._at(-0.02, near * 0.86), self._at(0.02, near * 0.86)]
            )
            self._paint(dash & (self.mask == ROAD), ROAD, self._vary((215, 215, 205), 12), depth=0.6)

    # -- things

    def tree(self, depth: float) -> None:
        x, y, size = self._stand(depth, on_road=False, tall=0.95)
        leaf, trunk = self._vary(_pick(self.rng, _LEAVES), 9), self._vary((95, 72, 52), 14)
        self._paint(self._box(x - size * 0.04, y - size * 0.5, x + size * 0.04 + 1, y), TREE, trunk, depth)
        for shade in (0.75, 0.9, 1.0, 1.12):
            dx, dy = self.rng.uniform(-0.16, 0.16), self.rng.uniform(-0.86, -0.5)
            crown = self._disc(x + dx * size, y + dy * size, size * self.rng.uniform(0.15, 0.25))
            self._paint(crown, TREE, leaf * shade, depth, rough=1.8)

    def car(self, depth: float) -> None:
        x, y, size = self._stand(depth, on_road=True, tall=0.34)
        half = size * self.rng.uniform(0.75, 1.25)
        paint = self._vary(_pick(self.rng, _PAINTS), 14)
        self.image *= 1 - 0.4 * self._disc(x, y, half, half * 0.16)[..., None]  # its shadow falls on the road
        for side in (-0.62, 0.62):
            self._paint(
                self._disc(x + side * half, y - size * 0.12, size * 0.17), CAR, self._vary((28, 28, 30), 6), depth
            )
        body = self._poly([(x - half, y - size * 0.12), (x - half * 0.96, y - size * 0.55),
                           (x - half * 0.6, y - size * 0.6), (x - half * 0.42, y - size), (x + half * 0.45, y - size),
                           (x + half * 0.68, y - size * 0.58), (x + half * 0.97, y - size * 0.5),
                           (x + half, y - size * 0.12)])  # fmt: skip
        self._paint(body, CAR, paint, depth, rough=0.4)
        glass = self._poly([(x - half * 0.5, y - size * 0.6), (x - half * 0.36, y - size * 0.93),
                            (x + half * 0.38, y - size * 0.93), (x + half * 0.56, y - size * 0.6)])  # fmt: skip
        self._paint(glass, CAR, self._vary((70, 82, 95), 16), depth, rough=0.4)
        lamp = self._vary((240, 225, 160) if self.rng.random() < 0.5 else (190, 40, 35), 10)
        self._paint(self._disc(x + half * 0.9, y - size * 0.38, size * 0.07), CAR, lamp, depth, rough=0.2)

    def person(self, depth: float) -> None:
        x, y, size = self._stand(depth, on_road=self.rng.random() < 0.15, tall=0.76)
        wide, stride = size * 0.17, size * self.rng.uniform(0.02, 0.11)
        shirt, trousers = (
            self._vary(_pick(self.rng, _PAINTS), 22),
            self._vary(_pick(self.rng, _WALLS + _PAINTS), 22) * 0.7,
        )
        for foot in (-stride, stride):
            leg = self._poly([(x - wide * 0.6, y - size * 0.5), (x + wide * 0.6, y - size * 0.5),
                              (x + foot + wide * 0.35, y), (x + foot - wide * 0.35, y)])  # fmt: skip
            self._paint(leg, PERSON, trousers, depth)
        torso = self._poly([(x - wide, y - size * 0.83), (x + wide, y - size * 0.83),
                            (x + wide * 0.75, y - size * 0.45), (x - wide * 0.75, y - size * 0.45)])  # fmt: skip
        self._paint(torso, PERSON, shirt, depth)
        skin = self._vary((205, 160, 130), 10) * self.rng.uniform(0.45, 1.05)
        self._paint(self._disc(x, y - size * 0.91, size * 0.085), PERSON, skin, depth)

    def sign(self, depth: float) -> None:
        x, y, size = self._stand(depth, on_road=False, tall=0.85)
        plate, pole = self._vary(_pick(self.rng, _PLATES), 12), self._vary((120, 120, 122), 20)
        self._paint(self._box(x - size * 0.045, y - size * 0.7, x + size * 0.045 + 1, y), SIGN, pole, depth)
        radius, middle = size * 0.27, y - size * 0.8
        shape = int(self.rng.integers(3))
        face, inner = (self._plate(shape, x, middle, scale) for scale in (radius, radius * 0.6))
        self._paint(face, SIGN, plate, depth, rough=0.3)
        self._paint(
            inner, SIGN, self._vary((238, 238, 235), 8) if self.rng.random() < 0.6 else plate * 0.8, depth, rough=0.3
        )

    def _plate(self, shape: int, x: float, y: float, radius: float) -> np.ndarray:
        if shape == 0:
            return self._disc(x, y, radius)
        if shape == 1:
            return self._box(x - radius, y - radius * 0.9, x + radius, y + radius * 0.9)
        return self._poly([(x, y - radius), (x + radius, y + radius * 0.8), (x - radius, y + radius * 0.8)])

    def ignored(self) -> None:
        if self.rng.random() < 0.35:  # the bonnet of the camera car
            bonnet = self._disc(self.width / 2, self.height + self.height * 0.3, self.width * 0.5, self.height * 0.4)
            self._paint(bonnet, IGNORE, self._vary((45, 47, 52), 20), depth=1, rough=0.2)
        for _ in range(self.rng.integers(0, 3)):  # things nobody labelled
            x, y, size = self._stand(self.rng.uniform(0.15, 0.8), on_road=False, tall=0.22)
            box = self._box(x - size * 0.4, y - size, x + size * 0.4, y)
            self._paint(box, IGNORE, self._vary(_pick(self.rng, _WALLS), 25), depth=0.7)

    def developed(self) -> np.ndarray:
        """Light, blur and sensor noise."""
        across = np.linspace(self.rng.uniform(0.85, 1.15), self.rng.uniform(0.85, 1.15), self.width, dtype=np.float32)[
            None, :, None
        ]
        tint = self.rng.uniform(0.95, 1.05, 3).astype(np.float32)
        image: np.ndarray = self.image * across * tint * np.float32(self.rng.uniform(0.8, 1.1))
        if self.rng.random() < 0.5:
            image = cv2.GaussianBlur(image, (3, 3), self.rng.uniform(0.3, 0.9)).astype(np.float32)
        noise = self.rng.standard_normal(image.shape, np.float32)
        image += noise * np.float32(self.rng.uniform(1, 4))
        return np.clip(image, 0, 255).astype(np.uint8)

    # -- helpers

    def _paint(self, region: np.ndarray, label: int, color: np.ndarray, depth: float, rough: float = 1.0) -> None:
        """Fills a 0/1 region with a textured colour; distance fades it into the air."""
        rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
        if not len(rows):
            return
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        where = region[window] > 0
        fade = self.haze * (1 - min(depth, 1)) ** 2
        lit = color + self.grain[window][where][:, None] * rough
        self.image[window][where] = lit * (1 - fade) + self.air * fade
        self.mask[window][where] = label

    def _stand(self, depth: float, on_road: bool, tall: float) -> tuple[float, float, float]:
        """Where a thing of that depth touches the ground and how tall it is there, in pixels."""
        side = int(self.rng.integers(2))
        edge = (-1, 1)[side] * self.kerb[side] / self.width
        # on the road a lane, else a spot on the paving beyond the kerb
        offset = edge * (
            self.rng.uniform(0.25, 0.8) if on_road else self.rng.uniform(1.08, 1.08 + 0.5 / max(depth, 0.3))
        )
        x, y = self._at(offset, depth)
        return x, y, tall * (12 + (self.height - self.horizon) * 1.15 * depth) * self.rng.uniform(0.85, 1.15)

    def _at(self, offset: float, depth: float) -> tuple[float, float]:
        return self.vanish + offset * self.width * depth, self._y(depth)

    def _y(self, depth: float) -> int:
        return int(self.horizon + (self.height - self.horizon) * depth)

    def _road(self, share: float) -> np.ndarray:
        left, right = self.kerb / self.width * share
        return self._poly(
            [(self.vanish - 2, self.horizon), (self.vanish + 2, self.horizon), self._at(right, 1), self._at(-left, 1)]
        )

    def _blank(self) -> np.ndarray:
        return np.zeros((self.height, self.width), np.uint8)

    def _box(self, left: float, top: float, right: float, bottom: float) -> np.ndarray:
        box = self._blank()
        box[max(int(top), 0) : max(int(bottom), 0), max(int(left), 0) : max(int(right), 0)] = 1
        return box

    def _poly(self, points: list[tuple[float, float]]) -> np.ndarray:
        return cv2.fillPoly(self._blank(), [np.round(points).astype(np.int32)], 1)

    def _disc(self, x: float, y: float, radius: float, high: float | None = None) -> np.ndarray:
        axes = (max(int(radius), 1), max(int(radius if high is None else high), 1))
        return cv2.ellipse(self._blank(), (int(x), int(y)), axes, 0, 0, 360, 1, -1)

    def _noise(self, cell: int) -> np.ndarray:
        """(H, W) smooth noise of unit variance at grid points `cell` pixels apart."""
        grid = self.rng.standard_normal((self.height // cell + 2, self.width // cell + 2), np.float32)
        return cv2.resize(grid, (self.width, self.height), interpolation=cv2.INTER_CUBIC)

    def _vary(self, color: tuple[int, int, int], spread: float) -> np.ndarray:
        shift = self.rng.normal(0, spread) + self.rng.normal(0, spread * 0.4, 3)
        return np.clip(np.asarray(color) + shift, 5, 250).astype(np.float32)


def _pick(rng: np.random.Generator, colors: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    return colors[rng.integers(len(colors))]
