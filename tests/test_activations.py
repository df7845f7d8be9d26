"""Inputs of products, quantized in programs of every kind."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cage_jax as cage
from cage_jax import Rules, calibrate, fake_quant, int4, int8, quantize_activations
from cage_jax.activations import quantize_input
from cage_jax.formats import Integer
from cage_jax.scales import AbsMax, Calibrated, MinMax, Percentile

EPS = float(np.finfo(np.float32).eps)
PER_TOKEN = int8(axis=-1)
STATIC = int8(axis=None, scale=Calibrated())


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def inputs_of(pattern, inputs=PER_TOKEN):
    return Rules([(pattern, None, inputs)])


def quantized_in_numpy(x, levels=127):
    """Symmetric absmax with a scale per row, in float64."""
    x = np.float64(x)
    scale = np.abs(x).max(-1, keepdims=True) / levels
    return np.round(x / scale) * scale


@pytest.fixture
def params(rng):
    return {
        "w": normal(rng, 8, 4),
        "stack": normal(rng, 3, 8, 8),
        "heads": normal(rng, 8, 2, 4),
        "out": normal(rng, 2, 4, 8),
        "embed": normal(rng, 16, 8),
        "bias": normal(rng, 8),
    }


@pytest.fixture
def x(rng):
    return normal(rng, 5, 8)


def test_a_product_by_an_operator(params, x):
    found = quantize_activations(lambda p, x: x @ p["w"], inputs_of("w"))(params, x)
    expected = quantized_in_numpy(x) @ np.float64(params["w"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=40 * EPS)
    assert np.abs(expected - np.float64(x) @ np.float64(params["w"])).max() > 1e-3


Q = functools.partial(fake_quant, quantizer=PER_TOKEN)
COARSE = int4(axis=-1)
Q4 = functools.partial(fake_quant, quantizer=COARSE)
HEADS = int8(axis=(-2, -1))


def transposed(q):
    return lambda p, x: q(x) @ p["embed"].T


def scanned(q):
    def layer(h, w):
        return jnp.tanh(q(h) @ w), None

    return lambda p, x: jax.lax.scan(layer, x, p["stack"])[0]


def scanned_backwards(q):
    def layer(h, row):
        w, i = row
        return jnp.tanh(q(h) @ w) * i, h

    def run(p, x):
        rows = (p["stack"], jnp.arange(3.0))
        h, seen = jax.lax.scan(layer, x, rows, reverse=True, unroll=2)
        return h + seen.sum(0)

    return run


def rematerialized(q):
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def layer(h, w):
        return jax.nn.silu(q(h) @ w)

    return lambda p, x: layer(layer(x, p["stack"][0]), p["stack"][1])


def compiled_inside(q):
    return lambda p, x: jax.jit(lambda w, x: q(x) @ w)(p["w"], x) * 2


def by_a_traced_index(q):
    def run(p, x):
        last = jnp.argmax(x[0]) % 3
        return q(x) @ p["stack"][last]

    return run


def one_of_many(q):
    return lambda p, x: jax.vmap(lambda x: q(x) @ p["w"])(x)


def of_a_computed_weight(q):
    def run(p, x):
        w = p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)
        return q(x) @ w.astype(jnp.float32)

    return run


def weight_first(q):
    return lambda p, x: p["w"].T @ q(x).T


def after_a_custom_derivative(q):
    return lambda p, x: optax.losses.safe_softmax_cross_entropy(
        jax.nn.relu(q(jax.nn.relu(x)) @ p["w"]), jnp.ones((5, 4)) / 4
    )


def twice(q):
    return lambda p, x: q(q(x) @ p["stack"][0]) @ p["stack"][0] + p["bias"][None]


def by_einsum(q):
    return lambda p, x: jnp.einsum("td,dnh->tnh", q(x), p["heads"])


PROGRAMS = {
    "operator": ("w", lambda q: lambda p, x: q(x) @ p["w"]),
    "tied embedding": ("embed", transposed),
    "scan": ("stack", scanned),
    "scan backwards": ("stack", scanned_backwards),
    "checkpoint": ("stack", rematerialized),
    "jit inside": ("w", compiled_inside),
    "traced index": ("stack", by_a_traced_index),
    "vmap": ("w", one_of_many),
    "computed weight": ("w", of_a_computed_weight),
    "weight first": ("w", weight_first),
    "custom derivatives": ("w", after_a_custom_derivative),
    "twice": ("stack", twice),
    "einsum": ("heads", by_einsum),
}


@pytest.mark.parametrize(("pattern", "build"), PROGRAMS.values(), ids=PROGRAMS)
def test_programs_are_those_written_with_quantized_inputs(pattern, build, params, x):
    found = quantize_activations(build(lambda x: x), inputs_of(pattern, COARSE))
    with jax.numpy_dtype_promotion("standard"):
        check_same(found, build(Q4), build(lambda x: x), params, x)


def check_same(found, expected, plain, params, x):
    """The same values and gradients, and others than those of the plain program."""

    def of(function):
        return jax.jit(
            jax.value_and_grad(lambda p, x: (function(p, x) ** 2).sum(), argnums=(0, 1))
        )(params, x)

    # Programs fuse otherwise; a value near a tie may not be among those here.
    chex.assert_trees_all_close(of(found), of(expected), rtol=2e-5, atol=2e-5)
    chex.assert_trees_all_close(found(params, x), expected(params, x), rtol=1e-5)
    different = np.abs(of(plain)[0] - of(expected)[0])
    assert different > 1e-4 * np.abs(of(plain)[0])


def test_several_axes_summed_over(params, x):
    y = jnp.einsum("td,dnh->tnh", x, params["heads"])

    def project(p, y):
        return jnp.einsum("tnh,nhd->td", y, p["out"])

    found = quantize_activations(project, inputs_of("out"))(params, y)
    expected = project(params, fake_quant(y, HEADS))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    # With groups and rotations they are one axis, in their order.
    for inputs in (int8(axis=-1, group_size=4), int4(axis=-1, hadamard=8)):
        found = quantize_activations(project, inputs_of("out", inputs))(params, y)
        flat = fake_quant(y.reshape(5, 8), inputs)
        expected = project(params, flat.reshape(y.shape))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "axis"),
    [(int8(axis=None), None), (int8(axis=0), (0, 1)), (int8(axis=-1), -1)],
    ids=["tensor", "feature", "token"],
)
def test_what_shares_a_scale(inputs, axis, params, rng):
    x = normal(rng, 2, 5, 8)
    found = quantize_activations(lambda p, x: x @ p["w"], inputs_of("w", inputs))
    high = np.abs(np.float64(x)).max(axis, keepdims=True) / 127
    expected = np.round(np.float64(x) / high) * high @ np.float64(params["w"])
    np.testing.assert_allclose(found(params, x), expected, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups, rng):
    kernel, x = normal(rng, 3, 3, 4 // groups, 8), normal(rng, 2, 6, 6, 4)

    def convolve(p, x):
        return jax.lax.conv_general_dilated(
            x,
            p["kernel"],
            (2, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    for inputs in (int8(axis=-1), int8(axis=None), int4(axis=-1, group_size=2)):
        found = quantize_activations(convolve, inputs_of("kernel", inputs))
        expected = convolve({"kernel": kernel}, fake_quant(x, inputs))
        np.testing.assert_allclose(found({"kernel": kernel}, x), expected, atol=1e-5)

    def transpose(p, x):
        return jax.lax.conv_transpose(
            x, p["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    if groups == 1:
        found = quantize_activations(transpose, inputs_of("kernel"))
        expected = transpose({"kernel": kernel}, Q(x))
        np.testing.assert_allclose(found({"kernel": kernel}, x), expected, atol=1e-5)


def test_channels_first(rng):
    kernel, x = normal(rng, 8, 4, 3), normal(rng, 2, 4, 6)

    def convolve(p, x):
        return jax.lax.conv_general_dilated(x, p["kernel"], (1,), "VALID")

    found = quantize_activations(convolve, inputs_of("kernel"))
    expected = convolve({"kernel": kernel}, fake_quant(x, int8(axis=1)))
    np.testing.assert_allclose(found({"kernel": kernel}, x), expected, atol=1e-5)


def test_weights_and_inputs_in_one_table(params, x):
    rules = Rules([("w", int4(), PER_TOKEN), ("out", int4())])
    apply = quantize_activations(lambda p, x: x @ p["w"], rules)

    def loss(params):
        return (apply(fake_quant(params, rules), x) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(params)["w"]
    quantized = fake_quant(params["w"], int4())
    expected = 2 * np.float64(Q(x)).T @ (np.float64(Q(x)) @ np.float64(quantized))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "weights",
    [
        int4(group_size=4),
        cage.quest(4, hadamard=8),
        cage.Quantizer(Integer(4), AbsMax(), hadamard=8, rounding="stochastic"),
    ],
    ids=["plain", "rotated", "stochastic"],
)
def test_weights_quantized_inside_the_function(weights, params, x):
    """What rotates them is a product, of a parameter, and none of the model's."""
    rules = Rules([("w", weights, PER_TOKEN), (".*", None)])
    key = jax.random.key(0) if weights.rounding == "stochastic" else None

    def apply(params, x, key):
        return x @ fake_quant(params, rules, key=key)["w"]

    found = quantize_activations(apply, rules)({"w": params["w"]}, x, key)
    rounded = fake_quant({"w": params["w"]}, rules, key=key)["w"]
    expected = quantized_in_numpy(x) @ np.float64(rounded)
    np.testing.assert_allclose(found, expected, rtol=0, atol=40 * EPS)


