"""AlphaTuning: sums of scaled signs, their errors, gradients and files."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cage_jax as cage
from cage_jax import contrib

RULES = cage.Rules([("kernel", cage.binary(group_size=16))])


@pytest.fixture
def params(rng):
    kernel = jnp.asarray(rng.standard_t(4, size=(32, 3)), jnp.float32)
    return {"kernel": kernel, "bias": jnp.ones(3)}


def in_groups(x):
    """A row for each group."""
    return np.float64(x).T.reshape(-1, 16)


def greedy(groups, bits):
    """Scales and signs, term after term."""
    rest, terms = groups.copy(), []
    for _ in range(bits):
        scale, sign = np.abs(rest).mean(1, keepdims=True), np.where(rest > 0, 1, -1)
        terms.append((scale, sign))
        rest = rest - scale * sign
    return terms


def refined(groups, terms):
    """One round: least squares, then the nearest of all sums."""
    sums = 2 * ((np.arange(2 ** len(terms))[:, None] >> np.arange(len(terms))) & 1) - 1
    values = np.zeros_like(groups)
    for row, group in enumerate(groups):
        signs = np.stack([sign[row] for _, sign in terms], 1)
        scales = np.abs(np.linalg.lstsq(signs, group, rcond=None)[0])
        tried = sums @ scales
        chosen = np.abs(group[:, None] - tried).argmin(1)
        values[row] = tried[chosen]
        for term, (scale, sign) in enumerate(terms):
            scale[row], sign[row] = scales[term], sums[chosen, term]
    return values


def test_terms_are_those_of_the_formula(params):
    groups = in_groups(params["kernel"])
    for rounds in (0, 1, 2):
        scales, codes = contrib.binary_coding(
            params, RULES, bits=3, rounds=rounds, trained=3
        )
        terms = greedy(groups, 3)
        want = sum(scale * sign for scale, sign in terms)
        for _ in range(rounds):
            want = refined(groups, terms)
        found = contrib.coded_weights(scales, codes)
        # Sums and solutions of float32.
        np.testing.assert_allclose(in_groups(found["kernel"]), want, atol=1e-5)
        for term, (scale, _) in enumerate(terms):
            # The values of a code are -1/2 and 1/2.
            stored = scales["kernel"][term].T.reshape(-1, 1) / 2
            np.testing.assert_allclose(stored, scale, atol=1e-5)
        assert found["bias"] is params["bias"]


def test_the_error_falls_with_each_term_and_round(params):
    def error(bits, rounds):
        scales, codes = contrib.binary_coding(params, RULES, bits=bits, rounds=rounds)
        found = contrib.coded_weights(scales, codes)["kernel"]
        return np.square(np.float64(params["kernel"]) - np.float64(found)).sum()

    terms = [error(bits, 0) for bits in (1, 2, 3, 4)]
    assert (np.diff(terms) < 0).all()
    rounds = [error(3, count) for count in range(4)]
    assert (np.diff(rounds) <= 1e-6 * rounds[0]).all()  # equal in the end
    assert rounds[-1] < 0.95 * rounds[0]


def test_one_bit_is_binary_to_the_bit(params):
    scales, codes = contrib.binary_coding(params, RULES, bits=1)
    want = cage.quantize(params, RULES)["kernel"]
    jax.tree.map(np.testing.assert_array_equal, codes["kernel"]["term0"], want)
    found = contrib.coded_weights(scales, codes)["kernel"]
    np.testing.assert_array_equal(found, cage.fake_quant(params, RULES)["kernel"])


def test_equal_signs_and_zeros_have_a_finite_solution():
    x = {"kernel": jnp.concatenate([jnp.zeros((16, 2)), jnp.ones((16, 2))])}
    scales, codes = contrib.binary_coding(x, RULES, bits=3)
    found = contrib.coded_weights(scales, codes)["kernel"]
    np.testing.assert_allclose(found, x["kernel"], atol=1e-6)


@pytest.mark.parametrize("trained", [1, 3])
def test_scales_alone_are_trained(params, rng, trained):
    scales, codes = contrib.binary_coding(params, RULES, bits=3, trained=trained)
    target = jnp.asarray(rng.normal(size=(32, 3)), jnp.float32)

    @jax.jit
    def gradient(scales):
        def loss(scales):
            values = contrib.coded_weights(scales, codes)["kernel"]
            return jnp.sum((values - target) ** 2) / 2

        return jax.grad(loss)(scales)

    away = np.float64(contrib.coded_weights(scales, codes)["kernel"]) - target
    terms = [codes["kernel"][f"term{i}"] for i in range(trained)]
    signs = [np.float64(term.codes) + 0.5 for term in terms]
    want = [(in_groups(away) * in_groups(sign)).sum(1) for sign in signs]
    found = gradient(scales)["kernel"]
    found = np.moveaxis(found, 2, 1).reshape(trained, -1)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    tx = optax.sgd(0.01)
    state, first = tx.init(scales), jnp.sum(away**2)
    for _ in range(20):
        updates, state = tx.update(gradient(scales), state)
        scales = optax.apply_updates(scales, updates)
    shipped = contrib.with_scales(scales, codes)
    for i in range(3):
        one, other = (each["kernel"][f"term{i}"] for each in (shipped, codes))
        np.testing.assert_array_equal(one.codes, other.codes)
        assert (one.scale != other.scale).any() == (i < trained)
    found = contrib.coded_weights({}, shipped)["kernel"]
    assert jnp.sum((found - target) ** 2) < first
    again = contrib.coded_weights(scales, codes)["kernel"]
    np.testing.assert_array_equal(found, again)


def test_codes_are_saved_and_loaded(params, tmp_path):
    params["kernel"] = params["kernel"].astype(jnp.bfloat16)
    scales, codes = contrib.binary_coding(params, RULES, bits=2)
    assert scales["kernel"].dtype == jnp.float32
    cage.export.save(codes, tmp_path / "codes.safetensors")
    again = cage.load(tmp_path / "codes.safetensors").params
    values = [contrib.coded_weights({}, each)["kernel"] for each in (codes, again)]
    assert values[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(*values)


def test_wrong_arguments(params):
    scales, codes = contrib.binary_coding(params, RULES, bits=2)
    with pytest.raises(ValueError, match="`trained` must be from 1 to 2; got 3"):
        contrib.binary_coding(params, RULES, bits=2, trained=3)
    text = "^`kernel`: `rules` must quantize coded parameters by binary.*got int4"
    with pytest.raises(ValueError, match=text):
        contrib.binary_coding(params, cage.Rules([("kernel", "int4")]))
    text = r"`scales` must be those of `codes`, of shape None at bias/term0; got \(2, 3"
    with pytest.raises(ValueError, match=text):
        contrib.coded_weights({"bias": scales["kernel"]}, codes)
