"""The recommended curvature: means of squared gradients by input and by output."""

import math

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cage_jax as cage
from cage_jax import curvature, weightings

CLOSE = {"rtol": 2e-5, "atol": 1e-6}
# By name: the quantizer, the shape, the axes of inputs and of outputs, and the length
# of the blocks of inputs that a rotation makes alike.
PARAMETERS = {
    "kernel": (cage.int4(group_size=8), (16, 8), (0,), (1,), 1),
    "transposed": (cage.int4(axis=-1), (6, 16), (1,), (0,), 1),
    "stack": (cage.int4(axis=-2), (3, 16, 8), (1,), (2,), 1),
    "query": (cage.int4(axis=0), (8, 2, 4), (0,), (1, 2), 1),
    "out": (cage.int4(axis=(0, 1)), (2, 4, 8), (0, 1), (2,), 1),
    "whole": (cage.int4(axis=None), (4, 8), (0,), (1,), 1),
    "vector": (cage.int4(axis=-1), (12,), (), (0,), 1),
    "rotated": (cage.quest(4, hadamard=8), (32, 8), (0,), (1,), 8),
}


def rules_of(names=PARAMETERS):
    return cage.Rules([(f"^{name}$", PARAMETERS[name][0]) for name in names])


RULES = rules_of()


def random_tree(rng, names=tuple(PARAMETERS), sizes=None):
    """Arrays whose rows and columns differ in size, and so do the arrays."""
    found = {}
    for name in names:
        shape = PARAMETERS[name][1]
        scale = np.exp(rng.normal())
        for axis in range(len(shape)):
            along = [-1 if i == axis else 1 for i in range(len(shape))]
            scale = scale * np.exp(rng.normal(size=shape[axis])).reshape(along)
        found[name] = np.float32(scale * rng.normal(size=shape))
    return found


def relative(x, axes):
    mean = x.mean(axes, keepdims=True)
    return x / mean


def factors_in_float64(gradients, decay, largest):
    """The weights and roots of each parameter from its gradients, in float64."""
    inputs, outputs, levels, sizes = {}, {}, {}, {}
    for name in gradients[0]:
        _, shape, ins, outs, block = PARAMETERS[name]
        squares = [np.square(np.float64(gradient[name])) for gradient in gradients]
        known = [x for x in squares if x.sum() < np.finfo(np.float32).max]
        mean = 0.0
        for square in known:
            mean = decay * mean + (1 - decay) * square
        mean = mean / (1 - decay ** len(known))
        by_input = mean.mean(outs, keepdims=True)
        if block > 1:
            parts = by_input.reshape(-1, block, 1).mean(1, keepdims=True)
            by_input = np.repeat(parts, block, 1).reshape(by_input.shape)
        inputs[name], outputs[name] = by_input, mean.mean(ins, keepdims=True)
        levels[name] = mean.mean(ins + outs, keepdims=True)
        sizes[name] = math.prod(shape) / levels[name].size
    count = sum(math.prod(each[1]) for each in PARAMETERS.values())

    def scaled(levels):
        total = sum(np.sum(sizes[name] * level) for name, level in levels.items())
        return {name: level * count / total for name, level in levels.items()}

    bounded = scaled(levels)
    for _ in range(4):
        bounded = scaled({n: np.minimum(x, largest) for n, x in bounded.items()})
    weights, roots = {}, {}
    for name, (_, _, ins, outs, _) in PARAMETERS.items():
        parts = []
        for vector, axes in ((inputs[name], ins), (outputs[name], outs)):
            most = np.sqrt(largest) * vector.mean(axes, keepdims=True)
            parts.append(relative(np.minimum(vector, most), axes))
        level = np.minimum(bounded[name], largest)
        weights[name] = np.minimum(level * parts[0] * parts[1], largest)
        roots[name] = np.sqrt(inputs[name] * relative(outputs[name], outs))
    return weights, roots


def errors_of(params):
    return {
        name: np.float64(x) - np.float64(cage.fake_quant(x, PARAMETERS[name][0]))
        for name, x in params.items()
    }


@pytest.mark.parametrize("coupled", [False, True])
def test_the_pull_is_that_of_the_formula(rng, coupled):
    """Also for stacks, kernels of three axes, vectors and rotations.

    Gradients that have a NaN, or whose squares are too large to add up, do not count.
    """
    params, gradients = random_tree(rng), [random_tree(rng) for _ in range(5)]
    options = {"decay": 0.5, "period": 2, "largest": 2.0}
    source = curvature.fisher(factored=True, times_root=coupled, **options)
    tx = cage.coupled(RULES, strength=0.5, curvature=source)
    update, errors = jax.jit(tx.update), errors_of(params)
    for damaged in (False, True):
        if damaged:
            gradients[0]["kernel"][3, 4] = np.nan
            gradients[2]["stack"][1, 2, 3] = np.inf
            gradients[2]["transposed"][:] = 6e18  # means are finite, not their sum
        state = tx.init(params)
        for gradient in gradients:
            updates, state = update(gradient, state, params)
        weights, roots = factors_in_float64(gradients[::2], 0.5, 2.0)
        for name, error in errors.items():
            pull = 0.5 * weights[name] * error * (roots[name] if coupled else 1)
            expected = np.float64(gradients[-1][name]) + pull
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                updates[name] / scale,
                expected / scale,
                rtol=1e-5,
                atol=1e-6,
                err_msg=name,
            )


