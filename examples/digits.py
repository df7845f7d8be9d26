"""Trains a small classifier of handwritten digits at few bits, with and without CAGE.

All arms of a seed share the initial weights and the batches, and all arms and seeds of
a bit width train at once. Run `python examples/digits.py`; the default run takes half a
minute on two cores.
"""

import dataclasses
import json
import math
import platform
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import program
from program import Limit

with program.imports(__name__):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import tyro
    from jax import lax
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    import cage_jax as cage

Arm = Literal["full", "ptq", "ste", "averaged", "ste0", "cage"]
ARMS: dict[Arm, str] = {
    "full": "full precision",
    "ptq": "rounded afterwards (PTQ)",
    "ste": "straight through (STE)",
    "averaged": "STE, last 20 % averaged",
    "ste0": "STE, learning rate to 0",
    "cage": "CAGE",
}
LAYERS = (64, 32, 10)
HADAMARD = 32
LEARNING_RATE = 1e-2
BATCH = 64
LABEL_SMOOTHING = 0.1
AVERAGED_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains an MLP on scikit-learn's digits at few bits, with and without CAGE."""

    bits: tuple[int, ...] = (4, 3, 2)
    """Bits of weights and activations, 1 to 8; one comparison for each value."""
    seeds: int | None = None
    """Number of runs of each arm; by default 5, with --tiny 2."""
    steps: int | None = None
    """Optimizer steps of a run; by default 2000, with --tiny 60."""
    strength: float = 10.0
    """Peak of CAGE's strength, reached at the last step."""
    silence: float = 0.8
    """Fraction of the steps without correction."""
    recommended: bool = False
    """Use cage.recommended instead of --strength and --silence."""
    floor: float = 0.1
    """Final learning rate of the cosine decay, as a fraction of the peak."""
    json: Path | None = None
    """File for the results of every seed."""
    tiny: bool = False
    """Check that everything works, in a short run."""

    def resolved(self) -> "Settings":
        """Returns the settings with numbers in place of None; checks all of them."""
        sizes = {"seeds": 2, "steps": 60} if self.tiny else {"seeds": 5, "steps": 2000}
        chosen = {name: n for name, n in sizes.items() if getattr(self, name) is None}
        settings = dataclasses.replace(self, **chosen)
        program.check(settings, LIMITS)
        return program.with_recommended(settings)


LIMITS = (
    Limit(
        "bits",
        lambda bits: 0 < len(bits) == len(set(bits)),
        "one or more widths, each once",
        "Use --bits 4 3 2.",
    ),
    Limit(
        "bits",
        lambda bits: all(1 <= width <= 8 for width in bits),
        "from 1 to 8",
        "Full precision is always among the arms.",
    ),
    Limit(
        "seeds",
        lambda seeds: seeds >= 1,
        "at least 1",
        "Use 5, or 20 for small errors.",
    ),
    program.STEPS,
    program.STRENGTH,
    program.SILENCE,
    program.FLOOR,
    Limit(
        "json",
        lambda path: path is None or not path.is_dir(),
        "a file",
        "Name one in that folder, such as digits.json.",
    ),
)


# --- data and model -------------------------------------------------------------------


class Data(NamedTuple):
    """Standardized images (n, 64) float32, and their labels (n,) int32."""

    images: jax.Array
    labels: jax.Array


def load() -> tuple[Data, Data]:
    """Loads the digits; a quarter of the 1797 is for testing, the same in every run."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    scaler = StandardScaler().fit(parts[0])

    def data(images, labels):
        images = scaler.transform(images)
        return Data(jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32))

    return data(parts[0], parts[2]), data(parts[1], parts[3])


class Quantization(NamedTuple):
    """The quantizers of weights and of layers' inputs; None for no quantization."""

    rules: cage.Rules
    inputs: cage.Quantizer | None


def quantization(bits: int | None) -> Quantization:
    """Returns QuEST's quantizers: kernels by output channel, inputs by example."""
    if bits is None:
        return Quantization(cage.Rules([(r".*", None)]), None)
    rules = cage.Rules(
        [(r".*/kernel", cage.quest(bits, hadamard=HADAMARD)), (r".*/bias", None)]
    )
    return Quantization(rules, cage.quest(bits, axis=-1, hadamard=HADAMARD))


