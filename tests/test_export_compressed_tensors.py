"""Folders of compressed-tensors: what is in them, by hand, and what is read again."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_raises, assert_same
from small_llama import (
    CONFIG,
    arrays_of,
    leaves_by_path,
    on_host,
    params_of,
    with_codes,
    with_kernels,
    with_leaf,
)

import cage_jax as cage
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export import safetensors_files
from cage_jax.export.compressed_tensors import compressed_tensors, read
from cage_jax.llama.tensors import tensors

pytest.importorskip("safetensors", reason="the files are of it")

# The models here have many schemes, to test each.
pytestmark = pytest.mark.filterwarnings("ignore:`codes` must have one quantizer")
TOKENIZER = {"tokenizer.json": b"{}", "tokenizer_config.json": b'{"a": 1}'}

# What a file says of a scheme: the format, the type of codes, their bits, whether they
# have no zero point, what shares a scale, and the size of groups.
PACKED, FP8 = "pack-quantized", "float-quantized"
INT4 = (PACKED, "int", 4, True, "group", 32)
INT4_CHANNEL = (PACKED, "int", 4, True, "channel", None)
INT4_ASYMMETRIC = (PACKED, "int", 4, False, "group", 32)
INT8 = (PACKED, "int", 8, True, "channel", None)
MXFP4 = ("mxfp4-pack-quantized", "float", 4, True, "group", 32)
NVFP4 = ("nvfp4-pack-quantized", "float", 4, True, "tensor_group", 16)

# By the dtype of the model: the quantizer of a parameter, its scheme, and whether it
# comes back with the very quantizer.
MODELS = {
    "integers of 4 bits": (
        "float32",
        {
            "layers/query/kernel": (cage.ct_w4a16(group_size=32), INT4, True),
            "layers/key/kernel": (
                cage.ct_w4a16(group_size=None),
                INT4_CHANNEL,
                True,
            ),
            "layers/value/kernel": (
                cage.ct_w4a16(group_size=32, symmetric=False),
                INT4_ASYMMETRIC,
                True,
            ),
            "layers/output/kernel": (
                cage.ct_w4a16(group_size=None, symmetric=False),
                (PACKED, "int", 4, False, "channel", None),
                True,
            ),
            "layers/gate/kernel": (cage.int4(group_size=32), INT4, False),
            "layers/up/kernel": (cage.q4_0(), INT4, False),
            "layers/down/kernel": (cage.int3(group_size=32), INT4, False),
            "head/kernel": (cage.ternary(axis=-2), INT4_CHANNEL, False),
        },
    ),
    "8 bits": (
        "float32",
        {
            "layers/query/kernel": (cage.ct_w8a8(), INT8, True),
            "layers/value/kernel": (
                cage.int8(group_size=32),
                (PACKED, "int", 8, True, "group", 32),
                False,
            ),
            "layers/key/kernel": (
                cage.int8(symmetric=False),
                (PACKED, "int", 8, False, "channel", None),
                False,
            ),
            "layers/down/kernel": (
                cage.fp8(),
                (FP8, "float", 8, True, "channel", None),
                True,
            ),
        },
    ),
    "bfloat16": (
        "bfloat16",
        {
            "layers/query/kernel": (
                cage.ct_w4a16(group_size=32, scale_dtype="bfloat16"),
                INT4,
                True,
            ),
            "layers/key/kernel": (cage.mxfp4(), MXFP4, True),
            "layers/value/kernel": (cage.nvfp4(), NVFP4, True),
            "layers/gate/kernel": (cage.nvfp4(tensor_divisor=False), NVFP4, False),
            "layers/down/kernel": (cage.mxfp4(), MXFP4, True),
        },
    ),
    "float16": (
        "float16",
        {
            "layers/query/kernel": (cage.ct_w4a16(group_size=32), INT4, True),
            "layers/down/kernel": (cage.ct_w8a8(), INT8, True),
        },
    ),
}


def codes_of(quantizers):
    """Makes the tiny model's parameters, with random codes of these quantizers."""
    codes = params_of()
    for seed, (path, quantizer) in enumerate(quantizers.items()):
        codes = with_codes(codes, path, quantizer, seed)
    return codes


CODES = on_host(with_kernels(cage.ct_w4a16(group_size=32)))


@pytest.fixture
def folder(tmp_path):
    """The tiny model with all kernels at four bits."""
    compressed_tensors(CODES, CONFIG, tmp_path / "model")
    return tmp_path / "model"


def config_of(folder):
    """Reads config.json."""
    return json.loads((folder / "config.json").read_text())


