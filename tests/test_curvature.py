"""Sources of curvature: their formulas, and what the correction makes of them.

Steps are compiled here; the examples in cage_jax.curvature run eagerly.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.tree_utils import tree_get
from oracles import absmax_round, hadamard

import cage_jax as cage
from cage_jax import curvature, weightings

RULES = cage.Rules([(r"w", cage.int4())])
# Sums in another order.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def narrow(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.fixture
def problem(rng):
    """A quadratic of one matrix: H of its columns, the optimum, weights, the loss."""
    factor = rng.normal(size=(8, 8))
    h = factor @ factor.T / 8 + np.eye(8)
    optimum, x = rng.normal(size=(2, 8, 3))
    target = jnp.asarray(optimum, jnp.float32)
    matrix = jnp.asarray(h, jnp.float32)

    def loss(params):
        away = cage.fake_quant(params, RULES)["w"] - target
        return 0.5 * jnp.sum(away * (matrix @ away)) + jnp.sum(params["bias"] ** 2)

    params = {"w": narrow(x), "bias": narrow(np.ones(3))}
    return h, optimum, params, loss


def coupled(source, strength=1.0, **options):
    """Makes updates that are the pull alone: the learning rate is -1."""
    return optax.chain(
        cage.coupled(RULES, strength=strength, curvature=source, **options),
        optax.sgd(-1.0),
    )


def stepped(tx, params, loss, steps=1, **extra):
    """The gradient, the last updates and the state, in one program."""

    @jax.jit
    def run(params):
        state, gradient = tx.init(params), jax.grad(loss)(params)
        for _ in range(steps):
            updates, state = tx.update(gradient, state, params, obj_fn=loss, **extra)
        return gradient, updates, state

    return run(params)


def updated(tx, params, gradients=None):
    """The updates and the state after the steps of these gradients, or one of zeros."""
    zeros = jax.tree.map(np.zeros_like, params)
    update, state = jax.jit(tx.update), tx.init(params)
    for gradient in [{}] if gradients is None else gradients:
        updates, state = update(narrow(zeros | gradient), state, params)
    return updates, state


def test_with_the_hessian_the_gradient_is_that_of_full_precision(problem):
    h, optimum, params, loss = problem
    _, updates, _ = stepped(coupled(curvature.hessian()), params, loss)
    x = np.asarray(params["w"], np.float64)
    np.testing.assert_allclose(updates["w"], h @ (x - optimum), **CLOSE)
    np.testing.assert_array_equal(updates["bias"], 2 * np.ones(3))


def test_a_diagonal_hessian_is_found_by_one_probe(problem):
    _, optimum, params, _ = problem
    d = np.linspace(0.5, 4, 24).reshape(8, 3)

    def loss(params):
        away = cage.fake_quant(params, RULES)["w"] - jnp.asarray(optimum, jnp.float32)
        return 0.5 * jnp.sum(jnp.asarray(d, jnp.float32) * away**2)

    _, updates, state = stepped(coupled(curvature.hutchinson()), params, loss)
    found = np.asarray(tree_get(state, "diagonal")["w"]) / (1 - 0.99)
    np.testing.assert_allclose(found, d, rtol=1e-5)
    assert tree_get(state, "clamped") is None
    x = np.asarray(params["w"], np.float64)
    np.testing.assert_allclose(updates["w"], d * (x - optimum), **CLOSE)


def test_probes_of_a_full_hessian_average_to_its_diagonal(problem):
    h, _, params, loss = problem
    tx = coupled(curvature.hutchinson(decay=0.999))
    steps = 2000

    @jax.jit
    def run(params):
        gradient = jax.grad(loss)(params)

        def step(state, _):
            _, state = tx.update(gradient, state, params, obj_fn=loss)
            return state, None

        return jax.lax.scan(step, tx.init(params), length=steps)[0]

    found = np.asarray(tree_get(run(params), "diagonal")["w"]) / (1 - 0.999**steps)
    # A probe's variance is the sum of squares off the diagonal; the average is of about
    # 760 of them.
    spread = np.sqrt(((h - np.diag(np.diag(h))) ** 2).sum(1) / 760)
    assert np.all(np.abs(found - np.diag(h)[:, None]) < 5 * spread[:, None])


def test_a_rotated_parameter_has_its_diagonal_in_the_rotated_basis(rng):
    rules = cage.Rules([(r"w", cage.quest(4, hadamard=32, gradient="identity"))])
    rotation = hadamard(32)
    d = np.linspace(1, 3, 32)
    h = jnp.asarray(rotation.T @ np.diag(d) @ rotation, jnp.float32)

    def loss(params):
        w = cage.fake_quant(params, rules)["w"]
        return 0.5 * jnp.sum(w * jnp.matmul(h, w, precision="highest"))

    params = {"w": jnp.asarray(rng.normal(size=(32, 2)), jnp.float32)}
    tx = optax.chain(
        cage.coupled(rules, strength=1.0, curvature=curvature.hutchinson()),
        optax.sgd(-1.0),
    )
    _, updates, state = stepped(tx, params, loss)
    found = np.asarray(tree_get(state, "diagonal")["w"]) / (1 - 0.99)
    np.testing.assert_allclose(found, np.tile(d[:, None], 2), rtol=1e-4)
    # And H e is what is added: the gradient is that of full precision.
    x = np.asarray(params["w"], np.float64)
    expected = rotation.T @ np.diag(d) @ rotation @ x
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-4, atol=1e-5)


def test_fisher_averages_squares(problem, rng):
    _, _, params, _ = problem
    gradients = rng.normal(size=(3, 8, 3))
    tx = coupled(curvature.fisher(examples=16, decay=0.9), strength=0.5)
    updates, _ = updated(tx, params, [{"w": g} for g in gradients])
    mean = 0
    for g in gradients:
        mean = 0.9 * mean + 0.1 * 16 * g**2
    x = np.asarray(params["w"], np.float64)
    h = mean / (1 - 0.9**3)
    expected = gradients[-1] + 0.5 * h * (x - absmax_round(x))
    np.testing.assert_allclose(updates["w"], expected, **CLOSE)


def test_sampled_gradients_are_those_that_are_squared(problem, rng):
    _, _, params, loss = problem
    sampled = rng.normal(size=(8, 3))
    tx = coupled(curvature.fisher(sampled=True))
    tree = narrow({"w": sampled, "bias": np.zeros(3)})
    _, _, state = stepped(tx, params, loss, sampled_gradients=tree)
    found = np.asarray(tree_get(state, "diagonal")["w"]) / (1 - 0.99)
    np.testing.assert_allclose(found, sampled**2, rtol=1e-5)


def test_relative_weights_have_the_mean_one(problem):
    _, _, params, loss = problem
    tx = coupled(curvature.fisher(relative=True), strength=3.0)
    gradient, updates, _ = stepped(tx, params, loss)
    g = np.asarray(gradient["w"], np.float64)
    x = np.asarray(params["w"], np.float64)
    h = g**2 / (g**2).mean()
    np.testing.assert_allclose(updates["w"], g + 3 * h * (x - absmax_round(x)), **CLOSE)


def test_gauss_newton_is_that_of_the_outputs(problem, rng):
    _, _, params, _ = problem
    inputs = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)

    # Each output has a weight of its own, so that the matrix is a diagonal.
    def outputs(params):
        return jnp.sin(3 * cage.fake_quant(params, RULES)["w"] * inputs)

    def of_outputs(found):
        return jnp.sum(jnp.cosh(found))

    def loss(params):
        return of_outputs(outputs(params))

    extra = {"outputs_fn": outputs, "outputs_loss_fn": of_outputs}
    _, _, state = stepped(coupled(curvature.gauss_newton()), params, loss, **extra)
    a, w = (
        np.asarray(inputs, np.float64),
        absmax_round(np.asarray(params["w"], np.float64)),
    )
    expected = (3 * a * np.cos(3 * w * a)) ** 2 * np.cosh(np.sin(3 * w * a))
    found = np.asarray(tree_get(state, "diagonal")["w"]) / (1 - 0.99)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_kronecker_multiplies_from_both_sides(problem, rng):
    _, _, params, _ = problem
    gradients = rng.normal(size=(3, 8, 3))
    tx = coupled(curvature.kronecker(examples=4, decay=0.9))
    updates, _ = updated(tx, params, [{"w": g} for g in gradients])
    left, right = 0, 0
    for g in gradients:
        left, right = 0.9 * left + 0.1 * g @ g.T, 0.9 * right + 0.1 * g.T @ g
    x = np.asarray(params["w"], np.float64)
    pull = 4 * left @ (x - absmax_round(x)) @ right / np.trace(left) / (1 - 0.9**3)
    np.testing.assert_allclose(updates["w"], gradients[-1] + pull, **CLOSE)


@pytest.mark.usefixtures("standard_promotion")
def test_the_second_moment_is_that_of_the_optimizer(problem):
    _, _, params, loss = problem
    plain = optax.with_extra_args_support(optax.adamw(0.1, b2=0.95))
    gradient, expected, _ = stepped(plain, params, loss, steps=2)
    g = np.asarray(gradient["w"], np.float64)
    x = np.asarray(params["w"], np.float64)
    for relative in (False, True):
        source = curvature.second_moment(b2=0.95, relative=relative)
        tx = cage.cage_adamw(0.1, RULES, strength=2.0, b2=0.95, curvature=source)
        _, updates, state = stepped(tx, params, loss, steps=2)
        h = np.abs(g) / (np.abs(g).mean() if relative else 1)
        pull = -0.1 * 2 * h * (x - absmax_round(x))
        found = np.asarray(updates["w"]) - expected["w"]
        np.testing.assert_allclose(found, pull, **CLOSE)
        assert not jax.tree.leaves(state[1].curvature)


def test_a_function_of_the_user(problem):
    _, _, params, loss = problem

    def signs(errors, step):
        assert set(step.gradients) == {"w"}
        return {path: jnp.sign(e) for path, e in errors.items()}

    gradient, updates, _ = stepped(
        coupled(curvature.stateless_source(signs)), params, loss
    )
    g, x = (np.asarray(tree["w"], np.float64) for tree in (gradient, params))
    np.testing.assert_allclose(updates["w"], g + np.sign(x - absmax_round(x)), **CLOSE)


def test_estimates_begin_and_come_when_they_should(problem):
    _, _, params, loss = problem
    tx = coupled(curvature.hutchinson(start=2, period=3))
    gradient, expected, _ = stepped(coupled(None), params, loss)
    update, state, counts = (
        jax.jit(partial(tx.update, obj_fn=loss)),
        tx.init(params),
        [],
    )
    for _ in range(7):
        updates, state = update(gradient, state, params)
        counts.append(int(tree_get(state, "estimates")))
        if counts[-1] == 0:  # as without a source
            np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)
    assert counts == [0, 0, 1, 1, 1, 2, 2]


def test_what_is_negative_or_too_large_is_clamped_and_counted(problem):
    _, _, params, _ = problem
    d = np.ones((8, 3))
    d[0, 0], d[1, 1] = -5, 1000

    def estimate(step, key):
        return {"w": jnp.asarray(d, jnp.float32)}

    source = curvature.diagonal(estimate, largest=10, statistics=True)
    updates, state = updated(coupled(source), params)
    assert tree_get(state, "clamped") == pytest.approx(2 / 24)
    positive = np.maximum(d, 0)
    x = np.asarray(params["w"], np.float64)
    expected = np.minimum(positive, 10 * positive.mean()) * (x - absmax_round(x))
    np.testing.assert_allclose(updates["w"], expected, **CLOSE)


def test_relative_weights_share_one_dose(problem, rng):
    """The mean is that of all parameters, and so is what is too large."""
    _, _, params, _ = problem
    rules = cage.Rules([(r"w|v", cage.int4())])
    weights = {"w": params["w"], "v": narrow(rng.normal(size=(5, 2)))}
    d = {"w": np.ones((8, 3)), "v": np.full((5, 2), 8.0)}
    d["w"][0, 0], d["v"][1, 1] = -5, 1000

    def estimate(step, key):
        return {path: jnp.asarray(h, jnp.float32) for path, h in d.items()}

    options = {"largest": 2, "statistics": True}
    source = curvature.diagonal(estimate, relative=True, **options)
    tx = optax.chain(
        cage.coupled(rules, strength=1.0, curvature=source), optax.sgd(-1.0)
    )
    updates, state = updated(tx, weights)
    # Of 34 entries 23 are 1, which the others are larger than however often the mean
    # is taken anew: it falls to a third with each, until no entry is above twice it.
    h = np.concatenate([np.maximum(part, 0).ravel() for part in d.values()])
    for _ in range(4):
        h = np.minimum(h, 2 * h.mean())
    expected = np.minimum(h / h.mean(), 2)
    assert expected.max() == 2 and expected.mean() > 0.9
    assert tree_get(state, "clamped") == pytest.approx(11 / 34)
    parts = np.split(expected, [24])
    for (path, x), part in zip(weights.items(), parts):
        x = np.asarray(x, np.float64)
        np.testing.assert_allclose(
            updates[path],
            part.reshape(x.shape) * (x - absmax_round(x)),
            **CLOSE,
            err_msg=path,
        )


def test_a_few_with_nearly_all_the_curvature_are_not_pulled_beyond_the_grid():
    """A model whose gradients lie in few weights, as those of a pretrained one do."""
    x, h = np.full((1000, 1), 0.3, np.float32), np.full((1000, 1), 1e-6, np.float32)
    x[0], h[:5] = 7, 1
    source = curvature.diagonal(
        lambda step, key: {"w": jnp.asarray(h)}, relative=True, largest=3.0
    )
    tx = optax.chain(
        cage.coupled(cage.Rules([("w", cage.int4())]), strength=1.0, curvature=source),
        optax.sgd(-1.0),
    )
    updates, _ = updated(tx, narrow({"w": x}))
    pull = np.asarray(updates["w"])[1:] / 0.3
    assert pull.max() == pytest.approx(3, rel=1e-6)


@pytest.mark.parametrize("source", [curvature.hutchinson, curvature.hessian])
def test_products_over_shards_are_those_of_one_device(problem, source):
    _, _, params, loss = problem
    mesh = jax.make_mesh((8,), ("rows",))

    def updated(place):
        weights = {"w": place(params["w"]), "bias": params["bias"]}
        tx = coupled(source())

        @jax.jit
        def step(weights):
            state = tx.init(weights)
            gradient = jax.grad(loss)(weights)
            return tx.update(gradient, state, weights, obj_fn=loss)

        return step(weights)

    sharding = jax.NamedSharding(mesh, jax.P("rows"))
    found, state = updated(lambda array: jax.device_put(array, sharding))
    expected, _ = updated(lambda array: array)
    np.testing.assert_allclose(found["w"], expected["w"], **CLOSE)
    for kept in jax.tree.leaves(tree_get(state, "diagonal", {})):
        assert kept.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize(
    "source",
    [
        curvature.fisher(),
        curvature.fisher(factored=True),
        curvature.kronecker(),
        weightings.by_flips(),
    ],
    ids=["diagonal", "factors", "kronecker", "flips"],
)
def test_a_state_can_be_donated(problem, source):
    _, _, params, _ = problem
    tx = coupled(source)
    gradient = narrow(jax.tree.map(np.ones_like, params))
    step = jax.jit(
        lambda state: tx.update(gradient, state, params)[1], donate_argnums=0
    )
    state = step(step(tx.init(params)))
    assert tree_get(state, "cage_count") == 2


def test_an_overflow_is_left_out(problem):
    _, _, params, _ = problem
    tx = coupled(curvature.fisher(decay=0.5))
    gradients = [{"w": np.full((8, 3), value)} for value in (1.0, np.inf, 1.0)]
    _, state = updated(tx, params, gradients)
    np.testing.assert_array_equal(tree_get(state, "diagonal")["w"], 0.75)
    _, state = updated(coupled(curvature.kronecker(decay=0.5)), params, gradients)
    np.testing.assert_array_equal(tree_get(state, "right")["w"], 8 * 0.75)


def test_while_silent_updates_pass_and_estimates_go_on(problem):
    _, _, params, loss = problem
    for strength in (0.0, lambda count: jnp.zeros([])):
        tx = cage.coupled(RULES, strength=strength, curvature=curvature.fisher())
        gradient, updates, state = stepped(tx, params, loss)
        chex.assert_trees_all_equal(updates, gradient)
        assert tree_get(state, "estimates") == 1


def test_statistics_have_the_norm_of_what_is_pulled(problem):
    _, _, params, loss = problem
    tx = cage.coupled(
        RULES, strength=2.0, curvature=curvature.fisher(), statistics=True
    )
    gradient, updates, state = stepped(tx, params, loss)
    pull = np.linalg.norm(np.asarray(updates["w"]) - gradient["w"])
    ratio = pull / np.linalg.norm(gradient["w"])
    assert tree_get(state, "correction_ratio") == pytest.approx(ratio, rel=1e-4)


PLACES = {
    "coupled": lambda source: coupled(source, strength=0.1),
    "decoupled": lambda source: cage.decoupled(
        optax.adamw(0.1), RULES, strength=0.1, learning_rate=0.1, curvature=source
    ),
    "post_step": lambda source: cage.post_step(
        optax.adamw(0.1), RULES, strength=0.1, learning_rate=0.1, curvature=source
    ),
    "sgd": lambda source: cage.cage_sgd(0.1, RULES, strength=0.1, curvature=source),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("place", PLACES)
def test_every_placement_has_the_gradient_at_hand(place, problem):
    _, _, params, loss = problem
    tx = PLACES[place](curvature.fisher())
    gradient, _, state = stepped(tx, params, loss)
    found = np.asarray(tree_get(state, "diagonal")["w"]) / (1 - 0.99)
    np.testing.assert_allclose(found, np.square(gradient["w"]), rtol=1e-4)
