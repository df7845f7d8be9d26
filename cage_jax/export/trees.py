"""Files with the codes of any model, bit for bit.

A file is safetensors, with the description of each leaf in its metadata, see
`tree_entries`. Its codes are packed: each `QuantizedArray` is the bytes of
`QuantizedArray.to_bytes`.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.core.finite import check_finite
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export import orbax_folders
from cage_jax.export.files import MalformedFileError, Path, as_path, malformed
from cage_jax.export.safetensors_files import read, write
from cage_jax.export.target import Target
from cage_jax.export.tree_entries import (
    FORMAT,
    Tree,
    check_array,
    check_version,
    entries_of,
    metadata_of,
)
from cage_jax.export.writing import new_file
from cage_jax.llama.loaded import Model


def save(codes: Any, path: Path, *, overwrite: bool = False) -> None:
    """Writes a tree of codes and arrays to one file, with packed codes.

    The file takes `QuantizedArray.nbytes` bytes for each array of codes, and a
    description of some hundred bytes. Any safetensors reader can read the other arrays.

    Args:
      codes: any tree of `QuantizedArray`s and arrays of floats, integers and bools,
        such as the result of `quantize`. It may have dicts, lists, and other nodes such
        as `nnx.State`.
      path: path of the file, which ends in ".safetensors".
      overwrite: whether to replace a file that this function wrote.

    Raises:
      TypeError: if a leaf is not such an array.
      ValueError: if `path` has another ending, if an array has NaN or infinities, or
        if parts of one are not on this machine.
      FileExistsError: if the path exists, unless `overwrite`. With `overwrite`, if
        this function did not write it.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> import pathlib, tempfile
      >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}
      >>> rules = cage.Rules([("kernel", cage.int4(group_size=32))])
      >>> codes = cage.quantize(params, rules)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "codes.safetensors"
      ...     cage.export.save(codes, path)
      ...     again = cage.load(path).params
      >>> bool((again["kernel"].codes == codes["kernel"].codes).all())
      True
    """
    path = as_path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"`path` must end in .safetensors; got {path}. Use save_orbax for a folder."
        )
    with new_file(path, is_export=_is_export, overwrite=overwrite) as temporary:
        write_tree(codes, temporary)


def write_tree(codes: Any, path: pathlib.Path) -> None:
    """Writes a tree to a file as `save` does, in the place of whatever is there."""
    entries, leaves = entries_of(codes)
    check_finite(leaves)
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
    write(path, arrays, metadata_of(json.dumps(entries)))


def _is_export(path):
    try:
        return read(path)[1].get("format") == FORMAT
    except MalformedFileError:
        return False


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
    path = as_path(path)
    if path.is_dir():
        return orbax_folders.load(path, shardings)
    arrays, metadata = read(path)
    check_version(metadata, path)
    try:
        entries = json.loads(metadata.get("tree", ""))
    except (ValueError, RecursionError) as error:
        raise malformed(f"the tree of {path.name} must be JSON", error) from error
    tree = Tree(entries)
    if set(arrays) != set(tree.like):
        different = sorted(set(arrays) ^ set(tree.like))
        rule = f"{path.name} must have the arrays of its tree"
        raise malformed(rule, f"others, such as {different[:3]}")
    leaves: dict[str, Any] = {}
    for name, like in tree.like.items():
        array = arrays[name]
        if isinstance(like, QuantizedArray):
            check_array(name, array, np.uint8, (like.nbytes,))
            leaves[name] = QuantizedArray.from_bytes(
                memoryview(array.data), like.quantizer, like.shape, like.dtype
            )
        else:
            check_array(name, array, like.dtype, like.shape)
            leaves[name] = jnp.array(array)
    if shardings is not None:
        leaves = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, like.sharding),
            leaves,
            tree.placed(shardings),
        )
    return tree.build(leaves)


TARGET = Target(
    written_by="export.save",
    read_by="`cage.load`",
    holds="every quantizer, any model",
    recognises=lambda path: path.is_file() and path.suffix == ".safetensors",
    read=lambda path: Model(load(path), None, {}),
    suffix=".safetensors",
)
