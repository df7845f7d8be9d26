"""Rules taken from qwix, against the weights of qwix's own compiled training step.

A product with an identity matrix shows what qwix makes of a weight: each output is one
of its values, plus zeros.
"""

import importlib
import importlib.metadata
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cage_jax as cage
from cage_jax.diagnostics import report
from cage_jax.rounding import fit_grid

qwix = pytest.importorskip("qwix")
bridge = pytest.importorskip("cage_jax.qwix", exc_type=ImportError)
linen = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")

# What qwix itself calls of flax.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

compiled = jax.jit(cage.fake_quant, static_argnums=1)
EXACT = {"use_original_residuals": False}


@pytest.fixture(autouse=True)
def as_qwix_needs_it():
    """Of implicit promotion, which qwix and flax make use of."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def rules_and_warnings(*args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rules = bridge.rules(*args, **kwargs)
    return rules, [str(warning.message) for warning in caught]


def exact_rules(*args, **kwargs):
    """Rules that nothing is said against but what is true of qwix's defaults."""
    rules, texts = rules_and_warnings(*args, **kwargs)
    assert not [text for text in texts if text.startswith("`")]
    return rules


def quantizing(qtype, **options):
    return qwix.QtRule(weight_qtype=qtype, **options)


def grid_of(qtype):
    """The values of a type, and the one that the largest of a group becomes."""
    if str(qtype).startswith("int"):
        high = 2 ** (int(qtype[3:]) - 1)
        return np.arange(-high, high), high - 0.5
    if qtype == "nf4":
        numerics = importlib.import_module("qwix._src.core.numerics")
        return np.asarray(numerics.get_nf4_buckets(), np.float64), 1.0
    kind = {
        "mxfp8": "float8_e4m3fn",
        "mxfp4": "float4_e2m1fn",
        "nvfp4": "float4_e2m1fn",
    }
    dtype = jnp.dtype(kind.get(qtype, qtype))
    count = 16 if "float4" in dtype.name else 256
    values = np.arange(count, dtype=np.uint8).view(dtype).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    return values, values[-1]


def hard_weights(rng, shape, qtype="int4", tile=None):
    """Values next to the middle of two codes, where the last bit of a scale counts.

    Along the last axis but one, in float32; with groups of zeros and of an outlier, and
    with largest values of both signs.
    """
    levels, end = grid_of(qtype)
    x = rng.standard_normal(shape)
    groups = np.moveaxis(x, -2, 0).reshape(tile or shape[-2], -1)
    groups[0] = np.abs(groups).max(0) * rng.choice([-1, 1], groups.shape[1]) * 1.01
    groups[0] = groups[0].astype(np.float32)
    scale = np.abs(groups[0]) / end
    middle = rng.choice((levels[1:] + levels[:-1]) / 2, groups.shape)
    near = middle * scale * (1 + 2.0**-24 * rng.integers(-3, 4, groups.shape))
    inside = (np.abs(near) < np.abs(groups[0])) & (rng.random(groups.shape) < 0.7)
    inside[0] = False
    groups = np.where(inside, near, groups)
    groups[:, 1], groups[1, 2] = 0, 100
    parts = np.moveaxis(x, -2, 0).shape
    return np.moveaxis(groups.reshape(parts), 0, -2).astype(np.float32)


def assert_same_bits(actual, expected):
    assert np.asarray(actual).dtype == np.asarray(expected).dtype
    np.testing.assert_array_equal(
        np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    )


def one_hot(*shape):
    """Inputs such that a product gives each value of a weight."""
    return jnp.eye(int(np.prod(shape)), dtype=jnp.float32).reshape(-1, *shape)


# --- one model with a layer of each kind, one training step --------------------------

