"""Keys and values: trained as they are decoded, and as NumPy has them."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cage_jax as cage
from cage_jax.kv_cache import KVCache, quantize_kv

BATCH, TOKENS, HEADS, SIZE = 2, 12, 3, 8
SHAPE = BATCH, TOKENS, HEADS, SIZE

# Scales that are found without a sum, which come out alike in every program.
PER_TOKEN = {
    "int4": cage.int4(axis=-1),
    "int2 groups": cage.int2(axis=-1, group_size=4),
    "int4 all heads": cage.int4(axis=(-2, -1)),
    "int4 asymmetric": cage.int4(axis=-1, symmetric=False),
    "float16 scales": cage.ct_w8a8(axis=-1),
    "nvfp4": cage.Quantizer(
        cage.formats.Float("e2m1"),
        axis=-1,
        group_size=4,
        scale_type=cage.scale_types.Float8(),
    ),
    "e8m0 scales": cage.Quantizer(
        cage.formats.Float("e2m1"),
        axis=-1,
        scale_type=cage.scale_types.PowerOfTwo(),
    ),
}
IN_GROUPS = {
    "channels by 4": cage.int4(axis=-3, group_size=4),
    "channels by 3": cage.int2(axis=-3, group_size=3, symmetric=False),
    "channels by 1": cage.fp8(axis=1, group_size=1),
    "all by 4": cage.int4(axis=(-3, -1), group_size=(4, None)),
}
PAIRS = (
    [(quantizer, quantizer) for quantizer in PER_TOKEN.values()]
    + [(quantizer, quantizer) for quantizer in IN_GROUPS.values()]
    + [
        (IN_GROUPS["channels by 4"], PER_TOKEN["int4"]),  # KIVI's
        (IN_GROUPS["channels by 4"], IN_GROUPS["channels by 3"]),
        (None, IN_GROUPS["channels by 4"]),
        (None, None),
    ]
)
each_pair = pytest.mark.parametrize(
    ("key_quantizer", "value_quantizer"),
    PAIRS,
    ids=[f"{k} | {v}" for k, v in PAIRS],
)

# Groups of tokens of one length, of several, of one token, and none.
kivi = pytest.mark.parametrize(
    ("key_quantizer", "value_quantizer"),
    [(IN_GROUPS["channels by 4"], PER_TOKEN["int4"])],
)
some_pairs = pytest.mark.parametrize(
    ("key_quantizer", "value_quantizer"),
    [
        (IN_GROUPS["channels by 4"], PER_TOKEN["int4"]),
        (IN_GROUPS["channels by 4"], IN_GROUPS["channels by 3"]),
        (PER_TOKEN["nvfp4"], None),
    ],
    ids=["KIVI", "groups", "tokens"],
)


def numbers(rng, shape=SHAPE, dtype=jnp.float32):
    """Keys and values, some channels and tokens of them larger than others."""
    wide = np.exp(rng.standard_normal((shape[-3], 1, shape[-1])))
    return [jnp.asarray(rng.standard_normal(shape) * wide, dtype) for _ in "kv"]


def assert_same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def numpy_int(x, high, axes):
    """What integers from -high to high stand for, in the float32 of NumPy."""
    x = np.asarray(x)
    scale = np.max(np.abs(x), axis=axes, keepdims=True) / np.float32(high)
    return np.rint(x / scale) * scale + np.float32(0)  # codes have no negative zero


def numpy_past(x, group, high=7):
    """What a query sees that comes last: complete groups per channel, then the rest."""
    x = np.asarray(x)
    complete = x.shape[-3] // group * group
    parts = [
        numpy_int(x[..., start : start + group, :, :], high, -3)
        for start in range(0, complete, group)
    ]
    return np.concatenate([*parts, x[..., complete:, :, :]], axis=-3)


def numpy_attention(query, key, value):
    """Of the last token, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    score = np.einsum("bhd,bshd->bhs", query, key) / np.sqrt(SIZE)
    weight = np.exp(score - score.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    return np.einsum("bhs,bshd->bhd", weight, value)


def decoded(keys, values, key_quantizer, value_quantizer, length=TOKENS):
    """What a cache reads as after each token, in a scan; the last cache."""
    shape = (*keys.shape[:-3], length, *keys.shape[-2:])
    cache = KVCache.empty(shape, key_quantizer, value_quantizer, keys.dtype)

    def step(cache, token):
        cache = cache.append(*token)
        return cache, cache.read()

    tokens = [jnp.moveaxis(x, -3, 0)[..., None, :, :] for x in (keys, values)]
    return jax.lax.scan(step, cache, tokens)


quantized_kv = jax.jit(quantize_kv, static_argnums=(2, 3))
decoded = jax.jit(decoded, static_argnums=(2, 3, 4))


# --- what attention reads -------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantizer", "high", "axes"),
    [
        (cage.int4(axis=-1), 7, -1),
        (cage.int8(axis=-1), 127, -1),
        (cage.int4(axis=(-2, -1)), 7, (-2, -1)),
    ],
    ids=str,
)
def test_tokens_alone_are_as_in_numpy(rng, quantizer, high, axes):
    keys, values = numbers(rng)
    found = quantized_kv(keys, values, quantizer, None)
    causal = np.tril(np.ones((TOKENS, TOKENS), bool))
    assert_same(found, (numpy_int(keys, high, axes), values, causal))


