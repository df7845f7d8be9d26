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
@pytest.mark.filterwarnings("ignore:the recommended strength, at most 15")
@pytest.mark.parametrize(("peak", "strongest"), [(1e-2, 4.11), (1e-4, 15.0)])
def test_what_is_recommended_is_never_strong(peak, strongest):
    """A small learning rate does not get its dose by a pull beyond all measure."""
    rate = optax.cosine_decay_schedule(peak, 1000, alpha=0.1)
    strength = cage.recommended(rate, 1000)["strength"]
    ramp = cage.ramp_to_dose(rate, 1000)
    both = jax.jit(jax.vmap(lambda count: (strength(count), ramp(count))))
    strengths, ramps = map(np.asarray, both(np.int32([600, 800, 999])))
    assert strengths[-1] == pytest.approx(strongest, rel=1e-3)
    shares = strengths / ramps
    assert shares == pytest.approx(3 * [min(1.0, 15 / ramps[-1])], rel=1e-5)
    assert (shares[0] == 1.0) == (peak == 1e-2)


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
def test_a_dose_far_below_what_was_asked_is_warned_of():
    """The oracle sums the ramp after a silence of a half, up to a strength of 15."""
    counts = np.arange(1000)
    ramp = np.maximum((counts + 1) / 500 - 1, 0) ** 3
    for floor, warns in ((0.0, True), (0.1, False)):
        rate = optax.cosine_decay_schedule(1e-3, 1000, alpha=floor)
        rates = 1e-3 * (floor + (1 - floor) * (1 + np.cos(np.pi * counts / 1000)) / 2)
        left = 15 * np.sum(rates * ramp)
        assert (left < 0.7 / 4) == warns
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            strength = cage.recommended(rate, 1000)["strength"]
        assert cage.dose(rate, strength, 1000) == pytest.approx(left, rel=1e-3)
        said = rf"a dose of {left:.2g} in 1000 steps .* act.* the default aims at 0\.7,"
        assert len(found) == warns
        for each in found:
            assert re.search(said, str(each.message)) and each.filename == __file__
    with pytest.warns(UserWarning, match=r"; you asked for 0\.8, "):
        cage.recommended(1e-6, 1000, dose=0.8)
    cage.recommended(rate, 1000, dose=0.01)  # as small as it was asked to be
    jax.jit(lambda rate: cage.recommended(rate, 1000)["strength"](999))(1e-6)
