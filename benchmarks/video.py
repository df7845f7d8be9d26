"""PSNR of a video that is a network at few bits, the arms of `examples/tiny_nerv.py`.

    python benchmarks/video.py    # ten minutes on an idle core

All arms of a seed share the trained network and the order of frames; nothing is tuned.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import measurement
import numpy as np
import tyro
from measurement import Rows

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import tiny_nerv

SEEDS, BASE = 3, "QAT"


def measure(settings: tiny_nerv.Settings, seeds: int) -> dict[str, Any]:
    """Returns the record: by arm, the PSNR of each seed."""
    runs = [
        tiny_nerv.run(dataclasses.replace(settings, seed=seed)) for seed in range(seeds)
    ]
    return {
        "name": "video",
        "benchmark": "video",
        "title": f"PSNR in dB of a video of 32 x 48 pixels as a network, {seeds} seeds",
        "environment": measurement.environment(),
        "settings": dataclasses.asdict(settings) | {"seeds": seeds},
        "figures": {name: [run[name] for run in runs] for name in runs[0]},
        "targets": [],
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record: means over seeds, and paired differences."""

    def estimate(values: np.ndarray, form: str) -> str:
        error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return f"{np.mean(values):{form}} ± {error:.2f}"

    figures = {name: np.array(values) for name, values in record["figures"].items()}
    cells = []
    for name, values in figures.items():
        bits, other, _ = name.partition(", ")
        gain = values - figures[f"{bits}, {BASE}"] if other else np.zeros(1)
        told = estimate(gain, "+.2f") if gain.any() else ""
        cells.append([name, estimate(values, ".2f"), told])
    return Rows(["weights", "PSNR, dB", f"less “{BASE}”, paired"], cells)


def main() -> int:
    """Runs the program; the exit status."""
    from rich.console import Console

    settings = tyro.cli(tiny_nerv.Settings, description=__doc__)
    record = measure(settings, 1 if settings.tiny else SEEDS)
    measurement.finish(record, table(record), Console(), keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
