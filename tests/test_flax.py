"""Flax models, Linen and NNX, that know nothing of quantization."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_raises
from oracles import absmax_round

import cage_jax as cage
from cage_jax import Rules, fake_quant, int4, int8
from cage_jax.quantizers.scales import Calibrated

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
    return rng.standard_normal(shape).astype(np.float32)


# Initializers are not tested here, and would have to be compiled.


def drawn(rng, like):
    """Normal parameters in the shapes of others, about as large as Flax's own."""
    return jax.tree.map(lambda a: jax.device_put(normal(rng, *a.shape) / 4), like)


def variables_of(module, rng, *inputs):
    """Variables of a Linen module that has no others than parameters."""
    return drawn(rng, jax.eval_shape(module.init, jax.random.key(0), *inputs))


def filled(make, rng):
    """An NNX module that has no other variables than parameters."""
    model = nnx.eval_shape(make)
    nnx.update(model, drawn(rng, nnx.state(model)))
    return model


def assert_close(found, expected, atol=1e-5, rtol=1e-5):
    chex.assert_trees_all_close(found, expected, atol=atol, rtol=rtol)


# --- every kind of layer --------------------------------------------------------------

# A layer of Linen and of NNX, the shape of its input, and the axes that are summed.
LAYERS = {
    "Dense": (nn.Dense(4), lambda rngs: nnx.Linear(8, 4, rngs=rngs), (5, 8), -1),
    "Dense in bfloat16": (
        nn.Dense(4, dtype=jnp.bfloat16),
        lambda rngs: nnx.Linear(8, 4, dtype=jnp.bfloat16, rngs=rngs),
        (5, 8),
        -1,
    ),
    "DenseGeneral": (
        nn.DenseGeneral((2, 3), axis=(-2, -1)),
        lambda rngs: nnx.LinearGeneral((4, 8), (2, 3), axis=(-2, -1), rngs=rngs),
        (5, 4, 8),
        (-2, -1),
    ),
    "Einsum": (
        nn.Einsum((4, 8, 6), "tnh,nhd->td"),
        lambda rngs: nnx.Einsum("tnh,nhd->td", (4, 8, 6), rngs=rngs),
        (5, 4, 8),
        (-2, -1),
    ),
    "Conv": (
        nn.Conv(4, (3, 3), strides=2),
        lambda rngs: nnx.Conv(8, 4, (3, 3), strides=2, rngs=rngs),
        (2, 6, 6, 8),
        -1,
    ),
    "Conv grouped": (
        nn.Conv(4, (3,), feature_group_count=2, padding="CAUSAL"),
        lambda rngs: nnx.Conv(8, 4, (3,), feature_group_count=2, rngs=rngs),
        (2, 6, 8),
        -1,
    ),
    "Conv dilated": (
        nn.Conv(4, (3,), kernel_dilation=2),
        lambda rngs: nnx.Conv(8, 4, (3,), kernel_dilation=2, rngs=rngs),
        (2, 9, 8),
        -1,
    ),
    "ConvTranspose": (
        nn.ConvTranspose(4, (3, 3), strides=(2, 2)),
        lambda rngs: nnx.ConvTranspose(8, 4, (3, 3), strides=(2, 2), rngs=rngs),
        (2, 4, 4, 8),
        -1,
    ),
}


def quantized_input(x, axes, dtype=jnp.float32):
    return fake_quant(x.astype(dtype), int4(axis=axes))


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, rng):
    linen, make, shape, axes = LAYERS[name]
    x = normal(rng, *shape)
    variables = variables_of(linen, rng, x)
    layer = filled(lambda: make(nnx.Rngs(0)), rng)
    kind, params = type(layer), nnx.to_pure_dict(nnx.state(layer))
    of_linen = quantize_activations(linen, RULES)
    of_nnx = quantize_activations(layer, RULES)
    assert isinstance(of_nnx, kind) and of_nnx is not layer

    @nnx.jit
    def run(of_nnx, layer, variables, x):
        rounded = quantized_input(x, axes, linen.dtype or jnp.float32)
        apply = functools.partial(linen.apply, variables)
        return (
            (of_linen.apply(variables, x), apply(rounded), apply(x)),
            (of_nnx(x), layer(rounded), layer(x)),
        )

    for found, expected, plain in run(of_nnx, layer, variables, x):
        assert_close(found, expected)
        assert np.abs(np.float32(found) - np.float32(plain)).max() > 0.01
    # The old one is as it was.
    assert type(layer) is kind
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(layer)), params)