def test_the_dtype_is_kept(params, x):
    def apply(p, x):
        return x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)

    found = quantize_activations(apply, inputs_of("w"))(params, x)
    assert found.dtype == jnp.bfloat16
    expected = Q(x.astype(jnp.bfloat16)) @ params["w"].astype(jnp.bfloat16)
    chex.assert_trees_all_equal(found, expected)


def test_arguments_that_are_no_arrays(params, x):
    def apply(p, x, *, scale=1, kind="plain", nothing=None):
        assert kind in ("plain", "twice") and nothing is None
        return {"y": (x @ p["w"]) * (2 if kind == "twice" else 1) * scale, "n": None}

    apply = quantize_activations(apply, inputs_of("w"))
    twice = apply(params, x, kind="twice", nothing=None)
    chex.assert_trees_all_close(twice["y"], 2 * apply(params, np.asarray(x))["y"])
    assert twice["n"] is None


def test_data_that_the_function_closes_over(params, x):
    found = quantize_activations(lambda p: x @ p["w"], inputs_of("w"))(params)
    np.testing.assert_allclose(found, Q(x) @ params["w"], atol=1e-5)


# --- calibrated and learned -----------------------------------------------------------


def test_calibrated_on_batches(params, rng):
    batches = [(normal(rng, 5, 8),) for _ in range(3)]
    largest = [np.abs(np.asarray(x)).max() for (x,) in batches]

    def apply(p, x):
        return x @ p["w"]

    def scale_of(rule):
        rules = inputs_of("w", int8(axis=None, scale=rule))
        variables = calibrate(apply, rules, params, batches)
        assert variables["params"] is params
        return float(variables["grids"]["w/inputs"].scale)

    assert scale_of(Calibrated()) == pytest.approx(max(largest) / 127, rel=1e-6)
    moving = 0.9 * (0.9 * largest[0] + 0.1 * largest[1]) + 0.1 * largest[2]
    assert scale_of(Calibrated(decay=0.9)) == pytest.approx(moving / 127, rel=1e-6)
    percentiles = [
        np.percentile(np.abs(np.asarray(x)), 90, method="higher") for (x,) in batches
    ]
    found = scale_of(Calibrated(Percentile(90.0)))
    assert found == pytest.approx(max(percentiles) / 127, rel=1e-6)


