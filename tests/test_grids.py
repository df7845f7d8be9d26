"""Grids that are given, found in two halves, or learned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import KERNEL, QUANTIZERS, assert_raises, assert_same, normal

from cage_jax import (
    Rules,
    cage_adamw,
    cage_sgd,
    dequantize,
    fake_quant,
    int2,
    int4,
    int8,
    lsq,
    nvfp4,
    q4_0,
    quantization_error,
    quantize,
    quest,
    with_grids,
)
from cage_jax.quantizers.rounding import (
    error_elementwise,
    error_reductions,
    fit_grid,
    rounding,
)
from cage_jax.quantizers.scales import Fixed, Gaussian, Grid

EPS = float(np.finfo(np.float32).eps)
ONES = np.ones((8, 3), np.float32)


def ones(*shape):
    return np.ones(shape, np.float32)


# --- a given grid ---------------------------------------------------------------------


def test_the_grid_that_is_found_may_be_given(rng):
    names = "int4", "int4 groups", "int4 asymmetric", "int4 tiles", "quest4"
    names += ("int8 tensor",)
    x = normal(rng, *KERNEL)
    smaller = 0.9 * x
    grids = {name: fit_grid(x, QUANTIZERS[name]) for name in names}

    @jax.jit
    def given(x, grids):
        return {n: fake_quant(x, QUANTIZERS[n], grid=g) for n, g in grids.items()}

    @jax.jit
    def codes_given(x, grids):
        return {n: quantize(x, QUANTIZERS[n], grid=g) for n, g in grids.items()}

    assert_same(given(x, grids), {n: fake_quant(x, QUANTIZERS[n]) for n in names})
    codes = codes_given(smaller, grids)
    assert_same(jax.jit(dequantize)(codes), given(smaller, grids))
    for name in names:
        assert grids[name].scale.shape == QUANTIZERS[name].blocks(KERNEL).scale_shape, (
            name
        )
        assert_same(codes[name].scale, grids[name].scale)


def test_a_bad_value_spoils_its_group_in_a_given_grid_too(rng):
    x = rng.standard_normal((8, 3)).astype(np.float32)
    spoilt = np.zeros((8, 3), bool)
    spoilt[4:, 1] = True
    quantizers = (
        int4(group_size=4),
        int4(group_size=4, symmetric=False),
        int4(group_size=4, scale=Gaussian()),
        int4(group_size=4, scale=Fixed(0.25)),
        quest(2, group_size=4, hadamard=None),
        quest(4, group_size=4, hadamard=4),
    )

    def find_one(x, quantizer):
        zeros = np.zeros((2, 3), np.float32) if quantizer.asymmetric else None
        grid = Grid(0.25 * ones(2, 3), zeros)
        return (
            fake_quant(x, quantizer, grid=grid),
            dequantize(quantize(x, quantizer, grid=grid)),
            quantization_error(x, quantizer, grid=grid),
        )

    find = jax.jit(lambda x: [find_one(x, quantizer) for quantizer in quantizers])
    before = find(x.copy())
    for bad in (np.nan, np.inf, -np.inf):
        x[5, 1] = bad
        for quantizer, old, new in zip(quantizers, before, find(x.copy())):
            value, restored, error = new
            expected, text = np.where(spoilt, np.nan, old[0]), f"{quantizer}, {bad}"
            np.testing.assert_array_equal(value, expected, text)
            np.testing.assert_array_equal(restored, expected, text)
            np.testing.assert_array_equal(np.isnan(error), spoilt, text)


def test_where_the_scale_is_zero_the_grid_is_found(rng):
    x = rng.standard_normal((8, 3)).astype(np.float32)
    quantizer = int4(group_size=4, symmetric=False)
    scale = np.zeros((2, 3), np.float32)
    scale[1, 2] = 0.5
    grid = Grid(jnp.asarray(scale), jnp.asarray(-2 * ones(2, 3)))
    result = np.float64(fake_quant(x, quantizer, grid=grid))
    part = np.float64(x)[4:, 2]
    expected = 0.5 * (np.clip(np.round(part / 0.5 - 2), -8, 7) + 2)
    np.testing.assert_array_equal(result[4:, 2], expected)
    found = np.float64(fake_quant(x, quantizer))
    found[4:, 2] = result[4:, 2]
    np.testing.assert_array_equal(result, found)
    kept = rounding(x, quantizer, grid).grid
    assert (float(kept.scale[1, 2]), float(kept.zero_point[1, 2])) == (0.5, -2.0)
    assert np.all(np.asarray(kept.scale) > 0)


def test_a_grid_receives_no_gradient(rng):
    x = normal(rng, 8, 3)

    def total(grid):
        return fake_quant(x, int4(), grid=grid).sum()

    gradient = jax.jit(jax.grad(total))(Grid(0.25 * ones(1, 3)))
    assert_same(gradient, Grid(np.zeros((1, 3), np.float32)))


def test_the_mask_is_that_of_the_given_grid():
    x, quantizer = np.float32([[1.0], [2.0], [8.0]]), int4(gradient="clip")
    grid = Grid(0.5 * ones(1, 1))
    value, pull_back = jax.vjp(lambda x: fake_quant(x, quantizer, grid=grid), x)
    np.testing.assert_array_equal(pull_back(ones(3, 1))[0], [[1.0], [1.0], [0.0]])
    assert value.ravel().tolist() == [1.0, 2.0, 3.5]


def test_bad_grids():
    asymmetric = int4(symmetric=False)
    table = [
        (int4(), ones(1, 3), TypeError, "ndarray", r"Use Grid\(scale\)"),
        (int4(), 0.5, TypeError, "float", r"Use Grid\(scale\)"),
        (int4(), Grid(ONES), ValueError, r"shape \(8, 3\)", "the state"),
        (int4(), Grid(ones(3)), ValueError, r"shape \(3,\)", "the state"),
        (
            asymmetric,
            Grid(ones(1, 3)),
            ValueError,
            "zero_point=None",
            "the same rules",
        ),
        (
            int4(),
            Grid(ones(1, 3), ones(1, 3)),
            ValueError,
            r"zero_point=\[\[",
            "the same rules",
        ),
        (
            asymmetric,
            Grid(ones(1, 3), ones(2, 3)),
            ValueError,
            r"shape \(2, 3\)",
            r"one zero_point for each group, shape \(1, 3\)",
        ),
    ]
    assert_raises(
        (
            lambda function=function, row=row: function(ONES, row[0], grid=row[1]),
            row[2],
            rf"^`grid` must (?=.*{row[4]}).*got .*{row[3]}",
        )
        for function in (fake_quant, quantize, quantization_error)
        for row in table
    )


def test_values_that_no_grid_has():
    tensor, learned = nvfp4(axis=0), lsq(4, axis=0, offset=True)
    good = {
        int4(): Grid(ones(1, 3)),
        int4(symmetric=False): Grid(ones(1, 3), 7 * ones(1, 3)),
        q4_0(axis=0): Grid(-ones(1, 3)),
        tensor: Grid(ones(2, 3), tensor_divisor=ones(1, 1)),
        learned: Grid(ones(1, 3), offset=-ones(1, 3)),
    }
    for quantizer, grid in good.items():
        x = ones(32 if quantizer in (tensor, q4_0(axis=0)) else 8, 3)
        traced = jax.jit(functools.partial(fake_quant, x, quantizer))
        assert np.isfinite(traced(grid=grid)).all(), quantizer
        for part, text, bad_values in (
            ("scale", "scales", (np.nan, np.inf, -1.0)),
            ("zero_point", "zero points", (np.nan, np.inf, 0.5, -9, 8)),
            ("offset", "offsets", (np.nan, -np.inf)),
            ("tensor_divisor", "tensor divisors", (np.nan, np.inf, 0, -1.0)),
        ):
            value = getattr(grid, part)
            for bad in () if value is None else bad_values:
                if quantizer.scale.signed and bad == -1:
                    continue
                first = np.arange(value.size).reshape(value.shape) == 0
                broken = np.where(first, np.float32(bad), value)
                given = grid._replace(**{part: broken})
                words = f"^`grid` must have {text} that are .*; got {bad:g}, quant"
                assert_raises(
                    (
                        functools.partial(each, x, quantizer, grid=given),
                        ValueError,
                        words,
                    )
                    for each in (fake_quant, quantize, quantization_error)
                )
                traced(grid=given)  # values that are traced are not known
    # Those of a constant are known while something else is traced.
    given = Grid(-ones(1, 3))
    with pytest.raises(ValueError, match="got -1"):
        jax.jit(lambda x: fake_quant(x, int4(), grid=given))(ONES)


def test_bad_grids_of_a_tree():
    rules = Rules([("a", int4())])
    assert_raises(
        (
            lambda grid=grid: fake_quant({"a": ONES}, rules, grid=grid),
            error,
            "^`a`: `grid` must " + text,
        )
        for grid, error, text in [
            (Grid(ones(1, 3)), TypeError, r"map .*got Grid\. Use the"),
            ({}, ValueError, r"have an entry .*got the paths \[\]\. Add this"),
            ({"a": Grid(ones(3))}, ValueError, r"have one scale .*\(3,\)"),
            ({"a": Grid(-ones(1, 3))}, ValueError, "have scales .*at least 0; got -1"),
        ]
    )


# --- the error in two halves ----------------------------------------------------------

HALVES = [
    (int4(), None),
    (int4(symmetric=False, group_size=32), None),
    (int4(hadamard=64), "int16"),
    (int4(hadamard=64, group_size=16), "float32"),
    (int8(hadamard=128), "int16"),
    (int8(hadamard=128, symmetric=False), "int16"),
    (quest(1), "int16"),
    (quest(8), "int16"),
]


def in_two_halves(x, quantizers):
    """The error by both halves and in one, and what is kept between the halves."""

    @jax.jit
    def fit(x):
        return [error_reductions(x, quantizer) for quantizer in quantizers]

    @jax.jit
    def rest(x, kept):
        return [error_elementwise(x, q, each) for q, each in zip(quantizers, kept)]

    @jax.jit
    def whole(x):
        return [quantization_error(x, quantizer) for quantizer in quantizers]

    kept = fit(x)
    return rest(x, kept), whole(x), [each.unrotated_codes for each in kept]


@pytest.mark.parametrize("rows", [128, 256])
def test_the_error_in_two_halves_is_the_error(rows, rng):
    x = rng.standard_normal((rows, 3)).astype(np.float32)
    x[0, 1] = np.nan
    quantizers = [quantizer for quantizer, _ in HALVES]
    found, expected, between = in_two_halves(jnp.asarray(x), quantizers)
    for (quantizer, dtype), one, two, kept in zip(HALVES, found, expected, between):
        assert (kept if dtype is None else str(kept.dtype)) == dtype, quantizer
        # A compiler may contract the last product and difference, so not to the bit.
        np.testing.assert_allclose(
            one,
            two,
            rtol=0,
            atol=2 * EPS * np.nanmax(np.abs(x)),
            err_msg=f"{quantizer}",
        )


def test_the_largest_sums_of_codes_are_turned_back_exactly():
    for block, dtype in ((128, jnp.int16), (256, jnp.float32)):
        x = np.zeros((block, 1), np.float32)
        x[0] = 1.0  # rotated, all alike
        quantizer = dataclasses.replace(quest(8), scale=Fixed(1e-4), hadamard=block)
        found, _, (turned_back,) = in_two_halves(x, [quantizer])
        assert turned_back.dtype == dtype
        expected = np.float64(x) * (1 - 127.5 * 1e-4 * np.sqrt(block))
        np.testing.assert_allclose(found[0], expected, rtol=1e-6)


# --- learned grids --------------------------------------------------------------------


def lsq_oracle(x, scale, offset, cotangent, low, high, axes):
    """Value and gradients of LSQ and LSQ+, in float64, from the papers."""
    position = (x - offset) / scale
    rounded = np.clip(np.round(position), low, high)
    inside = (position >= low) & (position <= high)
    count = np.prod([x.shape[axis] for axis in axes])
    share = 1 / np.sqrt(count * high)

    def total(parts):
        return (cotangent * parts).sum(axis=axes, keepdims=True) * share

    return (
        rounded * scale + offset,
        cotangent * inside,
        total(np.where(inside, rounded - position, rounded)),
        total(~inside),
    )


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("axis", "axes"), [(None, (0, 1)), (-2, (0,))])
def test_the_gradient_of_a_learned_grid(offset, axis, axes, rng, x64):
    x, cotangent = rng.standard_normal((2, 32, 4))
    quantizer = lsq(3, axis=axis, offset=offset)
    grid = jax.tree.map(np.asarray, fit_grid(x, quantizer))
    grid = grid._replace(scale=0.6 * grid.scale)
    if offset:
        grid = grid._replace(offset=grid.offset + 0.1)

    @jax.jit
    def find(x, grid, cotangent):
        quant = lambda x, grid: fake_quant(x, quantizer, grid=grid)  # noqa: E731
        value, pull = jax.vjp(quant, x, grid)
        return value, *pull(cotangent)

    value, gradient, grid_gradient = find(x, grid, cotangent)
    at = grid.offset if offset else 0.0
    low, high = quantizer.format.low, quantizer.format.high
    expected = lsq_oracle(x, grid.scale, at, cotangent, low, high, axes)
    assert np.any(np.abs(expected[3]) > 0)  # some values lie beyond
    found = [value, gradient, grid_gradient.scale]
    if offset:
        found.append(grid_gradient.offset)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_learned_grid_starts_as_in_the_paper(rng):
    x = rng.standard_normal((32, 4)).astype(np.float32)
    grid = fit_grid(x, lsq(4))
    expected = 2 * np.abs(x).mean() / np.sqrt(7)
    np.testing.assert_allclose(grid.scale, [[expected]], rtol=1e-6)


def test_the_grid_of_lsq_plus_starts_at_both_ends_of_the_values(rng):
    x = normal(rng, 64, 3)
    for quantizer in (lsq(4, offset=True), lsq(4, offset=True, axis=0)):
        grid, axis = fit_grid(x, quantizer), quantizer.axis
        scale, offset = np.float64(grid.scale), np.float64(grid.offset)
        # The range and its ends are each rounded once in float32.
        room = 4 * np.finfo(np.float32).eps * np.abs(x).max()
        for code, end in (
            (quantizer.format.low, np.min),
            (quantizer.format.high, np.max),
        ):
            found = code * scale + offset
            assert (np.abs(found - end(np.asarray(x), axis)) <= room).all()


@pytest.mark.usefixtures("standard_promotion")
def test_learned_grids_are_trained_beside_the_weights(rng):
    rules = Rules([(".*kernel", lsq(2, axis=-2)), ("embed", int4())])
    params = {
        "dense": {"kernel": normal(rng, 32, 4), "bias": np.zeros(4, np.float32)},
        "embed": normal(rng, 8, 4),
    }
    variables = start = with_grids(params, rules)
    assert list(variables["grids"]) == ["dense/kernel"]
    target = fake_quant(params["dense"]["kernel"], int2()) * 0.7

    def loss(variables):
        quantized = fake_quant(variables, rules)["params"]
        return jnp.mean((quantized["dense"]["kernel"] - target) ** 2)

    tx = cage_adamw(0.02, rules, strength=0.5, statistics=True)

    @jax.jit
    def step(variables, state):
        now, gradient = jax.value_and_grad(loss)(variables)
        updates, state = tx.update(gradient, state, variables)
        return optax.apply_updates(variables, updates), state, now

    state, losses = tx.init(variables), []
    for _ in range(101):
        last = variables
        variables, state, now = step(variables, state)
        losses.append(now)
    assert losses[100] < 0.5 * losses[0]
    grid, before = (v["grids"]["dense/kernel"] for v in (last, start))
    assert np.all(np.asarray(grid.scale) != np.asarray(before.scale))
    # The correction pulled to the learned grid, and the codes are of that grid.
    error = quantization_error(last, rules)["params"]["dense"]["kernel"]
    x = last["params"]["dense"]["kernel"]
    expected = x - fake_quant(x, lsq(2, axis=-2), grid=grid)
    np.testing.assert_array_equal(error, expected)
    codes = quantize(last, rules)["params"]["dense"]["kernel"]
    np.testing.assert_array_equal(codes.scale, grid.scale)
    assert "grids" not in str(rules.report(last))


def test_the_pull_is_to_the_learned_grid(rng):
    quantizer = lsq(3)
    rules = Rules([("kernel", quantizer)])
    variables = with_grids({"kernel": normal(rng, 16, 4)}, rules)
    grid = variables["grids"]["kernel"]._replace(scale=np.float32([[0.3]]))
    variables["grids"]["kernel"] = grid
    x = variables["params"]["kernel"]
    zeros = jax.tree.map(np.zeros_like, variables)
    value = np.float64(fake_quant(x, quantizer, grid=grid))
    for freeze_scale in (False, True):
        tx = cage_sgd(1.0, rules, strength=0.5, freeze_scale=freeze_scale)
        updates, _ = jax.jit(tx.update)(zeros, tx.init(variables), variables)
        expected = -0.5 * (np.float64(x) - value)
        np.testing.assert_allclose(updates["params"]["kernel"], expected, atol=1e-6)


def test_learned_grids_beside_the_variables_of_linen(rng):
    """They have a collection `params` of their own, and others."""
    rules = Rules([(".*kernel", lsq(2, axis=-2)), (".*", None)])
    linen = {"params": {"kernel": normal(rng, 8, 4)}, "batch_stats": {"mean": ONES}}
    right = with_grids(linen["params"], rules)
    variables = with_grids(linen, rules)
    assert [*rules.quantized(variables)] == [*variables["grids"]] == ["kernel"]
    for function in (fake_quant, quantization_error):
        found, expected = (function(v, rules)["params"] for v in (variables, right))
        np.testing.assert_array_equal(found["params"]["kernel"], expected["kernel"])
    cage_adamw(0.02, rules, strength=0.5).init(variables)


def test_a_learned_scale_that_is_not_positive():
    compiled = jax.jit(lambda grid: fake_quant(ONES, lsq(4), grid=grid))
    for scale in (0.0, -0.1, np.nan):
        grid = Grid(np.float32([[scale]]))
        with pytest.raises(ValueError, match=r"scales .* positive; got .*with_grids"):
            fake_quant(ONES, lsq(4), grid=grid)
        assert np.all(np.isnan(compiled(grid))), scale


def test_a_learned_grid_must_be_given():
    rules, params = Rules([("kernel", lsq(4))]), {"kernel": ONES}
    tx = cage_sgd(0.1, rules, strength=1.0)
    alone = "^`grid` must be given for a learned"
    in_tree = "^`kernel`: `grid` must be given"
    assert_raises(
        [
            (lambda: fake_quant(ONES, lsq(4)), ValueError, alone),
            (lambda: quantize(ONES, lsq(4)), ValueError, alone),
            (lambda: quantization_error(ONES, lsq(4)), ValueError, alone),
            (lambda: fake_quant(params, rules), ValueError, in_tree),
            (lambda: tx.update(params, tx.init(params), params), ValueError, in_tree),
            (
                lambda: with_grids(params, Rules([("kernel", int4())])),
                ValueError,
                "`rules` must match a parameter with a learn",
            ),
        ]
    )
