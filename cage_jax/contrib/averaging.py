"""The average of the weights over the last steps, to be rounded once."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cage_jax.contrib.arguments import check_number, check_steps
from cage_jax.optim.placements import check_params
from cage_jax.quantizers.scales import compute_dtype


class AveragingState(NamedTuple):
    """State of the average.

    Attributes:
      averaging_count: steps done, int32.
      average: of the parameters, float32 or wider; what is not floating is the latest.
    """

    averaging_count: jax.Array
    average: Any


_DECAYS = "Use 0.999, or 1.0 for the plain mean."


def averaging(
    decay: float = 0.999, *, start: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Keeps an average of the weights; it belongs behind the learning rate, last.

    The updates pass as they are. With `x_1 ... x_n` the weights after the steps from
    `start` on, the average is their mean weighted by `decay ** (n - i)`, which is
    Adam's debiased one; with `decay` 1 it is the plain mean: tail averaging. Until
    `start` it is the latest weights. It is kept in float32 (float64 for float64), and
    rounded only where it is used: `fake_quant(averaged(state), rules)`.

    Args:
      decay: in [0, 1], what is left of a weight's share after one step.
      start: how many steps are left out.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError, ValueError: for arguments out of range; in `update` without `params`.

    Example:
      >>> from cage_jax import baselines
      >>> import jax.numpy as jnp
      >>> import optax
      >>> tx = optax.chain(optax.sgd(1.0), baselines.averaging(1.0, start=1))
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for _ in range(3):  # to 1, 2, 3
      ...     updates, state = tx.update(-jnp.ones(2), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> baselines.averaged(state)
      Array([2.5, 2.5], dtype=float32)

    Source: Polyak and Juditsky, 1992; SWA, arXiv 1803.05407.
    """
    check_number(decay, "decay", _DECAYS, most=1, known=True)
    check_steps(start, "start", 0, "Use the step from which on to average.")

    def init(params):
        # Copies, so that parameters and state can be donated together.
        average = jax.tree.map(lambda x: jnp.copy(_wide(x)), params)
        return AveragingState(jnp.zeros([], jnp.int32), average)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check_params(params)
        count = optax.safe_increment(state.averaging_count)
        number = jnp.maximum(count - start, 1)
        share = _share(decay, number.astype(jnp.result_type(float)))

        def step(average, x):
            x = _wide(x)
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            moved = average + share.astype(average.dtype) * (x - average)
            return jnp.where(number == 1, x, moved)

        average = jax.tree.map(step, state.average, _reached(params, updates))
        return updates, AveragingState(count, average)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged(state: Any) -> Any:
    """The average that `averaging` keeps, from the state of the whole optimizer.

    Args:
      state: of `averaging`, or of an optimizer with one inside.

    Returns:
      A tree like the parameters, float32 or wider. Cast it by
      `optax.tree.cast_like(average, params)` where the model wants its own dtype.

    Raises:
      ValueError: for a state without one average.

    Example:
      >>> from cage_jax import baselines
      >>> import jax.numpy as jnp
      >>> baselines.averaged(baselines.averaging().init({"kernel": jnp.ones(2)}))
      {'kernel': Array([1., 1.], dtype=float32)}
    """

    def is_ours(part):
        return isinstance(part, AveragingState)

    parts = jax.tree.leaves(state, is_leaf=is_ours)
    found = [part.average for part in parts if is_ours(part)]
    if len(found) != 1:
        raise ValueError(
            f"`state` must have one average; got {len(found)}. Use that of "
            f"optax.chain(optimizer, averaging())."
        )
    return found[0]


def _reached(params, updates):
    """The parameters after the updates, of which some may be None."""
    return jax.tree.map(
        lambda x, update: x if update is None else (x + update).astype(x.dtype),
        params,
        updates,
        is_leaf=lambda x: x is None,
    )


def _wide(x):
    x = jnp.asarray(x)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(compute_dtype(x.dtype)) if floating else x


def _share(decay, number):
    """(1 - decay) / (1 - decay**number), the weight of the last one of the mean."""
    if decay == 1:
        return 1 / number
    if decay == 0:
        return jnp.ones_like(number)
    rate = math.log(decay)
    return math.expm1(rate) / jnp.expm1(rate * number)
