"""A Llama-style language model in Flax NNX: RMSNorm, RoPE, SwiGLU, grouped heads.

`LlamaConfig` says what else it has: the biases of Qwen 2, the norms of Qwen 3,
or the windows of Mistral.

Weights are quantized outside the model, by `cage_jax.fake_quant(params, rules)`. The
model quantizes the inputs of its layers' products token by token with the `inputs`
quantizer, and the keys and values of attention with the `kv` quantizer.

The parameters of all layers are stacked, and the layers run as one loop, so a deep
model compiles as fast as a shallow one.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cage_jax._project import missing
from cage_jax.core.inputs import of_features
from cage_jax.core.quantize import fake_quant
from cage_jax.finetuning.reconstruction.blocks import Block
from cage_jax.llama.config import LlamaConfig
from cage_jax.program.kv_cache import KVCache, quantize_kv
from cage_jax.quantizers.quantizer import Quantizer

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise missing("flax", "cage_jax.llama.model", "flax") from error

FEW_LAYERS = 2


class Llama(nnx.Module):
    """A Llama model, from tokens to the logits of the next token.

    Args:
      config: the model's dimensions.
      dtype: dtype of the computation; parameters and logits are float32.
      inputs: quantizer of the inputs of all linear layers but the head, or None. Where
        the head is quantized too, leave this out and use
        `cage_jax.quantize_activations(logits, rules)`, which follows the rules.
      kv: quantizer of keys and values, or None.
      rngs: random number generators for the initial weights.

    Example:
      >>> from cage_jax.llama.model import Llama
      >>> from cage_jax.llama.config import LlamaConfig
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> config = LlamaConfig(vocabulary=256, width=64, hidden=192, layers=2, heads=4)
      >>> model = Llama(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 8), jnp.int32)).shape
      (1, 8, 256)

    Source: Llama, arXiv 2302.13971; grouped heads, arXiv 2305.13245.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        inputs: Quantizer | None = None,
        kv: Quantizer | None = None,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(dtype)
        self.embedding = nnx.Embed(
            config.vocabulary,
            config.width,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=dtype,
            rngs=rngs,
        )
        self.depth = config.layers
        layers = [
            Layer(config, dtype=dtype, inputs=inputs, kv=kv, rngs=rngs)
            for _ in range(self.depth)
        ]
        states = [nnx.state(layer) for layer in layers]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)
        self.layers = nnx.merge(nnx.graphdef(layers[0]), stacked)
        self.norm = _norm(config.width, config, dtype, rngs)
        self.tied = config.tied
        if not self.tied:
            self.head = _linear(config.width, config.vocabulary, dtype, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens (batch, sequence) to logits (batch, sequence, vocabulary)."""
        # Batch and sequence merge into one axis, because products of two matrices are
        # the fastest on any device.
        x = by_tokens(self.embedding(tokens.reshape(-1)))
        graphdef, stacked = nnx.split(self.layers)

        def one_more(x, state):
            x, _ = nnx.merge(graphdef, state)(x, *tokens.shape)
            return by_tokens(x), None

        # A few layers run faster unrolled.
        x, _ = jax.lax.scan(one_more, x, stacked, unroll=self.depth <= FEW_LAYERS)
        return self._logits(x).reshape(*tokens.shape, -1)

    def decode(
        self, tokens: jax.Array, caches: list[KVCache]
    ) -> tuple[jax.Array, list[KVCache]]:
        """Maps one more token (batch,) to logits (batch, vocabulary).

        Args:
          tokens: the next token of each sequence.
          caches: caches of the earlier tokens, one per layer; initially
            `empty_caches`.

        Returns:
          The logits, and the caches with this token added.
        """
        x, longer = self.embedding(tokens), []
        graphdef, stacked = nnx.split(self.layers)
        for number, cache in enumerate(caches):
            state = jax.tree.map(lambda array: array[number], stacked)  # noqa: B023
            x, cache = nnx.merge(graphdef, state)(x, len(tokens), 1, cache)
            longer.append(cache)
        return self._logits(x), longer

    def empty_caches(self, batch: int, length: int) -> list[KVCache]:
        """Makes caches with room for `length` tokens of each sequence."""
        return [self.layers.empty_cache(batch, length)] * self.depth

    def _logits(self, x):
        head = self.embedding.attend if self.tied else self.head
        return head(self.norm(x)).astype(jnp.float32)


class Layer(nnx.Module):
    """Causal attention, then a SwiGLU, each after a norm and with a residual."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: jnp.dtype,
        inputs: Quantizer | None,
        kv: Quantizer | None,
        rngs: nnx.Rngs,
    ):
        width, hidden = config.width, config.hidden
        self.inputs, self.kv, self.dtype = inputs, kv, dtype
        self.query_shape = config.heads, config.head_size
        self.key_shape = config.kv_heads, config.head_size
        self.rope_theta, self.rope_scaling = config.rope_theta, config.rope_scaling
        queries, keys = math.prod(self.query_shape), math.prod(self.key_shape)
        self.attention_norm = _norm(width, config, dtype, rngs)
        bias = config.qkv_bias
        self.query = _linear(width, queries, dtype, rngs, bias)
        self.key = _linear(width, keys, dtype, rngs, bias)
        self.value = _linear(width, keys, dtype, rngs, bias)
        self.qk_norm, self.window = config.qk_norm, config.window
        if self.qk_norm:
            self.query_norm = _norm(config.head_size, config, dtype, rngs)
            self.key_norm = _norm(config.head_size, config, dtype, rngs)
        self.output = _linear(queries, width, dtype, rngs)
        self.mlp_norm = _norm(width, config, dtype, rngs)
        self.gate = _linear(width, hidden, dtype, rngs)
        self.up = _linear(width, hidden, dtype, rngs)
        self.down = _linear(hidden, width, dtype, rngs)

    def __call__(
        self, x: jax.Array, batch: int, sequence: int, cache: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """Maps (batch * sequence, width) to the same shape; with a cache, one token."""
        normed = self._quantized(self.attention_norm(x))
        mixed, cache = self._attention(normed, (batch, sequence), cache)
        x = x + mixed
        normed = self._quantized(self.mlp_norm(x))
        gated = nnx.silu(self.gate(normed)) * self.up(normed)
        return x + self.down(self._quantized(gated)), cache

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """Makes a cache with room for `length` tokens of each sequence."""
        return KVCache.empty(
            (batch, length, *self.key_shape), self.kv, self.kv, self.dtype
        )

    def _attention(self, x, tokens, cache):
        start = 0 if cache is None else cache.count
        query = self.query(x).reshape(*tokens, *self.query_shape)
        key = self.key(x).reshape(*tokens, *self.key_shape)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query = _rotary(query, start, self.rope_theta, self.rope_scaling)
        key = _rotary(key, start, self.rope_theta, self.rope_scaling)
        value = self.value(x).reshape(*tokens, *self.key_shape)
        mask = None
        if cache is not None:
            cache = cache.append(key, value)
            key, value, mask = cache.read()
        elif self.kv is not None:
            key, value, mask = quantize_kv(key, value, self.kv, self.kv)
        is_causal = mask is None
        if self.window is not None:
            length = tokens[1] if cache is None else cache.length
            places = start + jnp.arange(tokens[1])
            near = places[:, None] - jnp.arange(length)[None, :] < self.window
            # Keys in groups are seen twice, quantized and not.
            near = jnp.tile(near, key.shape[1] // length)
            mask = near if mask is None else mask & near
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=None if mask is None else mask[None, None],
            is_causal=is_causal,
        )
        mixed = mixed.reshape(x.shape[0], math.prod(self.query_shape))
        return self.output(self._quantized(mixed)), cache

    def _quantized(self, x):
        return x if self.inputs is None else fake_quant(x, of_features(self.inputs))


def logits(
    params: Any,
    tokens: jax.Array,
    config: LlamaConfig,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    inputs: Quantizer | None = None,
    kv: Quantizer | None = None,
) -> jax.Array:
    """Computes a `Llama` as a function of its parameters.

    Args:
      params: a dict with the paths and shapes of `config.shapes()`, such as
        `cage_jax.load(path).params` or its values after `dequantize`; or the
        `nnx.state` of a `Llama`.
      tokens: (batch, sequence), ints.
      config: the model's dimensions.
      dtype: as in `Llama`.
      inputs: as in `Llama`.
      kv: as in `Llama`.

    Returns:
      float32 of shape (batch, sequence, vocabulary).

    Example:
      >>> from cage_jax import llama
      >>> from cage_jax.llama.config import LlamaConfig
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> config = LlamaConfig(vocabulary=256, width=64, hidden=192, layers=2, heads=4)
      >>> params = llama.initial_params(config, seed=0)
      >>> llama.logits(params, jnp.zeros((1, 8), jnp.int32), config).shape
      (1, 8, 256)
    """
    abstract = _abstract(Llama, config, jnp.dtype(dtype), inputs, kv)
    return _with_params(abstract, params)(tokens)


def embed(
    params: Any, tokens: jax.Array, *, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Looks up the inputs of a Llama's first layer.

    Args:
      params: as in `logits`.
      tokens: (batch, sequence), ints.
      dtype: as in `Llama`.

    Returns:
      An array (batch, sequence, width) of `dtype`.

    Example:
      >>> from cage_jax import llama
      >>> from cage_jax.llama.config import LlamaConfig
      >>> import jax.numpy as jnp
      >>> config = LlamaConfig(vocabulary=256, width=64, hidden=192, layers=2, heads=4)
      >>> params = llama.initial_params(config, seed=0)
      >>> llama.embed(params, jnp.zeros((1, 8), jnp.int32)).shape
      (1, 8, 64)
    """
    table = _pure(params)["embedding"]["embedding"]
    return jnp.take(jnp.asarray(table, dtype), tokens, axis=0)


def blocks(
    config: LlamaConfig,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    inputs: Quantizer | None = None,
    kv: Quantizer | None = None,
) -> list[Block]:
    """Makes a block of each layer, for `cage_jax.finetuning.reconstruct`.

    The inputs of the first one are those of `embed`, the tokens of a batch.

    Args:
      config: the model's dimensions.
      dtype: as in `Llama`.
      inputs: as in `Llama`; the teacher's layers have none.
      kv: as in `Llama`; the teacher's layers have none.

    Example:
      >>> from cage_jax import llama
      >>> from cage_jax.llama.config import LlamaConfig
      >>> config = LlamaConfig(vocabulary=256, width=64, hidden=192, layers=2, heads=4)
      >>> [block.name for block in llama.blocks(config)]
      ['layers[0]', 'layers[1]']
    """
    function = _layer_of(config, jnp.dtype(dtype), inputs, kv)
    teacher = _layer_of(config, jnp.dtype(dtype), None, None)
    return [Block(function, "layers", row, teacher) for row in range(config.layers)]


@functools.lru_cache(maxsize=16)
def _layer_of(config, dtype, inputs, kv):
    """Returns a layer as a function; one of each kind, so that it is compiled once."""
    abstract = _abstract(Layer, config, dtype, inputs, kv)

    def layer(params, x):
        y, _ = _with_params(abstract, params)(x.reshape(-1, x.shape[-1]), *x.shape[:2])
        return y.reshape(x.shape)

    return layer


def initial_params(config: LlamaConfig, *, seed: int) -> dict[str, Any]:
    """Draws random parameters for `logits`, as a dict.

    Args:
      config: the model's dimensions.
      seed: seed of the random numbers.
    """
    return nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(seed)), nnx.Param))


@functools.lru_cache(maxsize=16)
def _abstract(module, config, dtype, inputs, kv):
    def make():
        rngs = nnx.Rngs(0)
        return module(config, dtype=dtype, inputs=inputs, kv=kv, rngs=rngs)

    return nnx.split(nnx.eval_shape(make))


def _with_params(abstract, params):
    """Returns a module of `_abstract` with its parameters."""
    graphdef, state = abstract
    state = jax.tree.map(lambda leaf: leaf, state)  # replaced in place
    nnx.replace_by_pure_dict(state, _pure(params))
    return nnx.merge(graphdef, state)


def _pure(params):
    return nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params


def by_tokens(x: jax.Array) -> jax.Array:
    """Shards the first axis of `x` along "data", if the mesh has this axis."""
    if "data" not in jax.sharding.get_abstract_mesh().axis_names:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec("data"))


def _linear(size_in, size_out, dtype, rngs, bias=False):
    return nnx.Linear(
        size_in,
        size_out,
        use_bias=bias,
        dtype=dtype,
        kernel_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )


def _norm(size, config, dtype, rngs):
    epsilon = config.norm_epsilon
    return nnx.RMSNorm(size, epsilon=epsilon, dtype=dtype, rngs=rngs)


def _rotary(x, start, base, scaling):
    """Rotates pairs of features of (batch, sequence, heads, size) by position."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequency = scaling.scaled(frequency)
    position = (start + jnp.arange(x.shape[1])).astype(jnp.float32)
    angle = position[:, None] * frequency[None, :]
    cosine, sine = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
