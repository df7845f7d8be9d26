"""The package as a whole: public names, the order of imports, documentation."""

import ast
import builtins
import doctest
import inspect
import pathlib
import subprocess
import sys

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


def test_imports_point_up():
    for name, height in HEIGHT.items():
        path = (FOLDER / name.replace(".", "/")).with_suffix(".py")
        for other in imported(ast.parse(path.read_text())):
            assert HEIGHT[other] < height, f"{name} imports {other}"


def imported(program):
    """The modules of the package that a program imports."""
    for node in ast.walk(program):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            if node.module.startswith("cage_jax"):
                assert node.module != "cage_jax"
                module = node.module.removeprefix("cage_jax.")
                # Kernels are imported where a program is compiled for them.
                if module in ("pallas", "export"):
                    yield from (f"{module}.{part.name}" for part in node.names)
                else:
                    yield module
        elif isinstance(node, ast.Import):
            assert not any(a.name.startswith("cage_jax") for a in node.names)


# --- documentation --------------------------------------------------------------------


def test_every_public_name_has_an_example_that_runs_where_it_is_pasted():
    """Each is run as a doctest of its module, whose names are not pasted with it."""
    for name in CONTRACT:
        value = getattr(cage_jax, name)
        documentation = inspect.getdoc(value)
        assert documentation.splitlines()[0].endswith((".", ";")), name
        assert "Example:\n  >>> " in documentation, name
        module = sys.modules[value.__module__]
        collected = {test.name: test for test in doctest.DocTestFinder().find(module)}
        examples = collected[f"{module.__name__}.{name}"].examples
        assert examples, name
        assert not unknown_names(examples), name


def unknown_names(examples):
    """The names that examples use and neither import nor bind, as far as they came."""
    known, unknown = set(dir(builtins)), set()
    for example in examples:
        nodes = list(ast.walk(ast.parse(example.source)))
        for node in nodes:
            match node:
                case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                    known.add(name)
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    known.add(name)
                case ast.alias(name=name, asname=alias):
                    known.add(alias or name.partition(".")[0])
        used = {node.id for node in nodes if isinstance(node, ast.Name)}
        unknown |= used - known
    return unknown


def test_names_that_an_example_does_not_bring_are_found():
    program = """
    >>> import numpy as np
    >>> def double(x):
    ...     return factor * x
    >>> [double(each) for each in np.ones(n)]
    >>> n = len("ab")
    """
    assert unknown_names(doctest.DocTestParser().get_examples(program)) == {
        "factor",
        "n",
    }


def test_public_methods_are_documented():
    for name in ("Rules", "Quantizer", "QuantizedArray"):
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
