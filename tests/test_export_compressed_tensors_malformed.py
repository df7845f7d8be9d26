"""Folders of compressed-tensors: damaged, made to do harm, or of other models."""

import dataclasses
import json

import numpy as np
import pytest
from cases import assert_same
from small_llama import (
    CONFIG,
    arrays_of,
    on_host,
    params_of,
    with_kernels,
    write_anew,
)

import cage_jax as cage
from cage_jax.export import safetensors_files
from cage_jax.export.compressed_tensors import compressed_tensors, read
from cage_jax.export.files import MalformedFileError

pytest.importorskip("safetensors", reason="the files are of it")

CODES = on_host(with_kernels(cage.ct_w4a16(group_size=32)))


@pytest.fixture
def folder(tmp_path):
    """The tiny model with all kernels at four bits."""
    compressed_tensors(CODES, CONFIG, tmp_path / "model")
    return tmp_path / "model"


def changed(content, name, value):
    """Copies what is in config.json, with another value; two underscores go inside."""
    content = json.loads(json.dumps(content))
    *inner, last = name.split("__")
    node = content
    for key in inner:
        node = node[key]
    node[last] = value
    return content


WEIGHTS = "quantization_config__config_groups__group_0__weights"


def test_configurations_that_are_not_of_the_tensors(folder):
    content = json.loads((folder / "config.json").read_text())
    for name, value, message in [
        ("num_hidden_layers", 3, "layers.2.*must have"),
        ("num_hidden_layers", 2**24, "layers"),
        ("num_hidden_layers", 1, "only the tensors of a Llama; got"),
        ("vocab_size", 319, "shape"),
        ("model_type", "gpt2", "config.json: .*model_type='gpt2'"),
        ("hidden_size", "many", "`hidden_size` must be an int"),
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
        (WEIGHTS + "__group_size", 30, "of a scheme"),  # as many groups, too short
        (WEIGHTS + "__group_size", 0, "of a scheme"),
        (WEIGHTS + "__symmetric", False, "of a scheme"),
        (WEIGHTS + "__type", "float", "of a scheme"),
        (WEIGHTS + "__strategy", ["channel"], "of a scheme"),
    ]:
        text = json.dumps(changed(content, name, value))
        (folder / "config.json").write_text(text)
        with pytest.raises(MalformedFileError, match=message):
            read(folder)
            pytest.fail(f"{name} {value}")


def test_tensors_that_are_not_of_the_configuration(folder):
    file = folder / "model.safetensors"
    stored = arrays_of(folder)
    module = "model.layers.1.mlp.up_proj"
    shape, scale = stored[f"{module}.weight_shape"], stored[f"{module}.weight_scale"]
    # Into new files: from the old ones jax may still copy.
    for changes, message in [
        ({f"{module}.weight_shape": shape[::-1]}, r"`.*up_proj`: weight_shape must be"),
        ({f"{module}.weight_scale": scale[:, :1]}, "of a scheme"),
        ({f"{module}.weight_scale": scale.astype(np.float64)}, "of a scheme"),
        ({f"{module}.weight": np.zeros((128, 64), np.float32)}, "of a scheme"),
        ({f"{module}.bias": np.zeros(64, np.float32)}, "got 1 more, .*up_proj.bias"),
        (
            {f"{module}.weight_zero_point": np.zeros((16, 2), np.int32)},
            "`.*up_proj`: the file must have no zero points, .* symmetric; got",
        ),
        ({"model.norm.weight": np.zeros(64, np.int32)}, "`model.norm`"),
        ({"model.norm.weight": np.zeros(65, np.float32)}, "`model.norm`"),
        ({"model.norm.weight_scale": np.zeros(1, np.float32)}, "`model.norm`"),
    ]:
        file.unlink()
        safetensors_files.write(file, stored | changes)
        with pytest.raises(MalformedFileError, match=message):
            read(folder)
            pytest.fail(str(changes))
    for name in (
        f"{module}.weight_scale",
        "model.norm.weight",
        f"{module}.weight_shape",
    ):
        less = {key: value for key, value in stored.items() if key != name}
        file.unlink()
        safetensors_files.write(file, less)
        with pytest.raises(MalformedFileError, match="must have"):
            read(folder)
            pytest.fail(name)


