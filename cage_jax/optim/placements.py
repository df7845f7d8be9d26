"""CAGE as Optax transformations: coupled, decoupled, and the reference's order.

Where the correction goes::

    coupled      gradient -> (+ lambda e) -> optimizer -> -learning rate -> update
                 chain(coupled(rules, learning_rate=lr, total_steps=n), optax.adam(lr))
                 chain(coupled(rules, strength=strength), optax.sgd(lr))

    decoupled    gradient -> optimizer -> (+ lambda e) -> -learning rate -> update
                 decoupled(optax.adamw(lr), rules, learning_rate=lr, total_steps=n)

    post-step    gradient -> optimizer -> -learning rate -> update, then x - lr lambda e
                 post_step(optax.adamw(lr), rules, learning_rate=lr, total_steps=n)

`e = x - Q(x)` is the quantization error, `lambda` the strength. Never
`optax.chain(optax.adam(lr), coupled(...))`: after `adam(lr)` the updates are
already scaled by -lr, so the pull has the wrong sign and size, and `coupled` cannot
detect this.
"""

import math

import optax

from cage_jax.arrays.checks import warn
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import nodes_of_type
from cage_jax.core.rules import Rules
from cage_jax.optim.correction import CageState, check_params, correction
from cage_jax.optim.curvature.source import Curvature
from cage_jax.optim.recommended import resolve_strength
from cage_jax.optim.schedules import (
    ScalarOrSchedule,
    check_learning_rate,
    is_optimizer,
    value_at,
)


@names_checked
def coupled(
    rules: Rules,
    *,
    strength: ScalarOrSchedule | None = None,
    learning_rate: ScalarOrSchedule | None = None,
    total_steps: int | None = None,
    curvature: Curvature | None = None,
    freeze_scale: bool = False,
    statistics: bool | int = False,
) -> optax.GradientTransformationExtraArgs:
    """Adds `strength * (x - Q(x))` to the updates: the coupled CAGE correction.

    It belongs before the learning rate: at the front of a chain (coupled), or between
    an optimizer's direction and `optax.scale_by_learning_rate` (decoupled). After a
    learning rate this transformation is wrong and cannot detect it. For a ready-made
    optimizer use `decoupled` or `post_step`, for AdamW `cage_adamw`.

    Adam and its relatives divide the pull by the root of mean squared gradients. Before
    them, give `learning_rate` and `total_steps`: the pull is then the recommended one,
    multiplied by that root, and there is nothing to tune. Parameters whose gradients
    are 0 are not pulled then. Before an optimizer that does not divide, such as SGD,
    give a `strength`; strengths and doses are there those of `decoupled`.

    The error is computed in float32 and the updates keep their dtype. While the
    strength is 0 no scale is computed and nothing is rotated (except under `jax.vmap`
    of the state, or in a step that `statistics` measures), and the updates pass through
    unchanged, to the bit.

    Args:
      rules: which parameters are quantized, and how.
      strength: lambda, a number or a schedule of the step count; None for the
        recommended pull before Adam.
      learning_rate: in place of `strength`, that of the optimizer, a number or a
        schedule.
      total_steps: in place of `strength`, the length of the training in optimizer
        updates; under `optax.MultiSteps` that is batches divided by
        `every_k_schedule`. The pull is that of `recommended(..., coupled=True)`.
      curvature: a source from `cage_jax.curvature` that weights the error; None for no
        weighting, the published form, or with `total_steps` for the recommended one. A
        source that needs more than gradients gets it through `update`, such as
        `obj_fn=loss`.
      freeze_scale: keep the grid of each parameter as it is when the pull begins, so
        that a quantizer that is not idempotent does not drift. Use the same grids in
        the forward pass and for the shipped codes: `fake_quant(params, rules,
        grid=grids)` and `quantize(params, rules, grid=grids)` with
        `grids = tree_get(state, "grids")`.
      statistics: keep `CageStatistics` in the state. True measures every step, a
        number `n` every n-th step and the one in which the pull begins; in between,
        the state keeps the last numbers. A measured step quantizes, even while the
        strength is 0. Codes take one byte a parameter.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError, ValueError: for arguments of the wrong kind, for a strength that is
        negative or NaN, for a `strength` that comes with a learning rate, a number of
        steps, or both missing; in `update` without `params`.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> import optax
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> tx = optax.chain(cage.coupled(rules, strength=0.5), optax.sgd(1.0))
      >>> params = {"kernel": jnp.array([[0.5], [-3.5], [1.25]])}
      >>> gradients = {"kernel": jnp.zeros((3, 1))}
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> updates["kernel"].ravel().tolist()
      [-0.0, -0.0, -0.125]

      Before Adam, with nothing to tune:

      >>> pull = cage.coupled(rules, learning_rate=1e-3, total_steps=1000)
      >>> tx = optax.chain(pull, optax.adam(1e-3))

    Source: CAGE, arXiv 2510.18784, the coupled form; the multiplication by the root
    before Adam is our own, see benchmarks/README.md.
    """
    if (learning_rate is None) != (total_steps is None):
        given, missing = "learning_rate", "total_steps"
        if learning_rate is None:
            given, missing = missing, given
        raise TypeError(
            f"`{missing}` must come with `{given}`; got `{given}` alone. Use "
            f"coupled(rules, learning_rate=lr, total_steps=n) before Adam, or a "
            f"strength before SGD."
        )
    if learning_rate is not None:
        check_learning_rate(learning_rate)
        if curvature is not None:
            raise ValueError(
                "`curvature` must be None if `total_steps` is given, because the pull "
                "is scaled for Adam by the recommended one; got a source. Leave one of "
                "them out."
            )
    strength, curvature = resolve_strength(
        learning_rate, strength, total_steps, curvature, coupled=True
    )
    return correction(
        rules,
        strength,
        lambda count: 1.0,
        at_updated=False,
        curvature=curvature,
        freeze_scale=freeze_scale,
        statistics=statistics,
    )


