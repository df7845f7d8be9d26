"""GGUF files of a Llama, against the package gguf: what is written, and read."""

import dataclasses

import jax
import numpy as np
import pytest
from cases import assert_same, random_codes
from small_llama import (
    CONFIG,
    TIED,
    leaves_by_path,
    on_host,
    params_of,
    with_codes,
    with_leaf,
)

import cage_jax as cage
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export.gguf import gguf, read
from cage_jax.llama.config import LlamaConfig

pytest.importorskip("gguf", reason="needs the extra oracles")

import gguf as ggml
from small_gguf import rewritten

PRESETS = {"Q4_0": cage.q4_0, "Q4_1": cage.q4_1, "Q8_0": cage.q8_0}


def in_float32(codes, axis):
    """Decodes codes in groups of 32: products in float32, and sums."""
    numbers = np.float32(codes.codes) + np.float32(codes.quantizer.format.code_offset)
    values = numbers * np.float32(codes.scale).repeat(32, axis)
    if codes.offset is not None:
        values += np.float32(codes.offset).repeat(32, axis)
    return values


def values_of(tree):
    """Copies a tree, with the values of codes in their place."""
    return jax.tree.map_with_path(
        lambda path, leaf: (
            in_float32(leaf, -1 if path[-1].key == "embedding" else -2)
            if isinstance(leaf, QuantizedArray)
            else leaf
        ),
        tree,
        is_leaf=lambda leaf: isinstance(leaf, QuantizedArray),
    )


# --- blocks ---------------------------------------------------------------------------

IN_LAYERS = {
    "attn_q": "query",
    "attn_k": "key",
    "attn_v": "value",
    "attn_output": "output",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}


def in_their_order(kernel, heads):
    """Turns (in, out) to what llama.cpp has; of each head, neighbours rotate."""
    rows = np.asarray(kernel).T
    size = len(rows) // heads
    order = [
        head * size + pair + half * (size // 2)
        for head in range(heads)
        for pair in range(size // 2)
        for half in range(2)
    ]
    return rows[order]


def in_file(params, name, config):
    """Gives the floats of one tensor as the file has them."""
    if name == "token_embd.weight":
        return params["embedding"]["embedding"]
    if name == "output_norm.weight":
        return params["norm"]["scale"]
    if name == "output.weight":
        return params["head"]["kernel"].T
    _, number, part, _ = name.split(".")
    layer = jax.tree.map(lambda array: array[int(number)], params["layers"])
    if part.endswith("norm"):
        which = {"attn_norm": "attention_norm", "ffn_norm": "mlp_norm"}[part]
        return layer[which]["scale"]
    kernel = layer[IN_LAYERS[part]]["kernel"]
    if part == "attn_q":
        return in_their_order(kernel, config.heads)
    if part == "attn_k":
        return in_their_order(kernel, config.kv_heads)
    return kernel.T


# The kind of each parameter that is quantized: of both with rows in another order, of
# every shape, and of all three.
MIXED = {
    "embedding/embedding": "Q8_0",
    "layers/query/kernel": "Q4_0",
    "layers/key/kernel": "Q4_1",
    "layers/value/kernel": "Q8_0",
    "layers/output/kernel": "Q4_1",
    "layers/gate/kernel": "Q4_0",
    "layers/up/kernel": "Q8_0",
    "layers/down/kernel": "Q4_0",
    "head/kernel": "Q4_0",
}
OTHERS = {
    "embedding/embedding": "Q4_0",
    "layers/query/kernel": "Q8_0",
    "layers/key/kernel": "Q4_1",
    "layers/down/kernel": "Q4_1",
}
# The model, the kinds of what is quantized, the kind of all else, and the number that
# says which kind most of the file is of.
FILES = {
    "grouped": (CONFIG, MIXED, "F32", "MOSTLY_Q4_0"),
    "tied": (TIED, OTHERS, "F32", "ALL_F32"),
    "float16": (CONFIG, {}, "F16", "MOSTLY_F16"),
    "embedding": (CONFIG, {"embedding/embedding": "Q4_1"}, "F16", "MOSTLY_F16"),
}


@pytest.mark.parametrize("name", FILES)
def test_blocks_are_those_of_the_package_and_are_read_again(name, tmp_path):
    config, kinds, other, file_type = FILES[name]
    params = params_of(config)
    rules = [
        (path, PRESETS[kind](axis=-1 if "embedding" in path else -2))
        for path, kind in kinds.items()
    ]
    codes = params
    if rules:
        codes = cage.quantize(params, cage.Rules([*rules, (".*", None)]))
    path = tmp_path / "model.gguf"
    gguf(codes, config, path, float_dtype={"F32": "float32", "F16": "float16"}[other])

    originals, values = on_host(params), on_host(values_of(codes))
    file = ggml.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in file.tensors}
    assert len(stored) == 9 * config.layers + 3 - config.tied
    for tensor_name, tensor in stored.items():
        original = in_file(originals, tensor_name, config)
        expected = in_file(values, tensor_name, config)
        assert tuple(tensor.shape) == original.shape[::-1]  # theirs is reversed
        if original.ndim == 1:
            assert tensor.tensor_type.name == "F32"
            np.testing.assert_array_equal(tensor.data, original)
            continue
        kind = kinds.get(path_of(tensor_name), other)
        assert tensor.tensor_type.name == kind
        blocks = ggml.quants.quantize(original, tensor.tensor_type)
        np.testing.assert_array_equal(tensor.data, blocks)
        if kind == "F16":
            expected = expected.astype(np.float16)
        found = ggml.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found, np.float32(expected))
    said = file.fields["general.file_type"].contents()
    assert said == ggml.LlamaFileType[file_type]

    model = read(path)
    expected = codes
    if other == "F16":
        expected = rounded_to_float16(codes)
    assert_same(model.params, expected)
    assert model.config == config
    assert model.tokenizer == {}


