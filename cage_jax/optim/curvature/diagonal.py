"""Averages of estimates of a diagonal, which bound and scale the weights."""

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.arrays.names import names_checked
from cage_jax.arrays.reprs import brief_repr
from cage_jax.optim.curvature.averages import (
    advance,
    average,
    check_averaging,
    total_weight,
)
from cage_jax.optim.curvature.source import (
    Arrays,
    Curvature,
    Step,
    apply_weights,
    mean_of_all,
)


@brief_repr
class DiagonalState(NamedTuple):
    """An average of estimates of the diagonal.

    It belongs to the basis in which the parameter is quantized: with a rotation, to the
    rotated weights. It has the shape of the parameter, and so its sharding.

    Attributes:
      steps: the number of steps done, int32.
      estimates: the number of estimates averaged, int32.
      diagonal: the average of the estimates by path, float32, before it is debiased.
      clamped: the fraction of the last average that was negative or too large; None
        without `statistics`.
    """

    steps: jax.Array
    estimates: jax.Array
    diagonal: dict[str, jax.Array]
    clamped: jax.Array | None


class DiagonalOptions(TypedDict, total=False):
    """The options of `diagonal`, which the sources made with it pass on."""

    decay: float
    period: int
    start: int
    relative: bool
    largest: float
    seed: int
    statistics: bool


@names_checked
def diagonal(
    estimate: Callable[[Step, jax.Array], dict[str, jax.Array]],
    *,
    decay: float = 0.99,
    period: int = 1,
    start: int = 0,
    relative: bool = False,
    largest: float = 100.0,
    seed: int = 0,
    statistics: bool = False,
) -> Curvature:
    """Creates a source from estimates of the diagonal, averaged over steps.

    Args:
      estimate: maps a `Step` and a key to estimates by path, in the basis of the
        quantizers.
      decay: the decay of the exponential average, which is debiased.
      period: the number of steps from one estimate to the next.
      start: the step of the first estimate; before it errors are not weighted.
      relative: weight by `h / mean(h)`, with the mean over all quantized weights. The
        total pull stays the same and moves to where the curvature is.
      largest: the upper bound of an entry of `h`, as a multiple of the mean: the mean
        of its parameter, or of all parameters if `relative`. In that case it is the
        mean of the clamped entries, and if a few entries have nearly all the curvature
        the total pull is smaller. Negative entries count as 0.
      seed: the seed of the keys.
      statistics: keep in the state the fraction of entries that were `clamped`.

    Returns:
      A source with a `DiagonalState`: 4 bytes for each quantized weight.

    Raises:
      TypeError, ValueError: for arguments out of range.
    """
    check_averaging(decay, period, start)
    if not largest > 1:
        raise ValueError(f"`largest` must be above 1; got {largest}. Use 100.")

    def init(quantized):
        return DiagonalState(
            steps=jnp.zeros([], jnp.int32),
            estimates=jnp.zeros([], jnp.int32),
            diagonal={
                path: jnp.zeros_like(x, jnp.float32)
                for path, (_, x) in quantized.items()
            },
            clamped=jnp.zeros([], jnp.float32) if statistics else None,
        )

    def update(state, step):
        def estimated():
            new = estimate(step, jax.random.fold_in(jax.random.key(seed), state.steps))
            means = state.diagonal | {  # a parameter without a gradient has none
                path: average(decay, state.diagonal[path], h.astype(jnp.float32))
                for path, h in new.items()
            }
            clamped = None
            if statistics:
                within = clamp_diagonals(means, largest, relative)
                clamped = mean_of_all(
                    {path: means[path] != h for path, h in within.items()}
                )
            return state.estimates + 1, means, clamped

        return advance(state, estimated, period, start)

    def weigh(errors, state, step):
        weights = {path: state.diagonal[path] for path in errors}
        weights = clamp_diagonals(weights, largest, relative)
        unit = total_weight(decay, state.estimates)
        if relative:
            unit = mean_of_all(weights)
            weights = {p: jnp.minimum(h, largest * unit) for p, h in weights.items()}
        # Before the first estimate nothing is known, so errors are not weighted.
        known = state.estimates > 0
        weighted, quantizers = {}, step.quantizers
        for path, error in errors.items():
            h = weights[path] / unit
            h = jnp.where(known & jnp.isfinite(h), h, 1.0).astype(error.dtype)
            weighted[path] = apply_weights(h, error, quantizers[path])
        return weighted

    return Curvature(init, update, weigh)


def clamp_diagonals(
    diagonals: Arrays, largest: float, relative: bool
) -> dict[str, jax.Array]:
    """Clamps each entry to 0 and to `largest` times the mean, as in `diagonal`."""
    found = {path: jnp.maximum(h, 0) for path, h in diagonals.items()}
    if not relative:
        return {
            path: jnp.minimum(h, largest * mean_of_all({path: h}))
            for path, h in found.items()
        }

    def within(most):
        return {path: jnp.minimum(h, most) for path, h in found.items()}

    # Clamping lowers the mean, so that the largest entries exceed the bound again.
    def lower(_, most):
        return largest * mean_of_all(within(most))

    # A loop, because compilers take long over rounds that each depend on all arrays.
    return within(lax.fori_loop(0, 4, lower, jnp.float32(jnp.inf)))
