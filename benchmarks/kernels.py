"""Counts what kernels and XLA move to and from memory, for chips that are not here.

Each case is compiled for one TPU chip, as XLA makes it of `jax.numpy` and with the
kernel. A unit is one copy of the array: to read it and to write the result takes two,
and a quarter more where a mask is written for the gradient. Cycles are those that the
compiler expects of its own programs, which wait for memory, and of kernels those of
their instructions; with how long memory takes for what a kernel moves, by the same
estimate, the longer of both is what to expect of it. Nothing is run.
"""

import dataclasses
import os
import re
import sys
import time
from typing import Any, Literal

# Before jax is loaded: no TPU is looked for, and other processes may compile too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import bundles
import hlo
import jax
import jax.numpy as jnp
import measurement
import optax
import tyro
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from kernel_cases import CASES_FOR_TPU, LONG, WIDE, Case
from measurement import Rows
from rich.console import Console

import cage_jax as cage

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
IMPLEMENTATIONS: tuple[Literal["xla", "pallas"], ...] = ("xla", "pallas")
# That a kernel is shipped for: what XLA moves over what it moves.
GAIN = 1.15
EXCESS = 1.05
# Cycles are given for so many numbers of an array.
_NUMBERS = 1024


@dataclasses.dataclass(frozen=True)
class Settings:
    """Counts what kernels and XLA move, compiled for TPU."""

    chips: tuple[Literal["v4", "v5e", "v5p", "v6e"], ...] = ("v5e", "v6e")
    """What to compile for."""
    tiny: bool = False
    """One case, to see that it works; nothing is written."""


def lowered(case: Case, x: Any, implementation: Literal["xla", "pallas"] | None) -> Any:
    """What is compiled, for an abstract array."""

    def forward(x):
        return cage.fake_quant(x, case.quantizer, implementation=implementation)

    def both(x, cotangent):
        value, back = jax.vjp(forward, x)
        return value, *back(cotangent)

    if not case.is_step:
        args = (x,) if case.what == "forward" else (x, x)
        return jax.jit(forward if case.what == "forward" else both).lower(*args)

    rules = cage.Rules([(".*", case.quantizer)])
    after = case.what == "step, error after the update"
    tx = cage.cage_adamw(
        1e-3,
        rules,
        strength=cage.silence_then_ramp(100),
        placement="post_step" if after else "decoupled",
        statistics=case.what == "step, statistics",
    )

    def step(params, state, gradient):
        if implementation != "xla":
            return tx.fused_step(gradient, state, params, implementation=implementation)
        # "xla" of the fused step is this as well, but for the layout of its state.
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = {"x": x}
    state = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=x.sharding),
        jax.eval_shape(tx.init, params),
    )
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)


def array(shape: tuple[int, int], dtype: str, chip: str) -> jax.ShapeDtypeStruct:
    """An abstract array on a chip."""
    (device, *_) = topologies.get_topology_desc(
        platform="tpu", topology_name=CHIPS[chip]
    ).devices
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))


def counted(
    case: Case, chip: str, implementation: Literal["xla", "pallas"]
) -> dict[str, Any]:
    """Units moved, the kernels by name, seconds to compile, and expected cycles.

    The compiler expects none of kernels.
    """
    x = array(case.shape, case.dtype, chip)
    start, unit = time.perf_counter(), x.size * jnp.dtype(x.dtype).itemsize
    program = lowered(case, x, implementation).compile()
    text = program.as_text()
    return {
        "units": hlo.moved(text).memory / unit,
        "in place": program.memory_analysis().alias_size_in_bytes / unit,
        "kernels": sorted(set(re.findall(r"%(cage_\w+?)(?:\.\d+)? = ", text))),
        "seconds": time.perf_counter() - start,
        "cycles": _expected(text) * _NUMBERS / x.size,
    }


def cycles(cases: list[Case], chips: tuple[str, ...]) -> list[float]:
    """Computes the cycles of each case's kernels, for one chip after the other."""
    calls = [(case, chip) for case in cases for chip in chips]
    found = []
    for (case, _), each in zip(calls, bundles.schedules(_compiled, calls)):
        # A step has a branch without the pull, which is shorter.
        branches = 2 if case.is_step and case.what != "step, statistics" else 1
        whole = sum(schedule.cycles(branches) for schedule in each.values())
        found.append(whole * _NUMBERS / (LONG * WIDE))
    return found


