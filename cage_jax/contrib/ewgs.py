"""EWGS: gradients scaled per weight by the distance to the rounded value."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cage_jax.arrays.checks import check_number
from cage_jax.arrays.exact import clamp, compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import key_at, path_in_errors
from cage_jax.contrib.scaled_gradients import with_scaled_gradient
from cage_jax.core.grids import grid_at
from cage_jax.core.quantize import fake_quant
from cage_jax.core.rules import Rules, check_rules
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import check_has_codes
from cage_jax.quantizers.rounding import rounding


@names_checked
def ewgs(
    params: Any,
    rules: Rules,
    delta: float | jax.Array | Mapping[str, Any],
    *,
    grid: Mapping[str, Grid] | None = None,
) -> Any:
    """Computes `fake_quant`, its gradient scaled by `1 + delta * sign(g) * (x - x_q)`.

    It replaces `fake_quant` in the loss and returns the same values. Here `g` is the
    gradient at the quantized weights, `x` the weights mapped so that their grid is
    [0, 1] and clipped to it, and `x_q` the quantized `x`. The quantizer's `gradient`
    (identity, clip, trust) still masks the gradient. With a rotation, all of this is
    in the rotated basis. With `delta` 0 the result is bit-identical to `fake_quant`.
    A learned grid gets the same gradient as in `fake_quant`.

    Args:
      params: a tree of parameters.
      rules: which parameters are quantized, and how.
      delta: one number for all parameters, or a dict by path from `ewgs_delta`.
      grid: as in `fake_quant`.

    Returns:
      A tree like `params`.

    Raises:
      TypeError, ValueError: as `fake_quant`; also if `delta` is negative or lacks a
        path.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> x = {"kernel": jnp.array([[0.5], [-3.5], [1.25]])}
      >>> loss = lambda x: jnp.sum(contrib.ewgs(x, rules, 0.5)["kernel"])
      >>> jax.grad(loss)(x)["kernel"].ravel().round(4)
      Array([1.    , 1.    , 1.0179], dtype=float32)

    Source: EWGS, arXiv 2104.00903.
    """
    check_rules(rules)
    if not isinstance(delta, Mapping):
        remedy = "Use ewgs_delta(loss, params, rules, key)."
        check_number("delta", delta, remedy, least=0, or_array=True)

    def apply(path, quantizer, x):
        check_has_codes(quantizer, "ewgs")
        leaf_delta = delta
        if isinstance(delta, Mapping):
            if path not in delta:
                raise ValueError(
                    f"`delta` must have an entry for each quantized parameter; got the "
                    f"paths {list(delta)}. Use ewgs_delta, or one number for all."
                )
            leaf_delta = delta[path]
        found = grid_at(path, params, grid)
        wide = compute_dtype(x.dtype)
        number = jnp.asarray(leaf_delta).astype(wide)
        scaled = with_scaled_gradient(_added, quantizer, x, found, number)
        return fake_quant(scaled, quantizer, grid=found)

    return rules.map(apply, params)


def _added(rounded, gradient, delta):
    format = rounded.quantizer.format
    position = clamp(rounded.position(), format.low, format.high)
    distance = (position - rounded.code_values()) / (format.high - format.low)
    return delta * jnp.abs(gradient) * distance


@names_checked
def ewgs_delta(
    loss: Callable[[Any], jax.Array],
    params: Any,
    rules: Rules,
    key: jax.Array,
    *,
    grid: Mapping[str, Grid] | None = None,
) -> dict[str, jax.Array]:
    """Computes the paper's `delta` of each quantized parameter.

    delta = max(0, mean of the Hessian's diagonal) / (3 * deviation of the gradient)

    Both are taken at the quantized parameters, with each parameter mapped so that its
    grid is [0, 1]. The mean is Hutchinson's estimate with one vector of random signs
    for all parameters; it takes one Hessian-vector product, in reverse mode twice.
    Average the result over batches and keys, and compute it again from time to time.

    Args:
      loss: a function from the quantized parameters, a tree like `params`, to a
        scalar. It must not quantize them itself.
      params: a tree of parameters, all of real floats.
      rules: which parameters are quantized, and how.
      key: a `jax.random` key.
      grid: as in `fake_quant`.

    Returns:
      A dict from path to a scalar, float32 or wider; 0 where the gradient is 0.

    Raises:
      TypeError, ValueError: as `fake_quant`.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> x = {"kernel": jnp.array([[0.5], [-3.5], [1.25]])}
      >>> loss = lambda x: jnp.sum(x["kernel"] ** 2)
      >>> delta = contrib.ewgs_delta(loss, x, rules, jax.random.key(0))
      >>> round(float(delta["kernel"]), 3)
      1.159

    Source: EWGS, arXiv 2104.00903.
    """
    check_rules(rules)
    quantized = fake_quant(params, rules, grid=grid)
    widths, signs = {}, {}  # the width of the grid of each weight, and random signs
    for path, (quantizer, x) in rules.quantized(params).items():
        with path_in_errors(path):
            found = rounding(x, quantizer, grid_at(path, params, grid)).grid
        width = found.step * (quantizer.format.high - quantizer.format.low)
        widths[path] = quantizer.blocks(x.shape).spread(width)
        signs[path] = jax.random.rademacher(key_at(key, path), x.shape, width.dtype)

    def draw(path, quantizer, x, zeros):
        vector = quantizer.basis(x.shape).unrotate(signs[path] * widths[path])
        return vector.astype(zeros.dtype)

    along = rules.map(draw, params, jax.tree.map(jnp.zeros_like, quantized))

    def slope(x):
        gradient = jax.grad(loss)(x)
        wide = jnp.result_type(float)
        parts = jax.tree.map(lambda g, v: jnp.sum(g * v).astype(wide), gradient, along)
        return sum(jax.tree.leaves(parts)), gradient

    curved, gradient = jax.grad(slope, has_aux=True)(quantized)
    curved, deltas = rules.quantized(curved), {}
    for path, (quantizer, g) in rules.quantized(gradient).items():
        rotate, width = quantizer.basis(g.shape).rotate, widths[path]
        mean = jnp.mean(signs[path] * width * rotate(curved[path][1]))
        deviation = 3 * jnp.std(width * rotate(g))
        known = deviation > 0
        ratio = jnp.maximum(mean, 0.0) / jnp.where(known, deviation, 1.0)
        deltas[path] = jnp.where(known, ratio, 0.0)
    return deltas
