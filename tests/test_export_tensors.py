"""The parameters of a Llama by the names of files, and rotations that fold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cage_jax as cage
from cage_jax.export.tensors import PLACES, tensors, tree_of
from cage_jax.llama_config import LlamaConfig
from cage_jax.quantized_array import QuantizedArray

llama = pytest.importorskip("cage_jax.llama", reason="the model needs flax")

CONFIG = LlamaConfig(
    vocabulary=96, width=64, hidden=96, layers=3, heads=4, kv_heads=2, head_size=32
)
RULES = cage.Rules([(r"layers/.*/kernel", cage.int4(group_size=32)), (r".*", None)])


@pytest.fixture(scope="module")
def params():
    found = llama.initial_params(CONFIG, seed=0)
    keys = iter(jax.random.split(jax.random.key(1), 40))

    def noisy(x):  # norms are 1 at first, which would hide that they were swapped
        return x + 0.1 * jax.random.normal(next(keys), x.shape)

    return jax.tree.map(noisy, found)


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_transformers(params, tied):
    torch = pytest.importorskip("torch", reason="the oracle is in PyTorch")
    transformers = pytest.importorskip("transformers", reason="the oracle")
    config = dataclasses.replace(CONFIG, tied=tied, rope_theta=1e5, norm_epsilon=1e-5)
    params = {name: part for name, part in params.items() if name != "head" or not tied}
    oracle = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**config.to_huggingface())
    ).eval()
    named = {}
    for place, layer, array in tensors(params, config):
        array = np.array(array.T if place.is_kernel else array)
        named[place.huggingface.format(layer)] = torch.from_numpy(array)
    missing, unexpected = oracle.load_state_dict(named, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    oracle.tie_weights()
    tokens = np.random.default_rng(0).integers(0, 96, (2, 20))
    with torch.no_grad():
        expected = oracle(torch.from_numpy(tokens)).logits.numpy()
    logits = llama.logits(params, jnp.asarray(tokens), config)
    # Sums of 64 to 96 terms in another order, three layers of them.
    np.testing.assert_allclose(
        logits, expected, rtol=0, atol=2e-5 * abs(expected).max()
    )


def test_config_there_and_back():
    config = dataclasses.replace(CONFIG, tied=True, bos=1, eos=(2, 3), context=77)
    assert LlamaConfig.from_huggingface(config.to_huggingface()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"attention_bias": True}, "attention_bias=False; got True"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='default'; got 'yarn'"),
        ({"hidden_size": 2**60}, "`width` must be in"),
        ({"hidden_size": "many"}, "`width` must be an int"),
        ({"num_key_value_heads": 3}, "`kv_heads` must divide"),
        ({"rms_norm_eps": float("nan")}, "`norm_epsilon` must be positive"),
        ({"num_hidden_layers": 10**6}, "`layers` must be at most 4096"),
        ({"eos_token_id": {}}, "`eos` must be tokens"),
        ({"rope_parameters": "plain"}, "must describe its rotation; got 'plain'"),
    ],
)
def test_config_refused(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LlamaConfig.from_huggingface(CONFIG.to_huggingface() | change)


def test_config_must_be_complete():
    config = CONFIG.to_huggingface()
    del config["vocab_size"]
    with pytest.raises(ValueError, match="must have 'vocab_size'"):
        LlamaConfig.from_huggingface(config)


def test_a_tree_there_and_back(params):
    codes = cage.quantize(params, RULES)
    found = {
        (place.path, layer): array for place, layer, array in tensors(codes, CONFIG)
    }
    again = tree_of(found, CONFIG)
    assert jax.tree.structure(again) == jax.tree.structure(codes)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(codes)):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "quantizer",
    [
        cage.int4(group_size=32),
        cage.int4(axis=1, group_size=32),
        cage.int4(symmetric=False),
        cage.nvfp4(),
        cage.q4_1(),
        cage.int4(axis=None),
        cage.int4(axis=(-2, -1), group_size=(32, 32)),
        cage.int4(axis=(0, 1)),
    ],
    ids=str,
)
def test_a_layer_of_codes_has_the_values_of_the_layer(params, quantizer):
    rules = cage.Rules([(r"layers/.*/kernel", quantizer), (r".*", None)])
    codes = cage.quantize(params, rules)
    values = cage.dequantize(codes)
    for place, layer, array in tensors(codes, CONFIG):
        whole = values
        for name in place.path.split("/"):
            whole = whole[name]
        if isinstance(array, QuantizedArray):
            np.testing.assert_array_equal(cage.dequantize(array), whole[layer])
            assert array.scale.shape == array.quantizer.scale_shape(array.shape)


def test_layers_apart_are_as_layers_stacked(params):
    codes = cage.quantize(params, RULES)
    apart = {name: part for name, part in codes.items() if name != "layers"}
    apart["layers"] = {}
    for place, layer, array in tensors(codes, CONFIG):
        if layer is not None:
            _, *names, last = place.path.split("/")
            node = apart["layers"].setdefault(str(layer), {})
            for name in names:
                node = node.setdefault(name, {})
            node[last] = array
    both = zip(tensors(codes, CONFIG), tensors(apart, CONFIG))
    for (*one, array), (*other, same) in both:
        assert one == other
        jax.tree.map(np.testing.assert_array_equal, array, same)


def test_layers_of_several_formats_become_floats(params):
    found = {}
    for place, layer, array in tensors(params, CONFIG):
        quantizer = cage.int4() if layer else cage.int8()
        if place.is_kernel and layer is not None:
            array = cage.quantize(array, quantizer)
        found[place.path, layer] = array
    kernel = tree_of(found, CONFIG)["layers"]["query"]["kernel"]
    expected = [found["layers/query/kernel", layer] for layer in range(CONFIG.layers)]
    np.testing.assert_array_equal(kernel, np.stack([*map(cage.dequantize, expected)]))


def test_what_does_not_fit_the_config(params):
    other = dataclasses.replace(CONFIG, tied=True)
    with pytest.raises(ValueError, match=r"got 1 \['head/kernel'\] too many"):
        list(tensors(params, other))
    other = dataclasses.replace(CONFIG, hidden=64)
    with pytest.raises(ValueError, match=r"`layers/gate/kernel`: .*\(3, 64, 96\) for"):
        list(tensors(params, other))
    with pytest.raises(ValueError, match=r"missing \['head/kernel'\]"):
        list(tensors({n: p for n, p in params.items() if n != "head"}, CONFIG))
    with pytest.raises(TypeError, match="`config` must be a LlamaConfig; got dict"):
        list(tensors(params, {}))
    with pytest.raises(TypeError, match=r"`norm/scale`: .*got int32"):
        list(tensors(params | {"norm": {"scale": jnp.zeros(64, jnp.int32)}}, CONFIG))
    with pytest.raises(ValueError, match="must have the shape that its config says"):
        arrays = {(p, n): array for (p, *_), n, array in tensors(params, CONFIG)}
        tree_of(arrays | {("norm/scale", None): jnp.zeros(3)}, CONFIG)


# --- rotations ------------------------------------------------------------------------


def rotated(block, *, seed=None, value=None):
    plain = cage.int4(group_size=32)
    turned = dataclasses.replace(plain, hadamard=block, hadamard_seed=seed)
    return cage.Rules(
        [
            (r"layers/output/kernel", turned),
            (r"layers/value/kernel", value),
            (r"layers/.*/kernel", plain),
            (r".*", None),
        ]
    )


def written(codes, config):
    found = {(p.path, layer): array for p, layer, array in tensors(codes, config)}
    return tree_of(found, config)


@pytest.mark.parametrize("block", [8, 32])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_rotation_of_the_output_folds_into_the_values(block, kv_heads):
    seed = 7 if kv_heads == 4 else None
    config = dataclasses.replace(CONFIG, kv_heads=kv_heads)
    codes = cage.quantize(
        llama.initial_params(config, seed=1), rotated(block, seed=seed)
    )
    plain = written(codes, config)
    output = plain["layers"]["output"]["kernel"]
    assert output.quantizer == cage.int4(group_size=32)
    np.testing.assert_array_equal(
        output.codes, codes["layers"]["output"]["kernel"].codes
    )
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 96)
    expected = llama.logits(cage.dequantize(codes), tokens, config)
    logits = llama.logits(cage.dequantize(plain), tokens, config)
    # The same products in another basis, in float32.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6)
    assert abs(expected).max() > 0.1


@pytest.mark.parametrize(
    "rules",
    [rotated(8, value=cage.int4()), rotated(64), rotated(8, seed=1)],
    ids=["codes", "heads", "signs"],
)
def test_a_rotation_that_does_not_fold_is_left(params, rules):
    codes = cage.quantize(params, rules)
    output = written(codes, CONFIG)["layers"]["output"]["kernel"]
    assert output.quantizer.hadamard is not None


def test_every_parameter_has_a_place():
    assert set(CONFIG.shapes()) == set(PLACES)
