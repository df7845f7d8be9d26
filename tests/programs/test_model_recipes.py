"""Models of every kind, unedited, at W4A8: all products, outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from w4a8 import check, drawn
from walker import Kernel

import cage_jax as cage

pytestmark = pytest.mark.usefixtures("as_users_have_it")
KERNELS = cage.Rules([(r".*kernel", "int4", "int8")])


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def started(model, rng, *args, **kwargs):
    """The variables of a Linen module; its own initializers take long to compile."""
    like = jax.eval_shape(
        functools.partial(model.init, **kwargs), jax.random.key(0), *args
    )
    return drawn(rng, like)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(h, mask=mask)
        h = nn.gelu(nn.Dense(32, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(16, name="down")(h), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        mask = nn.make_causal_mask(tokens)
        embed = nn.Embed(24, 16, name="embed")
        layers = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=3,
        )
        x, _ = layers(name="layers")(embed(tokens), mask)
        return embed.attend(nn.LayerNorm()(x))


def test_a_transformer_with_scan_and_remat(rng, compilations):
    model = Transformer()
    batches = [(jnp.asarray(rng.integers(0, 24, (2, 6))),) for _ in range(2)]
    params = started(model, rng, *batches[0])["params"]
    rules = cage.Rules([*KERNELS, (r"embed/embedding", "int8", "int8")])
    table = [
        Kernel(r"layers/attn/out/kernel", (1, 2)),
        Kernel(r"layers/attn/(query|key|value)/kernel", 1),
        Kernel(r"layers/(up|down)/kernel", 1),
        Kernel(r"embed/embedding", 1, bits=8),
    ]

    def apply(params, tokens):
        return model.apply({"params": params}, tokens)

    check(apply, rules, table, params, batches, 7, compilations)


# The second joins the kernels of its four gates for one product.
@pytest.mark.parametrize("cell, count", [(nn.GRUCell, 6), (nn.OptimizedLSTMCell, 2)])
def test_a_recurrent_network(cell, count, rng, compilations):
    model = nn.RNN(cell(8))
    batches = [(normal(rng, 2, 5, 6),) for _ in range(2)]
    params = started(model, rng, *batches[0])["params"]

    def apply(params, x):
        return model.apply({"params": params}, x)

    table = [Kernel(r".*kernel", 0)]
    check(apply, KERNELS, table, params, batches, count, compilations)


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        first = nn.relu(nn.Conv(8, (3, 3), name="enter")(x))
        low = nn.relu(nn.Conv(12, (3, 3), strides=2, name="down")(first))
        low = nn.relu(nn.Conv(12, (3, 3), name="middle")(low))
        up = nn.ConvTranspose(8, (2, 2), strides=(2, 2), name="up")(low)
        x = nn.relu(jnp.concatenate([up, first], -1))
        low = nn.Conv(6, (3, 3), strides=2, name="again")(x)
        up = nn.ConvTranspose(
            4, (3, 3), strides=(2, 2), transpose_kernel=True, name="turned"
        )(low)
        return nn.Conv(2, (1, 1), name="leave")(jnp.concatenate([up, x], -1))


def test_a_unet_with_transposed_convolutions(rng, compilations):
    model = UNet()
    batches = [(normal(rng, 2, 8, 8, 3),) for _ in range(2)]
    params = started(model, rng, *batches[0])["params"]
    table = [
        Kernel(r"turned/kernel", (0, 1, 3)),
        Kernel(r".*kernel", (0, 1, 2)),
    ]

    def apply(params, x):
        return model.apply({"params": params}, x)

    check(apply, KERNELS, table, params, batches, 7, compilations)


class Depthwise(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
        for i in range(2):
            h = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            h = nn.Conv(8, (3, 3), feature_group_count=8, name=f"depth_{i}")(h)
            h = nn.relu(nn.BatchNorm(use_running_average=not train)(h))
            x = x + nn.Conv(8, (1, 1), name=f"point_{i}")(h)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def test_a_depthwise_network_with_batch_norm(rng, compilations):
    model = Depthwise()
    variables = started(model, rng, normal(rng, 2, 8, 8, 3), train=True)
    batches = [(variables["batch_stats"], normal(rng, 2, 8, 8, 3)) for _ in range(2)]
    table = [
        Kernel(r"head/kernel", 0),
        Kernel(r".*kernel", (0, 1, 2)),
    ]

    def apply(params, statistics, x):
        variables = {"params": params, "batch_stats": statistics}
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    check(apply, KERNELS, table, variables["params"], batches, 6, compilations)


class DiTBlock(nnx.Module):
    """Peebles and Xie, arXiv 2212.09748: adaLN-Zero."""

    def __init__(self, width, rngs):
        self.modulation = nnx.Linear(width, 6 * width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=width, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, use_bias=False, use_scale=False, rngs=rngs)

    def __call__(self, x, condition):
        parts = self.modulation(nnx.silu(condition))[:, None]
        shift, scale, gate, shift_2, scale_2, gate_2 = jnp.split(parts, 6, -1)
        h = self.norm(x) * (1 + scale) + shift
        x = x + gate * self.attention(h)
        h = self.norm(x) * (1 + scale_2) + shift_2
        return x + gate_2 * self.down(nnx.gelu(self.up(h)))


def test_a_diffusion_transformer_block(rng, compilations):
    graph, like = nnx.split(nnx.eval_shape(lambda: DiTBlock(16, nnx.Rngs(0))))
    params = nnx.to_pure_dict(drawn(rng, like))
    batches = [(normal(rng, 2, 6, 16), normal(rng, 2, 16)) for _ in range(2)]
    table = [Kernel(r"attention/out/kernel", (0, 1)), Kernel(r".*kernel", 0)]

    def apply(params, x, condition):
        state = nnx.state(nnx.merge(graph, like))
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x, condition)

    check(apply, KERNELS, table, params, batches, 7, compilations)


def test_equinox(rng, compilations):
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        conv: eqx.nn.Conv2d
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP

        def __call__(self, image):
            x = jax.nn.relu(self.conv(image))
            x = x.reshape(x.shape[0], -1).T
            return jax.vmap(self.mlp)(x + self.attention(x, x, x))

    def build(key):
        keys = jax.random.split(key, 3)
        return Model(
            eqx.nn.Conv2d(3, 8, 3, stride=2, padding=1, key=keys[0]),
            eqx.nn.MultiheadAttention(2, 8, key=keys[1]),
            eqx.nn.MLP(8, 4, 16, 2, key=keys[2]),
        )

    params, static = eqx.partition(build(jax.random.key(0)), eqx.is_inexact_array)
    batches = [(normal(rng, 2, 3, 8, 8),) for _ in range(2)]
    rules = cage.Rules([(r".*weight", "int4", "int8")])
    table = [
        Kernel(r"conv/weight", (1, 2, 3)),
        Kernel(r".*weight", 1),
    ]

    def apply(params, images):
        return jax.vmap(eqx.combine(params, static))(images)

    check(apply, rules, table, params, batches, 8, compilations)


def test_haiku(rng, compilations):
    hk = pytest.importorskip("haiku")

    def forward(x):
        h = hk.Conv2D(8, 3, stride=2)(x)
        h = hk.LayerNorm(-1, True, True)(jax.nn.relu(h)).reshape(len(x), -1, 8)
        h = h + hk.MultiHeadAttention(2, 4, w_init=hk.initializers.RandomNormal())(
            h, h, h
        )
        return hk.nets.MLP([16, 4])(h)

    model = hk.without_apply_rng(hk.transform(forward))
    batches = [(normal(rng, 2, 8, 8, 3),) for _ in range(2)]
    params = drawn(rng, jax.eval_shape(model.init, jax.random.key(0), *batches[0]))
    rules = cage.Rules([(r".*/w", "int4", "int8")])
    table = [Kernel(r"conv2_d/w", (0, 1, 2)), Kernel(r".*/w", 0)]
    check(model.apply, rules, table, params, batches, 7, compilations)


def sdf(params, point):
    h = point
    for layer in params[:-1]:
        h = jnp.sin(3 * (h @ layer["kernel"] + layer["bias"]))
    return (h @ params[-1]["kernel"])[0]


def sdf_params(rng):
    widths = [(3, 16), (16, 16), (16, 1)]
    like = [
        {
            "kernel": jax.ShapeDtypeStruct(s, "float32"),
            "bias": jax.ShapeDtypeStruct(s[1:], "float32"),
        }
        for s in widths
    ]
    del like[-1]["bias"]
    return drawn(rng, like)


def test_a_distance_with_its_gradient_inside(rng, compilations):
    def losses(params, points, distances):
        """Distances, and the lengths of their gradients, which have to be 1."""
        found, slopes = jax.vmap(jax.value_and_grad(sdf, 1), (None, 0))(params, points)
        return (found - distances) ** 2, (jnp.linalg.norm(slopes, axis=-1) - 1) ** 2

    batches = [(normal(rng, 7, 3), normal(rng, 7)) for _ in range(2)]
    table = [Kernel(r".*kernel", 0)]
    check(losses, KERNELS, table, sdf_params(rng), batches, 5, compilations)
