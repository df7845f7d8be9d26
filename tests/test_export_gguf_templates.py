"""Export with a GGUF as template, against the package gguf: kept, replaced, refused."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_raises, assert_same, random_codes
from small_llama import CONFIG, nested, on_host, params_of, with_codes

import cage_jax as cage
from cage_jax import export
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export import TensorName, copying
from cage_jax.export.files import MalformedFileError
from cage_jax.export.gguf import gguf, read
from cage_jax.export.gguf_templates import read_template
from cage_jax.llama.tensors import tensors

pytest.importorskip("gguf", reason="needs the extra oracles")

import gguf as ggml
from small_gguf import DTYPES, TENSORS, file_of

TERNARY = dataclasses.replace(
    cage.int2(axis=-1, group_size=256), scale_type=cage.q8_0().scale_type
)
# Each type of codes, and a quantizer of such codes.
KINDS = {
    "Q4_0": cage.q4_0(axis=-1),
    "Q4_1": cage.q4_1(axis=-1),
    "Q8_0": cage.q8_0(axis=-1),
    "MXFP4": cage.mxfp4(axis=-1),
    "TQ2_0": TERNARY,
}


@pytest.fixture
def template(tmp_path, rng):
    return file_of(tmp_path / "template.gguf", rng)


def stored_in(path):
    """Reads the types and bytes of tensors, with the reader of the package gguf."""
    return {
        tensor.name: (tensor.tensor_type.name, tensor.data)
        for tensor in ggml.GGUFReader(path).tensors
    }


def keys_of(path):
    """Reads the bytes of each key and its value."""
    return {
        field.name: b"".join(part.tobytes() for part in field.parts)
        for field in ggml.GGUFReader(path).fields.values()
        if not field.name.startswith("GGUF.")
    }


def values_of(codes):
    """Decodes codes in blocks along the last axis: in float32, products and sums."""
    numbers = np.asarray(codes.codes).astype(np.float32)
    numbers += np.float32(codes.quantizer.format.code_offset or 0)
    size = numbers.shape[-1] // codes.scale.shape[-1]
    values = numbers * np.asarray(codes.scale).astype(np.float32).repeat(size, -1)
    if codes.offset is not None:
        values += np.float32(codes.offset).repeat(size, -1)
    return values


def same_bits(left, right):
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    return left.tobytes() == right.tobytes()


def test_what_is_not_quantized_is_copied(template, rng, tmp_path):
    weights = export.read_tensors(template)
    assert {n: (x.dtype, x.shape) for n, x in weights.items()} == {
        n: (np.dtype(DTYPES[kind]), shape) for n, (kind, shape) in TENSORS.items()
    }
    places = {
        "token_embd.weight": "TQ2_0",
        "blk.0.attn_q.weight": "Q4_0",
        "blk.0.ffn_up_exps.weight": "MXFP4",
        "blk.0.ffn_up.weight": "Q4_1",
        "blk.0.ffn_down.weight": "TQ2_0",
        "output.weight": "Q8_0",
    }
    codes = {
        name: random_codes(rng, KINDS[places[name]], weights[name].shape)
        if name in places
        else array
        for name, array in weights.items()
    }
    bias = weights["blk.0.attn_q.bias"] + np.float32(1)
    codes |= {"blk.0.attn_q.bias": jnp.asarray(bias, jnp.bfloat16)}
    del codes["rope_freqs.weight"]  # a constant, which no training has
    gguf(codes, template, tmp_path / "out.gguf")
    before, after = stored_in(template), stored_in(tmp_path / "out.gguf")
    assert list(before) == list(after)
    for name, (kind, data) in after.items():
        if name in places:
            assert kind == places[name]
            found = ggml.quants.dequantize(data, ggml.GGMLQuantizationType[kind])
            np.testing.assert_array_equal(found, values_of(codes[name]), strict=True)
        elif name == "blk.0.attn_q.bias":
            rounded = bias.astype(jnp.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(data, rounded, strict=True)
        else:
            assert kind == before[name][0] and same_bits(data, before[name][1]), name
    old, new = keys_of(template), keys_of(tmp_path / "out.gguf")
    changed = {
        "general.file_type": ggml.LlamaFileType.MOSTLY_TQ2_0,
        "general.quantized_by": "cage_jax",
        "general.quantization_version": ggml.GGML_QUANT_VERSION,
    }
    assert new.keys() == old.keys() | changed.keys()
    assert all(new[key] == old[key] for key in old.keys() - changed.keys())
    fields = ggml.GGUFReader(tmp_path / "out.gguf").fields
    assert {key: fields[key].contents() for key in changed} == changed
    again = export.read_tensors(tmp_path / "out.gguf")
    for name in places:
        assert_same(again[name].codes, codes[name].codes)
        assert_same(again[name].scale, codes[name].scale)
        assert_same(again[name].offset, codes[name].offset)


def test_without_codes_it_is_a_copy(rng, tmp_path):
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    gguf(on_host(params_of()), CONFIG, path)
    weights = export.read_tensors(path)
    read = read_template(path)
    assert all(read.holds(name, array) for name, array in weights.items())
    others = {name: weights[name].copy() for name in weights}
    others["blk.0.attn_k.weight"] = weights["blk.0.attn_v.weight"]
    others["blk.0.attn_q.weight"] = weights["blk.0.attn_q.weight"].view(np.int32)
    assert not any(read.holds(name, array) for name, array in others.items())
    gguf(weights, path, again)
    assert again.read_bytes() == path.read_bytes()
    gguf(weights, path, again, overwrite=True)
    # Of another writer it is a copy but for the key that says who wrote it.
    theirs = file_of(tmp_path / "theirs.gguf", rng)
    gguf(export.read_tensors(theirs), theirs, tmp_path / "ours.gguf")
    old, new = keys_of(theirs), keys_of(tmp_path / "ours.gguf")
    assert new.pop("general.quantized_by") and new == old
    with pytest.raises(FileExistsError, match="that no export wrote"):
        gguf(weights, path, theirs, overwrite=True)


def test_copies_in_small_steps(template, tmp_path, monkeypatch):
    """Systems copy less than they are asked for, or have no call for it."""
    calls = []

    def some(old, new, length, begin, place):
        calls.append(length)
        if len(calls) % 2:
            raise OSError
        return os.pwrite(new, os.pread(old, min(length, 1000), begin), place)

    monkeypatch.setattr(os, "copy_file_range", some)
    monkeypatch.setattr(copying, "_AT_ONCE", 700)
    gguf(export.read_tensors(template), template, tmp_path / "out.gguf")
    assert len(calls) > 2 * len(TENSORS)
    before, after = stored_in(template), stored_in(tmp_path / "out.gguf")
    assert all(same_bits(after[name][1], before[name][1]) for name in before)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_there_and_back(kind, rng, tmp_path):
    """What was read as codes is written as the same bytes."""
    tensors = {"a.weight": (kind, (2, 3, 512)), "b.weight": (kind, (5, 256))}
    writer = ggml.GGUFWriter(tmp_path / "a.gguf", "new")
    for name, (_, shape) in tensors.items():
        raw = ggml.GGMLQuantizationType[kind]
        values = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, ggml.quants.quantize(values, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    codes = export.read_tensors(tmp_path / "a.gguf")
    for name, (_, shape) in tensors.items():
        assert isinstance(codes[name], QuantizedArray) and codes[name].shape == shape
    gguf(codes, tmp_path / "a.gguf", tmp_path / "b.gguf")
    before, after = stored_in(tmp_path / "a.gguf"), stored_in(tmp_path / "b.gguf")
    assert all(same_bits(after[name][1], before[name][1]) for name in tensors)


def test_our_llama_is_written_as_with_its_config(tmp_path):
    gguf(on_host(params_of()), CONFIG, tmp_path / "template.gguf")
    codes = params_of()
    for seed, (name, quantizer) in enumerate(
        {"query": cage.q4_0(), "key": cage.q4_1(), "up": cage.mxfp4()}.items()
    ):
        codes = with_codes(codes, f"layers/{name}/kernel", quantizer, seed)
    codes = with_codes(codes, "embedding/embedding", cage.q8_0(axis=-1))
    codes = on_host(codes)
    gguf(codes, CONFIG, tmp_path / "expected.gguf")
    apart = {}
    for names, layer, array in tensors(codes, CONFIG):
        apart[names.path_in(layer)] = array
    expected = stored_in(tmp_path / "expected.gguf")
    for name, tree in {"found": codes, "one by one": nested(apart)}.items():
        gguf(tree, tmp_path / "template.gguf", tmp_path / name)
        found = stored_in(tmp_path / name)
        assert list(found) == list(expected)
        for each, (kind, data) in expected.items():
            assert found[each][0] == kind and same_bits(found[each][1], data), each
        assert_same(
            read(tmp_path / name).params, read(tmp_path / "expected.gguf").params
        )


def test_names_of_transformers(tmp_path):
    params, file = on_host(params_of()), tmp_path / "floats.gguf"
    gguf(params, CONFIG, file)
    export.compressed_tensors(params, CONFIG, tmp_path / "floats")
    weights = export.read_tensors(tmp_path / "floats")
    rules = cage.Rules([(r".*(proj|lm_head)\.weight", KINDS["Q4_1"]), (".*", None)])
    codes = cage.quantize(weights, rules)
    nested_codes = nested({n.replace(".", "/"): codes[n] for n in codes})
    rules = cage.Rules([(r".*/kernel", cage.q4_1(axis=-2)), (".*", None)])
    gguf(cage.quantize(params, rules), CONFIG, tmp_path / "expected.gguf")
    expected = stored_in(tmp_path / "expected.gguf")
    for tree in (codes, nested_codes):
        found = tmp_path / "found.gguf"
        gguf(tree, file, found, names="transformers", overwrite=True)
        found = stored_in(found)
        assert list(found) == list(expected)
        for name, (kind, data) in expected.items():
            assert found[name][0] == kind and same_bits(found[name][1], data), name
    other = {"model.layers.0.self_attn.r_proj.weight": weights["lm_head.weight"]}
    with pytest.raises(ValueError, match=r"r_proj\.weight`: no tensor of"):
        gguf(codes | other, file, tmp_path / "out.gguf", names="transformers")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "MXFP4"])
def test_stacks_that_are_joined(kind, rng, tmp_path):
    fused = {f"blk.{layer}.ffn_up.weight": ("F16", (48, 64)) for layer in range(2)}
    path = file_of(tmp_path / "a.gguf", rng, fused)
    quantizer = dataclasses.replace(KINDS[kind], axis=-2)
    codes = {
        name: random_codes(rng, quantizer, (2, 64, size))
        for name, size in {"gate": 16, "up": 32}.items()
    }
    table = [TensorName("gate|up", "blk.{}.ffn_up.weight", "lio")]
    gguf(codes, path, tmp_path / "b.gguf", names=table)
    values = [
        jax.tree.map(lambda part: np.asarray(part).swapaxes(-1, -2), codes[name])
        for name in codes
    ]
    expected = np.concatenate([values_of(each) for each in values], axis=1)
    for layer, (name, (stored, data)) in enumerate(
        stored_in(tmp_path / "b.gguf").items()
    ):
        assert stored == kind
        found = ggml.quants.dequantize(data, ggml.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(found, expected[layer], name)


def test_experts_by_the_names_of_transformers(rng, tmp_path):
    experts, shape = range(12), (32, 64)
    tensors = {
        "blk.0.ffn_up_exps.weight": ("F32", (12, *shape)),
        "blk.0.ffn_gate_exps.weight": ("F16", (12, *shape)),
        "blk.0.ffn_gate_inp.weight": ("F32", (12, 64)),
    }
    path = file_of(tmp_path / "a.gguf", rng, tensors, "qwen3moe")
    layer = "model.layers.0.mlp"
    up = [random_codes(rng, KINDS["Q4_0"], shape) for _ in experts]
    gate = [rng.standard_normal(shape).astype(np.float16) for _ in experts]
    tree = {f"{layer}.gate.weight": np.ones((12, 64), np.float32)}
    for number in experts:
        tree[f"{layer}.experts.{number}.up_proj.weight"] = up[number]
        tree[f"{layer}.experts.{number}.gate_proj.weight"] = gate[number]
    gguf(tree, path, tmp_path / "b.gguf", names="transformers")
    found = stored_in(tmp_path / "b.gguf")
    kind, data = found["blk.0.ffn_up_exps.weight"]
    assert kind == "Q4_0"
    values = ggml.quants.dequantize(data, ggml.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(values, np.stack([values_of(each) for each in up]))
    np.testing.assert_array_equal(found["blk.0.ffn_gate_exps.weight"][1], gate)
    del tree[f"{layer}.experts.7.up_proj.weight"]
    with pytest.raises(
        ValueError, match=r"for `blk.0.ffn_up_exps.weight` \[12, 32, 64\]"
    ):
        gguf(tree, path, tmp_path / "c.gguf", names="transformers")


# --- rows and norms of other architectures --------------------------------------------

ATTENTION = {
    "blk.0.attn_q.weight": ("F32", (64, 32)),
    "blk.0.attn_k.weight": ("F32", (32, 32)),
    "blk.0.attn_v.weight": ("F32", (32, 32)),
    "blk.0.attn_q.bias": ("F32", (64,)),
    "blk.0.attn_norm.weight": ("F32", (32,)),
    "blk.0.attn_q_norm.weight": ("F32", (16,)),
}
TABLE = [
    TensorName(r"(\d+)/(\w+)/kernel", r"blk.\1.attn_\2.weight", "io"),
    TensorName(r"(\d+)/(\w+)/bias", r"blk.\1.attn_\2.bias"),
    TensorName(r"(\d+)/(\w+)/scale", r"blk.\1.attn_\2.weight"),
]


def paired(rows, heads):
    """Orders rows so that the halves of each head alternate."""
    size = len(rows) // heads
    order = [
        head * size + pair + half * (size // 2)
        for head in range(heads)
        for pair in range(size // 2)
        for half in range(2)
    ]
    return rows[order]


@pytest.mark.parametrize("architecture", ["llama", "granite", "qwen2", "gemma2"])
def test_rows_and_norms_of_an_architecture(architecture, rng, tmp_path):
    heads = {
        f"{architecture}_DOT_attention_DOT_{name}": count
        for name, count in {"head_count": 4, "head_count_kv": 2}.items()
    }
    path = file_of(tmp_path / "a.gguf", rng, ATTENTION, architecture, **heads)
    weights = {
        n: rng.standard_normal(s).astype("f4") for n, (_, s) in ATTENTION.items()
    }
    codes = {
        name: random_codes(rng, cage.q4_0(axis=-2), weights[tensor].T.shape)
        for name, tensor in {
            "0/q/kernel": "blk.0.attn_q.weight",
            "0/k/kernel": "blk.0.attn_k.weight",
        }.items()
    }
    tree = codes | {
        "0/v/kernel": weights["blk.0.attn_v.weight"].T,
        "0/q/bias": weights["blk.0.attn_q.bias"],
        "0/norm/scale": weights["blk.0.attn_norm.weight"],
        "0/q_norm/scale": weights["blk.0.attn_q_norm.weight"],
    }
    gguf(tree, path, tmp_path / "b.gguf", names=TABLE)
    expected = weights | {
        f"blk.0.attn_{name}.weight": values_of(
            dataclasses.replace(
                codes[f"0/{name}/kernel"],
                codes=codes[f"0/{name}/kernel"].codes.T,
                scale=codes[f"0/{name}/kernel"].scale.T,
            )
        )
        for name in "qk"
    }
    if architecture in ("llama", "granite"):
        for name, count in {"q.weight": 4, "k.weight": 2, "q.bias": 4}.items():
            name = f"blk.0.attn_{name}"
            expected[name] = paired(expected[name], count)
    if architecture == "gemma2":
        for name in ("attn_norm", "attn_q_norm"):
            expected[f"blk.0.{name}.weight"] = weights[f"blk.0.{name}.weight"] + 1
    for name, (kind, data) in stored_in(tmp_path / "b.gguf").items():
        found = ggml.quants.dequantize(data, ggml.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(found, expected[name], name)
    # The same by the names of transformers, but for a norm under its own name; though
    # they are the very bytes of the file.
    weights = export.read_tensors(path)
    named = {
        "self_attn.q_proj.weight": "attn_q.weight",
        "self_attn.k_proj.weight": "attn_k.weight",
        "self_attn.v_proj.weight": "attn_v.weight",
        "self_attn.q_proj.bias": "attn_q.bias",
        "input_layernorm.weight": "attn_norm.weight",
    }
    tree = {f"model.layers.0.{n}": weights[f"blk.0.{own}"] for n, own in named.items()}
    own = "blk.0.attn_q_norm.weight"
    tree[own] = weights[own]
    expected = dict(weights)
    if architecture in ("llama", "granite"):
        for name, count in {"q.weight": 4, "k.weight": 2, "q.bias": 4}.items():
            name = f"blk.0.attn_{name}"
            expected[name] = paired(weights[name], count)
    if architecture == "gemma2":
        expected["blk.0.attn_norm.weight"] = weights["blk.0.attn_norm.weight"] + 1
    gguf(tree, path, tmp_path / "named.gguf", names="transformers")
    for name, (_, data) in stored_in(tmp_path / "named.gguf").items():
        np.testing.assert_array_equal(data, expected[name], name)
    # Under the names of the file, everything is as it is there.
    gguf(weights, path, tmp_path / "c.gguf")
    for name, (_, data) in stored_in(tmp_path / "c.gguf").items():
        assert same_bits(data, weights[name])


def test_an_unknown_architecture(rng, tmp_path):
    path = file_of(tmp_path / "a.gguf", rng, ATTENTION)
    weights = export.read_tensors(path)
    named = dict(weights)
    named["0/v/kernel"] = named.pop("blk.0.attn_v.weight").T
    gguf(named, path, tmp_path / "b.gguf", names=TABLE)
    for name, given, array in [
        ("q.weight", "0/q/kernel", weights["blk.0.attn_q.weight"].T),
        ("norm.weight", "0/norm/scale", weights["blk.0.attn_norm.weight"]),
    ]:
        others = {n: x for n, x in weights.items() if n != f"blk.0.attn_{name}"}
        with pytest.raises(ValueError, match=rf"`blk.0.attn_{name}`.*'new'; got it"):
            gguf(others | {given: array}, path, tmp_path / "c.gguf", names=TABLE)
    wrong = file_of(tmp_path / "d.gguf", rng, ATTENTION, "llama")
    others = dict(weights)
    others["0/q/kernel"] = others.pop("blk.0.attn_q.weight").T
    with pytest.raises(MalformedFileError, match="number of heads that divides 64"):
        gguf(others, wrong, tmp_path / "c.gguf", names=TABLE)


# --- templates with codes -------------------------------------------------------------


def test_codes_of_a_template_are_kept(rng, tmp_path):
    tensors = {
        "a.weight": ("Q4_K", (4, 256)),
        "b.weight": ("Q8_0", (4, 64)),
        "c.weight": ("F16", (4, 64)),
        "d.weight": ("TQ2_0", (4, 256)),
    }
    path = file_of(tmp_path / "a.gguf", rng, tensors)
    codes = random_codes(rng, cage.q4_0(axis=-1), (4, 64))
    floats = np.ones((4, 64), np.float32)
    gguf({"b.weight": codes, "c.weight": floats}, path, tmp_path / "b.gguf")
    before, after = stored_in(path), stored_in(tmp_path / "b.gguf")
    for name in ("a.weight", "d.weight"):
        assert after[name][0] == before[name][0]
        assert same_bits(after[name][1], before[name][1])
    assert after["b.weight"][0] == "Q4_0"
    np.testing.assert_array_equal(after["c.weight"][1], floats.astype(np.float16))
    both = {"b.weight": floats, "c.weight": floats}
    assert_raises(
        [
            (
                lambda: gguf(both, path, tmp_path / "c.gguf"),
                ValueError,
                "`b.weight`: `codes` must have codes .* Q8_0 in the template; got flo",
            ),
            (lambda: export.read_tensors(path), ValueError, "`a.weight`: .*got Q4_K"),
        ]
    )
    others = {name: tensors[name] for name in ("c.weight", "d.weight")}
    # Its bytes have a fourth code, which is no ternary one.
    path = file_of(tmp_path / "e.gguf", rng, others)
    with pytest.raises(ValueError, match=r"`d.weight`: .*got TQ2_0"):
        export.read_tensors(path)