def unpacked(words, bits, count, axis=-1):
    """Unpacks words of 32 bits: the first code in the lowest bits, less the middle."""
    words = np.moveaxis(words, axis, -1).view(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words[..., None] >> shifts & (2**bits - 1)).astype(np.int64)
    codes = codes.reshape(*words.shape[:-1], -1) - 2 ** (bits - 1)
    assert (codes[..., count:] == -(2 ** (bits - 1))).all()  # nothing behind the last
    return np.moveaxis(codes[..., :count], -1, axis)


def unpacked_fp4(data):
    """Unpacks two codes of E2M1 a byte, the first one in the lower half."""
    halves = np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return np.where(halves & 8, -1, 1) * sizes[halves & 7]


def check_tensors(module, stored, array, scheme):
    """Compares what is stored of one matrix with its codes and scales, (out, in)."""
    format, _, bits, symmetric, _, _ = scheme
    stored = {
        name.removeprefix(f"{module}."): part
        for name, part in stored.items()
        if name.startswith(f"{module}.")
    }
    out, inputs = array.shape[::-1]
    numbers, scale = np.float64(array.codes).T, np.asarray(array.scale).T
    names = {"weight_packed", "weight_scale"}
    if format == PACKED:
        assert stored["weight_packed"].dtype == np.int32
        found = unpacked(stored["weight_packed"], bits, inputs)
        assert stored["weight_shape"].tolist() == [out, inputs]
        names |= {"weight_shape"}
        if not symmetric:
            zero_point = unpacked(stored["weight_zero_point"], bits, out, axis=0)
            np.testing.assert_array_equal(zero_point, np.float64(array.zero_point).T)
            names |= {"weight_zero_point"}
    elif format == FP8:
        found, names = stored["weight"], {"weight", "weight_scale"}
        assert found.dtype == jnp.float8_e4m3fn
    else:
        found = unpacked_fp4(stored["weight_packed"])
    np.testing.assert_array_equal(np.float64(found), numbers)
    if scheme == MXFP4:  # exponents alone
        exponents = np.log2(np.float64(scale)) + 127
        np.testing.assert_array_equal(stored["weight_scale"], np.uint8(exponents))
    else:
        assert stored["weight_scale"].dtype == scale.dtype
        np.testing.assert_array_equal(stored["weight_scale"], scale)
    if scheme == NVFP4:
        divisor = array.tensor_divisor
        expected = [1.0] if divisor is None else np.ravel(divisor)
        np.testing.assert_array_equal(
            stored["weight_global_scale"], np.float32(expected), strict=True
        )
        names |= {"weight_global_scale"}
    assert stored.keys() == names


@pytest.mark.parametrize("name", MODELS)
def test_codes_lie_in_the_file_as_they_must(name, tmp_path):
    dtype, cases = MODELS[name]
    codes = codes_of({path: quantizer for path, (quantizer, _, _) in cases.items()})
    if name != "bfloat16":
        codes = on_host(codes)
    path = tmp_path / "model"
    compressed_tensors(codes, CONFIG, path, dtype=dtype, tokenizer=TOKENIZER)
    stored, metadata = safetensors_files.read(path / "model.safetensors")
    assert metadata == {"format": "pt"}
    content = config_of(path)
    assert content["dtype"] == content["torch_dtype"] == dtype
    groups = content["quantization_config"]["config_groups"].values()
    unquantized = []
    for names, layer, array in tensors(codes, CONFIG):
        module = names.huggingface.format(layer).removesuffix(".weight")
        if names.path not in cases:
            expected = np.asarray(array.T if names.is_kernel else array).astype(dtype)
            np.testing.assert_array_equal(
                stored[f"{module}.weight"], expected, strict=True
            )
            unquantized += [module] * names.is_kernel
            continue
        _, scheme, _ = cases[names.path]
        check_tensors(module, stored, array, scheme)
        (group,) = (group for group in groups if module in group["targets"])
        said = group["weights"]
        fields = ("type", "num_bits", "symmetric", "strategy", "group_size")
        assert (group["format"], *map(said.get, fields)) == scheme
        assert said["dynamic"] is False
        assert said.get("scale_dtype") == {
            MXFP4: "torch.uint8",
            NVFP4: "torch.float8_e4m3fn",
        }.get(scheme)
        assert group["input_activations"] is group["output_activations"] is None
    assert sorted(content["quantization_config"]["ignore"]) == sorted(unquantized)

    again = read(path)
    assert again.config == CONFIG
    assert again.tokenizer == TOKENIZER
    found = leaves_by_path(again.params)
    for name, array in leaves_by_path(codes).items():
        if isinstance(array, QuantizedArray):
            _, _, is_preset = cases[name]
            check_codes(found[name], array, is_preset)
        else:
            rounded = np.asarray(array).astype(dtype).astype(np.float32)
            np.testing.assert_array_equal(found[name], rounded, strict=True)
    params = on_host(again.params)
    compressed_tensors(params, CONFIG, tmp_path / "again", dtype=dtype)
    one, other = (tmp_path / n / "model.safetensors" for n in ("model", "again"))
    assert one.read_bytes() == other.read_bytes()


