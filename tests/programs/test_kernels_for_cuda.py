"""Kernels compiled for an H200: registers, what they move, and that they are there."""

import json
import pathlib
import subprocess
import sys

import cuda_aot
import gpu
import jax
import pytest
from kernel_cases import CASES_FOR_GPU as CASES

import cage_jax as cage

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPT = """
import json, pathlib, sys, tempfile
import cuda_aot, gpu

with tempfile.TemporaryDirectory() as folder:
    usage = cuda_aot.watched(pathlib.Path(folder))
    print(json.dumps([gpu.counted(case, usage, False) for case in gpu.CASES]))
"""
THROUGH_THE_OPTIMIZER = """
import json, re
import cuda_aot, jax, jax.numpy as jnp
import cage_jax as cage

tx = cage.cage_adamw(1e-3, cage.Rules([(".*", cage.quest(4))]), strength=1.0)
params = {"x": jax.ShapeDtypeStruct((1024, 2048), jnp.float32)}

def step(params, state, gradient):
    return tx.fused_step(gradient, state, params, implementation="pallas")

state = jax.eval_shape(tx.init, params)
program = cuda_aot.compiled(step, params, state, params, donated=(0, 1))
print(json.dumps([
    "cage_adamw_step" in program.as_text(),
    program.memory_analysis().alias_size_in_bytes / 2**23,
]))
"""
BY_DEFAULT = """
import json, pathlib, sys
import cuda_aot, hlo, jax, jax.numpy as jnp
import cage_jax as cage
from cage_jax.pallas import tuned

tuned.path = lambda: pathlib.Path(sys.argv[1]) / "kernels.json"
quantizer, shape = cage.quest(4, axis=-2), (4096, 8192)
tx = cage.cage_adamw(1e-3, cage.Rules([(".*", quantizer)]), strength=1.0)
params = {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}
state = jax.eval_shape(tx.init, params)

def step(params, state, gradient):
    return tx.fused_step(gradient, state, params)

def copies():
    forward = cuda_aot.compiled(lambda x: cage.fake_quant(x, quantizer), params["x"])
    whole = cuda_aot.compiled(step, params, state, params, donated=(0, 1))
    texts = forward.as_text(), whole.as_text()
    return [hlo.moved(text).memory / (4 * 4096 * 8192) for text in texts]

found = [copies()]  # nothing can be compared without an H200
for operation in ("fake_quant", "adamw_step"):
    name = f"{operation} {shape} float32 {quantizer!r}"
    tuned.keep("NVIDIA H200", {name: tuned.Measured(True)})
print(json.dumps([*found, copies()]))
"""
needs_plugin = pytest.mark.skipif(
    cuda_aot.missing() is not None, reason=str(cuda_aot.missing())
)


def said(script, *arguments):
    """What a script prints last, as JSON."""
    # A process of its own: the plugin registers itself where JAX starts.
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_plugin
def test_every_kernel_fits_the_registers_and_moves_the_least():
    for case, found in zip(CASES, said(SCRIPT), strict=True):
        columns = case.quantizer.axis == -2 and case.quantizer.group_size is None
        if columns and case.quantizer.hadamard is None:
            assert found == {}, case  # left to the compiler
            continue
        assert found["kernels"] == sorted(case.kernels)
        assert found["spilled"] == 0, case
        assert found["registers"] <= 255
        assert found["kernel units"] == pytest.approx(case.least, rel=1e-3), case
        assert found["in place"] == pytest.approx(3 * case.is_step, abs=1e-4)
        assert found["read again"] <= (case.quantizer.group_size is None)


@needs_plugin
def test_by_default_a_program_for_a_gpu_takes_what_was_measured_on_one(tmp_path):
    (forward, step), (kernel_forward, kernel_step) = said(BY_DEFAULT, tmp_path)
    assert forward > 8.9 and step > 17.9
    # At worst, a channel is read a second time from memory, which no program tells.
    assert kernel_forward + 1 <= 3.01 and kernel_step + 1 <= 8.01


