"""Sources of curvature with wrong or missing arguments."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from cases import assert_raises

import cage_jax as cage
from cage_jax import curvature

RULES = cage.Rules([("w", cage.int4())])
PARAMS = {"w": np.ones((4, 4), np.float32), "bias": np.ones(3, np.float32)}


def traced(tx, params, **extra):
    """Traces an update, for the errors that it raises."""
    state = jax.eval_shape(tx.init, params)
    jax.eval_shape(partial(tx.update, **extra), params, state, params)


def test_what_is_missing_is_named():
    assert_raises(
        (
            partial(
                traced, cage.coupled(RULES, strength=1.0, curvature=source), PARAMS
            ),
            ValueError,
            f"this curvature needs `{name}`, ",
        )
        for source, name in (
            (curvature.hutchinson(), "obj_fn"),
            (curvature.hessian(), "obj_fn"),
            (curvature.gauss_newton(), "outputs_fn"),
            (curvature.fisher(sampled=True), "sampled_gradients"),
        )
    )
    vectors = cage.Rules([(r"bias", cage.int4(axis=-1))])
    factors = cage.coupled(vectors, strength=1.0, curvature=curvature.kronecker())
    assert_raises(
        [
            (
                partial(
                    traced,
                    cage.coupled(
                        RULES, strength=1.0, curvature=curvature.second_moment()
                    ),
                    PARAMS,
                ),
                ValueError,
                "needs exactly one Adam state .* got 0",
            ),
            (
                partial(factors.init, PARAMS),
                ValueError,
                r"`bias`: a parameter must have two axes",
            ),
        ]
    )


def test_numbers_out_of_range_are_refused():
    assert_raises(
        (partial(curvature.fisher, **{name: value}), ValueError, f"`{name}` must")
        for name, value in (
            ("decay", 1.0),
            ("period", 0),
            ("start", -1),
            ("largest", 1.0),
            ("examples", 0),
        )
    )


def test_a_loss_that_is_none():
    assert_raises(
        (
            partial(
                traced,
                cage.coupled(RULES, strength=1.0, curvature=source),
                PARAMS,
                obj_fn=obj_fn,
            ),
            TypeError,
            f"`obj_fn` must be a function.*{message}",
        )
        for source in (curvature.hutchinson(), curvature.hessian())
        for obj_fn, message in (
            (
                lambda params, batch: 0.0,
                r"it raised: .*missing 1 required.*lambda params",
            ),
            (lambda params: (0.0, 0.0), "it returned tuple"),
            (lambda params: jnp.ones(3), r"it returned \(3,\)"),
            (1.0, "got float"),
        )
    )


def test_a_source_that_is_none():
    assert_raises(
        (
            partial(cage.cage, RULES, strength=1.0, curvature=source),
            TypeError,
            f"`curvature` must be a source.*{message}",
        )
        for source, message in (
            (curvature.hutchinson, r"Call the source, with \(\)"),
            ("fisher", "got 'fisher'"),
        )
    )
