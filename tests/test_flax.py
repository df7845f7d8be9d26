"""Flax models, Linen and NNX, that know nothing of quantization."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cage_jax as cage
from cage_jax import Rules, fake_quant, int4, int8
from cage_jax.scales import Calibrated

pytest.importorskip("flax")

from flax import linen as nn
from flax import nnx

import cage_jax.flax as cage_flax
from cage_jax.flax import calibrate, quantize_activations, report

pytestmark = pytest.mark.usefixtures("as_users_have_it")

PER_TOKEN = int4(axis=-1)
STATIC = int8(axis=None, scale=Calibrated())
RULES = Rules([(".*(kernel|embedding|/w|^w)", None, PER_TOKEN)])


@pytest.fixture
def as_users_have_it(standard_promotion):
    """Flax promotes dtypes and ranks by itself."""
    with jax.numpy_rank_promotion("allow"):
        yield


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


# --- every kind of layer --------------------------------------------------------------

# A layer, the shape of its input, and the axes of it that are summed over.
LINEN = {
    "Dense": (nn.Dense(4), (5, 8), -1),
    "Dense in bfloat16": (nn.Dense(4, dtype=jnp.bfloat16), (5, 8), -1),
    "DenseGeneral": (nn.DenseGeneral((2, 3), axis=(-2, -1)), (5, 4, 8), (-2, -1)),
    "Einsum": (nn.Einsum((4, 8, 6), "tnh,nhd->td"), (5, 4, 8), (-2, -1)),
    "Conv": (nn.Conv(4, (3, 3), strides=2), (2, 6, 6, 8), -1),
    "Conv grouped": (
        nn.Conv(4, (3,), feature_group_count=2, padding="CAUSAL"),
        (2, 6, 8),
        -1,
    ),
    "Conv dilated": (nn.Conv(4, (3,), kernel_dilation=2), (2, 9, 8), -1),
    "ConvTranspose": (nn.ConvTranspose(4, (3, 3), strides=(2, 2)), (2, 4, 4, 8), -1),
}
NNX = {
    "Linear": (nnx.Linear(8, 4, rngs=nnx.Rngs(0)), (5, 8), -1),
    "Linear in bfloat16": (
        nnx.Linear(8, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        (5, 8),
        -1,
    ),
    "LinearGeneral": (
        nnx.LinearGeneral((4, 8), (2, 3), axis=(-2, -1), rngs=nnx.Rngs(0)),
        (5, 4, 8),
        (-2, -1),
    ),
    "Einsum": (
        nnx.Einsum("tnh,nhd->td", (4, 8, 6), rngs=nnx.Rngs(0)),
        (5, 4, 8),
        (-2, -1),
    ),
    "Conv": (nnx.Conv(8, 4, (3, 3), strides=2, rngs=nnx.Rngs(0)), (2, 6, 6, 8), -1),
    "Conv grouped": (
        nnx.Conv(8, 4, (3,), feature_group_count=2, rngs=nnx.Rngs(0)),
        (2, 6, 8),
        -1,
    ),
    "ConvTranspose": (
        nnx.ConvTranspose(8, 4, (3, 3), strides=(2, 2), rngs=nnx.Rngs(0)),
        (2, 4, 4, 8),
        -1,
    ),
}


def quantized_input(x, axes, dtype=jnp.float32):
    return fake_quant(x.astype(dtype), int4(axis=axes))


@pytest.mark.parametrize("name", LINEN)
def test_layers_of_linen(name, rng):
    layer, shape, axes = LINEN[name]
    x = normal(rng, *shape)
    variables = layer.init(jax.random.key(0), x)
    quantized = quantize_activations(layer, RULES)
    chex.assert_trees_all_equal(quantized.init(jax.random.key(0), x), variables)
    found = jax.jit(quantized.apply)(variables, x)
    expected = layer.apply(
        variables, quantized_input(x, axes, layer.dtype or jnp.float32)
    )
    chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)
    plain = layer.apply(variables, x)
    assert np.abs(np.float32(found) - np.float32(plain)).max() > 0.01


@pytest.mark.parametrize("name", NNX)
def test_layers_of_nnx(name, rng):
    layer, shape, axes = NNX[name]
    x = normal(rng, *shape)
    plain = layer(x)
    quantized = quantize_activations(layer, RULES)
    assert isinstance(quantized, type(layer)) and quantized is not layer
    found = nnx.jit(quantized)(x)
    expected = layer(quantized_input(x, axes, layer.dtype or jnp.float32))
    chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)
    # The old one is as it was.
    assert type(layer).__name__ in name
    chex.assert_trees_all_equal(layer(x), plain)
    assert np.abs(np.float32(found) - np.float32(plain)).max() > 0.01


def test_a_local_convolution_has_patches_as_inputs(rng):
    layer, x = nn.ConvLocal(4, (3,)), normal(rng, 2, 6, 8)
    variables = layer.init(jax.random.key(0), x)
    found = quantize_activations(layer, RULES).apply(variables, x)
    padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (0, 0)))
    patches = np.stack([padded[:, i : i + 3] for i in range(6)], 1)
    # Flax lays a patch out with its channels first.
    patches = jnp.asarray(patches.transpose(0, 1, 3, 2).reshape(2, 6, 24))
    patches = quantized_input(patches, -1)
    expected = jnp.einsum("bti,tio->bto", patches, variables["params"]["kernel"])
    chex.assert_trees_all_close(found, expected, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_is_looked_up_and_multiplied(tied, rng):
    tokens = jnp.array([[1, 2, 3]])

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(16, 8)
            return embed.attend(embed(tokens)) if tied else embed(tokens)

    model = Tied()
    variables = model.init(jax.random.key(0), tokens)
    quantized = quantize_activations(model, RULES)
    embedding = variables["params"]["Embed_0"]["embedding"]
    if tied:
        expected = quantized_input(embedding[tokens], -1) @ embedding.T
        found = quantized.apply(variables, tokens)
        chex.assert_trees_all_close(found, expected, rtol=1e-5)
    else:
        with pytest.raises(ValueError, match="`Embed_0/embedding`: a parameter must"):
            quantized.apply(variables, tokens)


def test_attention_projects_quantized_inputs(rng):
    x = normal(rng, 2, 5, 8)
    attention = nn.MultiHeadDotProductAttention(2)
    variables = attention.init(jax.random.key(0), x)
    params = variables["params"]
    q = functools.partial(quantized_input, axes=-1)

    def project(name):
        return jnp.einsum("btd,dnh->btnh", q(x), params[name]["kernel"])

    query, key, value = map(project, ("query", "key", "value"))
    weights = nn.softmax(jnp.einsum("bqnh,bknh->bnqk", query / 2.0, key))
    mixed = jnp.einsum("bnqk,bknh->bqnh", weights, value)
    expected = jnp.einsum(
        "btnh,nhd->btd", quantized_input(mixed, (-2, -1)), params["out"]["kernel"]
    )
    found = quantize_activations(attention, RULES).apply(variables, x)
    chex.assert_trees_all_close(found, expected, atol=1e-5)

    nnx_attention = nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), decode=False)
    state = nnx.state(nnx_attention, nnx.Param)
    pure = nnx.to_pure_dict(state)
    for name in ("query", "key", "value", "out"):
        pure[name]["kernel"] = params[name]["kernel"]
        pure[name]["bias"] = params[name]["bias"]
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(nnx_attention, state)
    found = quantize_activations(nnx_attention, RULES)(x)
    chex.assert_trees_all_close(found, expected, atol=1e-5)


class Block(nn.Module):
    """A layer to be stacked."""

    @nn.compact
    def __call__(self, x, _):
        w = self.param("w", nn.initializers.lecun_normal(), (8, 8))
        return nn.tanh(nn.Dense(8, use_bias=False)(x)) @ w, None


@pytest.mark.parametrize("remat", [False, True])
def test_a_scanned_stack_of_linen(remat, rng):
    block = nn.remat(Block, prevent_cse=False) if remat else Block
    stack = nn.scan(
        block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )()
    x = normal(rng, 5, 8)
    variables = stack.init(jax.random.key(0), x, None)
    q = functools.partial(quantized_input, axes=-1)
    h = x
    params = variables["params"]
    for kernel, w in zip(params["Dense_0"]["kernel"], params["w"]):
        h = q(jnp.tanh(q(h) @ kernel)) @ w
    quantized = quantize_activations(stack, RULES)
    found, _ = jax.jit(quantized.apply)(variables, x, None)
    chex.assert_trees_all_close(found, h, atol=1e-5)
    # Calibrated: a grid for each layer.
    rules = Rules([(".*", None, STATIC)])
    variables = calibrate(stack, rules, [(x, None)], variables)
    assert variables["grids"]["w/inputs"].scale.shape == (3,)
    found, _ = quantize_activations(stack, rules).apply(variables, x, None)
    plain, _ = stack.apply(variables, x, None)
    chex.assert_trees_all_close(found, plain, atol=0.1)
    assert np.abs(found - plain).max() > 0


@pytest.mark.parametrize("remat", [False, True])
def test_a_scanned_stack_of_nnx(remat, rng):
    class Stack(nnx.Module):
        def __init__(self):
            @nnx.vmap(in_axes=0, out_axes=0)
            def make(key):
                return nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(key))

            self.layers = make(jax.random.split(jax.random.key(0), 3))

        def __call__(self, x):
            def layer(x, linear):
                return jnp.tanh(linear(x))

            wrapped = nnx.remat(layer) if remat else layer
            return nnx.scan(wrapped, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )

    model, x = Stack(), normal(rng, 5, 8)
    h = x
    for kernel in model.layers.kernel[...]:
        h = jnp.tanh(quantized_input(h, -1) @ kernel)
    found = nnx.jit(quantize_activations(model, RULES))(x)
    chex.assert_trees_all_close(found, h, atol=1e-5)


# --- one model in three frameworks ----------------------------------------------------


class LinenModel(nn.Module):
    """Two layers and a norm."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(nn.Dense(16, name="up")(x))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return x @ self.param("w", nn.initializers.lecun_normal(), (16, 4))


