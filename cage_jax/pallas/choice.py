"""The kernels that exist for an array and its quantizer.

The modules that launch kernels are imported only when a program is compiled for their
platform, because importing them takes longer than the rest of this package. The GPU
kernels have not been timed on a GPU yet, so they run only if "pallas" is asked for.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from cage_jax.arrays.adamw import AdamW
from cage_jax.arrays.dispatch import Variant, Variants, if_asked, on_one_device
from cage_jax.arrays.tile_order import LANES
from cage_jax.pallas.tiles import (
    Tiles,
    product_tiles_of,
    tiles_for_gpu,
    tiles_of,
)
from cage_jax.quantizers.formats import Integer, MidRise
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer


def fake_quant(
    quantizer: Quantizer,
    x: jax.Array,
    grid: Grid | None,
    noise: jax.Array | None,
    *,
    masked: bool,
) -> Variants:
    """Returns the kernels that quantize and dequantize an array.

    They map `(x, grid, noise)` to the values, and with `masked` also to a mask, int8.
    """
    if grid is not None or noise is not None:
        return Variants()

    def kernel(module, tiles):
        return lambda x, grid, noise: module.fake_quant(x, tiles=tiles, masked=masked)

    tiles = tiles_of(quantizer, x.shape, x.dtype)
    return _kernels(kernel, tiles, tiles_for_gpu(quantizer, x.shape, x.dtype))


def masked_gradient(quantizer: Quantizer, cotangent: jax.Array) -> Variants:
    """Returns the kernels that map `(mask, cotangent)` to the gradient.

    The mask is that of `fake_quant`.
    """

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
) -> Variants:
    """Returns the kernels for a step of AdamW, with the signature in `pallas.tpu`."""
    if first_dtype not in (jnp.float32, jnp.bfloat16):
        return Variants()
    # The step streams seven arrays instead of two or three, so its blocks are smaller.
    kept = 2 if at_updated else 1
    for_tpu = tiles_of(quantizer, shape, dtype, block_bytes=2**18, kept=kept)
    for_gpu = tiles_for_gpu(quantizer, shape, dtype)
    if quantizer.scale_type.has_tensor_divisor:
        for_tpu = None  # the kernel would have to read the whole tensor first
    if measured:
        for_gpu = None
        whole_numbers = isinstance(quantizer.format, Integer | MidRise)
        if not (whole_numbers and for_tpu and for_tpu.exact):
            for_tpu = None  # the sums would include elements beyond the array
    if at_updated and for_gpu and for_gpu.whole:
        for_gpu = None  # the kernel would read all four arrays twice

    def kernel(module, tiles):
        return partial(
            module.adamw_step, tiles=tiles, adamw=adamw, at_updated=at_updated
        )

    found = _kernels(kernel, for_tpu, for_gpu)
    plain = quantizer.hadamard is None and not (at_updated or measured)
    if plain and all(
        _one_more(n, axis, shape) for axis, n in quantizer.blocks(shape).by_axis.items()
    ):
        # The compiler's step moves 8 copies of the array and the kernel's 7, which
        # gains less than the factor of 1.15 that `on_one_device` asks for.
        found = Variants(tuple(each._replace(when=if_asked) for each in found.found))
    return found


def _one_more(size, axis, shape):
    """Tells whether the TPU compiler finds groups by reading an array once more."""
    return size == shape[axis] or (axis == len(shape) - 1 and size % LANES == 0)


def product(
    quantizer: Quantizer,
    shape: tuple[int, ...],
    inputs_shape: tuple[int, ...],
    dtype,
    *,
    scaled: bool,
) -> Variants:
    """Returns the kernels that multiply `inputs` by a `QuantizedArray` of weights.

    Args:
      quantizer: quantizer of the weights (in, out).
      shape: shape of the weights.
      inputs_shape: shape of the inputs, (..., in).
      dtype: dtype of the product.
      scaled: whether weights are scaled and rounded before they are multiplied.
    """
    tokens = math.prod(inputs_shape[:-1])
    tiles = product_tiles_of(quantizer, shape, tokens, scaled=scaled)
    if tiles is None:
        return Variants()

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

    # With one scale per channel, the compiler moves as little as the kernel. The form
    # that scales sums was not evaluated for several blocks of tokens. 2-bit codes crash
    # the compiler for v4.
    taken = tiles.group < shape[0] and (scaled or tokens <= tiles.tokens)
    taken = taken and quantizer.format.code_dtype != jnp.int2
    return Variants((Variant("tpu", on_tpu, on_one_device if taken else if_asked),))


def _kernels(
    kernel: Callable[..., Callable], for_tpu: Tiles | None, for_gpu: Tiles | None
) -> Variants:
    """Returns `kernel(module, tiles)` for each platform that has tiles."""

    def tpu_kernel(*args):
        from cage_jax.pallas import tpu

        return kernel(tpu, for_tpu)(*args)

    def gpu_kernel(*args):
        from cage_jax.pallas import gpu

        return kernel(gpu, for_gpu)(*args)

    found = []
    if for_tpu is not None:
        found.append(Variant("tpu", tpu_kernel, on_one_device))
    if for_gpu is not None:
        found.append(Variant("cuda", gpu_kernel, if_asked))
    return Variants(tuple(found))
