"""Several processes of one machine: the losses of one, and what happens if one dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import launch
import numpy as np
import orbax.checkpoint as ocp
import processes
import pytest
from checkpoints import newest

import cage_jax as cage

EXAMPLES = Path(launch.__file__).parent
# CAGE pulls from the first step, so that one segment is compiled.
FLAGS = ["--tiny", "--arms", "cage", "--steps", "20", "--strength", "30"]
FLAGS += ["--silence", "0"]
# To compile and run a tiny model on a busy machine.
PATIENCE = 300


def start(processes, *flags):
    """The launcher of the documented command."""
    command = [sys.executable, EXAMPLES / "launch.py", str(processes)]
    return subprocess.Popen(
        [*command, EXAMPLES / "train_lm.py", *FLAGS, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )


def losses(out):
    """Reads the losses of all steps from the last checkpoint."""
    path = out / "checkpoints/cage/20/default"
    tree = ocp.StandardCheckpointer().metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    restored = ocp.PyTreeCheckpointer().restore(path, restore_args=as_numpy)
    return np.asarray(restored["losses"])


def alone(out, devices):
    """The losses of one process that has so many devices.

    Not of this one, which has more: threads of a CPU, among which sums are divided, are
    as many as devices at least.
    """
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train_lm.py", *FLAGS, "--out", out],
        capture_output=True,
        text=True,
        env=os.environ
        | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(out)


def test_processes_train_as_one(tmp_path):
    """The same program on the same mesh."""
    process = start(2, "--out", tmp_path / "many")
    expected = alone(tmp_path / "one", 2)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, printed
    found = losses(tmp_path / "many")
    assert found.shape == (20,) and found[-1] < 0.8 * found[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # One of them speaks.
    assert printed.count("Table, plot and codes are in") == 1
    assert printed.count("in 2 process(es)") == 1
    assert (tmp_path / "many/results.json").exists()
    assert "give the same validation loss" in printed


def wait_for(condition, process):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)


def children(process):
    """The processes that the launcher started, by their number in the run."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"PPid:\t{process.pid}\n" in (path / "status").read_text():
                environment = (path / "environ").read_text().split("\0")
                (number,) = (v for v in environment if v.startswith("JAX_PROCESS_ID="))
                found[int(number.partition("=")[2])] = int(path.name)
        except (FileNotFoundError, ProcessLookupError, ValueError):
            pass  # it has just ended
    return found


CODES = """
import sys

import processes

processes.join()
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

import cage_jax as cage

folder = sys.argv[1]
mesh = jax.make_mesh((jax.device_count(),), ("rows",))
rows = NamedSharding(mesh, P("rows"))
numbers = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
weights = jax.make_array_from_callback((64, 32), rows, lambda i: numbers[i])
codes = jax.jit(lambda x: cage.quantize(x, cage.int4(group_size=16)))(weights)
assert not codes.codes.is_fully_addressable
cage.export.save_orbax({"kernel": codes}, folder)
from cage_jax.export.trees import load

again = load(folder, shardings=rows)["kernel"]
assert not again.codes.is_fully_addressable
for ours, theirs in zip(jax.tree.leaves(codes), jax.tree.leaves(again), strict=True):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    for one, other in zip(ours.addressable_shards, theirs.addressable_shards):
        np.testing.assert_array_equal(one.data, other.data)
try:
    cage.export.save_orbax({"kernel": codes}, folder)
except FileExistsError:
    print("there already")
cage.export.save_orbax({"kernel": codes}, folder, overwrite=True)
again = load(folder, shardings=rows)["kernel"]
for one, other in zip(again.codes.addressable_shards, codes.codes.addressable_shards):
    np.testing.assert_array_equal(one.data, other.data)
if processes.is_first():
    with open(folder + "/thesis.tex", "w") as file:
        file.write("of years")
processes.gather(0)
try:
    cage.export.save_orbax({"kernel": codes}, folder, overwrite=True)
except FileExistsError as error:
    print("thesis.tex. Remove" in str(error) and "kept")
"""


def test_processes_save_codes_that_one_reads(tmp_path):
    program, folder = tmp_path / "program.py", tmp_path / "codes"
    program.write_text(CODES)
    done = subprocess.run(
        [sys.executable, EXAMPLES / "launch.py", "2", program, folder],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": ":".join(sys.path)},
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("there already") == done.stdout.count("kept") == 2
    assert (folder / "thesis.tex").read_text() == "of years"
    assert [path.name for path in tmp_path.iterdir() if path.name[0] == "."] == []
    found = cage.load(folder).params["kernel"]
    numbers = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    expected = cage.quantize(numbers, cage.int4(group_size=16))
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scale, expected.scale)


def test_without_a_cluster_the_flag_is_named(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(ValueError, match=r"`--cluster` must be given where .*launch"):
        processes.join(cluster=True)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_one_stops_all_and_one_that_is_killed_ends_all(tmp_path):
    flags = ("--out", tmp_path, "--steps", "100000", "--save-seconds", "1")
    process = start(2, *flags)
    wait_for(lambda: newest(tmp_path), process)
    running = children(process)
    assert sorted(running) == [0, 1]
    os.kill(running[1], signal.SIGTERM)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, printed
    assert printed.count("stopped by SIGTERM; all steps so far are saved") == 1
    stopped = newest(tmp_path)

    process = start(2, *flags, "--resume")
    wait_for(lambda: newest(tmp_path) != stopped, process)
    os.kill(children(process)[0], signal.SIGKILL)
    killed = time.monotonic()
    printed, _ = process.communicate(timeout=PATIENCE)
    assert time.monotonic() - killed < 60
    assert process.returncode == 128 + signal.SIGKILL
    # Ours, or JAX's where that is faster.
    says = ("another process of the run has ended", "another task died")
    assert any(text in printed for text in says), printed
    assert "process 0 ended with status 137" in printed

    # Nothing is lost but what came after the newest checkpoint.
    _, kept = newest(tmp_path)
    again = *FLAGS, *map(str, flags), "--resume"
    with subprocess.Popen(
        [sys.executable, EXAMPLES / "train_lm.py", *again],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(lambda: newest(tmp_path)[1] > kept, process)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, printed
