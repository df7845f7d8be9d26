import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cage_jax.formats import Integer, MidRise
from cage_jax.scale_types import FULL as FULL_SCALE
from cage_jax.scale_types import PowerOfTwo
from cage_jax.scales import (
    AbsMax,
    AbsMean,
    Fixed,
    Gaussian,
    Grid,
    Learned,
    MinMax,
    Percentile,
    Searched,
    SignedMax,
    compute_dtype,
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

each_rule = pytest.mark.parametrize("rule", RULES, ids=str)

# A reduction of 16 numbers and three operations on its result.
ROUNDING = 8 * float(np.finfo(np.float32).eps)


def format_of(rule):
    if isinstance(rule, MinMax):
        return FULL if rule.zero_point else UNSIGNED
    return FULL if rule == SignedMax() else Integer(4)


def fit(rule, x, format=None, axes=(0,)):
    return rule.fit(jnp.asarray(x, jnp.float32), axes, format or format_of(rule))


def bound_of(rule, x):
    """The bound on the values of each column, in float64."""
    x = np.asarray(x, np.float64)
    match rule:
        case AbsMax(clip):
            return clip * np.abs(x).max(0)
        case Gaussian():
            return np.sqrt((x**2).mean(0))


@pytest.mark.parametrize(
    ("format", "half_range", "gaussian"),
    [
        (Integer(2), 1.0, 1.2240063747),  # the minimum, see test_formats.py
        (MidRise(1), 0.5, 0.7978845587),
        (MidRise(4), 7.5, 2.5139305786),
        (MidRise(8), 127.5, 3.8849386788),
    ],
    ids=str,
)
def test_symmetric_scales(format, half_range, gaussian, rng):
    x = rng.standard_normal((16, 3)).astype(np.float32)
    for rule, factor in ((AbsMax(), 1), (AbsMax(0.5), 1), (Gaussian(), gaussian)):
        expected = factor * bound_of(rule, x)[None] / half_range
        grid = fit(rule, x, format)
        assert grid.zero_point is None
        chex.assert_shape(grid.scale, (1, 3))
        chex.assert_type(grid.scale, jnp.float32)
        chex.assert_trees_all_close(np.float64(grid.scale), expected, rtol=ROUNDING)


@pytest.mark.parametrize("shift", [-10.0, -0.5, 0.0, 0.5, 10.0])
def test_minmax(shift, rng):
    x = (rng.uniform(-1, 1, (16, 3)) + shift).astype(np.float32)
    top = np.maximum(np.float64(x).max(0, keepdims=True), 0)
    bottom = np.minimum(np.float64(x).min(0, keepdims=True), 0)
    scale = (top - bottom) / 15
    grid = fit(MinMax(), x)
    chex.assert_trees_all_close(np.float64(grid.scale), scale, rtol=ROUNDING)
    expected = np.clip(np.round(-8 - bottom / scale), -8, 7)
    np.testing.assert_array_equal(grid.zero_point, expected)


def test_minmax_reaches_both_ends():
    # Zero lies on a level, so no end is lost to the rounding of the zero point.
    grid = fit(MinMax(), [[-5.0], [10.0]])
    assert (float(grid.scale[0, 0]), float(grid.zero_point[0, 0])) == (1.0, -3.0)


def test_fixed_is_what_was_given(rng):
    x = rng.standard_normal((16, 3)).astype(np.float32)
    scale = fit(Fixed(0.3), x).scale
    np.testing.assert_array_equal(scale, np.full((1, 3), np.float32(0.3)))


def test_absmean(rng):
    x = rng.standard_normal((16, 3)).astype(np.float32)
    mean = np.abs(np.float64(x)).mean(0, keepdims=True)
    # The level next to zero is 1 of integers, 1/2 of the mid-rise grid.
    for format, level in ((Integer(2), 1), (MidRise(1), 0.5)):
        scale = fit(AbsMean(), x, format).scale
        chex.assert_trees_all_close(np.float64(scale), mean / level, rtol=ROUNDING)


def test_signed_max(rng):
    x = rng.standard_normal((16, 5)).astype(np.float32)
    place = np.abs(x).argmax(0)[None]
    expected = np.take_along_axis(x, place, 0) / np.float32(-8)
    np.testing.assert_array_equal(fit(SignedMax(), x, FULL).scale, expected)
    # Of two that differ in sign alone, the first one counts.
    for first in (-2.0, 2.0):
        scale = fit(SignedMax(), [[1.0], [first], [-first]], FULL).scale
        assert float(scale[0, 0]) == first / -8


@pytest.mark.parametrize("percent", [1, 50, 80, 99.9, 100])
def test_percentile(percent, rng):
    x = rng.standard_normal((16, 3)).astype(np.float32)
    bound = np.percentile(np.abs(x), percent, axis=0, keepdims=True, method="higher")
    np.testing.assert_array_equal(
        fit(Percentile(percent), x).scale, bound / np.float32(7)
    )
    share = (np.abs(x) <= bound).mean(0)
    assert np.all(share >= percent / 100)


@pytest.mark.parametrize("bits", [2, 4])
def test_searched_has_the_least_squared_error(bits, rng):
    x = rng.standard_t(3, (64, 7)).astype(np.float32)  # with outliers
    format = Integer(bits)
    found = np.float64(fit(Searched(20, 0.3), x, format).scale)
    wide = np.float64(x)

    def error(scale):
        levels = np.clip(np.round(wide / scale), format.low, format.high)
        return ((wide - levels * scale) ** 2).sum(0)

    largest = np.abs(wide).max(0, keepdims=True)
    candidates = [clip * largest / format.high for clip in np.linspace(1, 0.3, 20)]
    errors = np.stack([error(scale) for scale in candidates])
    chosen = np.abs(np.stack(candidates)[:, 0] - found).argmin(0)
    near = np.take_along_axis(np.stack(candidates)[:, 0], chosen[None], 0)
    np.testing.assert_allclose(found, near, rtol=ROUNDING)
    # Of two that are alike, float32 may find another one.
    np.testing.assert_allclose(error(found), errors.min(0), rtol=1e-5)
    assert np.any(chosen > 0)


def test_searched_finds_the_least_of_huge_and_tiny_numbers(rng):
    x = rng.standard_t(3, (64, 7)).astype(np.float32)
    scale = fit(Searched(20, 0.3), x).scale
    for exponent in (-100, 100):
        factor = np.float32(2.0**exponent)
        found = fit(Searched(20, 0.3), x * factor).scale
        np.testing.assert_array_equal(found, scale * factor)


@each_rule
def test_several_axes(rule, rng):
    x = rng.standard_normal((2, 4, 3, 5)).astype(np.float32)
    together = fit(rule, x, axes=(1, 3))
    chex.assert_shape(together.scale, (2, 1, 3, 1))
    rows = np.moveaxis(x, (1, 3), (0, 1)).reshape(20, 6)
    apart = fit(rule, rows)
    # A mean may be summed in another order.
    chex.assert_trees_all_close(
        jax.tree.map(jnp.ravel, together), jax.tree.map(jnp.ravel, apart), rtol=ROUNDING
    )


@each_rule
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [4, 1024])
def test_a_group_that_is_not_finite_has_no_scale(rule, bad, rows):
    """Also a large one: XLA for CPU drops NaN from the maximum of such."""
    x = np.ones((rows, 64), np.float32)
    x[2, 1] = bad
    expected = [[column == 1 for column in range(64)]]
    np.testing.assert_array_equal(np.isnan(fit(rule, x).scale), expected)


