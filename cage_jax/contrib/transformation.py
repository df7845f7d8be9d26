"""What the transformations share: checks, the count of steps, the way to a leaf."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from cage_jax.arrays.checks import warn
from cage_jax.core.rules import Rules, check_rules, nothing_quantized
from cage_jax.optim.correction import check_params
from cage_jax.optim.states import check_state, first_state, is_placeholder


def transformation(
    rules: Rules,
    state_type: type,
    step: Callable[[Any, Any, Any], Callable],
    init: Callable[[dict, Any], tuple] = lambda quantized, params: (),
) -> optax.GradientTransformationExtraArgs:
    """Creates a transformation of the updates of quantized parameters.

    Args:
      rules: which parameters are quantized, and how.
      state_type: a named tuple of the number of steps done, and of dicts by path.
      step: maps the state before the step, the state after it, whose dicts it may
        change, and the parameters to a function of path, quantizer, parameter and
        update, which returns the new update. Parameters without an update keep none.
      init: maps `rules.quantized(params)` and the parameters to the dicts.
    """
    check_rules(rules)

    def first(params):
        dicts = init(rules.quantized(params), params)
        return state_type(jnp.zeros([], jnp.int32), *dicts)

    def init_state(params):
        if not rules.quantized(params) and not is_placeholder(params):
            warn(nothing_quantized(rules, params, ", so there is nothing to do"))
        return first_state(first, params)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check_params(params)
        check_state(state, first, params)
        count, *dicts = state
        after = state_type(optax.safe_increment(count), *map(dict, dicts))
        function = step(state, after, params)
        updates = rules.map(
            lambda path, quantizer, x, update: (
                None if update is None else function(path, quantizer, x, update)
            ),
            params,
            updates,
        )
        return updates, after

    return optax.GradientTransformationExtraArgs(init_state, update)
