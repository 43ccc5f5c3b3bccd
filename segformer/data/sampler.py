"""Which sample comes when: endless and step-indexed for training, unpadded shards for evaluation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from segformer.errors import UserError, nearest

Order = Callable[[int], int]  # position in the endless order -> sample


class Draw(NamedTuple):
    """One training sample: its place in the source, and the seed of its augmentation."""

    sample: int
    seed: int


def mix(*numbers: int) -> int:
    """One well-mixed 32-bit seed from several non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@dataclass(frozen=True)
class Sampling:
    """How often a training sample comes.

    name: "uniform", each once an epoch; "rare_class", a class first, the rarer the likelier, then one of the images
    that hold it (arXiv 2111.14887); "repeat_factor", an image as often as its rarest class asks for (arXiv 1908.03195).
    temperature: of rare_class; the lower, the rarer the classes. threshold: of repeat_factor; classes in fewer than
    this share of the images are repeated.
    """

    name: str = "uniform"
    temperature: float = 0.01
    threshold: float = 0.001

    def __post_init__(self) -> None:
        names = ("uniform", "rare_class", "repeat_factor")
        if self.name not in names:
            raise UserError(
                f"data.sampling.name is {self.name!r}{nearest(self.name, names)}: choose from {', '.join(names)}"
            )
        if self.temperature <= 0:
            raise UserError(f"data.sampling.temperature is {self.temperature}, expected more than 0")
        if not 0 < self.threshold <= 1:
            raise UserError(f"data.sampling.threshold is {self.threshold}, expected more than 0 and at most 1")

    def order(self, seed: int, pixels: np.ndarray) -> Order:
        """The endless order. pixels: (samples, classes), how many of each; of "uniform" only the length counts."""
        if self.name == "rare_class":
            return _rare_classes(seed, pixels, self.temperature)
        weights = _repeat_factors(pixels, self.threshold) if self.name == "repeat_factor" else np.ones(len(pixels))
        return _epochs(seed, weights)


def _epochs(seed: int, weights: np.ndarray) -> Order:
    """Epochs of as many draws as samples: each sample as often as its weight says, rounded anew, in a new order.

    A systematic sample: with equal weights each sample comes exactly once.
    """
    ends = np.cumsum(weights * (len(weights) / weights.sum()))
    ends[-1] = len(weights)  # the sum may round
    latest: tuple[int, np.ndarray] = (-1, np.empty(0))

    def order(position: int) -> int:
        nonlocal latest
        epoch, place = divmod(position, len(weights))
        if latest[0] != epoch:
            draw = np.random.default_rng((seed, epoch))
            picked = np.arange(len(weights))
            if (weights != weights[0]).any():
                picked = np.searchsorted(ends, picked + draw.random(), side="right")
            latest = epoch, draw.permutation(picked)
        return int(latest[1][place])

    return order


def _rare_classes(seed: int, pixels: np.ndarray, temperature: float) -> Order:
    frequencies = pixels.sum(0) / max(pixels.sum(), 1)
    holders = [np.flatnonzero(column) for column in pixels.T]
    chances = np.where(frequencies > 0, np.exp(-frequencies / temperature), 0)
    if not chances.any():
        raise UserError("data.sampling=rare_class needs labelled pixels, but the training masks hold none")
    chances /= chances.sum()

    def order(position: int) -> int:
        draw = np.random.default_rng((seed, position))
        return int(draw.choice(holders[draw.choice(len(chances), p=chances)]))

    return order


def _repeat_factors(pixels: np.ndarray, threshold: float) -> np.ndarray:
    shares = (pixels > 0).mean(0)
    factors = np.maximum(1, np.sqrt(threshold / np.maximum(shares, 1e-12)))
    return np.where(pixels > 0, factors, 1).max(1)


class TrainingBatches(Sampler[list[Draw]]):
    """Endless micro-batches whose content follows from (seed, optimiser step) alone.

    order: what sample stands at a position of the endless order. Step s takes the `batch_size` positions from
    s * batch_size on, dealt out over processes and accumulated micro-batches, so a run that resumes at step s, with any
    number of workers or processes, sees what an unbroken run sees.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        seed: int,
        start_step: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        assert batch_size % (world * accumulate) == 0, "the data module shares evenly or refuses"
        self.order, self.batch_size, self.seed, self.start_step = order, batch_size, seed, start_step
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        micro = self.batch_size // (self.world * self.accumulate)
        step = self.start_step
        while True:
            for part in range(self.accumulate):
                first = step * self.batch_size + (part * self.world + self.rank) * micro
                yield [self._draw(position) for position in range(first, first + micro)]
            step += 1

    def _draw(self, position: int) -> Draw:
        return Draw(self.order(position), mix(self.seed, position))


class EvaluationShard(Sampler[int]):
    """Every world-th sample from `rank` on: each sample exactly once over all processes, none repeated as padding."""

    def __init__(self, length: int, rank: int = 0, world: int = 1) -> None:
        self.indices = range(rank, length, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
