"""Schedules of the strength and its dose, against their formulas in float64."""

import functools
import itertools
import math
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises
from hypothesis import example, given, settings
from hypothesis import strategies as st

import cage_jax as cage
from cage_jax import (
    contrib,
    dose,
    ramp_to_dose,
    silence_then_constant,
    silence_then_ramp,
)
from cage_jax.optim.schedules import check_learning_rate, check_strength

EPS = float(np.finfo(np.float32).eps)
MOST = 512

each_schedule = pytest.mark.parametrize(
    "schedule", [silence_then_ramp, silence_then_constant]
)


def formula(schedule, count, total_steps, peak, silence):
    r = (count + 1) / total_steps
    if r <= silence:
        return 0.0
    if schedule is silence_then_constant:
        return peak
    return peak * min((r - silence) / (1 - silence), 1.0)


# The counts have one shape, so that each operation is compiled once.
def strengths(schedule):
    return np.asarray(schedule(jnp.asarray(np.arange(MOST, dtype=np.int32))))


@each_schedule
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    total_steps=st.integers(1, MOST),
    peak=st.sampled_from([0.0, 0.1, 10.0]),
    silence=st.one_of(
        st.floats(0, 0.99), st.integers(0, 98).map(lambda percent: percent / 100)
    ),
)
@example(total_steps=10, peak=10.0, silence=0.8)
@example(total_steps=10, peak=10.0, silence=0.7)  # 0.7 * 10 is below 7
@example(total_steps=100, peak=10.0, silence=0.29)  # 0.29 * 100 is below 29
@example(total_steps=50, peak=10.0, silence=0.56)  # 0.56 * 50 is above 28
@example(total_steps=10, peak=10.0, silence=math.nextafter(0.9, 0))  # times 10 is 9
@example(total_steps=1, peak=10.0, silence=0.8)
@example(total_steps=7, peak=10.0, silence=0.0)
def test_is_the_formula(schedule, total_steps, peak, silence):
    expected = np.array(
        [formula(schedule, c, total_steps, peak, silence) for c in range(MOST)]
    )
    got = strengths(schedule(total_steps, peak, silence))
    after_silence = np.arange(1, MOST + 1) / total_steps > silence
    np.testing.assert_array_equal(got[~after_silence], 0)
    if schedule is silence_then_constant:
        np.testing.assert_array_equal(got[after_silence], np.float32(peak))
    # The ramp is the difference of numbers up to total_steps in float32, over its
    # length, which is short when the silence is long.
    tolerance = 4 * EPS * max(peak, 1e-9) / (1 - silence)
    chex.assert_trees_all_close(np.float64(got), expected, atol=tolerance, rtol=0)


@each_schedule
def test_the_last_step_and_what_follows(schedule):
    for total_steps in (2, 10, 1000, 1_000_000):
        strength = schedule(total_steps, 10.0, 0.8)
        for count in (total_steps - 1, total_steps, 2 * total_steps):
            # A quotient of two equal numbers, each rounded to float32.
            found = float(strength(count))
            assert found == pytest.approx(10.0, rel=2 * EPS), (total_steps, count)
        assert float(strength(10 * total_steps)) <= 10.0, total_steps


@each_schedule
def test_the_silence_of_a_long_training_ends_where_it_should(schedule):
    for total_steps, silence in itertools.product(
        (1000, 30_000, 1_000_000), (0.1, 0.29, 0.56, 0.8, 0.9, 0.95)
    ):
        near = round(silence * total_steps)
        last = max(
            count
            for count in range(near - 3, near + 3)
            if (count + 1) / total_steps <= silence
        )
        strength = schedule(total_steps, 10.0, silence)
        assert float(strength(last)) == 0.0, (total_steps, silence)
        assert float(strength(last + 1)) > 0.0, (total_steps, silence)


def test_the_papers_defaults():
    ramp = silence_then_ramp(1000)
    assert [float(ramp(c)) for c in (0, 799)] == [0.0, 0.0]
    # Float32 over a fifth of the length.
    assert float(ramp(899)) == pytest.approx(5.0, rel=20 * EPS)
    assert float(ramp(999)) == pytest.approx(10.0, rel=2 * EPS)
    assert float(silence_then_constant(1000)(800)) == 10.0


@each_schedule
def test_under_transformations(schedule):
    strength = schedule(100, 10.0, 0.5)
    counts = jnp.asarray(np.arange(MOST, dtype=np.int32))
    expected = strengths(strength)
    # A compiler may use the product with an inverse.
    for transformed in (jax.jit(strength), jax.vmap(strength)):
        np.testing.assert_allclose(transformed(counts), expected, 4 * EPS)
    chex.assert_type(strength(jnp.int32(3)), jnp.float32)
    chex.assert_shape(strength(3), ())


@each_schedule
def test_numpy_numbers(schedule):
    strength = schedule(np.int64(10), np.float32(4.0), np.float64(0.5))
    assert float(strength(9)) == pytest.approx(4.0, rel=2 * EPS)
    assert float(strength(4)) == 0.0


# --- dose -----------------------------------------------------------------------------


