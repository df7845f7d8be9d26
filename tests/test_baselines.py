"""The rivals, each against its formula in NumPy, and what Optax expects of them."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.tree_utils import tree_get

import cage_jax as cage
from cage_jax import baselines
from cage_jax.formats import Float, Integer
from cage_jax.scales import Fixed

GROUP = 4
STEP = 0.25
RULES = cage.Rules([(r".*kernel", cage.int4(group_size=GROUP))])
CLIPPED = cage.Quantizer(Integer(4), Fixed(STEP), gradient="clip")
# The grid ends at 7 * STEP, which normal numbers of deviation 1 exceed.
CLIPPED_RULES = cage.Rules([(r".*kernel", CLIPPED)])
ROTATED = cage.Quantizer(Integer(4), Fixed(STEP), hadamard=8, gradient="clip")
# Both sides in float64: what is left is rounding in another order of operations.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-13}


def scales(x):
    """Of int4, absmax over groups of 4 along axis -2, in NumPy; for each weight."""
    largest = np.abs(x.reshape(-1, GROUP, x.shape[-1])).max(1)
    return largest.repeat(GROUP, 0) / 7


def rounded(x):
    return np.round(x / scales(x)) * scales(x)


def rounded_and_clipped(x):
    return np.clip(np.round(x / STEP), -7, 7) * STEP


def hadamard(size=8):
    """Orthonormal, by Sylvester's construction."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


@pytest.fixture
def tree(rng):
    """Draws parameters or gradients, in NumPy."""

    def draw(dtype=np.float64):
        kernel, bias = rng.normal(size=(8, 3)), rng.normal(size=3)
        return {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}

    return draw


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def apply(params, updates):
    """`optax.apply_updates`, for which None is no update."""
    return jax.tree.map(
        lambda x, update: x if update is None else x + update,
        params,
        updates,
        is_leaf=lambda x: x is None,
    )


