"""The input of a product, quantized as a matrix of (tokens, features).

The features are summed over with the weight; the tokens are all other axes. The axis of
an input quantizer selects the values that share a scale: `axis=-1` the features (a
scale per token), `axis=0` the tokens (a scale per feature), `axis=None` everything.
"contracted", the default of most presets, stands for -1.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.core.quantize import fake_quant
from cage_jax.quantizers.axes import CONTRACTED
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.rounding import fit_grid


def quantize_input(
    x: jax.Array, features: tuple[int, ...], quantizer: Quantizer, grid: Grid | None
) -> jax.Array:
    """Applies `fake_quant` to the input of a product.

    Args:
      x: the input.
      features: the axes of `x` that are summed over, ascending.
      quantizer: its quantizer, along the axes of the matrix of (tokens, features).
      grid: the result of `fit_input_grid`, or None.

    Returns:
      An array like `x`.
    """
    check_calibrated(quantizer, grid)
    x, quantizer, grid, back = arranged(x, features, quantizer, grid)
    return back(fake_quant(x, quantizer, grid=grid))


def check_calibrated(quantizer: Quantizer, grid: Grid | None) -> None:
    """Raises if an input has no grid, and its quantizer needs one."""
    if quantizer.scale.needs_grid and grid is None:
        raise ValueError(
            f"`inputs` of this weight must be calibrated first; got no grid for "
            f"{quantizer}. Use variables = calibrate(model, rules, [(x,), ...])."
        )


def fit_input_grid(
    x: jax.Array, features: tuple[int, ...], quantizer: Quantizer
) -> Grid:
    """Finds the grid of an input by the scale rule, without the axes of tokens.

    The scale is 0 for groups of zeros only, which give no information.
    """
    if quantizer.axis in (-1, CONTRACTED):
        raise ValueError(
            f"`inputs` must not have a calibrated or learned scale per token, since "
            f"tokens differ; got {quantizer}. Use axis=None or axis=0."
        )
    if quantizer.scale_type.has_tensor_divisor and quantizer.axis is not None:
        raise ValueError(
            f"`inputs` must not have a calibrated or learned scale per feature and one "
            f"more for all; got {quantizer}. Use Float8(tensor_divisor=False), or "
            f"axis=None."
        )
    keep = () if quantizer.axis is None else tuple(x.shape[a] for a in features)
    x, quantizer, _, _ = arranged(x, features, quantizer, None)
    grid, blocks = fit_grid(x, quantizer), quantizer.blocks(x.shape)
    any_of_group = functools.partial(jnp.any, keepdims=True)
    empty = ~blocks.reduce(any_of_group, x != 0, ignores_zeros=True)
    grid = grid._replace(scale=jnp.where(empty, 0, grid.scale))
    return jax.tree.map(lambda g: g.reshape(keep), grid)


def arranged(
    x: jax.Array, features: tuple[int, ...], quantizer: Quantizer, grid: Grid | None
) -> tuple[jax.Array, Quantizer, Grid | None, Callable]:
    """Arranges an input for a quantizer of (tokens, features).

    Returns:
      The input, the quantizer along its axes, the grid in its shape, and the function
      that undoes the arrangement.
    """
    if quantizer.rounding != "nearest":
        raise ValueError(
            f"`inputs` must be rounded to the nearest; got {quantizer}. Round the "
            f"weights stochastically instead, with a key."
        )

    def along(axes):
        axis = axes[0] if len(axes) == 1 else tuple(axes)
        return dataclasses.replace(quantizer, axis=axis)

    def back(y):
        return y

    tokens = tuple(axis for axis in range(x.ndim) if axis not in features)
    blocks = quantizer.group_size is not None or quantizer.hadamard is not None
    quantizer = of_features(quantizer)
    match quantizer.axis:
        case None:
            quantizer = along(range(x.ndim))
        case 0 if tokens and not blocks:
            quantizer = along(tokens)
        case -1 if len(features) == 1 or not blocks:
            quantizer = along(features)
        case -1:
            quantizer = along([-1])
            moved = jnp.transpose(x, order := tokens + features)
            x = moved.reshape(*moved.shape[: len(tokens)], -1)

            def back(y):
                return y.reshape(moved.shape).transpose(np.argsort(order).tolist())

        case _:
            raise ValueError(
                f"`inputs` must be quantized along axis -1 (a scale per token), 0 "
                f"without groups (a scale per feature) or None (one for all); got "
                f"{quantizer}, an input of shape {x.shape}. Use int8(axis=-1)."
            )
    if grid is not None:
        shape = quantizer.blocks(x.shape).scale_shape
        grid = jax.tree.map(lambda g: g.reshape(shape), grid)
    return x, quantizer, grid, back


def of_features(quantizer: Quantizer) -> Quantizer:
    """Returns the quantizer of a matrix of (tokens, features), its axis a number."""
    if quantizer.axis != CONTRACTED:
        return quantizer
    return dataclasses.replace(quantizer, axis=-1)
