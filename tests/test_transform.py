"""The correction: identities, placements, frozen grids, statistics, bad input."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from optax.tree_utils import tree_get

import cage_jax as cage
from cage_jax.formats import Integer
from cage_jax.scales import Fixed

# By count. The strength is silent at first; `post_step` looks one step ahead.
LEARNING_RATE = np.array([0.05, 0.04, 0.07, 0.06, 0.03, 0.02, 0.01])
STRENGTH = np.array([0.0, 0.0, 2.0, 3.5, 5.0, 1.5])
STEPS = len(STRENGTH)
GROUP = 4
RULES = cage.Rules([(r".*kernel", cage.int4(group_size=GROUP))])
# Both sides in float64: what is left is rounding in another order of operations.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-13}


def table(values):
    """A schedule that looks its value up by count."""
    return lambda count: jnp.asarray(values)[count]


def scales(x):
    """Of int4, absmax over groups of 4 along axis -2, in NumPy; for each weight."""
    largest = np.abs(x.reshape(-1, GROUP, x.shape[-1])).max(1)
    return largest.repeat(GROUP, 0) / 7


def codes(x):
    return np.round(x / scales(x))


def rounded(x):
    return codes(x) * scales(x)


def error(x):
    return x - rounded(x)


@pytest.fixture
def start(rng):
    """Parameters and the gradients of all steps, in NumPy."""

    def normal():
        return {"kernel": rng.normal(size=(8, 3)), "bias": rng.normal(size=3)}

    return normal(), [normal() for _ in range(STEPS)]


def train(tx, params, gradients, *, jit=False):
    """The parameters and the state after each step."""
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)

    # Only the update: compiled together, the addition to the parameters may be fused
    # into a multiply-add in one program and not in another.
    update = jax.jit(tx.update) if jit else tx.update
    trajectory, states = [], []
    for gradient in gradients:
        gradient = jax.tree.map(jnp.asarray, gradient)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
        states.append(state)
    return trajectory, states


# --- identities ----------------------------------------------------------------------


def test_coupled_with_the_curvature_gives_the_exact_gradient(x64, rng):
    x, target, curvature = rng.normal(size=(8, 3)), rng.normal(size=(8, 3)), 1.7

    def loss(params):
        quantized = cage.fake_quant(params, RULES)["kernel"]
        return curvature / 2 * jnp.sum((quantized - target) ** 2)

    params = {"kernel": jnp.asarray(x)}
    gradient = jax.grad(loss)(params)
    exact = curvature * (x - target)
    chex.assert_trees_all_close(
        gradient["kernel"], exact - curvature * error(x), **FLOAT64
    )
    tx = cage.cage(RULES, curvature)
    updates, _ = tx.update(gradient, tx.init(params), params)
    chex.assert_trees_all_close(updates["kernel"], exact, **FLOAT64)


def test_with_a_full_hessian_the_ideal_correction_is_its_product(x64, rng):
    x, target = rng.normal(size=(8, 1)), rng.normal(size=(8, 1))
    root = rng.normal(size=(8, 8))
    hessian = root @ root.T
    quantizer = cage.int4(group_size=GROUP)

    def loss(x):
        distance = cage.fake_quant(x, quantizer) - target
        return jnp.sum(distance * (hessian @ distance)) / 2

    gradient = jax.grad(loss)(jnp.asarray(x))
    correction = hessian @ cage.quantization_error(jnp.asarray(x), quantizer)
    chex.assert_trees_all_close(correction, hessian @ error(x), **FLOAT64)
    chex.assert_trees_all_close(
        gradient + correction, hessian @ (x - target), **FLOAT64
    )


def placements(strength, **options):
    """Each placement beside its base optimizer."""
    lr = table(LEARNING_RATE.astype(np.float32))
    correction = cage.cage(RULES, strength, **options)
    direction = (optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    descent = optax.scale_by_learning_rate(lr)
    sgd, adamw = optax.sgd(lr, momentum=0.9), optax.adamw(lr, weight_decay=0.1)
    return {
        "coupled": (optax.chain(correction, sgd), sgd),
        "chain": (
            optax.chain(*direction, correction, descent),
            optax.chain(*direction, descent),
        ),
        "decoupled": (cage.decoupled(adamw, RULES, strength, lr, **options), adamw),
        "post_step": (cage.post_step(adamw, RULES, strength, lr, **options), adamw),
        "cage_adamw": (
            cage.cage_adamw(lr, RULES, strength, weight_decay=0.1, **options),
            adamw,
        ),
        "cage_sgd": (
            cage.cage_sgd(lr, RULES, strength, momentum=0.9, **options),
            sgd,
        ),
    }


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("jit", "options"),
    [(False, {}), (True, {}), (True, {"freeze_scale": True, "statistics": True})],
    ids=["eager", "jit", "jit-options"],
)
@pytest.mark.parametrize(
    "strength",
    [0.0, cage.silence_then_ramp(100, silence=0.9)],
    ids=["number", "silence"],
)
@pytest.mark.parametrize("name", list(placements(0.0)))
def test_without_strength_it_is_the_base_optimizer(name, strength, jit, options, start):
    params, gradients = jax.tree.map(np.float32, start)
    gradients = gradients[:3]
    tx, base = placements(strength, **options)[name]
    corrected, _ = train(tx, params, gradients, jit=jit)
    plain, _ = train(base, params, gradients, jit=jit)
    chex.assert_trees_all_equal(corrected, plain)


def test_coupled_with_sgd_is_oscillation_dampening(x64, rng):
    x, gradient = rng.normal(size=(8, 3)), rng.normal(size=(8, 3))
    damping, lr = 0.3, 0.1

    def dampened(w):  # arXiv 2203.11086, with w_q a constant
        clipped = jnp.clip(w, -7 * scales(x), 7 * scales(x))
        return damping * jnp.sum((rounded(x) - clipped) ** 2)

    dampening = np.asarray(jax.grad(dampened)(jnp.asarray(x)))
    params = {"kernel": jnp.asarray(x)}
    tx = optax.chain(cage.cage(RULES, 2 * damping), optax.sgd(lr))
    updates, _ = tx.update({"kernel": jnp.asarray(gradient)}, tx.init(params), params)
    chex.assert_trees_all_close(
        updates["kernel"], -lr * (gradient + dampening), **FLOAT64
    )


def test_clipped_weights_are_pulled_to_the_edge():
    rules = cage.Rules([(".*", cage.Quantizer(Integer(4), Fixed(0.25)))])
    x = jnp.array([[3.0], [-2.75], [0.5]])  # the grid ends at 7 / 4
    tx = cage.cage(rules, 2.0)
    updates, _ = tx.update(jnp.zeros_like(x), tx.init(x), x)
    chex.assert_trees_all_equal(updates, jnp.array([[2.5], [-2.0], [0.0]]))


def test_post_step_is_the_buffer_update_of_pv_tuning(x64, start):
    params, gradients = start
    lr, strength = 0.05, 3.0
    decay = lr * strength  # PV-Tuning's delta, and WinQ's interpolation weight
    tx = cage.post_step(optax.sgd(lr), RULES, strength, lr)
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
    tx = cage.cage_adamw(lr, RULES, strength, eps=eps, weight_decay=0.0)
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
    lr, strength = table(LEARNING_RATE), table(STRENGTH)
    correction, adam = cage.cage(RULES, strength), optax.adamw(lr, weight_decay=0.1)
    tx = {
        "coupled": lambda: optax.chain(correction, optax.sgd(lr, momentum=0.9)),
        "chain": lambda: optax.chain(
            optax.scale_by_adam(),
            optax.add_decayed_weights(0.1),
            correction,
            optax.scale_by_learning_rate(lr),
        ),
        "decoupled": lambda: cage.decoupled(adam, RULES, strength, lr),
        "post_step": lambda: cage.post_step(adam, RULES, strength, lr),
    }[name]()
    trajectory, _ = train(tx, params, gradients)
    for key, wrong in (("kernel", error), ("bias", nothing)):
        want = list(ORACLES[name](params[key], [g[key] for g in gradients], wrong))
        assert abs(want[-1] - want[0]).max() > 0.1  # far above the tolerance
        chex.assert_trees_all_close([p[key] for p in trajectory], want, **FLOAT64)


def test_each_parameter_gets_its_own_quantizer(x64, rng):
    params = {"a": rng.normal(size=(8, 3)), "b": rng.normal(size=(3, 8))}
    quantizers = {"a": cage.int4(group_size=GROUP), "b": cage.int8(axis=-1)}
    tx = cage.cage(cage.Rules(list(quantizers.items())), 1.0)
    arrays = jax.tree.map(jnp.asarray, params)
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, arrays), tx.init(arrays), arrays
    )
    scale = np.abs(params["b"]).max(1, keepdims=True) / 127
    wide = params["b"] - np.round(params["b"] / scale) * scale
    chex.assert_trees_all_close(
        updates, {"a": error(params["a"]), "b": wide}, **FLOAT64
    )


def test_the_correction_is_a_constant_for_differentiation():
    tx = cage.cage(RULES, 2.0)

    def total(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, tx.init(params), params)
        return jnp.sum(updates["kernel"] ** 2)

    params = {"kernel": jnp.linspace(-1, 1, 16).reshape(8, 2)}
    assert total(params) > 0
    gradient = jax.grad(total)(params)
    chex.assert_trees_all_equal(gradient, {"kernel": jnp.zeros((8, 2))})


# --- the frozen grid -----------------------------------------------------------------

QUEST = cage.quest(3, hadamard=None)
QUEST_RULES = cage.Rules([(r".*kernel", QUEST)])


def quest_scale(x):
    """The published clipping point over half of 2**3 - 1 steps, by column."""
    return 2.0510683541 * np.sqrt(np.mean(x**2, 0, keepdims=True)) / 3.5


def quest_rounded(x, scale):
    return (np.clip(np.floor(x / scale), -4, 3) + 0.5) * scale


@pytest.mark.parametrize("placement", ["decoupled", "post_step"])
def test_frozen_grid_is_that_of_the_first_pull(x64, placement, start):
    params, gradients = start
    lr, strength = table(LEARNING_RATE), table(STRENGTH)
    tx = getattr(cage, placement)(
        optax.sgd(lr), QUEST_RULES, strength, lr, freeze_scale=True
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
    got = cage.fake_quant(trajectory[-1], QUEST_RULES, grid=grids)["kernel"]
    chex.assert_trees_all_close(got, want, **FLOAT64)
    shipped = cage.quantize(trajectory[-1], QUEST_RULES, grid=grids)
    chex.assert_trees_all_close(shipped["kernel"].scale, scale, **FLOAT64)
    chex.assert_trees_all_equal(
        np.asarray(shipped["kernel"].codes.astype(jnp.int8)),
        np.floor(want / scale).astype(np.int8),
    )


def test_silent_grids_are_those_found_in_the_array(rng):
    params = {"kernel": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)}
    state = cage.cage(QUEST_RULES, 1.0, freeze_scale=True).init(params)
    chex.assert_trees_all_equal(
        cage.fake_quant(params, QUEST_RULES, grid=state.grids),
        cage.fake_quant(params, QUEST_RULES),
    )


def test_frozen_zero_point(rng):
    rules = cage.Rules([(".*", cage.int4(symmetric=False))])
    x = jnp.asarray(rng.uniform(1, 2, size=(8, 3)), jnp.float32)
    tx = cage.cage(rules, 1.0, freeze_scale=True)
    _, state = tx.update(jnp.zeros_like(x), tx.init(x), x)
    (grid,) = state.grids.values()
    # All values positive: the range starts at zero, whose code is the lowest.
    chex.assert_trees_all_equal(grid.zero_point, jnp.full((1, 3), -8.0))
    _, later = tx.update(jnp.zeros_like(x), state, -2 * x)
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

    def pull(freeze_scale):
        tx = cage.decoupled(
            optax.sgd(0.1), rules, 1.0, 0.1, freeze_scale=freeze_scale, statistics=True
        )

        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jnp.zeros_like(x), state, x)
            return (x + updates, state), None

        (last, state), _ = jax.lax.scan(step, (x, tx.init(x)), length=1000)
        drift = np.linalg.norm(last) / np.linalg.norm(x) - 1
        # The statistic is of the weights before the last step.
        assert abs(tree_get(state, "norm_drift") - drift) < 0.01 * (1 + drift)
        return drift

    assert least < pull(False) < most
    # Rounding once: at 2 bits the error of 0.345 rms takes 6 % from the norm.
    assert abs(pull(True)) < 0.08


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
        tx = optax.chain(cage.cage(RULES, strength, statistics=True), optax.sgd(lr))
    else:
        wrap = getattr(cage, placement)
        tx = wrap(optax.sgd(lr), RULES, strength, lr, statistics=True)
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
        optax.sgd(lr), QUEST_RULES, 1.0, lr, freeze_scale=True, statistics=True
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


def test_statistics_of_zeros_are_finite():
    params = {"kernel": jnp.zeros((8, 3))}
    tx = cage.cage(RULES, 1.0, statistics=True)
    _, state = tx.update(params, tx.init(params), params)
    measured = state.statistics._asdict()
    assert measured.pop("correction_strength") == 1
    chex.assert_trees_all_equal(measured, jax.tree.map(jnp.zeros_like, measured))


# --- the silent phase does no work ---------------------------------------------------


def primitives(jaxpr, *, in_branches, inside=False):
    """The names of all primitives, inside conditional branches or outside of them."""
    found = set()
    for equation in jaxpr.eqns:
        branch = equation.primitive.name == "cond"
        if inside == in_branches:
            found.add(equation.primitive.name)
        if branch and not in_branches:
            continue
        for inner in jaxprs_in_params(equation.params):
            found |= primitives(inner, in_branches=in_branches, inside=inside or branch)
    return found


@pytest.mark.parametrize("freeze_scale", [False, True])
@pytest.mark.parametrize(
    ("quantizer", "work", "instruction"),
    [
        # Rounding on a known grid is elementwise: it costs no pass over memory.
        (cage.int4(), {"reduce_max"}, "reduce"),
        (cage.int4(hadamard=8), {"reduce_max", "round", "dot_general"}, "dot"),
    ],
    ids=["plain", "rotated"],
)
def test_passes_over_an_array_stand_in_a_branch(
    quantizer, work, instruction, freeze_scale
):
    params = {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}
    rules = cage.Rules([("kernel", quantizer)])
    strength = cage.silence_then_ramp(100)
    tx = cage.decoupled(optax.sgd(0.1), rules, strength, 0.1, freeze_scale=freeze_scale)
    arguments = params, tx.init(params), params
    jaxpr = jax.make_jaxpr(tx.update)(*arguments).jaxpr
    assert work <= primitives(jaxpr, in_branches=True)
    assert not work & primitives(jaxpr, in_branches=False)
    # The compiler leaves it there.
    text = jax.jit(tx.update).lower(*arguments).compile().as_text()
    assert "conditional(" in text
    assert f" {instruction}(" in text
    assert f" {instruction}(" not in reached_without_a_branch(text)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "strength", [1.0, cage.silence_then_ramp(100)], ids=["constant", "ramp"]
)
@pytest.mark.parametrize(
    "quantizer", [cage.int4(group_size=128), cage.quest(4)], ids=str
)
def test_one_parameter_at_a_time_is_in_memory(quantizer, strength):
    shape = (1024, 512)
    bytes_each = 4 * shape[0] * shape[1]
    rules = cage.Rules([(".*", quantizer)])
    tx = cage.cage_adamw(1e-3, rules, strength)

    def step(gradients, params, state):  # in the order of what it donates
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def temporaries(count):
        params = [jax.ShapeDtypeStruct(shape, jnp.float32)] * count
        state = jax.eval_shape(tx.init, params)
        step_of_count = jax.jit(step, donate_argnums=(1, 2))
        compiled = step_of_count.lower(params, params, state).compile()
        return compiled.memory_analysis().temp_size_in_bytes / bytes_each

    assert temporaries(12) <= 4
    assert temporaries(12) <= 1.5 * temporaries(1) + 0.1


def reached_without_a_branch(text):
    """The text of the computations that an HLO module runs unconditionally."""
    bodies, entry = {}, None
    for block in re.split(r"\n(?=\S)", text):
        header = re.match(r"(ENTRY )?%?([\w.\-]+) ", block)
        if header:
            bodies[header[2]] = block
            entry = header[2] if header[1] else entry
    seen, queue = set(), [entry]
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in bodies[name].splitlines()[1:]:
            if " conditional(" not in line:
                queue += [n for n in re.findall(r"%?([\w.\-]+)", line) if n in bodies]
    return "\n".join(bodies[name] for name in seen)


@pytest.mark.parametrize("strength", [0.0, 0, optax.constant_schedule(0.0)])
def test_a_known_zero_adds_nothing(strength):
    params = {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}
    tx = cage.cage(RULES, strength)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    assert jaxpr.outvars[:2] == jaxpr.invars[:2]
    names = primitives(jaxpr, in_branches=False) | primitives(jaxpr, in_branches=True)
    assert not names & {"round", "cond", "reduce_max", "mul"}


# --- wrong placement and bad input ---------------------------------------------------


def test_an_optimizer_in_place_of_rules():
    with pytest.raises(TypeError, match=r"`rules` must be Rules.*optax\.chain\(cage"):
        cage.cage(optax.adam(1e-3), 1.0)
    with pytest.raises(TypeError, match="`rules` must be Rules; got list"):
        cage.cage([(".*", cage.int4())], 1.0)


@pytest.mark.parametrize("wrap", [cage.decoupled, cage.post_step])
def test_rules_in_place_of_the_optimizer(wrap):
    with pytest.raises(TypeError, match=rf"`inner`.*{wrap.__name__}\(optax.adamw"):
        wrap(RULES, RULES, 1.0, 1e-3)
    with pytest.raises(TypeError, match=r"got Rules\. The optimizer comes first"):
        wrap(RULES, optax.adam(1e-3), 1.0, 1e-3)
    with pytest.raises(TypeError, match="`inner` must be an optimizer"):
        wrap(optax.adam, RULES, 1.0, 1e-3)


@pytest.mark.parametrize("wrap", [cage.decoupled, cage.post_step])
@pytest.mark.parametrize(
    "inner",
    [
        optax.chain(cage.cage(RULES, 1.0), optax.sgd(0.1)),
        cage.cage_sgd(0.1, RULES, 1.0),
        optax.MultiSteps(cage.cage_adamw(0.1, RULES, 1.0), 2).gradient_transformation(),
        optax.inject_hyperparams(cage.cage_sgd)(0.1, RULES, strength=1.0),
    ],
    ids=["chain", "alias", "multi_steps", "inject"],
)
def test_a_double_correction_is_found_at_init(wrap, inner):
    tx = wrap(inner, RULES, 1.0, 0.1)
    with pytest.raises(ValueError, match=rf"{wrap.__name__} would pull twice"):
        tx.init({"kernel": jnp.ones((8, 3))})


BUILD = {
    "cage": lambda strength, lr: cage.cage(RULES, strength),
    "decoupled": lambda strength, lr: cage.decoupled(optax.sgd(1), RULES, strength, lr),
    "post_step": lambda strength, lr: cage.post_step(optax.sgd(1), RULES, strength, lr),
    "cage_adamw": lambda strength, lr: cage.cage_adamw(lr, RULES, strength),
    "cage_sgd": lambda strength, lr: cage.cage_sgd(lr, RULES, strength),
}


@pytest.mark.parametrize("name", list(BUILD))
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (-1.0, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("10", TypeError),
        (True, TypeError),
        (None, TypeError),
    ],
    ids=str,
)
def test_bad_numbers(name, value, kind):
    text = rf"`strength` must be .*got {value!r}\."
    if value is None and name != "cage":
        text = "`total_steps` must be given"  # without a strength they recommend one
    with pytest.raises(kind, match=text):
        BUILD[name](value, 0.1)
    if name != "cage":
        with pytest.raises(kind, match=rf"`learning_rate` must be .*got {value!r}\."):
            BUILD[name](1.0, value)


def _condition(count):
    return 1.0 if count > 3 else 0.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            cage.silence_then_ramp,
            r"got silence_then_ramp, which raised TypeError, `tot",
        ),
        (optax.linear_schedule, "got linear_schedule, which raised TypeError"),
        (lambda count: None, "which returned None"),
        (lambda count: jnp.ones(3), r"which returned ShapeDtypeStruct\(shape=\(3,\)"),
        (optax.adam(1e-3), "got an optimizer"),
    ],
    ids=["not called", "not called of optax", "nothing", "three", "optimizer"],
)
@pytest.mark.parametrize("name", list(BUILD))
def test_schedules_that_are_none(name, value, text):
    with pytest.raises(TypeError, match=f"`strength` must be .*{text}"):
        BUILD[name](value, 0.1)
    if name != "cage":
        with pytest.raises(TypeError, match=f"`learning_rate` must be .*{text}"):
            BUILD[name](1.0, value)


@pytest.mark.parametrize("name", list(BUILD))
def test_a_schedule_with_a_condition_runs_outside_of_jit(name, standard_promotion):
    params = {"kernel": jnp.linspace(-1, 1, 16).reshape(8, 2)}
    tx = BUILD[name](_condition, 0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    assert jnp.all(jnp.isfinite(updates["kernel"]))


@pytest.mark.parametrize("name", ["decoupled", "post_step", "cage_adamw", "cage_sgd"])
def test_a_strength_that_looks_like_a_number_of_steps_is_warned_of(name):
    with pytest.warns(UserWarning, match="moves a weight by 100 of its distance"):
        BUILD[name](1000.0, 0.1)


@pytest.mark.parametrize("wrap", [cage.decoupled, cage.post_step])
def test_any_optimizer_takes_the_recommended_strength(wrap, standard_promotion):
    rate = optax.cosine_decay_schedule(0.01, 100)
    params = {"kernel": jnp.linspace(-1, 1, 16).reshape(8, 2)}
    chosen = cage.recommended(rate, 100)
    one = wrap(optax.lion(rate), RULES, learning_rate=rate, total_steps=100)
    other = wrap(optax.lion(rate), RULES, learning_rate=rate, **chosen)
    plain = optax.lion(rate)

    def train(tx):
        def step(_, carry):
            params, state = carry
            updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 90, step, (params, tx.init(params)))[0]

    expected = train(other)
    chex.assert_trees_all_equal(train(one), expected)
    assert not jnp.array_equal(train(plain)["kernel"], expected["kernel"])


def test_a_state_of_another_optimizer_is_said(standard_promotion):
    params = {"kernel": jnp.ones((8, 3))}
    tx = cage.cage_adamw(0.1, RULES, 1.0)
    plain = optax.adamw(0.1).init(params)
    with pytest.raises(ValueError, match=r"got a tuple without CAGE.*tx\.init"):
        tx.update(params, plain, params)
    tx.update(params, (plain, tx.init(params)[1]), params)
    for name, options in {
        "statistics": {"strength": 1.0, "statistics": True},
        "freeze_scale": {"strength": 1.0, "freeze_scale": True},
        "curvature": {"total_steps": 100},
    }.items():
        other = cage.cage_adamw(0.1, RULES, **options)
        with pytest.raises(ValueError, match=f"an optimizer without `{name}`"):
            other.update(params, tx.init(params), params)


def test_one_of_several_rules_that_decides_nothing_warns_at_init():
    rules = cage.Rules([(r".*kernal", cage.int8()), (r".*kernel", cage.int4())])
    params = {"kernel": jnp.ones((8, 3))}
    tx = cage.cage_sgd(0.1, rules, 1.0)
    with pytest.warns(UserWarning, match=r"'\.\*kernal' matches no .* is 'kernel'"):
        tx.init(params)
    # A part of the parameters says nothing about the whole table.
    parts = optax.masked(tx, {"kernel": True, "head": {"kernal": False}})
    parts.init(params | {"head": {"kernal": jnp.ones((8, 3))}})


@pytest.mark.parametrize("name", list(BUILD))
def test_rules_that_match_nothing_warn_at_init(name):
    with pytest.warns(UserWarning, match="CAGE has nothing to pull"):
        BUILD[name](1.0, 0.1).init({"weights": jnp.ones((8, 3))})


@pytest.mark.parametrize("name", list(BUILD))
@pytest.mark.parametrize(
    ("kernel", "kind", "text"),
    [
        (jnp.ones((8, 3), jnp.int32), TypeError, ".*must be real floating.*int32"),
        (jnp.ones((6, 3)), ValueError, "`group_size` must divide axis -2.*(6, 3)"),
        (jnp.ones(8), ValueError, "`axis` must be within the dimensions"),
    ],
    ids=["integers", "group", "axis"],
)
def test_a_parameter_that_does_not_fit_is_named_at_init(name, kernel, kind, text):
    tx = BUILD[name](1.0, 0.1)
    with pytest.raises(kind, match=f"^`layers/1/kernel`: {text}"):
        tx.init({"layers": [{}, {"kernel": kernel}]})


def test_two_parameters_with_one_path_are_refused():
    # The state is by path.
    with pytest.raises(ValueError, match="`0/kernel`: paths must tell"):
        cage.cage(RULES, 1.0).init(
            {
                "params": [{"kernel": jnp.ones((8, 3))}],
                "0": {"kernel": jnp.ones((8, 3))},
            }
        )


def test_init_and_later_steps_compile_nothing(compilations, start, standard_promotion):
    params, gradients = jax.tree.map(jnp.asarray, start)
    tx = cage.cage_adamw(0.1, RULES, 2.0)
    jax.block_until_ready(tx.init(params))  # zeros for Adam's moments
    with compilations(0):
        state = cage.cage_adamw(0.1, RULES, 2.0).init(params)
    tx.update(gradients[0], state, params)
    with compilations(0):
        tx.update(gradients[1], state, params)
