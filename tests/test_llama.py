"""The Llama in Flax, against float64 NumPy."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import scipy.special
from small_llama import CONFIG, TIED, on_host, params_of

import cage_jax as cage

llama = pytest.importorskip("cage_jax.llama.model", reason="the model needs flax")


def normed(x, scale, epsilon):
    """Divides by the root of the mean square."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def rotated(x, base):
    """Rotates the halves of each head, (sequence, heads, size), by position."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    turn = np.exp(1j * angles)[:, None]
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(x, layer, config):
    """Mixes the tokens of one sequence, each with those before it."""
    shape = (len(x), -1, config.head_size)
    query, key, value = (
        (x @ layer[name]["kernel"]).reshape(shape) for name in ("query", "key", "value")
    )
    query, key = (rotated(part, config.rope_theta) for part in (query, key))
    key, value = (
        part.repeat(config.heads // config.kv_heads, axis=1) for part in (key, value)
    )
    weights = np.einsum("qhs,khs->hqk", query, key) / np.sqrt(config.head_size)
    weights = np.where(np.tri(len(x)), weights, -np.inf)
    mixed = np.einsum("hqk,khs->qhs", scipy.special.softmax(weights, axis=-1), value)
    return mixed.reshape(len(x), -1) @ layer["output"]["kernel"]


def expected_logits(params, tokens, config):
    """Computes the logits of one sequence."""
    params = jax.tree.map(np.float64, on_host(params))
    norm = functools.partial(normed, epsilon=config.norm_epsilon)
    x = params["embedding"]["embedding"][tokens]
    for number in range(config.layers):
        layer = jax.tree.map(lambda array: array[number], params["layers"])  # noqa: B023
        x = x + attention(norm(x, layer["attention_norm"]["scale"]), layer, config)
        inputs = norm(x, layer["mlp_norm"]["scale"])
        gate = inputs @ layer["gate"]["kernel"]
        up = inputs @ layer["up"]["kernel"]
        x = x + (gate * scipy.special.expit(gate) * up) @ layer["down"]["kernel"]
    table = params["embedding"]["embedding"].T
    head = table if config.tied else params["head"]["kernel"]
    return norm(x, params["norm"]["scale"]) @ head


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["grouped", "tied"])
def test_logits(config, rng):
    tokens = rng.integers(0, config.vocabulary, (2, 20), dtype=np.int32)
    params = params_of(config)
    found = jax.jit(functools.partial(llama.logits, config=config))(params, tokens)
    expected = np.stack([expected_logits(params, line, config) for line in tokens])
    # Sums of 64 to 128 terms in float32, two layers of them.
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6 * abs(expected).max())


def test_the_input_of_a_head_is_rounded_by_rules_alone(rng):
    config, inputs = dataclasses.replace(CONFIG, vocabulary=64), cage.int8()
    tokens, params = rng.integers(0, 64, (2, 8), dtype=np.int32), params_of(config)

    @jax.jit
    def found(params):
        rules = cage.Rules([(r"(layers/.*|head)/kernel", cage.int4(axis=-2), inputs)])
        by_rules = cage.quantize_activations(llama.logits, rules)
        return by_rules(params, tokens, config)

    @jax.jit
    def by_the_option(params):
        return llama.logits(params, tokens, config, inputs=inputs)

    hidden = by_the_option({**params, "head": {"kernel": np.eye(64, dtype="float32")}})
    bound = abs(np.asarray(hidden, np.float64)).max(-1, keepdims=True)
    rounded = np.rint(hidden / bound * 127) * bound / 127
    head = np.asarray(params["head"]["kernel"], np.float64)
    # Sums of 64 terms in float32.
    np.testing.assert_allclose(found(params), rounded @ head, rtol=0, atol=1e-5)
    np.testing.assert_allclose(by_the_option(params), hidden @ head, rtol=0, atol=1e-5)


def test_weights_of_4_bits_with_a_scale_for_each_output(rng):
    """The recipe of GLM-130B: nothing but the kernels of the layers is rounded."""
    tokens, params = rng.integers(0, 320, (2, 8), dtype=np.int32), params_of(CONFIG)
    rules = cage.Rules([(r"layers/.*kernel", cage.int4(axis=-2)), (r".*", None)])
    codes = cage.quantize(params, rules)
    rounded, kernels = [], 0
    for path, x in jax.tree.leaves_with_path(params):
        x = np.asarray(x, np.float64)
        if "layers" in str(path) and "kernel" in str(path):
            scale = np.abs(x).max(-2, keepdims=True) / 7
            x, kernels = np.rint(x / scale) * scale, kernels + 1
        rounded.append(x)
    assert kernels == 7  # of all layers in one array
    values = cage.dequantize(codes)
    for found, expected in zip(jax.tree.leaves(values), rounded):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    run = jax.jit(functools.partial(llama.logits, config=CONFIG))
    trained = run(cage.fake_quant(params, rules), tokens)
    np.testing.assert_array_equal(run(values, tokens), trained)
    change = np.linalg.norm(trained - run(params, tokens)) / np.linalg.norm(trained)
    assert 0 < change < 0.5


def test_suggested_rules_take_the_gate_for_no_router():
    params = jax.eval_shape(lambda: params_of(CONFIG))
    tokens = jax.ShapeDtypeStruct((1, 4), np.int32)
    rules = cage.suggest(llama.logits, params, tokens, CONFIG, show=False)
    kernels = {path for path in CONFIG.shapes() if path.endswith("/kernel")}
    assert kernels - rules.resolved.keys() == {"head/kernel"}
