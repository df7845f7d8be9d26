"""Tests of the checks of arguments."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cage_jax as cage
from cage_jax.arrays.checks import check_choice, check_int, check_number


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_what_is_no_int(value):
    with pytest.raises(TypeError, match=r"`n` must be an int; got .*\. Use 1\."):
        check_int("n", value, "Use 1.")


def test_ints_in_a_range():
    check_int("n", np.int64(3), "Use 3.", least=3, most=3)
    with pytest.raises(ValueError, match=r"`n` must be from 3 to 4; got 2\. Use 3\."):
        check_int("n", 2, "Use 3.", least=3, most=4)
    with pytest.raises(ValueError, match="`n` must be at least 3; got 2"):
        check_int("n", 2, "Use 3.", least=3)


@pytest.mark.parametrize("value", [False, "1", None, 1j])
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match="`x` must be a number"):
        check_number("x", value, "Use 1.0.")


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, np.float32(2)])
def test_numbers_out_of_range(value):
    with pytest.raises(ValueError, match="`x` must be above 0 and below 2; got"):
        check_number("x", value, "Use 1.0.", above=0, below=2)


def test_the_ends_of_a_range():
    check_number("x", 0, "Use 1.0.", least=0, most=1)
    check_number("x", 1.0, "Use 1.0.", least=0, most=1)
    check_number("x", np.float16(1), "Use 1.0.", least=0, most=1)
    with pytest.raises(ValueError, match="`x` must be finite; got nan"):
        check_number("x", math.nan, "Use 1.0.")


def test_numbers_of_numpy_are_stored_as_those_of_python():
    """Or the same quantizer would be printed in two ways, and JSON would refuse one."""
    scales = cage.scales
    for given, expected in (
        (cage.int4(group_size=np.int64(32)), cage.int4(group_size=32)),
        (
            cage.int4(axis=(np.int8(0), np.int64(1)), group_size=(None, np.int64(32))),
            cage.int4(axis=(0, 1), group_size=(None, 32)),
        ),
        (cage.quest(np.int64(4), hadamard=np.uint8(32)), cage.quest(4, hadamard=32)),
        (cage.formats.Integer(np.int64(4), np.True_), cage.formats.Integer(4)),
        (
            cage.formats.Codebook(tuple(np.float64([-1, 0.5]))),
            cage.formats.Codebook((-1.0, 0.5)),
        ),
        (scales.AbsMax(np.float32(0.9)), scales.AbsMax(float(np.float32(0.9)))),
        (scales.Searched(np.int64(9)), scales.Searched(9)),
        (scales.Fixed(np.float64(0.5)), scales.Fixed(0.5)),
        (scales.Percentile(np.float64(99)), scales.Percentile(99.0)),
        (scales.Calibrated(decay=np.float64(0.5)), scales.Calibrated(decay=0.5)),
    ):
        assert given == expected
        assert hash(given) == hash(expected)
        fields = [dataclasses.asdict(each) for each in (given, expected)]
        assert repr(fields[0]) == repr(fields[1])


def test_a_warning_is_of_the_line_that_called_the_library():
    """Through how many functions the library came to it, or Optax, does not matter."""
    rules, params = cage.Rules([("kernel", "int4")]), {"w": jnp.ones((4, 4))}
    for call in (
        lambda: rules.report(params),
        lambda: cage.fake_quant(params, rules),
        lambda: cage.cage_sgd(0.5, rules, strength=2.5),
        lambda: cage.decoupled(optax.sgd(1), rules, learning_rate=1, strength=2),
        lambda: cage.cage_adamw(0.1, rules, strength=0.1).init(params),
        lambda: cage.contrib.lotion(rules).init(params),
    ):
        with pytest.warns(UserWarning) as found:
            call()
        assert {each.filename for each in found} == {__file__}


def test_choices():
    check_choice("kind", "one", ("one", "two"))
    with pytest.raises(ValueError, match=r"one of \('one', 'two'\); got 3. Use 'one'"):
        check_choice("kind", 3, ("one", "two"))
