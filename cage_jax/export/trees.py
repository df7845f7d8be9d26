"""Storage of codes of any model, bit for bit: in one file, or in a folder by Orbax.

Both hold the arrays by path and a JSON description of each of them:

    {"format": "cage_jax", "version": "1", "tree": {"layers/0/kernel": {
      "kind": "codes", "shape": [64, 32], "dtype": "float32", "quantizer": {...}}, ...}}

A file is safetensors, with the description in its metadata. Its codes are packed: each
`QuantizedArray` is the bytes of `QuantizedArray.to_bytes`. A folder holds plain jax
arrays, so that each process writes and reads the shards of its own devices.
"""

import contextlib
import dataclasses
import json
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

from cage_jax.arrays.paths import flatten_with_keys, name_of, path_in_errors
from cage_jax.arrays.sharding import devices_along
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.descriptions import describe, quantizer_of
from cage_jax.export.files import (
    MalformedFileError,
    Path,
    as_path,
    new_file,
    new_folder,
)
from cage_jax.export.safetensors_files import read, write

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
_REMEDY = "Get the file again."


def save(codes: Any, path: Path, *, overwrite: bool = False) -> None:
    """Writes a tree of codes and arrays to one file, with packed codes.

    The file takes `QuantizedArray.nbytes` bytes for each array of codes, and a
    description of some hundred bytes. Any safetensors reader can read the other arrays.

    Args:
      codes: any tree of `QuantizedArray`s and arrays of floats, integers and bools,
        such as the result of `quantize`. It may have dicts, lists, and other nodes such
        as `nnx.State`.
      path: path of the file, which ends in ".safetensors".
      overwrite: whether to replace an existing file.

    Raises:
      TypeError: if a leaf is not such an array.
      ValueError: if `path` has another ending, or if parts of an array are not on this
        machine.
      FileExistsError: if the path exists, unless `overwrite`.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> import pathlib, tempfile
      >>> from cage_jax.export import trees
      >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}
      >>> rules = cage.Rules([("kernel", cage.int4(group_size=32))])
      >>> codes = cage.quantize(params, rules)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "codes.safetensors"
      ...     trees.save(codes, path)
      ...     again = trees.load(path)
      >>> bool((again["kernel"].codes == codes["kernel"].codes).all())
      True
    """
    path = as_path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"`path` must end in .safetensors; got {path}. Use save_orbax for a folder."
        )
    entries, leaves = described(codes)
    arrays = {}
    for name, leaf in leaves.items():
        parts = jax.tree.leaves(leaf)
        if not all(getattr(part, "is_fully_addressable", True) for part in parts):
            raise ValueError(
                f"`{name}`: arrays must be on the devices of one process to be in one "
                f"file; got {parts[0].sharding}. Use save_orbax."
            )
        if isinstance(leaf, QuantizedArray):
            leaf = np.frombuffer(leaf.to_bytes(), np.uint8)
        arrays[name] = leaf
    with new_file(path, overwrite=overwrite) as temporary:
        write(temporary, arrays, _metadata(json.dumps(entries)))


