"""Teacher Intervention: its stages, what is replaced, gradients; ternary weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_raises

import cage_jax as cage
from cage_jax import contrib
from cage_jax.quantizers.formats import Integer
from cage_jax.quantizers.scales import KeptMean

GROUP = 16


def test_stages_are_sixths_of_the_steps():
    stage = jax.jit(contrib.intervention_stage(100))
    for count in range(120):
        want = next((i for i, part in enumerate((6, 3, 1)) if count < 100 / part), 3)
        assert int(stage(count)) == want, count


def attention(params, x, tap):
    """Two layers, whose outputs are tapped."""
    for layer in ("0", "1"):
        scores = tap(f"{layer}/scores", x @ params[layer]["query"] @ x.T)
        weights = tap(f"{layer}/map", jax.nn.softmax(scores))
        context = tap(f"{layer}/context", weights @ x @ params[layer]["value"])
        x = x + tap(f"{layer}/output", context @ params[layer]["out"])
    return x


@pytest.fixture
def models(rng):
    def draw():
        names = ("query", "value", "out")
        return {
            layer: {
                name: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
                for name in names
            }
            for layer in ("0", "1")
        }

    return draw(), draw(), jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)


def by_numpy(params, teacher, x, stage):
    """The student in float64, with tensors of the teacher in its place."""
    for layer in ("0", "1"):
        w = {name: np.float64(each) for name, each in params[layer].items()}
        given = {kind: np.float64(teacher[f"{layer}/{kind}"]) for kind in KINDS}
        scores = x @ w["query"] @ x.T
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        weights = given["map"] if stage == 2 else weights
        context = given["context"] if stage == 1 else weights @ x @ w["value"]
        x = x + (given["output"] if stage == 0 else context @ w["out"])
    return x


KINDS = ("output", "context", "map")
# What a stage leaves without a gradient from the result.
UNREACHED = {0: {"query", "value", "out"}, 1: {"query", "value"}, 2: {"query"}, 3: ()}


def test_tensors_of_the_teacher_stand_in(models):
    student, teacher, x = models
    call = contrib.tapped(attention)
    _, given = jax.jit(call)(teacher, x)

    @jax.jit
    def run(stage):
        def result(params):
            found, own = call(params, x, teacher=given, stage=stage)
            return jnp.sum(found**2), (found, own)

        return jax.grad(result, has_aux=True)(student)

    for stage, unreached in UNREACHED.items():
        gradients, (found, own) = run(stage)
        want = by_numpy(student, given, np.float64(x), stage)
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)  # float32
        assert set(own) == set(given)
        for layer in ("0", "1"):
            for name, gradient in gradients[layer].items():
                assert (gradient == 0).all() == (name in unreached), (stage, name)
    # What was read is the student's own, also where it is replaced.
    scores = np.float64(x) @ np.float64(student["0"]["query"]) @ np.float64(x).T
    np.testing.assert_allclose(run(0)[1][1]["0/scores"], scores, rtol=1e-4, atol=1e-4)
    to_teacher = jax.grad(lambda given: jnp.sum(call(student, x, teacher=given)[0]))
    assert all((each == 0).all() for each in to_teacher(given).values())


def test_without_a_teacher_nothing_is_replaced(models):
    student, _, x = models
    found, own = contrib.tapped(attention)(student, x)
    np.testing.assert_array_equal(found, attention(student, x, lambda name, x: x))
    assert len(own) == 8


def test_the_distance_is_a_sum_of_mean_squares(rng):
    student, teacher = (
        {name: rng.normal(size=(2, 3)).astype(np.float32) for name in NAMES}
        for _ in range(2)
    )
    student["0/scores"][0], student["0/scores"][1, 1] = -1e9, -150
    teacher["0/scores"][:, 0] = -np.inf
    x, y = (np.float64(each["0/scores"]).copy() for each in (student, teacher))
    x[x <= -100], y[y <= -100] = 0, 0
    want = np.mean((x - y) ** 2)
    want += np.mean((np.float64(student["1/hidden"]) - teacher["1/hidden"]) ** 2)
    arrays = [
        {name: jnp.asarray(x) for name, x in each.items()}
        for each in (student, teacher)
    ]
    found, gradients = jax.value_and_grad(contrib.tap_distance, (0, 1))(*arrays)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    slope = 2 * (np.float64(student["1/hidden"]) - teacher["1/hidden"]) / 6
    np.testing.assert_allclose(gradients[0]["1/hidden"], slope, rtol=1e-5)
    assert np.isfinite(gradients[0]["0/scores"]).all()
    assert all((each == 0).all() for each in gradients[1].values())
    only = contrib.tap_distance(*arrays, kinds=["map"])
    maps = np.float64(student["0/map"]) - teacher["0/map"]
    np.testing.assert_allclose(only, np.mean(maps**2), rtol=1e-6)


NAMES = ("0/map", "0/scores", "1/hidden")


def test_wrong_taps():
    x = {name: jnp.ones(3) for name in NAMES}

    def twice(x, tap):
        return tap("map", x) + tap("map", x)

    call = contrib.tapped(lambda x, tap: tap("map", x))
    assert_raises(
        [
            (
                lambda: contrib.tapped(twice)(x["0/map"]),
                ValueError,
                "`tap` must get each name once; got 'map' again",
            ),
            (
                lambda: call(x["0/map"], teacher={"map": jnp.ones(2)}, stage=2),
                ValueError,
                r"`teacher` must have a tensor of shape \(3,\) at 'map'",
            ),
            (
                lambda: call(x["0/map"], teacher={}, stage=2),
                ValueError,
                "`teacher` must have a tensor",
            ),
            (
                lambda: contrib.tap_distance(x, {**x, "0/scores": jnp.ones(2)}),
                ValueError,
                "must have tensors of the same shapes.*0/scores",
            ),
            (
                lambda: contrib.tap_distance(x, x, kinds=["none"]),
                ValueError,
                r"end in one of \('none',\); got \['0/map'",
            ),
        ]
    )


# --- ternary weights ------------------------------------------------------------------


def test_ternary_weights_are_those_of_twn(rng):
    x = rng.standard_t(3, size=(48, 6)).astype(np.float32)
    groups = np.float64(x).T.reshape(-1, GROUP)
    size = np.abs(groups)
    kept = size > 0.7 * size.mean(1, keepdims=True)
    scale = (size * kept).sum(1, keepdims=True) / kept.sum(1, keepdims=True)
    quantizer = contrib.twn(group_size=GROUP)
    codes = cage.quantize(jnp.asarray(x), quantizer)
    found = np.float64(cage.dequantize(codes)).T.reshape(-1, GROUP)
    np.testing.assert_array_equal(
        np.int8(codes.codes).T.reshape(-1, GROUP), np.sign(groups) * kept
    )
    np.testing.assert_allclose(found, np.sign(groups) * kept * scale, rtol=1e-6)
    # Half the scale is another threshold.
    assert (kept != (size > scale / 2)).any()
    again = cage.fake_quant(cage.dequantize(codes), quantizer)
    np.testing.assert_allclose(again, cage.dequantize(codes), rtol=1e-6)
    np.testing.assert_array_equal(
        cage.fake_quant(jnp.asarray(x), quantizer), cage.dequantize(codes)
    )


def test_ternary_zeros_nan_and_huge_values():
    x = np.ones((8, 4), np.float32)
    x[:, 0], x[2, 1], x[:, 2] = 0, np.nan, 3e37
    codes = cage.quantize(jnp.asarray(x), contrib.twn())
    values = np.asarray(cage.dequantize(codes))
    assert (values[:, 0] == 0).all()
    assert np.isnan(values[:, 1]).all()
    np.testing.assert_allclose(values[:, 2:], x[:, 2:], rtol=1e-6)


def test_ternary_thresholds_need_three_levels():
    with pytest.raises(ValueError, match="`scale` KeptMean needs the values -1, 0 and"):
        cage.Quantizer(Integer(2), KeptMean())
    with pytest.raises(ValueError, match="`threshold` must be above 0 and below 1"):
        KeptMean(1.0)
