"""Scale rules, against float64 NumPy.

A rule finds the scale of each column without a look at the others, so that one program
fits many cases, a column each.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_raises

from cage_jax.arrays.exact import compute_dtype
from cage_jax.quantizers.formats import Integer, MidRise
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.presets import fp8, int4, int8
from cage_jax.quantizers.rounding import fit_grid
from cage_jax.quantizers.scale_types import FULL as FULL_SCALE
from cage_jax.quantizers.scale_types import PowerOfTwo
from cage_jax.quantizers.scales import (
    AbsMax,
    AbsMean,
    Fixed,
    Gaussian,
    Learned,
    MinMax,
    Percentile,
    Searched,
    SignedMax,
)

FULL = Integer(4, narrow=False)
UNSIGNED = Integer(4, narrow=False, signed=False)
RULES = [
    AbsMax(),
    AbsMax(0.5),
    Gaussian(),
    Fixed(0.3),
    MinMax(),
    MinMax(zero_point=False),
    AbsMean(),
    SignedMax(),
    Percentile(80),
    Searched(8),
    Learned(),
]
TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)

# A reduction of 16 numbers and three operations on its result.
ROUNDING = 8 * float(np.finfo(np.float32).eps)

# The first numbers of a column of 16, of which the others are 0.
COLUMNS = {
    "zeros": [0.0],
    "tiny": [TINY],
    "largest": [LARGEST],
    "lowest": [-LARGEST],
    "a range beyond the largest": [LARGEST, -LARGEST],
    "zero on a level": [-5.0, 10.0],
    "negative first": [1.0, -2.0, 2.0],
    "positive first": [1.0, 2.0, -2.0],
    "nan": [1.0, np.nan],
    "inf": [1.0, np.inf],
    "-inf": [1.0, -np.inf],
}
NAMES = list(COLUMNS)
NORMAL = slice(len(COLUMNS), len(COLUMNS) + 5)
SHIFTS = [-10.0, -0.5, 0.0, 0.5, 10.0]
SHIFTED = slice(NORMAL.stop, NORMAL.stop + 3 * len(SHIFTS))


def columns():
    rng = np.random.default_rng(0)
    named = [np.pad(each, (0, 16 - len(each))) for each in COLUMNS.values()]
    normal = rng.standard_normal((16, 5))
    shifted = rng.uniform(-1, 1, (16, 3 * len(SHIFTS))) + np.repeat(SHIFTS, 3)
    return np.hstack([np.stack(named, 1), normal, shifted]).astype(np.float32)


def format_of(rule):
    if isinstance(rule, MinMax):
        return FULL if rule.zero_point else UNSIGNED
    return FULL if rule == SignedMax() else Integer(4)


@functools.partial(jax.jit, static_argnums=(0, 2))
def compiled(rules, x, axes=(0,)):
    return [rule.fit(x, axes, format) for rule, format in rules]


def fit(rules, x, axes=(0,)):
    """The grids of pairs of a rule and a format, in one program, as NumPy arrays."""
    grids = compiled(tuple(rules), np.float32(x), axes)
    return jax.tree.map(np.asarray, grids)


def fit_each(x, axes=(0,)):
    """The grid of each of `RULES`."""
    return zip(RULES, fit([(rule, format_of(rule)) for rule in RULES], x, axes))


def bound_of(rule, x):
    """The bound on the values of each column, in float64."""
    x = np.asarray(x, np.float64)
    match rule:
        case AbsMax(clip):
            return clip * np.abs(x).max(0)
        case Gaussian():
            return np.sqrt((x**2).mean(0))


def test_symmetric_scales(rng):
    table = [
        (Integer(2), 1.0, 1.2240063747),  # the minimum, see test_formats.py
        (MidRise(1), 0.5, 0.7978845587),
        (MidRise(4), 7.5, 2.5139305786),
        (MidRise(8), 127.5, 3.8849386788),
    ]
    rules = [AbsMax(), AbsMax(0.5), Gaussian()]
    x = rng.standard_normal((16, 4)).astype(np.float32)
    x[:, 3] = 0
    grids = iter(fit([(rule, row[0]) for row in table for rule in rules], x))
    for format, half_range, gaussian in table:
        for rule, factor in zip(rules, (1, 1, gaussian)):
            grid = next(grids)
            expected = factor * bound_of(rule, x)[None] / half_range
            # Of zeros: next to nothing where the format has no zero.
            expected[0, 3] = 1 if format == Integer(2) else TINY
            assert grid.zero_point is None
            chex.assert_shape(grid.scale, (1, 4))
            chex.assert_type(grid.scale, jnp.float32)
            assert grid.scale[0, 3] == expected[0, 3], (rule, format)
            np.testing.assert_allclose(
                np.float64(grid.scale), expected, ROUNDING, err_msg=f"{rule} {format}"
            )


def test_each_rule_on_normal_numbers():
    x = columns()[:, NORMAL]
    wide, grids = np.float64(x), dict(fit_each(columns()))
    scale = {rule: grid.scale[:, NORMAL] for rule, grid in grids.items()}
    assert {each.scale.shape for each in grids.values()} == {(1, SHIFTED.stop)}
    np.testing.assert_array_equal(
        scale[Fixed(0.3)], np.full((1, 5), np.float32(0.3)), strict=True
    )
    place = np.abs(x).argmax(0)[None]
    np.testing.assert_array_equal(
        scale[SignedMax()], np.take_along_axis(x, place, 0) / np.float32(-8)
    )
    mean = np.abs(wide).mean(0, keepdims=True)
    np.testing.assert_allclose(scale[AbsMean()], mean, ROUNDING)
    # LSQ (arXiv 1902.08153), section 2.1; the highest value of 4 bits is 7.
    np.testing.assert_allclose(scale[Learned()], 2 * mean / np.sqrt(7), ROUNDING)
    span = (wide.max(0) - wide.min(0))[None]
    offset = grids[MinMax(zero_point=False)].offset
    np.testing.assert_allclose(scale[MinMax(zero_point=False)], span / 15, ROUNDING)
    np.testing.assert_array_equal(offset[:, NORMAL], x.min(0)[None])


def test_absmean(rng):
    x = rng.standard_normal((16, 3)).astype(np.float32)
    mean = np.abs(np.float64(x)).mean(0, keepdims=True)
    # The level next to zero is 1 of integers, 1/2 of the mid-rise grid.
    whole, half = fit([(AbsMean(), Integer(2)), (AbsMean(), MidRise(1))], x)
    np.testing.assert_allclose(np.float64(whole.scale), mean, ROUNDING)
    np.testing.assert_allclose(np.float64(half.scale), mean / 0.5, ROUNDING)


def test_minmax():
    x = np.float64(columns()[:, SHIFTED])
    top = np.maximum(x.max(0, keepdims=True), 0)
    bottom = np.minimum(x.min(0, keepdims=True), 0)
    scale = (top - bottom) / 15
    grid = dict(fit_each(columns()))[MinMax()]
    found = np.float64(grid.scale[:, SHIFTED])
    np.testing.assert_allclose(found, scale, ROUNDING)
    expected = np.clip(np.round(-8 - bottom / scale), -8, 7)
    np.testing.assert_array_equal(grid.zero_point[:, SHIFTED], expected)
    # Zero lies on a level, so no end is lost to the rounding of the zero point.
    place = 0, NAMES.index("zero on a level")
    assert (grid.scale[place], grid.zero_point[place]) == (1, -3)


def test_percentile(rng):
    x = rng.standard_normal((16, 3)).astype(np.float32)
    percents = [1, 50, 80, 99.9, 100]
    grids = fit([(Percentile(percent), Integer(4)) for percent in percents], x)
    for percent, grid in zip(percents, grids):
        bound = np.percentile(np.abs(x), percent, axis=0, method="higher")[None]
        np.testing.assert_array_equal(grid.scale, bound / np.float32(7), str(percent))
        assert np.all((np.abs(x) <= bound).mean(0) >= percent / 100)


def test_searched_has_the_least_squared_error(rng):
    x = rng.standard_t(3, (64, 7)).astype(np.float32)  # with outliers
    wide = np.float64(x)
    tiny, huge = np.float32(2.0**-100), np.float32(2.0**100)
    formats = [Integer(2), Integer(4)]
    rules = [(Searched(20, 0.3), format) for format in formats]
    for format, grid in zip(formats, fit(rules, np.hstack([x, x * tiny, x * huge]))):
        found, of_tiny, of_huge = np.hsplit(grid.scale, 3)
        np.testing.assert_array_equal(of_tiny, found * tiny, str(format))
        np.testing.assert_array_equal(of_huge, found * huge, str(format))

        def error(scale, format=format):
            levels = np.clip(np.round(wide / scale), format.low, format.high)
            return ((wide - levels * scale) ** 2).sum(0)

        largest = np.abs(wide).max(0, keepdims=True)
        candidates = [clip * largest / format.high for clip in np.linspace(1, 0.3, 20)]
        errors = np.stack([error(scale) for scale in candidates])
        scales = np.stack(candidates)[:, 0]
        chosen = np.abs(scales - found).argmin(0)
        near = np.take_along_axis(scales, chosen[None], 0)
        np.testing.assert_allclose(found, near, ROUNDING)
        # Of two that are alike, float32 may find another one.
        np.testing.assert_allclose(error(np.float64(found)), errors.min(0), 1e-5)
        assert np.any(chosen > 0)


def test_several_axes(rng):
    x = rng.standard_normal((2, 4, 3, 5)).astype(np.float32)
    # Of two that differ in sign alone, the first one counts: in the order of all axes.
    x[1, 1, 0, 4], x[1, 2, 0, 0] = -9, 9
    rows = np.moveaxis(x, (1, 3), (0, 1)).reshape(20, 6)
    for (rule, together), (_, apart) in zip(fit_each(x, (1, 3)), fit_each(rows)):
        chex.assert_shape(together.scale, (2, 1, 3, 1))
        # A mean may be summed in another order.
        chex.assert_trees_all_close(
            jax.tree.map(np.ravel, together),
            jax.tree.map(np.ravel, apart),
            rtol=ROUNDING,
            custom_message=str(rule),
        )


def test_large_groups(rng):
    # A CPU joins parts of groups first if an array is large.
    x = rng.standard_normal((512, 1024)).astype(np.float32)
    faults = {(3, 900): np.nan, (200, 5): np.inf, (300, 64): -np.nan, (301, 1): -np.inf}
    for place, value in faults.items():
        x[place] = value
    quantizers = {
        "groups of the last axis": int4(group_size=128, axis=-1),
        "groups of the first axis": int4(group_size=64, axis=0),
        "rows": int4(axis=-1),
        "columns": int4(axis=0),
        "the array": int4(axis=None),
    }

    @jax.jit
    def fitted(x):
        return {name: fit_grid(x, each).scale for name, each in quantizers.items()}

    for large in (x, np.nan_to_num(x, posinf=7, neginf=-9)):
        found = fitted(large)
        for name, quantizer in quantizers.items():
            blocks = quantizer.blocks(x.shape)
            parts = np.abs(np.float64(large)).reshape(
                blocks.scale_shape[0],
                -1,
                blocks.scale_shape[1],
                1024 // blocks.scale_shape[1],
            )
            largest = parts.max((1, 3))  # NumPy keeps NaN
            expected = np.where(
                np.isfinite(largest), np.float32(largest) / np.float32(7), np.nan
            )
            np.testing.assert_array_equal(found[name], expected, name)


def test_float64(rng, x64):
    x = rng.standard_normal((16, 3))
    pairs = tuple((rule, format_of(rule)) for rule in RULES)
    grids, narrow = compiled(pairs, x), compiled(pairs, np.float32(x))
    for rule, grid, other in zip(RULES, grids, narrow):
        chex.assert_type(grid.scale, jnp.float64)
        assert not np.array_equal(grid.scale, np.float64(other.scale)), rule
        chex.assert_trees_all_close(
            jax.tree.map(np.float32, grid),
            jax.tree.map(np.asarray, other),
            rtol=ROUNDING,
            custom_message=str(rule),
        )


# --- zeros, the ends of float32, and what is no number --------------------------------


def test_a_group_that_is_not_finite_has_no_scale():
    """Also a large one: XLA for CPU drops NaN from the maximum of such."""
    x = np.ones((1024, 64), np.float32)
    x[2, 1:4] = [np.nan, np.inf, -np.inf]
    for rule in RULES:
        (grid,) = fit([(rule, format_of(rule))], x)
        found = np.isnan(grid.scale)[0]
        np.testing.assert_array_equal(found.nonzero()[0], [1, 2, 3], str(rule))
    for rule, grid in fit_each(columns()):
        found = {name for name, scale in zip(NAMES, grid.scale[0]) if np.isnan(scale)}
        assert found - {"a range beyond the largest"} == {"nan", "inf", "-inf"}, rule
        assert np.isfinite(grid.scale[:, len(COLUMNS) :]).all(), rule


def test_the_scale_of_zeros():
    for rule, grid in fit_each(columns()):
        found = dict(zip(NAMES, grid.scale[0]))
        expected = np.float32(0.3 if rule == Fixed(0.3) else 1)
        assert found["zeros"] == expected, rule
        if rule in (AbsMax(), Gaussian(), MinMax()):
            # What is too small to divide by counts as zero.
            assert found["tiny"] == 1, rule


def test_the_largest_numbers_have_a_scale():
    grids = dict(fit_each(columns()))
    for rule, levels in ((AbsMax(), 7), (MinMax(), 15)):
        found = dict(zip(NAMES, grids[rule].scale[0]))
        for name in ("largest", "lowest"):
            assert found[name] == pytest.approx(LARGEST / levels, rel=ROUNDING), rule
    # Also a range that is beyond the largest number itself.
    scale = found["a range beyond the largest"]
    assert scale == pytest.approx(LARGEST / 7.5, rel=ROUNDING)


def test_of_two_that_differ_in_sign_alone_the_first_one_counts():
    found = dict(zip(NAMES, dict(fit_each(columns()))[SignedMax()].scale[0]))
    assert found["negative first"] == 2 / 8
    assert found["positive first"] == -2 / 8


# --- descriptions and bad arguments ---------------------------------------------------


def test_what_a_rule_says_of_itself():
    table = [
        (AbsMax(), Integer(4), False, True),
        (AbsMax(), MidRise(4), False, True),
        (AbsMax(), FULL, True, False),
        (AbsMax(0.5), Integer(4), True, False),
        (AbsMax(2.0), Integer(4), False, False),
        (Gaussian(), Integer(4), True, False),
        (Gaussian(), MidRise(4), True, False),
        (Fixed(0.5), Integer(4), True, True),
        (MinMax(), FULL, False, True),
        (MinMax(zero_point=False), UNSIGNED, False, True),
        (AbsMean(), Integer(2), True, False),
        (AbsMean(), MidRise(1), True, True),
        (SignedMax(), FULL, True, True),
        (Percentile(100), Integer(4), False, True),
        (Percentile(100), FULL, True, False),
        (Percentile(80), Integer(4), True, False),
        (Searched(8), Integer(4), True, True),
        (Searched(8), FULL, True, False),
        (Learned(), Integer(4), True, True),
    ]
    for rule, format, clips, idempotent in table:
        row = f"{rule} {format}"
        assert rule.clips(format) == clips, row
        assert rule.idempotent(format) == idempotent, row
        assert rule.asymmetric == (rule == MinMax()), row
        assert rule.has_offset == (rule == MinMax(zero_point=False)), row
        assert rule.signed == (rule == SignedMax()), row
        assert rule.learned == (rule == Learned()), row
        rule.check(format, FULL_SCALE)


def test_bad_arguments():
    builds = {
        "clip": AbsMax,
        "scale": Fixed,
        "percent": Percentile,
        "least": lambda least: Searched(least=least),
    }
    values = [
        (0.0, ValueError),
        (-1.0, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("1", TypeError),
        (True, TypeError),
        (None, TypeError),
    ]
    for name, build in builds.items():
        for value, error in values:
            text = rf"^`{name}` must be .*; got {value!r}\. Use "
            assert_raises([(functools.partial(build, value), error, text)])
    assert_raises(
        [
            (lambda: Percentile(101), ValueError, "`percent` .* at most 100; got 101"),
            (lambda: Searched(1), ValueError, "`count` must be at least 2; got 1"),
            (lambda: Searched(2.5), TypeError, "`count` must be an int; got 2.5"),
            (lambda: Searched(least=1), ValueError, "`least` .* below 1; got 1"),
        ]
    )


def test_what_does_not_fit_together():
    full = r"^`scale` .*got format {}\. Use "
    table = [
        (MinMax(), Integer(4), FULL_SCALE, full.format("int4")),
        (MinMax(), MidRise(4), FULL_SCALE, full.format("midrise4")),
        (
            SignedMax(),
            UNSIGNED,
            FULL_SCALE,
            "SignedMax needs a format with negative values; got format uint4",
        ),
        (
            SignedMax(),
            FULL,
            PowerOfTwo(),
            "SignedMax needs a scale type with a sign; got scale_type e8m0",
        ),
        (
            MinMax(zero_point=False),
            FULL,
            FULL_SCALE,
            "needs unsigned integers; got format int4 full range",
        ),
    ]
    assert_raises(
        (functools.partial(rule.check, format, scale_type), ValueError, text)
        for rule, format, scale_type, text in table
    )


def test_rules_are_hashable_and_equal_by_value():
    assert AbsMax() == AbsMax(1.0) != AbsMax(0.5)
    assert len({*RULES, *RULES}) == len(RULES) == len({str(rule) for rule in RULES})
    assert Grid(np.ones(1)).zero_point is None


def test_compute_dtype():
    for dtype, expected in (
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float64", "float64"),
    ):
        assert compute_dtype(jnp.dtype(dtype)) == jnp.dtype(expected)


@pytest.mark.parametrize(("axis", "stored"), [(-1, 0), (-2, 512 * 1024 // 8 * 4)])
def test_a_cpu_reads_an_array_once(axis, stored):
    """XLA for CPU stores an array first that it reduces along a long axis."""
    x = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    program = fit_grid.lower(x, int8(axis=axis)).compile()
    assert program.memory_analysis().temp_size_in_bytes <= stored


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_large_array_has_the_largest_magnitudes(axis, rng):
    """What is reduced in other steps there, with all that a maximum may lose."""
    x = rng.normal(size=(512, 1024)).astype(np.float32)
    x[0, 0], x[130, 200], x[260, 400] = np.nan, -np.inf, np.finfo(np.float32).max
    x[384:, 896:] = -0.0
    groups = np.moveaxis(x, axis, -1)
    groups = np.abs(groups.reshape(*groups.shape[:-1], -1, 128))
    expected = np.where(np.isnan(groups), np.inf, groups).max(axis=-1)
    found = jax.jit(fit_grid, static_argnums=1)(x, fp8(axis=axis, group_size=128))
    scale = np.moveaxis(np.asarray(found.scale), axis, -1)
    known = np.isfinite(expected) & (expected > 0)
    assert not known.all()
    np.testing.assert_allclose(scale[known], expected[known] / 448, rtol=1e-6)
    assert np.isnan(scale[np.isinf(expected)]).all()
    assert (scale[expected == 0] > 0).all()


def test_a_cpu_reduces_an_eighth_of_columns():
    """XLA for CPU has slow loops for the rest; see `largest_magnitude_on_cpu`."""
    x = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    text = fit_grid.lower(x, int4(group_size=128)).compile().as_text()
    reduced = re.findall(r" reduce\((?:[^%\s]\S* )?(%[\w.-]+)", text)
    assert reduced
    for name in reduced:
        (shape,) = re.findall(rf"{re.escape(name)} = \w+\[([\d,]+)\]", text)
        assert np.prod([*map(int, shape.split(","))]) <= 512 * 1024 // 8
