"""W3A3 against W4A4 of equal bytes: what CAGE and other recipes do for fewer bits.

The Llama of bytes of `language_models`, of four layers at 3 bits and three at 4. Each
cell is one training, judged at its last weights and at the mean of its last fifth.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lm
import optax
from cells import Table
from experiment import Experiment, Settings
from methods import AVERAGED_SHARE
from rich.console import Console

import cage_jax as cage
from cage_jax import contrib

SEEDS, STEPS, FLOOR = 3, 4000, 0.1
# Bits of weights and of inputs, and layers.
MODELS = {"W4A4": (4, 3), "W3A3": (3, 4)}
SCALES = 0.01  # of the learning rate, for learned scales
TINY = {"seeds": 2, "steps": 10}


class Recipe(NamedTuple):
    """How a model is trained.

    Attributes:
      pulls: by CAGE as recommended.
      start: "scratch", or the weights of the "twin", the same model that was trained in
        full precision for as many steps.
      taught: whether it learns the twin's predictions, not the text.
      settles: whether the rate falls to 0 in the last tenth of the steps.
      learned: whether weights have learned scales, in place of QuEST's grid.
      times: how many times as many steps.
    """

    pulls: bool = True
    start: str = "scratch"
    taught: bool = False
    settles: bool = False
    learned: bool = False
    times: int = 1


RECIPES = {
    "STE": Recipe(pulls=False),
    "CAGE": Recipe(),
    "CAGE, rate to 0 in the last tenth": Recipe(settles=True),
    "CAGE, learned scales": Recipe(learned=True),
    "CAGE, taught by the twin": Recipe(taught=True),
    "STE, twice as long": Recipe(pulls=False, times=2),
    "CAGE, twice as long": Recipe(times=2),
    "STE, from the twin and taught": Recipe(False, "twin", taught=True),
    "CAGE, from the twin and taught": Recipe(start="twin", taught=True),
}
_NAME = re.compile(r"(?P<width>\w+): (?P<recipe>.+), seed (?P<seed>\d+)")


def names(seeds: int = SEEDS) -> list[str]:
    """Returns the names of all cells."""
    return [
        f"{width}: {recipe}, seed {seed}"
        for seed in range(seeds)
        for recipe in RECIPES
        for width in MODELS
    ]


def measure(
    console: Console,
    *,
    seeds: int = SEEDS,
    steps: int = STEPS,
    only: Sequence[str] = (),
    table: Table | None = None,
    **changes: Any,
) -> Table:
    """Fills the table, cell by cell, as `quadratics.measure` does.

    Args:
      console: is told of each.
      seeds: of each recipe.
      steps: of a training, before its recipe multiplies them.
      only: the names of some cells; none for all.
      table: to fill; None for the one that is kept.
      **changes: settings of `train_lm.py`, for a trial.
    """
    table = table or Table("equal_bytes", {"steps": steps, "floor": FLOOR})
    twin = functools.cache(functools.partial(_twin, steps=steps, changes=changes))

    def one(name):
        parts = _NAME.fullmatch(name)
        assert parts is not None
        width, seed = parts["width"], int(parts["seed"])
        recipe = RECIPES[parts["recipe"]]
        run = _experiment(width, seed, recipe.times * steps, changes)
        own = twin(width, seed) if recipe.taught or recipe.start == "twin" else None
        found = _train(run, recipe, own)
        rows = [row for row in run.report.rows if row.quantizer]
        return {key: round(loss, 6) for key, loss in found.items()} | {
            "bytes": sum(row.bytes_after for row in rows)
        }

    table.measure(only or names(seeds), one, console)
    return table


def _experiment(width, seed, steps, changes):
    bits, layers = MODELS[width]
    settings = {"size": "tiny", "devices": 1} | changes
    own = {"w_bits": bits, "a_bits": bits, "layers": layers}
    return Experiment(Settings(**settings, **own, seed=seed, steps=steps).resolved())


def _twin(width, seed, steps, changes):
    """Trains a model in full precision."""
    run = _experiment(width, seed, steps, changes)
    tx = run.model.optimizer(run.learning_rate(FLOOR), strength=0.0)
    params, _ = _steps(run, tx, run.model.initial_params(), quantized=False)
    return params


def _train(run: Experiment, recipe: Recipe, twin: Any) -> dict[str, float]:
    """Trains as a recipe says; returns the losses of the last and of the mean weights.

    Args:
      run: the model and its data.
      recipe: the recipe.
      twin: the parameters in full precision, if the recipe needs them.
    """
    model, steps = run.model, run.settings.steps
    rules = _learned(run.settings.w_bits) if recipe.learned else model.rules
    rate = run.learning_rate(FLOOR)
    if recipe.settles:
        rate = _settling(rate, steps)
    chosen: dict[str, Any] = {"strength": 0.0}
    if recipe.pulls:
        chosen = cage.recommended(rate, steps)
    adamw = functools.partial(cage.cage_adamw, rules=rules, **chosen)
    averaged = contrib.averaging(1.0, start=steps - round(AVERAGED_SHARE * steps))
    # Scales are small numbers, to which a step of Adam is large.
    slow_scales = optax.masked(optax.scale(SCALES), _are_scales)
    tx = optax.chain(lm.optimizer_of(adamw, rate), slow_scales, averaged)
    params = twin if recipe.start == "twin" else model.initial_params()
    if recipe.learned:
        params = cage.with_grids(params, rules)

    def rounded(params):
        weights = cage.fake_quant(params, rules)
        return weights["params"] if recipe.learned else weights

    teacher = twin if recipe.taught else None
    last, state = _steps(run, tx, params, teacher=teacher, weights=rounded)
    judged = {"last": last, "averaged": contrib.averaged(state)}
    return {
        key: run.validation_loss(jax.jit(rounded)(params), True)
        for key, params in judged.items()
    }


def _steps(run, tx, params, **options):
    """Does all steps; returns the parameters and the state of the optimizer."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, windows, teacher):
        return run.model.step(tx)(state, windows, **options | {"teacher": teacher})[0]

    params = jax.tree.map(jnp.copy, params)
    state, batches = (params, tx.init(params)), run.batches(run.text)
    for number in range(run.settings.steps):
        state = step(state, batches[number], options.get("teacher"))
    return jax.block_until_ready(state)


def _settling(rate, steps):
    """Returns a rate that falls to 0 in the last tenth of the steps."""

    def settling(count):
        return rate(count) * jnp.clip((steps - count) / (steps / 10), 0, 1)

    return settling


def _are_scales(params):
    return jax.tree.map_with_path(
        lambda path, _: "grids" in jax.tree_util.keystr(path), params
    )


def _learned(bits):
    weights = cage.lsq(bits, axis=-2)
    return cage.Rules([(r"layers/.*/kernel", weights), (r".*", None)])
