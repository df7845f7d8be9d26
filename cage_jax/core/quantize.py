"""Quantizing arrays, and trees of them by path, with straight-through gradients."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any, TypedDict, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.checks import check_byte_order, warn
from cage_jax.arrays.dispatch import Implementation, check_implementation
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import (
    flatten_with_paths,
    is_nnx_module,
    key_at,
    path_in_errors,
)
from cage_jax.core.grids import check_grid, grid_at, missing_grid
from cage_jax.core.quantized_array import QuantizedArray, decoded, encoded
from cage_jax.core.rules import Rules, nothing_quantized
from cage_jax.core.straight_through import straight_through
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer, check_has_codes
from cage_jax.quantizers.rounding import fit_grid

_ALLOWED_FLOATS = "float32, bfloat16, float16 or float64"

Array = jax.Array | np.ndarray
Tree = TypeVar("Tree")


class TreeOptions(TypedDict, total=False):
    """The options of `fake_quant` for a tree."""

    grid: Mapping[str, Grid] | None
    key: jax.Array | None
    implementation: Implementation | None


@overload
def fake_quant(
    x: Array,
    quantizer: Quantizer,
    *,
    grid: Grid | None = None,
    key: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array: ...
@overload
def fake_quant(
    x: Tree,
    quantizer: Rules,
    *,
    grid: Mapping[str, Grid] | None = None,
    key: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> Tree: ...
@names_checked
def fake_quant(x, quantizer, *, grid=None, key=None, implementation=None):
    """Quantizes and dequantizes `x`, with a straight-through gradient.

    The result is computed in float32 (float64 for float64) and keeps the dtype of `x`.
    The gradient goes to `x` as the quantizer's `gradient` says (identity, clip, trust;
    in the rotated basis if there is a rotation): the gradient of
    `loss(fake_quant(params, rules))` is exactly the gradient of the loss at the
    quantized parameters, under that mask. A learned scale (LSQ) also receives a
    gradient, other scales do not. Reverse mode works any number of times; forward mode
    (`jax.jvp`) is not defined.

    An all-zero group gives zeros (tiny numbers if the grid has no zero). A NaN or an
    infinity makes its whole group NaN, and so does a rotation in which a sum exceeds
    the largest float. A level above the largest number of the dtype becomes that one.

    Args:
      x: an array of real floats, or a tree of parameters.
      quantizer: a `Quantizer` for an array, `Rules` for a tree: each parameter that a
        rule names is quantized, the others are left as they are.
      grid: the grid to use instead of the one that the scale rule finds in `x`: a
        `Grid` for an array, a dict from path to `Grid` for a tree (such as the `grids`
        in the state of `coupled(..., freeze_scale=True)`). Where its scale is 0 the
        grid is found in `x`. A learned grid must be given, here or in `x` by
        `with_grids`; where its scale is not positive the group becomes NaN.
      key: a `jax.random` key, needed for stochastic rounding only; in a tree each
        parameter draws its own numbers from it.
      implementation: None uses a kernel if the program is compiled for a platform that
        has a faster one (see `tune`), and runs on one device, inside of a `shard_map`,
        or on shards of whole groups that are explicit or that `Rules.placed` was told.
        "xla" never uses one. "pallas" uses it or raises if it cannot run. Kernels agree
        with XLA to the bit, except that they may sum (rotations, means) in another
        order, so that a value at a tie may go the other way.

    Returns:
      An array, or a tree, like `x`.

    Raises:
      TypeError: for integers, complex numbers, and a quantizer of the wrong kind.
      ValueError: for an axis out of range, a group or a Hadamard block that does not
        divide, and a grid of the wrong shape or with impossible values; for
        `implementation` "pallas" if no kernel can run. In a tree the message begins
        with the parameter's path; two leaves of one path are an error too.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.5], [-3.5], [1.3]])
      >>> cage.fake_quant(x, cage.int4()).ravel().tolist()
      [0.5, -3.5, 1.5]
      >>> jax.grad(lambda x: (3 * cage.fake_quant(x, cage.int4())).sum())(x).ravel()
      Array([3., 3., 3.], dtype=float32)

    Source: Bengio et al., arXiv 1308.3432 (straight through); QuEST, arXiv 2502.05003.
    """
    if is_nnx_module(x):
        raise TypeError(
            f"`x` must be an array or a tree of parameters; got the NNX module "
            f"{type(x).__name__}, whose other state would no longer be updated. Use "
            f"cage_jax.flax.fake_quant(model, rules)."
        )
    if implementation is not None:
        check_implementation(implementation)
    placements = quantizer.placements if isinstance(quantizer, Rules) else {}
    apply = functools.partial(
        _fake_quant_array, implementation=implementation, placements=placements
    )
    return _apply(apply, x, quantizer, grid, key)


@overload
def quantize(
    x: Array,
    quantizer: Quantizer,
    *,
    grid: Grid | None = None,
    key: jax.Array | None = None,
) -> QuantizedArray: ...
@overload
def quantize(
    x: Any,
    quantizer: Rules,
    *,
    grid: Mapping[str, Grid] | None = None,
    key: jax.Array | None = None,
) -> Any: ...
@names_checked
def quantize(x, quantizer, *, grid=None, key=None):
    """Quantizes `x` to codes and scales.

    `dequantize(quantize(x, quantizer))` equals `fake_quant(x, quantizer)` to the bit,
    with the same `grid` for both. Codes have no gradient, and differentiating through
    their scales is an error: `fake_quant` has the straight-through gradient.

    Args:
      x: an array of real floats, or a tree of parameters.
      quantizer: a `Quantizer` for an array, `Rules` for a tree.
      grid: as in `fake_quant`.
      key: as in `fake_quant`.

    Returns:
      A `QuantizedArray`, or a tree like `x` with one in place of each parameter that a
      rule names.

    Raises:
      TypeError, ValueError: as in `fake_quant`.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> quantized = cage.quantize(jnp.array([[0.5], [-3.5], [1.3]]), cage.int4())
      >>> quantized.codes.ravel().tolist(), quantized.scale.ravel().tolist()
      ([1, -7, 3], [0.5])
    """
    if is_nnx_module(x):
        raise TypeError(
            f"`x` must be an array or a tree of parameters; got the NNX module "
            f"{type(x).__name__}, which cannot hold codes and has other state. Use "
            f"quantize(nnx.state(model, nnx.Param), rules)."
        )
    return _apply(_quantize_array, x, quantizer, grid, key)


@overload
def dequantize(
    x: QuantizedArray, quantizer: Quantizer | Rules | None = None
) -> jax.Array: ...
@overload
def dequantize(x: Any, quantizer: Quantizer | Rules | None = None) -> Any: ...
@names_checked
def dequantize(x, quantizer=None):
    """Returns the values that codes stand for.

    Args:
      x: a `QuantizedArray`, or a tree with some of them among its leaves.
      quantizer: the `Quantizer` or `Rules` that made `x`, only to check that they did;
        or None, since codes know their quantizer.

    Returns:
      An array in the dtype of the original, or a tree like `x`.

    Raises:
      TypeError: for an array that is not quantized.
      ValueError: for codes that another quantizer made.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> quantized = cage.quantize(jnp.array([[0.5], [-3.5], [1.3]]), cage.int4())
      >>> cage.dequantize(quantized).ravel().tolist()
      [0.5, -3.5, 1.5]
    """
    paths, leaves, structure = flatten_with_paths(x, QuantizedArray)
    if not any(isinstance(leaf, QuantizedArray) for leaf in leaves):
        raise TypeError(
            f"`x` must be a QuantizedArray, or a tree with some; got "
            f"{type(x).__name__} without any. Use `quantize` first, or `fake_quant` "
            f"to do both."
        )
    values = []
    for path, leaf in zip(paths, leaves):
        if isinstance(leaf, QuantizedArray):
            with path_in_errors(path):
                _check_maker(leaf, quantizer, path)
            leaf = decoded(leaf)
        values.append(leaf)
    return structure.unflatten(values)


@overload
def quantization_error(
    x: Array, quantizer: Quantizer, *, grid: Grid | None = None
) -> jax.Array: ...
@overload
def quantization_error(
    x: Tree, quantizer: Rules, *, grid: Mapping[str, Grid] | None = None
) -> Tree: ...
@names_checked
def quantization_error(x, quantizer, *, grid=None):
    """Computes `x - fake_quant(x)`, the error that CAGE pulls on.

    The error is a constant for differentiation. Rounding is to the nearest value, even
    if the quantizer rounds stochastically.

    Args:
      x: an array of real floats, or a tree of parameters.
      quantizer: a `Quantizer` for an array, `Rules` for a tree.
      grid: as in `fake_quant`.

    Returns:
      An array like `x`, or a tree with zeros for the parameters that are left alone.

    Raises:
      TypeError, ValueError: as in `fake_quant`.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.5], [-3.5], [1.3]])
      >>> error = cage.quantization_error(x, cage.int4())
      >>> error.ravel().tolist()
      [0.0, 0.0, -0.20000004768371582]
    """
    if isinstance(quantizer, Rules):
        zeros = functools.partial(jax.tree.map, jnp.zeros_like)
        return _apply_to_tree(_error_array, x, quantizer, grid, elsewhere=zeros)
    return _apply(_error_array, x, quantizer, grid)


def _apply(function, x, quantizer, grid, key=None):
    """Calls `function(x, quantizer, grid, key)` on an array, or on leaves of a tree."""
    if isinstance(quantizer, Rules):
        return _apply_to_tree(function, x, quantizer, grid, key)
    _check_array(x, quantizer)
    if key is not None and quantizer.rounding != "stochastic":
        raise _unused_key(quantizer)
    return function(x, quantizer.at(np.shape(x)), grid, key)


def _apply_to_tree(function, tree, rules, grid, key=None, elsewhere=lambda x: x):
    """Calls `function(leaf, quantizer, grid, key, path)` on quantized parameters.

    The other leaves are those of the tree `elsewhere(tree)`.
    """
    _check_no_codes(tree, rules)
    quantizers = [quantizer for quantizer, _ in rules.quantized(tree).values()]
    if rules.misses(tree):
        warn(nothing_quantized(rules, tree))
    if key is not None and not any(q.rounding == "stochastic" for q in quantizers):
        raise _unused_key(rules)

    def apply(path, quantizer, leaf, _):
        own = None
        if key is not None and quantizer.rounding == "stochastic":
            own = key_at(key, path)
        return function(leaf, quantizer, grid_at(path, tree, grid), own, path)

    return rules.map(apply, tree, elsewhere(tree))


def _check_array(x, quantizer):
    """Raises unless `x` is one array and `quantizer` one quantizer."""
    if not isinstance(quantizer, Quantizer):
        name = getattr(quantizer, "__name__", "int4")
        called = f" Call the preset: {name}(...)." if callable(quantizer) else ""
        if isinstance(x, (Quantizer, Rules)):
            called = " The parameters come first."
        raise TypeError(
            f"`quantizer` must be a Quantizer, or Rules for a tree; got "
            f"{short(quantizer)}.{called} Use a preset such as int4(), or "
            f"Rules([(pattern, int4())])."
        )
    if isinstance(x, Mapping) or any(
        hasattr(leaf, "shape") and leaf is not x for leaf in jax.tree.leaves(x)
    ):
        raise TypeError(
            f"`x` must be an array where `quantizer` is a Quantizer; got a tree "
            f"({type(x).__name__}). Use Rules([('.*', quantizer)]) for a tree."
        )


def _check_no_codes(tree, rules):
    paths, leaves, _ = flatten_with_paths(tree, QuantizedArray)
    for path, leaf in zip(paths, leaves):
        if isinstance(leaf, QuantizedArray) and rules.match(path):
            raise TypeError(
                f"`{path}`: a parameter must not be quantized already; got {leaf!r}. "
                f"Use dequantize, or low_bit for a model on its codes."
            )


def _unused_key(quantizer):
    return ValueError(
        f"`key` has no meaning without stochastic rounding; got one with {quantizer}. "
        f"Leave it out, or use dataclasses.replace(quantizer, rounding='stochastic')."
    )


@functools.cache
def gaussian_error(quantizer: Quantizer) -> float:
    """Computes a quantizer's mean squared error on standard normal numbers.

    Args:
      quantizer: any quantizer; a learned grid is taken as it starts, and rounding is to
        the nearest.

    Returns:
      The mean over an array of about (4096, 64) from a fixed seed, with scales along
      the first axis.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax.core.quantize import gaussian_error
      >>> round(gaussian_error(cage.quest(4)), 3)
      0.012
    """
    sizes = [size for size in quantizer.group_sizes if size is not None]
    whole = len(sizes) < len(quantizer.group_sizes)
    size = None if whole or quantizer.axis is None else math.prod(sizes)
    if quantizer.axis is not None:
        quantizer = dataclasses.replace(quantizer, axis=-2, group_size=size)
    block = math.lcm(quantizer.hadamard or 1, size or 1)
    shape = block * max(4096 // block, 1), 64
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    grid = fit_grid(x, quantizer) if quantizer.scale.needs_grid else None
    error = quantization_error(x, quantizer, grid=grid)
    return float(np.mean(np.square(np.asarray(error, np.float64))))


def _fake_quant_array(x, quantizer, grid, key, path="", *, implementation, placements):
    x = _checked(x, quantizer, grid, key)
    noise, placement = _noise(x, quantizer, key), placements.get(path)
    return straight_through(quantizer, x, grid, noise, implementation, path, placement)


def _quantize_array(x, quantizer, grid, key, path=""):
    del path  # errors are raised at once, and the caller adds the path
    check_has_codes(quantizer, "quantize")
    x = _checked(x, quantizer, grid, key)
    return encoded(x, quantizer, grid, _noise(x, quantizer, key))


def _noise(x, quantizer, key):
    """Returns uniform numbers for stochastic rounding, or None."""
    if key is None:
        return None
    return jax.random.uniform(key, x.shape, compute_dtype(x.dtype))


def _check_maker(quantized, quantizer, path):
    maker = quantizer.match(path) if isinstance(quantizer, Rules) else quantizer
    if maker is not None:
        maker = maker.at(quantized.shape)
    if quantizer is not None and maker != quantized.quantizer:
        raise ValueError(
            f"`quantizer` must be the one that made the codes, {quantized.quantizer}; "
            f"got {maker}. Leave it out: codes know their quantizer."
        )


def _error_array(x, quantizer, grid, key=None, path=""):
    del path
    x = lax.stop_gradient(_checked(x, quantizer, grid, key, rounds=False))
    grid = lax.stop_gradient(grid)
    # On a TPU a kernel and the difference move 5 copies of the array. Without a kernel
    # they move 3, fewer when fused into a consumer, but 7 and more with a rotation.
    implementation = "xla" if quantizer.hadamard is None else None
    return x - straight_through(quantizer, x, grid, None, implementation)


def _checked(x, quantizer, grid, key, rounds=True):
    check_byte_order("`x`", x)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`x` must be an array of real floats; got dtype {x.dtype}. Convert it to "
            f"{_ALLOWED_FLOATS}, or leave it unquantized."
        )
    blocks = quantizer.blocks(x.shape)
    if grid is not None:
        check_grid(grid, quantizer, blocks)
    elif quantizer.scale.needs_grid:
        raise missing_grid(quantizer)
    if rounds and key is None and quantizer.rounding == "stochastic":
        raise ValueError(
            f"`key` must be given for stochastic rounding; got None, quantizer "
            f"{quantizer}. Use a new key of jax.random at each step."
        )
    return x
