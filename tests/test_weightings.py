"""Weights by thresholds and flips: what NumPy makes of them, and their dose."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import Halves, assert_raises
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.tree_utils import tree_get
from oracles import hadamard

import cage_jax as cage
from cage_jax import weightings
from cage_jax.optim.curvature import Step
from cage_jax.quantizers.scales import AbsMax, Fixed

# Positions in float32, and their differences from a value, over the mean of weights.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
INT4 = np.arange(-7.0, 8)
FP4 = np.array([0.5, 1, 1.5, 2, 3, 4, 6])
FP4 = np.concatenate([-FP4[::-1], [0], FP4])
SOURCES = {"distance": weightings.by_distance, "flips": weightings.by_flips}


def absmax(x, top):
    return np.abs(x).max(0, keepdims=True) / top


def in_groups(x, size, scale):
    """Scales of groups along the first axis, for each element."""
    parts = x.reshape(-1, size, x.shape[-1])
    each = [np.broadcast_to(scale(part), part.shape) for part in parts]
    return np.concatenate(each)


def power_of_two(x):
    """Finds the scale of FP4 as the OCP does: its largest value, 6, is below 2 ** 3."""
    return 2.0 ** (np.floor(np.log2(np.abs(x).max(0, keepdims=True))) - 2)


def gaussian(x):
    """The step of QuEST's 4 bits: 15 of them from end to end."""
    return 2 * 2.5139305786 / 15 * np.sqrt((x**2).mean(0, keepdims=True))


def minmax(x):
    top, bottom = x.max(0, keepdims=True), x.min(0, keepdims=True)
    return (np.maximum(top, 0) - np.minimum(bottom, 0)) / 15


def shifted(x):
    """The zero points, codes from -8 to 7."""
    return np.round(-8 - np.minimum(x.min(0, keepdims=True), 0) / minmax(x))


# Of each its quantizer, the steps of weights, and the values in such steps.
CASES = {
    "int4": (cage.int4(), lambda x: absmax(x, 7), INT4),
    "int4 groups": (
        cage.int4(group_size=16),
        lambda x: in_groups(x, 16, lambda part: absmax(part, 7)),
        INT4,
    ),
    "quest": (cage.quest(4, hadamard=32), gaussian, np.arange(-8, 8) + 0.5),
    "nf4": (
        cage.nf4(group_size=32),
        lambda x: in_groups(x, 32, lambda part: absmax(part, 1)),
        cage.formats.NF4.values,
    ),
    "mxfp4": (cage.mxfp4(), lambda x: in_groups(x, 32, power_of_two), FP4),
    "binary": (
        cage.Quantizer(cage.formats.Codebook((-1.0, 1.0)), AbsMax()),
        lambda x: absmax(x, 1),
        np.array([-1.0, 1]),
    ),
    "asymmetric": (cage.int4(symmetric=False), minmax, np.arange(-8.0, 8)),
}


