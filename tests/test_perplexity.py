"""Perplexity and greedy text against NumPy on the logits of whole windows."""

import jax.numpy as jnp
import numpy as np
import pytest

from cage_jax.llama_config import LlamaConfig

pytest.importorskip("flax", reason="the model needs flax")

from cage_jax import llama
from cage_jax.perplexity import greedy, perplexity

CONFIG = LlamaConfig(vocabulary=50, width=32, hidden=64, layers=1, heads=2)
PARAMS = llama.initial_params(CONFIG, seed=3)
TOKENS = np.random.default_rng(0).integers(0, 50, 70)


def logits_of(window):
    found = llama.logits(PARAMS, jnp.asarray(window)[None], CONFIG)[0]
    return np.asarray(found, np.float64)


@pytest.mark.parametrize("batch", [1, 2])
def test_perplexity(batch):
    losses = []
    for start in (0, 16, 32, 48):
        window = TOKENS[start : start + 16]
        logits = logits_of(window)
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        losses += [-np.log(chances[i, window[i + 1]]) for i in range(15)]
    found = perplexity(PARAMS, TOKENS, CONFIG, context=16, batch=batch)
    assert found.tokens == 60
    # A sum in float32.
    np.testing.assert_allclose(found.value, np.exp(np.mean(losses)), rtol=1e-6)


def test_a_short_text_is_one_window():
    assert perplexity(PARAMS, TOKENS[:9], CONFIG).tokens == 8


def test_greedy():
    text = TOKENS[:5].tolist()
    for _ in range(6):
        text.append(int(logits_of(text)[-1].argmax()))
    assert greedy(PARAMS, TOKENS[:5], CONFIG, count=6) == text[5:]


def test_refused():
    with pytest.raises(ValueError, match=r"at least 2.* got 1 tokens"):
        perplexity(PARAMS, [1], CONFIG)
    with pytest.raises(ValueError, match=r"must be in \[0, 50\).* got 3 to 50"):
        perplexity(PARAMS, [3, 50], CONFIG)
    with pytest.raises(ValueError, match="one to go on from; got 0"):
        greedy(PARAMS, [], CONFIG, count=1)
