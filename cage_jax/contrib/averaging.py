"""Averaging of the weights over the last steps, before they are rounded."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cage_jax.arrays.checks import check_int, check_number
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import nodes_of_type
from cage_jax.arrays.reprs import brief_repr
from cage_jax.optim.correction import check_params
from cage_jax.optim.states import check_state


@brief_repr
class AveragingState(NamedTuple):
    """State of the average.

    Attributes:
      averaging_count: steps done, int32.
      average: average of the parameters, float32 or wider; other dtypes keep their
        latest values.
    """

    averaging_count: jax.Array
    average: Any


@names_checked
def averaging(
    decay: float = 0.999, *, start: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Keeps an average of the weights; put it last, after the learning rate.

    The updates pass unchanged. Let `x_1 ... x_n` be the weights after the steps from
    `start` on. Their average is weighted by `decay ** (n - i)`, a moving average with
    Adam's bias correction. With `decay` 1 it is the plain mean (tail averaging). Before
    `start` it is the latest weights. It is kept in float32 (float64 for float64) and
    rounded only where it is used: `fake_quant(averaged(state), rules)`.

    Args:
      decay: factor in [0, 1] by which a step shrinks the weight of earlier steps.
      start: number of steps to leave out.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError, ValueError: for arguments out of range; in `update` without `params`,
        and for a state of other parameters.

    Example:
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> import optax
      >>> tx = optax.chain(optax.sgd(1.0), contrib.averaging(1.0, start=1))
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for _ in range(3):  # to 1, 2, 3
      ...     updates, state = tx.update(-jnp.ones(2), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> contrib.averaged(state)
      Array([2.5, 2.5], dtype=float32)

    Source: Polyak and Juditsky, 1992; SWA, arXiv 1803.05407.
    """
    remedy = "Use 0.999, or 1.0 for the plain mean."
    check_number("decay", decay, remedy, least=0, most=1)
    remedy = "Use the step at which averaging starts."
    check_int("start", start, remedy, least=0, or_array=True)

    def init(params):
        # Copied, so that parameters and state can be donated together.
        average = jax.tree.map(lambda x: jnp.copy(_wide(x)), params)
        return AveragingState(jnp.zeros([], jnp.int32), average)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check_params(params)
        check_state(state, init, params)
        count = optax.safe_increment(state.averaging_count)
        number = jnp.maximum(count - start, 1)
        share = _share(decay, number.astype(jnp.result_type(float)))

        def step(average, x):
            x = _wide(x)
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            moved = average + share.astype(average.dtype) * (x - average)
            return jnp.where(number == 1, x, moved)

        reached = jax.tree.map(
            lambda x, update: x if update is None else (x + update).astype(x.dtype),
            params,
            updates,
            is_leaf=lambda x: x is None,
        )
        average = jax.tree.map(step, state.average, reached)
        return updates, AveragingState(count, average)

    return optax.GradientTransformationExtraArgs(init, update)


@names_checked
def averaged(state: Any) -> Any:
    """Returns the average that `averaging` keeps in an optimizer's state.

    Args:
      state: the state of `averaging`, or of an optimizer that contains it.

    Returns:
      A tree like the parameters, float32 or wider. If the model needs its own dtype,
      cast it with `optax.tree.cast_like(average, params)`.

    Raises:
      ValueError: if the state does not have exactly one average.

    Example:
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> contrib.averaged(contrib.averaging().init({"kernel": jnp.ones(2)}))
      {'kernel': Array([1., 1.], dtype=float32)}
    """
    found = nodes_of_type(state, AveragingState)
    if len(found) != 1:
        raise ValueError(
            f"`state` must have one average; got {len(found)}. Pass the state "
            f"of optax.chain(optimizer, averaging())."
        )
    return found[0].average


def _wide(x):
    x = jnp.asarray(x)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(compute_dtype(x.dtype)) if floating else x


def _share(decay, number):
    """Computes (1 - decay) / (1 - decay**number), the latest weights' share."""
    if decay == 1:
        return 1 / number
    if decay == 0:
        return jnp.ones_like(number)
    rate = math.log(decay)
    return math.expm1(rate) / jnp.expm1(rate * number)