KINDS = {
    "int2": quantizing("int2"),
    "int3": quantizing("int3"),
    "int4": quantizing("int4"),
    "int4 exact gradient": quantizing("int4", additional_qt_config=EXACT),
    "int4 one scale": quantizing("int4", disable_channelwise_axes=True),
    "int5": quantizing("int5"),
    "int6": quantizing("int6"),
    "int7": quantizing("int7"),
    "int8": quantizing("int8"),
    "int4 tile 16": quantizing("int4", tile_size=16),
    "int4 tile 16 exact": quantizing("int4", tile_size=16, additional_qt_config=EXACT),
    "int8 quarter": quantizing("int8", tile_size=0.25),
    "int4 tile 1": quantizing("int4", tile_size=1),
    "int4 clipped": quantizing("int4", weight_calibration_method="absmax,0.8"),
    "int4 over 7": quantizing("int4", weight_calibration_method="absmax,1.0714286"),
    "int4 over 7 tile": quantizing(
        "int4", weight_calibration_method="absmax,1.0714286", tile_size=32
    ),
    "int8 fixed": quantizing("int8", weight_calibration_method="fixed,-1.7,1.7"),
    "int8 fixed tile": quantizing(
        "int8", weight_calibration_method="fixed,1.7", tile_size=16
    ),
    "fp8": quantizing("float8_e4m3fn"),
    "fp8 e5m2": quantizing(jnp.float8_e5m2),
    "fp4": quantizing(jnp.float4_e2m1fn),
    "mxfp8": quantizing("mxfp8", tile_size=32),
    "mxfp4": quantizing("mxfp4", tile_size=32),
    "nvfp4": quantizing("nvfp4", tile_size=16),
    "nf4": quantizing("nf4", tile_size=32),
    "nf4 channel": quantizing("nf4"),
}


class Layers(nnx.Module):
    """Each layer has an input and an output of its own."""

    def __init__(self, layers):
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.names = nnx.static(tuple(layers))

    def __call__(self, inputs):
        return {name: getattr(self, name)(inputs[name]) for name in self.names}


def trained(model, qwix_rules, inputs, tx=None):
    """The weights that qwix's training step shows, and the model after it."""
    quantized = qwix.quantize_model(model, qwix.QtProvider(qwix_rules), inputs)
    optimizer = nnx.Optimizer(quantized, tx or optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, inputs):
        def loss(model):
            outputs = model(inputs)
            total = sum(jnp.sum(jnp.sin(y) ** 2) for y in jax.tree.leaves(outputs))
            return total.astype(jnp.float32), outputs

        (_, outputs), gradient = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, gradient)
        return outputs

    return step(quantized, optimizer, inputs), quantized


@pytest.fixture(scope="module")
def every_kind():
    rng = np.random.default_rng(0)
    names = {name: f"layer{i}" for i, name in enumerate(KINDS)}
    layers, qwix_rules = {}, []
    for name, rule in KINDS.items():
        layer = nnx.Linear(64, 24, use_bias=False, rngs=nnx.Rngs(0))
        qtype, tile = rule.weight_qtype, rule.tile_size
        tile = {None: 64, 0.25: 16, 1: 64}.get(tile, tile)
        weights = hard_weights(rng, (64, 24), qtype, tile)
        layer.kernel[...] = jnp.asarray(weights)
        layers[names[name]] = layer
        options = {f: getattr(rule, f) for f in rule.__dataclass_fields__}
        qwix_rules.append(qwix.QtRule(**options | {"module_path": names[name]}))
    model = Layers(layers)
    inputs = {name: jnp.eye(64) for name in layers}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            outputs, _ = trained(model, qwix_rules, inputs)
        rules = exact_rules(model, qwix_rules, inputs)
    return {
        name: (getattr(model, at).kernel[...], rules.match(f"{at}/kernel"), outputs[at])
        for name, at in names.items()
    }


@pytest.mark.parametrize("name", list(KINDS))
def test_the_bits_of_a_training_step(name, every_kind):
    weights, quantizer, expected = every_kind[name]
    assert_same_bits(compiled(weights, quantizer), expected)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        error = jax.jit(cage.quantization_error, static_argnums=1)(weights, quantizer)
        assert_same_bits(error, np.asarray(weights) - np.asarray(expected))


# --- layouts: what a parameter is when it becomes a factor ----------------------------


def nnx_layouts():
    rngs = nnx.Rngs(0)
    return {
        "einsum": nnx.Einsum("bd,dhk->bhk", (32, 4, 8), rngs=rngs),
        "turned": nnx.Einsum("bi,oi->bo", (24, 32), rngs=rngs),
        "general": nnx.LinearGeneral((4, 8), 6, axis=(-2, -1), rngs=rngs),
        "conv": nnx.Conv(3, 5, (2, 2), padding="VALID", rngs=rngs),
    }


