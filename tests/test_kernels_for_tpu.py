"""Kernels compiled for TPU: what they move, and that they are in the program."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import kernels
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import json, kernels, sys
print(json.dumps([
    kernels.counted(case, chip, "pallas")
    for chip in sys.argv[1:] for case in kernels.CASES
]))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the extra `tpu` is missing"
)
def test_they_move_the_least_and_no_copy(request):
    chips = ["v5e", "v6e"]
    if request.config.getoption("--all-chips"):
        chips += ["v4", "v5p"]
    # A process of its own: libtpu says much, and stays.
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *chips],
        env=os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    cases = [case for _ in chips for case in kernels.CASES]
    for case, each in zip(cases, found, strict=True):
        assert case.least <= each["units"] < 1.05 * case.least, case
        assert each["kernels"] == case.kernels
        assert each["in place"] == pytest.approx(3 * (case.what == "step"), abs=1e-4)


def test_the_record_and_its_table(monkeypatch):
    units = {"xla": 5.0, "pallas": 2.2}

    def counted(case, chip, implementation):
        kernel = ["cage_fake_quant"] * (implementation == "pallas")
        return {"units": units[implementation], "kernels": kernel, "seconds": 10.0}

    monkeypatch.setattr(kernels, "counted", counted)
    case = kernels.CASES[0]
    record = json.loads(json.dumps(kernels.measure([case], ("v5e", "v6e"))))
    excess, gain = record["targets"]
    assert not excess["met"] and excess["measured"] == pytest.approx(1.1)
    assert gain["met"] and gain["measured"] == pytest.approx(2.2 / 5)
    rows = kernels.table(record)
    assert rows.cells[0] == [str(case), "2.00", "5.00", "2.20", "5.00", "2.20"]
    assert rows.cells[1][2:] == ["10"] * 4