def test_a_local_convolution_has_patches_as_inputs(rng):
    layer, x = nn.ConvLocal(4, (3,)), normal(rng, 2, 6, 8)
    variables = variables_of(layer, rng, x)
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    patches = np.stack([padded[:, i : i + 3] for i in range(6)], 1)
    # Flax lays a patch out with its channels first.
    patches = patches.transpose(0, 1, 3, 2).reshape(2, 6, 24)

    @jax.jit
    def both(variables, x, patches):
        kernel, bias = (variables["params"][name] for name in ("kernel", "bias"))
        found = quantize_activations(layer, RULES).apply(variables, x)
        patches = quantized_input(patches, -1)
        return found, jnp.einsum("bti,tio->bto", patches, kernel) + bias

    assert_close(*both(variables, x, patches))


def test_an_embedding_is_looked_up_and_multiplied(rng):
    tokens = np.array([[1, 2, 3]])

    class Embedding(nn.Module):
        tied: bool

        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(16, 8)
            return embed.attend(embed(tokens)) if self.tied else embed(tokens)

    tied, lookup = Embedding(True), Embedding(False)
    variables = variables_of(tied, rng, tokens)
    embedding = np.asarray(variables["params"]["Embed_0"]["embedding"])

    @jax.jit
    def both(variables):
        found = quantize_activations(tied, RULES).apply(variables, tokens)
        return found, quantized_input(embedding[tokens], -1) @ embedding.T

    assert_close(*both(variables))
    with pytest.raises(
        ValueError, match=r"`Embed_0/embedding`: its input .* only looked up"
    ):
        jax.eval_shape(quantize_activations(lookup, RULES).apply, variables, tokens)


def test_attention_projects_quantized_inputs(rng):
    x = normal(rng, 2, 5, 8)
    attention = nn.MultiHeadDotProductAttention(2)
    variables = variables_of(attention, rng, x)
    module = filled(
        lambda: nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), decode=False), rng
    )
    nnx.update(module, variables["params"])
    quantized = quantize_activations(module, RULES)

    def by_hand(params, x):
        def project(name):
            kernel, bias = params[name]["kernel"], params[name]["bias"]
            inputs = quantized_input(x, -1)
            return jnp.einsum("btd,dnh->btnh", inputs, kernel) + bias

        query, key, value = map(project, ("query", "key", "value"))
        weights = nn.softmax(jnp.einsum("bqnh,bknh->bnqk", query / 2.0, key))
        mixed = jnp.einsum("bnqk,bknh->bqnh", weights, value)
        mixed = quantized_input(mixed, (-2, -1))
        out = jnp.einsum("btnh,nhd->btd", mixed, params["out"]["kernel"])
        return out + params["out"]["bias"]

    @nnx.jit
    def run(quantized, variables, x):
        found = quantize_activations(attention, RULES).apply(variables, x)
        return found, quantized(x), by_hand(variables["params"], x)

    of_linen, of_nnx, expected = run(quantized, variables, x)
    assert_close(of_linen, expected)
    assert_close(of_nnx, expected)


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
    variables = variables_of(stack, rng, x, None)
    q = functools.partial(quantized_input, axes=-1)

    def by_hand(params, h):
        for kernel, w in zip(params["Dense_0"]["kernel"], params["w"]):
            h = q(jnp.tanh(q(h) @ kernel)) @ w
        return h

    # Calibrated: a grid for each layer.
    rules = Rules([(".*", None, STATIC)])
    calibrated = calibrate(stack, rules, [(x, None)], variables)
    assert calibrated["grids"]["w/inputs"].scale.shape == (3,)

    @jax.jit
    def run(variables, calibrated, x):
        found, _ = quantize_activations(stack, RULES).apply(variables, x, None)
        static, _ = quantize_activations(stack, rules).apply(calibrated, x, None)
        plain, _ = stack.apply(variables, x, None)
        return found, by_hand(variables["params"], x), static, plain

    found, expected, static, plain = run(variables, calibrated, x)
    assert_close(found, expected)
    assert_close(static, plain, atol=0.1)
    assert np.abs(static - plain).max() > 0


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

    x = normal(rng, 5, 8)
    model = quantize_activations(filled(Stack, rng), RULES)

    @nnx.jit
    def both(model, x):
        h = x
        for kernel in model.layers.kernel[...]:
            h = jnp.tanh(quantized_input(h, -1) @ kernel)
        return model(x), h

    assert_close(*both(model, x))


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


