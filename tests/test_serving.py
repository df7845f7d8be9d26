"""Products made from codes, against float64 NumPy of what the codes stand for."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import linen as nn
from flax import nnx

import cage_jax as cage
from cage_jax import formats
from cage_jax.products import subjaxprs

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


def kernel_of(quantizer, rng, shape=(IN, OUT)):
    return cage.quantize(jnp.asarray(rng.normal(size=shape), jnp.float32), quantizer)


def rotation(quantizer, length):
    if quantizer.hadamard is None:
        return np.eye(length)
    block = scipy.linalg.hadamard(quantizer.hadamard) / math.sqrt(quantizer.hadamard)
    whole = np.kron(np.eye(length // quantizer.hadamard), block)
    if quantizer.hadamard_seed is None:
        return whole
    drawn = np.random.default_rng(quantizer.hadamard_seed).integers(0, 2, length)
    return (2 * drawn - 1)[:, None] * whole


def spread(per_group, shape):
    """Each group's number for each element of a matrix."""
    array = np.asarray(per_group).astype(np.float64)
    for axis in (0, 1):
        array = np.repeat(array, shape[axis] // array.shape[axis], axis)
    return array


def parts(weights):
    """Values, steps, zero points and offsets of a matrix, before it is rotated."""
    quantizer, shape = weights.quantizer, weights.shape
    index = np.asarray(quantizer.format.to_index(weights.codes)).astype(np.int64)
    format = quantizer.format

    def values(index):
        if isinstance(format, formats.Float):
            return index.astype(np.uint8).view(format._type).astype(np.float64)
        ordered = np.sort(format.values)
        if len(ordered) % 2:  # narrow: without the lowest code
            ordered = np.concatenate([[ordered[0] - 1], ordered])
        if isinstance(format, formats.Codebook) or not getattr(format, "signed", True):
            return ordered[index]
        half = 2 ** (format.bits - 1)
        return ordered[(index + half) % (2 * half)]

    step = spread(weights.scale, shape)
    if weights.tensor_divisor is not None:
        step = step / np.float64(weights.tensor_divisor)
    zero = np.zeros(shape)
    if weights.zero_point is not None:
        index_of_zero = format.to_index(weights.zero_point).astype(np.int64)
        zero = spread(values(index_of_zero), shape)
    offset = np.zeros(shape)
    if weights.offset is not None:
        offset = spread(weights.offset, shape)
    return values(index), step, zero, offset


def oracle(x, weights):
    """The product, and the sum of what is added up for it, each without its sign."""
    values, step, zero, offset = parts(weights)
    quantizer = weights.quantizer
    in_basis = step * (values - zero) + offset
    size = abs(step) * (abs(values) + abs(zero)) + abs(offset)
    x = np.float64(x)
    if quantizer.hadamard is not None and quantizer.axis == -1:
        turned = rotation(quantizer, weights.shape[1]).T
        return x @ (in_basis @ turned), abs(x) @ (size @ abs(turned))
    turn = rotation(quantizer, weights.shape[0])
    # A rotated input is a sum itself, with an error of its own.
    return x @ turn @ in_basis, abs(x) @ abs(turn) @ size


def check(found, x, weights, slack=1.0):
    expected, size = oracle(x, weights)
    # Sums of 256 numbers in blocks, each rounded to float32: sixteen roundings and
    # a few of scales.
    room = slack * 24 * 2.0**-24 * size + (found.dtype == jnp.bfloat16) * 2.0**-8 * abs(
        expected
    )
    np.testing.assert_array_less(abs(np.float64(found) - expected), room + 1e-30)


def product(x, weights, numbers=None, **options):
    return jax.jit(lambda x, weights: cage.low_bit_dot(x, weights, numbers, **options))(
        x, weights
    )


FEW = ["int4", "int4 groups of 128", "q4_1"]
CASES = [(name, 5) for name in QUANTIZERS]
CASES += [(name, tokens) for name in FEW for tokens in (1, 300)]


@pytest.mark.parametrize("name,tokens", CASES)
def test_it_is_the_product_with_what_codes_stand_for(name, tokens, rng):
    weights = kernel_of(QUANTIZERS[name], rng)
    x = jnp.asarray(rng.normal(size=(tokens, IN)), jnp.float32)
    found = product(x, weights)
    assert found.shape == (tokens, OUT) and found.dtype == jnp.float32
    check(found, x, weights)


@pytest.mark.parametrize("name", ["int4 groups", "q4_1", "mxfp8", "quest"])
def test_bfloat16_inputs_are_multiplied_with_codes_unrounded(name, rng):
    weights = kernel_of(QUANTIZERS[name], rng)
    x = jnp.asarray(rng.normal(size=(5, IN)), jnp.bfloat16)
    check(product(x, weights, preferred_element_type=jnp.float32), x, weights)
    rounded = product(x, weights)
    assert rounded.dtype == jnp.bfloat16
    check(rounded, x, weights)


def test_float64(x64, rng):
    weights = cage.quantize(jnp.asarray(rng.normal(size=(IN, OUT))), cage.q4_1())
    x = jnp.asarray(rng.normal(size=(5, IN)))
    found = product(x, weights)
    assert found.dtype == jnp.float64
    check(found, x, weights, slack=2.0**-28)


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
    "experts": ((4, 64, 24), cage.q4_1(), (4, 3, 64), "eti,eio->eto"),
    "experts of nvfp4": ((4, 64, 24), cage.nvfp4(), (4, 3, 64), "eti,eio->eto"),
    "pairs of experts": (
        (4, 64, 24),
        cage.int4(axis=(0, 1), group_size=(2, 16)),
        (4, 3, 64),
        "eti,eio->eto",
    ),
    "one scale for all experts": (
        (4, 64, 24),
        cage.int4(axis=None),
        (4, 3, 64),
        "eti,eio->eto",
    ),
    "rotated heads": (
        (4, 32, 24),
        cage.quest(4, hadamard=32),
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


@pytest.mark.parametrize("name", AXES)
def test_any_axes(name, rng):
    shape, quantizer, inputs, einsum = AXES[name]
    weights = kernel_of(quantizer, rng, shape)
    x = jnp.asarray(rng.normal(size=inputs), jnp.float32)
    values = np.float64(cage.dequantize(weights))
    expected = np.einsum(einsum, np.float64(x), values)
    found = product(x, weights, numbers_of(einsum))
    assert found.shape == expected.shape
    # Up to 256 products, of numbers that are rotated or have zero points.
    size = np.einsum(einsum, abs(np.float64(x)), abs(values)).max()
    np.testing.assert_allclose(found, expected, atol=2.0**-20 * size, rtol=0)


def test_a_stack_by_vmap(rng):
    weights = kernel_of(cage.int4(group_size=32), rng, (3, 64, 8))
    x = jnp.asarray(rng.normal(size=(3, 5, 64)), jnp.float32)
    found = jax.vmap(cage.low_bit_dot)(x, weights)
    expected = np.float64(x) @ np.float64(cage.dequantize(weights))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("spec,sums", [((None, "x"), 0), (("x", None), 1)])
def test_shards_are_gathered_by_nobody(spec, sums, rng):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    # A block of 128 for each device.
    weights = kernel_of(cage.int4(group_size=32), rng, (1024, OUT))
    x = jnp.asarray(rng.normal(size=(5, 1024)), jnp.float32)
    expected = product(x, weights)
    weights = jax.tree.map(lambda a: jax.device_put(a, place), weights)
    x = jax.device_put(
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    program = jax.jit(cage.low_bit_dot)
    np.testing.assert_allclose(program(x, weights), expected, atol=1e-4)
    text = program.lower(x, weights).compile().as_text()
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


def has_whole_product(x, weights, quantizer):
    program = jax.make_jaxpr(
        lambda x, w: cage.low_bit_dot(x, w, inputs_quantizer=quantizer)
    )(x, weights)
    products = [e for e in program.eqns if e.primitive.name == "dot_general"]
    kinds = [tuple(str(v.aval.dtype) for v in e.invars) for e in products]
    return ("int8", "int8") in kinds


@pytest.mark.parametrize("name", [*WHOLE, *FLOATS])
def test_quantized_inputs(name, rng):
    quantizer, inputs = (WHOLE | FLOATS)[name]
    weights = kernel_of(quantizer, rng)
    x = jnp.asarray(rng.normal(size=(5, IN)), jnp.float32)
    found = product(x, weights, inputs_quantizer=inputs)
    rounded = np.float64(cage.dequantize(cage.quantize(x, inputs)))
    expected, size = oracle(rounded, weights)
    # As before; rotated inputs come out of a sum of 128 once more.
    np.testing.assert_array_less(abs(found - expected), 48 * 2.0**-24 * size)
    assert has_whole_product(x, weights, inputs) == (name in WHOLE)


def test_sums_of_whole_numbers_are_exact(rng):
    codes = rng.integers(-127, 128, (4096, 4))
    weights = cage.quantize(jnp.asarray(codes, jnp.float32), cage.int8(axis=None))
    x = rng.integers(-127, 128, (3, 4096))
    x[:, 0] = 127
    inputs = jnp.asarray(x, jnp.float32)
    found = product(inputs, weights, inputs_quantizer=cage.int8(axis=-1))
    expected = np.float32(x.astype(np.int64) @ codes)
    scale = np.float32(weights.scale[0, 0])
    assert scale == 1 and abs(expected).max() > 2**18
    np.testing.assert_array_equal(found, expected)


def test_attention_inputs_of_two_axes(rng):
    weights = kernel_of(cage.int4(axis=(0, 1)), rng, (4, 16, 24))
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 16)), jnp.float32)
    quantizer = cage.int8(axis=-1)
    numbers = (((2, 3), (0, 1)), ((), ()))
    found = product(x, weights, numbers, inputs_quantizer=quantizer)
    step = abs(np.asarray(x)).max((2, 3), keepdims=True) / 127
    rounded = np.round(np.asarray(x) / step) * np.float64(step)
    expected = np.einsum("bthd,hdo->bto", rounded, cage.dequantize(weights))
    np.testing.assert_allclose(found, expected, atol=1e-4)


