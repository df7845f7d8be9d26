"""Compiles train steps for TPU pods that are not here, and counts what they cost.

libtpu compiles for a topology without a TPU. The whole W4A4 step of the example's
Llama, rotated and fully sharded, is compiled with AdamW alone and with CAGE: what it
needs of a chip's memory, what it moves to and from it, what chips send each other.
"""

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

# Before jax is loaded: no TPU is looked for, and other processes may compile too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import hlo
import jax
import jax.numpy as jnp
import measurement
import optax
import tyro
from jax.experimental import topologies
from measurement import Rows
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import layout
import lm
from sizes import SIZES

import cage_jax as cage

# Gigabytes of memory of a chip.
MEMORY = {"v5e": 16, "v6e": 32}
# Size, topology, windows a step. What a chip holds of the batch stays the same from 16
# chips on, so that the last ones show how the cost of a step grows with the pod.
PROGRAMS = [
    ("100m", "v5e:4x4", 512),
    ("100m", "v6e:2x4", 512),
    ("800m", "v5e:4x4", 512),
    ("800m", "v6e:2x4", 512),
    ("100m", "v5e:8x8", 2048),
    ("100m", "v5e:16x16", 8192),
]
OPTIMIZERS = ("AdamW", "CAGE")
# Windows of a microbatch that a chip holds at a time.
WINDOWS_A_CHIP = 4
STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compiles train steps for TPU pods, and counts memory, traffic and collectives."""

    out: Path = Path("runs/tpu_aot")
    """Folder for what is already counted: a second call goes on."""
    tiny: bool = False
    """The smallest model on four chips, to see that it works; nothing is written."""


def compiled(size: str, topology: str, batch: int, optimizer: str) -> Any:
    """The program of a step.

    Args:
      size: of the model, one of `SIZES`.
      topology: of the TPU, such as "v5e:4x4".
      batch: windows a step.
      optimizer: "AdamW", or "CAGE" which pulls too.
    """
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
    ).devices
    mesh = layout.mesh_of(list(devices))
    model = lm.LanguageModel(
        SIZES[size],
        w_bits=4,
        a_bits=4,
        kv_bits=None,
        microbatch=min(batch, WINDOWS_A_CHIP * len(devices)),
        seed=0,
    )
    rate = lm.learning_rate(SIZES[size].learning_rate, STEPS, 0.1)
    if optimizer == "AdamW":
        tx = lm.optimizer_of(optax.adamw, rate)
    else:
        tx = model.optimizer(rate, cage.silence_then_ramp(STEPS))

    windows = jax.ShapeDtypeStruct(
        (batch, SIZES[size].sequence + 1),
        jnp.uint8,
        sharding=layout.batch_sharding(mesh),
    )
    with jax.set_mesh(mesh):
        run, state = model.step_on(mesh, tx)
        return run.lower(state, windows).compile()


def counted(size: str, topology: str, batch: int, optimizer: str) -> dict[str, Any]:
    """What the program of a step needs and moves, on each chip."""
    start = time.perf_counter()
    program = compiled(size, topology, batch, optimizer)
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    moves = hlo.moved(program.as_text())
    return {
        "memory": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "state": memory.argument_size_in_bytes,
        "traffic": moves.memory,
        "collectives": dict(moves.collectives),
        "counts": dict(moves.counts),
        "seconds to compile": seconds,
    }


def measure(programs: list[tuple[str, str, int]], out: Path | None) -> dict[str, Any]:
    """The record of all programs.

    Args:
      programs: size, topology and windows a step of each.
      out: folder for each one's figures, taken from there where it has them.
    """
    console, figures = Console(), {}
    for number, (size, topology, batch) in enumerate(programs, 1):
        for optimizer in OPTIMIZERS:
            name = f"{size}, {topology}, {optimizer}"
            path = out and out / f"{re.sub(r'[^a-zA-Z0-9]+', '-', name)}.json"
            if path is not None and path.exists():
                figures[name] = json.loads(path.read_text())
                continue
            console.print(f"{number}/{len(programs)} {name}", highlight=False)
            figures[name] = counted(size, topology, batch, optimizer)
            figures[name]["batch"] = batch
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(".part")
                part.write_text(json.dumps(figures[name]))
                part.replace(path)
    return {
        "name": "tpu_aot",
        "benchmark": "tpu_aot",
        "title": "A W4A4 train step on each chip of a pod, compiled and not run",
        "environment": measurement.environment("libtpu", "flax"),
        "settings": {"windows a chip": WINDOWS_A_CHIP},
        "figures": figures,
        "targets": [
            target
            for size, topology, _ in programs
            for target in _targets(figures, f"{size}, {topology}")
        ],
    }


def _targets(figures, name):
    """Returns targets: the step fits in memory, and CAGE adds no collectives."""
    adamw, pulled = (figures[f"{name}, {optimizer}"] for optimizer in OPTIMIZERS)
    kind = name.split(", ")[1].partition(":")[0]
    sent = [sum(each["collectives"].values()) / 1e6 for each in (adamw, pulled)]
    return [
        measurement.target(
            f"{name}: gigabytes a chip", pulled["memory"] / 1e9, MEMORY[kind], ".1f"
        ),
        measurement.target(
            f"{name}: megabytes of collectives that CAGE adds",
            sent[1] - sent[0],
            0.0,
            ".3f",
        ),
    ]


def table(record: dict[str, Any]) -> Rows:
    """The table of a record."""
    cells = []
    for name, each in record["figures"].items():
        size, topology, optimizer = name.split(", ")
        cells.append(
            [
                f"{size}, {topology}, {each['batch']} windows, {optimizer}",
                f"{each['memory'] / 1e9:.2f}",
                f"{each['state'] / 1e9:.2f}",
                f"{each['traffic'] / 1e9:.1f}",
                f"{sum(each['collectives'].values()) / 1e9:.2f}",
                f"{sum(each['counts'].values())}",
            ]
        )
    header = [
        "step",
        "memory, GB",
        "of it state",
        "moved to and from it, GB",
        "received from others, GB",
        "collectives",
    ]
    return Rows(header, cells)


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    if settings.tiny:
        record = measure([("tiny", "v5e:2x2", 16)], None)
    else:
        console.print("Compiles twelve programs: about half an hour (goes on, too).")
        record = measure(PROGRAMS, settings.out)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
