"""Groups along the last axis, in the order in which a TPU has an array in memory.

There an array is tiles of 8 rows by 128 columns. To split its last axis into groups, a
compiler copies it into another layout, and back. An array of (rows / 8, columns / 128,
8, 128) is the same memory: a group of 128 is all of an axis of that, and of shorter
ones a tile has several side by side, each of which is found with the others masked.
Nothing is copied, whatever comes before and after.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from cage_jax.pallas.tiles import LANES, SMALLEST
from cage_jax.shards import devices_along

_ROWS = 8
# Each masks a tile once more.
_MOST_GROUPS = 8


def tile_pieces(
    shape: tuple[int, ...], size: int, sharding: NamedSharding
) -> int | None:
    """Into how many pieces of whole tiles and groups both last axes can be cut.

    Args:
      shape: of an array.
      size: of its groups along the last axis.
      sharding: of the array, or of what it has for each group.

    Returns:
      What the number of devices has to divide that have a part each; None where an
      array is small or no such tiles, or where its explicit shards cut them.
    """
    if len(shape) < 2 or math.prod(shape) < SMALLEST:
        return None
    if size % LANES and (LANES % size or LANES // size > _MOST_GROUPS):
        return None
    units = _ROWS, math.lcm(size, LANES)
    devices = devices_along(sharding, len(shape))[-2:]
    counts = [length // unit for length, unit in zip(shape[-2:], units)]
    whole = all(
        n * unit == length for n, unit, length in zip(counts, units, shape[-2:])
    )
    if not whole or any(n % count for n, count in zip(counts, devices)):
        return None
    return math.gcd(*counts)


def reduce_in_tiles(function: Callable, x: jax.Array, size: int) -> Any:
    """What `function(blocks, axes)` gives for each group.

    Args:
      function: reduces `axes`, which it keeps with size 1, and gives the same where
        zeros are added to what it reduces.
      x: an array (..., rows, columns) of such tiles.
      size: of its groups along the last axis.

    Returns:
      A tree of arrays (..., rows, columns / size).
    """
    x = _tiles(x)
    *first, _, lanes = x.shape
    if size >= LANES:
        blocks = x.reshape(*first[:-1], -1, size // LANES, _ROWS, lanes)
        axes: tuple[int, ...] = (blocks.ndim - 3, blocks.ndim - 1)
    else:
        shape = *first, LANES // size, _ROWS, lanes
        spread = jnp.broadcast_to(jnp.expand_dims(x, -3), shape)
        own = _along(-3, spread) == _group(spread, size)
        blocks = jnp.where(own, spread, jnp.zeros_like(spread))
        axes = (blocks.ndim - 1,)

    def whole(found):
        # (..., tiles of rows, across, groups of a tile or 1, 8, 1)
        found = jnp.moveaxis(jnp.squeeze(found, -1), -1, -3)
        *stack, tiles, rows, across, groups = found.shape
        found = found.reshape(*stack, tiles * rows, across, groups)
        return found.reshape(*stack, tiles * rows, across * groups)

    return jax.tree.map(whole, function(blocks, axes))


def spread_in_tiles(per_group: jax.Array, size: int) -> jax.Array:
    """What each group along the last axis has once, for each of its elements.

    Args:
      per_group: an array (..., rows, groups).
      size: of a group.

    Returns:
      An array (..., rows, groups * size).
    """
    *stack, rows, groups = per_group.shape
    beside = max(1, LANES // size)
    tiles = per_group.reshape(*stack, rows, groups // beside, beside)
    tiles = tiles.reshape(*stack, rows // _ROWS, _ROWS, groups // beside, beside)
    tiles = jnp.moveaxis(tiles, -3, -2)
    shape = *tiles.shape[:-1], LANES
    found = jnp.broadcast_to(tiles[..., :1], shape)
    for i in range(1, beside):
        other = jnp.broadcast_to(tiles[..., i : i + 1], shape)
        found = jnp.where(_group(found, size) == i, other, found)
    if size > LANES:
        times = size // LANES
        found = jnp.broadcast_to(
            jnp.expand_dims(found, -3), (*shape[:-2], times, *shape[-2:])
        ).reshape(*shape[:-3], shape[-3] * times, *shape[-2:])
    *stack, tiles_of_rows, across, rows, lanes = found.shape
    found = jnp.moveaxis(found, -2, -3)
    found = found.reshape(*stack, tiles_of_rows * rows, across, lanes)
    return found.reshape(*stack, tiles_of_rows * rows, across * lanes)


def _tiles(x):
    """(..., rows / 8, columns / 128, 8, 128)."""
    *stack, rows, columns = x.shape
    # One axis at a time, the last one first: sharded arrays are reshaped only so.
    x = x.reshape(*stack, rows, columns // LANES, LANES)
    x = x.reshape(*stack, rows // _ROWS, _ROWS, columns // LANES, LANES)
    return jnp.moveaxis(x, -3, -2)


def _group(x, size):
    """Which of the groups of a tile each element of tiles is in."""
    return _along(-1, x) >> (size.bit_length() - 1)


def _along(axis, x):
    """Where each element is along an axis."""
    sharding = jax.typeof(x).sharding  # whatever is explicit of it
    return lax.broadcasted_iota(
        jnp.int32, x.shape, x.ndim + axis, out_sharding=sharding
    )