@each_rule
def test_the_scale_of_zeros(rule):
    grid = fit(rule, np.zeros((4, 3)))
    expected = 0.3 if rule == Fixed(0.3) else 1.0
    np.testing.assert_array_equal(grid.scale, np.full((1, 3), np.float32(expected)))


@pytest.mark.parametrize("rule", [AbsMax(), Gaussian()], ids=str)
def test_the_scale_of_zeros_without_a_zero_on_the_grid(rule):
    grid = fit(rule, np.zeros((4, 3)), MidRise(4))
    np.testing.assert_array_equal(grid.scale, np.full((1, 3), np.float32(TINY)))


@pytest.mark.parametrize("rule", [AbsMax(), Gaussian(), MinMax()], ids=str)
def test_a_scale_too_small_to_divide_by_counts_as_zero(rule):
    assert float(fit(rule, [[TINY], [0.0]]).scale[0, 0]) == 1.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("rule", [AbsMax(), MinMax()], ids=str)
def test_the_largest_number_has_a_scale(rule, sign):
    largest = float(np.finfo(np.float32).max)
    scale = float(fit(rule, [[sign * largest], [0.0]]).scale[0, 0])
    levels = 7 if rule == AbsMax() else 15
    assert scale == pytest.approx(largest / levels, rel=ROUNDING)


