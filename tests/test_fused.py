"""The fused step: that of the transformation, and its kernel interpreted."""

import copy
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.pallas import tpu as pltpu

import cage_jax as cage
from cage_jax.arrays.adamw import AdamW, Dtypes, StepNumbers
from cage_jax.arrays.factors import Factors
from cage_jax.optim.statistics import codes_of
from cage_jax.pallas import candidates, tiling, tpu
from cage_jax.pallas.candidates import adamw_kernels

pytestmark = pytest.mark.usefixtures("standard_promotion")

RULES = cage.Rules(
    [
        ("layers/kernel", cage.quest(4, axis=-2)),
        ("groups", cage.int4(group_size=32)),
        ("rows", cage.int8(axis=-1)),
        ("small", cage.int4()),
        (".*", None),
    ]
)
STEPS = 100
ADAMW = AdamW(b1=0.9, b2=0.95, eps=1e-8, eps_root=0.0, weight_decay=0.1)


@pytest.fixture(autouse=True)
def small_arrays_too(monkeypatch):
    monkeypatch.setattr(candidates, "SMALLEST", 2**13)


@pytest.fixture
def params(rng):
    shapes = {
        "layers": {"kernel": (2, 128, 128), "norm": (2, 128)},
        "groups": (128, 128),
        "rows": (64, 256),
        "small": (8, 8),
        "bias": (3,),
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def optimizer(rules=RULES, **changes):
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, STEPS, 1e-3)
    strength = cage.silence_then_ramp(STEPS, 10.0, 0.5)
    options = {"b2": 0.95, "weight_decay": 0.1, "mask": decays} | changes
    return cage.cage_adamw(rate, rules, strength=strength, **options)


def decays(params):
    """A mask without what has no kernel, norms, and without something that has one."""
    return jax.tree.map_with_path(
        lambda path, _: not {"norm", "rows"} & {key.key for key in path}, params
    )


@jax.jit
def gradients(params, count):
    return jax.tree.map(lambda x: jnp.cos(3 * x + count), params)


