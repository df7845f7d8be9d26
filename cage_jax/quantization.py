"""Quantizing arrays, and trees of them by path, with straight-through gradients."""

import dataclasses
import functools
import math
import warnings
import zlib
from collections.abc import Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.exact import divide, rounded
from cage_jax.hadamard import transform
from cage_jax.paths import flatten_with_paths, path_in_errors
from cage_jax.quantizers import Quantizer
from cage_jax.rules import Rules
from cage_jax.scales import Grid, compute_dtype

_WHOLE = jnp.dtype("int16")  # rounded values turned back, between the two halves of e
_ALLOWED_FLOATS = "float32, bfloat16, float16 or float64"


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
        signed = jnp.issubdtype(dtype, jnp.signedinteger)
        return np.dtype(np.int8 if signed else np.uint8)

    @property
    def _wide(self):
        return compute_dtype(self.dtype)


@overload
def fake_quant(
    x: jax.Array,
    quantizer: Quantizer,
    *,
    grid: Grid | None = None,
    key: jax.Array | None = None,
) -> jax.Array: ...
@overload
def fake_quant(
    x: Any,
    quantizer: Rules,
    *,
    grid: Mapping[str, Grid] | None = None,
    key: jax.Array | None = None,
) -> Any: ...
def fake_quant(x, quantizer, *, grid=None, key=None):
    """Quantizes and dequantizes `x`, with a straight-through gradient.

    Computed in float32 (float64 for float64); the dtype is kept. The gradient goes to
    `x` as the quantizer's `gradient` says (identity, clip, trust; in the rotated basis
    where there is a rotation): the gradient of `loss(fake_quant(params, rules))` is
    exactly the gradient of the loss at the quantized parameters, under that mask. It
    goes to the scale where that is learned (LSQ), and to no other scale. It can be
    differentiated in reverse any number of times; forward mode (`jax.jvp`) is not
    defined.

    An all-zero group gives zeros (tiny numbers where the grid has no zero). A NaN or
    an infinity makes its whole group NaN.

    Args:
      x: an array of real floats, or a tree of parameters.
      quantizer: a `Quantizer` for an array, `Rules` for a tree: each parameter that a
        rule names is quantized, the others are left as they are.
      grid: where the grid lies, instead of what the scale rule finds in `x`: a `Grid`
        for an array, a dict from path to `Grid` for a tree (such as the `grids` in
        the state of `cage(..., freeze_scale=True)`). Where its scale is 0 the grid is
        found in `x`. A learned grid must be given, here or in `x` by `with_grids`;
        where its scale is not positive the group becomes NaN.
      key: of `jax.random`, needed for stochastic rounding and for nothing else; in a
        tree each parameter draws its own numbers from it.

    Returns:
      An array, or a tree, like `x`.

    Raises:
      TypeError: for integers, complex numbers, and a quantizer of the wrong kind.
      ValueError: for an axis out of range, a group or a Hadamard block that does not
        divide, a grid of the wrong shape; with the parameter's path in a tree.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.5], [-3.5], [1.3]])
      >>> cage.fake_quant(x, cage.int4()).ravel().tolist()
      [0.5, -3.5, 1.5]
      >>> jax.grad(lambda x: (3 * cage.fake_quant(x, cage.int4())).sum())(x).ravel()
      Array([3., 3., 3.], dtype=float32)

    Source: Bengio et al., arXiv 1308.3432 (straight through); QuEST, arXiv 2502.05003.
    """
    return _apply(_fake_quant_array, x, quantizer, grid, key)


def quantize(x, quantizer, *, grid=None, key=None):
    """The codes and scales of `x`.

    `dequantize(quantize(x, quantizer))` equals `fake_quant(x, quantizer)` to the bit,
    with the same `grid` for both. Codes have no gradient, and to differentiate through
    their scales is an error: `fake_quant` has the straight-through gradient.

    Args:
      x: an array of real floats, or a tree of parameters.
      quantizer: a `Quantizer` for an array, `Rules` for a tree.
      grid: as in `fake_quant`.
      key: as in `fake_quant`.

    Returns:
      A `QuantizedArray`, or a tree like `x` with one in place of each parameter that a
      rule names.

    Raises:
      TypeError, ValueError: as `fake_quant`.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> quantized = cage.quantize(jnp.array([[0.5], [-3.5], [1.3]]), cage.int4())
      >>> quantized.codes.ravel().tolist(), quantized.scale.ravel().tolist()
      ([1, -7, 3], [0.5])
    """
    return _apply(_quantize_array, x, quantizer, grid, key)


