"""Small networks of images: an MLP, a CNN and a ViT, as functions of their parameters.

All products are with matrices, (inputs, outputs), convolutions too, of patches: so one
quantizer serves all of them, and seeds can be mapped over. What is quantized is under
"inner"; the first and the last layer of the CNN and the ViT are not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import cage_jax as cage

CLASSES = 10
_WIDTH, _HEADS, _BLOCKS, _PATCHES = 32, 2, 2, 4
_CHANNELS = (16, 32)
_HIDDEN = 64

Params = Any
Product = Callable[[jax.Array, jax.Array], jax.Array]  # of inputs and a kernel
init = jax.nn.initializers.he_normal()


class Network(NamedTuple):
    """A network of square images.

    Attributes:
      learning_rate: the peak that it is trained with.
      steps: of a training.
      initial: parameters, of a key and the length of a side.
      logits: (batch, CLASSES), of parameters, images (batch, side, side) and the
        product of inner layers.
    """

    learning_rate: float
    steps: int
    initial: Callable[[jax.Array, int], Params]
    logits: Callable[[Params, jax.Array, Product], jax.Array]


def rules_of(bits: int) -> cage.Rules:
    """QuEST's quantizer for inner kernels, by output, in blocks of 16."""
    quantizer = cage.quest(bits, hadamard=_BLOCK)
    return cage.Rules([(r"inner/.*kernel", quantizer), (".*", None)])


# The inputs of all inner kernels are multiples of it, but for pixels, of which the MLP
# of larger images has not a multiple: those are padded with zeros.
_BLOCK = 16


def product_of(bits: int | None) -> Product:
    """The product of inner layers: of inputs at that many bits, each by itself."""
    if bits is None:
        return jnp.matmul
    quantizer = cage.quest(bits, axis=-1, hadamard=_BLOCK)
    return lambda x, kernel: cage.fake_quant(x, quantizer) @ kernel


def _dense(key, inputs, outputs):
    return {"kernel": init(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}


def _apply(layer, x, product=jnp.matmul):
    return product(x, layer["kernel"]) + layer["bias"]


# --- MLP ------------------------------------------------------------------------------


def _mlp_initial(key, side):
    keys = jax.random.split(key)
    pixels = -(-side * side // _BLOCK) * _BLOCK
    return {
        "inner": {
            "first": _dense(keys[0], pixels, 2 * _WIDTH),
            "second": _dense(keys[1], 2 * _WIDTH, CLASSES),
        }
    }


def _mlp_logits(params, images, product):
    x = images.reshape(len(images), -1)
    layers = params["inner"]
    x = jnp.pad(x, ((0, 0), (0, len(layers["first"]["kernel"]) - x.shape[1])))
    x = jax.nn.relu(_apply(layers["first"], x, product))
    return _apply(layers["second"], x, product)


# --- CNN ------------------------------------------------------------------------------


def _cnn_initial(key, side):
    keys = jax.random.split(key, 4)
    few, many = _CHANNELS
    left = side // 2 // 2
    return {
        "first": _dense(keys[0], 9, few),
        "inner": {
            "convolution": _dense(keys[1], 9 * few, many),
            "dense": _dense(keys[2], left * left * many, _HIDDEN),
        },
        "last": _dense(keys[3], _HIDDEN, CLASSES),
    }


def _cnn_logits(params, images, product):
    x = _pooled(jax.nn.relu(_apply(params["first"], _neighbours(images[..., None]))))
    inner = params["inner"]
    x = _pooled(jax.nn.relu(_apply(inner["convolution"], _neighbours(x), product)))
    x = x.reshape(len(x), -1)
    return _apply(params["last"], jax.nn.relu(_apply(inner["dense"], x, product)))


def _neighbours(x):
    """The 3 x 3 places around each, (batch, side, side, 9 * channels)."""
    side = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate(
        [
            padded[:, row : row + side, column : column + side]
            for row in range(3)
            for column in range(3)
        ],
        axis=-1,
    )


def _pooled(x):
    """The largest of each 2 x 2; an odd last row and column is left out."""
    batch, side, _, channels = x.shape
    half = side // 2
    x = x[:, : 2 * half, : 2 * half].reshape(batch, half, 2, half, 2, channels)
    return x.max((2, 4))


# --- ViT ------------------------------------------------------------------------------


def _vit_initial(key, side):
    keys = iter(jax.random.split(key, 3 + 4 * _BLOCKS))
    patch = -(-side // _PATCHES)
    block = {
        "qkv": (_WIDTH, 3 * _WIDTH),
        "output": (_WIDTH, _WIDTH),
        "up": (_WIDTH, _HIDDEN),
        "down": (_HIDDEN, _WIDTH),
    }
    return {
        "first": _dense(next(keys), patch**2, _WIDTH),
        "places": 0.02 * jax.random.normal(next(keys), (_PATCHES**2, _WIDTH)),
        "inner": [
            {name: _dense(next(keys), *shape) for name, shape in block.items()}
            | {"norms": jnp.ones((2, _WIDTH))}
            for _ in range(_BLOCKS)
        ],
        "norm": jnp.ones(_WIDTH),
        "last": _dense(next(keys), _WIDTH, CLASSES),
    }


def _vit_logits(params, images, product):
    x = _apply(params["first"], _patches(images)) + params["places"]
    for block in params["inner"]:
        heads = _apply(block["qkv"], _normed(x, block["norms"][0]), product)
        heads = heads.reshape(*x.shape[:2], 3, _HEADS, -1)
        mixed = jax.nn.dot_product_attention(*jnp.moveaxis(heads, 2, 0))
        x = x + _apply(block["output"], mixed.reshape(x.shape), product)
        hidden = _apply(block["up"], _normed(x, block["norms"][1]), product)
        x = x + _apply(block["down"], jax.nn.gelu(hidden), product)
    return _apply(params["last"], _normed(x, params["norm"]).mean(1))


def _patches(images):
    """Squares of pixels, (batch, _PATCHES ** 2, pixels); the last ones are padded."""
    batch, side, _ = images.shape
    patch = -(-side // _PATCHES)
    more = patch * _PATCHES - side
    x = jnp.pad(images, ((0, 0), (0, more), (0, more)))
    x = x.reshape(batch, _PATCHES, patch, _PATCHES, patch).swapaxes(2, 3)
    return x.reshape(batch, _PATCHES**2, patch**2)


def _normed(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * scale


NETWORKS = {
    "MLP": Network(1e-2, 2000, _mlp_initial, _mlp_logits),
    "CNN": Network(3e-3, 1000, _cnn_initial, _cnn_logits),
    "ViT": Network(3e-3, 1000, _vit_initial, _vit_logits),
}
