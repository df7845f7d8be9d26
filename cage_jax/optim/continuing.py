"""The way from a training without CAGE to one with it, and from rules to others."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

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
from cage_jax.core.rules import Rules, check_rules
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


@names_checked
def move_state(
    tx: optax.GradientTransformation,
    params: Any,
    state: Any,
    *,
    old_rules: Rules,
    new_rules: Rules,
) -> Any:
    """Returns a state of `tx` that goes on from one of the same optimizer, other rules.

    For a layer more or less, other groups or bits. Kept are counts, moments, and of
    each parameter whose quantizer and shape stayed the same, what is known of it by its
    path: its frozen grid, its codes, what `cage_jax.contrib` keeps. For other
    parameters these begin as in `tx.init`, moments only where the shape is another one.
    If any quantizer is another one, so do the averages of a curvature, which the
    recommended one fills in ten steps, and the numbers of `statistics`. A frozen grid
    begins unknown, and is found in the next step with a pull.

    Moments that begin at 0 beside a count that goes on are not debiased: with Adam, the
    first steps of a new parameter are up to three times as long.

    Args:
      tx: the transformation with the new rules.
      params: the parameters at present.
      state: the state with the old rules, after its last step.
      old_rules, new_rules: the rules of the two.

    Returns:
      A state for `tx.update`. It holds arrays of `state`, not copies.

    Raises:
      TypeError: for arguments in another order, and for anything but `Rules`.
      ValueError: if `state` is not that of the same optimizer, by name.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> params = {"up": jnp.ones((64, 32)), "down": jnp.ones((32, 64))}
      >>> old, new = cage.Rules([("up", "int4")]), cage.Rules([("up|down", "int4")])
      >>> state = cage.cage_adamw(1e-3, old, total_steps=1000).init(params)  # ... train
      >>> tx = cage.cage_adamw(1e-3, new, total_steps=1000)
      >>> state = cage.move_state(tx, params, state, old_rules=old, new_rules=new)
    """
    _check_order(tx, params)
    for rules in (old_rules, new_rules):
        check_rules(rules)
    fresh = tx.init(params)
    new, old = _by_place(fresh), _by_place(state)
    _check_names(
        _of_optimizer(new),
        _of_optimizer(old),
        "the optimizer in `tx`, with CAGE",
        "Give `tx` the options of that optimizer; from a state without CAGE use "
        "cage.init_from(tx, params, state).",
    )

    def is_alike(place):
        return place in new and place in old and _kind(new[place]) == _kind(old[place])

    def is_same(path):
        return old_rules.match(path) == new_rules.match(path)

    all_same = all(map(is_same, new_rules.quantized(params)))
    all_same &= all(is_alike(place) for place in {**new, **old} if place.is_of_all)

    def stays(place):
        if place.is_of_all:
            return all_same
        return is_alike(place) and (place.path is None or is_same(place.path))

    leaves = [old[place] if stays(place) else leaf for place, leaf in new.items()]
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def _of_optimizer(places):
    """Returns the fields of a state's arrays, which its optimizer decides, in order."""
    fields = dict.fromkeys(place.fields for place in places if place.path is None)
    optional = "CageState.curvature", "CageState.statistics"
    return ["/".join(each) for each in fields if not set(optional) & set(each)]


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
    return "/".join(name for name, _ in _steps(state, keys))


def _steps(state: Any, keys: KeyPath) -> Iterator[tuple[str, Any]]:
    """Yields the names of keys, with the named tuple if it is a key of one.

    Places in a chain have no name.
    """
    for key in keys:
        node, state = state, _at(state, key)
        if isinstance(node, tuple) and isinstance(key, GetAttrKey):
            yield f"{type(node).__name__}.{key.name}", node
        elif not (isinstance(node, tuple) and isinstance(key, SequenceKey)):
            yield name_of(key), None


def _at(state, key):
    """Returns what is at a key of a named tuple, a chain or a dict, else None."""
    match key:
        case GetAttrKey(name=name) if isinstance(state, tuple):
            return getattr(state, name)
        case SequenceKey(idx=index) if isinstance(state, tuple):
            return state[index]
        case DictKey(key=name) if isinstance(state, dict):
            return state[name]
    return None


class _Place(NamedTuple):
    """Where an array of a state is.

    Attributes:
      keys: the keys that lead there.
      fields: the fields of named tuples among them, such as "ScaleByAdamState.mu".
      path: the parameter's path, if one of these fields is a dict by path.
    """

    keys: KeyPath
    fields: tuple[str, ...]
    path: str | None

    @property
    def is_of_all(self) -> bool:
        """Whether it belongs to all quantized parameters together."""
        if "CageState.curvature" in self.fields:
            return True
        return "CageState.statistics" in self.fields and self.path is None


def _by_place(state) -> dict[_Place, Any]:
    found = {}
    for keys, leaf in tree_flatten_with_path(state)[0]:
        fields, path, by_path = [], None, False
        for name, node in _steps(state, keys):
            if node is not None:
                fields.append(name)
                field = type(node).__annotations__.get(name.partition(".")[2])
                by_path = (
                    "dict[str" in str(field) and "cage_jax" in type(node).__module__
                )
            elif by_path and path is None:
                path = name
        found[_Place(keys, tuple(fields), path)] = leaf
    return found


def _check_alike(needed, given):
    names, others = ([name for name, _ in each] for each in (needed, given))
    remedy = "Give `tx` the options of that optimizer, such as a schedule as the "
    remedy += "learning rate."
    _check_names(names, others, "the optimizer in `tx`, without CAGE", remedy)
    for (name, new), (_, old) in zip(needed, given):
        if _kind(new) != _kind(old):
            raise ValueError(
                f"`state` must be that of these parameters; got {name} with "
                f"{_kind(old)}, not {_kind(new)}. Give the parameters that it was made "
                f"for, and `tx` the same dtypes."
            )


def _check_names(names, others, what, remedy):
    """Raises if the names in a state are others than those that there must be."""
    if names == others:
        return
    names, others = Counter(names), Counter(others)
    told = [
        f"{verb} {', '.join([*found][:3])}{' and more' * (len(found) > 3)}"
        for verb, found in (("lacks", names - others), ("has", others - names))
        if found
    ]
    raise ValueError(
        f"`state` must be that of {what}; got one that "
        f"{', and '.join(told) or 'has the same in another order'}. {remedy}"
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