def dequantize(x, quantizer=None):
    """The values that codes stand for.

    Args:
      x: a `QuantizedArray`, or a tree with some of them among its leaves.
      quantizer: None, or the `Quantizer` or `Rules` that made `x`, to have them
        checked: codes know their quantizer.

    Returns:
      An array in the dtype of the original, or a tree like `x`.

    Raises:
      TypeError: for an array that is not quantized.
      ValueError: for codes that another quantizer made.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> quantized = cage.quantize(jnp.array([[0.5], [-3.5], [1.3]]), cage.int4())
      >>> cage.dequantize(quantized).ravel().tolist()
      [0.5, -3.5, 1.5]
    """
    paths, leaves, structure = flatten_with_paths(x, is_leaf=_is_quantized)
    if not any(map(_is_quantized, leaves)):
        raise TypeError(
            f"`x` must be a QuantizedArray, or a tree with some; got "
            f"{type(x).__name__} without any. Use `quantize` first, or `fake_quant` "
            f"for both in turn."
        )
    values = []
    for path, leaf in zip(paths, leaves):
        if _is_quantized(leaf):
            with path_in_errors(path):
                _check_maker(leaf, quantizer, path)
            leaf = _dequantize_array(leaf)
        values.append(leaf)
    return structure.unflatten(values)


def quantization_error(x, quantizer, *, grid=None):
    """`x - fake_quant(x)`: what CAGE pulls on. A constant for differentiation.

    Always to the nearest value, also where the quantizer rounds stochastically.

    Args:
      x: an array of real floats, or a tree of parameters.
      quantizer: a `Quantizer` for an array, `Rules` for a tree.
      grid: as in `fake_quant`.

    Returns:
      An array like `x`, or a tree with zeros for the parameters that are left alone.

    Raises:
      TypeError, ValueError: as `fake_quant`.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.5], [-3.5], [1.3]])
      >>> error = cage.quantization_error(x, cage.int4())
      >>> error.ravel().tolist()
      [0.0, 0.0, -0.20000004768371582]
    """
    if isinstance(quantizer, Rules):
        zeros = jax.tree.map(jnp.zeros_like, x)
        return quantizer.map(
            lambda path, q, leaf, _: _error_array(leaf, q, grid_at(path, x, grid)),
            x,
            zeros,
        )
    return _apply(_error_array, x, quantizer, grid)


def with_grids(params: Any, rules: Rules) -> dict[str, Any]:
    """Puts learned grids beside the parameters, so that any optimizer trains both.

    `fake_quant`, `quantize`, `quantization_error` and the CAGE transformations find
    them there.

    Args:
      params: a tree of parameters.
      rules: of which some quantizers are learned, such as `lsq()`.

    Returns:
      `{"params": params, "grids": {path: Grid}}`, the grids as they are found in the
      parameters.

    Raises:
      ValueError: where no rule with a learned quantizer matches.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r".*kernel", cage.lsq(4))])
      >>> variables = cage.with_grids({"kernel": jnp.ones((8, 4))}, rules)
      >>> quantized = cage.fake_quant(variables, rules)["params"]
      >>> round(float(variables["grids"]["kernel"].scale[0, 0]), 4)
      0.7559

    Source: LSQ, arXiv 1902.08153, section 2.
    """
    grids = {
        path: fit_grid(x, quantizer)
        for path, (quantizer, x) in rules.quantized(params).items()
        if quantizer.scale.learned
    }
    if not grids:
        raise ValueError(
            f"`rules` must match a parameter with a learned quantizer; got {rules}. "
            f"Use lsq(), or leave the grids out."
        )
    return {"params": params, "grids": grids}