def test_a_range_beyond_the_largest_number_is_not_taken_for_a_finite_one():
    largest = float(np.finfo(np.float32).max)
    scale = float(fit(MinMax(), [[largest], [-largest]]).scale[0, 0])
    assert np.isnan(scale) or scale == pytest.approx(largest / 7.5, rel=ROUNDING)


@each_rule
def test_float64(rule, rng, x64):
    x = rng.standard_normal((16, 3))
    grid = rule.fit(jnp.asarray(x), (0,), format_of(rule))
    chex.assert_type(grid.scale, jnp.float64)
    narrow = rule.fit(jnp.asarray(x, jnp.float32), (0,), format_of(rule))
    assert not np.array_equal(np.asarray(grid.scale), np.float64(narrow.scale))
    chex.assert_trees_all_close(
        jax.tree.map(np.float32, grid), jax.tree.map(np.asarray, narrow), rtol=ROUNDING
    )


@pytest.mark.parametrize(
    ("rule", "format", "clips", "idempotent"),
    [
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
    ],
    ids=str,
)
def test_what_a_rule_says_of_itself(rule, format, clips, idempotent):
    assert rule.clips(format) == clips
    assert rule.idempotent(format) == idempotent
    assert rule.asymmetric == (rule == MinMax())
    assert rule.has_offset == (rule == MinMax(zero_point=False))
    assert rule.signed == (rule == SignedMax())
    assert rule.learned == (rule == Learned())
    rule.check(format, FULL_SCALE)


@pytest.mark.parametrize("format", [Integer(4), MidRise(4)], ids=str)
def test_minmax_needs_the_full_range(format):
    with pytest.raises(ValueError, match=rf"^`scale` .*got format {format}\. Use "):
        MinMax().check(format, FULL_SCALE)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (AbsMax, "clip"),
        (Fixed, "scale"),
        (Percentile, "percent"),
        (lambda least: Searched(least=least), "least"),
    ],
    ids=["AbsMax", "Fixed", "Percentile", "Searched"],
)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0.0, ValueError),
        (-1.0, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("1", TypeError),
        (True, TypeError),
        (None, TypeError),
    ],
)
def test_bad_numbers(build, name, value, error):
    with pytest.raises(error, match=rf"^`{name}` must be .*; got {value!r}\. Use "):
        build(value)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: Percentile(101), ValueError, "`percent` must be at most 100; got 101"),
        (lambda: Searched(1), ValueError, "`count` must be at least 2; got 1"),
        (lambda: Searched(2.5), TypeError, "`count` must be an int; got 2.5"),
        (lambda: Searched(least=1), ValueError, "`least` must be below 1; got 1"),
        (
            lambda: SignedMax().check(UNSIGNED, FULL_SCALE),
            ValueError,
            "SignedMax needs a format with negative values; got format uint4",
        ),
        (
            lambda: SignedMax().check(FULL, PowerOfTwo()),
            ValueError,
            "SignedMax needs a scale type with a sign; got scale_type e8m0",
        ),
        (
            lambda: MinMax(zero_point=False).check(FULL, FULL_SCALE),
            ValueError,
            "needs unsigned integers; got format int4 full range",
        ),
        (
            lambda: Learned().check(Integer(4), PowerOfTwo()),
            ValueError,
            "`scale_type` of a learned scale must be Full.*got e8m0 scales down",
        ),
    ],
)
def test_what_does_not_fit_together(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_rules_are_hashable_and_equal_by_value():
    assert AbsMax() == AbsMax(1.0) != AbsMax(0.5)
    assert len({*RULES, *RULES}) == len(RULES) == len({str(rule) for rule in RULES})


def test_a_grid_is_symmetric_by_default():
    assert Grid(jnp.ones(1)).zero_point is None


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float64", "float64")],
)
def test_compute_dtype(dtype, expected):
    assert compute_dtype(jnp.dtype(dtype)) == jnp.dtype(expected)