# Its inputs, and how its output becomes its weight.
IDENTITIES = {
    "einsum": (one_hot(32), lambda y: y),
    "turned": (one_hot(32), lambda y: y.T),
    "general": (one_hot(4, 8), lambda y: y.reshape(4, 8, 6)),
    "conv": (one_hot(2, 2, 3), lambda y: y.reshape(2, 2, 3, 5)),
}


@pytest.fixture(scope="module")
def nnx_layers():
    rng = np.random.default_rng(1)
    layers = nnx_layouts()
    for name, layer in layers.items():
        if getattr(layer, "bias", None) is not None:
            layer.bias[...] = jnp.zeros_like(layer.bias[...])
        shape, turned = layer.kernel.shape, name == "turned"
        if name == "einsum":
            weights = hard_weights(rng, (32, 32)).reshape(shape)
        else:
            weights = hard_weights(rng, shape[::-1] if turned else shape)
        layer.kernel[...] = jnp.asarray(weights.T if turned else weights)
    model = Layers(layers)
    inputs = {name: IDENTITIES[name][0] for name in layers}
    qwix_rules = [quantizing("int4", additional_qt_config=EXACT)]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            outputs, _ = trained(model, qwix_rules, inputs)
        rules = exact_rules(model, qwix_rules, inputs)
    return model, rules, outputs


@pytest.mark.parametrize("name", list(IDENTITIES))
def test_layouts_of_nnx(name, nnx_layers):
    model, rules, outputs = nnx_layers
    _, back = IDENTITIES[name]
    quantizer = rules.match(f"{name}/kernel")
    kernel = getattr(model, name).kernel[...]
    assert_same_bits(compiled(kernel, quantizer), back(outputs[name]))


def test_the_paths_are_those_of_the_optimizer(nnx_layers):
    model, rules, _ = nnx_layers
    paths = [f"{name}/kernel" for name in sorted(IDENTITIES)]
    assert sorted(rules.quantized(nnx.state(model, nnx.Param))) == paths
    assert sorted(rules.quantized({"params": nnx.to_pure_dict(nnx.state(model))})) == (
        paths
    )


class Body(linen.Module):
    @linen.compact
    def __call__(self, carry, x):
        return carry, linen.Dense(6, use_bias=False)(x)


class Stacks(linen.Module):
    """Linen's layers, and stacks of them along two axes of the parameter."""

    @linen.compact
    def __call__(self, inputs, train):
        split = {"split_rngs": {"params": True}}
        scan = linen.scan(linen.remat(Body), {"params": 0}, length=3, **split)
        vmap = linen.vmap(linen.Dense, {"params": 1}, **split)
        dense = linen.Dense(6, use_bias=False)(inputs["dense"])
        return {
            "dense": linen.Dropout(0.0 if train else 0.5, deterministic=False)(dense),
            "scan": scan(name="scan")(0, inputs["stack"])[1],
            "vmap": vmap(6, use_bias=False, name="vmap")(inputs["stack"]),
            "general": linen.DenseGeneral(6, axis=(-2, -1), use_bias=False)(
                inputs["general"]
            ),
            "conv": linen.Conv(5, (2, 2), padding="VALID", use_bias=False)(
                inputs["conv"]
            ),
            "transposed": linen.ConvTranspose(5, (1, 1), use_bias=False)(
                inputs["pixel"]
            ),
        }


STACKS = {
    "dense": ("Dense_0/kernel", lambda y: y),
    "scan": ("scan/Dense_0/kernel", lambda y: y),
    "vmap": ("vmap/kernel", lambda y: y.transpose(1, 0, 2)),
    "general": ("DenseGeneral_0/kernel", lambda y: y.reshape(4, 8, 6)),
    "conv": ("Conv_0/kernel", lambda y: y.reshape(2, 2, 3, 5)),
    "transposed": ("ConvTranspose_0/kernel", lambda y: y.reshape(1, 1, 7, 5)),
}