def train(tx, params, gradients):
    """The parameters and the state after each step."""
    params = arrays(params)
    state, trajectory, states = tx.init(params), [], []
    for gradient in gradients:
        updates, state = tx.update(arrays(gradient), state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
        states.append(state)
    return trajectory, states


# --- averaging -----------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("decay", [0.0, 0.7, 0.999, 1.0])
def test_the_average_is_weighted_by_powers_of_the_decay(x64, tree, decay, start):
    gradients = [tree() for _ in range(6)]
    tx = optax.chain(optax.sgd(0.1), baselines.averaging(decay, start=start))
    trajectory, states = train(tx, tree(), gradients)
    plain, _ = train(optax.sgd(0.1), trajectory[0], gradients[1:])
    chex.assert_trees_all_equal(trajectory[1:], plain)
    for n, state in enumerate(states, 1):
        kept = trajectory[:n][min(start, n - 1) :]
        powers = np.array([decay**i for i in range(len(kept))][::-1])
        weights = powers / powers.sum()
        want = jax.tree.map(
            lambda *leaves, weights=weights: sum(
                w * np.asarray(leaf) for w, leaf in zip(weights, leaves)
            ),
            *kept,
        )
        # expm1 of the product of a logarithm, for powers near 1.
        chex.assert_trees_all_close(baselines.averaged(state), want, rtol=1e-10)


def test_the_average_of_narrow_weights_is_wide():
    tx = baselines.averaging(0.999)
    params = {"kernel": jnp.ones(4, jnp.bfloat16), "steps": jnp.arange(2)}
    state = tx.init(params)
    for _ in range(100):
        updates = {"kernel": jnp.full(4, 1 / 128, jnp.bfloat16), "steps": None}
        updates, state = tx.update(updates, state, params)
        params = apply(params, updates)
    average = baselines.averaged(state)
    assert average["kernel"].dtype == jnp.float32
    weights = 0.999 ** np.arange(100)[::-1]
    want = np.sum(weights * (1 + np.arange(1, 101) / 128)) / weights.sum()
    np.testing.assert_allclose(average["kernel"], want, rtol=1e-5)  # float32 sums
    chex.assert_trees_all_equal(average["steps"], jnp.arange(2))


def test_the_state_must_have_one_average():
    params = jnp.ones(3)
    two = optax.chain(baselines.averaging(), baselines.averaging()).init(params)
    for state, count in ((optax.sgd(0.1).init(params), 0), (two, 2)):
        with pytest.raises(ValueError, match=f"one average; got {count}"):
            baselines.averaged(state)


# --- dampening -----------------------------------------------------------------------


def test_dampening_pulls_within_the_grid_alone(x64, tree):
    params, gradient, strength = tree(), tree(), 0.3
    x = params["kernel"]
    assert (np.abs(x) > 7 * STEP).any()
    clipped = np.clip(x, -7 * STEP, 7 * STEP)
    inside = clipped == x
    want = gradient["kernel"] - 2 * strength * (rounded_and_clipped(x) - x) * inside
    tx = baselines.dampening(CLIPPED_RULES, strength)
    updates, _ = tx.update(arrays(gradient), tx.init(arrays(params)), arrays(params))
    chex.assert_trees_all_close(updates["kernel"], want, **FLOAT64)
    chex.assert_trees_all_equal(updates["bias"], gradient["bias"])


def test_dampening_of_a_rotated_weight_clips_in_its_basis(x64, rng):
    x = 1.5 * rng.normal(size=(8, 3))
    turned = hadamard() @ x
    inside = np.abs(turned) <= 7 * STEP
    assert 0 < inside.mean() < 1
    wrong = (turned - rounded_and_clipped(turned)) * inside
    tx = baselines.dampening(cage.Rules([(".*", ROTATED)]), 0.5)
    x = jnp.asarray(x)
    updates, _ = tx.update(jnp.zeros_like(x), tx.init(x), x)
    chex.assert_trees_all_close(updates, hadamard().T @ wrong, **FLOAT64)


def test_dampening_is_coupled_cage_of_twice_the_strength(x64, tree):
    params, gradients = tree(), [tree() for _ in range(5)]
    strength = baselines.cosine_ramp(5, peak=0.8)
    ours = optax.chain(baselines.dampening(RULES, strength), optax.sgd(0.1))
    twice = cage.cage(RULES, lambda count: 2 * strength(count))
    got, _ = train(ours, params, gradients)
    want, _ = train(optax.chain(twice, optax.sgd(0.1)), params, gradients)
    chex.assert_trees_all_close(got, want, **FLOAT64)
    plain, _ = train(optax.sgd(0.1), params, gradients)
    assert abs(plain[-1]["kernel"] - got[-1]["kernel"]).max() > 1e-3


def test_the_ramp_is_half_a_cosine(x64):
    ramp = baselines.cosine_ramp(8)
    for count in range(12):
        want = 0.1 * (1 - np.cos(np.pi * min(count / 8, 1))) / 2
        np.testing.assert_allclose(ramp(count), want, rtol=1e-12)


# --- freezing ------------------------------------------------------------------------


def frozen_by_numpy(x, moves, threshold, momentum):
    """The weights and which are frozen, after each step, weight by weight."""
    x = x.copy()
    codes, n = np.clip(np.round(x / STEP), -7, 7), x.size
    average, previous = codes.ravel().copy(), codes.ravel().copy()
    direction, frequency, pinned = np.zeros(n), np.zeros(n), np.full(n, np.nan)
    for t, move in enumerate(moves):
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
            if frequency[i] > threshold(t):
                pinned[i] = np.round(average[i])
                flat[i] = pinned[i] * STEP
            else:
                average[i] = momentum * code + (1 - momentum) * average[i]
        x = flat.reshape(x.shape)
        yield x, ~np.isnan(pinned).reshape(x.shape)


@pytest.mark.parametrize("scheduled", [False, True])
def test_freezing_pins_what_oscillates_to_its_average(x64, tree, rng, scheduled):
    momentum = 0.2
    threshold = (lambda t: 0.4 - 0.01 * float(t)) if scheduled else (lambda t: 0.35)
    params = tree()
    moves = [0.15 * rng.normal(size=(8, 3)) for _ in range(30)]
    tx = baselines.freezing(
        CLIPPED_RULES, threshold if scheduled else 0.35, momentum=momentum
    )
    gradients = [{"kernel": move, "bias": np.ones(3)} for move in moves]
    trajectory, states = train(tx, params, gradients)
    want = list(frozen_by_numpy(params["kernel"], moves, threshold, momentum))
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
    tx = baselines.freezing(RULES, 0.0, momentum=0.5)
    x = jnp.array([[7.0], [2.4], [1.0], [0.0]])
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


# --- EWGS ----------------------------------------------------------------------------


def test_ewgs_scales_the_gradient_by_the_distance(x64, tree):
    params, g, delta = tree(), tree()["kernel"], 0.7
    x = params["kernel"]

    def loss(params):
        return jnp.sum(baselines.ewgs(params, CLIPPED_RULES, delta)["kernel"] * g)

    # Laid on [0, 1], as in the paper.
    low, width = -7 * STEP, 14 * STEP
    unit = np.clip((x - low) / width, 0, 1)
    unit_rounded = np.round(14 * unit) / 14
    inside = np.abs(x) <= 7 * STEP
    assert 0 < inside.mean() < 1
    want = inside * g * (1 + delta * np.sign(g) * (unit - unit_rounded))
    gradient = jax.grad(loss)(arrays(params))
    chex.assert_trees_all_close(gradient["kernel"], want, **FLOAT64)
    chex.assert_trees_all_equal(gradient["bias"], np.zeros(3))


def test_ewgs_of_a_rotated_weight_scales_in_its_basis(x64, rng):
    x, g = 1.5 * rng.normal(size=(8, 3)), rng.normal(size=(8, 3))
    rules = cage.Rules([(".*", ROTATED)])

    def loss(x):
        return jnp.sum(baselines.ewgs(x, rules, 0.7) * g)

    turned, turned_g = hadamard() @ x, hadamard() @ g
    inside = np.abs(turned) <= 7 * STEP
    distance = (turned - rounded_and_clipped(turned)) / (14 * STEP)
    want = inside * turned_g * (1 + 0.7 * np.sign(turned_g) * distance)
    gradient = jax.grad(loss)(jnp.asarray(x))
    chex.assert_trees_all_close(gradient, hadamard().T @ want, **FLOAT64)


def test_ewgs_without_delta_is_fake_quant(tree):
    variables = cage.with_grids(
        arrays(tree(np.float32)), rules := cage.Rules([(".*kernel", cage.lsq(3))])
    )

    def loss(quantize):
        return lambda x: jnp.sum(jnp.sin(quantize(x)["params"]["kernel"]))

    def with_delta(delta):
        return loss(lambda x: baselines.ewgs(x, rules, delta))

    want = jax.value_and_grad(loss(lambda x: cage.fake_quant(x, rules)))(variables)
    got = jax.value_and_grad(with_delta({"kernel": 0.0}))
    chex.assert_trees_all_equal(got(variables), want)
    # With it the learned grid gets the same gradient, the weights another.
    gradient = jax.grad(with_delta(0.9))(variables)
    chex.assert_trees_all_equal(gradient["grids"], want[1]["grids"])
    other, same = gradient["params"], want[1]["params"]
    assert abs(other["kernel"] - same["kernel"]).max() > 1e-3


def test_delta_is_the_curvature_over_the_gradient(x64, tree, rng, key):
    params = {name: tree() for name in ("a", "b", "c", "d")}
    x = {name: part["kernel"] for name, part in params.items()}
    curvature = {name: rng.uniform(1, 2, size=(8, 3)) for name in x}
    curvature["b"] *= -1  # the mean is not positive
    curvature["d"] *= 0

    def loss(params):
        parts = [
            jnp.sum(curvature[name] / 2 * params[name]["kernel"] ** 2) for name in x
        ]
        return sum(parts)

    deltas = baselines.ewgs_delta(loss, arrays(params), RULES, key)
    want = {}
    for name, value in x.items():
        # A diagonal Hessian makes Hutchinson's estimate exact.
        width = 14 * scales(value)
        gradient = width * curvature[name] * rounded(value)
        mean = np.mean(width**2 * curvature[name])
        want[f"{name}/kernel"] = max(mean, 0) / (3 * gradient.std() or 1)
    assert want["a/kernel"] > 0.1
    assert want["b/kernel"] == want["d/kernel"] == 0
    chex.assert_trees_all_close(deltas, want, **FLOAT64)
    baselines.ewgs(arrays(params), RULES, deltas)


def test_delta_of_rotated_weights_is_that_of_their_basis(x64, rng):
    x, root = rng.normal(size=(8, 1)), rng.normal(size=(8, 8))
    hessian = root @ root.T
    rules = cage.Rules([(".*", ROTATED)])

    def loss(x):
        return jnp.sum(x * (hessian @ x)) / 2

    turned = hadamard() @ hessian @ hadamard().T
    gradient = turned @ rounded_and_clipped(hadamard() @ x)
    width = 14 * STEP
    want = width * np.trace(turned) / 8 / (3 * gradient.std())
    keys = jax.random.split(jax.random.key(0), 2000)
    deltas = jax.vmap(lambda key: baselines.ewgs_delta(loss, x, rules, key)[""])(keys)
    # The mean of 2000 estimates; no single one is below 0 here.
    np.testing.assert_allclose(jnp.mean(deltas), want, rtol=0.05)


# --- WinQ ----------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_interpolation_after_every_so_many_steps(x64, tree, every):
    params, gradients = tree(), [tree() for _ in range(7)]
    tx = optax.chain(optax.sgd(0.1), baselines.interpolation(RULES, 0.3, every=every))
    trajectory, _ = train(tx, params, gradients)
    x = params["kernel"]
    for t, (gradient, reached) in enumerate(zip(gradients, trajectory), 1):
        x = x - 0.1 * gradient["kernel"]
        if t % every == 0:
            x = 0.7 * x + 0.3 * rounded(x)
        chex.assert_trees_all_close(reached["kernel"], x, **FLOAT64)


def test_between_interpolations_updates_are_the_very_same(tree):
    tx = baselines.interpolation(RULES, every=2)
    params, updates = arrays(tree(np.float32)), arrays(tree(np.float32))
    state = tx.init(params)
    first, state = tx.update(updates, state, params)
    second, _ = tx.update(updates, state, params)
    chex.assert_trees_all_equal(first, updates)
    assert (second["kernel"] != updates["kernel"]).any()


def test_one_interpolation_a_step_is_post_step_cage_and_pv_tuning(x64, tree):
    params, gradients = tree(), [tree() for _ in range(5)]
    lr, strength = 0.05, 3.0
    ours = optax.chain(
        optax.sgd(lr), baselines.interpolation(RULES, lr * strength, every=1)
    )
    got, _ = train(ours, params, gradients)
    want, _ = train(
        cage.post_step(optax.sgd(lr), RULES, strength, lr), params, gradients
    )
    chex.assert_trees_all_close(got, want, **FLOAT64)
    buffer, decay = params["kernel"], lr * strength  # PV-Tuning's
    for gradient, reached in zip(gradients, got):
        buffer = buffer - lr * gradient["kernel"]
        buffer = (1 - decay) * buffer + decay * rounded(buffer)
        chex.assert_trees_all_close(reached["kernel"], buffer, **FLOAT64)


def test_noise_is_normal_and_rounded(key):
    # A fine grid of which 5 deviations are within, around 0.
    quantizer = cage.int8(scale=Fixed(0.04))
    rules = cage.Rules([(r".*kernel", quantizer)])
    params = {
        "a": {"kernel": jnp.zeros((64, 64))},
        "b": {"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(3)},
    }
    noisy = baselines.noisy_fake_quant(params, rules, key, deviation=1.0)
    assert noisy["b"]["bias"] is params["b"]["bias"]
    a, b = (np.asarray(noisy[name]["kernel"]) for name in "ab")
    for noise in (a, b):
        np.testing.assert_allclose(noise / 0.04, np.round(noise / 0.04), atol=1e-4)
        # Means over 4096 numbers, within 4 deviations.
        assert abs(noise.mean()) < 0.07
        assert abs(noise.std() - 1) < 0.05
        assert abs((np.abs(noise) < 1).mean() - 0.6827) < 0.03
    assert abs((a * b).mean()) < 0.07
    again = baselines.noisy_fake_quant(params, rules, key, deviation=1.0)
    chex.assert_trees_all_equal(again, noisy)
    other = baselines.noisy_fake_quant(params, rules, jax.random.key(1), deviation=1.0)
    assert (other["a"]["kernel"] != a).any()


def test_the_gradient_is_that_at_the_noisy_weights(x64, key, tree):
    params, g = arrays(tree()), tree()["kernel"]
    fine = cage.Rules([(".*kernel", cage.int8(scale=Fixed(0.05)))])
    noisy = baselines.noisy_fake_quant(params, fine, key, deviation=1.0)["kernel"]

    def loss(params):
        coarse = baselines.noisy_fake_quant(params, CLIPPED_RULES, key, deviation=1.0)
        return jnp.sum(coarse["kernel"] * g)

    gradient = np.asarray(jax.grad(loss)(params)["kernel"])
    passes = gradient != 0
    # Near the end of the grid the fine one does not tell.
    clear = np.abs(np.abs(noisy) - 7 * STEP) > 0.05
    assert (passes == (np.abs(noisy) <= 7 * STEP))[clear].all()
    assert (passes != (np.abs(params["kernel"]) <= 7 * STEP)).any()
    chex.assert_trees_all_equal(gradient[passes], g[passes])


# --- LOTION --------------------------------------------------------------------------


def variance(x, levels):
    """Of unbiased random rounding to the levels on both sides; 0 beyond them."""
    above = levels[np.clip(np.searchsorted(levels, x), 1, len(levels) - 1)]
    below = levels[np.clip(np.searchsorted(levels, x) - 1, 0, len(levels) - 2)]
    within = np.clip(x, levels[0], levels[-1])
    return (within - below) * (above - within)


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.mark.parametrize(
    ("format", "levels"),
    [(Integer(4), np.arange(-7, 8)), (Float("e2m1"), np.unique([-FP4, FP4]))],
    ids=str,
)
def test_lotion_adds_the_slope_of_the_variance(x64, tree, format, levels):
    rules = cage.Rules([(".*kernel", cage.Quantizer(format, Fixed(STEP)))])
    params, gradients, decay = tree(), [tree() for _ in range(4)], 0.9
    tx = baselines.lotion(rules, lambda count: 0.8 + 0.1 * float(count), decay=decay)
    state, fisher, x = tx.init(arrays(params)), 0.0, params["kernel"]
    for t, gradient in enumerate(gradients):
        updates, state = tx.update(arrays(gradient), state, arrays(params))
        g = gradient["kernel"]
        fisher = decay * fisher + (1 - decay) * g**2
        h = 1e-6
        ends = [variance(x + d, levels * STEP) for d in (-h, h)]
        want = g + (0.8 + 0.1 * t) / 2 * fisher * (ends[1] - ends[0]) / (2 * h)
        # A parabola: its central difference is exact but for cancellation.
        chex.assert_trees_all_close(updates["kernel"], want, rtol=1e-8, atol=1e-8)
        chex.assert_trees_all_equal(updates["bias"], gradient["bias"])
        chex.assert_trees_all_close(tree_get(state, "fisher")["kernel"], fisher)
    assert abs(want - g).max() > 1e-2


def test_the_variance_is_that_of_the_paper(x64, rng):
    # s**2 D (1 - D), whose slope by the weight is s (1 - 2 D).
    x, g = rng.uniform(-1.7, 1.7, size=(8, 3)), np.ones((8, 3))
    tx = baselines.lotion(cage.Rules([(".*", CLIPPED)]), decay=0.0)
    updates, _ = tx.update(jnp.asarray(g), tx.init(jnp.asarray(x)), jnp.asarray(x))
    above = x / STEP - np.floor(x / STEP)
    chex.assert_trees_all_close(updates, g + STEP * (1 - 2 * above) / 2, **FLOAT64)


def test_lotion_in_the_basis_of_a_rotation(x64, rng):
    plain, rotated = cage.Rules([(".*", CLIPPED)]), cage.Rules([(".*", ROTATED)])
    x, turn = rng.uniform(-1.7, 1.7, size=(8, 3)), hadamard()
    tx, like = (baselines.lotion(rules, 2.0, decay=0.5) for rules in (rotated, plain))
    state, expected = tx.init(jnp.asarray(x)), like.init(jnp.asarray(x))
    for _ in range(2):
        g = rng.normal(size=(8, 3))
        updates, state = tx.update(jnp.asarray(g), state, jnp.asarray(x))
        turned, expected = like.update(
            jnp.asarray(turn @ g), expected, jnp.asarray(turn @ x)
        )
        chex.assert_trees_all_close(updates, turn.T @ turned, **FLOAT64)
        assert abs(updates - g).max() > 1e-2


def test_lotion_leaves_levels_and_what_lies_beyond_alone():
    tx = baselines.lotion(cage.Rules([(".*", CLIPPED)]), decay=0.0)
    x = jnp.array([[0.25], [-1.75], [1.75], [3.1], [-2.9], [0.0]])
    updates, _ = tx.update(jnp.ones_like(x), tx.init(x), x)
    chex.assert_trees_all_equal(updates, jnp.ones_like(x))


# --- BinaryRelax and PARQ ------------------------------------------------------------


@pytest.mark.parametrize("relaxation", [0.0, 0.3, 1.0])
def test_binary_relax_mixes_weights_and_quantized(x64, tree, relaxation):
    params, g = tree(), tree()["kernel"]
    x = params["kernel"]
    relaxed = baselines.binary_relax(arrays(params), CLIPPED_RULES, relaxation)
    want = (1 - relaxation) * x + relaxation * rounded_and_clipped(x)
    chex.assert_trees_all_close(relaxed["kernel"], want, **FLOAT64)

    def loss(params):
        relaxed = baselines.binary_relax(params, CLIPPED_RULES, relaxation)
        return jnp.sum(relaxed["kernel"] * g)

    # Unmasked, though the quantizer clips: the latent weights get all of it.
    chex.assert_trees_all_equal(jax.grad(loss)(arrays(params))["kernel"], g)


def parq_by_numpy(x, levels, inverse_slope):
    place = np.searchsorted(levels, x)
    below = levels[np.maximum(place - 1, 0)]
    above = levels[np.minimum(place, len(levels) - 1)]
    center = (below + above) / 2
    return np.clip(center + (x - center) / inverse_slope, below, above)


@pytest.mark.parametrize("inverse_slope", [1e-6, 0.4])
@pytest.mark.parametrize(
    ("format", "levels"),
    [(Integer(4), np.arange(-7, 8)), (Float("e2m1"), np.unique([-FP4, FP4]))],
    ids=str,
)
def test_parq_is_a_staircase_with_ramps(x64, tree, format, levels, inverse_slope):
    rules = cage.Rules([(".*kernel", cage.Quantizer(format, Fixed(STEP)))])
    params, g = tree(), tree()["kernel"]

    def ramp(params):
        return baselines.parq(params, rules, inverse_slope)["kernel"]

    want = parq_by_numpy(params["kernel"], levels * STEP, inverse_slope)
    # The quotient by a small slope magnifies rounding.
    chex.assert_trees_all_close(ramp(arrays(params)), want, rtol=1e-9, atol=1e-9)
    gradient = jax.grad(lambda params: jnp.sum(ramp(params) * g))(arrays(params))
    chex.assert_trees_all_equal(gradient["kernel"], g)


@pytest.mark.parametrize("quantizer", [cage.int4(), ROTATED, cage.nf4(group_size=8)])
def test_parq_begins_with_the_weights_and_ends_on_the_grid(rng, quantizer):
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    rules = cage.Rules([(".*", quantizer)])
    chex.assert_trees_all_equal(baselines.parq(x, rules, 1.0), x)
    chex.assert_trees_all_equal(
        baselines.parq(x, rules, 0.0), cage.fake_quant(x, rules)
    )


def test_parq_of_a_rotated_weight_ramps_in_its_basis(x64, rng):
    x = rng.normal(size=(8, 3))
    ramped = baselines.parq(jnp.asarray(x), cage.Rules([(".*", ROTATED)]), 0.4)
    want = parq_by_numpy(hadamard() @ x, np.arange(-7, 8) * STEP, 0.4)
    chex.assert_trees_all_close(ramped, hadamard().T @ want, rtol=1e-9, atol=1e-9)


def test_the_schedule_of_parq_is_a_mirrored_sigmoid(x64):
    schedule = baselines.parq_schedule(50, start=10, steepness=6.0)

    def sigmoid(share):
        return 1 / (1 + np.exp(6 * (share - 0.5)))

    for count in (0, 10, 11, 30, 49, 50, 90):
        share = min(max((count - 10) / 40, 0), 1)
        want = (sigmoid(share) - sigmoid(1)) / (sigmoid(0) - sigmoid(1))
        np.testing.assert_allclose(schedule(count), want, rtol=1e-9, atol=1e-12)
    assert schedule(50) == 0
    assert schedule(10) == 1


# --- EfQAT and ZeroQAT ---------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_rows_of_largest_weights_are_trained(x64, rng, share):
    rules = cage.Rules([("a", cage.int4()), ("b", cage.int4(axis=-1)), (".*", None)])
    shapes = {"a": (8, 3), "b": (4, 6), "bias": (3,)}
    params = {name: -rng.uniform(0.5, 1, size=shape) for name, shape in shapes.items()}
    gradients = [  # what is trained shrinks, and others are the largest
        {name: -rng.uniform(0.1, 0.2, size=shape) for name, shape in shapes.items()}
        for _ in range(7)
    ]
    tx = optax.chain(optax.sgd(1.0), baselines.trained_rows(rules, share, every=3))
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


def test_two_points_give_the_slope_along_a_direction(x64, tree, key):
    params, radius = tree() | {"count": np.arange(3)}, 0.3
    weight = tree()["kernel"]
    seen = []

    def loss(params):
        quantized = cage.fake_quant(params, CLIPPED_RULES)
        seen.append(params)
        return jnp.sum(weight * quantized["kernel"] ** 2) + jnp.sum(params["bias"] ** 3)

    def by_numpy(x):
        kernel = np.sum(weight * rounded_and_clipped(x["kernel"]) ** 2)
        return kernel + np.sum(x["bias"] ** 3)

    value, gradient = baselines.two_point_gradient(
        loss, arrays(params), key, radius=radius
    )
    chex.assert_trees_all_equal(gradient.pop("count"), np.zeros(3, int))
    names = ("kernel", "bias")
    points = [{name: np.asarray(x[name]) for name in names} for x in seen]
    u = {name: (points[0][name] - params[name]) / radius for name in names}
    for name in names:
        middle = (points[0][name] + points[1][name]) / 2
        chex.assert_trees_all_close(middle, params[name], **FLOAT64)
    losses = [by_numpy(point) for point in points]
    slope = (losses[0] - losses[1]) / (2 * radius)
    assert abs(slope) > 0.1
    want = {name: slope * u[name] for name in names}
    chex.assert_trees_all_close(gradient, want, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(value, sum(losses) / 2, rtol=1e-11)


def test_the_mean_of_two_point_gradients_is_the_gradient(key):
    slope = jnp.array([2.0, -1.0, 0.5])

    def gradient(key):
        return baselines.two_point_gradient(lambda x: x @ slope, jnp.ones(3), key)[1]

    mean = jax.vmap(gradient)(jax.random.split(key, 20_000)).mean(0)
    # Deviations of about 3 over the root of their number, and float32 differences.
    np.testing.assert_allclose(mean, slope, atol=0.1)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("quantizer", [CLIPPED, ROTATED], ids=["plain", "rotated"])
def test_fogzo_goes_along_its_draw_and_the_gradient(x64, tree, key, quantizer, beta):
    params, weight = tree(), tree()["kernel"]
    rules, seen = cage.Rules([(r".*kernel", quantizer)]), []
    turn = np.eye(8) if quantizer is CLIPPED else hadamard()

    def loss(params):
        if not isinstance(params["kernel"], jax.core.Tracer):
            seen.append(params)
        quantized = cage.fake_quant(params, rules)
        return jnp.sum(weight * quantized["kernel"]) + jnp.sum(params["bias"] ** 3)

    def by_numpy(x):
        kernel = turn.T @ rounded_and_clipped(turn @ x["kernel"])
        return np.sum(weight * kernel) + np.sum(x["bias"] ** 3)

    value, gradient = baselines.fogzo(loss, arrays(params), rules, key, beta=beta)
    np.testing.assert_allclose(value, by_numpy(params), rtol=1e-11)
    np.testing.assert_allclose(gradient["bias"], 3 * params["bias"] ** 2, rtol=1e-11)
    above, below = ({k: np.asarray(x) for k, x in each.items()} for each in seen)
    chex.assert_trees_all_close((above["bias"], below["bias"]), (params["bias"],) * 2)
    middle = (above["kernel"] + below["kernel"]) / 2
    np.testing.assert_allclose(middle, params["kernel"], rtol=1e-11)
    epsilon = STEP / (2 * np.sqrt(3))
    v = turn @ (above["kernel"] - params["kernel"]) / epsilon
    slope = (by_numpy(above) - by_numpy(below)) / (2 * epsilon)
    want = slope * (turn.T @ v)
    np.testing.assert_allclose(gradient["kernel"], want, rtol=1e-8, atol=1e-9)
    # The gate of the clip is that of the weights, in the basis.
    g = (turn @ weight) * (np.abs(turn @ params["kernel"]) <= 7 * STEP)
    g = g / np.linalg.norm(g)
    seen.clear()
    baselines.fogzo(loss, arrays(params), rules, key, beta=0.0)  # the draw alone
    u = turn @ (np.asarray(seen[0]["kernel"]) - params["kernel"]) / epsilon
    assert np.sqrt(3) / 2 < np.abs(u).max() <= np.sqrt(3)
    along, across = np.sqrt(beta) * g, np.sqrt(1 - beta) * u
    assert min(np.abs(v - across - s * along).max() for s in (-1, 1)) < 1e-9


def test_the_mean_of_fogzo_without_a_guide(key):
    """12 times the integral of d from the distance to the threshold to half a step.

    The mean of that over a cell is 1: rounding, smoothed, is the identity.
    """
    slope = jnp.array([[2.0, -1.0, 0.5]])
    params = {"kernel": jnp.array([[0.1, 0.3, -0.7]])}
    distance = np.array([0.1, 0.3, 0.3])
    expected = 6 * (0.25 - distance**2) * np.asarray(slope)

    def gradient(key):
        def loss(params):
            return jnp.sum(slope * cage.fake_quant(params, CLIPPED_RULES)["kernel"])

        found = baselines.fogzo(loss, params, CLIPPED_RULES, key, beta=0.0, samples=2)
        return found[1]["kernel"]

    mean = jax.vmap(gradient)(jax.random.split(key, 20_000)).mean(0)
    np.testing.assert_allclose(mean, expected, atol=0.1)


# --- what Optax expects of the transformations ---------------------------------------

BUILD = {
    "averaging": lambda rules: baselines.averaging(),
    "dampening": lambda rules: baselines.dampening(rules, 0.3),
    "freezing": lambda rules: baselines.freezing(rules, 0.1, momentum=0.3),
    "interpolation": lambda rules: baselines.interpolation(rules, every=2),
    "lotion": lambda rules: baselines.lotion(rules, 2.0, decay=0.5),
    "trained_rows": lambda rules: baselines.trained_rows(rules, 0.5, every=2),
}
each = pytest.mark.parametrize("name", list(BUILD))
of_rules = pytest.mark.parametrize("name", [n for n in BUILD if n != "averaging"])


def steps(tx, params, gradients, count=5, jit=False):
    state = tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    for _ in range(count):
        updates, state = update(gradients, state, params)
        params = apply(params, updates)
    return params, state


def assert_close(a, b):
    # The same float32 formula compiled in another program: the last bits may differ.
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


@each
def test_extra_arguments_and_params(name, tree):
    tx = BUILD[name](RULES)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params, gradients = arrays(tree(np.float32)), arrays(tree(np.float32))
    state = tx.init(params)
    chex.assert_trees_all_equal(
        tx.update(gradients, state, params, value=1.0),
        tx.update(gradients, state, params),
    )
    with pytest.raises(ValueError, match=r"`params` must be given.*Use tx\.update"):
        tx.update(gradients, state)


@each
def test_jit_and_scan_agree_and_the_state_is_stable(name, tree):
    tx = BUILD[name](RULES)
    params, gradients = arrays(tree(np.float32)), arrays(tree(np.float32))
    gradients = jax.tree.map(lambda g: 0.1 * g, gradients)
    want = steps(tx, params, gradients)
    assert jax.tree.map(jax.typeof, want[1]) == jax.tree.map(
        jax.typeof, tx.init(params)
    )
    assert_close(steps(tx, params, gradients, jit=True), want)

    @jax.jit
    def scanned(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=5)[0]

    assert_close(scanned(params), want)


@each
def test_parameters_and_state_can_be_donated(name, tree):
    tx = BUILD[name](RULES)
    params, gradients = arrays(tree(np.float32)), arrays(tree(np.float32))
    want, _ = steps(tx, params, gradients, count=2)

    def step(params, state):
        updates, state = tx.update(gradients, state, params)
        return apply(params, updates), state

    step, state = jax.jit(step, donate_argnums=(0, 1)), tx.init(params)
    first = params["kernel"]
    for _ in range(2):
        params, state = step(params, state)
    assert first.is_deleted()
    assert_close(params, want)


@pytest.mark.parametrize(
    ("function", "numbers"),
    [
        (baselines.dampening, {"strength": 0.3}),
        (baselines.freezing, {"threshold": 0.1, "momentum": 0.3}),
        (baselines.interpolation, {"share": 0.3, "every": 2}),
        (baselines.lotion, {"strength": 2.0, "decay": 0.5}),
    ],
)
def test_numbers_can_be_injected(function, numbers, tree):
    params, gradients = arrays(tree(np.float32)), arrays(tree(np.float32))
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


@each
def test_updates_keep_their_dtype(name, tree):
    tx = BUILD[name](RULES)
    params, gradients = (
        jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree()) for _ in range(2)
    )
    state = tx.init(params)
    for _ in range(2):
        updates, after = tx.update(gradients, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        state = after


@each
def test_none_leaves_and_masks(name, tree):
    params, gradients = arrays(tree(np.float32)), arrays(tree(np.float32))
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
    gradients = {**gradients, "still": {"kernel": jnp.ones((8, 3))}}
    got, _ = steps(masked, params, gradients, count=1)
    moved = {"kernel": params["kernel"] + 1}
    chex.assert_trees_all_equal(got.pop("still"), moved)


@of_rules
def test_unmatched_parameters_are_untouched(name, tree):
    tx = BUILD[name](RULES)
    params, gradients = arrays(tree(np.float32)), arrays(tree(np.float32))
    updates, _ = tx.update(gradients, tx.init(params), params)
    assert updates["bias"] is gradients["bias"]
    with pytest.warns(UserWarning, match="no parameter is quantized"):
        tx.init({"weights": jnp.ones((8, 3))})


@each
def test_learned_grids_are_found_beside_the_parameters(name, tree):
    rules = cage.Rules([(r".*kernel", cage.lsq(3))])
    tx = BUILD[name](rules)
    params = arrays(tree(np.float32))
    variables = cage.with_grids(params, rules)
    zeros = jax.tree.map(jnp.zeros_like, variables)
    updates, _ = steps(tx, variables, zeros, count=2)
    chex.assert_trees_all_equal(updates["grids"], variables["grids"])
    if name in ("averaging", "trained_rows"):  # which quantize nothing
        return
    with pytest.raises(ValueError, match="kernel`: `grid` must be given for a learned"):
        tx.update(params, tx.init(params), params)


# --- what takes the place of fake_quant ----------------------------------------------

FORWARD = {
    "ewgs": lambda x, rules: baselines.ewgs(x, rules, 0.5),
    "noisy_fake_quant": lambda x, rules: baselines.noisy_fake_quant(
        x, rules, jax.random.key(0)
    ),
    "binary_relax": lambda x, rules: baselines.binary_relax(x, rules, 0.5),
    "parq": lambda x, rules: baselines.parq(x, rules, 0.5),
}
forward = pytest.mark.parametrize("name", list(FORWARD))


@forward
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_keeps_dtypes_and_what_is_unmatched(name, dtype, tree):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), tree()) | {"gone": None}

    def apply(params):
        return FORWARD[name](params, RULES)

    values = apply(params)
    assert values["bias"] is params["bias"]
    assert values["gone"] is None
    chex.assert_trees_all_equal_shapes_and_dtypes(values, params)
    assert_close(jax.jit(apply)(params)["kernel"], values["kernel"])
    gradient = jax.grad(lambda x: jnp.sum(apply(x)["kernel"]))(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)


@forward
def test_forward_takes_grids(name, tree):
    rules = cage.Rules([(r".*kernel", cage.lsq(3))])
    params = arrays(tree(np.float32))
    variables = cage.with_grids(params, rules)
    values = FORWARD[name](variables, rules)
    chex.assert_trees_all_equal(values["grids"], variables["grids"])
    with pytest.raises(ValueError, match="`kernel`: `grid` must be given for a learn"):
        FORWARD[name](params, rules)


# --- bad input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda rules: baselines.dampening(rules, 1.0),
        lambda rules: baselines.freezing(rules, 0.1),
        lambda rules: baselines.interpolation(rules),
        lambda rules: baselines.lotion(rules),
        lambda rules: baselines.trained_rows(rules, 0.5, every=1),
        *(
            lambda rules, f=f: f({"kernel": jnp.ones((8, 3))}, rules)
            for f in FORWARD.values()
        ),
    ],
)
def test_something_else_than_rules(call):
    with pytest.raises(TypeError, match=r"`rules` must be Rules; got list.*Rules\(\["):
        call([(".*", cage.int4())])


