"""The kernels that suit an array and its quantizer; `dispatch` chooses among them.

The modules that launch kernels are imported only when a program is compiled for their
platform, because importing them takes longer than the rest of this package.
"""

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cage_jax.arrays.adamw import AdamW, Dtypes, StepNumbers
from cage_jax.arrays.dispatch import (
    Platform,
    Variant,
    Variants,
    by_default,
    no_kernel,
    on_request,
)
from cage_jax.arrays.factors import Factors
from cage_jax.arrays.tile_order import LANES, SMALLEST
from cage_jax.pallas.choices import Choice, Untuned
from cage_jax.pallas.tiling import (
    NoKernelError,
    Tiling,
    product_tiling,
    require,
    tiling_for_gpu,
    tiling_for_tpu,
)
from cage_jax.quantizers.formats import Integer, MidRise
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer

_MODULES = {"tpu": "cage_jax.pallas.tpu", "cuda": "cage_jax.pallas.gpu"}


def fake_quant_kernels(
    quantizer: Quantizer,
    x: jax.Array | jax.ShapeDtypeStruct,
    grid: Grid | None,
    noise: jax.Array | None,
    *,
    masked: bool,
) -> Variants:
    """Returns the kernels that quantize and dequantize an array.

    They map `(x, grid, noise)` to the values, and with `masked` also to a mask, int8.
    """
    if grid is not None or noise is not None:
        return no_kernel("kernels do not take a grid, such as a learned one, or noise")
    dtype = x.dtype

    def kernel(module, tiling):
        return lambda x, grid, noise: module.fake_quant(x, tiling=tiling, masked=masked)

    def arguments(shape):
        return _normal(0, shape, dtype), None, None

    name = "fake_quant with a mask" if masked else "fake_quant"
    return _kernels(_Operation(name, kernel, arguments), quantizer, x.shape, dtype)


def masked_gradient_kernels(quantizer: Quantizer, cotangent: jax.Array) -> Variants:
    """Returns the kernels that map `(mask, cotangent)` to the gradient.

    The mask is that of `fake_quant`.
    """
    dtype = cotangent.dtype

    def kernel(module, tiling):
        return partial(module.masked_gradient, tiling=tiling)

    def arguments(shape):
        mask = _normal(1, shape, dtype) < 2
        return mask.astype(jnp.int8), _normal(0, shape, dtype)

    operation = _Operation("masked_gradient", kernel, arguments)
    return _kernels(operation, quantizer, cotangent.shape, dtype)


def adamw_kernels(
    quantizer: Quantizer,
    shape: tuple[int, ...],
    dtype,
    moment_dtype,
    adamw: AdamW,
    *,
    at_updated: bool,
    measured: bool = False,
    weighted: bool = False,
) -> Variants:
    """Returns the kernels for a step of AdamW, with the signature in `pallas.tpu`."""
    if moment_dtype not in (jnp.float32, jnp.bfloat16):
        return no_kernel(f"the dtype of its first moment is {moment_dtype}")

    def for_tpu(*array):
        # The step streams seven arrays instead of two or three, so its blocks are
        # smaller.
        tiling = tiling_for_tpu(
            *array, block_bytes=2**18, floats_per_element=2 if at_updated else 1
        )
        matrix = {*tiling.order[-2:]} == {*range(len(tiling.merged))[-2:]}
        require(matrix or not weighted, "its weights are not vectors as it is stored")
        why = f"a group of {tiling.length} does not fit on the chip"
        require(tiling.kept or not at_updated, why)
        divided = quantizer.scale_type.has_tensor_divisor
        require(not divided, "it would have to read the whole tensor first")
        if measured:
            whole_numbers = isinstance(quantizer.format, Integer | MidRise)
            require(whole_numbers, f"statistics need integers, not {quantizer.format}")
        return tiling

    def for_gpu(*array):
        require(not measured, "it computes no statistics")
        tiling = tiling_for_gpu(*array)
        twice = at_updated and tiling.group_is_axis
        require(not twice, "it would read all four arrays twice")
        return tiling

    def kernel(module, tiling):
        return partial(
            module.adamw_step, tiling=tiling, adamw=adamw, at_updated=at_updated
        )

    def arguments(shape):
        numbers = StepNumbers(*map(jnp.float32, (1e-3, -0.5, 0.5, 0.5)))
        first = _normal(1, shape, moment_dtype)
        return (
            _normal(0, shape, dtype),
            first,
            jnp.square(_normal(2, shape, dtype)),
            _normal(3, shape, dtype),
            numbers.rounded(Dtypes(dtype, first.dtype)),
            jnp.zeros(shape, jnp.int8) if measured else None,
            _weights(quantizer, shape) if weighted else None,
        )

    options = {"at_updated": at_updated, "measured": measured, "weighted": weighted}
    words = ["adamw_step", *(name for name, is_so in options.items() if is_so)]
    if moment_dtype != dtype:
        words.append(f"moment in {jnp.dtype(moment_dtype)}")
    replaced = (1, 2, 3, 5) if measured else (1, 2, 3)
    operation = _Operation(", ".join(words), kernel, arguments, replaced)
    on_tpu: Untuned = "kernel"
    plain = quantizer.hadamard is None and not (at_updated or measured)
    plain = plain and dtype == jnp.float32
    if plain and _takes_one_extra_read(quantizer, shape):
        # The compiler's step moves 8 copies of the array and the kernel's 7, which
        # gains less than the factor of 1.15 that `by_default` asks for.
        on_tpu = "xla"
    return _kernels(operation, quantizer, shape, dtype, for_tpu, for_gpu, on_tpu)


