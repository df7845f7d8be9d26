"""Comparison of a tensor of a file with what was trained, number by number."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from cage_jax.core.on_grid import on_grid
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.audit_report import Finding, TensorRow
from cage_jax.export.compressed_tensors_schemes import FLOATS

_PARTS = ("codes", "scale", "zero_point", "offset", "tensor_divisor")


def compared(
    path: str, trained: Any, shipped: Any, kind: str | None = None
) -> tuple[TensorRow, list[Finding]]:
    """Compares a tensor with its parameter.

    Args:
      path: the name of the tensor.
      trained: floats or codes, in the layout of `shipped`.
      shipped: floats or codes of the file.
      kind: how the file stores floats, such as "float16"; None for their dtype.

    Returns:
      The row of the tensor, and its differences.
    """
    cast = grid = None
    if trained.shape != shipped.shape:
        shapes = f"{shipped.shape} in the file, {trained.shape} in training"
        found = [Finding(path, "shape", shapes)]
    elif _is_codes(trained) and _is_codes(shipped):
        found = _different_codes(path, trained, shipped)
    elif _is_codes(shipped):
        text = f"{shipped.quantizer} in the file, floats in training"
        found = [Finding(path, "quantized", text)]
    elif _is_codes(trained):
        kind = kind or shipped.dtype.name
        grid = on_grid(shipped, trained, kind if kind in FLOATS else None)
        text = f"floats in the file, {trained.quantizer} in training: {grid}"
        found = [Finding(path, "floats", text)] if grid.share < 1 else []
    else:
        kind = kind or shipped.dtype.name
        cast, found = _different_floats(path, trained, shipped, kind)
    result = ", ".join(dict.fromkeys(each.kind for each in found)) or "same"
    if grid is not None:
        result = f"floats: {grid}"
    elif cast is not None:
        result = f"rounded to {kind}, by at most {cast:.2g} of a value"
    shape, names = tuple(shipped.shape), (_name(trained), _name(shipped, kind))
    return TensorRow(path, shape, *names, result, cast, grid), found


def _is_codes(array):
    return isinstance(array, QuantizedArray)


def _name(array, kind=None):
    return str(array.quantizer) if _is_codes(array) else kind or array.dtype.name


def _different_codes(path, trained, shipped):
    """Compares what is stored; codes by the values of their formats."""
    found = []
    for name in _PARTS:
        pair = [_stored(array, name) for array in (trained, shipped)]
        what = f"{name.replace('_', ' ').removesuffix('s')}s"
        ours, theirs = pair
        if (ours is None) != (theirs is None):
            where = "the file" if ours is None else "training"
            found.append(Finding(path, what, f"{what} only in {where}"))
        elif ours is not None and ours.shape != theirs.shape:
            text = f"{what} {theirs.shape} in the file, {ours.shape} in training"
            found.append(Finding(path, what, text))
        elif ours is not None:
            found += _different(path, what, ours, theirs)
    if trained.quantizer.hadamard != shipped.quantizer.hadamard:
        where = "training" if trained.quantizer.hadamard else "the file"
        found.append(Finding(path, "rotation", f"rotated only in {where}"))
    return found


def _stored(array, name):
    """Returns a part of codes as NumPy, decoded if it holds codes."""
    part = getattr(array, name)
    if part is not None and name in ("codes", "zero_point"):
        part = array.quantizer.format.decode(part, jnp.float32)
    return None if part is None else np.asarray(part)


def _different_floats(path, trained, shipped, kind):
    """Returns the change by rounding, if that is all that differs, and the findings."""
    ours, theirs = np.asarray(trained), np.asarray(shipped)
    found = _different(path, "values", ours, theirs)
    if not found or kind not in FLOATS or not jnp.issubdtype(ours.dtype, jnp.floating):
        return None, found
    rounded, (ours, theirs) = _cast(ours, kind), _comparable(ours, theirs)
    if not _same(rounded, theirs).all() or np.isinf(theirs[np.isfinite(ours)]).any():
        return None, found
    some = ours != 0
    change = np.abs((theirs[some] - ours[some]) / ours[some])
    return float(change.max()), []


def _different(path, what, ours, theirs):
    """Counts the numbers that differ, and names the first of them."""
    kind = theirs.dtype.name
    rounded = what == "scales" and ours.dtype != theirs.dtype and _cast(ours, kind)
    ours, theirs = _comparable(ours, theirs)
    differ = ~_same(ours, theirs)
    if not (count := int(differ.sum())):
        return []
    place = tuple(map(int, np.unravel_index(np.argmax(differ), differ.shape)))
    text = (
        f"{count} of {differ.size} {what} differ, first at {place}: "
        f"{theirs[place]:.9g} in the file, {ours[place]:.9g} in training"
    )
    if rounded is not False and _same(rounded, theirs).all():
        text += f"; all are those of training, rounded to {kind}"
    return [Finding(path, what, text)]


def _cast(array, dtype):
    with np.errstate(over="ignore"):
        return array.astype(jnp.dtype(dtype)).astype(np.float32)


def _comparable(*arrays):
    """Converts to a dtype of NumPy that holds both exactly."""
    wide = any(array.dtype.itemsize > 4 for array in arrays)
    return [array.astype(np.float64 if wide else np.float32) for array in arrays]


def _same(ours, theirs):
    return (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
