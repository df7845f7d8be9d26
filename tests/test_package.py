import ast
import doctest
import inspect
import pathlib
import subprocess
import sys

import pytest

import cage_jax

CONTRACT = [
    "Rules",
    "Quantizer",
    "QuantizedArray",
    "fake_quant",
    "quantize",
    "dequantize",
    "quantization_error",
    "cage",
    "post_step",
    "decoupled",
    "cage_adamw",
    "cage_sgd",
    "silence_then_ramp",
    "silence_then_constant",
    "dose",
    "ramp_to_dose",
    "recommended",
    "int8",
    "int4",
    "int3",
    "int2",
    "quest",
    "binary",
    "ct_w4a16",
    "ct_w8a8",
    "fp8",
    "lsq",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "nf4",
    "nvfp4",
    "q4_0",
    "q4_1",
    "q8_0",
    "ternary",
    "with_grids",
    "choose_rotation",
    "quantize_activations",
    "calibrate",
    "low_bit",
    "low_bit_dot",
    "load",
]

# Each module may import those of the lines above its own.
LAYERS = [
    ["operations", "schedules", "shards", "paths", "products", "llama_config", "bits"],
    ["adamw", "packing", "pallas.dispatch"],
    ["exact", "hadamard"],
    ["formats"],
    ["scale_types"],
    ["scales"],
    ["quantizers"],
    ["presets", "pallas.tiles"],
    ["tile_order"],
    ["rounding", "report"],
    ["pallas.strips"],
    ["pallas.tpu", "pallas.gpu", "pallas.products_tpu"],
    ["pallas.kernels"],
    ["rules", "straight_through", "quantized_array"],
    ["quantization"],
    ["rotation", "activations"],
    ["kv_cache", "diagnostics", "serving"],
    ["flax", "qwix", "llama", "export.files", "export.model", "export.folding"],
    [
        "export.safetensors_files",
        "export.gguf_files",
        "export.tensors",
        "export.descriptions",
        "export.tokenizer_files",
    ],
    ["export.gguf_blocks", "export.gguf_tokenizer", "export.compressed_tensors"],
    ["export.gguf", "export.trees", "export.text"],
    ["export.stablehlo", "export.native", "export.checking", "perplexity"],
    ["export.loading"],
    ["statistics", "curvature"],
    ["recommendation", "weightings"],
    ["transform"],
    ["fused"],
    ["optimizers"],
    ["baselines.arguments"],
    [
        "baselines.averaging",
        "baselines.efqat",
        "baselines.ewgs",
        "baselines.lotion",
        "baselines.oscillation",
        "baselines.relaxation",
        "baselines.winq",
        "baselines.zeroth_order",
    ],
    ["export.__init__"],
    ["__init__", "pallas.__init__", "baselines.__init__"],
    ["terminal"],
    ["command_line"],
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
FOLDER = pathlib.Path(cage_jax.__file__).parent

# Everything a user need not have: optional parts, tests, demonstrations, bridges.
OPTIONAL = [
    "flax",
    "chex",
    "orbax",
    "sklearn",
    "matplotlib",
    "rich",
    "tyro",
    "hypothesis",
    "pytest",
    "torch",
    "haiku",
    "equinox",
    "qwix",
    "tensorflow",
    "transformers",
    "safetensors",
    "gguf",
    "pandas",
]

PROGRAM = f"""
import sys
import jax, optax

before = {{name.partition(".")[0] for name in sys.modules}}
for name in {OPTIONAL}:
    if name not in before:  # what optax needs itself is no part of this
        sys.modules[name] = None
import cage_jax
for name in {CONTRACT}:
    assert hasattr(cage_jax, name), name
after = {{name.partition(".")[0] for name in sys.modules}}
print(*sorted(after - before - set(sys.stdlib_module_names) - set({OPTIONAL})))
"""


def test_import_needs_jax_and_optax_alone():
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=FOLDER.parent,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["cage_jax"]


def test_the_public_names():
    assert sorted(cage_jax.__all__) == sorted(CONTRACT)
    assert cage_jax.__version__[0].isdigit()


def test_there_is_a_place_for_every_module():
    files = {path.relative_to(FOLDER) for path in FOLDER.rglob("*.py")}
    assert {".".join(path.with_suffix("").parts) for path in files} == set(HEIGHT)


@pytest.mark.parametrize("name", HEIGHT)
def test_imports_point_up(name):
    imported = set()
    path = (FOLDER / name.replace(".", "/")).with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            if node.module.startswith("cage_jax"):
                assert node.module != "cage_jax"
                module = node.module.removeprefix("cage_jax.")
                # Kernels are imported where a program is compiled for them.
                if module in ("pallas", "export"):
                    imported |= {f"{module}.{part.name}" for part in node.names}
                else:
                    imported.add(module)
        elif isinstance(node, ast.Import):
            assert not any(a.name.startswith("cage_jax") for a in node.names)
    assert all(HEIGHT[other] < HEIGHT[name] for other in imported)


@pytest.mark.parametrize("name", CONTRACT)
def test_every_public_name_has_an_example(name):
    documentation = inspect.getdoc(getattr(cage_jax, name))
    assert documentation.splitlines()[0].endswith((".", ";"))
    assert "Example:\n  >>> " in documentation


@pytest.mark.parametrize("name", ["Rules", "Quantizer", "QuantizedArray"])
def test_public_methods_are_documented(name):
    for attribute, value in inspect.getmembers(getattr(cage_jax, name)):
        if inspect.isfunction(value) or isinstance(value, property):
            assert attribute.startswith("_") or inspect.getdoc(value), attribute


def test_descriptions_are_static_arguments():
    for value in (cage_jax.Rules([]), cage_jax.int4(), cage_jax.quest(4)):
        assert hash(value) == hash(value)
        assert not callable(value)


def test_options_are_keyword_only():
    for name in ("int8", "int4", "int3", "int2"):
        parameters = inspect.signature(getattr(cage_jax, name)).parameters.values()
        assert {p.kind for p in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    for name in ("fake_quant", "quantize", "quantization_error"):
        grid = inspect.signature(getattr(cage_jax, name)).parameters["grid"]
        assert grid.kind == inspect.Parameter.KEYWORD_ONLY


def test_the_quick_start_of_the_readme(tmp_path):
    readme = (FOLDER.parent / "README.md").read_text()
    program = readme.split("```python\n")[1].split("```")[0]
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "int4 320 bytes" in run.stdout
    shown = readme.split("what is not:\n\n```\n")[1].split("```")[0]
    assert run.stdout.endswith(shown)


@pytest.mark.parametrize("name", CONTRACT)
def test_examples_run_where_they_are_pasted(name):
    found = doctest.DocTestFinder(recurse=False).find(
        getattr(cage_jax, name), name, module=cage_jax, globs={}
    )
    (example,) = found
    assert example.examples
    result = doctest.DocTestRunner().run(example)
    assert result.attempted == len(example.examples)
    assert not result.failed
