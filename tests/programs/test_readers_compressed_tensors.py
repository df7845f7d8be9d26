"""Folders of compressed-tensors, read and written by transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import along_inputs, assert_same

import cage_jax as cage

pytest.importorskip("torch", reason="transformers needs it")
pytest.importorskip("transformers", reason="reads what is written")
pytest.importorskip("compressed_tensors", reason="reads what is written")
pytest.importorskip("safetensors", reason="reads what is written")
pytest.importorskip("flax", reason="the model needs it")

import torch
import transformers
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file

from cage_jax import llama
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.compressed_tensors import compressed_tensors, read
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.tensors import tensors

# Those of transformers, PyTorch and torchao, which this project cannot mend.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

CONFIG = LlamaConfig(
    vocabulary=256, width=64, hidden=192, layers=2, heads=4, kv_heads=2, bos=1, eos=(2,)
)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 16))


def rules_of(*pairs):
    """Rules of stacked kernels, (layers, in, out)."""
    named = ((path, along_inputs(quantizer)) for path, quantizer in pairs)
    return cage.Rules([*named, (r".*", None)])


def all_kernels(quantizer):
    return rules_of((r"layers/.*/kernel|head/kernel", quantizer))


# The rules, and the dtype of the model.
CASES = {
    "int4": (all_kernels(cage.ct_w4a16(group_size=32)), "float32"),
    "int4 per channel": (all_kernels(cage.ct_w4a16(group_size=None)), "float32"),
    "int4 asymmetric": (
        all_kernels(cage.ct_w4a16(group_size=32, symmetric=False)),
        "float32",
    ),
    "int4 asymmetric per channel": (
        all_kernels(cage.ct_w4a16(group_size=None, symmetric=False)),
        "float32",
    ),
    "int4, a model of float16": (all_kernels(cage.ct_w4a16(group_size=32)), "float16"),
    "int4, a model of bfloat16": (
        all_kernels(cage.ct_w4a16(group_size=32, scale_dtype="bfloat16")),
        "bfloat16",
    ),
    "int4, float32 scales": (all_kernels(cage.int4(group_size=32)), "float32"),
    "int4, scales below 0": (all_kernels(cage.q4_0()), "float32"),
    "int3": (all_kernels(cage.int3(group_size=32)), "float32"),
    "ternary": (all_kernels(cage.ternary(axis=-2)), "float32"),
    "int8": (all_kernels(cage.ct_w8a8()), "float32"),
    "int8, a model of float16": (all_kernels(cage.ct_w8a8()), "float16"),
    "int8 in groups": (all_kernels(cage.int8(group_size=32)), "float32"),
    "int8 asymmetric": (all_kernels(cage.int8(symmetric=False)), "float32"),
    "fp8": (all_kernels(cage.fp8()), "float32"),
    "mxfp4": (all_kernels(cage.mxfp4()), "bfloat16"),
    "nvfp4": (all_kernels(cage.nvfp4()), "bfloat16"),
    "nvfp4 without a tensor's scale": (
        all_kernels(cage.nvfp4(tensor_divisor=False)),
        "bfloat16",
    ),
    "several": (
        rules_of(
            (r".*/(query|key|value)/kernel", cage.ct_w4a16(group_size=32)),
            (r".*/output/kernel", cage.int8(group_size=32)),
            (r".*/(gate|up)/kernel", cage.fp8()),
            (r"head/kernel", cage.ct_w8a8()),
        ),
        "float32",
    ),
    "several of 4 bits": (
        rules_of(
            (r".*/query/kernel", cage.ct_w4a16(scale_dtype="bfloat16", group_size=64)),
            (r".*/(key|value)/kernel", cage.nvfp4()),
            (r".*/(gate|up)/kernel", cage.mxfp4()),
        ),
        "bfloat16",
    ),
}
PLAIN = CASES["int4"][0]


@pytest.fixture(scope="module")
def params():
    found = llama.initial_params(CONFIG, seed=0)
    keys = iter(jax.random.split(jax.random.key(1), 40))
    # Norms are 1 at first, which would hide that they were swapped.
    return jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), found
    )


@pytest.fixture(scope="module")
def codes(params):
    return cage.quantize(params, PLAIN)


def load(folder, **options):
    return transformers.LlamaForCausalLM.from_pretrained(folder, **options).eval()


def logits_of(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.float().numpy()


def named(tree):
    for names, layer, array in tensors(tree, CONFIG):
        name = names.huggingface.format(layer).removesuffix(".weight")
        yield name, array, names.is_kernel


# --- what others read -----------------------------------------------------------------


def words_of(module, stored, array):
    """The codes and zero points (out, in) as the library finds them."""
    shape = array.shape[::-1]
    if f"{module}.weight" in stored:
        return stored[f"{module}.weight"].float(), None
    words = stored[f"{module}.weight_packed"]
    if words.dtype == torch.uint8:
        return unpack_fp4_from_uint8(words, *shape).float(), None
    assert tuple(stored[f"{module}.weight_shape"].tolist()) == shape
    bits = 4 if array.bits <= 4 else 8
    codes, zero = unpack_from_int32(words, bits, torch.Size(shape)), None
    if f"{module}.weight_zero_point" in stored:
        zero = unpack_from_int32(
            stored[f"{module}.weight_zero_point"],
            bits,
            torch.Size((shape[0], array.scale.shape[0])),
            packed_dim=0,
        ).float()
    return codes.float(), zero


@pytest.mark.parametrize("name", CASES)
def test_transformers_has_the_codes_the_weights_and_the_logits(name, params, tmp_path):
    rules, dtype = CASES[name]
    codes = cage.quantize(params, rules)
    compressed_tensors(codes, CONFIG, tmp_path / "model", dtype=dtype)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for module, array, _ in named(codes):
        if isinstance(array, QuantizedArray):
            found, zero_point = words_of(module, stored, array)
            np.testing.assert_array_equal(found.numpy(), np.float32(array.codes).T)
            if zero_point is not None:
                expected = np.float32(array.zero_point).T
                np.testing.assert_array_equal(zero_point.numpy(), expected)
    model = load(tmp_path / "model")
    assert str(model.dtype) == f"torch.{dtype}"
    found = logits_of(model)  # where it decompresses itself
    weights = dict(model.named_parameters())
    values = cage.dequantize(codes)
    for module, array, is_kernel in named(values):
        expected = np.asarray(array.T if is_kernel else array).astype(dtype)
        theirs = weights[f"{module}.weight"].detach()
        assert str(theirs.dtype) == f"torch.{dtype}"
        np.testing.assert_array_equal(theirs.float().numpy(), np.float32(expected))
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), values)
    expected = np.asarray(llama.logits(rounded, jnp.asarray(TOKENS), CONFIG))
    # float32: sums of 64 to 192 terms in another order, two layers of them. Else the
    # model computes in `dtype` throughout, with some ten roundings in a row.
    tolerance = {"float32": 4e-6, "float16": 5e-3, "bfloat16": 4e-2}[dtype]
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=tolerance * abs(expected).max()
    )


def test_scales_of_float16_are_exact_in_a_model_of_float32(codes, tmp_path):
    compressed_tensors(codes, CONFIG, tmp_path / "model", dtype="float16")
    model = load(tmp_path / "model", dtype=torch.float32)
    logits_of(model)
    weights = dict(model.named_parameters())
    for module, array, is_kernel in named(cage.dequantize(codes)):
        if is_kernel:
            theirs = weights[f"{module}.weight"].detach().numpy()
            np.testing.assert_array_equal(theirs, array.T)


def test_tied_embeddings(params, tmp_path):
    config = dataclasses.replace(CONFIG, tied=True)
    tied = {name: part for name, part in params.items() if name != "head"}
    codes = cage.quantize(tied, PLAIN)
    compressed_tensors(codes, config, tmp_path / "model")
    found = logits_of(load(tmp_path / "model"))
    values = cage.dequantize(codes)
    expected = np.asarray(llama.logits(values, jnp.asarray(TOKENS), config))
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6 * abs(expected).max())


def test_shards(codes, tmp_path):
    compressed_tensors(codes, CONFIG, tmp_path / "one")
    compressed_tensors(codes, CONFIG, tmp_path / "model", shard_bytes=30_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    np.testing.assert_array_equal(
        logits_of(load(tmp_path / "model")), logits_of(load(tmp_path / "one"))
    )


# --- what others write ----------------------------------------------------------------


def test_integers_that_are_not_packed(params, tmp_path):
    codes = cage.quantize(params, all_kernels(cage.ct_w8a8()))
    compressed_tensors(codes, CONFIG, tmp_path)
    stored, folder = load_file(tmp_path / "model.safetensors"), tmp_path
    for name in [name for name in stored if name.endswith("weight_packed")]:
        shape = torch.Size(stored.pop(name.replace("packed", "shape")).tolist())
        stored[name.replace("_packed", "")] = unpack_from_int32(
            stored.pop(name), 8, shape
        )
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    quantization = content["quantization_config"]
    for part in (quantization, *quantization["config_groups"].values()):
        part["format"] = "int-quantized"
    (folder / "config.json").write_text(json.dumps(content))
    model = load(folder)  # transformers takes it for what it says
    logits = logits_of(model)
    again = read(folder)
    assert_same(again.params, codes)
    expected = llama.logits(cage.dequantize(again.params), TOKENS, CONFIG)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize(
    "name", ["int4", "int4 asymmetric", "int8", "fp8", "mxfp4", "nvfp4", "several"]
)
def test_a_folder_that_the_library_wrote(name, params, tmp_path):
    rules, dtype = CASES[name]
    codes = cage.quantize(params, rules)
    compressed_tensors(codes, CONFIG, tmp_path / "model", dtype=dtype)
    model = load(tmp_path / "model")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").is_file()
    again = read(tmp_path / "theirs").params
    for (_, array, _), (_, other, _) in zip(named(again), named(codes)):
        if isinstance(other, QuantizedArray):
            assert isinstance(array, QuantizedArray)
            # It has scales in the dtype of the model.
            np.testing.assert_array_equal(
                cage.dequantize(array), cage.dequantize(other)
            )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_a_folder_of_floats_that_transformers_wrote(dtype, tied, size, tmp_path):
    config = dataclasses.replace(CONFIG, tied=tied)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**config.to_huggingface(dtype))
    ).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (size == "5GB") == (tmp_path / "model.safetensors").is_file()
    found = read(tmp_path)
    assert found.config == config
    assert found.tokenizer == {}
    theirs = model.state_dict()
    for names, layer, array in tensors(found.params, config):
        assert array.dtype == jnp.float32
        expected = theirs[names.huggingface.format(layer)].float().numpy()
        np.testing.assert_array_equal(array.T if names.is_kernel else array, expected)
