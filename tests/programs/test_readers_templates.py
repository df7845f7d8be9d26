"""Models of several architectures, written by template and read by transformers."""

import json

import numpy as np
import pytest

import cage_jax as cage

pytest.importorskip("torch", reason="transformers needs it")
pytest.importorskip("transformers", reason="reads what is written")
pytest.importorskip("compressed_tensors", reason="reads what is written")

import torch
import transformers
from safetensors.torch import load_file, save_file

from cage_jax.core.quantized_array import QuantizedArray

# Those of transformers and PyTorch, which this project cannot mend.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
# The name of the class, and what its configuration has beside the sizes.
MODELS = {
    "llama3": ("Llama", {"rope_parameters": ROPE, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 40, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 4, "head_dim": 24}),
    "gemma2": ("Gemma2", {"head_dim": 40, "sliding_window": 4}),
    "phi3": ("Phi3", {}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"head_dim": 32}),
}
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(3, 97, (2, 12)))
# Two schemes, and layers that stay as they are.
RULES = cage.Rules(
    [
        (r".*experts.*|.*mlp\.gate\.weight|.*embed_tokens.*", None),
        (r"model\.layers\.0\..*o_proj\.weight", None),
        (r".*down_proj\.weight", cage.ct_w8a8(axis=-1)),
        (r".*(proj|lm_head)\.weight", cage.int4(axis=-1, group_size=8)),
        (r".*", None),
    ]
)

# The same in a model of bfloat16, with every kind of scheme that it can have.
SCHEMES = cage.Rules(
    [
        (r".*experts.*|.*embed_tokens.*", None),
        (r".*q_proj\.weight", cage.mxfp4(axis=-1)),
        (r".*o_proj\.weight", cage.nvfp4(axis=-1)),
        (
            r".*(gate|up)_proj\.weight",
            cage.ct_w4a16(
                axis=-1, group_size=32, symmetric=False, scale_dtype="bfloat16"
            ),
        ),
        (r".*", None),
    ]
)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """A random model, whose norms and biases are random too."""
    name, options = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | options))
    found = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for each in found.parameters():
            each.add_(0.05 * torch.randn_like(each))
    return found


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS).logits.float().numpy()


def test_transformers_has_the_weights_and_the_logits(model, tmp_path):
    model.save_pretrained(tmp_path / "floats", max_shard_size="200KB")
    tensors = cage.export.read_tensors(tmp_path / "floats")
    codes = cage.quantize(tensors, RULES)
    codes["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.5)
    cage.export.compressed_tensors(codes, tmp_path / "floats", tmp_path / "codes")
    values = {
        name: np.asarray(cage.dequantize(leaf) if is_codes(leaf) else leaf)
        for name, leaf in codes.items()
    }

    read = type(model).from_pretrained(tmp_path / "codes").eval()
    found = logits_of(read)  # where it decompresses itself

    # The same floats through a folder of floats.
    (tmp_path / "codes/config.json").rename(tmp_path / "codes.json")
    expected_folder = tmp_path / "expected"
    expected_folder.mkdir()
    for file in (tmp_path / "floats").iterdir():
        if file.suffix == ".json":
            (expected_folder / file.name).write_bytes(file.read_bytes())
            continue
        stored = {
            name: torch.from_numpy(values[name].copy()) for name in load_file(file)
        }
        save_file(stored, expected_folder / file.name, {"format": "pt"})
    oracle = type(model).from_pretrained(expected_folder).eval()
    theirs = dict(read.named_parameters())
    for name, expected in oracle.named_parameters():
        np.testing.assert_array_equal(theirs[name].detach(), expected.detach(), name)
    expected = logits_of(oracle)
    assert abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert abs(found - logits_of(model)).max() > 1e-3  # the model has changed

    quantized = [name for name, leaf in codes.items() if is_codes(leaf)]
    content = json.loads((tmp_path / "codes.json").read_text())
    groups = content.pop("quantization_config")["config_groups"].values()
    assert sorted(
        f"{name}.weight" for group in groups for name in group["targets"]
    ) == (sorted(quantized))
    assert content == json.loads((tmp_path / "floats/config.json").read_text())


def test_a_model_of_bfloat16(tmp_path):
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, head_dim=32)
    model = transformers.MistralForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "floats")
    codes = cage.quantize(cage.export.read_tensors(tmp_path / "floats"), SCHEMES)
    cage.export.compressed_tensors(codes, tmp_path / "floats", tmp_path / "codes")
    read = type(model).from_pretrained(tmp_path / "codes").eval()
    assert read.dtype == torch.bfloat16
    logits_of(read)  # where it decompresses itself
    theirs = dict(read.named_parameters())
    assert sum(map(is_codes, codes.values())) == 8
    for name, leaf in codes.items():
        expected = np.asarray(cage.dequantize(leaf) if is_codes(leaf) else leaf)
        assert str(expected.dtype) == "bfloat16"
        found = theirs[name].detach().float().numpy()
        np.testing.assert_array_equal(found, expected.astype(np.float32), name)


# --- models of tunix, which reads the same folders ------------------------------------

WIDTHS = {
    "num_layers": 2,
    "vocab_size": 97,
    "embed_dim": 96,
    "hidden_dim": 160,
    "num_heads": 3,
    "head_dim": 40,
    "num_kv_heads": 1,
    "rope_theta": 10_000,
    "norm_eps": 1e-6,
}


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama3"])
def test_names_of_tunix(family, tmp_path):
    nnx = pytest.importorskip("flax.nnx")
    package = f"tunix.models.{family}"
    module = pytest.importorskip(f"{package}.model")
    reader = pytest.importorskip(f"{package}.params")
    name, _ = MODELS[family]
    sizes = SIZES | {"head_dim": 40, "tie_word_embeddings": False}
    if family == "qwen2":  # which has no other size of heads in transformers
        sizes |= {"head_dim": 32}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.save_pretrained(tmp_path / "floats")
    options = WIDTHS | {"head_dim": sizes["head_dim"]}
    state = nnx.state(
        reader.create_model_from_safe_tensors(
            str(tmp_path / "floats"), module.ModelConfig(**options)
        ),
        nnx.Param,
    )
    rules = cage.Rules(
        [
            (r".*attn/[qkv]_proj/w", cage.int4(axis=0, group_size=8)),
            (r".*attn/o_proj/w", cage.int4(axis=1, group_size=8)),
            (r".*mlp/.*/kernel|lm_head/w", cage.int4(axis=0, group_size=8)),
            (r".*", None),
        ]
    )
    codes = cage.quantize(state, rules)
    cage.export.compressed_tensors(
        codes, tmp_path / "floats", tmp_path / "found", names="tunix"
    )
    rules = cage.Rules(
        [
            (r".*(proj|lm_head)\.weight", cage.int4(axis=-1, group_size=8)),
            (r".*", None),
        ]
    )
    flat = cage.quantize(cage.export.read_tensors(tmp_path / "floats"), rules)
    cage.export.compressed_tensors(flat, tmp_path / "floats", tmp_path / "expected")
    found = load_file(tmp_path / "found/model.safetensors")
    expected = load_file(tmp_path / "expected/model.safetensors")
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def is_codes(leaf):
    return isinstance(leaf, QuantizedArray)
