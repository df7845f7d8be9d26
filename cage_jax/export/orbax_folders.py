"""Folders of Orbax with the codes of any model, bit for bit.

They hold plain jax arrays, so that each process writes and reads the shards of its own
devices, and a description of each leaf, see `tree_entries`.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from cage_jax.core.finite import check_finite
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.files import Path, as_path, check_installed, malformed
from cage_jax.export.target import Target
from cage_jax.export.tree_entries import (
    Tree,
    check_version,
    entries_of,
    metadata_of,
    parts_of,
)
from cage_jax.export.writing import check_place, new_folder
from cage_jax.llama.loaded import Model

_MOST_LETTERS = 255  # of a file's name


def save_orbax(codes: Any, path: Path, *, overwrite: bool = False) -> None:
    """Writes a tree of codes and arrays to a folder with Orbax.

    Each process writes the shards of its devices, so all processes must call this.
    Codes take one byte each, compressed. `orbax.checkpoint` can read the arrays without
    this library, by path and then "codes", "scale" and so on.

    Args:
      codes: as in `save`.
      path: path of the folder.
      overwrite: whether to replace a folder that an export wrote, with nothing else
        in it.

    Raises:
      TypeError: if a leaf is not such an array.
      ValueError: if the tree has no arrays, or an array of size 0 or with NaN or
        infinities.
      FileExistsError: if the path exists, unless `overwrite`. With `overwrite`, if it
        holds anything that no export wrote.
    """
    check_installed("orbax", "writing an Orbax folder")
    import orbax.checkpoint as ocp

    entries, leaves = entries_of(codes)
    check_finite(leaves)
    if not leaves:
        raise ValueError(
            "`codes` must contain an array; got none. Pass the trained parameters."
        )
    arrays = {}
    for name, leaf in leaves.items():
        if 0 in leaf.shape:
            raise ValueError(
                f"`{name}`: arrays must not be empty for Orbax; got shape "
                f"{leaf.shape}. Leave it out, or use save."
            )
        arrays[name] = parts_of(leaf) if isinstance(leaf, QuantizedArray) else leaf
    content = ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays),
        description=ocp.args.JsonSave(metadata_of(entries)),
    )
    with (
        _new_folder(as_path(path).absolute(), overwrite) as folder,
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
        checkpointer.save(folder, content, force=True)


@contextlib.contextmanager
def _new_folder(path: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
    """Yields the same temporary folder to all processes; moves it to `path`."""
    if jax.process_count() == 1:
        with new_folder(path, overwrite=overwrite) as folder:
            yield folder
        return
    from jax.experimental import multihost_utils

    # In each process, because the others would wait for one that fails alone.
    check_place(path, overwrite=overwrite)
    is_first = jax.process_index() == 0
    place = new_folder(path, overwrite=overwrite) if is_first else None
    with place or contextlib.nullcontext(path) as folder:
        letters = np.zeros(_MOST_LETTERS, np.uint8)
        name = np.frombuffer(os.fsencode(folder.name), np.uint8)
        letters[: len(name)] = name
        letters = np.asarray(multihost_utils.broadcast_one_to_all(letters))
        yield path.parent / os.fsdecode(letters.tobytes().rstrip(b"\0"))
    multihost_utils.sync_global_devices("the folder is in its place")


def load(path: pathlib.Path, shardings: Any = None) -> Any:
    """Reads a folder of `save_orbax`; see `cage_jax.export.trees.load`."""
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
        check_version(description, path)
        tree = Tree(description.get("tree"))
        placed = tree.placed(shardings)
        arrays = {
            name: parts_of(like) if isinstance(like, QuantizedArray) else like
            for name, like in placed.items()
        }
        with _as_malformed(path):
            # Checked first, because Orbax would convert 4-bit codes to 8 bits and
            # allocate any shape.
            stored = checkpointer.metadata(path).item_metadata["arrays"].tree
            if _shapes_and_dtypes(stored) != _shapes_and_dtypes(arrays):
                raise ValueError("arrays that do not match its description")
        found = restored(arrays=ocp.args.StandardRestore(arrays))["arrays"]
    return tree.build(
        {
            name: dataclasses.replace(like, **found[name])
            if isinstance(like, QuantizedArray)
            else found[name]
            for name, like in placed.items()
        }
    )


def _shapes_and_dtypes(tree):
    return jax.tree.map(lambda array: (tuple(array.shape), str(array.dtype)), tree)


@contextlib.contextmanager
def _as_malformed(path):
    try:
        yield
    except Exception as error:  # Orbax raises exceptions of all kinds
        text = (str(error) or repr(error)).strip().splitlines()[0]
        rule = f"{path.name} must be a complete folder written by save_orbax"
        raise malformed(rule, text) from error


def is_folder(path: pathlib.Path) -> bool:
    """Tells whether a folder has the subfolders that `save_orbax` writes."""
    return all((path / name).is_dir() for name in ("arrays", "description"))


TARGET = Target(
    written_by="export.save_orbax",
    read_by="`cage.load`, `orbax.checkpoint`",
    holds="every quantizer, any model",
    recognises=is_folder,
    read=lambda path: Model(load(path), None, {}),
    packages=("orbax",),
)
