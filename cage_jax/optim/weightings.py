"""Sources that weight the correction by rounding thresholds and flips.

The total dose stays the same: the factors are divided by their mean over all parameters
that are pulled. They are computed at the parameters at which the gradients were taken
(with `post_step` these are before the update, while the error is taken after it). The
grid is the learned one or the one that the scale rule finds there, even under
`freeze_scale`. With a rotation the factors apply to the rotated errors. Nothing
receives a gradient.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cage_jax.arrays.checks import check_number
from cage_jax.arrays.exact import clamp, compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import path_in_errors
from cage_jax.arrays.reprs import brief_repr
from cage_jax.core.grids import check_grid_given, grid_at
from cage_jax.optim.curvature.source import (
    Arrays,
    Curvature,
    Step,
    apply_weights,
    mean_of_all,
    stateless_source,
)
from cage_jax.optim.statistics import codes_of
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer, check_has_codes
from cage_jax.quantizers.rounding import rounding


@names_checked
def by_distance(power: float = 1.0, *, near: bool = False) -> Curvature:
    """Weights errors by the distance of each weight to the next rounding threshold.

    For a weight between two values of the grid, let `a` be its distance to the nearer
    one, divided by half the distance between the two: 0 on the grid, 1 at the
    threshold. The factors are `(1 - a) ** power` over their mean, or 1 if the mean is
    0. Weights far from a threshold are settled first. Beyond the grid `a` continues as
    within the outermost step, up to 1. The factors are computed in float32 (float64 for
    float64), in the shape of each parameter.

    Args:
      power: the larger, the more the factors differ.
      near: use `a ** power` instead, so that weights about to flip are pulled most.

    Returns:
      A source without a state.

    Raises:
      TypeError, ValueError: for a power out of range; in `update` for a quantizer
        without codes of its own.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import weightings
      >>> import jax.numpy as jnp
      >>> import optax
      >>> rules = cage.Rules([(r"w", cage.int4())])
      >>> source = weightings.by_distance()
      >>> pull = cage.coupled(rules, strength=0.5, curvature=source)
      >>> tx = optax.chain(pull, optax.sgd(1.0))
      >>> params = {"w": jnp.array([[3.5], [1.5625], [0.6875], [0.625]])}
      >>> gradients = {"w": jnp.zeros((4, 1))}
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> [round(float(each), 4) for each in updates["w"].ravel()]
      [-0.0, -0.0375, -0.0375, -0.05]

    Source: none of its own; Nagel et al. 2022, arXiv 2203.11086, found that the weights
    near a threshold are the ones that oscillate.
    """
    remedy = "Use 1.0, or leave the curvature out for equal weights."
    check_number("power", power, remedy, above=0)

    def weigh(errors, step):
        scores = {}
        for path, x, quantizer, grid in _with_codes(step, "by_distance"):
            away = _distance(x, quantizer, grid)
            scores[path] = (away if near else 1 - away) ** power
        return _weigh_by_scores(errors, scores, step)

    return stateless_source(weigh)


@brief_repr
class FlipsState(NamedTuple):
    """How often codes changed, in dicts by path of arrays like the parameters.

    Attributes:
      steps: the number of steps done, int32.
      codes_before: the codes at the last step, int8, one byte each.
      flip_frequency: the average number of changes per step, before it is debiased;
        float32.
    """

    steps: jax.Array
    codes_before: dict[str, jax.Array]
    flip_frequency: dict[str, jax.Array]


@names_checked
def by_flips(decay: float = 0.99, *, floor: float = 0.1) -> Curvature:
    """Weights errors by how often the code of each weight has changed.

    Let `f` be the frequency with which the code of a weight differs from the step
    before. The factors are `f + floor * mean(f)` over their mean, or 1 if nothing has
    flipped so far. Every step is quantized, even while the strength is 0.

    Args:
      decay: the decay of the exponential average of flips.
      floor: the value for weights that never flip, as a multiple of mean(f).

    Returns:
      A source with a `FlipsState`: 5 bytes for each quantized weight.

    Raises:
      TypeError, ValueError: for numbers out of range; in `update` for a quantizer
        without codes of its own.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import weightings
      >>> import jax.numpy as jnp
      >>> import optax
      >>> rules = cage.Rules([(r"w", cage.int4())])
      >>> tx = cage.coupled(rules, strength=1.0, curvature=weightings.by_flips(0.5))
      >>> gradients = {"w": jnp.zeros((3, 1))}
      >>> state = tx.init(gradients)
      >>> for x in (1.2, 1.3, 1.2):
      ...     params = {"w": jnp.array([[3.5], [1.1], [x]])}
      ...     _, state = tx.update(gradients, state, params)
      >>> optax.tree_utils.tree_get(state, "flip_frequency")["w"].ravel().tolist()
      [0.0, 0.0, 0.75]

    Source: Nagel et al. 2022, arXiv 2203.11086, for the frequency. They count changes
    back, and use it to dampen or freeze weights, see `cage_jax.contrib`.
    """
    check_number("decay", decay, "Use 0.99.", least=0, below=1)
    check_number("floor", floor, "Use 0.1.", least=0)

    def init(quantized):
        return FlipsState(
            jnp.zeros([], jnp.int32),
            {path: jnp.zeros_like(x, jnp.int8) for path, (_, x) in quantized.items()},
            {path: jnp.zeros_like(x, "float32") for path, (_, x) in quantized.items()},
        )

    def update(state, step):
        codes, frequency = dict(state.codes_before), dict(state.flip_frequency)
        for path, x, quantizer, grid in _with_codes(step, "by_flips"):
            codes[path] = codes_of(x, quantizer, grid)
            # Before the first step there are no codes.
            flipped = (codes[path] != state.codes_before[path]) & (state.steps > 0)
            new = (1 - decay) * flipped.astype(jnp.float32)
            frequency[path] = decay * frequency[path] + new
        return FlipsState(optax.safe_increment(state.steps), codes, frequency)

    def weigh(errors, state, step):
        return _weigh_by_scores(errors, state.flip_frequency, step, floor)

    return Curvature(init, update, weigh)


def _with_codes(
    step: Step, name: str
) -> Iterator[tuple[str, jax.Array, Quantizer, Grid | None]]:
    """Yields path, array, quantizer and learned grid of each quantized parameter."""
    for path, (quantizer, x) in step.rules.quantized(step.params).items():
        grid = grid_at(path, step.params, None)
        with path_in_errors(path):
            check_grid_given(quantizer, grid)
            check_has_codes(quantizer, name)
        yield path, lax.stop_gradient(x.astype(compute_dtype(x.dtype))), quantizer, grid


def _distance(x, quantizer, grid):
    """Computes, in the basis, `a`: 0 at the nearest value, 1 at the threshold."""
    format = quantizer.format
    position = rounding(x, quantizer, grid).position()
    thresholds = (format.values[1:] + format.values[:-1]) / 2
    # Values beyond the outermost thresholds are measured by the outermost step.
    within = clamp(position, thresholds[0], thresholds[-1])
    below, above = format.neighbours(within)
    half = jnp.where(above > below, above - below, 1.0) / 2
    away = jnp.abs(position - format.round(position)) / half
    return jnp.where(away < 1, away, 1.0)  # 1 for NaN too, to keep it out of the mean


def _weigh_by_scores(
    errors: Arrays, scores: Arrays, step: Step, floor: float = 0.0
) -> dict[str, jax.Array]:
    """Weights errors by scores plus `floor` times their mean, scaled to mean 1."""
    mean = mean_of_all({path: scores[path] for path in errors})
    found, quantizers = {}, step.quantizers
    for path, error in errors.items():
        score = scores[path]
        share = jnp.where(mean > 0, score / mean.astype(score.dtype), 1.0)
        weight = ((share + floor) / (1 + floor)).astype(error.dtype)
        found[path] = apply_weights(weight, error, quantizers[path])
    return found
