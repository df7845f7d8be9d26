"""Which kernels there are for an array and its quantizer.

What launches them is imported when a program is compiled for their platform: it takes
longer than all the rest of this package. Those for GPU were not timed on one yet, so
they are run by name alone.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from cage_jax.arrays.adamw import AdamW
from cage_jax.arrays.dispatch import Kernels
from cage_jax.arrays.tile_order import LANES
from cage_jax.pallas.tiles import (
    Tiles,
    product_tiles_of,
    tiles_for_gpu,
    tiles_of,
)
from cage_jax.quantizers.formats import Integer, MidRise
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.scales import Grid


def fake_quant(
    quantizer: Quantizer,
    x: jax.Array,
    grid: Grid | None,
    noise: jax.Array | None,
    *,
    masked: bool,
) -> Kernels:
    """For `(x, grid, noise)` to the values, and with `masked` to a mask, int8, too."""
    if grid is not None or noise is not None:
        return Kernels()

    def kernel(module, tiles):
        return lambda x, grid, noise: module.fake_quant(x, tiles=tiles, masked=masked)

    tiles = tiles_of(quantizer, x.shape, x.dtype)
    return _kernels(kernel, tiles, tiles_for_gpu(quantizer, x.shape, x.dtype))


def masked_gradient(quantizer: Quantizer, cotangent: jax.Array) -> Kernels:
    """For `(mask, cotangent)`, with such a mask, to the gradient."""

    def kernel(module, tiles):
        return lambda *arrays: module.masked_gradient(*arrays, tiles=tiles)

    like = quantizer, cotangent.shape, cotangent.dtype
    return _kernels(kernel, tiles_of(*like), tiles_for_gpu(*like))


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
    if first_dtype not in (jnp.float32, jnp.bfloat16):
        return Kernels()
    # Seven arrays come and go, where two or three do otherwise.
    kept = 2 if at_updated else 1
    for_tpu = tiles_of(quantizer, shape, dtype, block_bytes=2**18, kept=kept)
    for_gpu = tiles_for_gpu(quantizer, shape, dtype)
    if quantizer.scale_type.has_tensor_divisor:
        for_tpu = None  # all of a tensor would have to be read first
    if measured:
        for_gpu = None
        whole_numbers = isinstance(quantizer.format, Integer | MidRise)
        if not (whole_numbers and for_tpu and for_tpu.exact):
            for_tpu = None  # what lies beyond the array would be added up
    if at_updated and for_gpu and for_gpu.whole:
        for_gpu = None  # all four arrays would be read twice

    def kernel(module, tiles):
        return partial(
            module.adamw_step, tiles=tiles, adamw=adamw, at_updated=at_updated
        )

    found = _kernels(kernel, for_tpu, for_gpu)
    plain = quantizer.hadamard is None and not (at_updated or measured)
    if plain and all(
        _one_more(n, axis, shape) for axis, n in quantizer.blocks(shape).by_axis.items()
    ):
        # A compiler's step moves 8 copies, a kernel's 7: less than 1.15.
        found = dataclasses.replace(found, by_name=found.by_name | {"tpu"})
    return found


def _one_more(size, axis, shape):
    """Whether a compiler for TPU finds groups by reading an array once more."""
    return size == shape[axis] or (axis == len(shape) - 1 and size % LANES == 0)


def product(
    quantizer: Quantizer,
    shape: tuple[int, ...],
    inputs_shape: tuple[int, ...],
    dtype,
    *,
    scaled: bool,
) -> Kernels:
    """For `(inputs, weights)`, a `QuantizedArray`, to their product.

    Args:
      quantizer: of the weights (in, out).
      shape: of the weights.
      inputs_shape: (..., in).
      dtype: of the product.
      scaled: whether weights are scaled and rounded before they are multiplied.
    """
    tokens = math.prod(inputs_shape[:-1])
    tiles = product_tiles_of(quantizer, shape, tokens, scaled=scaled)
    if tiles is None:
        return Kernels()

    def on_tpu(inputs, weights):
        from cage_jax.pallas import tpu_matmul as products_tpu

        found = products_tpu.product(
            inputs.reshape(tokens, -1),
            weights.codes,
            weights.scale,
            weights.zero_point,
            weights.offset,
            weights.tensor_divisor,
            tiles=tiles,
            dtype=dtype,
        )
        return found.reshape(*inputs_shape[:-1], -1)

    # With a scale for each channel a compiler moves as little. Sums of several blocks
    # of tokens were not counted, and codes of 2 bits crash the compiler for v4.
    taken = tiles.group < shape[0] and (scaled or tokens <= tiles.tokens)
    taken = taken and quantizer.format.code_dtype != jnp.int2
    return Kernels(tpu=on_tpu, by_name=frozenset() if taken else frozenset({"tpu"}))


def _kernels(
    kernel: Callable[..., Callable], for_tpu: Tiles | None, for_gpu: Tiles | None
) -> Kernels:
    """`kernel(module, tiles)` of each platform that there are tiles for."""

    def on_tpu(*args):
        from cage_jax.pallas import tpu

        return kernel(tpu, for_tpu)(*args)

    def on_gpu(*args):
        from cage_jax.pallas import gpu

        return kernel(gpu, for_gpu)(*args)

    return Kernels(
        tpu=on_tpu if for_tpu else None,
        cuda=on_gpu if for_gpu else None,
        by_name=frozenset({"cuda"}),
    )