def test_without_a_measurement_the_counted_copies_decide(standard_promotion):
    counted = json.loads((BENCHMARKS / "results" / "gpu.json").read_text())["figures"]
    for case in CASES:
        found = counted[str(case)]
        if "kernel units" not in found:
            continue
        halves = 2 * found["kernel units"] <= found["XLA units"]
        x = {"x": jax.ShapeDtypeStruct(gpu.SHAPE, case.dtype)}
        rules = cage.Rules([(".*", case.quantizer)])
        tx = cage.cage_adamw(1e-3, rules, total_steps=100)
        forms = cage.tune(x, rules, optimizer=tx, report=True).forms
        runs = {
            form.operation.partition(",")[0]: form.is_kernel
            for form in forms
            if form.platform == "cuda"
        }
        assert runs["adamw_step" if case.is_step else "fake_quant"] == halves, case


@needs_plugin
def test_a_fused_step_is_one_and_in_place():
    there, in_place = said(THROUGH_THE_OPTIMIZER)
    assert there and in_place == pytest.approx(3, abs=1e-3)


def test_the_report_of_the_assembler_is_read(tmp_path, monkeypatch):
    program = tmp_path / "ptxas"
    program.write_text(
        "#!/bin/sh\ncat >&2 <<'E'\n"
        "ptxas info    : Compiling entry function 'cage_fake_quant' for 'sm_90a'\n"
        "ptxas info    : Function properties for cage_fake_quant\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 99 registers, used 1 barriers\n"
        "ptxas info    : Function properties for another\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 40 registers\nE\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=b")
    folder = tmp_path / "watched"
    folder.mkdir()
    usage = cuda_aot.watched(folder)
    assert usage() == {}
    subprocess.run([folder / "bin" / "ptxas"], check=True)
    assert usage() == {"cage_fake_quant": cuda_aot.Usage(99, 28)}
    assert usage() == {}


def test_the_record_and_its_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu.measurement, "RESULTS", tmp_path)
    assert gpu.main([]) == 1 and "must be run where there is a GPU" in (
        capsys.readouterr().out
    )
    case = str(CASES[0])
    figures = {
        case: {"least": 2.0, "XLA units": 9.0, "kernel units": 2.0, "read again": 1.0}
        | {"registers": 80, "spilled": 0}
    }
    rows = gpu.table(gpu.record(figures, None, {}))
    assert rows.cells[0][:6] == [case, "2.00", "9.00", "2.00 + 1.00", "80", "0"]
    assert set(rows.cells[0][6:]) == {"not measured"}
    figures[case]["ms"] = {"XLA": 2.0, "kernel": 1.0}
    made = gpu.record(figures, 0.5, {})
    assert gpu.table(made).cells[0][6:] == ["2.000", "1.000", "", ""]
    assert "0.500 of a copy" in made["title"]
    (gain,) = made["targets"]
    assert gain["met"] and gain["measured"] == 0.5


def test_the_numerics_and_the_clock(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "CALLS", 1)
    monkeypatch.setattr(gpu, "SMALL", (512, 512))
    assert gpu.main(["--tiny"]) == 0
    assert "nothing is written" in capsys.readouterr().out


def test_both_forms_of_every_case_give_the_same_arrays():
    """Traced alone: on a GPU it would be late to see that a form cannot be called."""
    for case in CASES:
        arrays = gpu.count(case) * [jax.ShapeDtypeStruct(gpu.SMALL, case.dtype)]
        theirs = jax.eval_shape(gpu.xla(case), *arrays)
        if (kernel := gpu.kernel(case, gpu.SMALL, True)) is not None:
            assert jax.eval_shape(kernel, *arrays) == theirs, case


def test_a_wrong_kernel_is_noticed(monkeypatch):
    case = CASES[6]
    wrong = case._replace(quantizer=cage.int4(group_size=64, axis=-2))
    monkeypatch.setattr(gpu, "kernel", lambda *_: gpu.xla(wrong))
    with pytest.raises(AssertionError, match="agree with"):
        gpu.check(case, interpret=True)
