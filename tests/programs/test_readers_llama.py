"""The Llama in Flax, with the parameters and the logits of transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cage_jax import llama
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.tensors import tensors

CONFIG = LlamaConfig(
    vocabulary=96, width=64, hidden=96, layers=3, heads=4, kv_heads=2, head_size=32
)


@pytest.fixture(scope="module")
def params():
    found = llama.initial_params(CONFIG, seed=0)
    keys = iter(jax.random.split(jax.random.key(1), 40))

    def noisy(x):  # norms are 1 at first, which would hide that they were swapped
        return x + 0.1 * jax.random.normal(next(keys), x.shape)

    return jax.tree.map(noisy, found)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_transformers(params, tied):
    torch = pytest.importorskip("torch", reason="the oracle is in PyTorch")
    transformers = pytest.importorskip("transformers", reason="the oracle")
    config = dataclasses.replace(CONFIG, tied=tied, rope_theta=1e5, norm_epsilon=1e-5)
    params = {name: part for name, part in params.items() if name != "head" or not tied}
    oracle = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**config.to_huggingface())
    ).eval()
    named = {}
    for names, layer, array in tensors(params, config):
        array = np.array(array.T if names.is_kernel else array)
        named[names.huggingface.format(layer)] = torch.from_numpy(array)
    missing, unexpected = oracle.load_state_dict(named, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    oracle.tie_weights()
    tokens = np.random.default_rng(0).integers(0, 96, (2, 20))
    with torch.no_grad():
        expected = oracle(torch.from_numpy(tokens)).logits.numpy()
    logits = llama.logits(params, jnp.asarray(tokens), config)
    # Sums of 64 to 96 terms in another order, three layers of them.
    np.testing.assert_allclose(
        logits, expected, rtol=0, atol=2e-5 * abs(expected).max()
    )
