"""What Optax expects of a transformation, asked of each one of ours."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from optax.tree_utils import tree_get
from oracles import absmax_round

import cage_jax as cage

pytestmark = pytest.mark.usefixtures("standard_promotion")

RULES = cage.Rules([(r".*kernel", cage.int4())])
OPTIONS = {"freeze_scale": True, "statistics": True}
INT32_MAX = np.iinfo(np.int32).max
NAMES = ["cage", "coupled", "decoupled", "post_step", "cage_adamw", "cage_sgd"]
WITH_ADAM = ["decoupled", "post_step", "cage_adamw"]
each = pytest.mark.parametrize("name", NAMES)


def build(name, strength=2.0, lr=0.1, rules=RULES, **options):
    """The transformation of that name."""
    adam = optax.adam(lr)
    return {
        "cage": lambda: cage.coupled(rules, strength=strength, **options),
        "coupled": lambda: optax.chain(
            cage.coupled(rules, strength=strength, **options), optax.sgd(lr)
        ),
        "decoupled": lambda: cage.decoupled(
            adam, rules, strength=strength, learning_rate=lr, **options
        ),
        "post_step": lambda: cage.post_step(
            adam, rules, strength=strength, learning_rate=lr, **options
        ),
        "cage_adamw": lambda: cage.cage_adamw(lr, rules, strength=strength, **options),
        "cage_sgd": lambda: cage.cage_sgd(lr, rules, strength=strength, **options),
    }[name]()


def silence_then_pull(name):
    """The transformation with two silent steps, then a pull."""
    return build(name, cage.silence_then_constant(6, 2.0, silence=1 / 3), **OPTIONS)


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
    """The parameters and the state after some steps with the same gradients.

    Step by step and not compiled as a whole: all tests share these small programs,
    since their arrays have the same shapes.
    """
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
    for strength in (0.0, 2.0):
        tx = build(name, strength)
        with pytest.raises(ValueError, match=r"`params` must be given.*Use tx\.update"):
            tx.update(gradients, state)


@pytest.mark.parametrize("wrap", [cage.decoupled, cage.post_step])
def test_extra_arguments_reach_the_inner_optimizer(wrap, params, gradients):
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda g: value * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = wrap(inner, RULES, learning_rate=0.1, strength=0.0)
    updates, _ = tx.update(gradients, tx.init(params), params, value=3.0)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda g: 3 * g, gradients))


# --- trees ---------------------------------------------------------------------------


@each
def test_parts_of_a_tree(name, params, gradients):
    """None in place of an array, masks and partitions, in the same eager programs."""
    plain = build(name, **OPTIONS)
    want, _ = plain.update(gradients, plain.init(params), params)

    none = {"gone": None}
    tx = build(name, **OPTIONS)
    state = tx.init(params | none)
    updates, _ = tx.update(gradients | none, state, params | none)
    assert updates.pop("gone") is None
    chex.assert_trees_all_equal(updates, want)

    labels = {"layer": "quantized", "bias": "plain"}
    tx = optax.partition({"quantized": plain, "plain": optax.sgd(1.0)}, labels)
    updates, state = tx.update(gradients, tx.init(params), params)
    chex.assert_trees_all_equal(updates["bias"], -gradients["bias"])
    assert tree_get(state, "cage_count") == 1
    layer = {"layer": params["layer"]}
    alone, _ = plain.update({"layer": gradients["layer"]}, plain.init(layer), layer)
    chex.assert_trees_all_equal(updates["layer"], alone["layer"])

    params["out"] = {"kernel": 2 * params["layer"]["kernel"]}
    gradients["out"] = {"kernel": gradients["layer"]["kernel"]}
    mask = {"layer": {"kernel": True}, "bias": True, "out": {"kernel": False}}
    for given in (mask, lambda params: mask):
        tx = optax.masked(plain, given)
        updates, state = tx.update(gradients, tx.init(params), params)
        # What is masked passes, and is not in the state.
        chex.assert_trees_all_equal(updates.pop("out"), gradients["out"])
        assert list(tree_get(state, "grids")) == ["layer/kernel"]
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
    grids = jax.tree.map(np.asarray, tree_get(state, "grids"))
    assert not grids["still/kernel"].scale.any()
    assert grids["layer/kernel"].scale.all()


# --- the count -----------------------------------------------------------------------


def recording(seen, number):
    """A schedule that notes the counts it is called with; not what JAX traces."""

    def schedule(count):
        if not isinstance(count, jax.core.Tracer):
            seen.append(int(count))
        return number

    return schedule


# The optimizer and the decoupled correction ask for the learning rate in turn.
RATES = {
    "cage": [],
    "coupled": [0, 1, 2],
    "decoupled": [0, 0, 1, 1, 2, 2],
    "post_step": [0, 1, 1, 2, 2, 3],
    "cage_adamw": [0, 0, 1, 1, 2, 2],
    "cage_sgd": [0, 0, 1, 1, 2, 2],
}


@each
def test_schedules_see_the_old_count(name, params, gradients):
    strengths, rates = [], []
    tx = build(name, recording(strengths, 1.0), recording(rates, 0.1))
    _, state = train(tx, params, gradients)
    assert strengths == [0, 1, 2]
    assert rates == RATES[name]

    strengths.clear(), rates.clear()
    state = jax.tree.map(
        lambda x: jnp.int32(INT32_MAX) if x.dtype == jnp.int32 else x, state
    )
    updates, state = tx.update(gradients, state, params)
    counts = [x for x in jax.tree.leaves(state) if x.dtype == jnp.int32]
    # Nothing wraps around.
    assert {int(x) for x in counts} == {*strengths, *rates} == {INT32_MAX}
    assert tree_get(state, "cage_count") == INT32_MAX
    for x in jax.tree.leaves(updates):
        assert np.isfinite(np.asarray(x)).all()


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
    tx = compiled(optax.inject_hyperparams(function)(**numbers, **options))
    trained, state = train(tx, params, gradients)
    # Rules and flags are left alone.
    injected = {k for k in state.hyperparams if k in (*numbers, *options)}
    assert injected == set(numbers)
    want, _ = train(function(**numbers, **options), params, gradients)
    # An injected b2 is a float32, so that Adam's 1 - b2 loses digits.
    chex.assert_trees_all_close(trained, want, rtol=2e-4, atol=1e-5)
    assert tree_get(state, "cage_count") == 3
    if not scheduled:  # then it can be set
        state = tx.init(params)
        state.hyperparams["strength"] = jnp.float32(0.0)
        updates, _ = tx.update(gradients, state, params)
        plain = function(**{**numbers, "strength": 0.0}, **options)
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
    want, _ = train(build(name, **OPTIONS), params, mean, steps=2)
    assert_close(trained, want)


@each
def test_apply_if_finite_freezes_on_a_skipped_step(name, params, gradients):
    tx = optax.apply_if_finite(build(name, **OPTIONS), 3)
    update = jax.jit(tx.update)
    _, state = update(gradients, tx.init(params), params)
    broken = {**gradients, "bias": jnp.asarray(np.full(3, np.nan, np.float32))}
    updates, skipped = update(broken, state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(np.zeros_like, params))
    chex.assert_trees_all_equal(skipped.inner_state, state.inner_state)
    assert tree_get(skipped, "cage_count") == 1
    _, resumed = update(gradients, skipped, params)
    assert tree_get(resumed, "cage_count") == 2


def test_clipping_stands_before_a_decoupled_correction(params, gradients):
    lr, strength = 0.1, 2.0
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), cage.cage_sgd(lr, RULES, strength=strength)
    )
    huge = jax.tree.map(lambda g: 1e4 * g, gradients)
    updates, _ = tx.update(huge, tx.init(params), params)
    x = np.asarray(params["layer"]["kernel"], np.float64)
    flat = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradients)]
    clipped = np.asarray(gradients["layer"]["kernel"]) / np.sqrt(
        sum((g**2).sum() for g in flat)
    )
    want = -lr * (clipped + strength * (x - absmax_round(x)))
    # The pull comes on top with its full size; float32 against float64.
    np.testing.assert_allclose(updates["layer"]["kernel"], want, atol=1e-6)


# --- dtypes --------------------------------------------------------------------------


def types(tree):
    """Shapes, dtypes and weak types, without the sharding."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@each
