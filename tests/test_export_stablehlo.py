"""Programs of codes: what is exported, what it computes, and what is refused."""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    KERNEL,
    PRESETS,
    QUANTIZERS,
    assert_raises,
    assert_same,
    random_codes,
)
from small_llama import write_anew

import cage_jax as cage
from cage_jax.export.descriptions import quantizer_of
from cage_jax.export.files import MalformedFileError
from cage_jax.export.stablehlo import stablehlo

pytest.importorskip("flatbuffers", reason="jax.export writes by it")
safetensors = pytest.importorskip("safetensors.numpy", reason="the format of weights")

X = jax.ShapeDtypeStruct((1, 64), jnp.float32)


def codes_of(quantizer, shape=KERNEL):
    """Draws codes, the same for each quantizer."""
    return random_codes(np.random.default_rng(0), quantizer, shape)


def program_in(folder):
    """Reads the program as those do who have jax alone."""
    return jax.export.deserialize((folder / "program.bin").read_bytes())


def run(folder, *arguments):
    """Computes what the program in a folder makes of its weights and of arguments."""
    weights = safetensors.load_file(folder / "weights.safetensors")
    return program_in(folder).call(weights, *arguments)


def computed(function, codes, *arguments):
    """Computes a function of the values of codes."""
    values = jax.jit(lambda codes, *args: function(cage.dequantize(codes), *args))
    return values(codes, *arguments)


# --- what a program computes ----------------------------------------------------------


def test_values_of_every_quantizer(tmp_path):
    codes = {name: codes_of(q) for name, q in (QUANTIZERS | PRESETS).items()}
    one = jax.ShapeDtypeStruct((), jnp.float32)

    def function(params, x):
        return jax.tree.map(lambda kernel: kernel * x, params)

    stablehlo(function, codes, tmp_path / "m", arguments=[one])
    found = run(tmp_path / "m", np.float32(1))
    assert_same(found, computed(function, codes, np.float32(1)))
    assert_same(cage.load(tmp_path / "m").params, codes)


def test_a_program_names_no_source_file_of_this_machine(tmp_path):
    limit = jax.config.jax_traceback_in_locations_limit

    @jax.jit
    def function(params, x):
        return jnp.tanh(x @ params["w"])

    codes = {"w": codes_of(cage.int4(), (64, 8))}
    x = np.linspace(-1, 1, 64, dtype=np.float32)[None]
    expected = computed(function, codes, x)  # which JAX has traced before
    stablehlo(function, codes, tmp_path / "m", arguments=[x])
    program = (tmp_path / "m" / "program.bin").read_bytes()
    folders = [pathlib.Path(file).parent for file in (__file__, cage.__file__)]
    for text in (*map(str, folders), *(folder.name for folder in folders), ".py"):
        assert text.encode() not in program, text
    assert_same(run(tmp_path / "m", x), expected)
    assert jax.config.jax_traceback_in_locations_limit == limit


def layers(params, x):
    """A model with lists, norms, bfloat16 and whole numbers among its parameters."""
    for layer in params["layers"]:
        x = jax.nn.relu(x @ layer["kernel"].astype(jnp.float32) + layer["bias"][None])
    table = params["table"].astype(jnp.float32)
    return {
        "y": (x * params["scale"].astype(jnp.float32)[None]) @ table.T,
        "n": x.shape[0],
    }


def made():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {
        "layers": [
            {
                "kernel": random_codes(
                    rng, cage.int4(group_size=32, hadamard=32), (64, 64), "bfloat16"
                ),
                "bias": normal(64),
            },
            {
                "kernel": random_codes(rng, cage.nvfp4(), (64, 64)),
                "bias": normal(64),
            },
        ],
        "scale": jnp.asarray(rng.standard_normal(64).astype(jnp.bfloat16)),
        "table": jnp.asarray(rng.integers(-9, 9, (8, 64)), jnp.int32),
    }


