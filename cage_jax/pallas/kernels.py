"""Which kernels there are for an array and its quantizer.

What launches them is imported when a program is compiled for their platform: it takes
longer than all the rest of this package.
"""

import jax
import jax.numpy as jnp

from cage_jax.adamw import AdamW, StepNumbers
from cage_jax.formats import Integer, MidRise
from cage_jax.pallas.dispatch import Kernels
from cage_jax.pallas.tiles import tiles_of
from cage_jax.quantizers import Quantizer
from cage_jax.scales import Grid


def fake_quant(
    quantizer: Quantizer,
    x: jax.Array,
    grid: Grid | None,
    noise: jax.Array | None,
    *,
    masked: bool,
) -> Kernels:
    """For `(x, grid, noise)` to the values, and with `masked` to a mask, int8, too."""
    tiles = tiles_of(quantizer, x.shape, x.dtype)
    if tiles is None or grid is not None or noise is not None:
        return Kernels()

    def on_tpu(x, grid, noise):
        from cage_jax.pallas import tpu

        return tpu.fake_quant(x, tiles=tiles, masked=masked)

    return Kernels(tpu=on_tpu)


def masked_gradient(quantizer: Quantizer, cotangent: jax.Array) -> Kernels:
    """For `(mask, cotangent)`, with such a mask, to the gradient."""
    tiles = tiles_of(quantizer, cotangent.shape, cotangent.dtype)
    if tiles is None:
        return Kernels()

    def on_tpu(mask, cotangent):
        from cage_jax.pallas import tpu

        return tpu.masked_gradient(mask, cotangent, tiles=tiles)

    return Kernels(tpu=on_tpu)


def adamw_step(
    quantizer: Quantizer,
    shape: tuple[int, ...],
    dtype,
    first_dtype,
    adamw: AdamW,
    *,
    at_updated: bool,
    measured: bool,
) -> Kernels:
    """From the arguments of a step to its results, as `pallas.tpu` has them."""
    # Seven arrays come and go, where two or three do otherwise.
    kept = 2 if at_updated else 1
    tiles = tiles_of(quantizer, shape, dtype, block_bytes=2**18, kept=kept)
    if tiles is None or first_dtype not in (jnp.float32, jnp.bfloat16):
        return Kernels()
    if measured and not (
        tiles.exact and isinstance(quantizer.format, Integer | MidRise)
    ):
        return Kernels()  # what lies beyond the array would be added up

    def on_tpu(
        gradient: jax.Array,
        first: jax.Array,
        second: jax.Array,
        x: jax.Array,
        numbers: StepNumbers,
        previous: jax.Array | None,
    ):
        from cage_jax.pallas import tpu

        return tpu.adamw_step(
            gradient,
            first,
            second,
            x,
            numbers,
            previous,
            tiles=tiles,
            adamw=adamw,
            at_updated=at_updated,
        )

    return Kernels(tpu=on_tpu)
