"""What the correction keeps in its state: frozen grids and statistics."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import train
from jax.extend.core import jaxprs_in_params
from optax.tree_utils import tree_get
from oracles import absmax_round, absmax_scale

import cage_jax as cage

# By count. The strength is silent at first; `post_step` looks one step ahead.
LEARNING_RATE = np.array([0.05, 0.04, 0.07, 0.06, 0.03, 0.02, 0.01])
STRENGTH = np.array([0.0, 0.0, 2.0, 3.5, 5.0, 1.5])
STEPS = len(STRENGTH)
GROUP = 4
RULES = cage.Rules([(r".*kernel", cage.int4(group_size=GROUP))])
# Both sides in float64: what is left is rounding in another order of operations.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-13}
train = functools.partial(train, jit=True)


def table(values):
    """A schedule that looks its value up by count."""
    return lambda count: jnp.asarray(values)[count]


def codes(x):
    return np.round(x / absmax_scale(x, group=GROUP))


def error(x):
    return x - absmax_round(x, group=GROUP)


@pytest.fixture
def start(rng):
    """Parameters and the gradients of all steps, in NumPy."""

    def normal():
        return {"kernel": rng.normal(size=(8, 3)), "bias": rng.normal(size=3)}

    return normal(), [normal() for _ in range(STEPS)]


# --- the frozen grid -----------------------------------------------------------------

QUEST = cage.quest(3, hadamard=None)
QUEST_RULES = cage.Rules([(r".*kernel", QUEST)])


def quest_scale(x):
    """The published clipping point over half of 2**3 - 1 steps, by column."""
    return 2.0510683541 * np.sqrt(np.mean(x**2, 0, keepdims=True)) / 3.5


def quest_rounded(x, scale):
    return (np.clip(np.floor(x / scale), -4, 3) + 0.5) * scale


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("placement", ["decoupled", "post_step"])
def test_frozen_grid_is_that_of_the_first_pull(x64, placement, statistics, start):
    params, gradients = start
    lr, strength = table(LEARNING_RATE), table(STRENGTH)
    tx = getattr(cage, placement)(
        optax.sgd(lr),
        QUEST_RULES,
        learning_rate=lr,
        strength=strength,
        freeze_scale=True,
        statistics=statistics,
    )
    trajectory, states = train(tx, params, gradients)
    x, scale = params["kernel"], np.zeros((1, 3))
    late = placement == "post_step"
    for t, gradient in enumerate(gradients):
        descent = -LEARNING_RATE[t] * gradient["kernel"]
        point = x + descent if late else x
        if STRENGTH[t] and not scale.any():
            scale = quest_scale(point)
        pull = 0.0
        if STRENGTH[t]:
            wrong = point - quest_rounded(point, scale)
            pull = LEARNING_RATE[t + late] * STRENGTH[t] * wrong
        x = x + descent - pull
        chex.assert_trees_all_close(trajectory[t]["kernel"], x, **FLOAT64)
        grids = tree_get(states[t], "grids")
        assert list(grids) == ["kernel"]
        assert grids["kernel"].zero_point is None
        chex.assert_trees_all_close(grids["kernel"].scale, scale, **FLOAT64)
    # The forward pass and what is shipped lie on the same grid.
    assert abs(quest_scale(x) - scale).max() > 1e-3
    want = quest_rounded(x, scale)

    @jax.jit
    def on_grid(params):
        forward = cage.fake_quant(params, QUEST_RULES, grid=grids)
        return forward, cage.quantize(params, QUEST_RULES, grid=grids)

    forward, shipped = on_grid(trajectory[-1])
    chex.assert_trees_all_close(forward["kernel"], want, **FLOAT64)
    chex.assert_trees_all_close(shipped["kernel"].scale, scale, **FLOAT64)
    chex.assert_trees_all_equal(
        np.asarray(shipped["kernel"].codes).astype(np.int8),
        np.floor(want / scale).astype(np.int8),
    )


def test_silent_grids_are_those_found_in_the_array(rng):
    params = {"kernel": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)}
    grids = (
        cage.coupled(QUEST_RULES, strength=1.0, freeze_scale=True).init(params).grids
    )

    @jax.jit
    def both(params, grids):
        given = cage.fake_quant(params, QUEST_RULES, grid=grids)
        return given, cage.fake_quant(params, QUEST_RULES)

    chex.assert_trees_all_equal(*both(params, grids))


def test_frozen_zero_point(rng):
    rules = cage.Rules([(".*", cage.int4(symmetric=False))])
    x = rng.uniform(1, 2, size=(8, 3)).astype(np.float32)
    tx = cage.coupled(rules, strength=1.0, freeze_scale=True)
    update, zeros = jax.jit(tx.update), np.zeros_like(x)
    _, state = update(zeros, tx.init(jnp.asarray(x)), x)
    (grid,) = state.grids.values()
    # All values positive: the range starts at zero, whose code is the lowest.
    np.testing.assert_array_equal(grid.zero_point, np.full((1, 3), -8.0))
    _, later = update(zeros, state, -2 * x)
    chex.assert_trees_all_equal(later.grids, state.grids)


@pytest.mark.parametrize(
    ("quantizer", "least", "most"),
    [
        # The scale of a grid that is not idempotent walks with the weights.
        (cage.quest(2, hadamard=None), -1.0, -0.5),
        # A negative value of largest size lies at -7.5, a tie that goes to -8.
        (cage.int4(narrow=False), 10.0, 1000.0),
        (cage.int4(), -0.02, 0.02),
    ],
    ids=str,
)
def test_norm_drift_of_a_long_pull(quantizer, least, most, rng):
    rules = cage.Rules([(".*", quantizer)])
    x = jnp.asarray(rng.normal(size=(256, 4)), jnp.float32)

    @jax.jit
    def pulled(x):
        """The weights, and the statistic, of a grid that moves and one that is kept."""

        def pull(freeze_scale):
            tx = cage.decoupled(
                optax.sgd(0.1),
                rules,
                strength=1.0,
                learning_rate=0.1,
                freeze_scale=freeze_scale,
                statistics=True,
            )

            def step(carry, _):
                x, state = carry
                updates, state = tx.update(jnp.zeros_like(x), state, x)
                return (x + updates, state), None

            (last, state), _ = jax.lax.scan(step, (x, tx.init(x)), length=1000)
            return last, tree_get(state, "norm_drift")

        return pull(False), pull(True)

    drifts = []
    for last, statistic in pulled(x):
        drift = np.linalg.norm(last) / np.linalg.norm(x) - 1
        # The statistic is of the weights before the last step.
        assert abs(statistic - drift) < 0.01 * (1 + drift)
        drifts.append(drift)
    moving, kept = drifts
    assert least < moving < most
    # Rounding once: at 2 bits the error of 0.345 rms takes 6 % from the norm.
    assert abs(kept) < 0.08


# --- statistics ----------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["cage", "decoupled", "post_step"])
def test_statistics(x64, placement, rng):
    sizes = {"a/kernel": (8, 3), "b/kernel": (4, 2), "bias": (3,)}
    x = {path: rng.normal(size=shape) for path, shape in sizes.items()}
    gradients = [
        {path: rng.normal(size=shape) for path, shape in sizes.items()}
        for _ in range(STEPS)
    ]
    lr, strength = table(LEARNING_RATE), table(STRENGTH)
    if placement == "cage":
        tx = optax.chain(
            cage.coupled(RULES, strength=strength, statistics=True), optax.sgd(lr)
        )
    else:
        wrap = getattr(cage, placement)
        options = {"learning_rate": lr, "strength": strength, "statistics": True}
        tx = wrap(optax.sgd(lr), RULES, **options)
    _, states = train(tx, x, gradients)
    late = placement == "post_step"
    before = {path: codes(x[path]) for path in ("a/kernel", "b/kernel")}
    any_flipped, reference = 0.0, None
    for t, gradient in enumerate(gradients):
        factor = 1.0 if placement == "cage" else LEARNING_RATE[t + late]
        seen, pulls, updates, now = {}, {}, {}, {}
        for path in before:
            descent = -LEARNING_RATE[t] * gradient[path]
            updates[path] = gradient[path] if placement == "cage" else descent
            seen[path] = x[path] + descent if late else x[path]
            pulls[path] = factor * STRENGTH[t] * error(seen[path])
            now[path] = codes(seen[path])
            applied = LEARNING_RATE[t] if placement == "cage" else 1.0
            x[path] = x[path] + descent - applied * pulls[path]

        def norm(tree):
            return np.sqrt(sum(np.sum(leaf**2) for leaf in tree.values()))

        relative = [
            np.linalg.norm(error(leaf)) / np.linalg.norm(leaf) for leaf in seen.values()
        ]
        flips = [(now[path] != before[path]).ravel() for path in now]
        if STRENGTH[t] == 0 or reference is None:
            reference = norm(seen)
        if STRENGTH[t] == 0:
            reference = None
        drift = 0.0 if reference is None else norm(seen) / reference - 1
        want = {
            "correction_strength": STRENGTH[t],
            "relative_error_mean": np.mean(relative),
            "relative_error_max": np.max(relative),
            "correction_ratio": norm(pulls) / norm(updates),
            "codes_flipped": np.mean(np.concatenate(flips)),
            "norm_drift": drift,
        }
        for name, value in want.items():
            got = tree_get(states[t], name)
            chex.assert_shape(got, ())
            assert got.dtype == jnp.float32
            # Kept in float32; the drift is a difference of norms of about 5.
            np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-6, err_msg=name)
        kept = tree_get(states[t], "previous_codes")
        chex.assert_trees_all_equal(kept, jax.tree.map(np.int8, now))
        any_flipped += want["codes_flipped"]
        before = now
    assert any_flipped > 0
    assert abs(want["norm_drift"]) > 1e-3


def test_statistics_of_frozen_grids(x64, start):
    params, gradients = start
    lr = table(LEARNING_RATE)
    tx = cage.decoupled(
        optax.sgd(lr),
        QUEST_RULES,
        strength=1.0,
        learning_rate=lr,
        freeze_scale=True,
        statistics=True,
    )
    trajectory, states = train(tx, params, gradients)
    scale = quest_scale(params["kernel"])
    x = np.asarray(trajectory[-2]["kernel"])  # before the last step
    got = tree_get(states[-1], "previous_codes")["kernel"]
    want = quest_rounded(x, scale)
    chex.assert_trees_all_equal(got, np.floor(want / scale).astype(np.int8))
    relative = np.linalg.norm(x - want) / np.linalg.norm(x)
    # Kept in float32.
    np.testing.assert_allclose(
        tree_get(states[-1], "relative_error_max"), relative, rtol=1e-6
    )


def test_statistics_of_every_fourth_step_and_of_the_first_pull(x64, start):
    params, gradients = start
    lr, strength = table(LEARNING_RATE), table(STRENGTH)

    def run(statistics):
        options = {"learning_rate": lr, "strength": strength, "statistics": statistics}
        tx = cage.decoupled(optax.sgd(lr), RULES, **options)
        trajectory, states = train(tx, params, gradients)
        found = [tree_get(state, "statistics") for state in states]
        return jax.device_get((trajectory, found))

    trajectory, every = run(True)
    same, some = run(4)
    chex.assert_trees_all_close(same, trajectory, **FLOAT64)
    seen = [params, *trajectory[:-1]]
    last = params  # the parameters when codes were last measured
    for count, (found, full) in enumerate(zip(some, every)):
        assert found.correction_strength == STRENGTH[count]
        if count not in (0, 2, 4):  # it begins to pull in step 2
            kept = some[count - 1]._replace(correction_strength=STRENGTH[count])
            chex.assert_trees_all_equal(found, kept)
            continue
        now, before = (codes(x["kernel"]) for x in (seen[count], last))
        flipped = np.float32(np.mean(now != before))
        expected = full._replace(codes_flipped=flipped)
        chex.assert_trees_all_close(found, expected, rtol=1e-6)
        last = seen[count]
    assert some[4].codes_flipped != every[4].codes_flipped
    norms = [np.linalg.norm(x["kernel"]) for x in seen]
    np.testing.assert_allclose(some[5].reference_norm, norms[2], rtol=1e-6)
    drift = norms[4] / norms[2] - 1
    np.testing.assert_allclose(some[5].norm_drift, drift, atol=1e-6)


@pytest.mark.parametrize("quantizer", [cage.int4(group_size=8), cage.quest(4)], ids=str)
def test_nothing_is_measured_outside_of_a_branch(quantizer):
    params = {"kernel": jnp.ones((128, 4))}
    tx = cage.cage_sgd(
        0.1,
        cage.Rules([(".*", quantizer)]),
        strength=cage.silence_then_ramp(9),
        statistics=2,
    )
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    work = {"round", "floor", "reduce_max", "dot_general", "reduce_sum"}

    def measured(jaxpr, in_branches):
        found = [eqn for eqn in equations(jaxpr, in_branches) if eqn.invars]
        names = {eqn.primitive.name for eqn in found if eqn.invars[0].aval.size > 4}
        return work & names

    assert measured(jaxpr, in_branches=True) >= {"reduce_sum"}
    assert measured(jaxpr, in_branches=False) == set()


def equations(jaxpr, in_branches, inside=False):
    """All equations, inside conditional branches or outside of them."""
    for equation in jaxpr.eqns:
        if inside == in_branches:
            yield equation
        branch = inside or equation.primitive.name == "cond"
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner, in_branches, branch)


@pytest.mark.usefixtures("standard_promotion")
def test_a_period_goes_on_from_a_state_and_counts_the_steps_of_multisteps(start):
    params, gradients = jax.tree.map(jnp.float32, start)
    tx = cage.cage_sgd(0.1, RULES, strength=table(STRENGTH), statistics=3)
    _, states = train(tx, params, gradients)
    # Without and with a period the state is the same.
    state, x = (
        cage.cage_sgd(0.1, RULES, strength=1.0, statistics=True).init(params),
        params,
    )
    update = jax.jit(tx.update)
    for gradient, expected in zip(gradients, states):
        # As restored from a file.
        state = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state)
        updates, state = update(gradient, state, x)
        x = optax.apply_updates(x, updates)
        chex.assert_trees_all_equal(state, expected)
    twice = [gradient for gradient in gradients for _ in range(2)]
    _, many = train(optax.MultiSteps(tx, 2), params, twice)
    for found, expected in zip(many[1::2], states):
        chex.assert_trees_all_close(found.inner_opt_state, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("statistics", "error"), [(0, ValueError), (2.5, TypeError), ("10", TypeError)]
)
def test_a_period_that_is_none(statistics, error):
    with pytest.raises(error, match=r"`statistics` must be .* Use True for every step"):
        cage.cage_adamw(0.1, RULES, strength=1.0, statistics=statistics)


def test_statistics_of_zeros_are_finite():
    params = {"kernel": jnp.zeros((8, 3))}
    tx = cage.coupled(RULES, strength=1.0, statistics=True)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    measured = state.statistics._asdict()
    assert measured.pop("correction_strength") == 1
    chex.assert_trees_all_equal(measured, jax.tree.map(np.zeros_like, measured))
