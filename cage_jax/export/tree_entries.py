"""The JSON description of the leaves of a tree, in files and folders of any model.

It has an entry for each array, each `QuantizedArray` and each empty node:

    {"format": "cage_jax", "version": "1", "tree": {"layers/0/kernel": {
      "kind": "codes", "shape": [64, 32], "dtype": "float32", "quantizer": {...}}, ...}}
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from reprlib import repr as short
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import SequenceKey

from cage_jax.arrays.checks import check_byte_order
from cage_jax.arrays.paths import flatten_with_keys, name_of, path_in_errors
from cage_jax.arrays.sharding import devices_along
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.descriptions import describe, quantizer_of
from cage_jax.export.files import MalformedFileError, malformed

FORMAT, VERSION = "cage_jax", "1"

_DTYPES = {
    name: jnp.dtype(name)
    for name in (
        *("float16", "bfloat16", "float32", "float64"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
        *("int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64", "bool"),
    )
}
# Leaves of a tree that are not arrays.
_EMPTY: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "dict": dict,
    "list": list,
}
_MOST_KEYS = 64  # on the way to an array
_MOST_DIMENSIONS = 16
_MOST_NUMBERS = 2**48


def entries_of(codes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the description of each leaf and the leaves that are arrays, by path."""
    entries: dict[str, Any] = {}
    arrays = {}
    for path, keys, leaf in _flat(codes):
        if path in entries or len(keys) > _MOST_KEYS:
            raise ValueError(
                f"`{path}`: `codes` must have one array for each path, of at most "
                f"{_MOST_KEYS} keys; got {'two' if path in entries else len(keys)}. "
                f"Use other keys."
            )
        with path_in_errors(path):
            entry = _entry(leaf)
        if entry["kind"] not in _EMPTY:
            arrays[path] = leaf
        # The path alone is ambiguous for lists, and for keys that contain a "/".
        entries[path] = entry if path.split("/") == keys else entry | {"keys": keys}
    return entries, arrays


def _flat(tree: Any) -> Iterator[tuple[str, list[str | int], Any]]:
    """Yields the path, the keys and the value of each leaf."""
    for key_path, leaf in zip(*flatten_with_keys(tree, _is_leaf)[:2]):
        keys = [k.idx if isinstance(k, SequenceKey) else name_of(k) for k in key_path]
        yield "/".join(map(str, keys)), keys, leaf


def _is_leaf(node):
    empty = isinstance(node, dict | list | tuple) and not node
    return node is None or empty or isinstance(node, QuantizedArray)


def _entry(leaf):
    if leaf is None:
        return {"kind": "none"}
    if isinstance(leaf, dict | list | tuple):
        return {"kind": "dict" if isinstance(leaf, dict) else "list"}
    if not isinstance(leaf, QuantizedArray):
        check_byte_order("`codes`", leaf)
        dtype = getattr(leaf, "dtype", type(leaf).__name__)
        if str(dtype) not in _DTYPES:
            raise TypeError(
                f"`codes` must be QuantizedArrays, floats, ints and bools; got "
                f"{dtype}. Leave it out, or save jax.random.key_data of a key."
            )
        return {"kind": "array", "shape": list(leaf.shape), "dtype": str(dtype)}
    like = QuantizedArray.abstract(leaf.quantizer, leaf.shape, leaf.dtype)
    for name, part in parts_of(like).items():
        found = parts_of(leaf).get(name)
        if found is None or (found.shape, found.dtype) != (part.shape, part.dtype):
            raise ValueError(
                f"`{name}` must be {part.dtype} of shape {part.shape} for its "
                f"quantizer; got {found if found is None else found.shape}. Quantize "
                f"the whole array at once, or save its layers one by one."
            )
    return {
        "kind": "codes",
        "shape": list(leaf.shape),
        "dtype": str(jnp.dtype(leaf.dtype)),
        "quantizer": describe(like.quantizer),
    }


def parts_of(codes: QuantizedArray) -> dict[str, Any]:
    """Returns the arrays of a `QuantizedArray` by name."""
    names = ("codes", "scale", "zero_point", "offset", "tensor_divisor")
    parts = {name: getattr(codes, name) for name in names}
    return {name: part for name, part in parts.items() if part is not None}


def metadata_of(tree: Any) -> dict[str, Any]:
    """Adds format and version to the entries of a tree."""
    return {"format": FORMAT, "version": VERSION, "tree": tree}


def check_version(metadata: Mapping[str, Any], path: pathlib.Path) -> None:
    """Raises MalformedFileError for another format or version."""
    format, version = (str(metadata.get(name))[:80] for name in ("format", "version"))
    if format != FORMAT:
        raise malformed(
            f"{path.name} must be written by cage_jax.export.save or save_orbax",
            f"the format {format!r}",
            "Use the reader of its format.",
        )
    if version != VERSION:
        got = f"{version!r}: written by a newer version of cage_jax"
        raise malformed(f"{path.name} must have version {VERSION}", got, "Upgrade it.")


