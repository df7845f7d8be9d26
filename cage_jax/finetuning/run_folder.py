"""A folder in which a long run keeps what is done, each file whole or not at all."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.core.rules import Rules

_BELONGS = "run.json"


class RunFolder:
    """Arrays by name, in a folder that belongs to one run.

    Args:
      folder: path of the folder, made if it is missing; None keeps nothing.
      run: what the run is made of: digests and settings by their names in errors.

    Raises:
      ValueError: if the folder belongs to another run. Nothing is overwritten.
    """

    def __init__(self, folder: Any, run: Mapping[str, Any]):
        self._folder = None if folder is None else _path_of(folder)
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise FileExistsError(
                f"`folder` must be a folder; got {str(folder)!r}, a file. Use another "
                f"path."
            ) from error
        path, now = self._folder / _BELONGS, json.loads(json.dumps(run))
        if not path.exists():
            self._write(path, json.dumps(now, indent=1).encode())
            return
        before = read_run(folder)
        other = [name for name in now if now[name] != before.get(name)]
        if other:
            raise ValueError(
                f"`folder` must belong to the same call; got {str(self._folder)!r}, "
                f"which differs in {' and '.join(other)}. Use another folder. Nothing "
                f"was overwritten."
            )

    def has(self, name: str) -> bool:
        """Tells whether arrays of this name were written."""
        return self._folder is not None and (self._folder / f"{name}.npz").exists()

    def read(self, name: str, likes: Sequence[Any]) -> list[np.ndarray] | None:
        """Returns arrays that were written, or None if they were not.

        Args:
          name: their name.
          likes: arrays of their shapes and dtypes.

        Raises:
          ValueError: if the file is damaged.
        """
        if self._folder is None or not self.has(name):
            return None
        path = self._folder / f"{name}.npz"
        try:
            with path.open("rb") as opened, np.load(opened) as file:
                # As bytes, because NumPy forgets what bfloat16 is.
                return [
                    np.frombuffer(file[f"{i}"].tobytes(), like.dtype).reshape(
                        like.shape
                    )
                    for i, like in enumerate(likes)
                ]
        except Exception as error:  # zip, pickle and NumPy raise many types
            raise ValueError(
                f"`folder` must have whole files; cannot read {str(path)!r}: {error}. "
                f"Remove it, to do this part again."
            ) from error

    def write(self, name: str, arrays: Sequence[Any]) -> None:
        """Writes arrays of any dtype."""
        if self._folder is None:
            return
        path = self._folder / f"{name}.npz"
        parts = {
            f"{i}": np.frombuffer(np.asarray(array).tobytes(), np.uint8)
            for i, array in enumerate(arrays)
        }
        temporary = path.with_name(path.name + ".part")
        with temporary.open("wb") as file:
            np.savez(file, **parts)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def _write(self, path, content):
        temporary = path.with_name(path.name + ".part")
        temporary.write_bytes(content)
        temporary.replace(path)


def read_run(folder: Any) -> dict[str, Any]:
    """Reads which run a folder belongs to.

    Raises:
      ValueError: if it belongs to none, or if that cannot be read.
    """
    path = _path_of(folder) / _BELONGS
    try:
        run = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`folder` must be the folder of a run; got {str(folder)!r}, whose "
            f"{_BELONGS} cannot be read: {error}. Use the folder that the run made."
        ) from error
    if not isinstance(run, dict):
        raise ValueError(
            f"`folder` must have an object in {_BELONGS}; got {type(run).__name__} in "
            f"{str(folder)!r}. Use the folder that the run made."
        )
    return run


class Digest:
    """A digest of trees of arrays, one after another."""

    def __init__(self):
        self._sha = hashlib.sha256()

    def add(self, tree: Any) -> "Digest":
        """Adds a tree: its paths, dtypes, shapes and values."""
        paths, leaves, _ = flatten_with_paths(tree)
        for path, leaf in zip(paths, map(values_of, leaves)):
            self._sha.update(repr((path, str(leaf.dtype), leaf.shape)).encode())
            self._sha.update(np.ascontiguousarray(leaf).view(np.uint8).data)
        return self

    def __str__(self) -> str:
        return self._sha.hexdigest()


def values_of(x: Any) -> np.ndarray:
    """Returns an array as NumPy has it; a random key as its numbers."""
    is_key = isinstance(x, jax.Array) and jax.dtypes.issubdtype(
        x.dtype, jax.dtypes.prng_key
    )
    return np.asarray(jax.random.key_data(x) if is_key else x)


def _path_of(folder):
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(
            f"`folder` must be a path; got {type(folder).__name__}. Use 'teacher'."
        )
    return pathlib.Path(folder)


def rules_in_full(rules: Rules) -> list[Any]:
    """Returns a table with all settings of its quantizers, in texts."""
    lines = [[r.pattern, _fields(r.weights), _fields(r.inputs)] for r in rules]
    return [lines, {path: _fields(each) for path, each in rules.resolved.items()}]


def _fields(quantizer):
    if quantizer is None:
        return None
    names = (field.name for field in dataclasses.fields(quantizer))
    return [f"{name}={getattr(quantizer, name)!r}" for name in names]
