"""Parts of trees that make the tensors of a template: checks, cuts and joins."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.checks import first_lines
from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.core.finite import check_finite, check_values
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.safetensors_files import Like
from cage_jax.export.template_names import LISTED, Source
from cage_jax.llama.loaded import Model
from cage_jax.quantizers.quantizer import Quantizer

Coding = TypeVar("Coding")


def leaves_of(codes: Any) -> dict[str, Any]:
    """Returns the parameters of a tree by path."""
    if isinstance(codes, Model):
        raise TypeError(
            "`codes` must be parameters; got a whole Model. Use model.params."
        )
    paths, leaves, _ = flatten_with_paths(codes, QuantizedArray)
    for path, leaf in zip(paths, leaves):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(
                f"`{path}`: `codes` must be arrays and QuantizedArrays; got "
                f"{type(leaf).__name__}. Pass what quantize(params, rules) returns."
            )
    found = dict(zip(paths, leaves))
    check_values(found)
    return found


def coded_tensors(
    sources: Mapping[str, Sequence[Source]],
    leaves: Mapping[str, Any],
    tensors: Mapping[str, Like],
    coding: Callable[[str, QuantizedArray], Coding],
    format: str,
) -> dict[str, Coding]:
    """Finds how each quantized tensor is stored.

    Args:
      sources: the parts of each tensor, from `sources_of`.
      leaves: the parameters by path.
      tensors: the tensors of the template.
      coding: finds it for a tensor, of its name and of codes with the quantizer of the
        whole tensor (out, in); raises ValueError, with no path, if it cannot be stored.
      format: name of the format, for errors.

    Raises:
      ValueError: if some cannot be stored; it lists all of them.
    """
    coded, problems = {}, []
    for name, parts in sources.items():
        arrays = [leaves[part.path] for part in parts]
        paths = " and ".join(f"`{part.path}`" for part in parts)
        try:
            if any(isinstance(array, QuantizedArray) for array in arrays):
                coded[name] = coding(name, _like_all(name, parts, arrays))
            else:
                _check_dtypes(arrays, tensors[name].dtype)
        except ValueError as error:
            problems.append(f"{paths}: {error}")
    if problems:
        problems = list(dict.fromkeys(problems))  # a stack has the same one many times
        raise ValueError(
            f"`codes` must be what {format} holds in this template; got\n"
            f"{first_lines(problems, LISTED)}"
        )
    return coded


def _check_dtypes(arrays, dtype):
    for array in arrays:
        floats = [jnp.issubdtype(each, jnp.floating) for each in (array.dtype, dtype)]
        if array.dtype != dtype and not all(floats):
            raise ValueError(f"{array.dtype}, for {dtype} in the template")


def _like_all(name, parts, arrays):
    """Returns codes with the quantizer of the tensor that they make."""
    if not all(isinstance(array, QuantizedArray) for array in arrays):
        raise ValueError(f"floats and codes in `{name}`. Quantize all of it or nothing")
    like = {along_inputs(array, part) for array, part in zip(arrays, parts)}
    found = {(array.scale.dtype, jnp.dtype(array.dtype)) for array in arrays}
    if len(like) > 1 or len(found) > 1:
        raise ValueError(f"several quantizers in `{name}`. Give all parts the same one")
    divisors = [
        np.asarray(_taken(array.tensor_divisor, part, array.shape)).ravel()
        for array, part in zip(arrays, parts)
        if array.tensor_divisor is not None
    ]
    if divisors and len(set(np.concatenate(divisors).tolist())) > 1:
        raise ValueError(f"several tensor divisors in `{name}`. Quantize it as a whole")
    return dataclasses.replace(arrays[0], quantizer=like.pop())


def along_inputs(array: QuantizedArray, part: Source) -> Quantizer:
    """Returns the quantizer of a part of codes, for (out, in).

    Raises:
      ValueError: if its scales are not those of neighbours along the inputs.
    """
    quantizer = array.quantizer
    axes = part.axes or "o" * (len(array.shape) - 1) + "i"
    if quantizer.hadamard is not None:
        raise ValueError(f"{quantizer}, whose rotation readers do not do. Use none.")
    blocks = quantizer.blocks(tuple(array.shape))
    sizes = dict(zip(blocks.axes, blocks.sizes))
    group, whole = 1, True
    for axis, letter in reversed(list(enumerate(axes))):
        size, length = sizes.get(axis, 1), array.shape[axis]
        if letter == "o":
            fits = size == 1
        else:
            fits = letter == "l" or whole or size == 1
        if not fits:
            inputs = [n - len(axes) for n, each in enumerate(axes) if each == "i"]
            raise ValueError(
                f"{quantizer}, but readers take scales for groups of "
                f"neighbours along the inputs alone. Use axis="
                f"{inputs[0] if len(inputs) == 1 else tuple(inputs)}, for its axes "
                f"{axes!r}."
            )
        if letter == "i" and whole:
            group, whole = group * size, size == length
    channel = whole and all(size is None for size in quantizer.group_sizes)
    return dataclasses.replace(
        quantizer, axis=-1, group_size=None if channel else group
    )


def whole_of(
    parts: Sequence[Source],
    leaves: Mapping[str, Any],
    quantizer: Quantizer | None = None,
) -> Any:
    """Joins the parts of a tensor, in its own layout.

    Args:
      parts: the parts, from `sources_of`.
      leaves: the parameters by path.
      quantizer: the quantizer of the whole if they are codes; None for floats.

    Raises:
      ValueError: if there are NaN or infinities.
    """
    found = []
    for part in parts:
        found.append(part_of(leaves[part.path], part))
        check_finite({part.path: found[-1]})
    if quantizer is not None:
        return joined(found, quantizer)
    return np.concatenate(found) if len(found) > 1 else found[0]


def part_of(leaf: Any, source: Source) -> Any:
    """Takes a part of a parameter, floats or codes, in the layout of the template.

    The quantizer of codes stays that of the parameter, see `along_inputs`.
    """
    if isinstance(leaf, QuantizedArray):
        return jax.tree.map(lambda array: _taken(array, source, leaf.shape), leaf)
    return np.asarray(_taken(leaf, source, leaf.shape))


def _taken(array, source, whole):
    """Takes a part of codes, scales or floats of a parameter of the shape `whole`."""
    axes = source.axes
    if axes is not None:
        if source.place is not None:
            axis = axes.index("l")
            # Places that share a scale have one entry for all.
            place = source.place * array.shape[axis] // whole[axis]
            array = array[(slice(None),) * axis + (place,)]
            axes = axes.replace("l", "")
        order = [k for each in "oi" for k, letter in enumerate(axes) if letter == each]
        array = array.transpose(order).reshape(Source("", axes).shape(array.shape))
    cut = source.outputs is not None and array.shape[0] > 1
    return array[slice(*source.outputs)] if cut else array


def joined(parts: Sequence[QuantizedArray], quantizer: Quantizer) -> QuantizedArray:
    """Joins codes along their outputs, and gives them the quantizer of the whole."""
    first: Any = parts[0]
    if len(parts) > 1:
        first = dataclasses.replace(
            first,
            **{
                name: jnp.concatenate([getattr(part, name) for part in parts])
                for name in ("codes", "scale", "zero_point", "offset")
                if getattr(first, name) is not None
            },
        )
    return dataclasses.replace(first, quantizer=quantizer)
