"""Steps compiled for TPU: what is counted, and that it is kept."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import llama3_aot
import pytest
import tpu_aot

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ("tiny", "v5e:2x2", 16)
FIGURES = {
    "memory": 2_000_000_000,
    "state": 1_000_000_000,
    "traffic": 5_000_000_000,
    "collectives": {"all-reduce": 3_000_000},
    "counts": {"all-reduce": 3},
    "seconds to compile": 1.0,
}


def test_what_is_counted_is_kept(tmp_path, monkeypatch):
    asked = []

    def counted(*program):
        asked.append(program)
        more = 1_000_000 if program[-1] == "CAGE" else 0
        return FIGURES | {"collectives": {"all-reduce": 3_000_000 + more}}

    monkeypatch.setattr(tpu_aot, "counted", counted)
    made = tpu_aot.measure([PROGRAM], tmp_path / "parts")
    assert asked == [(*PROGRAM, "AdamW"), (*PROGRAM, "CAGE")]
    assert tpu_aot.measure([PROGRAM], tmp_path / "parts")["figures"] == made["figures"]
    assert len(asked) == 2
    fits, added = made["targets"]
    assert fits["met"] and fits["measured"] == 2.0 and fits["bound"] == 16
    assert not added["met"] and added["measured"] == 1.0
    rows = tpu_aot.table(json.loads(json.dumps(made)))
    assert rows.cells[1] == [
        "tiny, v5e:2x2, 16 windows, CAGE", "2.00", "1.00", "5.0", "0.00", "3"
    ]  # fmt: skip


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the extra `tpu` is missing"
)
def test_a_small_step_for_four_chips():
    # A process of its own: libtpu says much, and stays.
    script = (
        f"import json, tpu_aot; print(json.dumps(tpu_aot.measure([{PROGRAM}], None)))"
    )
    paths = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout.splitlines()[-1])
    assert all(target["met"] for target in made["targets"])
    adamw, pulled = made["figures"].values()
    # Groups, scales and rotations are inside of a shard.
    assert pulled["collectives"] == adamw["collectives"]
    assert pulled["counts"] == adamw["counts"]
    assert adamw["collectives"]["all-reduce"] > 0
    # The step's count and, at a tile each, nothing else.
    assert 0 < pulled["state"] - adamw["state"] < 4096
    assert adamw["traffic"] < pulled["traffic"] < 1.5 * adamw["traffic"]


def test_what_is_counted_of_llama_3(tmp_path, monkeypatch):
    asked = []

    def counted(config, topology, kind, tokens):
        asked.append(kind)
        traffic = 104e9 if kind == "CAGE" else 100e9
        return FIGURES | {"kernels": 14, "traffic": traffic}

    monkeypatch.setattr(llama3_aot, "counted", counted)
    program = llama3_aot.TINY, ("v5e:2x2",), 128, tmp_path / "parts"
    made = llama3_aot.measure(*program)
    assert asked == ["AdamW", "CAGE", "CAGE, distilled"]
    assert llama3_aot.measure(*program)["figures"] == made["figures"]
    assert len(asked) == 3
    fits, added = made["targets"]
    assert fits["met"] and fits["measured"] == 2.0 and fits["bound"] == 16
    assert added["met"] and added["measured"] == 1.04
    rows = llama3_aot.table(json.loads(json.dumps(made)))
    assert rows.cells[1] == ["v5e:2x2, CAGE", "2.00", "1.00", "104.0", "0.00", "14"]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the extra `tpu` is missing"
)
def test_a_small_step_of_llama_3_with_a_teacher():
    script = (
        "import json, llama3_aot as l; "
        "print(json.dumps(l.counted(l.TINY, 'v5e:2x2', l.DISTILLED, 128)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["memory"] > found["state"] > 0
