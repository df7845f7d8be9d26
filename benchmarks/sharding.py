"""Times sharded train steps with AdamW and with CAGE on devices of one host."""

import dataclasses
import os
import statistics
import sys
from pathlib import Path
from typing import Any

# Before jax is loaded: the CPU shows itself as so many devices.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hlo
import jax
import measurement
import numpy as np
import optax
import tyro
from measurement import Rows
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import layout
import lm
from sizes import SIZES

DEVICES = (1, 2, 4, 8)
BATCH = 8
OPTIMIZERS = ("AdamW", "CAGE")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times sharded train steps with AdamW and with CAGE, in turns."""

    rounds: int = 20
    """Timed steps of each kind."""
    tiny: bool = False
    """Two steps of the smallest model, to see that it works; nothing is written."""


def stepper(size: str, devices: int, optimizer: str) -> tuple[Any, hlo.Moved]:
    """A function that does one more step, and what its program moves.

    Args:
      size: of the model, one of `SIZES`.
      devices: how many the arrays are split over.
      optimizer: "AdamW", or "CAGE" which pulls from the first step on.
    """
    mesh = layout.mesh_of(jax.devices()[:devices])
    model = lm.LanguageModel(
        SIZES[size], w_bits=4, a_bits=4, kv_bits=None, microbatch=BATCH, seed=0
    )
    rate = optax.constant_schedule(1e-3)
    tx = (
        lm.optimizer_of(optax.adamw, rate)
        if optimizer == "AdamW"
        else model.optimizer(rate, 10.0)
    )
    length = SIZES[size].sequence
    generator = np.random.default_rng(0)
    windows = generator.integers(0, 256, (BATCH, length + 1)).astype(np.uint8)
    with jax.set_mesh(mesh):
        run, like = model.step_on(mesh, tx)
        places = layout.shardings_of(like)
        state = jax.device_put(model.first_state(tx), places)
        windows = jax.device_put(windows, layout.batch_sharding(mesh))
        program = run.lower(state, windows).compile()

    def call():
        nonlocal state
        state, loss = program(state, windows)
        jax.block_until_ready((state, loss))

    return call, hlo.moved(program.as_text())


def measure(
    size: str, rounds: int, warmup: int = 2, devices: tuple[int, ...] = DEVICES
) -> dict[str, Any]:
    """Median step times on each number of devices, and what devices exchange."""
    figures, times = {}, {}
    for count in devices:
        pair = {name: stepper(size, count, name) for name in OPTIMIZERS}
        calls = {name: call for name, (call, _) in pair.items()}
        taken = measurement.interleaved(calls, rounds, warmup)
        for name, (_, moves) in pair.items():
            figures[f"{count}, {name}"] = {
                "seconds": statistics.median(taken[name]),
                "to AdamW": measurement.median_ratio(taken, name, "AdamW"),
                "collectives": dict(moves.collectives),
                "counts": dict(moves.counts),
            }
            times[f"{count}, {name}"] = taken[name]
    return {
        "name": "sharding",
        "benchmark": "sharding",
        "title": f"A sharded W4A4 step of the {size} model on devices of one host",
        "environment": measurement.environment("flax"),
        "settings": {"size": size, "rounds": rounds, "warmup": warmup},
        "figures": figures,
        "seconds": times,
        "targets": [
            measurement.target(
                f"{count} devices, CAGE to AdamW",
                figures[f"{count}, CAGE"]["to AdamW"],
                1.1,
            )
            for count in devices
        ],
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record."""
    cells = [
        [
            name,
            f"{1e3 * each['seconds']:.1f}",
            f"{each['to AdamW']:.2f}",
            f"{sum(each['counts'].values())}",
            f"{sum(each['collectives'].values()) / 1e6:.2f}",
        ]
        for name, each in record["figures"].items()
    ]
    return Rows(["devices", "ms", "to AdamW", "collectives", "received, MB"], cells)


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    console.print("Times sharded steps in turns: about three minutes.")
    if settings.tiny:
        record = measure("tiny", 2, 1)
    else:
        record = measure("demo", settings.rounds)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