class Normalized(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.up(x)))


@nnx.jit(static_argnums=0)
def made(kind):
    """An NNX module as it is at the start, from one program."""
    return kind(nnx.Rngs(0))


@nnx.jit
def called(model, *args):
    return model(*args)


@pytest.fixture(scope="module")
def x():
    return normal(np.random.default_rng(1), 32, 8)


@pytest.fixture(scope="module")
def variables(x):
    """Variables of the Linen model."""
    return jax.jit(LinenModel().init)(jax.random.key(0), x)


W4A4 = Rules([("up/kernel|w", int4(), int4(axis=-1)), (".*", None)])


def test_linen_nnx_and_functions_agree(x, variables, rng):
    target, params, linen = normal(rng, 32, 4), variables["params"], LinenModel()

    def mean_square(y):
        return jnp.mean((y - target) ** 2)

    quantized = quantize_activations(linen, W4A4)
    apply = cage.quantize_activations(function_model, W4A4)

    def linen_loss(params):
        state = variables | {"params": fake_quant(params, W4A4)}
        return mean_square(quantized.apply(state, x, mutable=["batch_stats"])[0])

    def function_loss(params):
        return mean_square(apply(fake_quant(params, W4A4), x))

    def nnx_loss(model):
        graphdef, state, rest = nnx.split(model, nnx.Param, ...)
        copy = nnx.merge(graphdef, fake_quant(state, W4A4), rest)
        return mean_square(copy(x))

    model = quantize_activations(made(NnxModel), W4A4)
    nnx.update(model, params)

    @nnx.jit
    def run(model, params):
        found = [jax.value_and_grad(f)(params) for f in (function_loss, linen_loss)]
        return *found, nnx.value_and_grad(nnx_loss)(model)

    expected, of_linen, (loss, gradient) = run(model, params)
    assert_close(of_linen, expected, rtol=1e-6, atol=1e-6)
    of_nnx = loss, nnx.to_pure_dict(gradient)
    assert_close(of_nnx, expected, rtol=1e-6, atol=1e-6)
    # Its variables are those of the model.
    again = jax.jit(quantized.init)(jax.random.key(0), x)
    chex.assert_trees_all_equal(again, variables)


def test_state_goes_in_and_out(x, variables):
    model = made(NnxModel)
    quantized = quantize_activations(model, W4A4)
    called(quantized, x)
    h = np.maximum(absmax_round(x, axis=-1) @ np.float64(model.up.kernel[...]), 0)
    np.testing.assert_allclose(
        quantized.norm.mean[...], 0.01 * h.mean(0), rtol=1e-3, atol=1e-6
    )
    assert np.all(np.asarray(model.norm.mean[...]) == 0)
    quantized.eval()
    before = quantized.norm.mean[...]
    called(quantized, x)
    chex.assert_trees_all_equal(quantized.norm.mean[...], before)

    quantized = quantize_activations(LinenModel(), W4A4)

    @jax.jit
    def both(variables, x):
        trained = quantized.apply(variables, x, mutable=["batch_stats"])
        return trained, quantized.apply(variables, x, train=False)

    (_, updates), still = both(variables, x)
    assert np.any(np.asarray(updates["batch_stats"]["norm"]["mean"]) != 0)
    assert still.shape == (32, 4)


def test_random_numbers_move_on(x, rng):
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(8, 16, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.up(x))

    quantized = quantize_activations(made(Noisy), RULES)
    assert np.any(np.asarray(called(quantized, x)) != np.asarray(called(quantized, x)))

    class Drop(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(16)(x))

    variables = variables_of(Drop(), rng, x)

    @jax.jit
    def apply(key):
        rngs = {"dropout": key}
        return quantize_activations(Drop(), RULES).apply(variables, x, rngs=rngs)

    one, same, other = map(apply, map(jax.random.key, (0, 0, 1)))
    chex.assert_trees_all_equal(one, same)
    assert np.any(np.asarray(one) != np.asarray(other))


def test_what_is_no_parameter_is_updated_where_parameters_are_rounded(x):
    rules = Rules([(".*kernel", int4()), (".*", None)])
    model = made(Normalized)
    kernel = np.asarray(model.up.kernel[...])

    @nnx.jit
    def gradient_of(model):
        return nnx.grad(lambda m: jnp.sum(cage_flax.fake_quant(m, rules)(x)))(model)

    gradient = gradient_of(model)
    assert gradient["up"]["kernel"].shape == kernel.shape
    assert np.array_equal(model.up.kernel[...], kernel)  # not rounded in place
    rounded = np.float64(x) @ absmax_round(kernel)
    expected = 0.01 * rounded.mean(0)  # a step of the running mean, from 0
    np.testing.assert_allclose(model.norm.mean[...], expected, atol=1e-6)
    assert model.drop.rngs.count[...] == 1


