"""Inputs that are reached, whatever is around their product, or named in an error."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cage_jax as cage

MESH = Mesh(np.array(jax.devices()[:2]), ("d",))


@pytest.fixture
def params(rng):
    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {"w": normal(8, 8), "v": normal(8, 8), "experts": normal(3, 8, 8)}


@pytest.fixture
def x(rng):
    return rng.standard_normal((4, 8)).astype(np.float32)


def per_token(x):
    """Int4 with a scale for each row, by hand."""
    scale = jnp.abs(x).max(-1, keepdims=True) / 7
    return jnp.round(x / scale) * scale


def as_it_is(x):
    return x


# --- reached --------------------------------------------------------------------------


def branch(p, x, q):
    return lax.cond(x.sum() > -1e9, lambda: q(x) @ p["w"], lambda: x)


def other_branch(p, x, q):
    return lax.cond(x.sum() < -1e9, lambda: x, lambda: q(x) @ p["w"])


def one_of_three(p, x, q):
    layers = [lambda h, w=w: q(h) @ w for w in (p["w"], p["v"], p["w"].T)]
    return lax.switch(jnp.argmax(x[0]) % 3, layers, x)


def branches_in_a_loop(p, x, q):
    def layer(h, i):
        return lax.cond(i > 0, lambda: q(h) @ p["w"], lambda: h), None

    return lax.scan(layer, x, jnp.arange(2))[0]


def loop(p, x, q):
    return lax.fori_loop(0, jnp.argmin(x[0] * 0) + 2, lambda _, h: q(h) @ p["w"], x)


def loop_over_layers(p, x, q):
    def step(state):
        i, h = state
        w = lax.dynamic_index_in_dim(p["experts"], i, keepdims=False)
        return i + 1, q(h) @ w

    return lax.while_loop(lambda state: state[0] < 3, step, (0, x))[1]


def sharded(p, x, q):
    def local(x, w):
        return lax.psum(q(x) @ w, "d")

    specs = (P("d"), P())
    return jax.shard_map(local, mesh=MESH, in_specs=specs, out_specs=P())(x, p["w"])


def barrier(p, x, q):
    x, w = lax.optimization_barrier((x, p["w"]))
    return q(x) @ w


def masked(p, x, q):
    mask = jnp.asarray(MASK)
    return q(q(x) @ (p["w"] * mask)) @ p["v"]


def chosen(p, x, q):
    return q(x) @ jnp.where(jnp.asarray(MASK) > 0, p["w"], 0.0)


def one_of_two(p, x, q):
    return q(x) @ jnp.where(x.sum() > 0, p["w"], p["v"])


def gathered(p, x, q):
    index = jnp.argmax(x, -1) % 3
    return jnp.einsum("td,tdf->tf", q(x), p["experts"][index])


def ragged(p, x, q):
    sizes = jnp.array([1, 0, 3], jnp.int32)
    return lax.ragged_dot(q(x), p["experts"], sizes)


def ragged_after_dense(p, x, q):
    return ragged(p, q(x) @ p["w"], q)


def normalized(p, x, q):
    norm = jnp.linalg.norm(p["w"], axis=0, keepdims=True)
    return q(x) @ (p["w"] / norm)


def latents(p, x, q):
    """Learned ones that are repeated for each example, as in a Perceiver."""
    repeated = jnp.broadcast_to(p["experts"], (2, 3, 8, 8)) * 2
    keys = q(x) @ p["v"]
    return (q(repeated) @ p["w"]) @ keys.T


def diagonal(p, x, q):
    return q(x) @ (jnp.diag(p["experts"][0, 0]) @ p["w"])


MASK = np.float32(np.arange(64).reshape(8, 8) % 3)
REACHED = [
    *(branch, other_branch, one_of_three, branches_in_a_loop, loop, loop_over_layers),
    *(sharded, barrier, masked, chosen, one_of_two, gathered, ragged),
    *(ragged_after_dense, normalized, latents, diagonal),
]
RULES = cage.Rules([(".*", None, cage.int4())])


@pytest.mark.parametrize("program", REACHED, ids=lambda program: program.__name__)
def test_an_input_is_reached(program, params, x):
    def plain(p, x):
        return program(p, x, as_it_is)

    @jax.jit
    def all_of(p, x):
        quantized = cage.quantize_activations(plain, RULES)
        return quantized(p, x), program(p, x, per_token), plain(p, x)

    found, expected, unquantized = all_of(params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert abs(expected - unquantized).max() > 1e-2


@pytest.mark.parametrize("program", [branch, branches_in_a_loop, sharded, gathered])
def test_a_gradient_through_it(program, params, x):
    def straight_through(x):
        return x + lax.stop_gradient(per_token(x) - x)

    quantized = cage.quantize_activations(lambda p, x: program(p, x, as_it_is), RULES)

    @jax.jit
    def both(p, x):
        def of(function, *more):
            return jax.grad(
                lambda p, x: (function(p, x, *more) ** 2).sum(), argnums=(0, 1)
            )(p, x)

        return of(quantized), of(program, straight_through)

    found, expected = map(jax.tree.leaves, both(params, x))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_convolution_has_a_scale_per_example(rng):
    kernel = rng.standard_normal((3, 3, 4, 8)).astype(np.float32)
    x = rng.standard_normal((2, 6, 6, 4)).astype(np.float32)
    numbers = ("NHWC", "HWIO", "NHWC")

    def apply(p, x):
        return lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", dimension_numbers=numbers
        )

    def flipped(p, x):
        return lax.conv_transpose(x, p["kernel"], (2, 2), "SAME", transpose_kernel=True)

    def per_example(x):
        return per_token(x.reshape(2, -1)).reshape(x.shape)

    outputs = rng.standard_normal((2, 6, 6, 8)).astype(np.float32)
    for function, weight, inputs, by_hand in (
        (apply, kernel, x, per_example),
        (flipped, kernel, outputs, per_example),
        (apply, kernel[:1, :1], x, per_token),  # sums of one place, as of a Dense layer
    ):
        p = {"kernel": weight}
        found = cage.quantize_activations(function, RULES)(p, inputs)
        expected = function(p, by_hand(inputs))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# --- named ----------------------------------------------------------------------------


@jax.custom_vjp
def custom(x, w):
    return x @ w


custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, g))


def custom_vjp(p, x):
    return x @ p["v"] + custom(x, p["w"])


def kernel(p, x):
    def body(x, w, out):
        out[...] = x[...] @ w[...]

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    called = pl.pallas_call(body, out_shape=shape, interpret=True)
    return called(x @ p["v"], p["w"])


def asked_in_a_loop(p, x):
    return lax.while_loop(lambda h: (h @ p["w"]).sum() > 1e9, lambda h: h @ p["v"], x)


def computed_elsewhere(p, x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(np.matmul, shape, x @ p["v"], p["w"])


def summed_by_hand(p, x):
    return ((x @ p["v"])[:, :, None] * p["w"][None]).sum(1)


def looked_up(p, x):
    return x @ p["v"] + p["w"][jnp.argmax(x, -1)]


def masked_by_the_same(p, x):
    mask = x[0, 0]
    return (x @ p["v"]) @ (p["w"] * mask)


def positions(p, x):
    """Adds a table to one example, for which nothing is repeated."""
    return (x + p["w"][:4]) @ p["v"]


def a_bias_of_attention(p, x):
    scores = (x @ p["v"]) @ p["v"].T  # of (tokens, tokens)
    return jax.nn.softmax(scores + p["w"][:4]) @ jnp.eye(8)


NAMED = [
    (custom_vjp, "its product is inside `custom_vjp_call`"),
    (kernel, "its product is inside `pallas_call`"),
    (asked_in_a_loop, "its product is inside `while`"),
    (computed_elsewhere, "its product is inside `pure_callback`"),
    (summed_by_hand, "`mul` joins it with data, and no matrix product"),
    (looked_up, r"it is only looked up \(`gather`\)"),
    (masked_by_the_same, "it is joined with data before `dot_general`"),
    (positions, "it is joined with data before `dot_general`"),
    (a_bias_of_attention, "`add` joins it with data, and no matrix product"),
]


@pytest.mark.parametrize(
    ("program", "why"), NAMED, ids=[program.__name__ for program, _ in NAMED]
)
def test_an_input_out_of_reach_is_named(program, why, params, x):
    """Though another input of the same rule is reached, which stays so if it may."""
    rules = cage.Rules([("w|v", None, cage.int4())])
    with pytest.raises(ValueError, match=f"`w`: its input cannot .*: {why}") as raised:
        jax.eval_shape(cage.quantize_activations(program, rules), params, x)
    assert "`v`" not in str(raised.value)
    assert "Use strict=False" in str(raised.value)

    lenient = cage.quantize_activations(program, rules, strict=False)
    with pytest.warns(UserWarning, match=f"`w`: its input cannot .*: {why}"):
        found = lenient(params, x)
    of_v = cage.Rules([("v", None, cage.int4())])
    expected = cage.quantize_activations(program, of_v)(params, x)
    np.testing.assert_array_equal(found, expected)
    (finding,) = [
        each
        for each in cage.report(program, rules, params, x).findings
        if "cannot be" in each or re.search(why, each)
    ]
    assert finding.startswith("w: ")


def test_each_input_out_of_reach_is_named(params, x):
    def apply(p, x):
        return custom(custom(x @ p["v"], p["w"]), p["u"])

    params = {**params, "u": params["w"]}
    with pytest.raises(ValueError, match="custom_vjp_call") as raised:
        jax.eval_shape(cage.quantize_activations(apply, RULES), params, x)
    told = re.findall("`(.)`: its input", str(raised.value))
    assert told == ["w", "u"]


def test_what_needs_no_input(params, x):
    """Vectors, and parameters that the call does not use."""

    def apply(p, x):
        return x @ p["w"] * p["scale"][None] + p["bias"][None]

    params = {**params, "scale": np.ones(8, np.float32), "bias": x[0]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cage.quantize_activations(apply, RULES)(params, x)
    expected = np.asarray(per_token(x)) @ params["w"] + x[:1]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_calibration_and_codes_take_strict_too(params, x):
    static = cage.int8(axis=None, scale=cage.scales.Calibrated())
    rules = cage.Rules([("w|v", None, static)])
    with pytest.raises(ValueError, match="`w`: its input cannot"):
        cage.calibrate(custom_vjp, rules, params, [(x,)])
    with pytest.warns(UserWarning, match="`w`: its input cannot"):
        found = cage.calibrate(custom_vjp, rules, params, [(x,)], strict=False)
    assert [*found["grids"]] == ["v/inputs"]
    scale = np.abs(x).max() / 127
    np.testing.assert_allclose(found["grids"]["v/inputs"].scale, scale, rtol=1e-6)

    table = cage.Rules([("w|v", "int8", "int8"), (".*", None)])
    codes = cage.quantize(params, table)
    with pytest.raises(ValueError, match=r"`w`: its input cannot .*`pallas_call`"):
        cage.low_bit(kernel, table)(codes, x)


def test_a_calibrated_input_of_a_loop_cannot_be_joined(params, x):
    static = cage.int8(axis=None, scale=cage.scales.Calibrated())
    rules = cage.Rules([("w", None, static)])
    for program, name in ((loop, "while"), (sharded, "shard_map")):
        plain = functools.partial(program, q=as_it_is)
        with pytest.raises(ValueError, match=f"`w`: .* must not be inside {name}"):
            cage.calibrate(plain, rules, params, [(x,)])


def test_a_report_of_explicit_shards(params, x):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))

    def apply(p, x):
        return jnp.matmul(x, p["w"], out_sharding=P("d", None))

    rules = cage.Rules([("w", cage.int4(axis=0), "int8"), (".*", None)])
    expected = cage.report(lambda p, x: x @ p["w"], rules, params, x)
    with jax.set_mesh(mesh):
        placed = {"w": jax.device_put(params["w"], NamedSharding(mesh, P(None, "d")))}
        rows = jax.device_put(x, NamedSharding(mesh, P("d")))
        found = cage.report(apply, rules, placed, rows)
    (layer,) = [each for each in expected.layers if each.weight.path == "w"]
    np.testing.assert_allclose(found.layers[0].measured, layer.measured, rtol=1e-6)
    measured = (each.layers[-1].inputs for each in (found, expected))
    (mine,), (other,) = measured
    np.testing.assert_allclose(mine.measured, other.measured, rtol=1e-6)


def test_a_model_that_holds_its_parameters_is_no_function():
    class Pretrained:
        module, params = object(), {}

        def __call__(self, ids, params=None):
            return ids

    for function in (cage.quantize_activations, cage.low_bit):
        with pytest.raises(TypeError, match=r"model Pretrained.*params=params\)"):
            function(Pretrained(), cage.Rules([(".*", "int4", "int8")]))