def test_types_of_updates_and_state_are_kept(name, rng):
    """Traced, not run: in each dtype a step gives what the next one takes."""
    strength = cage.silence_then_ramp(3, silence=0.0)  # float32
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            params, gradients = tree(rng, dtype), tree(rng, dtype)
            tx = build(name, strength, **OPTIONS)
            first = jax.eval_shape(tx.init, params)
            updates, state = jax.eval_shape(tx.update, gradients, first, params)
            assert types(updates) == types(jax.tree.map(jax.typeof, gradients)), dtype
            assert types(state) == types(first), dtype
            kept = tree_get(state, "grids")["layer/kernel"].scale.dtype
            assert kept == (jnp.float64 if dtype == "float64" else jnp.float32)
    count = tree_get(state, "cage_count")
    assert (count.shape, count.dtype) == ((), jnp.int32)
    if name not in WITH_ADAM:  # which itself needs implicit promotion
        with jax.numpy_dtype_promotion("strict"):
            params, gradients = tree(rng), tree(rng)
            tx = build(name, strength, **OPTIONS)
            jax.eval_shape(tx.update, gradients, tx.init(params), params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "f16"])
def test_the_error_is_computed_in_float32(dtype, rng):
    params, gradients = tree(rng, dtype), tree(rng, dtype)
    tx = cage.coupled(RULES, strength=jnp.float32(3.0))
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    x = np.asarray(params["layer"]["kernel"]).astype(np.float64)
    g = np.asarray(gradients["layer"]["kernel"]).astype(np.float64)
    want = g + 3 * (x - absmax_round(x))
    # One rounding at the end, to the nearest.
    got = np.asarray(updates["layer"]["kernel"]).astype(np.float64)
    epsilon = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(got, want, rtol=0.51 * epsilon, atol=1e-6)


