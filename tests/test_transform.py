"""The correction: identities, and each placement against NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import train
from oracles import absmax_round, absmax_scale

import cage_jax as cage
from cage_jax.quantizers.formats import Integer
from cage_jax.quantizers.scales import Fixed

# By count. The strength is silent at first; `post_step` looks one step ahead.
LEARNING_RATE = np.array([0.05, 0.04, 0.07, 0.06, 0.03, 0.02, 0.01])
STRENGTH = np.array([0.0, 0.0, 2.0, 3.5, 5.0, 1.5])
STEPS = len(STRENGTH)
GROUP = 4
RULES = cage.Rules([(r".*kernel", cage.int4(group_size=GROUP))])
# Both sides in float64: what is left is rounding in another order of operations.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-13}
# Here each update is compiled; that each placement runs eagerly too is asked in
# test_optax_conventions.
train = functools.partial(train, jit=True)


def table(values):
    """A schedule that looks its value up by count."""
    return lambda count: jnp.asarray(values)[count]


def rounded(x):
    return absmax_round(x, group=GROUP)


def error(x):
    return x - rounded(x)


@pytest.fixture
def start(rng):
    """Parameters and the gradients of all steps, in NumPy."""

    def normal():
        return {"kernel": rng.normal(size=(8, 3)), "bias": rng.normal(size=3)}

    return normal(), [normal() for _ in range(STEPS)]


# --- identities ----------------------------------------------------------------------


def test_coupled_with_the_curvature_gives_the_exact_gradient(x64, rng):
    x, target, curvature = rng.normal(size=(8, 3)), rng.normal(size=(8, 3)), 1.7

    def loss(params):
        quantized = cage.fake_quant(params, RULES)["kernel"]
        return curvature / 2 * jnp.sum((quantized - target) ** 2)

    tx = cage.coupled(RULES, strength=curvature)

    @jax.jit
    def step(params):
        gradient = jax.grad(loss)(params)
        return gradient, tx.update(gradient, tx.init(params), params)[0]

    gradient, updates = step({"kernel": jnp.asarray(x)})
    exact = curvature * (x - target)
    chex.assert_trees_all_close(
        gradient["kernel"], exact - curvature * error(x), **FLOAT64
    )
    chex.assert_trees_all_close(updates["kernel"], exact, **FLOAT64)


def test_with_a_full_hessian_the_ideal_correction_is_its_product(x64, rng):
    x, target = rng.normal(size=(8, 1)), rng.normal(size=(8, 1))
    root = rng.normal(size=(8, 8))
    hessian = root @ root.T
    quantizer = cage.int4(group_size=GROUP)

    def loss(x):
        distance = cage.fake_quant(x, quantizer) - target
        return jnp.sum(distance * (hessian @ distance)) / 2

    @jax.jit
    def found(x):
        correction = hessian @ cage.quantization_error(x, quantizer)
        return jax.grad(loss)(x), correction

    gradient, correction = found(jnp.asarray(x))
    chex.assert_trees_all_close(correction, hessian @ error(x), **FLOAT64)
    chex.assert_trees_all_close(
        gradient + correction, hessian @ (x - target), **FLOAT64
    )


KEPT = {"freeze_scale": True, "statistics": True}
# Each placement and each ready-made optimizer; some that keep grids and statistics.
PLACEMENTS = {
    "coupled": {},
    "chain": KEPT,
    "decoupled": {},
    "post_step": KEPT,
    "cage_adamw": KEPT,
    "cage_sgd": {},
}


def placed(name, strength, lr, **options):
    """The transformation of that name."""
    correction = cage.coupled(RULES, strength=strength, **options)
    adamw = optax.adamw(lr, weight_decay=0.1)
    sgd = {"rules": RULES, "strength": strength, "momentum": 0.9}
    return {
        "coupled": lambda: optax.chain(correction, optax.sgd(lr, momentum=0.9)),
        "chain": lambda: optax.chain(
            optax.scale_by_adam(),
            optax.add_decayed_weights(0.1),
            correction,
            optax.scale_by_learning_rate(lr),
        ),
        "decoupled": lambda: cage.decoupled(
            adamw, RULES, strength=strength, learning_rate=lr, **options
        ),
        "post_step": lambda: cage.post_step(
            adamw, RULES, strength=strength, learning_rate=lr, **options
        ),
        "cage_adamw": lambda: cage.cage_adamw(
            lr, RULES, strength=strength, weight_decay=0.1, **options
        ),
        "cage_sgd": lambda: cage.cage_sgd(lr, **sgd, **options),
    }[name]()


@functools.cache
def base_steps(name, jit):
    """A base optimizer, which several placements have."""
    lr = table(LEARNING_RATE.astype(np.float32))
    base = {
        "sgd": optax.sgd(lr, momentum=0.9),
        "adamw": optax.adamw(lr, weight_decay=0.1),
    }
    tx = base[name]
    return optax.GradientTransformation(
        tx.init, jax.jit(tx.update) if jit else tx.update
    )


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", PLACEMENTS)
def test_without_strength_it_is_the_base_optimizer(name, start):
    params, gradients = jax.tree.map(np.float32, start)
    lr = table(LEARNING_RATE.astype(np.float32))
    base = "sgd" if name in ("coupled", "cage_sgd") else "adamw"
    silence = cage.silence_then_ramp(100, silence=0.9)
    for strength, jit, options in (
        (0.0, False, {}),
        (silence, False, {}),
        (silence, True, PLACEMENTS[name]),
    ):
        tx = placed(name, strength, lr, **options)
        corrected, _ = train(tx, params, gradients[:3], jit=jit)
        plain, _ = train(base_steps(base, jit), params, gradients[:3], jit=False)
        # Compiled, XLA may contract a product and a sum of Optax's own, as of the
        # momentum, in one of both programs: roundings of numbers near 1.
        rounding = 2.0**-23 if jit else 0
        chex.assert_trees_all_close(corrected, plain, rtol=0, atol=rounding)


def test_coupled_with_sgd_is_oscillation_dampening(x64, rng):
    x, gradient = rng.normal(size=(8, 3)), rng.normal(size=(8, 3))
    damping, lr = 0.3, 0.1

    def dampened(w):  # arXiv 2203.11086, with w_q a constant
        ends = 7 * absmax_scale(x, group=GROUP)
        clipped = jnp.clip(w, -ends, ends)
        return damping * jnp.sum((rounded(x) - clipped) ** 2)

    dampening = np.asarray(jax.jit(jax.grad(dampened))(jnp.asarray(x)))
    tx = optax.chain(cage.coupled(RULES, strength=2 * damping), optax.sgd(lr))
    (reached,), _ = train(tx, {"kernel": x}, [{"kernel": gradient}])
    chex.assert_trees_all_close(
        reached["kernel"], x - lr * (gradient + dampening), **FLOAT64
    )


def test_clipped_weights_are_pulled_to_the_edge():
    rules = cage.Rules([(".*", cage.Quantizer(Integer(4), Fixed(0.25)))])
    x = jnp.array([[3.0], [-2.75], [0.5]])  # the grid ends at 7 / 4
    tx = cage.coupled(rules, strength=2.0)
    updates, _ = jax.jit(tx.update)(0 * x, tx.init(x), x)
    np.testing.assert_array_equal(updates, [[2.5], [-2.0], [0.0]])


def test_post_step_is_the_buffer_update_of_pv_tuning(x64, start):
    params, gradients = start
    lr, strength = 0.05, 3.0
    decay = lr * strength  # PV-Tuning's delta, and WinQ's interpolation weight
    tx = cage.post_step(optax.sgd(lr), RULES, strength=strength, learning_rate=lr)
    trajectory, _ = train(tx, params, gradients)
    buffer = params["kernel"]
    for gradient, reached in zip(gradients, trajectory):
        buffer = buffer - lr * gradient["kernel"]
        buffer = (1 - decay) * buffer + decay * rounded(buffer)
        chex.assert_trees_all_close(reached["kernel"], buffer, **FLOAT64)


@pytest.mark.usefixtures("standard_promotion")
def test_decoupled_is_coupled_weighted_by_the_preconditioner(x64, start):
    params, (gradient, *_) = start
    lr, strength, eps = 0.05, 2.0, 1e-3
    tx = cage.cage_adamw(lr, RULES, strength=strength, eps=eps, weight_decay=0.0)
    (reached,), _ = train(tx, params, [gradient])
    x, g = params["kernel"], gradient["kernel"]
    # In the first step the debiased moments are the gradient and its square.
    preconditioner = np.abs(g) + eps
    weighted = g + strength * preconditioner * error(x)
    chex.assert_trees_all_close(
        reached["kernel"], x - lr * weighted / preconditioner, **FLOAT64
    )


# --- placements against NumPy --------------------------------------------------------


def sgd(x, gradients, wrong):
    """The error in front of SGD with momentum 0.9."""
    trace = np.zeros_like(x)
    for t, g in enumerate(gradients):
        trace = g + STRENGTH[t] * wrong(x) + 0.9 * trace
        x = x - LEARNING_RATE[t] * trace
        yield x


def adamw(x, gradients, before, after):
    """AdamW; `before` gives the error at the old weights, `after` at the new ones."""
    b1, b2, eps, decay = 0.9, 0.999, 1e-8, 0.1
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(gradients):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        root = np.sqrt(v / (1 - b2 ** (t + 1)))
        direction = m / (1 - b1 ** (t + 1)) / (root + eps) + decay * x
        x = x - LEARNING_RATE[t] * (direction + STRENGTH[t] * before(x))
        x = x - LEARNING_RATE[t + 1] * STRENGTH[t] * after(x)
        yield x


def nothing(x):
    return 0.0


ORACLES = {
    "coupled": lambda x, g, wrong: sgd(x, g, wrong),
    "chain": lambda x, g, wrong: adamw(x, g, wrong, nothing),
    "decoupled": lambda x, g, wrong: adamw(x, g, wrong, nothing),
    "post_step": lambda x, g, wrong: adamw(x, g, nothing, wrong),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", list(ORACLES))
def test_placement_follows_its_formula(x64, name, start):
    params, gradients = start
    tx = placed(name, table(STRENGTH), table(LEARNING_RATE))
    trajectory, _ = train(tx, params, gradients)
    for key, wrong in (("kernel", error), ("bias", nothing)):
        want = list(ORACLES[name](params[key], [g[key] for g in gradients], wrong))
        assert abs(want[-1] - want[0]).max() > 0.1  # far above the tolerance
        chex.assert_trees_all_close([p[key] for p in trajectory], want, **FLOAT64)


def test_each_parameter_gets_its_own_quantizer(x64, rng):
    params = {"a": rng.normal(size=(8, 3)), "b": rng.normal(size=(3, 8))}
    quantizers = {"a": cage.int4(group_size=GROUP), "b": cage.int8(axis=-1)}
    tx = cage.coupled(cage.Rules(list(quantizers.items())), strength=1.0)
    arrays = jax.tree.map(jnp.asarray, params)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(arrays), arrays)
    wide = params["b"] - absmax_round(params["b"], 127, axis=-1)
    chex.assert_trees_all_close(
        updates, {"a": error(params["a"]), "b": wide}, **FLOAT64
    )


def test_the_correction_is_a_constant_for_differentiation():
    tx = cage.coupled(RULES, strength=2.0)

    def total(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, tx.init(params), params)
        return jnp.sum(updates["kernel"] ** 2)

    params = {"kernel": jnp.asarray(np.linspace(-1, 1, 16).reshape(8, 2), np.float32)}
    value, gradient = jax.jit(jax.value_and_grad(total))(params)
    assert value > 0
    chex.assert_trees_all_equal(gradient, {"kernel": np.zeros((8, 2), np.float32)})


# --- the recommended strength --------------------------------------------------------


@pytest.mark.parametrize("wrap", [cage.decoupled, cage.post_step])
def test_any_optimizer_takes_the_recommended_strength(wrap, standard_promotion):
    rate = optax.cosine_decay_schedule(0.03, 100)
    params = {"kernel": jnp.asarray(np.linspace(-1, 1, 16).reshape(8, 2), np.float32)}
    chosen = cage.recommended(rate, 100)
    one = wrap(optax.lion(rate), RULES, learning_rate=rate, total_steps=100)
    other = wrap(optax.lion(rate), RULES, learning_rate=rate, **chosen)
    plain = optax.lion(rate)

    def trained(tx):
        def step(_, carry):
            params, state = carry
            updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 90, step, (params, tx.init(params)))[0]

    expected = trained(other)
    chex.assert_trees_all_equal(trained(one), expected)
    assert not np.array_equal(trained(plain)["kernel"], expected["kernel"])
