"""`cage_adamw` and `cage_sgd`: their formulas, and Optax's options in their place."""

from functools import partial

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises
from optax.tree_utils import tree_get
from oracles import absmax_round

import cage_jax as cage
from cage_jax.optim.placements import CageState

pytestmark = pytest.mark.usefixtures("standard_promotion")

LEARNING_RATE = np.array([0.05, 0.04, 0.07, 0.06])
STRENGTH = np.array([0.0, 2.0, 3.5, 5.0])
STEPS = len(STRENGTH)
RULES = cage.Rules([(r".*kernel", cage.int4())])
# Both sides in float64: what is left is rounding in another order of operations.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-13}
BUILDS = cage.cage_adamw, cage.cage_sgd


def table(values):
    """A schedule that looks its value up by count."""
    return lambda count: jnp.asarray(values)[count]


def error(x):
    return x - absmax_round(x)


@pytest.fixture
def start(rng):
    """Parameters and the gradients of all steps, in NumPy."""

    def normal():
        return {"kernel": rng.normal(size=(8, 3)), "bias": rng.normal(size=3)}

    return normal(), [normal() for _ in range(STEPS)]


def train(tx, params, gradients, jit=True):
    """The parameters after each step."""
    return cases.train(tx, params, gradients, jit=jit)[0]


def test_adamw_follows_its_formula(x64, start):
    params, gradients = start
    b1, b2, eps, decay = 0.85, 0.95, 1e-6, 0.1
    tx = cage.cage_adamw(
        table(LEARNING_RATE),
        RULES,
        strength=table(STRENGTH),
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=decay,
        mask={"kernel": True, "bias": False},
    )
    trajectory = train(tx, params, gradients)
    for key in params:
        x = params[key]
        m, v = np.zeros_like(x), np.zeros_like(x)
        for t, gradient in enumerate(gradients):
            g = gradient[key]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            root = np.sqrt(v / (1 - b2 ** (t + 1)))
            step = m / (1 - b1 ** (t + 1)) / (root + eps)
            if key == "kernel":
                step = step + decay * x + STRENGTH[t] * error(x)
            x = x - LEARNING_RATE[t] * step
            chex.assert_trees_all_close(trajectory[t][key], x, **FLOAT64)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_sgd_keeps_the_correction_out_of_the_momentum(x64, momentum, nesterov, start):
    params, gradients = start
    tx = cage.cage_sgd(
        table(LEARNING_RATE),
        RULES,
        strength=table(STRENGTH),
        momentum=momentum,
        nesterov=nesterov,
    )
    trajectory = train(tx, params, gradients)
    x, trace, decay = params["kernel"], 0.0, momentum or 0.0
    for t, gradient in enumerate(gradients):
        g = gradient["kernel"]
        trace = g + decay * trace
        step = g + decay * trace if nesterov else trace
        x = x - LEARNING_RATE[t] * (step + STRENGTH[t] * error(x))
        chex.assert_trees_all_close(trajectory[t]["kernel"], x, **FLOAT64)


def test_sgd_without_momentum_is_the_coupled_form(x64, start):
    params, gradients = start
    lr, strength = table(LEARNING_RATE), table(STRENGTH)
    coupled = optax.chain(cage.coupled(RULES, strength=strength), optax.sgd(lr))
    chex.assert_trees_all_close(
        train(cage.cage_sgd(lr, RULES, strength=strength), params, gradients),
        train(coupled, params, gradients),
        **FLOAT64,
    )