def grid_at(path: str, x: Any, grid: Mapping[str, Grid] | None) -> Grid | None:
    """The grid that is given for a path, else that which `with_grids` put beside it."""
    if grid is None:
        beside = isinstance(x, Mapping) and set(x) == {"params", "grids"}
        return x["grids"].get(path) if beside else None
    if not isinstance(grid, Mapping):
        raise TypeError(
            f"`grid` must map each path to its Grid; got {type(grid).__name__}. Use "
            f"the `grids` of the state, or a dict."
        )
    if path not in grid:
        raise ValueError(
            f"`grid` must have an entry for each quantized parameter; got the paths "
            f"{list(grid)}. Add this one, with scale 0 for a grid found in the array."
        )
    return grid[path]


def _apply(function, x, quantizer, grid, key=None):
    if isinstance(quantizer, Rules):
        if quantizer.misses(x):
            warnings.warn(
                f"no parameter is quantized by {quantizer}. Print rules.report(params) "
                f"to see the paths; a part of a tree has shorter ones.",
                stacklevel=3,
            )
        drawn = False

        def apply(path, quantizer, leaf):
            nonlocal drawn
            own = None
            if key is not None and quantizer.rounding == "stochastic":
                drawn = True
                own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            return function(leaf, quantizer, grid_at(path, x, grid), own)

        result = quantizer.map(apply, x)
        if key is not None and not drawn:
            raise _unused_key(quantizer)
        return result
    if not isinstance(quantizer, Quantizer):
        name = getattr(quantizer, "__name__", "int4")
        called = f" Call the preset: {name}(...)." if callable(quantizer) else ""
        raise TypeError(
            f"`quantizer` must be a Quantizer, or Rules for a tree; got {quantizer!r}."
            f"{called} Use a preset such as int4(), or Rules([(pattern, int4())])."
        )
    if isinstance(x, Mapping) or any(
        hasattr(leaf, "shape") and leaf is not x for leaf in jax.tree.leaves(x)
    ):
        raise TypeError(
            f"`x` must be an array where `quantizer` is a Quantizer; got a tree "
            f"({type(x).__name__}). Use Rules([('.*', quantizer)]) for a tree."
        )
    if key is not None and quantizer.rounding != "stochastic":
        raise _unused_key(quantizer)
    return function(x, quantizer, grid, key)


def _unused_key(quantizer):
    return ValueError(
        f"`key` has no meaning without stochastic rounding; got one with {quantizer}. "
        f"Leave it out, or use dataclasses.replace(quantizer, rounding='stochastic')."
    )


def gaussian_error(quantizer: Quantizer) -> float:
    """The mean squared error of a quantizer on normal numbers of deviation 1.

    Args:
      quantizer: anything; a learned grid is taken as it starts, and rounding is to the
        nearest.

    Returns:
      The mean over an array of shape (4096, 64) of a fixed seed.

    Example:
      >>> import cage_jax as cage
      >>> round(cage.quantization.gaussian_error(cage.quest(4)), 3)
      0.012
    """
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4096, 64)), jnp.float32)
    grid = fit_grid(x, quantizer) if quantizer.scale.learned else None
    error = quantization_error(x, quantizer, grid=grid)
    return float(np.mean(np.square(np.asarray(error, np.float64))))


def _is_quantized(leaf):
    return isinstance(leaf, QuantizedArray)


# --- one array ---------------------------------------------------------------------


def fit_grid(x: jax.Array, quantizer: Quantizer, grid: Grid | None = None) -> Grid:
    """The grid that the scale rule finds in `x`, with the shape of the scales.

    Args:
      x: an array of real floats.
      quantizer: how it is quantized.
      grid: kept wherever its scale is not 0 and the group is finite.

    Returns:
      A `Grid` in the dtype of computation.
    """
    return _fit(_transformed(x, quantizer), quantizer, grid)


def fit_for_error(
    x: jax.Array, quantizer: Quantizer, grid: Grid | None = None
) -> tuple[Grid, jax.Array | None]:
    """All of `x - fake_quant(x)` that is not elementwise in `x`.

    Returns:
      The grid, of which `grid` is kept as in `fit_grid`, and with a rotation the
      rounded values turned back, without their scale and as narrow as is exact.
    """
    x = lax.stop_gradient(x)
    _check_learned(quantizer, grid)
    if quantizer.hadamard is None:
        return fit_grid(x, quantizer, grid), None
    values, _, grid = _fit_and_round(x, quantizer, grid)
    turned_back = _turned_back(values, quantizer, grid, x.shape)
    if step := _whole_step(quantizer, x.shape):
        turned_back = (turned_back / step).astype(_WHOLE)
    return grid, turned_back


