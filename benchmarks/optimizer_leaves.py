"""Compiles and times optimizer steps of trees with many small arrays.

The arrays are the matrices of narrow Llamas, 7 a layer. What is compiled has never been
compiled before: caches are cleared, and the one on disk is off.
"""

import dataclasses
import statistics
import sys
import time
from typing import Any

import jax
import measurement
import optax
import optimizer_step
import tyro
from measurement import Rows
from optimizer_step import PERIOD, PHASES, Program, Shapes
from rich.console import Console

ADAMW, PUBLISHED = "optax, AdamW", "cage_jax, int4"
RECOMMENDED = "cage_jax, int4, recommended"
LEAVES = (24, 70, 210)
WIDTH, HIDDEN = 256, 512


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compiles and times optimizer steps of trees with many small arrays."""

    compiles: int = 3
    """Compilations of each contestant."""
    periods: int = 5
    """Timed periods of ten steps of each contestant."""
    tiny: bool = False
    """One compilation and one period with 7 arrays; nothing is written."""


def shapes_of(leaves: int) -> dict[str, tuple[int, int]]:
    """The shapes of the first `leaves` matrices of a Llama."""
    found = optimizer_step.llama_shapes(-(-leaves // 7), WIDTH, HIDDEN)
    return dict(list(found.items())[:leaves])


def compile_seconds(tx: optax.GradientTransformation, shapes: Shapes) -> float:
    """How long tracing and compiling a step takes; nothing is run."""
    arguments = optimizer_step.arguments(tx, shapes)
    jax.clear_caches()
    start = time.perf_counter()
    optimizer_step.jitted_step(tx).lower(*arguments).compile()
    return time.perf_counter() - start


def measure(leaves: int, compiles: int, periods: int) -> list[dict[str, Any]]:
    """A row for each contestant, with ratios to others within this run."""
    shapes = shapes_of(leaves)
    every = optimizer_step.adamw_and_cage()
    optimizers = {name: every[name] for name in (ADAMW, PUBLISHED, RECOMMENDED)}
    compiling: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(compiles):
        for name, tx in optimizers.items():
            compiling[name].append(compile_seconds(tx, shapes))
    gradients = optimizer_step.random_tree(shapes, 1e-3, seed=1)
    programs = {name: Program(tx, gradients) for name, tx in optimizers.items()}
    timed = {
        phase: measurement.interleaved(
            optimizer_step.steps_of(programs, phase), PERIOD * periods
        )
        for phase in PHASES
    }
    return [
        {
            "leaves": leaves,
            "step": name,
            "compile": statistics.median(compiling[name]),
            "compile_to_adamw": measurement.median_ratio(compiling, name, ADAMW),
            "compile_to_published": measurement.median_ratio(
                compiling, name, PUBLISHED
            ),
            "milliseconds": 1e3 * statistics.median(timed["silent"][name]),
            "memory": programs[name].memory,
        }
        | {
            phase: statistics.mean(
                measurement.ratios_in_period(times, name, ADAMW, PERIOD)
            )
            for phase, times in timed.items()
        }
        for name in optimizers
    ]


def record_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All that is written to JSON."""
    found = {(row["leaves"], row["step"]): row for row in rows}
    few, many = LEAVES[0], LEAVES[-1]
    targets = []
    if (few, RECOMMENDED) in found:
        text = f"compiling {few} arrays, int4, recommended, to published"
        ratio = found[few, RECOMMENDED]["compile_to_published"]
        targets.append(measurement.target(text, ratio, 1.3))
    if (many, RECOMMENDED) in found:
        text = f"compiling {many} arrays, int4, recommended, to optax, AdamW"
        ratio = found[many, RECOMMENDED]["compile_to_adamw"]
        targets.append(measurement.target(text, ratio, 4.0))
    return {
        "name": "optimizer_leaves",
        "benchmark": "optimizer_leaves",
        "title": f"Steps of many matrices, {WIDTH} wide: compiling, and mean of ten "
        f"steps' ratios to AdamW's",
        "environment": measurement.environment(),
        "settings": {"width": WIDTH, "hidden": HIDDEN},
        "figures": rows,
        "targets": targets,
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record, for the console and for the README."""
    header = ["arrays, step", "compile, s", "to AdamW", "to published"]
    header += ["ms", "silent, to AdamW", "active, to AdamW", "memory"]
    cells = [
        [
            f"{row['leaves']}, {row['step']}",
            f"{row['compile']:.1f}",
            *(f"{row[f'compile_to_{base}']:.2f}" for base in ("adamw", "published")),
            f"{row['milliseconds']:.1f}",
            *(f"{row[name]:.2f}" for name in (*PHASES, "memory")),
        ]
        for row in record["figures"]
    ]
    return Rows(header, cells)


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    jax.config.update("jax_enable_compilation_cache", False)
    console.print("Compiles and times optimizer steps: three minutes.", highlight=False)
    if settings.tiny:
        rows = measure(7, compiles=1, periods=1)
    else:
        rows = [
            row
            for leaves in LEAVES
            for row in measure(leaves, settings.compiles, settings.periods)
        ]
    record = record_of(rows)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
