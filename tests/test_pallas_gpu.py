"""Kernels for GPU: interpreted, against float64 NumPy; and lowered for CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from kernel_oracle import checked, rotate
from test_pallas_tpu import FALLS_BACK, QUANTIZERS

import cage_jax as cage
from cage_jax.adamw import AdamW, StepNumbers
from cage_jax.formats import Float
from cage_jax.pallas import gpu, tiles
from cage_jax.scales import Gaussian

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(autouse=True)
def small_arrays_too(monkeypatch):
    monkeypatch.setattr(tiles, "SMALLEST", 0)


def kernel(x, quantizer, masked=True):
    cut = tiles.tiles_for_gpu(quantizer, x.shape, x.dtype)
    assert cut is not None
    return gpu.fake_quant(x, tiles=cut, masked=masked, interpret=True)


def check(x, quantizer):
    return checked(x, quantizer, *kernel(x, quantizer))


# By name and axis; where a group is all of an axis, it is passed over once and twice.
EACH = [
    ("quest", -2, (384, 64)),
    ("quest", -1, (32, 128)),
    ("quest 64", -1, (32, 384)),
    ("quest groups", -1, (64, 512)),
    ("int4 channel", -1, (128, 96)),
    ("int4 channel", -2, (64, 128)),
    ("int4 groups", -2, (128, 96)),
    ("int4 groups", -1, (160, 128)),
    ("int4 groups in a rotation", -2, (256, 32)),
    ("int4 rotations in a group", -2, (256, 32)),
    ("int4 rotations in a group", -1, (32, 256)),
    ("int8 absmean", -1, (32, 128)),
    ("mxfp4", -1, (64, 128)),
    ("mxfp8", -2, (64, 64)),
    ("e4m3 scales", -2, (64, 64)),
    ("int4 up", -1, (32, 128)),
]


@pytest.mark.parametrize("name, axis, shape", EACH)
def test_values_and_masks(name, axis, shape, rng):
    quantizer = dataclasses.replace(QUANTIZERS[name], axis=axis)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    values, mask = check(x, quantizer)
    if quantizer.hadamard or "mean" in name:
        return
    # Without sums it is the default to the bit.
    expected, back = jax.vjp(
        lambda x: cage.fake_quant(x, quantizer, implementation="xla"), x
    )
    np.testing.assert_array_equal(values, expected)
    if quantizer.gradient != "identity":
        np.testing.assert_array_equal(mask, *back(jnp.ones_like(x)))


@pytest.mark.parametrize("name", ["quest", "mxfp4"])
def test_bfloat16_and_stacks(name, rng):
    x = jnp.asarray(rng.normal(size=(2, 3, 128, 32)), jnp.bfloat16)
    check(x, QUANTIZERS[name])


@pytest.mark.parametrize("axis, shape", [(-2, (384, 32)), (-1, (32, 384))])
def test_the_gradient_of_a_mask(axis, shape, rng):
    quantizer = cage.quest(4, axis=axis)
    mask = rng.integers(0, 2, shape).astype(np.int8)
    cotangent = rng.normal(size=shape).astype(np.float32)
    found = gpu.masked_gradient(
        jnp.asarray(mask),
        jnp.asarray(cotangent),
        tiles=tiles.tiles_for_gpu(quantizer, shape, jnp.float32),
        interpret=True,
    )
    expected = rotate(mask * rotate(np.float64(cotangent), quantizer), quantizer)
    # Two products of three parts each, of 24 bits.
    np.testing.assert_allclose(found, expected, atol=4e-6)


@pytest.mark.parametrize("name", ["quest", "int4 groups"])
def test_what_is_not_finite_makes_its_group_nan(name, rng):
    quantizer = QUANTIZERS[name]
    x = np.float32(rng.normal(size=(256, 32)))
    x[70, 5], x[101, 17], x[200, 30] = np.nan, np.inf, -np.inf
    values = np.asarray(kernel(jnp.asarray(x), quantizer, masked=False))
    (size,) = quantizer.groups(x.shape).values()
    assert np.isnan(values).sum() == 3 * size
    expected = cage.fake_quant(jnp.asarray(x), quantizer, implementation="xla")
    np.testing.assert_array_equal(np.isnan(values), np.isnan(expected))


ROWS = cage.int4(group_size=32, axis=-1)
STEPS = [
    (cage.quest(4), (2, 384, 32), False),
    (ROWS, (64, 128), False),
    (ROWS, (64, 128), True),
]


@pytest.mark.parametrize("pull", [0.0, -0.05])
@pytest.mark.parametrize("quantizer, shape, at_updated", STEPS)
def test_a_step(quantizer, shape, at_updated, pull, rng):
    gradient, first, second, x = rng.normal(size=(4, *shape)).astype(np.float32)
    second = np.abs(second)
    found = gpu.adamw_step(
        *map(jnp.asarray, (gradient, first, second, x)),
        StepNumbers(*map(jnp.float32, (1e-2, pull, 0.3, 0.2))),
        tiles=tiles.tiles_for_gpu(quantizer, shape, jnp.float32),
        adamw=AdamW(b1=0.9, b2=0.95, eps=1e-8, eps_root=0.0, weight_decay=0.1),
        at_updated=at_updated,
        interpret=True,
    )
    m = 0.1 * np.float64(gradient) + 0.9 * first
    v = 0.05 * np.float64(gradient) ** 2 + 0.95 * second
    update = -1e-2 * (m / 0.3 / (np.sqrt(v / 0.2) + 1e-8) + 0.1 * x)
    point = jnp.asarray(x + update if at_updated else x, jnp.float32)
    update += pull * np.float64(cage.quantization_error(point, quantizer))
    for ours, expected in zip(found[:2], (m, v)):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    # One at a tie may go to the other level, and with it all that it is rotated with.
    near = np.abs(found[2] - (x + update)) < 2e-6
    sure = 0.99 if quantizer.hadamard or at_updated else 1 - 1e-9
    assert near.mean() > sure


FOR_TPU_ALONE = {
    "columns that are not laid out whole",
    "rows likewise",
    "a channel too long for the chip",
}
NEITHER = {
    "another scale of the whole tensor": ((256, 128), cage.nvfp4(axis=-1)),
    "columns": ((256, 200), cage.int4(group_size=32)),
    "a group": ((1280, 128), cage.int4(group_size=160)),
    "a group that leaves too few columns": ((1024, 128), cage.int4(group_size=512)),
    "rows in a rotation": ((100, 128), cage.quest(4, axis=-1)),
    # The compiler reads them as often.
    "columns without a rotation": ((1024, 128), cage.int4()),
}
LEFT = {
    name: case for name, case in FALLS_BACK.items() if name not in FOR_TPU_ALONE
} | NEITHER


@pytest.mark.parametrize("name", LEFT)
def test_what_no_kernel_is_for(name):
    shape, quantizer = LEFT[name]
    assert tiles.tiles_for_gpu(quantizer, shape, jnp.float32) is None


def for_cuda(function, *args):
    """The program for a GPU that need not be here."""
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    # From JAX 0.11 on it is named by the mesh; before, it is this kind by default.
    kind = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        traced = jax.jit(function).trace(*args)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("axis", [-2, -1])
def test_it_is_in_a_program_for_cuda_that_names_it(axis):
    rules = cage.Rules([(".*", quantizer := cage.quest(4, axis=axis))])
    tx = cage.cage_adamw(1e-3, rules, 1.0)
    x = {"x": jnp.zeros((512, 512))}

    def both(implementation):
        def run(x, state):
            def loss(x):
                value = cage.fake_quant(
                    x["x"], quantizer, implementation=implementation
                )
                return value.sum()

            gradient = jax.grad(loss)(x)
            return tx.fused_step(gradient, state, x, implementation=implementation)

        return for_cuda(run, x, tx.init(x))

    names = ("cage_fake_quant", "cage_masked_gradient", "cage_adamw_step")
    text = both("pallas")
    assert all(name in text for name in names)
    # It was not measured there, so that nothing else takes it.
    text = both(None)
    assert not any(name in text for name in names)


ONE_ALONE = {
    "tpu": ((1024, 128), cage.int4()),
    "cuda": ((2**16, 128), cage.quest(4)),
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
    tx = cage.cage_adamw(1e-3, rules, 1.0)

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
    match = "^`b/kernel`: `implementation` must .*there is none for this platform"
    with pytest.raises(ValueError, match=match):
        cage.fake_quant(x, rules, implementation="pallas")


@pytest.mark.parametrize("quantizer", [cage.quest(4), cage.mxfp4()])
def test_the_machine_divides_and_rounds(quantizer):
    """Triton's own quotients and roots are approximate, and it does not round."""
    x = jax.ShapeDtypeStruct((256, 64), jnp.float32)
    cut = tiles.tiles_for_gpu(quantizer, x.shape, x.dtype)
    text = str(jax.make_jaxpr(lambda x: gpu.fake_quant(x, tiles=cut, masked=True))(x))
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
