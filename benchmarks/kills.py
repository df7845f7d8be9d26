"""Kills a training run at random moments and compares its end with an unbroken run's.

The language model trains, in one process and in two, and writes checkpoints one after
another in the background. It is killed (SIGKILL) at a random moment, every second time
while a checkpoint is being written, and continues from its newest checkpoint. In the
end all arrays must equal those of a run that nobody killed, bit for bit. Nothing is
timed.
"""

import concurrent.futures
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measurement
import numpy as np
import tyro
from measurement import Rows
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import jax
import orbax.checkpoint as ocp
import train_lm
from checkpoints import newest

PROGRAM = Path(train_lm.__file__)
FLAGS = ("--tiny", "--arms", "cage", "--silence", "0.5", "--save-seconds", "0")
# A run gets so long for its next checkpoint, and is killed so long after it at most.
PATIENCE, LONGEST = 300.0, 1.0
# So long after a checkpoint was begun, the others are killed at most.
SOON = 0.05
# More than a run comes to before it is killed, by the number of processes.
STEPS_A_KILL = {1: 150, 2: 30}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Kills a training run at random moments and compares its end."""

    kills: int = 30
    """Number of kills of one process."""
    kills_of_two: int = 30
    """Number of kills of a run of two processes."""
    seed: int = 0
    """Seed of the random moments."""
    add: bool = False
    """Keep the runs of the record, and add these; with another seed."""
    tiny: bool = False
    """Two kills of one process, to see that it works; nothing is written."""


def measure(kills: dict[int, int], seed: int) -> dict[str, Any]:
    """Returns the record of runs that are killed, with the kills by their processes."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        counts = [count for count in kills if kills[count]]
        figures = list(
            pool.map(lambda count: _compared(count, kills[count], seed), counts)
        )
    return record_of(figures)


def record_of(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the record of the figures of runs."""
    return {
        "name": "kills",
        "benchmark": "kills",
        "title": "Runs that are killed at random moments, and their last checkpoint",
        "environment": measurement.environment(),
        "settings": {
            "kills": [len(each["kills"]) for each in figures],
            "seed": [each["seed"] for each in figures],
        },
        "figures": figures,
        "targets": [
            measurement.target(
                "arrays that differ from those of a run that nobody killed",
                sum(len(each["different"]) for each in figures),
                0,
                ".0f",
            )
        ],
    }


def _compared(count: int, kills: int, seed: int) -> dict[str, Any]:
    """Returns the figures of runs of so many processes."""
    moments, steps = random.Random(seed), kills * STEPS_A_KILL[count]
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        at = [_kill(killed, count, steps, moments, i % 2) for i in range(kills)]
        _finish(_start(count, steps, killed))
        _finish(_start(count, steps, whole))
        return {
            "processes": count,
            "seed": seed,
            "steps": steps,
            "kills": at,
            "arrays": len(arrays(whole, steps)),
            "different": different(whole, killed, steps),
        }


def _start(count: int, steps: int, out: Path) -> subprocess.Popen:
    """Starts the run, or continues it, in a group of its own."""
    command = [str(PROGRAM), *FLAGS, "--steps", str(steps)]
    command += ["--out", str(out), "--resume"]
    if count > 1:
        command = [str(PROGRAM.with_name("launch.py")), str(count), *command]
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )


def _finish(run: subprocess.Popen) -> None:
    printed, _ = run.communicate()
    if run.returncode:
        raise RuntimeError(f"a run ended with {run.returncode}: {printed[-2000:]}")


def _kill(
    out: Path, count: int, steps: int, moments: random.Random, writing: int
) -> dict[str, Any]:
    """Continues the run and kills one or all of its processes at a random moment.

    Args:
      out: the run's folder.
      count: its processes.
      steps: its steps.
      moments: draws the moment and the process.
      writing: whether to wait for the begin of a checkpoint.
    """
    before = newest(out)
    with _start(count, steps, out) as run:
        _wait(run, lambda: newest(out) != before)
        time.sleep(moments.uniform(0, LONGEST))
        if writing:
            _wait(run, lambda: _under_way(out))
            time.sleep(moments.uniform(0, SOON))
        running = _children(run.pid) if count > 1 else [run.pid]
        one = moments.choice([*running, None])  # None for all at once
        for process in running if one is None else [one]:
            os.kill(process, signal.SIGKILL)
        under_way = _under_way(out)
        printed, _ = run.communicate(timeout=PATIENCE)
    # Where one is killed, the other may be the first to end, with an error.
    if not run.returncode or (count == 1 and run.returncode != -signal.SIGKILL):
        raise RuntimeError(f"a run ended with {run.returncode}: {printed[-2000:]}")
    segment, step = newest(out) or ("", -1)
    if before is not None and step < before[1]:
        raise RuntimeError(f"the checkpoint {before} is lost; the newest is of {step}")
    return {
        "segment": segment,
        "step": step,
        "processes killed": len(running) if one is None else 1,
        "under way": under_way,
    }


def _wait(run: subprocess.Popen, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if run.poll() is not None or time.monotonic() > end:
            printed = run.communicate()[0] if run.poll() is not None else "it hangs"
            raise RuntimeError(f"the run ended with {run.poll()}: {printed[-2000:]}")
        time.sleep(0.002)


def _under_way(out: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(out.glob("checkpoints/*/*tmp*"))


def _children(parent: int) -> list[int]:
    """Returns the processes that the launcher started."""
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return sorted(map(int, listed.split()))


def arrays(out: Path, steps: int) -> dict[str, np.ndarray]:
    """Returns all arrays of a run's last checkpoint, by path."""
    path = out / "checkpoints" / "cage" / str(steps) / "default"
    tree = ocp.StandardCheckpointer().metadata(path).item_metadata.tree
    like = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    found = ocp.PyTreeCheckpointer().restore(path, restore_args=like)
    return {
        jax.tree_util.keystr(key, simple=True, separator="/"): np.asarray(leaf)
        for key, leaf in jax.tree.leaves_with_path(found)
    }


def different(one: Path, other: Path, steps: int) -> list[str]:
    """Names the arrays of two runs' last checkpoints that differ in a bit."""
    ours, theirs = arrays(one, steps), arrays(other, steps)
    return sorted(
        path
        for path in ours.keys() | theirs.keys()
        if path not in ours
        or path not in theirs
        or ours[path].dtype != theirs[path].dtype
        or ours[path].tobytes() != theirs[path].tobytes()
    )


def table(record: dict[str, Any]) -> Rows:
    """Returns the table of a record."""
    figures = record["figures"]

    def row(name, cell):
        return [name, *(str(cell(each)) for each in figures)]

    return Rows(
        ["processes", *(str(each["processes"]) for each in figures)],
        [
            row("steps", lambda each: each["steps"]),
            row("kills", lambda each: len(each["kills"])),
            row(
                "while a checkpoint was written",
                lambda each: sum(kill["under way"] for kill in each["kills"]),
            ),
            row("arrays compared", lambda each: each["arrays"]),
            row("arrays that differ", lambda each: len(each["different"])),
        ],
    )


def main() -> int:
    """Runs the program; the exit status."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    tiny = settings.tiny
    kills = {1: 2} if tiny else {1: settings.kills, 2: settings.kills_of_two}
    record = measure(kills, settings.seed)
    if settings.add:
        before = json.loads((measurement.RESULTS / "kills.json").read_text())
        record = record_of([*before["figures"], *record["figures"]])
    measurement.finish(record, table(record), console, keep=not tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
