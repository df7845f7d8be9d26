"""Folders of compressed-tensors, against transformers and the library itself."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
from cage_jax.export.compressed_tensors import compressed_tensors, read
from cage_jax.export.files import MalformedFileError
from cage_jax.export.tensors import tensors
from cage_jax.llama_config import LlamaConfig
from cage_jax.quantized_array import QuantizedArray

# Those of transformers, PyTorch and torchao, which this project cannot mend.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

CONFIG = LlamaConfig(
    vocabulary=256, width=64, hidden=192, layers=2, heads=4, kv_heads=2, bos=1, eos=(2,)
)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 16))
TOKENIZER = {"tokenizer.json": b"{}", "tokenizer_config.json": b'{"a": 1}'}


def all_kernels(quantizer):
    return cage.Rules([(r"layers/.*/kernel|head/kernel", quantizer), (r".*", None)])


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
        cage.Rules(
            [
                (r".*/(query|key|value)/kernel", cage.ct_w4a16(group_size=32)),
                (r".*/output/kernel", cage.int8(group_size=32)),
                (r".*/(gate|up)/kernel", cage.fp8()),
                (r"head/kernel", cage.ct_w8a8()),
                (r".*", None),
            ]
        ),
        "float32",
    ),
    "several of 4 bits": (
        cage.Rules(
            [
                (
                    r".*/query/kernel",
                    cage.ct_w4a16(scale_dtype="bfloat16", group_size=64),
                ),
                (r".*/(key|value)/kernel", cage.nvfp4()),
                (r".*/(gate|up)/kernel", cage.mxfp4()),
                (r".*", None),
            ]
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


@pytest.fixture
def folder(codes, tmp_path):
    compressed_tensors(codes, CONFIG, tmp_path / "model")
    return tmp_path / "model"


def load(folder, **options):
    return transformers.LlamaForCausalLM.from_pretrained(folder, **options).eval()


def logits_of(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.float().numpy()


def named(tree):
    for place, layer, array in tensors(tree, CONFIG):
        name = place.huggingface.format(layer).removesuffix(".weight")
        yield name, array, place.is_kernel


def assert_same_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert_same_leaves(actual, expected)


def assert_same_leaves(actual, expected):
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


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
    assert_same_trees(read(tmp_path / "model").params, codes)


def test_shards(codes, tmp_path):
    compressed_tensors(codes, CONFIG, tmp_path / "one")
    compressed_tensors(codes, CONFIG, tmp_path / "model", shard_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files[0] == f"model-00001-of-{count:05}.safetensors"
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    merged = {}
    for file in files:
        part = load_file(tmp_path / "model" / file)
        size = sum(tensor.nbytes for tensor in part.values())
        assert size <= 30_000 or len(part) == 1
        assert {index["weight_map"][name] for name in part} == {file}
        merged |= part
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert merged.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    np.testing.assert_array_equal(
        logits_of(load(tmp_path / "model")), logits_of(load(tmp_path / "one"))
    )
    assert_same_trees(read(tmp_path / "model").params, codes)


def test_what_the_configuration_says(params, tmp_path):
    codes = cage.quantize(params, CASES["several"][0])
    compressed_tensors(codes, CONFIG, tmp_path / "model", tokenizer=TOKENIZER)
    content = json.loads((tmp_path / "model/config.json").read_text())
    quantization = content["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    formats = [group["format"] for group in quantization["config_groups"].values()]
    assert formats == [*["pack-quantized"] * 3, "float-quantized"]
    # Layers by their whole names, none of which the class of all would shadow.
    targets = [group["targets"] for group in quantization["config_groups"].values()]
    assert targets[0] == ["lm_head"]
    assert "Linear" not in {name for names in targets for name in names}
    assert sorted(quantization["ignore"]) == [
        f"model.layers.{layer}.mlp.down_proj" for layer in range(2)
    ]
    assert (tmp_path / "model/tokenizer.json").read_bytes() == b"{}"
    tokens = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert tokens == {"bos_token_id": 1, "eos_token_id": 2}
    compressed_tensors(params, CONFIG, tmp_path / "floats")
    content = json.loads((tmp_path / "floats/config.json").read_text())
    assert "quantization_config" not in content


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
    assert_same_trees(again.params, codes)
    expected = llama.logits(cage.dequantize(again.params), TOKENS, CONFIG)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("name", CASES)
def test_codes_there_and_back(name, params, tmp_path):
    rules, dtype = CASES[name]
    codes = cage.quantize(params, rules)
    path = tmp_path / "model"
    compressed_tensors(codes, CONFIG, path, dtype=dtype, tokenizer=TOKENIZER)
    again = read(path)
    assert again.config == CONFIG
    assert again.tokenizer == TOKENIZER
    for (_, array, _), (_, other, _) in zip(named(again.params), named(codes)):
        if not isinstance(other, QuantizedArray):
            other = jnp.asarray(other).astype(dtype).astype(jnp.float32)
            np.testing.assert_array_equal(array, other)
            continue
        # Of few bits they come back with 4, and one scale more stands for none.
        np.testing.assert_array_equal(np.float32(array.codes), np.float32(other.codes))
        assert array.scale.dtype == other.scale.dtype
        np.testing.assert_array_equal(np.float32(array.scale), np.float32(other.scale))
        np.testing.assert_array_equal(cage.dequantize(array), cage.dequantize(other))
        if other.quantizer in PRESETS:
            assert array.quantizer == other.quantizer
            assert_same_trees(array, other)
    compressed_tensors(again.params, CONFIG, tmp_path / "again", dtype=dtype)
    one, other = (
        load_file(tmp_path / n / "model.safetensors") for n in ("model", "again")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


PRESETS = [
    cage.ct_w4a16(group_size=32),
    cage.ct_w4a16(group_size=None),
    cage.ct_w4a16(group_size=32, symmetric=False),
    cage.ct_w4a16(group_size=None, symmetric=False),
    cage.ct_w4a16(group_size=32, scale_dtype="bfloat16"),
    cage.ct_w8a8(),
    cage.fp8(),
    cage.mxfp4(),
    cage.nvfp4(),
]


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
    for place, layer, array in tensors(found.params, config):
        assert array.dtype == jnp.float32
        expected = theirs[place.huggingface.format(layer)].float().numpy()
        np.testing.assert_array_equal(array.T if place.is_kernel else array, expected)


def test_a_head_that_is_the_embedding_again(params, tmp_path):
    config = dataclasses.replace(CONFIG, tied=True)
    tied = {name: part for name, part in params.items() if name != "head"}
    compressed_tensors(tied, config, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    embedding = stored["model.embed_tokens.weight"]
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(stored | {"lm_head.weight": embedding.clone()}, file)
    assert_same_trees(read(tmp_path / "model").params, tied)
    save_file(stored | {"lm_head.weight": embedding + 1}, file)
    with pytest.raises(MalformedFileError, match=r"got \['lm_head.weight'\] too"):
        read(tmp_path / "model")


# --- what cannot be written -----------------------------------------------------------


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (cage.quest(8, hadamard=None), "got midrise8 .*leave it unquantized"),
        (cage.int4(hadamard=32), "hadamard 32.*rotation cannot be folded"),
        (cage.ternary(), "per tensor.*Use that axis: a scale per output"),
        (cage.int4(axis=-1), "axis -1.*Use that axis"),
        (cage.int4(axis=(-2, -1), group_size=(32, 32)), "Use that axis"),
        (cage.q4_1(), "with an offset"),
        (cage.nf4(), "got nf4"),
        (cage.fp8("e5m2"), "got fp8 e5m2"),
        (cage.fp8(group_size=32), "got fp8 e4m3 absmax, group 32"),
        (cage.mxfp8(), "got fp8 e4m3"),
        (cage.mxfp6(), "got fp6"),
    ],
    ids=str,
)
def test_quantizers_that_the_format_lacks(quantizer, message, params, tmp_path):
    rules = cage.Rules([(r"layers/gate/kernel", quantizer), (r".*", None)])
    codes = cage.quantize(params, rules)
    message = r"`layers/0/gate/kernel`: .*ct_w4a16, .*nvfp4 .*" + message
    with pytest.raises(ValueError, match=message):
        compressed_tensors(codes, CONFIG, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_is_refused(params, codes, tmp_path):
    path = tmp_path / "model"
    rules = cage.Rules([(r"embedding/.*", cage.int8(axis=-1)), (r".*", None)])
    with pytest.raises(ValueError, match=r"`embedding/embedding`: .*unquantized"):
        compressed_tensors(cage.quantize(params, rules), CONFIG, path)
    floats = cage.quantize(params, CASES["int4, float32 scales"][0])
    message = r"`head/kernel`: `dtype` must be 'float32' .*got 'bfloat16'"
    with pytest.raises(ValueError, match=message):
        compressed_tensors(floats, CONFIG, path, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"`dtype` must be 'float16' .*got 'bfloat16'"):
        compressed_tensors(codes, CONFIG, path, dtype="bfloat16")
    fp4 = cage.quantize(params, CASES["mxfp4"][0])
    for dtype in ("float32", "float16"):
        with pytest.raises(ValueError, match="`dtype` must be 'bfloat16' for fp4"):
            compressed_tensors(fp4, CONFIG, path, dtype=dtype)
    large = params | {"norm": {"scale": jnp.full(64, 1e6)}}
    with pytest.raises(ValueError, match=r"`norm/scale`: .*'float16', for 1e"):
        compressed_tensors(large, CONFIG, path, dtype="float16")
    with pytest.raises(ValueError, match=r"`dtype` must be one of .*'int8'"):
        compressed_tensors(codes, CONFIG, path, dtype="int8")
    with pytest.raises(ValueError, match="`shard_bytes` must be positive; got 0"):
        compressed_tensors(codes, CONFIG, path, shard_bytes=0)
    with pytest.raises(
        TypeError, match=r"`shard_bytes` must be an int; got 1000000000.0"
    ):
        compressed_tensors(codes, CONFIG, path, shard_bytes=1e9)
    for name in ("../tokenizer.json", "config.json"):
        with pytest.raises(ValueError, match="`tokenizer` must have files of"):
            compressed_tensors(codes, CONFIG, path, tokenizer={name: b""})
    assert not list(tmp_path.iterdir())
    compressed_tensors(codes, CONFIG, path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        compressed_tensors(codes, CONFIG, path)
    compressed_tensors(codes, CONFIG, path, overwrite=True)


# --- what must not be read ------------------------------------------------------------


def change(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *inner, last = name.split("__")
        node = content
        for key in inner:
            node = node[key]
        node[last] = value
    (folder / "config.json").write_text(json.dumps(content))


WEIGHTS = "quantization_config__config_groups__group_0__weights"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_hidden_layers", 3, "layers.2.*must have"),
        ("num_hidden_layers", 2**24, "layers"),
        ("num_hidden_layers", 1, "of a Llama alone; got"),
        ("vocab_size", 255, "shape"),
        ("model_type", "gpt2", "config.json: .*model_type='gpt2'"),
        ("hidden_size", "many", "`width` must be an int"),
        ("quantization_config", 3, "an object"),
        ("quantization_config", None, "of a matrix"),
        ("quantization_config__quant_method", "gptq", "got 'gptq'"),
        ("quantization_config__config_groups", [1], "`config_groups`"),
        ("quantization_config__config_groups", {"a": ["Linear"]}, "objects in"),
        ("quantization_config__transform_config", {"a": 1}, "no `transform_config`"),
        (WEIGHTS, None, "`weights` in"),
        (WEIGHTS + "__num_bits", 3, "of a scheme"),
        (WEIGHTS + "__num_bits", 8, "of a scheme"),
        (WEIGHTS + "__num_bits", [4], "of a scheme"),
        (WEIGHTS + "__group_size", 33, "of a scheme"),
        (WEIGHTS + "__group_size", 0, "of a scheme"),
        (WEIGHTS + "__symmetric", False, "of a scheme"),
        (WEIGHTS + "__type", "float", "of a scheme"),
        (WEIGHTS + "__strategy", ["channel"], "of a scheme"),
    ],
)
def test_configurations_that_are_not_of_the_tensors(name, value, message, folder):
    change(folder, **{name: value})
    with pytest.raises(MalformedFileError, match=message):
        read(folder)


def test_tensors_that_are_not_of_the_configuration(folder):
    file = folder / "model.safetensors"
    # Copies, since the file is written anew below them.
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    module = "model.layers.1.mlp.up_proj"
    shape, scale = stored[f"{module}.weight_shape"], stored[f"{module}.weight_scale"]
    for changes, message in [
        (
            {f"{module}.weight_shape": shape.flip(0)},
            r"`.*up_proj`: weight_shape must be",
        ),
        ({f"{module}.weight_scale": scale[:, :1].clone()}, "of a scheme"),
        ({f"{module}.weight_scale": scale.double()}, "of a scheme"),
        ({f"{module}.weight": torch.zeros(192, 64)}, "of a scheme"),
        ({f"{module}.weight_g_idx": torch.zeros(64)}, "got .*weight_g_idx.* too"),
        ({"model.norm.weight": torch.zeros(64).int()}, "`model.norm`"),
        ({"model.norm.weight": torch.zeros(65)}, "`model.norm`"),
        ({"model.norm.weight_scale": torch.zeros(1)}, "`model.norm`"),
    ]:
        save_file(stored | changes, file)
        with pytest.raises(MalformedFileError, match=message):
            read(folder)
    for name in (
        f"{module}.weight_scale",
        "model.norm.weight",
        f"{module}.weight_shape",
    ):
        save_file({key: value for key, value in stored.items() if key != name}, file)
        with pytest.raises(MalformedFileError, match="must have"):
            read(folder)


def test_shards_made_to_do_harm(codes, tmp_path):
    folder = tmp_path / "model"
    compressed_tensors(codes, CONFIG, folder, shard_bytes=60_000)
    shutil.copy(folder / "model-00001-of-00003.safetensors", tmp_path / "outside")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    places = index["weight_map"]
    name = "model.norm.weight"
    shard = places[name]
    others = {key: file for key, file in places.items() if key != name}
    for changed, message in [
        (dict.fromkeys(places, "../outside"), "must be that of a file beside it"),
        (dict.fromkeys(places, str(tmp_path / "outside")), "must be that of a file"),
        (places | {name: "config.json"}, "must be a safetensors file"),
        (places | {name: "missing"}, "must be a file in the folder"),
        (places | {name: max(places.values())}, "must have the tensors"),
        (places | {name: [shard]}, "must have a `weight_map`"),
        (places | {"another": shard}, "1 missing, .'another'"),
        (others, "must have the tensors"),
        (list(places), "must have a `weight_map`"),
        (None, "must have a `weight_map`"),
    ]:
        path.write_text(json.dumps(index | {"weight_map": changed}))
        with pytest.raises(MalformedFileError, match=message):
            read(folder)
    path.write_text(json.dumps(index))
    assert_same_trees(read(folder).params, codes)
    (folder / shard).unlink()
    with pytest.raises(MalformedFileError, match="must be a file in the folder"):
        read(folder)
    with pytest.raises(MalformedFileError, match=r"config\.json must be"):
        read(tmp_path)


def test_damage_is_seen_or_is_in_the_numbers(folder, rng):
    for name in ("config.json", "model.safetensors"):
        whole = (folder / name).read_bytes()
        for number in range(60):
            damaged = bytearray(whole)
            if number % 3:  # mostly in the header
                damaged[rng.integers(min(len(whole), 5000))] ^= 1 << rng.integers(8)
            else:
                del damaged[rng.integers(len(whole)) :]
            (folder / name).write_bytes(damaged)
            try:
                found = read(folder)
            except MalformedFileError:
                continue
            assert number % 3 or not damaged[-1:].isspace()
            assert found.params.keys() == {"embedding", "layers", "norm", "head"}
        (folder / name).write_bytes(whole)
