"""Measures the table of the first page: digits at 2 bits, by `examples/quickstart.py`.

The setting was fixed before any quantized arm was run. The quantizer is `int2()` as it
comes, one scale for each output channel, and weights alone are quantized. The rate is a
cosine to 0, which is free and leaves CAGE less to do. CAGE is `cage_adamw` with
`total_steps`, with nothing to tune. Width, steps and rate are those of the lowest loss
in full precision on a quarter of the training digits, with seeds that are not used
here: of 64 and 128 hidden units, 1000 and 2000 steps, rates of .001, .003 and .01.

STE and CAGE are also trained with a rate that ends at a tenth of its peak, where the
study found more to gain.
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
from quickstart import FULL, RATE

INT2 = quickstart.rules
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


def scores(seeds: int, floor: float) -> dict[str, dict[str, np.ndarray]]:
    """Accuracy and loss on the unseen digits by arm, one entry a seed.

    The rate ends at `floor` times its peak.
    """
    steps = quickstart.STEPS
    rate = optax.cosine_decay_schedule(float(RATE(0)), steps, floor)

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

    full = trained(FULL, optax.adamw(rate))
    pulled = cage.cage_adamw(rate, INT2, total_steps=steps)
    return {
        "full": scored(full, FULL),
        "ptq": scored(full, INT2),
        "ste": scored(trained(INT2, optax.adamw(rate)), INT2),
        "cage": scored(trained(INT2, pulled), INT2),
    }


def measure(seeds: int) -> dict[str, Any]:
    """The record of so many seeds."""
    found, at_a_tenth = scores(seeds, 0.0), scores(seeds, 0.1)
    params = jax.eval_shape(partial(quickstart.train, FULL, optax.sgd(0.0)))
    sizes = {rules: rules.report(params).bytes_after for rules in (FULL, INT2)}
    return {
        "name": "first_page",
        "benchmark": "first_page",
        "title": f"Digits at 2 bits, mean ± standard error of {seeds} seeds",
        "environment": measurement.environment("scikit-learn"),
        "settings": {"seeds": seeds, "steps": quickstart.STEPS},
        "figures": [
            {"arm": arm, **estimates(values)}
            | {"bytes": sizes[FULL if arm == "full" else INT2]}
            for arm, values in found.items()
        ],
        **compared(found),
        "seed_by_seed": jax.tree.map(np.ndarray.tolist, found),
        "at_a_tenth": compared(at_a_tenth)
        | {arm: estimates(at_a_tenth[arm]) for arm in ("ste", "cage")},
        "targets": [],
    }


def estimates(values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean and standard error of accuracy and loss."""
    return {name: estimate(each)._asdict() for name, each in values.items()}


def compared(found: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """What CAGE changes in pairs of one seed."""
    paired = {
        name: found["cage"][name] - found["ste"][name] for name in ("accuracy", "loss")
    }
    wins = int((paired["loss"] < 0).sum())
    return {"cage_minus_ste": estimates(paired), "wins": wins}


def table(record: dict[str, Any]) -> Rows:
    """A row for each arm."""
    cells = []
    for each in record["figures"]:
        accuracy, loss = (Estimate(**each[name]) for name in ("accuracy", "loss"))
        size = f"{each['bytes']:,}"
        cells.append([ARMS[each["arm"]], f"{accuracy:.2%}", f"{loss:.4f}", size])
    return Rows(["weights at 2 bits", "accuracy", "loss", "bytes"], cells)


def sentence(record: dict[str, Any]) -> str:
    """Says what CAGE changes in pairs of one seed, at both ends of the rate."""

    def pairs(found):
        change = {k: Estimate(**each) for k, each in found["cage_minus_ste"].items()}
        return (
            f"{change['loss']:+.4f} of loss and {change['accuracy']:+.2%} of accuracy, "
            f"{found['wins']} seeds won"
        )

    tenth = record["at_a_tenth"]
    ste, ours = (Estimate(**tenth[arm]["accuracy"]) for arm in ("ste", "cage"))
    return (
        f"{record['title']}. CAGE - STE: {pairs(record)}. Here the rate decays "
        "to 0, which leaves CAGE little to do. If it ends at a tenth of its peak, "
        f"STE reaches {ste:.2%} and CAGE {ours:.2%}: {pairs(tenth)}."
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
    console.print(f"{settings.seeds} seeds of 6 trainings, all at once: two minutes.")
    record = measure(settings.seeds)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    console.print(sentence(record), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
