"""The package as a whole: public names, the order of imports, documentation."""

import ast
import builtins
import doctest
import inspect
import itertools
import pathlib
import re
import subprocess
import sys
import tomllib
import typing

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
    "coupled",
    "init_from",
    "move_state",
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
    "gptq",
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
    "choose_bits",
    "plan",
    "choose_rotation",
    "quantize_activations",
    "calibrate",
    "distill",
    "low_bit",
    "low_bit_dot",
    "audit",
    "load",
    "report",
    "resolve",
    "seq",
    "suggest",
    "tune",
]

# A folder imports only itself and those before it.
FOLDERS = ["arrays", "quantizers", "pallas", "core", "program", "optim", "contrib"]
FOLDERS += ["finetuning"]
FOLDERS += ["llama", "flax", "qwix", "export", "cli"]
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


def test_public_modules_are_listed_and_imported_when_used():
    shown = set(dir(cage_jax)) - set(CONTRACT) - {"__version__"}
    assert shown == {
        *("contrib", "curvature", "export", "finetuning", "flax", "formats"),
        *("kv_cache", "llama"),
        *("packing", "qwix", "scale_types", "scales", "weightings"),
    }
    for name in ("contrib", "curvature", "formats", "scales", "export", "finetuning"):
        assert inspect.ismodule(getattr(cage_jax, name))
    text = "no attribute 'int5'. Did you mean `int8` or `int4` or `int3`"
    with pytest.raises(AttributeError, match=text):
        _ = cage_jax.int5
    for name, place in cage_jax._ELSEWHERE.items():
        with pytest.raises(AttributeError, match=re.escape(f"{name!r}. Use `{place}`")):
            getattr(cage_jax, name)
        found = cage_jax
        for part in re.match(r"[\w.]+", place)[0].split("."):
            found = getattr(found, part)
        assert callable(found)


def test_a_folder_imports_only_folders_below_it():
    assert {path.parent.name for path in FOLDER.glob("*/__init__.py")} == set(FOLDERS)
    for height, folder in enumerate(FOLDERS):
        for path in (FOLDER / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and "cage_jax" in node.module:
                    below = node.module.split(".")[1]
                    lower = ["_project", *FOLDERS[: height + 1]]
                    assert below in lower, f"{path} imports {below}"


def test_subjects_of_finetuning_do_not_import_each_other():
    paths = [*(FOLDER / "finetuning").glob("*/*.py")]
    subjects = {path.parent.name for path in paths}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                match node.module.split("."):
                    case "cage_jax", "finetuning", folder, *_:
                        assert folder not in subjects - {path.parent.name}, path


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
        examples = collected[f"{module.__name__}.{value.__name__}"].examples
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


def test_docstrings_begin_with_what_they_are_about():
    """A function's with a verb, a property's or a class's with its noun."""
    words = re.compile(r'\s*r?"""(Of|That|Those|Which|Likewise|As)\b')
    for folder in ("cage_jax", "tests"):
        for path in (FOLDER.parent / folder).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not words.match(line), f"{path}:{number}: {line}"


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


def test_cage_is_coupled():
    assert cage_jax.cage is cage_jax.coupled
    assert cage_jax.coupled.__name__ == "coupled"


def test_every_public_function_answers_an_unknown_name():
    for module in (cage_jax, cage_jax.contrib, cage_jax.curvature, cage_jax.finetuning):
        for function in (getattr(module, name) for name in module.__all__):
            if inspect.isfunction(function) and not passes_names_on(function):
                with pytest.raises(TypeError, match="has no argument `unknown`"):
                    function(unknown=1)


def passes_names_on(function):
    """Whether keyword arguments are those of another function, which is given."""
    kinds = {each.kind for each in inspect.signature(function).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def test_every_public_function_has_types():
    modules = cage_jax, cage_jax.contrib, cage_jax.curvature, cage_jax.flax
    for module in (*modules, cage_jax.finetuning):
        for function in (getattr(module, name) for name in module.__all__):
            if inspect.isfunction(function) and not typing.get_overloads(function):
                signature = inspect.signature(function)
                for parameter in signature.parameters.values():
                    assert parameter.annotation is not inspect.Parameter.empty, function
                assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("name", ["coupled", "cage_adamw", "cage_sgd"])
def test_a_strength_is_given_by_name(name):
    function = getattr(cage_jax, name)
    first = [] if name == "coupled" else [1e-3]
    with pytest.raises(TypeError, match="Give all others by name"):
        function(*first, cage_jax.Rules([]), 0.9, 0.95)
    for each in (function, cage_jax.decoupled, cage_jax.post_step):
        strength = inspect.signature(each).parameters["strength"]
        assert strength.kind == inspect.Parameter.KEYWORD_ONLY


def test_every_fault_is_one_text_of_its_file():
    groups = tomllib.loads(pathlib.Path(__file__).with_name("faults.toml").read_text())
    groups.pop("tests")
    for fault in itertools.chain(*groups.values()):
        text = (pathlib.Path(cage_jax.__file__).parent / fault["file"]).read_text()
        assert text.count(fault["right"]) == 1, fault["name"]
