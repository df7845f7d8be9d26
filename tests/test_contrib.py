"""The rivals that are transformations, each against its formula in NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises, train
from contrib_cases import (
    CLIPPED,
    CLIPPED_RULES,
    FLOAT64,
    FP4,
    ROTATED,
    RULES,
    STEP,
    apply,
    arrays,
    drawn,
    rounded,
    rounded_and_clipped,
    updated,
)
from optax.tree_utils import tree_get
from oracles import hadamard

import cage_jax as cage
from cage_jax import contrib
from cage_jax.quantizers.formats import Float, Integer
from cage_jax.quantizers.scales import Fixed

# Each update is compiled; that it agrees with an eager one is asked in
# test_contrib_conventions.
train = functools.partial(train, jit=True)
TURN = hadamard(8)


@pytest.fixture
def tree(rng):
    """Draws parameters or gradients, in NumPy."""
    return functools.partial(drawn, rng)


# --- averaging -----------------------------------------------------------------------


def test_the_average_is_weighted_by_powers_of_the_decay(x64, tree):
    every = {
        (decay, start): contrib.averaging(decay, start=start)
        for decay in (0.0, 0.7, 0.999, 1.0)
        for start in (0, 2)
    }

    @jax.jit
    def update(gradient, states, params):
        """All of them in one program, which follow the same weights."""
        found = {
            case: tx.update(gradient, states[case], params)
            for case, tx in every.items()
        }
        passed = [updates for updates, _ in found.values()]
        return passed, {case: state for case, (_, state) in found.items()}

    params = arrays(tree())
    states = {case: tx.init(params) for case, tx in every.items()}
    trajectory = []
    for n in range(1, 7):
        updates = jax.tree.map(lambda g: -0.1 * g, tree())
        passed, states = update(updates, states, params)
        for each in passed:
            chex.assert_trees_all_equal(each, updates)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
        for (decay, start), state in states.items():
            kept = trajectory[min(start, n - 1) :]
            powers = np.array([decay**i for i in range(len(kept))][::-1])
            weights = powers / powers.sum()
            want = jax.tree.map(
                lambda *leaves, weights=weights: sum(
                    w * np.asarray(leaf) for w, leaf in zip(weights, leaves)
                ),
                *kept,
            )
            # expm1 of the product of a logarithm, for powers near 1.
            average = contrib.averaged((optax.EmptyState(), state))
            chex.assert_trees_all_close(average, want, rtol=1e-10)


def test_the_average_of_narrow_weights_is_wide():
    tx = contrib.averaging(0.999)
    start = {"kernel": jnp.ones(4, jnp.bfloat16), "steps": jnp.arange(2)}

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates = {"kernel": jnp.full(4, 1 / 128, jnp.bfloat16), "steps": None}
            updates, state = tx.update(updates, state, params)
            return (apply(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=100)[0][1]

    average = contrib.averaged(run(start))
    assert average["kernel"].dtype == jnp.float32
    weights = 0.999 ** np.arange(100)[::-1]
    want = np.sum(weights * (1 + np.arange(1, 101) / 128)) / weights.sum()
    np.testing.assert_allclose(average["kernel"], want, rtol=1e-5)  # float32 sums
    np.testing.assert_array_equal(average["steps"], np.arange(2))


def test_an_average_of_other_parameters_is_told():
    tx, params = contrib.averaging(), {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}

    def step(others):
        state = jax.eval_shape(tx.init, others)
        return lambda: jax.eval_shape(tx.update, params, state, params)

    text = "^`state` must be that of these rules and parameters; it {}. Use those"
    assert_raises(
        (step(others), ValueError, text.format(told))
        for others, told in (
            ({"a": params["a"]}, "lacks b"),
            ({**params, "c": jnp.ones(1)}, "has c"),
            # This broadcasts.
            (
                {**params, "b": jnp.ones(1)},
                r"has shape \(1,\), not \(3,\), at average/b",
            ),
        )
    )
    step(params)()


def test_the_state_must_have_one_average():
    params = jnp.ones(3)
    two = optax.chain(contrib.averaging(), contrib.averaging()).init(params)
    for state, count in ((optax.sgd(0.1).init(params), 0), (two, 2)):
        with pytest.raises(ValueError, match=f"one average; got {count}"):
            contrib.averaged(state)


# --- dampening -----------------------------------------------------------------------


def test_dampening_pulls_within_the_grid_alone(x64, tree):
    params, gradient, strength = tree(), tree(), 0.3
    x = params["kernel"]
    assert (np.abs(x) > 7 * STEP).any()
    clipped = np.clip(x, -7 * STEP, 7 * STEP)
    inside = clipped == x
    want = gradient["kernel"] - 2 * strength * (rounded_and_clipped(x) - x) * inside
    updates = updated(
        contrib.dampening(CLIPPED_RULES, strength=strength), gradient, params
    )
    chex.assert_trees_all_close(updates["kernel"], want, **FLOAT64)
    chex.assert_trees_all_equal(updates["bias"], gradient["bias"])


def test_dampening_of_a_rotated_weight_clips_in_its_basis(x64, rng):
    x = 1.5 * rng.normal(size=(8, 3))
    turned = TURN @ x
    inside = np.abs(turned) <= 7 * STEP
    assert 0 < inside.mean() < 1
    wrong = (turned - rounded_and_clipped(turned)) * inside
    tx = contrib.dampening(cage.Rules([(".*", ROTATED)]), strength=0.5)
    chex.assert_trees_all_close(updated(tx, 0 * x, x), TURN.T @ wrong, **FLOAT64)


def test_dampening_is_coupled_cage_of_twice_the_strength(x64, tree):
    params, gradients = tree(), [tree() for _ in range(5)]
    strength = contrib.cosine_ramp(5, peak=0.8)
    ours = optax.chain(contrib.dampening(RULES, strength=strength), optax.sgd(0.1))
    twice = cage.coupled(RULES, strength=lambda count: 2 * strength(count))
    got, _ = train(ours, params, gradients)
    want, _ = train(optax.chain(twice, optax.sgd(0.1)), params, gradients)
    chex.assert_trees_all_close(got, want, **FLOAT64)
    plain = params["kernel"] - 0.1 * sum(g["kernel"] for g in gradients)
    assert abs(plain - got[-1]["kernel"]).max() > 1e-3


def test_the_ramp_is_half_a_cosine(x64):
    ramp = jax.jit(contrib.cosine_ramp(8))
    for count in range(12):
        want = 0.1 * (1 - np.cos(np.pi * min(count / 8, 1))) / 2
        np.testing.assert_allclose(ramp(count), want, rtol=1e-12)


# --- freezing ------------------------------------------------------------------------


def frozen_by_numpy(x, moves, thresholds, momentum):
    """The weights and which are frozen, after each step, weight by weight."""
    x = x.copy()
    codes, n = np.clip(np.round(x / STEP), -7, 7), x.size
    average, previous = codes.ravel().copy(), codes.ravel().copy()
    direction, frequency, pinned = np.zeros(n), np.zeros(n), np.full(n, np.nan)
    for move, threshold in zip(moves, thresholds):
        x = x + move
        flat = x.ravel()
        for i in range(n):
            code = np.clip(np.round(flat[i] / STEP), -7, 7)
            if not np.isnan(pinned[i]):
                flat[i] = pinned[i] * STEP
                continue
            turn = np.sign(code - previous[i])
            back = turn != 0 and turn == -direction[i]
            frequency[i] = momentum * back + (1 - momentum) * frequency[i]
            direction[i] = turn or direction[i]
            previous[i] = code
            if frequency[i] > threshold:
                pinned[i] = np.round(average[i])
                flat[i] = pinned[i] * STEP
            else:
                average[i] = momentum * code + (1 - momentum) * average[i]
        x = flat.reshape(x.shape)
        yield x, ~np.isnan(pinned).reshape(x.shape)


@pytest.mark.parametrize("scheduled", [False, True])
def test_freezing_pins_what_oscillates_to_its_average(x64, tree, rng, scheduled):
    momentum = 0.2
    thresholds = 0.4 - 0.01 * np.arange(30) if scheduled else np.full(30, 0.35)
    threshold = (lambda t: jnp.asarray(thresholds)[t]) if scheduled else 0.35
    params = tree()
    moves = [0.15 * rng.normal(size=(8, 3)) for _ in range(30)]
    tx = contrib.freezing(CLIPPED_RULES, threshold, momentum=momentum)
    gradients = [{"kernel": move, "bias": np.ones(3)} for move in moves]
    trajectory, states = train(tx, params, gradients)
    want = list(frozen_by_numpy(params["kernel"], moves, thresholds, momentum))
    assert 0.1 < want[-1][1].mean() < 0.95
    assert want[5][1].sum() < want[-1][1].sum()
    for reached, state, (x, frozen) in zip(trajectory, states, want):
        chex.assert_trees_all_equal(
            np.asarray(tree_get(state, "frozen")["kernel"]), frozen
        )
        chex.assert_trees_all_close(reached["kernel"], x, **FLOAT64)
    chex.assert_trees_all_close(trajectory[-1]["bias"], params["bias"] + 30, **FLOAT64)


def test_a_frozen_weight_goes_with_its_grid(x64):
    # The largest weight sets the scale; the others keep their codes on it.
    tx = contrib.freezing(RULES, 0.0, momentum=0.5)
    x = np.array([[7.0], [2.4], [1.0], [0.0]])
    moves = [[0, 0.2, 0, 0], [0, -0.2, 0, 0], [7.0, 0.3, 0.0, 0.0]]
    moves = [{"kernel": np.array(move)[:, None]} for move in moves]
    trajectory, states = train(tx, {"kernel": x}, moves)
    frozen = [np.asarray(state.frozen["kernel"]).ravel().tolist() for state in states]
    assert frozen[0] == [False] * 4
    assert frozen[1:] == [[False, True, False, False]] * 2
    # The average of 2, 3 is 2.5 and goes to the even code, 2.
    got = [np.asarray(reached["kernel"]).ravel() for reached in trajectory]
    np.testing.assert_allclose(got[1], [7, 2, 1, 0], rtol=1e-12)
    np.testing.assert_allclose(got[2], [14, 4, 1, 0], rtol=1e-12)


# --- WinQ ----------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_interpolation_after_every_so_many_steps(x64, tree, every):
    params, gradients = tree(), [tree() for _ in range(7)]
    tx = optax.chain(optax.sgd(0.1), contrib.interpolation(RULES, 0.3, every=every))
    trajectory, _ = train(tx, params, gradients)
    x = params["kernel"]
    for t, (gradient, reached) in enumerate(zip(gradients, trajectory), 1):
        x = x - 0.1 * gradient["kernel"]
        if t % every == 0:
            x = 0.7 * x + 0.3 * rounded(x)
        chex.assert_trees_all_close(reached["kernel"], x, **FLOAT64)


def test_between_interpolations_updates_are_the_very_same(tree):
    tx = contrib.interpolation(RULES, every=2)
    params, updates = arrays(tree(np.float32)), arrays(tree(np.float32))
    update, state = jax.jit(tx.update), tx.init(params)
    first, state = update(updates, state, params)
    second, _ = update(updates, state, params)
    chex.assert_trees_all_equal(first, updates)
    assert (np.asarray(second["kernel"]) != updates["kernel"]).any()


def test_one_interpolation_a_step_is_post_step_cage_and_pv_tuning(x64, tree):
    params, gradients = tree(), [tree() for _ in range(5)]
    lr, strength = 0.05, 3.0
    ours = optax.chain(
        optax.sgd(lr), contrib.interpolation(RULES, lr * strength, every=1)
    )
    got, _ = train(ours, params, gradients)
    want, _ = train(
        cage.post_step(optax.sgd(lr), RULES, strength=strength, learning_rate=lr),
        params,
        gradients,
    )
    chex.assert_trees_all_close(got, want, **FLOAT64)
    buffer, decay = params["kernel"], lr * strength  # PV-Tuning's
    for gradient, reached in zip(gradients, got):
        buffer = buffer - lr * gradient["kernel"]
        buffer = (1 - decay) * buffer + decay * rounded(buffer)
        chex.assert_trees_all_close(reached["kernel"], buffer, **FLOAT64)


# --- LOTION --------------------------------------------------------------------------


def variance(x, levels):
    """Variance of unbiased random rounding between two levels; 0 beyond the ends."""
    above = levels[np.clip(np.searchsorted(levels, x), 1, len(levels) - 1)]
    below = levels[np.clip(np.searchsorted(levels, x) - 1, 0, len(levels) - 2)]
    within = np.clip(x, levels[0], levels[-1])
    return (within - below) * (above - within)


@pytest.mark.parametrize(
    ("format", "levels"),
    [(Integer(4), np.arange(-7, 8)), (Float("e2m1"), np.unique([-FP4, FP4]))],
    ids=str,
)
def test_lotion_adds_the_slope_of_the_variance(x64, tree, format, levels):
    rules = cage.Rules([(".*kernel", cage.Quantizer(format, Fixed(STEP)))])
    params, decay = tree(), 0.9
    strength = 0.8 + 0.1 * np.arange(4)
    tx = contrib.lotion(rules, strength=lambda t: jnp.asarray(strength)[t], decay=decay)
    update, weights = jax.jit(tx.update), arrays(params)
    state, fisher, x = tx.init(weights), 0.0, params["kernel"]
    for t in range(4):
        gradient = tree()
        updates, state = update(arrays(gradient), state, weights)
        g = gradient["kernel"]
        fisher = decay * fisher + (1 - decay) * g**2
        h = 1e-6
        ends = [variance(x + d, levels * STEP) for d in (-h, h)]
        want = g + strength[t] / 2 * fisher * (ends[1] - ends[0]) / (2 * h)
        # A parabola: its central difference is exact but for cancellation.
        chex.assert_trees_all_close(updates["kernel"], want, rtol=1e-8, atol=1e-8)
        chex.assert_trees_all_equal(updates["bias"], gradient["bias"])
        chex.assert_trees_all_close(tree_get(state, "fisher")["kernel"], fisher)
    assert abs(want - g).max() > 1e-2


def test_the_variance_is_that_of_the_paper(x64, rng):
    # s**2 D (1 - D), whose slope by the weight is s (1 - 2 D).
    x, g = rng.uniform(-1.7, 1.7, size=(8, 3)), np.ones((8, 3))
    tx = contrib.lotion(cage.Rules([(".*", CLIPPED)]), decay=0.0)
    above = x / STEP - np.floor(x / STEP)
    want = g + STEP * (1 - 2 * above) / 2
    chex.assert_trees_all_close(updated(tx, g, x), want, **FLOAT64)


def test_lotion_in_the_basis_of_a_rotation(x64, rng):
    plain, rotated = cage.Rules([(".*", CLIPPED)]), cage.Rules([(".*", ROTATED)])
    x = rng.uniform(-1.7, 1.7, size=(8, 3))
    tx, like = (
        contrib.lotion(rules, strength=2.0, decay=0.5) for rules in (rotated, plain)
    )
    state, expected = tx.init(jnp.asarray(x)), like.init(jnp.asarray(x))
    update, update_plain = jax.jit(tx.update), jax.jit(like.update)
    for _ in range(2):
        g = rng.normal(size=(8, 3))
        updates, state = update(jnp.asarray(g), state, jnp.asarray(x))
        turned, expected = update_plain(
            jnp.asarray(TURN @ g), expected, jnp.asarray(TURN @ x)
        )
        chex.assert_trees_all_close(updates, TURN.T @ turned, **FLOAT64)
        assert abs(updates - g).max() > 1e-2


def test_lotion_leaves_levels_and_what_lies_beyond_alone():
    tx = contrib.lotion(cage.Rules([(".*", CLIPPED)]), decay=0.0)
    x = np.float32([[0.25], [-1.75], [1.75], [3.1], [-2.9], [0.0]])
    ones = np.ones_like(x)
    np.testing.assert_array_equal(updated(tx, ones, x), ones)


# --- EfQAT ---------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_rows_of_largest_weights_are_trained(x64, rng, share):
    rules = cage.Rules([("a", cage.int4()), ("b", cage.int4(axis=-1)), (".*", None)])
    shapes = {"a": (8, 3), "b": (4, 6), "bias": (3,)}
    params = {name: -rng.uniform(0.5, 1, size=shape) for name, shape in shapes.items()}
    gradients = [  # what is trained shrinks, and others are the largest
        {name: -rng.uniform(0.1, 0.2, size=shape) for name, shape in shapes.items()}
        for _ in range(7)
    ]
    tx = optax.chain(optax.sgd(1.0), contrib.trained_rows(rules, share, every=3))
    trajectory, _ = train(tx, params, gradients)
    x, seen = dict(params), set()
    for t, (gradient, reached) in enumerate(zip(gradients, trajectory)):
        if t % 3 == 0:
            columns, rows = np.abs(x["a"]).mean(0), np.abs(x["b"]).mean(1)
            order = np.argsort(-np.concatenate([columns, rows]))
            mask = np.zeros(7, bool)
            mask[order[: int(np.ceil(share * 7))]] = True
            seen.add(tuple(mask))
        x["a"] = x["a"] - gradient["a"] * mask[None, :3]
        x["b"] = x["b"] - gradient["b"] * mask[3:, None]
        x["bias"] = x["bias"] - gradient["bias"]
        chex.assert_trees_all_close(reached, x, **FLOAT64)
    assert share != 0.4 or len(seen) > 1
