"""W4A8 by the library, compared with what the walker finds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import walker
from jax.extend.core import Literal

import cage_jax as cage

FAKE_QUANT = "_cage_jax_fake_quant"


def check(function, rules, table, params, batches, count, compilations):
    """Compares outputs and gradients of two batches, with one compiled program.

    Args:
      function: of parameters and data, at full precision.
      rules: as a user writes them, without axes.
      table: the walker's lines for the same kernels.
      params: its parameters.
      batches: two tuples of data.
      count: how many products have a kernel; one in a scan counts once.
      compilations: the fixture.
    """
    products = []
    walked = walker.quantized(function, table, products)
    rules = cage.resolve(rules, function, params, *batches[0])
    quantized = cage.quantize_activations(function, rules)

    def ours(params, *args):
        return quantized(cage.fake_quant(params, rules), *args)

    def theirs(params, *args):
        return walked(walker.rounded_weights(params, table), *args)

    def derived(function, params, args):
        def loss(params):
            outputs = function(params, *args)
            return sum(map(weighted, jax.tree.leaves(outputs))), outputs

        return jax.value_and_grad(loss, has_aux=True)(params)

    # So that equal programs, compiled apart, do not round otherwise.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def all_three(params, *args):
        both = (derived(each, params, args) for each in (ours, theirs))
        return *both, function(params, *args)

    with compilations(1):
        results = [all_three(params, *batch) for batch in batches]
    for found, expected, plain in results:
        jax.tree.map(np.testing.assert_array_equal, found[0], expected[0])
        assert_close(found[1], expected[1])
        pairs = zip(jax.tree.leaves(found[0][1]), jax.tree.leaves(plain), strict=True)
        assert any(np.any(x != y) for x, y in pairs)
    # Each traced once.
    products.clear()
    jax.make_jaxpr(walked)(params, *batches[0])
    assert len(products) == count
    assert (
        rounded_products(jax.make_jaxpr(quantized)(params, *batches[0]).jaxpr) == count
    )
    return products


def assert_close(gradients, expected):
    """Equal but for the order of sums, where several products have one input."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for (path, found), wanted in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(found, wanted, 1e-5, 1e-6 * largest, err_msg=name)


def weighted(x):
    """A sum in which each element counts differently."""
    weights = np.cos(np.arange(x.size)).reshape(x.shape)
    return jnp.sum(x.astype(jnp.float32) * weights.astype(np.float32)) / x.size**0.5


def rounded_products(jaxpr):
    """Counts the products of a program that `fake_quant` gives a factor to."""
    count, rounded = 0, set()
    for eqn in jaxpr.eqns:
        if eqn.params.get("name") == FAKE_QUANT:
            rounded.update(eqn.outvars)
        elif eqn.primitive.name in walker.PRODUCTS:
            count += any(v in rounded for v in eqn.invars if not isinstance(v, Literal))
        else:
            inside = jax.tree.leaves([*eqn.params.values()], is_leaf=is_program)
            count += sum(
                rounded_products(getattr(each, "jaxpr", each))
                for each in inside
                if is_program(each)
            )
    return count


def is_program(x):
    return hasattr(x, "eqns")


def drawn(rng, like):
    """Parameters to start from, of the shapes of `like`."""

    def of(leaf):
        scale = 1 / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.5
        values = rng.standard_normal(leaf.shape) * scale + (leaf.ndim < 2)
        return jax.device_put(values.astype(leaf.dtype))

    return jax.tree.map(of, like)