def test_calibrated_inputs_have_that_grid(params, rng, x):
    rules = inputs_of("w", STATIC)

    def apply(p, x):
        return x @ p["w"]

    variables = calibrate(apply, rules, params, [(0.5 * x,)])
    found = quantize_activations(apply, rules)(variables, x)
    scale = 0.5 * np.abs(np.float64(x)).max() / 127
    expected = np.clip(np.round(np.float64(x) / scale), -127, 127) * scale
    np.testing.assert_allclose(
        found, expected @ np.float64(params["w"]), rtol=0, atol=1e-4
    )
    # What lies beyond the grid receives no gradient.
    apply = quantize_activations(apply, rules)
    gradient = np.asarray(jax.grad(lambda x: apply(variables, x).sum())(x))
    outside = np.abs(np.float64(x)) > 127.01 * scale
    assert outside.any() and np.all((gradient == 0) == outside)


def test_one_sided_inputs_with_a_zero_point(params, rng):
    asymmetric = cage.Quantizer(
        Integer(8, narrow=False), Calibrated(MinMax()), axis=None
    )
    rules = inputs_of("w", asymmetric)
    batches = [(jax.nn.relu(normal(rng, 5, 8)) + shift,) for shift in (0, 1.0)]

    def apply(p, x):
        return x @ p["w"]

    variables = calibrate(apply, rules, params, batches)
    grid = variables["grids"]["w/inputs"]
    top = max(float(x.max()) for (x,) in batches)
    assert float(grid.scale) == pytest.approx(top / 255, rel=1e-5)
    assert float(grid.zero_point) == -128
    found = quantize_activations(apply, rules)(variables, batches[0][0])
    np.testing.assert_allclose(
        found, batches[0][0] @ params["w"], atol=float(grid.scale) * 8 * 2
    )