def path_of(name):
    """Says where a tensor of a file is here."""
    if name == "token_embd.weight":
        return "embedding/embedding"
    if name == "output.weight":
        return "head/kernel"
    return f"layers/{IN_LAYERS[name.split('.')[2]]}/kernel"


def rounded_to_float16(tree):
    """Rounds floats to float16, all but norms."""
    found = tree
    for path, leaf in leaves_by_path(tree).items():
        if not path.endswith("scale") and not isinstance(leaf, QuantizedArray):
            leaf = np.asarray(leaf).astype(np.float16).astype(np.float32)
            found = with_leaf(found, path, leaf)
    return found


def test_codes_of_other_presets_that_fit(tmp_path):
    """Symmetric integers in groups of 32 with float16 scales, of up to 8 bits."""
    other = cage.ct_w4a16(group_size=32)
    quantizers = {
        "query": other,
        "key": dataclasses.replace(
            cage.int3(group_size=32), scale_type=other.scale_type
        ),
        "value": dataclasses.replace(cage.q8_0(), format=cage.formats.Integer(6)),
    }
    codes = params_of()
    for name, quantizer in quantizers.items():
        codes = with_codes(codes, f"layers/{name}/kernel", quantizer)
    gguf(codes, CONFIG, tmp_path / "model.gguf")
    again = read(tmp_path / "model.gguf").params["layers"]
    for name, kind in {"query": "q4_0", "key": "q4_0", "value": "q8_0"}.items():
        found, expected = (tree[name]["kernel"] for tree in (again, codes["layers"]))
        assert found.quantizer == getattr(cage, kind)(axis=-2)
        np.testing.assert_array_equal(in_float32(found, -2), in_float32(expected, -2))


def test_fp4_and_ternary_codes(tmp_path):
    """MXFP4, whose zeros have signs here, and ternary codes in groups of 256."""
    config = LlamaConfig(vocabulary=64, width=256, hidden=256, layers=1, heads=2)
    ternary = dataclasses.replace(
        cage.int2(group_size=256), scale_type=cage.q8_0().scale_type
    )
    codes = params_of(config)
    kinds = {"up": ("MXFP4", cage.mxfp4()), "down": ("TQ2_0", ternary)}
    for name, (_, quantizer) in kinds.items():
        codes = with_codes(codes, f"layers/{name}/kernel", quantizer)
    gguf(codes, config, tmp_path / "model.gguf")
    file = ggml.GGUFReader(tmp_path / "model.gguf")
    stored = {tensor.name: tensor for tensor in file.tensors}
    again = read(tmp_path / "model.gguf").params["layers"]
    for name, (kind, _) in kinds.items():
        expected = codes["layers"][name]["kernel"]
        tensor = stored[f"blk.0.ffn_{name}.weight"]
        assert tensor.tensor_type.name == kind
        size = 256 // expected.scale.shape[-2]
        scale = np.asarray(expected.scale).astype(np.float32).repeat(size, -2)
        values = np.asarray(expected.codes).astype(np.float32) * scale
        found = ggml.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found, values[0].T, strict=True)
        for part in ("codes", "scale"):
            assert_same(getattr(again[name]["kernel"], part), getattr(expected, part))


# --- there and back -------------------------------------------------------------------