PARAMS = {"kernel": np.ones((8, 3), np.float32)}
BAD = {
    "strength": lambda v: baselines.dampening(RULES, v),
    "threshold": lambda v: baselines.freezing(RULES, v),
    "momentum": lambda v: baselines.freezing(RULES, 0.1, momentum=v),
    "share": lambda v: (
        baselines.interpolation(RULES, v)
        if isinstance(v, str)
        else baselines.trained_rows(RULES, v, every=1)
    ),
    "every": lambda v: baselines.interpolation(RULES, every=v),
    "radius": lambda v: baselines.two_point_gradient(
        jnp.sum, PARAMS, jax.random.key(0), radius=v
    ),
    "beta": lambda v: baselines.fogzo(
        lambda x: jnp.sum(x["kernel"]), PARAMS, RULES, jax.random.key(0), beta=v
    ),
    "decay": lambda v: baselines.averaging(v),
    "start": lambda v: baselines.averaging(start=v),
    "delta": lambda v: baselines.ewgs(PARAMS, RULES, v),
    "deviation": lambda v: baselines.noisy_fake_quant(
        PARAMS, RULES, jax.random.key(0), deviation=v
    ),
    "relaxation": lambda v: baselines.binary_relax(PARAMS, RULES, v),
    "inverse_slope": lambda v: baselines.parq(PARAMS, RULES, v),
    "total_steps": lambda v: baselines.cosine_ramp(v),
    "peak": lambda v: baselines.cosine_ramp(10, v),
    "steepness": lambda v: baselines.parq_schedule(10, steepness=v),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_numbers(name):
    for value, kind in ((-1, ValueError), ("1", TypeError), (True, TypeError)):
        with pytest.raises(kind, match=rf"^`{name}` must be .*got {value!r}\. [A-Z]"):
            BAD[name](value)


def test_bounds():
    for name in ("momentum", "share", "decay", "relaxation", "inverse_slope"):
        with pytest.raises(ValueError, match=rf"`{name}` must be .* \[0, 1\]; got 2"):
            BAD[name](2)
    for name in ("decay", "share"):  # which decide what is traced
        with pytest.raises(TypeError, match=f"`{name}` must be a number; got Array"):
            BAD[name](jnp.float32(0.5))
    for name in ("steepness", "radius"):
        with pytest.raises(ValueError, match=f"`{name}` must be positive; got 0"):
            BAD[name](0)
    with pytest.raises(ValueError, match="`total_steps` must be at least 11; got 10"):
        baselines.parq_schedule(10, start=10)
    with pytest.raises(ValueError, match=r"^`kernel`: `delta` must have an entry"):
        baselines.ewgs(PARAMS, RULES, {"other": 1.0})


def test_a_rotation_is_refused_where_codes_are_counted():
    tx = BUILD["freezing"](cage.Rules([(".*", ROTATED)]))
    with pytest.raises(ValueError, match=r"^`kernel`: .*`freezing`.*hadamard=None"):
        tx.init(PARAMS)


@pytest.mark.parametrize("name", baselines.__all__)
def test_every_name_has_an_example_and_a_source(name):
    documentation = inspect.getdoc(getattr(baselines, name))
    assert "Example:\n  >>> " in documentation
    assert "Source: " in documentation or name == "averaged"
