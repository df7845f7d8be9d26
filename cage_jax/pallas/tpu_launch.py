"""The launch of a kernel for TPU: its operands by name, and their blocks."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cage_jax.arrays.tile_order import LANES
from cage_jax.pallas.strips import TERMS, result_like, rotation
from cage_jax.pallas.tiling import Tiling


class Operand(NamedTuple):
    """An array that a kernel reads or writes.

    Attributes:
      array: the array; for a result, its shape and dtype.
      spec: the block of it that the kernel receives at each place of the grid.
    """

    array: Any
    spec: pl.BlockSpec


def read_blocks(array: jax.Array, tiling: Tiling, *, first: bool = True) -> Operand:
    """Returns an array in blocks, which the kernel uses in its first or last read."""
    stored = array.reshape(tiling.merged).transpose(tiling.order)
    stored = stored.reshape(tiling.shape)
    return Operand(stored, _blocks(tiling, first))


def written_blocks(
    x: jax.Array, dtype, tiling: Tiling, *, first: bool = False
) -> Operand:
    """Returns a result like `x`, which the kernel writes in its first or last read."""
    return Operand(result_like(x, tiling.shape, dtype), _blocks(tiling, first))


def read_vector(vector: jax.Array, tiling: Tiling, *, along: bool) -> Operand:
    """Returns numbers along the groups or across them, in blocks with the array's.

    Along the groups a block has a row for each strip, across them it is one row.

    Args:
      vector: an array like the kernel's, but of size 1 along the other axis.
      tiling: the blocks.
      along: whether the numbers lie along the groups.
    """
    stack, across, _, blocks = tiling.grid
    rows, columns = (tiling.strips, tiling.strip) if along else (1, tiling.across)
    shape = stack, blocks if along else across, rows, columns
    other = tiling.order[-tiling.along if along else tiling.along - 3]
    merged = [1 if axis == other else n for axis, n in enumerate(tiling.merged)]
    vector = vector.reshape(merged).transpose(tiling.order).reshape(stack, -1)
    beyond = math.prod(shape[1:]) - vector.shape[1]
    vector = jnp.pad(vector, ((0, 0), (0, beyond)))

    def index(stack, across, read, block):
        return stack, block if along else across, 0, 0

    return Operand(vector.reshape(shape), pl.BlockSpec((None, None, *shape[2:]), index))


def like(x: jax.Array, written: jax.Array, tiling: Tiling) -> jax.Array:
    """Returns what was written in blocks in the shape of `x`."""
    stored = written.reshape([tiling.merged[axis] for axis in tiling.order])
    return stored.transpose(np.argsort(tiling.order)).reshape(x.shape)


def one_per_block(x: jax.Array, tiling: Tiling) -> Operand:
    """Returns a result of (8, 128) float32 numbers for each block across the groups."""
    spec = pl.BlockSpec(
        (None, None, 8, LANES), lambda stack, across, *_: (stack, across, 0, 0)
    )
    shape = *tiling.grid[:2], 8, LANES
    return Operand(result_like(x, shape, jnp.float32), spec)


def _blocks(tiling, first):
    reads, last_block = tiling.grid[2], tiling.grid[3] - 1

    def index(stack, across, read, along):
        if first and tiling.kept:
            # Later reads stay at the last block, so nothing is moved again.
            along = jnp.where(read == 0, along, last_block)
        elif not first:
            along = jnp.where(read == reads - 1, along, 0)
        return (stack, along, across) if tiling.along == 1 else (stack, across, along)

    return pl.BlockSpec((None, *tiling.block), index)


def references(names: list[str], refs: tuple, optional: tuple[str, ...]) -> Any:
    """Returns an object with references as attributes; a missing one is None."""
    by_name = dict(zip(names, refs, strict=True))
    return SimpleNamespace(**dict.fromkeys(optional) | by_name)


def launch(
    name: str,
    kernel: Callable,
    tiling: Tiling,
    inputs: dict[str, Operand],
    outputs: dict[str, Operand],
    scratch: dict[str, Any] | None = None,
    aliases: dict[str, str] | None = None,
) -> dict[str, jax.Array]:
    """Runs a kernel over all blocks and returns its outputs by name.

    Args:
      name: name of the kernel in a program.
      kernel: receives an object whose attributes are references to all inputs, outputs
        and scratch memory by name, and to the matrix of the rotation, or None.
      tiling: the blocks.
      inputs, outputs: what it reads and writes, by name.
      scratch: memory that is kept from one block to the next, by name.
      aliases: maps names of inputs to those of the outputs that replace them.
    """
    scratch = scratch or {}
    matrix = rotation(tiling, math.gcd(LANES, tiling.strip))  # as for a matrix unit
    if matrix is not None:
        spec = pl.BlockSpec(matrix.shape, lambda *_: (0, 0))
        inputs = inputs | {"matrix": Operand(matrix, spec)}
    names = [*inputs, *outputs, *scratch]

    def run(*refs):
        kernel(references(names, refs, optional=("matrix",)))

    read, in_specs = zip(*inputs.values())
    written, out_specs = zip(*outputs.values())
    moved = [each for each in (*read, *written) if each.shape == tiling.shape]
    products = 0 if matrix is None else 2 * (TERMS + 1) * len(matrix)
    read_names, written_names = [*inputs], [*outputs]
    found = pl.pallas_call(
        run,
        grid=tiling.grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=written,
        scratch_shapes=[*scratch.values()],
        input_output_aliases={
            read_names.index(old): written_names.index(new)
            for old, new in (aliases or {}).items()
        },
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=math.prod(tiling.shape) * (products + 30),
            bytes_accessed=sum(each.size * each.dtype.itemsize for each in moved),
            transcendentals=0,
        ),
        name=f"cage_{name}",
    )(*read)
    return dict(zip(outputs, found, strict=True))
