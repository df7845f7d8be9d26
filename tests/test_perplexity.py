"""Perplexity and greedy text against NumPy on the logits of whole windows."""

import jax
import numpy as np
import pytest
from cases import assert_raises

from cage_jax.llama.config import LlamaConfig

pytest.importorskip("flax", reason="the model needs flax")

from cage_jax import llama
from cage_jax.llama.perplexity import greedy, perplexity

CONFIG = LlamaConfig(vocabulary=50, width=32, hidden=64, layers=1, heads=2)
PARAMS = llama.initial_params(CONFIG, seed=3)
TOKENS = np.random.default_rng(0).integers(0, 50, 70)


@jax.jit
def logits_of(windows):
    return llama.logits(PARAMS, windows, CONFIG)


def test_perplexity():
    windows, losses = TOKENS[:64].reshape(4, 16), []
    for window, logits in zip(windows, np.asarray(logits_of(windows), np.float64)):
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        losses += [-np.log(chances[i, window[i + 1]]) for i in range(15)]
    for batch in (1, 2):
        found = perplexity(PARAMS, TOKENS, CONFIG, context=16, batch=batch)
        assert found.tokens == 60
        # A sum in float32.
        np.testing.assert_allclose(found.value, np.exp(np.mean(losses)), rtol=1e-6)


def test_a_short_text_is_one_window():
    assert perplexity(PARAMS, TOKENS[:16], CONFIG).tokens == 15


def test_greedy():
    begin = TOKENS[:5].tolist()
    text = begin + greedy(PARAMS, TOKENS[:5], CONFIG, count=6)
    assert len(text) == 11
    # Each is the likeliest behind those before it, which are all that logits see.
    likeliest = np.asarray(logits_of(np.array([text])))[0].argmax(-1)
    assert text[5:] == likeliest[4:-1].tolist()


def test_refused():
    few, outside = (
        r"at least 2 tokens.* got 1 tokens",
        r"must be in \[0, 50\).* got 3 to 50",
    )
    table = [
        (lambda: perplexity(PARAMS, [1], CONFIG), few),
        (lambda: perplexity(PARAMS, [3, 50], CONFIG), outside),
        (
            lambda: greedy(PARAMS, [], CONFIG, count=1),
            "at least one token to continue; got 0",
        ),
    ]
    assert_raises([(call, ValueError, text) for call, text in table])
