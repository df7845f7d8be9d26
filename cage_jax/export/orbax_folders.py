"""Folders of Orbax with the codes of any model, bit for bit.

They hold plain jax arrays, so that each process writes and reads the shards of its own
devices, and a description of each leaf, see `tree_entries`.
"""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from cage_jax.core.finite import check_finite
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.files import (
    Path,
    as_path,
    check_all_inside,
    check_installed,
    malformed,
)
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
_INNER = "written"


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
        _new_folder(as_path(path), overwrite) as folder,
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
        try:
            checkpointer.save(folder, content)
        except ValueError as error:  # of a disk, such as a full one
            time.sleep(0.5)  # its threads still write, into what is removed then
            raise OSError(str(error).rpartition(": ")[2]) from error


@contextlib.contextmanager
def _new_folder(path: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
    """Yields the same path to all processes; moves what is written there to `path`.

    It is in a temporary folder, since Orbax leaves files beside it where it fails.
    """
    if jax.process_count() == 1:
        with new_folder(path, overwrite=overwrite) as folder:
            yield folder / _INNER
            _move_up(folder)
        return
    from jax.experimental import multihost_utils

    # In each process, because the others would wait for one that fails alone.
    check_place(path, overwrite=overwrite)
    is_first = jax.process_index() == 0
    place = new_folder(path, overwrite=overwrite) if is_first else None
    with place or contextlib.nullcontext(path) as folder:
        letters = np.zeros(_MOST_LETTERS, np.uint8)
        own = np.frombuffer(os.fsencode(folder.name), np.uint8)
        letters[: len(own)] = own
        letters = np.asarray(multihost_utils.broadcast_one_to_all(letters))
        name = os.fsdecode(letters.tobytes().rstrip(b"\0"))
        yield path.absolute().parent / name / _INNER
        if is_first:
            _move_up(folder)
    multihost_utils.sync_global_devices("the folder is in its place")


def _move_up(folder):
    for entry in (folder / _INNER).iterdir():
        entry.rename(folder / entry.name)
    (folder / _INNER).rmdir()


def load(path: pathlib.Path, shardings: Any = None) -> Any:
    """Reads a folder of `save_orbax`; see `cage_jax.export.trees.load`."""
    import orbax.checkpoint as ocp

    path = path.absolute()  # which Orbax wants
    check_all_inside(path)
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
