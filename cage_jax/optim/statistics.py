"""Statistics of the correction at a step: errors, flipped codes, drift of norms.

They are measured every n-th step, and in the step in which the pull begins, whose norm
is the reference of the drift. In between nothing is measured, and the state keeps the
numbers of the last time.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.arrays.checks import check_int
from cage_jax.arrays.dispatch import Variant, Variants, dispatch, if_divided
from cage_jax.arrays.exact import uncontracted
from cage_jax.arrays.folding import FOLDS, fold_axis
from cage_jax.arrays.reprs import brief_repr
from cage_jax.core.quantize import quantize
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.rounding import (
    ErrorReductions,
    bytes_of_codes,
    error_elementwise,
    fit_grid,
)


@brief_repr
class CageStatistics(NamedTuple):
    """Statistics of the last measured step: float32 scalars, but for `previous_codes`.

    Read them with `optax.tree_utils.tree_get(state, "codes_flipped")`.

    Attributes:
      correction_strength: lambda at the last step, measured or not.
      relative_error_mean: mean of ||e|| / ||x|| over the quantized parameters.
      relative_error_max: maximum of ||e|| / ||x|| over the quantized parameters.
      correction_ratio: norm of the correction divided by the norm of the update that it
        is added to, over all quantized parameters; 0 while silent.
      codes_flipped: fraction of the codes that differ from the last measured step.
      norm_drift: relative change of the parameters' norm since the pull began.
      reference_norm: the norm when the pull began.
      previous_codes: the codes at that step by path, int8, one byte each.
    """

    correction_strength: jax.Array
    relative_error_mean: jax.Array
    relative_error_max: jax.Array
    correction_ratio: jax.Array
    codes_flipped: jax.Array
    norm_drift: jax.Array
    reference_norm: jax.Array
    previous_codes: dict[str, jax.Array]


class ParameterStatistics(NamedTuple):
    """Statistics of one parameter, to be combined with those of others.

    Attributes:
      error: the sum of squares of its quantization error, a float32 scalar.
      norm: the sum of squares of the parameter where the error is taken.
      update: the sum of squares of its update before the correction.
      flipped: the number of codes that differ from the last measured step.
      codes: the codes at this step, int8, one byte each.
    """

    error: jax.Array
    norm: jax.Array
    update: jax.Array
    flipped: jax.Array
    codes: jax.Array


def initial_statistics(
    quantized: Mapping[str, tuple[Quantizer, jax.Array]],
) -> CageStatistics:
    """Returns the initial statistics of the given parameters."""
    norm = _root([squares(x) for _, x in quantized.values()])
    # Made from the norm, so that in a `shard_map` they vary as later numbers do. Each
    # is an array of its own, which can be donated.
    zeros = [lax.full_like(norm, 0) for _ in range(5)]
    codes = {
        path: codes_of(x, quantizer, fit_grid(x, quantizer))
        for path, (quantizer, x) in quantized.items()
    }
    return CageStatistics._make([jnp.zeros([], jnp.float32), *zeros, norm, codes])


def steps_between(statistics: bool | int) -> int:
    """Returns how many steps there are from one measured step to the next; 0 for never.

    Raises:
      TypeError, ValueError: for anything but True, False and a positive int.
    """
    if not isinstance(statistics, bool):
        remedy = "Use True for every step, False for none, 10 for every tenth."
        check_int("statistics", statistics, remedy, least=1)
    return int(statistics)


def is_measured(
    period: int, count: jax.Array, strength: Any, before: CageStatistics
) -> jax.Array:
    """Returns whether a step is measured: every n-th one, and where the pull begins."""
    begins = (strength != 0) & (before.correction_strength == 0)
    # Compilers would fold a condition that holds in every step.
    return ((count % period == 0) | begins) & (count >= 0)


def parameter_statistics(
    is_measured: jax.typing.ArrayLike,
    quantizer: Quantizer,
    x: jax.Array,
    update: jax.Array,
    reductions: ErrorReductions,
    previous: jax.Array,
) -> tuple[jax.Array, ParameterStatistics]:
    """Computes the statistics of one parameter if `is_measured`, else zeros.

    Args:
      is_measured: whether to compute them.
      quantizer: the parameter's quantizer.
      x: the parameter where the error is taken.
      update: the parameter's update, before the correction.
      reductions: of the error at `x`, with codes.
      previous: the codes at the last measured step; they are kept in between.

    Returns:
      `is_measured`, for what comes next to wait for, and the statistics.
    """
    codes = reductions.code_bytes
    assert codes is not None

    def sums():
        error = error_elementwise(x, quantizer, reductions)
        squared = (jnp.square(each.astype(jnp.float32)) for each in (error, x))
        flipped = _totals((codes != previous).astype(jnp.float32))
        return *_totals(*squared), squares(update), *flipped

    def zeros():
        # Made from `x`, so that in a `shard_map` they vary along the same mesh axes.
        return (lax.full_like(x, 0, jnp.float32, ()),) * 4

    done, found = lax.cond(
        is_measured, lambda: (True, sums()), lambda: (False, zeros())
    )
    # Codes are not a result of the branches, which would have to copy them.
    return done, ParameterStatistics._make([*found, jnp.where(done, codes, previous)])


def combine(
    is_measured: jax.Array,
    each: Mapping[str, ParameterStatistics],
    strength: jax.Array | float,
    factor: jax.Array | float,
    before: CageStatistics,
    weighted: Sequence[jax.Array] = (),
) -> CageStatistics:
    """Combines the statistics of all parameters into those of a step.

    Args:
      is_measured: whether the step is measured; if not, the numbers of `before` stay.
      each: the statistics of each parameter, by path.
      strength: lambda.
      factor: what the errors were multiplied by.
      before: the statistics of the step before.
      weighted: the weighted errors, if they are weighted with a curvature.
    """
    parts = each.values()
    ratios = [_ratio(jnp.sqrt(one.error), jnp.sqrt(one.norm)) for one in parts]
    relative = jnp.stack(ratios) if ratios else jnp.zeros([1], jnp.float32)
    norm = _root(one.norm for one in parts)
    began = before.correction_strength != 0
    reference = jnp.where(began, before.reference_norm, norm)
    errors = [one.error for one in parts]
    if weighted:
        errors = lax.cond(
            is_measured,
            lambda: [squares(error) for error in weighted],
            lambda: errors,
        )
    correction = jnp.abs(jnp.float32(factor)) * _root(errors)
    flipped = sum((one.flipped for one in parts), start=jnp.zeros([], jnp.float32))
    total = sum(one.codes.size for one in parts)
    codes = before.previous_codes | {path: one.codes for path, one in each.items()}
    measured = CageStatistics(
        correction_strength=jnp.float32(strength),
        relative_error_mean=jnp.mean(relative),
        relative_error_max=jnp.max(relative),
        correction_ratio=_ratio(correction, _root(one.update for one in parts)),
        codes_flipped=flipped / max(total, 1),
        norm_drift=_ratio(norm - reference, reference),
        reference_norm=reference,
        previous_codes=codes,
    )
    kept = before._replace(
        correction_strength=measured.correction_strength, previous_codes=codes
    )
    return jax.tree.map(functools.partial(jnp.where, is_measured), measured, kept)


@functools.partial(jax.jit, static_argnums=1)
def codes_of(x: jax.Array, quantizer: Quantizer, grid: Grid | None) -> jax.Array:
    """Returns the codes of the nearest values, int8, one byte each, for comparison."""
    quantizer = dataclasses.replace(quantizer, rounding="nearest")
    return bytes_of_codes(quantize(x, quantizer, grid=grid).codes)


def squares(x: jax.Array) -> jax.Array:
    """Returns the sum of the squares, float32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def _totals(*arrays):
    """Returns the sums of arrays of one shape, which are computed only to be added up.

    XLA for CPU writes such an array to memory before it adds it up. So there one loop
    computes them all, adds up eight rows at a time, and writes an eighth.
    """

    def at_once(*arrays):
        rows = [x.reshape(-1, x.shape[-1]) for x in arrays]
        parts = jnp.stack([fold_axis(lax.add, x, 0) for x in rows], axis=1)
        # This changes no value, but its limits keep the sum below out of that loop.
        return tuple(jnp.sum(uncontracted(parts), (0, 2)))

    variants = Variants()
    if math.prod(arrays[0].shape[:-1]) % FOLDS == 0:
        variants = Variants((Variant("cpu", at_once, if_divided(pieces=1)),))
    return dispatch(lambda *arrays: tuple(map(jnp.sum, arrays)), variants, *arrays)


def _ratio(part, whole):
    """Returns `part / whole`, or 0 where `whole` is 0."""
    return jnp.where(whole == 0, 0.0, part / jnp.where(whole == 0, 1.0, whole))


def _root(sums):
    return jnp.sqrt(sum(sums, start=jnp.zeros([], jnp.float32)))
