"""Folding of the rotations of weights into the preceding weights.

Programs that read a file multiply by the codes as they are and do not rotate. So the
inputs of a rotated matrix must already be rotated. The preceding weights can do this if
they are floats and only products lie in between: the value projection of attention,
before the output projection. It is not possible after the weights of a norm, or between
the factors of a SwiGLU.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.llama.config import LlamaConfig

Array = jax.Array | QuantizedArray
OUTPUT, VALUE, BIAS = "output/kernel", "value/kernel", "value/bias"


def folded(arrays: Mapping[str, Array], config: LlamaConfig) -> dict[str, Array]:
    """Folds rotations of floats and codes, by path, into the preceding weights.

    If the rotation blocks of `output/kernel` divide a head and `value/kernel` holds
    floats, the rotation moves from `output/kernel` to `value/kernel` and its bias. All
    other rotations stay, and the file's writer rejects them. The model computes the
    same up to the rounding of floats; codes and scales do not change.
    """
    result = dict(arrays)
    for path, codes in arrays.items():
        if not (path.endswith(OUTPUT) and isinstance(codes, QuantizedArray)):
            continue
        before = [path.removesuffix(OUTPUT) + name for name in (VALUE, BIAS)]
        before = [name for name in before if name in arrays]
        quantizer = codes.quantizer
        if (
            quantizer.hadamard is None
            or not before
            or any(isinstance(arrays[name], QuantizedArray) for name in before)
            or config.head_size % quantizer.hadamard
            # Random signs differ between heads, but heads that share values need equal
            # ones.
            or (quantizer.hadamard_seed is not None and config.kv_heads != config.heads)
        ):
            continue
        along_outputs = dataclasses.replace(quantizer, axis=-1, group_size=None)
        for name in before:
            floats: Any = arrays[name]
            rotated = along_outputs.basis(floats.shape).rotate(floats)
            result[name] = rotated.astype(floats.dtype)
        plain = dataclasses.replace(quantizer, hadamard=None, hadamard_seed=None)
        result[path] = dataclasses.replace(codes, quantizer=plain)
    return result


def why_not_folded(path: str) -> str:
    """Explains why a parameter stays rotated, and what to do."""
    if path.endswith(OUTPUT):
        return (
            "Its rotation can only be folded into value/kernel if that holds floats "
            "and the block divides a head: leave value/kernel unquantized, or use "
            "hadamard=None."
        )
    return (
        "Its rotation cannot be folded into the weights before it, because a norm or "
        "a product of activations lies in between: use hadamard=None."
    )