class NnxModel(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.w = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (16, 4)))

    def __call__(self, x):
        return self.norm(nnx.relu(self.up(x))) @ self.w


def function_model(params, x):
    x = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"])
    mean, variance = x.mean(0), x.var(0)
    x = (x - mean) / jnp.sqrt(variance + 1e-5)
    x = x * params["norm"]["scale"] + params["norm"]["bias"]
    return x @ params["w"]


W4A4 = Rules([("up/kernel|w", int4(), int4(axis=-1)), (".*", None)])


def test_linen_nnx_and_functions_agree(rng):
    x, target = normal(rng, 32, 8), normal(rng, 32, 4)
    linen = LinenModel()
    variables = linen.init(jax.random.key(0), x)
    params = variables["params"]

    def mean_square(y):
        return jnp.mean((y - target) ** 2)

    apply = cage.quantize_activations(function_model, W4A4)
    expected = jax.jit(
        jax.value_and_grad(lambda p: mean_square(apply(fake_quant(p, W4A4), x)))
    )(params)

    quantized = quantize_activations(linen, W4A4)

    def linen_loss(params):
        state = variables | {"params": fake_quant(params, W4A4)}
        return mean_square(quantized.apply(state, x, mutable=["batch_stats"])[0])

    found = jax.jit(jax.value_and_grad(linen_loss))(params)
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)

    model = quantize_activations(NnxModel(nnx.Rngs(0)), W4A4)
    nnx.update(model, params)

    @nnx.jit
    def nnx_loss(model):
        def loss(model):
            graphdef, state, rest = nnx.split(model, nnx.Param, ...)
            copy = nnx.merge(graphdef, fake_quant(state, W4A4), rest)
            return mean_square(copy(x))

        return nnx.value_and_grad(loss)(model)

    loss, gradient = nnx_loss(model)
    gradient = nnx.to_pure_dict(gradient)
    chex.assert_trees_all_close((loss, gradient), expected, rtol=1e-6, atol=1e-6)


