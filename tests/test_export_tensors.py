"""The parameters of a Llama by the names of files, and rotations that fold."""

import dataclasses

import jax
import numpy as np
import pytest
from cases import assert_raises, assert_same, random_codes
from small_llama import (
    CONFIG,
    leaves_by_path,
    on_host,
    params_of,
    with_codes,
    with_leaf,
)

import cage_jax as cage
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.rope import RopeScaling
from cage_jax.llama.tensors import PARAMETERS, tensors, tree_of

PARAMS = on_host(params_of())


def codes_of(quantizers):
    """Makes parameters with random codes, by the names of kernels in layers."""
    codes = params_of()
    for seed, (name, quantizer) in enumerate(quantizers.items()):
        codes = with_codes(codes, f"layers/{name}/kernel", quantizer, seed)
    return codes


def found_in(codes, config=CONFIG):
    """Gives the tensors of a tree by path and layer."""
    return {
        (names.path, layer): array for names, layer, array in tensors(codes, config)
    }


# --- configurations -------------------------------------------------------------------


def test_config_there_and_back():
    config = dataclasses.replace(CONFIG, tied=True, bos=1, eos=(2, 3), context=77)
    assert LlamaConfig.from_huggingface(config.to_huggingface()) == config
    assert LlamaConfig.from_huggingface(CONFIG.to_huggingface()) == CONFIG
    for fields in (
        {"qkv_bias": True, "rope_scaling": RopeScaling(4.0)},
        {"qk_norm": True, "tied": True, "window": 3},
        {"qkv_bias": True, "window": 3},
        {"window": 3},
        {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16)},
    ):
        config = dataclasses.replace(CONFIG, **fields)
        assert LlamaConfig.from_huggingface(config.to_huggingface()) == config
    with pytest.raises(ValueError, match="must not both be True"):
        dataclasses.replace(CONFIG, qkv_bias=True, qk_norm=True)


def changed(**changes):
    """Makes a config.json with other fields; those that are `...` are missing."""
    whole = CONFIG.to_huggingface() | changes
    return {name: value for name, value in whole.items() if value is not ...}


def test_config_without_effect():
    plain = {"rope_type": "default", "rope_theta": CONFIG.rope_theta}
    linear = {"type": "linear", "factor": 1.0, "rope_theta": CONFIG.rope_theta}
    for changes in [
        {"model_type": "mistral", "sliding_window": None},
        {"hidden_act": "swish", "attention_dropout": 0.5, "use_cache": False},
        {"rope_scaling": linear, "rope_parameters": None},
        {"rope_scaling": {"type": "linear", "factor": 1}},
        {"rope_scaling": {}, "rope_theta": ..., "rope_parameters": plain},
        {"rope_parameters": ..., "rope_scaling": None, "rope_interleaved": False},
        {"layer_types": ["full_attention"] * 2, "final_logit_softcapping": None},
        {"is_llama_config": True, "pad_token_id": -1, "architectures": None},
    ]:
        assert LlamaConfig.from_huggingface(changed(**changes)) == CONFIG
    mistral = changed(
        model_type="mistral", sliding_window=None, num_key_value_heads=...
    )
    with pytest.raises(ValueError, match="`num_key_value_heads` must divide"):
        LlamaConfig.from_huggingface(mistral)  # 8 of them where the file has none


