"""Training of scales alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises

import cage_jax as cage
from cage_jax.finetuning import only_scales


@pytest.mark.usefixtures("standard_promotion")
def test_only_the_grids_are_trained(rng):
    rules = cage.Rules([("w", cage.lsq(4)), (".*", None)])
    w = rng.standard_normal((8, 4)).astype(np.float32)
    variables = cage.with_grids({"w": w, "b": np.ones(4, np.float32)}, rules)
    gradients = jax.tree.map(jnp.ones_like, variables)
    tx = only_scales(optax.adam(0.01))
    state = tx.init(variables)
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(state)]
    assert sizes == [1, 1, 1]  # a count and two moments of one scale
    updates, state = tx.update(gradients, state, variables)
    for update in jax.tree.leaves(updates["params"]):
        np.testing.assert_array_equal(update, np.zeros(update.shape))
    np.testing.assert_allclose(updates["grids"]["w"].scale, [[-0.01]], rtol=1e-5)
    # As the optimizer alone on the grids.
    alone = optax.adam(0.01)
    expected, _ = alone.update(
        gradients["grids"], alone.init(variables["grids"]), variables["grids"]
    )
    jax.tree.map(np.testing.assert_array_equal, updates["grids"], expected)


def test_grids_must_be_there():
    tx, params = only_scales(optax.sgd(0.1)), {"w": jnp.ones((2, 2))}
    text = r"`variables` must be parameters with grids .*got dict\. Use with_grids"
    assert_raises([(lambda: tx.init(params), ValueError, text)])