def test_state_goes_in_and_out(rng):
    x = normal(rng, 32, 8)
    model = NnxModel(nnx.Rngs(0))
    quantized = quantize_activations(model, W4A4)
    quantized(x)
    kernel = model.up.kernel[...]
    h = nnx.relu(quantized_input(x, -1) @ kernel)
    chex.assert_trees_all_close(
        quantized.norm.mean[...], 0.01 * h.mean(0), rtol=1e-3, atol=1e-6
    )
    assert np.all(np.asarray(model.norm.mean[...]) == 0)
    quantized.eval()
    before = quantized.norm.mean[...]
    quantized(x)
    chex.assert_trees_all_equal(quantized.norm.mean[...], before)

    linen = LinenModel()
    variables = linen.init(jax.random.key(0), x)
    quantized = quantize_activations(linen, W4A4)
    _, updates = quantized.apply(variables, x, mutable=["batch_stats"])
    assert np.any(updates["batch_stats"]["norm"]["mean"] != 0)
    still = quantized.apply(variables, x, train=False)
    assert still.shape == (32, 4)


def test_random_numbers_move_on(rng):
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(8, 16, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.up(x))

    x = normal(rng, 4, 8)
    quantized = quantize_activations(Noisy(nnx.Rngs(0)), RULES)
    assert np.any(np.asarray(quantized(x)) != np.asarray(quantized(x)))

    class Drop(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(16)(x))

    model = Drop()
    variables = model.init(jax.random.key(0), x)
    apply = quantize_activations(model, RULES).apply
    keys = map(jax.random.key, (0, 0, 1))
    one, same, other = (apply(variables, x, rngs={"dropout": key}) for key in keys)
    chex.assert_trees_all_equal(one, same)
    assert np.any(np.asarray(one) != np.asarray(other))


