"""Kernels for GPU against float64 NumPy, run or interpreted; and lowered for CUDA."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from kernel_oracle import check_kernel, rotate
from test_pallas_tpu import FALLS_BACK, QUANTIZERS

import cage_jax as cage
from cage_jax.arrays.adamw import AdamW, Dtypes, StepNumbers
from cage_jax.arrays.factors import Factors
from cage_jax.pallas import candidates, gpu, tiling
from cage_jax.quantizers.formats import Float
from cage_jax.quantizers.scales import Gaussian

pytestmark = pytest.mark.usefixtures("standard_promotion", "small_arrays_too")


# By name and axis; where a group is all of an axis, it is passed over once and twice.
# More of them are in programs/test_every_kernel.py.
CASES = [
    ("quest", -2, (384, 64)),
    ("quest", -1, (32, 128)),
    ("quest 64", -1, (32, 384)),
    ("int4 channel", -1, (128, 96)),
    ("int4 channel", -2, (64, 128)),
    ("int4 groups", -2, (128, 96)),
    ("int4 groups in a rotation", -2, (256, 32)),
    ("int8 absmean", -1, (32, 128)),
    ("mxfp4", -1, (64, 128)),
    ("e4m3 scales", -2, (64, 64)),
    ("zero points", -2, (64, 64)),
    ("zero point", -1, (32, 8192)),
    ("quest", 0, (256, 32, 32)),
    ("int4 groups", -3, (2, 128, 32, 32)),
]
# Not on a GPU, with JAX_PLATFORMS=cuda.
INTERPRET = jax.default_backend() == "cpu"


def check(name, axis, shape, rng, dtype="float32"):
    x = rng.standard_normal(shape).astype(dtype)
    quantizer = dataclasses.replace(QUANTIZERS[name], axis=axis)
    cut = tiling.tiling_for_gpu(quantizer, x.shape, x.dtype)
    assert cut is not None
    kernel = partial(gpu.fake_quant, tiling=cut, masked=True, interpret=INTERPRET)
    check_kernel(jax.jit(kernel), x, quantizer)


@pytest.mark.parametrize("name, axis, shape", CASES)
def test_values_and_masks(name, axis, shape, rng):
    check(name, axis, shape, rng)


def test_bfloat16_and_stacks(rng):
    check("quest", -2, (2, 3, 128, 32), rng, jnp.bfloat16)


def test_levels_beyond_the_dtype_saturate(rng):
    quantizer = dataclasses.replace(QUANTIZERS["zero points"], axis=-1)
    largest = float(jnp.finfo(jnp.bfloat16).max)
    x = jnp.asarray(largest * rng.choice([-1, 0.5, 1], (32, 128)), jnp.bfloat16)
    cut = tiling.tiling_for_gpu(quantizer, x.shape, x.dtype)
    kernel = partial(gpu.fake_quant, tiling=cut, masked=False, interpret=INTERPRET)
    (value,) = jax.tree.leaves(jax.jit(kernel)(x))
    assert np.isfinite(np.float64(value)).all()
    expected = cage.fake_quant(x, quantizer, implementation="xla")
    np.testing.assert_array_equal(value, expected)


def test_without_a_mask_the_values_are_the_same(rng):
    x = rng.standard_normal((32, 128)).astype(np.float32)
    quantizer = dataclasses.replace(QUANTIZERS["int4 channel"], axis=-1)
    cut = tiling.tiling_for_gpu(quantizer, x.shape, x.dtype)
    kernel = partial(gpu.fake_quant, tiling=cut, interpret=INTERPRET)
    both = jax.jit(lambda x: (kernel(x, masked=False), kernel(x, masked=True)[0]))
    np.testing.assert_array_equal(*both(x))


def test_the_gradient_of_a_mask(rng):
    for axis, shape in ((-2, (384, 32)), (-1, (32, 384))):
        quantizer = cage.quest(4, axis=axis)
        mask = rng.integers(0, 2, shape).astype(np.int8)
        cotangent = rng.standard_normal(shape).astype(np.float32)
        cut = tiling.tiling_for_gpu(quantizer, shape, jnp.float32)
        run = partial(gpu.masked_gradient, tiling=cut, interpret=INTERPRET)
        found = jax.jit(run)(mask, cotangent)
        expected = rotate(mask * rotate(np.float64(cotangent), quantizer), quantizer)
        # Two products of three parts each, of 24 bits.
        np.testing.assert_allclose(found, expected, atol=4e-6, err_msg=f"axis {axis}")


ADAMW = AdamW(b1=0.9, b2=0.95, eps=1e-8, eps_root=0.0, weight_decay=0.1)
ROWS = cage.int4(group_size=32, axis=-1)
STEPS = [
    (cage.quest(4, axis=-2), (2, 384, 32), False, False, "float32"),
    (cage.quest(4, axis=-2), (2, 384, 32), False, True, "float32"),
    (ROWS, (64, 128), False, True, "float32"),
    (ROWS, (64, 128), True, False, "float32"),
    (ROWS, (64, 128), True, True, "bfloat16"),
]


@pytest.mark.parametrize("quantizer, shape, at_updated, weighted, dtype", STEPS)
def test_a_step(quantizer, shape, at_updated, weighted, dtype, rng):
    dtype = jnp.dtype(dtype)
    gradient, first, second, x = rng.standard_normal((4, *shape)).astype(dtype)
    second = np.abs(second)
    arrays = gradient, first, second, x
    kernel = partial(
        gpu.adamw_step,
        tiling=tiling.tiling_for_gpu(quantizer, shape, dtype),
        adamw=ADAMW,
        at_updated=at_updated,
        interpret=INTERPRET,
    )
    step = jax.jit(kernel)
    error = jax.jit(partial(cage.quantization_error, quantizer=quantizer))
    weight, weights = 1.0, None
    if weighted:
        # Each matrix of a stack has its own.
        *stack, rows, columns = shape
        factors = rng.uniform(0.5, 2, (*stack, rows, 1)), rng.uniform(0.5, 2, columns)
        factors = factors[0], np.broadcast_to(factors[1], (*stack, 1, columns))
        inputs, outputs = factors if quantizer.axis == -2 else factors[::-1]
        weights = Factors(jnp.float32(inputs), jnp.float32(outputs), largest=2.0)
        weight = np.minimum(inputs * outputs, 2.0)

    def of(number):
        return float(dtype.type(number))

    gradient, first, second, before = map(np.float64, (gradient, first, second, x))
    m = of(1 - 0.9) * gradient + of(0.9) * first
    v = of(1 - 0.95) * gradient**2 + of(0.95) * second
    base = m / of(0.3) / (np.sqrt(v / of(0.2)) + 1e-8)
    base = -of(1e-2) * (base + of(0.1) * before)
    error_at = error(np.float32((before + base).astype(dtype) if at_updated else x))
    # Near what is expected; bfloat16 is at most half a step away, as it is rounded.
    rounding = 2.0**-8 if dtype == jnp.bfloat16 else 0
    for pull in (0.0, -0.05):
        numbers = StepNumbers(*map(jnp.float32, (1e-2, pull, 0.3, 0.2)))
        numbers = numbers.rounded(Dtypes(dtype, dtype))
        found = [np.float64(each) for each in step(*arrays, numbers, None, weights)]
        for ours, expected in zip(found[:2], (m, v)):
            np.testing.assert_allclose(ours, expected, rtol=1e-5 + rounding, atol=1e-6)
        # One at a tie may go to the other level, and all that it is rotated with.
        expected = before + base + pull * weight * np.float64(error_at)
        near = np.abs(found[2] - expected) < 2e-6 + rounding * np.abs(expected)
        sure = 0.99 if quantizer.hadamard or at_updated else 1 - 1e-9
        assert near.mean() > sure, f"pull {pull}"


def test_steps_that_no_kernel_is_for():
    def found(quantizer, shape, first="float32", at_updated=False, measured=False):
        options = {"at_updated": at_updated, "measured": measured}
        like = quantizer, shape, jnp.float32, jnp.dtype(first)
        variants = candidates.adamw_kernels(*like, ADAMW, **options)
        return "cuda" in {each.platform for each in variants.found}

    # All four arrays would be read twice.
    channel, rows = (cage.quest(4), (384, 64)), (ROWS, (64, 128))
    assert found(*channel) and not found(*channel, at_updated=True)
    assert found(*rows, at_updated=True) and not found(*rows, measured=True)
    assert found(*rows, "bfloat16") and not found(*rows, "float16")


FOR_TPU_ALONE = {
    "65536 does not fit on the chip, and is not",
    "line up with tiles only every 640",
    "share one divisor per tensor",
    "whose parts are not neighbours",
    "would move it to other tiles",
    "along axis 0, and neighbours along 1 and 2",
}
NEITHER = {
    "one divisor for a tensor": ((256, 128), cage.nvfp4(axis=-1)),
    "128 by 8 elements are too small": ((256, 200), cage.int4(group_size=32)),
    "groups of 160 are not a power": ((1280, 128), cage.int4(group_size=160)),
    "512 by 8 elements are too small": ((1024, 128), cage.int4(group_size=512)),
    "128 by 4 elements are too small": ((100, 128), cage.quest(4, axis=-1)),
    "the compiler reads such columns": ((1024, 128), cage.int4()),
}
LEFT = {
    name: case for name, case in FALLS_BACK.items() if name not in FOR_TPU_ALONE
} | NEITHER


def test_what_no_kernel_is_for():
    for why, (shape, quantizer) in LEFT.items():
        with pytest.raises(tiling.NoKernelError, match=why):
            tiling.tiling_for_gpu(quantizer, shape, jnp.float32)


def for_cuda(function, *args):
    """The program for a GPU that need not be here."""
    # From JAX 0.11 on it is named by the mesh; before, it is this kind by default.
    kind = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        traced = jax.jit(function).trace(*args)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("axis", [-2, -1])
def test_it_is_in_a_program_for_cuda_that_names_it(axis):
    rules = cage.Rules([(".*", quantizer := cage.quest(4, axis=axis))])
    tx = cage.cage_adamw(1e-3, rules, strength=1.0)
    x = {"x": jax.ShapeDtypeStruct((512, 512), jnp.float32)}

    def both(implementation):
        def run(x, state):
            def loss(x):
                value = cage.fake_quant(
                    x["x"], quantizer, implementation=implementation
                )
                return value.sum()

            gradient = jax.grad(loss)(x)
            return tx.fused_step(gradient, state, x, implementation=implementation)

        return for_cuda(run, x, jax.eval_shape(tx.init, x))

    names = ("cage_fake_quant", "cage_masked_gradient", "cage_adamw_step")
    text = both("pallas")
    assert all(name in text for name in names)
    # It was not measured there, so that nothing else takes it.
    text = both(None)
    assert not any(name in text for name in names)


ONE_ALONE = {
    "tpu": ((1024, 128), cage.int4()),
    "cuda": ((128, 2048), cage.int4(axis=-1, group_size=1024)),
}


def lowered(function, platform, *args):
    traced = jax.jit(function).trace(*args)
    return traced.lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("platform", ONE_ALONE)
def test_a_parameter_without_a_kernel_on_a_platform_is_named(platform):
    (other,) = set(ONE_ALONE) - {platform}
    shape, quantizer = ONE_ALONE[platform]
    fits = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    tree = {"a": fits, "b": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    rules = cage.Rules([("b/kernel", quantizer), ("a", cage.quest(4))])
    tx = cage.cage_adamw(1e-3, rules, strength=1.0)

    def step(x, gradient):
        return tx.fused_step(gradient, tx.init(x), x, implementation="pallas")

    def loss(x):
        value = cage.fake_quant(x, rules, implementation="pallas")
        return jnp.square(value["b"]["kernel"]).sum()

    for function, *args in ((step, tree, tree), (loss, tree), (jax.grad(loss), tree)):
        match = f"^`b/kernel`: `implementation` must .*there is none for {other}"
        with pytest.raises(ValueError, match=match):
            lowered(function, other, *args)
        lowered(function, platform, *args)


def test_a_parameter_is_named_once_where_nothing_is_traced():
    x = {"b": {"kernel": jnp.ones((512, 512))}}
    rules = cage.Rules([("b/kernel", cage.quest(4))])
    match = "^`b/kernel`: `implementation` must .*there is none for cpu"
    with pytest.raises(ValueError, match=match):
        cage.fake_quant(x, rules, implementation="pallas")


def test_the_machine_divides_and_rounds():
    """Triton's own quotients and roots are approximate, and it does not round."""
    x = jax.ShapeDtypeStruct((256, 64), jnp.float32)
    for quantizer in (cage.quest(4), cage.mxfp4()):
        cut = tiling.tiling_for_gpu(quantizer, x.shape, x.dtype)
        kernel = partial(gpu.fake_quant, tiling=cut, masked=True)
        text = str(jax.make_jaxpr(kernel)(x))
        assert "div.rn.f32" in text and " div " not in text
        assert " sqrt " not in text and " round[" not in text
        assert ("sqrt.rn.f32" in text) == isinstance(quantizer.scale, Gaussian)
        assert ("cvt.rni.f32" in text) == isinstance(quantizer.format, Float)


def test_all_else_stays(monkeypatch):
    monkeypatch.setattr(gpu, "_INSTRUCTIONS", {})

    def function(x):
        return jnp.round(x), {"a": jnp.sort(x) / 3, "b": np.float32(2)}

    x = jnp.linspace(-3, 3, 15)
    found, expected = gpu._exactly(False)(function)(x), function(x)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
