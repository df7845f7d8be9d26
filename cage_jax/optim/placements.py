"""CAGE as Optax transformations: coupled, decoupled, and the reference's order.

Where the correction goes::

    coupled      gradient -> (+ lambda e) -> optimizer -> -learning rate -> update
                 optax.chain(cage(rules, strength), optax.sgd(lr))

    decoupled    gradient -> optimizer -> (+ lambda e) -> -learning rate -> update
                 decoupled(optax.adamw(lr), rules, strength, lr)   # or cage_adamw(...)

    post-step    gradient -> optimizer -> -learning rate -> update, then x - lr lambda e
                 post_step(optax.adamw(lr), rules, strength, lr)

`e = x - Q(x)` is the quantization error, `lambda` the strength. Never
`optax.chain(optax.adam(lr), cage(...))`: after `adam(lr)` the updates are already
scaled by -lr, so the pull has the wrong sign and size, and `cage` cannot detect this.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cage_jax.arrays.exact import compute_dtype
from cage_jax.core.quantize import check_grid_given, grid_at
from cage_jax.core.rules import Rules, check_rules
from cage_jax.optim.curvature import Curvature, Step
from cage_jax.optim.recommended import resolve_strength
from cage_jax.optim.schedules import (
    ScalarOrSchedule,
    check_learning_rate,
    check_strength,
    is_optimizer,
    value_at,
)
from cage_jax.optim.statistics import CageStatistics, Seen, first, gathered, seen
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.rounding import (
    error_elementwise,
    error_reductions,
    fit_grid,
)


class CageState(NamedTuple):
    """State of the correction.

    Attributes:
      cage_count: the number of steps done, int32.
      grids: with `freeze_scale`, the grid of each quantized parameter by path. Its
        scale is 0 until the pull begins. Pass it to `fake_quant` and `quantize` as
        `grid`. None otherwise.
      statistics: with `statistics`, the statistics of the last step. None otherwise.
      curvature: with `curvature`, the state of that source. None otherwise.
    """

    cage_count: jax.Array
    grids: dict[str, Grid] | None
    statistics: CageStatistics | None
    curvature: Any = None


def cage(
    rules: Rules,
    strength: ScalarOrSchedule,
    *,
    curvature: Curvature | None = None,
    freeze_scale: bool = False,
    statistics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adds `strength * (x - Q(x))` to the updates: the coupled CAGE correction.

    It belongs before the learning rate: at the front of a chain (coupled), or between
    an optimizer's direction and `optax.scale_by_learning_rate` (decoupled). After a
    learning rate this transformation is wrong and cannot detect it. For a ready-made
    optimizer use `decoupled` or `post_step`, for AdamW `cage_adamw`.

    The error is computed in float32 and the updates keep their dtype. While the
    strength is 0 no scale is computed and nothing is rotated (except under `jax.vmap`
    of the state, or with `statistics`), and the updates pass through unchanged, to the
    bit.

    Args:
      rules: which parameters are quantized, and how.
      strength: lambda, a number or a schedule of the step count.
      curvature: a source from `cage_jax.curvature` that weights the error; None for no
        weighting, the published form. A source that needs more than gradients gets it
        through `update`, such as `obj_fn=loss`.
      freeze_scale: keep the grid of each parameter as it is when the pull begins, so
        that a quantizer that is not idempotent does not drift. Use the same grids in
        the forward pass and for the shipped codes: `fake_quant(params, rules,
        grid=grids)` and `quantize(params, rules, grid=grids)` with
        `grids = tree_get(state, "grids")`.
      statistics: keep `CageStatistics` in the state; then every step quantizes.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError, ValueError: for arguments of the wrong kind, and for a strength that
        is negative or NaN; in `update` without `params`.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> import optax
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> tx = optax.chain(cage.cage(rules, 0.5), optax.sgd(1.0))
      >>> params = {"kernel": jnp.array([[0.5], [-3.5], [1.25]])}
      >>> gradients = {"kernel": jnp.zeros((3, 1))}
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> updates["kernel"].ravel().tolist()
      [-0.0, -0.0, -0.125]

    Source: CAGE, arXiv 2510.18784, the coupled form.
    """
    return _correction(
        rules,
        strength,
        lambda count: 1.0,
        at_updated=False,
        curvature=curvature,
        freeze_scale=freeze_scale,
        statistics=statistics,
    )


