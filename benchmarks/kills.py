"""Kills a training run at random moments and sees whether it goes on.

The language model trains and writes a checkpoint about every second, in the background.
Each time it is killed (SIGKILL) at a random moment, its newest checkpoint is read, and
it is started again. Nothing is timed.
"""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measurement
import tyro
from measurement import Rows
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import jax
import train_lm
from checkpoints import RunFolder, newest
from experiment import Experiment, identity
from experiment import Settings as Training

STEPS = 100_000  # more than it comes to
PROGRAM = train_lm.__file__
STRENGTH = 0.001  # for the usual dose in so many steps
FLAGS = ("--tiny", "--arms", "cage", "--devices", "1")
FLAGS += ("--steps", str(STEPS), "--strength", str(STRENGTH))
# A run gets so long to write its first checkpoint, and so long at most afterwards.
PATIENCE, LONGEST = 300.0, 6.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """Kills a training run at random moments and sees whether it goes on."""

    kills: int = 20
    """Number of kills."""
    seed: int = 0
    """Seed of the random moments."""
    tiny: bool = False
    """Two kills, to see that it works; nothing is written."""


def measure(kills: int, seed: int) -> dict[str, Any]:
    """The record of a run that is killed so often."""
    moments, figures = random.Random(seed), []
    with tempfile.TemporaryDirectory() as out:
        for _ in range(kills):
            figures.append(_kill(Path(out), moments.uniform(0, LONGEST)))
    whole = sum(each["read"] for each in figures)
    return {
        "name": "kills",
        "benchmark": "kills",
        "title": "A run that is killed at random moments",
        "environment": measurement.environment(),
        "settings": {"kills": kills, "seed": seed},
        "figures": figures,
        "targets": [
            measurement.target(
                "kills whose checkpoint is lost", kills - whole, 0, ".0f"
            )
        ],
    }


def _kill(out: Path, moment: float) -> dict[str, Any]:
    """Goes on with the run, kills it, reads its newest checkpoint."""
    before = _step(out)
    command = [sys.executable, PROGRAM, *FLAGS]
    command += ["--out", str(out), "--save-seconds", "0", "--resume"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        end = time.monotonic() + PATIENCE
        while _step(out) == before:
            if run.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the run ended with {run.poll()} or hangs")
            time.sleep(0.05)
        time.sleep(moment)
        run.send_signal(signal.SIGKILL)
    under_way = len(list(out.glob("checkpoints/*/*tmp*")))
    return {
        "step": _step(out),
        "seconds after a checkpoint": moment,
        "under way": under_way,
        "read": _reads(out),
    }


def _step(out: Path) -> int:
    """Returns the step of the newest checkpoint, or -1."""
    _, step = newest(out) or ("", -1)
    return step


def _reads(out: Path) -> bool:
    """Whether the newest checkpoint is whole, with the losses of all its steps."""
    asked = Training(
        tiny=True,
        arms=("cage",),
        steps=STEPS,
        strength=STRENGTH,
        devices=1,
        out=out,
        resume=True,
    )
    experiment = Experiment(asked.resolved())
    segment = experiment.segments[0]
    with (
        RunFolder(out, identity(experiment), resume=True) as folder,
        folder.checkpoints(segment.name) as checkpoints,
        jax.set_mesh(experiment.mesh),
    ):
        step = checkpoints.latest_step()
        state = checkpoints.restore(step, experiment.abstract_state(segment))
    return bool(jax.numpy.isfinite(state.losses[:step]).all()) and bool(
        jax.numpy.isnan(state.losses[step:]).all()
    )


def table(record: dict[str, Any]) -> Rows:
    """The table of a record."""
    figures = record["figures"]
    cells = [
        ["kills", str(len(figures))],
        [
            "while a checkpoint was written",
            str(sum(f["under way"] > 0 for f in figures)),
        ],
        ["newest checkpoint whole", str(sum(f["read"] for f in figures))],
        ["steps in all", str(figures[-1]["step"])],
    ]
    return Rows(["", ""], cells)


def main() -> int:
    """Runs the program; the exit status."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    kills = 2 if settings.tiny else settings.kills
    console.print(f"Kills a run {kills} times, half a minute each.", highlight=False)
    record = measure(kills, settings.seed)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
