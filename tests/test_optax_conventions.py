"""What Optax expects of a transformation, asked of each one of ours."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from optax.tree_utils import tree_get, tree_set

import cage_jax as cage

pytestmark = pytest.mark.usefixtures("standard_promotion")

RULES = cage.Rules([(r".*kernel", cage.int4())])
OPTIONS = {"freeze_scale": True, "statistics": True}
INT32_MAX = np.iinfo(np.int32).max


def build(name, strength=2.0, lr=0.1, rules=RULES, **options):
    """The transformation of that name."""
    adam = optax.adam(lr)
    return {
        "cage": lambda: cage.cage(rules, strength, **options),
        "coupled": lambda: optax.chain(
            cage.cage(rules, strength, **options), optax.sgd(lr)
        ),
        "decoupled": lambda: cage.decoupled(adam, rules, strength, lr, **options),
        "post_step": lambda: cage.post_step(adam, rules, strength, lr, **options),
        "cage_adamw": lambda: cage.cage_adamw(lr, rules, strength, **options),
        "cage_sgd": lambda: cage.cage_sgd(lr, rules, strength, **options),
    }[name]()


NAMES = ["cage", "coupled", "decoupled", "post_step", "cage_adamw", "cage_sgd"]
each = pytest.mark.parametrize("name", NAMES)


def tree(rng, dtype=jnp.float32):
    return {
        "layer": {"kernel": jnp.asarray(rng.normal(size=(8, 3)), dtype)},
        "bias": jnp.asarray(rng.normal(size=3), dtype),
    }


@pytest.fixture
def params(rng):
    return tree(rng)


@pytest.fixture
def gradients(rng, params):  # drawn after the parameters
    return tree(rng)


def train(tx, params, gradients, steps=3):
    """The parameters and the state after some steps with the same gradients."""
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def compiled(tx):
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))


def assert_close(a, b):
    # The same float32 formula compiled in another program: the last bits may differ.
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


# --- arguments -----------------------------------------------------------------------


@each
def test_takes_extra_arguments(name, params, gradients):
    tx = build(name)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state = tx.init(params)
    chex.assert_trees_all_equal(
        tx.update(gradients, state, params, value=1.0, other="x"),
        tx.update(gradients, state, params),
    )


@pytest.mark.parametrize("wrap", [cage.decoupled, cage.post_step])
def test_extra_arguments_reach_the_inner_optimizer(wrap, params, gradients):
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda g: value * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = wrap(inner, RULES, 0.0, 0.1)
    updates, _ = tx.update(gradients, tx.init(params), params, value=3.0)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda g: 3 * g, gradients))


@each
@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_needs_params(name, strength, params, gradients):
    tx = build(name, strength)
    with pytest.raises(ValueError, match=r"`params` must be given.*Use tx\.update"):
        tx.update(gradients, tx.init(params))


# --- trees ---------------------------------------------------------------------------


@each
def test_none_leaves_pass_through(name, params, gradients):
    tx = build(name, **OPTIONS)
    state = tx.init({**params, "gone": None})
    updates, state = tx.update(
        {**gradients, "gone": None}, state, {**params, "gone": None}
    )
    assert updates.pop("gone") is None
    plain = build(name, **OPTIONS)
    want, _ = plain.update(gradients, plain.init(params), params)
    chex.assert_trees_all_equal(updates, want)


# Optax's Adam takes no None in place of a gradient.
@pytest.mark.parametrize("name", ["cage", "coupled", "cage_sgd"])
def test_a_parameter_without_update_is_left_alone(name, params, gradients):
    tx = build(name, **OPTIONS)
    params = {**params, "still": {"kernel": 2 * params["layer"]["kernel"]}}
    before = tx.init(params)
    updates, state = tx.update({**gradients, "still": {"kernel": None}}, before, params)
    assert updates["still"]["kernel"] is None
    chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
    assert not tree_get(state, "grids")["still/kernel"].scale.any()
    assert tree_get(state, "grids")["layer/kernel"].scale.all()


@each
@pytest.mark.parametrize("callable_mask", [False, True])
def test_masked(name, callable_mask, params, gradients):
    params = {**params, "out": {"kernel": 2 * params["layer"]["kernel"]}}
    gradients = {**gradients, "out": {"kernel": gradients["layer"]["kernel"]}}
    mask = {"layer": {"kernel": True}, "bias": True, "out": {"kernel": False}}
    tx = optax.masked(
        build(name, **OPTIONS), (lambda params: mask) if callable_mask else mask
    )
    updates, state = tx.update(gradients, tx.init(params), params)
    # What is masked passes, and is not in the state.
    chex.assert_trees_all_equal(updates.pop("out"), gradients.pop("out"))
    assert list(tree_get(state, "grids")) == ["layer/kernel"]
    params.pop("out")
    plain = build(name, **OPTIONS)
    want, _ = plain.update(gradients, plain.init(params), params)
    chex.assert_trees_all_equal(updates, want)


@each
def test_partition(name, params, gradients):
    labels = {"layer": "quantized", "bias": "plain"}
    tx = optax.partition(
        {"quantized": build(name, **OPTIONS), "plain": optax.sgd(1.0)}, labels
    )
    updates, state = tx.update(gradients, tx.init(params), params)
    chex.assert_trees_all_equal(updates["bias"], -gradients["bias"])
    assert tree_get(state, "cage_count") == 1
    alone = build(name, **OPTIONS)
    layer = {"layer": params["layer"]}
    want, _ = alone.update({"layer": gradients["layer"]}, alone.init(layer), layer)
    chex.assert_trees_all_equal(updates["layer"], want["layer"])


# --- the count -----------------------------------------------------------------------


@each
def test_count_has_a_name_of_its_own(name, params, gradients):
    tx = build(name)
    _, state = train(tx, params, gradients)
    count = tree_get(state, "cage_count")
    chex.assert_shape(count, ())
    assert count.dtype == jnp.int32
    assert count == 3
    if name in ("decoupled", "post_step", "cage_adamw"):
        assert tree_get(state, "count") == 3  # Adam's


@each
def test_schedules_see_the_old_count(name, params, gradients):
    seen = []

    def strength(count):
        seen.append(int(count))
        return 1.0

    train(build(name, strength), params, gradients)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    ("wrap", "counts"), [(cage.decoupled, [0, 1, 2]), (cage.post_step, [1, 2, 3])]
)
def test_which_learning_rate_the_correction_takes(wrap, counts, params, gradients):
    seen = []

    def lr(count):
        seen.append(int(count))
        return 0.1

    train(wrap(optax.sgd(0.1), RULES, 1.0, lr), params, gradients)
    assert seen == counts


@each
def test_count_saturates(name, params, gradients):
    seen = []

    def strength(count):
        seen.append(int(count))
        return 1.0

    def lr(count):
        seen.append(int(count))
        return 0.1

    tx = build(name, strength, lr)
    state = tree_set(tx.init(params), cage_count=jnp.int32(INT32_MAX))
    if name in ("decoupled", "post_step", "cage_adamw"):
        state = tree_set(state, count=jnp.int32(INT32_MAX))
    elif name != "cage":
        state = jax.tree.map(
            lambda x: jnp.int32(INT32_MAX) if x.dtype == jnp.int32 else x, state
        )
    updates, state = tx.update(gradients, state, params)
    assert tree_get(state, "cage_count") == INT32_MAX
    assert set(seen) == {INT32_MAX}  # nothing wraps around
    chex.assert_tree_all_finite(updates)


# --- Optax's wrappers ----------------------------------------------------------------

INJECTED = {
    "cage": (cage.cage, {"strength": 2.0}),
    "cage_adamw": (cage.cage_adamw, {"learning_rate": 0.1, "strength": 2.0}),
    "cage_sgd": (cage.cage_sgd, {"learning_rate": 0.1, "strength": 2.0}),
}


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("name", list(INJECTED))
def test_inject_hyperparams(name, scheduled, params, gradients):
    function, numbers = INJECTED[name]
    if scheduled:
        numbers = {
            key: optax.linear_schedule(value, 2 * value, 4)
            for key, value in numbers.items()
        }
    options = {**OPTIONS, "rules": RULES}
    tx = optax.inject_hyperparams(function)(**numbers, **options)
    trained, state = train(compiled(tx), params, gradients)
    # Rules and flags are left alone.
    injected = {k for k in state.hyperparams if k in (*numbers, *options)}
    assert injected == set(numbers)
    want, _ = train(compiled(function(**numbers, **options)), params, gradients)
    # An injected b2 is a float32, so that Adam's 1 - b2 loses digits.
    chex.assert_trees_all_close(trained, want, rtol=2e-4, atol=1e-5)
    assert tree_get(state, "cage_count") == 3


@pytest.mark.parametrize("name", list(INJECTED))
def test_an_injected_strength_can_be_set(name, params, gradients):
    function, numbers = INJECTED[name]
    tx = optax.inject_hyperparams(function)(rules=RULES, **numbers)
    state = tx.init(params)
    state.hyperparams["strength"] = jnp.float32(0.0)
    updates, _ = tx.update(gradients, state, params)
    plain = function(rules=RULES, **{**numbers, "strength": 0.0})
    want, _ = plain.update(gradients, plain.init(params), params)
    assert_close(updates, want)


@each
def test_multi_steps_count_real_updates(name, rng, params, gradients):
    other = tree(rng)
    tx = optax.MultiSteps(build(name, **OPTIONS), 2)
    state, trained, update = tx.init(params), params, jax.jit(tx.update)
    counts = []
    for gradient in (gradients, other) * 2:
        updates, state = update(gradient, state, trained)
        trained = optax.apply_updates(trained, updates)
        counts.append(int(tree_get(state, "cage_count")))
    assert counts == [0, 1, 1, 2]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, gradients, other)
    want, _ = train(compiled(build(name, **OPTIONS)), params, mean, steps=2)
    assert_close(trained, want)


@each
def test_apply_if_finite_freezes_on_a_skipped_step(name, params, gradients):
    tx = optax.apply_if_finite(build(name, **OPTIONS), 3)
    update = jax.jit(tx.update)
    _, state = update(gradients, tx.init(params), params)
    broken = {**gradients, "bias": jnp.full(3, jnp.nan)}
    updates, skipped = update(broken, state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(skipped.inner_state, state.inner_state)
    assert tree_get(skipped, "cage_count") == 1
    _, resumed = update(gradients, skipped, params)
    assert tree_get(resumed, "cage_count") == 2


def test_clipping_stands_before_a_decoupled_correction(params, gradients):
    lr, strength = 0.1, 2.0
    tx = optax.chain(optax.clip_by_global_norm(1.0), cage.cage_sgd(lr, RULES, strength))
    huge = jax.tree.map(lambda g: 1e4 * g, gradients)
    updates, _ = tx.update(huge, tx.init(params), params)
    x = np.asarray(params["layer"]["kernel"], np.float64)
    scale = np.abs(x).max(0, keepdims=True) / 7
    wrong = x - np.round(x / scale) * scale
    flat = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradients)]
    clipped = np.asarray(gradients["layer"]["kernel"]) / np.sqrt(
        sum((g**2).sum() for g in flat)
    )
    # The pull comes on top with its full size; float32 against float64.
    chex.assert_trees_all_close(
        updates["layer"]["kernel"], -lr * (clipped + strength * wrong), atol=1e-6
    )


# --- dtypes --------------------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_updates_keep_their_dtype(name, dtype, rng):
    params, gradients = tree(rng, dtype), tree(rng, dtype)
    strength = cage.silence_then_ramp(3, silence=0.0)  # float32
    tx = build(name, strength, **OPTIONS)
    state = tx.init(params)
    for _ in range(2):
        updates, after = tx.update(gradients, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        state = after
    assert tree_get(state, "grids")["layer/kernel"].scale.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "f16"])
def test_the_error_is_computed_in_float32(dtype, rng):
    params, gradients = tree(rng, dtype), tree(rng, dtype)
    tx = cage.cage(RULES, jnp.float32(3.0))
    updates, _ = tx.update(gradients, tx.init(params), params)
    x = np.asarray(params["layer"]["kernel"]).astype(np.float64)
    g = np.asarray(gradients["layer"]["kernel"]).astype(np.float64)
    scale = np.abs(x).max(0, keepdims=True) / 7
    want = g + 3 * (x - np.round(x / scale) * scale)
    # One rounding at the end, to the nearest.
    got = np.asarray(updates["layer"]["kernel"]).astype(np.float64)
    epsilon = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(got, want, rtol=0.51 * epsilon, atol=1e-6)


@pytest.mark.parametrize("name", ["cage", "coupled", "cage_sgd"])
def test_strict_promotion(name, params, gradients):
    # Optax's Adam itself needs implicit promotion.
    with jax.numpy_dtype_promotion("strict"):
        strength = cage.silence_then_ramp(4, silence=0.25)
        train(build(name, strength, **OPTIONS), params, gradients)


def test_float64(x64, rng):
    params, gradients = tree(rng, jnp.float64), tree(rng, jnp.float64)
    tx = build("cage_adamw", cage.silence_then_ramp(3, silence=0.0), **OPTIONS)
    updates, state = tx.update(gradients, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert tree_get(state, "grids")["layer/kernel"].scale.dtype == jnp.float64


# --- jax's transformations -----------------------------------------------------------


def silence_then_pull(name):
    """Two silent steps, then a pull."""
    return build(name, cage.silence_then_constant(6, 2.0, silence=1 / 3), **OPTIONS)


@each
def test_state_is_stable(name, params, gradients):
    tx = silence_then_pull(name)
    state = tx.init(params)
    first = jax.tree.map(jax.typeof, state)
    for _ in range(4):
        updates, state = tx.update(gradients, state, params)
        # Structure, shapes, dtypes and weak types.
        assert jax.tree.map(jax.typeof, state) == first
        chex.assert_trees_all_equal_structs(updates, params)


@each
def test_jit_traces_once_and_agrees(name, params, gradients):
    tx = silence_then_pull(name)
    traces = []

    def update(*args):
        traces.append(name)
        return tx.update(*args)

    got, state = train(compiled(tx._replace(update=update)), params, gradients, steps=4)
    want, want_state = train(tx, params, gradients, steps=4)
    assert len(traces) == 1
    assert_close((got, state), (want, want_state))


@each
def test_scan_agrees_with_a_loop(name, params, gradients):
    tx = silence_then_pull(name)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=4)[0]

    assert_close(run(params), train(compiled(tx), params, gradients, steps=4))


@each
def test_vmap_over_seeds(name, params, gradients):
    tx = silence_then_pull(name)
    seeds = [jax.tree.map(lambda x, i=i: (i + 1.5) * x, params) for i in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
    state = jax.vmap(tx.init)(stacked)
    update = jax.jit(jax.vmap(tx.update, in_axes=(None, 0, 0)))
    for _ in range(4):
        updates, state = update(gradients, state, stacked)
        stacked = jax.vmap(optax.apply_updates)(stacked, updates)
    tx = compiled(tx)
    want = [train(tx, seed, gradients, steps=4) for seed in seeds]
    want_params, want_state = jax.tree.map(lambda *x: jnp.stack(x), *want)
    assert_close((stacked, state), (want_params, want_state))


@each
def test_donation(name, params, gradients):
    tx = silence_then_pull(name)
    want, want_state = train(compiled(tx), params, gradients, steps=4)

    def step(params, state):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    donated, state = jax.tree.map(jnp.copy, (params, tx.init(params)))
    first = donated["layer"]["kernel"]
    for _ in range(4):
        donated, state = step(donated, state)
    assert first.is_deleted()
    assert_close((donated, state), (want, want_state))


def test_transformations_of_abstract_parameters(params):
    # How checkpoints are restored: the state's shapes, without an array.
    tx = build("cage_adamw", **OPTIONS)
    abstract = jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, tx.init(params))
