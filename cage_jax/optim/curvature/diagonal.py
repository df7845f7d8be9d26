"""Averages of estimates of a diagonal, which bound and scale the weights."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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


class Factors(NamedTuple):
    """Row and column means of a diagonal.

    The diagonal is taken to be their outer product, divided by the mean of either.

    Attributes:
      rows: the means of rows, of shape (..., rows).
      columns: the means of columns, of shape (..., columns).
    """

    rows: jax.Array
    columns: jax.Array


class DiagonalState(NamedTuple):
    """An average of estimates of the diagonal.

    It belongs to the basis in which the parameter is quantized: with a rotation, to the
    rotated weights. It has the shape of the parameter, and so its sharding, or that of
    its rows and columns.

    Attributes:
      steps: the number of steps done, int32.
      estimates: the number of estimates averaged, int32.
      diagonal: the average of the estimates by path, float32, before it is debiased.
      clamped: the fraction of the last average that was negative or too large.
    """

    steps: jax.Array
    estimates: jax.Array
    diagonal: dict[str, jax.Array | Factors]
    clamped: jax.Array


def diagonal(
    estimate: Callable[[Step, jax.Array], dict[str, jax.Array]],
    *,
    decay: float = 0.99,
    period: int = 1,
    start: int = 0,
    relative: bool = False,
    factored: bool = False,
    largest: float = 100.0,
    seed: int = 0,
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
      factored: keep only the row and column means of the estimates (over the last two
        axes), which are far less noisy. Vectors are kept whole.
      largest: the upper bound of an entry of `h`, as a multiple of the mean: the mean
        of its parameter, or of all parameters if `relative`. In that case it is the
        mean of the clamped entries, and if a few entries have nearly all the curvature
        the total pull is smaller. Negative entries count as 0. `clamped` in the state
        is the fraction of entries that were changed.
      seed: the seed of the keys.

    Returns:
      A source with a `DiagonalState`: 4 bytes for each quantized weight, or for each
      row and each column if `factored`.

    Raises:
      TypeError, ValueError: for arguments out of range.
    """
    check_averaging(decay, period, start)
    if not largest > 1:
        raise ValueError(f"`largest` must be above 1; got {largest}. Use 100.")

    def reduced(h):
        h = h.astype(jnp.float32)
        if not factored or h.ndim < 2:
            return h
        return Factors(jnp.mean(h, -1), jnp.mean(h, -2))

    def init(params):
        return DiagonalState(
            steps=jnp.zeros([], jnp.int32),
            estimates=jnp.zeros([], jnp.int32),
            diagonal={path: reduced(jnp.zeros_like(x)) for path, x in params.items()},
            clamped=jnp.zeros([], jnp.float32),
        )

    def update(state, step):
        def estimated():
            new = estimate(step, jax.random.fold_in(jax.random.key(seed), state.steps))
            means = {
                path: jax.tree.map(partial(average, decay), before, reduced(new[path]))
                for path, before in state.diagonal.items()
            }
            diagonals = {path: diagonal_of(mean) for path, mean in means.items()}
            within = clamp_diagonals(diagonals, largest, relative)
            changed = {path: diagonals[path] != h for path, h in within.items()}
            return state.estimates + 1, means, mean_of_all(changed)

        return advance(state, estimated, period, start)

    def weigh(errors, state, step):
        weights = {path: diagonal_of(state.diagonal[path]) for path in errors}
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


def diagonal_of(estimate: Any) -> jax.Array:
    """Returns a diagonal, computed from its factors if only these are kept."""
    if not isinstance(estimate, Factors):
        return estimate
    # Otherwise two negative means would have a positive product.
    rows, columns = (jnp.maximum(means, 0) for means in estimate)
    total = jnp.mean(columns, -1)[..., None, None]
    product = rows[..., :, None] * columns[..., None, :]
    return product / jnp.where(total == 0, 1, total)


def clamp_diagonals(
    diagonals: Arrays, largest: float, relative: bool
) -> dict[str, jax.Array]:
    """Clamps each entry to 0 and to `largest` times the mean, as in `diagonal`."""
    found = {path: jnp.maximum(h, 0) for path, h in diagonals.items()}
    if not relative:
        return {
            path: jnp.minimum(h, largest * jnp.mean(h)) for path, h in found.items()
        }
    # Clamping lowers the mean, so that the largest entries exceed the bound again.
    for _ in range(4):
        most = largest * mean_of_all(found)
        found = {path: jnp.minimum(h, most) for path, h in found.items()}
    return found
