"""Parts of parameters, floats or codes, in the layout of a template's tensors."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.template_names import Source
from cage_jax.quantizers.quantizer import Quantizer


def along_inputs(array: QuantizedArray, part: Source) -> Quantizer:
    """Returns the quantizer of a part of codes, for (out, in).

    Raises:
      ValueError: if its scales are not those of neighbours along the inputs.
    """
    quantizer, axes = array.quantizer, part.axes or "oi"
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
                f"{quantizer}, but compressed-tensors has scales for groups of "
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


def part_of(leaf: Any, source: Source) -> Any:
    """Takes a part of a parameter, floats or codes, in the layout of the template.

    The quantizer of codes stays that of the parameter, see `along_inputs`.
    """
    if isinstance(leaf, QuantizedArray):
        return jax.tree.map(lambda array: taken(array, source, leaf.shape), leaf)
    return np.asarray(taken(leaf, source, leaf.shape))


def taken(array: Any, source: Source, whole: tuple[int, ...]) -> Any:
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
    if source.outputs is None or array.shape[0] == 1:
        return array
    return array[slice(*source.outputs)]


def joined(parts: Sequence[QuantizedArray], quantizer: Quantizer) -> QuantizedArray:
    """Joins codes along their outputs, and gives them the quantizer of the whole."""
    first: Any = parts[0]
    if len(parts) > 1:
        names = ["codes", "scale"] + ["zero_point"] * (first.zero_point is not None)
        first = dataclasses.replace(
            first,
            **{
                name: jnp.concatenate([getattr(part, name) for part in parts])
                for name in names
            },
        )
    return dataclasses.replace(first, quantizer=quantizer)
