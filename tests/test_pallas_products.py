"""The kernel that multiplies codes, interpreted, against float64 NumPy of the codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_codes
from jax.experimental.pallas import tpu as pltpu
from test_serving import check

import cage_jax as cage
from cage_jax import scale_types
from cage_jax.pallas import candidates, tiling

pytestmark = pytest.mark.usefixtures("standard_promotion", "small_arrays_too")

IN, OUT = 768, 128
QUANTIZERS = {
    "int4 channel": cage.int4(),
    "int4 groups of 128": cage.int4(group_size=128),
    "int4 groups over strips": cage.int4(group_size=384),
    "int4 zero point": cage.int4(symmetric=False, group_size=32),
    "int8 zero point": cage.int8(symmetric=False, group_size=64),
    "int2": cage.int2(group_size=64),
    "midrise": dataclasses.replace(cage.quest(4, group_size=32), hadamard=None),
    "mxfp4": cage.mxfp4(),
    "mxfp8": cage.mxfp8("e5m2"),
    "nvfp4": cage.nvfp4(),
    "bfloat16 scales": dataclasses.replace(
        cage.int4(group_size=32), scale_type=scale_types.Narrow("bfloat16")
    ),
    "q4_1": cage.q4_1(),
    "q8_0": cage.q8_0(),
}


def kernel(x, weights, *, scaled=False):
    """The compiled kernel; reads out of bounds, races and gaps show."""
    variants = candidates.product_kernels(
        weights.quantizer, weights.shape, x.shape, jnp.float32, scaled=scaled
    )
    (variant,) = variants.found
    params = pltpu.InterpretParams(
        detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
    )
    with pltpu.force_tpu_interpret_mode(params):
        return jax.jit(variant.function).lower(x, weights).compile()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_sums_of_groups_are_scaled(name, rng):
    weights = random_codes(rng, QUANTIZERS[name], (IN, OUT))
    tokens = 300 if name == "q4_1" else 5  # two blocks of tokens, or one
    x = rng.standard_normal((tokens, IN)).astype(jnp.bfloat16)
    product = kernel(x, weights)
    # Sums of 768 numbers by 128, each rounded to float32, and a few of scales.
    check(product(x, weights), x, weights)
    # A scale that is no number makes its group NaN.
    scale = np.array(weights.scale)
    scale[-1, 5] = np.nan
    found = product(np.ones_like(x), dataclasses.replace(weights, scale=scale))
    expected = np.broadcast_to(np.arange(OUT) == 5, found.shape)
    np.testing.assert_array_equal(np.isnan(found), expected)


def check_scaled(names, rng):
    x = rng.standard_normal((2, 40, IN)).astype(jnp.bfloat16)
    for name in names:
        weights = random_codes(rng, QUANTIZERS[name], (IN, OUT))
        found = kernel(x, weights, scaled=True)(x, weights)
        divisor, whole = np.float64(1), weights
        if weights.tensor_divisor is not None:  # which comes last
            divisor = np.float64(weights.tensor_divisor)
            one = np.ones((1, 1), np.float32)
            whole = dataclasses.replace(weights, tensor_divisor=one)
        rounded = np.asarray(jax.jit(cage.dequantize)(whole)).astype(jnp.bfloat16)
        rounded = rounded.astype(np.float64) / divisor
        size = abs(np.float64(x)) @ abs(rounded)
        assert found.shape == (2, 40, OUT)
        np.testing.assert_array_less(
            abs(found - np.float64(x) @ rounded), 24 * 2.0**-24 * size, err_msg=name
        )


def test_of_many_tokens_scaled_weights_are_rounded(rng):
    check_scaled(["nvfp4", "q4_1"], rng)


# --- where it is taken ----------------------------------------------------------------


def taken(quantizer, shape=(IN, OUT), x=None, implementation=None, **options):
    """Whether a program for one TPU has the kernel."""
    weights = jax.eval_shape(
        lambda w: cage.quantize(w, quantizer), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    x = jax.ShapeDtypeStruct((8, shape[0]), jnp.bfloat16) if x is None else x

    def product(x, weights):
        return cage.low_bit_dot(x, weights, implementation=implementation, **options)

    program = jax.jit(product).trace(x, weights).lower(lowering_platforms=("tpu",))
    return "tpu_custom_call" in program.as_text()


def test_it_is_taken_for_groups_by_itself():
    groups = cage.int4(group_size=128)
    assert taken(groups)
    assert taken(groups, x=jax.ShapeDtypeStruct((2, 200, IN), jnp.float32))
    assert not taken(groups, implementation="xla")
    assert not taken(cage.int2(group_size=64))
    # XLA moves as little.
    assert not taken(cage.int4()) and taken(cage.int4(), implementation="pallas")
    few = jax.ShapeDtypeStruct((300, IN), jnp.bfloat16)
    assert not taken(cage.int4(group_size=384), x=few)


FALLS_BACK = {
    "an axis of 200 is not a multiple": (cage.int4(group_size=128), (IN, 200)),
    "have two axes, and have 3": (cage.int4(group_size=128), (2, IN, OUT)),
    "groups along the first": (cage.int4(axis=None), (IN, OUT)),
    "groups along the first axis": (cage.int4(axis=-1, group_size=32), (IN, OUT)),
    "groups along the first axis must": (
        cage.int4(axis=(0, 1), group_size=(32, 8)),
        (IN, OUT),
    ),
    "groups along the first axis must divide": (cage.int4(group_size=8), (IN, OUT)),
    "groups along the first axis must divide 128": (
        cage.int4(group_size=48),
        (IN, OUT),
    ),
    "its format is nf4": (cage.nf4(), (IN, OUT)),
    "a sum over 16384 does not fit": (cage.int8(group_size=128), (2**14, OUT)),
}


def test_what_no_kernel_is_for():
    for why, (quantizer, shape) in FALLS_BACK.items():
        with pytest.raises(tiling.NoKernelError, match=why):
            tiling.product_tiling(quantizer, shape, 8, scaled=False)


def test_other_products_are_left_to_the_compiler():
    groups = cage.int4(group_size=128)
    x = jax.ShapeDtypeStruct((8, IN), jnp.float32)
    assert taken(groups, x=x) and not taken(groups, x=x, precision="highest")
    with jax.default_matmul_precision("highest"):
        assert not taken(groups, x=x)
    assert not taken(groups, x=jax.ShapeDtypeStruct((8, IN), jnp.float16))
    assert not taken(groups, dimension_numbers=(((0,), (0,)), ((), ())),
                     x=jax.ShapeDtypeStruct((IN, 8), jnp.bfloat16))  # fmt: skip
    rotated = cage.quest(4, group_size=128)
    assert taken(rotated)
    many = jax.ShapeDtypeStruct((300, IN), jnp.bfloat16)
    assert taken(groups, x=many) and not taken(rotated, x=many)
    with pytest.raises(ValueError, match="there is none for this quantizer and shape"):
        taken(cage.nf4(), implementation="pallas")
    with pytest.raises(ValueError, match="there is none for this quantizer and shape"):
        taken(groups, implementation="pallas", inputs_quantizer=cage.int8(axis=-1))


def test_programs_take_it():
    codes = jax.eval_shape(
        lambda w: cage.quantize({"w": w}, cage.Rules([("w", cage.mxfp4())])),
        jax.ShapeDtypeStruct((IN, OUT), jnp.float32),
    )
    x = jax.ShapeDtypeStruct((8, IN), jnp.bfloat16)
    for implementation in (None, "xla"):
        function = cage.low_bit(
            lambda params, x: jnp.tanh(x @ params["w"]), implementation=implementation
        )
        program = jax.jit(function).trace(codes, x).lower(lowering_platforms=("tpu",))
        assert ("tpu_custom_call" in program.as_text()) == (implementation is None)


def test_devices(rng):
    """A compiler that partitions gets its own form, a `shard_map` the kernel."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, columns = jax.P("x", None), jax.P(None, "x")
    weights = random_codes(rng, cage.mxfp4(), (IN, 8 * OUT))
    x = jnp.asarray(rng.standard_normal((8, IN)), jnp.bfloat16)
    for spec, of_weights in ((rows, jax.P()), (jax.P(), columns)):
        out = columns if spec == jax.P() else rows
        mapped = jax.shard_map(
            cage.low_bit_dot,
            mesh=mesh,
            in_specs=(spec, of_weights),
            out_specs=out,
        )
        text = jax.jit(mapped).trace(x, weights).lower(lowering_platforms=("tpu",))
        assert "tpu_custom_call" in text.as_text()
        places = [jax.NamedSharding(mesh, each) for each in (spec, of_weights)]
        program = jax.jit(cage.low_bit_dot, in_shardings=tuple(places))
        text = program.trace(x, weights).lower(lowering_platforms=("tpu",))
        assert "tpu_custom_call" not in text.as_text()