# --- programs -------------------------------------------------------------------------

RULES = cage.Rules([(r".*(kernel|embedding|w)", cage.int4(group_size=16))])


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
        return jnp.tanh(x @ w), jnp.sum(x)

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
    quantizer = cage.int4(group_size=16, axis=axis)
    codes = {"w": kernel_of(quantizer, rng, shape)}
    x = jnp.asarray(rng.normal(size=(4, 64)), jnp.float32)
    quantized = cage.low_bit(function)
    assert products_of(quantized, codes, x) == ["int4"]
    found = jax.jit(quantized)(codes, x)
    expected = function(cage.dequantize(codes), x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, expected
    )


def test_what_is_no_product_sees_the_values(rng):
    codes = {"w": kernel_of(cage.int4(group_size=16), rng, (64, 64)), "b": jnp.ones(64)}
    ids = jnp.array([3, 5])

    def tied(params, ids, train):
        assert train is False
        x = params["w"][ids] + params["b"][None]
        return x @ params["w"].T, jnp.tanh(params["w"]).sum()

    found = cage.low_bit(tied)(codes, ids, train=False)
    expected = tied(cage.dequantize(codes), ids, train=False)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


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
    ids = jnp.asarray(rng.integers(0, 32, (2, 6)))
    model = Block()
    codes = cage.quantize(model.init(key, ids), rules)
    apply = cage.low_bit(model.apply)
    kinds = ["float4_e2m1fn", "int4", "int4", "int4"]
    assert sorted(products_of(apply, codes, ids)) == kinds
    expected = model.apply(cage.dequantize(codes), ids)
    np.testing.assert_allclose(jax.jit(apply)(codes, ids), expected, atol=2e-4)
    inputs = cage.quantize_activations(model.apply, rules)
    expected = inputs(cage.dequantize(codes), ids)
    found = jax.jit(cage.low_bit(model.apply, rules))(codes, ids)
    # An input that lies between two codes may go to either: a step of 1/127.
    assert np.mean(abs(found - expected) < 1e-3) > 0.9
    np.testing.assert_allclose(found, expected, atol=0.1)


