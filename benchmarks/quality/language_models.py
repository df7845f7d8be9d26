"""A Llama of bytes from scratch on real text: few bits, both ends of the rate, sizes.

Each cell is a run of examples/train_lm.py, which has checkpoints: one that is stopped
goes on from the newest.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train_lm
from cells import Table
from experiment import ARMS, Experiment, Settings
from rich.console import Console

SEEDS = 3
WIDTHS = ((4, 4), (3, 3), (2, 2), (4, 16), (2, 16))
# What each end of the learning rate is measured for.
FLOORS = {0.1: WIDTHS, 0.0: ((4, 4), (2, 2))}
LAYERS = 2
# Of equal bytes in the layers are 3 of 4 bits, 4 of 3 and 6 of 2.
SIZES = ((4, 2), (4, 3), (4, 4), (3, 3), (3, 4), (2, 4), (2, 6))
OF_SIZES = ("ste", "recommended")
TINY = {"seeds": 2, "steps": 20, "size": "tiny"}
RUNS = Path("runs/quality/language_models")
_NAME = re.compile(r"W(\d+)A(\d+) of (\d+) layers, rate to ([\d.]+)%, seed (\d+)")


def names(seeds: int = SEEDS) -> list[str]:
    """Those of all cells."""
    cells = [
        (w_bits, a_bits, LAYERS, floor)
        for floor, widths in FLOORS.items()
        for w_bits, a_bits in widths
    ]
    cells += [(bits, bits, layers, 0.1) for bits, layers in SIZES]
    return [
        f"W{w_bits}A{a_bits} of {layers} layers, rate to {floor:.0%}, seed {seed}"
        for w_bits, a_bits, layers, floor in dict.fromkeys(cells)
        for seed in range(seeds)
    ]


def settings_of(
    name: str,
    steps: int | None,
    size: str | None = None,
    runs: Path = RUNS,
    **changes: Any,
) -> Settings:
    """The settings of a cell's run; `changes` are what no name of a cell says."""
    parts = _NAME.fullmatch(name)
    assert parts is not None
    w_bits, a_bits, layers, percent, seed = map(float, parts.groups())
    return Settings(
        **changes,
        size=size,
        w_bits=int(w_bits),
        a_bits=int(a_bits),
        layers=int(layers),
        floor=percent / 100,
        seed=int(seed),
        steps=steps,
        arms=OF_SIZES if size is None and layers != LAYERS else tuple(ARMS),
        out=runs / re.sub(r"\W+", "_", name),
        resume=True,
    )


def measure(
    console: Console,
    *,
    seeds: int = SEEDS,
    steps: int | None = 1000,
    only: Sequence[str] = (),
    table: Table | None = None,
    size: str | None = None,
    runs: Path = RUNS,
    name: str = "language_models",
    **changes: Any,
) -> Table:
    """Fills the table, cell by cell, as `quadratics.measure` does.

    Args:
      console: is told of each.
      seeds: of each setting.
      steps: of each training.
      only: the names of some cells; none for all.
      table: to fill; None for the one that is kept.
      size: of the model; None for that of the demonstration.
      runs: folder of the checkpoints.
      name: of the table.
      **changes: settings of `train_lm.py` that no name of a cell says.
    """
    changes = {"devices": 1} | changes
    common = Settings(size=size, steps=steps, **changes).resolved()
    kept = ["size", "steps", "batch", "sequence", "learning_rate", "strength"]
    kept += sorted(changes.keys() - {"devices", "text"})
    settings = {name: getattr(common, name) for name in kept}
    table = table or Table(name, settings)

    def one(name):
        settings = settings_of(name, steps, size, runs, **changes)
        results = train_lm.run(settings, console)
        return _figures(Experiment(settings.resolved()), results)

    table.measure(only or names(seeds), one, console)
    return table


def _figures(experiment, results) -> dict[str, Any]:
    rows = [row for row in experiment.report.rows if row.quantizer]
    return {
        "loss": {arm: round(result.loss, 6) for arm, result in results.items()},
        "weights": sum(row.size for row in rows),
        "bytes": sum(row.bytes_after for row in rows),
    }
