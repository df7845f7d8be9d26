"""Products made from codes, against float64 NumPy of what the codes stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_raises, random_codes
from flax import linen as nn
from flax import nnx
from oracles import hadamard, levels_of, rotated_axis, spread

import cage_jax as cage
from cage_jax import formats
from cage_jax.arrays.jaxprs import subjaxprs

IN, OUT = 256, 24
QUANTIZERS = {
    "int4": cage.int4(),
    "int4 groups": cage.int4(group_size=32),
    "int4 groups of 128": cage.int4(group_size=128),
    "int4 asymmetric": cage.int4(symmetric=False, group_size=32),
    "int4 asymmetric channel": cage.int4(symmetric=False),
    "uint4 asymmetric": cage.Quantizer(
        formats.Integer(4, narrow=False, signed=False),
        cage.scales.MinMax(),
        group_size=32,
    ),
    "int8 asymmetric": cage.int8(symmetric=False, group_size=64),
    "int3": cage.int3(group_size=16),
    "int2": cage.int2(group_size=64),
    "tensor": cage.int4(axis=None),
    "ternary": cage.ternary(),
    "binary": cage.binary(),
    "tiles": cage.int4(axis=(0, 1), group_size=(32, 8)),
    "fp8": cage.fp8(),
    "e5m2": cage.fp8("e5m2"),
    "mxfp4": cage.mxfp4(),
    "mxfp8": cage.mxfp8("e5m2"),
    "nvfp4": cage.nvfp4(),
    "nf4": cage.nf4(),
    "q4_0": cage.q4_0(),
    "q4_1": cage.q4_1(),
    "q8_0": cage.q8_0(),
    "quest": cage.quest(4),
    "quest groups": cage.quest(4, group_size=64),
    "quest groups in a rotation": cage.quest(3, group_size=32, hadamard=128),
    "signs": dataclasses.replace(cage.quest(4), hadamard_seed=3),
    "rotated otherwise": cage.int4(axis=-1, hadamard=8),
    "a scale for each input": cage.int4(axis=-1, group_size=8),
}


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def rotation(quantizer, length):
    if quantizer.hadamard is None:
        return np.eye(length)
    blocks = length // quantizer.hadamard
    whole = np.kron(np.eye(blocks), hadamard(quantizer.hadamard))
    if quantizer.hadamard_seed is None:
        return whole
    drawn = np.random.default_rng(quantizer.hadamard_seed).integers(0, 2, length)
    return (2 * drawn - 1)[:, None] * whole


def weights_of(quantized):
    """What codes stand for, and the sum of what is added up for it without signs."""
    quantizer, shape = quantized.quantizer, quantized.shape
    levels, codes = levels_of(quantizer.format)

    def values(stored):
        return levels[np.searchsorted(codes, np.asarray(stored).astype(np.float64))]

    step, zero, offset = spread(quantized.scale, shape, quantizer), 0.0, 0.0
    if quantized.tensor_divisor is not None:
        step = step / np.float64(quantized.tensor_divisor)
    if quantized.zero_point is not None:
        zero = spread(values(quantized.zero_point), shape, quantizer)
    if quantized.offset is not None:
        offset = spread(quantized.offset, shape, quantizer)
    level = values(quantized.codes)
    in_basis = step * (level - zero) + offset
    size = abs(step) * (abs(level) + abs(zero)) + abs(offset)
    if quantizer.hadamard is None:
        return in_basis, size
    axis = rotated_axis(quantizer, len(shape))
    turn = rotation(quantizer, shape[axis])

    def rotated(turn, x):
        return np.moveaxis(np.tensordot(turn, x, (1, axis)), 0, axis)

    return rotated(turn, in_basis), rotated(abs(turn), size)


def check(found, x, quantized, einsum="ti,io->to", roundings=24):
    """Compares a product with float64, within roundings of what is added up for it."""
    weights, size = weights_of(quantized)
    x = np.asarray(x).astype(np.float64)
    expected = np.einsum(einsum, x, weights)
    assert found.shape == expected.shape
    room = roundings * 2.0**-24 * np.einsum(einsum, abs(x), size)
    room += (found.dtype == jnp.bfloat16) * 2.0**-8 * abs(expected)
    error = abs(np.asarray(found).astype(np.float64) - expected)
    np.testing.assert_array_less(error, room + 1e-30, err_msg=str(quantized.quantizer))


# Sums of 256 numbers in blocks, each rounded to float32: sixteen roundings and a few of
# scales, as `check` allows.
TOKENS = dict.fromkeys(QUANTIZERS, (5,))
TOKENS |= dict.fromkeys(["int4", "int4 groups of 128", "q4_1"], (1, 5, 300))
UNROUNDED = ["int4 groups", "q4_1", "mxfp8", "quest"]


@pytest.fixture(scope="module")
def products():
    """Codes, inputs and products of each quantizer and dtype, from one program."""
    rng = np.random.default_rng(0)
    codes = {n: random_codes(rng, q, (IN, OUT)) for n, q in QUANTIZERS.items()}
    inputs = {tokens: normal(rng, tokens, IN) for tokens in (1, 5, 300)}
    narrow = inputs[5].astype(jnp.bfloat16)

    @jax.jit
    def run(codes, inputs, narrow):
        found = {
            name: {n: cage.low_bit_dot(inputs[n], codes[name]) for n in TOKENS[name]}
            for name in codes
        }
        unrounded = {
            name: [
                cage.low_bit_dot(narrow, codes[name]),
                cage.low_bit_dot(
                    narrow, codes[name], preferred_element_type=jnp.float32
                ),
            ]
            for name in UNROUNDED
        }
        return found, unrounded

    return codes, inputs, narrow, *run(codes, inputs, narrow)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_it_is_the_product_with_what_codes_stand_for(name, products):
    codes, inputs, _, found, _ = products
    for tokens, each in found[name].items():
        assert each.shape == (tokens, OUT) and each.dtype == jnp.float32
        check(each, inputs[tokens], codes[name])


def test_bfloat16_inputs_are_multiplied_with_codes_unrounded(products):
    codes, _, inputs, _, unrounded = products
    for name, found in unrounded.items():
        assert [each.dtype for each in found] == [jnp.bfloat16, jnp.float32]
        for each in found:
            check(each, inputs, codes[name])


def test_float64(x64, rng):
    codes = random_codes(rng, cage.q4_1(), (IN, OUT), dtype="float64")
    x = normal(rng, 5, IN, dtype=np.float64)
    found = jax.jit(cage.low_bit_dot)(x, codes)
    assert found.dtype == jnp.float64
    check(found, x, codes, roundings=24 * 2.0**-28)


# --- axes -----------------------------------------------------------------------------

# By name the shape of the weights, their quantizer, that of the inputs, and the einsum.
AXES = {
    "out, in": ((24, 64), cage.int4(axis=-1, group_size=16), (3, 64), "ti,oi->to"),
    "heads out of d": ((64, 4, 8), cage.int4(axis=0), (2, 3, 64), "bti,ihd->bthd"),
    "heads into d": (
        (4, 32, 24),
        cage.int4(axis=(0, 1), group_size=(1, 8)),
        (2, 3, 4, 32),
        "bthd,hdo->bto",
    ),
    "both axes in groups": (
        (8, 32, 24),
        cage.int4(axis=(0, 1), group_size=(2, 16), symmetric=False),
        (3, 8, 32),
        "thd,hdo->to",
    ),
    "experts": ((4, 64, 24), cage.q4_1(axis=-2), (4, 3, 64), "eti,eio->eto"),
    "experts of nvfp4": (
        (4, 64, 24),
        cage.nvfp4(axis=-2),
        (4, 3, 64),
        "eti,eio->eto",
    ),
    "pairs of experts": (
        (4, 64, 24),
        cage.int4(axis=(0, 1), group_size=(2, 16)),
        (4, 3, 64),
        "eti,eio->eto",
    ),
    "one scale for each expert": (
        (4, 64, 24),
        cage.int4(axis=None),
        (4, 3, 64),
        "eti,eio->eto",
    ),
    "one scale for all experts": (
        (4, 64, 24),
        cage.int4(axis=(0, 1, 2)),
        (4, 3, 64),
        "eti,eio->eto",
    ),
    "rotated heads": (
        (4, 32, 24),
        cage.quest(4, axis=-2, hadamard=32),
        (3, 4, 32),
        "thd,hdo->to",
    ),
    "a vector": ((64, 24), cage.int4(group_size=16), (64,), "i,io->o"),
    "a vector of weights": (
        (64,),
        cage.int4(axis=0, group_size=16),
        (3, 64),
        "ti,i->t",
    ),
}


def numbers_of(einsum):
    left, right, out = (*einsum.split("->")[0].split(","), einsum.split("->")[1])
    shared = [c for c in left if c in right]
    return tuple(
        tuple(tuple(side.index(c) for c in shared if (c in out) == kept)
              for side in (left, right))
        for kept in (False, True)
    )  # fmt: skip


def test_any_axes(rng):
    codes = {name: random_codes(rng, row[1], row[0]) for name, row in AXES.items()}
    inputs = {name: normal(rng, *shape) for name, (_, _, shape, _) in AXES.items()}

    @jax.jit
    def run(inputs, codes):
        return {
            name: cage.low_bit_dot(inputs[name], codes[name], numbers_of(row[3]))
            for name, row in AXES.items()
        }

    for name, found in run(inputs, codes).items():
        check(found, inputs[name], codes[name], einsum=AXES[name][3])


def test_a_stack_by_vmap(rng):
    codes = random_codes(rng, cage.int4(axis=-2, group_size=32), (3, 64, 8))
    x = normal(rng, 3, 5, 64)
    found = jax.jit(jax.vmap(cage.low_bit_dot))(x, codes)
    check(found, x, codes, einsum="sti,sio->sto")


def test_shards_are_gathered_by_nobody(rng):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    # A block of 128 for each device.
    codes = random_codes(rng, cage.int4(group_size=32), (1024, OUT))
    x = normal(rng, 5, 1024)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for spec, sums in ((None, "x"), 0), (("x", None), 1):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        weights, inputs = jax.device_put((codes, x), (place, everywhere))
        program = jax.jit(cage.low_bit_dot)
        # Sums of 1024 numbers.
        check(program(inputs, weights), x, codes, roundings=48)
        text = program.lower(inputs, weights).compile().as_text()
        assert "all-gather" not in text and "all-to-all" not in text
        assert text.count(" all-reduce(") == sums


# --- whole numbers --------------------------------------------------------------------

WHOLE = {
    "int8": (cage.int8(), cage.int8(axis=-1)),
    "int8 full range": (cage.ct_w8a8(), cage.int8(axis=-1, narrow=False)),
    "int4 groups": (cage.int4(group_size=32), cage.int8(axis=-1)),
    "int4 asymmetric": (cage.int4(symmetric=False, group_size=32), cage.int8(axis=-1)),
    "q4_1": (cage.q4_1(), cage.int8(axis=None)),
    "nvfp4": (cage.nvfp4(), cage.int8(axis=-1)),
    "quest": (cage.quest(4), cage.quest(4, axis=-1)),
}
FLOATS = {
    "another rotation": (cage.quest(4), cage.int8(axis=-1)),
    "inputs rotated alone": (cage.int4(), cage.quest(4, axis=-1)),
    "inputs in groups": (cage.int4(), cage.int8(axis=-1, group_size=32)),
    "zero points of inputs": (cage.int4(), cage.int8(axis=-1, symmetric=False)),
    "a scale per feature": (cage.int4(), cage.int8(axis=0)),
    "fp8": (cage.fp8(), cage.fp8(axis=-1)),
    "mxfp8 inputs": (cage.mxfp4(), cage.mxfp8(axis=-1)),
}


def has_whole_product(jaxpr):
    """Whether int8 is multiplied with int8 somewhere in a program."""
    return any(
        (
            eqn.primitive.name == "dot_general"
            and [str(atom.aval.dtype) for atom in eqn.invars] == ["int8", "int8"]
        )
        or any(has_whole_product(inner) for inner in subjaxprs(eqn.params))
        for eqn in jaxpr.eqns
    )


@pytest.mark.parametrize("name", [*WHOLE, *FLOATS])
def test_quantized_inputs(name, rng):
    quantizer, inputs = (WHOLE | FLOATS)[name]
    codes, x = random_codes(rng, quantizer, (IN, OUT)), normal(rng, 5, IN)

    def run(x, codes):
        rounded = cage.dequantize(cage.quantize(x, inputs))
        return cage.low_bit_dot(x, codes, inputs_quantizer=inputs), rounded

    traced = jax.jit(run).trace(x, codes)
    found, rounded = traced.lower().compile()(x, codes)
    # As without; rotated inputs come out of a sum of 128 once more.
    check(found, rounded, codes, roundings=48)
    assert has_whole_product(traced.jaxpr.jaxpr) == (name in WHOLE)


def test_sums_of_whole_numbers_are_exact(rng):
    numbers = rng.integers(-127, 128, (4096, 4))
    codes = dataclasses.replace(
        random_codes(rng, cage.int8(axis=None), (4096, 4)),
        codes=numbers.astype(np.int8),
        scale=np.ones((1, 1), np.float32),
    )
    x = rng.integers(-127, 128, (3, 4096))
    x[:, 0] = 127
    quantized = jax.jit(
        lambda x, codes: cage.low_bit_dot(x, codes, inputs_quantizer=cage.int8(axis=-1))
    )
    found = quantized(x.astype(np.float32), codes)
    expected = np.float32(x.astype(np.int64) @ numbers)
    assert abs(expected).max() > 2**18
    np.testing.assert_array_equal(found, expected)


def test_attention_inputs_of_two_axes(rng):
    codes = random_codes(rng, cage.int4(axis=(0, 1)), (4, 16, 24))
    x, quantizer = normal(rng, 2, 3, 4, 16), cage.int8(axis=-1)
    numbers = (((2, 3), (0, 1)), ((), ()))
    found = jax.jit(
        lambda x, codes: cage.low_bit_dot(x, codes, numbers, inputs_quantizer=quantizer)
    )(x, codes)
    step = abs(x).max((2, 3), keepdims=True) / 127
    rounded = np.round(x / step) * np.float64(step)
    check(found, rounded, codes, einsum="bthd,hdo->bto")


# --- programs -------------------------------------------------------------------------


def products_of(function, *args):
    """The dtypes of what is multiplied, however deep."""
    found = []

    def follow(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                source = {v: e for e in jaxpr.eqns for v in e.outvars}
                atom = eqn.invars[1]
                while atom in source and source[atom].primitive.name in (
                    "convert_element_type", "reshape", "transpose"
                ):  # fmt: skip
                    atom = source[atom].invars[0]
                found.append(str(atom.aval.dtype))
            for inner in subjaxprs(eqn.params):
                follow(inner)

    follow(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def stacked(params, x):
    def layer(x, w):
        return jnp.tanh(x @ w / 64), jnp.sum(x)  # below 1

    return jax.lax.scan(layer, x, params["w"])


PROGRAMS = {
    "matmul": (lambda p, x: x @ p["w"], (64, 64)),
    "cast": (lambda p, x: x @ p["w"].astype(jnp.float32), (64, 64)),
    "einsum": (lambda p, x: jnp.einsum("oi,ti->to", p["w"], x), (32, 64)),
    "transposed": (lambda p, x: x @ p["w"].T, (32, 64)),
    "weights first": (lambda p, x: p["w"] @ x.T, (32, 64)),
    "jit": (jax.jit(lambda p, x: x @ p["w"]), (64, 64)),
    "checkpoint": (jax.checkpoint(lambda p, x: x @ p["w"]), (64, 64)),
    "scan": (stacked, (3, 64, 64)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_codes(name, rng):
    function, shape = PROGRAMS[name]
    axis = -1 if shape == (32, 64) else -2
    codes = {"w": random_codes(rng, cage.int4(group_size=16, axis=axis), shape)}
    x, quantized = normal(rng, 4, 64), cage.low_bit(function)
    assert products_of(quantized, codes, x) == ["int4"]

    @jax.jit
    def both(codes, x):
        return quantized(codes, x), function(cage.dequantize(codes), x)

    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(
            found, expected, atol=8e-6 * abs(expected).max()
        ),
        *both(codes, x),
    )


def test_what_is_no_product_sees_the_values(rng):
    codes = {
        "w": random_codes(rng, cage.int4(group_size=16), (64, 64)),
        "b": np.ones(64, np.float32),
    }
    ids = np.array([3, 5])

    def tied(params, ids, train):
        assert train is False
        x = params["w"][ids] + params["b"][None]
        return x @ params["w"].T, jnp.tanh(params["w"]).sum()

    @jax.jit
    def both(codes, ids):
        found = cage.low_bit(tied)(codes, ids, train=False)
        return found, tied(cage.dequantize(codes), ids, train=False)

    for found, expected in zip(*both(codes, ids), strict=True):
        np.testing.assert_allclose(
            found, expected, rtol=1e-4, atol=1e-6 * abs(expected).max()
        )


class Block(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(32, 64)
        x = embed(ids)
        heads = nn.DenseGeneral((4, 16), name="up")(x)
        x = x + nn.DenseGeneral(64, axis=(-2, -1), name="out")(jnp.tanh(heads))
        x = x + nn.Dense(64)(x)
        return embed.attend(x)


def test_a_linen_model(standard_promotion, key, rng):
    rules = cage.Rules(
        [
            (r".*up/kernel", cage.int4(axis=0, group_size=16)),
            (r".*out/kernel", cage.int4(axis=(0, 1))),
            (r".*embedding", cage.int4(axis=-1, group_size=16)),
            (r".*kernel", cage.mxfp4(), cage.int8(axis=-1)),
        ]
    )
    ids, model = rng.integers(0, 32, (2, 6)), Block()
    codes = jax.jit(lambda key: cage.quantize(model.init(key, ids), rules))(key)
    apply = cage.low_bit(model.apply)
    kinds = ["float4_e2m1fn", "int4", "int4", "int4"]
    assert sorted(products_of(apply, codes, ids)) == kinds

    @jax.jit
    def both(codes, ids):
        values = cage.dequantize(codes)
        inputs = cage.quantize_activations(model.apply, rules)
        return (
            (apply(codes, ids), model.apply(values, ids)),
            (cage.low_bit(model.apply, rules)(codes, ids), inputs(values, ids)),
        )

    (found, expected), (of_inputs, expected_of_inputs) = both(codes, ids)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    # An input that lies between two codes may go to either: a step of 1/127.
    assert np.mean(abs(of_inputs - expected_of_inputs) < 1e-3) > 0.9
    np.testing.assert_allclose(of_inputs, expected_of_inputs, atol=0.1)


def test_an_nnx_model(rng):
    model = nnx.eval_shape(lambda: nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    bias = normal(rng, 8)
    weights = random_codes(rng, cage.int4(group_size=16), (64, 8))
    codes = nnx.to_pure_dict(state) | {"kernel": weights, "bias": bias}
    nnx.replace_by_pure_dict(state, codes)
    x = normal(rng, 4, 64)
    apply = cage.low_bit(lambda state, x: nnx.merge(graphdef, state)(x))
    assert products_of(apply, state, x) == ["int4"]
    found = np.asarray(jax.jit(apply)(state, x)) - bias
    # The bias is added, and taken off again.
    check(found, x, weights, roundings=48)


def test_the_gradient_of_inputs(rng):
    codes = random_codes(rng, cage.int4(group_size=32), (IN, OUT))
    x = normal(rng, 5, IN)
    found = jax.jit(jax.grad(lambda x: jnp.sum(cage.low_bit_dot(x, codes))))(x)
    expected = np.broadcast_to(weights_of(codes)[0].sum(1), x.shape)
    np.testing.assert_allclose(found, expected, atol=1e-4)


# --- errors ---------------------------------------------------------------------------


def test_what_cannot_be_multiplied(rng):
    x, short = normal(rng, 2, 16), normal(rng, 2, 8)
    weights = random_codes(rng, cage.int4(), (16, 4))
    by_groups = cage.Rules([("up", cage.int4(), cage.int8(axis=-1, group_size=5))])
    named = cage.low_bit(lambda params, x: x @ params["up"], by_groups)

    def dot(x, weights, numbers=None):
        return lambda: cage.low_bit_dot(x, weights, numbers)

    other = r"`dimension_numbers` .* inputs.shape=\(2"
    floats = r"`inputs` must be .* real floats; got dtype int8"
    one = (((1,), (1,)), ((), ()))
    table = [
        (dot(x, x), TypeError, "`weights` must be a QuantizedArray; got ndarray"),
        (dot(x.astype(np.int8), weights), TypeError, floats),
        (dot(short, weights), ValueError, other),
        (dot(x, weights, one), ValueError, other),
        (dot(x, weights, (((2,), (0,)), ((), ()))), ValueError, other),
        (dot(x, weights, (((), ()), ((), ()))), ValueError, other),
        (dot(x, weights, (((1, 0), (0,)), ((), ()))), ValueError, other),
        (dot(x, weights, "ij,jk"), ValueError, other),
        (
            lambda: cage.low_bit(lambda params: params, cage.int4()),
            TypeError,
            "`rules` must be Rules; got Quantizer",
        ),
        # The parameter is named.
        (
            lambda: jax.eval_shape(named, {"up": weights}, x),
            ValueError,
            "up.*`group_size` must divide",
        ),
    ]
    assert_raises(table)
