"""A ready-made table of names, against the layouts of those who made the names."""

import json

import numpy as np
import pytest

import cage_jax as cage
from cage_jax import export
from cage_jax.export import TensorName, safetensors_files

# What MaxText calls the weights of Qwen, the names and shapes of transformers, and the
# shapes of MaxText, as its `param_mapping.py` has them: 2 layers of width 48, with 3
# heads of 40 and one of keys, 64 hidden features and 4 experts.
LAYER = {
    "pre_self_attention_layer_norm/scale": ("input_layernorm.weight", (48,), (48,)),
    "post_self_attention_layer_norm/scale": (
        *("post_attention_layernorm.weight", (48,), (48,)),
    ),
    "self_attention/query/kernel": ("self_attn.q_proj.weight", (120, 48), (48, 3, 40)),
    "self_attention/query/bias": ("self_attn.q_proj.bias", (120,), (3, 40)),
    "self_attention/query_norm/scale": ("self_attn.q_norm.weight", (40,), (40,)),
    "self_attention/key/kernel": ("self_attn.k_proj.weight", (40, 48), (48, 1, 40)),
    "self_attention/key/bias": ("self_attn.k_proj.bias", (40,), (1, 40)),
    "self_attention/key_norm/scale": ("self_attn.k_norm.weight", (40,), (40,)),
    "self_attention/value/kernel": ("self_attn.v_proj.weight", (40, 48), (48, 1, 40)),
    "self_attention/value/bias": ("self_attn.v_proj.bias", (40,), (1, 40)),
    "self_attention/out/kernel": ("self_attn.o_proj.weight", (48, 120), (3, 40, 48)),
    "mlp/wi_0/kernel": ("mlp.gate_proj.weight", (64, 48), (48, 64)),
    "mlp/wi_1/kernel": ("mlp.up_proj.weight", (64, 48), (48, 64)),
    "mlp/wo/kernel": ("mlp.down_proj.weight", (48, 64), (64, 48)),
    "moe_block/gate/kernel": ("mlp.gate.weight", (4, 48), (48, 4)),
}
EXPERTS = {
    "moe_block/wi_0": ("mlp.experts.{}.gate_proj.weight", (64, 48)),
    "moe_block/wi_1": ("mlp.experts.{}.up_proj.weight", (64, 48)),
    "moe_block/wo": ("mlp.experts.{}.down_proj.weight", (48, 64)),
}
OTHERS = {
    "token_embedder/embedding": ("model.embed_tokens.weight", (97, 48)),
    "decoder/decoder_norm/scale": ("model.norm.weight", (48,)),
    "decoder/logits_dense/kernel": ("lm_head.weight", (97, 48)),
}


def int4(axis):
    return cage.int4(axis=axis, group_size=8)


THEIRS = cage.Rules([(r".*(mlp|attn)\.\w+_proj\.weight", int4(-1)), (".*", None)])
OURS = cage.Rules(
    [
        (".*(query|key|value|wi_0|wi_1|wo)/kernel", int4(0)),
        (".*out/kernel", int4(-2)),
        (".*", None),
    ]
)


def template_of(folder, weights):
    folder.mkdir()
    safetensors_files.write(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps({"dtype": "float32"}))
    return folder


@pytest.mark.parametrize("layers", ["layers", "layers_{}", "layers/{}"])
def test_names_of_maxtext(layers, rng, tmp_path):
    weights, tree = {}, {}

    def drawn(name, shape):
        weights[name] = rng.standard_normal(shape).astype(np.float32)
        return weights[name].T

    for path, (name, shape) in OTHERS.items():
        array = drawn(name, shape)
        tree[f"params/{path}"] = array.T if path.endswith("embedding") else array
    both = [f"model.layers.{number}." for number in range(2)]
    for path, (name, theirs, ours) in LAYER.items():
        one_by_one = [drawn(layer + name, theirs).reshape(ours) for layer in both]
        if layers == "layers":
            tree[f"params/decoder/layers/{path}"] = np.stack(one_by_one, axis=1)
            continue
        for number, array in enumerate(one_by_one):
            tree[f"params/decoder/{layers.format(number)}/{path}"] = array
    if layers != "layers":  # there they are in a stack of two axes
        for number, layer in enumerate(both):
            for path, (name, shape) in EXPERTS.items():
                stack = [drawn(layer + name.format(n), shape) for n in range(4)]
                place = layers.format(number)
                tree[f"params/decoder/{place}/{path}"] = np.stack(stack)

    folder = template_of(tmp_path / "template", weights)
    export.compressed_tensors(
        cage.quantize(weights, THEIRS), folder, tmp_path / "expected"
    )
    export.compressed_tensors(
        cage.quantize(tree, OURS), folder, tmp_path / "found", names="maxtext_qwen"
    )
    expected, found = (
        safetensors_files.read(tmp_path / name / "model.safetensors")[0]
        for name in ("expected", "found")
    )
    assert found.keys() == expected.keys()
    assert sum(name.endswith("packed") for name in found) == 2 * 7
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], name)


def test_experts_that_are_one_tensor(rng, tmp_path):
    stack = rng.standard_normal((3, 5, 7)).astype(np.float32)
    folder = template_of(tmp_path / "template", {"experts.up": np.zeros_like(stack)})
    tree = {f"{name}/kernel": each.T for name, each in zip("abc", stack)}
    names = [TensorName(r"\w/kernel", "experts.up", "io")]
    export.compressed_tensors(tree, folder, tmp_path / "out", names=names)
    found, _ = safetensors_files.read(tmp_path / "out/model.safetensors")
    np.testing.assert_array_equal(found["experts.up"], stack)
