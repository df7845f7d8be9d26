"""What methods come to when all are tuned alike, on digits.

The one number that a method has is tried at the same factors for all, on seeds of their
own; the best by train loss is then trained on the seeds of `classifiers`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from cells import Table
from classifiers import batches_of, load_digits, rounded, scores, train_all
from methods import METHODS, Method, full
from networks import NETWORKS
from rich.console import Console

BITS, NETWORK, FLOOR = (4, 3, 2), "MLP", 0.1
# Of the number that the paper has; each method may take the best of seven trainings.
FACTORS = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
# Of the random numbers of the study, and of those to tune with.
STUDY, TUNING = 0, 1
TINY = {"seeds": 2, "steps": 20, "factors": (0.1, 1.0)}


def names() -> list[str]:
    """Returns the names of all cells."""
    return [f"digits {NETWORK} W{bits}A{bits}" for bits in BITS]


def measure(
    console: Console,
    *,
    seeds: int = 10,
    steps: int | None = None,
    factors: Sequence[float] = FACTORS,
    only: Sequence[str] = (),
    table: Table | None = None,
) -> Table:
    """Fills the table, cell by cell, as `quadratics.measure` does.

    What else it takes are the factors.
    """
    network = NETWORKS[NETWORK]
    steps = steps or network.steps
    settings = {"seeds": seeds, "steps": steps, "factors": factors, "floor": FLOOR}
    table = table or Table("tuned", settings)
    data = load_digits()
    parts = tuple(map(batches_of, data))

    def losses(method: Method, bits: int | None, key: int) -> np.ndarray:
        trained = train_all(method, network, bits, FLOOR, data[0], seeds, steps, key)
        found = scores(trained.last, network, bits, parts).train_loss
        return np.nan_to_num(found, nan=np.inf)

    def one(name: str) -> dict[str, Any]:
        bits = int(name.rpartition("A")[2])
        unquantized = losses(Method("", weights=full), None, STUDY)
        found: dict[str, Any] = {"full": {"train_loss": rounded(unquantized)}}
        for label, method in METHODS.items():
            if not method.number:
                found[label] = {"train_loss": rounded(losses(method, bits, STUDY))}
                continue
            means = [losses(method.times(n), bits, TUNING).mean() for n in factors]
            factor = factors[int(np.argmin(means))]
            found[label] = {
                "tried": [mean if np.isfinite(mean) else None for mean in means],
                "factor": factor,
                "train_loss": rounded(losses(method.times(factor), bits, STUDY)),
            }
            console.print(f"  {label}: {factor:g} x {method.number}", highlight=False)
        return found

    table.measure(only or names(), one, console)
    return table