def test_config_refused():
    plain = {"rope_type": "default", "rope_theta": 1e4}
    nested = {"full_attention": plain, "sliding_attention": plain}
    assert_raises(
        (
            lambda change=change: LlamaConfig.from_huggingface(changed(**change)),
            (ValueError, TypeError),
            text,
        )
        for change, text in [
            ({"model_type": "gpt2"}, "model_type='gpt2'"),
            ({"vocab_size": ...}, "must have 'vocab_size'"),
            ({"architectures": ["LlamaForCausalLMEagle"]}, "architectures=None; got"),
            ({"attention_bias": True}, "attention_bias=False; got True"),
            ({"attention_bias": 0}, "attention_bias=False; got 0"),
            ({"mlp_bias": "false"}, "mlp_bias=False; got 'false'"),
            ({"tie_word_embeddings": "false"}, "`tie_word_embeddings` must be a bool"),
            ({"hidden_act": "gelu"}, "hidden_act='silu'; got 'gelu'"),
            ({"sliding_window": 4096}, "sliding_window=None; got 4096"),
            ({"use_sliding_window": True}, "use_sliding_window=False; got True"),
            (
                {"model_type": "mistral", "sliding_window": 0},
                "`sliding_window` must be from 1 to",
            ),
            (
                {"model_type": "mistral", "layer_types": ["full_attention"] * 2},
                r"layer_types=\['sliding_attention', 'sliding_attention'\]; got",
            ),
            (
                {"model_type": "qwen2", "use_sliding_window": True},
                "max_window_layers=0; got 28",
            ),
            (
                {"layer_types": ["full_attention", "sliding_attention"]},
                r"layer_types=\['full_attention', 'full_attention'\]; got",
            ),
            ({"final_logit_softcapping": 30.0}, "softcapping=None; got 30.0"),
            ({"use_qk_norm": True}, "use_qk_norm=False; got True"),
            ({"a_new_field": 3}, "known to compute a Llama; got a_new_field=3. Rem"),
            ({"hidden_size": 2**60}, "`hidden_size` must be from 1 to"),
            ({"hidden_size": "many"}, "`hidden_size` must be an int"),
            ({"num_key_value_heads": 3}, "`num_key_value_heads` must divide"),
            ({"num_hidden_layers": 10**6}, "`num_hidden_layers` must be from 1 to 4"),
            ({"rms_norm_eps": float("nan")}, "`rms_norm_eps` must be at least 1e-30"),
            ({"rms_norm_eps": 10**400}, "`rms_norm_eps` must be .* at most 1; got 10"),
            ({"eos_token_id": {}}, "`eos_token_id` must be an int"),
            ({"eos_token_id": -1}, "`eos_token_id` must be from 0 to 319; got -1"),
            ({"eos_token_id": [2, 320]}, "`eos_token_id` must be from 0 to 319"),
            ({"bos_token_id": 10**9}, "`bos_token_id` must be from 0 to 319; got 10"),
            # Rotations in both spellings, and what only one of them says.
            ({"rope_parameters": "plain"}, "object in rope_parameters; got 'plain'"),
            ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='default'; got 'y"),
            (
                {"rope_scaling": {"type": "linear", "factor": 4}},
                r"one scaling .* rope_scaling=RopeScaling\(factor=4, .*=None\. Write",
            ),
            (
                {"rope_scaling": {"type": "linear", "rope_type": "llama3"}},
                "'llama3'; g",
            ),
            (
                {"rope_scaling": {"type": "linear", "factor": 0.5}},
                "`factor` must be at least 1",
            ),
            (
                {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
                "`low_freq_factor` must be a number; got None",
            ),
            ({"rope_scaling": {"factor": 8.0}}, "rope_scaling.factor=1; got 8.0"),
            ({"rope_parameters": nested}, "no rope_parameters.full_attention; got {"),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=1; got 0.5"),
            ({"rope_parameters": plain}, "rope_theta=50000.0, rope_parameters.rope_th"),
            (
                {"rope_theta": ..., "rope_scaling": {"type": "default"}},
                "rope_parameters.rope_theta=50000.0, of which transformers takes 1000",
            ),
            (
                {"rope_theta": 10**400, "rope_parameters": ...},
                "`rope_theta` must be at least 1 and at most 1e.30",
            ),
        ]
    )


# --- trees ----------------------------------------------------------------------------


def test_every_parameter_has_a_place():
    kinds = {}, {"qkv_bias": True}, {"qk_norm": True}
    shapes = [dataclasses.replace(CONFIG, **fields).shapes() for fields in kinds]
    assert set().union(*shapes) == set(PARAMETERS)


def test_a_tree_there_and_back():
    codes = codes_of({"query": cage.int4(group_size=32), "down": cage.nvfp4()})
    assert_same(tree_of(found_in(codes), CONFIG), codes)


def test_a_layer_of_codes_has_the_values_of_the_layer():
    quantizers = {
        "query": cage.int4(group_size=32),
        "key": cage.int4(axis=1, group_size=32),
        "value": cage.int4(symmetric=False),
        "output": cage.nvfp4(),
        "gate": cage.q4_1(),
        "up": cage.int4(axis=None),
        "down": cage.int4(axis=(-2, -1), group_size=(32, 32)),
    }
    others = {"query": cage.int4(axis=(0, 1)), "down": cage.int4(axis=(0, 2))}
    for chosen in (quantizers, others):
        codes = codes_of(chosen)
        values = leaves_by_path(jax.jit(cage.dequantize)(codes))
        arrays = found_in(codes)
        # As a list, since layers are keys in no tree.
        keys = [key for key, each in arrays.items() if isinstance(each, QuantizedArray)]
        assert len(keys) == CONFIG.layers * len(chosen)
        decoded = jax.jit(cage.dequantize)([arrays[key] for key in keys])
        for (path, layer), found in zip(keys, decoded):
            np.testing.assert_array_equal(found, values[path][layer], str(path))
            array = arrays[path, layer]
            assert array.scale.shape == array.quantizer.blocks(array.shape).scale_shape


def test_layers_apart_are_as_layers_stacked():
    codes = codes_of({"query": cage.int4(group_size=32), "up": cage.int4(axis=None)})
    apart = {name: part for name, part in codes.items() if name != "layers"}
    apart["layers"] = {}
    for names, layer, array in tensors(codes, CONFIG):
        if layer is not None:
            _, *inner, last = names.path.split("/")
            node = apart["layers"].setdefault(str(layer), {})
            for name in inner:
                node = node.setdefault(name, {})
            node[last] = array
    both = zip(tensors(codes, CONFIG), tensors(apart, CONFIG))
    for (*one, array), (*other, same) in both:
        assert one == other
        assert_same(array, same)


def test_layers_of_several_formats_become_floats(rng):
    found = found_in(PARAMS)
    shape = PARAMS["layers"]["query"]["kernel"].shape[1:]
    kernels = []
    for layer, quantizer in enumerate([cage.int8(), cage.int4()]):
        codes = random_codes(rng, quantizer, shape)
        found["layers/query/kernel", layer] = codes
        kernels.append(np.float32(codes.codes) * np.asarray(codes.scale))
    kernel = tree_of(found, CONFIG)["layers"]["query"]["kernel"]
    np.testing.assert_array_equal(kernel, np.stack(kernels), strict=True)
    # Codes in some layers, and floats in others, too.
    found["layers/query/kernel", 1] = kernels[1] + 1
    kernel = tree_of(found, CONFIG)["layers"]["query"]["kernel"]
    expected = np.stack([kernels[0], kernels[1] + 1])
    np.testing.assert_array_equal(kernel, expected, strict=True)


def test_what_does_not_fit_the_config():
    tied = dataclasses.replace(CONFIG, tied=True)
    narrow = dataclasses.replace(CONFIG, hidden=64)
    less = {name: part for name, part in PARAMS.items() if name != "head"}
    whole_numbers = with_leaf(PARAMS, "norm/scale", np.zeros(64, np.int32))
    short = found_in(PARAMS) | {("norm/scale", None): np.zeros(3, np.float32)}
    rows = [
        (PARAMS, tied, ValueError, r"got 1 unexpected, such as \['head/kernel'\]"),
        (PARAMS, narrow, ValueError, r"`layers/gate/kernel`: .*\(2, 64, 128\) for"),
        (less, CONFIG, ValueError, r"got 1 missing, such as \['head/kernel'\]"),
        (PARAMS, {}, TypeError, "`config` must be a LlamaConfig; got dict"),
        (whole_numbers, CONFIG, TypeError, r"`norm/scale`: .*got int32"),
    ]
    assert_raises(
        (lambda tree=tree, config=config: list(tensors(tree, config)), error, text)
        for tree, config, error, text in rows
    )
    with pytest.raises(ValueError, match="must have the shape that its config says"):
        tree_of(short, CONFIG)


# --- rotations ------------------------------------------------------------------------


def rotated(block, seed=None):
    """Makes a quantizer that rotates the inputs of blocks."""
    plain = cage.int4(group_size=32)
    return dataclasses.replace(plain, hadamard=block, hadamard_seed=seed)


def products(value, output, config):
    """Multiplies each head's values and outputs, in float64: (layer, head, in, out)."""
    layers, size = config.layers, config.head_size
    value = np.asarray(value, np.float64).reshape(layers, -1, config.kv_heads, size)
    value = value.repeat(config.heads // config.kv_heads, axis=2)
    output = np.asarray(output, np.float64).reshape(layers, config.heads, size, -1)
    return np.einsum("liha,lhao->lhio", value, output)


@pytest.mark.parametrize("block", [8, 32])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_rotation_of_the_output_folds_into_the_values(block, kv_heads):
    seed = 7 if kv_heads == 4 else None
    config = dataclasses.replace(CONFIG, kv_heads=kv_heads)
    codes = params_of(config)
    codes = with_codes(codes, "layers/output/kernel", rotated(block, seed))
    plain = tree_of(found_in(codes, config), config)
    before, after = (
        {name: tree["layers"][name]["kernel"] for name in ("value", "output")}
        for tree in (codes, plain)
    )
    assert after["output"].quantizer == cage.int4(axis=-2, group_size=32)
    np.testing.assert_array_equal(after["output"].codes, before["output"].codes)
    np.testing.assert_array_equal(after["output"].scale, before["output"].scale)
    scale = np.float64(after["output"].scale).repeat(32, axis=1)
    found = products(after["value"], np.float64(after["output"].codes) * scale, config)
    expected = products(before["value"], cage.dequantize(before["output"]), config)
    # Both rotate in float32, sums of 32 terms at most.
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=32 * 2.0**-24 * abs(expected).max()
    )
    # And without the rotation of the values it would be another model.
    other = products(before["value"], np.float64(after["output"].codes) * scale, config)
    assert abs(other - expected).max() > 0.1 * abs(expected).max()


def test_a_rotation_that_does_not_fold_is_left():
    for quantizers in (
        {"output": rotated(8), "value": cage.int4()},  # codes before
        {"output": rotated(64)},  # more than a head
        {"output": rotated(8, seed=1)},  # signs of heads that share their values
    ):
        codes = codes_of(quantizers)
        output = tree_of(found_in(codes), CONFIG)["layers"]["output"]["kernel"]
        assert output.quantizer.hadamard is not None, quantizers
        assert_same(output, codes["layers"]["output"]["kernel"])
