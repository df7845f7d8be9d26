"""What mypy says of a user's program, and in which line."""

import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("mypy", reason="mypy is in the extra lint, which CI installs")

ROOT = pathlib.Path(__file__).parents[1]
# Types of JAX, NumPy and Optax are read; those of what is optional would take longer.
CONFIG = """
[mypy]
ignore_missing_imports = True
follow_imports = silent
[mypy-flax.*,orbax.*,tokenizers.*,gguf.*,qwix.*]
follow_imports = skip
"""

RIGHT = """
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cage_jax as cage

params: dict[str, jax.Array] = {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}
rules = cage.Rules([(".*kernel", "int4", "int8"), ("head", cage.nf4()), (".*", None)])
quantizer: cage.Quantizer = cage.int4(group_size=32, symmetric=False)
rounded: jax.Array = cage.fake_quant(params["kernel"], quantizer)
tree: dict[str, jax.Array] = cage.fake_quant(params, rules)
codes: cage.QuantizedArray = cage.quantize(np.ones((64, 32)), quantizer)
values: jax.Array = cage.dequantize(codes)
error: dict[str, jax.Array] = cage.quantization_error(params, rules)
tx: optax.GradientTransformation
tx = cage.cage_adamw(1e-3, rules, strength=cage.ramp_to_dose(1e-3, 1000))
tx = optax.chain(cage.coupled(rules, strength=0.5), optax.sgd(0.1))
tx = cage.decoupled(optax.lion(1e-3), rules, learning_rate=1e-3, total_steps=1000)
state: Any = cage.init_from(tx, params, optax.lion(1e-3).init(params))
source: cage.curvature.Curvature = cage.curvature.hutchinson(decay=0.9)
tx = cage.contrib.dampening(rules, strength=0.1)


def model(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ params["kernel"]


y: jax.Array = cage.quantize_activations(model, rules)(params, jnp.ones((2, 64)))
z: jax.Array = cage.low_bit(model, rules)(cage.quantize(params, rules), y)
"""

# Each line with a comment is wrong, and the comment is in the error.
WRONG = """
import jax
import jax.numpy as jnp
import optax

import cage_jax as cage

x = jnp.ones((64, 32))
rules = cage.Rules([(".*", cage.int4())])
cage.int4(group_size="a")  # "group_size" has incompatible type "str"
cage.int8(nonsense=1)  # Unexpected keyword argument "nonsense"
cage.int5()  # Module has no attribute "int5"
cage.contrib.nothing  # Module has no attribute "nothing"
cage.quest()  # Missing positional argument "bits"
cage.mxfp4(rounding="sideways")  # "rounding" to "mxfp4" has incompatible type
cage.cage_adamw(1e-3, rules, 0.9, 0.95)  # Too many positional arguments
cage.cage_adamw(1e-3, rules, steps=100)  # Unexpected keyword argument "steps"
cage.coupled(rules, 0.5)  # Too many positional arguments
cage.decoupled(optax.adam(1e-3), rules)  # Missing named argument "learning_rate"
cage.fake_quant({"w": x}, cage.int4())  # No overload variant of "fake_quant"
codes: jax.Array = cage.quantize(x, cage.int4())  # has type "QuantizedArray"
cage.Rules([(".*", 4)])  # incompatible type "tuple[str, int]"
cage.curvature.hutchinson(decays=0.9)  # Unexpected keyword argument "decays"
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Pairs of a line's number and an error for each of the two programs."""
    folder = tmp_path_factory.mktemp("typing")
    (folder / "mypy.ini").write_text(CONFIG)
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(WRONG)
    cache = ROOT / ".mypy_cache" / "of_users"
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", cache, "right.py", "wrong.py"],
        cwd=folder,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not found.stderr, found.stderr
    lines = re.findall(r"^(\w+)\.py:(\d+): error: (.*)$", found.stdout, re.MULTILINE)
    return [(name, int(number), text) for name, number, text in lines]


def test_a_right_program_has_no_errors(errors):
    assert not [each for each in errors if each[0] == "right"]


def test_each_wrong_line_of_a_program_has_its_error(errors):
    told = {}
    for name, number, text in errors:
        if name == "wrong":
            told.setdefault(number, text)
    wrong = {
        number: line.partition("  # ")[2]
        for number, line in enumerate(WRONG.splitlines(), 1)
        if "  # " in line
    }
    assert sorted(told) == sorted(wrong)
    for number, text in wrong.items():
        assert text in told[number]