cage = coupled


@names_checked
def decoupled(
    inner: optax.GradientTransformation,
    rules: Rules,
    *,
    learning_rate: ScalarOrSchedule,
    strength: ScalarOrSchedule | None = None,
    total_steps: int | None = None,
    curvature: Curvature | None = None,
    freeze_scale: bool = False,
    statistics: bool | int = False,
) -> optax.GradientTransformationExtraArgs:
    """Adds the decoupled CAGE correction to any ready-made optimizer.

    x <- x + inner(gradient) - learning_rate * strength * (x - Q(x)), with the error at
    the weights before the step.

    Args:
      inner: an optimizer with its learning rate, such as `optax.contrib.muon(lr)`.
        Gradient clipping belongs before this transformation or inside `inner`.
      rules: which parameters are quantized, and how.
      learning_rate: the learning rate of `inner`, a number or a schedule.
      strength: lambda, a number or a schedule of the step count; None for the
        recommended schedule of `total_steps`.
      total_steps: length of the training in optimizer updates, in place of `strength`;
        under `optax.MultiSteps` that is batches divided by `every_k_schedule`.
        Strength and curvature are then those of `recommended`.
      curvature: as in `coupled`.
      freeze_scale: as in `coupled`.
      statistics: as in `coupled`.

    Returns:
      A transformation with the state `(inner's state, CageState)`.

    Raises:
      TypeError, ValueError: as in `coupled`, and for an `inner` that already has a
        correction.

    Example:
      >>> import cage_jax as cage
      >>> import optax
      >>> rules = cage.Rules([(r".*kernel", cage.int4(group_size=32))])
      >>> lion = optax.lion(1e-3)
      >>> tx = cage.decoupled(lion, rules, learning_rate=1e-3, total_steps=1000)
      >>> strength = cage.silence_then_ramp(1000)
      >>> tx = cage.decoupled(lion, rules, learning_rate=1e-3, strength=strength)

    Source: CAGE, arXiv 2510.18784, the decoupled form, the paper's default.
    """
    _check_inner("decoupled", inner)
    check_learning_rate(learning_rate)
    strength, curvature = resolve_strength(
        learning_rate, strength, total_steps, curvature
    )
    _check_share(learning_rate, strength)
    pull = correction(
        rules,
        strength,
        lambda count: -value_at(learning_rate, count),
        at_updated=False,
        curvature=curvature,
        freeze_scale=freeze_scale,
        statistics=statistics,
    )
    return _then_pull("decoupled", inner, pull)


