"""Quantizers that harden during training: BinaryRelax and PARQ."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.arrays.checks import check_int, check_number
from cage_jax.arrays.exact import clamp, compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.core.grids import grid_at, needed_grid
from cage_jax.core.quantize import quantization_error
from cage_jax.core.rules import Rules, check_rules
from cage_jax.optim.schedules import Schedule
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import check_has_codes
from cage_jax.quantizers.rounding import dequantized, rounding


@names_checked
def binary_relax(
    params: Any,
    rules: Rules,
    relaxation: float | jax.Array,
    *,
    grid: Mapping[str, Grid] | None = None,
) -> Any:
    """Computes the relaxed weights `(1 - relaxation) * x + relaxation * Q(x)`.

    It replaces `fake_quant` in the loss. The parameters are the latent weights; they
    get the gradient at the relaxed weights, unchanged and unmasked. With 0 the result
    is the latent weights, with 1 that of `fake_quant` up to rounding. Computed in
    float32 (float64 for float64); the dtype is kept.

    Args:
      params: a tree of parameters.
      rules: which parameters are quantized, and how.
      relaxation: theta, in [0, 1]; it rises linearly from 0 to 1 during training, by
        `optax.linear_schedule(0.0, 1.0, steps, start)(count)` for example.
      grid: as in `fake_quant`.

    Returns:
      A tree like `params`.

    Raises:
      TypeError, ValueError: as `fake_quant`; also if `relaxation` is out of range.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> params = {"kernel": jnp.array([[0.5], [-3.5], [1.25]])}
      >>> contrib.binary_relax(params, rules, 0.5)["kernel"].ravel().tolist()
      [0.5, -3.5, 1.125]

    Source: BinaryRelax, arXiv 1801.06313; its schedule as in torchao.
    """
    check_rules(rules)
    remedy = "Raise it from 0 to 1 during training."
    check_number("relaxation", relaxation, remedy, least=0, most=1, or_array=True)

    def relax(path, quantizer, x):
        wide = x.astype(compute_dtype(x.dtype))
        error = quantization_error(wide, quantizer, grid=grid_at(path, params, grid))
        return (wide - jnp.asarray(relaxation, wide.dtype) * error).astype(x.dtype)

    return rules.map(relax, params)


@names_checked
def parq(
    params: Any,
    rules: Rules,
    inverse_slope: float | jax.Array,
    *,
    grid: Mapping[str, Grid] | None = None,
) -> Any:
    """Applies PARQ's proximal map, a staircase with ramps instead of jumps.

    Between two levels with center `c`, a weight `x` maps to
    `c + (x - c) / inverse_slope`, clipped to the two levels; beyond the grid it maps to
    the end of the grid. It replaces `fake_quant` in the loss. The parameters are the
    latent weights; they get the gradient at the mapped values, unchanged and unmasked.
    With 1 the weights stay unchanged, with 0 the result is that of `fake_quant`. With a
    rotation, all of this is in the rotated basis. Computed in float32 (float64 for
    float64); the dtype is kept.

    Args:
      params: a tree of parameters.
      rules: which parameters are quantized, and how.
      inverse_slope: rho, in [0, 1]; it falls from 1 to 0 during training, by
        `parq_schedule(total_steps)(count)`.
      grid: as in `fake_quant`. The authors' code fits the grid only every 10 steps;
        here each call fits it unless it is given.

    Returns:
      A tree like `params`.

    Raises:
      TypeError, ValueError: as `fake_quant`; also if `inverse_slope` is out of range.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> params = {"kernel": jnp.array([[0.625], [-3.5], [1.375]])}
      >>> contrib.parq(params, rules, 0.75)["kernel"].ravel().round(4)
      Array([ 0.5833, -3.5   ,  1.4167], dtype=float32)

    Source: PARQ, arXiv 2503.15748.
    """
    check_rules(rules)
    remedy, name = "Lower it from 1 to 0 during training.", "inverse_slope"
    check_number(name, inverse_slope, remedy, least=0, most=1, or_array=True)

    def ramp(path, quantizer, x):
        check_has_codes(quantizer, "parq")
        found = needed_grid(path, quantizer, params, grid)
        value = lax.stop_gradient(_ramped(x, quantizer, found, inverse_slope))
        return value + (x - lax.stop_gradient(x))

    return rules.map(ramp, params)


def _ramped(x, quantizer, grid, inverse_slope):
    rounded, format = rounding(x, quantizer, grid), quantizer.format
    position = rounded.position()
    slope = jnp.asarray(inverse_slope, position.dtype)
    within = clamp(position, format.low, format.high)
    below, above = format.neighbours(within)
    center = (below + above) / 2
    steep = (within - center) / jnp.where(slope > 0, slope, 1.0)
    ramped = jnp.clip(center + steep, below, above)
    values = jnp.where(slope > 0, ramped, format.round(position))
    return jnp.where(slope < 1, dequantized(values, quantizer, rounded.grid, x), x)


@names_checked
def parq_schedule(
    total_steps: int, *, start: int = 0, steepness: float = 10.0
) -> Schedule:
    """Returns PARQ's inverse slope, a sigmoid falling from 1 at `start` to 0.

    Args:
      total_steps: first step with value 0.
      start: last step with value 1.
      steepness: steepness of the sigmoid.

    Returns:
      A schedule from the step count (from 0) to the inverse slope.

    Raises:
      TypeError, ValueError: for arguments out of range.

    Example:
      >>> from cage_jax import contrib
      >>> inverse_slope = contrib.parq_schedule(100)
      >>> [round(float(inverse_slope(count)), 3) for count in (0, 25, 50, 75, 100)]
      [1.0, 0.93, 0.5, 0.07, 0.0]

    Source: PARQ, arXiv 2503.15748; the default is that of torchao.
    """
    check_int("start", start, "Use the step at which to begin.", least=0)
    check_int("total_steps", total_steps, "Use a step after `start`.", least=start + 1)
    check_number("steepness", steepness, "The authors' code uses 10.", above=0)

    def sigmoid(share):
        return 1 / (1 + jnp.exp(steepness * (share - 0.5)))

    last = 1 / (1 + math.exp(steepness / 2))
    first = 1 - last

    def schedule(count):
        elapsed = jnp.asarray(count).astype(jnp.result_type(float)) - start
        share = jnp.clip(elapsed / (total_steps - start), 0.0, 1.0)
        inverse_slope = (sigmoid(share) - last) / (first - last)
        return jnp.where(share < 1, jnp.clip(inverse_slope, 0.0, 1.0), 0.0)

    return schedule
