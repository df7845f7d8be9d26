"""Statistics of the correction at a step: errors, flipped codes, drift of norms."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.core.quantize import quantization_error, quantize
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.rounding import fit_grid


class CageStatistics(NamedTuple):
    """Statistics of the last step: float32 scalars, except for `previous_codes`.

    Read them with `optax.tree_utils.tree_get(state, "codes_flipped")`.

    Attributes:
      correction_strength: lambda.
      relative_error_mean: mean of ||e|| / ||x|| over the quantized parameters.
      relative_error_max: maximum of ||e|| / ||x|| over the quantized parameters.
      correction_ratio: norm of the correction divided by the norm of the update that it
        is added to, over all quantized parameters; 0 while silent.
      codes_flipped: fraction of the codes that differ from the step before.
      norm_drift: relative change of the parameters' norm since the pull began.
      reference_norm: the norm when the pull began.
      previous_codes: the codes at this step by path, int8, one byte each.
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
      flipped: the number of codes that differ from the step before.
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
    zero = jnp.zeros([], jnp.float32)
    return CageStatistics(
        *(zero,) * 6,
        reference_norm=_root([squares(x) for _, x in quantized.values()]),
        previous_codes={
            path: codes_of(x, quantizer, fit_grid(x, quantizer))
            for path, (quantizer, x) in quantized.items()
        },
    )


def parameter_statistics(
    quantizer: Quantizer,
    x: jax.Array,
    update: jax.Array,
    grid: Grid | None,
    previous: jax.Array,
) -> ParameterStatistics:
    """Computes the statistics of one parameter.

    Args:
      quantizer: the parameter's quantizer.
      x: the parameter where the error is taken.
      update: the parameter's update, before the correction.
      grid: as in `quantize`.
      previous: the codes at the step before.
    """
    codes = codes_of(x, quantizer, grid)
    return ParameterStatistics(
        squares(quantization_error(x, quantizer, grid=grid)),
        squares(x),
        squares(update),
        jnp.sum(codes != previous, dtype=jnp.float32),
        codes,
    )


def combine(
    each: Mapping[str, ParameterStatistics],
    strength: jax.Array | float,
    factor: jax.Array | float,
    before: CageStatistics,
    weighted: Iterable[jax.Array] = (),
) -> CageStatistics:
    """Combines the statistics of all parameters into those of a step.

    Args:
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
    errors = [squares(error) for error in weighted] or [one.error for one in parts]
    correction = jnp.abs(jnp.float32(factor)) * _root(errors)
    flipped = sum((one.flipped for one in parts), start=jnp.zeros([], jnp.float32))
    total = sum(one.codes.size for one in parts)
    codes = {path: one.codes for path, one in each.items()}
    return CageStatistics(
        correction_strength=jnp.float32(strength),
        relative_error_mean=jnp.mean(relative),
        relative_error_max=jnp.max(relative),
        correction_ratio=_ratio(correction, _root(one.update for one in parts)),
        codes_flipped=flipped / max(total, 1),
        norm_drift=_ratio(norm - reference, reference),
        reference_norm=reference,
        previous_codes={**before.previous_codes, **codes},
    )


@functools.partial(jax.jit, static_argnums=1)
def codes_of(x: jax.Array, quantizer: Quantizer, grid: Grid | None) -> jax.Array:
    """Returns the codes of the nearest values, int8, one byte each, for comparison."""
    codes = quantize(x, dataclasses.replace(quantizer, rounding="nearest"), grid=grid)
    return lax.bitcast_convert_type(codes.codes.astype(codes.byte_dtype), jnp.int8)


def squares(x: jax.Array) -> jax.Array:
    """Returns the sum of the squares, float32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def _ratio(part, whole):
    """Returns `part / whole`, or 0 where `whole` is 0."""
    return jnp.where(whole == 0, 0.0, part / jnp.where(whole == 0, 1.0, whole))


def _root(sums):
    return jnp.sqrt(sum(sums, start=jnp.zeros([], jnp.float32)))