class Normalized(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.up(x)))


def test_what_is_no_parameter_is_updated_where_parameters_are_rounded(rng):
    rules = Rules([(".*kernel", int4()), (".*", None)])
    model, x = Normalized(nnx.Rngs(0)), normal(rng, 5, 8)
    kernel = model.up.kernel[...]

    @nnx.jit
    def gradient_of(model):
        return nnx.grad(lambda m: jnp.sum(cage_flax.fake_quant(m, rules)(x)))(model)

    gradient = gradient_of(model)
    assert gradient["up"]["kernel"].shape == kernel.shape
    assert jnp.array_equal(model.up.kernel[...], kernel)  # not rounded in place
    rounded = np.float64(x) @ np.float64(fake_quant(kernel, int4()))
    expected = 0.01 * rounded.mean(0)  # a step of the running mean, from 0
    np.testing.assert_allclose(model.norm.mean[...], expected, atol=1e-6)
    assert model.drop.rngs.count[...] == 1


NOT_QUANTIZED = "`rules` quantize inputs, and `model` does not"
OTHERWISE = "`rules` quantize inputs otherwise"


def test_a_model_whose_inputs_are_not_quantized_as_asked(rng):
    rules = Rules([(".*kernel", int4(), int8(axis=-1)), (".*", None)])
    weights = Rules([(".*kernel", int4()), (".*", None)])
    other = Rules([(".*kernel", int4(), int8(axis=None)), (".*", None)])
    plain, x = nnx.Linear(8, 4, rngs=nnx.Rngs(0)), normal(rng, 64, 8)
    model = quantize_activations(plain, rules)
    outer = nnx.Sequential(model, nnx.relu)
    for found, asked, text in (
        (plain, rules, NOT_QUANTIZED),
        (model, other, OTHERWISE),
        (outer, other, OTHERWISE),
    ):
        with pytest.warns(UserWarning, match=text) as warned:
            cage_flax.fake_quant(found, asked)
        assert warned[0].filename == __file__
    for found, asked in (plain, weights), (model, rules), (outer, rules):
        cage_flax.fake_quant(found, asked)  # no warning

    linen = nn.Dense(4)
    variables = linen.init(jax.random.key(0), x)
    quantized = quantize_activations(linen, rules)

    def last(model, rules, **kwargs):
        return (*report(model, rules, x, **kwargs).findings, "none")[0]

    assert last(plain, rules).startswith(NOT_QUANTIZED)
    assert last(model, other).startswith(OTHERWISE)
    assert last(linen, rules, variables=variables).startswith(NOT_QUANTIZED)
    assert last(quantized, other, variables=variables).startswith(OTHERWISE)
    assert last(model, rules) == last(plain, weights) == "none"
    assert last(quantized, rules, variables=variables) == "none"


def test_modules_are_not_taken_for_trees_or_functions():
    rules = Rules([(".*kernel", int4(), int8(axis=-1)), (".*", None)])
    module = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    with pytest.raises(
        TypeError, match=r"NNX module Linear.*cage_jax\.flax\.fake_quant"
    ):
        fake_quant(module, rules)
    with pytest.raises(TypeError, match=r"NNX module Linear.*nnx\.state\(model"):
        cage.quantize(module, rules)
    with pytest.raises(TypeError, match=r"got the module Linear.*low_bit\(model\.app"):
        cage.low_bit(module)
    with pytest.raises(TypeError, match=r"got State\. For a tree .* cage_jax\.fake"):
        cage_flax.fake_quant(nnx.state(module), rules)
    for each in (module, nn.Dense(4)):
        with pytest.raises(
            TypeError, match=r"the module .*cage_jax\.flax\.quantize_act"
        ):
            cage.quantize_activations(each, rules)


