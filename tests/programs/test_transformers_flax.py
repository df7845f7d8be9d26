"""Flax models of transformers, unedited, at W4A8: all products, outputs, gradients.

The last release that has them is 4.57. It runs with the JAX and Flax of this library,
in an environment of its own: `make test-transformers`.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from w4a8 import check, drawn
from walker import Kernel

import cage_jax as cage

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("as_users_have_it"),
    pytest.mark.skipif(
        not hasattr(transformers, "FlaxGPT2LMHeadModel"),
        reason="Flax models, which transformers 4.57 was the last to have: run "
        "make test-transformers",
    ),
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48}
WORDS = {"vocab_size": 24, "max_position_embeddings": 16}


def outputs_of(model):
    """The model as a function of its parameters."""

    def apply(params, *args):
        return model(*args, params=params, train=False).logits

    return apply


def words(rng):
    return [(jnp.asarray(rng.integers(0, 24, (2, 6))),) for _ in range(2)]


def test_gpt2(rng, compilations):
    config = transformers.GPT2Config(
        vocab_size=24, n_positions=16, n_embd=32, n_layer=2, n_head=4
    )
    model = transformers.FlaxGPT2LMHeadModel(config, _do_init=False)
    params = drawn(rng, model.params_shape_tree)
    rules = cage.Rules(
        [
            (r".*(attn|mlp).*kernel", "int4", "int8"),
            (r"transformer/wte/embedding", "int8", "int8"),
        ]
    )
    table = [  # its layers keep kernels as (out, in)
        Kernel(r".*(c_attn|c_proj|c_fc)/kernel", 1),
        Kernel(r"transformer/wte/embedding", 1, bits=8),
    ]
    check(outputs_of(model), rules, table, params, words(rng), 9, compilations)


def test_llama(rng, compilations):
    config = transformers.LlamaConfig(**SIZES, **WORDS, num_key_value_heads=2)
    model = transformers.FlaxLlamaForCausalLM(config, _do_init=False)
    params = drawn(rng, model.params_shape_tree)
    rules = cage.Rules([(r".*kernel", "int4", "int8")])
    table = [Kernel(r".*_proj/kernel|lm_head/kernel", 0)]
    check(outputs_of(model), rules, table, params, words(rng), 15, compilations)


def test_vit(rng, compilations):
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=5)
    model = transformers.FlaxViTForImageClassification(config, _do_init=False)
    params = drawn(rng, model.params_shape_tree)
    batches = [
        (rng.standard_normal((2, 3, 16, 16)).astype(np.float32),) for _ in range(2)
    ]
    rules = cage.Rules(
        [
            (r".*kernel", "int4", "int8"),
        ]
    )
    table = [
        Kernel(r".*projection/kernel", (0, 1, 2)),
        Kernel(r".*(query|key|value|dense|classifier)/kernel", 0),
    ]
    check(outputs_of(model), rules, table, params, batches, 14, compilations)


def test_bert(rng, compilations):
    config = transformers.BertConfig(**SIZES, **WORDS)
    model = transformers.FlaxBertForMaskedLM(config, _do_init=False)
    params = drawn(rng, model.params_shape_tree)
    rules = cage.Rules(
        [
            (r".*kernel", "int4", "int8"),
            (r".*word_embeddings/embedding", "int8", "int8"),
        ]
    )
    table = [
        Kernel(r".*(query|key|value|dense)/kernel", 0),
        Kernel(r".*word_embeddings/embedding", 1, bits=8),
    ]
    check(outputs_of(model), rules, table, params, words(rng), 14, compilations)
