"""Trainings that begin without CAGE and go on with it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises

import cage_jax as cage

pytestmark = pytest.mark.usefixtures("standard_promotion")
RULES = cage.Rules([(".*kernel", "int4")])
BEFORE, AFTER = 3, 4
RATE = optax.linear_schedule(0.1, 0.02, BEFORE + AFTER)


@pytest.fixture(scope="module")
def start():
    rng = np.random.default_rng(0)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=3), jnp.float32),
    }
    draws = [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
        for _ in range(BEFORE + AFTER)
    ]
    return params, draws


def trained(tx, params, state, gradients):
    """Parameters and state after a step for each of the gradients, not compiled."""
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def coupled(inner, strength):
    return optax.chain(cage.coupled(RULES, strength=strength), inner)


def decoupled(inner, strength):
    return cage.decoupled(inner, RULES, learning_rate=RATE, strength=strength)


def adamw(inner, strength):
    del inner
    return cage.cage_adamw(RATE, RULES, strength=strength, weight_decay=0.0)


def sgd(inner, strength):
    del inner
    return cage.cage_sgd(RATE, RULES, strength=strength, momentum=0.9)


def clipped(inner, strength):
    # As optax.chain(clip, inner): the rest of a chain stays where it is.
    pull = cage.coupled(RULES, strength=strength)
    return optax.chain(optax.clip_by_global_norm(1.0), pull, inner)


def many_steps(inner, strength):
    return optax.MultiSteps(decoupled(inner, strength), 2).gradient_transformation()


CLIP = optax.clip_by_global_norm(1.0)
CASES = {
    "cage_adamw from adamw": (optax.adamw(RATE, weight_decay=0.0), adamw),
    "cage_adamw from adam": (optax.adam(RATE), adamw),
    "cage_sgd from sgd": (optax.sgd(RATE, momentum=0.9), sgd),
    "decoupled lion": (optax.lion(RATE), decoupled),
    "decoupled partition": (
        optax.partition(
            {"a": optax.adam(RATE), "b": optax.sgd(RATE)}, {"kernel": "a", "bias": "b"}
        ),
        decoupled,
    ),
    "coupled adam": (optax.adam(RATE), coupled),
    "coupled rmsprop": (optax.rmsprop(RATE), coupled),
}


@pytest.mark.parametrize("name", CASES)
def test_with_strength_0_the_training_goes_on_to_the_bit(name, start):
    plain, with_cage = CASES[name]
    params, gradients = start
    between, state = trained(plain, params, plain.init(params), gradients[:BEFORE])
    want = trained(plain, between, state, gradients[BEFORE:])
    tx = with_cage(plain, 0.0)
    state = cage.init_from(tx, between, state)
    assert int(optax.tree_utils.tree_get(state, "cage_count")) == BEFORE
    got, state = trained(tx, between, state, gradients[BEFORE:])
    chex.assert_trees_all_equal(got, want[0])
    chex.assert_trees_all_equal(
        jax.tree.structure(tx.init(params)), jax.tree.structure(state)
    )


@pytest.mark.parametrize("around", ["clip", "MultiSteps"])
def test_what_stands_around_both_stays(around, start):
    params, gradients = start
    adam = optax.adam(RATE)
    if around == "clip":
        plain, tx = optax.chain(CLIP, adam), clipped(adam, 0.0)
    else:
        plain, tx = optax.MultiSteps(adam, 2), many_steps(adam, 0.0)
        plain = plain.gradient_transformation()
    between, state = trained(plain, params, plain.init(params), gradients[:BEFORE])
    want, _ = trained(plain, between, state, gradients[BEFORE:])
    state = cage.init_from(tx, between, state)
    got, _ = trained(tx, between, state, gradients[BEFORE:])
    chex.assert_trees_all_equal(got, want)


def test_strength_and_learning_rate_count_the_steps_before(start):
    """A training with CAGE from the start, whose strength is 0 until then, is equal."""
    params, gradients = start

    def strength(count):
        return jnp.where(count < BEFORE, 0.0, 0.5 * count)

    tx, plain = decoupled(optax.adam(RATE), strength), optax.adam(RATE)
    want, _ = trained(tx, params, tx.init(params), gradients)
    between, state = trained(plain, params, plain.init(params), gradients[:BEFORE])
    state = cage.init_from(tx, between, state)
    got, state = trained(tx, between, state, gradients[BEFORE:])
    chex.assert_trees_all_equal(got, want)
    assert int(state[1].cage_count) == BEFORE + AFTER


def test_both_states_can_be_donated(start):
    params, _ = start
    tx = cage.cage_adamw(0.1, RULES, strength=0.1)
    state = cage.init_from(tx, params, optax.adam(0.1).init(params))
    jax.block_until_ready(jax.jit(lambda state: state, donate_argnums=0)(state))


def test_a_state_without_a_count_needs_the_number_of_steps(start):
    params, _ = start
    tx, state = cage.cage_sgd(0.1, RULES, strength=0.1), optax.sgd(0.1).init(params)
    found = cage.init_from(tx, params, state, steps_done=7)
    assert int(found[1].cage_count) == 7
    with pytest.raises(TypeError, match="`steps_done` must be given"):
        cage.init_from(tx, params, state)
    with pytest.raises(ValueError, match="`steps_done` must be at least 0; got -1"):
        cage.init_from(tx, params, state, steps_done=-1)


def test_states_that_do_not_fit_are_told_by_name(start):
    params, _ = start
    adam = optax.adam(0.1)
    tx = cage.cage_adamw(RATE, RULES, strength=0.1)

    def start_from(optimizer, params=params, tx=tx, like=params):
        return lambda: cage.init_from(tx, like, optimizer.init(params))

    narrow = cage.cage_adamw(RATE, RULES, strength=0.1, mu_dtype="bfloat16")
    larger = {**params, "more": jnp.ones(3)}
    assert_raises(
        (
            (
                start_from(adam),
                ValueError,
                "that lacks ScaleByScheduleState.count. Give",
            ),
            (
                start_from(optax.sgd(RATE, momentum=0.9)),
                ValueError,
                "lacks ScaleByAdamState.count, ScaleByAdamState.mu/bias, "
                "ScaleByAdamState.mu/kernel and more, and has TraceState.trace/bias",
            ),
            (start_from(tx), ValueError, "has a correction"),
            (
                start_from(optax.adam(RATE), larger),
                ValueError,
                "has ScaleByAdamState.mu/more, ScaleByAdamState.nu/more",
            ),
            (
                start_from(optax.adam(RATE), tx=narrow),
                ValueError,
                r"mu/bias with shape \(3,\) and dtype float32, not shape \(3,\) and "
                "dtype bfloat16",
            ),
            (start_from(adam, tx=adam), ValueError, "`tx` must have a CAGE correction"),
        )
    )


def test_the_order_of_the_arguments_is_told(start):
    params, _ = start
    tx = cage.cage_adamw(RATE, RULES, strength=0.1)
    order = r"The order is tx, params, state\."
    for optimizer in (optax.adamw(RATE), optax.sgd(0.1)):
        state = optimizer.init(params)
        for swapped, name in (
            ((tx, state, params), "params"),
            ((params, tx, state), "tx"),
            ((state, params, tx), "tx"),
        ):
            with pytest.raises(TypeError, match=f"^`{name}` must be .*{order}"):
                cage.init_from(*swapped)