def test_schemes_that_are_not_read_are_named(folder):
    file, stored = folder / "model.safetensors", arrays_of(folder)
    attention = "model.layers.1.self_attn"
    for name, scheme, remedy in [
        ("k_scale", "kv_cache_scheme", "cage_jax.kv_cache"),
        ("v_zero_point", "kv_cache_scheme", "cage_jax.kv_cache"),
        ("q_proj.weight_g_idx", "actorder", "actorder='weight'"),
        ("q_proj.input_scale", "input_activations", "dynamic"),
        ("q_proj.input_global_scale", "input_activations", "dynamic"),
        ("k_proj.output_zero_point", "output_activations", "dynamic"),
        ("q_proj.bitmask", "sparsity_config", "without"),
        ("q_proj.meta", "marlin-24", "without"),
    ]:
        file.unlink()
        more = {f"{attention}.{name}": np.zeros(4, np.float32)}
        # Also where the matrix itself is stored in another way.
        less = {k: v for k, v in stored.items() if ".q_proj.weight_packed" not in k}
        safetensors_files.write(file, (less if "q_proj" in name else stored) | more)
        text = rf"`{attention}.{name}`, of .*\(.*{scheme}.*\. .*{remedy}"
        with pytest.raises(MalformedFileError, match=text):
            read(folder)
            pytest.fail(name)
    content = json.loads((folder / "config.json").read_text())
    for name, value in [("strategy", "block"), ("num_bits", 3), ("type", "nf4")]:
        text = json.dumps(changed(content, f"{WEIGHTS}__{name}", value))
        (folder / "config.json").write_text(text)
        with pytest.raises(MalformedFileError, match=f"is read; got .*{name}={value}"):
            read(folder)
            pytest.fail(name)


def test_shards_made_to_do_harm(tmp_path):
    folder = tmp_path / "model"
    compressed_tensors(CODES, CONFIG, folder, shard_bytes=60_000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    places = index["weight_map"]
    name = "model.norm.weight"
    shard = places[name]
    (tmp_path / "outside").write_bytes((folder / shard).read_bytes())
    others = {key: file for key, file in places.items() if key != name}
    for changed, message in [
        (dict.fromkeys(places, "../outside"), "must be a plain file name"),
        (dict.fromkeys(places, str(tmp_path / "outside")), "must be a plain file name"),
        (places | {name: "config.json"}, "must be a safetensors file"),
        (places | {name: "missing"}, "must be a file in the folder"),
        (places | {name: max(places.values())}, "must have exactly the tensors"),
        (places | {name: [shard]}, "must have a `weight_map`"),
        (places | {"another": shard}, "1 missing, .'another'"),
        (others, "must have exactly the tensors"),
        (list(places), "must have a `weight_map`"),
        (None, "must have a `weight_map`"),
    ]:
        path.write_text(json.dumps(index | {"weight_map": changed}))
        with pytest.raises(MalformedFileError, match=message):
            read(folder)
            pytest.fail(message)
    path.write_text(json.dumps(index))
    assert_same(read(folder).params, CODES)
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
            write_anew(folder / name, damaged)
            try:
                found = read(folder)
            except MalformedFileError:
                continue
            assert number % 3 or not damaged[-1:].isspace()
            assert found.params.keys() == {"embedding", "layers", "norm", "head"}
        write_anew(folder / name, whole)


def test_a_head_that_is_the_embedding_again(tmp_path):
    config = dataclasses.replace(CONFIG, tied=True)
    tied = {n: part for n, part in on_host(params_of()).items() if n != "head"}
    compressed_tensors(tied, config, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    stored = arrays_of(tmp_path / "model")
    embedding = stored["model.embed_tokens.weight"]
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    file.unlink()  # from which jax may still copy
    safetensors_files.write(file, stored | {"lm_head.weight": embedding})
    assert_same(read(tmp_path / "model").params, tied)
    file.unlink()
    safetensors_files.write(file, stored | {"lm_head.weight": embedding + 1})
    with pytest.raises(MalformedFileError, match=r"1 more, .*lm_head"):
        read(tmp_path / "model")