# --- jax's transformations -----------------------------------------------------------


@each
def test_a_compiled_step_traces_once_donates_and_agrees(name, params, gradients):
    tx = silence_then_pull(name)
    traces = []

    def step(params, state):
        traces.append(name)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    donated, state = jax.tree.map(jnp.copy, (params, tx.init(params)))
    # How checkpoints are restored: the state's shapes, without an array.
    abstract = jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)
    kind, first = jax.tree.map(jax.typeof, state), donated["layer"]["kernel"]
    want, want_state = params, tx.init(params)
    for _ in range(4):
        donated, state = step(donated, state)
        updates, want_state = tx.update(gradients, want_state, want)
        chex.assert_trees_all_equal_structs(updates, params)
        want = optax.apply_updates(want, updates)
        # Structure, shapes, dtypes and weak types; compiled and not.
        assert jax.tree.map(jax.typeof, state) == kind
        assert jax.tree.map(jax.typeof, want_state) == kind
        assert_close((donated, state), (want, want_state))
    assert len(traces) == 1
    assert first.is_deleted()
    assert tree_get(state, "cage_count") == 4
    if name in WITH_ADAM:  # which has a count of its own
        assert tree_get(state, "count") == 4


@each
def test_scan_over_steps_and_vmap_over_seeds(name, params, gradients):
    tx = silence_then_pull(name)

    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=4)[0]

    factors = 1.5, 2.5, 3.5
    seeds = [jax.tree.map(lambda x, f=f: f * x, params) for f in factors]
    stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *seeds)
    want = [train(tx, seed, gradients, steps=4) for seed in seeds]
    want = jax.tree.map(lambda *x: np.stack(x), *want)
    assert_close(jax.jit(jax.vmap(run))(stacked), want)
    # Without vmap the pull stands under a condition.
    one = jax.tree.map(lambda x: x[0], want)
    assert_close(jax.jit(run)(seeds[0]), one)
