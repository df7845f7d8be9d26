"""Programs that are followed, entered and run with another rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cage_jax.arrays.jaxprs import called, enter, evaluate, unchanged

X = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)


def primitives(program):
    return [eqn.primitive.name for eqn in program.jaxpr.eqns]


def with_sine_for_cosine(eqn, values):
    """Enters everything, and replaces one function."""
    if eqn.primitive.name == "cos":
        return [jnp.sin(values[0])]
    if eqn.primitive.name == "scan" or called(eqn) is not None:
        return enter(eqn, values, run)
    return unchanged(eqn, values)


def run(program, values):
    return evaluate(program.jaxpr, [*program.consts, *values], with_sine_for_cosine)


def loop(wave):
    @jax.jit
    def call(x):
        return wave(x) + X[0]

    def step(carry, row):
        carry = jax.checkpoint(call)(carry * 0.5) + row
        return carry, wave(carry)

    return lambda x: jax.lax.scan(step, x[0], x, reverse=True)


def test_an_operation_is_replaced_however_deep():
    cosine = jax.make_jaxpr(loop(jnp.cos))(X)
    replaced = jax.make_jaxpr(lambda x: run(cosine, [x]))(X)
    # The scan is still one, and the checkpoint in it.
    assert primitives(replaced)[-1] == primitives(cosine)[-1] == "scan"
    (scan,) = [eqn for eqn in replaced.jaxpr.eqns if eqn.primitive.name == "scan"]
    assert set(primitives(scan.params["jaxpr"])) & {"checkpoint", "remat2"}

    @jax.jit
    def both(x):
        def total(function):
            return lambda x: sum(jnp.sum(y) for y in jax.tree.leaves(function(x)))

        followed = total(lambda x: run(cosine, [x]))
        expected = total(loop(jnp.sin))
        return [jax.value_and_grad(each)(x) for each in (followed, expected)]

    found, expected = both(X)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_trees_follow_the_values_into_each_repetition():
    program = jax.make_jaxpr(loop(jnp.cos))(X)
    (scan,) = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "scan"]

    def count(program, values):
        *values, more = values
        outputs = evaluate(program.jaxpr, [*program.consts, *values], unchanged)
        return [*outputs, {"twice": 2 * more["once"]}]

    def rule(eqn, values):
        if eqn is not scan:
            return unchanged(eqn, values)
        *outputs, more = enter(eqn, [*values, {"once": jnp.arange(3)}], count)
        assert more["twice"].shape == (3,)
        np.testing.assert_array_equal(more["twice"], [0, 2, 4])
        return outputs

    evaluate(program.jaxpr, [*program.consts, X], rule)


def test_own_derivatives_are_entered_only_if_asked_for():
    @jax.custom_jvp
    def double(x):
        return 2 * x

    double.defjvp(lambda primals, tangents: (2 * primals[0], 3 * tangents[0]))
    program = jax.make_jaxpr(double)(X)
    (eqn,) = program.jaxpr.eqns
    assert called(eqn) is None
    assert called(eqn, custom_derivatives=True) is not None
    gradient = jax.grad(lambda x: jnp.sum(unchanged(eqn, [x])[0]))(jnp.asarray(X))
    np.testing.assert_array_equal(gradient, np.full_like(X, 3))


def test_values_may_be_what_is_known_about_arrays():
    program = jax.make_jaxpr(lambda x, y: (jnp.sin(x) * 2, y))(X, X)

    def rule(eqn, values):
        return [frozenset().union(*values)]

    values = [frozenset("x"), frozenset("y")]
    found = evaluate(program.jaxpr, values, rule, literal=lambda _: frozenset("2"))
    assert found == [{"x", "2"}, {"y"}]
    with pytest.raises(ValueError, match="zip"):
        evaluate(program.jaxpr, values[:1], rule)
