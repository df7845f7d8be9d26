"""Keys and values of attention, quantized: while training, and in a cache.

Arrays are (..., tokens, heads, head_dim). The quantizer's axis selects the values that
share a scale:

- -1, or (-2, -1): a scale for each token and head, or for each token. The values of a
  token depend on that token alone.
- -3, with a `group_size`: a scale for each channel and group of tokens, as in KIVI for
  keys. A group is quantized when its last token comes; until then its tokens are kept
  as they are. So a query sees earlier groups quantized and its own group unquantized,
  except that the query of a group's last token sees it quantized too. No query sees a
  scale that depends on a later token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.arrays.names import names_checked
from cage_jax.core.quantize import dequantize, fake_quant, quantize
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.quantizers.axes import CONTRACTED
from cage_jax.quantizers.quantizer import Quantizer

_TOKENS = -3


@names_checked
def quantize_kv(
    keys: jax.Array,
    values: jax.Array,
    key_quantizer: Quantizer | None,
    value_quantizer: Quantizer | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what causal attention over a window reads from a quantized cache.

    Row `t` of the mask selects the same numbers, to the bit, that a `KVCache` of the
    first `t + 1` tokens reads. Quantizers that sum over a group (with a rotation, or
    the scales `Gaussian` and `AbsMean`) are an exception: the order of a sum may differ
    between two programs, and so may, by a step, a value that lies between two codes.

    The gradient goes straight through to `keys` and `values`, as in `fake_quant`.

    Args:
      keys: an array of shape (..., tokens, heads, head_dim), rotated by position if the
        keys in the cache are.
      values: an array like `keys`.
      key_quantizer: a quantizer along axis -1 or (-2, -1), with a scale per token; or
        along axis -3 in groups of tokens, with a scale per channel. None leaves the
        keys as they are.
      value_quantizer: the same for the values.

    Returns:
      Keys and values in the dtypes given, of shape (..., seen, heads, head_dim), and
      the boolean mask of shape (tokens, seen), for any attention that takes one. With
      scales per token, `seen` is `tokens` and the mask is the causal one, so attention
      without it may use the keys and values too. With groups, `seen` is a multiple,
      since some queries see a token quantized and others unquantized; add another mask
      by `mask & jnp.tile(other, seen // tokens)`.

    Raises:
      TypeError: for anything but a `Quantizer`, and for integers.
      ValueError: for shapes that differ or lack an axis, for a quantizer with a scale
        for all tokens or several sequences, and for one that needs a key or a grid.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> from cage_jax.program.kv_cache import quantize_kv
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 16, 4, 8))
      >>> per_channel = cage.int4(axis=-3, group_size=4)
      >>> k, v, mask = quantize_kv(key, value, per_channel, cage.int4(axis=-1))
      >>> k.shape, mask.shape
      ((2, 32, 4, 8), (16, 32))
      >>> jax.nn.dot_product_attention(query, k, v, mask=mask[None, None]).shape
      (2, 16, 4, 8)

    Source: LLM-QAT, arXiv 2305.17888, section 3.2 (per token); KIVI, arXiv 2402.02750,
    section 3 (keys per channel).
    """
    keys, values = jnp.asarray(keys), jnp.asarray(values)
    _check_arrays(keys, values)
    tokens = keys.shape[_TOKENS]
    kinds = [
        (key, value, np.maximum(key_first, value_first), np.minimum(key_end, value_end))
        for key, key_first, key_end in _seen(keys, key_quantizer, "key_quantizer")
        for value, value_first, value_end in _seen(
            values, value_quantizer, "value_quantizer"
        )
    ]
    # Without any tokens, the first kind is kept.
    kinds = [kind for kind in kinds if (kind[2] < kind[3]).any()] or kinds[:1]
    query = jnp.arange(tokens)[:, None]
    masks = [(first <= query) & (query < end) for _, _, first, end in kinds]
    return (
        _concatenated([key for key, *_ in kinds], _TOKENS),
        _concatenated([value for _, value, *_ in kinds], _TOKENS),
        _concatenated(masks, -1),
    )