def initial_params(key: jax.Array) -> Any:
    """Draws kernels from He's normal distribution; biases are zero."""
    init = jax.nn.initializers.he_normal()
    return [
        {"kernel": init(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}
        for key, inputs, outputs in zip(jax.random.split(key), LAYERS, LAYERS[1:])
    ]


def logits_of(params: Any, images: jax.Array, how: Quantization) -> jax.Array:
    """Computes the network at quantized weights and inputs."""
    hidden = images
    for number, layer in enumerate(cage.fake_quant(params, how.rules)):
        if number > 0:
            hidden = jax.nn.relu(hidden)
        if how.inputs is not None:
            hidden = cage.fake_quant(hidden, how.inputs)
        hidden = hidden @ layer["kernel"] + layer["bias"]
    return hidden


def loss_of(params: Any, data: Data, how: Quantization) -> jax.Array:
    """Computes the mean cross-entropy with smoothed labels, in nats."""
    targets = optax.smooth_labels(
        jax.nn.one_hot(data.labels, LAYERS[-1]), LABEL_SMOOTHING
    )
    logits = logits_of(params, data.images, how)
    return optax.softmax_cross_entropy(logits, targets).mean()


# --- training -------------------------------------------------------------------------


def learning_rate(settings: Settings, floor) -> optax.Schedule:
    """Returns a cosine decay from the peak to `floor` times the peak."""
    return optax.cosine_decay_schedule(LEARNING_RATE, settings.steps, floor)


def correction(settings: Settings, floor, share) -> dict[str, Any]:
    """Returns `share` (may be traced) times the strength, and the curvature, if any."""
    if settings.recommended:
        rate = learning_rate(settings, floor)
        whole = cage.recommended(rate, settings.steps, silence=settings.silence)
    else:
        ramp = cage.silence_then_ramp(
            settings.steps, settings.strength, settings.silence
        )
        whole = {"strength": ramp}
    return whole | {"strength": lambda count: share * whole["strength"](count)}


def optimizer(settings: Settings, how: Quantization, floor, share):
    """Returns AdamW with CAGE; with `share` 0 it equals plain AdamW, to the bit."""
    rate = learning_rate(settings, floor)
    adamw = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.01}
    if how.inputs is None:
        return optax.adamw(rate, **adamw)
    return cage.cage_adamw(
        rate, how.rules, **correction(settings, floor, share), **adamw
    )


class Start(NamedTuple):
    """Parameters and batches that all arms share; the leading axis is the seed."""

    params: Any
    batches: jax.Array  # (seeds, steps, BATCH), indices of each step's images


def start(settings: Settings, images: int) -> Start:
    """Draws the initial parameters and the batches of all seeds."""

    @jax.vmap
    def one(key):
        weights_key, batches_key = jax.random.split(key)
        shape = (settings.steps, BATCH)
        batches = jax.random.randint(batches_key, shape, 0, images)
        return Start(initial_params(weights_key), batches)

    return one(jax.random.split(jax.random.key(0), settings.seeds))


@partial(jax.jit, static_argnums=(0, 1))
def train(
    settings: Settings, bits: int | None, data: Data, begin: Start, floors, shares
):
    """Trains all arms and seeds of one bit width in a single scan.

    Args:
      settings: static.
      bits: of weights and activations, or None for full precision.
      data: to train on.
      begin: initial parameters and batches of each seed.
      floors: final learning rate of each arm as a fraction of the peak, (arms,).
      shares: factor of CAGE's strength in each arm, (arms,); 0 for plain STE.

    Returns:
      The final parameters and the average of the last ones, (arms, seeds, ...) each.
    """
    how = quantization(bits)
    averaged = max(1, round(AVERAGED_SHARE * settings.steps))

    def one(begin, floor, share):
        tx = optimizer(settings, how, floor, share)

        def step(carry, inputs):
            params, state, average = carry
            number, batch = inputs
            part = Data(data.images[batch], data.labels[batch])
            gradients = jax.grad(loss_of)(params, part, how)
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            share = jnp.where(number >= settings.steps - averaged, 1 / averaged, 0.0)
            average = jax.tree.map(lambda a, x: a + share * x, average, params)
            return (params, state, average), None

        zeros = jax.tree.map(jnp.zeros_like, begin.params)
        first = (begin.params, tx.init(begin.params), zeros)
        steps = (jnp.arange(settings.steps), begin.batches)
        (params, _, average), _ = lax.scan(step, first, steps)
        return params, average

    seeds = jax.vmap(one, in_axes=(0, None, None))
    return jax.vmap(seeds, in_axes=(None, 0, 0))(begin, floors, shares)


class Scores(NamedTuple):
    """Results of an arm, one entry per seed."""

    train_loss: np.ndarray
    test_loss: np.ndarray
    test_accuracy: np.ndarray


@partial(jax.jit, static_argnums=1)
def _scores(params, bits, train_data, test_data):
    how = quantization(bits)

    def one(params):
        guess = jnp.argmax(logits_of(params, test_data.images, how), -1)
        return Scores(
            loss_of(params, train_data, how),
            loss_of(params, test_data, how),
            jnp.mean(guess == test_data.labels, dtype=jnp.float32),
        )

    return jax.vmap(one)(params)


Results = dict[int, dict[Arm, Scores]]