def save_orbax(codes: Any, path: Path, *, overwrite: bool = False) -> None:
    """Writes a tree of codes and arrays to a folder with Orbax.

    Each process writes the shards of its devices, so all processes must call this.
    Codes take one byte each, compressed. `orbax.checkpoint` can read the arrays without
    this library, by path and then "codes", "scale" and so on.

    Args:
      codes: as in `save`.
      path: path of the folder.
      overwrite: whether to replace an existing folder; with several processes it is
        removed before the new one is written.

    Raises:
      TypeError: if a leaf is not such an array.
      ValueError: if the tree has no arrays, or an array of size 0.
      FileExistsError: if the path exists, unless `overwrite`.
    """
    import orbax.checkpoint as ocp

    entries, leaves = described(codes)
    if not leaves:
        raise ValueError("`codes` must have an array; got none. Give what you trained.")
    arrays = {}
    for name, leaf in leaves.items():
        if 0 in leaf.shape:
            raise ValueError(
                f"`{name}`: Orbax has no arrays without numbers; got shape "
                f"{leaf.shape}. Leave it out, or use save."
            )
        arrays[name] = _parts(leaf) if isinstance(leaf, QuantizedArray) else leaf
    content = ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays),
        description=ocp.args.JsonSave(_metadata(entries)),
    )
    path = as_path(path).absolute()
    alone = jax.process_count() == 1
    if not alone and not overwrite and path.exists():  # else a process would hang
        raise FileExistsError(
            f"`path` must not be there yet; got {path}. Use overwrite=True, or another "
            f"path."
        )
    place = new_folder(path, overwrite=overwrite)
    with (
        place if alone else contextlib.nullcontext(path) as folder,
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
        checkpointer.save(folder, content, force=alone or overwrite)


def load(path: Path, *, shardings: Any = None) -> Any:
    """Reads a file of `save` or a folder of `save_orbax`.

    Files are not trusted: a file can only contain arrays and quantizers, no larger than
    the file itself. The sizes in an Orbax folder are trusted, because its content is
    compressed.

    Args:
      path: path of the file or the folder.
      shardings: None for the default device of a single process; otherwise a
        `jax.sharding.Sharding`, or a prefix tree of them, as in `jax.device_put`. The
        scales of an array are sharded like its codes. Axes that the devices do not
        divide, such as those of few groups, are not sharded.

    Returns:
      The tree. Dicts keep their structure, with string keys; lists and tuples become
      lists; other nodes, such as `nnx.State`, become nested dicts.

    Raises:
      MalformedFileError: if the content is not from `save`, or from a newer version.
      ValueError: if there are 64-bit arrays and jax does not have them enabled, if
        `shardings` do not fit the tree, or if they are missing with several processes.
    """
    path = pathlib.Path(path).absolute()
    return (_load_orbax if path.is_dir() else _load_file)(path, shardings)


def is_folder(path: pathlib.Path) -> bool:
    """Returns whether a folder has the subfolders that `save_orbax` writes."""
    return all((path / name).is_dir() for name in ("arrays", "description"))


def _load_file(path, shardings):
    arrays, metadata = read(path)
    _check_version(metadata, path)
    try:
        entries = json.loads(metadata.get("tree", ""))
    except (ValueError, RecursionError) as error:
        raise MalformedFileError(
            f"the tree of {path.name} must be JSON; got {error}. {_REMEDY}"
        ) from error
    tree = Tree(entries)
    if set(arrays) != set(tree.like):
        different = sorted(set(arrays) ^ set(tree.like))
        raise MalformedFileError(
            f"{path.name} must have the arrays of its tree; got others, such as "
            f"{different[:3]}. {_REMEDY}"
        )
    leaves: dict[str, Any] = {}
    for name, like in tree.like.items():
        array = arrays[name]
        if isinstance(like, QuantizedArray):
            _check(name, array, np.uint8, (like.nbytes,))
            leaves[name] = QuantizedArray.from_bytes(
                memoryview(array.data), like.quantizer, like.shape, like.dtype
            )
        else:
            _check(name, array, like.dtype, like.shape)
            leaves[name] = jnp.array(array)
    if shardings is not None:
        leaves = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, like.sharding),
            leaves,
            tree.placed(shardings),
        )
    return tree.of(leaves)


def _check(name, array, dtype, shape):
    if (array.dtype, array.shape) != (dtype, tuple(shape)):
        raise malformed(
            name,
            f"it must be {np.dtype(dtype)} of shape {shape}, as the tree says",
            f"{array.dtype} of shape {array.shape}",
        )


