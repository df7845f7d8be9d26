"""Rotations of weights, given to the weights before them.

A file's reader multiplies with codes as they are, and does not rotate. What a rotated
matrix is multiplied with must then come rotated, which the weights before can do where
nothing but products lies between, and where they are floats: the values of attention
before its output. Behind a norm's weights, or between the factors of a SwiGLU, nothing
can.
"""

import dataclasses
from collections.abc import Mapping

import jax

from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.llama.config import LlamaConfig
from cage_jax.quantizers.rounding import basis_factor, in_basis

Array = jax.Array | QuantizedArray
OUTPUT, VALUE = "output/kernel", "value/kernel"


def folded(arrays: Mapping[str, Array], config: LlamaConfig) -> dict[str, Array]:
    """The parameters, with rotations where they can be in the weights before.

    The model computes the same, up to the rounding of floats; codes and scales stay as
    they are.

    Args:
      arrays: floats and codes by path.
      config: the model's dimensions.

    Returns:
      The same, where `output/kernel` has a rotation of blocks that divide a head, and
      `value/kernel` is of floats: the one without rotation, the other rotated. All
      other rotations are left, for the writer of the file to refuse.
    """
    found = dict(arrays)
    for path, codes in arrays.items():
        before = path.removesuffix(OUTPUT) + VALUE
        if not (path.endswith(OUTPUT) and isinstance(codes, QuantizedArray)):
            continue
        value, quantizer = arrays.get(before), codes.quantizer
        if (
            quantizer.hadamard is None
            or value is None
            or isinstance(value, QuantizedArray)
            or config.head_size % quantizer.hadamard
            # Signs differ from head to head; those that share their values may not.
            or (quantizer.hadamard_seed is not None and config.kv_heads != config.heads)
        ):
            continue
        of_outputs = dataclasses.replace(quantizer, axis=-1, group_size=None)
        rotated = in_basis(value, of_outputs) * basis_factor(of_outputs)
        found[before] = rotated.astype(value.dtype)
        plain = dataclasses.replace(quantizer, hadamard=None, hadamard_seed=None)
        found[path] = dataclasses.replace(codes, quantizer=plain)
    return found


def why_not_folded(path: str) -> str:
    """Why a rotated parameter stays rotated, and what to do."""
    if path.endswith(OUTPUT):
        return (
            "Its rotation folds into value/kernel where that is of floats and the "
            "block divides a head: leave value/kernel unquantized, or use "
            "hadamard=None."
        )
    return (
        "Its rotation cannot be folded into the weights before it, which a norm or a "
        "product of activations keeps apart: use hadamard=None."
    )
