"""A Llama of bytes from scratch on real text: few bits, both ends of the rate, sizes.

Each cell is a run of examples/train_lm.py, which has checkpoints: one that is stopped
goes on from the newest.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import train_lm
from cells import Table
from experiment import ARMS, Experiment, Settings
from rich.console import Console
from sizes import SIZES

SEEDS = 3
WIDTHS = ((4, 4), (3, 3), (2, 2), (4, 16), (2, 16))
# What each end of the learning rate is measured for.
FLOORS = {0.1: WIDTHS, 0.0: ((4, 4), (2, 2))}


class Model(NamedTuple):
    """Its layers, their width, and the steps of its training."""

    layers: int
    width: int
    steps: int


# Few weights and many bytes for each, as in trainings that end.
LONG = Model(1, 64, 4000)
# Many weights and few bytes, as in a training that is cut short.
SHORT = Model(2, 128, 1000)
# Of equal bytes in the layers are 3 of 4 bits, 4 of 3 and 6 of 2.
SIZES_OF = ((4, 2), (4, 3), (3, 4), (2, 6))
OF_SIZES = ("ste", "recommended")
TINY = {"seeds": 2, "steps": 20}
RUNS = Path("runs/quality/language_models")
_NAME = re.compile(
    r"W(\d+)A(\d+), (\d+) x (\d+), (\d+) steps, rate to ([\d.]+)%, seed (\d+)"
)
_SIZE_OF = {size.width: name for name, size in SIZES.items()}


def name_of(w_bits: int, a_bits: int, model: Model, floor: float, seed: int) -> str:
    """Returns the name of a cell."""
    size = f"{model.layers} x {model.width}, {model.steps} steps"
    return f"W{w_bits}A{a_bits}, {size}, rate to {floor:.0%}, seed {seed}"


def names(seeds: int = SEEDS) -> list[str]:
    """Returns the names of all cells."""
    cells = [
        (w_bits, a_bits, LONG, floor)
        for floor, widths in FLOORS.items()
        for w_bits, a_bits in widths
    ]
    cells += [(4, 4, SHORT, 0.1)]
    cells += [
        (bits, bits, LONG._replace(layers=layers), 0.1) for bits, layers in SIZES_OF
    ]
    return [name_of(*cell, seed) for cell in cells for seed in range(seeds)]


def settings_of(
    name: str, steps: int | None = None, runs: Path = RUNS, **changes: Any
) -> Settings:
    """The settings of a cell's run.

    Args:
      name: of the cell.
      steps: of a trial; None for those that the name says.
      runs: folder of the checkpoints.
      **changes: what no name says.
    """
    parts = _NAME.fullmatch(name)
    assert parts is not None
    w_bits, a_bits, layers, width, said, percent, seed = map(float, parts.groups())
    of_sizes = width == LONG.width and layers != LONG.layers
    return Settings(
        **changes,
        size=_SIZE_OF[int(width)],
        w_bits=int(w_bits),
        a_bits=int(a_bits),
        layers=int(layers),
        floor=percent / 100,
        seed=int(seed),
        steps=steps or int(said),
        arms=OF_SIZES if of_sizes else tuple(ARMS),
        out=runs / re.sub(r"\W+", "_", name),
        resume=True,
    )


def measure(
    console: Console,
    *,
    seeds: int = SEEDS,
    steps: int | None = None,
    only: Sequence[str] = (),
    table: Table | None = None,
    runs: Path = RUNS,
    name: str = "language_models",
    **changes: Any,
) -> Table:
    """Fills the table, cell by cell, as `quadratics.measure` does.

    Args:
      console: is told of each.
      seeds: of each setting.
      steps: of each training, for a trial; None for those that the names say.
      only: the names of some cells; none for all.
      table: to fill; None for the one that is kept.
      runs: folder of the checkpoints.
      name: of the table.
      **changes: settings of `train_lm.py` that no name of a cell says.
    """
    changes = {"devices": 1} | changes
    settings = {"strength": Settings().strength}
    settings |= {k: changes[k] for k in sorted(changes.keys() - {"devices", "text"})}
    table = table or Table(name, settings)

    def one(name):
        settings = settings_of(name, steps, runs, **changes)
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
