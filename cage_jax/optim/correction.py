"""The correction: the pull of each quantized parameter towards its grid.

All placements share it; see `placements` for where it goes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cage_jax.arrays.checks import warn
from cage_jax.arrays.exact import compute_dtype, divide
from cage_jax.arrays.paths import path_in_errors
from cage_jax.arrays.reprs import brief_repr
from cage_jax.core.grids import check_grid_given, grid_at
from cage_jax.core.rules import Rules, check_rules, nothing_quantized
from cage_jax.optim.curvature.source import Curvature, Step, step_source
from cage_jax.optim.schedules import (
    ScalarOrSchedule,
    check_strength,
    is_optimizer,
    value_at,
)
from cage_jax.optim.states import (
    check_remembered,
    check_state,
    first_state,
    is_placeholder,
    remembered,
)
from cage_jax.optim.statistics import (
    CageStatistics,
    ParameterStatistics,
    combine,
    initial_statistics,
    is_measured,
    parameter_statistics,
    steps_between,
)
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer, check_has_codes
from cage_jax.quantizers.rounding import error_elementwise, error_reductions, fit_grid


@brief_repr
class CageState(NamedTuple):
    """State of the correction.

    Attributes:
      cage_count: the number of steps done, int32.
      grids: with `freeze_scale`, the grid of each quantized parameter by path. Its
        scale is 0 until the pull begins. Pass it to `fake_quant` and `quantize` as
        `grid`. None otherwise.
      statistics: with `statistics`, the statistics of the last step. None otherwise.
      curvature: with `curvature`, the state of that source. None otherwise.
      rules: the quantizers, with the number and a digest of the paths of each, as keys
        of a dict without arrays. So `update` refuses a state of other rules, as do
        checkpoints. None in its place is not compared.
    """

    cage_count: jax.Array
    grids: dict[str, Grid] | None
    statistics: CageStatistics | None
    curvature: Any = None
    rules: dict[str, None] | None = None


class Fused(NamedTuple):
    """What a fused step has done before `update` steps the other parameters.

    Attributes:
      statistics: statistics of the parameters that it stepped, by path.
      step: what the source of curvature was given, for all parameters; None without
        `curvature`.
      source: the state of that source after the step; None without `curvature`.
    """

    statistics: Mapping[str, ParameterStatistics]
    step: Step | None
    source: Any


class _Parameter(NamedTuple):
    """A quantized parameter at one step.

    Attributes:
      quantizer: its quantizer.
      x: the weights at which the error is taken, in float32 or wider.
      update: its update before the correction.
      grid: the grid to keep, learned or frozen, or None.
    """

    quantizer: Quantizer
    x: jax.Array
    update: jax.Array
    grid: Grid | None


class _Error(NamedTuple):
    """The quantization error of a parameter; while silent, numbers not to be used."""

    error: jax.Array
    grid: Grid
    is_pulling: jax.Array
    update: jax.Array


def correction(
    rules: Rules,
    strength: ScalarOrSchedule,
    step_size: Callable[[jax.Array], Any],
    *,
    at_updated: bool,
    curvature: Curvature | None,
    freeze_scale: bool,
    statistics: bool | int,
) -> optax.GradientTransformationExtraArgs:
    """Adds `step_size(count) * strength * (x - Q(x))` to the updates.

    Args:
      rules: which parameters are quantized, and how.
      strength: lambda, a number or a schedule of the step count.
      step_size: 1, or minus the learning rate, as a function of the step count.
      at_updated: whether the error is taken at `params + updates`, not at `params`.
      curvature: as in `coupled`.
      freeze_scale: as in `coupled`.
      statistics: as in `coupled`.

    Returns:
      A transformation. Its `update` takes three more arguments: the `gradients` and the
      `inner_state` of an optimizer before it, and what was `fused`, if anything.
    """
    _check_arguments(rules, strength, curvature)
    period = steps_between(statistics)

    first = FirstState(rules, curvature, freeze_scale, statistics)

    def init(params):
        if not is_placeholder(params):
            _warn_of_rules(rules, params)
        return first_state(first, params)

    def update(
        updates,
        state,
        params=None,
        *,
        gradients=None,
        inner_state=None,
        fused: Fused | None = None,
        **extra_args,
    ):
        check_params(params)
        if fused is None:  # else it is checked, and the stepped parameters are left out
            check_parts(state, first, params)
        count, grids, source = state.cage_count, state.grids, state.curvature
        strength_now = value_at(strength, count)
        factor = step_size(count) * strength_now
        parameters = _parameters(rules, params, updates, grids, at_updated)
        measured, each = state.statistics, {}
        if period:
            measures = is_measured(period, count, strength_now, measured)
            measures, found, each = _errors_and_statistics(
                parameters, strength_now, count, measures, measured.previous_codes
            )
        else:
            found = _errors(parameters, strength_now, count)
        errors = {path: each.error for path, each in found.items()}
        if freeze_scale:
            grids = grids | {path: each.grid for path, each in found.items()}
        if curvature is not None:
            if fused is None:
                # Without an optimizer before it, the updates are the gradients.
                gradients = updates if gradients is None else gradients
                inputs = gradients, params, rules, inner_state, extra_args
                fused = Fused(
                    {}, *step_source(curvature, source, strength, count, *inputs)
                )
            source = fused.source
            errors = _weighted(curvature, source, fused.step, found)
        if period:
            for path, one in (fused.statistics if fused else {}).items():
                # A fused step measures in every step; compilers drop a known choice.
                new, old = one.codes, measured.previous_codes[path]
                codes = jnp.where(measures | (period == 1), new, old)
                each[path] = one._replace(codes=codes)
            weighted = list(errors.values()) if curvature is not None else ()
            measured = combine(measures, each, strength_now, factor, measured, weighted)

        def correct(path, quantizer, x, update):
            if path not in found:
                return update
            _, _, is_pulling, update = found[path]
            update = _pulled(update, factor, errors[path], is_pulling)
            # An optimizer that divides by the root reads the update several times.
            is_read_often = curvature is not None and curvature.times_root
            return _after(count >= 0, update) if is_read_often else update

        updates = rules.map(correct, params, updates)
        count = optax.safe_increment(count)
        return updates, CageState(count, grids, measured, source, state.rules)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class FirstState:
    """The first state of a correction as a function of the parameters; hashable."""

    rules: Rules
    curvature: Curvature | None
    freeze_scale: bool
    statistics: bool | int

    def __call__(self, params: Any) -> CageState:
        """Returns the state; nothing is fitted but for statistics and frozen grids."""
        quantized, curvature = self.rules.quantized(params), self.curvature
        if self.freeze_scale:
            _check_codes("freeze_scale", quantized)
        if self.statistics:
            _check_codes("statistics", quantized)
        return CageState(
            cage_count=jnp.zeros([], jnp.int32),
            grids=_unknown_grids(quantized) if self.freeze_scale else None,
            statistics=initial_statistics(quantized) if self.statistics else None,
            curvature=curvature and curvature.init(quantized),
            rules=remembered(quantized),
        )


def _parameters(rules, params, updates, grids, at_updated):
    """Returns a `_Parameter` for each quantized parameter with an update, by path."""
    found = {}
    for path, (quantizer, x, update) in rules.quantized(params, updates).items():
        if update is None:
            continue
        if at_updated:
            x = (x + update).astype(x.dtype)
        x = x.astype(compute_dtype(x.dtype))
        grid = grid_at(path, params, None)  # learned
        if grid is None and grids is not None:
            grid = grids[path]  # frozen, as in the state
        with path_in_errors(path):
            check_grid_given(quantizer, grid)
        found[path] = _Parameter(quantizer, x, update, grid)
    return found


def _errors(parameters, strength, count):
    """Returns the `_Error` of each parameter by path; none with a strength of 0."""
    if isinstance(strength, (int, float)) and strength == 0:
        return {}
    # With a constant strength, compilers would fold a condition without the count.
    is_pulling = (strength != 0) & (count >= 0)
    found = {}
    for path, (quantizer, x, update, grid) in parameters.items():
        is_pulling, reductions = reductions_if(is_pulling, x, quantizer, grid)
        error = error_elementwise(x, quantizer, reductions)
        found[path] = _Error(error, reductions.grid, is_pulling, update)
    return found


def _errors_and_statistics(parameters, strength, count, measures, previous_codes):
    """Returns whether the step is measured, all errors, and `ParameterStatistics`.

    Both share the rounding of a parameter. Each step waits for the one before, as in
    `reductions_if`, also the update: it is needed in memory for its norm.
    """
    is_pulling = (strength != 0) & (count >= 0)
    found, statistics = {}, {}
    for path, (quantizer, x, update, grid) in parameters.items():
        needed = is_pulling | measures
        done, reductions = reductions_if(needed, x, quantizer, grid, with_codes=True)
        update = _after(done == needed, update)
        measured, statistics[path] = parameter_statistics(
            measures & done, quantizer, x, update, reductions, previous_codes[path]
        )
        is_pulling &= done & (measured == measures)
        measures = measured
        kept = reductions.grid
        if grid is not None:  # a silent step freezes no grid
            kept = jax.tree.map(functools.partial(jnp.where, is_pulling), kept, grid)
        error = error_elementwise(x, quantizer, reductions)
        found[path] = _Error(error, kept, is_pulling, update)
    return measures, found, statistics


@jax.jit
def _after(done, update):
    """Returns an update; a CPU computes it once, and not before `done` is known.

    XLA computes a division once for all who need it, and everything else again for each
    of them. `done` is always true, which no compiler knows, and dividing by 1 is exact.
    """

    def divided(done, update):
        return divide(update, jnp.where(done, 1, 2).astype(update.dtype))

    return lax.platform_dependent(done, update, cpu=divided, default=lambda _, u: u)


@functools.partial(jax.jit, static_argnames=("quantizer", "with_codes"))
def reductions_if(is_pulling, x, quantizer, grid, with_codes=False):
    """Computes `error_reductions` if `is_pulling`, else zeros and the given grid.

    While silent, no extra pass over an array is made. Reductions and rotations are
    under this condition; the rest is elementwise and fuses with the optimizer and
    `apply_updates`. A condition around that part too would have to store the updates.

    It also returns `is_pulling`, for the next parameter to wait for. Otherwise the
    intermediate arrays of all parameters are in memory at once, and on a CPU fresh
    memory costs more than the work itself.
    """

    def compute():
        return True, error_reductions(x, quantizer, grid, with_codes)

    def skip():
        shapes = jax.eval_shape(
            lambda x: error_reductions(x, quantizer, grid, with_codes), x
        )
        # Made from `x`, so that in a `shard_map` they vary along the same mesh axes.
        zeros = jax.tree.map(
            lambda s: lax.full_like(x, 0, s.dtype, s.shape, s.sharding), shapes
        )
        return False, zeros if grid is None else zeros._replace(grid=grid)

    return lax.cond(is_pulling, compute, skip)


def _weighted(curvature, source, step, found):
    """Returns the weighted errors."""
    errors = {path: each.error for path, each in found.items()}
    if not found:
        return errors
    if curvature.is_elementwise:
        return curvature.weigh(errors, source, step)
    # Each parameter waited for the one before, so the last one's condition is for all.
    (*_, last) = found.values()
    return lax.cond(
        last.is_pulling,
        lambda: curvature.weigh(errors, source, step),
        lambda: errors,
    )


@jax.jit
def _pulled(update, factor, error, is_pulling):
    """Adds the pull of CAGE (arXiv 2510.18784) to an update: u + factor * e."""
    pulled = update.astype(error.dtype) + jnp.asarray(factor, error.dtype) * error
    return jnp.where(is_pulling, pulled.astype(update.dtype), update)


def check_params(params: Any) -> None:
    """Raises if `update` was not given the parameters."""
    if params is None:
        raise ValueError(
            "`params` must be given to `update`, which reads them; got None. Use "
            "tx.update(updates, state, params)."
        )


def _check_arguments(rules, strength, curvature):
    check_rules(
        rules,
        " An optimizer is not an argument of `coupled`: use optax.chain(coupled(rules, "
        "strength=...), optimizer), or decoupled(optimizer, rules, learning_rate=..., "
        "strength=...)."
        if is_optimizer(rules)
        else "",
    )
    check_strength(strength)
    if not isinstance(curvature, Curvature | None):
        called = " Call the source, with ()." if callable(curvature) else ""
        raise TypeError(
            f"`curvature` must be a source of `cage_jax.curvature`, or None; got "
            f"{curvature!r}.{called} Use curvature.hutchinson(), for example."
        )


def check_parts(state: CageState, first: FirstState, params: Any) -> None:
    """Raises unless a state has what this correction needs for these parameters."""
    needed = {
        "grids": first.freeze_scale,
        "statistics": first.statistics,
        "curvature": first.curvature is not None,
    }
    for field, is_needed in needed.items():
        if is_needed and getattr(state, field) is None:
            option = "freeze_scale" if field == "grids" else field
            raise ValueError(
                f"`state` must come from this optimizer's `init`; got one without "
                f"`{option}`. Use tx.init(params), with the `cage_count` of the other "
                f"state to go on from there, or leave `{option}` out."
            )
    others: dict[str, Any] = {
        f: None for f, is_needed in needed.items() if not is_needed
    }
    check_state(state._replace(**others), first, params)
    check_remembered(state.rules, first.rules.quantized(params))


def _warn_of_rules(rules, params):
    """Warns of rules that match nothing, and of a table that quantizes nothing."""
    unused = rules.why_unused(params)
    if rules.quantized(params):
        for text in unused:
            warn(text)
        return
    so = ", so CAGE has nothing to pull"
    if not jax.tree.leaves(params):
        so += ": `params` has no array in it, so check what `wrt` selects"
    warn(nothing_quantized(rules, params, so))


def _check_codes(name, quantized):
    for path, (quantizer, _) in quantized.items():
        with path_in_errors(path):
            check_has_codes(quantizer, name)


def _unknown_grids(quantized):
    # Zeros made from fitted grids, so that they have the shardings of later grids.
    grids = {path: fit_grid(x, quantizer) for path, (quantizer, x) in quantized.items()}
    return jax.tree.map(jnp.zeros_like, grids)
