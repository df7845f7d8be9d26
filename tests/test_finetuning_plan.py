"""The plan of a budget of tokens: its formulas in float64, and what it says."""

import inspect
import math
import operator
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cage_jax as cage
from cage_jax.finetuning.published_recipes import RECIPES, nearest


@pytest.fixture
def make():
    """Makes plans without output; warnings are looked at in a test of their own."""

    def make(*args, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cage.plan(*args, **{"show": False} | options)

    return make


def test_the_law_in_float64(make):
    for tokens, weights, bits in ((2.3e9, 8.6e7, 4), (3e9, 3e7, 6)):
        found = make(tokens, weights, bits, pretrained=False)
        byte = np.float64(weights) * bits / 8
        law = np.exp(-6.7297 / np.log(tokens / byte))
        assert found.tokens_per_byte == pytest.approx(tokens / byte, rel=1e-14)
        assert found.law == pytest.approx(law, rel=1e-14)
        assert found.share == max(found.law, 0.1)
    # Where S is at most 1 the law has no value, or one that grows beyond 1.
    for tokens in (4e6, 5e6):
        found = make(tokens, 1e7, 4, pretrained=False)
        assert found.share == 0.1
        assert found.law < 1e-10
        assert "says less than the 10%" in str(found)


def test_a_pretrained_model_is_trained_quantized_from_the_first_step(make):
    found = make(1e8, 1e9, 4, tokens_per_step=50_000)
    assert found.share == 1
    assert found.steps == 2000
    assert make(1e8, 1e9, 4, tokens_per_step=50_000, pretrained=False).steps == 200


def test_the_learning_rate_is_that_of_the_nearest_training(make):
    for recipe in RECIPES:
        tokens = math.sqrt(math.prod(recipe.tokens))
        assert nearest(recipe.weights, tokens, recipe.pretrained) is recipe
        assert nearest(1.2 * recipe.weights, tokens, recipe.pretrained) is recipe
    assert nearest(3e7, 3e9, pretrained=True).pretrained
    near = make(5e9, 1e8, 4)
    assert near.learning_rate == near.recipe.rate == 2e-5
    assert "learning rate is extrapolated" not in str(near)
    far = make(24_576, 1.35e9, 4)
    assert far.learning_rate == 1e-4
    assert "extrapolated: 10 times the weights of the nearest" in str(far)
    assert make(1e9, 1e9, 4, learning_rate=3e-5).learning_rate == 3e-5


def test_the_dose_is_that_of_the_recommended_strength(make):
    """A cosine to a tenth, and a cubic ramp up to a strength of 15, in float64."""
    steps = 400
    found = make(steps * 256, 1e8, 3, learning_rate=1e-4)
    assert found.steps == steps
    count = np.arange(steps)
    rate = 1e-4 * (0.1 + 0.9 * (1 + np.cos(np.pi * count / steps)) / 2)
    ramp = np.maximum(2 * (count + 1) / steps - 1, 0) ** 3
    # Rates and strengths are float32.
    assert found.dose == pytest.approx(np.sum(rate * 15 * ramp), rel=1e-5)


def test_it_warns_where_cage_will_hardly_act():
    with pytest.warns(UserWarning, match="CAGE: it will do nothing at this learning"):
        idle = cage.plan(24_576, 1.35e8, 3, show=False)
    assert "CAGE beside" not in str(idle)
    with pytest.warns(UserWarning, match="CAGE: it will hardly act"):
        cage.plan(1e9, 1.35e8, 2, show=False)
    acting = cage.plan(3e9, 3e7, 4, pretrained=False, show=False)
    assert acting.dose == pytest.approx(0.7, rel=1e-3)
    assert "CAGE beside" in str(acting)


def test_memory_counts_what_adam_and_the_teacher_take(make):
    params = {
        "kernel": jax.ShapeDtypeStruct((1000, 1000), jnp.bfloat16),
        "norm": jax.ShapeDtypeStruct((1000,), jnp.float32),
    }
    found = make(1e9, params, 4)
    assert found.weights == 1_001_000
    width = 2e6 + 4e3
    expected = np.array([width, width, 2 * width, 2 * 1_001_000]) / 1e9
    np.testing.assert_allclose(found.memory, expected)
    assert found.memory.total == pytest.approx(expected.sum())
    assert make(1e9, 1_001_000, 4, pretrained=False).memory.teacher == 0
    rules = cage.Rules([("kernel", cage.lsq(4)), (".*", None)])
    variables = jax.eval_shape(lambda x: cage.with_grids(x, rules), params)
    assert make(1e9, variables, 4).weights == found.weights
    codes = jax.eval_shape(lambda x: cage.quantize(x, rules), variables)["params"]
    with pytest.raises(TypeError, match="`params` must be floats; got codes at 'ker"):
        make(1e9, codes, 4)
    assert make(1e9, 1_001_000, 4).memory.parameters == 4 * 1_001_000 / 1e9


def test_fewer_bits_need_more_pieces(make):
    counts = [len(make(1e9, 1e8, bits).pieces) for bits in (8, 4, 3)]
    assert counts == sorted(counts)
    assert "round to nearest" in make(1e9, 1e8, 8).pieces[0]
    assert "scales alone" in str(make(1e5, 1e8, 4))
    assert "all weights" in str(make(1e9, 1e8, 4))


def test_the_functions_that_it_names_are_there(make):
    texts = [str(make(tokens, 1e8, bits)) for tokens in (1e5, 1e9) for bits in (2, 8)]
    names = {*re.findall(r"cage\.([\w.]*\w)", " ".join(texts))}
    assert {
        "gptq",
        "distill",
        "finetuning.reconstruct",
        "finetuning.only_scales",
    } < names
    for name in names:
        assert callable(operator.attrgetter(name)(cage))
    options = {*re.findall(r"cage\.(\w+)\(\.\.\., (\w+)=", " ".join(texts))}
    assert options == {("gptq", "rounded")}  # to train from what it returns
    for name, option in options:
        assert option in inspect.signature(getattr(cage, name)).parameters


def test_it_prints_what_it_returns(capsys):
    found = cage.plan(3e9, 3e7, 4, pretrained=False)
    assert capsys.readouterr().out == f"{found}\n"
    assert str(found).startswith(
        "3e+07 weights of 4 bits, 3e+09 tokens, from scratch\n"
    )
    assert "the last 28% of the tokens" in str(found)


def test_arguments_out_of_range(make):
    def error(kind, text, *args, **options):
        with pytest.raises(kind, match=text):
            make(*args, **options)

    error(ValueError, "`tokens` must be at least 1", 0, 1e6, 4)
    error(TypeError, "`tokens` must be a number", "1B", 1e6, 4)
    error(ValueError, "`bits` must be above 0 and at most 16", 1e6, 1e6, 32)
    error(ValueError, "`params` must be at least 1", 1e6, 0, 4)
    error(ValueError, "`params` must have weights", 1e6, {}, 4)
    error(
        ValueError, "`tokens_per_step` must be at least 1", 1, 1, 4, tokens_per_step=0
    )
    few = {"tokens_per_step": 99_999}
    error(ValueError, "`tokens_per_step` must be at least 100000", 1e12, 1e9, 4, **few)
    error(ValueError, "`learning_rate` must be above 0", 1e6, 1e6, 4, learning_rate=0.0)