def _compiled(case, chip):
    return lowered(case, array(case.shape, case.dtype, chip), "pallas").compile()


def copied(chip: str, dtype: str) -> float:
    """Cycles that the compiler expects to read and write an array."""
    x = array((LONG, WIDE), dtype, chip)
    text = jax.jit(lambda x: x + x.dtype.type(1)).lower(x).compile().as_text()
    return _expected(text) * _NUMBERS / x.size


def is_taken(case: Case, chip: str) -> bool:
    """Whether a kernel is run where none is asked for."""
    x = array(case.shape, case.dtype, chip)
    return case.kernels[0] in lowered(case, x, None).as_text()


def _expected(text):
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))


def measure(cases: list[Case], chips: tuple[str, ...]) -> dict[str, Any]:
    """The record of all cases."""
    console, figures = Console(), {}
    console.print("schedules of all kernels", highlight=False)
    schedules = iter(cycles(cases, chips))
    for number, case in enumerate(cases, 1):
        console.print(f"{number}/{len(cases)} {case}", highlight=False)
        by_chip = {}
        for chip in chips:
            by_chip[chip] = {
                name: counted(case, chip, name) for name in IMPLEMENTATIONS
            }
            by_chip[chip]["pallas"]["cycles"] += next(schedules)
            by_chip[chip]["copy"] = copied(chip, case.dtype)
        figures[str(case)] = {
            "least": case.least,
            "taken": is_taken(case, chips[0]),
            "chips": by_chip,
        }
    return {
        "name": "kernels",
        "benchmark": "kernels",
        "title": f"Copies of an array of {LONG * WIDE // 2**20} M numbers that are "
        f"moved to and from memory, and in brackets cycles for {_NUMBERS} of them, "
        f"compiled and not run",
        "environment": measurement.environment("libtpu"),
        "settings": {"chips": list(chips), "shape": [LONG, WIDE]},
        "figures": figures,
        "targets": _targets(figures),
    }


def _targets(figures):
    each_chip = [
        (each, found["copy"], found["xla"], found["pallas"])
        for each in figures.values()
        for found in each["chips"].values()
    ]
    taken = [rest for each, *rest in each_chip if each["taken"]]
    return [
        measurement.target(
            "kernels, most of the least",
            max(kernel["units"] / each["least"] for each, _, _, kernel in each_chip),
            EXCESS,
            ".3f",
        ),
        measurement.target(
            "kernels that are run by themselves, most of what XLA moves",
            max(kernel["units"] / xla["units"] for _, xla, kernel in taken),
            1 / GAIN,
            ".2f",
        ),
        measurement.target(
            "kernels that are run by themselves, most of XLA's cycles",
            max(
                max(kernel["cycles"], kernel["units"] / 2 * copy) / xla["cycles"]
                for copy, xla, kernel in taken
            ),
            1 / GAIN,
            ".2f",
        ),
    ]


def table(record: dict[str, Any]) -> Rows:
    """The table of a record."""
    chips = record["settings"]["chips"]
    header = ["case", "least"]
    header += [f"{chip}, {name}" for chip in chips for name in ("XLA", "kernel")]
    cells = []
    for case, each in record["figures"].items():
        found = [
            each["chips"][chip][name] for chip in chips for name in IMPLEMENTATIONS
        ]
        cells.append([case if each["taken"] else f"{case} (by name alone)"])
        cells[-1].append(f"{each['least']:.2f}")
        cells[-1] += [f"{one['units']:.2f} ({one['cycles']:.0f})" for one in found]
    cells.append(["(to read and write float32)", ""])
    for chip in chips:
        float32 = max(
            each["chips"][chip]["copy"] for each in record["figures"].values()
        )
        cells[-1] += ["", f"({float32:.0f})"]
    cells.append(["seconds to compile all", ""])
    for chip in chips:
        for name in IMPLEMENTATIONS:
            seconds = sum(
                each["chips"][chip][name]["seconds"]
                for each in record["figures"].values()
            )
            cells[-1].append(f"{seconds:.0f}")
    return Rows(header, cells)


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    if settings.tiny:
        record = measure(CASES_FOR_TPU[:1], settings.chips[:1])
    else:
        record = measure(CASES_FOR_TPU, settings.chips)
    keep = not settings.tiny and settings.chips == Settings.chips
    measurement.finish(record, table(record), console, keep=keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
