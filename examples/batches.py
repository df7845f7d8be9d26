"""Shuffled batches of a run, for each process its share, starting from any step."""

from collections.abc import Iterator
from typing import Any, Protocol

import grain
import jax
import numpy as np
from jax.sharding import Sharding

_READ_AHEAD = 8  # batches that a thread reads in advance
_STEPS = 2**40  # more than any run has


class Source(Protocol):
    """Examples that are read many at a time, as an array of rows or a tree of arrays.

    A NumPy array is one.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: np.ndarray) -> Any: ...


class Windows:
    """Consecutive windows of a row of tokens.

    Each has `length + 1` tokens: the last is the first of the next window, so every
    token but the very first is predicted once.
    """

    def __init__(self, tokens: np.ndarray, length: int):
        self._tokens, self._length = tokens, length

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._length

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        starts = np.asarray(numbers)[..., None] * self._length
        if np.any((starts < 0) | (starts >= len(self) * self._length)):
            raise IndexError(f"there are {len(self)} windows; got number {numbers}")
        return self._tokens[starts + np.arange(self._length + 1)]


class Batches:
    """The batch of each step, on the devices of a mesh.

    Every epoch has each example once, in an order drawn from the seed. A batch depends
    only on the seed and the step, so a checkpoint needs only the step, and any number
    of processes read the same batches. Each process reads only the examples of its own
    devices.

    Args:
      source: the examples.
      batch: examples per step.
      seed: of their order.
      sharding: of a batch, by its first axis.
    """

    def __init__(self, source: Source, *, batch: int, seed: int, sharding: Sharding):
        self._batch, self._sharding = batch, sharding
        places = sharding.addressable_devices_indices_map((batch,))
        starts = sorted({index[0].indices(batch)[0] for index in places.values()})
        (self._rows,) = sharding.shard_shape((batch,))
        own, parts = [start // self._rows for start in starts], batch // self._rows
        order = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()
        part = order.batch(self._rows).map(source.__getitem__)
        # Part `i` of step `s` has the global index `s * parts + i`.
        self._steps = grain.MapDataset.range(_STEPS).map(
            lambda step: {i: part[step * parts + i] for i in own}
        )

    def __getitem__(self, step: int) -> Any:
        """Returns the batch of a step."""
        return self._placed(self._steps[step])

    def start(self, step: int) -> Iterator[Any]:
        """Yields the batches from a step on, read in advance."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_READ_AHEAD)
        return map(self._placed, iter(self._steps[step:].to_iter_dataset(options)))

    def _placed(self, parts):
        def whole(*leaves):
            of_part = dict(zip(parts, leaves))

            def read(index):
                return of_part[index[0].indices(self._batch)[0] // self._rows]

            shape = (self._batch, *leaves[0].shape[1:])
            return jax.make_array_from_callback(shape, self._sharding, read)

        return jax.tree.map(whole, *parts.values())