@pytest.fixture(scope="module")
def linen_layers():
    rng = np.random.default_rng(2)
    inputs = {
        "dense": jnp.eye(32),
        "stack": jnp.stack([jnp.eye(32)] * 3),
        "general": one_hot(4, 8),
        "conv": one_hot(2, 2, 3),
        "pixel": one_hot(1, 1, 7),
    }
    model, qwix_rules = Stacks(), [quantizing("int4")]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = model.init(jax.random.key(0), inputs, True)["params"]
        params = jax.tree.map(
            lambda w: jnp.asarray(hard_weights(rng, w.shape)), dict(params)
        )
        params["vmap"]["kernel"] = jnp.asarray(
            hard_weights(rng, (3, 32, 6)).transpose(1, 0, 2)
        )
        quantized = qwix.quantize_model(model, qwix.QtProvider(qwix_rules))

        @jax.jit
        def step(params, inputs):
            def loss(params):
                rngs = {"dropout": jax.random.key(0)}
                outputs = quantized.apply({"params": params}, inputs, True, rngs=rngs)
                return sum(jnp.sum(y**2) for y in jax.tree.leaves(outputs)), outputs

            gradient, outputs = jax.grad(loss, has_aux=True)(params)
            return jax.tree.map(lambda w, g: w - 0.1 * g, params, gradient), outputs

        outputs = step(params, inputs)[1]
        rules = exact_rules(model, qwix_rules, inputs, train=True)
    return params, rules, outputs


@pytest.mark.parametrize("name", list(STACKS))
def test_layouts_of_linen(name, linen_layers):
    params, rules, outputs = linen_layers
    path, back = STACKS[name]
    weights, quantizer = params, rules.match(path)
    for key in path.split("/"):
        weights = weights[key]
    assert_same_bits(compiled(weights, quantizer), back(outputs[name]))


def test_the_paths_are_those_of_linen_variables(linen_layers):
    params, rules, _ = linen_layers
    paths = sorted(path for path, _ in STACKS.values())
    for tree in (params, {"params": params}):
        assert sorted(rules.quantized(tree)) == paths


def test_shapes_are_enough(linen_layers):
    _, rules, _ = linen_layers
    inputs = {
        "dense": jnp.eye(32),
        "stack": jax.ShapeDtypeStruct((3, 32, 32), jnp.float32),
        "general": one_hot(4, 8),
        "conv": one_hot(2, 2, 3),
        "pixel": one_hot(1, 1, 7),
    }
    assert exact_rules(Stacks(), [quantizing("int4")], inputs, train=False) == rules


class Dotted(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4, name="upx0")(linen.Dense(4, name="up.0")(x))


def test_a_path_is_no_pattern():
    qwix_rules = [quantizing("int4", module_path=r"up\.0")]
    rules = exact_rules(Dotted(), qwix_rules, jnp.ones((1, 4)))
    assert rules.match("up.0/kernel") is not None
    assert rules.match("upx0/kernel") is None


class Own(nnx.Module):
    """A product of one's own."""

    def __init__(self, product, shape=(8, 8), dtype=jnp.float32):
        weights = np.random.default_rng(3).standard_normal(shape)
        self.w = nnx.Param(jnp.asarray(weights, dtype))
        self.product = nnx.static(product)

    def __call__(self, x):
        return self.product(self.w[...], x)


def contracted(w, x):
    return jnp.einsum("bi,io->bo", x, w)


def over_7(**options):
    """Such that no value lies in the middle of two codes."""
    method = "absmax,1.0714286"
    return quantizing("int4", weight_calibration_method=method, **options)


def int4_by_hand(x, size=8):
    """In groups of rows of each column, in float64."""
    groups = np.asarray(x, np.float64).reshape(-1, size, *x.shape[1:])
    scale = np.abs(groups).max(1, keepdims=True) / 7
    return (np.clip(np.round(groups / scale), -8, 7) * scale).reshape(x.shape)


@pytest.mark.parametrize(
    ("product", "shape", "tile"),
    [
        (lambda w, x: jnp.einsum("io,bi->bo", w, x), (8, 6), 8),
        (lambda w, x: contracted(w.reshape(8, 6), x), (2, 4, 6), 8),
        (lambda w, x: contracted(w.reshape(8, 6), x), (2, 4, 6), 2),
        (lambda w, x: contracted(w.reshape(8, 6), x), (4, 2, 6), 4),
        (lambda w, x: contracted(w[:, 0], x), (8, 1, 6), 8),
        (lambda w, x: jnp.einsum("bi,ihd->bhd", x, w.reshape(8, 2, 3)), (8, 6), 8),
        (jax.jit(contracted), (8, 6), 8),
        (lambda w, x: contracted(w, x), (8, 6), 4),
        (
            lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: contracted(w, x), lambda: x),
            (8, 8),
            8,
        ),
        (
            lambda w, x: jax.lax.fori_loop(0, 2, lambda i, x: contracted(w, x), x),
            (8, 8),
            8,
        ),
    ],
)
def test_a_factor_is_followed_back(product, shape, tile):
    model = Own(product, shape)
    qwix_rules = [over_7(tile_size=None if tile == 8 else tile)]
    rules = exact_rules(model, qwix_rules, jnp.ones((3, 8)))
    values = compiled(model.w[...], rules.match("w"))
    expected = int4_by_hand(np.asarray(model.w[...]).reshape(8, -1), tile)
    np.testing.assert_allclose(values, expected.reshape(shape), rtol=1e-5)


