"""What the benchmarks share: where they ran, how they time, write and show."""

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # what only measures needs no rich
    from rich.console import Console

RESULTS = Path(__file__).resolve().parent / "results"


class Rows(NamedTuple):
    """A table: the names of its columns, and its cells as text."""

    header: list[str]
    cells: list[list[str]]


def environment(*packages: str) -> dict[str, Any]:
    """The machine, the date, and the versions of what was measured.

    Args:
      packages: what is not of jax, optax and PyTorch.
    """
    versions = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "optax", "torch", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "machine": {
            "processor": _processor(),
            "cpus": cpus(),
            "system": platform.system(),
            "architecture": platform.machine(),
            # Well above the number of CPUs, others were at work.
            "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        },
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def cpus() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns.

    Whatever else the machine does then slows all of them alike, so that their ratios
    mean something where their times do not.

    Args:
      functions: by name; each must return when its work is done.
      rounds: timed calls of each.
      warmup: calls of each before them, not timed.

    Returns:
      By name, `rounds` times.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return times


def median_ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over the rounds of one function's time over another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[base]))


def ratios_in_period(
    times: Mapping[str, list[float]], name: str, base: str, period: int
) -> list[float]:
    """`median_ratio` of each step of a period, for steps that are not alike.

    A median over all rounds would hide what only every tenth step does. The mean of
    these is the ratio of a whole period, and their maximum that of its slowest step.
    """
    return [
        median_ratio(
            {each: times[each][place::period] for each in (name, base)}, name, base
        )
        for place in range(period)
    ]


def target(text: str, measured: float, bound: float, form: str = ".2f") -> dict:
    """Whether `measured` is at most `bound`, for the record."""
    return {
        "text": text,
        "measured": measured,
        "bound": bound,
        "met": bool(measured <= bound),
        "form": form,
    }


def target_lines(record: Mapping[str, Any]) -> list[str]:
    """A line for each target: what it is, what was measured, and whether it was met."""
    return [
        f"{each['text']}: target at most {each['bound']:{each['form']}}, measured "
        f"{each['measured']:{each['form']}}, {'met' if each['met'] else 'NOT met'}."
        for each in record["targets"]
    ]


def environment_line(record: Mapping[str, Any]) -> str:
    """Where and when a record was made."""
    where = record["environment"]
    machine = where["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items() if v)
    load = machine.get("load")
    busy = "" if load is None else f" at load {load:g}"
    return (
        f"{where['date']}, {machine['processor']}, {machine['cpus']} CPUs{busy}; "
        f"{versions}."
    )


def save(record: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Writes a record as `NAME.json`, and returns where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['name']}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def show(record: Mapping[str, Any], rows: Rows, console: "Console") -> None:
    """Prints the table of a record and its targets."""
    from rich.table import Table

    table = Table(title=record["title"])
    for number, name in enumerate(rows.header):
        table.add_column(name, justify="right" if number else "left")
    for cells in rows.cells:
        table.add_row(*cells)
    console.print(table)
    for line in target_lines(record):
        console.print(line, soft_wrap=True, highlight=False)


def finish(
    record: Mapping[str, Any], rows: Rows, console: "Console", *, keep: bool
) -> None:
    """Prints a record and, unless it is only a trial, writes it."""
    show(record, rows, console)
    if keep:
        path = save(record)
        console.print(f"Written to {path.parent.name}/{path.name}.", highlight=False)
    else:
        console.print("A trial: nothing is written.")
