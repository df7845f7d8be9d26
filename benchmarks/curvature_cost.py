"""Times train steps of the demo's language model with each source of curvature.

W4A4, AdamW with CAGE behind clipping, pulling in every step. An estimate that is made
in every tenth step makes that one long, so blocks of ten steps are timed.
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measurement
import optax
import tyro
from flax import nnx
from jax import lax
from measurement import Rows
from optax.tree_utils import tree_get, tree_set
from rich.console import Console

import cage_jax as cage
from cage_jax import curvature

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import lm
import train_lm

# Steps of one timed call: a multiple of every period.
BLOCK = 10
PERIODS = (1, 10)


class Now(NamedTuple):
    """What the extra arguments of a step are made of.

    Attributes:
      params: of the step.
      windows: those of its batch that the source may look at.
      due: whether the source makes an estimate now; True where it always does.
      key: of the step.
    """

    params: Any
    windows: jax.Array
    due: bool | jax.Array
    key: jax.Array


def _outputs(model, windows, params):
    """The logits, through quantized weights and inputs."""
    network = nnx.merge(model.graphs[True], cage.fake_quant(params, model.rules))
    return network(windows[:, :-1].astype(jnp.int32))


def _cross_entropy(targets, outputs):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def nothing(model: lm.LanguageModel, now: Now) -> dict[str, Any]:
    """For sources that need no more than gradients."""
    return {}


def loss(model: lm.LanguageModel, now: Now) -> dict[str, Any]:
    """The loss of the batch at hand."""
    return {"obj_fn": lambda params: model.loss(params, now.windows, True)}


def outputs(model: lm.LanguageModel, now: Now) -> dict[str, Any]:
    """The same loss in two: the logits, and cross-entropy as a function of these."""
    targets = now.windows[:, 1:].astype(jnp.int32)
    return {
        "outputs_fn": partial(_outputs, model, now.windows),
        "outputs_loss_fn": partial(_cross_entropy, targets),
    }


def sampled_gradients(model: lm.LanguageModel, now: Now) -> dict[str, Any]:
    """One more gradient, at drawn labels: in the steps whose estimate needs it."""

    def sampled_loss(params):
        logits = _outputs(model, now.windows, params)
        drawn = jax.random.categorical(now.key, lax.stop_gradient(logits))
        return _cross_entropy(drawn, logits)

    def gradient():
        return jax.grad(sampled_loss)(now.params)

    def zeros():
        return jax.tree.map(jnp.zeros_like, now.params)

    found = gradient() if now.due is True else lax.cond(now.due, gradient, zeros)
    return {"sampled_gradients": found}


class Source(NamedTuple):
    """A source of curvature, and what a train step gives it.

    Attributes:
      make: the source; of `period=`, where it has one.
      has_period: whether it does; what does not works in every step.
      extra: the arguments of `update` besides.
      share: of the windows of the batch, 1 / `share` are what `extra` looks at.
    """

    make: Callable[..., curvature.Curvature]
    has_period: bool = True
    extra: Callable[[lm.LanguageModel, Now], dict[str, Any]] = nothing
    share: int = 1


HUTCHINSON, GAUSS_NEWTON, QUARTER = "hutchinson", "gauss_newton", ", 1/4 of the batch"
# What is timed besides STE and CAGE without a source.
SOURCES: dict[str, Source] = {
    "second_moment": Source(partial(curvature.second_moment, 0.95), has_period=False),
    "fisher, relative": Source(partial(curvature.fisher, relative=True)),
    "fisher, recommended": Source(partial(curvature.fisher, factored=True)),
    "fisher, sampled": Source(
        partial(curvature.fisher, sampled=True, relative=True), extra=sampled_gradients
    ),
    HUTCHINSON: Source(curvature.hutchinson, extra=loss),
    HUTCHINSON + QUARTER: Source(curvature.hutchinson, extra=loss, share=4),
    GAUSS_NEWTON: Source(curvature.gauss_newton, extra=outputs),
    GAUSS_NEWTON + QUARTER: Source(curvature.gauss_newton, extra=outputs, share=4),
    "kronecker": Source(curvature.kronecker),
    "hessian": Source(curvature.hessian, has_period=False, extra=loss),
}
STE, PLAIN = "STE", "CAGE"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times train steps with each source of curvature, in turns."""

    rounds: int = 15
    """Timed blocks of ten steps of each kind."""
    tiny: bool = False
    """One block of the smallest model, to see that it works; nothing is written."""


