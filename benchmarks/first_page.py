"""Measures the table of the first page: digits at 2 bits, by `examples/quickstart.py`.

The setting was fixed before any quantized arm was run. The quantizer is `int2()` as it
comes, one scale for each output channel, and weights alone are quantized. The rate is a
cosine to 0, which is free and leaves CAGE less to do. CAGE is `cage_adamw` with
`total_steps`, with nothing to tune. Width, steps and rate are those of the lowest loss
in full precision on a quarter of the training digits, with seeds that are not used
here: of 64 and 128 hidden units, 1000 and 2000 steps, rates of .001, .003 and .01.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import measurement
import numpy as np
import optax
import tyro
from measurement import Rows
from rich.console import Console

import cage_jax as cage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import quickstart
from digits import Estimate, estimate
from quickstart import FULL, INT2, RATE

ARMS = {
    "full": "full precision",
    "ptq": "rounded afterwards (PTQ)",
    "ste": "straight-through (STE)",
    "cage": "STE + CAGE",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains all arms of the quick start with many seeds, which they share."""

    seeds: int = 40
    """Trainings of each arm; at least 2, for a standard error."""
    tiny: bool = False
    """Two seeds of a few steps, to see that everything works; nothing is written."""


def scores(seeds: int) -> dict[str, dict[str, np.ndarray]]:
    """Accuracy and loss on the unseen digits by arm, one entry a seed."""

    def trained(rules, tx):
        return jax.jit(jax.vmap(partial(quickstart.train, rules, tx)))(np.arange(seeds))

    def scored(params, rules):
        def one(params):
            guess = quickstart.logits(
                cage.fake_quant(params, rules), quickstart.x_test
            ).argmax(-1)
            loss = quickstart.loss(params, rules, quickstart.x_test, quickstart.y_test)
            return {"accuracy": (guess == quickstart.y_test).mean(), "loss": loss}

        return jax.tree.map(np.float64, jax.jit(jax.vmap(one))(params))

    full = trained(FULL, optax.adamw(RATE))
    pulled = cage.cage_adamw(RATE, INT2, total_steps=quickstart.STEPS)
    return {
        "full": scored(full, FULL),
        "ptq": scored(full, INT2),
        "ste": scored(trained(INT2, optax.adamw(RATE)), INT2),
        "cage": scored(trained(INT2, pulled), INT2),
    }


def measure(seeds: int) -> dict[str, Any]:
    """The record of so many seeds."""
    found = scores(seeds)
    params = jax.eval_shape(partial(quickstart.train, FULL, optax.sgd(0.0)))
    sizes = {rules: rules.report(params).bytes_after for rules in (FULL, INT2)}
    paired = {
        name: found["cage"][name] - found["ste"][name] for name in ("accuracy", "loss")
    }
    return {
        "name": "first_page",
        "benchmark": "first_page",
        "title": f"Digits at 2 bits, mean ± standard error of {seeds} seeds",
        "environment": measurement.environment("scikit-learn"),
        "settings": {"seeds": seeds, "steps": quickstart.STEPS},
        "figures": [
            {
                "arm": arm,
                **{name: estimate(each)._asdict() for name, each in values.items()},
                "bytes": sizes[FULL if arm == "full" else INT2],
            }
            for arm, values in found.items()
        ],
        "cage_minus_ste": {
            name: estimate(values)._asdict() for name, values in paired.items()
        },
        "wins": int((paired["loss"] < 0).sum()),
        "seed_by_seed": jax.tree.map(np.ndarray.tolist, found),
        "targets": [],
    }


def table(record: dict[str, Any]) -> Rows:
    """A row for each arm."""
    cells = []
    for each in record["figures"]:
        accuracy, loss = (Estimate(**each[name]) for name in ("accuracy", "loss"))
        size = f"{each['bytes']:,}"
        cells.append([ARMS[each["arm"]], f"{accuracy:.2%}", f"{loss:.4f}", size])
    return Rows(["weights at 2 bits", "accuracy", "loss", "bytes"], cells)


def sentence(record: dict[str, Any]) -> str:
    """Says what CAGE changes in pairs of one seed."""
    change = {name: Estimate(**each) for name, each in record["cage_minus_ste"].items()}
    return (
        f"{record['title']}. In pairs, CAGE changes STE's loss by "
        f"{change['loss']:+.4f} and its accuracy by {change['accuracy']:+.2%}; its "
        f"loss is lower in {record['wins']} seeds."
    )


def main() -> int:
    """Runs the program; the exit status."""
    settings, console = tyro.cli(Settings, description=__doc__), Console()
    if settings.tiny:
        settings, quickstart.STEPS = dataclasses.replace(settings, seeds=2), 20
    if settings.seeds < 2:
        console.print(
            f"`--seeds` must be at least 2, for a standard error; got "
            f"{settings.seeds}. The published figures have 40."
        )
        return 2
    console.print(f"{settings.seeds} seeds of 3 trainings, all at once: two minutes.")
    record = measure(settings.seeds)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    console.print(sentence(record), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
