"""The rivals: what Optax and `fake_quant` expect of them, and wrong arguments."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises
from contrib_cases import FORWARD, ROTATED, RULES, apply, arrays, drawn

import cage_jax as cage
from cage_jax import contrib

BUILD = {
    "averaging": lambda rules: contrib.averaging(),
    "dampening": lambda rules: contrib.dampening(rules, strength=0.3),
    "freezing": lambda rules: contrib.freezing(rules, 0.1, momentum=0.3),
    "gradual_pruning": lambda rules: contrib.gradual_pruning(rules, 0.4, every=2),
    "interpolation": lambda rules: contrib.interpolation(rules, every=2),
    "locked_zeros": lambda rules: contrib.locked_zeros(rules),
    "lotion": lambda rules: contrib.lotion(rules, strength=2.0, decay=0.5),
    "prox_quant": lambda rules: contrib.prox_quant(rules, strength=0.02),
    "sparse_codes": lambda rules: contrib.sparse_codes(rules, 0.2, decay=0.1),
    "trained_rows": lambda rules: contrib.trained_rows(rules, 0.5, every=2),
}
each = pytest.mark.parametrize("name", list(BUILD))
forward = pytest.mark.parametrize("name", list(FORWARD))
LEARNED = cage.Rules([(r".*kernel", cage.lsq(3))])


@pytest.fixture
def tree(rng):
    """Draws parameters or gradients, in NumPy."""
    return functools.partial(drawn, rng)


@pytest.fixture
def params(tree):
    return arrays(tree(np.float32))


@pytest.fixture
def gradients(tree, params):  # drawn after the parameters
    return arrays(tree(np.float32))


def steps(tx, params, gradients, count=2, **extra):
    """The parameters and the state after steps that are not compiled as a whole."""
    state = tx.init(params)
    for _ in range(count):
        updates, state = tx.update(gradients, state, params, **extra)
        params = apply(params, updates)
    return params, state


def assert_close(a, b):
    # The same float32 formula compiled in another program: the last bits may differ.
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


# --- the transformations -------------------------------------------------------------


@each
def test_compiled_steps_and_scans_agree_with_eager_steps(name, params, gradients):
    tx = BUILD[name](RULES)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    gradients = jax.tree.map(lambda g: 0.1 * np.asarray(g), gradients)
    first = tx.init(params)
    with pytest.raises(ValueError, match=r"`params` must be given.*Use tx\.update"):
        tx.update(gradients, first)
    # An extra argument is for others.
    want = steps(tx, params, gradients, count=3, value=1.0)
    assert jax.tree.map(jax.typeof, want[1]) == jax.tree.map(jax.typeof, first)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        return (apply(params, updates), state), None

    donating = jax.jit(
        lambda params, state: step((params, state), None)[0], donate_argnums=(0, 1)
    )
    donated, state = jax.tree.map(jnp.copy, (params, tx.init(params)))
    kernel = donated["kernel"]
    for _ in range(3):
        donated, state = donating(donated, state)
    assert kernel.is_deleted()
    assert_close((donated, state), want)

    @jax.jit
    def scanned(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=3)[0]

    assert_close(scanned(params), want)


@pytest.mark.parametrize(
    ("function", "numbers"),
    [
        (contrib.dampening, {"strength": 0.3}),
        (contrib.freezing, {"threshold": 0.1, "momentum": 0.3}),
        (contrib.gradual_pruning, {"sparsity": 0.4, "every": 2}),
        (contrib.interpolation, {"share": 0.3, "every": 2}),
        (contrib.lotion, {"strength": 2.0, "decay": 0.5}),
    ],
)
def test_numbers_can_be_injected(function, numbers, params, gradients):
    tx = optax.inject_hyperparams(function)(RULES, **numbers)
    plain, update, state = (
        function(RULES, **numbers),
        jax.jit(tx.update),
        tx.init(params),
    )
    for _ in range(5):
        want, _ = plain.update(gradients, state.inner_state, params)
        updates, state = update(gradients, state, params)
        assert_close(updates, want)
        params = apply(params, updates)
    assert set(numbers) <= set(state.hyperparams)


def test_updates_keep_their_dtype(tree):
    """Traced, not run: a step in bfloat16 gives what the next one takes."""
    params, gradients = (
        jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree()) for _ in range(2)
    )
    for name, build in BUILD.items():
        tx = build(RULES)
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, gradients, state, params)
        types = jax.tree.map(
            lambda x: (x.shape, x.dtype, x.weak_type), (updates, after)
        )
        want = jax.tree.map(
            lambda x: (x.shape, x.dtype, x.weak_type),
            (jax.tree.map(jax.typeof, params), state),
        )
        assert types == want, name


@each
def test_none_leaves_and_masks(name, params, gradients):
    want, _ = steps(BUILD[name](RULES), params, gradients)
    got, _ = steps(
        BUILD[name](RULES), {**params, "gone": None}, {**gradients, "gone": None}
    )
    assert got.pop("gone") is None
    chex.assert_trees_all_equal(got, want)
    # Without an update a parameter stays.
    params = {**params, "still": {"kernel": params["kernel"]}}
    got, _ = steps(BUILD[name](RULES), params, {**gradients, "still": {"kernel": None}})
    chex.assert_trees_all_equal(got.pop("still"), {"kernel": params["kernel"]})
    chex.assert_trees_all_equal(got, want)
    mask = {"kernel": True, "bias": True, "still": {"kernel": False}}
    masked = optax.masked(BUILD[name](RULES), mask)
    ones = jnp.asarray(np.ones((8, 3), np.float32))
    got, _ = steps(masked, params, {**gradients, "still": {"kernel": ones}}, count=1)
    moved = {"kernel": np.asarray(params["kernel"]) + 1}
    chex.assert_trees_all_equal(got.pop("still"), moved)


@each
def test_unmatched_parameters_are_untouched(name, params, gradients):
    if name == "averaging":  # which has no rules
        return
    tx = BUILD[name](RULES)
    updates, _ = tx.update(gradients, tx.init(params), params)
    assert updates["bias"] is gradients["bias"]
    with pytest.warns(UserWarning, match="no parameter is quantized"):
        tx.init({"weights": params["kernel"]})


@each
def test_learned_grids_are_found_beside_the_parameters(name, params):
    tx = BUILD[name](LEARNED)
    variables = cage.with_grids(params, LEARNED)
    zeros = jax.tree.map(np.zeros_like, variables)
    updates, _ = steps(tx, variables, zeros)
    chex.assert_trees_all_equal(updates["grids"], variables["grids"])
    if name in ("averaging", "gradual_pruning", "locked_zeros", "trained_rows"):
        return  # they quantize nothing
    with pytest.raises(ValueError, match="kernel`: `grid` must be given for a learned"):
        tx.update(params, tx.init(params), params)


# --- what takes the place of fake_quant ----------------------------------------------


@forward
def test_forward_keeps_dtypes_and_what_is_unmatched(name, tree):
    def apply(params):
        return FORWARD[name](params, RULES)

    @jax.jit
    def both(params):
        return apply(params), jax.grad(lambda x: jnp.sum(apply(x)["kernel"]))(params)

    for dtype in ("float32", "bfloat16"):
        params = arrays(tree(jnp.dtype(dtype))) | {"gone": None}
        values = apply(params)
        assert values["bias"] is params["bias"]
        assert values["gone"] is None
        chex.assert_trees_all_equal_shapes_and_dtypes(values, params)
        compiled, gradient = both(params)
        assert_close(compiled["kernel"], values["kernel"])
        chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)


def test_forward_takes_grids(params):
    variables = cage.with_grids(params, LEARNED)
    for quantize in FORWARD.values():
        values = quantize(variables, LEARNED)
        chex.assert_trees_all_equal(values["grids"], variables["grids"])
    text = "^`kernel`: `grid` must be given for a learned"
    assert_raises(
        (functools.partial(quantize, params, LEARNED), ValueError, text)
        for quantize in FORWARD.values()
    )


# --- bad input -----------------------------------------------------------------------

PARAMS = {"kernel": np.ones((8, 3), np.float32)}
NO_RULES = [(".*", cage.int4())]
BAD = {
    "strength": lambda v: contrib.dampening(RULES, strength=v),
    "threshold": lambda v: contrib.freezing(RULES, v),
    "momentum": lambda v: contrib.freezing(RULES, 0.1, momentum=v),
    "share": lambda v: (
        contrib.interpolation(RULES, v)
        if isinstance(v, str)
        else contrib.trained_rows(RULES, v, every=1)
    ),
    "every": lambda v: contrib.interpolation(RULES, every=v),
    "sparsity": lambda v: contrib.gradual_pruning(RULES, v),
    "final": lambda v: contrib.cubic_sparsity(10, v),
    "scale": lambda v: contrib.apply_vector(
        PARAMS, contrib.quantization_vector(PARAMS, PARAMS), v
    ),
    "radius": lambda v: contrib.two_point_gradient(
        jnp.sum, PARAMS, jax.random.key(0), radius=v
    ),
    "doubt": lambda v: contrib.fogzo(
        lambda x: jnp.sum(x["kernel"]), PARAMS, RULES, jax.random.key(0), doubt=v
    ),
    "decay": lambda v: contrib.averaging(v),
    "start": lambda v: contrib.averaging(start=v),
    "amplitude": lambda v: contrib.stable_qat(PARAMS, RULES, v),
    "temperature": lambda v: contrib.soft_quant(PARAMS, RULES, v),
    "delta": lambda v: contrib.ewgs(PARAMS, RULES, v),
    "deviation": lambda v: contrib.noisy_fake_quant(
        PARAMS, RULES, jax.random.key(0), deviation=v
    ),
    "relaxation": lambda v: contrib.binary_relax(PARAMS, RULES, v),
    "inverse_slope": lambda v: contrib.parq(PARAMS, RULES, v),
    "total_steps": lambda v: contrib.cosine_ramp(v),
    "peak": lambda v: contrib.cosine_ramp(10, v),
    "steepness": lambda v: contrib.parq_schedule(10, steepness=v),
}


def test_something_else_than_rules():
    calls = [
        lambda: contrib.dampening(NO_RULES, strength=1.0),
        lambda: contrib.freezing(NO_RULES, 0.1),
        lambda: contrib.interpolation(NO_RULES),
        lambda: contrib.locked_zeros(NO_RULES),
        lambda: contrib.lotion(NO_RULES),
        lambda: contrib.trained_rows(NO_RULES, 0.5, every=1),
        *(functools.partial(f, PARAMS, NO_RULES) for f in FORWARD.values()),
    ]
    text = r"`rules` must be Rules; got list.*Rules\(\["
    assert_raises((call, TypeError, text) for call in calls)


def test_bad_numbers():
    assert_raises(
        (
            functools.partial(call, value),
            kind,
            rf"^`{name}` must be .*got {value!r}\. [A-Z]",
        )
        for name, call in BAD.items()
        for value, kind in ((-1, ValueError), ("1", TypeError), (True, TypeError))
        if not (name == "scale" and value == -1)  # which takes a vector away
    )


def test_bounds():
    most_one = ("momentum", "share", "decay", "relaxation", "inverse_slope")
    most_one += ("sparsity", "final")
    rows = [
        (name, 2, ValueError, f"`{name}` must be at least 0 and at most 1; got 2")
        for name in most_one
    ]
    rows += [  # which decide what is traced
        (name, jnp.float32(0.5), TypeError, f"`{name}` must be a number; got Array")
        for name in ("decay", "share")
    ]
    rows += [
        (name, 0, ValueError, f"`{name}` must be above 0; got 0")
        for name in ("steepness", "radius")
    ]
    assert_raises(
        (functools.partial(BAD[name], value), kind, text)
        for name, value, kind, text in rows
    )
    assert_raises(
        [
            (
                lambda: contrib.parq_schedule(10, start=10),
                ValueError,
                "`total_steps` must be at least 11; got 10",
            ),
            (
                lambda: contrib.ewgs(PARAMS, RULES, {"other": 1.0}),
                ValueError,
                r"^`kernel`: `delta` must have an entry",
            ),
            (  # where codes are counted
                lambda: BUILD["freezing"](cage.Rules([(".*", ROTATED)])).init(PARAMS),
                ValueError,
                r"^`kernel`: .*`freezing`.*hadamard=None",
            ),
        ]
    )


def test_every_name_has_an_example_and_a_source():
    for name in contrib.__all__:
        if not inspect.isfunction(getattr(contrib, name)):
            continue
        documentation = inspect.getdoc(getattr(contrib, name))
        assert "Example:\n  >>> " in documentation, name
        assert "Source: " in documentation or name == "averaged", name
