"""The recommended strength and curvature: dose, bounds and cost."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.tree_utils import tree_get

import cage_jax as cage


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("steps", [3, 100, 1000])
def test_no_step_of_what_is_recommended_goes_beyond_the_grid(steps):
    rate = optax.cosine_decay_schedule(0.1, steps, alpha=0.1)
    strength = cage.recommended(rate, steps)["strength"]
    share = jax.vmap(lambda count: 3 * rate(count) * strength(count))
    share = np.float64(jax.jit(share)(np.arange(steps, dtype=np.int32)))
    assert share.max() < 1 + 1e-6
    assert (share.sum() / 3 == pytest.approx(0.7, rel=1e-4)) == (steps > 3)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.filterwarnings("ignore:the recommended pull")
@pytest.mark.parametrize(
    "quantizer", [cage.int4(axis=-2), cage.quest(3, axis=-2, hadamard=8)]
)
@pytest.mark.parametrize("peak", [1e-2, 1e-4])
def test_no_matrix_is_pulled_by_more_than_half_of_a_step(rng, peak, quantizer):
    """With gradients of 1 all weights are equal; the oracle is in float64."""
    sizes = np.array([1e-4, 0.03, 3.0])
    params = {
        "stack": jnp.asarray(rng.normal(size=(3, 64, 8)) * sizes[:, None, None]),
        "large": jnp.asarray(rng.normal(size=(64, 16)) * 30),
    }
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    rules = cage.Rules([(".*", quantizer)])
    rate, steps = optax.cosine_decay_schedule(peak, 1000, alpha=0.1), 1000
    tx = cage.decoupled(optax.scale(0.0), rules, learning_rate=rate, total_steps=steps)
    state = optax.tree_utils.tree_set(tx.init(params), cage_count=steps - 1)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    strength = float(cage.recommended(rate, steps)["strength"](steps - 1))
    bound = []
    for name, x in params.items():
        error = np.float64(x) - np.float64(cage.fake_quant(x, quantizer))
        size = np.sqrt(np.mean(error**2, axis=(-2, -1), keepdims=True))
        full = strength * error
        expected = full * np.minimum(1, 0.5 / (strength * size))
        pulled = -np.float64(updates[name]) / float(rate(steps - 1))
        np.testing.assert_allclose(pulled, expected, rtol=1e-4, atol=1e-6)
        bound += list((strength * size > 0.5).ravel())
    assert sum(bound) == {1e-2: 2, 1e-4: 3}[peak]


@pytest.mark.usefixtures("standard_promotion")
def test_a_pull_is_bounded_by_the_errors_that_the_training_began_with(rng):
    """Beyond them the state keeps its arrays, so that a step reads no error twice."""
    params = {"w": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)}
    tx = cage.cage_adamw(1e-3, cage.Rules([("w", cage.int2())]), total_steps=1000)
    state = tx.init(params)
    error = np.float64(cage.quantization_error(params["w"], cage.int2()))
    for found in tree_get(state, "errors"):
        np.testing.assert_allclose(found, [[np.sqrt(np.mean(error**2))]], rtol=1e-6)
    _, after = tx.update(params, state, jax.tree.map(lambda x: 2 * x, params))
    for old, new in zip(tree_get(state, "errors"), tree_get(after, "errors")):
        np.testing.assert_array_equal(old, new)


@pytest.mark.usefixtures("standard_promotion")
def test_what_is_recommended_has_its_dose_and_costs_two_vectors(rng):
    rules = cage.Rules([("w", cage.int4())])
    params = {"w": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)}
    rate = optax.cosine_decay_schedule(0.1, 100)
    chosen = cage.recommended(rate, 100)
    assert cage.dose(rate, chosen["strength"], 100) == pytest.approx(0.7, rel=1e-5)
    tx = cage.cage_adamw(rate, rules, **chosen)
    state = tx.init(params)
    for kept in (tree_get(state, "means"), tree_get(state, "weights")):
        assert [x.shape for x in kept] == [(1, 8), (1, 3)]

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda x: jnp.sum((x["w"] - 1) ** 2))(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(100):
        params, state = step(params, state)
    np.testing.assert_array_equal(tree_get(state, "estimates"), 10)


@pytest.mark.usefixtures("standard_promotion")
def test_a_dose_below_what_was_seen_to_act_is_warned_of():
    """The oracle sums the ramp after a silence of a half, up to a strength of 15."""
    counts = np.arange(1000)
    ramp = np.maximum((counts + 1) / 500 - 1, 0) ** 3
    for peak, floor, warns in ((1e-4, 0.1, True), (1e-3, 0.0, False)):
        rate = optax.cosine_decay_schedule(peak, 1000, alpha=floor)
        rates = peak * (floor + (1 - floor) * (1 + np.cos(np.pi * counts / 1000)) / 2)
        likely = 15 * np.sum(rates * ramp)
        assert (likely < 0.05) == warns
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            cage.recommended(rate, 1000)
        assert len(found) == warns
        said = rf"a dose of about {likely:.2g} in 1000 steps .* act.* about 0\.05 on"
        for each in found:
            assert re.search(said, str(each.message)) and each.filename == __file__
    cage.recommended(1e-2, 1000, dose=0.01)  # as small as it was asked to be
    jax.jit(lambda rate: cage.recommended(rate, 1000)["strength"](999))(1e-6)
