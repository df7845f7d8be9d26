"""Models of the family of Llama: what transformers computes, and what it reads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle is in PyTorch")
pytest.importorskip("transformers", reason="the oracle")

import torch
import transformers
from flax import nnx

import cage_jax as cage
from cage_jax import llama
from cage_jax.export.compressed_tensors import compressed_tensors
from cage_jax.export.gguf import gguf
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.folding import folded
from cage_jax.llama.tensors import by_path, nested

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama, 3": {"rope_scaling": LLAMA_3, "rope_theta": 500.0},
    "llama, linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": {"sliding_window": 5},
    "qwen2": {"max_window_layers": 2},
    "qwen2, windows": {
        "sliding_window": 5,
        "use_sliding_window": True,
        "max_window_layers": 0,
    },
    "qwen3": {"head_dim": 32},
    "qwen3, tied": {"head_dim": 8, "tie_word_embeddings": True},
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 40))
CODES = cage.Rules(
    [("layers/.*/kernel", cage.ct_w4a16(axis=-2, group_size=32)), (".*", None)]
)


@pytest.fixture(params=FAMILIES)
def theirs(request):
    """A model of transformers with random parameters, its biases and norms too."""
    kind, fields = request.param.split(",")[0], FAMILIES[request.param]
    config = transformers.AutoConfig.for_model(kind, **SIZES, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    return model


def logits_of(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def assert_close(found, expected):
    # Sums of 64 to 128 terms in another order, in two layers.
    bound = 1e-5 * abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


def test_a_folder_of_floats_is_read(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    found = cage.load(tmp_path)
    assert_close(
        llama.logits(found.params, jnp.asarray(TOKENS), found.config), logits_of(theirs)
    )
    config = found.config
    assert LlamaConfig.from_huggingface(config.to_huggingface()) == config
    drawn = llama.initial_params(config, seed=0)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, found.params)


def test_codes_are_read_by_transformers_and_again(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "floats")
    model = cage.load(tmp_path / "floats")
    codes = cage.quantize(model.params, CODES)
    compressed_tensors(codes, model.config, tmp_path / "codes")
    again = cage.load(tmp_path / "codes")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.floats(), cage.dequantize(codes))
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "codes").eval()
    assert read.config.model_type == theirs.config.model_type
    found = llama.logits(again.floats(), jnp.asarray(TOKENS), again.config)
    assert_close(found, logits_of(read))
    with pytest.raises(ValueError, match=r"of a plain Llama; got (qk|rope_sc|window)"):
        gguf(model.params, model.config, tmp_path / "model.gguf")


def test_blocks_and_decoding_compute_the_same(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    params, config, _ = cage.load(tmp_path)
    tokens = jnp.asarray(TOKENS)
    expected = llama.logits(params, tokens, config)
    model = llama.Llama(config, rngs=nnx.Rngs(0))
    nnx.update(model, nnx.State(params))
    step = nnx.jit(lambda model, token, caches: model.decode(token, caches))
    caches, found = model.empty_caches(*TOKENS.shape), []
    for token in tokens.T:
        logits, caches = step(model, token, caches)
        found.append(logits)
    assert_close(np.stack(found, axis=1), np.asarray(expected))
    x = llama.embed(params, tokens)
    for number, block in enumerate(llama.blocks(config)):
        row = jax.tree.map(lambda array: array[number], params["layers"])  # noqa: B023
        x = block.function(row, x)
    np.testing.assert_allclose(model._logits(x), expected, rtol=0, atol=1e-4)


def test_windows_of_a_quantized_cache():
    """Groups of tokens, which the mask of a window must count twice."""
    config = LlamaConfig(
        vocabulary=96, width=64, hidden=96, layers=2, heads=4, context=64, window=5
    )
    tokens, kv = jnp.asarray(TOKENS), cage.int8(axis=-3, group_size=4)
    model = llama.Llama(config, kv=kv, rngs=nnx.Rngs(0))
    params = jax.tree.map(lambda x: 3 * x, nnx.state(model, nnx.Param))
    nnx.update(model, params)
    expected = llama.logits(params, tokens, config, kv=kv)
    step = nnx.jit(lambda model, token, caches: model.decode(token, caches))
    caches, found = model.empty_caches(*TOKENS.shape), []
    for token in tokens.T:
        logits, caches = step(model, token, caches)
        found.append(logits)
    bound = 1e-3 * abs(expected).max()  # a code may round to the other side
    np.testing.assert_allclose(np.stack(found, 1), expected, rtol=0, atol=bound)
    floats = llama.logits(params, tokens, config)
    np.testing.assert_allclose(expected, floats, rtol=0, atol=20 * bound)


def test_a_rotation_is_folded_with_the_bias():
    """What transformers multiplies by codes is what was rotated."""
    config = LlamaConfig(
        vocabulary=96, width=64, hidden=96, layers=2, heads=4, qkv_bias=True
    )
    params = llama.initial_params(config, seed=0)
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    rotated = dataclasses.replace(cage.int8(axis=-2), hadamard=16)
    rules = cage.Rules([(".*output/kernel", rotated), (".*", None)])
    codes = cage.quantize(params, rules)
    plain = cage.dequantize(nested(folded(by_path(codes), config)))
    found = llama.logits(plain, jnp.asarray(TOKENS), config)
    expected = llama.logits(cage.dequantize(codes), jnp.asarray(TOKENS), config)
    assert_close(np.asarray(found), np.asarray(expected))