def error_from(
    x: jax.Array, quantizer: Quantizer, grid: Grid, turned_back: jax.Array | None
) -> jax.Array:
    """The elementwise rest of `x - fake_quant(x)`, from what `fit_for_error` gives."""
    x, grid = lax.stop_gradient((x, grid))
    if turned_back is None:
        values, _ = _round(x, quantizer, grid)
        turned_back = _turned_back(values, quantizer, grid, x.shape)
    elif step := _whole_step(quantizer, x.shape):
        turned_back = turned_back.astype(x.dtype) * step
    return x - _scaled(turned_back, quantizer, grid, x)


def _fake_quant_array(x, quantizer, grid, key):
    x = _checked(x, quantizer, grid, key)
    return _straight_through(quantizer, x, grid, _noise(x, quantizer, key))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight_through(quantizer, x, grid, noise):
    values, _, grid = _fit_and_round(x, quantizer, grid, noise)
    return _restore(values, quantizer, grid, x)


def _straight_through_forward(quantizer, x, grid, noise):
    saved = grid, noise, None, None
    if quantizer.scale.learned:
        saved = grid, noise, x, None
    elif quantizer.gradient != "identity":
        _, position, _ = _fit_and_round(x, quantizer, grid, noise)
        saved = grid, noise, None, _passes(position, quantizer)
    # Calling the function itself, not its body, keeps the second derivative: reverse
    # over reverse differentiates this rule's own code.
    return _straight_through(quantizer, x, grid, noise), saved


def _straight_through_backward(quantizer, saved, cotangent):
    grid, noise, x, mask = saved
    grid_gradient = jax.tree.map(jnp.zeros_like, grid)
    no_gradient = jax.tree.map(jnp.zeros_like, noise)
    gradient = cotangent
    if mask is not None or x is not None:
        # The rotation is orthonormal: its transpose rotates back.
        gradient = _transformed(cotangent, quantizer)
    if x is not None:
        values, position, _ = _fit_and_round(x, quantizer, grid, noise)
        mask = _passes(position, quantizer)
        grid_gradient = _learned_gradient(
            gradient * _factor(quantizer), values, position, mask, quantizer, grid
        )
        if quantizer.gradient == "identity":
            return cotangent, grid_gradient, no_gradient
    if mask is None:
        return cotangent, grid_gradient, no_gradient
    gradient = jnp.where(mask, gradient, jnp.zeros_like(gradient))
    gradient = _rotated_back(gradient, quantizer) * _factor(quantizer) ** 2
    return gradient.astype(cotangent.dtype), grid_gradient, no_gradient


def _learned_gradient(gradient, values, position, mask, quantizer, grid):
    """LSQ's: of `scale * round(x / scale)` with a straight-through round."""
    shape = gradient.shape
    split, axes = _split(shape, quantizer)
    count = math.prod(split[axis] for axis in axes)
    share = (count * quantizer.format.high) ** -0.5

    def of_group(parts):
        total = jnp.sum(parts.reshape(split), axis=axes)
        return total.reshape(quantizer.scale_shape(shape)) * share

    inside = mask.astype(gradient.dtype)
    found = jax.tree.map(jnp.zeros_like, grid)
    scale = of_group(gradient * (values - inside * position))
    found = found._replace(scale=scale.astype(grid.scale.dtype))
    if grid.offset is not None:
        offset = of_group(gradient * (1 - inside))
        found = found._replace(offset=offset.astype(grid.offset.dtype))
    return found


_straight_through.defvjp(_straight_through_forward, _straight_through_backward)


def _noise(x, quantizer, key):
    """Uniform numbers for stochastic rounding, or None."""
    if key is None:
        return None
    return jax.random.uniform(key, x.shape, compute_dtype(x.dtype))


