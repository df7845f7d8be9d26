"""Paths of parameters as strings that are the same in every framework."""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.tree_util import (
    DictKey,
    FlattenedIndexKey,
    GetAttrKey,
    KeyPath,
    SequenceKey,
    keystr,
    tree_flatten_with_path,
)


def flatten_with_paths(
    tree: Any, leaf_types: type | tuple[type, ...] = ()
) -> tuple[list[str], list[Any], Any]:
    """Flattens a tree, with the path of each leaf as a string.

    The keys are joined by `/`. Dict keys, list indices and attributes look the same.
    Two things are left out, because they are not always there: the box around a
    variable (`.value` of an NNX variable or of Linen's `with_partitioning`), and
    Linen's leading collection name `params`. What `with_grids` made of Linen's
    variables has two of these names.

    Args:
      tree: any pytree.
      leaf_types: types of nodes that count as leaves.

    Returns:
      Paths such as "layers/0/attention/kernel", leaves, and the structure.

    Raises:
      ValueError: if two leaves have one path.
    """
    keys, leaves, structure = flatten_with_keys(
        tree, lambda node: isinstance(node, leaf_types)
    )
    if isinstance(tree, Mapping) and set(tree) == {"params", "grids"}:
        keys = [key[1:] if key[0] == DictKey("params") else key for key in keys]
    paths = [_joined(key_path) for key_path in keys]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        places = [keystr(k) for k, path in zip(keys, paths) if path == twice]
        raise ValueError(
            f"`{twice}`: paths must be unique; got {' and '.join(places[:2])}. Rename "
            f"one of them, or use one kind of key for both."
        )
    return paths, leaves, structure


def flatten_with_keys(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[KeyPath], list[Any], Any]:
    """Does `flatten_with_paths`, with JAX's own keys and with `params` kept."""

    def stop(node):
        return _is_box(node) or (is_leaf is not None and is_leaf(node))

    keys: list[KeyPath] = []
    for key_path, node in tree_flatten_with_path(tree, is_leaf=stop)[0]:
        if _is_box(node):  # its only key, such as `value`, is left out
            inside = tree_flatten_with_path(node, is_leaf)[0]
            keys += [(*key_path, *path[1:]) for path, _ in inside]
        else:
            keys.append(key_path)
    leaves, structure = jax.tree.flatten(tree, is_leaf)
    return keys, leaves, structure


def _is_box(node: Any) -> bool:
    """Tells whether `node` is Flax's box around one array, without importing Flax."""
    return any(
        kind.__name__ in ("Variable", "AxisMetadata")
        and kind.__module__.partition(".")[0] == "flax"
        for kind in type(node).__mro__
    )


def is_nnx_module(x: Any) -> bool:
    """Returns whether `x` is a Flax NNX module, a tree too; without importing Flax."""
    return any(
        base.__name__ == "Module" and base.__module__.startswith("flax.nnx")
        for base in type(x).__mro__
    )


def _joined(key_path: KeyPath) -> str:
    keys = list(key_path)
    if len(keys) > 1 and isinstance(keys[0], DictKey) and keys[0].key == "params":
        keys.pop(0)
    return "/".join(name_of(key) for key in keys)


def key_at(key: jax.Array, path: str) -> jax.Array:
    """Returns a random key for one path, the same whatever else is in the tree."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def nodes_of_type(tree: Any, kind: type) -> list[Any]:
    """Returns the nodes of one type, such as Adam's state in that of a chain."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


@contextlib.contextmanager
def path_in_errors(path: str) -> Iterator[None]:
    """Puts a parameter's path in front of an error about it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        # Subclasses, such as JAX's for tracers, do not take a message as the argument.
        kind = TypeError if isinstance(error, TypeError) else ValueError
        text, parameter = str(error), f"`{path}`: " if path else ""
        raise kind(text if text.startswith(parameter) else parameter + text) from error


def name_of(key: Any) -> str:
    """Returns a key of a tree as a string."""
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
        case GetAttrKey(name=name):
            return name
    return keystr((key,), simple=True)
