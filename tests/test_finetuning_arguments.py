"""Arguments that the pieces of fine-tuning refuse, by name, before they do anything."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises

import cage_jax as cage
from cage_jax import finetuning

RULES = cage.Rules([(".*w", "int4")])
W = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)
PARAMS = {"layers": [{"w": W}, {"w": W.T}]}
NAN = {"layers": [{"w": W.at[1, 2].set(jnp.nan)}, {"w": W}]}
CODES, SHAPES = cage.quantize(PARAMS, RULES), jax.eval_shape(lambda: PARAMS)
X = jnp.ones((4, 8))


def layer(params, x):
    return jnp.tanh(x @ params["w"])


def apply(params, x):
    for each in params["layers"]:
        x = layer(each, x)
    return x


def loss(params, x):
    return jnp.mean(apply(params, x) ** 2)


def reconstruct(params=PARAMS, batches=((X,),), **options):
    blocks = finetuning.blocks(layer, PARAMS, r"layers/\d+")
    return partial(
        finetuning.reconstruct, blocks, RULES, params, batches, epochs=1, **options
    )


def gptq(params=PARAMS, batches=((X,),)):
    return partial(cage.gptq, apply, RULES, params, batches)


def choose(params=PARAMS, **options):
    return partial(cage.choose_bits, RULES, params, bits=8, show=False, **options)


def test_parameters_without_values_or_with_wrong_ones():
    low_rank = partial(partial, finetuning.low_rank, rules=RULES)
    takes = (gptq, reconstruct, choose, low_rank)
    finite = r"`layers/0/w`: `params` must have finite values; got NaN .* in 1 places"
    for take in takes:
        assert_raises(
            (
                (take(SHAPES), TypeError, "`layers/0/w`: `params` must have values"),
                (take(NAN), ValueError, finite),
            )
        )
    text = "`params` must be floats; got codes at 'layers/0/w'"
    for take in (gptq, choose):
        with pytest.raises(TypeError, match=text):
            take(CODES)()


def test_batches_that_are_none_or_empty():
    takes = (gptq, reconstruct)
    for take in takes:
        assert_raises(
            (
                (take(batches=None), TypeError, "`batches` .*; got NoneType"),
                (take(batches=[(X[:0],)]), ValueError, "`batches` must .* empty"),
            )
        )
    text = "`batches` must give inputs whose products are finite; .* 1e19"
    with pytest.raises(ValueError, match=text):
        gptq(batches=[(X * 1e30,)])()


def test_functions_and_dtypes_that_are_none():
    assert_raises(
        (
            (reconstruct(first=3), TypeError, "`first` must be a function; got int"),
            (
                reconstruct(optimizer=optax.adam(1e-3)),
                TypeError,
                "`optimizer` must be a function; got Gradient.* Use optimizer=lambda",
            ),
            (
                reconstruct(stream_dtype="int8"),
                TypeError,
                "`stream_dtype` must be a dtype of floats; got 'int8'",
            ),
            (
                partial(finetuning.blocks, layer, PARAMS, "("),
                ValueError,
                r"`pattern` must be a regular expression; got '\('",
            ),
            (
                partial(finetuning.fisher, PARAMS, loss, []),
                TypeError,
                "`loss` must be a function; got dict. The order is",
            ),
        )
    )


def test_losses_and_curvature_of_another_kind():
    batches = [(X,)]
    none, whole = (lambda p, x: None), (lambda p, x: apply(p, x))
    integer = lambda p, x: jnp.int32(1)  # noqa: E731
    tree = "`curvature` must be a tree like `params`; got one of another structure"
    assert_raises(
        (
            (choose(curvature=1.0), ValueError, tree),
            (choose(curvature={"layers": []}), ValueError, tree),
            (choose(loss=3, batches=batches), TypeError, "`loss` must be a function"),
            *(
                (
                    choose(loss=each, batches=batches),
                    ValueError,
                    f"`loss` must return a finite scalar, a float; got {text}",
                )
                for each, text in (
                    (none, "None"),
                    (whole, re.escape("float32[4,8]")),
                    (integer, "int32"),
                )
            ),
        )
    )


def test_teachers_that_are_none():
    def distill(teacher, **options):
        return partial(cage.distill, apply, RULES, teacher, **options)

    kind = "`teacher` must be parameters with values, .*; got {} at {!r}.*cache.at"
    assert_raises(
        (
            (distill(CODES), TypeError, "`teacher` must be floats; got codes"),
            (
                distill(SHAPES),
                TypeError,
                kind.format("ShapeDtypeStruct", "layers/0/w"),
            ),
            (distill("folder"), TypeError, kind.format("str", "")),
            (
                distill(PARAMS, dtype="int8"),
                TypeError,
                "`dtype` must be a dtype of floats",
            ),
            (
                partial(distill(X)(), PARAMS, X),
                TypeError,
                r"`teacher` must be parameters like .*; got an array of shape \(4, 8\)",
            ),
            (
                partial(
                    cage.distill(
                        lambda p, x: (apply(p, x), ()),
                        RULES,
                        PARAMS,
                        features=1.0,
                        dtype=None,
                    ),
                    PARAMS,
                    X,
                ),
                ValueError,
                "`features` must have an array; got none",
            ),
        )
    )


def test_caches_of_teachers(tmp_path):
    def cache(params=PARAMS, batches=((X,),), folder=tmp_path / "new"):
        return partial(finetuning.cache_teacher, apply, params, batches, folder, k=2)

    (tmp_path / "file").touch()
    rows = [(X,), (X * jnp.nan,)]
    assert_raises(
        (
            (
                cache(NAN, folder=tmp_path / "nan"),
                ValueError,
                "got NaN for all tokens of batch 0",
            ),
            (cache(batches=rows), ValueError, "got NaN for all tokens of batch 1"),
            (cache(folder=None), TypeError, "`folder` must be a path; got NoneType"),
            (cache(folder=tmp_path / "file"), FileExistsError, "`folder` .* a file"),
        )
    )
    # A batch with some NaN is written, because `where` can leave tokens out.
    some = jnp.stack([X[0], X[0] * jnp.nan])
    found = cache(batches=[(X,), (some,)])()
    assert np.isnan(found[1].rest).tolist() == [False, True]
    with pytest.raises(TypeError, match="`number` must be an int"):
        found["0"]
    reconstruct(folder=tmp_path / "blocks")()
    with pytest.raises(ValueError, match="`folder` must be that of a teacher"):
        finetuning.TeacherCache(tmp_path / "blocks")


def test_random_keys_are_among_what_a_teacher_takes(tmp_path):
    one, other = jax.random.split(jax.random.key(0))
    cache = finetuning.cache_teacher(
        lambda params, x, key: apply(params, x),
        PARAMS | {"key": one},
        [(X, one)],
        tmp_path,
        k=2,
    )
    cache.at(0, X, one)
    with pytest.raises(ValueError, match="`args` must be the arguments of batch 0"):
        cache.at(0, X, other)


def test_plans_of_more_tokens_than_there_are_steps():
    plan = partial(cage.plan, params=10**6, bits=4, show=False)
    assert plan(1e30).steps == 10**7
    with pytest.raises(ValueError, match="`pretrained` must be one of"):
        plan(1e9, pretrained="no")