def _quantize_array(x, quantizer, grid, key):
    x = _checked(x, quantizer, grid, key)
    noise = _noise(x, quantizer, key)
    values, _, grid = _fit_and_round(x, quantizer, grid, noise)
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


def _check_maker(quantized, quantizer, path):
    maker = quantizer.match(path) if isinstance(quantizer, Rules) else quantizer
    if quantizer is not None and maker != quantized.quantizer:
        raise ValueError(
            f"`quantizer` must be the one that made the codes, {quantized.quantizer}; "
            f"got {maker}. Leave it out: codes know their quantizer."
        )


def _dequantize_array(quantized):
    quantizer, dtype = quantized.quantizer, compute_dtype(quantized.dtype)
    decode = functools.partial(quantizer.format.decode, dtype=dtype)
    zero_point, offset = quantized.zero_point, quantized.offset
    grid = Grid(
        scale=quantized.scale.astype(dtype),
        zero_point=None if zero_point is None else decode(zero_point),
        offset=None if offset is None else offset.astype(dtype),
        tensor_divisor=quantized.tensor_divisor,
    )
    like = jax.ShapeDtypeStruct(quantized.shape, quantized.dtype)
    return _restore(decode(quantized.codes), quantizer, grid, like)


def _error_array(x, quantizer, grid, key=None):
    x = lax.stop_gradient(_checked(x, quantizer, grid, key, rounds=False))
    grid = lax.stop_gradient(grid)
    return x - _straight_through(quantizer, x, grid, None)


# --- the way of the data: rotate, fit the grid of each group, round, and back --------
#
# Codes and values must come out the same, to the bit, in every program: compilers
# contract a product and a sum to one operation, turn the division by a broadcast into a
# product, and gather constants, in one program and not in another. So divisions by a
# scale and sums after a product are those of `exact`, but where a product is exact.
#
# Only `fit_grid` splits `x` into groups. The rest keeps its shape and spreads the grid
# instead, so that it fuses with what comes before and after.


def _fit_and_round(x, quantizer, grid, noise=None):
    """The rounded values of `x`, their unrounded positions, and their grid."""
    transformed = _transformed(x, quantizer)
    grid = _fit(transformed, quantizer, grid)
    return *_round(transformed, quantizer, grid, noise), grid


def _transformed(x, quantizer):
    """`x` in the dtype of computation and, up to `_factor`, rotated."""
    x = x.astype(compute_dtype(x.dtype))
    if quantizer.hadamard is None:
        return x
    (axis,) = quantizer.groups(x.shape)
    return transform(_signed(x, quantizer, axis), quantizer.hadamard, axis)


def _rotated_back(x, quantizer, additions=True):
    """The transpose of `_transformed`; its inverse, up to `_factor` squared."""
    if quantizer.hadamard is None:
        return x
    (axis,) = quantizer.groups(x.shape)
    x = transform(x, quantizer.hadamard, axis, additions=additions)
    return _signed(x, quantizer, axis)


def _signed(x, quantizer, axis):
    """`x` times the random signs, if any, which are the same along all other axes."""
    if quantizer.hadamard_seed is None:
        return x
    drawn = np.random.default_rng(quantizer.hadamard_seed).integers(0, 2, x.shape[axis])
    along = [1] * x.ndim
    along[axis] = -1
    signs = jnp.asarray(2 * drawn.reshape(along) - 1, x.dtype)
    return x * jnp.broadcast_to(signs, x.shape)


def _factor(quantizer):
    return 1.0 if quantizer.hadamard is None else quantizer.hadamard**-0.5


def _fit(transformed, quantizer, grid):
    shape = transformed.shape
    if quantizer.scale.learned and grid is not None:
        # A learned scale that is not positive has no values; it must not pass unseen.
        scale = jnp.where(grid.scale > 0, grid.scale, jnp.nan)
        return grid._replace(scale=scale.astype(transformed.dtype))
    split, axes = _split(shape, quantizer)
    tensor_axes = _split_axes(quantizer.tensor_axes(shape), shape, quantizer)
    blocks = (transformed * _factor(quantizer)).reshape(split)
    fitted = quantizer.scale.fit(
        blocks, axes, quantizer.format, quantizer.scale_type, tensor_axes
    )
    shapes = quantizer.scale_shape(shape), quantizer.tensor_shape(shape)
    fitted = fitted._replace(
        **{
            name: g.reshape(shapes[name == "tensor_divisor"])
            for name, g in fitted._asdict().items()
            if g is not None
        }
    )
    return fitted if grid is None else _kept(grid, fitted, shapes)


