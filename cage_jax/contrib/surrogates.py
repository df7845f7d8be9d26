"""Other gradients for rounding: StableQAT's factor, and Hestia's soft quantizer."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.arrays.checks import check_number
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.contrib.scaled_gradients import with_scaled_gradient
from cage_jax.core.grids import grid_at, needed_grid
from cage_jax.core.quantize import fake_quant
from cage_jax.core.rules import Rules, check_rules
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import check_has_codes
from cage_jax.quantizers.rounding import dequantized, rounding


@names_checked
def stable_qat(
    params: Any,
    rules: Rules,
    amplitude: float | jax.Array = 0.21,
    *,
    grid: Mapping[str, Grid] | None = None,
) -> Any:
    """Computes `fake_quant`, its gradient scaled by `(1 - S) / (1 + S)`.

    It replaces `fake_quant` in the loss and returns the same values. `S` is the slope
    of the first term of a Fourier series for the sawtooth of rounding,
    `S = sqrt(2) * pi * amplitude * cos(pi * (v - round(v)))`, where `v` are the weights
    in units of the grid. So little of the gradient passes on a level, 3.5 % by default,
    and all of it halfway between two. The quantizer's `gradient` still masks it. With a
    rotation, all of this is in the rotated basis. With `amplitude` 0 the result is
    bit-identical to `fake_quant`. A learned grid gets the same gradient as there.

    Args:
      params: a tree of parameters.
      rules: which parameters are quantized, and how; their values must be 1 apart, as
        integers are.
      amplitude: from 0 to 0.225, where `S` is 1 on a level.
      grid: as in `fake_quant`.

    Returns:
      A tree like `params`.

    Raises:
      TypeError, ValueError: as `fake_quant`; for an amplitude out of range, and for
        formats of floating point and codebooks.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> x = {"kernel": jnp.array([[0.5], [2.0], [1.25], [7.0]])}
      >>> loss = lambda x: jnp.sum(contrib.stable_qat(x, rules)["kernel"])
      >>> [round(float(g), 3) for g in jax.grad(loss)(x)["kernel"].ravel()]
      [1.0, 0.035, 0.205, 0.035]

    Source: StableQAT, arXiv 2601.19320; the default is that of its code.
    """
    check_rules(rules)
    remedy = "The authors use 0.21."
    check_number("amplitude", amplitude, remedy, least=0, most=0.225, or_array=True)

    def apply(path, quantizer, x):
        check_has_codes(quantizer, "stable_qat")
        if quantizer.format.code_offset is None:
            raise ValueError(
                f"`rules` must have values that are 1 apart for stable_qat; got "
                f"{quantizer}. Use int4(), or ewgs for other formats."
            )
        found = grid_at(path, params, grid)
        wide = jnp.asarray(amplitude).astype(compute_dtype(x.dtype))
        scaled = with_scaled_gradient(_added, quantizer, x, found, wide)
        return fake_quant(scaled, quantizer, grid=found)

    return rules.map(apply, params)


def _added(rounded, gradient, amplitude):
    distance = rounded.position() - rounded.code_values()
    slope = math.sqrt(2) * math.pi * amplitude * jnp.cos(math.pi * distance)
    # As what is added, so that nothing changes without an amplitude.
    return -2 * slope / (1 + slope) * gradient


@names_checked
def soft_quant(
    params: Any,
    rules: Rules,
    temperature: float | jax.Array,
    *,
    grid: Mapping[str, Grid] | None = None,
) -> Any:
    """Computes the mean of all levels, weighted by a softmax of their distances.

    It replaces `fake_quant` in the loss while the temperature falls. With `v` the
    weights in units of the grid, a weight becomes the step of its grid times

        sum_c softmax_c(-(v - c)**2 / temperature) * c

    over the values `c` of the format, and gets the gradient of that; the grid is a
    constant. A low temperature gives `fake_quant` and nearly no gradient, so train the
    rest with `fake_quant`. With a rotation, all of this is in the rotated basis. It
    takes an array for each level, so it suits few bits. Computed in float32 (float64
    for float64); the dtype is kept.

    Args:
      params: a tree of parameters.
      rules: which parameters are quantized, and how.
      temperature: tau, above 0. The authors keep it, and then lower it by half a cosine
        to 0: `optax.cosine_decay_schedule(0.5, steps)(count)`, for example. They train
        ternary weights, and pace it by the Hessian's trace.
      grid: as in `fake_quant`.

    Returns:
      A tree like `params`.

    Raises:
      TypeError, ValueError: as `fake_quant`; also for a temperature that is not
        positive.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> x = {"kernel": jnp.array([[0.5], [2.0], [1.25], [7.0]])}
      >>> for temperature in (1.0, 0.1):
      ...     soft = contrib.soft_quant(x, rules, temperature)["kernel"]
      ...     print([round(float(v), 2) for v in soft.ravel()])
      [0.5, 2.0, 1.25, 6.71]
      [0.5, 2.0, 1.01, 7.0]

    Source: HESTIA, arXiv 2601.20745, and its code.
    """
    check_rules(rules)
    remedy = "Use fake_quant in place of 0."
    check_number("temperature", temperature, remedy, above=0, or_array=True)

    def soften(path, quantizer, x):
        check_has_codes(quantizer, "soft_quant")
        given = needed_grid(path, quantizer, params, grid)
        found = lax.stop_gradient(rounding(x, quantizer, given).grid)
        position = rounding(x, quantizer, found).position()
        levels = jnp.asarray(quantizer.format.values, position.dtype)
        distance = position[..., None] - levels.reshape(*[1] * x.ndim, -1)
        share = jnp.asarray(temperature, position.dtype)
        weights = jax.nn.softmax(-jnp.square(distance) / share, axis=-1)
        return dequantized(jnp.dot(weights, levels), quantizer, found, x)

    return rules.map(soften, params)
