"""Whether a state is that of these rules and parameters: its paths, parts and shapes.

All that transformations keep by path is checked here, while a step is traced. A digest
of the rules is not kept. As an array it could not be compared under `jax.jit`, where
its value is not known. As a static part of the state it would not be in checkpoints,
whose readers take such parts from the tree to restore into.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.tree_util import DictKey, KeyPath, tree_flatten_with_path

from cage_jax.arrays.paths import name_of


def first_state(init: Callable[[Any], Any], params: Any) -> Any:
    """Returns `init(params)`, in one compiled program for all inits that are equal.

    Args:
      init: maps parameters to the first state; hashable.
      params: the parameters.
    """
    return _first(init, _arrays(params))


def check_state(state: Any, init: Callable[[Any], Any], params: Any) -> None:
    """Raises unless a state has the paths, parts and shapes of the first one.

    Nothing is computed, and the first state is traced once for parameters of the same
    shapes.

    Raises:
      ValueError: for another state, with what it lacks, has or has in another shape.
    """
    wanted, found = _leaves(_first.eval_shape(init, _arrays(params))), _leaves(state)
    lacks, extra = _told(wanted, found), _told(found, wanted)
    told = [
        f"{verb} {', '.join(names[:3])}{' and more' * (len(names) > 3)}"
        for verb, names in (("lacks", lacks), ("has", extra))
        if names
    ]
    told = (
        told
        or [
            f"has shape {np.shape(found[keys])}, not {leaf.shape}, at {_name(keys)}"
            for keys, leaf in wanted.items()
            if np.shape(found[keys]) != leaf.shape
        ][:1]
    )
    if told:
        raise ValueError(
            f"`state` must be that of these rules and parameters; it "
            f"{' and '.join(told)}. Use those that it was made with, or "
            f"cage.move_state(tx, params, state, old_rules=..., new_rules=...)."
        )


@functools.partial(jax.jit, static_argnums=0)
def _first(init, params):
    return init(params)


def _arrays(params):
    """Leaves out what is no array, such as a function in an Equinox module."""
    return jax.tree.map(
        lambda x: x if hasattr(x, "dtype") or isinstance(x, int | float) else None,
        params,
    )


def _leaves(state) -> dict[KeyPath, Any]:
    return dict(tree_flatten_with_path(state)[0])


def _told(leaves, others) -> list[str]:
    """Names the leaves that others lack: a whole parameter by its path."""
    theirs = {_path(keys) for keys in others}
    missing = (keys for keys in leaves if keys not in others)
    names: dict[str, None] = {}
    for keys in missing:
        path = _path(keys)
        names[_name(keys) if path is None or path in theirs else path] = None
    return list(names)


def _path(keys: KeyPath) -> str | None:
    """Returns the parameter's path in the keys of a leaf, or None."""
    return next((str(key.key) for key in keys if isinstance(key, DictKey)), None)


def _name(keys):
    return "/".join(map(name_of, keys))