def _kept(grid, fitted, shapes):
    """`grid`, but `fitted` where the scale is 0 and in groups with a NaN."""
    unknown = (grid.scale == 0) | jnp.isnan(fitted.scale)
    # A tensor's divisor is found again only with all of its scales.
    axes = [axis for axis, n in enumerate(shapes[1]) if n != shapes[0][axis]]
    all_unknown = jnp.all(unknown, axis=axes, keepdims=True).reshape(shapes[1])
    # What a given grid may lack: then it rounds by what it stores.
    grid = grid._replace(
        inverse=1 / grid.step if grid.inverse is None else grid.inverse,
        origin=grid.offset if grid.origin is None else grid.origin,
    )
    return fitted._replace(
        **{
            name: jnp.where(
                all_unknown if name == "tensor_divisor" else unknown,
                found,
                getattr(grid, name).astype(found.dtype),
            )
            for name, found in fitted._asdict().items()
            if found is not None
        }
    )


def _round(transformed, quantizer, grid, noise=None):
    shape, format = transformed.shape, quantizer.format
    spread = functools.partial(_spread, quantizer=quantizer, shape=shape)
    origin = grid.offset if grid.origin is None else grid.origin
    if origin is not None:
        transformed = transformed - spread(origin / _factor(quantizer))
    if grid.inverse is None:
        position = divide(transformed, spread(grid.step / _factor(quantizer)))
    else:
        position = rounded(transformed * spread(grid.inverse * _factor(quantizer)))
    if grid.zero_point is not None:
        position = position + spread(grid.zero_point)
    if noise is None:
        return format.round(position), position
    below, above = format.neighbours(position)
    up = noise * (above - below) < position - below
    return jnp.where(up, above, below), position


def _restore(values, quantizer, grid, like):
    """Turns rounded values into an array such as `like`."""
    return _scaled(
        _turned_back(values, quantizer, grid, like.shape), quantizer, grid, like
    )


def _turned_back(values, quantizer, grid, shape):
    """Rounded values in the basis of `x`, but for what `_scaled` multiplies with."""
    if grid.zero_point is not None:
        values = values - _spread(grid.zero_point, quantizer, shape)
    if quantizer.hadamard is None:
        return values
    if _scaled_last(quantizer, shape):
        return _rotated_back(values, quantizer)
    product = rounded(values * _spread(grid.step, quantizer, shape))
    if grid.offset is not None:
        product = product + _spread(grid.offset, quantizer, shape)
    return _rotated_back(product, quantizer, additions=False)


def _scaled(turned_back, quantizer, grid, like):
    factor = _factor(quantizer)
    if not _scaled_last(quantizer, like.shape):
        return rounded(turned_back * factor).astype(like.dtype)
    spread = functools.partial(_spread, quantizer=quantizer, shape=like.shape)
    product = rounded(turned_back * spread(grid.step * factor))
    if grid.offset is not None:
        product = product + spread(grid.offset)
    return product.astype(like.dtype)


def _scaled_last(quantizer, shape):
    """Whether small whole numbers are turned back, exactly, and scaled afterwards."""
    block = quantizer.hadamard
    if block is None:
        return True
    whole = all(size % block == 0 for size in quantizer.groups(shape).values())
    return whole and not quantizer.scale.has_offset


def _whole_step(quantizer, shape):
    """That of which turned-back values are multiples that `_WHOLE` holds, or None."""
    format, block = quantizer.format, quantizer.hadamard
    if format.step is None or not _scaled_last(quantizer, shape):
        return None
    widest = max(-format.low, format.high)
    if quantizer.asymmetric:
        widest = format.high - format.low
    fits = block * widest / format.step <= jnp.iinfo(_WHOLE).max
    return format.step if fits else None