def test_gradients_are_read_only_while_the_pull_is_near():
    """Every tenth step, from 100 steps before the strength is positive."""
    rules = cage.Rules([("w", cage.int4())])
    source = curvature.fisher(factored=True)
    strength = cage.silence_then_constant(250, 1.0, silence=0.5)
    tx = cage.coupled(rules, strength=strength, curvature=source)
    params = {"w": jnp.ones((4, 2))}

    def step(state, _):
        _, state = tx.update({"w": jnp.ones((4, 2))}, state, params)
        return state, jnp.stack(state.curvature.estimates).ravel()

    scan = jax.jit(lambda state: jax.lax.scan(step, state, length=60))
    _, estimates = scan(tx.init(params))
    expected = np.maximum(0, np.arange(60) - 15) // 10
    np.testing.assert_array_equal(estimates, np.stack([expected] * 2, axis=1))


def test_before_the_first_gradient_errors_are_not_weighted(rng):
    params = random_tree(rng)
    source = curvature.fisher(factored=True)
    state = source.init(RULES.quantized(params))
    step = curvature.Step(params, params, RULES, None, {}, is_near=jnp.array(False))
    errors = {name: jnp.ones_like(x) for name, x in params.items()}
    weighted = source.weigh(errors, source.update(state, step), step)
    for name, error in errors.items():
        np.testing.assert_array_equal(weighted[name], error, err_msg=name)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("explicit", [False, True])
def test_vectors_of_shards_are_those_of_one_device(rng, explicit):
    names = ["kernel", "stack", "query", "rotated"]
    params, gradient = random_tree(rng, names), random_tree(rng, names)
    tx = cage.cage_adamw(
        0.1,
        rules_of(names),
        strength=1.0,
        curvature=curvature.fisher(factored=True, period=2),
    )

    @jax.jit
    def step(params, state, gradient):
        return tx.update(gradient, state, params)

    expected, _ = step(params, tx.init(params), gradient)
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(kind,) * 2)
    specs = {
        "kernel": jax.P("rows", "columns"),
        "stack": jax.P(None, "rows", "columns"),
        "query": jax.P("rows", "columns"),
        "rotated": jax.P("rows", "columns"),
    }

    def placed(tree):
        return {
            name: jax.device_put(x, jax.NamedSharding(mesh, specs[name]))
            for name, x in tree.items()
        }

    with jax.set_mesh(mesh):
        params, gradient = placed(params), placed(gradient)
        state = jax.jit(tx.init)(params)
        found, state = step(params, state, gradient)
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], **CLOSE, err_msg=name)


@pytest.mark.usefixtures("standard_promotion")
def test_devices_send_vectors_and_only_where_gradients_are_read():
    """Outside of a branch the published form has the same sums over devices."""
    kind = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(kind,) * 2)
    sharding = jax.NamedSharding(mesh, jax.P("rows", "columns"))
    params = {"kernel": jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding)}
    rules = cage.Rules([("kernel", cage.int4(group_size=8))])
    sent = []
    for options in ({"strength": 1.0}, {"total_steps": 1000}):
        tx = cage.cage_adamw(0.1, rules, **options)
        state = jax.eval_shape(tx.init, params)
        step = jax.jit(lambda g, s, p, tx=tx: tx.update(g, s, p))
        text = step.lower(params, state, params).compile().as_text()
        entry = text[text.index("\nENTRY") :]
        sent.append((entry.count(" all-reduce("), hlo.moved(text).collectives))
    assert [outside for outside, _ in sent] == [0, 0]
    assert not sent[0][1]
    # Each device sends its part of both vectors, and a few numbers for their means.
    assert set(sent[1][1]) <= {"all-reduce", "all-gather"}
    assert 0 < sum(sent[1][1].values()) <= 4 * (64 + 32 + 32)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "source",
    [
        curvature.fisher(factored=True),
        curvature.fisher(relative=True),
        curvature.fisher(relative=False, largest=1.5),
        weightings.by_distance(),
    ],
    ids=["factored", "relative", "of each array", "distance"],
)
def test_inside_shard_map_the_mean_is_over_all_devices(source, rng):
    """Also if parameters vary along different axes, or along none."""
    specs = {
        "first": jax.P("a", None, None),
        "second": jax.P("b", None, None),
        "both": jax.P(("a", "b"), None, None),
        "copied": jax.P(),
    }
    shapes = {"first": (4, 8, 4), "second": (2, 8, 4), "both": (8, 8, 4)}
    rules = cage.Rules([(".*", cage.int4(axis=-2))])
    gradients = {
        name: np.float32(np.exp(2 * rng.normal()) * rng.normal(size=shape))
        for name, shape in (shapes | {"copied": (8, 4)}).items()
    }

    def weights(gradients):
        state = source.init(rules.quantized(gradients))
        near = jnp.array(True)
        step = curvature.Step(gradients, gradients, rules, None, {}, is_near=near)
        ones = jax.tree.map(jnp.ones_like, gradients)
        return source.weigh(ones, source.update(state, step), step)

    expected = jax.jit(weights)(gradients)
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)
    mapped = jax.shard_map(weights, mesh=mesh, in_specs=(specs,), out_specs=specs)
    found = jax.jit(mapped)(gradients)
    for name in specs:
        np.testing.assert_allclose(found[name], expected[name], **CLOSE, err_msg=name)