@pytest.mark.parametrize("group", [3, 5, 20])
def test_a_query_sees_its_own_group_unquantized(rng, group):
    keys, values = numbers(rng)
    quantizer = cage.int4(axis=-3, group_size=group)
    found, also, mask = quantized_kv(keys, values, quantizer, cage.int4(axis=-1))
    assert mask.shape == (TOKENS, found.shape[-3])
    for token, seen in enumerate(np.asarray(mask)):
        past = [x[:, : token + 1] for x in (keys, values)]
        expected = numpy_past(past[0], group), numpy_int(past[1], 7, -1)
        assert_same((found[:, seen], also[:, seen]), expected)


@each_pair
def test_training_reads_what_decoding_does(rng, key_quantizer, value_quantizer):
    keys, values = numbers(rng)
    trained = quantized_kv(keys, values, key_quantizer, value_quantizer)
    trained = [np.asarray(x) for x in trained]
    _, reads = decoded(keys, values, key_quantizer, value_quantizer, TOKENS + 12)
    reads = [np.asarray(x) for x in reads]
    for token, (key, value, there) in enumerate(zip(*reads)):
        assert there.shape == (1, TOKENS + 12)
        np.testing.assert_array_equal(there[0], np.arange(TOKENS + 12) <= token)
        seen, past = trained[2][token], there[0]
        assert_same(
            (trained[0][:, seen], trained[1][:, seen]), (key[:, past], value[:, past])
        )
        assert not key[:, ~past].any() and not value[:, ~past].any()


def test_it_is_the_same_outside_of_jit(rng):
    keys, values = numbers(rng)
    pair = cage.int4(axis=-3, group_size=5), cage.int4(axis=-1)
    assert_same(quantize_kv(keys, values, *pair), quantized_kv(keys, values, *pair))
    cache, _ = decoded(keys, values, *pair, TOKENS + 3)
    assert_same(KVCache.read(cache), jax.jit(KVCache.read)(cache))


@pytest.mark.parametrize("quantizer", [cage.quest(4, axis=-1, hadamard=SIZE)], ids=str)
def test_quantizers_that_sum_agree_up_to_rounding(rng, quantizer):
    shape = (2, 64, 8, SIZE)
    keys, values = numbers(rng, shape)
    trained = quantized_kv(keys, values, quantizer, quantizer)
    cache, _ = decoded(keys, values, quantizer, quantizer, 64)
    for ours, theirs in zip(trained, cache.read()[:2]):
        # A tie may go to either code, one step apart in the rotated basis; the rest
        # differ by the rounding of the scales.
        differs = ~np.isclose(ours, theirs, rtol=1e-5, atol=1e-6)
        assert differs.mean() < 1e-3


def test_bfloat16_stays(rng):
    keys, values = numbers(rng, dtype=jnp.bfloat16)
    pair = cage.int4(axis=-3, group_size=4), cage.int4(axis=-1)
    found = quantized_kv(keys, values, *pair)
    cache, _ = decoded(keys, values, *pair)
    assert cache.keys.newest.dtype == jnp.bfloat16
    last = np.asarray(found[2])[-1]
    assert_same([x[:, last] for x in found[:2]], cache.read()[:2])
    assert found[0].dtype == jnp.bfloat16


def test_attention_is_that_of_numpy_step_by_step(rng):
    keys, values = numbers(rng)
    query = jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)
    pair = cage.int4(axis=-3, group_size=5), cage.int4(axis=-1)
    k, v, mask = quantized_kv(keys, values, *pair)
    found = jax.nn.dot_product_attention(query, k, v, mask=mask[None, None])
    for token in range(TOKENS):
        expected = numpy_attention(
            query[:, token],
            numpy_past(keys[:, : token + 1], 5),
            numpy_int(values[:, : token + 1], 7, -1),
        )
        # A softmax of float32.
        np.testing.assert_allclose(found[:, token], expected, rtol=2e-5, atol=2e-6)


