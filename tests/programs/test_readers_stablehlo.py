"""Exported programs, run where cage_jax cannot be imported."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KERNEL, PRESETS, QUANTIZERS

import cage_jax as cage
from cage_jax.export.stablehlo import stablehlo

pytest.importorskip("flatbuffers", reason="jax.export writes by it")
pytest.importorskip("safetensors.numpy", reason="the format of weights")

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
    x, quantizers = rng.standard_normal(KERNEL, np.float32), QUANTIZERS | PRESETS
    return {"kernels": {name: cage.quantize(x, q) for name, q in quantizers.items()}}


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
        assert len(found) == len(expected) == 2 * len(every["kernels"])
        for ours, theirs in zip(found, expected):
            assert ours.dtype == theirs.dtype
            assert ours.tobytes() == np.asarray(theirs).tobytes()
    assert (folder / "weights.safetensors").exists() != constants


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