def test_a_transposed_factor():
    model = Own(lambda w, x: contracted(w.T, x), (6, 8))
    rules = exact_rules(model, [over_7()], jnp.ones((3, 8)))
    values = compiled(model.w[...], rules.match("w"))
    expected = int4_by_hand(np.asarray(model.w[...]).T).T
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_rows_of_a_stack():
    def product(w, x):
        return contracted(w[1], contracted(w[0], x))

    model = Own(product, (2, 8, 8))
    rules = exact_rules(model, [over_7()], jnp.ones((3, 8)))
    values = compiled(model.w[...], rules.match("w"))
    expected = [int4_by_hand(row) for row in np.asarray(model.w[...])]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


# --- what has no equal ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("product", "text"),
    [
        (lambda w, x: x @ w, "in jnp.matmul, .* Use jnp.einsum"),
        (lambda w, x: jnp.dot(x, w), "in jnp.dot, which jax may have traced before"),
        (lambda w, x: contracted(w * 2, x), "from it by mul, so CAGE .* Use cage_jax"),
        (lambda w, x: contracted(w[:, :4], x), "computed from it by slice"),
        (
            lambda w, x: jnp.einsum("bi,oi->bo", contracted(w, x), w),
            "in several ways, .* axis 0 and .* axis 1, so CAGE leaves it alone. Give",
        ),
        (
            lambda w, x: jax.lax.scan(
                lambda c, _: ((c[0] + x[0], contracted(*c)), 0), (w, x), length=2
            )[0][1],
            None,
        ),
    ],
)
def test_what_is_no_parameter_is_left_alone(product, text):
    model = Own(product)
    if text is None:  # data by the second repetition
        with pytest.raises(ValueError, match="must quantize a weight"):
            bridge.rules(model, [quantizing("int4")], jnp.ones((3, 8)))
        return
    rules, texts = rules_and_warnings(model, [quantizing("int4")], jnp.ones((3, 8)))
    assert rules == cage.Rules([("w", None)])
    (problem,) = [each for each in texts if each.startswith("`w`: ")]
    assert re.search(text, problem)
    assert "CAGE leaves it alone" in problem


def test_sparse_weights_are_left_alone():
    rule = quantizing("int4", additional_qt_config={"sparsity_rule": sparsity_rule()})
    rules, texts = rules_and_warnings(Own(contracted), [rule], jnp.ones((3, 8)))
    assert rules.match("w") is None
    assert re.search("`w`: .* computed from it by .* CAGE leaves it alone", texts[0])


def sparsity_rule():
    return importlib.import_module("qwix._src.core.sparsity").SparsityRule(
        weight_sparsity_n=1, weight_sparsity_m=2
    )


@pytest.mark.parametrize(
    ("options", "dtypes"),
    [
        ({"weight_calibration_method": "minmax"}, ()),
        ({"weight_calibration_method": "fixed,-1,2"}, ()),
        ({"weight_calibration_method": "rms,3"}, ()),
        ({"weight_qtype": "float8_e4m3b11fnuz"}, ()),
        ({}, (jnp.float32, jnp.bfloat16)),
        ({}, (jnp.bfloat16, jnp.float32)),
    ],
)
def test_the_bits_of_unusual_ways(options, dtypes, rng):
    first, last = dtypes or (jnp.float32, jnp.float32)

    def product(w, x):
        return contracted(w.astype(last), x.astype(last))

    model = Own(product, (64, 24), first)
    qwix_rules = [qwix.QtRule(**{"weight_qtype": "int4"} | options)]
    rules = exact_rules(model, qwix_rules, jnp.eye(64))
    model.w[...] = jnp.asarray(rng.standard_normal((64, 24)), first)
    expected, _ = trained(model, qwix_rules, jnp.eye(64), optax.sgd(0.0))
    values = compiled(model.w[...], rules.match("w"))
    assert values.dtype == first
    assert_same_bits(values.astype(last), expected.astype(first).astype(last))
    # In what CAGE computes with, nothing is lost.
    wide = cage.scales.compute_dtype(first)
    grid = jax.jit(fit_grid, static_argnums=1)(model.w[...], rules.match("w"))
    assert_same_bits(grid.offset, expected.astype(wide))


