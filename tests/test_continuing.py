"""Trainings that begin without CAGE and go on with it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises

import cage_jax as cage
from cage_jax import contrib, curvature, weightings

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


# --- other rules ----------------------------------------------------------------------

TREE = {"a": {"kernel": (8, 4)}, "b": {"kernel": (8, 4)}, "bias": (4,)}
ONE, BOTH = cage.Rules([("a/kernel", "int4")]), cage.Rules([(".*kernel", "int4")])
GROUPS = cage.Rules([("a/.*", "int4"), (".*kernel", cage.int4(group_size=4))])
UNEVEN = cage.Rules([("a/.*", "int4"), (".*kernel", cage.int4(symmetric=False))])
STATES = {
    "recommended": lambda rules: cage.cage_adamw(0.1, rules, total_steps=1000),
    "statistics": lambda rules: cage.cage_sgd(
        0.1, rules, strength=1.0, statistics=True
    ),
    "frozen": lambda rules: cage.post_step(
        optax.sgd(0.1), rules, learning_rate=0.1, strength=1.0, freeze_scale=True
    ),
    "fisher": lambda rules: _weighted(rules, curvature.fisher()),
    "kronecker": lambda rules: _weighted(rules, curvature.kronecker()),
    "flips": lambda rules: _weighted(rules, weightings.by_flips()),
    "freezing": lambda rules: contrib.freezing(rules, 0.1),
    "lotion": lambda rules: contrib.lotion(rules),
    "rows": lambda rules: contrib.trained_rows(rules, 0.5, every=2),
}


def _weighted(rules, source):
    return cage.coupled(rules, strength=1.0, curvature=source)


def tree(make=np.ones):
    return jax.tree.map(
        lambda shape: jnp.asarray(make(shape), jnp.float32),
        TREE,
        is_leaf=lambda node: isinstance(node, tuple),
    )


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_other_rules_is_told_by_the_paths(name):
    params = tree()

    def step(new, old):
        state = jax.eval_shape(STATES[name](old).init, params)
        return lambda: jax.eval_shape(STATES[name](new).update, params, state, params)

    text = "^`state` must be that of these rules and parameters; it {} b/kernel. "
    assert_raises(
        (
            (step(BOTH, ONE), ValueError, text.format("lacks")),
            (step(ONE, BOTH), ValueError, text.format("has")),
        )
    )
    step(BOTH, BOTH)()
    if name in ("recommended", "statistics"):
        state = STATES[name](ONE).init(params)
        tx = cage.cage_adamw(
            0.1,
            BOTH,
            **(
                {"total_steps": 1000}
                if name == "recommended"
                else {"strength": 1.0, "statistics": True}
            ),
        )
        state = (tx.init(params)[0], state[1])
        with pytest.raises(ValueError, match=text.format("lacks")):
            tx.fused_step(params, state, params)


def test_a_frozen_grid_of_another_kind_is_told():
    params, make = tree(), STATES["frozen"]
    state = make(BOTH).init(params)
    for rules, text in (
        (GROUPS, r"it has shape \(1, 4\), not \(2, 4\), at grids/b/kernel/scale"),
        (UNEVEN, "it lacks grids/b/kernel/zero_point"),
    ):
        with pytest.raises(ValueError, match=text):
            jax.eval_shape(make(rules).update, params, state, params)


@pytest.mark.parametrize("fused", [False, True])
def test_a_state_remembers_rules_that_no_shape_shows(fused):
    """Under jit, and in a state for each of several models."""
    params = tree()

    def make(rules):
        return cage.cage_adamw(0.1, rules, strength=1.0)

    def step(rules):
        tx = make(rules)
        return jax.jit(tx.fused_step) if fused else jax.jit(tx.update)

    state = make(BOTH).init(params)
    assert len(jax.tree.leaves(state[1])) == 1
    bits = cage.Rules([("a/.*", "int4"), (".*kernel", "int8")])
    for rules, text in (
        (bits, "remembers int4 .*: 2 of .*, and these have int4 .*: 1 of .*, int8 "),
        (ONE, "remembers int4 .*: 2 of .*, and these have int4 .*: 1 of "),
        (
            cage.Rules([("b/.*", "int4")]),
            "remembers int4 .*, and these have int4 .*: 1 of ",
        ),
    ):
        text = f"^`state` must be that of these rules; it {text}.*move_state"
        with pytest.raises(ValueError, match=text):
            step(rules)(params, state, params)
        moved = cage.move_state(
            make(rules), params, state, old_rules=BOTH, new_rules=rules
        )
        jax.eval_shape(make(rules).update, params, moved, params)
    forgets = (state[0], state[1]._replace(rules=None))
    _, after = jax.eval_shape(make(bits).update, params, forgets, params)
    assert after[1].rules is None
    several = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    state = jax.vmap(make(BOTH).init)(several)
    jax.eval_shape(jax.vmap(make(BOTH).update), several, state, several)
    with pytest.raises(ValueError, match="it remembers int4 "):
        jax.eval_shape(jax.vmap(make(bits).update), several, state, several)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", STATES)
def test_optax_maps_over_the_parameters_in_a_state(name):
    params, tx = tree(), STATES[name](BOTH)
    state = tx.init(params)
    mapped = optax.tree_map_params(tx, lambda x: x + 1, state)
    chex.assert_trees_all_equal_structs(mapped, state)
    if name == "recommended":
        np.testing.assert_array_equal(mapped[0][0].mu["a"]["kernel"], 1.0)
        chex.assert_trees_all_equal(mapped[1], state[1])


@pytest.mark.parametrize("name", [n for n in STATES if n != "recommended"])
def test_a_gradient_of_none_passes_where_the_optimizer_lets_it(name):
    params, tx = tree(), STATES[name](BOTH)
    gradients = {**params, "a": {"kernel": None}, "bias": None}
    state = tx.init(params)
    updates, after = jax.eval_shape(tx.update, gradients, state, params)
    assert updates["a"]["kernel"] is None
    assert jax.tree.structure(after) == jax.tree.structure(state)
    recommended = cage.cage_sgd(0.1, BOTH, total_steps=100)
    jax.eval_shape(recommended.update, gradients, recommended.init(params), params)


@pytest.mark.parametrize("name", STATES)
def test_a_moved_state_fits_and_the_same_rules_keep_all(name):
    params, rng = tree(), np.random.default_rng(0)
    old = jax.tree.map(
        lambda x: jnp.asarray(rng.integers(1, 5, size=x.shape), x.dtype),
        STATES[name](BOTH).init(params),
    )
    for rules in (ONE, GROUPS, UNEVEN):
        tx = STATES[name](rules)
        state = cage.move_state(tx, params, old, old_rules=BOTH, new_rules=rules)
        jax.eval_shape(tx.update, params, state, params)
    tx = STATES[name](BOTH)
    same = cage.move_state(tx, params, old, old_rules=BOTH, new_rules=BOTH)
    chex.assert_trees_all_equal(same, old)


def test_what_a_moved_state_keeps_and_what_begins_anew():
    options = {
        "strength": 1.0,
        "freeze_scale": True,
        "statistics": True,
        "curvature": curvature.fisher(),
    }
    make = lambda rules: cage.cage_adamw(0.1, rules, **options)  # noqa: E731
    params = tree()
    old = jax.tree.map(lambda x: x + 3, make(BOTH).init(params))
    tx = make(GROUPS)
    fresh = tx.init(params)
    adam, new = cage.move_state(tx, params, old, old_rules=BOTH, new_rules=GROUPS)
    chex.assert_trees_all_equal(adam, old[0])
    assert new.cage_count == 3
    chex.assert_trees_all_equal(new.grids["a/kernel"], old[1].grids["a/kernel"])
    chex.assert_trees_all_equal(new.grids["b/kernel"], fresh[1].grids["b/kernel"])
    codes = new.statistics.previous_codes
    chex.assert_trees_all_equal(
        codes,
        {
            "a/kernel": old[1].statistics.previous_codes["a/kernel"],
            "b/kernel": fresh[1].statistics.previous_codes["b/kernel"],
        },
    )
    numbers = new.statistics._replace(previous_codes={})
    wanted = fresh[1].statistics._replace(previous_codes={})
    chex.assert_trees_all_equal(numbers, wanted)
    chex.assert_trees_all_equal(new.curvature, fresh[1].curvature)
    # Other bits, which no shape shows.
    bits = cage.Rules([("a/.*", "int4"), (".*kernel", "int8")])
    _, new = cage.move_state(make(bits), params, old, old_rules=BOTH, new_rules=bits)
    chex.assert_trees_all_equal(new.grids["a/kernel"], old[1].grids["a/kernel"])
    np.testing.assert_array_equal(new.grids["b/kernel"].scale, 0)
    # A layer more, whose moments begin at 0.
    larger = {**params, "c": {"kernel": jnp.ones((8, 4))}}
    (adam, *_), new = cage.move_state(
        make(BOTH), larger, old, old_rules=BOTH, new_rules=BOTH
    )
    chex.assert_trees_all_equal(adam.mu["a"], old[0][0].mu["a"])
    np.testing.assert_array_equal(adam.mu["c"]["kernel"], 0)
    assert adam.count == 3
    assert set(new.grids) == {"a/kernel", "b/kernel", "c/kernel"}


def test_a_state_that_cannot_be_moved(start):
    params, _ = start
    tx = cage.cage_adamw(0.1, RULES, strength=0.1)
    rules = {"old_rules": RULES, "new_rules": RULES}
    sgd = cage.cage_sgd(0.1, RULES, strength=0.1, momentum=0.9)

    def move(state, **changed):
        return lambda: cage.move_state(tx, params, state, **{**rules, **changed})

    assert_raises(
        (
            (move(sgd.init(params)), ValueError, "has TraceState.trace"),
            (
                move(optax.adamw(0.1).init(params)),
                ValueError,
                r"lacks CageState.cage_count. .*cage\.init_from\(tx, params, state\)",
            ),
            (move(tx.init(params), old_rules=[]), TypeError, "must be Rules"),
            (
                lambda: cage.move_state(tx, tx.init(params), params, **rules),
                TypeError,
                "The order is tx, params, state",
            ),
        )
    )
