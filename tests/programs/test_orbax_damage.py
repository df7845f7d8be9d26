"""A damaged folder of Orbax, in a process of its own: Orbax leaves threads behind."""

import numpy as np
import own_process
import pytest

import cage_jax as cage
from cage_jax.export import trees
from cage_jax.export.files import MalformedFileError
from cage_jax.export.orbax_folders import save_orbax

pytest.importorskip("orbax.checkpoint", reason="it writes the folder")


def test_damaged_arrays_of_a_folder(tmp_path):
    path = tmp_path / "codes"
    codes = cage.quantize(np.eye(64, 32, dtype=np.float32), cage.int4())
    save_orbax({"kernel": codes}, path)
    for part in (path / "arrays").rglob("d/*"):
        part.write_bytes(part.read_bytes()[:-8])
    own_process.run(load_an_incomplete_folder, path)


def load_an_incomplete_folder(path):
    with pytest.raises(MalformedFileError, match="must be a complete folder"):
        trees.load(path)