@pytest.mark.parametrize(
    ("qtype", "options", "dtype"),
    [
        ("int4", {}, jnp.bfloat16),
        ("int8", {"tile_size": 16}, jnp.bfloat16),
        ("int4", {"weight_calibration_method": "absmax,1.0714286"}, jnp.bfloat16),
        ("int4", {"weight_calibration_method": "fixed,1.7"}, jnp.bfloat16),
        ("float8_e4m3fn", {}, jnp.bfloat16),
        ("mxfp4", {"tile_size": 32}, jnp.bfloat16),
        ("nvfp4", {"tile_size": 16}, jnp.bfloat16),
        ("nf4", {"tile_size": 32}, jnp.bfloat16),
        ("int4", {"weight_calibration_method": "absmax,1.0714286"}, jnp.float16),
        ("nf4", {"tile_size": 32}, jnp.float16),
    ],
)
def test_narrow_parameters(qtype, options, dtype):
    model = Own(contracted, (64, 24), dtype)
    qwix_rules = [quantizing(qtype, **options)]
    inputs = jnp.eye(64, dtype=dtype)
    rules = exact_rules(model, qwix_rules, inputs)
    expected, _ = trained(model, qwix_rules, inputs, optax.sgd(0.0))
    weights, quantizer = model.w[...], rules.match("w")
    assert_same_bits(compiled(weights, quantizer), expected)


@pytest.mark.parametrize("qtype", ["mxfp4", "mxfp8"])
def test_powers_of_two_survive_a_conversion(qtype):
    def product(w, x):
        return contracted(w.astype(jnp.bfloat16), x.astype(jnp.bfloat16))

    model, qwix_rules = Own(product, (64, 24)), [quantizing(qtype, tile_size=32)]
    rules = exact_rules(model, qwix_rules, jnp.eye(64))
    expected, _ = trained(model, qwix_rules, jnp.eye(64))
    actual = compiled(model.w[...], rules.match("w"))
    assert_same_bits(actual, expected.astype(jnp.float32))


def test_scales_next_to_powers_of_two(rng):
    # qwix's logarithm is one off at some of them; scales are twice as large there.
    powers = np.exp2(np.arange(-40, 24)).astype(np.float32)
    weights = rng.uniform(-1, 1, (32, 3, 64)).astype(np.float32)
    weights[0] = 1
    weights[0, 1], weights[0, 2] = 1 + 2e-7, 1 - 2e-7
    model = Own(contracted, (32, 192))
    model.w[...] = jnp.asarray((6 * weights * powers).reshape(32, 192))
    qwix_rules = [quantizing("mxfp4", tile_size=32)]
    rules = exact_rules(model, qwix_rules, jnp.eye(32))
    expected, _ = trained(model, qwix_rules, jnp.eye(32), optax.sgd(0.0))
    assert_same_bits(compiled(model.w[...], rules.match("w")), expected)
    assert not np.array_equal(
        compiled(model.w[...], cage.mxfp4(rounding="up")), expected
    )


@pytest.mark.parametrize("qtype", ["int4", "nvfp4", "mxfp4", "nf4"])
def test_scales_that_underflow(qtype, rng):
    tile = {"nvfp4": 16, "mxfp4": 32}.get(qtype)
    model = Own(contracted, (32, 6))
    sizes = np.array([1.0, 1e-2, 1e-3, 1e-5, 1e-22, 0.0])
    weights = sizes * rng.uniform(-1, 1, (32, 6))
    weights[3] = 0
    model.w[...] = jnp.asarray(weights, jnp.float32)
    qwix_rules = [quantizing(qtype, tile_size=tile)]
    rules = exact_rules(model, qwix_rules, jnp.eye(32))
    expected, _ = trained(model, qwix_rules, jnp.eye(32), optax.sgd(0.0))
    assert_same_bits(compiled(model.w[...], rules.match("w")), expected)