def test_layers_of_several_kinds_become_floats(tmp_path, rng):
    params = on_host(params_of())
    layers = {
        str(number): jax.tree.map(lambda array: array[number], params["layers"])  # noqa: B023
        for number in range(CONFIG.layers)
    }
    codes = params | {"layers": layers}
    for number, preset in enumerate([cage.q4_0(), cage.q8_0()]):
        down = random_codes(rng, preset, (CONFIG.hidden, CONFIG.width))
        codes = with_leaf(codes, f"layers/{number}/down/kernel", down)
        up = random_codes(rng, cage.q4_0(), (CONFIG.width, CONFIG.hidden))
        codes = with_leaf(codes, f"layers/{number}/up/kernel", up)
    gguf(codes, CONFIG, tmp_path / "model.gguf")
    found = read(tmp_path / "model.gguf").params["layers"]
    assert found["up"]["kernel"].quantizer == cage.q4_0(axis=-2)
    expected = [in_float32(codes["layers"][n]["down"]["kernel"], -2) for n in "01"]
    np.testing.assert_array_equal(found["down"]["kernel"], np.stack(expected))


def test_other_types_become_floats(tmp_path, rng):
    config = LlamaConfig(vocabulary=64, width=256, hidden=256, layers=1, heads=2)
    gguf(on_host(params_of(config)), config, tmp_path / "floats.gguf")
    kinds = {
        "attn_v": "BF16",
        "attn_output": "Q5_1",
        "ffn_gate": "Q4_K",
        "ffn_up": "Q6_K",
        "ffn_down": "IQ4_NL",
        "output": "TQ2_0",
    }
    types = {name: ggml.GGMLQuantizationType[kind] for name, kind in kinds.items()}

    def replace(name, data):
        kind = types.get(name.removeprefix("blk.0.").removesuffix(".weight"))
        if kind is None:
            return data, None
        # Any bytes are numbers of such a type, or infinite, or none.
        block, size = ggml.GGML_QUANT_SIZES[kind]
        shape = (len(data), data.shape[-1] // block * size)
        return rng.integers(0, 256, shape, dtype=np.uint8), kind

    rewritten(tmp_path / "floats.gguf", tmp_path / "others.gguf", replace)
    params = read(tmp_path / "others.gguf").params
    for tensor in ggml.GGUFReader(tmp_path / "others.gguf").tensors:
        name = tensor.name.removeprefix("blk.0.").removesuffix(".weight")
        if name not in kinds:
            continue
        assert tensor.tensor_type == types[name]
        with np.errstate(all="ignore"):
            expected = ggml.quants.dequantize(tensor.data, types[name]).T
        found = leaves_by_path(params)[path_of(tensor.name)]
        found = found if name == "output" else found[0]
        np.testing.assert_array_equal(found, expected, strict=True)


# --- what cannot be written -----------------------------------------------------------

KERNELS = {
    "rotated": dataclasses.replace(cage.q4_0(), hadamard=32),
    "another group": cage.int4(group_size=16),
    "float32 scales": cage.int4(group_size=32),
    "another axis": cage.q4_0(axis=-1),
    "channels": cage.ct_w8a8(),
    "zero point": cage.ct_w4a16(group_size=32, symmetric=False),
    "no integers": dataclasses.replace(
        cage.nf4(group_size=32), scale_type=cage.q8_0().scale_type
    ),
}


def test_codes_that_no_block_holds(tmp_path):
    for name, quantizer in KERNELS.items():
        codes = on_host(with_codes(params_of(), "layers/up/kernel", quantizer))
        remedy = "q4_0, q4_1, q8_0 or mxfp4 along axis -2"
        if name == "rotated":
            remedy += " and hadamard=None"
        text = rf"^`layers/0/up/kernel`: .*got .*{remedy}, or leave"
        with pytest.raises(ValueError, match=text):
            gguf(codes, CONFIG, tmp_path / "model.gguf")
            pytest.fail(name)
        assert list(tmp_path.iterdir()) == [], name


def test_other_things_that_cannot_be_written(tmp_path):
    path, params = tmp_path / "model.gguf", on_host(params_of())
    head = {"kernel": params["head"]["kernel"] + np.float32(1e5)}
    many = dataclasses.replace(CONFIG, eos=(1, 2, 3, 4))
    for codes, config, options, text in [
        (
            with_codes(params, "norm/scale", cage.q8_0(axis=-1)),
            CONFIG,
            {},
            r"^`norm/scale`: norms must be floats",
        ),
        (
            with_codes(params, "embedding/embedding", cage.q8_0()),
            CONFIG,
            {},
            r"^`embedding/embedding`: .*mxfp4 along axis -1",
        ),
        (
            params,
            CONFIG,
            {"float_dtype": "bfloat16"},
            "`float_dtype` must be one of",
        ),
        (
            params | {"head": head},
            CONFIG,
            {"float_dtype": "float16"},
            r"^`head/kernel`: floats .*float_dtype='flo",
        ),
        (params, many, {}, "`config` must have at most 3"),
    ]:
        with pytest.raises(ValueError, match=text):
            gguf(codes, config, path, **options)
            pytest.fail(text)
        assert list(tmp_path.iterdir()) == [], text
    gguf(params, CONFIG, path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        gguf(params, CONFIG, path)
    gguf(params, CONFIG, path, overwrite=True)
