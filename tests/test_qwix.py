"""Rules taken from qwix, against the weights of qwix's own compiled training step.

A product with an identity matrix shows what qwix makes of a weight: each output is one
of its values, plus zeros.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import re
import sys
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_raises

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
    """Allows implicit promotion, which qwix and flax make use of."""
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
    """A rule of qwix's for weights."""
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
    return np.eye(int(np.prod(shape)), dtype=np.float32).reshape(-1, *shape)


class Own(nnx.Module):
    """A product of one's own."""

    def __init__(self, product, shape=(8, 8), dtype="float32", values=None):
        if values is None:
            values = np.random.default_rng(3).standard_normal(shape)
            values = values.astype(np.float32).astype(jnp.dtype(dtype))
        self.w = nnx.Param(jax.device_put(values))
        self.product = nnx.static(product)

    def __call__(self, x):
        return self.product(self.w[...], x)


def contracted(w, x):
    return jnp.einsum("bi,io->bo", x, w)


@functools.cache
def converted(dtype):
    """A product in a dtype."""
    return lambda w, x: contracted(w.astype(dtype), x.astype(dtype))


def over_7(**options):
    """Such that no value lies in the middle of two codes."""
    method = "absmax,1.0714286"
    return quantizing("int4", weight_calibration_method=method, **options)


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
    "int4 over 7": over_7(),
    "int4 over 7 tile": over_7(tile_size=32),
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
# Rules of products of one's own, with the dtypes of the parameter and of the product.
UNUSUAL = {
    "minmax": (
        quantizing("int4", weight_calibration_method="minmax"),
        "float32",
        "float32",
    ),
    "fixed ends": (
        quantizing("int4", weight_calibration_method="fixed,-1,2"),
        "float32",
        "float32",
    ),
    "rms": (
        quantizing("int4", weight_calibration_method="rms,3"),
        "float32",
        "float32",
    ),
    "fnuz": (quantizing("float8_e4m3b11fnuz"), "float32", "float32"),
    "to narrow": (quantizing("int4"), "float32", "bfloat16"),
    "to wide": (quantizing("int4"), "bfloat16", "float32"),
}
NARROW = {
    "int4": (quantizing("int4"), "bfloat16"),
    "int8 tile 16": (quantizing("int8", tile_size=16), "bfloat16"),
    "int4 over 7": (over_7(), "bfloat16"),
    "int4 fixed": (
        quantizing("int4", weight_calibration_method="fixed,1.7"),
        "bfloat16",
    ),
    "fp8": (quantizing("float8_e4m3fn"), "bfloat16"),
    "mxfp4": (quantizing("mxfp4", tile_size=32), "bfloat16"),
    "nvfp4": (quantizing("nvfp4", tile_size=16), "bfloat16"),
    "nf4": (quantizing("nf4", tile_size=32), "bfloat16"),
    "int4 over 7 in float16": (over_7(), "float16"),
    "nf4 in float16": (quantizing("nf4", tile_size=32), "float16"),
}
CONVERTED = {name: quantizing(name, tile_size=32) for name in ("mxfp4", "mxfp8")}
UNDERFLOW = {"int4": None, "nvfp4": 16, "mxfp4": 32, "nf4": None}

# Inputs that show the weight of a layout, and how an output becomes that weight.
IDENTITIES = {
    "einsum": (one_hot(32), lambda y: y),
    "turned": (one_hot(32), lambda y: y.T),
    "general": (one_hot(4, 8), lambda y: y.reshape(4, 8, 6)),
    "conv": (one_hot(2, 2, 3), lambda y: y.reshape(2, 2, 3, 5)),
}


class Layers(nnx.Module):
    """Each layer has an input and an output of its own."""

    def __init__(self, layers):
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.names = nnx.static(tuple(layers))

    def __call__(self, inputs):
        return {name: getattr(self, name)(inputs[name]) for name in self.names}


class Case(NamedTuple):
    """A layer, the rule of qwix's for it, and inputs that show its weight."""

    layer: nnx.Module
    rule: qwix.QtRule
    inputs: np.ndarray

    @property
    def param(self):
        """The name of its weight."""
        return "w" if isinstance(self.layer, Own) else "kernel"

    @property
    def weights(self):
        """Its weight."""
        return getattr(self.layer, self.param)[...]


