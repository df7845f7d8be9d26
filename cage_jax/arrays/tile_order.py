"""Groups in the order in which a TPU stores an array.

A TPU stores an array as tiles of 8 rows by 128 columns. To split an axis into groups, a
compiler copies the array into another layout and back, or reads it once for what comes
before and once for what comes after. An array of shape
(rows / 8, columns / 128, 8, 128) has the same layout in memory, and once it is split at
the ends of tiles, groups are whole axes of it. A tile can hold several shorter groups
side by side; each is reduced with the others masked. So nothing is copied, and all is
done in one read with the operations around it.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from cage_jax.arrays.sharding import devices_along

LANES = 128
# Smaller arrays stay on the chip, where one more program costs more than it saves.
SMALLEST = 2**18
_ROWS = 8
# The groups in one tile. Each masks the tile once more, and by the compiler's own
# estimate of cycles, eight take longer than the copies.
_MOST_GROUPS = 4


def stored_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the axes of an array in the order in which a TPU stores it.

    Tiles lie along the last two of them. A TPU chooses the two that tiles fill best, by
    default the last two, so that transposing to this order moves nothing.
    """
    axes = range(len(shape))
    if len(shape) < 2:
        return tuple(axes)

    def stored(pair):
        lengths = [*shape]
        for axis, unit in zip(pair, (LANES, _ROWS)):
            lengths[axis] = math.ceil(lengths[axis] / unit) * unit
        return math.prod(lengths)

    columns, rows = min(itertools.permutations(reversed(axes), 2), key=stored)
    others = (axis for axis in axes if axis not in (rows, columns))
    return *others, rows, columns


def tile_pieces(
    shape: tuple[int, ...], axis: int, size: int, sharding: NamedSharding
) -> int | None:
    """Counts the pieces of whole tiles and groups that the last two axes divide into.

    Args:
      shape: shape of the array.
      axis: axis of its groups, -1 or -2.
      size: length of a group.
      sharding: sharding of the array, or of its array of one number per group.

    Returns:
      A number that the number of devices must divide if they split the array. None if
      the array does not consist of such tiles, or if its explicit shards cut them.
    """
    if axis < -2 or len(shape) < 2:
        return None
    tile = [_ROWS, LANES]
    beside = 1 if size % tile[axis] == 0 else tile[axis] / size
    if beside % 1 or beside > (_MOST_GROUPS if axis == -1 else 1):
        return None
    tile[axis] = max(tile[axis], size)
    devices = devices_along(sharding, len(shape))[-2:]
    counts = [length // unit for length, unit in zip(shape[-2:], tile)]
    if [n * unit for n, unit in zip(counts, tile)] != [*shape[-2:]]:
        return None
    if any(n % count for n, count in zip(counts, devices)):
        return None
    return math.gcd(*counts)


def reduce_in_tiles(function: Callable, x: jax.Array, axis: int, size: int) -> Any:
    """Reduces each group of an array in its order in memory.

    Args:
      function: called as `function(blocks, axes)`. It reduces `axes`, keeps them with
        size 1, and gives the same result if zeros are added to its input.
      x: an array (..., rows, columns) for which `tile_pieces` is not None.
      axis: axis of its groups, -1 or -2.
      size: length of a group.

    Returns:
      A tree of arrays (..., rows, columns / size), or (..., rows / size, columns).
    """
    # (..., tiles of rows, tiles of columns, 8, 128)
    x = _tiles(x, LANES)
    *stack, down, across, rows, lanes = x.shape
    if axis == -2:
        x = x.reshape(*stack, -1, size // rows, across, rows, lanes)
        found = function(x, (x.ndim - 4, x.ndim - 2))
        return jax.tree.map(
            lambda each: jnp.squeeze(each, (-4, -2)).reshape(
                *stack, each.shape[-5], across * lanes
            ),
            found,
        )
    if size >= lanes:
        x = x.reshape(*stack, down, -1, size // lanes, rows, lanes)
        found = function(x, (x.ndim - 3, x.ndim - 1))
    else:
        shape = *stack, down, across, lanes // size, rows, lanes
        x = jnp.broadcast_to(jnp.expand_dims(x, -3), shape)
        own = _along(-3, x) == _group(x, size)
        x = jnp.where(own, x, jnp.zeros_like(x))
        found = function(x, (x.ndim - 1,))

    def whole(each):
        # (..., down, across, groups beside each other, rows, 1)
        each = jnp.moveaxis(jnp.squeeze(each, -1), -1, -3)
        each = each.reshape(*stack, down * rows, *each.shape[-2:])
        return each.reshape(*stack, down * rows, -1)

    return jax.tree.map(whole, found)


def spread_in_tiles(per_group: jax.Array, axis: int, size: int) -> jax.Array:
    """Repeats the number of each group for all its elements.

    Args:
      per_group: an array (..., rows, groups), or (..., groups, columns).
      axis: axis of the groups, -1 or -2.
      size: length of a group.

    Returns:
      An array (..., rows, columns).
    """
    *stack, rows, columns = per_group.shape
    if axis == -2:
        tiles = per_group.reshape(*stack, rows, columns // LANES, LANES)
        tiles = jnp.expand_dims(tiles, (-4, -2))
        shape = *stack, rows, size // _ROWS, columns // LANES, _ROWS, LANES
        tiles = jnp.broadcast_to(tiles, shape)
        return _untiled(tiles.reshape(*stack, -1, *shape[-3:]))
    beside = max(1, LANES // size)
    tiles = _tiles(per_group, beside)
    shape = *tiles.shape[:-1], LANES
    found = jnp.broadcast_to(tiles[..., :1], shape)
    for i in range(1, beside):
        other = jnp.broadcast_to(tiles[..., i : i + 1], shape)
        found = jnp.where(_group(found, size) == i, other, found)
    times = max(1, size // LANES)
    if times > 1:
        shape = *shape[:-2], times, *shape[-2:]
        found = jnp.broadcast_to(jnp.expand_dims(found, -3), shape)
        found = found.reshape(*shape[:-4], -1, *shape[-2:])
    return _untiled(found)


def _tiles(x, width):
    """Reshapes to (..., rows / 8, columns / width, 8, width)."""
    *stack, rows, columns = x.shape
    # JAX reshapes sharded arrays only one axis at a time, the last one first.
    x = x.reshape(*stack, rows, columns // width, width)
    x = x.reshape(*stack, rows // _ROWS, _ROWS, columns // width, width)
    return jnp.moveaxis(x, -3, -2)


def _untiled(tiles):
    *stack, down, across, rows, lanes = tiles.shape
    x = jnp.moveaxis(tiles, -2, -3).reshape(*stack, down * rows, across, lanes)
    return x.reshape(*stack, down * rows, across * lanes)


def _group(x, size):
    """Returns the index, within its tile, of the group of each element."""
    return _along(-1, x) >> (size.bit_length() - 1)


def _along(axis, x):
    """Returns the index of each element along an axis."""
    sharding = jax.typeof(x).sharding  # its explicit part, if any
    return lax.broadcasted_iota(
        jnp.int32, x.shape, x.ndim + axis, out_sharding=sharding
    )