def test_each_repetition_of_a_scan_has_its_own_grid(params, x):
    rules = inputs_of("stack", STATIC)
    variables = calibrate(scanned(lambda x: x), rules, params, [(x,)])
    h, expected = x, []
    for w in params["stack"]:
        expected.append(np.abs(np.asarray(h)).max() / 127)
        h = jnp.tanh(h @ w)
    found = variables["grids"]["stack/inputs"].scale
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    apply = jax.jit(quantize_activations(scanned(lambda x: x), rules))
    h = np.float64(x)
    for w, scale in zip(params["stack"], expected):
        h = np.tanh(np.clip(np.round(h / scale), -127, 127) * scale @ np.float64(w))
    np.testing.assert_allclose(apply(variables, x), h, atol=1e-4)


def test_batches_of_zeros_say_nothing(params, x):
    rules = inputs_of("w", STATIC)

    def apply(p, x):
        return x @ p["w"]

    for batches in ([x, 0 * x], [0 * x, x]):
        found = calibrate(apply, rules, params, [(each,) for each in batches])
        scale = float(found["grids"]["w/inputs"].scale)
        assert scale == pytest.approx(float(jnp.abs(x).max()) / 127, rel=1e-6)
    found = calibrate(apply, rules, params, [(0 * x,)])
    assert float(found["grids"]["w/inputs"].scale) == 1


def test_learned_grids_of_inputs_are_trained(params, x):
    rules = Rules([("stack", int4(), cage.lsq(4))])
    function = scanned(lambda x: x)
    variables = calibrate(function, rules, params, [(x,)])
    start = variables["grids"]["stack/inputs"].scale
    first = 2 * np.abs(np.float64(x)).mean() / np.sqrt(7)
    assert float(start[0]) == pytest.approx(first, rel=1e-5)
    apply = quantize_activations(function, rules)
    target = function(params, x)

    def loss(variables):
        return jnp.mean((apply(fake_quant(variables, rules), x) - target) ** 2)

    tx = cage.cage_adamw(0.01, rules, 1.0)
    state = tx.init(variables)
    before = loss(variables)

    @jax.jit
    def step(variables, state):
        updates, state = tx.update(jax.grad(loss)(variables), state, variables)
        return optax.apply_updates(variables, updates), state

    with jax.numpy_dtype_promotion("standard"):
        for _ in range(30):
            variables, state = step(variables, state)
    assert loss(variables) < 0.8 * before
    assert np.all(np.asarray(variables["grids"]["stack/inputs"].scale != start))


def test_learned_weights_and_calibrated_inputs_lie_beside_each_other(params, x):
    rules = Rules([("w", cage.lsq(4), STATIC)])

    def apply(p, x):
        return x @ p["w"]

    variables = calibrate(apply, rules, cage.with_grids(params, rules), [(x,)])
    assert sorted(variables["grids"]) == ["w", "w/inputs"]
    quantized = fake_quant(variables, rules)
    found = quantize_activations(apply, rules)(quantized, x)
    w = fake_quant(params["w"], cage.lsq(4), grid=variables["grids"]["w"])
    expected = fake_quant(x, int8(axis=None)) @ w
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# --- bad input ------------------------------------------------------------------------


def bad(pattern, inputs, function, text, params, x, error=ValueError):
    with pytest.raises(error, match=text):
        quantize_activations(function, inputs_of(pattern, inputs))(params, x)


