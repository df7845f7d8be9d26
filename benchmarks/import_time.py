"""Times `import cage_jax` against `import jax, optax`, each in a process of its own."""

import dataclasses
import statistics
import subprocess
import sys
from typing import Any

import measurement
import tyro
from measurement import Rows
from rich.console import Console
from rich.markup import escape

STATEMENTS = {
    "jax and optax": "import jax, optax",
    "jax, optax and cage_jax": "import jax, optax, cage_jax",
}
BOUND_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times what importing cage_jax adds to importing jax and optax."""

    rounds: int = 11
    """Timed processes of each kind."""
    tiny: bool = False
    """One process of each, to see that everything works; nothing is written."""


def _importer(statement: str):
    def call():
        subprocess.run([sys.executable, "-c", statement], check=True)

    return call


def measure(rounds: int, warmup: int = 1) -> dict[str, Any]:
    """Medians of both kinds of process and of their difference, in seconds."""
    functions = {name: _importer(text) for name, text in STATEMENTS.items()}
    times = measurement.interleaved(functions, rounds, warmup)
    without, together = times.values()
    added = statistics.median(b - a for a, b in zip(without, together))
    return {
        "name": "import_time",
        "benchmark": "import_time",
        "title": "Importing, start of Python included",
        "environment": measurement.environment(),
        "settings": {"rounds": rounds, "warmup": warmup},
        "figures": {name: statistics.median(each) for name, each in times.items()}
        | {"added by cage_jax": added},
        "seconds": times,
        "targets": [
            measurement.target("seconds that cage_jax adds", added, BOUND_SECONDS)
        ],
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record, for the console and for the README."""
    cells = [[name, f"{seconds:.2f}"] for name, seconds in record["figures"].items()]
    return Rows(["import", "seconds"], cells)


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    if settings.rounds < 3:
        error = (
            f"`--rounds` must be at least 3, for a median; got {settings.rounds}. Use "
            f"11."
        )
        console.print(f"[red]error[/]: {escape(error)}", soft_wrap=True)
        return 2
    rounds, warmup = (1, 0) if settings.tiny else (settings.rounds, 1)
    console.print(
        f"Starting Python {2 * (rounds + warmup)} times, two seconds each.",
        highlight=False,
    )
    record = measure(rounds, warmup)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