@some_pairs
def test_gradients_go_straight_through(rng, key_quantizer, value_quantizer):
    keys, values = numbers(rng)
    query, weight = (jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in "qw")

    def loss(keys, values, mask):
        mixed = jax.nn.dot_product_attention(query, keys, values, mask=mask[None, None])
        return jnp.sum(mixed * weight)

    def whole(keys, values):
        return loss(*quantize_kv(keys, values, key_quantizer, value_quantizer))

    found = jax.jit(jax.grad(whole, argnums=(0, 1)))(keys, values)
    seen = quantized_kv(keys, values, key_quantizer, value_quantizer)
    # A token gets what each of its kinds gets, as if they were inputs.
    for ours, parts in zip(found, jax.jit(jax.grad(loss, argnums=(0, 1)))(*seen)):
        parts = np.asarray(parts, np.float64)
        expected = parts.reshape(BATCH, -1, TOKENS, HEADS, SIZE).sum(1)
        # Sums of up to four numbers in float32.
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens(rng, tokens):
    keys, values = numbers(rng, (tokens, HEADS, SIZE))
    quantizer = cage.int4(axis=-3, group_size=4)
    found = quantize_kv(keys, values, quantizer, quantizer)
    causal = np.tril(np.ones((tokens, tokens), bool))
    assert_same(found, (keys, values, causal))


# --- the cache ------------------------------------------------------------------------


@some_pairs
def test_tokens_come_one_by_one_or_together(rng, key_quantizer, value_quantizer):
    keys, values = numbers(rng)
    expected, _ = decoded(keys, values, key_quantizer, value_quantizer)

    @jax.jit
    def in_parts():
        caches = []
        for parts in ((1, 11), (8, 4), (5, 2, 0, 5)):
            cache = KVCache.empty(SHAPE, key_quantizer, value_quantizer)
            for start, stop in itertools.pairwise(itertools.accumulate((0, *parts))):
                cache = cache.append(keys[:, start:stop], values[:, start:stop])
            caches.append((cache, cache.read()))
        return caches

    for cache, read in in_parts():
        assert int(cache.count) == TOKENS
        assert_same(read, expected.read())
        assert_same(  # every group is complete
            jax.tree.leaves((cache.keys.complete, cache.values.complete)),
            jax.tree.leaves((expected.keys.complete, expected.values.complete)),
        )