class Training:
    """A call does `BLOCK` train steps.

    Args:
      experiment: whose model, batch, learning rate and strength are used.
      source: of the curvature; None for none.
      period: of its estimates.
      count: that of steps from which the strength goes on.
      strength: None for the experiment's.
    """

    def __init__(
        self,
        experiment: train_lm.Experiment,
        source: Source | None,
        period: int,
        count: int,
        strength: float | None = None,
    ):
        settings, model = experiment.settings, experiment.model
        options = {"period": period} if source and source.has_period else {}
        adamw = partial(
            cage.cage_adamw,
            rules=model.rules,
            strength=experiment.correction()["strength"]
            if strength is None
            else strength,
            curvature=source.make(**options) if source else None,
        )
        # Clipped, and skipped where it is not finite: both hand on what `update` is
        # given besides.
        optimizer = lm.optimizer_of(adamw, experiment.learning_rate(settings.floor))

        @partial(jax.jit, donate_argnums=0)
        def step(state, windows, number):
            params, before = state
            _, gradients = model.gradient(params, windows, True)
            extra = {}
            if source:
                now = Now(
                    params,
                    windows[: len(windows) // source.share],
                    period == 1 or number % period == 0,
                    jax.random.fold_in(jax.random.key(settings.seed), number),
                )
                extra = source.extra(model, now)
            updates, after = optimizer.update(gradients, before, params, **extra)
            return optax.apply_updates(params, updates), after

        params, state = model.first_state(optimizer)
        self._state = params, tree_set(state, cage_count=jnp.int32(count))
        self._step, self._number = step, 0
        self._windows = experiment.batches(experiment.text)[0]
        weights = sum(x.size for _, x in model.rules.quantized(params).values())
        kept = jax.tree.leaves(tree_get(state, "curvature"))
        self.bytes = sum(leaf.nbytes for leaf in kept) / weights

    def __call__(self) -> None:
        """Returns when the steps are done."""
        for _ in range(BLOCK):
            number = jnp.int32(self._number)
            self._state = self._step(self._state, self._windows, number)
            self._number += 1
        jax.block_until_ready(self._state)

    @property
    def skipped(self) -> int:
        """The steps that were not done, since a gradient was not finite."""
        return int(tree_get(self._state, "total_notfinite"))


def measure(
    size: str, rounds: int, warmup: int = 1, periods: tuple[int, ...] = PERIODS
) -> dict[str, Any]:
    """Median step times with each source, and their ratios to STE and CAGE.

    Args:
      size: of the model.
      rounds: timed blocks of each kind.
      warmup: blocks before them.
      periods: of the estimates; the last one's is what the target is of.
    """
    steps = BLOCK * (rounds + warmup)
    asked = train_lm.Settings(size=size, steps=10 * steps, devices=1)
    experiment = train_lm.Experiment(asked.resolved())
    # From here on the strength is not 0, and grows until the end.
    count = experiment.settings.steps - steps - 1
    training = partial(Training, experiment, count=count)
    rows: dict[str, tuple[str, int | None]] = {STE: (STE, None), PLAIN: (PLAIN, None)}
    trainings = {STE: training(None, 1, strength=0.0), PLAIN: training(None, 1)}
    for source_name, source in SOURCES.items():
        for period in periods if source.has_period else (1,):
            name = _name(source_name, period)
            rows[name] = (source_name, period)
            trainings[name] = training(source, period)
    blocks = measurement.interleaved(trainings, rounds, warmup)
    times = {name: [each / BLOCK for each in found] for name, found in blocks.items()}
    for name, each in trainings.items():
        if each.skipped:
            raise RuntimeError(
                f"`{name}` must have finite gradients, to be timed; got {each.skipped} "
                f"steps without. Lower its strength."
            )

    def ratio(name, base):
        return measurement.median_ratio(times, name, base)

    last = periods[-1]

    def cheaper(sources):
        return min(ratio(_name(name, last), PLAIN) for name in sources)

    settings = experiment.settings
    return {
        "name": "curvature_cost",
        "benchmark": "curvature_cost",
        "title": f"A W4A4 train step of the {size} model with each source of "
        f"curvature, {settings.batch} x {settings.sequence} bytes",
        "environment": measurement.environment(),
        "settings": {"size": size, "rounds": rounds, "warmup": warmup, "block": BLOCK},
        "figures": {
            name: {
                "source": source_name,
                "period": period,
                "seconds": statistics.median(times[name]),
                "to STE": ratio(name, STE),
                "to CAGE": ratio(name, PLAIN),
                "bytes": trainings[name].bytes,
            }
            for name, (source_name, period) in rows.items()
        },
        "seconds": times,
        "targets": [
            measurement.target(
                f"hutchinson or gauss_newton{share}, the cheaper, "
                f"period {last}, to CAGE",
                cheaper([source + share for source in (HUTCHINSON, GAUSS_NEWTON)]),
                1.15,
            )
            for share in ("", QUARTER)
            if HUTCHINSON + share in SOURCES
        ],
    }


def _name(source, period):
    return f"{source}, period {period}"


def table(record: dict[str, Any]) -> Rows:
    """The table of a record."""
    cells = [
        [
            each["source"],
            str(each["period"] or ""),
            f"{1e3 * each['seconds']:.1f}",
            f"{each['to STE']:.2f}",
            f"{each['to CAGE']:.2f}",
            f"{each['bytes']:.2f}",
        ]
        for each in record["figures"].values()
    ]
    header = ["source", "period", "ms", "to STE", "to CAGE", "bytes a weight"]
    return Rows(header, cells)


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    console.print(
        "Compiles a train step with each source, then times them in turns: about ten "
        "minutes.",
        highlight=False,
    )
    if settings.tiny:
        record = measure("tiny", 1, periods=PERIODS[-1:])
    else:
        record = measure("demo", settings.rounds)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
