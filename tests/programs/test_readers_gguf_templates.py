"""Models of several architectures, written by template and run by llama.cpp."""

import re

import numpy as np
import pytest

import cage_jax as cage
from cage_jax import export
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.gguf_tokenizer import metadata_of

pytest.importorskip("torch", reason="transformers needs it")
pytest.importorskip("transformers", reason="computes the same")
pytest.importorskip("compressed_tensors", reason="the models are those of its test")
pytest.importorskip("gguf", reason="needs the extra oracles")
pytest.importorskip("tokenizers", reason="needs the extra demo")

import gguf as ggml
import torch
import transformers
from small_tokenizer import split_tokenizer
from test_readers_gguf import CONFIG, llama_cpp
from test_readers_templates import MODELS, SIZES

# Those of transformers and PyTorch, which this project cannot mend.
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = SIZES | {
    "vocab_size": CONFIG.vocabulary,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# The architectures in llama.cpp; what it computes in one way alone; and keys of some.
ARCHITECTURES = {
    "llama3": ("llama", {}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "mistral": ("llama", {"sliding_window": None}, {}),
    "gemma2": (
        "gemma2",
        {"query_pre_attn_scalar": 40},
        {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4,
        },
    ),
    "phi3": (
        "phi3",
        {"rope_parameters": ROPE, "original_max_position_embeddings": 128},
        {"sliding_window": 0, "rope_scaling_orig_ctx_len": 128},
    ),
    "qwen3_moe": (
        "qwen3moe",
        {"norm_topk_prob": True},
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64},
    ),
}


def zeros_of(path, kind, model, tensors):
    """Writes a file with the metadata of a model, and zeros for its tensors."""
    architecture, _, keys = ARCHITECTURES[kind]
    writer, config = ggml.GGUFWriter(path, architecture), model.config
    for key, value in metadata_of(split_tokenizer(), CONFIG).items():
        found = ggml.GGUFValueType.get_type(value)
        is_int = found == ggml.GGUFValueType.INT32
        writer.add_key_value(key, value, ggml.GGUFValueType.UINT32 if is_int else found)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    for key, value in {
        "context_length": 128,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": size,
        "value_length": size,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": 10000.0,
        "rope_dimension_count": size,
        "vocab_size": config.vocab_size,
        **keys,
    }.items():
        getattr(writer, f"add_{key}")(value)
    (number,) = (n for n, name in ggml.MODEL_ARCH_NAMES.items() if name == architecture)
    known, shapes = ggml.get_tensor_name_map(number, config.num_hidden_layers), {}
    for name, array in tensors.items():
        stacked = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        own = known.get_name(stacked, (".weight", ".bias"))
        shapes[own] = array.shape if stacked == name else (4, *array.shape)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    if kind == "llama3":
        plain = 10000.0 ** -(np.arange(0, size, 2) / size)
        factors = plain / model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rows_of(path):
    """The values of each tensor, decoded by the package."""
    return {
        tensor.name: ggml.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in ggml.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_computes_as_transformers_does(kind, tmp_path):
    name, options = MODELS[kind]
    options = SIZES | options | ARCHITECTURES[kind][1]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.2 * torch.randn_like(each))
    model.save_pretrained(tmp_path / "floats")
    tensors = export.read_tensors(tmp_path / "floats")
    template = tmp_path / "template.gguf"
    zeros_of(template, kind, model, tensors)

    def written(tree, path):
        export.gguf(tree, template, path, names="transformers")
        return path

    path = written(tensors, tmp_path / "floats.gguf")
    words = np.random.default_rng(1).integers(3, CONFIG.vocabulary, 11)
    tokens = [1, *words.tolist()]
    request = {"n_predict": 1, "temperature": 0, "n_probs": 10}
    requests = [request | {"prompt": tokens[:end]} for end in range(4, 12)]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    expected = torch.log_softmax(logits, -1).numpy()
    # There is no answer where a token is a part of a letter.
    apart = [
        abs(top["logprob"] - expected[end - 1, top["id"]])
        for end, answer in enumerate(llama_cpp(path, requests), 4)
        if answer["logprobs"]
        for top in answer["logprobs"]["content"][0]["top_logprobs"]
    ]
    # Both sum in float32: seen was 1e-5, and 0.011 with the GELU of Gemma 2, which
    # llama.cpp takes from a table of float16. A wrong row or norm is worth more than 1.
    assert len(apart) >= 40 and max(apart) < (0.05 if kind == "gemma2" else 1e-4)

    # Codes are in the places of the floats that they stand for.
    odd = [re.escape(each) for each, x in tensors.items() if x.shape[-1] % 32]
    rules = [
        ("|".join([r".*mlp\.gate\.weight", *odd]), None),
        (r".*down_proj\.weight", cage.q8_0(axis=-1)),
        (r".*(_proj|lm_head)\.weight", cage.q4_0(axis=-1)),
        (".*", None),
    ]
    codes = cage.quantize(tensors, cage.Rules(rules))
    assert sum(isinstance(leaf, QuantizedArray) for leaf in codes.values()) > 6
    found = rows_of(written(codes, tmp_path / "codes.gguf"))
    values = cage.dequantize(codes)
    for each, array in rows_of(written(values, tmp_path / "values.gguf")).items():
        np.testing.assert_array_equal(found[each], array, each)
