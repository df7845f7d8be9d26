"""The recommended strength and curvature: dose, bounds and cost."""

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
    assert tree_get(state, "estimates") == 10