OTHERWISE = "`rules` do not quantize the same inputs"


def test_a_model_whose_inputs_are_not_quantized_as_asked(x, rng):
    rules = Rules([(".*kernel", int4(), int8(axis=-1)), (".*", None)])
    weights = Rules([(".*kernel", int4()), (".*", None)])
    other = Rules([(".*kernel", int4(), int8(axis=None)), (".*", None)])
    plain = filled(lambda: nnx.Linear(8, 4, rngs=nnx.Rngs(0)), rng)
    model = quantize_activations(plain, rules)
    outer = nnx.Sequential(model, nnx.relu)
    for found, asked, text in (
        (model, other, OTHERWISE),
        (outer, other, OTHERWISE),
    ):
        with pytest.warns(UserWarning, match=text) as warned:
            cage_flax.fake_quant(found, asked)
        assert warned[0].filename == __file__
    for found, asked in (
        (plain, weights),
        (plain, rules),
        (model, rules),
        (outer, rules),
    ):
        cage_flax.fake_quant(found, asked)  # no warning

    linen = nn.Dense(4)
    variables = variables_of(linen, rng, x)
    quantized = quantize_activations(linen, rules)

    def last(model, rules, **kwargs):
        return (*report(model, rules, x, **kwargs).findings, "none")[0]

    assert last(model, other).startswith(OTHERWISE)
    assert last(quantized, other, variables=variables).startswith(OTHERWISE)
    assert last(model, rules) == last(plain, rules) == last(plain, weights) == "none"
    assert last(linen, rules, variables=variables) == "none"
    assert last(quantized, rules, variables=variables) == "none"


def test_modules_are_not_taken_for_trees_or_functions(rng):
    rules = Rules([(".*kernel", int4(), int8(axis=-1)), (".*", None)])
    module = filled(lambda: nnx.Linear(8, 4, rngs=nnx.Rngs(0)), rng)
    quantize_me = r"the module .*cage_jax\.flax\.quantize_act"
    table = [
        (
            lambda: fake_quant(module, rules),
            r"NNX module Linear.*cage_jax\.flax\.fake_quant",
        ),
        (
            lambda: cage.quantize(module, rules),
            r"NNX module Linear.*nnx\.state\(model",
        ),
        (
            lambda: cage.low_bit(module),
            r"got the module Linear.*low_bit\(model\.app",
        ),
        (
            lambda: cage_flax.fake_quant(nnx.state(module), rules),
            r"got State\. For a tree .* cage_jax\.fake",
        ),
        (lambda: cage.quantize_activations(module, rules), quantize_me),
        (lambda: cage.quantize_activations(nn.Dense(4), rules), quantize_me),
    ]
    assert_raises([(call, TypeError, text) for call, text in table])


def test_other_methods_are_quantized_too(rng):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(8, 16, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.encode(x))

        def encode(self, x, *, scale=1.0):
            return scale * self.up(x)

    class Encoder(nn.Module):
        def setup(self):
            self.up = nn.Dense(16)

        def __call__(self, x):
            return nn.relu(self.up(x))

        def encode(self, x):
            return self.up(x)

    x, linen = normal(rng, 4, 8), Encoder()
    model = filled(lambda: Two(nnx.Rngs(0)), rng)
    variables = variables_of(linen, rng, x)
    of_nnx, of_linen = (quantize_activations(each, RULES) for each in (model, linen))

    @nnx.jit
    def run(of_nnx, model, variables, x):
        rounded = quantized_input(x, -1)
        return (
            (of_nnx.encode(x, scale=2.0), model.encode(rounded, scale=2.0)),
            (
                of_linen.apply(variables, x, method="encode"),
                linen.apply(variables, rounded, method="encode"),
            ),
        )

    for found, expected in run(of_nnx, model, variables, x):
        assert_close(found, expected)


# --- grids kept with the variables ----------------------------------------------------


