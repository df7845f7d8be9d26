"""Rotations chosen by the errors of weights and inputs, in float64 NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import absmax_round, hadamard

import cage_jax as cage
from cage_jax import contrib

SIZE = 16
TURN = hadamard(SIZE)
PAIR = cage.int4(hadamard=SIZE), cage.int4(axis=-1, hadamard=SIZE)
PLAIN = cage.int4(axis=-2), cage.int4(axis=-1)
ROTATED = cage.Rules([(r"layers/.*", *PAIR), (r"head", PAIR[0])])


def apply(params, x):
    for kernel in params["layers"]:
        x = jnp.tanh(x @ kernel)
    return x @ params["head"]


def shares(x, axis):
    """Squared errors with and without a rotation, as shares of the squares."""
    turned = TURN @ x if axis == -2 else x @ TURN.T
    kept = [absmax_round(each, axis=axis) for each in (turned, x)]
    errors = np.sum((turned - kept[0]) ** 2), np.sum((x - kept[1]) ** 2)
    return np.array(errors) / np.sum(x**2)


def measure_by_numpy(params, batches):
    """The errors of each product by path, both rotated and neither."""
    inputs = [np.asarray(np.concatenate(batches))]
    for kernel in params["layers"]:
        inputs.append(np.tanh(inputs[-1] @ kernel))
    found = {
        f"layers/{i}": shares(kernel, -2) + shares(inputs[i], -1)
        for i, kernel in enumerate(params["layers"])
    }
    return found | {"head": shares(params["head"], -2)}  # whose input is not quantized


def drawn(rng):
    """Weights with outliers in rows, which a rotation spreads, or near the grid."""
    grid = rng.integers(-7, 8, (SIZE, SIZE)) + rng.normal(size=(SIZE, SIZE)) / 50
    grid[0] = 7
    outlier = rng.normal(size=(SIZE, SIZE))
    outlier[3] *= 20
    kernels = [grid, outlier, grid[:, ::-1].copy(), rng.normal(size=(SIZE, SIZE))]
    return {"layers": [kernel / 8 for kernel in kernels], "head": grid}


def test_each_product_gets_the_smaller_error_of_weights_and_inputs(x64, rng):
    params = drawn(rng)
    batches = [rng.normal(size=(8, SIZE)) for _ in range(2)]
    for x in batches:
        x[:, 5] *= 10  # so that the first layer is rotated, against its weight
    measured = measure_by_numpy(params, batches)
    given = jax.tree.map(jnp.asarray, params)
    chosen = contrib.choose_rotations(
        apply, ROTATED, given, [(jnp.asarray(x),) for x in batches]
    )
    by_weights = cage.choose_rotation(given, ROTATED)
    assert by_weights.match("layers/0").hadamard is None
    for path, errors in measured.items():
        rotated = chosen.match(path).hadamard is not None
        assert rotated == (errors[0] <= errors[1]), (path, errors)
        inputs = chosen.match_inputs(path)
        if path != "head":
            assert (inputs.hadamard is not None) == rotated
            assert inputs in (PAIR[1], PLAIN[1])
    choices = {chosen.match(path).hadamard for path in measured}
    assert choices == {None, SIZE}
    assert chosen.match("layers/0").hadamard == SIZE
    # Over all products never worse than either, by the same measure.
    each = np.array(list(measured.values()))
    best = [
        errors[0 if chosen.match(path).hadamard else 1]
        for path, errors in measured.items()
    ]
    assert sum(best) < each.sum(0).min()
    again = contrib.choose_rotations(
        apply, chosen, given, [(jnp.asarray(x),) for x in batches]
    )
    assert {path: again.match(path) for path in measured} == {
        path: chosen.match(path) for path in measured
    }


def test_layers_in_a_scan_are_judged_together(rng):
    stack = np.stack(drawn(rng)["layers"]).astype(np.float32)
    x = rng.normal(size=(8, SIZE)).astype(np.float32)
    rules = cage.Rules([("w", cage.int4(axis=-2, hadamard=SIZE), PAIR[1])])

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    inputs = [x]
    for kernel in stack[:-1]:
        inputs.append(np.tanh(inputs[-1] @ kernel))
    weights = np.float64(sum(shares(k, -2) * np.sum(k**2) for k in stack))
    values = np.float64(sum(shares(v, -1) * np.sum(v**2) for v in inputs))
    measured = weights / np.sum(stack**2) + values / sum(np.sum(v**2) for v in inputs)
    chosen = contrib.choose_rotations(
        scanned, rules, {"w": jnp.asarray(stack)}, [(jnp.asarray(x),)]
    )
    assert (chosen.match("w").hadamard is not None) == (measured[0] <= measured[1])
    assert abs(measured[0] / measured[1] - 1) > 0.05  # which float32 tells apart


def test_a_training_with_a_choice_every_few_steps_compiles_each_table_once(rng):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn(rng))
    params["layers"] = params["layers"][:1]
    traced = []

    @functools.partial(jax.jit, static_argnames="rules")
    def step(params, x, rules):
        traced.append(rules)

        def loss(params):
            run = cage.quantize_activations(apply, rules)
            return jnp.mean(run(cage.fake_quant(params, rules), x) ** 2)

        return jax.tree.map(lambda p, g: p - 0.01 * g, params, jax.grad(loss)(params))

    tables = []
    for count in range(4):
        x = jnp.asarray(rng.normal(size=(8, SIZE)), jnp.float32)
        if count % 2 == 0:
            tables.append(contrib.choose_rotations(apply, ROTATED, params, [(x,)]))
        params = step(params, x, tables[-1])
    assert len(traced) == len(set(tables))


def test_bad_arguments(rng):
    params = jax.tree.map(jnp.asarray, drawn(rng))
    with pytest.raises(ValueError, match="`batches` must have a batch to judge"):
        contrib.choose_rotations(apply, ROTATED, params, [])
    with pytest.raises(TypeError, match=re.escape("`rules` must be Rules; got list")):
        contrib.choose_rotations(apply, [("w", *PAIR)], params, [])
