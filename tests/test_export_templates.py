"""Export with the folder of a model as template: what is copied, replaced, refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_raises, assert_same
from small_llama import CONFIG, on_host, params_of, with_kernels

import cage_jax as cage
from cage_jax import export
from cage_jax.export import TensorName, safetensors_files
from cage_jax.export.compressed_tensors import compressed_tensors, read
from cage_jax.export.files import MalformedFileError
from cage_jax.export.templates import read_template
from cage_jax.llama.tensors import tensors

INT4 = cage.int4(axis=-1, group_size=32)
BFLOAT16 = cage.ct_w4a16(axis=-1, group_size=32, scale_dtype="bfloat16")
# The tensors of a model that no program knows: names, dtypes and shapes.
TENSORS = {
    "embed_tokens.weight": ("bfloat16", (11, 64)),
    "h.0.qkv.weight": ("bfloat16", (24, 64)),
    "h.0.qkv.bias": ("float32", (24,)),
    "h.0.out.weight": ("bfloat16", (64, 64)),
    "h.1.qkv.weight": ("bfloat16", (24, 64)),
    "h.1.qkv.bias": ("float32", (24,)),
    "h.1.out.weight": ("bfloat16", (64, 64)),
    "norm.weight": ("float16", (64,)),
    "positions": ("int64", (5,)),
}


@pytest.fixture
def template(tmp_path, rng):
    return template_of(tmp_path / "template", rng, TENSORS)


def template_of(folder, rng, tensors, shard_bytes=9000, **config):
    """Writes a folder with random tensors, a tokenizer and other files."""
    folder.mkdir()
    arrays = ((n, random(rng, dtype, shape)) for n, (dtype, shape) in tensors.items())
    safetensors_files.write_shards(folder, arrays, shard_bytes)
    config = {"model_type": "new", "dtype": "bfloat16"} | config
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_bytes(name.encode() + b"\r\n")
    (folder / "weights.bin").write_bytes(b"0")
    return folder


def random(rng, dtype, shape):
    if dtype == "int64":
        return rng.integers(0, 9, shape)
    return rng.standard_normal(shape).astype(dtype)


def stored_in(folder):
    """Reads all tensors of a folder, by the file and the name."""
    return {
        (file.name, name): array
        for file in sorted(folder.glob("*.safetensors"))
        for name, array in safetensors_files.read(file)[0].items()
    }


def same_bits(left, right):
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    return left.tobytes() == right.tobytes()


def test_what_is_not_quantized_is_copied(template, tmp_path):
    weights = export.read_tensors(template)
    assert {n: (str(x.dtype), x.shape) for n, x in weights.items()} == TENSORS
    rules = cage.Rules([(r"h\.\d\.out\.weight", BFLOAT16), (".*", None)])
    codes = cage.quantize(weights, rules)
    bias = weights["h.1.qkv.bias"] + np.float32(1)
    norm = weights["norm.weight"].astype(np.float32) + np.float32(1 / 3)
    codes |= {"h.1.qkv.bias": jnp.asarray(bias), "norm.weight": norm}
    del codes["positions"]  # a constant, which no training has
    export.compressed_tensors(codes, template, tmp_path / "out")
    before, after = stored_in(template), stored_in(tmp_path / "out")
    assert len({file for file, _ in before}) > 2
    trained = {"h.1.qkv.bias": bias, "norm.weight": norm.astype(np.float16)}
    for (file, name), array in before.items():
        if name.endswith("out.weight"):
            module = name.removesuffix(".weight")
            ours = codes[name]
            assert same_bits(after.pop((file, f"{module}.weight_scale")), ours.scale)
            assert after.pop((file, f"{module}.weight_shape")).tolist() == [64, 64]
            words = after.pop((file, f"{module}.weight_packed"))
            shifts = np.arange(0, 32, 4, dtype=np.int32)
            found = ((words[..., None] >> shifts) & 15).reshape(64, 64) - 8
            np.testing.assert_array_equal(found, np.asarray(ours.codes).astype(int))
        else:
            assert same_bits(after.pop((file, name)), trained.get(name, array)), name
    assert not after
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        copied = (tmp_path / "out" / name).read_bytes()
        assert copied == (template / name).read_bytes()
    assert not (tmp_path / "out/weights.bin").exists()
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    found = stored_in(tmp_path / "out")
    assert index["weight_map"] == {name: file for file, name in found}
    total = sum(array.nbytes for array in found.values())
    assert index["metadata"]["total_size"] == total
    config = json.loads((tmp_path / "out/config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((template / "config.json").read_text())
    (group,) = quantization["config_groups"].values()
    assert group["targets"] == ["h.0.out", "h.1.out"]
    assert quantization["ignore"] == ["h.0.qkv", "h.1.qkv", "lm_head"]


def test_without_codes_it_is_a_copy(template, tmp_path):
    weights = export.read_tensors(template)
    read = read_template(template)
    assert all(read.holds(name, array) for name, array in weights.items())
    others = {name: weights[name].copy() for name in weights}
    others["h.0.out.weight"] = weights["h.1.out.weight"]
    others["h.1.out.weight"] = weights["h.1.out.weight"].T
    others["norm.weight"] = weights["norm.weight"].view(jnp.bfloat16)
    assert not any(read.holds(name, array) for name, array in others.items())
    export.compressed_tensors(weights, template, tmp_path / "out")
    for file in template.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("quantizer", [cage.int4(group_size=32), cage.fp8()])
def test_our_llama_is_written_as_with_its_config(quantizer, tmp_path):
    floats = on_host(params_of())
    compressed_tensors(floats, CONFIG, tmp_path / "template")
    codes = with_kernels(quantizer)
    compressed_tensors(codes, CONFIG, tmp_path / "expected")
    compressed_tensors(codes, tmp_path / "template", tmp_path / "found")
    layers = {"layers": {}}
    for names, layer, array in tensors(codes, CONFIG):
        node = layers
        *inner, last = names.path_in(layer).split("/")
        for name in inner:
            node = node.setdefault(name, {})
        node[last] = array
    compressed_tensors(layers, tmp_path / "template", tmp_path / "one by one")
    expected = stored_in(tmp_path / "expected")
    for name in ("found", "one by one"):
        found = stored_in(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(same_bits(found[key], expected[key]) for key in expected)
        assert_same(read(tmp_path / name).params, read(tmp_path / "expected").params)


# What a tree calls the same four matrices, and the lines that say so.
LAYOUTS = {
    "kernels": (
        lambda q, k, o: {
            "0": {"q": q.T, "k": k.T},
            "1": {"q": q.T, "k": k.T},
            "o": o.T,
        },
        [
            TensorName(r"(\d)/(q|k)", r"h.\1.\2.weight", "io"),
            TensorName("o", "o.weight", "io"),
        ],
        {"q": -2, "k": -2, "o": -2},
    ),
    "a stack, and axes of heads": (
        lambda q, k, o: {
            "q": np.stack([q.T, q.T]).reshape(2, 64, 4, 16).transpose(2, 1, 0, 3),
            "k": np.stack([k, k]),
            "o": o.T.reshape(2, 32, 96),
        },
        [
            TensorName("q", "h.{}.q.weight", "oilo"),
            TensorName("k", "h.{}.k.weight", "loi"),
            TensorName("o", "o.weight", "iio"),
        ],
        {"q": 1, "k": -1, "o": 1},
    ),
    "fused": (
        lambda q, k, o: {"qk": np.stack([np.concatenate([q, k]).T] * 2), "o": o},
        [
            TensorName("qk", ("h.{}.q.weight", "h.{}.k.weight"), "lio"),
            TensorName("o", "o.weight", "oi"),
        ],
        {"qk": -2, "o": -1},
    ),
    "in parts": (
        lambda q, k, o: {
            **{
                f"h.{i}.{name}.weight": x
                for i in range(2)
                for name, x in zip("qk", (q, k))
            },
            "b": o[40:],
            "z": o[:40],
        },
        [TensorName("z", "o.weight"), TensorName("b", "o.weight")],
        {"q.weight": -1, "k.weight": -1, "z": -1, "b": -1},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, rng, tmp_path):
    asymmetric = name in ("kernels", "in parts")
    shapes = {"q": (64, 64), "k": (24, 64), "o": (96, 64)}
    named = {f"h.{i}.{n}.weight": shapes[n] for i in range(2) for n in "qk"}
    named["o.weight"] = shapes["o"]
    like = {name: ("float32", shape) for name, shape in named.items()}
    folder = template_of(tmp_path / "template", rng, like, dtype="float32")
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    quantizer = cage.int4(group_size=32, axis=-1, symmetric=not asymmetric)
    flat = {name: weights[name.split(".")[-2]] for name in named}
    expected = cage.quantize(flat, cage.Rules([(".*", quantizer)]))
    export.compressed_tensors(expected, folder, tmp_path / "expected")
    build, table, axes = LAYOUTS[name]
    rules = [
        (f".*{path}", cage.int4(axis=axis, group_size=32, symmetric=not asymmetric))
        for path, axis in axes.items()
    ]
    codes = cage.quantize(build(**weights), cage.Rules(rules))
    export.compressed_tensors(codes, folder, tmp_path / "found", names=table)
    stored, found = stored_in(tmp_path / "expected"), stored_in(tmp_path / "found")
    assert found.keys() == stored.keys()
    for key in stored:
        assert same_bits(found[key], stored[key]), key


def test_names_of_flax(rng, tmp_path):
    like = {
        "model.layers.0.up.weight": ("float32", (32, 64)),
        "model.layers.0.up.bias": ("float32", (32,)),
        "model.norm.weight": ("float32", (64,)),
        "model.embed.weight": ("float32", (9, 64)),
    }
    folder = template_of(tmp_path / "template", rng, like, dtype="float32")
    arrays = export.read_tensors(folder)
    tree = {
        "params": {
            "model": {
                "layers": {
                    "0": {
                        "up": {
                            "kernel": np.array(arrays["model.layers.0.up.weight"].T),
                            "bias": arrays["model.layers.0.up.bias"],
                        }
                    }
                },
                "norm": {"scale": arrays["model.norm.weight"]},
                "embed": {"embedding": arrays["model.embed.weight"]},
            }
        }
    }
    export.compressed_tensors(tree, folder, tmp_path / "found", names="flax")
    for (_, name), array in stored_in(tmp_path / "found").items():
        assert same_bits(array, arrays[name])


def test_wrong_codes(template, rng, tmp_path):
    weights = export.read_tensors(template)

    def write(changes=(), **options):
        given = weights | dict(changes)
        given = {name: leaf for name, leaf in given.items() if leaf is not None}
        export.compressed_tensors(given, template, tmp_path / "out", **options)

    def coded(name, quantizer, array=None):
        return {
            name: cage.quantize(weights[name] if array is None else array, quantizer)
        }

    out, qkv = "h.0.out.weight", "h.0.qkv.weight"
    line = TensorName("ours", out)
    assert_raises(
        [
            (
                lambda: write({out: None, "h.1.out.weight": None}),
                ValueError,
                r"`h.0.out.weight` \[64, 64\] of the template: no parameter.*h.1.out",
            ),
            (
                lambda: write({"h.2.out.weight": weights[out], "x": weights[out]}),
                ValueError,
                "`h.2.out.weight`: no tensor of the template.*`x`: no tensor",
            ),
            (
                lambda: write({"ours": weights[out]}, names=[line]),
                ValueError,
                r"`h.0.out.weight` \[64, 64\] and `ours` \[64, 64\]: for",
            ),
            (
                lambda: write({out: None, "ours": weights[qkv]}, names=[line]),
                ValueError,
                r"`ours` \[24, 64\]: for `h.0.out.weight` \[64, 64\]",
            ),
            (
                lambda: write(coded(qkv, BFLOAT16, jnp.ones((64, 64), jnp.bfloat16))),
                ValueError,
                r"`h.0.qkv.weight` \[64, 64\]: for .* \[24, 64\] of the template",
            ),
            (
                lambda: write(coded(out, cage.int4(axis=-2)) | coded(qkv, INT4)),
                ValueError,
                "`h.0.out.weight`: int4.*Use axis=-1.*"
                "`h.0.qkv.weight`: float32 scales in a template of bfloat16",
            ),
            (
                lambda: write(coded(out, cage.int4(axis=None))),
                ValueError,
                "groups of neighbours along the inputs alone",
            ),
            (
                lambda: write(coded(out, cage.nf4(axis=-1))),
                ValueError,
                "nf4.*does not hold. Choose one of",
            ),
            (
                lambda: write(coded(out, cage.int4(axis=-1, hadamard=32))),
                ValueError,
                "rotation",
            ),
            (
                lambda: write(coded("embed_tokens.weight", BFLOAT16)),
                ValueError,
                "only the weights of linear layers, not embeddings",
            ),
            (
                lambda: write({"positions": np.zeros(5, np.float32)}),
                ValueError,
                "float32, for int64",
            ),
            (
                lambda: write({"norm.weight": np.full(64, 1e6, np.float32)}),
                ValueError,
                "`norm.weight`: `dtype` must hold the values; got 'float16'",
            ),
            (
                lambda: write({"norm.weight": np.full(64, np.nan, np.float32)}),
                ValueError,
                "`norm.weight`: `codes` must have finite values",
            ),
            (lambda: write({"norm.weight": 1.0}), TypeError, "must be arrays"),
            (
                lambda: write({"norm.weight": jax.ShapeDtypeStruct((64,), "float32")}),
                TypeError,
                "`norm.weight`: `codes` must have values; got a shape",
            ),
            (lambda: write(names="maxtext"), ValueError, "`names` must be a table"),
            (lambda: write(names=[("a", "b")]), TypeError, "list of TensorName"),
            (lambda: write(dtype="float32"), ValueError, "`dtype` must be None"),
            (lambda: write(tokenizer={}), ValueError, "`tokenizer` must be None"),
            (lambda: write(shard_bytes=1), ValueError, "`shard_bytes` must be None"),
            (
                lambda: compressed_tensors(params_of(), CONFIG, "out", names="flax"),
                ValueError,
                "`names` must be None with a LlamaConfig",
            ),
            (lambda: TensorName("(", "x"), ValueError, "`path` must be a regular"),
            (lambda: TensorName("x", "x", "oii n"), ValueError, "`axes` must be a"),
            (lambda: TensorName("x", "x", "llo"), ValueError, "`axes` must be a"),
        ]
    )
    assert not (tmp_path / "out").exists()


def test_wrong_templates(template, rng, tmp_path):
    weights = {name: np.array(x) for name, x in export.read_tensors(template).items()}

    def write(folder=template):
        export.compressed_tensors(weights, folder, tmp_path / "out")

    def with_config(**content):
        (template / "config.json").write_text(json.dumps(content))
        write()

    def with_file(name, content):
        (template / name).write_bytes(content)
        write()

    def with_link(name):
        (template / name).unlink(missing_ok=True)
        (template / name).symlink_to("/etc/hostname")
        write()

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    quantized = {"quant_method": "gptq"}
    assert_raises(
        [
            (
                lambda: write(tmp_path / "none"),
                FileNotFoundError,
                "`config` must be the",
            ),
            (lambda: write(tmp_path), ValueError, "with its config.json"),
            (lambda: write(tmp_path / "empty"), ValueError, "model.safetensors, or"),
            (lambda: with_config(quantization_config=quantized), ValueError, "'gptq'"),
            (
                lambda: with_config(text_config={"quantization_config": quantized}),
                ValueError,
                "must be a model of floats.*'gptq'",
            ),
            (lambda: with_file("config.json", b"{"), MalformedFileError, "JSON"),
        ]
    )
    (template / "config.json").write_text("{}")
    assert_raises([(lambda: with_link("vocab.json"), MalformedFileError, "a link to")])
    (template / "vocab.json").unlink()
    shard = next(iter(template.glob("*.safetensors")))
    content = shard.read_bytes()
    assert_raises(
        [
            (
                lambda: with_file(shard.name, content[:-1]),
                MalformedFileError,
                "must be a safetensors file",
            ),
            (lambda: with_link(shard.name), MalformedFileError, "a link to"),
        ]
    )


def test_heads_and_layers_that_readers_do_not_take(rng, tmp_path):
    like = {"lm_head.weight": ("float32", (32, 64))}
    head = cage.quantize(jnp.ones((32, 64)), INT4)

    def write(name, **config):
        config = {"dtype": "float32"} | config
        folder = template_of(tmp_path / name, rng, like, **config)
        export.compressed_tensors({"lm_head.weight": head}, folder, tmp_path / "out")

    assert_raises(
        [
            (
                lambda: write("a", tie_word_embeddings=True),
                ValueError,
                "heads that are",
            ),
            (lambda: write("b", model_type="gpt2"), ValueError, "linear layers"),
        ]
    )
    write("c")
    assert (tmp_path / "out").is_dir()


def test_experts_and_mixed_layers_are_warned_of(rng, tmp_path):
    names = ("experts.0.up", "x.q_proj", "x.k_proj", "y.q_proj")
    like = {f"a.{name}.weight": ("float32", (32, 64)) for name in names}
    folder = template_of(tmp_path / "template", rng, like, dtype="float32")
    weights = export.read_tensors(folder)
    rules = cage.Rules([(r".*(up|q_proj)\.weight", INT4), (".*", None)])
    codes = cage.quantize(weights, rules)
    with pytest.warns(UserWarning) as found:
        export.compressed_tensors(codes, folder, tmp_path / "out")
    texts = [str(each.message) for each in found]
    assert len(texts) == 2
    assert "a.x.(q_proj|k_proj|v_proj)" in texts[0]
    assert "a.experts.0.up.weight" in texts[1]
    assert all(each.filename == __file__ for each in found)
