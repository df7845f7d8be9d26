"""Whether a state is that of these rules and parameters: its paths, parts and shapes.

All that transformations keep by path is checked here, while a step is traced. The rules
themselves are remembered in the keys of a dict without arrays. A digest in an array
could not be compared under `jax.jit`, where its value is not known, and static data of
a node would not be in checkpoints; keys are known while a step is traced and are in
every checkpoint, and they cost neither memory nor time in a step.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, KeyPath, tree_flatten_with_path

from cage_jax.arrays.paths import name_of

_REMEDY = (
    "Use those that it was made with, or "
    "cage.move_state(tx, params, state, old_rules=..., new_rules=...)."
)


def first_state(init: Callable[[Any], Any], params: Any) -> Any:
    """Returns `init(params)`, in one compiled program for all inits that are equal.

    Args:
      init: maps parameters to the first state; hashable.
      params: the parameters. With the placeholder of `optax.tree_map_params`, a number
        stands for each field, whatever is in it by path.
    """
    state = _first(init, _arrays(params))
    if is_placeholder(params):
        return type(state)(*(jnp.zeros([], jnp.int32) for _ in state))
    return state


def is_placeholder(params: Any) -> bool:
    """Tells whether it is what `optax.tree_map_params` has in place of parameters."""
    return type(params).__name__ == "_ParamsPlaceholder"


def remembered(quantized: Mapping[str, tuple]) -> dict[str, None]:
    """Returns what a state remembers of its rules, as keys.

    Args:
      quantized: a quantizer, and what follows it, for each parameter by path.
    """
    paths: dict[str, list[str]] = {}
    for path, (quantizer, *_) in quantized.items():
        paths.setdefault(str(quantizer), []).append(path)
    return {
        f"{text}: {len(each)} of {zlib.crc32(repr(sorted(each)).encode()):08x}": None
        for text, each in paths.items()
    }


def check_remembered(found: Any, quantized: Mapping[str, tuple]) -> None:
    """Raises ValueError if a state remembers other rules; None remembers nothing."""
    wanted = remembered(quantized)
    if found is not None and found.keys() != wanted.keys():
        raise ValueError(
            f"`state` must be that of these rules; it remembers "
            f"{_first_of(sorted(found.keys() - wanted.keys()))}, and these have "
            f"{_first_of(sorted(wanted.keys() - found.keys()))}. {_REMEDY}"
        )


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
        f"{verb} {_first_of(names)}"
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
            f"{' and '.join(told)}. {_REMEDY}"
        )


def _first_of(names):
    return (", ".join(names[:3]) or "nothing else") + " and more" * (len(names) > 3)


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