class Tree:
    """The checked description of a file's leaves.

    Attributes:
      like: each array by path, with `ShapeDtypeStruct`s in the place of data.
    """

    def __init__(self, entries: Any):
        if not isinstance(entries, dict):
            raise malformed("the tree must be an object", type(entries).__name__)
        self._keys: dict[str, list[str | int]] = {}
        self._empty: dict[str, Callable[[], Any]] = {}
        self.like: dict[str, Any] = {}
        for path, entry in entries.items():
            if not isinstance(entry, dict):
                raise _malformed(path, "its entry must be an object", entry)
            self._keys[path] = _keys_of(path, entry)
            kind = entry.get("kind")
            if isinstance(kind, str) and kind in _EMPTY:
                self._empty[path] = _EMPTY[kind]
            else:
                self.like[path] = _like(path, entry)
        self.build(self.like)  # which checks the keys

    def build(self, leaves: Mapping[str, Any]) -> Any:
        """Builds the tree from its leaves by path."""
        root = _Node()
        for path, keys in self._keys.items():
            leaf = leaves[path] if path in leaves else self._empty[path]()
            node, (*inner, last) = root, [None, *keys]
            for key in inner:
                node = node.setdefault(key, _Node())
                if not isinstance(node, _Node):
                    raise _malformed(
                        path, "an array cannot contain another array", keys
                    )
            if last in node:
                raise _malformed(path, "there must be one array for a path", keys)
            node[last] = leaf
        return _plain(root.get(None, {}))

    def placed(self, shardings: Any) -> dict[str, Any]:
        """Returns `like` with shardings."""
        tree = self.build(self.like)
        tree = jax.tree.map(_placed, tree, jax.tree.broadcast(shardings, tree))
        return {path: leaf for path, _, leaf in _flat(tree) if path in self.like}


class _Node(dict):
    """A node under construction; its own class tells it from a leaf."""


def _plain(node):
    if not isinstance(node, _Node):
        return node
    items = {key: _plain(part) for key, part in node.items()}
    if not any(isinstance(key, int) for key in items):
        return items
    if items.keys() != set(range(len(items))):
        rule = "a list must have an item for each number from 0 on"
        raise malformed(rule, short(sorted(items, key=str)))
    return [items[number] for number in range(len(items))]


def _placed(like, sharding):
    if isinstance(sharding, NamedSharding):
        counts = devices_along(sharding, len(like.shape))
        each = zip(sharding.spec, like.shape, counts)
        spec = P(*(None if length % count else name for name, length, count in each))
        kind = sharding.memory_kind
        sharding = NamedSharding(sharding.mesh, spec, memory_kind=kind)
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)


def _keys_of(path, entry):
    keys = entry.get("keys", path.split("/"))
    if (
        not isinstance(keys, list)
        or len(keys) > _MOST_KEYS
        or not all(type(key) is str or (type(key) is int and key >= 0) for key in keys)
        or "/".join(map(str, keys)) != path
    ):
        rule = f"its `keys` must be those of the path, at most {_MOST_KEYS}"
        raise _malformed(path, rule, keys)
    return keys


def _like(path, entry):
    fields = {"array": {"shape", "dtype"}, "codes": {"shape", "dtype", "quantizer"}}
    kind, shape, dtype = (entry.get(name) for name in ("kind", "shape", "dtype"))
    if not isinstance(kind, str) or kind not in fields:
        raise _malformed(path, f"its `kind` must be one of {[*fields, *_EMPTY]}", kind)
    if more := entry.keys() - fields[kind] - {"kind", "keys"}:
        raise _malformed(path, f"its fields must be {sorted(fields[kind])}", more)
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_DIMENSIONS
        or not all(type(length) is int and length >= 0 for length in shape)
        or math.prod(max(length, 1) for length in shape) > _MOST_NUMBERS
    ):
        raise _malformed(path, "its `shape` must be a list of lengths", shape)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _malformed(path, f"its `dtype` must be one of {[*_DTYPES]}", dtype)
    if kind == "array":
        like: Any = jax.ShapeDtypeStruct(shape, _DTYPES[dtype])
    else:
        if not jnp.issubdtype(_DTYPES[dtype], jnp.floating):
            raise _malformed(path, "its `dtype` must be one of floats", dtype)
        try:
            quantizer = quantizer_of(entry.get("quantizer"))
            if quantizer.axis is None and len(shape) > 2:
                # An older file, of one scale for all: newer ones have numbers here.
                axes = tuple(range(-len(shape), 0))
                quantizer = dataclasses.replace(quantizer, axis=axes)
            like = QuantizedArray.abstract(quantizer, tuple(shape), _DTYPES[dtype])
        except ValueError as error:
            raise MalformedFileError(f"`{path[:200]}`: {error}") from error
    parts = jax.tree.leaves(like)
    if any(jax.dtypes.canonicalize_dtype(p.dtype) != p.dtype for p in parts):
        raise ValueError(
            f"`{path[:200]}`: arrays of 64 bits need jax_enable_x64; got {dtype}. Set "
            f'JAX_ENABLE_X64=1, or use jax.config.update("jax_enable_x64", True) first.'
        )
    return like


def check_array(name: str, array: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    """Raises MalformedFileError for another dtype or shape; `array` may be None."""
    dtype, shape = np.dtype(dtype), tuple(shape)
    if array is None or (array.dtype, array.shape) != (dtype, shape):
        got = None if array is None else f"{array.dtype} of shape {array.shape}"
        raise _malformed(name, f"it must be {dtype} of shape {shape}", got)


def _malformed(path, rule, found):
    got = f"{short(found)}: damaged, or written by a newer version of cage_jax"
    return malformed(f"`{path[:200]}`: {rule}", got)