def test_calibration_is_kept_with_the_variables(x, variables):
    rules = Rules([("up/kernel", int4(), STATIC), (".*", None)])
    scale, linen, plain = np.abs(x).max() / 127, LinenModel(), variables
    for _ in range(2):  # again from where it was
        variables = calibrate(linen, rules, [(x / 2,), (x,)], variables, train=False)
    found = float(variables["grids"]["up/kernel/inputs"].scale)
    assert found == pytest.approx(scale, rel=1e-6)
    apply = functools.partial(quantize_activations(linen, rules).apply, train=False)
    assert jax.eval_shape(apply, variables, x).shape == (32, 4)
    uncalibrated = "`up/kernel/inputs`: `inputs` of this weight must be"
    with pytest.raises(ValueError, match=uncalibrated):
        jax.eval_shape(apply, plain, x)

    model = made(NnxModel)
    quantized = calibrate(model, rules, [(x / 2,), (x,)])
    found = float(quantized.input_grids["up/kernel"].scale[...])
    assert found == pytest.approx(scale, rel=1e-6)
    assert not hasattr(model, "input_grids")
    graphdef, state = nnx.split(quantized)
    again = nnx.merge(graphdef, jax.tree.map(np.asarray, state))
    outputs = called(quantized, x)
    assert outputs.shape == (32, 4)
    chex.assert_trees_all_equal(called(again, x), outputs)
    with pytest.raises(ValueError, match=uncalibrated):
        called(quantize_activations(model, rules), x)


def test_an_nnx_optimizer_trains_learned_grids(x, rng):
    target = normal(rng, 32, 4)
    rules = Rules([("up/kernel|w", int4(), cage.lsq(4)), (".*", None)])
    model = calibrate(made(NnxModel), rules, [(x,)])
    start = {p: float(g.scale[...]) for p, g in model.input_grids.items()}
    tx = cage.cage_adamw(0.01, rules, strength=1.0)
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
    x, image, words = (normal(rng, *s) for s in ((5, 8), (2, 6, 6, 8), (2, 5, 8)))
    product = cage_flax.dot_general(PER_TOKEN)
    convolution = cage_flax.conv_general_dilated(PER_TOKEN)
    assert product == cage_flax.dot_general(PER_TOKEN)
    assert hash(product) == hash(cage_flax.dot_general(PER_TOKEN))
    by_product = {"dot_general": product}
    by_convolution = {"conv_general_dilated": convolution}
    in_attention = {"qkv_dot_general": product, "out_dot_general": product}
    general = functools.partial(nn.DenseGeneral, (2, 2), axis=(-2, -1))
    heads = functools.partial(nn.MultiHeadDotProductAttention, 2)
    linens = [
        (functools.partial(nn.Dense, 4), by_product, x),
        (general, by_product, image),
        (functools.partial(nn.Conv, 4, (3, 3), strides=2), by_convolution, image),
        (heads, in_attention, words),
    ]
    variables = [variables_of(make(), rng, data) for make, _, data in linens]
    of_nnx = [
        (functools.partial(nnx.Linear, 8, 4), by_product, x),
        (functools.partial(nnx.Conv, 8, 4, (3,)), by_convolution, image[0]),
    ]
    modules = []
    for make, options, _ in of_nnx:
        plain, made = (
            filled(lambda o=o, m=make: m(rngs=nnx.Rngs(0), **o), rng)
            for o in ({}, options)
        )
        nnx.update(made, nnx.state(plain))
        modules.append((quantize_activations(plain, RULES), made))

    @nnx.jit
    def run(modules, variables):
        pairs = []
        for (make, options, data), each in zip(linens, variables):
            expected = quantize_activations(make(), RULES).apply(each, data)
            pairs.append((make(**options).apply(each, data), expected))
        for (expected, found), (_, _, data) in zip(modules, of_nnx):
            pairs.append((found(data), expected(data)))
        return pairs

    for found, expected in run(modules, variables):
        assert_close(found, expected)


@pytest.mark.parametrize("size", [1, 3])
def test_a_convolution_by_its_argument_has_a_scale_per_example(size, rng):
    image, rules = normal(rng, 2, 6, 6, 8), Rules([(".*kernel", None, "int4")])
    make = functools.partial(nn.Conv, 4, (size, size))
    variables = variables_of(make(), rng, image)
    convolution = cage_flax.conv_general_dilated(int4())
    rounded = quantized_input(image, -1 if size == 1 else (1, 2, 3))
    expected = make().apply(variables, rounded)
    made = make(conv_general_dilated=convolution)
    assert_close(made.apply(variables, image), expected)
    by_rules = quantize_activations(make(), rules)
    assert_close(by_rules.apply(variables, image), expected)