def test_dose_by_hand(standard_promotion):
    # Of ten steps each, for which all is compiled once.
    assert dose(0.1, 2.0, 10) == pytest.approx(2.0)
    # Strengths 0, 5, 10 at the last three of ten steps.
    assert dose(0.1, silence_then_ramp(10), 10) == pytest.approx(1.5)
    halves = optax.piecewise_constant_schedule(0.2, {9: 0.5})
    assert dose(halves, silence_then_ramp(10), 10) == pytest.approx(0.2 * 5 + 0.1 * 10)
    assert dose(optax.constant_schedule(0.1), 1.0, 10) == pytest.approx(1.0)
    half = jnp.asarray(np.float32(0.5))
    assert dose(half, np.float32(0.25), 10) == pytest.approx(1.25)
    assert dose(0.1, 0.0, 10) == 0.0
    assert isinstance(dose(0.1, 2.0, 10), float)


@pytest.mark.parametrize(
    ("steps", "peak", "low", "high"),
    # The 30M and the 430M model: 512 sequences of 512, 100 tokens a parameter.
    [(11_444, 1.2e-3, 1.5, 1.7), (164_032, 1.5e-4, 2.8, 3.0)],
    ids=["30M", "430M"],
)
def test_the_dose_of_the_published_recipe(steps, peak, low, high, standard_promotion):
    warm, end = steps // 10, peak / 10
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warm, steps, end)
    expected = 0.0
    for count in range(warm, steps):
        cosine = 0.5 * (1 + math.cos(math.pi * (count - warm) / (steps - warm)))
        strength = formula(silence_then_ramp, count, steps, 10.0, 0.8)
        expected += (end + (peak - end) * cosine) * strength
    assert low < expected < high
    # The schedules are float32, and their rounding is not all of one sign.
    got = dose(jax.jit(rate), jax.jit(silence_then_ramp(steps)), steps)
    assert got == pytest.approx(expected, rel=100 * EPS)


def test_a_large_dose_warns():
    with pytest.warns(
        UserWarning, match=r"the dose is 3\.1, above 3.*Lower the"
    ) as seen:
        assert dose(0.1, 3.1, 10) == pytest.approx(3.1)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dose(0.1, 2.9, 10)
        dose(0.5, 3.0, 2)


# --- a ramp to a dose -----------------------------------------------------------------


def test_a_ramp_to_a_dose_by_hand(standard_promotion):
    steps, silence, powers = 200, 0.5, (1.0, 3.0)
    rate = optax.cosine_decay_schedule(0.1, steps, 0.1)

    @jax.jit
    def strengths(counts):
        return [
            ramp_to_dose(rate, steps, 0.7, silence, power)(counts) for power in powers
        ]

    for power, found in zip(powers, strengths(np.arange(steps + 5, dtype=np.int32))):
        r = np.arange(1, steps + 1) / steps
        shape = np.maximum((r - silence) / (1 - silence), 0) ** power
        decay = 0.5 * (1 + np.cos(np.pi * np.arange(steps) / steps))
        rates = 0.1 * (0.9 * decay + 0.1)
        expected = 0.7 / np.sum(rates * shape) * shape
        np.testing.assert_allclose(found[:steps], expected, rtol=1e-5)
        assert float(found[-1]) == pytest.approx(expected[-1])


def test_a_dose_for_a_learning_rate_that_is_traced(standard_promotion):
    @jax.jit
    def last(floor):
        rate = optax.cosine_decay_schedule(0.1, 10, floor)
        return ramp_to_dose(rate, 10)(9)

    rate = optax.cosine_decay_schedule(0.1, 10, 0.25)
    assert float(last(0.25)) == pytest.approx(float(ramp_to_dose(rate, 10)(9)))


# --- bad arguments --------------------------------------------------------------------

NAN = float("nan")


@each_schedule
def test_bad_arguments_of_a_schedule(schedule):
    table = [
        ((0,), ValueError, "total_steps", "0", "the number of optimizer steps"),
        ((-5,), ValueError, "total_steps", "-5", "the number of optimizer steps"),
        ((10.0,), TypeError, "total_steps", "10.0", "the number of optimizer steps"),
        ((True,), TypeError, "total_steps", "True", "the number of optimizer steps"),
        ((None,), TypeError, "total_steps", "None", "the number of optimizer steps"),
        ((10, -1.0), ValueError, "peak", "-1.0", "silence_then_ramp(total_steps)"),
        ((10, NAN), ValueError, "peak", "nan", "0.0 for no correction"),
        ((10, math.inf), ValueError, "peak", "inf", "0.0 for no correction"),
        ((10, "10"), TypeError, "peak", "'10'", "a number"),
        ((10, jnp.float32(-1)), ValueError, "peak", "-1.0", "0.0 for no correction"),
        ((10, math.sqrt), TypeError, "peak", "a function", "Pass a schedule of your"),
        ((10, 1.0, 1.0), ValueError, "silence", "1.0", "The paper uses 0.8"),
        ((10, 1.0, -0.1), ValueError, "silence", "-0.1", "The paper uses 0.8"),
        ((10, 1.0, NAN), ValueError, "silence", "nan", "use strength 0.0"),
        ((10, 1.0, "0.8"), TypeError, "silence", "'0.8'", "The paper uses 0.8"),
        ((10, 1.0, True), TypeError, "silence", "True", "The paper uses 0.8"),
    ]
    for arguments, error, name, value, remedy in table:
        call = functools.partial(schedule, *arguments)
        got = f"^`{name}` must be .*got {re.escape(value)}"
        assert_raises([(call, error, got), (call, error, re.escape(remedy))])