def test_an_nnx_model(rng):
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    codes = cage.quantize(state, RULES)
    x = jnp.asarray(rng.normal(size=(4, 64)), jnp.float32)
    apply = cage.low_bit(lambda state, x: nnx.merge(graphdef, state)(x))
    assert products_of(apply, codes, x) == ["int4"]
    expected = nnx.merge(graphdef, cage.dequantize(codes))(x)
    np.testing.assert_allclose(apply(codes, x), expected, atol=1e-4)


def test_the_gradient_of_inputs(rng):
    weights = kernel_of(cage.int4(group_size=32), rng)
    x = jnp.asarray(rng.normal(size=(5, IN)), jnp.float32)
    found = jax.grad(lambda x: jnp.sum(cage.low_bit_dot(x, weights)))(x)
    values, step, _, _ = parts(weights)
    expected = np.broadcast_to((values * step).sum(1), x.shape)
    np.testing.assert_allclose(found, expected, atol=1e-4)


# --- errors ---------------------------------------------------------------------------


def test_what_cannot_be_multiplied():
    x, weights = jnp.ones((2, 16)), cage.quantize(jnp.ones((16, 4)), cage.int4())
    with pytest.raises(
        TypeError, match="`weights` must be a QuantizedArray; got Array"
    ):
        cage.low_bit_dot(x, x)
    with pytest.raises(
        TypeError, match=r"`inputs` must be .* real floats; got dtype int8"
    ):
        cage.low_bit_dot(x.astype(jnp.int8), weights)
    for numbers in (
        None,
        (((1,), (1,)), ((), ())),
        (((2,), (0,)), ((), ())),
        (((), ()), ((), ())),
        (((1, 0), (0,)), ((), ())),
        "ij,jk",
    ):
        with pytest.raises(
            ValueError, match=r"`dimension_numbers` .* inputs.shape=\(2"
        ):
            cage.low_bit_dot(x[:, :8] if numbers is None else x, weights, numbers)
    with pytest.raises(TypeError, match="`rules` must be Rules; got Quantizer"):
        cage.low_bit(lambda params: params, cage.int4())


def test_errors_name_the_parameter():
    codes = {"up": cage.quantize(jnp.ones((16, 4)), cage.int4())}
    rules = cage.Rules([("up", cage.int4(), cage.int8(axis=-1, group_size=5))])
    apply = cage.low_bit(lambda params, x: x @ params["up"], rules)
    with pytest.raises(ValueError, match=r"up.*`group_size` must divide"):
        apply(codes, jnp.ones((2, 16)))
