"""Which sample comes when: endless and step-indexed for training, unpadded shards for evaluation."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One training sample: its place in the source, and the seed of its augmentation."""

    sample: int
    seed: int


def mix(*numbers: int) -> int:
    """One well-mixed 32-bit seed from several non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class TrainingBatches(Sampler[list[Draw]]):
    """Endless micro-batches whose content follows from (seed, optimiser step) alone.

    Position p of the endless order is sample permutation(seed, p // n)[p % n]. Step s takes the `batch_size` positions
    from s * batch_size on, dealt out over processes and accumulated micro-batches, so a run that resumes at step s,
    with any number of workers or processes, sees what an unbroken run sees.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start_step: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        assert batch_size % (world * accumulate) == 0, "the data module shares evenly or refuses"
        self.length, self.batch_size, self.seed, self.start_step = length, batch_size, seed, start_step
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
        epoch, place = divmod(position, self.length)
        return Draw(int(self._permutation(epoch)[place]), mix(self.seed, position))

    def _permutation(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.length)
        return self._order


class EvaluationShard(Sampler[int]):
    """Every world-th sample from `rank` on: each sample exactly once over all processes, none repeated as padding."""

    def __init__(self, length: int, rank: int = 0, world: int = 1) -> None:
        self.indices = range(rank, length, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
