"""The recommended pull inside of Optax's wrappers, old states, and a `shard_map`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises
from optax.tree_utils import tree_get

import cage_jax as cage
from cage_jax import curvature

pytestmark = pytest.mark.usefixtures("standard_promotion")

RULES = cage.Rules([("kernel", cage.int4()), ("bias", None)])
STEPS = 40


def adamw(**options):
    return cage.cage_adamw(0.01, RULES, total_steps=STEPS, **options)


def coupled(optimizer=optax.adam):
    pull = cage.coupled(RULES, learning_rate=0.01, total_steps=STEPS)
    return optax.chain(pull, optimizer(0.01))


def around(optimizer):
    return cage.decoupled(optimizer, RULES, learning_rate=0.01, total_steps=STEPS)


def labels(params):
    return jax.tree.map_with_path(lambda path, _: path[-1].key, params)


CHOSEN = cage.recommended(0.01, STEPS)
# By name: an optimizer, and the plain one whose steps it has without the pull.
OPTIMIZERS = {
    "a chain before Adam": (coupled(), optax.adam(0.01)),
    "a chain before AdamW": (coupled(optax.adamw), optax.adamw(0.01)),
    "a first moment in bfloat16": (
        adamw(mu_dtype=jnp.bfloat16),
        optax.adamw(0.01, mu_dtype=jnp.bfloat16),
    ),
    "accumulated gradients": (
        optax.MultiSteps(adamw(), 1).gradient_transformation(),
        optax.adamw(0.01),
    ),
    "injected numbers": (
        optax.inject_hyperparams(cage.cage_adamw, static_args=("rules",))(
            0.01, rules=RULES, **CHOSEN
        ),
        optax.adamw(0.01),
    ),
    "a mask": (
        optax.masked(adamw(), {"kernel": True, "bias": False}),
        optax.masked(optax.adamw(0.01), {"kernel": True, "bias": False}),
    ),
    "a partition": (
        optax.partition({"kernel": adamw(), "bias": optax.sgd(0.1)}, labels),
        optax.partition({"kernel": optax.adamw(0.01), "bias": optax.sgd(0.1)}, labels),
    ),
    "two Adams": (
        around(optax.chain(optax.scale_by_adam(), optax.adam(0.01))),
        optax.chain(optax.scale_by_adam(), optax.adam(0.01)),
    ),
    "no Adam": (around(optax.lion(0.01)), optax.lion(0.01)),
    "schedule-free": (
        around(optax.contrib.schedule_free_adamw(0.01)),
        optax.contrib.schedule_free_adamw(0.01),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_recommended_pull_works_in_every_wrapper(name, rng):
    """Steps while silent are the optimizer's own, then weights go to their grid."""
    tx, plain = OPTIMIZERS[name]
    start = {
        "kernel": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
        "bias": jnp.ones(8),
    }
    target = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
    noise = jnp.asarray(rng.normal(size=(STEPS, 16, 8)), jnp.float32)

    def trained(tx):
        def step(carry, noise):
            params, state = carry
            rounded = cage.fake_quant(params["kernel"], cage.int4())
            gradient = {"kernel": rounded - target + noise, "bias": params["bias"]}
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params["kernel"]

        return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), noise))(start)

    (_, state), pulled = trained(tx)
    _, expected = trained(plain)
    half = STEPS // 2
    np.testing.assert_allclose(pulled[:half], expected[:half], rtol=1e-5, atol=1e-5)
    # A few steps later the noise of both is still the same.
    x, moved = expected[half], (pulled - expected)[half + STEPS // 8]
    error = np.asarray(x - cage.fake_quant(x, cage.int4()))
    alike = np.sum(moved * error) / np.linalg.norm(moved) / np.linalg.norm(error)
    assert alike < -0.5
    # An injected strength is a number, which does not tell when the pull begins.
    reads = half if name == "injected numbers" else STEPS
    np.testing.assert_array_equal(tree_get(state, "estimates"), reads // 10)


@pytest.mark.filterwarnings("ignore:no parameter is quantized")
def test_without_a_quantized_parameter_a_step_is_that_of_the_optimizer():
    params = {"bias": jnp.ones(2)}
    updates, expected = (
        tx.update(params, tx.init(params), params)[0]
        for tx in OPTIMIZERS["a chain before Adam"]
    )
    np.testing.assert_array_equal(updates["bias"], expected["bias"])


def test_a_state_of_another_source_or_version_is_named():
    params = {"kernel": jnp.ones((8, 2)), "bias": jnp.ones(2)}
    source = curvature.fisher(relative=True)
    old = cage.cage_adamw(0.01, RULES, strength=1.0, curvature=source).init(params)
    tx = adamw()
    assert_raises(
        [
            (
                lambda: tx.update(params, old, params),
                ValueError,
                "`state` must be that of these rules and parameters; it lacks "
                "curvature/estimates/0,",
            )
        ]
    )
    more = cage.Rules([(".*", cage.int4(axis=0))])
    other = cage.cage_adamw(0.01, more, total_steps=STEPS)
    with pytest.raises(
        ValueError, match="and parameters; it lacks curvature/estimates/2"
    ):
        other.update(params, tx.init(params), params)
    inner, correction = old
    correction = correction._replace(curvature=tx.init(params)[1].curvature)
    tx.update(params, (inner, correction), params)


def test_a_coupled_pull_needs_both_numbers_or_a_strength():
    rate = 1e-3
    assert_raises(
        [
            (
                lambda: cage.coupled(RULES, total_steps=10),
                TypeError,
                "`learning_rate` must come with `total_steps`.*before SGD",
            ),
            (
                lambda: cage.coupled(RULES, learning_rate=rate),
                TypeError,
                "`total_steps` must come with `learning_rate`",
            ),
            (
                lambda: cage.coupled(
                    RULES, strength=1.0, learning_rate=rate, total_steps=10
                ),
                ValueError,
                "`total_steps` must not come with a `strength`",
            ),
            (
                lambda: cage.coupled(
                    RULES,
                    learning_rate=rate,
                    total_steps=1000,
                    curvature=curvature.fisher(),
                ),
                ValueError,
                "`curvature` must be None if `total_steps` is given",
            ),
            (
                lambda: cage.coupled(
                    RULES, learning_rate=optax.adam(rate), total_steps=10
                ),
                TypeError,
                "`learning_rate` must be a number, or a schedule",
            ),
        ]
    )


def test_in_a_shard_map_the_mean_is_over_all_devices(rng):
    """A matrix that all devices have is pulled alike, one in shards by its shards."""
    kind = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(kind,))
    rules = cage.Rules([("sharded|whole", cage.int4(axis=0))])
    names = {"sharded": jax.P(None, "devices"), "whole": jax.P()}
    params, gradient = (
        {
            "sharded": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
            "whole": jnp.asarray(3 * rng.normal(size=(8, 4)), jnp.float32),
        }
        for _ in range(2)
    )
    tx = cage.coupled(rules, strength=1.0, curvature=curvature.fisher(factored=True))

    def step(params, gradient):
        return tx.update(gradient, tx.init(params), params)[0]

    in_shards = jax.shard_map(step, mesh=mesh, in_specs=(names, names), out_specs=names)
    found = jax.jit(in_shards)(params, gradient)
    expected = jax.jit(step)(params, gradient)
    np.testing.assert_allclose(found["whole"], expected["whole"], rtol=1e-5, atol=1e-6)
