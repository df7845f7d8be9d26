"""The way from a training without CAGE to one with it."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import (
    DictKey,
    GetAttrKey,
    KeyPath,
    SequenceKey,
    tree_flatten_with_path,
)

from cage_jax.arrays.checks import check_int
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import name_of, nodes_of_type
from cage_jax.optim.correction import CageState
from cage_jax.optim.schedules import is_optimizer


@names_checked
def init_from(
    tx: optax.GradientTransformation,
    params: Any,
    state: Any,
    *,
    steps_done: int | jax.Array | None = None,
) -> Any:
    """Returns a state of `tx` that goes on from one of the same optimizer without CAGE.

    Moments and counts are those of `state`. So `cage_adamw` goes on from `optax.adamw`
    or `optax.adam`, `cage_sgd` from `optax.sgd`, and `decoupled(x, ...)`,
    `post_step(x, ...)` and `optax.chain(coupled(...), x)` from any optimizer `x`; what
    is around them, such as clipping or `optax.MultiSteps`, must be around `x` too. With
    strength 0 the training goes on as it would have without CAGE, to the bit.

    The correction counts the steps that were done, too, as the optimizer's learning
    rate does. Its schedules begin with the first step of the training, and
    `total_steps` is the length of the whole training: after 6000 of 10000 steps the
    recommended pull, which begins in the middle, is on at once. For a silence that
    begins now, shift the schedule: `lambda count: strength(count - 6000)`.

    Args:
      tx: the transformation with CAGE.
      params: the parameters at present.
      state: the state of the optimizer without CAGE, after its last step.
      steps_done: how many steps it has done. Only needed if the state has no `count`,
        as that of SGD with a constant learning rate.

    Returns:
      A state for `tx.update`. It holds the arrays of `state`, not copies.

    Raises:
      ValueError: if `state` lacks something that `tx` needs or has something that it
        does not know, by name; if shapes or dtypes differ; if `tx` has no correction.
      TypeError: without `steps_done` if `state` has no count; for arguments in another
        order.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> import optax
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> adamw = optax.adamw(1e-3)
      >>> state = adamw.init(params)  # ... and train
      >>> rules = cage.Rules([(r".*kernel", "int4")])
      >>> tx = cage.cage_adamw(1e-3, rules, total_steps=1000)
      >>> state = cage.init_from(tx, params, state)
    """
    _check_order(tx, params)
    fresh, structure = jax.tree.flatten(tx.init(params), is_leaf=_is_cage)
    if not any(map(_is_cage, fresh)):
        raise ValueError(
            "`tx` must have a CAGE correction; got one without. Use cage_adamw, or "
            "decoupled(optimizer, rules, learning_rate=lr, total_steps=n)."
        )
    if nodes_of_type(state, CageState):
        raise ValueError(
            "`state` must be that of an optimizer without CAGE; got one that has a "
            "correction. If it has the options of `tx`, use it as it is."
        )
    named = _by_name(jax.tree.unflatten(structure, fresh))
    needed = [(name, leaf) for name, leaf in named if not _is_cage(leaf)]
    given = _by_name(state)
    _check_alike(needed, given)
    count = _count(given, steps_done)
    old = iter(jax.tree.leaves(state))
    leaves = [
        # A copy of the count, as no array may be donated twice.
        each._replace(cage_count=jnp.array(count, jnp.int32))
        if _is_cage(each)
        else next(old)
        for each in fresh
    ]
    return jax.tree.unflatten(structure, leaves)


def _check_order(tx, params):
    order = "The order is tx, params, state."
    if not is_optimizer(tx):
        got = type(tx).__name__
        raise TypeError(f"`tx` must be an optimizer with CAGE; got a {got}. {order}")
    for node in jax.tree.leaves(params, is_leaf=_is_of_optax):
        if _is_of_optax(node):
            got = type(node).__name__
            raise TypeError(
                f"`params` must be parameters; got an optimizer's state, with {got}. "
                f"{order}"
            )


def _is_of_optax(node):
    is_state = isinstance(node, tuple) and type(node).__module__.startswith("optax.")
    return is_state and not isinstance(node, optax.MaskedNode)


def _is_cage(node):
    return isinstance(node, CageState)


def _by_name(state):
    """Returns pairs of a name and an array, or of a name and a correction's state.

    An array of "ScaleByAdamState.mu/kernel" has that name wherever Adam is in a chain.
    """
    leaves, _ = tree_flatten_with_path(state, is_leaf=_is_cage)
    return [(_name(state, keys), leaf) for keys, leaf in leaves]


def _name(state: Any, keys: KeyPath) -> str:
    names: list[str] = []
    for i, key in enumerate(keys):
        if isinstance(state, tuple) and isinstance(key, GetAttrKey):
            names.append(f"{type(state).__name__}.{key.name}")
            state = getattr(state, key.name)
        elif isinstance(state, tuple) and isinstance(key, SequenceKey):
            state = state[key.idx]  # a place in a chain
        elif isinstance(state, dict) and isinstance(key, DictKey):
            names.append(name_of(key))
            state = state[key.key]
        else:
            names += map(name_of, keys[i:])
            break
    return "/".join(names)


def _check_alike(needed, given):
    names, others = ([name for name, _ in each] for each in (needed, given))
    if names != others:
        lacks, extra = (
            Counter(names) - Counter(others),
            Counter(others) - Counter(names),
        )
        told = [
            f"{verb} {', '.join([*found][:3])}{' and more' * (len(found) > 3)}"
            for verb, found in (("lacks", lacks), ("has", extra))
            if found
        ]
        raise ValueError(
            f"`state` must be that of the optimizer in `tx`, without CAGE; got one "
            f"that {', and '.join(told) or 'has the same in another order'}. Give `tx` "
            f"the options of that optimizer, such as a schedule as the learning rate."
        )
    for (name, new), (_, old) in zip(needed, given):
        if _kind(new) != _kind(old):
            raise ValueError(
                f"`state` must be that of these parameters; got {name} with "
                f"{_kind(old)}, not {_kind(new)}. Give the parameters that it was made "
                f"for, and `tx` the same dtypes."
            )


def _kind(x):
    return f"shape {np.shape(x)} and dtype {x.dtype}"


def _count(given, steps_done):
    if steps_done is not None:
        remedy = "Use the number of steps of the optimizer."
        check_int("steps_done", steps_done, remedy, least=0, or_array=True)
        return steps_done
    counts = [(name, x) for name, x in given if name.endswith(".count")]
    if not counts:
        raise TypeError(
            "`steps_done` must be given for a state without a count; got None. Use the "
            "number of steps that the optimizer has done."
        )
    # First that of the learning rate, which the pull is multiplied by, too.
    counts.sort(key=lambda pair: not pair[0].endswith("ScaleByScheduleState.count"))
    return counts[0][1]