def check_codes(found, expected, is_preset):
    """Compares codes that were read; of few bits they come back with 4."""
    assert isinstance(found, QuantizedArray)
    if is_preset:
        assert_same(found, expected)
    decoded = [
        np.asarray(each.quantizer.format.decode(np.asarray(part), np.float32))
        for each in (found, expected)
        for part in (each.codes, each.zero_point)
        if part is not None
    ]
    half = len(decoded) // 2
    for ours, theirs in zip(decoded[:half], decoded[half:], strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)
    assert found.scale.dtype == expected.scale.dtype
    np.testing.assert_array_equal(found.scale, expected.scale)
    divisor = expected.tensor_divisor
    if divisor is None and found.tensor_divisor is not None:
        divisor = np.ones(found.tensor_divisor.shape)  # which stands for none
    np.testing.assert_array_equal(found.tensor_divisor, divisor)


def test_tied_embeddings(tmp_path):
    config = dataclasses.replace(CONFIG, tied=True)
    tied = {name: part for name, part in CODES.items() if name != "head"}
    compressed_tensors(tied, config, tmp_path / "model")
    found = read(tmp_path / "model")
    assert found.config == config
    assert_same(found.params, tied)
    said = config_of(tmp_path / "model")["quantization_config"]
    assert said["ignore"] == ["lm_head"]


def test_shards(folder, tmp_path):
    compressed_tensors(CODES, CONFIG, tmp_path / "shards", shard_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files[0] == f"model-00001-of-{count:05}.safetensors"
    assert files[-1] == f"model-{count:05}-of-{count:05}.safetensors"
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    merged = {}
    for file in files:
        part, _ = safetensors_files.read(tmp_path / "shards" / file)
        size = sum(tensor.nbytes for tensor in part.values())
        assert size <= 30_000 or len(part) == 1
        assert {index["weight_map"][name] for name in part} == {file}
        merged |= part
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())
    whole = arrays_of(folder)
    assert merged.keys() == whole.keys() == index["weight_map"].keys()
    assert_same(merged, whole)
    assert_same(read(tmp_path / "shards").params, CODES)


def test_what_the_configuration_says(folder, tmp_path):
    said = config_of(folder)["quantization_config"]
    assert said["quant_method"] == "compressed-tensors"
    assert said["quantization_status"] == "compressed"
    assert said["format"] == PACKED
    assert [group["targets"] for group in said["config_groups"].values()] == [
        ["Linear"]
    ]
    assert said["ignore"] == []
    several = on_host(
        codes_of(
            {
                "layers/query/kernel": cage.ct_w4a16(group_size=32),
                "layers/output/kernel": cage.int8(group_size=32),
                "layers/up/kernel": cage.fp8(),
                "head/kernel": cage.ct_w8a8(),
            }
        )
    )
    compressed_tensors(several, CONFIG, tmp_path / "several", tokenizer=TOKENIZER)
    said = config_of(tmp_path / "several")["quantization_config"]
    assert said["format"] == "mixed-precision"
    groups = said["config_groups"]
    assert list(groups) == [f"group_{number}" for number in range(4)]
    formats = [group["format"] for group in groups.values()]
    assert formats == [*["pack-quantized"] * 3, "float-quantized"]
    # Layers by their whole names, none of which the class of all would shadow.
    targets = [group["targets"] for group in groups.values()]
    assert targets[0] == ["lm_head"]
    assert "Linear" not in {name for names in targets for name in names}
    tokens = json.loads((tmp_path / "several/generation_config.json").read_text())
    assert tokens == {"bos_token_id": 1, "eos_token_id": 0}
    compressed_tensors(on_host(params_of()), CONFIG, tmp_path / "floats")
    assert "quantization_config" not in config_of(tmp_path / "floats")


def test_mixed_layers_are_warned_of(tmp_path):
    mixed = on_host(
        codes_of(
            {
                "layers/query/kernel": cage.ct_w4a16(group_size=32),
                "layers/gate/kernel": cage.ct_w8a8(),
                "layers/up/kernel": cage.int8(),  # of the same scheme
            }
        )
    )
    text = r"vLLM.*got several in model.layers.0.self_attn.\(q_proj\|k_proj\|v_proj\)"
    with pytest.warns(UserWarning, match=text + " and 1 more"):
        compressed_tensors(mixed, CONFIG, tmp_path / "mixed")
    assert read(tmp_path / "mixed").config == CONFIG


