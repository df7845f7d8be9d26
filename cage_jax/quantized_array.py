"""The codes and scales of an array, and their bytes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax.quantizers import Quantizer
from cage_jax.rounding import fit_and_round, restore
from cage_jax.scales import Grid, compute_dtype


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scale", "zero_point", "offset", "tensor_divisor"),
    meta_fields=("quantizer", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """The codes and scales of an array: what is shipped. A pytree.

    value = scale / tensor_divisor * (code value - zero_point) + offset, rotated back
    where the quantizer rotates.

    Attributes:
      codes: of the array's shape, in the narrowest dtype jax has.
      scale: in the dtype of the quantizer's scale type, else float32 (float64 for a
        float64 array); of the array's shape with each shared axis counting its groups.
      zero_point: the code of real zero, shaped as `scale`; None when symmetric.
      offset: the value of code 0, shaped and typed as `scale`, or None.
      tensor_divisor: float32, one entry per tensor, or None.
      quantizer: what made it (static).
      dtype: of the array before and after (static).

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

    def to_bytes(self) -> bytes:
        """All that is stored, `nbytes` bytes; for arrays on this machine.

        The codes in the order of the array, then the zero points, each of `bits` bits,
        the lowest bit first and without gaps; then scales, offsets and the tensors'
        divisors in their own dtypes, little-endian.
        """
        index = self.quantizer.format.to_index
        numbers = [index(self.codes).ravel()]
        if self.zero_point is not None:
            numbers.append(index(self.zero_point).ravel())
        bits = np.unpackbits(
            np.concatenate(numbers)[:, None], axis=1, count=self.bits, bitorder="little"
        )
        parts = [np.packbits(bits, bitorder="little").tobytes()]
        for array in (self.scale, self.offset, self.tensor_divisor):
            if array is not None:
                parts.append(np.asarray(array).tobytes())
        return b"".join(parts)

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        quantizer: Quantizer,
        shape: tuple[int, ...],
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> "QuantizedArray":
        """What `to_bytes` packed.

        Args:
          data: of `to_bytes`.
          quantizer: what made the array.
          shape: of the array.
          dtype: of the array before and after.

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
        dtype, wide = jnp.dtype(dtype), compute_dtype(dtype)
        expected = -(-quantizer.storage_bits(shape, wide) // 8)
        if len(data) != expected:
            raise ValueError(
                f"`data` must have {expected} bytes for shape {shape} and quantizer "
                f"{quantizer}; got {len(data)}. Give the shape and the quantizer of "
                f"the array that was packed."
            )
        count, groups = math.prod(shape), quantizer.scale_shape(shape)
        total = count + (math.prod(groups) if quantizer.asymmetric else 0)
        place = -(-total * quantizer.bits // 8)
        packed = np.frombuffer(data, np.uint8, place)
        bits = np.unpackbits(packed, count=total * quantizer.bits, bitorder="little")
        index = np.packbits(
            bits.reshape(total, quantizer.bits), axis=1, bitorder="little"
        )[:, 0]

        def read(size, kind):
            nonlocal place
            array = np.frombuffer(data, kind, math.prod(size), place).reshape(size)
            place += array.nbytes
            return jnp.asarray(array)

        from_index = quantizer.format.from_index
        scale_dtype = quantizer.scale_type.dtype or wide
        divided = quantizer.scale_type.has_tensor_divisor
        return cls(
            codes=from_index(index[:count].reshape(shape)),
            zero_point=from_index(index[count:].reshape(groups))
            if quantizer.asymmetric
            else None,
            scale=read(groups, scale_dtype),
            offset=read(groups, scale_dtype) if quantizer.scale.has_offset else None,
            tensor_divisor=read(quantizer.tensor_shape(shape), wide)
            if divided
            else None,
            quantizer=quantizer,
            dtype=dtype,
        )

    @property
    def byte_dtype(self) -> np.dtype:
        """A dtype of one byte that holds the codes."""
        dtype = self.codes.dtype
        if jnp.issubdtype(dtype, jnp.floating):
            return np.dtype(jnp.float8_e4m3fn) if self.bits < 8 else dtype
        return np.dtype(np.int8)

    @property
    def _wide(self):
        return compute_dtype(self.dtype)


# Compiled like `fake_quant`, so that a mean is summed in the same order.
@functools.partial(jax.jit, static_argnums=1)
def encoded(
    x: jax.Array, quantizer: Quantizer, grid: Grid | None, noise: jax.Array | None
) -> QuantizedArray:
    """The codes of `x`; `noise` for stochastic rounding."""
    values, _, grid = fit_and_round(x, quantizer, grid, noise)
    encode = quantizer.format.encode

    def stored(number):
        dtype = quantizer.scale_type.dtype or number.dtype
        return _without_gradient(number).astype(dtype)

    return QuantizedArray(
        codes=encode(values),
        scale=stored(grid.scale),
        zero_point=None if grid.zero_point is None else encode(grid.zero_point),
        offset=None if grid.offset is None else stored(grid.offset),
        tensor_divisor=grid.tensor_divisor,
        quantizer=quantizer,
        dtype=x.dtype,
    )


@jax.custom_vjp
def _without_gradient(number):
    return number


def _refuse_gradient(_, __):
    raise TypeError(
        "`quantize` has no gradient, but its result was differentiated. Use "
        "`fake_quant` in a loss."
    )


_without_gradient.defvjp(lambda number: (number, None), _refuse_gradient)


@jax.jit
def decoded(quantized: QuantizedArray) -> jax.Array:
    """The values of codes."""
    quantizer, dtype = quantized.quantizer, compute_dtype(quantized.dtype)
    values = quantizer.format.decode(quantized.codes, dtype)
    like = jax.ShapeDtypeStruct(quantized.shape, quantized.dtype)
    return restore(values, quantizer, grid_of(quantized), like)


def grid_of(quantized: QuantizedArray) -> Grid:
    """The grid of codes, in the dtype of computation."""
    dtype = compute_dtype(quantized.dtype)
    zero_point, offset = quantized.zero_point, quantized.offset
    decode = quantized.quantizer.format.decode
    return Grid(
        scale=quantized.scale.astype(dtype),
        zero_point=None if zero_point is None else decode(zero_point, dtype),
        offset=None if offset is None else offset.astype(dtype),
        tensor_divisor=quantized.tensor_divisor,
    )