MODEL = made()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model, exported for batches of any size."""
    folder = tmp_path_factory.mktemp("exported") / "m"
    stablehlo(layers, MODEL, folder, arguments=[X], shapes="b, ...")
    return folder


def test_a_model_of_any_batch(folder, tmp_path, rng):
    constants = tmp_path / "constants"
    options = {"arguments": [X], "shapes": "b, ...", "weights": "constants"}
    stablehlo(layers, MODEL, constants, **options)
    assert not (constants / "weights.safetensors").exists()
    for batch in (1, 7):
        x = rng.standard_normal((batch, 64)).astype(np.float32)
        expected = computed(layers, MODEL, x)
        assert_same(run(folder, x), expected)
    assert_same(program_in(constants).call(x), expected)


def test_what_is_stored(folder):
    weights = safetensors.load_file(folder / "weights.safetensors")
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


def test_what_the_description_says(folder):
    found = json.loads((folder / "program.json").read_text())
    assert found["inputs"] == [{"path": "0", "shape": ["b", 64], "dtype": "float32"}]
    assert found["outputs"] == [
        {"path": "n", "shape": [], "dtype": "int32"},
        {"path": "y", "shape": ["b", 8], "dtype": "float32"},
    ]
    assert found["platforms"] == ["cpu", "tpu", "cuda"]
    assert found["weights"] == "weights.safetensors"
    assert found["jax"] == jax.__version__
    assert found["calling_convention_version"] == (
        program_in(folder).calling_convention_version
    )
    kernel = found["parameters"]["layers/1/kernel"]
    assert (kernel["shape"], kernel["dtype"]) == ([64, 64], "float32")
    assert quantizer_of(kernel["quantizer"]) == cage.nvfp4(axis=-2)


INPUTS = {
    "int8": cage.int8(axis=-1),
    "of a tensor": cage.int8(axis=None),
    "offset": cage.int4(axis=-1, symmetric=False),
    "rotated": cage.quest(4, axis=-1, hadamard=32),
    "mxfp4": cage.mxfp4(axis=-1),
    "nvfp4": cage.nvfp4(axis=-1),
}


def test_quantized_inputs_of_any_batch(tmp_path, rng):
    weights = cage.int4(group_size=32)
    rules = cage.Rules([(name, weights, each) for name, each in INPUTS.items()])

    def products(params, x):
        return {name: x @ kernel for name, kernel in params.items()}

    codes = {name: codes_of(weights) for name in INPUTS}
    function = cage.quantize_activations(products, rules)
    stablehlo(function, codes, tmp_path / "m", arguments=[X], shapes="b, ...")
    x = rng.standard_normal((7, 64)).astype(np.float32)
    found = run(tmp_path / "m", x)
    expected = computed(function, codes, x)
    for name in INPUTS:
        np.testing.assert_allclose(
            found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name
        )


def test_a_mean_over_an_axis_of_any_length(tmp_path):
    quantizer = cage.int8(axis=None, scale=cage.scales.Gaussian())

    def rounded(params, x):
        return cage.fake_quant(x, quantizer) + params["one"]

    codes = {"one": np.ones((1, 1), np.float32)}
    with pytest.raises(ValueError, match="`scale` must not be a mean over an axis of"):
        stablehlo(rounded, codes, tmp_path / "m", arguments=[X], shapes="b, ...")


def test_several_arguments_and_trees_of_them(tmp_path):
    def function(params, batch, factor):
        return layers(params, batch["x"])["y"] * factor

    arguments = ({"x": np.ones((2, 64), np.float32)}, np.float32(3))
    shapes = ({"x": "b, ..."}, "")
    stablehlo(function, MODEL, tmp_path / "m", arguments=arguments, shapes=shapes)
    batch = {"x": np.ones((5, 64), np.float32)}
    found = run(tmp_path / "m", batch, np.float32(2))
    once = run(tmp_path / "m", batch, np.float32(1))
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
    found = run(tmp_path / "m", x)
    expected = computed(function, codes, x)
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


# --- what is stored and read ----------------------------------------------------------


def test_codes_are_read_back(folder):
    found, config, tokenizer = cage.load(folder)
    assert (config, tokenizer) == (None, {})
    assert_same(found, MODEL)


def test_codes_that_cannot_be_read_back(tmp_path):
    options = {"arguments": [X], "weights": "constants"}
    stablehlo(lambda params, x: x, MODEL, tmp_path / "constants", **options)
    text = r"^`path` must be .*constants in .* Export it with weights='arguments'"
    with pytest.raises(ValueError, match=text):
        cage.load(tmp_path / "constants")
    folder = tmp_path / "damaged"
    stablehlo(lambda params, x: x, MODEL, folder, arguments=[X])
    weights = safetensors.load_file(folder / "weights.safetensors")
    for name, wrong in {
        "layers/0/kernel/codes": np.zeros(2047, np.uint8),
        "layers/1/kernel/scale": np.zeros((4, 64), np.float32),
        "scale": np.zeros(64, np.float32),
    }.items():
        damaged = dict(weights) | {name: wrong}
        write_anew(folder / "weights.safetensors", safetensors.save(damaged))
        with pytest.raises(MalformedFileError, match=f"`{name}`: it must be"):
            cage.load(folder)
    write_anew(folder / "weights.safetensors", safetensors.save(weights))
    description = json.loads((folder / "program.json").read_text())
    (folder / "program.json").write_text(json.dumps(description | {"version": "2"}))
    with pytest.raises(MalformedFileError, match="upgrade cage_jax"):
        cage.load(folder)


def test_sizes(tmp_path):
    # Bits of a parameter with its part of the scales, by hand.
    for number, (quantizer, bits) in enumerate(
        [
            (cage.int4(group_size=32), 5),
            (cage.int3(group_size=32), 4),
            (cage.int2(group_size=64), 2.5),
            (cage.mxfp4(), 4.25),
            (cage.binary(), 1 + 32 / 512),
            (cage.int8(), 8 + 32 / 512),
        ]
    ):
        codes = {"kernel": codes_of(quantizer, (512, 1024))}
        sizes = {}
        for weights in ("arguments", "constants"):
            folder = tmp_path / f"{weights} {number}"
            stablehlo(
                lambda params, x: x @ params["kernel"],
                codes,
                folder,
                arguments=[jax.ShapeDtypeStruct((1, 512), jnp.float32)],
                weights=weights,
            )
            for file in folder.iterdir():
                sizes[weights, file.name] = file.stat().st_size
        stored = bits * 512 * 1024 / 8
        program = sizes["arguments", "program.bin"]
        assert program < 20_000
        assert stored <= sizes["arguments", "weights.safetensors"] < stored + 1000
        assert stored <= sizes["constants", "program.bin"] < stored + program + 1000
        assert len(sizes) == 7


def test_codes_stay_codes_where_they_are_constants(tmp_path):
    codes = {"kernel": codes_of(cage.int4(group_size=32), (512, 512))}
    inputs = jax.ShapeDtypeStruct((1, 512), jnp.float32)
    stablehlo(
        lambda params, x: x @ params["kernel"],
        codes,
        tmp_path / "m",
        arguments=[inputs],
        weights="constants",
    )
    program = program_in(tmp_path / "m")
    compiled = jax.jit(program.call).lower(inputs).compile()
    lines = compiled.as_text().splitlines()
    kinds = {line.split()[2] for line in lines if " constant(" in line}
    large = {kind for kind in kinds if re.search(r"\[[0-9,]{5,}\]", kind)}
    assert {kind.split("{")[0] for kind in large} == {"u8[131072]", "f32[16,512]"}


@pytest.mark.parametrize("platforms", [("cpu",), ("tpu",), ("cuda",), ("cpu", "tpu")])
def test_platforms_that_are_not_here(platforms, tmp_path):
    # Large enough for what is done in the order of a TPU's tiles, and for kernels.
    quantizers = [cage.int4(group_size=32), cage.quest(4), cage.nvfp4(), cage.nf4()]
    codes = [codes_of(quantizer, (1024, 1024)) for quantizer in quantizers]

    def function(params, x):
        for kernel in params:
            # Inputs in int8 too: what kernels do elsewhere.
            x = cage.fake_quant(x, cage.int8(axis=-1)) @ kernel
        return x

    arguments = [jax.ShapeDtypeStruct((256, 1024), jnp.float32)]
    stablehlo(function, codes, tmp_path / "m", arguments=arguments, platforms=platforms)
    program = program_in(tmp_path / "m")
    assert program.platforms == platforms


# --- what is refused ------------------------------------------------------------------


def test_refusals(tmp_path, monkeypatch):
    x = np.ones((1, 64), np.float32)

    def export(codes=MODEL, arguments=(x,), **options):
        stablehlo(layers, codes, tmp_path / "m", arguments=arguments, **options)

    def row(error, text, **options):
        return lambda: export(**options), error, text

    def of_scale(scale):
        return MODEL | {"scale": scale}

    assert_raises(
        [
            row(ValueError, r"`weights` must be one of .*; got 'both'", weights="both"),
            row(
                TypeError,
                "`platforms` must be a sequence; got 'cpu'",
                platforms="cpu",
            ),
            row(ValueError, r"`platforms` must be .*'gpu'.*'cuda'", platforms=("gpu",)),
            row(ValueError, r"`platforms` must be .*got \(\)", platforms=()),
            row(
                ValueError,
                "`shapes` must fit the shapes of `arguments`",
                shapes="b, t, u",
            ),
            row(TypeError, r"`arguments` must be a list .*arr", arguments=x),
            row(
                TypeError,
                r"`1/a`: `arguments` must be .*; got float",
                arguments=(x, {"a": 1.0}),
            ),
            row(
                TypeError,
                r"`scale`: `codes` must be .*; got int4",
                codes=of_scale(np.ones(3).astype(jnp.int4)),
            ),
            row(
                TypeError,
                r"`scale`: `codes` must be .*; got float",
                codes=of_scale(1.0),
            ),
            row(
                TypeError,
                r"`scale`: `codes` must be .*; got key<fry>",
                codes=of_scale(jax.random.key(0)),
            ),
            row(ValueError, r"`a/b`: .*got two", codes={"a/b": x, "a": {"b": x}}),
            (
                lambda: stablehlo(layers, MODEL, None, arguments=[x]),
                TypeError,
                "`path` must be a path; got NoneType",
            ),
        ]
    )
    monkeypatch.setattr(sys.modules[stablehlo.__module__], "_MOST_CONSTANTS", 1000)
    text = "must be 'arguments' for more than 1000 bytes"
    assert_raises([row(ValueError, text, weights="constants")])
    assert not list(tmp_path.iterdir())
    export()
    assert_raises([row(FileExistsError, "overwrite=True")])
    export(overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["m"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = r"package flatbuffers.*cage_jax\[export\]"
    assert_raises([row(ImportError, text, overwrite=True)])
