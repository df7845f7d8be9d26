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
# What is timed with --window.
WINDOW_STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "W4A8 STE": ("trunk", {}),
    "W4A8 CAGE, recommended, active": ("cage", {"recommended": True}),
}
WINDOW = {"batch": 1, "microbatch": 1, "sequence": 512, "dtype": "float32", "a_bits": 8}
# The recommended gradients are read at every tenth step.
PERIOD = 10
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
    window: bool = False
    """Steps of one window of 512 tokens in float32, W4A8, with recommended CAGE."""
    rounds: int = 30
    """Timed steps of each kind; with --window rounded up to tens."""
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


def step_times(
    size: str,
    steps: dict[str, tuple[str, dict[str, Any]]],
    rounds: int,
    warmup: int,
    **shared: Any,
) -> tuple[train_lm.Settings, dict[str, list[float]]]:
    """Seconds of each step of each kind, and the settings that they share."""
    functions = {}
    for name, (kind, changes) in steps.items():
        # So many steps that the pull is not even near while "silent" is timed.
        asked = train_lm.Settings(
            size=size, steps=100 * (rounds + warmup), devices=1, **shared, **changes
        )
        experiment = train_lm.Experiment(asked.resolved())
        segment = next(each for each in experiment.segments if each.name == kind)
        last = experiment.settings.steps - rounds - warmup - 1
        functions[name] = _stepper(experiment, segment, last if "active" in name else 0)
    times = measurement.interleaved(functions, rounds, warmup)
    return experiment.settings, times


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
    settings, times = step_times(size, STEPS, rounds, warmup)
    compiling: dict[str, list[float]] = {name: [] for name in COMPILED}
    for _ in range(compiles):
        for name, (kind, changes) in COMPILED.items():
            compiling[name].append(compile_seconds(deep, kind, changes))

    def ratio(name, base):
        return measurement.median_ratio(times, name, base)

    record = _record(name_of(size), settings, times, "W4A4 STE", ratio, compiling)
    record["targets"] = [
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
    ]
    return record


def measure_window(size: str, rounds: int, warmup: int = 2) -> dict[str, Any]:
    """Measures steps of one window with recommended CAGE, and compiles nothing else.

    Ratios are means of the ten steps of a period, of which one reads the gradients.
    """
    settings, times = step_times(size, WINDOW_STEPS, rounds, warmup, **WINDOW)

    def ratio(name, base):
        ratios = measurement.ratios_in_period(times, name, base, PERIOD)
        return statistics.mean(ratios)

    name = name_of(size, window=True)
    record = _record(name, settings, times, "W4A8 STE", ratio, {})
    to_ste = ratio("W4A8 CAGE, recommended, active", "W4A8 STE")
    text = "CAGE, recommended, active, to STE"
    record["targets"] = [measurement.target(text, to_ste, 1.05)]
    return record


def _record(name, settings, times, ste, ratio, compiling):
    """All that is written to JSON, without targets."""
    rounds = len(times[ste])
    return {
        "name": name,
        "benchmark": "train_step",
        "title": f"A train step of the {settings.size} model, {settings.batch} x "
        f"{settings.sequence} bytes",
        "environment": measurement.environment(),
        "settings": {
            "size": settings.size,
            "rounds": rounds,
            "tokens": settings.batch * settings.sequence,
        },
        "device": jax.devices()[0].device_kind,
        "figures": {
            name: {
                "seconds": statistics.median(times[name]),
                "to STE": ratio(name, ste),
                "to full precision": ratio(name, "full precision")
                if "full precision" in times
                else None,
                "compile": statistics.median(compiling[name])
                if name in compiling
                else None,
            }
            for name in times
        },
        "seconds": times,
        "compile seconds": compiling,
    }


def name_of(size: str, window: bool = False) -> str:
    """Returns the name of a record."""
    parts = ["train_step", *([size] if size != "demo" else [])]
    return "_".join(parts + ["window"] * window)


def table(record: dict[str, Any]) -> Rows:
    """The table of a record; the MFU is of bfloat16, on chips that are known."""
    size = SIZES[record["settings"]["size"]]
    tokens = record["settings"].get("tokens", size.batch * size.sequence)
    operations = tokens * utilization.operations(size, vocabulary=256)
    peak = utilization.peak_of(record.get("device", ""))
    cells = [
        [
            name,
            f"{1e3 * each['seconds']:.1f}",
            f"{tokens / each['seconds']:,.0f}",
            f"{operations / each['seconds'] / peak:.1%}" if peak else "",
            f"{each['to STE']:.2f}",
            f"{each['to full precision']:.2f}" if each["to full precision"] else "",
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
    what = "for some minutes" if settings.window else "then compiles: ten minutes"
    console.print(f"Times train steps in turns, {what}.", highlight=False)
    if settings.tiny and settings.window:
        record = measure_window("tiny", PERIOD, 1)
    elif settings.tiny:
        record = measure("tiny", 2, 1, deep="tiny", compiles=1)
    elif settings.window:
        periods = -(-settings.rounds // PERIOD)
        record = measure_window(settings.size, PERIOD * periods)
    else:
        record = measure(settings.size, settings.rounds)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