def run(settings: Settings, tell: Callable[[str], None] = lambda text: None) -> Results:
    """Trains every arm and evaluates it on all training and test digits.

    Args:
      settings: `tiny` and all checks are applied here.
      tell: called with a few words before each stage.

    Returns:
      The `Scores` of all seeds, by bits and arm: at quantized weights and activations,
      except for full precision.
    """
    settings = settings.resolved()
    train_data, test_data = load()
    begin = start(settings, len(train_data.labels))

    def scores_of(params, bits):
        measured = _scores(params, bits, train_data, test_data)
        return Scores(*(np.asarray(value, np.float64) for value in measured))

    def arm(number, tree):
        return jax.tree.map(lambda x: x[number], tree)

    tell("full precision")
    fixed = dataclasses.replace(settings, json=None, bits=())
    floor = settings.floor
    once = (jnp.array([floor]), jnp.array([0.0]))
    full = arm(0, train(fixed, None, train_data, begin, *once)[0])
    results: Results = {}
    for bits in settings.bits:
        tell(f"W{bits}A{bits}")
        # Floors and shares are traced, so that one compilation serves all arms. Under
        # `vmap` both branches of the silent phase are computed, which costs little for
        # a network of this size.
        floors = jnp.array([floor, 0.0, floor])
        shares = jnp.array([0.0, 0.0, 1.0])
        last, average = train(fixed, bits, train_data, begin, floors, shares)
        results[bits] = {
            "full": scores_of(full, None),
            "ptq": scores_of(full, bits),
            "ste": scores_of(arm(0, last), bits),
            "averaged": scores_of(arm(0, average), bits),
            "ste0": scores_of(arm(1, last), bits),
            "cage": scores_of(arm(2, last), bits),
        }
    return results


def dose_of(settings: Settings) -> tuple[float, str]:
    """Returns the sum of learning rate times strength, and a warning, if any."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dose = cage.dose(
            learning_rate(settings, settings.floor),
            correction(settings, settings.floor, 1.0)["strength"],
            settings.steps,
        )
    return dose, " ".join(str(warning.message) for warning in caught)


# --- results --------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean over seeds and its standard error (NaN for one seed)."""

    mean: float
    error: float

    def __format__(self, form: str) -> str:
        error = form.replace("+", "")
        if math.isnan(self.error):
            return format(self.mean, form)
        return f"{self.mean:{form}} ± {self.error:{error}}"


def estimate(values: np.ndarray) -> Estimate:
    """Computes the mean of `values` and its standard error."""
    many = len(values) > 1
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if many else math.nan
    return Estimate(float(np.mean(values)), float(error))


class Comparison(NamedTuple):
    """Paired differences of CAGE to the other arms; negative if CAGE is lower."""

    train_loss: Estimate
    wins: int
    test_loss: Estimate
    test_accuracy: Estimate
    recovered: float
    averaged: Estimate
    ste0: Estimate


def compare(arms: dict[Arm, Scores]) -> Comparison:
    """Compares CAGE with STE, averaged STE and STE with the learning rate to 0."""
    ours, ste = arms["cage"], arms["ste"]
    difference = ours.train_loss - ste.train_loss
    gap = np.mean(ste.train_loss - arms["full"].train_loss)
    return Comparison(
        estimate(difference),
        int(np.sum(difference < 0)),
        estimate(ours.test_loss - ste.test_loss),
        estimate(ours.test_accuracy - ste.test_accuracy),
        float(-np.mean(difference) / gap) if gap > 0 else math.nan,
        estimate(ours.train_loss - arms["averaged"].train_loss),
        estimate(ours.train_loss - arms["ste0"].train_loss),
    )


def arms_table(bits: int, arms: dict[Arm, Scores]) -> Table:
    """Makes a table of the losses and accuracy of every arm."""
    table = Table(title=f"W{bits}A{bits}, mean ± standard error")
    table.add_column("arm")
    for name in ("train loss", "test loss", "test accuracy"):
        table.add_column(name, justify="right")
    for arm, name in ARMS.items():
        scores = arms[arm]
        table.add_row(
            name,
            f"{estimate(scores.train_loss):.4f}",
            f"{estimate(scores.test_loss):.4f}",
            f"{estimate(scores.test_accuracy):.1%}",
        )
    return table