def test_codes_and_scales_are_narrow():
    pair = cage.int2(axis=-3, group_size=4), cage.int4(axis=-1)
    cache = KVCache.empty(SHAPE, *pair, jnp.bfloat16)
    keys, values = cache.keys.complete, cache.values.complete
    assert (keys.codes.dtype, values.codes.dtype) == (jnp.int2, jnp.int4)
    assert keys.scale.shape == (BATCH, TOKENS // 4, HEADS, SIZE)
    assert values.scale.shape == (BATCH, TOKENS, HEADS, 1)
    numbers, vectors = BATCH * TOKENS * HEADS * SIZE, BATCH * TOKENS * HEADS
    newest = BATCH * 4 * HEADS * SIZE * 2
    assert cache.keys.nbytes == numbers * 2 // 8 + numbers // 4 * 4 + newest
    assert cache.values.nbytes == numbers * 4 // 8 + vectors * 4
    assert cache.nbytes == cache.keys.nbytes + cache.values.nbytes
    assert KVCache.empty(SHAPE, None, None, jnp.bfloat16).nbytes == 2 * 2 * numbers


@pytest.mark.parametrize(
    "quantizer", [PER_TOKEN["e8m0 scales"], PER_TOKEN["nvfp4"], cage.binary(axis=-1)]
)
def test_an_empty_cache_reads_as_zeros(quantizer):
    keys, values, there = KVCache.empty(SHAPE, quantizer, None).read()
    assert not np.asarray(keys).any() and not np.asarray(values).any()
    assert there.shape == (1, TOKENS) and not np.asarray(there).any()


@kivi
def test_sequences_of_several_lengths(rng, key_quantizer, value_quantizer):
    keys, values = numbers(rng)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def alone(sequence, tokens):
        cache = KVCache.empty(SHAPE[1:], key_quantizer, value_quantizer)
        return cache.append(keys[sequence, :tokens], values[sequence, :tokens])

    pair = alone(0, 5), alone(1, 0)
    caches = jax.tree.map(lambda *each: jnp.stack(each), *pair)

    @jax.jit
    @jax.vmap
    def one_more(cache, key, value):
        cache = cache.append(key[None], value[None])
        return cache, cache.read()

    for step in range(3):
        new = (jnp.stack([x[0, 5 + step], x[1, step]]) for x in (keys, values))
        caches, found = one_more(caches, *new)
    np.testing.assert_array_equal(caches.count, [8, 3])
    for sequence, tokens in enumerate((8, 3)):
        assert_same([x[sequence] for x in found], alone(sequence, tokens).read())


def test_too_many_tokens_are_refused_or_seen(rng):
    keys, values = numbers(rng)
    pair = cage.int4(axis=-3, group_size=4), cage.int4(axis=-1)
    cache = KVCache.empty((BATCH, 8, HEADS, SIZE), *pair)
    with pytest.raises(ValueError, match="got 12 tokens, where 0 of 8 are taken"):
        cache.append(keys, values)
    append = jax.jit(KVCache.append)
    cache = append(cache, keys[:, :7], values[:, :7])
    with pytest.raises(ValueError, match="got 2 tokens, where 7 of 8 are taken"):
        cache.append(keys[:, :2], values[:, :2])
    cache = append(cache, keys[:, :1], values[:, :1])
    assert all(np.isfinite(x).all() for x in cache.read()[:2])
    cache = append(cache, keys[:, :1], values[:, :1])
    assert all(np.isnan(x).all() for x in cache.read()[:2])


# --- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantizer", "error", "message"),
    [
        (cage.int4, TypeError, "must be a Quantizer or None; got <function int4"),
        (cage.int4(axis=None), ValueError, "must not share a scale among all tokens"),
        (cage.int4(axis=-3), ValueError, "must not share a scale among all tokens"),
        (cage.int4(axis=(1, 3)), ValueError, "must not share a scale among all tok"),
        (cage.int4(axis=0), ValueError, "must not share a scale among sequences"),
        (cage.int4(axis=4), ValueError, "`axis` must be within the dimensions"),
        (cage.int4(axis=-1, group_size=3), ValueError, "`group_size` must divide"),
        (
            cage.quest(4, axis=-3, hadamard=4, group_size=4),
            ValueError,
            "must not rotate tokens",
        ),
        (cage.lsq(4, axis=-1), ValueError, "which needs a grid"),
        (
            cage.Quantizer(cage.formats.Integer(4), axis=-1, rounding="stochastic"),
            ValueError,
            "which needs a key",
        ),
        (
            cage.Quantizer(
                cage.formats.Float("e2m1"),
                axis=-3,
                group_size=4,
                scale_type=cage.scale_types.Float8(),
            ),
            ValueError,
            "must not have a scale for the whole tensor",
        ),
    ],
)
def test_quantizers_that_do_not_fit(rng, quantizer, error, message):
    keys, values = numbers(rng)
    with pytest.raises(error, match=message) as raised:
        quantize_kv(keys, values, quantizer, None)
    assert str(raised.value).startswith(("`key_quantizer`", "`axis`", "`group_size`"))
    with pytest.raises(error, match=message):
        KVCache.empty(SHAPE, None, quantizer)


def test_arrays_that_do_not_fit(rng):
    keys, values = numbers(rng)
    quantizer = cage.int4(axis=-1)
    with pytest.raises(ValueError, match=r"`keys` must have the axes \(..., tokens"):
        quantize_kv(keys[0, 0], values[0, 0], quantizer, quantizer)
    with pytest.raises(ValueError, match="`values` must have the shape of `keys`"):
        quantize_kv(keys, values[:, 1:], quantizer, quantizer)
    with pytest.raises(TypeError, match="`values` must be an array of real floats"):
        quantize_kv(keys, jnp.ones(SHAPE, jnp.int32), quantizer, quantizer)
    with pytest.raises(ValueError, match="`shape` must have the axes"):
        KVCache.empty((TOKENS, SIZE), quantizer, quantizer)
    with pytest.raises(
        ValueError, match="of the group of `key_quantizer`; got length 12"
    ):
        KVCache.empty(SHAPE, cage.int4(axis=-3, group_size=5), quantizer)
    cache = KVCache.empty(SHAPE, quantizer, quantizer)
    with pytest.raises(ValueError, match="`keys` must have the shape of the cache"):
        cache.append(keys[..., :4], values[..., :4])
    with pytest.raises(TypeError, match="`keys` must have the dtype of the cache, fl"):
        cache.append(keys.astype(jnp.bfloat16), values.astype(jnp.bfloat16))


def test_a_cache_has_one_structure(rng):
    keys, values = numbers(rng)
    pair = cage.int4(axis=-3, group_size=4), None
    empty = KVCache.empty(SHAPE, *pair)
    cache = jax.eval_shape(empty.append, keys, values)
    chex.assert_trees_all_equal_structs(cache, empty)
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, empty)
    assert cache.length == TOKENS
