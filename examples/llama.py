"""A Llama-style language model in Flax NNX: RMSNorm, RoPE, SwiGLU.

Weights are quantized from outside, by `cage_jax.fake_quant(params, rules)`; the inputs
of the linear layers are quantized here, by the `inputs` quantizer, token by token, and
so are the keys and values of attention, by the `kv` quantizer.

The parameters of all layers are stacked, and the layers are one loop: a deep model
compiles as fast as a shallow one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from layout import by_tokens

import cage_jax as cage
from cage_jax.kv_cache import KVCache, quantize_kv


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the hyperparameters it is trained with."""

    layers: int
    width: int
    learning_rate: float
    steps: int
    batch: int = 512
    sequence: int = 512
    microbatch: int = 32
    head_size: int = 128
    hidden_multiple: int = 256
    dtype: str = "bfloat16"

    @property
    def hidden(self) -> int:
        """Width of the SwiGLU, 8/3 of the model's, rounded up."""
        multiple = self.hidden_multiple
        return -(-8 * self.width // (3 * multiple)) * multiple

    @property
    def hadamard(self) -> int:
        """Block of the rotation: 128, or less where the width has no such factor."""
        return min(128, self.width & -self.width, self.hidden & -self.hidden)


def _paper(layers: int, width: int, learning_rate: float, tokens: float) -> Size:
    return Size(layers, width, learning_rate, steps=round(tokens / 512**2))


# The named ones are the CAGE paper's: sizes, learning rates and 100 tokens a parameter.
SIZES = {
    "tiny": Size(1, 64, 3e-3, 60, 8, 64, 8, 32, 64, "float32"),
    "demo": Size(2, 128, 3e-3, 2000, 8, 128, 8, 64, 128, "float32"),
    "30m": _paper(6, 640, 1.2e-3, 3e9),
    "50m": _paper(7, 768, 1.2e-3, 5e9),
    "100m": _paper(8, 1024, 6e-4, 10e9),
    "200m": _paper(10, 1280, 3e-4, 20e9),
    "430m": _paper(13, 1664, 1.5e-4, 43e9),
    "800m": _paper(16, 2048, 7.5e-5, 80e9),
}


FEW_LAYERS = 2


class Llama(nnx.Module):
    """Logits of the next token.

    Args:
      size: the model's dimensions and the dtype of computation; parameters are float32.
      vocabulary: number of tokens.
      inputs: quantizer of the linear layers' inputs, or None.
      kv: quantizer of keys and values, or None.
      rngs: for the initial weights.
    """

    def __init__(
        self,
        size: Size,
        *,
        vocabulary: int = 256,
        inputs: cage.Quantizer | None = None,
        kv: cage.Quantizer | None = None,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(size.dtype)
        self.embedding = nnx.Embed(
            vocabulary,
            size.width,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=dtype,
            rngs=rngs,
        )
        self.depth = size.layers
        layers = [
            Layer(size, inputs=inputs, kv=kv, rngs=rngs) for _ in range(self.depth)
        ]
        states = [nnx.state(layer) for layer in layers]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)
        self.layers = nnx.merge(nnx.graphdef(layers[0]), stacked)
        self.norm = _norm(size, rngs)
        self.head = _linear(size.width, vocabulary, dtype, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens (batch, sequence) to logits (batch, sequence, vocabulary)."""
        # Tokens in one axis: products of two matrices are the fastest on any device.
        x = by_tokens(self.embedding(tokens.reshape(-1)))
        graphdef, stacked = nnx.split(self.layers)

        def one_more(x, state):
            x, _ = nnx.merge(graphdef, state)(x, *tokens.shape)
            return by_tokens(x), None

        # Few layers run faster where they are not a loop.
        x, _ = jax.lax.scan(one_more, x, stacked, unroll=self.depth <= FEW_LAYERS)
        logits = self.head(self.norm(x)).astype(jnp.float32)
        return logits.reshape(*tokens.shape, -1)

    def decode(
        self, tokens: jax.Array, caches: list[KVCache]
    ) -> tuple[jax.Array, list[KVCache]]:
        """The same for one more token: (batch,) to logits (batch, vocabulary).

        Args:
          tokens: the next of each sequence.
          caches: of the tokens before, one a layer; `empty_caches` at first.

        Returns:
          The logits, and the caches with this token in them.
        """
        x, longer = self.embedding(tokens), []
        graphdef, stacked = nnx.split(self.layers)
        for number, cache in enumerate(caches):
            state = jax.tree.map(lambda array: array[number], stacked)  # noqa: B023
            x, cache = nnx.merge(graphdef, state)(x, len(tokens), 1, cache)
            longer.append(cache)
        return self.head(self.norm(x)).astype(jnp.float32), longer

    def empty_caches(self, batch: int, length: int) -> list[KVCache]:
        """Caches with room for `length` tokens of each sequence."""
        return [self.layers.empty_cache(batch, length)] * self.depth


class Layer(nnx.Module):
    """Causal attention, then a SwiGLU, each behind a norm and beside a shortcut."""

    def __init__(
        self,
        size: Size,
        *,
        inputs: cage.Quantizer | None,
        kv: cage.Quantizer | None,
        rngs: nnx.Rngs,
    ):
        dtype, width, hidden = jnp.dtype(size.dtype), size.width, size.hidden
        self.inputs, self.kv = inputs, kv
        self.heads, self.dtype = (width // size.head_size, size.head_size), dtype
        self.attention_norm = _norm(size, rngs)
        self.query = _linear(width, width, dtype, rngs)
        self.key = _linear(width, width, dtype, rngs)
        self.value = _linear(width, width, dtype, rngs)
        self.output = _linear(width, width, dtype, rngs)
        self.mlp_norm = _norm(size, rngs)
        self.gate = _linear(width, hidden, dtype, rngs)
        self.up = _linear(width, hidden, dtype, rngs)
        self.down = _linear(hidden, width, dtype, rngs)

    def __call__(
        self, x: jax.Array, batch: int, sequence: int, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """Maps (batch * sequence, width) to the same shape; with a cache, one token."""
        normed = self._quantized(self.attention_norm(x))
        mixed, cache = self._attention(normed, (batch, sequence, *self.heads), cache)
        x = x + mixed
        return x + self._mlp(self._quantized(self.mlp_norm(x))), cache

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """A cache with room for `length` tokens of each sequence."""
        return KVCache.empty((batch, length, *self.heads), self.kv, self.kv, self.dtype)

    def _attention(self, x, heads, cache):
        start = 0 if cache is None else cache.count
        query = _rotary(self.query(x).reshape(heads), start)
        key = _rotary(self.key(x).reshape(heads), start)
        value = self.value(x).reshape(heads)
        seen: dict[str, Any] = {"is_causal": True}
        if cache is not None:
            cache = cache.append(key, value)
            key, value, mask = cache.read()
            seen = {"mask": mask[None, None]}
        elif self.kv is not None:
            key, value, mask = quantize_kv(key, value, self.kv, self.kv)
            seen = {"mask": mask[None, None]}
        mixed = jax.nn.dot_product_attention(query, key, value, **seen)
        return self.output(self._quantized(mixed.reshape(x.shape))), cache

    def _mlp(self, x):
        return self.down(self._quantized(nnx.silu(self.gate(x)) * self.up(x)))

    def _quantized(self, x):
        return x if self.inputs is None else cage.fake_quant(x, self.inputs)


def _linear(size_in, size_out, dtype, rngs):
    return nnx.Linear(
        size_in,
        size_out,
        use_bias=False,
        dtype=dtype,
        kernel_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )


def _norm(size, rngs):
    return nnx.RMSNorm(size.width, dtype=jnp.dtype(size.dtype), rngs=rngs)


def _rotary(x, start=0, base=10_000.0):
    """Rotates pairs of features of (batch, sequence, heads, size) by position."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    position = (start + jnp.arange(x.shape[1])).astype(jnp.float32)
    angle = position[:, None] * frequency[None, :]
    cosine, sine = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
