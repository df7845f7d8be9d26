"""The windows that a run reads: shuffled, each process its share, from any step on."""

from collections.abc import Iterator
from typing import Protocol

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

# Windows are read ahead by a thread, which numbers of steps.
_READ_AHEAD = 8
_STEPS = 2**40  # more than any run has


class Source(Protocol):
    """Something with windows, all of one shape and dtype."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


class Windows:
    """The windows of a row of tokens, one behind the other.

    Each has one token more than `length`, the first of the next: so every token but the
    first is predicted once.
    """

    def __init__(self, tokens: np.ndarray, length: int):
        self._tokens, self._length = tokens, length

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._length

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} windows; got index {index}")
        start = index * self._length
        return np.asarray(self._tokens[start : start + self._length + 1])


class Batches:
    """The batch of each step, on the devices of a mesh.

    Every window comes once, in an order that the seed tells, then all come again in
    another. A batch is a function of the seed and the step: the step is all that a
    checkpoint has to know, and any number of processes read the same. Each reads the
    windows of its own devices alone.

    Args:
      source: the windows.
      batch: windows a step.
      seed: of their order.
      sharding: of a batch, by its first axis.
    """

    def __init__(
        self, source: Source, *, batch: int, seed: int, sharding: NamedSharding
    ):
        self._sharding = sharding
        self._shape = (batch, *source[0].shape)
        places = sharding.addressable_devices_indices_map(self._shape)
        starts = sorted({index[0].indices(batch)[0] for index in places.values()})
        self._rows = sharding.shard_shape(self._shape)[0]
        own, parts = [start // self._rows for start in starts], batch // self._rows
        order = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
        part = order.batch(self._rows)
        # Part `i` of step `s` is number `s * parts + i` of all.
        self._steps = grain.MapDataset.range(_STEPS).map(
            lambda step: {i: part[step * parts + i] for i in own}
        )

    def __getitem__(self, step: int) -> jax.Array:
        """The batch of a step."""
        return self._placed(self._steps[step])

    def start(self, step: int) -> Iterator[jax.Array]:
        """The batches from a step on, read ahead."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_READ_AHEAD)
        return map(self._placed, iter(self._steps[step:].to_iter_dataset(options)))

    def _placed(self, parts):
        def read(index):
            return parts[index[0].indices(self._shape[0])[0] // self._rows]

        return jax.make_array_from_callback(self._shape, self._sharding, read)