def comparison_table(results: Results) -> Table:
    """Makes a table of CAGE against the arms of STE, with a column per width."""
    table = Table(title="CAGE - others, paired by seed (negative: CAGE is lower)")
    for name in ("", *results):
        table.add_column(f"W{name}A{name}" if name else "", justify="right")
    table.columns[0].justify = "left"
    rows = {bits: compare(arms) for bits, arms in results.items()}
    seeds = len(next(iter(results.values()))["cage"].train_loss)
    for name, show in {
        "train loss - STE": lambda paired: f"{paired.train_loss:+.4f}",
        "  seeds where lower": lambda paired: f"{paired.wins} of {seeds}",
        "  gap to full recovered": lambda paired: f"{paired.recovered:.0%}",
        "train loss - averaged STE": lambda paired: f"{paired.averaged:+.4f}",
        "train loss - STE, rate to 0": lambda paired: f"{paired.ste0:+.4f}",
        "test loss - STE": lambda paired: f"{paired.test_loss:+.4f}",
        "test accuracy - STE": lambda paired: f"{paired.test_accuracy:+.1%}",
    }.items():
        table.add_row(name, *(show(paired) for paired in rows.values()))
    return table


def verdict(bits: int, arms: dict[Arm, Scores]) -> str:
    """Says in a sentence which arms CAGE beat."""
    paired = compare(arms)
    seeds = len(arms["cage"].train_loss)
    others = {
        "plain STE": paired.train_loss,
        "averaged STE": paired.averaged,
        "STE with the learning rate to 0": paired.ste0,
    }
    words = [f"{_outcome(difference)} {name}" for name, difference in others.items()]
    lower = f"lower than plain STE's in {paired.wins} of {seeds} seeds"
    return f"W{bits}A{bits}: CAGE {', '.join(words)}; train loss {lower}."


def _outcome(difference: Estimate) -> str:
    """Says whether a difference is more than two standard errors from zero."""
    if math.isnan(difference.error):
        return f"(one seed, so no more than a hint: {difference.mean:+.4f}) against"
    if abs(difference.mean) <= 2 * difference.error:
        return "does not differ beyond noise from"
    return "beats" if difference.mean < 0 else "loses to"


def record(settings: Settings, results: Results) -> dict[str, Any]:
    """Returns all results, for JSON."""
    return {
        "settings": {
            "bits": list(settings.bits),
            "seeds": settings.seeds,
            "steps": settings.steps,
            "strength": settings.strength,
            "silence": settings.silence,
            "recommended": settings.recommended,
            "floor": settings.floor,
            "dose": dose_of(settings)[0],
        },
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "results": {
            f"W{bits}A{bits}": {
                arm: {name: list(v) for name, v in scores._asdict().items()}
                for arm, scores in arms.items()
            }
            for bits, arms in results.items()
        },
    }


def announce(settings: Settings, console: Console) -> None:
    """Announces the run and how long it takes."""
    widths = ", ".join(f"W{bits}A{bits}" for bits in settings.bits)
    trainings = settings.seeds * (1 + 3 * len(settings.bits))
    dose, warning = dose_of(settings)
    work = trainings * settings.steps / 50 / 2000
    seconds = 5 + 8 * len(settings.bits) + 6 * work
    console.print(
        f"An MLP {'-'.join(map(str, LAYERS))} on scikit-learn's digits at {widths}: "
        f"{trainings} trainings of {settings.steps} steps, {settings.seeds} seeds an "
        f"arm, in about {seconds:.0f} seconds on two cores. Weights and the inputs of "
        f"both layers are quantized ({quantization(settings.bits[0]).inputs}).\n"
        f"CAGE's dose, the sum of learning rate times strength, is {dose:.2f} (the "
        f"paper's: 1.6 to 2.9).",
        soft_wrap=True,
        highlight=False,
    )
    if warning:
        console.print(f"Note: {warning}", soft_wrap=True, highlight=False)
    if settings.strength == Settings.strength and not settings.recommended:
        text = "CAGE is the paper's here; --recommended takes the one to begin with."
        console.print(text, soft_wrap=True, highlight=False)


def main() -> int:
    """Runs the program; returns the exit status."""
    console = Console()
    try:
        settings = tyro.cli(Settings, description=__doc__).resolved()
        announce(settings, console)
        columns = (TextColumn("{task.description:<14}"), BarColumn())
        with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
            stages = 1 + len(settings.bits)
            task = progress.add_task("starting", total=stages, completed=-1)

            def tell(text):
                progress.update(task, description=text, advance=1)

            results = run(settings, tell)
            tell("done")
    except ValueError as error:
        console.print(f"[red]error[/]: {escape(str(error))}", soft_wrap=True)
        return 2
    for bits, arms in results.items():
        console.print(arms_table(bits, arms))
    console.print(comparison_table(results))
    if settings.tiny:
        console.print(program.TINY, soft_wrap=True)
    else:
        for bits, arms in results.items():
            console.print(verdict(bits, arms), soft_wrap=True, highlight=False)
    if settings.json is not None:
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        settings.json.write_text(json.dumps(record(settings, results), indent=2) + "\n")
        console.print(f"All figures are in {settings.json}.", soft_wrap=True)
    return 0


if __name__ == "__main__":
    program.run(main, stopped="nothing was written.")