def test_a_dtype_is_chosen(tmp_path):
    fp4 = on_host(codes_of({"layers/key/kernel": cage.mxfp4()}))
    for name, codes in {"bfloat16": fp4, "float32": CODES}.items():
        compressed_tensors(codes, CONFIG, tmp_path / name)
        assert config_of(tmp_path / name)["dtype"] == name


def test_integers_that_are_not_packed_are_read(tmp_path):
    codes = on_host(with_kernels(cage.ct_w8a8()))
    compressed_tensors(codes, CONFIG, tmp_path)
    stored = arrays_of(tmp_path)
    for name in [name for name in stored if name.endswith("weight_packed")]:
        _, inputs = stored.pop(name.replace("packed", "shape")).tolist()
        plain = unpacked(stored.pop(name), 8, inputs).astype(np.int8)
        stored[name.replace("_packed", "")] = plain
    safetensors_files.write(tmp_path / "model.safetensors", stored)
    content = config_of(tmp_path)
    quantization = content["quantization_config"]
    for part in (quantization, *quantization["config_groups"].values()):
        part["format"] = "int-quantized"
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert_same(read(tmp_path).params, codes)


# --- what cannot be written -----------------------------------------------------------


def test_quantizers_that_the_format_lacks(tmp_path):
    params = on_host(params_of())

    def row(quantizer, message, name="gate"):
        codes = on_host(with_codes(params, f"layers/{name}/kernel", quantizer))
        text = rf"`layers/0/{name}/kernel`: .*ct_w4a16, .*nvfp4 .*" + message
        return (
            lambda: compressed_tensors(codes, CONFIG, tmp_path / "model"),
            ValueError,
            text,
        )

    assert_raises(
        [
            row(cage.quest(8, hadamard=None), "got midrise8 .*leave it unquantized"),
            row(cage.int4(hadamard=32), "hadamard 32.*rotation cannot be folded"),
            row(cage.ternary(), r"axis \(-2, -1\).*Quantize along the inputs, axis=-2"),
            row(cage.int4(axis=-1), "axis -1.*Quantize along the inputs"),
            row(
                cage.int4(axis=(-2, -1), group_size=(32, 32)),
                "Quantize along the inputs",
            ),
            row(cage.q4_1(), "with an offset"),
            row(cage.nf4(), "got nf4"),
            row(cage.fp8("e5m2"), "got fp8 e5m2"),
            row(cage.fp8(group_size=32), "got fp8 e4m3 absmax, group 32"),
            row(cage.mxfp8(), "got fp8 e4m3"),
            row(cage.mxfp6(), "got fp6"),
        ]
    )
    assert not list(tmp_path.iterdir())


def test_what_is_refused(tmp_path):
    path, params = tmp_path / "model", on_host(params_of())
    embedding = with_codes(params, "embedding/embedding", cage.int8(axis=-1))
    floats = with_codes(params, "head/kernel", cage.int4(group_size=32))
    fp4 = with_codes(params, "layers/up/kernel", cage.mxfp4())
    large = with_leaf(params, "norm/scale", jnp.full(64, 1e6))

    def row(text, codes=CODES, error=ValueError, **options):
        return (
            lambda: compressed_tensors(codes, CONFIG, path, **options),
            error,
            text,
        )

    assert_raises(
        [
            row(r"`embedding/embedding`: .*unquantized", embedding),
            row(
                r"`head/kernel`: `dtype` must be 'float32' .*got 'bfloat16'",
                floats,
                dtype="bfloat16",
            ),
            row(r"`dtype` must be 'float16' .*got 'bfloat16'", dtype="bfloat16"),
            row("`dtype` must be 'bfloat16' for fp4", fp4, dtype="float32"),
            row("`dtype` must be 'bfloat16' for fp4", fp4, dtype="float16"),
            row(r"`norm/scale`: .*'float16', for 1e", large, dtype="float16"),
            row(r"`dtype` must be one of .*'int8'", dtype="int8"),
            row("`shard_bytes` must be at least 1; got 0", shard_bytes=0),
            row(
                r"`shard_bytes` must be an int; got 1000000000.0",
                error=TypeError,
                shard_bytes=1e9,
            ),
            *(
                row("`tokenizer` must have files of", tokenizer={name: b""})
                for name in ("../tokenizer.json", "config.json")
            ),
        ]
    )
    assert not list(tmp_path.iterdir())
    compressed_tensors(CODES, CONFIG, path)
    assert_raises([row("overwrite=True", error=FileExistsError)])
    compressed_tensors(CODES, CONFIG, path, overwrite=True)
