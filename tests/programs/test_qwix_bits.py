"""The bits of weights in qwix's own compiled training step.

A product with an identity matrix shows what qwix makes of a weight: each output is one
of its values, plus zeros.
"""

import dataclasses
import functools
import importlib
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from qwix_models import (
    EXACT,
    Own,
    contracted,
    exact_rules,
    implicit_promotion,
    nnx,
    one_hot,
    over_7,
    quantized_by_qwix,
    quantizing,
    qwix,
    without_values,
)

import cage_jax as cage
from cage_jax.arrays.exact import compute_dtype
from cage_jax.quantizers.rounding import fit_grid
from cage_jax.qwix import quantizer as qwix_quantizer

linen = pytest.importorskip("flax.linen")

# What qwix itself calls of flax.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def as_qwix_needs_it():
    """Allows implicit promotion in each test."""
    with implicit_promotion():
        yield


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


@functools.cache
def converted(dtype):
    """A product in a dtype."""
    return lambda w, x: contracted(w.astype(dtype), x.astype(dtype))


# --- one model with a layer of each kind, one training step --------------------------

FLOAT32, BFLOAT16 = "float32", "bfloat16"


def calibrated(method, qtype="int4", **options):
    return quantizing(qtype, weight_calibration_method=method, **options)


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
    "int4 clipped": calibrated("absmax,0.8"),
    "int4 over 7": over_7(),
    "int4 over 7 tile": over_7(tile_size=32),
    "int8 fixed": calibrated("fixed,-1.7,1.7", "int8"),
    "int8 fixed tile": calibrated("fixed,1.7", "int8", tile_size=16),
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
    "minmax": (calibrated("minmax"), FLOAT32, FLOAT32),
    "fixed ends": (calibrated("fixed,-1,2"), FLOAT32, FLOAT32),
    "rms": (calibrated("rms,3"), FLOAT32, FLOAT32),
    "fnuz": (quantizing("float8_e4m3b11fnuz"), FLOAT32, FLOAT32),
    "to narrow": (quantizing("int4"), FLOAT32, BFLOAT16),
    "to wide": (quantizing("int4"), BFLOAT16, FLOAT32),
}
NARROW = {
    "int4": (quantizing("int4"), BFLOAT16),
    "int8 tile 16": (quantizing("int8", tile_size=16), BFLOAT16),
    "int4 over 7": (over_7(), BFLOAT16),
    "int4 fixed": (calibrated("fixed,1.7"), BFLOAT16),
    "fp8": (quantizing("float8_e4m3fn"), BFLOAT16),
    "mxfp4": (quantizing("mxfp4", tile_size=32), BFLOAT16),
    "nvfp4": (quantizing("nvfp4", tile_size=16), BFLOAT16),
    "nf4": (quantizing("nf4", tile_size=32), BFLOAT16),
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
        layer = Own(converted(BFLOAT16), (64, 24))
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
    with implicit_promotion():
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
            patch.setattr(qwix_quantizer, "_is_idempotent", lambda how: True)
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
        wide = compute_dtype(jnp.dtype(first))
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
    rounded_up = cage.fake_quant(weights_of(step, case), cage.mxfp4(rounding="up"))
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
    with implicit_promotion():
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