def rotation_of(quantizer, rows):
    if quantizer.hadamard is None:
        return np.eye(rows)
    blocks = np.eye(rows // quantizer.hadamard)
    return np.kron(blocks, hadamard(quantizer.hadamard))


def placed(name, x):
    """In the basis: the error of each weight, and its distance, by looking at all."""
    quantizer, step, values = CASES[name]
    turned = rotation_of(quantizer, len(x)) @ x
    steps = step(turned)
    zero = shifted(turned) if quantizer.asymmetric else 0
    position = turned / steps + zero
    nearest = np.abs(position[..., None] - values).argmin(-1)
    value = values[nearest]
    side = nearest + np.where(position >= value, 1, -1)
    ends = side == -1, side == len(values)
    side = np.select(ends, [1, len(values) - 2], side)
    half = np.abs(values[side] - value) / 2
    away = np.minimum(np.abs(position - value) / half, 1)
    return turned - (value - zero) * steps, away


def fixed(*values):
    """The quantizer to these values."""
    return cage.Quantizer(cage.formats.Codebook(values), Fixed(1.0))


def coupled(rules, source):
    """Makes updates that are the pull alone: the learning rate is -1."""
    return optax.chain(
        cage.coupled(rules, strength=1.0, curvature=source), optax.sgd(-1.0)
    )


def pulled(rules, source, params, steps=1):
    """What is added to gradients of zero, jitted."""
    tx, zeros = coupled(rules, source), jax.tree.map(np.zeros_like, params)
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(steps):
        updates, state = update(zeros, state, params)
    return updates, state


def weighed(source, rules, x):
    """What a source makes of errors that are all 1; of one without a state."""

    @jax.jit
    def weights(params):
        step = Step(params, params, rules, None, {})
        return source.weigh(jax.tree.map(jnp.ones_like, params), (), step)

    return jax.tree.map(np.asarray, weights(narrow(x)))


def narrow(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize("name", CASES)
def test_weights_by_distance(name, rng):
    # Another parameter, since the mean is that of all.
    rules = cage.Rules([("w", CASES[name][0]), ("v", cage.int4())])
    x = {"w": rng.normal(size=(64, 3)), "v": rng.normal(size=(8, 5))}
    params = narrow(x | {"bias": np.ones(3)})
    options = (1.0, False), (2.5, True)
    txs = [coupled(rules, weightings.by_distance(p, near=near)) for p, near in options]

    @jax.jit
    def every(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return [tx.update(zeros, tx.init(params), params)[0] for tx in txs]

    found = {"w": placed(name, x["w"]), "v": placed("int4", x["v"])}
    for (power, near), updates in zip(options, every(params)):
        weights = {k: (a if near else 1 - a) ** power for k, (_, a) in found.items()}
        mean = np.concatenate([each.ravel() for each in weights.values()]).mean()
        for k, (error, _) in found.items():
            back = rotation_of(
                CASES[name][0] if k == "w" else cage.int4(), len(error)
            ).T
            expected = back @ (weights[k] / mean * error)
            np.testing.assert_allclose(updates[k], expected, **CLOSE)
        np.testing.assert_array_equal(updates["bias"], 0)


def test_beyond_the_grid_the_last_step_goes_on():
    rules = cage.Rules([("w", fixed(-1.0, 0.0, 3.0))])
    position = np.array([[-9, -1.25, -1, -0.75, 0, 0.75, 2.25, 3, 3.75, 9]]).T
    away = np.array([[1, 0.5, 0, 0.5, 0, 0.5, 0.5, 0, 0.5, 1]]).T
    weights = weighed(weightings.by_distance(near=True), rules, {"w": position})
    np.testing.assert_allclose(weights["w"] * away.mean(), away, rtol=1e-6)


@pytest.mark.parametrize("name", SOURCES)
def test_the_dose_stays_the_same(name, rng):
    rules = cage.Rules([(".*", cage.int4(axis=-2, group_size=8))])
    shapes = {"v": (16, 4), "w": (2, 8, 3)}
    source = SOURCES[name]()
    state = source.init({k: (cage.int4(), jnp.zeros(s)) for k, s in shapes.items()})

    @jax.jit
    def weights_of(params, state):
        """Weighs all parameters, and the only one that is pulled."""
        step = Step(params, params, rules, None, {})
        state = source.update(state, step)
        ones = jax.tree.map(jnp.ones_like, params)
        one = source.weigh({"v": ones["v"]}, state, step)["v"]
        return state, source.weigh(ones, state, step), one

    for _ in range(4):
        params = narrow({k: rng.normal(size=shape) for k, shape in shapes.items()})
        state, weights, one = weights_of(params, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(weights, params)
        every = np.concatenate([np.ravel(each) for each in weights.values()])
        assert every.sum() == pytest.approx(every.size, rel=1e-5)
    assert every.std() > 0.1
    assert np.sum(one) == pytest.approx(one.size, rel=1e-5)


def test_flips_by_hand():
    # Steps of 0.5: at 1.2 the code is 2, at 1.3 it is 3.
    rules = cage.Rules([("w", cage.int4())])
    last = np.array([[1.2, 1.2], [1.3, 1.2], [1.2, 1.3], [1.2, 1.3], [1.3, 1.3]])
    flips = np.array([[0, 0], [1, 0], [1, 1], [0, 0], [1, 0]])
    source = weightings.by_flips(0.75, floor=0.5)
    tx = coupled(rules, source)
    zeros = narrow({"w": np.zeros((3, 2))})
    update, state = jax.jit(tx.update), tx.init(zeros)
    frequency = np.zeros((3, 2))
    for row, flipped in zip(last, flips):
        x = np.array([[3.5, -3.5], [0.6, -0.1], row])
        updates, state = update(zeros, state, narrow({"w": x}))
        frequency[2] = 0.75 * frequency[2] + 0.25 * flipped
        found = tree_get(state, "flip_frequency")["w"]
        np.testing.assert_allclose(found, frequency, rtol=1e-6)
        mean = frequency.mean()
        weights = (frequency / mean + 0.5) / 1.5 if mean else 1
        error = x - np.round(x / 0.5) * 0.5
        np.testing.assert_allclose(updates["w"], weights * error, **CLOSE)
    assert tree_get(state, "codes_before")["w"].dtype == jnp.int8
    assert tree_get(state, "steps") == 5


def test_flips_of_a_rotated_parameter_are_those_of_rotated_codes(rng):
    rules = cage.Rules([("w", CASES["quest"][0])])
    rotation = rotation_of(CASES["quest"][0], 64)
    source = weightings.by_flips(0.9, floor=0.2)
    tx = coupled(rules, source)
    walk = rng.normal(size=(64, 3)) + rng.normal(size=(4, 64, 3)).cumsum(0) / 10
    zeros = narrow({"w": np.zeros((64, 3))})
    update, state, codes, frequency = jax.jit(tx.update), tx.init(zeros), None, 0
    for x in walk:
        updates, state = update(zeros, state, narrow({"w": x}))
        error, _ = placed("quest", x)
        turned = rotation @ x
        after = np.round((turned - error) / gaussian(turned) - 0.5)
        flipped = 0 if codes is None else after != codes
        codes, frequency = after, 0.9 * frequency + 0.1 * flipped
    found = tree_get(state, "flip_frequency")["w"]
    np.testing.assert_allclose(found, frequency, rtol=1e-5)
    weights = (frequency / frequency.mean() + 0.2) / 1.2
    expected = rotation.T @ (weights * error)
    np.testing.assert_allclose(updates["w"], expected, **CLOSE)


def test_a_learned_grid_is_the_one_that_is_trained(rng):
    rules = cage.Rules([("w", cage.lsq(4))])
    x = rng.normal(size=(16, 3))
    variables = cage.with_grids(narrow({"w": x}), rules)
    scale = np.full((1, 1), 0.37)
    grid = variables["grids"]["w"]
    variables["grids"]["w"] = grid._replace(scale=jnp.asarray(scale, jnp.float32))
    updates, _ = pulled(rules, weightings.by_distance(near=True), variables)
    position = x / scale
    value = np.clip(np.round(position), -8, 7)
    weights = np.minimum(2 * np.abs(position - value), 1)
    expected = weights / weights.mean() * (x - value * scale)
    np.testing.assert_allclose(updates["params"]["w"], expected, **CLOSE)
    _, state = pulled(rules, weightings.by_flips(), variables)
    codes = tree_get(state, "codes_before")["w"]
    np.testing.assert_array_equal(codes, value)


@pytest.mark.parametrize("place", [cage.decoupled, cage.post_step])
def test_weights_are_those_before_the_update(place, rng):
    rules = cage.Rules([("w", cage.int4())])
    x, g = rng.normal(size=(2, 8, 3))
    source = weightings.by_distance()
    sgd = optax.sgd(0.1)
    tx = place(sgd, rules, learning_rate=0.1, strength=3.0, curvature=source)
    params = narrow({"w": x})
    updates, _ = jax.jit(tx.update)(narrow({"w": g}), tx.init(params), params)
    _, away = placed("int4", x)
    weights = (1 - away) / (1 - away).mean()
    error, _ = placed("int4", x - 0.1 * g if place is cage.post_step else x)
    expected = -0.1 * g - 0.1 * 3 * weights * error
    np.testing.assert_allclose(updates["w"], expected, **CLOSE)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("name", "dtype"), [("distance", jnp.float32), ("flips", jnp.bfloat16)]
)
def test_with_adamw_statistics_and_a_silent_start(name, dtype, rng):
    rules = cage.Rules([("w", cage.int4())])
    strength = cage.silence_then_constant(5, 10.0, silence=0.5)
    tx = cage.cage_adamw(
        0.1, rules, strength=strength, curvature=SOURCES[name](), statistics=True
    )
    params = {"w": jnp.asarray(rng.normal(size=(8, 3)), dtype)}
    state, update = tx.init(params), jax.jit(tx.update)
    # Of the other dtype, traced only.
    other = {"w": jax.ShapeDtypeStruct((8, 3), jnp.bfloat16)}
    _, after = jax.eval_shape(tx.update, other, jax.eval_shape(tx.init, other), other)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, other), after)
    for _ in range(5):
        before = state
        updates, state = update(params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
        assert np.isfinite(np.float32(updates["w"])).all()
        params = optax.apply_updates(params, updates)
    assert tree_get(state, "correction_ratio") > 0


@pytest.mark.parametrize("name", SOURCES)
def test_sharded_like_on_one_device(name, rng):
    rules = cage.Rules([("v", cage.int4(group_size=16)), ("w", cage.int4())])
    walk = rng.normal(size=(3, 2, 128, 8)).cumsum(0)
    tx = coupled(rules, SOURCES[name]())

    def run(place):
        trees = [place(narrow({"v": v, "w": w})) for v, w in walk]
        zeros, state = jax.tree.map(jnp.zeros_like, trees[0]), tx.init(trees[0])
        update = jax.jit(tx.update)
        for params in trees:
            updates, state = update(zeros, state, params)
        return updates, state

    expected = jax.device_get(run(lambda tree: tree))
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
        sharding = NamedSharding(mesh, P("data", "model"))
        with jax.set_mesh(mesh):
            found = run(partial(jax.device_put, device=sharding))
        chex.assert_trees_all_close(  # sums in another order
            jax.device_get(found), expected, rtol=1e-6
        )
        for array in jax.tree.leaves(found):
            if array.ndim:
                assert array.sharding.is_equivalent_to(sharding, array.ndim), kind


def test_where_no_weight_is_left_all_are_one():
    # All on the grid, or all at a threshold and beyond.
    rules = cage.Rules([("w", fixed(0.0, 1.0))])
    for near, x in ((True, [[0.0], [1.0]]), (False, [[0.5], [5.0]])):
        source = weightings.by_distance(near=near)
        found = weighed(source, rules, {"w": np.array(x)})
        np.testing.assert_array_equal(found["w"], 1)


def test_what_is_no_number_stays_with_its_group(rng):
    rules = cage.Rules([("w", cage.int4())])
    x = rng.normal(size=(8, 3))
    x[2, 1] = np.nan
    for name, source in SOURCES.items():
        updates, _ = pulled(rules, source(), narrow({"w": x}), steps=2)
        updates = np.asarray(updates["w"])
        assert np.isfinite(updates).all(0).tolist() == [True, False, True], name
    updates, _ = pulled(rules, weightings.by_distance(), narrow({"w": x}))
    error, away = placed("int4", x[:, [0, 2]])
    mean = (1 - away).sum() / x.size  # the others have the weight 0
    expected = (1 - away) / mean * error
    updates = np.asarray(updates["w"])[:, [0, 2]]
    np.testing.assert_allclose(updates, expected, **CLOSE)


def test_numbers_out_of_range_are_refused():
    assert_raises(
        (
            partial(SOURCES[source], **{name: value}),
            ValueError,
            rf"`{name}` must .*; got .*\. Use ",
        )
        for source, name, value in (
            ("distance", "power", 0.0),
            ("distance", "power", -1.0),
            ("distance", "power", float("inf")),
            ("distance", "power", float("nan")),
            ("flips", "decay", 1.0),
            ("flips", "decay", -0.1),
            ("flips", "floor", -0.1),
            ("flips", "floor", float("inf")),
        )
    )


def test_what_has_no_codes_or_no_grid_is_refused():
    params = {"w": np.ones((4, 2), np.float32)}

    def weigh(source, quantizer):
        step = Step(params, params, cage.Rules([("w", quantizer)]), None, {})
        source.weigh(params, source.update(source.init(step.quantized), step), step)

    assert_raises(
        (partial(weigh, source(), quantizer), ValueError, rf"^`w`: .*{text}.*\. Use ")
        for source in SOURCES.values()
        for quantizer, text in (
            (Halves(), "codes of its own; got halves"),
            (cage.lsq(4), "`grid` must be given"),
        )
    )
