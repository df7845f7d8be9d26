"""Unknown names of arguments: the error, and what stays of a function."""

import inspect
import pickle

import pytest

import cage_jax as cage
from cage_jax.arrays.names import did_you_mean, names_checked


def scaled(x, factor: float = 2.0, *, total_steps: int = 1, learning_rate=0.1):
    """Multiplies."""
    return x * factor * total_steps * learning_rate


CHECKED = names_checked(scaled)
ALL = "Its arguments are x, factor, total_steps, learning_rate."


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("steps", "total_steps"),  # a part
        ("lr", "learning_rate"),  # initials
        ("factr", "factor"),  # a slip
        ("my_factor", "factor"),  # a part the other way round
    ],
)
def test_the_nearest_name_is_told(given, nearest):
    text = f"`scaled` has no argument `{given}`. Did you mean `{nearest}`? {ALL}"
    with pytest.raises(TypeError) as raised:
        CHECKED(3, **{given: 1})
    assert str(raised.value) == text


def test_without_a_near_name_there_are_only_all_names():
    with pytest.raises(TypeError) as raised:
        CHECKED(3, q=1)
    assert str(raised.value) == f"`scaled` has no argument `q`. {ALL}"
    assert did_you_mean("int5", ["int4", "nf4"]) == " Did you mean `int4`?"
    assert did_you_mean("INT4", ["int4", "nf4"]) == " Did you mean `int4`?"


def test_values_beyond_those_by_position_are_told():
    with pytest.raises(TypeError, match="takes x, factor by position; got 3"):
        CHECKED(1, 2, 3)


def test_the_function_stays_what_it_is():
    assert CHECKED(3, total_steps=2) == scaled(3, total_steps=2)
    for function in (inspect.signature, inspect.getdoc, inspect.get_annotations):
        assert function(CHECKED) == function(scaled)
    assert pickle.loads(pickle.dumps(cage.int4)) is cage.int4
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        CHECKED()


def test_presets_and_optimizers_answer():
    with pytest.raises(TypeError, match="Did you mean `group_size`"):
        cage.int4(group=32)
    with pytest.raises(TypeError, match="Did you mean `total_steps`"):
        cage.cage_adamw(1e-3, cage.Rules([]), steps=1000)
