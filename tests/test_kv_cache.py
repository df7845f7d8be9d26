"""Keys and values: trained as they are decoded, and as NumPy has them."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_raises, assert_same

import cage_jax as cage
from cage_jax.program.kv_cache import KVCache, quantize_kv

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
# Each quantizer once, in groups of one length and of two, beside others and alone.
PAIRS = [
    (PER_TOKEN["int4"], PER_TOKEN["int2 groups"]),
    (PER_TOKEN["int4 all heads"], PER_TOKEN["int4 asymmetric"]),
    (PER_TOKEN["float16 scales"], PER_TOKEN["e8m0 scales"]),
    (PER_TOKEN["nvfp4"], None),
    (IN_GROUPS["channels by 1"], IN_GROUPS["all by 4"]),
    (IN_GROUPS["channels by 3"], IN_GROUPS["channels by 3"]),
    (IN_GROUPS["channels by 4"], PER_TOKEN["int4"]),  # KIVI's
    (IN_GROUPS["channels by 4"], IN_GROUPS["channels by 3"]),
    (None, IN_GROUPS["channels by 4"]),
    (None, None),
]
each_pair = pytest.mark.parametrize(
    ("key_quantizer", "value_quantizer"),
    PAIRS,
    ids=[f"{k} | {v}" for k, v in PAIRS],
)

# Groups of tokens of one length, of two, of one token, and none.
some_pairs = pytest.mark.parametrize(
    ("key_quantizer", "value_quantizer"),
    [
        (IN_GROUPS["channels by 4"], PER_TOKEN["int4"]),
        (IN_GROUPS["channels by 4"], IN_GROUPS["channels by 3"]),
        (PER_TOKEN["nvfp4"], None),
    ],
    ids=["KIVI", "groups", "tokens"],
)


def numbers(rng, shape=SHAPE, dtype=np.float32):
    """Keys and values, some channels and tokens of them larger than others."""
    wide = np.exp(rng.standard_normal((shape[-3], 1, shape[-1])))
    return [(rng.standard_normal(shape) * wide).astype(dtype) for _ in "kv"]


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
    """Computes the attention of the last token in float64."""
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


def last_of(reads):
    """What a cache reads as behind its last token."""
    return tuple(each[-1] for each in reads)


# --- what attention reads -------------------------------------------------------------


def test_tokens_alone_are_as_in_numpy(rng):
    keys, values = numbers(rng)
    table = [
        (cage.int4(axis=-1), 7, -1),
        (cage.int8(axis=-1), 127, -1),
        (cage.int4(axis=(-2, -1)), 7, (-2, -1)),
        (cage.int4(axis=None), 7, (-2, -1)),  # the heads of a token are a matrix
    ]
    seen = jax.jit(lambda k, v: [quantize_kv(k, v, row[0], None) for row in table])
    causal = np.tril(np.ones((TOKENS, TOKENS), bool))
    for found, (_, high, axes) in zip(seen(keys, values), table):
        assert_same(found, (numpy_int(keys, high, axes), values, causal))


def test_a_query_sees_its_own_group_unquantized(rng):
    keys, values = numbers(rng)
    groups, per_token = (3, 5, 20), cage.int4(axis=-1)

    @jax.jit
    def seen_in_groups(keys, values):
        quantizers = [cage.int4(axis=-3, group_size=group) for group in groups]
        return [quantize_kv(keys, values, each, per_token) for each in quantizers]

    for group, (found, also, mask) in zip(groups, seen_in_groups(keys, values)):
        assert mask.shape == (TOKENS, found.shape[-3])
        found, also = np.asarray(found), np.asarray(also)
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
    cache, reads = decoded(keys, values, *pair, TOKENS + 3)
    assert_same(KVCache.read(cache), last_of(reads))


def test_quantizers_that_sum_agree_up_to_rounding(rng):
    quantizer = cage.quest(4, axis=-1, hadamard=SIZE)
    keys, values = numbers(rng, (2, 64, 8, SIZE))
    trained = quantized_kv(keys, values, quantizer, quantizer)
    _, reads = decoded(keys, values, quantizer, quantizer, 64)
    for ours, theirs in zip(trained[:2], last_of(reads)[:2], strict=True):
        # A tie may go to either code, one step apart in the rotated basis; the rest
        # differ by the rounding of the scales.
        differs = ~np.isclose(ours, theirs, rtol=1e-5, atol=1e-6)
        assert differs.mean() < 1e-3


def test_bfloat16_stays(rng):
    keys, values = numbers(rng, dtype=jnp.bfloat16)
    pair = cage.int4(axis=-3, group_size=4), cage.int4(axis=-1)
    found = [np.asarray(each) for each in quantized_kv(keys, values, *pair)]
    cache, reads = decoded(keys, values, *pair)
    assert cache.keys.newest.dtype == jnp.bfloat16
    last = found[2][-1]
    assert_same(tuple(x[:, last] for x in found[:2]), last_of(reads)[:2])
    assert found[0].dtype == jnp.bfloat16


def test_attention_is_that_of_numpy_step_by_step(rng):
    keys, values = numbers(rng)
    query = rng.standard_normal(SHAPE).astype(np.float32)
    pair = cage.int4(axis=-3, group_size=5), cage.int4(axis=-1)

    @jax.jit
    def attention(query, keys, values):
        k, v, mask = quantize_kv(keys, values, *pair)
        return jax.nn.dot_product_attention(query, k, v, mask=mask[None, None])

    found = np.asarray(attention(query, keys, values))
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
    query, weight = (rng.standard_normal(SHAPE).astype(np.float32) for _ in "qw")

    def loss(keys, values, mask):
        mixed = jax.nn.dot_product_attention(query, keys, values, mask=mask[None, None])
        return jnp.sum(mixed * weight)

    def seen(keys, values):
        return quantize_kv(keys, values, key_quantizer, value_quantizer)

    @jax.jit
    def gradients(keys, values):
        whole = jax.grad(lambda *pair: loss(*seen(*pair)), argnums=(0, 1))
        of_parts = jax.grad(loss, argnums=(0, 1))
        return whole(keys, values), of_parts(*seen(keys, values))

    # A token gets what each of its kinds gets, as if they were inputs.
    for ours, parts in zip(*gradients(keys, values), strict=True):
        parts = np.asarray(parts, np.float64)
        expected = parts.reshape(BATCH, -1, TOKENS, HEADS, SIZE).sum(1)
        # Sums of up to four numbers in float32.
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_few_tokens(rng):
    quantizer, counts = cage.int4(axis=-3, group_size=4), (0, 1, 3)
    pairs = [numbers(rng, (tokens, HEADS, SIZE)) for tokens in counts]
    seen = jax.jit(lambda ps: [quantize_kv(*pair, quantizer, quantizer) for pair in ps])
    for tokens, pair, found in zip(counts, pairs, seen(pairs)):
        causal = np.tril(np.ones((tokens, tokens), bool))
        assert_same(found, (*pair, causal))


# --- the cache ------------------------------------------------------------------------


@some_pairs
def test_tokens_come_one_by_one_or_together(rng, key_quantizer, value_quantizer):
    keys, values = numbers(rng)
    roomy = BATCH, TOKENS + 12, HEADS, SIZE
    expected, _ = decoded(keys, values, key_quantizer, value_quantizer, TOKENS + 12)

    @jax.jit
    def in_parts(keys, values):
        caches = []
        for parts in ((8, 4), (1, 6, 0, 5)):
            cache = KVCache.empty(roomy, key_quantizer, value_quantizer)
            for start, stop in itertools.pairwise(itertools.accumulate((0, *parts))):
                cache = cache.append(keys[:, start:stop], values[:, start:stop])
            caches.append(cache)
        return caches

    for cache in in_parts(keys, values):
        assert int(cache.count) == TOKENS
        assert_same(  # every group is complete, so that nothing else is read
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


def test_an_empty_cache_reads_as_zeros():
    quantizers = [PER_TOKEN["e8m0 scales"], PER_TOKEN["nvfp4"], cage.binary(axis=-1)]
    read = jax.jit(lambda: [KVCache.empty(SHAPE, q, None).read() for q in quantizers])
    for keys, values, there in read():
        assert not np.asarray(keys).any() and not np.asarray(values).any()
        assert there.shape == (1, TOKENS) and not np.asarray(there).any()


def test_sequences_of_several_lengths(rng):
    pair = IN_GROUPS["channels by 4"], PER_TOKEN["int4"]
    keys, values = numbers(rng)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def alone(sequence, tokens):
        cache = KVCache.empty(SHAPE[1:], *pair)
        cache = cache.append(*(x[sequence, :tokens] for x in (keys, values)))
        return cache, cache.read()

    @jax.jit
    def together(caches, new):
        @jax.vmap
        def one_more(cache, key, value):
            cache = cache.append(key[None], value[None])
            return cache, cache.read()

        return jax.lax.scan(lambda cache, token: one_more(cache, *token), caches, new)

    caches = jax.tree.map(
        lambda *each: np.stack(each), *(alone(i, n)[0] for i, n in ((0, 5), (1, 0)))
    )
    # Three tokens more of each, which have another place in each.
    new = [np.stack([x[0, 5:8], x[1, :3]], axis=1) for x in (keys, values)]
    caches, reads = together(caches, new)
    np.testing.assert_array_equal(caches.count, [8, 3])
    found = last_of(reads)
    for sequence, tokens in enumerate((8, 3)):
        assert_same(tuple(x[sequence] for x in found), alone(sequence, tokens)[1])


def test_too_many_tokens_are_refused_or_seen(rng):
    keys, values = numbers(rng)
    pair = cage.int4(axis=-3, group_size=4), cage.int4(axis=-1)
    cache = KVCache.empty((BATCH, 8, HEADS, SIZE), *pair)
    with pytest.raises(ValueError, match="got 12 tokens, where 0 of 8 are taken"):
        cache.append(keys, values)

    @jax.jit
    def append(cache, keys, values):
        cache = cache.append(keys, values)
        return cache, cache.read()[:2]

    cache, _ = append(cache, keys[:, :7], values[:, :7])
    with pytest.raises(ValueError, match="got 2 tokens, where 7 of 8 are taken"):
        cache.append(keys[:, :2], values[:, :2])
    cache, read = append(cache, keys[:, :1], values[:, :1])
    assert all(np.isfinite(x).all() for x in read)
    cache, read = append(cache, keys[:, :1], values[:, :1])
    assert all(np.isnan(x).all() for x in read)


# --- errors ---------------------------------------------------------------------------


def test_quantizers_that_do_not_fit(rng):
    keys, values = numbers(rng)
    stochastic = cage.Quantizer(cage.formats.Integer(4), axis=-1, rounding="stochastic")
    nvfp4 = cage.Quantizer(
        cage.formats.Float("e2m1"),
        axis=-3,
        group_size=4,
        scale_type=cage.scale_types.Float8(),
    )
    rotated = cage.quest(4, axis=-3, hadamard=4, group_size=4)
    for quantizer, error, text in (
        (cage.int4, TypeError, "must be a Quantizer or None; got <function int4"),
        (cage.int4(), ValueError, "must name its axes.*Use axis=-1"),
        (cage.int4(axis=(1, 2, 3)), ValueError, "must not share a scale among all tok"),
        (cage.int4(axis=-3), ValueError, "must not share a scale among all tokens"),
        (cage.int4(axis=(1, 3)), ValueError, "must not share a scale among all tok"),
        (cage.int4(axis=0), ValueError, "must not share a scale among sequences"),
        (cage.int4(axis=4), ValueError, "`axis` must be within the dimensions"),
        (cage.int4(axis=-1, group_size=3), ValueError, "`group_size` must divide"),
        (rotated, ValueError, "must not rotate tokens"),
        (cage.lsq(4, axis=-1), ValueError, "must not need a grid"),
        (stochastic, ValueError, "must not need a key"),
        (nvfp4, ValueError, "must not have a scale for the whole tensor"),
    ):
        begins = rf"^(?=`(key_quantizer|axis|group_size)`).*{text}"
        table = [
            (lambda q=quantizer: quantize_kv(keys, values, q, None), error, begins),
            (lambda q=quantizer: KVCache.empty(SHAPE, None, q), error, text),
        ]
        assert_raises(table)


def test_arrays_that_do_not_fit(rng):
    keys, values = numbers(rng)
    quantizer, one = cage.int4(axis=-1), np.ones(SHAPE, np.int32)
    cache, narrow = KVCache.empty(SHAPE, quantizer, quantizer), jnp.bfloat16

    def quantized(keys, values):
        return lambda: quantize_kv(keys, values, quantizer, quantizer)

    def empty(shape, key_quantizer):
        return lambda: KVCache.empty(shape, key_quantizer, quantizer)

    def append(keys, values):
        return lambda: cache.append(keys, values)

    by_5 = cage.int4(axis=-3, group_size=5)
    table = [
        (
            quantized(keys[0, 0], values[0, 0]),
            ValueError,
            r"`keys` must have the axes \(..., tokens",
        ),
        (
            quantized(keys, values[:, 1:]),
            ValueError,
            "`values` must have the shape of `keys`",
        ),
        (
            quantized(keys, one),
            TypeError,
            "`values` must be an array of real floats",
        ),
        (empty((TOKENS, SIZE), quantizer), ValueError, "`shape` must have the axes"),
        (
            empty(SHAPE, by_5),
            ValueError,
            "of the group of `key_quantizer`; got length 12",
        ),
        (
            append(keys[..., :4], values[..., :4]),
            ValueError,
            "`keys` must have the shape of the cache",
        ),
        (
            append(keys.astype(narrow), values.astype(narrow)),
            TypeError,
            "`keys` must have the dtype of the cache, fl",
        ),
    ]
    assert_raises(table)


def test_a_cache_has_one_structure(rng):
    keys, values = numbers(rng)
    pair = cage.int4(axis=-3, group_size=4), None
    empty = KVCache.empty(SHAPE, *pair)
    cache = jax.eval_shape(empty.append, keys, values)
    chex.assert_trees_all_equal_structs(cache, empty)
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, empty)
    assert cache.length == TOKENS
