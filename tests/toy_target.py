"""A target in a dozen lines: an .npz of the codes and scales of int8()."""

import zipfile

import numpy as np

import cage_jax as cage
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.target import Target
from cage_jax.export.writing import new_file
from cage_jax.llama.loaded import Model
from cage_jax.llama.tensors import by_path, nested


def write(codes, config, path, *, tokenizer, overwrite):
    arrays = {}
    for name, leaf in by_path(codes).items():
        if isinstance(leaf, QuantizedArray):
            arrays[f"{name} scale"], leaf = leaf.scale, leaf.codes
        arrays[name] = leaf
    with (
        new_file(path, is_export=zipfile.is_zipfile, overwrite=overwrite) as place,
        place.open("wb") as file,
    ):
        np.savez(file, **arrays)


def read(path):
    arrays = dict(np.load(path))
    for name in [name for name in arrays if f"{name} scale" in arrays]:
        parts = arrays[name], arrays.pop(f"{name} scale"), None, None, None
        arrays[name] = QuantizedArray(*parts, cage.int8(axis=-2), np.dtype("float32"))
    return Model(nested(arrays), None, {})


TARGET = Target(
    written_by="toy_target.write",
    read_by="NumPy",
    holds="`int8()`",
    recognises=lambda path: path.suffix == ".npz",
    read=read,
    write=write,
    suffix=".npz",
    is_export=zipfile.is_zipfile,
    presets=("int8",),
)