def test_other_methods_are_quantized_too(rng):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(8, 16, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.encode(x))

        def encode(self, x, *, scale=1.0):
            return scale * self.up(x)

    x, model = normal(rng, 4, 8), Two(nnx.Rngs(0))
    quantized = quantize_activations(model, RULES)
    expected = model.encode(quantized_input(x, -1), scale=2.0)
    chex.assert_trees_all_close(quantized.encode(x, scale=2.0), expected, atol=1e-5)

    class Encoder(nn.Module):
        def setup(self):
            self.up = nn.Dense(16)

        def __call__(self, x):
            return nn.relu(self.up(x))

        def encode(self, x):
            return self.up(x)

    model = Encoder()
    variables = model.init(jax.random.key(0), x)
    found = quantize_activations(model, RULES).apply(variables, x, method="encode")
    expected = model.apply(variables, quantized_input(x, -1), method="encode")
    chex.assert_trees_all_close(found, expected, atol=1e-5)


# --- grids kept with the variables ----------------------------------------------------


def test_calibration_is_kept_with_the_variables(rng):
    x = normal(rng, 32, 8)
    rules = Rules([("up/kernel", int4(), STATIC), (".*", None)])
    scale = float(np.abs(np.asarray(x)).max()) / 127
    linen = LinenModel()
    variables = linen.init(jax.random.key(0), x)
    for _ in range(2):  # again from where it was
        variables = calibrate(linen, rules, [(x / 2,), (x,)], variables, train=False)
    found = float(variables["grids"]["up/kernel/inputs"].scale)
    assert found == pytest.approx(scale, rel=1e-6)
    quantized = quantize_activations(linen, rules)
    assert quantized.apply(variables, x, train=False).shape == (32, 4)
    with pytest.raises(
        ValueError, match="`up/kernel/inputs`: `inputs` of this weight must be"
    ):
        quantized.apply({"params": variables["params"]}, x, mutable=True)

    model = NnxModel(nnx.Rngs(0))
    quantized = calibrate(model, rules, [(x / 2,), (x,)])
    found = float(quantized.input_grids["up/kernel"].scale[...])
    assert found == pytest.approx(scale, rel=1e-6)
    assert quantized(x).shape == (32, 4)
    assert not hasattr(model, "input_grids")
    graphdef, state = nnx.split(quantized)
    again = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
    chex.assert_trees_all_equal(again(x), quantized(x))
    with pytest.raises(
        ValueError, match="`up/kernel/inputs`: `inputs` of this weight must be"
    ):
        quantize_activations(model, rules)(x)


def test_an_nnx_optimizer_trains_learned_grids(rng):
    x, target = normal(rng, 32, 8), normal(rng, 32, 4)
    rules = Rules([("up/kernel|w", int4(), cage.lsq(4)), (".*", None)])
    model = calibrate(NnxModel(nnx.Rngs(0)), rules, [(x,)])
    start = {p: float(g.scale[...]) for p, g in model.input_grids.items()}
    tx = cage.cage_adamw(0.01, rules, 1.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            graphdef, state, rest = nnx.split(model, nnx.Param, ...)
            copy = nnx.merge(graphdef, fake_quant(state, rules), rest)
            return jnp.mean((copy(x) - target) ** 2)

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]
    assert sorted(start) == ["up/kernel", "w"]
    for path, grid in model.input_grids.items():
        assert float(grid.scale[...]) != start[path]


# --- the arguments of Flax's layers ---------------------------------------------------


