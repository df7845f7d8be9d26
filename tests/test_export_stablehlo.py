"""Programs of codes, run where cage_jax cannot be imported."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_quantized_array import QUANTIZERS

import cage_jax as cage
from cage_jax.export.descriptions import quantizer_of
from cage_jax.export.files import MalformedFileError
from cage_jax.export.stablehlo import stablehlo

pytest.importorskip("flatbuffers", reason="jax.export writes by it")
safetensors = pytest.importorskip("safetensors.numpy", reason="the format of weights")

RUN = """
import sys
sys.modules["cage_jax"] = None
import jax, numpy as np
from safetensors.numpy import load_file

folder, constants, *inputs = sys.argv[1:]
with open(folder + "/program.bin", "rb") as file:
    program = jax.export.deserialize(file.read())
weights = [] if constants == "True" else [load_file(folder + "/weights.safetensors")]
for name in inputs:
    found = program.call(*weights, np.load(name))
    arrays = {str(i): np.asarray(y) for i, y in enumerate(jax.tree.leaves(found))}
    np.savez(name.replace("npy", "npz"), **arrays)
"""


def run(folder, inputs, *, constants=False):
    """What the program makes of each input, in a process without cage_jax."""
    names = []
    for i, x in enumerate(inputs):
        names.append(str(folder.parent / f"{i}.npy"))
        np.save(names[-1], x)
    command = [sys.executable, "-W", "error", "-c", RUN, folder, str(constants), *names]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    outputs = []
    for name in names:
        with np.load(name.replace("npy", "npz")) as found:
            outputs.append([found[str(i)] for i in range(len(found))])
    return outputs


def expected_of(function, codes, x):
    return jax.tree.leaves(
        jax.jit(lambda codes, x: function(cage.dequantize(codes), x))(codes, x)
    )


def products(params, x):
    """Each kernel, and what it is multiplied to."""
    kernels = params["kernels"]
    return kernels, {name: x @ kernel for name, kernel in kernels.items()}


@pytest.fixture
def every(rng):
    """Codes of every quantizer."""
    x = jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)
    return {"kernels": {name: cage.quantize(x, q) for name, q in QUANTIZERS.items()}}


@pytest.mark.parametrize("weights", ["arguments", "constants"])
def test_every_quantizer_in_a_process_without_the_library(
    weights, every, tmp_path, rng
):
    folder, constants = tmp_path / "model", weights == "constants"
    like = [jax.ShapeDtypeStruct((1, 64), jnp.float32)]
    stablehlo(products, every, folder, arguments=like, shapes="b, 64", weights=weights)
    inputs = [rng.standard_normal((n, 64)).astype(np.float32) for n in (1, 7)]
    outputs = run(folder, inputs, constants=constants)
    for x, found in zip(inputs, outputs):
        expected = expected_of(products, every, x)
        assert len(found) == len(expected) == 2 * len(QUANTIZERS)
        for ours, theirs in zip(found, expected):
            assert ours.dtype == theirs.dtype
            assert ours.tobytes() == np.asarray(theirs).tobytes()
    assert (folder / "weights.safetensors").exists() != constants


def layers(params, x):
    """A model with lists, norms, bfloat16 and whole numbers among its parameters."""
    for layer in params["layers"]:
        x = jax.nn.relu(x @ layer["kernel"].astype(jnp.float32) + layer["bias"][None])
    table = params["table"].astype(jnp.float32)
    return {
        "y": (x * params["scale"].astype(jnp.float32)[None]) @ table.T,
        "n": x.shape[0],
    }


@pytest.fixture
def model(rng):
    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = {
        "layers": [{"kernel": normal(64, 64), "bias": normal(64)} for _ in range(2)],
        "scale": normal(64).astype(jnp.bfloat16),
        "table": jnp.asarray(rng.integers(-9, 9, (8, 64)), jnp.int32),
    }
    params["layers"][0]["kernel"] = params["layers"][0]["kernel"].astype(jnp.bfloat16)
    rules = [(r"layers/0/kernel", cage.int4(group_size=32, hadamard=32))]
    rules += [(r"layers/1/kernel", cage.nvfp4()), (r".*", None)]
    return cage.quantize(params, cage.Rules(rules))


INPUTS = {
    "int8": cage.int8(axis=-1),
    "of a tensor": cage.int8(axis=None),
    "offset": cage.int4(axis=-1, symmetric=False),
    "rotated": cage.quest(4, axis=-1, hadamard=32),
    "mxfp4": cage.mxfp4(axis=-1),
    "nvfp4": cage.nvfp4(axis=-1),
}


@pytest.mark.parametrize("name", INPUTS)
def test_quantized_inputs_of_any_batch(name, tmp_path, rng):
    rules = cage.Rules([(".*", cage.int4(group_size=32), INPUTS[name])])

    def products(params, x):
        return jax.nn.relu(x @ params["first"]) @ params["second"]

    params = {
        "first": rng.normal(size=(64, 32)).astype(np.float32),
        "second": rng.normal(size=(32, 8)).astype(np.float32),
    }
    codes = cage.quantize(params, rules)
    function = cage.quantize_activations(products, rules)
    like = [jax.ShapeDtypeStruct((1, 64), jnp.float32)]
    stablehlo(function, codes, tmp_path / "m", arguments=like, shapes="b, ...")
    inputs = [rng.normal(size=(n, 64)).astype(np.float32) for n in (1, 7)]
    for x, found in zip(inputs, run(tmp_path / "m", inputs)):
        (expected,) = expected_of(function, codes, x)
        np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)


def test_a_mean_over_an_axis_of_any_length(tmp_path):
    quantizer = cage.int8(axis=None, scale=cage.scales.Gaussian())
    like = [jax.ShapeDtypeStruct((1, 64), jnp.float32)]

    def rounded(params, x):
        return cage.fake_quant(x, quantizer) + params["one"]

    codes = {"one": np.ones((1, 1), np.float32)}
    with pytest.raises(ValueError, match="`scale` must be no mean over an axis of any"):
        stablehlo(rounded, codes, tmp_path / "m", arguments=like, shapes="b, ...")


def test_a_model_in_a_process_without_the_library(model, tmp_path, rng):
    inputs = [rng.standard_normal((n, 64)).astype(np.float32) for n in (1, 7)]
    stablehlo(layers, model, tmp_path / "m", arguments=inputs[:1], shapes="b, ...")
    for x, found in zip(inputs, run(tmp_path / "m", inputs)):
        expected = expected_of(layers, model, x)
        assert [y.tobytes() for y in found] == [
            np.asarray(y).tobytes() for y in expected
        ]
    weights = safetensors.load_file(tmp_path / "m" / "weights.safetensors")
    assert {name: (str(w.dtype), w.shape) for name, w in weights.items()} == {
        "layers/0/kernel/codes": ("uint8", (2048,)),
        "layers/0/kernel/scale": ("float32", (2, 64)),
        "layers/0/bias": ("float32", (64,)),
        "layers/1/kernel/codes": ("uint8", (2048,)),
        "layers/1/kernel/scale": ("uint8", (4, 64)),
        "layers/1/kernel/tensor_divisor": ("float32", (1, 1)),
        "layers/1/bias": ("float32", (64,)),
        "scale": ("uint16", (64,)),
        "table": ("int32", (8, 64)),
    }


def test_what_the_description_says(model, tmp_path):
    x = jnp.ones((1, 64))
    stablehlo(layers, model, tmp_path / "m", arguments=[x], shapes="b, ...")
    found = json.loads((tmp_path / "m" / "program.json").read_text())
    assert found["inputs"] == [{"path": "0", "shape": ["b", 64], "dtype": "float32"}]
    assert found["outputs"] == [
        {"path": "n", "shape": [], "dtype": "int32"},
        {"path": "y", "shape": ["b", 8], "dtype": "float32"},
    ]
    assert found["platforms"] == ["cpu", "tpu", "cuda"]
    assert found["weights"] == "weights.safetensors"
    assert found["jax"] == jax.__version__
    kernel = found["parameters"]["layers/1/kernel"]
    assert (kernel["shape"], kernel["dtype"]) == ([64, 64], "float32")
    assert quantizer_of(kernel["quantizer"]) == cage.nvfp4()


def test_codes_are_read_back(every, model, tmp_path):
    for name, codes in {"every": every, "model": model}.items():
        folder = tmp_path / name
        like = [jax.ShapeDtypeStruct((1, 64), jnp.float32)]
        stablehlo(lambda params, x: x, codes, folder, arguments=like)
        found, config, tokenizer = cage.load(folder)
        assert (config, tokenizer) == (None, {})
        assert jax.tree.structure(found) == jax.tree.structure(codes)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(codes)):
            assert one.dtype == other.dtype
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_codes_that_cannot_be_read_back(model, tmp_path, rng):
    like = [jax.ShapeDtypeStruct((1, 64), jnp.float32)]
    options = {"arguments": like, "weights": "constants"}
    stablehlo(lambda params, x: x, model, tmp_path / "constants", **options)
    with pytest.raises(ValueError, match=r"Export it with weights='arguments'"):
        cage.load(tmp_path / "constants")
    folder = tmp_path / "damaged"
    stablehlo(lambda params, x: x, model, folder, arguments=like)
    weights = safetensors.load_file(folder / "weights.safetensors")
    for name, wrong in {
        "layers/0/kernel/codes": np.zeros(2047, np.uint8),
        "layers/1/kernel/scale": np.zeros((4, 64), np.float32),
        "scale": np.zeros(64, np.float32),
    }.items():
        damaged = dict(weights) | {name: wrong}
        safetensors.save_file(damaged, folder / "weights.safetensors")
        with pytest.raises(MalformedFileError, match=f"`{name}`: it must be"):
            cage.load(folder)
    safetensors.save_file(weights, folder / "weights.safetensors")
    description = json.loads((folder / "program.json").read_text())
    (folder / "program.json").write_text(json.dumps(description | {"version": "2"}))
    with pytest.raises(MalformedFileError, match="upgrade cage_jax"):
        cage.load(folder)


# Bits of a parameter with its part of the scales, by hand.
@pytest.mark.parametrize(
    ("quantizer", "bits"),
    [
        (cage.int4(group_size=32), 5),
        (cage.int3(group_size=32), 4),
        (cage.int2(group_size=64), 2.5),
        (cage.mxfp4(), 4.25),
        (cage.binary(), 1 + 32 / 512),
        (cage.int8(), 8 + 32 / 512),
    ],
    ids=str,
)
def test_sizes(quantizer, bits, tmp_path, rng):
    kernel = jnp.asarray(rng.standard_normal((512, 1024)), jnp.float32)
    codes = {"kernel": cage.quantize(kernel, quantizer)}
    sizes = {}
    for weights in ("arguments", "constants"):
        folder = tmp_path / weights
        stablehlo(
            lambda params, x: x @ params["kernel"],
            codes,
            folder,
            arguments=[jnp.ones((1, 512))],
            weights=weights,
        )
        for file in folder.iterdir():
            sizes[weights, file.name] = file.stat().st_size
    stored = bits * kernel.size / 8
    program = sizes["arguments", "program.bin"]
    assert program < 20_000
    assert stored <= sizes["arguments", "weights.safetensors"] < stored + 1000
    assert stored <= sizes["constants", "program.bin"] < stored + program + 1000
    assert len(sizes) == 5


def test_codes_stay_codes_where_they_are_constants(tmp_path, rng):
    kernel = jnp.asarray(rng.standard_normal((512, 512)), jnp.float32)
    codes = {"kernel": cage.quantize(kernel, cage.int4(group_size=32))}
    stablehlo(
        lambda params, x: x @ params["kernel"],
        codes,
        tmp_path / "m",
        arguments=[jnp.ones((1, 512))],
        weights="constants",
    )
    program = jax.export.deserialize((tmp_path / "m" / "program.bin").read_bytes())
    compiled = jax.jit(program.call).lower(jnp.ones((1, 512))).compile()
    lines = compiled.as_text().splitlines()
    kinds = {line.split()[2] for line in lines if " constant(" in line}
    large = {kind for kind in kinds if re.search(r"\[[0-9,]{5,}\]", kind)}
    assert {kind.split("{")[0] for kind in large} == {"u8[131072]", "f32[16,512]"}


@pytest.mark.parametrize("platforms", [("cpu",), ("tpu",), ("cuda",), ("cpu", "tpu")])
def test_platforms_that_are_not_here(platforms, tmp_path):
    # Large enough for what is done in the order of a TPU's tiles, and for kernels.
    kernel = jnp.zeros((1024, 1024))
    quantizers = [cage.int4(group_size=32), cage.quest(4), cage.nvfp4(), cage.nf4()]
    codes = [cage.quantize(kernel, quantizer) for quantizer in quantizers]

    def function(params, x):
        for kernel in params:
            # Inputs in int8 too: what kernels do elsewhere.
            x = cage.fake_quant(x, cage.int8(axis=-1)) @ kernel
        return x

    arguments = [jax.ShapeDtypeStruct((256, 1024), jnp.float32)]
    stablehlo(function, codes, tmp_path / "m", arguments=arguments, platforms=platforms)
    program = jax.export.deserialize((tmp_path / "m" / "program.bin").read_bytes())
    assert program.platforms == platforms


def test_several_arguments_and_trees_of_them(model, tmp_path):
    def function(params, batch, factor):
        return layers(params, batch["x"])["y"] * factor

    arguments = ({"x": jnp.ones((2, 64))}, jnp.float32(3))
    shapes = ({"x": "b, ..."}, "")
    stablehlo(function, model, tmp_path / "m", arguments=arguments, shapes=shapes)
    program = jax.export.deserialize((tmp_path / "m" / "program.bin").read_bytes())
    weights = safetensors.load_file(tmp_path / "m" / "weights.safetensors")
    found = program.call(weights, {"x": jnp.ones((5, 64))}, jnp.float32(2))
    once = program.call(weights, {"x": jnp.ones((5, 64))}, jnp.float32(1))
    np.testing.assert_array_equal(found, 2 * once)


def test_a_module_of_nnx(tmp_path, rng):
    nnx = pytest.importorskip("flax.nnx")
    graph, state = nnx.split(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    rules = cage.Rules([(r"kernel", cage.int4(group_size=32)), (r".*", None)])
    codes = cage.quantize(state, rules)

    def function(state, x):
        return nnx.merge(graph, state)(x)

    x = rng.standard_normal((3, 64)).astype(np.float32)
    stablehlo(function, codes, tmp_path / "m", arguments=[x])
    ((found,),) = run(tmp_path / "m", [x])
    (expected,) = expected_of(function, codes, x)
    assert found.tobytes() == np.asarray(expected).tobytes()


# --- what is refused ------------------------------------------------------------------


def test_refusals(model, tmp_path, monkeypatch):
    x = jnp.ones((1, 64))

    def export(codes=model, arguments=(x,), **options):
        stablehlo(layers, codes, tmp_path / "m", arguments=arguments, **options)

    with pytest.raises(ValueError, match=r"`weights` must be one of .*; got 'both'"):
        export(weights="both")
    with pytest.raises(TypeError, match="`platforms` must be a sequence; got 'cpu'"):
        export(platforms="cpu")
    with pytest.raises(ValueError, match=r"`platforms` must be .*'gpu'.*'cuda'"):
        export(platforms=("gpu",))
    with pytest.raises(ValueError, match="`shapes` must fit the shapes of `arguments`"):
        export(shapes="b, t, u")
    with pytest.raises(TypeError, match="`path` must be a path; got NoneType"):
        stablehlo(layers, model, None, arguments=[x])
    with pytest.raises(TypeError, match=r"`arguments` must be a list .*Arr"):
        export(arguments=x)
    with pytest.raises(TypeError, match=r"`1/a`: `arguments` must be .*; got float"):
        export(arguments=(x, {"a": 1.0}))
    with pytest.raises(TypeError, match=r"`scale`: `codes` must be .*; got int4"):
        export(codes=model | {"scale": jnp.ones(3, jnp.int4)})
    with pytest.raises(TypeError, match=r"`scale`: `codes` must be .*; got float"):
        export(codes=model | {"scale": 1.0})
    with pytest.raises(TypeError, match=r"`scale`: `codes` must be .*; got key<fry>"):
        export(codes=model | {"scale": jax.random.key(0)})
    with pytest.raises(ValueError, match=r"`a/b`: .*got two"):
        export(codes={"a/b": x, "a": {"b": x}})
    monkeypatch.setattr(sys.modules[stablehlo.__module__], "_MOST_CONSTANTS", 1000)
    with pytest.raises(
        ValueError, match="must be 'arguments' for more than 1000 bytes"
    ):
        export(weights="constants")
    assert not list(tmp_path.iterdir())
    export()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export()
    export(overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["m"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"package flatbuffers.*cage_jax\[export\]"):
        export(overwrite=True)