def test_bad_arguments_of_a_dose():
    for steps, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError)):
        text = rf"^`total_steps` must be .*got {steps}\. Use the"
        assert_raises([(functools.partial(dose, 0.1, 1.0, steps), error, text)])
    table = [
        (-0.1, 1.0, ValueError, "`learning_rate` must be at least 0; got -0.1"),
        (0.1, "1", TypeError, "`strength` must be a number; got '1'"),
        (0.1, lambda count: None, TypeError, "`strength`.*which returned None"),
        (lambda count: jnp.ones(2), 1.0, TypeError, "`learning_rate`.*which returned"),
    ]
    for rate, strength, error, text in table:
        assert_raises([(functools.partial(dose, rate, strength, 10), error, text)])


def test_a_training_longer_than_steps_can_be_counted():
    for make in (silence_then_ramp, silence_then_constant, contrib.cosine_ramp):
        text = "`total_steps` must be from 1 to 2147483647; got 1099511627776"
        assert_raises([(functools.partial(make, 2**40), ValueError, text)])
        make(2**31 - 1)(3)


def wrong_after(first, value, *, branches):
    """A schedule that is 0.1 up to a step, and wrong from there on."""
    if branches:
        return lambda count: 0.1 if count < first else value
    return lambda count: jnp.where(count < first, 0.1, value)


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("value", [NAN, math.inf, -1.0])
def test_a_schedule_that_is_wrong_at_a_step(value, branches, standard_promotion):
    """Each step is tried where their number is known, else the first one."""
    at_once, later = (wrong_after(n, value, branches=branches) for n in (0, 7))
    rules = cage.Rules([(".*", "int4")])
    calls = [
        ("strength", 0, lambda: cage.coupled(rules, strength=at_once)),
        ("learning_rate", 0, lambda: cage.cage_sgd(at_once, rules, strength=1.0)),
        ("threshold", 0, lambda: contrib.freezing(rules, at_once)),
        ("strength", 7, lambda: dose(0.1, later, 10)),
        ("learning_rate", 7, lambda: ramp_to_dose(later, 10)),
        ("learning_rate", 7, lambda: cage.cage_adamw(later, rules, total_steps=10)),
    ]
    for name, step, call in calls:
        text = f"`{name}` must be at least 0, and finite.* got {value:g} at step {step}"
        assert_raises([(call, ValueError, text)])
    cage.coupled(rules, strength=later)


@pytest.mark.parametrize(
    ("check", "name"),
    [(check_strength, "strength"), (check_learning_rate, "learning_rate")],
)
def test_checks(check, name):
    two = np.float32(2.0)
    for good in (0.0, 1, two, np.asarray(two), jnp.asarray(two), silence_then_ramp(10)):
        check(good)
    bad = ((-1.0, ValueError), (NAN, ValueError), ("1", TypeError), (None, TypeError))
    for value, error in bad:
        text = rf"^`{name}` must be .*got {value!r}\. Use "
        assert_raises([(functools.partial(check, value), error, text)])
    arrays = (
        (jnp.float32(-1), ValueError, "-1.0"),
        (jnp.bfloat16(NAN), ValueError, "nan"),
        (np.asarray(-1.0), ValueError, "-1.0"),
        (jnp.ones(3), TypeError, r"an array of shape \(3,\) and dtype float32"),
        (np.ones(3), TypeError, r"an array of shape \(3,\) and dtype float64"),
        (jnp.asarray(True), TypeError, r"an array of shape \(\) and dtype bool"),
    )
    for value, error, got in arrays:
        text = rf"^`{name}` must be .*got {got}\. Use "
        assert_raises([(functools.partial(check, value), error, text)])
    # What is traced is not known, but its shape is.
    jax.jit(check)(-1.0)
    with pytest.raises(TypeError, match=r"got an array of shape \(3,\)"):
        jax.jit(check)(np.ones(3, np.float32))


def test_what_cannot_be_a_dose_is_refused(standard_promotion):
    table = [
        ({"dose": -1.0}, "`dose` must be at least 0; got -1.0"),
        ({"power": math.nan}, "`power` must be above 0; got nan"),
        ({"power": 0.0}, "`power` must be above 0; got 0.0"),
        ({"silence": 1.0}, "`silence` must be at least 0 and below 1; got 1.0"),
        ({"total_steps": 0}, "`total_steps` must be from 1 to 2147483647; got 0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive in some step"),
    ]
    for arguments, text in table:
        arguments = {"learning_rate": 0.1, "total_steps": 10} | arguments
        call = functools.partial(ramp_to_dose, **arguments)
        assert_raises([(call, ValueError, text)])