def test_bad_arguments(rng):
    x, linear = np.ones((1, 8), np.float32), lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    twice = quantize_activations(filled(linear, rng), RULES)
    quantized = quantize_activations(nn.Dense(4), RULES)
    table = [
        (
            lambda: cage_flax.dot_general(int8),
            TypeError,
            "`inputs` must be a Quantizer",
        ),
        (
            lambda: cage_flax.conv_general_dilated(STATIC),
            ValueError,
            "`inputs` must have a scale that is computed from each input",
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
            lambda: calibrate(nn.Dense(4), RULES, [(x,)]),
            ValueError,
            "`variables` must be given for a Linen module.* Use calibrate\\(model, "
            "rules, batches, variables=variables\\)",
        ),
        (
            lambda: report(nn.Dense(4), RULES),
            ValueError,
            "Use report\\(model, rules, x, variables=variables\\), where variables = ",
        ),
        (
            lambda: report(nn.Dense(4), RULES, variables={"params": {}}),
            TypeError,
            "`args` must be .*; got none. Use report\\(model, rules, x, variables=var",
        ),
        (
            lambda: report(linear(), RULES),
            TypeError,
            "`args` must be .*; got none. Use report\\(model, rules, x\\)",
        ),
        *[
            (function, TypeError, "a tree .* got the NNX module Linear.* Use nnx.state")
            for function in (
                lambda: RULES.report(linear()),
                lambda: cage.cage_adamw(0.1, RULES, total_steps=9).init(linear()),
                lambda: cage.coupled(RULES, strength=1.0).init(linear()),
            )
        ],
        (
            lambda: report(nn.Dense(4), RULES, x, variables={"a": 1}),
            ValueError,
            "`variables` must have the collection 'params'; got \\['a'\\]",
        ),
        (
            lambda: quantize_activations(twice, RULES),
            ValueError,
            "`model` must not be quantized yet; got a Quantized",
        ),
        (
            lambda: quantized.bind({}),
            AttributeError,
            "apply\\(variables, ..., method='bind'\\)",
        ),
        (
            lambda: quantized(x),
            TypeError,
            "a quantized Linen module cannot be called",
        ),
    ]
    assert_raises(table)


# --- the report -----------------------------------------------------------------------


def test_the_report_lists_nothing_but_parameters(x):
    model, rules = made(Normalized), Rules([(".*", int4(axis=None))])
    paths = [layer.weight.path for layer in report(model, rules, x).layers]
    assert paths == ["norm/bias", "norm/scale", "up/bias", "up/kernel"]


def test_the_report_lists_every_parameter(x, variables):
    rules = Rules([("up/kernel", int4(), int8(axis=-1)), ("w", int4())])
    assert set(variables) > {"params"}
    found = report(LinenModel(), rules, x, variables=variables, train=False)
    count = len(jax.tree.leaves(variables["params"]))
    assert len(found.layers) == count < len(jax.tree.leaves(variables))
    layers = {layer.weight.path: layer for layer in found.layers}
    up, w = layers["up/kernel"], layers["w"]
    assert up.weight.quantizer == w.weight.quantizer == int4(axis=-2)
    (product,) = up.inputs
    assert product.quantizer == int8(axis=-1)
    assert product.product.shape == (32, 8)
    assert w.inputs[0].quantizer is None
    assert not layers["up/bias"].inputs
    text = str(found)
    assert "- in no matrix product" in text and "- not quantized" in text
    # An NNX module has the same, quantized or not.
    model = made(NnxModel)
    plain = report(model, rules, x)
    again = report(quantize_activations(model, rules), rules, x)
    assert plain.layers == again.layers
    assert {"up/kernel", "up/bias", "w", "norm/scale"} <= {
        layer.weight.path for layer in plain.layers
    }


def test_resolve_from_shapes_of_a_model_with_other_variables():
    """Statistics and keys are shapes too, in a model that was never made."""

    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.norm(self.conv(x)))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x))

    rules = Rules([(".*kernel", int4())])
    x = jax.ShapeDtypeStruct((2, 5, 5, 3), jnp.float32)
    init = functools.partial(Linen().init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), x)
    for found in (
        cage_flax.resolve(rules, nnx.eval_shape(Net), x),
        cage_flax.resolve(rules, Linen(), x, variables=variables, train=False),
    ):
        (quantizer,) = found.resolved.values()
        assert quantizer.axis == (-4, -3, -2)