def _seen(x, quantizer, name):
    """Returns the forms in which queries see `x`, each with the first query and end."""
    tokens = x.shape[_TOKENS]
    position, all_of_them = np.arange(tokens)[None], np.full([1, tokens], tokens)
    if quantizer is None:
        return [(x, position, all_of_them)]
    size = _group_size(x.shape, quantizer, name)
    complete = tokens // size * size
    quantized = _concatenated(
        [
            fake_quant(x[..., :complete, :, :], quantizer),
            x[..., complete:, :, :],
        ],
        _TOKENS,
    )
    last = position // size * size + size - 1
    return [(quantized, last, all_of_them), (x, position, last)]


def _concatenated(parts, axis):
    parts = [part for part in parts if part.shape[axis]] or parts[:1]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("complete", "newest"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class StoredTokens:
    """The keys, or the values, in a `KVCache`. A pytree.

    Attributes:
      complete: the codes and scales of complete groups of tokens; an array if nothing
        is quantized.
      newest: the tokens of the group that is not complete; None with scales per token.
    """

    complete: QuantizedArray | jax.Array
    newest: jax.Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the keys, or values, that are read."""
        return self.complete.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the keys, or values, that are read."""
        return self.complete.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, packed, with scales, and of the newest tokens."""
        return self.complete.nbytes + (0 if self.newest is None else self.newest.nbytes)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "count"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The codes and scales of past keys and values, for decoding. A pytree.

    Make one with `KVCache.empty`; `append` and `read` work under `jax.jit`,
    `jax.lax.scan` and `jax.vmap` (then with a count for each sequence). Codes have no
    gradient: `quantize_kv` is for training.

    Attributes:
      keys: the stored keys.
      values: the stored values.
      count: the number of tokens appended, int32.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> from cage_jax.program.kv_cache import KVCache
      >>> per_token = cage.int4(axis=-1)
      >>> cache = KVCache.empty((2, 64, 4, 32), per_token, per_token)
      >>> cache.keys.complete.codes.dtype, cache.nbytes
      (dtype(int4), 20480)
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 1, 4, 32))
      >>> cache = cache.append(key, value)
      >>> k, v, mask = cache.read()
      >>> jax.nn.dot_product_attention(query, k, v, mask=mask[None, None]).shape
      (2, 1, 4, 32)
    """

    keys: StoredTokens
    values: StoredTokens
    count: jax.Array

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        key_quantizer: Quantizer | None,
        value_quantizer: Quantizer | None,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> "KVCache":
        """Creates a cache without tokens.

        Args:
          shape: (..., length, heads, head_dim), with room for `length` tokens.
          key_quantizer: as in `quantize_kv`.
          value_quantizer: as in `quantize_kv`.
          dtype: the dtype of the keys and values that are appended and read.

        Raises:
          TypeError, ValueError: as in `quantize_kv`; also for a length that is not a
            multiple of a group.
        """
        shape, dtype = tuple(shape), jnp.dtype(dtype)
        _check_shape(shape, "shape")
        return cls(
            keys=_empty(shape, key_quantizer, "key_quantizer", dtype),
            values=_empty(shape, value_quantizer, "value_quantizer", dtype),
            count=jnp.zeros([], jnp.int32),
        )

    @property
    def length(self) -> int:
        """Number of tokens that there is room for."""
        return self.keys.shape[_TOKENS]

    @property
    def nbytes(self) -> int:
        """Bytes of packed codes, scales, and the newest tokens, not yet quantized."""
        return self.keys.nbytes + self.values.nbytes

    def append(self, keys: jax.Array, values: jax.Array) -> "KVCache":
        """Returns the cache with more tokens after those that it has.

        Args:
          keys: an array (..., tokens, heads, head_dim) of one token or several, such as
            a prompt (which itself attends to the result of `quantize_kv`).
          values: an array like `keys`.

        Returns:
          A new `KVCache`.

        Raises:
          TypeError: for another dtype than the cache was made for.
          ValueError: for another shape, and for more tokens than there is room for.
            Under `jit`, where their number is not known, too many tokens raise no
            error, and `read` returns NaN.
        """
        keys, values = jnp.asarray(keys), jnp.asarray(values)
        _check_arrays(keys, values)
        self._check_appended(keys, values)
        return KVCache(
            keys=_appended(self.keys, keys, self.count),
            values=_appended(self.values, values, self.count),
            count=self.count + keys.shape[_TOKENS],
        )

    def read(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns what the newest token attends to.

        Returns:
          Keys and values of the shape and dtype the cache was made for, with zeros
          after the last token, and the boolean mask of shape (1, length) that marks
          the tokens in the cache.
        """
        present = jnp.arange(self.length)[None, :] < self.count
        return _read(self.keys, self.count), _read(self.values, self.count), present

    def _check_appended(self, keys, values):
        for name, x, stored in (
            ("keys", keys, self.keys),
            ("values", values, self.values),
        ):
            like = (*stored.shape[:_TOKENS], x.shape[_TOKENS], *stored.shape[-2:])
            if x.shape != like:
                raise ValueError(
                    f"`{name}` must have the shape of the cache but for the number of "
                    f"tokens; got {x.shape}, the cache has {stored.shape}. Make one of "
                    f"the right shape with KVCache.empty."
                )
            if x.dtype != stored.dtype:
                raise TypeError(
                    f"`{name}` must have the dtype of the cache, {stored.dtype}; got "
                    f"{x.dtype}. Convert them, or give that dtype to KVCache.empty."
                )
        before = 0
        if not isinstance(self.count, jax.core.Tracer):
            before = int(np.asarray(self.count).max())  # jnp would be traced
        if before + keys.shape[_TOKENS] > self.length:
            raise ValueError(
                f"`keys` must fit into the cache; got {keys.shape[_TOKENS]} tokens, "
                f"where {before} of {self.length} are taken. Make a longer one with "
                f"KVCache.empty."
            )


def _empty(shape, quantizer, name, dtype):
    if quantizer is None:
        return StoredTokens(jnp.zeros(shape, dtype), None)
    size = _group_size(shape, quantizer, name)
    if shape[_TOKENS] % size:
        raise ValueError(
            f"`shape` must have a length that is a multiple of the group of "
            f"`{name}`; got length {shape[_TOKENS]}, group_size={size}. Use "
            f"{-(-shape[_TOKENS] // size) * size}."
        )
    made = jax.eval_shape(
        lambda x: quantize(x, quantizer), jax.ShapeDtypeStruct(shape, dtype)
    )
    # Not zeros, which a scale of type E8M0 cannot hold.
    complete = jax.tree.map(lambda part: jnp.ones(part.shape, part.dtype), made)
    newest = None
    if size > 1:
        newest = jnp.zeros((*shape[:_TOKENS], size, *shape[-2:]), dtype)
    return StoredTokens(complete, newest)


def _appended(stored, new, count):
    if stored.newest is None:
        return StoredTokens(_written(stored.complete, _codes(stored, new), count), None)
    size, tokens = stored.newest.shape[_TOKENS], new.shape[_TOKENS]
    before = count % size
    # The newest group as far as it has come, followed by the new tokens.
    groups = -(-(size - 1 + tokens) // size)
    room = [(0, 0)] * new.ndim
    room[_TOKENS] = (0, (groups - 1) * size)
    window = jnp.pad(stored.newest, room)
    window = lax.dynamic_update_slice_in_dim(window, new, before, _TOKENS)
    made = _codes(stored, window)
    place, certain = count // size, tokens // size
    complete = stored.complete
    if certain:
        complete = _written(complete, _part(made, 0, certain, groups), place)
    # The number of tokens before decides whether one more group is complete.
    one_more = (before + tokens) // size > certain
    complete = _written(
        complete, _part(made, certain, 1, groups), place + certain, one_more
    )
    newest = lax.dynamic_slice_in_dim(
        window, (before + tokens) // size * size, size, _TOKENS
    )
    return StoredTokens(complete, newest)


def _codes(stored, x):
    if isinstance(stored.complete, QuantizedArray):
        return quantize(x, stored.complete.quantizer)
    return x


def _part(made, start, groups, of_groups):
    """Takes some groups of codes and scales; a group has one entry or several."""

    def of(array):
        each = array.shape[_TOKENS] // of_groups
        return lax.slice_in_dim(
            array, start * each, (start + groups) * each, axis=_TOKENS
        )

    return jax.tree.map(of, made)


def _written(complete, made, place, wanted=None):
    """Writes the groups of `made` into `complete` from group `place`, if `wanted`."""
    groups = _groups(made)

    def write(old, new):
        each = new.shape[_TOKENS] // groups
        if wanted is not None:
            there = lax.dynamic_slice_in_dim(
                old, place * each, new.shape[_TOKENS], _TOKENS
            )
            new = jnp.where(wanted, new, there)
        return lax.dynamic_update_slice_in_dim(old, new, place * each, _TOKENS)

    return jax.tree.map(write, complete, made)


def _groups(made):
    # At least one, so that appending no tokens works.
    return max(1, min(part.shape[_TOKENS] for part in jax.tree.leaves(made)))


def _read(stored, count):
    x = stored.complete
    if isinstance(x, QuantizedArray):
        x = dequantize(x)
    length = x.shape[_TOKENS]
    position = jnp.broadcast_to(jnp.arange(length)[:, None, None], x.shape)
    if stored.newest is not None:
        size = stored.newest.shape[_TOKENS]
        # Repeated for each group, since a token's place in its group is known.
        repeated = jnp.expand_dims(stored.newest, _TOKENS - 1)
        every = (*x.shape[:_TOKENS], length // size, *stored.newest.shape[_TOKENS:])
        newest = jnp.broadcast_to(repeated, every).reshape(x.shape)
        x = jnp.where(position < count // size * size, x, newest)
    # One selection: zeros after the last token, NaN everywhere if there are too many.
    fits = count <= length
    zero = jnp.asarray(0, x.dtype)
    return jnp.where(fits & (position < count), x, jnp.where(fits, zero, jnp.nan))


def _check_arrays(keys, values):
    _check_shape(keys.shape, "keys")
    if keys.shape != values.shape:
        raise ValueError(
            f"`values` must have the shape of `keys`; got {values.shape} and "
            f"{keys.shape}. For grouped-query attention, repeat heads after quantizing."
        )
    for name, x in (("keys", keys), ("values", values)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"`{name}` must be an array of real floats; got dtype {x.dtype}. "
                f"Convert them to float32 or bfloat16."
            )


def _check_shape(shape, name):
    if len(shape) < 3:
        raise ValueError(
            f"`{name}` must have the axes (..., tokens, heads, head_dim); got "
            f"{shape}. Add an axis of length 1 for a single head."
        )


def _group_size(shape, quantizer, name):
    """Returns how many tokens share a scale, after checking that nothing else does."""
    if not isinstance(quantizer, Quantizer):
        raise TypeError(
            f"`{name}` must be a Quantizer or None; got {quantizer!r}. Use a preset "
            f"such as int4(axis=-1)."
        )
    if quantizer.rounding == "stochastic" or quantizer.scale.needs_grid:
        needs = "a grid" if quantizer.scale.needs_grid else "a key"
        raise ValueError(
            f"`{name}` must not need {needs}; got {quantizer}. Use a preset such as "
            f"int4(axis=-1)."
        )
    if quantizer.axis == CONTRACTED:
        raise ValueError(
            f"`{name}` must name its axes; got {quantizer}. Use axis=-1 for a scale "
            f"per token and head."
        )
    size = 1
    for axis, group in _shared(quantizer, len(shape)):
        if axis < _TOKENS:
            raise ValueError(
                f"`{name}` must not share a scale among sequences; got axis="
                f"{quantizer.axis}, shape {shape}. Use axis=-1 for a scale per token."
            )
        if axis == _TOKENS:
            if group is None:
                raise ValueError(
                    f"`{name}` must not share a scale among all tokens, because later "
                    f"ones are not known; got axis={quantizer.axis}, group_size="
                    f"{quantizer.group_size}, shape {shape}. Use axis=-1 for a scale "
                    f"per token, or groups of tokens with group_size=32."
                )
            if quantizer.hadamard is not None:
                raise ValueError(
                    f"`{name}` must not rotate tokens; got {quantizer}. Use "
                    f"hadamard=None, or axis=-1 to rotate channels."
                )
            size = group
    one = (*shape[:_TOKENS], size, *shape[-2:])
    if quantizer.scale_type.has_tensor_divisor and (
        len(shape) + _TOKENS in quantizer.blocks(one).tensor_axes
    ):
        raise ValueError(
            f"`{name}` must not have a scale for the whole tensor; got {quantizer}. "
            f"Use nvfp4(axis=-1), or tensor_divisor=False."
        )
    quantizer.blocks(one)  # raises for anything else that does not fit
    return size


def _shared(quantizer, ndim):
    """Returns the axes that share a scale, from the end, with group sizes or None."""
    quantizer = quantizer.at((1,) * ndim)
    axes = quantizer.axis if isinstance(quantizer.axis, tuple) else (quantizer.axis,)
    from_end = [axis if axis < 0 else axis - ndim for axis in axes]
    return [*zip(from_end, quantizer.group_sizes)]
