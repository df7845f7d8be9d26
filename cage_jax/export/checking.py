"""Checks that a model's parameters are well-formed or equal those of another model."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from cage_jax.core.finite import not_finite
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.llama.tensors import Array


def problems(path: str, leaf: Array) -> list[str]:
    """Lists the problems of a parameter, one sentence each."""
    sentences = [
        f"`{path}`: the {what} must be finite; got NaN or infinity in {count} places"
        for what, count in not_finite(leaf).items()
    ]
    if sentences or not isinstance(leaf, QuantizedArray):
        return sentences
    format = leaf.quantizer.format
    values = np.asarray(format.decode(leaf.codes, jnp.float32))
    if values.size and not format.low <= values.min() <= values.max() <= format.high:
        sentences.append(
            f"`{path}`: codes must be from {format.low:g} to {format.high:g}; got "
            f"{values.min():g} to {values.max():g}"
        )
    return sentences


def differences(one: Mapping[str, Array], other: Mapping[str, Array]) -> list[str]:
    """Lists the differences of the codes, scales and floats of two models, by path."""
    found = [f"{path}: only in one of them" for path in one.keys() ^ other.keys()]
    for path in [path for path in one if path in other]:
        ours, theirs = one[path], other[path]
        if ours.shape != theirs.shape:
            found.append(f"{path}: the shapes differ: {ours.shape} and {theirs.shape}")
        elif isinstance(ours, QuantizedArray) and isinstance(theirs, QuantizedArray):
            found += _different_codes(path, ours, theirs)
        elif isinstance(ours, QuantizedArray) or isinstance(theirs, QuantizedArray):
            found.append(f"{path}: codes in one, floats in the other")
        else:
            found += _different_values(path, "values", ours, theirs)
    return sorted(found)


def _different_codes(path, ours, theirs):
    """Compares stored values only: a file does not say how its codes were found."""
    found = []
    for name in ("codes", "scale", "zero_point", "offset", "tensor_divisor"):
        parts = [_stored(codes, name) for codes in (ours, theirs)]
        what = name.replace("_", " ").removesuffix("s") + "s"
        missing = sum(part is None for part in parts)
        if missing:
            found += [f"{path}: {what} only in one of them"] if missing == 1 else []
        elif parts[0].shape != parts[1].shape:
            shapes = f"{parts[0].shape} and {parts[1].shape}"
            found.append(f"{path}: {what} differ in shape: {shapes}")
        else:
            found += _different_values(path, what, *parts)
    if ours.quantizer.hadamard != theirs.quantizer.hadamard:
        found.append(f"{path}: rotated only in one of them")
    return found


def _stored(codes, name):
    """Returns an array of `codes`, decoded if it holds codes."""
    part = getattr(codes, name)
    if part is None or name not in ("codes", "zero_point"):
        return part
    return codes.quantizer.format.decode(part, jnp.float32)


def _different_values(path, what, ours, theirs):
    ours, theirs = (np.asarray(part, np.float32) for part in (ours, theirs))
    count = int(np.sum(~((ours == theirs) | (np.isnan(ours) & np.isnan(theirs)))))
    return [f"{path}: {count} of {ours.size} {what} differ"] if count else []