OPTIONS = [
    {},
    {"b1": 0.8, "b2": 0.9, "eps": 1e-4, "weight_decay": 0.3},
    {"eps_root": 1e-3, "nesterov": True, "mu_dtype": jnp.bfloat16},
    {"mask": {"kernel": False, "bias": True}},
    {"mask": lambda params: jax.tree.map(lambda x: x.ndim > 1, params)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=[*map(" ".join, OPTIONS[:4]), "call"])
def test_adamw_without_strength_is_that_of_optax(options, start):
    params, gradients = jax.tree.map(np.float32, start)
    lr = table(LEARNING_RATE.astype(np.float32))
    chex.assert_trees_all_equal(
        train(
            cage.cage_adamw(lr, RULES, strength=0.0, **options),
            params,
            gradients,
            jit=False,
        ),
        train(optax.adamw(lr, **options), params, gradients, jit=False),
    )


def test_sgd_without_strength_is_that_of_optax(start):
    params, gradients = jax.tree.map(np.float32, start)
    for options in ({}, {"momentum": 0.9, "nesterov": True}):
        chex.assert_trees_all_equal(
            train(
                cage.cage_sgd(0.1, RULES, strength=0.0, **options),
                params,
                gradients,
                False,
            ),
            train(optax.sgd(0.1, **options), params, gradients, False),
        )


@pytest.mark.parametrize("build", BUILDS)
def test_options_reach_the_correction(build, start):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start[0])
    inner, correction = build(0.1, RULES, strength=1.0).init(params)
    assert isinstance(correction, CageState)
    assert not isinstance(inner, CageState)
    assert correction.grids is None
    assert correction.statistics is None
    state = build(0.1, RULES, strength=1.0, freeze_scale=True).init(params)
    chex.assert_trees_all_equal(
        tree_get(state, "grids")["kernel"].scale, np.zeros((1, 3), np.float32)
    )
    assert tree_get(state, "statistics") is None
    state = build(0.1, RULES, strength=1.0, statistics=True).init(params)
    assert tree_get(state, "grids") is None
    assert tree_get(state, "codes_flipped") == 0


@pytest.mark.parametrize("build", BUILDS)
def test_the_default_is_what_is_recommended(build, start):
    params, gradients = jax.tree.map(np.float32, start)
    rate = optax.cosine_decay_schedule(0.1, 4)
    chosen = cage.recommended(rate, 4)
    found = train(build(rate, RULES, total_steps=4), params, gradients)
    chex.assert_trees_all_equal(
        found, train(build(rate, RULES, **chosen), params, gradients)
    )
    own = cage.curvature.second_moment() if build is cage.cage_adamw else None
    if own is not None:
        found = train(
            build(rate, RULES, total_steps=4, curvature=own), params, gradients
        )
        chosen["curvature"] = own
        expected = train(build(rate, RULES, **chosen), params, gradients)
        chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize("build", BUILDS)
def test_a_recommended_strength_that_does_nothing_is_warned_of(build):
    dose = r"comes to a dose of about 0\.002 in 100 steps"
    with pytest.warns(UserWarning, match=dose) as found:
        build(1e-5, RULES, total_steps=100)
    assert found[0].filename == __file__
    build(1e-3, RULES, total_steps=100)


def test_the_recommended_strength_needs_all_rates():
    schedule = optax.cosine_decay_schedule(1e-3, 100, 0.1)
    params = {"kernel": np.ones((8, 3), np.float32)}

    def begin(build, static):
        tx = optax.inject_hyperparams(build, static_args=static)
        tx(schedule, RULES, total_steps=100).init(params)

    assert_raises(
        (
            partial(begin, build, static),
            TypeError,
            r"got an array, .*inject_hyperparams",
        )
        for build in BUILDS
        for static in (("rules",), ("rules", "total_steps"))
    )


def test_arguments_that_do_not_go_together():
    advised = cage.recommended(1e-3, 100)
    for build in BUILDS:
        assert_raises(
            [
                (
                    partial(build, 1e-3, RULES),
                    TypeError,
                    "`total_steps` must be given if `strength` is not",
                ),
                (
                    partial(build, 1e-3, RULES, strength=1.0, total_steps=100),
                    ValueError,
                    r"`total_steps` must not .* 100 and 1\.0",
                ),
                (
                    partial(build, 1e-3, RULES, total_steps=0),
                    ValueError,
                    "`total_steps` must be",
                ),
                (
                    partial(build, 1e-3, RULES, total_steps=jnp.int32(100)),
                    TypeError,
                    r"or int\(total_steps\) if only that is an array",
                ),
                # In another order.
                (
                    partial(build, RULES, 1e-3, strength=1.0),
                    TypeError,
                    "`learning_rate` must be a number",
                ),
                (
                    partial(build, 1e-3, RULES, strength=advised),
                    TypeError,
                    r"got a dict. Unpack it: \*\*recommended",
                ),
                (
                    partial(build, 1e-3, 0.1, total_steps=100),
                    TypeError,
                    "`rules` must be Rules; got float",
                ),
            ]
        )