def _weights(quantizer, shape):
    """Returns weights of the error, one for each input and each output of a matrix."""
    blocks = quantizer.blocks(shape)
    outputs = [axis for axis in blocks.tensor_axes if axis not in blocks.axes]

    def factor(number, others):
        lengths = (1 if axis in others else n for axis, n in enumerate(shape))
        return 1 + jnp.abs(_normal(number, tuple(lengths), jnp.float32))

    return Factors(factor(4, outputs), factor(5, blocks.axes), largest=3.0)


def _normal(number, shape, dtype):
    return jax.random.normal(jax.random.key(number), shape, dtype)


def _takes_one_extra_read(quantizer, shape):
    """Tells whether the TPU compiler finds grids by reading an array once more."""
    return all(
        size == shape[axis]
        or (axis == len(shape) - 1 and size % LANES == 0 and not quantizer.asymmetric)
        for axis, size in quantizer.blocks(shape).by_axis.items()
    )


def product_kernels(
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
    if reason := _too_small(shape):
        return no_kernel(reason)
    try:
        tiling = product_tiling(quantizer, shape, tokens, scaled=scaled)
    except NoKernelError as error:
        return no_kernel(str(error))

    def on_tpu(inputs, weights):
        from cage_jax.pallas import tpu_matmul

        rows = inputs.reshape(tokens, -1)
        found = tpu_matmul.product(rows, weights, tiling=tiling, dtype=dtype)
        return found.reshape(*inputs_shape[:-1], -1)

    # With one scale per channel, the compiler moves as little as the kernel. The form
    # that scales sums was not evaluated for several blocks of tokens. 2-bit codes crash
    # the compiler for v4.
    is_faster = tiling.group < shape[0] and (scaled or tokens <= tiling.tokens)
    is_faster = is_faster and quantizer.format.code_dtype != jnp.int2
    return Variants((Variant("tpu", on_tpu, by_default if is_faster else on_request),))


class _Operation(NamedTuple):
    """What a kernel computes.

    Attributes:
      name: of the operation and its options.
      kernel: maps a module of kernels and a tiling to the kernel.
      arguments, replaced: as in `Choice`.
    """

    name: str
    kernel: Callable[..., Callable]
    arguments: Callable[[tuple[int, ...]], tuple]
    replaced: tuple[int, ...] = ()


def _kernels(
    operation: _Operation,
    quantizer: Quantizer,
    shape: tuple[int, ...],
    dtype,
    for_tpu: Callable[..., Tiling] = tiling_for_tpu,
    for_gpu: Callable[..., Tiling] = tiling_for_gpu,
    on_tpu: Untuned = "kernel",
) -> Variants:
    """Returns the kernel of an operation for each platform that has a tiling."""
    if reason := _too_small(shape):
        return no_kernel(reason)
    # XLA writes a rotated array to memory and reads it again, several times, so that it
    # moves at least twice as much as the kernel; without a rotation it never does.
    on_gpu: Untuned = "xla" if quantizer.hadamard is None else "compare"
    found: list[Variant] = []
    missing: list[tuple[Platform, str]] = []
    platforms: tuple[tuple[Platform, Callable[..., Tiling], Untuned], ...] = (
        ("tpu", for_tpu, on_tpu),
        ("cuda", for_gpu, on_gpu),
    )
    for platform, tiling_of, untuned in platforms:
        kernel = partial(
            _kernel, platform, operation.kernel, tiling_of, quantizer, jnp.dtype(dtype)
        )
        try:
            function = kernel(shape)
        except NoKernelError as reason:
            missing.append((platform, str(reason)))
        else:
            array = quantizer, shape, jnp.dtype(dtype).name
            about = operation.arguments, operation.replaced, untuned
            when = Choice(operation.name, *array, kernel, *about)
            # mypy does not see that this tuple can be called.
            found.append(Variant(platform, function, when))  # type: ignore[arg-type]
    return Variants(tuple(found), tuple(missing))


def _kernel(platform, kernel, tiling_of, quantizer, dtype, shape):
    """Returns the kernel for arrays of a shape, or raises `NoKernelError`."""
    return partial(_launch, platform, kernel, tiling_of(quantizer, shape, dtype))


def _launch(platform, kernel, tiling, *args):
    module = importlib.import_module(_MODULES[platform])
    return kernel(module, tiling)(*args)


def _too_small(shape):
    """Returns why no kernel is worth it for an array of this size, or ""."""
    if not all(isinstance(length, int) for length in shape):
        return "its shape is not known yet"  # symbolic, while a program is exported
    size = math.prod(shape)
    return f"{size} elements are fewer than {SMALLEST}" if size < SMALLEST else ""
