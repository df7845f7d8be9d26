"""Where a program multiplies parameters with data."""

import jax
import jax.numpy as jnp
import numpy as np

from cage_jax import fake_quant, quest
from cage_jax.core.straight_through import FAKE_QUANT
from cage_jax.program.following import follow
from cage_jax.program.mapping import map_inputs
from cage_jax.program.origins import CONSTANT, of_data, of_parameter
from cage_jax.program.products import Product

W, X = np.ones((8, 4), np.float32), np.ones((5, 8), np.float32)
DATA, OF_W = of_data(0), of_parameter("w", 2)

PLAIN = Product(
    ("w",),
    "dot_general",
    (5, 8),
    features=(1,),
    summed=(1,),
    contracted=frozenset({("w", 0)}),
    kept=frozenset({("w", 1)}),
)


def products_of(function, *arguments, origins):
    return follow(jax.make_jaxpr(function)(*arguments), origins).products


def test_a_product_is_described():
    (found,) = products_of(lambda w, x: x @ w, W, X, origins=[OF_W, DATA])
    assert found == PLAIN
    (found,) = products_of(lambda x, w: w.T @ x.T, X, W, origins=[DATA, OF_W])
    assert (found.shape, found.features) == ((8, 5), (0,))


def test_what_is_no_product_of_a_parameter_with_data():
    for name, function, origins in (
        ("two data", lambda w, x: x @ w, [DATA, DATA]),
        ("two parameters", lambda w, x: x @ w, [OF_W, of_parameter("x", 2)]),
        ("a constant", lambda w, x: x @ w, [CONSTANT, DATA]),
        ("elementwise", lambda w, x: w[None] * x[:, :, None], [OF_W, DATA]),
        ("a lookup", lambda w, x: w[x[:, 0].astype(int)], [OF_W, DATA]),
    ):
        assert products_of(function, W, X, origins=origins) == [], name


def test_a_factor_computed_from_parameters_has_all_their_paths():
    def lora(w, a, b, x):
        return x @ (w + jnp.tanh(a) @ b)

    a, b = np.ones((8, 2), np.float32), np.ones((2, 4), np.float32)
    origins = [*(of_parameter(name, 2) for name in "wab"), DATA]
    (found,) = products_of(lora, W, a, b, X, origins=origins)
    assert found.paths == ("w", "a", "b")


def test_a_quantized_weight_is_a_weight():
    def run(w, x):
        return x @ fake_quant(w, quest(4, hadamard=8))

    # The rotation's own product, with a matrix, is not one of the model.
    (found,) = products_of(run, W, X, origins=[OF_W, DATA])
    assert found == PLAIN
    called = [eqn.params.get("name") for eqn in jax.make_jaxpr(run)(W, X).eqns]
    assert called.count(FAKE_QUANT) == 1


def test_a_weight_that_depends_on_data_is_data():
    def hypernetwork(w, x):
        return x @ (w * x.mean())

    assert products_of(hypernetwork, W, X, origins=[OF_W, DATA]) == []


def test_a_carry_that_becomes_data_is_data():
    square = np.ones((8, 8), np.float32)

    def run(w, start, x):
        # The first repetition multiplies two parameters, the others data.
        return jax.lax.scan(lambda h, row: (h @ w + row, None), start, x)[0]

    rows = np.ones((3, 5, 8), np.float32)
    origins = [OF_W, of_parameter("start", 2), DATA]
    (found,) = products_of(run, square, X, rows, origins=origins)
    assert found.repeats == (3,)
    assert found.paths == ("w",)


def test_scans_within_scans_and_calls():
    stacked = np.ones((2, 3, 8, 8), np.float32)

    @jax.jit
    def inner(h, w):
        return jax.checkpoint(jnp.matmul)(h, w), None

    def run(w, x):
        def outer(h, row):
            return jax.lax.scan(inner, h, row)[0], None

        return jax.lax.scan(outer, x, w)[0]

    origins = [of_parameter("w", 4), DATA]
    (found,) = products_of(run, stacked, X, origins=origins)
    assert found.repeats == (2, 3)
    assert (found.contracted, found.kept) == ({("w", 2)}, {("w", 3)})
    program = jax.make_jaxpr(run)(stacked, X)

    @jax.jit
    def with_more(stacked, x, more):
        return map_inputs(
            program,
            origins,
            [stacked, x],
            lambda product: product.paths[0],
            lambda name, product, x, grid, shared: (x + grid, x.sum()),
            {"w": more},
        )[:2]

    more = np.arange(6, dtype=np.float32).reshape(2, 3)
    (result,), records = with_more(stacked, X, more)
    h, sums = np.float64(X), []  # whole numbers below 2**24
    for i, w in enumerate(stacked.reshape(6, 8, 8)):
        sums.append(h.sum())
        h = (h + i) @ w
    np.testing.assert_array_equal(result, h)
    np.testing.assert_array_equal(records["w"][0].ravel(), sums)


def test_where_a_product_is():
    def conditional(w, x):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x[:, :4])

    def loop(w, x):
        return jax.lax.fori_loop(0, jnp.int32(x[0, 0]), lambda _, h: h @ w @ w.T, x)

    for function, name in ((conditional, "cond"), (loop, "while")):
        found = products_of(function, W, X, origins=[OF_W, DATA])
        assert found and {product.within for product in found} == {(name,)}
        assert {product.blocked_by for product in found} == {None}


def test_what_is_out_of_reach_is_found():
    def asked(w, x):
        return jax.lax.while_loop(lambda h: (h @ w).sum() < 9, lambda h: 2 * h, x)

    @jax.custom_jvp
    def custom(w, x):
        return x @ w

    custom.defjvp(lambda primals, _: (custom(*primals),) * 2)
    for function, name in ((asked, "while"), (custom, "custom_jvp_call")):
        (found,) = products_of(function, W, X, origins=[OF_W, DATA])
        assert (found.paths, found.blocked_by) == (("w",), name)


def test_a_program_without_wanted_products_runs_as_it_is():
    def run(w, x):
        values, indices = jax.lax.top_k(x @ w, 2)
        return jax.nn.relu(values), indices, jnp.linalg.norm(w)

    program = jax.make_jaxpr(run)(W, X)

    @jax.jit
    def both(w, x):
        found, records, _ = map_inputs(
            program, [OF_W, DATA], [w, x], lambda product: None, None, {}
        )
        assert records == {}
        return found, run(w, x)

    for found, expected in zip(*both(W, X), strict=True):
        np.testing.assert_array_equal(found, expected)
