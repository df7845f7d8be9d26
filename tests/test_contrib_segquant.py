"""Scales for each sign of an input and for each chunk of a layer, in float64 NumPy."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_raises
from oracles import absmax_round

import cage_jax as cage
from cage_jax import contrib


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dual_by_numpy(x, bits, axes):
    """SegQuant's formula, with its scales above and not below the quotient."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    above = np.max(np.where(x > 0, x, 0), axes, keepdims=True)
    below = np.max(np.where(x < 0, -x, 0), axes, keepdims=True)
    above, below = (np.where(most > 0, most, 1) for most in (above, below))
    codes = np.where(x >= 0, np.round(x * qmax / above), np.round(x * -qmin / below))
    codes = np.clip(codes, qmin, qmax)
    return codes, np.where(x >= 0, codes * above / qmax, codes * below / -qmin)


@pytest.mark.parametrize(("axis", "axes"), [(None, (0, 1)), (-1, 1), (0, 0)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_sign_has_a_scale(x64, rng, bits, axis, axes):
    x = gelu(2 * rng.normal(size=(12, 16)))
    x[0], x[1] = np.abs(x[0]), -np.abs(x[1])  # rows of one sign
    x[2] = 0
    dual = contrib.dual_scale(bits, axis=axis)
    codes, values = dual_by_numpy(x, bits, axes)
    found = dual.quantize(jnp.asarray(x))
    np.testing.assert_array_equal(found.codes, codes)
    assert codes.min() == -(2 ** (bits - 1)) and codes.max() == 2 ** (bits - 1) - 1
    np.testing.assert_allclose(found.values(), values, rtol=1e-14)

    # As the input of a product in a program, of any dimensions.
    rules = cage.Rules([("w", None, dual)])
    product = cage.quantize_activations(lambda params, x: x @ params["w"], rules)
    weights, g = {"w": jnp.eye(16)}, rng.normal(size=(3, 4, 16))

    @jax.jit
    def both(x):
        value, pull = jax.vjp(lambda x: product(weights, x), x)
        return value, *pull(jnp.asarray(g))

    value, gradient = both(jnp.asarray(x.reshape(3, 4, 16)))
    np.testing.assert_allclose(value.reshape(12, 16), values, rtol=1e-14)
    np.testing.assert_array_equal(gradient, g)


def test_behind_gelu_the_error_is_below_that_of_one_scale(rng):
    for bits, one in ((8, cage.int8(axis=-1)), (4, cage.int4(axis=-1))):
        dual = contrib.dual_scale(bits, axis=-1)
        for _ in range(5):
            x = jnp.asarray(gelu(2 * rng.normal(size=(64, 64))), jnp.float32)
            errors = [
                float(jnp.sum((cage.fake_quant(x, quantizer) - x) ** 2))
                for quantizer in (dual, one)
            ]
            assert errors[0] < 0.9 * errors[1], (bits, errors)


def test_a_nan_spoils_its_group_alone():
    x = jnp.array([[1.0, -2.0, jnp.nan], [1.0, -2.0, 0.5]])
    found = cage.fake_quant(x, contrib.dual_scale(4, axis=-1))
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()
    # An infinity spoils the values of its sign.
    x = jnp.array([[1.0, -2.0, jnp.inf]])
    found = cage.fake_quant(x, contrib.dual_scale(4, axis=-1))
    np.testing.assert_array_equal(np.isnan(found), [[True, False, True]])


def test_each_chunk_has_scales_of_its_own(x64, rng):
    x = rng.normal(size=(8, 12)) * np.repeat([0.01, 1.0, 30.0], [3, 4, 5])
    parts = np.split(x, (3, 7), -1)
    # One scale for each chunk of outputs, where the layer would have one for all.
    outputs = contrib.chunked(cage.int4(axis=None), (3, 7))
    want = np.concatenate(
        [absmax_round(p.reshape(-1, 1)).reshape(p.shape) for p in parts], 1
    )
    values = cage.fake_quant({"w": jnp.asarray(x)}, cage.Rules([("w", outputs)]))["w"]
    np.testing.assert_allclose(values, want, rtol=1e-14)
    # A scale for each token and chunk of inputs.
    inputs = contrib.chunked(cage.int4(axis=-1), (3, 7))
    want = np.concatenate([absmax_round(part.T).T for part in parts], 1)
    rules = cage.Rules([("w", None, inputs)])
    product = cage.quantize_activations(lambda params, x: x @ params["w"], rules)
    found = product({"w": jnp.eye(12)}, jnp.asarray(x.reshape(2, 4, 12)))
    np.testing.assert_allclose(found.reshape(8, 12), want, rtol=1e-14)
    # Chunks of rows, and a scale per sign in each.
    both = contrib.chunked(contrib.dual_scale(4), (3,), axis=-2)
    want = np.concatenate([dual_by_numpy(p, 4, (0, 1))[1] for p in (x[:3], x[3:])])
    np.testing.assert_allclose(cage.fake_quant(jnp.asarray(x), both), want, rtol=1e-14)


def test_bytes_are_counted():
    quantizers = {
        "chunks": (contrib.chunked(cage.int4(axis=None), (3,)), 2 * 32),
        "signs": (contrib.dual_scale(4, axis=-1), 8 * 2 * 32),
        "both": (contrib.chunked(contrib.dual_scale(4), (3,)), 2 * 2 * 32),
    }
    rules = cage.Rules([(name, each) for name, (each, _) in quantizers.items()])
    rows = rules.report({name: jnp.ones((8, 12)) for name in quantizers}).rows
    for row in rows:
        assert row.quantized_bits == 4 * 96 + quantizers[row.path][1], row


def test_bad_arguments():
    whole = jnp.ones((8, 12))
    assert_raises(
        [
            (
                lambda: contrib.dual_scale(9),
                ValueError,
                "`bits` must be from 2 to 8; got 9",
            ),
            *(
                (
                    functools.partial(contrib.chunked, cage.int4(), ends),
                    ValueError,
                    "`boundaries` must ascend from above 0; got",
                )
                for ends in ((), (0, 4), (4, 4), (-1,))
            ),
            (
                lambda: contrib.chunked(cage.quest(4), (4,)),
                ValueError,
                "`quantizer` must pass all gradients",
            ),
            (
                lambda: cage.fake_quant(whole, contrib.chunked(cage.int4(), (12,))),
                ValueError,
                "`boundaries` must be below the length of axis -1; got",
            ),
            (
                lambda: cage.quantize(whole, contrib.dual_scale()),
                ValueError,
                "needs a quantizer with a grid and codes of its own",
            ),
        ]
    )


WIDTH, HEADS = 16, 2
PAGE = Path(__file__).parents[1] / "docs" / "rivals.md"


def block(params, x, condition):
    """A block of a diffusion transformer, arXiv 2212.09748: adaLN-Zero."""

    def norm(x):
        centered = x - jnp.mean(x, -1, keepdims=True)
        return centered / jnp.sqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-6)

    parts = (jax.nn.silu(condition) @ params["modulation"])[:, None]
    shift, scale, gate, shift_2, scale_2, gate_2 = jnp.split(parts, 6, -1)
    h = norm(x) * (1 + scale) + shift
    shape = *x.shape[:2], HEADS, WIDTH // HEADS
    query, key, value = (
        h.reshape(shape) for h in jnp.split(h @ params["fused"], 3, -1)
    )
    mixed = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
    x = x + gate * (mixed @ params["out"])
    h = norm(x) * (1 + scale_2) + shift_2
    return x + gate_2 * (jax.nn.gelu(h @ params["up"]) @ params["down"])


def test_in_a_small_diffusion_transformer(rng):
    """Its outputs change less than with one scale, as much as the page says."""
    shapes = {"modulation": 6, "fused": 3, "out": 1, "up": 4}
    one, fine = cage.int4(axis=None), cage.int8(axis=-1)
    chunks = {
        name: contrib.chunked(one, tuple(WIDTH * i for i in range(1, count)))
        for name, count in (("modulation", 6), ("fused", 3))
    }
    signs = contrib.dual_scale(4, axis=-1)
    tables = {
        "one scale": [("modulation|down", None, cage.int4(axis=-1))],
        "per sign": [("modulation|down", None, signs)],
        "one for all": [("modulation|fused", one, fine)],
        "per chunk": [(name, each, fine) for name, each in chunks.items()],
    }

    @jax.jit
    def errors(params, x, condition):
        exact = block(params, x, condition)
        found = {}
        for name, table in tables.items():
            rules = cage.Rules(table)
            run = cage.quantize_activations(block, rules)
            y = run(cage.fake_quant(params, rules), x, condition)
            found[name] = jnp.mean((y - exact) ** 2)
        return found

    logs = {name: [] for name in tables}
    for _ in range(200):
        params = {
            name: jnp.asarray(
                rng.normal(size=(WIDTH, count, WIDTH))
                * np.exp(rng.normal(size=(count, 1)))  # the parts differ
                / np.sqrt(WIDTH),
                jnp.float32,
            ).reshape(WIDTH, count * WIDTH)
            for name, count in shapes.items()
        }
        params["down"] = jnp.asarray(rng.normal(size=(4 * WIDTH, WIDTH)) / 8, "float32")
        x, condition = (
            jnp.asarray(rng.normal(size=shape), jnp.float32)
            for shape in ((2, 6, WIDTH), (2, WIDTH))
        )
        for name, error in errors(params, x, condition).items():
            logs[name].append(np.log(float(error)))
    text = (
        r"to (\S+) of that with one scale, .{,90} to (\S+) of that with one scale for"
    )
    (told,) = re.findall(text, " ".join(PAGE.read_text().split()))
    for of, base, share in zip(("sign", "chunk"), ("scale", "for all"), told):
        away = np.subtract(logs[f"per {of}"], logs[f"one {base}"])
        assert f"{np.exp(away.mean()):.2f}" == share