def decoupled(
    inner: optax.GradientTransformation,
    rules: Rules,
    strength: ScalarOrSchedule | None = None,
    learning_rate: ScalarOrSchedule = None,  # type: ignore[assignment]
    *,
    total_steps: int | None = None,
    curvature: Curvature | None = None,
    freeze_scale: bool = False,
    statistics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adds the decoupled CAGE correction to any ready-made optimizer.

    x <- x + inner(gradient) - learning_rate * strength * (x - Q(x)), with the error at
    the weights before the step.

    Args:
      inner: an optimizer with its learning rate, such as `optax.contrib.muon(lr)`.
        Gradient clipping belongs before this transformation or inside `inner`.
      rules: which parameters are quantized, and how.
      strength: lambda, a number or a schedule of the step count; None for the
        recommended schedule of `total_steps`.
      learning_rate: the one of `inner`, a number or a schedule; it must be given.
      total_steps: length of the training in optimizer steps, in place of `strength`.
        Strength and curvature are then those of `recommended`.
      curvature: as in `cage`.
      freeze_scale: as in `cage`.
      statistics: as in `cage`.

    Returns:
      A transformation with the state `(inner's state, CageState)`.

    Raises:
      TypeError, ValueError: as in `cage`, and for an `inner` that already has a
        correction.

    Example:
      >>> import cage_jax as cage
      >>> import optax
      >>> rules = cage.Rules([(r".*kernel", cage.int4(group_size=32))])
      >>> strength = cage.silence_then_ramp(1000)
      >>> tx = cage.decoupled(optax.lion(1e-3), rules, strength, 1e-3)
      >>> lion = optax.lion(1e-3)
      >>> tx = cage.decoupled(lion, rules, learning_rate=1e-3, total_steps=1000)

    Source: CAGE, arXiv 2510.18784, the decoupled form, the paper's default.
    """
    _check_inner("decoupled", inner)
    check_learning_rate(learning_rate)
    strength, curvature = resolve_strength(
        learning_rate, strength, total_steps, curvature
    )
    _check_share(learning_rate, strength)
    correction = _correction(
        rules,
        strength,
        lambda count: -value_at(learning_rate, count),
        at_updated=False,
        curvature=curvature,
        freeze_scale=freeze_scale,
        statistics=statistics,
    )
    return _after("decoupled", inner, correction)


def post_step(
    inner: optax.GradientTransformation,
    rules: Rules,
    strength: ScalarOrSchedule | None = None,
    learning_rate: ScalarOrSchedule = None,  # type: ignore[assignment]
    *,
    total_steps: int | None = None,
    curvature: Curvature | None = None,
    freeze_scale: bool = False,
    statistics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adds CAGE to any ready-made optimizer, in the order of the authors' PyTorch code.

    x' = x + inner(gradient), then x <- x' - learning_rate' * strength * (x' - Q(x')).
    The error is taken at the weights after the update and its weight decay. The
    learning rate is that of the *next* step, since the authors' code steps its
    scheduler in between.

    Args:
      inner: an optimizer with its learning rate, such as `optax.adamw(lr)`.
      rules: which parameters are quantized, and how.
      strength: as in `decoupled`.
      learning_rate: the one of `inner`, a number or a schedule; it must be given. Under
        `optax.inject_hyperparams` it is this step's number, not the next one's.
      total_steps: as in `decoupled`.
      curvature: as in `cage`.
      freeze_scale: as in `cage`.
      statistics: as in `cage`.

    Returns:
      A transformation with the state `(inner's state, CageState)`.

    Raises:
      TypeError, ValueError: as in `decoupled`.

    Example:
      >>> import cage_jax as cage
      >>> import optax
      >>> rules = cage.Rules([(r".*kernel", cage.quest(4))])
      >>> lr = optax.warmup_cosine_decay_schedule(0, 1e-3, 100, 1000, 1e-4)
      >>> strength = cage.silence_then_ramp(1000)
      >>> tx = cage.post_step(optax.adamw(lr), rules, strength, lr)

    Source: the reference implementation of CAGE, arXiv 2510.18784.
    """
    _check_inner("post_step", inner)
    check_learning_rate(learning_rate)
    strength, curvature = resolve_strength(
        learning_rate, strength, total_steps, curvature
    )
    _check_share(learning_rate, strength)
    correction = _correction(
        rules,
        strength,
        lambda count: -value_at(learning_rate, optax.safe_increment(count)),
        at_updated=True,
        curvature=curvature,
        freeze_scale=freeze_scale,
        statistics=statistics,
    )
    return _after("post_step", inner, correction)


def _check_inner(name, inner):
    if not is_optimizer(inner):
        got = type(inner).__name__ if isinstance(inner, Rules) else repr(inner)
        raise TypeError(
            f"`inner` must be an optimizer; got {got}. The optimizer comes first: "
            f"{name}(optax.adamw(lr), rules, strength, lr)."
        )


def _check_share(learning_rate, strength):
    numbers = int, float
    if isinstance(learning_rate, numbers) and isinstance(strength, numbers):
        share = learning_rate * strength
        if 1 <= share < math.inf:
            warnings.warn(
                f"`strength` should be below 1 / learning_rate; got {strength:g}, with "
                f"which each step moves a weight by {share:.3g} of its distance to the "
                f"grid. For a length of the training write total_steps=..., for a "
                f"dose ramp_to_dose(learning_rate, steps).",
                stacklevel=3,
            )


def _after(name, inner, correction):
    """Runs `inner`, then `correction` on its updates."""
    both = optax.chain(inner, correction)
    first_of_both = optax.with_extra_args_support(inner)

    def init(params):
        state = both.init(params)
        if len(_cage_states(state)) > 1:
            raise ValueError(
                f"`inner` must be an optimizer without a CAGE correction; got one that "
                f"has it, and {name} would pull twice. Give {name} the plain optimizer."
            )
        return state

    def update(updates, state, params=None, **extra_args):
        check_params(params)  # before `inner` raises an error of its own
        if not (
            isinstance(state, tuple)
            and len(state) == 2
            and isinstance(state[1], CageState)
        ):
            raise ValueError(
                f"`state` must be that of `inner` and of the correction, as `init` "
                f"gives it; got a {type(state).__name__} without CAGE. To go on from "
                f"an optimizer's own state use (state, tx.init(params)[1])."
            )
        gradients, (inner_state, cage_state) = updates, state
        updates, inner_state = first_of_both.update(
            updates, inner_state, params, **extra_args
        )
        updates, cage_state = correction.update(
            updates,
            cage_state,
            params,
            gradients=gradients,
            inner_state=inner_state,
            **extra_args,
        )
        return updates, (inner_state, cage_state)

    return optax.GradientTransformationExtraArgs(init, update)


def check_params(params: Any) -> None:
    """Raises if `update` was not given the parameters."""
    if params is None:
        raise ValueError(
            "`params` must be given to `update`, since what it does depends on them; "
            "got None. Use tx.update(updates, state, params)."
        )


def _cage_states(state):
    def is_cage(part):
        return isinstance(part, CageState)

    return [part for part in jax.tree.leaves(state, is_leaf=is_cage) if is_cage(part)]


def _correction(
    rules: Rules,
    strength: ScalarOrSchedule,
    factor: Callable,
    *,
    at_updated: bool,
    curvature: Curvature | None,
    freeze_scale: bool,
    statistics: bool,
) -> optax.GradientTransformationExtraArgs:
    """Adds `factor(count) * strength * e` to the updates, for all placements.

    The factor is 1 or minus the learning rate. `at_updated` takes the error at
    `params + updates` rather than at `params`.
    """
    check_rules(
        rules,
        " An optimizer is not an argument of `cage`: use optax.chain(cage(rules, "
        "strength), optimizer), or decoupled(optimizer, rules, strength, "
        "learning_rate)."
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

    def point(x, update):
        """Returns the weights at which the error is taken, in float32 or wider."""
        if at_updated:
            x = (x + update).astype(x.dtype)
        return x.astype(compute_dtype(x.dtype))

    def init(params):
        quantized = rules.quantized(params)
        for name, asked in (("freeze_scale", freeze_scale), ("statistics", statistics)):
            if asked:
                _check_grids(name, quantized)
        unused = rules.why_unused(params)
        if not quantized:
            why = f" {unused[0][0].upper()}{unused[0][1:]}" if unused else ""
            if not jax.tree.leaves(params):
                why = " `params` has no array in it: does `wrt` select some?"
            warnings.warn(
                f"no parameter is quantized by {rules.in_words}, so CAGE has nothing "
                f"to pull."
                f"{why} Print rules.report(params) to see the paths.",
                stacklevel=2,
            )
        else:
            for text in unused:
                warnings.warn(text, stacklevel=2)
        return CageState(
            cage_count=jnp.zeros([], jnp.int32),
            grids=_unknown_grids(quantized) if freeze_scale else None,
            statistics=first(quantized) if statistics else None,
            curvature=curvature
            and curvature.init({path: x for path, (_, x) in quantized.items()}),
        )

    def check_kept(state):
        for name, asked, kept in (
            ("freeze_scale", freeze_scale, state.grids),
            ("statistics", statistics, state.statistics),
            ("curvature", curvature is not None, state.curvature),
        ):
            if asked and kept is None:
                raise ValueError(
                    f"`state` must be that of this optimizer; got one of an optimizer "
                    f"without `{name}`. Use that of its own init, which may get the "
                    f"`cage_count` of the other, or leave `{name}` out."
                )

    def update(
        updates,
        state,
        params=None,
        *,
        gradients=None,
        inner_state=None,
        seen_elsewhere: Mapping[str, Seen] | None = None,
        **extra_args,
    ):
        check_params(params)
        if gradients is None:
            gradients = updates  # no optimizer runs before the correction
        check_kept(state)
        count = state.cage_count
        level = value_at(strength, count)

        silent = isinstance(level, (int, float)) and level == 0
        # With a constant strength, compilers would fold a condition without the count.
        active = (level != 0) & (count >= 0)
        coefficient = factor(count) * level
        points, kept, errors = {}, {}, {}

        def pulled(update, error):
            pull = jnp.asarray(coefficient, error.dtype) * error
            found = update.astype(error.dtype) + pull
            return jnp.where(active, found.astype(update.dtype), update)

        def correct(path, quantizer, x, update):
            nonlocal active
            if update is None:
                return None
            x = point(x, update)
            points[path] = (quantizer, x, update)
            if silent:
                return update
            frozen = grid_at(path, params, None)  # learned
            if frozen is None and freeze_scale:
                frozen = state.grids[path]
            check_grid_given(quantizer, frozen)
            active, reductions = fit_if(active, x, quantizer, frozen)
            kept[path] = reductions.grid
            error = error_elementwise(x, quantizer, reductions)
            if curvature is None:
                return pulled(update, error)
            errors[path] = error
            return update

        updates = rules.map(correct, params, updates)
        source = state.curvature
        if curvature is not None:
            step = Step(gradients, params, rules, inner_state, extra_args)
            source = curvature.update(source, step)
            if errors:
                errors = lax.cond(
                    active,
                    lambda: curvature.weigh(errors, source, step),
                    lambda: errors,
                )
            updates = rules.map(
                lambda path, _, x, update: (
                    pulled(update, errors[path]) if path in errors else update
                ),
                params,
                updates,
            )
        grids = state.grids | kept if freeze_scale else None
        measured = state.statistics
        if statistics:
            each = {}
            for path, (quantizer, x, update) in points.items():
                grid = grid_at(path, params, None)
                if grid is None and grids is not None:
                    grid = grids[path]
                before = measured.previous_codes[path]
                each[path] = seen(quantizer, x, update, grid, before)
            each |= seen_elsewhere or {}
            measured = gathered(each, level, coefficient, measured, errors.values())
        count = optax.safe_increment(count)
        return updates, CageState(count, grids, measured, source)

    return optax.GradientTransformationExtraArgs(init, update)


@functools.partial(jax.jit, static_argnames="quantizer")
def fit_if(active, x, quantizer, frozen):
    """Computes `error_reductions` if `active`, else zeros and the frozen grid.

    While silent, no extra pass over an array is made. Reductions and rotations are
    under this condition; the rest is elementwise and fuses with the optimizer and
    `apply_updates`. A condition around that part too would have to store the updates.

    It also returns `active`, for the next parameter to wait for. Otherwise the
    intermediate arrays of all parameters are in memory at once, and on a CPU fresh
    memory costs more than the work itself.
    """

    def fit():
        return True, error_reductions(x, quantizer, frozen)

    def skip():
        zeros = _zeros(error_reductions, x, quantizer, frozen)
        return False, zeros if frozen is None else zeros._replace(grid=frozen)

    return lax.cond(active, fit, skip)


def _zeros(function, x, *args):
    """Returns zeros like `function`'s results, also in sharding, without running it."""
    shapes = jax.eval_shape(lambda x: function(x, *args), x)
    # Made from `x`, so that in a `shard_map` they vary along the same mesh axes.
    return jax.tree.map(
        lambda s: lax.full_like(x, 0, s.dtype, s.shape, s.sharding), shapes
    )


def _check_grids(name, quantized):
    for path, (quantizer, _) in quantized.items():
        if quantizer.scale.finds_values:
            raise ValueError(
                f"`{path}`: `{name}` must be False for a quantizer without a grid and "
                f"codes of its own; got {quantizer}. Leave it out."
            )


def _unknown_grids(quantized):
    # Zeros made from fitted grids, so that they have the shardings of later grids.
    grids = {path: fit_grid(x, quantizer) for path, (quantizer, x) in quantized.items()}
    return jax.tree.map(jnp.zeros_like, grids)