def test_batches_are_tuples(params, x):
    def apply(p, x):
        return x @ p["w"]

    with pytest.raises(TypeError, match=r"`batches` must be tuples .*Use \[\(x,\)"):
        calibrate(apply, inputs_of("w", STATIC), params, [x])


def test_what_cannot_be_done_is_said(params, x):
    def apply(p, x):
        return x @ p["w"] + p["bias"][None, :4]

    bad("bias", PER_TOKEN, apply, "`bias`: a parameter must multiply data", params, x)
    bad(
        "w",
        int8(),
        apply,
        r"`w/inputs`: `inputs` must be .*axis -1.*int8\(axis",
        params,
        x,
    )
    bad("w", int8(axis=0, group_size=5), apply, "0 without groups", params, x)
    bad(
        "w",
        int8(axis=-1, group_size=3),
        apply,
        "`w/inputs`: `group_size` must",
        params,
        x,
    )
    bad(
        "w",
        STATIC,
        apply,
        "`w/inputs`: `inputs` of this weight must be calib.*int8 calibrated",
        params,
        x,
    )
    bad(
        "w",
        cage.lsq(8),
        apply,
        "`w/inputs`: `inputs` of this weight must be calib.*learned",
        params,
        x,
    )
    stochastic = cage.Quantizer(Integer(8), axis=-1, rounding="stochastic")
    bad("w", stochastic, apply, "`w/inputs`: `inputs` must be rounded", params, x)
    with pytest.raises(TypeError, match=r"`rules` must be Rules; got dict"):
        quantize_activations(apply, {"w": int8()})
    # Calibrated per token makes no sense: tokens differ.
    per_token = inputs_of("w", int8(axis=-1, scale=Calibrated()))
    with pytest.raises(
        ValueError, match="`w/inputs`: `inputs` must not have a calibrated"
    ):
        calibrate(apply, per_token, params, [(x,)])
    static = inputs_of("w", STATIC)
    with pytest.raises(ValueError, match="`batches` must have a batch"):
        calibrate(apply, static, params, [])
    with pytest.raises(ValueError, match="`rules` must have inputs with a calibrated"):
        calibrate(apply, inputs_of("w"), params, [(x,)])
    with pytest.raises(ValueError, match="`w`: `batches` must give finite inputs"):
        calibrate(apply, static, params, [(x.at[0, 0].set(jnp.nan),)])


def test_a_product_out_of_reach_is_said(params, x):
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: saved)
    bad(
        "w",
        PER_TOKEN,
        lambda p, x: product(x, p["w"]),
        "`w`: its input must be within reach .*inside of custom_vjp_call",
        params,
        x,
    )

    def conditional(p, x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: x[:, :4], x)

    bad("w", PER_TOKEN, conditional, "inside of cond", params, x)


def test_a_pattern_of_another_naming_is_warned_of(params, x):
    rules = Rules([("W/kernel", None, PER_TOKEN), ("w", None, PER_TOKEN)])
    with pytest.warns(UserWarning, match=r"'W/kernel' matches no parameter"):
        quantize_activations(lambda p, x: x @ p["w"], rules)(params, x)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: Calibrated(cage.scales.Learned()), TypeError, "`rule` must be a rule"),
        (lambda: Calibrated("absmax"), TypeError, "`rule` must be a rule"),
        (lambda: Calibrated(decay=1.0), ValueError, "`decay` must be below 1"),
        (lambda: Calibrated(decay=0.0), ValueError, "`decay` must be positive"),
    ],
)
def test_bad_calibrations(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_calibrated_is_what_it_wraps():
    rule = Calibrated(AbsMax(), decay=0.5)
    assert str(rule) == "calibrated absmax, average of decay 0.5"
    assert rule.needs_grid and not rule.learned and not rule.asymmetric
    assert Calibrated(MinMax()).asymmetric
    with pytest.raises(ValueError, match="MinMax needs an integer format of full"):
        cage.Quantizer(Integer(8), Calibrated(MinMax()))


def test_an_input_of_one_token(rng):
    x = normal(rng, 8)
    found = quantize_input(x, (0,), PER_TOKEN, None)
    chex.assert_trees_all_equal(found, Q(x))
    with pytest.raises(ValueError, match=r"an input of shape \(8,\)"):
        quantize_input(x, (0,), int8(axis=0), None)