def without_values(make):
    """A module without arrays, for which initializers would have to be compiled."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def cases():
    """A layer for each name, by the table that it is of."""
    rng, found = np.random.default_rng(0), {}
    for name, rule in KINDS.items():
        layer = without_values(
            lambda rngs: nnx.Linear(64, 24, use_bias=False, rngs=rngs)
        )
        tile = {None: 64, 0.25: 16, 1: 64}.get(rule.tile_size, rule.tile_size)
        weights = hard_weights(rng, (64, 24), rule.weight_qtype, tile)
        nnx.update(layer, {"kernel": jax.device_put(weights)})
        found["kind", name] = Case(layer, rule, np.eye(64, dtype=np.float32))
    for name, (rule, first, last) in UNUSUAL.items():
        layer = Own(converted(last), (64, 24), first)
        found["unusual", name] = Case(layer, rule, np.eye(64, dtype=np.float32))
    for name, (rule, dtype) in NARROW.items():
        inputs = np.eye(64, dtype=jnp.dtype(dtype))
        found["narrow", name] = Case(Own(contracted, (64, 24), dtype), rule, inputs)
    for name, rule in CONVERTED.items():
        layer = Own(converted("bfloat16"), (64, 24))
        found["converted", name] = Case(layer, rule, np.eye(64, dtype=np.float32))
    eye = np.eye(32, dtype=np.float32)
    # qwix's logarithm is one off at some of them; scales are twice as large there.
    powers = np.exp2(np.arange(-40, 24)).astype(np.float32)
    weights = rng.uniform(-1, 1, (32, 3, 64)).astype(np.float32)
    weights[0] = 1
    weights[0, 1], weights[0, 2] = 1 + 2e-7, 1 - 2e-7
    layer = Own(contracted, values=(6 * weights * powers).reshape(32, 192))
    found["powers", "mxfp4"] = Case(layer, CONVERTED["mxfp4"], eye)
    for name, tile in UNDERFLOW.items():
        sizes = np.array([1.0, 1e-2, 1e-3, 1e-5, 1e-22, 0.0])
        weights = sizes * rng.uniform(-1, 1, (32, 6))
        weights[3] = 0
        layer = Own(contracted, values=weights.astype(np.float32))
        found["underflow", name] = Case(layer, quantizing(name, tile_size=tile), eye)
    for name, layer in nnx_layouts().items():
        shape, turned = layer.kernel.shape, name == "turned"
        if name == "einsum":
            weights = hard_weights(rng, (32, 32)).reshape(shape)
        else:
            weights = hard_weights(rng, shape[::-1] if turned else shape)
        weights = weights.T if turned else weights
        nnx.update(layer, {"kernel": jax.device_put(weights)})
        rule = quantizing("int4", additional_qt_config=EXACT)
        found["layout", name] = Case(layer, rule, IDENTITIES[name][0])
    return found


def nnx_layouts():
    layouts = {
        "einsum": lambda rngs: nnx.Einsum("bd,dhk->bhk", (32, 4, 8), rngs=rngs),
        "turned": lambda rngs: nnx.Einsum("bi,oi->bo", (24, 32), rngs=rngs),
        "general": lambda rngs: nnx.LinearGeneral(
            (4, 8), 6, axis=(-2, -1), use_bias=False, rngs=rngs
        ),
        "conv": lambda rngs: nnx.Conv(
            3, 5, (2, 2), padding="VALID", use_bias=False, rngs=rngs
        ),
    }
    return {name: without_values(make) for name, make in layouts.items()}


def quantized_by_qwix(model, qwix_rules, inputs):
    """What `qwix.quantize_model` makes of a model, which it calls without computing."""
    quantized = nnx.eval_shape(
        lambda model: qwix.quantize_model(model, qwix.QtProvider(qwix_rules), inputs),
        model,
    )
    nnx.update(quantized, nnx.state(model))
    return quantized


class Step(NamedTuple):
    """What the layers are in qwix's training step, and what CAGE makes of them.

    Attributes:
      model: with all layers, as it was before the step.
      rules: of CAGE.
      paths: of the weight of each case.
      outputs: of qwix's step, for each case.
      values: of CAGE, likewise.
      errors: likewise.
      offsets: of the grids of CAGE, likewise.
    """

    model: nnx.Module
    rules: cage.Rules
    paths: dict
    outputs: dict
    values: dict
    errors: dict
    offsets: dict


@pytest.fixture(scope="module")
def step():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        table = cases()
        names = {case: f"layer{i}" for i, case in enumerate(table)}
        model = Layers({names[case]: each.layer for case, each in table.items()})
        inputs = {names[case]: each.inputs for case, each in table.items()}
        qwix_rules = [
            dataclasses.replace(each.rule, module_path=names[case])
            for case, each in table.items()
        ]
        # Which of them are idempotent is asked elsewhere, and takes long to find.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bridge, "_stays", lambda how: True)
            rules = exact_rules(model, qwix_rules, inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            quantized = quantized_by_qwix(model, qwix_rules, inputs)
            outputs = trained(quantized, inputs)
    paths = {case: f"{at}/{table[case].param}" for case, at in names.items()}
    weights = {case: each.weights for case, each in table.items()}

    @jax.jit
    def of_cage(weights):
        found = {}
        for case, x in weights.items():
            quantizer = rules.match(paths[case])
            offset = fit_grid(x, quantizer).offset
            error = cage.quantization_error(x, quantizer)
            found[case] = cage.fake_quant(x, quantizer), error, offset
        return found

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = of_cage(weights)
    values, errors, offsets = (
        {case: parts[i] for case, parts in found.items()} for i in range(3)
    )
    outputs = {case: np.asarray(outputs[at]) for case, at in names.items()}
    return Step(model, rules, paths, outputs, values, errors, offsets)


def trained(quantized, inputs):
    """The outputs in the middle of a step of training."""
    optimizer = nnx.Optimizer(quantized, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, inputs):
        def loss(model):
            outputs = model(inputs)
            total = sum(jnp.sum(jnp.sin(y) ** 2) for y in jax.tree.leaves(outputs))
            return total.astype(jnp.float32), outputs

        (_, outputs), gradient = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, gradient)
        return outputs

    return step(quantized, optimizer, inputs)


def weights_of(step, case):
    """The weight of a layer, as it was."""
    layer, param = step.paths[case].split("/")
    return np.asarray(getattr(getattr(step.model, layer), param)[...])


@pytest.mark.parametrize("name", KINDS)
def test_the_bits_of_a_training_step(name, step):
    case = "kind", name
    expected = step.outputs[case]
    assert_same_bits(step.values[case], expected)
    assert_same_bits(step.errors[case], weights_of(step, case) - expected)


def test_the_bits_of_unusual_ways(step):
    for name, (_, first, last) in UNUSUAL.items():
        case = "unusual", name
        values, expected = np.asarray(step.values[case]), step.outputs[case]
        assert values.dtype == jnp.dtype(first)
        last = jnp.dtype(last)
        assert_same_bits(values.astype(last), expected.astype(first).astype(last))
        # In what CAGE computes with, nothing is lost.
        wide = cage.scales.compute_dtype(jnp.dtype(first))
        assert_same_bits(step.offsets[case], expected.astype(wide))


def test_narrow_parameters(step):
    for name in NARROW:
        case = "narrow", name
        assert_same_bits(step.values[case], step.outputs[case])


def test_powers_of_two_survive_a_conversion(step):
    for name in CONVERTED:
        case = "converted", name
        assert_same_bits(step.values[case], step.outputs[case].astype(np.float32))


def test_scales_next_to_powers_of_two(step):
    case = "powers", "mxfp4"
    assert_same_bits(step.values[case], step.outputs[case])
    rounded_up = compiled(weights_of(step, case), cage.mxfp4(rounding="up"))
    assert not np.array_equal(rounded_up, step.outputs[case])


def test_scales_that_underflow(step):
    for name in UNDERFLOW:
        case = "underflow", name
        assert_same_bits(step.values[case], step.outputs[case])


def test_layouts_of_nnx(step):
    for name, (_, back) in IDENTITIES.items():
        case = "layout", name
        assert_same_bits(step.values[case], back(step.outputs[case]))


def test_the_paths_are_those_of_the_optimizer(step):
    paths = sorted(step.paths.values())
    state = nnx.state(step.model, nnx.Param)
    for tree in (state, {"params": nnx.to_pure_dict(state)}):
        assert sorted(step.rules.quantized(tree)) == paths


# --- layers of Linen ------------------------------------------------------------------


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


LINEN_INPUTS = {
    "dense": np.eye(32, dtype=np.float32),
    "stack": np.stack([np.eye(32, dtype=np.float32)] * 3),
    "general": one_hot(4, 8),
    "conv": one_hot(2, 2, 3),
    "pixel": one_hot(1, 1, 7),
}


@pytest.fixture(scope="module")
def linen_layers():
    rng, key = np.random.default_rng(2), jax.random.key(0)
    model, qwix_rules = Stacks(), [quantizing("int4")]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        init = functools.partial(model.init, train=True)
        params = dict(jax.eval_shape(init, key, LINEN_INPUTS)["params"])
        params = jax.tree.map(lambda w: hard_weights(rng, w.shape), params)
        stack = hard_weights(rng, (3, 32, 6))
        params["vmap"]["kernel"] = stack.transpose(1, 0, 2)
        quantized = qwix.quantize_model(model, qwix.QtProvider(qwix_rules))

        @jax.jit
        def step(params, inputs):
            def loss(params):
                outputs = quantized.apply(
                    {"params": params}, inputs, True, rngs={"dropout": key}
                )
                return sum(jnp.sum(y**2) for y in jax.tree.leaves(outputs)), outputs

            gradient, outputs = jax.grad(loss, has_aux=True)(params)
            return jax.tree.map(lambda w, g: w - 0.1 * g, params, gradient), outputs

        outputs = step(params, LINEN_INPUTS)[1]
        rules = exact_rules(model, qwix_rules, LINEN_INPUTS, train=True)
    return params, rules, outputs


def test_layouts_of_linen(linen_layers):
    params, rules, outputs = linen_layers
    values = jax.jit(lambda params: cage.fake_quant(params, rules))(params)
    for name, (path, back) in STACKS.items():
        found = values
        for key in path.split("/"):
            found = found[key]
        assert_same_bits(found, back(np.asarray(outputs[name])))


def test_the_paths_are_those_of_linen_variables(linen_layers):
    params, rules, _ = linen_layers
    paths = sorted(path for path, _ in STACKS.values())
    for tree in (params, {"params": params}):
        assert sorted(rules.quantized(tree)) == paths


def test_shapes_are_enough(linen_layers):
    _, rules, _ = linen_layers
    inputs = LINEN_INPUTS | {"stack": jax.ShapeDtypeStruct((3, 32, 32), jnp.float32)}
    assert exact_rules(Stacks(), [quantizing("int4")], inputs, train=False) == rules


class Dotted(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4, name="upx0")(linen.Dense(4, name="up.0")(x))


def test_a_path_is_no_pattern():
    qwix_rules = [quantizing("int4", module_path=r"up\.0")]
    rules = exact_rules(Dotted(), qwix_rules, np.ones((1, 4), np.float32))
    assert rules.match("up.0/kernel") is not None
    assert rules.match("upx0/kernel") is None


# --- from a factor back to its parameter ----------------------------------------------


def int4_by_hand(x, size=8):
    """In groups of rows of each column, in float64."""
    groups = np.asarray(x, np.float64).reshape(-1, size, *x.shape[1:])
    scale = np.abs(groups).max(1, keepdims=True) / 7
    return (np.clip(np.round(groups / scale), -8, 7) * scale).reshape(x.shape)


def in_a_branch(w, x):
    return jax.lax.cond(x[0, 0] > 0, lambda: contracted(w, x), lambda: x)


def in_a_loop(w, x):
    return jax.lax.fori_loop(0, 2, lambda i, x: contracted(w, x), x)


# A product, the shape of its parameter, and the tile of a contracted axis of 8.
FACTORS = {
    "weight first": (lambda w, x: jnp.einsum("io,bi->bo", w, x), (8, 6), 8),
    "reshape": (lambda w, x: contracted(w.reshape(8, 6), x), (2, 4, 6), 8),
    "tiles of 2": (lambda w, x: contracted(w.reshape(8, 6), x), (2, 4, 6), 2),
    "tiles of 4": (lambda w, x: contracted(w.reshape(8, 6), x), (4, 2, 6), 4),
    "squeeze": (lambda w, x: contracted(w[:, 0], x), (8, 1, 6), 8),
    "heads": (
        lambda w, x: jnp.einsum("bi,ihd->bhd", x, w.reshape(8, 2, 3)),
        (8, 6),
        8,
    ),
    "jit": (jax.jit(contracted), (8, 6), 8),
    "tiles": (contracted, (8, 6), 4),
    "cond": (in_a_branch, (8, 8), 8),
    "loop": (in_a_loop, (8, 8), 8),
    "transpose": (lambda w, x: contracted(w.T, x), (6, 8), 8),
    "rows": (lambda w, x: contracted(w[1], contracted(w[0], x)), (2, 8, 8), 8),
}


def test_a_factor_is_followed_back():
    x, quantizers, weights = np.ones((3, 8), np.float32), {}, {}
    for name, (product, shape, tile) in FACTORS.items():
        model = Own(product, shape)
        rule = over_7(tile_size=None if tile == 8 else tile)
        quantizers[name] = exact_rules(model, [rule], x).match("w")
        weights[name] = np.asarray(model.w[...])
    values = jax.jit(
        lambda weights: {
            n: cage.fake_quant(weights[n], q) for n, q in quantizers.items()
        }
    )(weights)
    for name, (_, shape, tile) in FACTORS.items():
        w = weights[name]
        if name == "transpose":
            expected = int4_by_hand(w.T).T
        elif name == "rows":
            expected = np.stack([int4_by_hand(row) for row in w])
        else:
            expected = int4_by_hand(w.reshape(8, -1), tile).reshape(shape)
        np.testing.assert_allclose(values[name], expected, rtol=1e-5, err_msg=name)


# --- what has no equal ----------------------------------------------------------------


def both_ways(w, x):
    return jnp.einsum("bi,oi->bo", contracted(w, x), w)


def carried(w, x):
    """Data by the second repetition."""

    def repeated(carry, _):
        return (carry[0] + x[0], contracted(*carry)), 0

    return jax.lax.scan(repeated, (w, x), length=2)[0][1]


def test_what_is_no_parameter_is_left_alone():
    x, qwix_rules = np.ones((3, 8), np.float32), [quantizing("int4")]
    for product, text in (
        (lambda w, x: x @ w, "in jnp.matmul, .* Use jnp.einsum"),
        (lambda w, x: jnp.dot(x, w), "in jnp.dot, which jax may have traced before"),
        (lambda w, x: contracted(w * 2, x), "from it by mul, so CAGE .* Use cage_jax"),
        (lambda w, x: contracted(w[:, :4], x), "computed from it by slice"),
        (
            both_ways,
            "in several ways, .* axis 0 and .* axis 1, so CAGE leaves it alone. Give",
        ),
    ):
        rules, texts = rules_and_warnings(Own(product), qwix_rules, x)
        assert rules == cage.Rules([("w", None)]), text
        (problem,) = [each for each in texts if each.startswith("`w`: ")]
        assert re.search(text, problem)
        assert "CAGE leaves it alone" in problem
    with pytest.raises(ValueError, match="must quantize a weight"):
        bridge.rules(Own(carried), qwix_rules, x)


def test_sparse_weights_are_left_alone():
    sparsity = importlib.import_module("qwix._src.core.sparsity").SparsityRule(
        weight_sparsity_n=1, weight_sparsity_m=2
    )
    rule = quantizing("int4", additional_qt_config={"sparsity_rule": sparsity})
    x = np.ones((3, 8), np.float32)
    rules, texts = rules_and_warnings(Own(contracted), [rule], x)
    assert rules.match("w") is None
    assert re.search("`w`: .* computed from it by .* CAGE leaves it alone", texts[0])


# --- what is said of qwix -------------------------------------------------------------


def test_warnings_of_qwix_defaults():
    parts = {
        "original": "use_original_residuals': False}",
        "tiles": "as always for tiles and MX types: `w`",
        "idempotent": "not idempotent, so a long pull moves their grids: `w`",
    }
    by = "weight_calibration_method"
    for options, said in (
        ({}, {"original", "idempotent"}),
        ({"additional_qt_config": EXACT}, {"idempotent"}),
        ({"tile_size": 4}, {"tiles", "idempotent"}),
        ({"tile_size": 0.25}, {"tiles", "idempotent"}),
        ({by: "absmax,1.0714286"}, {"original"}),
        ({by: "absmax,1.05"}, {"original", "idempotent"}),
        ({by: "fixed,-1.7,1.7", "additional_qt_config": EXACT}, set()),
        ({"weight_qtype": "mxfp4", "tile_size": 32}, {"tiles"}),
        ({"weight_qtype": "nf4", "additional_qt_config": EXACT}, set()),
        ({"bwd_qtype": "int8"}, {"idempotent"}),
    ):
        rule = qwix.QtRule(**{"weight_qtype": "int4"} | options)
        x = np.ones((3, 32), np.float32)
        _, texts = rules_and_warnings(Own(contracted, (32, 8)), [rule], x)
        found = {name for name, part in parts.items() if any(part in t for t in texts)}
        assert found == said, options
        assert len(texts) == len(said), options


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
    tokens = np.zeros(3, np.int32)
    rules, texts = rules_and_warnings(without_values(Tied), qwix_rules, tokens)
    assert [rule.pattern for rule in rules] == ["out/kernel", "up/kernel"]
    (unseen,) = texts
    assert "quantizes no product of them: `embed/embedding`. It does not see" in unseen


def test_many_paths_are_cut_short():
    model = without_values(
        lambda rngs: nnx.Sequential(*[nnx.Linear(4, 4, rngs=rngs) for _ in range(8)])
    )
    x = np.ones((1, 4), np.float32)
    _, texts = rules_and_warnings(model, [quantizing("int4")], x)
    assert all("`layers/5/kernel` and 2 more" in text for text in texts)


# --- training -------------------------------------------------------------------------


def test_cage_pulls_to_the_grid_that_qwix_has(rng):
    model = without_values(lambda rngs: nnx.Linear(32, 8, use_bias=False, rngs=rngs))
    x, y, kernel = (
        jax.device_put(rng.standard_normal(shape).astype(np.float32))
        for shape in ((64, 32), (64, 8), (32, 8))
    )
    nnx.update(model, {"kernel": kernel / np.float32(np.sqrt(32))})
    qwix_rules = [over_7(additional_qt_config=EXACT)]
    rules = bridge.rules(model, qwix_rules, x)

    def distance(strength):
        tx = optax.chain(cage.cage(rules, strength), optax.sgd(0.05))
        quantized = quantized_by_qwix(model, qwix_rules, x)
        optimizer = nnx.Optimizer(quantized, tx, wrt=nnx.Param)

        @nnx.jit
        def step(quantized, optimizer):
            def loss(model):
                return 0.01 * jnp.mean((model(x) - y) ** 2)

            before = quantized.kernel[...], quantized(jnp.eye(32))
            gradient = nnx.grad(loss)(quantized)
            optimizer.update(quantized, gradient)
            return before

        for _ in range(301):
            kernel, on_grid = map(np.asarray, step(quantized, optimizer))
        return np.linalg.norm(kernel - on_grid) / np.linalg.norm(kernel)

    free, pulled = distance(0.0), distance(1.0)
    assert free > 0.05
    assert pulled < 0.1 * free


# --- nothing is left behind -----------------------------------------------------------


def test_the_trace_is_not_seen_elsewhere(rng):
    # jax keeps the trace of jnp.matmul: with qwix at work, and with our marks.
    model = Own(lambda w, x: x @ w, (11, 13))
    x, qwix_rules = (
        rng.standard_normal((7, 11)).astype(np.float32),
        [quantizing("int4")],
    )
    rules_and_warnings(model, qwix_rules, x)
    expected = np.asarray(x, np.float64) @ np.asarray(model.w[...], np.float64)
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(nnx.jit(model)(x), expected, rtol=1e-4, atol=1e-3)
    quantized = quantized_by_qwix(Own(contracted, (11, 13)), qwix_rules, x)
    assert "qwix_quantized" not in str(jax.make_jaxpr(lambda x: quantized(x))(x))


def test_the_model_stays_as_it_was():
    model = without_values(
        lambda rngs: nnx.Sequential(
            nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        )
    )
    ones = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), nnx.state(model))
    nnx.update(model, ones)
    before = jax.tree.leaves(nnx.state(model))
    x = np.ones((3, 4), np.float32)
    bridge_rules = rules_and_warnings(model, [quantizing("nf4")], x)[0]
    assert bridge_rules.match("layers/0/kernel") is not None
    for one, other in zip(before, jax.tree.leaves(nnx.state(model))):
        assert one is other
    assert not hasattr(model, "qwix_path")


# --- errors ---------------------------------------------------------------------------


def test_bad_arguments():
    model, good = Own(contracted), [quantizing("int4")]
    x, nothing = np.ones((1, 8), np.float32), [quantizing("int4", module_path="layer")]
    wrong = (qwix.QtProvider(good), good[0], ["int4"], None)
    table = [
        (
            lambda: bridge.rules({}, good, x),
            TypeError,
            r"`model` must be an NNX or a Linen .* dict",
        ),
        *(
            (
                functools.partial(bridge.rules, model, each, x),
                TypeError,
                r"`qwix_rules` must be a list .* Use",
            )
            for each in wrong
        ),
        (
            lambda: bridge.rules(model, good),
            ValueError,
            "`inputs` must be those of the model",
        ),
        (
            lambda: bridge.rules(model, nothing, x),
            ValueError,
            r"got module_path=\['layer'\], .*\['w'\]",
        ),
    ]
    assert_raises(table)


def test_another_version_is_refused(monkeypatch):
    for found in ("0.1.9", None):

        def version(name, found=found):
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.delitem(sys.modules, "cage_jax.qwix", raising=False)
        text = f"needs qwix 0.1.8.* got {found or 'none'}"
        with pytest.raises(ImportError, match=text):
            importlib.import_module("cage_jax.qwix")


def test_a_quantizer_is_a_value():
    first, second = (
        exact_rules(Own(contracted), [quantizing("int4")], np.ones((1, 8), np.float32))
        for _ in range(2)
    )
    assert first == second
    assert hash(first) == hash(second)
    assert str(first.match("w")) == (
        "int4 by qwix, absmax, a scale for each index of axis 1"
    )


def test_what_has_no_codes_says_so():
    model = Own(contracted, (64, 24))
    rules = exact_rules(model, [quantizing("int4")], np.ones((1, 64), np.float32))
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
    rules = exact_rules(model, [tiled], np.ones((1, 64), np.float32))
    row = rules.report({"w": model.w[...]}).rows[0]
    assert row.quantized_bits == 64 * 24 * 4 + 4 * 24 * 32


def test_the_report_of_a_model(rng):
    model = Own(lambda w, x: contracted(w.reshape(64, 24), x), (8, 8, 24))
    params = {"w": rng.standard_normal((8, 8, 24)).astype(np.float32)}
    rules = exact_rules(model, [over_7()], np.ones((1, 64), np.float32))

    def apply(params, x):
        return x @ params["w"].reshape(64, 24)

    (layer,) = report(apply, rules, params, np.ones((2, 64), np.float32)).layers
    weights = np.asarray(params["w"]).reshape(64, 24)
    error = np.linalg.norm(weights - int4_by_hand(weights, 64))
    error /= np.linalg.norm(weights)
    assert layer.measured.error == pytest.approx(error, rel=1e-4)
