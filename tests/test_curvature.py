"""Sources of curvature: their formulas, and what the correction makes of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.tree_utils import tree_get

import cage_jax as cage
from cage_jax import curvature, weightings
from cage_jax.hadamard import hadamard_matrix

RULES = cage.Rules([(r"w", cage.int4())])
# Sums in another order.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def rounded(x):
    """Of int4, absmax along axis -2, in NumPy."""
    scale = np.abs(x).max(0, keepdims=True) / 7
    return np.round(x / scale) * scale


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

    params = {"w": jnp.asarray(x, jnp.float32), "bias": jnp.ones(3)}
    return h, optimum, params, loss


def coupled(source, strength=1.0, **options):
    """Of the pull alone: the learning rate is -1."""
    return optax.chain(
        cage.cage(RULES, strength, curvature=source, **options), optax.sgd(-1.0)
    )


def stepped(tx, params, loss, steps=1, **extra):
    """The last updates and the state."""
    state, gradient = tx.init(params), jax.grad(loss)(params)
    for _ in range(steps):
        updates, state = tx.update(gradient, state, params, obj_fn=loss, **extra)
    return updates, state


def test_with_the_hessian_the_gradient_is_that_of_full_precision(problem):
    h, optimum, params, loss = problem
    updates, _ = stepped(coupled(curvature.hessian()), params, loss)
    x = np.asarray(params["w"], np.float64)
    np.testing.assert_allclose(updates["w"], h @ (x - optimum), **CLOSE)
    np.testing.assert_array_equal(updates["bias"], 2 * params["bias"])


def test_a_diagonal_hessian_is_found_by_one_probe(problem):
    _, optimum, params, _ = problem
    d = np.linspace(0.5, 4, 24).reshape(8, 3)

    def loss(params):
        away = cage.fake_quant(params, RULES)["w"] - jnp.asarray(optimum, jnp.float32)
        return 0.5 * jnp.sum(jnp.asarray(d, jnp.float32) * away**2)

    updates, state = stepped(coupled(curvature.hutchinson()), params, loss)
    found = tree_get(state, "diagonal")["w"] / (1 - 0.99)
    np.testing.assert_allclose(found, d, rtol=1e-5)
    assert tree_get(state, "clamped") == 0
    x = np.asarray(params["w"], np.float64)
    np.testing.assert_allclose(updates["w"], d * (x - optimum), **CLOSE)


def test_probes_of_a_full_hessian_average_to_its_diagonal(problem):
    h, _, params, loss = problem
    tx = coupled(curvature.hutchinson(decay=0.999))
    gradient = jax.grad(loss)(params)

    def step(state, _):
        _, state = tx.update(gradient, state, params, obj_fn=loss)
        return state, None

    steps = 2000
    state, _ = jax.lax.scan(step, tx.init(params), length=steps)
    found = tree_get(state, "diagonal")["w"] / (1 - 0.999**steps)
    # A probe's variance is the sum of squares off the diagonal; the average is of about
    # 760 of them.
    spread = np.sqrt(((h - np.diag(np.diag(h))) ** 2).sum(1) / 760)
    assert np.all(np.abs(found - np.diag(h)[:, None]) < 5 * spread[:, None])


def test_a_rotated_parameter_has_its_diagonal_in_the_rotated_basis(rng):
    rules = cage.Rules([(r"w", cage.quest(4, hadamard=32, gradient="identity"))])
    rotation = np.asarray(hadamard_matrix(32)) / np.sqrt(32)
    d = np.linspace(1, 3, 32)
    h = jnp.asarray(rotation.T @ np.diag(d) @ rotation, jnp.float32)

    def loss(params):
        w = cage.fake_quant(params, rules)["w"]
        return 0.5 * jnp.sum(w * jnp.matmul(h, w, precision="highest"))

    params = {"w": jnp.asarray(rng.normal(size=(32, 2)), jnp.float32)}
    tx = optax.chain(
        cage.cage(rules, 1.0, curvature=curvature.hutchinson()), optax.sgd(-1.0)
    )
    updates, state = stepped(tx, params, loss)
    found = tree_get(state, "diagonal")["w"] / (1 - 0.99)
    np.testing.assert_allclose(found, np.tile(d[:, None], 2), rtol=1e-4)
    # And H e is what is added: the gradient is that of full precision.
    x = np.asarray(params["w"], np.float64)
    expected = rotation.T @ np.diag(d) @ rotation @ x
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-4, atol=1e-5)


def test_fisher_averages_squares(problem, rng):
    _, _, params, _ = problem
    gradients = rng.normal(size=(3, 8, 3))
    tx = coupled(curvature.fisher(examples=16, decay=0.9), strength=0.5)
    state, mean = tx.init(params), 0
    for g in gradients:
        tree = {"w": jnp.asarray(g, jnp.float32), "bias": jnp.zeros(3)}
        updates, state = tx.update(tree, state, params)
        mean = 0.9 * mean + 0.1 * 16 * g**2
    x = np.asarray(params["w"], np.float64)
    h = mean / (1 - 0.9**3)
    expected = gradients[-1] + 0.5 * h * (x - rounded(x))
    np.testing.assert_allclose(updates["w"], expected, **CLOSE)


def test_sampled_gradients_are_those_that_are_squared(problem, rng):
    _, _, params, loss = problem
    sampled = rng.normal(size=(8, 3))
    tx = coupled(curvature.fisher(sampled=True))
    tree = {"w": jnp.asarray(sampled, jnp.float32), "bias": jnp.zeros(3)}
    _, state = stepped(tx, params, loss, sampled_gradients=tree)
    found = tree_get(state, "diagonal")["w"] / (1 - 0.99)
    np.testing.assert_allclose(found, sampled**2, rtol=1e-5)


def test_relative_weights_have_the_mean_one(problem):
    _, _, params, loss = problem
    g = np.asarray(jax.grad(loss)(params)["w"], np.float64)
    x = np.asarray(params["w"], np.float64)
    updates, _ = stepped(coupled(curvature.fisher(relative=True), 3.0), params, loss)
    h = g**2 / (g**2).mean()
    np.testing.assert_allclose(updates["w"], g + 3 * h * (x - rounded(x)), **CLOSE)


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
    _, state = stepped(coupled(curvature.gauss_newton()), params, loss, **extra)
    a, w = np.asarray(inputs, np.float64), rounded(np.asarray(params["w"], np.float64))
    expected = (3 * a * np.cos(3 * w * a)) ** 2 * np.cosh(np.sin(3 * w * a))
    found = tree_get(state, "diagonal")["w"] / (1 - 0.99)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_kronecker_multiplies_from_both_sides(problem, rng):
    _, _, params, _ = problem
    gradients = rng.normal(size=(3, 8, 3))
    tx = coupled(curvature.kronecker(examples=4, decay=0.9))
    state, left, right = tx.init(params), 0, 0
    for g in gradients:
        tree = {"w": jnp.asarray(g, jnp.float32), "bias": jnp.zeros(3)}
        updates, state = tx.update(tree, state, params)
        left, right = 0.9 * left + 0.1 * g @ g.T, 0.9 * right + 0.1 * g.T @ g
    x = np.asarray(params["w"], np.float64)
    pull = 4 * left @ (x - rounded(x)) @ right / np.trace(left) / (1 - 0.9**3)
    np.testing.assert_allclose(updates["w"], gradients[-1] + pull, **CLOSE)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("relative", [False, True])
def test_the_second_moment_is_that_of_the_optimizer(problem, relative):
    _, _, params, loss = problem
    source = curvature.second_moment(b2=0.95, relative=relative)
    plain = optax.adamw(0.1, b2=0.95)
    tx = cage.cage_adamw(0.1, RULES, 2.0, b2=0.95, curvature=source)
    updates, state = stepped(tx, params, loss, steps=2)
    expected, _ = stepped(optax.with_extra_args_support(plain), params, loss, steps=2)
    g = np.asarray(jax.grad(loss)(params)["w"], np.float64)
    x = np.asarray(params["w"], np.float64)
    h = np.abs(g) / (np.abs(g).mean() if relative else 1)
    pull = -0.1 * 2 * h * (x - rounded(x))
    np.testing.assert_allclose(updates["w"] - expected["w"], pull, **CLOSE)
    assert not jax.tree.leaves(state[1].curvature)


def test_a_function_of_the_user(problem):
    _, _, params, loss = problem

    def signs(errors, step):
        assert set(step.gradients) == {"w"}
        return {path: jnp.sign(e) for path, e in errors.items()}

    updates, _ = stepped(coupled(curvature.weighted(signs)), params, loss)
    g = jax.grad(loss)(params)["w"]
    x = np.asarray(params["w"], np.float64)
    np.testing.assert_allclose(updates["w"], g + np.sign(x - rounded(x)), **CLOSE)


def test_estimates_begin_and_come_when_they_should(problem):
    _, _, params, loss = problem
    tx = coupled(curvature.hutchinson(start=2, period=3))
    state, counts = tx.init(params), []
    gradient = jax.grad(loss)(params)
    for _ in range(7):
        updates, state = tx.update(gradient, state, params, obj_fn=loss)
        counts.append(int(tree_get(state, "estimates")))
        if counts[-1] == 0:  # as without a source
            plain = optax.chain(cage.cage(RULES, 1.0), optax.sgd(-1.0))
            expected, _ = plain.update(gradient, plain.init(params), params)
            np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)
    assert counts == [0, 0, 1, 1, 1, 2, 2]


def test_what_is_negative_or_too_large_is_clamped_and_counted(problem):
    _, _, params, _ = problem
    d = np.ones((8, 3))
    d[0, 0], d[1, 1] = -5, 1000

    def estimate(step, key):
        return {"w": jnp.asarray(d, jnp.float32)}

    source = curvature.diagonal(estimate, largest=10)
    zeros = {"w": jnp.zeros((8, 3)), "bias": jnp.zeros(3)}
    tx = coupled(source)
    updates, state = tx.update(zeros, tx.init(params), params)
    assert tree_get(state, "clamped") == pytest.approx(2 / 24)
    positive = np.maximum(d, 0)
    x = np.asarray(params["w"], np.float64)
    expected = np.minimum(positive, 10 * positive.mean()) * (x - rounded(x))
    np.testing.assert_allclose(updates["w"], expected, **CLOSE)


def test_relative_weights_share_one_dose(problem, rng):
    """The mean is that of all parameters, and so is what is too large."""
    _, _, params, _ = problem
    rules = cage.Rules([(r"w|v", cage.int4())])
    weights = {"w": params["w"], "v": jnp.asarray(rng.normal(size=(5, 2)), jnp.float32)}
    d = {"w": np.ones((8, 3)), "v": np.full((5, 2), 8.0)}
    d["w"][0, 0], d["v"][1, 1] = -5, 1000

    def estimate(step, key):
        return {path: jnp.asarray(h, jnp.float32) for path, h in d.items()}

    source = curvature.diagonal(estimate, relative=True, largest=2)
    tx = optax.chain(cage.cage(rules, 1.0, curvature=source), optax.sgd(-1.0))
    zeros = jax.tree.map(jnp.zeros_like, weights)
    updates, state = tx.update(zeros, tx.init(weights), weights)
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
            part.reshape(x.shape) * (x - rounded(x)),
            **CLOSE,
            err_msg=path,
        )


def test_a_few_with_nearly_all_the_curvature_are_not_pulled_beyond_the_grid():
    """A model whose gradients lie in few weights, as those of a pretrained one do."""
    x = jnp.full((1000, 1), 0.3).at[0].set(7.0)
    h = jnp.full((1000, 1), 1e-6).at[:5].set(1.0)
    source = curvature.diagonal(lambda step, key: {"w": h}, relative=True, largest=3.0)
    tx = optax.chain(
        cage.cage(cage.Rules([("w", cage.int4())]), 1.0, curvature=source),
        optax.sgd(-1.0),
    )
    updates, _ = tx.update({"w": 0 * x}, tx.init({"w": x}), {"w": x})
    pull = np.asarray(updates["w"])[1:] / 0.3
    assert pull.max() == pytest.approx(3, rel=1e-6)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("steps", [3, 40, 1000])
def test_no_step_of_what_is_recommended_goes_beyond_the_grid(steps):
    rate = optax.cosine_decay_schedule(0.1, steps, alpha=0.1)
    strength = cage.recommended(rate, steps)["strength"]
    share = [float(3 * rate(count) * strength(count)) for count in range(steps)]
    assert max(share) < 1 + 1e-6
    assert (sum(share) / 3 == pytest.approx(0.7, rel=1e-4)) == (steps > 3)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("peak", "strongest"), [(1e-2, 4.11), (1e-4, 15.0)])
def test_what_is_recommended_is_never_strong(peak, strongest):
    """A small learning rate does not get its dose by a pull beyond all measure."""
    rate = optax.cosine_decay_schedule(peak, 1000, alpha=0.1)
    strength = cage.recommended(rate, 1000)["strength"]
    ramp = cage.ramp_to_dose(rate, 1000)
    assert float(strength(999)) == pytest.approx(strongest, rel=1e-3)
    shares = [float(strength(count) / ramp(count)) for count in (600, 800, 999)]
    assert shares == pytest.approx(3 * [min(1.0, 15 / float(ramp(999)))], rel=1e-5)
    assert (shares[0] == 1.0) == (peak == 1e-2)


@pytest.mark.parametrize("relative", [False, True])
def test_factors_are_means_of_rows_and_columns(rng, relative):
    """Of each matrix of a stack; of a product they are the whole of it."""
    quantizers = {"w": cage.int4(), "v": cage.int4(axis=-1)}
    rules = cage.Rules(list(quantizers.items()))
    params = {"w": rng.normal(size=(2, 8, 3)), "v": rng.normal(size=(5,))}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    d = {"w": rng.uniform(1, 2, size=(2, 8, 3)), "v": rng.uniform(1, 2, size=(5,))}
    d["w"][0, :, 0] = -1  # a column with a negative mean

    def estimate(step, key):
        return {path: jnp.asarray(h, jnp.float32) for path, h in d.items()}

    source = curvature.diagonal(estimate, factored=True, relative=relative)
    tx = optax.chain(cage.cage(rules, 1.0, curvature=source), optax.sgd(-1.0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params)
    kept = tree_get(state, "diagonal")
    assert [x.shape for x in jax.tree.leaves(kept)] == [(5,), (2, 8), (2, 3)]
    rows = np.maximum(d["w"].mean(-1), 0)
    columns = np.maximum(d["w"].mean(-2), 0)
    product = np.einsum("nr,nc->nrc", rows, columns)
    h = {"w": product / columns.mean(-1)[:, None, None], "v": d["v"]}
    unit = sum(x.sum() for x in h.values()) / 53 if relative else 1
    for path in params:
        error = cage.quantization_error(params[path], quantizers[path])
        expected = h[path] / unit * np.asarray(error, np.float64)
        np.testing.assert_allclose(updates[path], expected, **CLOSE, err_msg=path)


@pytest.mark.usefixtures("standard_promotion")
def test_factors_lie_as_the_parameter_does(rng):
    """Rows and columns on the axes of a mesh, and the same figures as on one device."""
    mesh = jax.make_mesh((4, 2), ("rows", "columns"))
    x, g = rng.normal(size=(2, 32, 8))
    source = curvature.fisher(factored=True, relative=True, largest=3.0)
    tx = cage.cage_adamw(0.1, RULES, 1.0, curvature=source)

    def updated(place):
        params = {"w": place(jnp.asarray(x, jnp.float32))}
        gradient = {"w": place(jnp.asarray(g, jnp.float32))}
        state = jax.jit(tx.init)(params)
        return jax.jit(tx.update)(gradient, state, params)

    sharding = jax.NamedSharding(mesh, jax.P("rows", "columns"))
    with jax.set_mesh(mesh):
        found, state = updated(lambda array: jax.device_put(array, sharding))
    expected, _ = updated(lambda array: array)
    np.testing.assert_allclose(found["w"], expected["w"], **CLOSE)
    factors = tree_get(state, "diagonal")["w"]
    assert factors.rows.sharding.is_equivalent_to(
        jax.NamedSharding(mesh, jax.P("rows")), 1
    )
    assert factors.columns.sharding.is_equivalent_to(
        jax.NamedSharding(mesh, jax.P("columns")), 1
    )


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


@pytest.mark.usefixtures("standard_promotion")
def test_what_is_recommended_has_its_dose_and_costs_rows_and_columns(problem):
    _, _, params, loss = problem
    rate = optax.cosine_decay_schedule(0.1, 100)
    chosen = cage.recommended(rate, 100)
    assert cage.dose(rate, chosen["strength"], 100) == pytest.approx(0.7, rel=1e-5)
    tx = cage.cage_adamw(rate, RULES, **chosen)
    state = tx.init(params)
    kept = jax.tree.leaves(tree_get(state, "diagonal"))
    assert sum(x.size for x in kept) == 8 + 3

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(100):
        params, state = step(params, state)
    assert tree_get(state, "estimates") == 100


@pytest.mark.parametrize(
    "source",
    [
        curvature.fisher(),
        curvature.fisher(factored=True, relative=True),
        curvature.kronecker(),
        weightings.by_flips(),
    ],
    ids=["diagonal", "factors", "kronecker", "flips"],
)
def test_a_state_can_be_donated(problem, source):
    _, _, params, loss = problem
    tx = coupled(source)
    gradient = jax.grad(loss)(params)
    step = jax.jit(
        lambda state: tx.update(gradient, state, params)[1], donate_argnums=0
    )
    state = step(step(tx.init(params)))
    assert tree_get(state, "cage_count") == 2


def test_an_overflow_is_left_out(problem):
    _, _, params, _ = problem
    tx = coupled(curvature.fisher(decay=0.5))
    state = tx.init(params)
    for value in (1.0, np.inf, 1.0):
        tree = {"w": jnp.full((8, 3), value, jnp.float32), "bias": jnp.zeros(3)}
        _, state = tx.update(tree, state, params)
    np.testing.assert_array_equal(tree_get(state, "diagonal")["w"], 0.75)


def test_while_silent_updates_pass_and_estimates_go_on(problem):
    _, _, params, loss = problem
    for strength in (0.0, lambda count: jnp.zeros([])):
        tx = cage.cage(RULES, strength, curvature=curvature.fisher())
        gradient = jax.grad(loss)(params)
        updates, state = tx.update(gradient, tx.init(params), params)
        chex.assert_trees_all_equal(updates, gradient)
        assert tree_get(state, "estimates") == 1


def test_statistics_have_the_norm_of_what_is_pulled(problem):
    _, _, params, loss = problem
    tx = cage.cage(RULES, 2.0, curvature=curvature.fisher(), statistics=True)
    updates, state = stepped(tx, params, loss)
    gradient = jax.grad(loss)(params)
    pull = np.linalg.norm(updates["w"] - gradient["w"])
    ratio = pull / np.linalg.norm(gradient["w"])
    assert tree_get(state, "correction_ratio") == pytest.approx(ratio, rel=1e-4)


PLACES = {
    "coupled": lambda source: coupled(source, 0.1),
    "decoupled": lambda source: cage.decoupled(
        optax.adamw(0.1), RULES, 0.1, 0.1, curvature=source
    ),
    "post_step": lambda source: cage.post_step(
        optax.adamw(0.1), RULES, 0.1, 0.1, curvature=source
    ),
    "sgd": lambda source: cage.cage_sgd(0.1, RULES, 0.1, curvature=source),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("place", PLACES)
def test_every_placement_has_the_gradient_at_hand(place, problem):
    _, _, params, loss = problem
    tx = PLACES[place](curvature.fisher())
    gradient = jax.grad(loss)(params)
    _, state = jax.jit(tx.update)(gradient, tx.init(params), params)
    found = tree_get(state, "diagonal")["w"] / (1 - 0.99)
    np.testing.assert_allclose(found, np.square(gradient["w"]), rtol=1e-4)


def test_what_is_missing_is_named(problem):
    _, _, params, loss = problem
    gradient = jax.grad(loss)(params)
    for source, name in (
        (curvature.hutchinson(), "obj_fn"),
        (curvature.hessian(), "obj_fn"),
        (curvature.gauss_newton(), "outputs_fn"),
        (curvature.fisher(sampled=True), "sampled_gradients"),
    ):
        tx = coupled(source)
        with pytest.raises(ValueError, match=f"`{name}` must be given to `update`"):
            tx.update(gradient, tx.init(params), params)
    tx = coupled(curvature.second_moment())
    with pytest.raises(ValueError, match=r"must follow one optimizer .* got 0"):
        tx.update(gradient, tx.init(params), params)
    vectors = cage.Rules([(r"bias", cage.int4(axis=-1))])
    with pytest.raises(ValueError, match=r"`bias`: a parameter must have two axes"):
        cage.cage(vectors, 1.0, curvature=curvature.kronecker()).init(params)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"decay": 1.0}, "decay"),
        ({"period": 0}, "period"),
        ({"start": -1}, "start"),
        ({"largest": 1.0}, "largest"),
        ({"examples": 0}, "examples"),
    ],
)
def test_numbers_out_of_range_are_refused(options, name):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        curvature.fisher(**options)


@pytest.mark.parametrize("source", [curvature.hutchinson(), curvature.hessian()])
@pytest.mark.parametrize(
    ("obj_fn", "message"),
    [
        (lambda params, batch: 0.0, r"it raised: .*missing 1 required.*lambda params"),
        (lambda params: (0.0, 0.0), r"got tuple from it"),
        (lambda params: jnp.ones(3), r"got \(3,\) from it"),
        (1.0, "got float"),
    ],
)
def test_a_loss_that_is_none(source, obj_fn, message):
    tx = cage.cage(cage.Rules([(".*", cage.int4())]), 1.0, curvature=source)
    params = {"w": jnp.ones((4, 4))}
    with pytest.raises(TypeError, match=f"`obj_fn` must be a function.*{message}"):
        tx.update(params, tx.init(params), params, obj_fn=obj_fn)


@pytest.mark.parametrize(
    ("source", "message"),
    [(curvature.hutchinson, r"Call the source, with \(\)"), ("fisher", "got 'fisher'")],
)
def test_a_source_that_is_none(source, message):
    with pytest.raises(TypeError, match=f"`curvature` must be a source.*{message}"):
        cage.cage(cage.Rules([(".*", cage.int4())]), 1.0, curvature=source)
