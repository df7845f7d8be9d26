"""Tensors of compressed-tensors: what a file stores for a parameter, and back."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.packing import COMPRESSED_TENSORS, FP4, pack, unpack
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.compressed_tensors_schemes import (
    FLOATS,
    FP8,
    MXFP4,
    PACKED,
    SUPPORTED,
    Scheme,
)
from cage_jax.export.files import malformed
from cage_jax.llama.tensors import Array, Tensor

_pack = functools.partial(jax.jit, static_argnames=("layout", "axis"))(pack)
_unpack = functools.partial(
    jax.jit, static_argnames=("layout", "dtype", "axis", "length")
)(unpack)


def stored_arrays(
    tensor: Tensor, scheme: Scheme | None, dtype: str
) -> dict[str, np.ndarray]:
    """Converts a tensor to the arrays that the file stores for it, by suffix.

    Args:
      tensor: floats or codes.
      scheme: the result of `scheme_of`.
      dtype: dtype of floats in the file.

    Raises:
      ValueError: if floats are too large for `dtype`.
    """
    array = tensor.array
    if isinstance(array, QuantizedArray):
        assert scheme is not None
        return stored_codes(jax.tree.map(lambda part: part.T, array), scheme)
    values = stored_floats(array, dtype, tensor.path)
    return {tensor.names.suffix: values.T if tensor.names.is_kernel else values}


def stored_floats(array: Any, dtype: str, path: str) -> np.ndarray:
    """Converts floats to the dtype of a file; raises ValueError if they overflow."""
    if array.dtype == dtype:
        return np.asarray(array)
    with np.errstate(over="ignore"):
        values = np.asarray(array).astype(dtype)
    if np.isinf(values).any() and not np.isinf(array).any():
        raise ValueError(
            f"`{path}`: `dtype` must hold the values; got {dtype!r}, for "
            f"{jnp.abs(array).max():g}. Use 'float32', or a template of it."
        )
    return values


def stored_codes(array: QuantizedArray, scheme: Scheme) -> dict[str, np.ndarray]:
    """Returns the arrays that a file stores for codes (out, in), by suffix."""
    codes, scale = array.codes, np.asarray(array.scale)
    if scheme == FP8:
        return {"weight": np.asarray(codes), "weight_scale": scale}
    if scheme.format == PACKED:
        narrow = f"int{scheme.bits}"
        found = {
            "weight_packed": _pack(codes.astype(narrow), COMPRESSED_TENSORS),
            "weight_scale": scale,
            "weight_shape": np.array(codes.shape, np.int64),
        }
        if array.zero_point is not None:
            found["weight_zero_point"] = _pack(
                array.zero_point.astype(narrow), COMPRESSED_TENSORS, axis=0
            )
        return {name: np.asarray(part) for name, part in found.items()}
    words = {"weight_packed": np.asarray(_pack(codes, FP4))}
    if scheme == MXFP4:
        return words | {"weight_scale": scale.view(np.uint8)}
    divisor = np.ones(1, np.float32)
    if array.tensor_divisor is not None:
        divisor = np.asarray(array.tensor_divisor).ravel()
    return words | {"weight_scale": scale, "weight_global_scale": divisor}


def kernel_of(
    module: str,
    stored: Mapping[str, np.ndarray],
    shape: tuple[int, ...],
    schemes: Sequence[Scheme],
) -> Array:
    """Builds a matrix (in, out) of floats or codes from its stored arrays.

    Args:
      module: name of the matrix, for errors.
      stored: arrays by suffix.
      shape: (in, out).
      schemes: the schemes that the matrix may have.

    Raises:
      MalformedFileError: if the arrays fit none of the schemes.
    """
    has = {suffix: (str(part.dtype), part.shape) for suffix, part in stored.items()}
    if set(has) == {"weight"} and has["weight"][0] in FLOATS:
        return floats_of(module, stored, shape[::-1]).T
    for scheme in schemes:
        expected = scheme.tensors(shape[::-1])
        if (
            shape[0] % (scheme.group_size or 1) == 0
            and set(expected) == set(has)
            and all(
                dtype in expected[suffix][0] and size == expected[suffix][1]
                for suffix, (dtype, size) in has.items()
            )
        ):
            return _codes_of(module, stored, shape, scheme)
    texts = [f"{suffix} {dtype}{list(size)}" for suffix, (dtype, size) in has.items()]
    if "weight_zero_point" in has and all(scheme.symmetric for scheme in schemes):
        raise malformed(
            f"`{module}`: the file must have no zero points, since config.json says "
            f"that its schemes are symmetric",
            texts,
            "If readers of the model use them, set symmetric to false there.",
        )
    raise malformed(
        f"`{module}`: the file must have the tensors of a matrix {shape[::-1]} of "
        f"{FLOATS}, or of a scheme in config.json that is supported, "
        f"{[scheme.format for scheme in schemes]}",
        texts,
        f"Supported are {SUPPORTED}.",
    )


def floats_of(
    module: str,
    stored: Mapping[str, np.ndarray],
    shape: tuple[int, ...],
    suffix: str = "weight",
) -> jax.Array:
    """Returns float32 values that are stored as any floats; arguments as before."""
    has = {name: f"{part.dtype}{part.shape}" for name, part in stored.items()}
    if has not in [{suffix: f"{dtype}{shape}"} for dtype in FLOATS]:
        raise malformed(
            f"`{module}`: the file must have only `{suffix}`, of {FLOATS} and shape "
            f"{shape}",
            has,
        )
    return jnp.array(stored[suffix].astype(np.float32))


def _codes_of(module, stored, shape, scheme):
    scale, zero_point, divisor = stored["weight_scale"].T, None, None
    quantizer = scheme.quantizer(str(scale.dtype))
    codes_dtype = quantizer.format.code_dtype
    if scheme.format == PACKED:
        if tuple(stored["weight_shape"].tolist()) != shape[::-1]:
            raise malformed(
                f"`{module}`: weight_shape must be {shape[::-1]}, as config.json says",
                stored["weight_shape"].tolist(),
            )
        layout = COMPRESSED_TENSORS
        words = jnp.array(stored["weight_packed"])
        codes = _unpack(words, layout, codes_dtype, length=shape[0])
        if not scheme.symmetric:
            words = jnp.array(stored["weight_zero_point"])
            zero_point = _unpack(words, layout, codes_dtype, axis=0, length=shape[1]).T
    elif "weight" in stored:
        codes = jnp.array(stored["weight"])
    else:
        codes = _unpack(jnp.array(stored["weight_packed"]), FP4, codes_dtype)
        if scheme == MXFP4:
            scale = scale.view(jnp.float8_e8m0fnu)
        else:
            divisor = jnp.array(stored["weight_global_scale"]).reshape(1, 1)
    return QuantizedArray(
        codes=codes.T,
        scale=jnp.array(scale),
        zero_point=zero_point,
        offset=None,
        tensor_divisor=divisor,
        quantizer=quantizer,
        dtype=jnp.dtype(jnp.float32),
    )