def _split(shape, quantizer):
    """`shape` with each shared axis as (groups, group), and the axes of a group."""
    groups = quantizer.groups(shape)
    split, axes = [], []
    for axis, length in enumerate(shape):
        size = groups.get(axis)
        if size is not None and size != length:
            split.append(length // size)
            length = size
        if size is not None:
            axes.append(len(split))
        split.append(length)
    return split, tuple(axes)


def _split_axes(axes, shape, quantizer):
    """Those of `_split(shape)` that belong to `axes` of `shape`."""
    groups, place = quantizer.groups(shape), 0
    found: list[int] = []
    for axis, length in enumerate(shape):
        parts = 1 if groups.get(axis, length) == length else 2
        if axis in axes:
            found += range(place, place + parts)
        place += parts
    return tuple(found)


def _spread(per_group, quantizer, shape):
    """What each group has once, for each element of an array of `shape`."""
    split, axes = _split(shape, quantizer)
    once = [1 if axis in axes else length for axis, length in enumerate(split)]
    return jnp.broadcast_to(per_group.reshape(once), split).reshape(shape)


def _passes(position, quantizer):
    """Where the gradient passes, from positions in units of the grid."""
    format = quantizer.format
    # A value at the very end of the grid, as absmax puts one into each group, must not
    # fall out of it because dividing by the scale rounds.
    slack = 4 * float(jnp.finfo(position.dtype).eps) * max(abs(format.low), format.high)
    if quantizer.gradient == "trust":
        slack += format.edge
    return (format.low - slack <= position) & (position <= format.high + slack)


def _checked(x, quantizer, grid, key, rounds=True):
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`x` must be an array of real floats; got dtype {x.dtype}. Convert it to "
            f"{_ALLOWED_FLOATS}, or leave it unquantized."
        )
    scale_shape = quantizer.scale_shape(x.shape)
    _check_learned(quantizer, grid)
    if grid is not None:
        _check_grid(grid, quantizer, x.shape, scale_shape)
    if rounds and key is None and quantizer.rounding == "stochastic":
        raise ValueError(
            f"`key` must be given for stochastic rounding; got None, quantizer "
            f"{quantizer}. Use a new key of jax.random at each step."
        )
    return x


def _check_learned(quantizer, grid):
    if quantizer.scale.learned and grid is None:
        raise ValueError(
            f"`grid` must be given for a learned scale; got None, quantizer "
            f"{quantizer}. Use variables = with_grids(params, rules) in place of the "
            f"parameters."
        )


def _check_grid(grid, quantizer, shape, scale_shape):
    if not isinstance(grid, Grid):
        raise TypeError(
            f"`grid` must be a Grid; got {type(grid).__name__}. Use Grid(scale) or "
            f"Grid(scale, zero_point) of `cage_jax.scales`."
        )
    wants = {
        "zero_point": quantizer.asymmetric,
        "offset": quantizer.scale.has_offset,
        "tensor_divisor": quantizer.scale_type.has_tensor_divisor,
    }
    for name, wanted in wants.items():
        if (getattr(grid, name) is not None) != wanted:
            text = name.replace("_", " ")
            raise ValueError(
                f"`grid` must have a {text} when the quantizer has one, and none "
                f"otherwise; got {name}={getattr(grid, name)}, quantizer {quantizer}. "
                f"Take the grid from the state of the same rules."
            )
    for name, value in grid._asdict().items():
        tensor = name == "tensor_divisor"
        expected = quantizer.tensor_shape(shape) if tensor else scale_shape
        if value is not None and jnp.shape(value) != expected:
            each = "tensor" if tensor else "group"
            raise ValueError(
                f"`grid` must have one {name} for each {each}, shape {expected}; got "
                f"shape {jnp.shape(value)}, x.shape={shape}. Take the grid from the "
                f"state of the same rules."
            )
    if quantizer.scale.learned and not isinstance(grid.scale, jax.core.Tracer):
        least = float(jnp.min(grid.scale)) if grid.scale.size else 1.0
        if not least > 0:
            raise ValueError(
                f"`grid` must have positive learned scales; got {least}. Lower the "
                f"learning rate of the scales, or start them again by with_grids."
            )