# --- what is said of qwix -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, {"original", "idempotent"}),
        ({"additional_qt_config": EXACT}, {"idempotent"}),
        ({"tile_size": 4}, {"tiles", "idempotent"}),
        ({"weight_calibration_method": "absmax,1.0714286"}, {"original"}),
        ({"weight_calibration_method": "absmax,1.05"}, {"original", "idempotent"}),
        ({"weight_qtype": "mxfp4", "tile_size": 32}, {"tiles"}),
        ({"weight_qtype": "nf4", "additional_qt_config": EXACT}, set()),
        ({"bwd_qtype": "int8"}, {"idempotent"}),
    ],
)
def test_warnings_of_qwix_defaults(options, said):
    options = {"weight_qtype": "int4"} | options
    _, texts = rules_and_warnings(
        Own(contracted, (32, 8)), [qwix.QtRule(**options)], jnp.ones((3, 32))
    )
    parts = {
        "original": "use_original_residuals': False}",
        "tiles": "as always for tiles and MX types: `w`",
        "idempotent": "not idempotent, so a long pull moves their grids: `w`",
    }
    found = {name for name, part in parts.items() if any(part in t for t in texts)}
    assert found == said
    assert len(texts) == len(said)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.stack = nnx.Param(jnp.ones((2, 8)))  # a bias for each layer
        self.up = nnx.Linear(8, 8, rngs=rngs)
        self.out = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, tokens):
        x = self.norm(self.embed(tokens)) + self.stack[0]
        x = self.out(self.up(x) + jax.lax.dot(x, self.up.kernel[...]))
        return self.embed.attend(x)


def test_warnings_of_what_qwix_does_not_see():
    options = {"additional_qt_config": EXACT, "module_path": "up|out|embed"}
    qwix_rules = [quantizing("nf4", **options)]
    rules, texts = rules_and_warnings(
        Tied(nnx.Rngs(0)), qwix_rules, jnp.zeros(3, jnp.int32)
    )
    assert [rule.pattern for rule in rules] == ["out/kernel", "up/kernel"]
    (unseen,) = texts
    assert "quantizes no product of them: `embed/embedding`. It does not see" in unseen


def test_many_paths_are_cut_short():
    model = nnx.Sequential(*[nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(8)])
    _, texts = rules_and_warnings(model, [quantizing("int4")], jnp.ones((1, 4)))
    assert all("`layers/5/kernel` and 2 more" in text for text in texts)


# --- training -------------------------------------------------------------------------


def test_cage_pulls_to_the_grid_that_qwix_has(rng):
    model = nnx.Linear(32, 8, use_bias=False, rngs=nnx.Rngs(0))
    qwix_rules = [
        quantizing(
            "int4",
            weight_calibration_method="absmax,1.0714286",
            additional_qt_config=EXACT,
        )
    ]
    x = jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)
    y = jnp.asarray(rng.standard_normal((64, 8)), jnp.float32)
    rules = bridge.rules(model, qwix_rules, x)

    def distance(strength):
        tx = optax.chain(cage.cage(rules, strength), optax.sgd(0.05))
        quantized = qwix.quantize_model(model, qwix.QtProvider(qwix_rules), x)
        optimizer = nnx.Optimizer(quantized, tx, wrt=nnx.Param)

        @nnx.jit
        def step(quantized, optimizer):
            def loss(model):
                return 0.01 * jnp.mean((model(x) - y) ** 2)

            gradient = nnx.grad(loss)(quantized)
            optimizer.update(quantized, gradient)

        for _ in range(300):
            step(quantized, optimizer)
        kernel = quantized.kernel[...]
        on_grid = nnx.jit(lambda model: model(jnp.eye(32)))(quantized)
        return float(jnp.linalg.norm(kernel - on_grid) / jnp.linalg.norm(kernel))

    free, pulled = distance(0.0), distance(1.0)
    assert free > 0.05
    assert pulled < 0.1 * free


# --- nothing is left behind -----------------------------------------------------------


