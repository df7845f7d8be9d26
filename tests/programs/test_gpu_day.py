"""The program for the day that a GPU is there, on a CPU and from its packed folder."""

import json
import math
import subprocess
import sys
from functools import partial

import gpu_day
import gpu_training
import jax
import numpy as np
import pytest

pytestmark = [
    pytest.mark.usefixtures("as_users_have_it"),
    pytest.mark.filterwarnings("ignore:the recommended pull"),  # in 8 steps
]


def test_all_parts_run_from_the_packed_folder(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(3000)))
    size = gpu_day.pack(tmp_path / "folder", [text], 256)
    assert 0 < size < gpu_day.LARGEST
    with pytest.raises(ValueError, match="must name a new or empty folder"):
        gpu_day.pack(tmp_path / "folder", [text], 256)
    out, program = tmp_path / "out", tmp_path / "folder/benchmarks/gpu.py"
    flags = ["--all", "--tiny", "--minutes", "8", "--out", out]
    subprocess.run([sys.executable, program, *flags], check=True, cwd=tmp_path)
    text = (out / "gpu_day.json").read_text()
    report = json.loads(text)
    assert list(report) == [part.name for part in gpu_day.ORDER]
    for part in report.values():
        assert part["outcome"]["status"] == "done", part["outcome"]
        assert part["outcome"]["failed"] == [] and part["found"]
    assert report["tests"]["found"]["test_pallas_gpu"]["result"]["run"] == 1
    chosen = report["choices"]["found"]["tune"]["result"]
    assert any("adamw_step" in line and "cuda" in line for line in chosen["table"])
    found = report["llama"]["found"]["CAGE, seed 0"]["result"]
    # The first guess is of all bytes alike.
    assert found["losses"][0] == pytest.approx(math.log(256), rel=0.05)
    assert found["losses"][-1] < found["losses"][0] - 0.5
    # A checkpoint continues to the bit.
    with np.load(tmp_path / "folder" / gpu_day.TOKENS) as file:
        tokens = {name: file[name] for name in file}
    path, asked = tmp_path / "state.npz", gpu_training.Training(8, 8)
    model = gpu_training.model_of(True, 4, 256, 0)
    train = partial(gpu_training._trained, model, "CAGE", asked, tokens, path)
    with pytest.raises(TimeoutError, match="after 1 of 8 steps"):
        train(0.0)
    assert path.exists()
    again = train(math.inf)
    assert not path.exists()
    for name in ("losses", "validation", "tokens"):
        assert again[name] == found[name], name


def test_a_part_that_fails_leaves_the_rest_alone(tmp_path, monkeypatch):
    # Without the packed folder there are no tokens.
    order = gpu_day.Part("llama", 2), gpu_day.Part("machine", 2)
    monkeypatch.setattr(gpu_day, "ORDER", order)
    report = gpu_day.run(tmp_path, 4, True)
    outcome = report["llama"]["outcome"]
    assert outcome["status"] == "ended with 1"
    assert "FileNotFoundError" in outcome["output"]
    assert report["machine"]["outcome"]["status"] == "done"
    report = gpu_day.run(tmp_path, 0, True)
    assert report["machine"]["outcome"]["status"] == "no time left"
    assert set(report["machine"]["found"]["devices"]["result"]) == {"cpu"}


def test_findings_are_kept_and_errors_have_a_traceback(tmp_path):
    path = tmp_path / "found.json"
    findings = gpu_day.Findings(path, True, math.inf)

    def fails(error=ZeroDivisionError):
        raise error("no")

    findings.add("good", lambda: 1)
    findings.add("bad", fails)
    findings.add("good", lambda: 2)
    with pytest.raises(SystemExit):
        findings.add("worse", lambda: fails(jax.errors.JaxRuntimeError))
    found = gpu_day.read(path)
    assert found.pop("good") == {"result": 1}
    assert list(found) == ["bad", "worse"]
    for each in found.values():
        assert "fails" in each["error"]
    gpu_day.Findings(path, True, 0.0).add("late", lambda: 1)
    assert "late" not in gpu_day.read(path)


def test_the_step_with_every_kernel_can_be_traced():
    """Not on a GPU, where it would be late to see that it cannot."""
    kind = gpu_training.KINDS["W4A4 CAGE, recommended, kernels"]
    model = gpu_training.model_of(False, kind.a_bits, gpu_training.VOCABULARY, 0)
    tx = gpu_training._optimizer(model, kind)
    state = jax.eval_shape(lambda: model.first_state(tx))
    shape = model.size.batch, model.size.sequence + 1
    windows = jax.ShapeDtypeStruct(shape, jax.numpy.int32)
    step = gpu_training._step(model, tx, kind)
    after, loss = jax.eval_shape(step, state, windows)
    assert loss.shape == () and jax.tree.structure(after) == jax.tree.structure(state)
