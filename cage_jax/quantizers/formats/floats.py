"""Floating-point numbers of 4, 6 and 8 bits."""

import dataclasses
import functools
from typing import Literal, get_args

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from cage_jax.arrays.checks import check_choice
from cage_jax.arrays.exact import clamp, power_below
from cage_jax.quantizers.formats.base import Format, constant

FloatName = Literal["e2m1", "e2m3", "e3m2", "e4m3", "e5m2"]
_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


@dataclasses.dataclass(frozen=True)
class Float(Format):
    """Floating-point numbers of 4, 6 or 8 bits, defined by the Open Compute Project.

    Values beyond the largest saturate; infinities and NaN have no code. 6-bit codes are
    held in float8_e4m3fn, because JAX has no narrower dtype for them.

    Args:
      name: the numbers of exponent and mantissa bits: "e2m1" (FP4), "e2m3" or "e3m2"
        (FP6), "e4m3" or "e5m2" (FP8).
    """

    name: FloatName
    has_zero = True

    def __post_init__(self):
        check_choice("name", self.name, get_args(FloatName), "Use 'e4m3' for FP8.")

    @functools.cached_property
    def _dtype(self) -> np.dtype:
        return np.dtype(_DTYPES[self.name])

    @functools.cached_property
    def bits(self) -> int:  # type: ignore[override]
        return ml_dtypes.finfo(self._dtype).bits

    @functools.cached_property
    def values(self) -> np.ndarray:
        every = np.arange(2**self.bits, dtype=np.uint8).view(self._dtype)
        every = every.astype(np.float64)
        return constant(np.unique(every[np.isfinite(every)]))

    @functools.cached_property
    def code_dtype(self) -> np.dtype:
        return np.dtype(jnp.float8_e4m3fn) if self.bits == 6 else self._dtype

    def round(self, x):
        x = clamp(x, self.low, self.high)
        step = self._step(x)
        return jnp.round(x / step) * step

    def neighbours(self, x):
        x = jnp.clip(x, self.low, self.high)
        step = self._step(x)
        below = jnp.floor(x / step) * step
        return below, jnp.minimum(below + step, self.high)

    def _step(self, x):
        """Returns the distance between grid values around `x`, a power of two."""
        own = ml_dtypes.finfo(self._dtype)
        return jnp.maximum(power_below(x), 2.0 ** int(own.minexp)) * 2.0**-own.nmant

    def encode(self, value):
        return jnp.where(jnp.isnan(value), 0, value).astype(self.code_dtype)

    def decode(self, codes, dtype):
        return codes.astype(dtype)

    def to_index(self, codes):
        values = np.asarray(codes).astype(np.float32)
        return values.astype(self._dtype).view(np.uint8)

    def from_index(self, index):
        index = jnp.asarray(index, jnp.uint8)
        if self.bits != 6:
            word = index.astype(f"uint{self.bits}")
            return lax.bitcast_convert_type(word, self._dtype)
        # Read the bits as E4M3, then rescale, because its exponents begin lower.
        own, wide = ml_dtypes.finfo(self._dtype), ml_dtypes.finfo(self.code_dtype)
        sign, size = index >> 5 << 7, (index & 31) << (wide.nmant - own.nmant)
        values = lax.bitcast_convert_type(sign | size, self.code_dtype)
        factor = 2.0 ** (int(own.minexp) - int(wide.minexp))
        return (values.astype(jnp.float32) * factor).astype(self.code_dtype)

    def __str__(self):
        return f"fp{self.bits} {self.name}"
