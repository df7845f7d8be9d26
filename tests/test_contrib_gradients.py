"""The rivals that change the forward pass or its gradient, against NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contrib_cases import (
    CLIPPED,
    CLIPPED_RULES,
    FLOAT64,
    FP4,
    ROTATED,
    RULES,
    STEP,
    arrays,
    drawn,
    rounded,
    rounded_and_clipped,
)
from oracles import absmax_scale, hadamard

import cage_jax as cage
from cage_jax import contrib
from cage_jax.quantizers.formats import Float, Integer
from cage_jax.quantizers.scales import Fixed

TURN = hadamard(8)


@pytest.fixture
def tree(rng):
    """Draws parameters or gradients, in NumPy."""
    return functools.partial(drawn, rng)


# --- EWGS ----------------------------------------------------------------------------


def test_ewgs_scales_the_gradient_by_the_distance(x64, tree):
    params, g, delta = tree(), tree()["kernel"], 0.7
    x = params["kernel"]

    @jax.jit
    @jax.grad
    def gradient_of(params):
        return jnp.sum(contrib.ewgs(params, CLIPPED_RULES, delta)["kernel"] * g)

    # Laid on [0, 1], as in the paper.
    low, width = -7 * STEP, 14 * STEP
    unit = np.clip((x - low) / width, 0, 1)
    unit_rounded = np.round(14 * unit) / 14
    inside = np.abs(x) <= 7 * STEP
    assert 0 < inside.mean() < 1
    want = inside * g * (1 + delta * np.sign(g) * (unit - unit_rounded))
    gradient = gradient_of(arrays(params))
    chex.assert_trees_all_close(gradient["kernel"], want, **FLOAT64)
    chex.assert_trees_all_equal(gradient["bias"], np.zeros(3))


def test_ewgs_of_a_rotated_weight_scales_in_its_basis(x64, rng):
    x, g = 1.5 * rng.normal(size=(8, 3)), rng.normal(size=(8, 3))
    rules = cage.Rules([(".*", ROTATED)])

    @jax.jit
    @jax.grad
    def gradient_of(x):
        return jnp.sum(contrib.ewgs(x, rules, 0.7) * g)

    turned, turned_g = TURN @ x, TURN @ g
    inside = np.abs(turned) <= 7 * STEP
    distance = (turned - rounded_and_clipped(turned)) / (14 * STEP)
    want = inside * turned_g * (1 + 0.7 * np.sign(turned_g) * distance)
    gradient = gradient_of(jnp.asarray(x))
    chex.assert_trees_all_close(gradient, TURN.T @ want, **FLOAT64)


def test_ewgs_without_delta_is_fake_quant(tree):
    rules = cage.Rules([(".*kernel", cage.lsq(3))])
    variables = cage.with_grids(arrays(tree(np.float32)), rules)

    def loss(quantize):
        return lambda x: jnp.sum(jnp.sin(quantize(x)["params"]["kernel"]))

    def with_delta(delta):
        return loss(lambda x: contrib.ewgs(x, rules, delta))

    @jax.jit
    def every(variables):
        plain = jax.value_and_grad(loss(lambda x: cage.fake_quant(x, rules)))
        same = jax.value_and_grad(with_delta({"kernel": 0.0}))
        return plain(variables), same(variables), jax.grad(with_delta(0.9))(variables)

    want, got, gradient = every(variables)
    chex.assert_trees_all_equal(got, want)
    # With it the learned grid gets the same gradient, the weights another.
    chex.assert_trees_all_equal(gradient["grids"], want[1]["grids"])
    other, same = gradient["params"], want[1]["params"]
    assert abs(np.asarray(other["kernel"]) - same["kernel"]).max() > 1e-3


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

    deltas = jax.jit(lambda x: contrib.ewgs_delta(loss, x, RULES, key))(arrays(params))
    want = {}
    for name, value in x.items():
        # A diagonal Hessian makes Hutchinson's estimate exact.
        width = 14 * absmax_scale(value, group=4)
        gradient = width * curvature[name] * rounded(value)
        mean = np.mean(width**2 * curvature[name])
        want[f"{name}/kernel"] = max(mean, 0) / (3 * gradient.std() or 1)
    assert want["a/kernel"] > 0.1
    assert want["b/kernel"] == want["d/kernel"] == 0
    chex.assert_trees_all_close(deltas, want, **FLOAT64)
    jax.eval_shape(lambda x: contrib.ewgs(x, RULES, deltas), arrays(params))


def test_delta_of_rotated_weights_is_that_of_their_basis(x64, rng):
    x, root = rng.normal(size=(8, 1)), rng.normal(size=(8, 8))
    hessian = root @ root.T
    rules = cage.Rules([(".*", ROTATED)])

    def loss(x):
        return jnp.sum(x * (hessian @ x)) / 2

    turned = TURN @ hessian @ TURN.T
    gradient = turned @ rounded_and_clipped(TURN @ x)
    width = 14 * STEP
    want = width * np.trace(turned) / 8 / (3 * gradient.std())

    @jax.jit
    def deltas(key):
        keys = jax.random.split(key, 2000)
        found = lambda key: contrib.ewgs_delta(loss, x, rules, key)[""]  # noqa: E731
        return jax.vmap(found)(keys)

    # The mean of 2000 estimates; no single one is below 0 here.
    mean = np.mean(deltas(jax.random.key(0)))
    np.testing.assert_allclose(mean, want, rtol=0.05)


# --- WinQ ----------------------------------------------------------------------------


def test_noise_is_normal_and_rounded(key):
    # A fine grid of which 5 deviations are within, around 0.
    quantizer = cage.int8(scale=Fixed(0.04))
    rules = cage.Rules([(r".*kernel", quantizer)])
    params = {
        "a": {"kernel": np.zeros((64, 64), np.float32)},
        "b": {
            "kernel": np.zeros((64, 64), np.float32),
            "bias": np.zeros(3, np.float32),
        },
    }

    @jax.jit
    def noised(key):
        return contrib.noisy_fake_quant(arrays(params), rules, key, deviation=1.0)

    noisy = noised(key)
    np.testing.assert_array_equal(noisy["b"]["bias"], 0)
    a, b = (np.asarray(noisy[name]["kernel"]) for name in "ab")
    for noise in (a, b):
        np.testing.assert_allclose(noise / 0.04, np.round(noise / 0.04), atol=1e-4)
        # Means over 4096 numbers, within 4 deviations.
        assert abs(noise.mean()) < 0.07
        assert abs(noise.std() - 1) < 0.05
        assert abs((np.abs(noise) < 1).mean() - 0.6827) < 0.03
    assert abs((a * b).mean()) < 0.07
    chex.assert_trees_all_equal(noised(key), noisy)
    assert (np.asarray(noised(jax.random.key(1))["a"]["kernel"]) != a).any()


def test_the_gradient_is_that_at_the_noisy_weights(x64, key, tree):
    params, g = tree(), tree()["kernel"]
    fine = cage.Rules([(".*kernel", cage.int8(scale=Fixed(0.05)))])

    @jax.jit
    def found(params):
        def loss(params):
            coarse = contrib.noisy_fake_quant(params, CLIPPED_RULES, key, deviation=1.0)
            return jnp.sum(coarse["kernel"] * g)

        noisy = contrib.noisy_fake_quant(params, fine, key, deviation=1.0)
        return noisy["kernel"], jax.grad(loss)(params)["kernel"]

    noisy, gradient = map(np.asarray, found(arrays(params)))
    passes = gradient != 0
    # Near the end of the grid the fine one does not tell.
    clear = np.abs(np.abs(noisy) - 7 * STEP) > 0.05
    assert (passes == (np.abs(noisy) <= 7 * STEP))[clear].all()
    assert (passes != (np.abs(params["kernel"]) <= 7 * STEP)).any()
    np.testing.assert_array_equal(gradient[passes], g[passes])


# --- BinaryRelax and PARQ ------------------------------------------------------------


def value_and_gradient(quantize, params, g):
    """A function of a number: the kernel, and its gradient where `g` comes in."""

    @jax.jit
    def found(number):
        def loss(params):
            kernel = quantize(params, number)["kernel"]
            return jnp.sum(kernel * g), kernel

        gradient, kernel = jax.grad(loss, has_aux=True)(arrays(params))
        return kernel, gradient["kernel"]

    return found


def test_binary_relax_mixes_weights_and_quantized(x64, tree):
    params, g = tree(), tree()["kernel"]
    x = params["kernel"]
    relax = value_and_gradient(
        lambda params, number: contrib.binary_relax(params, CLIPPED_RULES, number),
        params,
        g,
    )
    for relaxation in (0.0, 0.3, 1.0):
        kernel, gradient = relax(relaxation)
        want = (1 - relaxation) * x + relaxation * rounded_and_clipped(x)
        chex.assert_trees_all_close(kernel, want, **FLOAT64)
        # Unmasked, though the quantizer clips: the latent weights get all of it.
        chex.assert_trees_all_equal(gradient, g)


def parq_by_numpy(x, levels, inverse_slope):
    place = np.searchsorted(levels, x)
    below = levels[np.maximum(place - 1, 0)]
    above = levels[np.minimum(place, len(levels) - 1)]
    center = (below + above) / 2
    return np.clip(center + (x - center) / inverse_slope, below, above)


@pytest.mark.parametrize(
    ("format", "levels"),
    [(Integer(4), np.arange(-7, 8)), (Float("e2m1"), np.unique([-FP4, FP4]))],
    ids=str,
)
def test_parq_is_a_staircase_with_ramps(x64, tree, format, levels):
    rules = cage.Rules([(".*kernel", cage.Quantizer(format, Fixed(STEP)))])
    params, g = tree(), tree()["kernel"]
    ramp = value_and_gradient(
        lambda params, number: contrib.parq(params, rules, number), params, g
    )
    for inverse_slope in (1e-6, 0.4):
        kernel, gradient = ramp(inverse_slope)
        want = parq_by_numpy(params["kernel"], levels * STEP, inverse_slope)
        # The quotient by a small slope magnifies rounding.
        chex.assert_trees_all_close(kernel, want, rtol=1e-9, atol=1e-9)
        chex.assert_trees_all_equal(gradient, g)


@pytest.mark.parametrize("quantizer", [cage.int4(), ROTATED, cage.nf4(group_size=8)])
def test_parq_begins_with_the_weights_and_ends_on_the_grid(rng, quantizer):
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    rules = cage.Rules([(".*", quantizer)])

    @jax.jit
    def ends(x):
        first, last = (contrib.parq(x, rules, slope) for slope in (1.0, 0.0))
        return first, last, cage.fake_quant(x, rules)

    first, last, quantized = ends(x)
    chex.assert_trees_all_equal(first, x)
    chex.assert_trees_all_equal(last, quantized)


def test_parq_of_a_rotated_weight_ramps_in_its_basis(x64, rng):
    x, rules = rng.normal(size=(8, 3)), cage.Rules([(".*", ROTATED)])
    ramped = jax.jit(lambda x: contrib.parq(x, rules, 0.4))(jnp.asarray(x))
    want = parq_by_numpy(TURN @ x, np.arange(-7, 8) * STEP, 0.4)
    chex.assert_trees_all_close(ramped, TURN.T @ want, rtol=1e-9, atol=1e-9)


def test_the_schedule_of_parq_is_a_mirrored_sigmoid(x64):
    schedule = jax.jit(contrib.parq_schedule(50, start=10, steepness=6.0))

    def sigmoid(share):
        return 1 / (1 + np.exp(6 * (share - 0.5)))

    for count in (0, 10, 11, 30, 49, 50, 90):
        share = min(max((count - 10) / 40, 0), 1)
        want = (sigmoid(share) - sigmoid(1)) / (sigmoid(0) - sigmoid(1))
        np.testing.assert_allclose(schedule(count), want, rtol=1e-9, atol=1e-12)
    assert schedule(50) == 0
    assert schedule(10) == 1


# --- ZeroQAT and FOGZO ---------------------------------------------------------------


def test_two_points_give_the_slope_along_a_direction(x64, tree, key):
    params, radius = tree() | {"count": np.arange(3)}, 0.3
    weight = tree()["kernel"]

    @jax.jit
    def found(params):
        seen = []

        def loss(params):
            seen.append(params)
            kernel = cage.fake_quant(params, CLIPPED_RULES)["kernel"]
            return jnp.sum(weight * kernel**2) + jnp.sum(params["bias"] ** 3)

        return *contrib.two_point_gradient(loss, params, key, radius=radius), seen

    def by_numpy(x):
        kernel = np.sum(weight * rounded_and_clipped(x["kernel"]) ** 2)
        return kernel + np.sum(x["bias"] ** 3)

    value, gradient, seen = found(arrays(params))
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
    slope = np.float32([2.0, -1.0, 0.5])

    def gradient(key):
        return contrib.two_point_gradient(lambda x: x @ slope, jnp.ones(3), key)[1]

    @jax.jit
    def mean(key):
        return jax.vmap(gradient)(jax.random.split(key, 20_000)).mean(0)

    # Deviations of about 3 over the root of their number, and float32 differences.
    np.testing.assert_allclose(mean(key), slope, atol=0.1)


@pytest.mark.parametrize("quantizer", [CLIPPED, ROTATED], ids=["plain", "rotated"])
def test_fogzo_goes_along_its_draw_and_the_gradient(x64, tree, key, quantizer):
    params, weight = tree(), tree()["kernel"]
    rules = cage.Rules([(r".*kernel", quantizer)])
    turn = np.eye(8) if quantizer is CLIPPED else TURN

    @jax.jit
    def found(params, doubt):
        seen = []

        def loss(params):
            seen.append(params)
            quantized = cage.fake_quant(params, rules)
            return jnp.sum(weight * quantized["kernel"]) + jnp.sum(params["bias"] ** 3)

        value, gradient = contrib.fogzo(loss, params, rules, key, doubt=doubt)
        return value, gradient, seen[1:]  # the first is that of the gradient

    def by_numpy(x):
        kernel = turn.T @ rounded_and_clipped(turn @ x["kernel"])
        return np.sum(weight * kernel) + np.sum(x["bias"] ** 3)

    epsilon = STEP / (2 * np.sqrt(3))
    # The gate of the clip is that of the weights, in the basis.
    g = (turn @ weight) * (np.abs(turn @ params["kernel"]) <= 7 * STEP)
    g = g / np.linalg.norm(g)
    for doubt in (1.0, 0.5, 1e-9, 0.0):
        value, gradient, seen = found(arrays(params), doubt)
        np.testing.assert_allclose(value, by_numpy(params), rtol=1e-11)
        bias = 3 * params["bias"] ** 2
        np.testing.assert_allclose(gradient["bias"], bias, rtol=1e-11)
        above, below = ({k: np.asarray(x) for k, x in each.items()} for each in seen)
        biases = above["bias"], below["bias"]
        chex.assert_trees_all_close(biases, (params["bias"],) * 2)
        middle = (above["kernel"] + below["kernel"]) / 2
        np.testing.assert_allclose(middle, params["kernel"], rtol=1e-11)
        v = turn @ (above["kernel"] - params["kernel"]) / epsilon
        slope = (by_numpy(above) - by_numpy(below)) / (2 * epsilon)
        want = slope * (turn.T @ v)
        np.testing.assert_allclose(gradient["kernel"], want, rtol=1e-8, atol=1e-9)
        if doubt == 1.0:  # the draw alone
            u = v
            assert np.sqrt(3) / 2 < np.abs(u).max() <= np.sqrt(3)
        along, across = np.sqrt(1 - doubt) * g, np.sqrt(doubt) * u
        assert min(np.abs(v - across - s * along).max() for s in (-1, 1)) < 1e-9


def test_the_mean_of_fogzo_without_a_guide(key):
    """12 times the integral of d from the distance to the threshold to half a step.

    The mean of that over a cell is 1: rounding, smoothed, is the identity.
    """
    slope = np.float32([[2.0, -1.0, 0.5]])
    params = {"kernel": jnp.asarray(np.float32([[0.1, 0.3, -0.7]]))}
    distance = np.array([0.1, 0.3, 0.3])
    expected = 6 * (0.25 - distance**2) * slope

    def gradient(key):
        def loss(params):
            return jnp.sum(slope * cage.fake_quant(params, CLIPPED_RULES)["kernel"])

        found = contrib.fogzo(loss, params, CLIPPED_RULES, key, doubt=1.0, samples=2)
        return found[1]["kernel"]

    @jax.jit
    def mean(key):
        return jax.vmap(gradient)(jax.random.split(key, 20_000)).mean(0)

    np.testing.assert_allclose(mean(key), expected, atol=0.1)


def test_the_doubt_of_fogzo_rises_linearly():
    doubt = jax.jit(contrib.fogzo_doubt(50, 1e-9, start=10))
    for count in (0, 10, 11, 30, 50, 90):
        want = 1e-9 * min(max((count - 10) / 40, 0), 1)
        np.testing.assert_allclose(doubt(count), want, rtol=1e-5)  # float32


def test_fogzo_explores_at_a_doubt_below_the_resolution_of_1(key):
    params, seen = {"kernel": jnp.float32([[0.1, 0.3, -0.7]])}, []

    def loss(params):
        seen.append(params["kernel"])
        return cage.fake_quant(params, CLIPPED_RULES)["kernel"][0, 0]

    contrib.fogzo(loss, params, CLIPPED_RULES, key, doubt=1e-9)
    # The gradient of the others is 0, so the draw alone moves them.
    assert (seen[1] != params["kernel"]).all() and (seen[2] != params["kernel"]).all()