def _load_orbax(path, shardings):
    import orbax.checkpoint as ocp

    if shardings is None:
        if jax.process_count() > 1:
            raise ValueError(
                "`shardings` must be given in several processes; got None. Use a "
                "jax.sharding.NamedSharding, or a tree of them."
            )
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    handler = ocp.CompositeCheckpointHandler(
        arrays=ocp.StandardCheckpointHandler(), description=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(handler) as checkpointer:

        def restored(**items):
            with _as_malformed(path):
                return checkpointer.restore(path, ocp.args.Composite(**items))

        description = restored(description=ocp.args.JsonRestore())["description"]
        if not isinstance(description, dict):
            description = {}
        _check_version(description, path)
        tree = Tree(description.get("tree"))
        placed = tree.placed(shardings)
        arrays = {
            name: _parts(like) if isinstance(like, QuantizedArray) else like
            for name, like in placed.items()
        }
        with _as_malformed(path):
            # Checked first, because Orbax would convert 4-bit codes to 8 bits and
            # allocate any shape.
            there = checkpointer.metadata(path).item_metadata["arrays"].tree
            if _forms(there) != _forms(arrays):
                raise ValueError("other arrays than its description says")
        found = restored(arrays=ocp.args.StandardRestore(arrays))["arrays"]
    return tree.of(
        {
            name: dataclasses.replace(like, **found[name])
            if isinstance(like, QuantizedArray)
            else found[name]
            for name, like in placed.items()
        }
    )


def _forms(tree):
    return jax.tree.map(lambda array: (tuple(array.shape), str(array.dtype)), tree)


@contextlib.contextmanager
def _as_malformed(path):
    try:
        yield
    except Exception as error:  # Orbax raises exceptions of all kinds
        text = (str(error) or repr(error)).strip().splitlines()[0]
        raise MalformedFileError(
            f"{path.name} must be a whole folder of save_orbax; got {text}. Get the "
            f"folder again."
        ) from error


# --- what is in a tree ----------------------------------------------------------------


def described(codes):
    """Returns by path the description of each leaf, and the leaves that are arrays."""
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
        dtype = getattr(leaf, "dtype", type(leaf).__name__)
        if str(dtype) not in _DTYPES:
            raise TypeError(
                f"`codes` must be QuantizedArrays and arrays of floats, whole numbers "
                f"and bools; got {dtype}. Leave it out, or save jax.random.key_data of "
                f"a key."
            )
        return {"kind": "array", "shape": list(leaf.shape), "dtype": str(dtype)}
    like = QuantizedArray.abstract(leaf.quantizer, leaf.shape, leaf.dtype)
    for name, part in _parts(like).items():
        found = _parts(leaf).get(name)
        if found is None or (found.shape, found.dtype) != (part.shape, part.dtype):
            raise ValueError(
                f"`{name}` must be as its quantizer says, {part.dtype} of shape "
                f"{part.shape}; got {found if found is None else found.shape}. "
                f"Quantize the whole array at once, or save its layers one by one."
            )
    return {
        "kind": "codes",
        "shape": list(leaf.shape),
        "dtype": str(jnp.dtype(leaf.dtype)),
        "quantizer": describe(leaf.quantizer),
    }


def _parts(codes):
    """Returns the arrays of a `QuantizedArray` by name."""
    names = ("codes", "scale", "zero_point", "offset", "tensor_divisor")
    parts = {name: getattr(codes, name) for name in names}
    return {name: part for name, part in parts.items() if part is not None}


def _metadata(tree):
    return {"format": FORMAT, "version": VERSION, "tree": tree}


def _check_version(metadata, path):
    if metadata.get("format") != FORMAT:
        raise MalformedFileError(
            f"{path.name} must be of cage_jax.export.trees; got the format "
            f"{str(metadata.get('format'))[:80]!r}. Use the reader of its format."
        )
    if metadata.get("version") != VERSION:
        raise MalformedFileError(
            f"{path.name} must have version {VERSION}; got "
            f"{str(metadata.get('version'))[:80]!r}: written by a newer version of "
            f"cage_jax. Upgrade cage_jax."
        )


class Tree:
    """The checked description of a file's leaves.

    Attributes:
      like: each array by path, with `ShapeDtypeStruct`s in the place of data.
    """

    def __init__(self, entries: Any):
        if not isinstance(entries, dict):
            raise MalformedFileError(
                f"the tree must be an object; got {type(entries).__name__}. {_REMEDY}"
            )
        self._keys: dict[str, list[str | int]] = {}
        self._empty: dict[str, Callable[[], Any]] = {}
        self.like: dict[str, Any] = {}
        for path, entry in entries.items():
            if not isinstance(entry, dict):
                raise malformed(path, "its entry must be an object", entry)
            self._keys[path] = _keys_of(path, entry)
            kind = entry.get("kind")
            if isinstance(kind, str) and kind in _EMPTY:
                self._empty[path] = _EMPTY[kind]
            else:
                self.like[path] = _like(path, entry)
        self.of(self.like)

    def of(self, leaves: Mapping[str, Any]) -> Any:
        """Builds the tree from its leaves by path."""
        root = _Node()
        for path, keys in self._keys.items():
            leaf = leaves[path] if path in leaves else self._empty[path]()
            node, (*inner, last) = root, [None, *keys]
            for key in inner:
                node = node.setdefault(key, _Node())
                if not isinstance(node, _Node):
                    raise malformed(path, "an array must not lie in another", keys)
            if last in node:
                raise malformed(path, "there must be one array for a path", keys)
            node[last] = leaf
        return _plain(root.get(None, {}))

    def placed(self, shardings: Any) -> dict[str, Any]:
        """Returns `like` with shardings."""
        tree = self.of(self.like)
        tree = jax.tree.map(_placed, tree, jax.tree.broadcast(shardings, tree))
        return {path: leaf for path, _, leaf in _flat(tree) if path in self.like}


class _Node(dict):
    """A node under construction; its own class tells it from a leaf."""


def _plain(node):
    if not isinstance(node, _Node):
        return node
    found = {key: _plain(part) for key, part in node.items()}
    if not any(isinstance(key, int) for key in found):
        return found
    if found.keys() != set(range(len(found))):
        raise MalformedFileError(
            f"a list must have a place for each number from 0 on; got "
            f"{short(sorted(found, key=str))}. {_REMEDY}"
        )
    return [found[place] for place in range(len(found))]


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
        raise malformed(path, f"its `keys` must be those, at most {_MOST_KEYS}", keys)
    return keys


def _like(path, entry):
    fields = {"array": {"shape", "dtype"}, "codes": {"shape", "dtype", "quantizer"}}
    kind, shape, dtype = (entry.get(name) for name in ("kind", "shape", "dtype"))
    if not isinstance(kind, str) or kind not in fields:
        raise malformed(path, f"its `kind` must be one of {[*fields, *_EMPTY]}", kind)
    if more := entry.keys() - fields[kind] - {"kind", "keys"}:
        raise malformed(path, f"its fields must be {sorted(fields[kind])}", more)
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_DIMENSIONS
        or not all(type(length) is int and length >= 0 for length in shape)
        or math.prod(max(length, 1) for length in shape) > _MOST_NUMBERS
    ):
        raise malformed(path, "its `shape` must be that of an array", shape)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise malformed(path, f"its `dtype` must be one of {[*_DTYPES]}", dtype)
    if kind == "array":
        like: Any = jax.ShapeDtypeStruct(shape, _DTYPES[dtype])
    else:
        if not jnp.issubdtype(_DTYPES[dtype], jnp.floating):
            raise malformed(path, "its `dtype` must be one of floats", dtype)
        try:
            quantizer = quantizer_of(entry.get("quantizer"))
            like = QuantizedArray.abstract(quantizer, tuple(shape), _DTYPES[dtype])
        except ValueError as error:
            raise MalformedFileError(f"`{path[:200]}`: {error}") from error
    parts = jax.tree.leaves(like)
    if any(jax.dtypes.canonicalize_dtype(p.dtype) != p.dtype for p in parts):
        raise ValueError(
            f"`{path[:200]}`: arrays of 64 bits need jax_enable_x64; got {dtype}. Use "
            f'jax.config.update("jax_enable_x64", True) first.'
        )
    return like


def malformed(path: str, rule: str, found: Any) -> MalformedFileError:
    """Makes the error for an array that does not fit its description."""
    return MalformedFileError(
        f"`{path[:200]}`: {rule}; got {short(found)}: damaged, or written by a newer "
        f"version of cage_jax. {_REMEDY}"
    )
