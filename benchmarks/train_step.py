"""Times and compiles whole train steps of the demo's language model, part by part."""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import measurement
import optax
import tyro
import utilization
from measurement import Rows
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import train_lm
from sizes import SIZES

# What is timed: a segment of the program, and the settings that differ.
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "full precision": ("full", {}),
    "W4A16 STE": ("trunk", {"a_bits": 16}),
    "W4A4 STE": ("trunk", {}),
    "W4A4 KV4 STE": ("trunk", {"kv_bits": 4}),
    "W4A4 CAGE, silent": ("cage", {}),
    "W4A4 CAGE, active": ("cage", {}),
    "W4A4 KV4 CAGE, active": ("cage", {"kv_bits": 4}),
}
# What is compiled: the model of 8 layers, its parameters never made.
COMPILED = {
    name: STEPS[name]
    for name in ("full precision", "W4A4 STE", "W4A4 KV4 CAGE, active")
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times a train step at full precision, with STE and with CAGE, in turns."""

    size: Literal["demo", "30m", "100m"] = "demo"
    """Size of the model; the sizes of the paper are for a large GPU or a TPU."""
    rounds: int = 30
    """Timed steps of each kind."""
    tiny: bool = False
    """Two steps of the smallest model, to see that it works; nothing is written."""


def _stepper(experiment, segment, step: int) -> Callable[[], None]:
    """A function that does one step, as if `step` steps had been done."""
    run = experiment.step_of(segment)
    state = experiment.start(segment)
    optimizer = optax.tree_utils.tree_set(state.optimizer, cage_count=jnp.int32(step))
    state = state._replace(optimizer=optimizer)
    windows = experiment.batches(experiment.text)[0]

    def call():
        nonlocal state
        state = jax.block_until_ready(run(state, windows, jnp.int32(step)))

    return call


def compile_seconds(size: str, kind: str, changes: dict[str, Any]) -> float:
    """How long tracing and compiling a step of a model takes; nothing is run."""
    asked = train_lm.Settings(
        size=size,
        batch=2,
        microbatch=2,
        sequence=128,
        steps=100,
        devices=1,
        **changes,
    )
    experiment = train_lm.Experiment(asked.resolved())
    segment = next(each for each in experiment.segments if each.name == kind)
    run = experiment.step_of(segment)
    state = experiment.abstract_state(segment)
    windows = jax.ShapeDtypeStruct((2, 129), experiment.tokens.train.dtype)
    jax.clear_caches()
    start = time.perf_counter()
    run.lower(state, windows, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    return time.perf_counter() - start


def measure(
    size: str, rounds: int, warmup: int = 3, deep: str = "100m", compiles: int = 7
) -> dict[str, Any]:
    """Median step times of each kind, and their ratios to STE and full precision.

    Args:
      size: of the model whose steps are timed.
      rounds: timed steps of each kind.
      warmup: steps before them.
      deep: size of the model whose steps are compiled.
      compiles: compilations of each kind.
    """
    functions = {}
    for name, (kind, changes) in STEPS.items():
        # So many steps that the silence does not end while "silent" is timed.
        asked = train_lm.Settings(
            size=size, steps=10 * (rounds + warmup) + 10, devices=1, **changes
        )
        experiment = train_lm.Experiment(asked.resolved())
        segment = next(each for each in experiment.segments if each.name == kind)
        last = experiment.settings.steps - rounds - warmup - 1
        functions[name] = _stepper(experiment, segment, last if "active" in name else 0)
    times = measurement.interleaved(functions, rounds, warmup)
    compiling: dict[str, list[float]] = {name: [] for name in COMPILED}
    for _ in range(compiles):
        for name, (kind, changes) in COMPILED.items():
            compiling[name].append(compile_seconds(deep, kind, changes))

    def ratio(name, base):
        return measurement.median_ratio(times, name, base)

    settings = experiment.settings
    return {
        "name": name_of(size),
        "benchmark": "train_step",
        "title": f"A train step of the {size} model, {settings.batch} x "
        f"{settings.sequence} bytes",
        "environment": measurement.environment(),
        "settings": {"size": size, "rounds": rounds, "warmup": warmup},
        "device": jax.devices()[0].device_kind,
        "figures": {
            name: {
                "seconds": statistics.median(times[name]),
                "to STE": ratio(name, "W4A4 STE"),
                "to full precision": ratio(name, "full precision"),
                "compile": statistics.median(compiling[name])
                if name in compiling
                else None,
            }
            for name in STEPS
        },
        "seconds": times,
        "compile seconds": compiling,
        "targets": [
            measurement.target(
                "CAGE, active, to STE", ratio("W4A4 CAGE, active", "W4A4 STE"), 1.06
            ),
            measurement.target(
                "CAGE, active, to full precision",
                ratio("W4A4 CAGE, active", "full precision"),
                1.35,
            ),
            measurement.target(
                "compiling 8 layers with everything, to full precision",
                measurement.median_ratio(
                    compiling, "W4A4 KV4 CAGE, active", "full precision"
                ),
                1.5,
            ),
        ],
    }


def name_of(size: str) -> str:
    """Returns the name of a record."""
    return "train_step" if size == "demo" else f"train_step_{size}"


def table(record: dict[str, Any]) -> Rows:
    """The table of a record; the MFU is of bfloat16, on chips that are known."""
    size = SIZES[record["settings"]["size"]]
    tokens = size.batch * size.sequence
    operations = tokens * utilization.operations(size, vocabulary=256)
    peak = utilization.peak_of(record.get("device", ""))
    cells = [
        [
            name,
            f"{1e3 * each['seconds']:.1f}",
            f"{tokens / each['seconds']:,.0f}",
            f"{operations / each['seconds'] / peak:.1%}" if peak else "",
            f"{each['to STE']:.2f}",
            f"{each['to full precision']:.2f}",
            f"{each['compile']:.1f}" if each.get("compile") else "",
        ]
        for name, each in record["figures"].items()
    ]
    header = ["step", "ms", "tokens/s", "MFU", "to STE", "to full precision"]
    return Rows([*header, "8 layers, compile, s"], cells)


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    console.print(
        "Times train steps in turns, then compiles: about ten minutes.", highlight=False
    )
    if settings.tiny:
        record = measure("tiny", 2, 1, deep="tiny", compiles=1)
    else:
        record = measure(settings.size, settings.rounds)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
