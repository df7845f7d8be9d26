"""Perplexity of a Llama on a text, and greedy decoding."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cage_jax.core.finite import check_finite
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.model import logits as logits_of
from cage_jax.llama.tensors import by_path


class Perplexity(NamedTuple):
    """Perplexity of a model on a text.

    Attributes:
      loss: mean negative log-probability of a token, in nats.
      tokens: number of predicted tokens.
    """

    loss: float
    tokens: int

    @property
    def value(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def windows(tokens: Any, context: int) -> np.ndarray:
    """Divides tokens into consecutive windows and drops the rest.

    Args:
      tokens: (count,), ints.
      context: length of a window. A shorter text is one window.

    Returns:
      int32 of shape (windows, context).

    Raises:
      ValueError: if there are fewer than two tokens, so that none is predicted.
    """
    tokens = np.asarray(tokens, np.int32)
    context = min(context, len(tokens))
    if context < 2:
        raise ValueError(
            f"`tokens` and `context` must have at least 2 tokens, since the first is "
            f"not predicted; got {len(tokens)} tokens and context={context}. Pass a "
            f"longer text."
        )
    count = len(tokens) // context
    return tokens[: count * context].reshape(count, context)


def perplexity(
    params: Any,
    tokens: Any,
    config: LlamaConfig,
    *,
    context: int = 512,
    batch: int = 1,
    track: Callable[[Iterator], Iterator] = iter,
    **options: Any,
) -> Perplexity:
    """Computes the perplexity of a text, in windows that do not overlap.

    In each window, every token but the first is predicted from the tokens before it.

    Args:
      params: floats, as in `llama.logits`. Apply `dequantize` to codes first.
      tokens: (count,), ints; an incomplete last window is dropped.
      config: the model's dimensions.
      context: number of tokens in a window.
      batch: number of windows in a batch.
      track: wraps the iterator of batches, to show progress.
      **options: options of `llama.logits`: `dtype`, `inputs`, `kv`.

    Returns:
      A `Perplexity`; its `value` is exp of the mean loss.

    Raises:
      ValueError: if the text has fewer than two tokens, or tokens that are not in the
        model's vocabulary, or if the loss is NaN or infinite.

    Example:
      >>> from cage_jax import llama
      >>> from cage_jax.llama.config import LlamaConfig
      >>> from cage_jax.llama.perplexity import perplexity
      >>> config = LlamaConfig(vocabulary=256, width=64, hidden=192, layers=2, heads=4)
      >>> params = llama.initial_params(config, seed=0)
      >>> perplexity(params, list(b"a text of bytes"), config).tokens
      14
    """
    cut = windows(tokens, context)
    if cut.min() < 0 or cut.max() >= config.vocabulary:
        raise ValueError(
            f"`tokens` must be in [0, {config.vocabulary}), the vocabulary; got "
            f"{cut.min()} to {cut.max()}. Use the model's own tokenizer."
        )
    loss_of = _loss(config, tuple(sorted(options.items())))
    total = 0.0
    parts = [cut[start : start + batch] for start in range(0, len(cut), batch)]
    for part in track(iter(parts)):
        total += float(loss_of(params, jnp.asarray(part)))
    if not math.isfinite(total):
        check_finite(by_path(params), "params")
        raise ValueError(
            f"`params` must give finite logits for the text; got a loss of {total}. "
            f"Look at the last steps of the training, or compute in float32."
        )
    count = cut.size - len(cut)
    return Perplexity(total / count, count)


@functools.lru_cache(maxsize=8)
def _loss(config, options):
    @jax.jit
    def loss(params, tokens):
        logits = logits_of(params, tokens, config, **dict(options))[:, :-1]
        target = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
        return jnp.sum(jax.nn.logsumexp(logits, -1) - target)

    return loss


def greedy(
    params: Any, tokens: Any, config: LlamaConfig, *, count: int, **options: Any
) -> list[int]:
    """Appends the most likely next tokens, one at a time.

    Args:
      params: as in `llama.logits`.
      tokens: (before,), ints: the text to continue, at least one token.
      config: the model's dimensions.
      count: number of tokens to append.
      **options: options of `llama.logits`.

    Returns:
      The new tokens.

    Example:
      >>> from cage_jax import llama
      >>> from cage_jax.llama.config import LlamaConfig
      >>> from cage_jax.llama.perplexity import greedy
      >>> config = LlamaConfig(vocabulary=256, width=64, hidden=192, layers=2, heads=4)
      >>> params = llama.initial_params(config, seed=0)
      >>> len(greedy(params, [1, 2, 3], config, count=4))
      4
    """
    before = len(tokens)
    if before < 1:
        raise ValueError(
            f"`tokens` must have at least one token to continue; got {before}. Pass "
            f"the beginning of the text, or the config's `bos`."
        )
    text = jnp.zeros((1, before + count), jnp.int32)
    text = text.at[0, :before].set(jnp.asarray(tokens, jnp.int32))

    @jax.jit
    def run(params, text):
        def one_more(place, text):
            # The zeros after `place` have no effect, because attention is causal.
            logits = logits_of(params, text, config, **options)
            last = lax.dynamic_index_in_dim(logits, place - 1, 1, keepdims=False)
            return text.at[:, place].set(jnp.argmax(last, -1).astype(text.dtype))

        return lax.fori_loop(before, before + count, one_more, text)

    return np.asarray(run(params, text))[0, before:].tolist()