def forms(tx):
    """A step, fused and not."""

    def unfused(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(tx.fused_step), jax.jit(unfused)


def run(steps, tx, params):
    state = tx.init(params)
    for count, step in enumerate(steps):
        params, state = step(gradients(params, count), state, params)
    return params, state


def assert_near(found, expected, tolerance=1e-6, at_ties=0):
    """By the norm of each array, but for a number of elements.

    One whose weight lay at a tie went the other way, by a step times the pull.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        ours, theirs = np.float64(ours), np.float64(theirs)
        far = np.sort(np.abs(ours - theirs), axis=None)
        assert far[-1] <= (1e-3 if at_ties else far[-1])
        far = far[: far.size - at_ties] if far.size > 100 else far
        size = np.linalg.norm(theirs)
        size = size if theirs.ndim else max(size, 1)  # statistics are of relative size
        assert np.linalg.norm(far) <= tolerance * size


def check_hundred_steps(params, changes):
    """A hundred fused steps are those of the transformation, with these options."""
    fused, unfused = forms(tx := optimizer(**changes))
    expected = run([unfused] * STEPS, tx, params)
    found = run([fused] * STEPS, tx, params)
    tolerance = 1e-3 if "mu_dtype" in changes else 1e-6  # bfloat16 has 8 bits
    at_ties = 4 if "placement" in changes else 0
    assert_near(found, expected, tolerance, at_ties)
    # Each goes on from the other's state.
    mixed = run([fused, unfused] * (STEPS // 2), tx, params)
    assert_near(mixed, expected, tolerance, at_ties)
    moved = np.abs(expected[0]["groups"] - params["groups"]).max()
    assert moved > 0.05


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"statistics": True, "mask": None},
        {"curvature": cage.curvature.fisher(factored=True)},
    ],
    ids=["plain", "statistics", "weights"],
)
def test_a_hundred_steps_are_those_of_the_transformation(params, changes):
    check_hundred_steps(params, changes)


def test_with_a_period_the_state_keeps_the_last_statistics(params):
    params = {name: params[name] for name in ("groups", "bias")}
    fused, unfused = forms(tx := optimizer(FEW, statistics=4, mask=None))
    expected = run([unfused] * 7, tx, params)
    found = run([fused] * 7, tx, params)  # measured in steps 0 and 4
    assert_near(found, expected)
    kept = found[1][1].statistics
    chex.assert_trees_all_equal(kept, run([fused] * 5, tx, params)[1][1].statistics)
    last = fused(gradients(params, 9), found[1], found[0])[1][1].statistics
    chex.assert_trees_all_equal(last, kept)


PLAIN = {
    "nesterov": {"nesterov": True},
    "freeze_scale": {"freeze_scale": True},
    "an array": {"weight_decay": jnp.float32(0.1)},
    "`curvature`": {"curvature": cage.curvature.second_moment()},
    "`curvature` with `statistics`": {
        "curvature": cage.curvature.fisher(factored=True),
        "statistics": True,
    },
}


FEW = cage.Rules([("groups", cage.int4(group_size=32)), (".*", None)])


@pytest.mark.parametrize("name", PLAIN)
def test_without_a_fused_form_it_is_the_transformation(params, name):
    params = {name: params[name] for name in ("groups", "bias")}
    fused, unfused = forms(tx := optimizer(FEW, **PLAIN[name]))
    steps = 10
    assert_near(run([fused] * steps, tx, params), run([unfused] * steps, tx, params))
    why = f"`groups`: `implementation` must be None or .*{name}.* has no fused form"
    with pytest.raises(ValueError, match=why):
        tx.fused_step(params, tx.init(params), params, implementation="pallas")


def test_trees_of_any_kind(params):
    tx = optimizer(cage.Rules([(".*", cage.int4(group_size=32))]), mask=None)
    for tree in (params["groups"], [params["groups"]], {"a": (params["groups"],)}):
        fused, unfused = forms(tx)
        assert_near(run([fused] * 3, tx, tree), run([unfused] * 3, tx, tree))


REUSED = {
    "parameters": lambda old, new: (old[0], new[1]),
    "state": lambda old, new: (new[0], old[1]),
    "one buffer as both": lambda old, new: (
        new[0],
        optax.tree_utils.tree_set(new[1], mu=new[0]),
    ),
}


def test_what_was_donated_raises_when_it_is_used_again(params):
    params, tx = {"groups": params["groups"]}, optimizer(FEW, mask=None)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradient):
        return tx.fused_step(gradient, state, params)

    gradient = gradients(params, 0)
    for name, reused in REUSED.items():
        old = jax.tree.map(jnp.copy, params), tx.init(params)
        new = step(*old, gradient)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old)), name
        # JAX's own error: its type and words differ by version, and no number comes.
        with pytest.raises((RuntimeError, ValueError), match=r"deleted|donate"):
            step(*reused(old, new), gradient)


def test_a_state_of_another_optimizer_is_refused(params):
    tx = optimizer()
    for other in (optax.adamw(1e-3), optax.chain(optax.clip(1.0), optimizer())):
        with pytest.raises(ValueError, match="`state` must come from this optimizer"):
            tx.fused_step(params, other.init(params), params)
    with pytest.raises(ValueError, match=r"`implementation` must be one of .*'gpu'"):
        tx.fused_step(params, tx.init(params), params, implementation="gpu")


def test_a_copy_has_the_fused_step():
    tx = optimizer()
    assert copy.copy(tx).options == tx.options


QUANTIZERS = {
    "channels": cage.quest(4),
    "channels without a rotation": cage.int8(),
    "groups": cage.int4(group_size=32),
    "zero points": cage.int4(group_size=32, symmetric=False),
    "groups in a rotation": cage.int4(group_size=64, hadamard=128),
}


# Of each whether the error is that of updated weights, and whether it is measured.
# tests/programs/test_every_fused_step.py has the others.
EACH = [
    ("channels", -2, False, False),
    ("channels without a rotation", -1, False, False),
    ("groups", -1, False, False),
    ("groups in a rotation", -2, False, False),
    ("channels", -1, True, True),
    ("groups", -2, True, True),
    ("channels", -2, True, False),
    ("groups", -1, False, True),
    ("zero points", -2, True, True),
]
# Blocks reach beyond these along the groups, and across in the last case.
BEYOND = [
    ("channels without a rotation", (2, 72, 576), True, True),
    ("groups", (40, 288), False, True),
]


@functools.cache
def error_and_codes(quantizer):
    """A compiled function of weights: their quantization error and their codes."""
    return jax.jit(
        lambda x: (
            cage.quantization_error(x, quantizer),
            codes_of(x, quantizer, None),
        )
    )


def assert_rounded(found, expected, dtype, sure=1 - 1e-9):
    """Float32 is near what is expected, but for a few; bfloat16 is that, rounded."""
    assert found.dtype == dtype
    if dtype == jnp.bfloat16:
        assert np.mean(found == expected.astype(dtype)) > 0.99
    else:
        off = np.abs(found - expected)
        assert np.mean(off < 2e-6 + 1e-6 * np.abs(expected)) > sure


def check_kernel(
    name,
    axis,
    at_updated,
    measured,
    rng,
    shape=None,
    dtypes=(jnp.float32,) * 2,
    weighted=False,
):
    """Compares a kernel of several blocks along a group and across, and of a stack."""
    dtypes = Dtypes(*map(jnp.dtype, dtypes))
    quantizer = dataclasses.replace(QUANTIZERS[name], axis=axis)
    shape = shape or ((2, 256, 128) if axis == -2 else (2, 128, 256))
    cut = tiling.tiling_for_tpu(quantizer, shape, dtypes.x, block_bytes=2**16)
    gradient, first, second, x = rng.normal(size=(4, *shape)).astype(dtypes.x)
    first, second = first.astype(dtypes.first), np.abs(second)
    previous = rng.integers(-7, 8, shape).astype(np.int8) if measured else None
    step = jax.jit(
        functools.partial(
            tpu.adamw_step, tiling=cut, adamw=ADAMW, at_updated=at_updated
        )
    )

    def of(dtype, number):
        return float(dtype.type(number))

    def wide(numbers):
        return of(dtypes.update, numbers)

    b1, b2 = of(dtypes.first, 0.9), of(dtypes.x, 0.95)
    g, first_before, second_before, before = map(
        np.float64, (gradient, first, second, x)
    )
    m = of(dtypes.x, 1 - 0.9) * g + b1 * first_before
    v = of(dtypes.x, 1 - 0.95) * g**2 + b2 * second_before
    update = m / wide(0.3) / (np.sqrt(v / of(dtypes.x, 0.2)) + 1e-8)
    update = -wide(1e-2) * (update + of(dtypes.x, 0.1) * before)
    point = np.float32((before + update).astype(dtypes.x) if at_updated else x)
    error, expected_codes = error_and_codes(quantizer)(point)
    error = np.float64(error)
    # One at a tie may go to the other level, and with it all that it is rotated with.
    sure = 0.99 if quantizer.hadamard or at_updated else 1 - 1e-9
    weights = None
    if weighted:
        factors = [
            rng.uniform(0.1, 2, [1 if i == over else n for i, n in enumerate(shape)])
            for over in (len(shape) - 3 - axis, len(shape) + axis)
        ]
        weights = Factors(*map(jnp.float32, factors), largest=1.5)
        error = np.minimum(np.float64(factors[0]) * factors[1], 1.5) * error
    for pull in (0.0, -0.05):
        numbers = StepNumbers(*map(jnp.float32, (1e-2, pull, 0.3, 0.2)))
        numbers = numbers.rounded(dtypes)
        arrays = jax.tree.map(
            jnp.asarray, (gradient, first, second, x, numbers, previous, weights)
        )
        params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
        with pltpu.force_tpu_interpret_mode(params):
            new_first, new_second, after, *rest = step(*arrays)
        for ours, expected, dtype in zip((new_first, new_second), (m, v), dtypes[::-1]):
            assert_rounded(ours, expected, dtype)
        assert_rounded(after, before + update + pull * error, dtypes.x, sure)
        assert len(rest) == (2 if measured else 0)
        if measured:
            codes, sums = map(np.asarray, rest)
            assert codes.dtype == np.int8
            assert np.mean(np.equal(codes, expected_codes)) > sure
            squares = [np.square(np.float64(a)).sum() for a in (error, point, update)]
            np.testing.assert_allclose(sums[:3], squares, rtol=1e-4)
            assert sums[3] == np.sum(codes != previous)


@pytest.mark.parametrize(("name", "axis", "at_updated", "measured"), EACH)
def test_the_kernel(name, axis, at_updated, measured, rng):
    check_kernel(name, axis, at_updated, measured, rng)


@pytest.mark.parametrize(("name", "shape", "at_updated", "measured"), BEYOND)
def test_no_kernel_adds_up_what_lies_beyond_the_array(
    name, shape, at_updated, measured, rng, monkeypatch
):
    # The interpreter would return what is beyond an array too, if it is written over.
    launch = tpu.launch
    monkeypatch.setattr(tpu, "launch", lambda *args: launch(*args[:6]))
    check_kernel(name, -1, at_updated, measured, rng, shape)


@pytest.mark.parametrize(
    ("name", "axis", "at_updated", "shape"),
    [
        ("channels", -2, True, (2, 256, 128)),
        ("groups", -1, False, (2, 128, 256)),
        # Beyond the array both ways, and stored with its axes in another order.
        ("channels without a rotation", -1, False, (2, 72, 576)),
        ("groups in a rotation", -2, False, (256, 72)),
    ],
)
def test_the_kernel_with_weights(name, axis, at_updated, shape, rng, monkeypatch):
    launch = tpu.launch
    monkeypatch.setattr(tpu, "launch", lambda *args: launch(*args[:6]))
    check_kernel(name, axis, at_updated, False, rng, shape, weighted=True)


@pytest.mark.parametrize("measured", [False, True])
def test_the_kernel_of_groups_that_do_not_fit_on_the_chip(measured, rng, monkeypatch):
    monkeypatch.setattr(tiling, "_KEPT_BYTES", 2**14)
    check_kernel("channels", -2, False, measured, rng)
    twice = {"at_updated": True, "measured": False}
    like = QUANTIZERS["channels"], (256, 128), jnp.float32, jnp.float32, ADAMW
    found = adamw_kernels(*like, **twice)
    assert not found.found
    assert "does not fit on the chip" in dict(found.missing)["tpu"]


@pytest.mark.parametrize("first", ["bfloat16", "float32"])
def test_the_kernel_in_bfloat16(first, rng):
    check_kernel("groups", -1, False, True, rng, None, ("bfloat16", first))
    check_kernel("channels", -2, True, False, rng, None, ("bfloat16", first))


@pytest.mark.parametrize("changes", [{}, {"placement": "post_step"}], ids=str)
def test_a_step_in_bfloat16_is_that_of_the_transformation(changes, params):
    """But for roundings in between, of which a TPU makes none in either form."""
    params = {"groups": params["groups"].astype(jnp.bfloat16), "bias": params["bias"]}
    tx = cage.cage_adamw(1e-2, FEW, strength=5.0, **changes)
    fused, unfused = forms(tx)
    state = run([unfused] * 20, tx, params)[1]
    for mu_dtype in ("bfloat16", "float32"):
        adam, *others = state[0]
        adam = adam._replace(mu=optax.tree.cast(adam.mu, jnp.dtype(mu_dtype)))
        before = (adam, *others), state[1]
        gradient = gradients(params, 20)
        found, expected = (step(gradient, before, params) for step in (fused, unfused))
        chex.assert_trees_all_equal_dtypes(found[0], expected[0])
        # Three bits of eight for each rounding of a moment, one for that of a weight.
        assert_near(found[1][0][0].nu, expected[1][0][0].nu, 2**-7)
        assert_near(found[0], expected[0], 2**-8)


def test_a_dtype_without_a_fused_form(params):
    tx, x = optimizer(FEW, mask=None), params["groups"]
    for dtype, gradient, why in (
        ("float16", "float16", "a dtype other than float32 or bfloat16"),
        ("bfloat16", "float32", "a gradient or second moment of another dtype"),
    ):
        params = {"groups": x.astype(dtype)}
        with pytest.raises(ValueError, match=f"{why} has no fused form"):
            tx.fused_step(
                {"groups": x.astype(gradient)},
                tx.init(params),
                params,
                implementation="pallas",
            )


def test_statistics_need_integers():

    def found(measured):
        like = cage.mxfp4(), (256, 256), jnp.float32, jnp.float32, ADAMW
        return adamw_kernels(*like, at_updated=False, measured=measured).found

    assert found(False) and not found(True)


def test_a_step_that_gains_too_little_is_run_by_name_alone():

    def by_name(quantizer, at_updated=False, dtype=jnp.float32):
        shape = 512, 512
        options = {"at_updated": at_updated, "measured": False}
        found = adamw_kernels(quantizer, shape, dtype, dtype, ADAMW, **options).found
        return {each.platform for each in found if each.when.untuned != "kernel"}

    assert by_name(cage.int8()) == {"tpu"}  # there is no kernel for GPU
    assert by_name(cage.int8(), at_updated=True) == set()
    assert by_name(cage.int8(), dtype=jnp.bfloat16) == set()
    rows = cage.int4(axis=-1, group_size=128)
    # The compiler reads once for each end of a range.
    ranges = cage.int4(axis=-1, group_size=128, symmetric=False)
    assert by_name(rows) == {"tpu", "cuda"} and by_name(ranges) == {"cuda"}
    assert by_name(cage.quest(4)) == by_name(cage.int4(group_size=32)) == {"cuda"}


def test_a_placement_that_is_none():
    with pytest.raises(ValueError, match=r"`placement` must be one of .*'coupled'"):
        optimizer(placement="coupled")


def test_the_arithmetic_of_a_step_is_that_of_optax(rng):
    """With numbers so large that each of them shows; two float32 programs differ."""
    options = {"b1": 0.8, "b2": 0.9, "eps": 0.3, "eps_root": 0.2, "weight_decay": 0.4}
    x, *gradients = rng.normal(size=(3, 64)).astype(np.float32)
    tx, fused = optax.adamw(0.1, **options), AdamW(**options)
    step_of = jax.jit(functools.partial(fused.step, dtypes=Dtypes(x.dtype, x.dtype)))
    state = tx.init(x)
    first = second = np.zeros_like(x)
    for step, gradient in enumerate(gradients, 1):
        numbers = StepNumbers(
            rate=np.float32(0.1),
            pull=np.float32(0),
            first_correction=np.float32(1 - 0.8**step),
            second_correction=np.float32(1 - 0.9**step),
        )
        first, second, update = step_of(gradient, first, second, x, numbers)
        expected, state = jax.jit(tx.update)(gradient, state, x)
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(first, state[0].mu, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(second, state[0].nu, rtol=1e-5, atol=1e-7)