@names_checked
def post_step(
    inner: optax.GradientTransformation,
    rules: Rules,
    *,
    learning_rate: ScalarOrSchedule,
    strength: ScalarOrSchedule | None = None,
    total_steps: int | None = None,
    curvature: Curvature | None = None,
    freeze_scale: bool = False,
    statistics: bool | int = False,
) -> optax.GradientTransformationExtraArgs:
    """Adds CAGE to any ready-made optimizer, in the order of the authors' PyTorch code.

    x' = x + inner(gradient), then x <- x' - learning_rate' * strength * (x' - Q(x')).
    The error is taken at the weights after the update and its weight decay. The
    learning rate is that of the *next* step, since the authors' code steps its
    scheduler in between.

    Args:
      inner: an optimizer with its learning rate, such as `optax.adamw(lr)`.
      rules: which parameters are quantized, and how.
      learning_rate: the learning rate of `inner`, a number or a schedule. Under
        `optax.inject_hyperparams` it is this step's number, not the next one's.
      strength: as in `decoupled`.
      total_steps: as in `decoupled`.
      curvature: as in `coupled`.
      freeze_scale: as in `coupled`.
      statistics: as in `coupled`.

    Returns:
      A transformation with the state `(inner's state, CageState)`.

    Raises:
      TypeError, ValueError: as in `decoupled`.

    Example:
      >>> import cage_jax as cage
      >>> import optax
      >>> rules = cage.Rules([(r".*kernel", cage.quest(4))])
      >>> adamw = optax.adamw(1e-3)
      >>> tx = cage.post_step(adamw, rules, learning_rate=1e-3, total_steps=1000)

      With the paper's strength:

      >>> strength = cage.silence_then_ramp(1000)
      >>> tx = cage.post_step(adamw, rules, learning_rate=1e-3, strength=strength)

    Source: the reference implementation of CAGE, arXiv 2510.18784.
    """
    _check_inner("post_step", inner)
    check_learning_rate(learning_rate)
    strength, curvature = resolve_strength(
        learning_rate, strength, total_steps, curvature
    )
    _check_share(learning_rate, strength)
    pull = correction(
        rules,
        strength,
        lambda count: -value_at(learning_rate, optax.safe_increment(count)),
        at_updated=True,
        curvature=curvature,
        freeze_scale=freeze_scale,
        statistics=statistics,
    )
    return _then_pull("post_step", inner, pull)


def _check_inner(name, inner):
    if not is_optimizer(inner):
        got = type(inner).__name__ if isinstance(inner, Rules) else repr(inner)
        raise TypeError(
            f"`inner` must be an optimizer; got {got}. The optimizer comes first: "
            f"{name}(optax.adamw(lr), rules, learning_rate=lr, total_steps=steps)."
        )


def _check_share(learning_rate, strength):
    numbers = int, float
    if isinstance(learning_rate, numbers) and isinstance(strength, numbers):
        share = learning_rate * strength
        if 1 <= share < math.inf:
            warn(
                f"`strength` should be below 1 / learning_rate; got {strength:g}, with "
                f"which each step moves a weight by {share:.3g} of its distance to the "
                f"grid. For a length of the training write total_steps=..., for a "
                f"dose ramp_to_dose(learning_rate, steps).",
            )


def _then_pull(name, inner, pull):
    """Runs `inner`, then the correction `pull` on its updates."""
    both = optax.chain(inner, pull)
    inner_with_extra_args = optax.with_extra_args_support(inner)

    def init(params):
        state = both.init(params)
        if len(nodes_of_type(state, CageState)) > 1:
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
                f"`state` must be the pair that `init` returns, of `inner` and of the "
                f"correction; got a {type(state).__name__} without CAGE. To go on from "
                f"the state of the optimizer without CAGE use "
                f"cage.init_from(tx, params, state); a checkpoint that is restored as "
                f"lists and dicts needs tx.init(params) as what it is restored like."
            )
        gradients, (inner_state, cage_state) = updates, state
        updates, inner_state = inner_with_extra_args.update(
            updates, inner_state, params, **extra_args
        )
        updates, cage_state = pull.update(
            updates,
            cage_state,
            params,
            gradients=gradients,
            inner_state=inner_state,
            **extra_args,
        )
        return updates, (inner_state, cage_state)

    return optax.GradientTransformationExtraArgs(init, update)