def test_products_for_the_arguments_of_layers(rng):
    x, image = normal(rng, 5, 8), normal(rng, 2, 6, 6, 8)
    product = cage_flax.dot_general(PER_TOKEN)
    convolution = cage_flax.conv_general_dilated(PER_TOKEN)
    assert product == cage_flax.dot_general(PER_TOKEN)
    assert hash(product) == hash(cage_flax.dot_general(PER_TOKEN))
    layers = [
        (nn.Dense(4), nn.Dense(4, dot_general=product), x),
        (
            nn.DenseGeneral((2, 2), axis=(-2, -1)),
            nn.DenseGeneral((2, 2), axis=(-2, -1), dot_general=product),
            image,
        ),
        (
            nn.Conv(4, (3, 3), strides=2),
            nn.Conv(4, (3, 3), strides=2, conv_general_dilated=convolution),
            image,
        ),
        (
            nn.MultiHeadDotProductAttention(2),
            nn.MultiHeadDotProductAttention(
                2, qkv_dot_general=product, out_dot_general=product
            ),
            normal(rng, 2, 5, 8),
        ),
    ]
    for plain, made, data in layers:
        variables = plain.init(jax.random.key(0), data)
        expected = quantize_activations(plain, RULES).apply(variables, data)
        found = jax.jit(made.apply)(variables, data)
        chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)
    plain = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    made = nnx.Linear(8, 4, dot_general=product, rngs=nnx.Rngs(0))
    expected = quantize_activations(plain, RULES)(x)
    chex.assert_trees_all_close(nnx.jit(made)(x), expected, atol=1e-5)
    made = nnx.Conv(8, 4, (3,), conv_general_dilated=convolution, rngs=nnx.Rngs(0))
    plain = nnx.Conv(8, 4, (3,), rngs=nnx.Rngs(0))
    expected = quantize_activations(plain, RULES)(image[0])
    chex.assert_trees_all_close(nnx.jit(made)(image[0]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (
            lambda: cage_flax.dot_general(int8),
            TypeError,
            "`inputs` must be a Quantizer",
        ),
        (
            lambda: cage_flax.conv_general_dilated(STATIC),
            ValueError,
            "`inputs` must have a scale that is found in each input",
        ),
        (
            lambda: quantize_activations(lambda x: x, RULES),
            TypeError,
            "`model` must be a Linen or an NNX module; got function",
        ),
        (
            lambda: quantize_activations(nn.Dense(4), [("a", int8())]),
            TypeError,
            "`rules` must be Rules; got list",
        ),
        (
            lambda: calibrate(nn.Dense(4), RULES, [(jnp.ones((1, 8)),)]),
            ValueError,
            "`variables` must be given for a Linen module",
        ),
        (
            lambda: report(nn.Dense(4), RULES, jnp.ones((1, 8)), variables={"a": 1}),
            ValueError,
            "`variables` must have the collection 'params'; got \\['a'\\]",
        ),
        (
            lambda: quantize_activations(
                quantize_activations(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), RULES), RULES
            ),
            ValueError,
            "`model` must not be quantized yet; got a Quantized",
        ),
        (
            lambda: quantize_activations(nn.Dense(4), RULES).bind({}),
            AttributeError,
            "apply\\(variables, ..., method='bind'\\)",
        ),
        (
            lambda: quantize_activations(nn.Dense(4), RULES)(jnp.ones((1, 8))),
            TypeError,
            "a quantized Linen module must be the outermost one",
        ),
    ],
)
def test_bad_arguments(build, error, text):
    with pytest.raises(error, match=text):
        build()


# --- the report -----------------------------------------------------------------------


def test_the_report_lists_nothing_else(rng):
    x, rules = normal(rng, 32, 8), Rules([(".*", int4(axis=None))])
    model = Normalized(nnx.Rngs(0))
    paths = [layer.weight.path for layer in report(model, rules, x).layers]
    assert paths == ["norm/bias", "norm/scale", "up/bias", "up/kernel"]

    linen = LinenModel()
    variables = linen.init(jax.random.key(0), x)
    assert set(variables) > {"params"}
    found = report(linen, rules, x, variables=variables, train=False)
    count = len(jax.tree.leaves(variables["params"]))
    assert len(found.layers) == count < len(jax.tree.leaves(variables))


def test_the_report_lists_every_parameter(rng):
    x = normal(rng, 32, 8)
    linen = LinenModel()
    variables = linen.init(jax.random.key(0), x)
    rules = Rules([("up/kernel", int4(), int8(axis=-1)), ("w", int4())])
    found = report(linen, rules, x, variables=variables, train=False)
    layers = {layer.weight.path: layer for layer in found.layers}
    up, w = layers["up/kernel"], layers["w"]
    assert up.weight.quantizer == int4() and w.weight.quantizer == int4()
    (product,) = up.inputs
    assert product.quantizer == int8(axis=-1)
    assert product.product.shape == (32, 8)
    assert w.inputs[0].quantizer is None
    assert not layers["up/bias"].inputs
    text = str(found)
    assert "- in no product with data" in text and "- as it is" in text
    # Of an NNX module the same, quantized or not.
    model = NnxModel(nnx.Rngs(0))
    plain = report(model, rules, x)
    again = report(quantize_activations(model, rules), rules, x)
    assert plain.layers == again.layers
    assert {"up/kernel", "up/bias", "w", "norm/scale"} <= {
        layer.weight.path for layer in plain.layers
    }
