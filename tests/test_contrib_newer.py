"""StableQAT, HESTIA, ProxQuant and PV-Tuning, each against its formula in NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises, train
from contrib_cases import (
    CLIPPED,
    CLIPPED_RULES,
    FLOAT64,
    ROTATED,
    STEP,
    arrays,
    drawn,
    rounded_and_clipped,
)
from oracles import hadamard

import cage_jax as cage
from cage_jax import contrib
from cage_jax.quantizers.formats import Integer
from cage_jax.quantizers.scales import Fixed

TURN = hadamard(8)


@pytest.fixture
def tree(rng):
    return functools.partial(drawn, rng)


def gradient_of(quantize, x, g):
    @jax.jit
    def both(x):
        value, pull = jax.vjp(quantize, x)
        return value, *pull(jnp.asarray(g))

    return both(jnp.asarray(x))


@pytest.mark.parametrize("quantizer", [CLIPPED, ROTATED], ids=["plain", "rotated"])
def test_stable_qat_scales_the_gradient_by_the_slope_of_a_cosine(x64, rng, quantizer):
    x, g = rng.normal(size=(8, 3)), rng.normal(size=(8, 3))
    turn = np.eye(8) if quantizer is CLIPPED else TURN
    rules = cage.Rules([(".*", quantizer)])
    v = turn @ x / STEP
    slope = np.sqrt(2) * np.pi * 0.15 * np.cos(np.pi * (v + np.round(v)))
    inside = np.abs(v) <= 7
    assert 0 < inside.mean() < 1
    want = turn.T @ (inside * (turn @ g) * (1 - slope) / (1 + slope))
    value, gradient = gradient_of(lambda x: contrib.stable_qat(x, rules, 0.15), x, g)
    if quantizer is CLIPPED:
        np.testing.assert_allclose(gradient, want, **FLOAT64)
    else:  # the mask and the factor are in the basis, one after the other
        np.testing.assert_allclose(gradient, want, rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(value, cage.fake_quant(jnp.asarray(x), quantizer))


def test_without_an_amplitude_it_is_fake_quant(rng):
    x, g = (rng.normal(size=(8, 3)).astype(np.float32) for _ in range(2))
    for rules in (CLIPPED_RULES, cage.Rules([(".*kernel", cage.seq(4))])):
        params = {"kernel": jnp.asarray(x)}
        if rules is not CLIPPED_RULES:
            params = cage.with_grids(params, rules)

        def loss(quantize, params):
            values = quantize(params)
            return jnp.sum(values.get("params", values)["kernel"] * jnp.asarray(g))

        same, want = (
            jax.grad(functools.partial(loss, quantize))(params)
            for quantize in (
                lambda x, rules=rules: contrib.stable_qat(x, rules, 0.0),
                lambda x, rules=rules: cage.fake_quant(x, rules),
            )
        )
        chex.assert_trees_all_equal(same, want)


@pytest.mark.parametrize("turned", [False, True])
def test_soft_quant_is_a_softmax_over_the_levels(x64, rng, turned):
    x, g, temperature = rng.normal(size=(8, 3)), rng.normal(size=(8, 3)), 0.3
    turn = TURN if turned else np.eye(8)
    format, step = Integer(2), 0.5
    quantizer = cage.Quantizer(format, Fixed(step), hadamard=8 if turned else None)
    v, levels = turn @ x / step, np.arange(-1, 2)
    weights = np.exp(-((v[..., None] - levels) ** 2) / temperature)
    weights /= weights.sum(-1, keepdims=True)
    mean = weights @ levels
    # The derivative of the mean of c: the covariance of c and the slope of the logits.
    variance = weights @ levels**2 - mean**2
    slope = 2 / temperature * variance
    value, gradient = gradient_of(
        lambda x: contrib.soft_quant(x, cage.Rules([(".*", quantizer)]), temperature),
        x,
        g,
    )
    np.testing.assert_allclose(value, turn.T @ mean * step, **FLOAT64)
    np.testing.assert_allclose(gradient, turn.T @ (slope * (turn @ g)), **FLOAT64)


def test_a_cold_soft_quantizer_rounds(rng):
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    rules = cage.Rules([(".*", cage.ternary())])
    cold = contrib.soft_quant(x, rules, 1e-4)
    np.testing.assert_allclose(cold, cage.fake_quant(x, rules), atol=1e-5)


@pytest.mark.parametrize("quantizer", [CLIPPED, ROTATED], ids=["plain", "rotated"])
def test_prox_quant_shrinks_the_error(x64, tree, quantizer):
    params, gradients = tree(), [tree() for _ in range(3)]
    strengths = 0.02 * np.arange(1, 4)
    turn = np.eye(8) if quantizer is CLIPPED else TURN
    rules = cage.Rules([(".*kernel", quantizer)])
    tx = optax.chain(
        optax.sgd(0.1),
        contrib.prox_quant(rules, strength=lambda t: jnp.asarray(strengths)[t]),
    )
    got, _ = train(tx, params, gradients, jit=True)
    x = params["kernel"]
    for gradient, strength, reached in zip(gradients, strengths, got):
        moved = turn @ (x - 0.1 * gradient["kernel"])
        error = moved - rounded_and_clipped(moved)
        left = np.sign(error) * np.maximum(np.abs(error) - strength, 0)
        x = turn.T @ (moved - error + left)
        np.testing.assert_allclose(reached["kernel"], x, **FLOAT64)
    assert (left == 0).any() and (left != 0).any()


def sparse_by_numpy(x, moves, share, decay, step):
    latent, values = x.copy(), np.clip(np.round(x / step), -7, 7) * step
    for move in moves:
        latent = latent + move
        distance = np.abs(latent - values)
        count = int(np.ceil(share * x.size))
        chosen = np.argsort(-distance, axis=None, kind="stable")[:count]
        new = np.clip(np.round(latent / step), -7, 7) * step
        values = values.copy()
        values.flat[chosen] = new.flat[chosen]
        latent = latent + decay * (values - latent)
        yield values


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_few_codes_change_in_a_step(x64, rng, decay):
    x, share = rng.normal(size=(8, 3)), 0.1
    moves = [0.3 * rng.normal(size=(8, 3)) for _ in range(6)]
    tx = contrib.sparse_codes(CLIPPED_RULES, share, decay=decay)
    got, _ = train(tx, {"kernel": x}, [{"kernel": move} for move in moves], jit=True)
    changes, before = [], rounded_and_clipped(x)
    for reached, want in zip(got, sparse_by_numpy(x, moves, share, decay, STEP)):
        np.testing.assert_allclose(reached["kernel"], want, rtol=1e-12, atol=1e-14)
        changes.append((np.abs(want - before) > STEP / 2).sum())
        before = want
    assert 0 < max(changes) <= 3  # a tenth of 24, rounded up


def test_bad_arguments():
    params = arrays({"kernel": np.ones((8, 3), np.float32)})
    assert_raises(
        [
            (
                lambda: contrib.stable_qat(
                    params, cage.Rules([(".*", cage.nf4(group_size=8))])
                ),
                ValueError,
                "^`kernel`: `rules` must have values that are 1 apart",
            ),
            (
                lambda: contrib.stable_qat(params, CLIPPED_RULES, 0.3),
                ValueError,
                "`amplitude` must be at least 0 and at most 0.225",
            ),
            (
                lambda: contrib.sparse_codes(cage.Rules([(".*", ROTATED)])).init(
                    params
                ),
                ValueError,
                "^`kernel`: `rules` must not rotate weights for `sparse_codes`",
            ),
            (
                lambda: contrib.prox_quant(CLIPPED_RULES, strength=-1.0),
                ValueError,
                "`strength` must be",
            ),
        ]
    )
