"""Low-rank adapters inside the grid, against float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from adapter_cases import moved, params_of, rules_of

import cage_jax as cage
from cage_jax import finetuning, formats, scales

FULL = cage.int4(group_size=8, narrow=False)
ONCE_ROUNDED = dataclasses.replace(FULL, gradient="identity")
ZERO = cage.int4(group_size=8, symmetric=False)
QUANTIZERS = {
    "int4": cage.int4(group_size=8),
    "full range": FULL,
    "zero points": ZERO,
    "int2": cage.int2(),
    "rotated": cage.quest(4),
    "clipped": cage.Quantizer(formats.Integer(3), scales.Gaussian()),
    "binary": cage.binary(),
    "nf4": cage.nf4(group_size=8),
    "q4_0": cage.q4_0(),
    "q4_1": cage.q4_1(),
    "lsq": cage.lsq(4, axis=-2, offset=True),
    "mxfp4": cage.mxfp4(),
    "nvfp4": cage.nvfp4(),
    "int8": cage.int8(),
}


@pytest.mark.parametrize("store", ["bfloat16", "int8", "float32"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_start_is_that_of_fake_quant(rng, name, store):
    quantizer = QUANTIZERS[name]
    if name == "int8" and store == "int8":
        return
    rules, params = rules_of(quantizer), params_of(rng)
    if quantizer.scale.needs_grid:
        params = cage.with_grids(params, rules)
    expected = cage.fake_quant(params, rules)
    expected = expected.get("params", expected)
    adapters, frozen = finetuning.low_rank(params, rules, store=store, scale="grid")
    assert frozen["up"]["kernel"].store.dtype == jnp.dtype(store)
    jax.tree.map(
        np.testing.assert_array_equal, finetuning.weights(adapters, frozen), expected
    )


@pytest.mark.parametrize("name", QUANTIZERS)
def test_merged_codes_have_the_values_of_the_forward_pass_to_the_bit(rng, name):
    quantizer = QUANTIZERS[name]
    rules, params = rules_of(quantizer), params_of(rng)
    for options in (
        {},  # LR-QAT
        {"units": "weights", "scale": "grid"},  # L4Q
        {"units": "weights", "store": "float32"},  # DL-QAT
        {"scale": None},
    ):
        adapters, frozen = finetuning.low_rank(
            params, rules, rank=3, alpha=2.0, **options
        )
        start = finetuning.merge(adapters, frozen)["up"]["kernel"]
        adapters = moved(adapters, rng)
        compiled = jax.jit(finetuning.weights)(adapters, frozen)
        codes = finetuning.merge(adapters, frozen)
        kernel = codes["up"]["kernel"]
        assert kernel.quantizer == quantizer.at((128, 8))
        assert (kernel.codes != start.codes).any()
        values = cage.dequantize(codes, rules)
        for found in (compiled, finetuning.weights(adapters, frozen)):
            jax.tree.map(np.testing.assert_array_equal, found, values)


def test_stores_hold_the_nearest_position_with_the_same_code(rng):
    x = rng.uniform(-7.5, 7.5, (64, 32)).astype(np.float32)
    x[0], x[1, :4] = 7.5, [0.49, -0.51, 5.499, 6.5]  # the scale becomes 1
    params = {"kernel": jnp.asarray(x)}
    quantizer = dataclasses.replace(FULL, scale=scales.Fixed(1.0), group_size=None)

    def stores(store, format=quantizer.format):
        rules = rules_of(dataclasses.replace(quantizer, format=format))
        return finetuning.low_rank(params, rules, store=store)[1]["kernel"].store

    def values_of(store, middle, fraction):
        return np.asarray(store).astype(np.float64) / 2.0**fraction + middle

    for format, middle, fraction in (
        (quantizer.format, -0.5, 4),
        (formats.Integer(4), 0, 4),
        (formats.Integer(3), 0, 5),
        (formats.Integer(6, narrow=False), -0.5, 2),
    ):
        found = np.asarray(stores("int8", format)).astype(int)
        every = values_of(np.arange(-128, 128), middle, fraction)
        low, high = format.low, format.high
        same = (
            np.clip(np.round(every), low, high)
            == np.clip(np.round(x), low, high)[..., None]
        )
        distance = np.where(same, np.abs(every - x[..., None]), np.inf)
        expected = np.abs(values_of(found, middle, fraction) - x)
        np.testing.assert_array_equal(expected, distance.min(-1))
    found = np.asarray(stores("bfloat16")).astype(np.float64)
    nearest = x.astype(ml_dtypes.bfloat16).astype(np.float64)
    differs = np.clip(np.round(nearest), -8, 7) != np.clip(np.round(x), -8, 7)
    assert differs.any()
    np.testing.assert_array_equal(found[~differs], nearest[~differs])
    np.testing.assert_array_equal(np.round(found[differs]), np.round(x[differs]))
    # The next of 8 bits, at most 2**-5 away below 8.
    assert (np.abs(found - nearest)[differs] <= 2.0**-5).all()
    np.testing.assert_array_equal(stores("float32"), x)


def in_groups(x, size):
    return x.reshape(-1, size, x.shape[-1])


def numpy_weight(phi, adapter, first, now, zero, options, quantizer):
    """The formula, and the slopes to the scale and to the product; groups of axis 0."""
    low, high = quantizer.format.low, quantizer.format.high
    size = phi.shape[0] // first.shape[0]

    def spread(part):
        return np.repeat(part, size, 0)

    product = options["factor"] * adapter["a"] @ adapter["b"]
    if options["units"] == "weights":
        product = product / spread(first)
    position = phi + product
    if options["scale"] == "grid":
        position = (position - spread(zero)) * spread(first / now) + spread(zero)
    rounded = np.round(position)
    codes = np.clip(rounded, low, high)
    # As the code of LR-QAT does, which clips what is rounded already.
    inside = codes == rounded
    if quantizer.gradient == "clip":
        inside = (position >= low) & (position <= high)
    value = spread(now) * (codes - spread(zero))
    to_scale = codes - spread(zero)
    to_product = inside * spread(now)
    if options["scale"] == "grid":
        to_scale = to_scale - inside * (position - spread(zero))
        to_product = inside * spread(first)
    if options["units"] == "weights":
        to_product = to_product / spread(first)
    return value, to_scale, to_product


@pytest.mark.parametrize("units", ["steps", "weights"])
@pytest.mark.parametrize("scale", ["output", "grid"])
@pytest.mark.parametrize("quantizer", [ONCE_ROUNDED, FULL, ZERO], ids=str)
def test_the_formulas(rng, x64, quantizer, scale, units):
    params = params_of(rng, (32, 8), np.float64)
    x = np.asarray(params["up"]["kernel"])
    adapters, frozen = finetuning.low_rank(
        params, rules_of(quantizer), rank=3, alpha=1.5, scale=scale, units=units
    )
    adapters = jax.tree.map(np.float64, moved(adapters, rng, 2.0))
    weight, adapter = frozen["up"]["kernel"], adapters["up/kernel"]
    first = np.asarray(weight.grid.scale)
    groups = in_groups(x, 8)
    if quantizer is not ZERO:
        np.testing.assert_allclose(first, np.abs(groups).max(1) / 7.5)
        zero = np.zeros_like(first)
    else:
        zero = np.asarray(weight.grid.zero_point)
    phi = np.asarray(weight.store).astype(np.float64)
    options = {"factor": 0.5, "units": units, "scale": scale}
    value, to_scale, to_product = numpy_weight(
        phi, adapter, first, adapter["scale"], zero, options, quantizer
    )
    assert (to_product == 0).any()  # something is clipped
    cotangent = rng.standard_normal(x.shape)

    @jax.jit
    def weight_and_gradient(adapters, frozen):
        def of(adapters):
            return finetuning.weights(adapters, frozen)["up"]["kernel"]

        found, gradient = jax.vjp(of, adapters)
        return found, gradient(jnp.asarray(cotangent))[0]

    found, gradients = weight_and_gradient(adapters, frozen)
    np.testing.assert_allclose(found, value, rtol=1e-12, atol=1e-12)
    back = 0.5 * cotangent * to_product
    for name, expected in {
        "a": back @ adapter["b"].T,
        "b": adapter["a"].T @ back,
        "scale": in_groups(cotangent * to_scale, 8).sum(1),
    }.items():
        np.testing.assert_allclose(
            gradients["up/kernel"][name], expected, rtol=1e-9, atol=1e-9, err_msg=name
        )


def test_an_offset_is_trained_as_in_lsq_plus(rng, x64):
    params = params_of(rng, (32, 8), np.float64)
    rules = rules_of(cage.lsq(3, axis=-2, offset=True))
    adapters, frozen = finetuning.low_rank(
        cage.with_grids(params, rules), rules, scale="grid", units="weights"
    )
    adapters = jax.tree.map(np.float64, moved(adapters, rng, 2.0))
    adapter, grid = adapters["up/kernel"], frozen["up"]["kernel"].grid
    phi = np.asarray(frozen["up"]["kernel"].store).astype(np.float64)
    latent = phi * np.asarray(grid.scale) + np.asarray(grid.offset)
    latent = latent + adapter["a"] @ adapter["b"]
    position = (latent - adapter["offset"]) / adapter["scale"]
    codes = np.clip(np.round(position), 0, 7)
    # The quantizer's gradient is "clip", which looks at the position itself.
    inside = (position >= 0) & (position <= 7)
    assert 0.1 < inside.mean() < 0.9
    cotangent = rng.standard_normal(phi.shape)
    found, pull = jax.vjp(
        lambda each: finetuning.weights(each, frozen)["up"]["kernel"], adapters
    )
    (gradient,) = pull(jnp.asarray(cotangent))
    value = codes * adapter["scale"] + adapter["offset"]
    np.testing.assert_allclose(found, value, rtol=1e-12, atol=1e-12)
    for name, slope in {"offset": ~inside, "scale": codes - inside * position}.items():
        expected = (cotangent * slope).sum(0, keepdims=True)
        np.testing.assert_allclose(gradient["up/kernel"][name], expected, rtol=1e-9)
    expected = (cotangent * inside) @ adapter["b"].T
    np.testing.assert_allclose(gradient["up/kernel"]["a"], expected, rtol=1e-9)


def test_scales_with_a_divisor_are_trained_in_the_size_of_weights(rng, x64):
    params, rules = params_of(rng, (64, 8), np.float64), rules_of(cage.nvfp4())
    adapters, frozen = finetuning.low_rank(params, rules)
    scale = np.asarray(adapters["up/kernel"]["scale"])
    divisor = np.asarray(frozen["up"]["kernel"].grid.tensor_divisor)
    assert 1 <= divisor.item() < 2
    absmax = np.abs(in_groups(np.asarray(params["up"]["kernel"]), 16)).max(1)
    # E4M3 has 3 bits of mantissa.
    np.testing.assert_allclose(scale / divisor, absmax / 6, rtol=2.0**-4)
    cotangent = rng.standard_normal((64, 8))
    value, pull = jax.vjp(
        lambda each: finetuning.weights(each, frozen)["up"]["kernel"], adapters
    )
    gradient = pull(jnp.asarray(cotangent))[0]["up/kernel"]["scale"]
    codes = in_groups(np.asarray(value), 16) / (scale / divisor)[:, None]
    expected = (in_groups(cotangent, 16) * codes).sum(1) / divisor
    np.testing.assert_allclose(gradient, expected, rtol=1e-9)


def test_a_rotated_weight_is_moved_in_its_basis_or_by_itself(rng):
    quantizer = dataclasses.replace(cage.quest(4), hadamard_seed=3)
    params, rules = params_of(rng), rules_of(quantizer)
    basis = quantizer.at((128, 8)).basis((128, 8))
    matrix = np.asarray(basis.rotate(jnp.eye(128, dtype=jnp.float32)), np.float64)
    for units in ("steps", "weights"):
        adapters, frozen = finetuning.low_rank(
            params, rules, store="float32", units=units
        )
        adapters = moved(adapters, rng)
        adapter, weight = adapters["up/kernel"], frozen["up"]["kernel"]
        product = np.float64(adapter["a"]) @ np.float64(adapter["b"])
        first, now = np.float64(weight.grid.scale), np.float64(adapter["scale"])
        if units == "weights":
            product = matrix @ product / first
        position = np.float64(weight.store) + product
        codes = np.clip(np.floor(position) + 0.5, -7.5, 7.5)
        sure = np.abs(position - np.round(position)) > 1e-4  # not at a border
        found = finetuning.weights(adapters, frozen)["up"]["kernel"]
        rotated = matrix @ np.float64(found)
        np.testing.assert_allclose(rotated[sure], (codes * now)[sure], atol=1e-5)
        # float32 sums of 128 numbers, and a few positions at a border
        assert sure.mean() > 0.99

        cotangent = rng.standard_normal((128, 8))

        def loss(adapters, frozen=frozen, cotangent=cotangent):
            kernel = finetuning.weights(adapters, frozen)["up"]["kernel"]
            return jnp.sum(kernel * jnp.asarray(cotangent, jnp.float32))

        gradient = jax.grad(loss)(adapters)["up/kernel"]["b"]
        inside = np.abs(position) <= 7.5  # "clip"
        back = matrix @ cotangent * inside * now
        if units == "weights":
            back = matrix.T @ (back / first)
        expected = np.float64(adapter["a"]).T @ back
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-3)


def test_every_rank_up_to_the_shorter_side(rng):
    params, rules = params_of(rng, (32, 24)), rules_of(cage.int4())
    for rank in (1, 16, 19):
        adapters, frozen = finetuning.low_rank(
            params, rules, rank=rank, store="float32", scale=None
        )
        adapters = moved(adapters, rng)
        a, b = (np.float64(adapters["up/kernel"][name]) for name in "ab")
        position = np.float64(frozen["up"]["kernel"].store) + a @ b
        codes = np.clip(np.round(position), -7, 7)
        sure = np.abs(np.abs(position - np.floor(position)) - 0.5) > 1e-5
        found = np.asarray(finetuning.merge(adapters, frozen)["up"]["kernel"].codes)
        np.testing.assert_array_equal(found.astype(int)[sure], codes[sure])
        compiled = jax.jit(finetuning.weights)(adapters, frozen)["up"]["kernel"]
        expected = cage.dequantize(finetuning.merge(adapters, frozen))["up"]["kernel"]
        np.testing.assert_array_equal(compiled, expected)


def test_stacks_convolutions_and_products_over_several_axes(rng):
    for shape, axis, rank, a, b in (
        ((3, 32, 8), -2, 4, (3, 32, 4), (3, 4, 8)),  # layers or experts
        ((3, 8, 32), -1, 4, (3, 32, 4), (3, 4, 8)),  # the same, outputs first
        ((16, 2, 4), 0, 2, (16, 2), (2, 2, 4)),  # heads
        ((2, 4, 16), (0, 1), 2, (2, 4, 2), (2, 16)),
        ((3, 3, 4, 8), (0, 1, 2), 4, (3, 3, 4, 4), (4, 8)),
    ):
        params = params_of(rng, shape)
        rules = rules_of(cage.int4(axis=axis))
        adapters, frozen = finetuning.low_rank(
            params, rules, rank=rank, store="float32", units="weights"
        )
        adapters = moved(adapters, rng, 0.2)
        adapter = adapters["up/kernel"]
        assert (adapter["a"].shape, adapter["b"].shape) == (a, b)
        letters = {-2: "lir,lrj->lij", -1: "lir,lrj->lji", 0: "ir,rhd->ihd"}
        letters |= {(0, 1): "hdr,rj->hdj", (0, 1, 2): "xyir,rj->xyij"}
        product = np.einsum(
            letters[axis], np.float64(adapter["a"]), np.float64(adapter["b"])
        )
        grid = frozen["up"]["kernel"].grid
        latent = np.float64(params["up"]["kernel"]) + product
        position = latent / np.float64(grid.scale)
        codes = np.clip(np.round(position), -7, 7)
        sure = np.abs(np.abs(position - np.floor(position)) - 0.5) > 1e-5
        found = finetuning.merge(adapters, frozen)["up"]["kernel"].codes
        np.testing.assert_array_equal(np.asarray(found).astype(int)[sure], codes[sure])

        def loss(adapters, frozen=frozen):
            return jnp.sum(finetuning.weights(adapters, frozen)["up"]["kernel"] ** 2)

        gradient = jax.jit(jax.grad(loss))(adapters)["up/kernel"]
        assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, adapter)


def test_qlora_adds_to_codes_as_they_are(rng):
    params, rules = params_of(rng), rules_of(cage.int4(group_size=32))
    codes = cage.quantize(params, rules)
    codes["left"] = cage.quantize(params["up"]["kernel"], cage.int4())
    adapters, frozen = finetuning.low_rank(codes, rules, rank=2, alpha=1.0)
    assert adapters.keys() == {"up/kernel"}
    assert adapters["up/kernel"].keys() == {"a", "b"}
    start = jax.jit(finetuning.weights)(adapters, frozen)
    expected = cage.dequantize(codes)
    jax.tree.map(np.testing.assert_array_equal, start, expected)
    adapters = moved(adapters, rng)
    a, b = (np.float64(adapters["up/kernel"][name]) for name in "ab")
    found, pull = jax.vjp(
        lambda each: finetuning.weights(each, frozen)["up"]["kernel"], adapters
    )
    expected = np.float64(expected["up"]["kernel"]) + 0.5 * a @ b
    np.testing.assert_allclose(found, expected, atol=1e-6)
    gradient = pull(jnp.ones_like(found))[0]["up/kernel"]["a"]
    expected = 0.5 * np.ones((128, 8)) @ b.T
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="`up/kernel`: `adapters` must be of weights"):
        finetuning.merge(adapters, frozen)