def test_the_trace_is_not_seen_elsewhere(rng):
    # jax keeps the trace of jnp.matmul: with qwix at work, and with our marks.
    model = Own(lambda w, x: x @ w, (11, 13))
    x = jnp.asarray(rng.standard_normal((7, 11)), jnp.float32)
    rules_and_warnings(model, [quantizing("int4")], x)
    expected = np.asarray(x, np.float64) @ np.asarray(model.w[...], np.float64)
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(nnx.jit(model)(x), expected, rtol=1e-4, atol=1e-3)
    model, x = Own(contracted, (11, 13)), jnp.asarray(x)
    quantized = qwix.quantize_model(model, qwix.QtProvider([quantizing("int4")]), x)
    assert "qwix_quantized" not in str(jax.make_jaxpr(lambda x: quantized(x))(x))


def test_the_model_stays_as_it_was():
    model = nnx.Sequential(
        nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    )
    before = jax.tree.leaves(nnx.state(model))
    bridge_rules = rules_and_warnings(model, [quantizing("nf4")], jnp.ones((3, 4)))[0]
    assert bridge_rules.match("layers/0/kernel") is not None
    for one, other in zip(before, jax.tree.leaves(nnx.state(model))):
        assert one is other
    assert not hasattr(model, "qwix_path")


# --- errors ---------------------------------------------------------------------------


def test_bad_arguments():
    model, good, x = Own(contracted), [quantizing("int4")], jnp.ones((1, 8))
    with pytest.raises(TypeError, match=r"`model` must be an NNX or a Linen .* dict"):
        bridge.rules({}, good, x)
    for bad in (qwix.QtProvider(good), good[0], ["int4"], None):
        with pytest.raises(TypeError, match=r"`qwix_rules` must be a list .* Use"):
            bridge.rules(model, bad, x)
    with pytest.raises(ValueError, match="`inputs` must be those of the model"):
        bridge.rules(model, good)
    nothing = [quantizing("int4", module_path="layer")]
    with pytest.raises(ValueError, match=r"got module_path=\['layer'\], .*\['w'\]"):
        bridge.rules(model, nothing, x)


@pytest.mark.parametrize("found", ["0.1.9", None])
def test_another_version_is_refused(found, monkeypatch):
    def version(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delitem(sys.modules, "cage_jax.qwix")
    with pytest.raises(ImportError, match=f"needs qwix 0.1.8.* got {found or 'none'}"):
        importlib.import_module("cage_jax.qwix")


def test_a_quantizer_is_a_value():
    first, second = (
        exact_rules(Own(contracted), [quantizing("int4")], jnp.ones((1, 8)))
        for _ in range(2)
    )
    assert first == second
    assert hash(first) == hash(second)
    assert str(first.match("w")) == (
        "int4 by qwix, absmax, a scale for each index of axis 1"
    )


def test_what_has_no_codes_says_so():
    model = Own(contracted, (64, 24))
    rules = exact_rules(model, [quantizing("int4")], jnp.ones((1, 64)))
    params = {"w": model.w[...]}
    with pytest.raises(TypeError, match=r"`w`: .* codes of its own; got one of qwix's"):
        cage.quantize(params, rules)
    with pytest.raises(ValueError, match="`w`: `freeze_scale` must be False"):
        cage.cage(rules, 1.0, freeze_scale=True).init(params)
    with pytest.raises(ValueError, match=r"`w`: `statistics` must be False .* by qwix"):
        cage.cage(rules, 1.0, statistics=True).init(params)


def test_its_size_is_that_of_the_codes_and_scales():
    model = Own(contracted, (64, 24))
    tiled = quantizing("int4", tile_size=16)
    rules = exact_rules(model, [tiled], jnp.ones((1, 64)))
    row = rules.report({"w": model.w[...]}).rows[0]
    assert row.quantized_bits == 64 * 24 * 4 + 4 * 24 * 32


def test_the_report_of_a_model(rng):
    model = Own(lambda w, x: contracted(w.reshape(64, 24), x), (8, 8, 24))
    params = {"w": jnp.asarray(rng.standard_normal((8, 8, 24)), jnp.float32)}
    rules = exact_rules(model, [over_7()], jnp.ones((1, 64)))

    def apply(params, x):
        return x @ params["w"].reshape(64, 24)

    (layer,) = report(apply, rules, params, jnp.ones((2, 64))).layers
    weights = np.asarray(params["w"]).reshape(64, 24)
    error = np.linalg.norm(weights - int4_by_hand(weights, 64))
    error /= np.linalg.norm(weights)
    assert layer.measured.error == pytest.approx(error, rel=1e-4)
