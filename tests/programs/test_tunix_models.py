"""Models of tunix, unedited, at W4A8: all products, outputs and gradients."""

import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from w4a8 import check, drawn
from walker import Kernel

import cage_jax as cage
import cage_jax.flax

pytestmark = [
    pytest.mark.usefixtures("as_users_have_it"),
    # What the models do, not this library.
    pytest.mark.filterwarnings("ignore"),
]
LENGTH, WORDS = 6, 24


def logits_of(build, rng):
    """A function of parameters and words, the parameters, and two batches of words."""
    graph, like = nnx.split(nnx.eval_shape(build))

    def apply(params, tokens):
        state = nnx.clone(like)
        nnx.replace_by_pure_dict(state, params)
        positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
        mask = jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
        return nnx.merge(graph, state)(tokens, positions, None, mask)[0]

    batches = [(jnp.asarray(rng.integers(0, WORDS, (2, LENGTH))),) for _ in range(2)]
    return apply, nnx.to_pure_dict(drawn(rng, like)), batches


def test_gemma(rng, compilations):
    gemma = pytest.importorskip("tunix.models.gemma.model")
    config = gemma.ModelConfig(
        num_layers=2,
        num_embed=WORDS,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        final_logit_softcap=30.0,
        attn_logits_soft_cap=50.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        sliding_window_size=4,
        attention_types=(gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL),
        remat_config=gemma.RematConfig.DECODER,
    )
    apply, params, batches = logits_of(
        lambda: gemma.Gemma(config, rngs=nnx.Rngs(0)), rng
    )
    rules = cage.Rules(
        [
            (r".*_einsum/w|.*kernel", "int4", "int8"),
            (r"embedder/input_embedding", "int8", "int8"),
        ]
    )
    table = [
        Kernel(r".*attn/attn_vec_einsum/w", (0, 1)),
        Kernel(r".*attn/q_einsum/w", 1),
        Kernel(r".*attn/kv_einsum/w", 2),
        Kernel(r".*mlp/.*_proj/kernel", 0),
        Kernel(r"embedder/input_embedding", 1, bits=8),
    ]
    check(apply, rules, table, params, batches, 2 * 6 + 1, compilations)


def test_gemma_is_trained_in_three_lines():
    gemma = pytest.importorskip("tunix.models.gemma.model")
    config = gemma.ModelConfig(
        num_layers=2,
        num_embed=WORDS,
        embed_dim=64,
        hidden_dim=96,
        num_heads=4,
        head_dim=16,
        num_kv_heads=2,
        final_logit_softcap=None,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        attention_types=(gemma.AttentionType.GLOBAL,) * 2,
    )
    model = gemma.Gemma(config, rngs=nnx.Rngs(0))
    tokens = jnp.tile(jnp.arange(LENGTH)[None], (2, 1))
    mask = jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
    inputs = tokens, jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape), None, mask

    rules = cage.flax.suggest(model, *inputs, show=False)  # the first line
    tx = cage.cage_adamw(3e-3, rules, strength=1.0)  # the second, for optax.adamw(3e-3)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        def loss(model):
            model = cage.flax.fake_quant(model, rules)  # the third
            logits = model(*inputs)[0][:, :-1]
            return optax.losses.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(train_step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    layers = cage.flax.report(model, rules, *inputs).layers
    quantized = [layer for layer in layers if layer.weight.quantizer is not None]
    # q, kv and output, and the three of the MLP; the tied embedding is left alone.
    assert len(quantized) == 2 * 6
    assert all(each.quantizer for layer in quantized for each in layer.inputs)


def test_qwen3_with_experts(rng, compilations):
    qwen3 = pytest.importorskip("tunix.models.qwen3.model")
    config = qwen3.ModelConfig(
        num_layers=2,
        vocab_size=WORDS,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        norm_eps=1e-6,
        rope_theta=10_000,
        num_experts=3,
        num_experts_per_tok=2,
    )
    apply, params, batches = logits_of(
        lambda: qwen3.Qwen3(config, rngs=nnx.Rngs(0)), rng
    )
    rules = cage.Rules(
        [
            (r".*router/kernel", None),
            (r".*_proj(/w)?|lm_head/w", "int4", "int8"),
        ]
    )
    table = [
        Kernel(r".*attn/o_proj/w", (0, 1)),
        Kernel(r".*attn/[qkv]_proj/w", 0),
        Kernel(r".*mlp/(gate|up|down)_proj", 1),
        Kernel(r"lm_head/w", 0),
    ]
    check(apply, rules, table, params, batches, 2 * (4 + 3 * 3) + 1, compilations)
