"""The correction with wrong arguments: errors and warnings that say what to do."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises

import cage_jax as cage

RULES = cage.Rules([(r".*kernel", cage.int4(group_size=4))])
WRAPS = cage.decoupled, cage.post_step
BUILD = {
    "cage": lambda strength, lr: cage.coupled(RULES, strength=strength),
    "decoupled": lambda strength, lr: cage.decoupled(
        optax.sgd(1), RULES, strength=strength, learning_rate=lr
    ),
    "post_step": lambda strength, lr: cage.post_step(
        optax.sgd(1), RULES, strength=strength, learning_rate=lr
    ),
    "cage_adamw": lambda strength, lr: cage.cage_adamw(lr, RULES, strength=strength),
    "cage_sgd": lambda strength, lr: cage.cage_sgd(lr, RULES, strength=strength),
}
WITH_RATE = [name for name in BUILD if name != "cage"]
PARAMS = {"kernel": np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)}


def test_an_optimizer_in_place_of_rules():
    assert_raises(
        [
            (
                lambda: cage.coupled(optax.adam(1e-3), strength=1.0),
                TypeError,
                r"`rules` must be Rules.*optax\.chain\(coupled",
            ),
            (
                lambda: cage.coupled([(".*", cage.int4())], strength=1.0),
                TypeError,
                "`rules` must be Rules; got list",
            ),
        ]
    )


def test_rules_in_place_of_the_optimizer():
    for wrap in WRAPS:
        assert_raises(
            [
                (
                    partial(wrap, RULES, RULES, learning_rate=1e-3, strength=1.0),
                    TypeError,
                    rf"`inner`.*{wrap.__name__}\(optax.adamw",
                ),
                (
                    partial(
                        wrap, RULES, optax.adam(1e-3), learning_rate=1e-3, strength=1.0
                    ),
                    TypeError,
                    r"got Rules\. The optimizer comes first",
                ),
                (
                    partial(wrap, optax.adam, RULES, learning_rate=1e-3, strength=1.0),
                    TypeError,
                    "`inner` must be an optimizer",
                ),
            ]
        )


def test_a_double_correction_is_found_at_init():
    adamw = optax.MultiSteps(cage.cage_adamw(0.1, RULES, strength=1.0), 2)
    corrected = (
        optax.chain(cage.coupled(RULES, strength=1.0), optax.sgd(0.1)),
        cage.cage_sgd(0.1, RULES, strength=1.0),
        adamw.gradient_transformation(),
        optax.inject_hyperparams(cage.cage_sgd)(0.1, RULES, strength=1.0),
    )
    assert_raises(
        (
            partial(wrap(inner, RULES, learning_rate=0.1, strength=1.0).init, PARAMS),
            ValueError,
            rf"{wrap.__name__} would pull twice",
        )
        for wrap in WRAPS
        for inner in corrected
    )


def calls(value, text):
    """Each transformation with a strength, then a learning rate, that is none."""
    for name, build in BUILD.items():
        yield name, partial(build, value, 0.1), f"`strength` must be .*{text}"
        if name in WITH_RATE:
            yield name, partial(build, 1.0, value), f"`learning_rate` must be .*{text}"


def test_bad_numbers():
    for value, kind in (
        (-1.0, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("10", TypeError),
        (True, TypeError),
        (None, TypeError),
    ):
        for _, call, text in calls(value, rf"got {value!r}\."):
            if value is None and "strength" in text:
                text = "`total_steps` must be given"  # they recommend one
            assert_raises([(call, kind, text)])


def test_schedules_that_are_none():
    for value, text in (
        (
            cage.silence_then_ramp,
            r"got silence_then_ramp, which raised TypeError, `tot",
        ),
        (optax.linear_schedule, "got linear_schedule, which raised TypeError"),
        (lambda count: None, "which returned None"),
        (lambda count: jnp.ones(3), r"which returned ShapeDtypeStruct\(shape=\(3,\)"),
        (optax.adam(1e-3), "got an optimizer"),
    ):
        assert_raises((call, TypeError, text) for _, call, text in calls(value, text))


def _condition(count):
    return 1.0 if count > 3 else 0.0


@pytest.mark.parametrize("name", list(BUILD))
def test_a_schedule_with_a_condition_runs_outside_of_jit(name, standard_promotion):
    params = jax.tree.map(jnp.asarray, PARAMS)
    tx = BUILD[name](_condition, 0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    assert np.isfinite(np.asarray(updates["kernel"])).all()


@pytest.mark.parametrize("name", list(BUILD))
def test_a_schedule_with_a_condition_says_under_jit_what_to_do(
    name, standard_promotion
):
    params = jax.tree.map(jnp.asarray, PARAMS)
    for arguments in (_condition, 0.1), (1.0, _condition):
        tx = BUILD[name](*arguments)
        if arguments == (1.0, _condition) and name == "cage":
            continue  # it has no learning rate
        with pytest.raises(jax.errors.TracerBoolConversionError) as found:
            jax.eval_shape(tx.update, params, tx.init(params), params)
        assert "must not branch on the step's count" in found.value.__notes__[0]


def test_a_learning_rate_with_a_condition_gives_the_dose_of_one_without():
    def rate(count):
        return 0.1 if count < 300 else 0.01

    table = jnp.asarray([rate(count) for count in range(400)])
    params = jax.tree.map(jnp.asarray, PARAMS)
    updates = []
    for learning_rate in (rate, lambda count: table[count]):
        tx = cage.cage_sgd(learning_rate, RULES, total_steps=400)
        state = optax.tree_utils.tree_set(tx.init(params), cage_count=jnp.int32(350))
        updates.append(tx.update(params, state, params)[0])
    np.testing.assert_array_equal(updates[0]["kernel"], updates[1]["kernel"])


def test_a_strength_that_looks_like_a_number_of_steps_is_warned_of():
    for name in WITH_RATE:
        with pytest.warns(UserWarning, match="moves a weight by 100 of its distance"):
            BUILD[name](1000.0, 0.1)


def test_a_state_of_another_optimizer_is_said(standard_promotion):
    params = jax.tree.map(jnp.asarray, PARAMS)
    tx = cage.cage_adamw(0.1, RULES, strength=1.0)
    plain = optax.adamw(0.1).init(params)
    tx.update(params, (plain, tx.init(params)[1]), params)
    others = {
        "statistics": cage.cage_adamw(0.1, RULES, strength=1.0, statistics=True),
        "freeze_scale": cage.cage_adamw(0.1, RULES, strength=1.0, freeze_scale=True),
        "curvature": cage.cage_adamw(0.1, RULES, total_steps=100),
    }
    assert_raises(
        [
            (
                lambda: tx.update(params, plain, params),
                ValueError,
                r"got a tuple without CAGE.*use cage\.init_from\(tx, params, state\)",
            ),
            (  # as checkpoints are restored that are not told like what
                lambda: tx.update(params, list(tx.init(params)), params),
                ValueError,
                r"got a list.*restored as lists.*tx\.init\(params\)",
            ),
            *(
                (
                    partial(other.update, params, tx.init(params), params),
                    ValueError,
                    f"got one without `{name}`",
                )
                for name, other in others.items()
            ),
        ]
    )


def test_one_of_several_rules_that_decides_nothing_warns_at_init():
    rules = cage.Rules([(r".*kernal", cage.int8()), (r".*kernel", cage.int4())])
    tx = cage.cage_sgd(0.1, rules, strength=1.0)
    with pytest.warns(UserWarning, match=r"'\.\*kernal' matches no .* is 'kernel'"):
        tx.init(PARAMS)
    # A part of the parameters says nothing about the whole table.
    parts = optax.masked(tx, {"kernel": True, "head": {"kernal": False}})
    parts.init(PARAMS | {"head": {"kernal": np.ones((8, 3), np.float32)}})


def test_rules_that_match_nothing_warn_at_init():
    for build in BUILD.values():
        with pytest.warns(UserWarning, match="CAGE has nothing to pull"):
            build(1.0, 0.1).init({"weights": PARAMS["kernel"]})


def test_a_parameter_that_does_not_fit_is_named_at_init():
    ones = np.ones((8, 3), np.float32)
    assert_raises(
        (
            partial(build(1.0, 0.1).init, {"layers": [{}, {"kernel": kernel}]}),
            kind,
            f"^`layers/1/kernel`: {text}",
        )
        for build in BUILD.values()
        for kernel, kind, text in (
            (ones.astype(np.int32), TypeError, ".*must be real floating.*int32"),
            (ones[:6], ValueError, r"`group_size` must divide axis -2.*\(6, 3\)"),
            (ones[:, 0], ValueError, "`axis` must be within the dimensions"),
        )
    )
