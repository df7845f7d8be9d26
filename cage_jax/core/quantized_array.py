"""The codes and scales of an array, and their bytes."""

import contextlib
import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.packing import pack_bits, unpack_bits
from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.quantizers.formats import Format
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.rounding import dequantized, rounding

_AT_ONCE = 2**18  # codes packed at a time; they fill whole bytes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scale", "zero_point", "offset", "tensor_divisor"),
    meta_fields=("quantizer", "dtype"),
)
@dataclasses.dataclass(frozen=True, repr=False)
class QuantizedArray:
    """The codes and scales of an array, as they are shipped. A pytree.

    value = scale / tensor_divisor * (code value - zero_point) + offset, rotated back
    if the quantizer rotates.

    Attributes:
      codes: an array of the original shape, in the narrowest dtype that JAX has.
      scale: the scales, in the dtype of the quantizer's scale type, else float32
        (float64 for a float64 array). Their shape is the array's, with the number of
        groups along each shared axis.
      zero_point: the code of real zero, shaped as `scale`; None when symmetric.
      offset: the value of code 0, shaped and typed as `scale`, or None.
      tensor_divisor: float32, one entry per tensor, or None.
      quantizer: the quantizer that made the codes (static).
      dtype: the dtype of the array before and after (static).

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> kernel = jnp.linspace(-1, 1, 64, dtype=jnp.float32).reshape(32, 2)
      >>> quantized = cage.quantize(kernel, cage.int4(group_size=16))
      >>> quantized.codes.dtype, quantized.scale.shape, quantized.nbytes
      (dtype(int4), (2, 2), 48)
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    offset: jax.Array | None
    tensor_divisor: jax.Array | None
    quantizer: Quantizer
    dtype: jnp.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.codes.shape

    @property
    def bits(self) -> int:
        """Width of one code."""
        return self.quantizer.bits

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, packed, with scales and zero points."""
        return -(-self.quantizer.storage_bits(self.shape, self._wide) // 8)

    def __repr__(self) -> str:
        shape = getattr(self.codes, "shape", None)
        told = [str(shape), str(jnp.dtype(self.dtype)), str(self.quantizer)]
        with contextlib.suppress(AttributeError, ValueError):  # under vmap, for example
            told.append(f"{self.nbytes} bytes")
        return f"QuantizedArray({', '.join(told)})"

    def __array__(self, dtype=None, copy=None):
        raise _no_array("converted")

    def __getitem__(self, key):
        raise _no_array("indexed")

    def __matmul__(self, other):
        raise _no_array("multiplied")

    __rmatmul__ = __mul__ = __rmul__ = __matmul__

    def __add__(self, other):
        raise _no_array("added")

    __radd__ = __sub__ = __rsub__ = __add__

    def __truediv__(self, other):
        raise _no_array("divided")

    __rtruediv__ = __floordiv__ = __rfloordiv__ = __truediv__

    if not TYPE_CHECKING:  # a type checker would take any attribute for known

        def __getattr__(self, name):
            if not hasattr(jax.Array, name):
                return object.__getattribute__(self, name)  # raises Python's error
            error = _no_array(f"used with `.{name}`")
            raise AttributeError(str(error), name=name, obj=self)

    def to_bytes(self) -> bytes:
        """Packs all that is stored into `nbytes` bytes; for arrays on this machine.

        The codes come first, in the order of the array, then the zero points, each of
        `bits` bits, the lowest bit first and without gaps. Scales, offsets and the
        tensors' divisors follow in their own dtypes, little-endian.
        """
        numbers = [
            np.asarray(array).ravel()
            for array in (self.codes, self.zero_point)
            if array is not None
        ]
        # Codes are copied only if zero points follow them.
        codes = numbers[0] if len(numbers) == 1 else np.concatenate(numbers)
        parts = [packed(codes, self.quantizer.format).tobytes()]
        for array in (self.scale, self.offset, self.tensor_divisor):
            if array is not None:
                parts.append(np.asarray(array).tobytes())
        return b"".join(parts)

    @classmethod
    def from_bytes(
        cls,
        data: bytes | memoryview,
        quantizer: Quantizer,
        shape: tuple[int, ...],
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> "QuantizedArray":
        """Unpacks what `to_bytes` packed.

        Args:
          data: the result of `to_bytes`.
          quantizer: the quantizer that made the codes.
          shape: the array's shape.
          dtype: the dtype of the array before and after.

        Raises:
          ValueError: for bytes that are too few or too many.

        Example:
          >>> import cage_jax as cage
          >>> import jax.numpy as jnp
          >>> quantized = cage.quantize(jnp.ones((32, 2)), cage.int4())
          >>> data = quantized.to_bytes()
          >>> len(data)
          40
          >>> again = cage.QuantizedArray.from_bytes(data, cage.int4(), (32, 2))
          >>> bool((cage.dequantize(again) == cage.dequantize(quantized)).all())
          True
        """
        like = cls.abstract(quantizer, shape, dtype)
        expected = like.nbytes
        if len(data) != expected:
            raise ValueError(
                f"`data` must have {expected} bytes for shape {shape} and quantizer "
                f"{quantizer}; got {len(data)}. Give the shape and the quantizer of "
                f"the array that was packed."
            )
        count = math.prod(shape)
        zeros = () if like.zero_point is None else like.zero_point.shape
        total = count + (0 if like.zero_point is None else math.prod(zeros))
        place = -(-total * quantizer.bits // 8)
        packed = np.frombuffer(data, np.uint8, place)
        # The code of each number; NumPy stores narrow dtypes in one byte each.
        every = np.arange(2**quantizer.bits, dtype=np.uint8)
        code_of = np.asarray(quantizer.format.from_index(every))
        codes = np.empty(total, code_of.dtype)
        for start in range(0, total, _AT_ONCE):
            part = codes[start : start + _AT_ONCE]
            first = start * quantizer.bits // 8
            last = first - (-part.size * quantizer.bits // 8)
            numbers = unpack_bits(packed[first:last], quantizer.bits, part.size)
            part[...] = code_of[numbers]

        def read(like):
            nonlocal place
            if like is None:
                return None
            array = np.frombuffer(data, like.dtype, math.prod(like.shape), place)
            place += array.nbytes
            return jnp.array(array.reshape(like.shape))

        return dataclasses.replace(
            like,
            codes=jnp.asarray(codes[:count].reshape(shape)),
            zero_point=None
            if like.zero_point is None
            else jnp.asarray(codes[count:].reshape(zeros)),
            scale=read(like.scale),
            offset=read(like.offset),
            tensor_divisor=read(like.tensor_divisor),
        )

    @classmethod
    def abstract(
        cls,
        quantizer: Quantizer,
        shape: tuple[int, ...],
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> "QuantizedArray":
        """Returns the shapes and dtypes of the result of `quantize`.

        Args:
          quantizer: the quantizer that makes the codes.
          shape: the array's shape.
          dtype: the dtype of the array before and after.

        Returns:
          A `QuantizedArray` of `jax.ShapeDtypeStruct`s.

        Raises:
          ValueError: for a shape that the quantizer does not fit.
        """
        shape, wide = tuple(shape), compute_dtype(jnp.dtype(dtype))
        quantizer = quantizer.at(shape)
        blocks = quantizer.blocks(shape)
        of: Any = jax.ShapeDtypeStruct
        scale = of(blocks.scale_shape, quantizer.scale_type.dtype or wide)
        code, asymmetric = quantizer.format.code_dtype, quantizer.asymmetric
        divided = quantizer.scale_type.has_tensor_divisor
        return cls(
            codes=of(shape, code),
            scale=scale,
            zero_point=of(blocks.scale_shape, code) if asymmetric else None,
            offset=scale if quantizer.scale.has_offset else None,
            tensor_divisor=of(blocks.tensor_shape, wide) if divided else None,
            quantizer=quantizer,
            dtype=jnp.dtype(dtype),
        )

    @property
    def _wide(self):
        return compute_dtype(self.dtype)


def packed(codes: np.ndarray, format: Format) -> np.ndarray:
    """Packs the bits of codes one after another, uint8; in parts, to save memory."""
    codes = codes.ravel()
    parts = [
        pack_bits(format.to_index(codes[start : start + _AT_ONCE]), format.bits)
        for start in range(0, codes.size, _AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


# Compiled like `fake_quant`, so that a mean is summed in the same order.
@functools.partial(jax.jit, static_argnums=1)
def encoded(
    x: jax.Array, quantizer: Quantizer, grid: Grid | None, noise: jax.Array | None
) -> QuantizedArray:
    """Quantizes `x`; `noise` is for stochastic rounding."""
    found, encode = rounding(x, quantizer, grid), quantizer.format.encode
    grid = found.grid

    def stored(number):
        dtype = quantizer.scale_type.dtype or number.dtype
        return _without_gradient(number, x).astype(dtype)

    return QuantizedArray(
        codes=encode(found.code_values(noise)),
        scale=stored(grid.scale),
        zero_point=None if grid.zero_point is None else encode(grid.zero_point),
        offset=None if grid.offset is None else stored(grid.offset),
        tensor_divisor=grid.tensor_divisor,
        quantizer=quantizer,
        dtype=x.dtype,
    )


@jax.custom_vjp
def _without_gradient(number, x):
    return number


def _refuse_gradient(_, __):
    raise TypeError(
        "`quantize` has no gradient, but its result was differentiated. Use "
        "`fake_quant` in a loss."
    )


_without_gradient.defvjp(lambda number, x: (number, None), _refuse_gradient)


@jax.jit
def decoded(quantized: QuantizedArray) -> jax.Array:
    """Returns the values of codes."""
    quantizer, dtype = quantized.quantizer, compute_dtype(quantized.dtype)
    values = quantizer.format.decode(quantized.codes, dtype)
    like = jax.ShapeDtypeStruct(quantized.shape, quantized.dtype)
    return dequantized(values, quantizer, grid_of(quantized), like)


def grid_of(quantized: QuantizedArray) -> Grid:
    """Returns the grid of codes, in the dtype of computation."""
    dtype = compute_dtype(quantized.dtype)
    zero_point, offset = quantized.zero_point, quantized.offset
    decode = quantized.quantizer.format.decode
    return Grid(
        scale=quantized.scale.astype(dtype),
        zero_point=None if zero_point is None else decode(zero_point, dtype),
        offset=None if offset is None else offset.astype(dtype),
        tensor_divisor=quantized.tensor_divisor,
    )


def check_no_codes(**trees: Any) -> None:
    """Raises TypeError for codes in arguments that must be floats, given by name."""
    for name, tree in trees.items():
        paths, leaves, _ = flatten_with_paths(tree, QuantizedArray)
        for path, leaf in zip(paths, leaves):
            if isinstance(leaf, QuantizedArray):
                raise TypeError(
                    f"`{name}` must be floats; got codes at {path!r}, {leaf!r}. Use "
                    f"cage.dequantize(codes)."
                )


def _no_array(what):
    return TypeError(
        f"a QuantizedArray cannot be {what} like an array. Use dequantize(codes) for "
        f"the values, or low_bit(apply) to run a model on the codes."
    )
