"""Measures what CAGE buys: on quadratics, digits, a language model and images.

All comparisons are paired: the same start, the same batches, the same noise. Each part
writes its figures to `results/effect_PART.json`; `tables.py` makes the tables of the
README from them.
"""

import dataclasses
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import measurement
import numpy as np
import optax
import tyro
from jax import lax
from measurement import Rows
from rich.console import Console
from rich.markup import escape

import cage_jax as cage
from cage_jax import curvature as curvature_sources

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import digits as digits_example
import experiment
import fashion_mnist
import train_lm

Part = Literal["quadratic", "digits", "lm", "images"]
# A seed of the language model takes ten minutes, one of the others a second.
LM_SEEDS = 3
LM_ARMS = {arm: train_lm.ARMS[arm] for arm in experiment.USUAL} | {
    "recommended": "CAGE, recommended"
}
# Of images a training takes minutes; it is shorter than the example's own.
IMAGE_SEEDS, IMAGE_STEPS = 3, 500
IMAGE_MODELS = (("resnet", 4), ("resnet", 2), ("vit", 4), ("vit", 2))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measures what CAGE buys, and says whether the targets were met."""

    parts: tuple[Part, ...] = ("quadratic", "digits", "lm")
    """What to measure; images, which need Fashion-MNIST, only if named."""
    seeds: int = 20
    """Problems or trainings of each arm; of the language model and images 3 at most."""
    data: Path | None = None
    """Folder with Fashion-MNIST's files; by default that of Debian's package."""
    tiny: bool = False
    """Two seeds of a few steps, to see that everything works; nothing is written."""


# --- quadratics -----------------------------------------------------------------------


class Problem(NamedTuple):
    """One row of the table: what is minimized, and how."""

    bits: int
    correlated: bool
    condition: float
    optimizer: Literal["adam", "sgd"]
    noise: float = 0.1
    floor: float = 0.1
    quest: bool = False

    def __str__(self):
        axes = "correlated" if self.correlated else "axis-aligned"
        optimizer = {"adam": "Adam", "sgd": "SGD"}[self.optimizer]
        text = f"W{self.bits} {axes} κ {self.condition:g} {optimizer}"
        if self.quest:
            text += ", QuEST's Q"
        if self.noise != 0.1:
            text += f", noise {self.noise:g}"
        if self.floor != 0.1:
            text += f", floor {self.floor:g}"
        return text


# The first five are those of the design; the others change one thing of the target's.
TARGET = Problem(4, True, 100, "sgd")
PROBLEMS = (
    Problem(4, False, 10, "adam"),
    Problem(4, True, 100, "adam"),
    TARGET,
    Problem(3, True, 100, "sgd"),
    Problem(2, True, 100, "adam"),
    TARGET._replace(quest=True),
    TARGET._replace(noise=0.03),
    TARGET._replace(noise=0.3),
    TARGET._replace(floor=0.0),
)
WEIGHTS = 128
PEAK_RATE = {"sgd": 0.1, "adam": 0.01}
STRENGTHS = {"CAGE 10/.8": (10.0, 0.8), "CAGE 3/.5": (3.0, 0.5)}
# Of strength 1, coupled, from a share of the steps on; nothing is tuned.
SOURCES = {
    "diag(H), 1/.5": ("diag(H)", 0.5),
    "diag(H), 1/0": ("diag(H)", 0.0),
    "Hutchinson, 1/.5": ("Hutchinson", 0.5),
    "H e, 1/.5": ("H e", 0.5),
}


def hessians(problem: Problem, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Hessians with eigenvalues from 1 down to 1/κ, and optima drawn from N(0, 1).

    Returns:
      Arrays of shape (seeds, weights, weights) and (seeds, weights, 1), float32.
    """
    generator = np.random.default_rng(0)
    eigenvalues = np.geomspace(1, 1 / problem.condition, WEIGHTS)
    curvatures, optima = [], []
    for _ in range(seeds):
        if problem.correlated:
            basis, _ = np.linalg.qr(generator.normal(size=(WEIGHTS, WEIGHTS)))
            curvatures.append((basis * eigenvalues) @ basis.T)
        else:
            curvatures.append(np.diag(generator.permutation(eigenvalues)))
        optima.append(generator.normal(size=(WEIGHTS, 1)))
    return np.float32(curvatures), np.float32(optima)


def minimize(problem: Problem, seeds: int, steps: int) -> dict[str, np.ndarray]:
    """The final loss of each arm at its rounded weights, one entry a seed.

    Training starts at the exact optimum, as fine-tuning does.
    """
    if problem.quest:
        quantizer = cage.quest(problem.bits, hadamard=None)
    else:
        quantizer = {2: cage.int2, 3: cage.int3, 4: cage.int4}[problem.bits]()
    rules = cage.Rules([(r"x", quantizer)])
    rate = optax.cosine_decay_schedule(
        PEAK_RATE[problem.optimizer], steps, problem.floor
    )
    averaged = max(1, steps // 5)

    def loss(x, curvature, optimum):
        offset = cage.fake_quant(x, quantizer) - optimum
        return jnp.sum(offset * (curvature @ offset)) / 2

    def optimizer(strength, source, curvature):
        chosen: dict[str, Any] = {"strength": strength}
        if source == "recommended":
            chosen, source = cage.recommended(rate, steps), None
        if source is None and problem.optimizer == "sgd":
            return cage.cage_sgd(rate, rules, **chosen)
        if source is None:
            return cage.cage_adamw(rate, rules, **chosen, weight_decay=0.0)

        def known(errors, step):
            return {"x": jnp.diagonal(curvature)[:, None] * errors["x"]}

        sources = {
            "diag(H)": partial(curvature_sources.stateless_source, known),
            "Hutchinson": curvature_sources.hutchinson,
            "H e": curvature_sources.hessian,
        }
        inner = optax.sgd(rate) if problem.optimizer == "sgd" else optax.adam(rate)
        return optax.chain(
            cage.coupled(rules, strength=strength, curvature=sources[source]()), inner
        )

    def train(strength, source=None):
        @jax.jit
        @jax.vmap
        def one(key, curvature, optimum):
            tx = optimizer(strength, source, curvature)

            def of_params(params):
                return loss(params["x"], curvature, optimum)

            def step(carry, number):
                params, state, average = carry
                noise = jax.random.normal(
                    jax.random.fold_in(key, number), optimum.shape
                )
                gradient = jax.grad(of_params)(params)["x"]
                gradient = {"x": gradient + problem.noise * noise}
                extra = {} if source is None else {"obj_fn": of_params}
                updates, state = tx.update(gradient, state, params, **extra)
                params = optax.apply_updates(params, updates)
                share = jnp.where(number >= steps - averaged, 1 / averaged, 0.0)
                return (params, state, average + share * params["x"]), None

            start = {"x": optimum}
            first = (start, tx.init(start), jnp.zeros_like(optimum))
            (params, _, average), _ = lax.scan(step, first, jnp.arange(steps))
            ends = (params["x"], average, optimum)
            return [loss(x, curvature, optimum) for x in ends]

        keys = jax.random.split(jax.random.key(0), seeds)
        values = one(keys, *map(jnp.asarray, hessians(problem, seeds)))
        return [np.asarray(value, np.float64) for value in values]

    ste, average, rounded = train(0.0)
    losses = {"STE": ste}
    for name, (peak, silence) in STRENGTHS.items():
        losses[name], *_ = train(cage.silence_then_ramp(steps, peak, silence))
    for name, (source, silence) in SOURCES.items():
        strength = cage.silence_then_constant(steps, 1.0, silence)
        losses[name], *_ = train(strength, source)
    losses["recommended"], *_ = train(None, "recommended")
    losses |= {"rounded optimum": rounded, "averaged STE": average}
    each = zip(*hessians(problem, seeds))
    losses["coordinate descent"] = np.array([descended(quantizer, *h) for h in each])
    return losses


def descended(
    quantizer: cage.Quantizer, curvature: np.ndarray, optimum: np.ndarray
) -> float:
    """The loss where no change of one code by one improves it, from the nearest values.

    The scale is that of the optimum.
    """
    h, target = np.float64(curvature), np.float64(optimum[:, 0])
    scale = float(cage.quantize(jnp.asarray(optimum), quantizer).scale.item())
    values = scale * np.sort(quantizer.format.values)
    codes = np.abs(target[:, None] - values).argmin(1)
    while True:
        away = values[codes] - target
        changes = np.full((2, len(codes)), np.inf)
        moved = [np.clip(codes + sign, 0, len(values) - 1) for sign in (-1, 1)]
        for place, to in enumerate(moved):
            by = values[to] - values[codes]
            changes[place] = by * (h @ away) + by**2 * np.diag(h) / 2
        place, weight = np.unravel_index(changes.argmin(), changes.shape)
        if changes[place, weight] > -1e-12:
            return float(away @ h @ away / 2)
        codes[weight] = moved[place][weight]


def quadratic(
    seeds: int, steps: int = 1500, problems: tuple[Problem, ...] = PROBLEMS
) -> dict[str, Any]:
    """Losses as shares of plain STE's, over problems that differ by seed."""
    figures = []
    for problem in problems:
        losses = minimize(problem, seeds, steps)
        ste = losses["STE"]
        figures.append(
            {
                "problem": str(problem),
                "settings": problem._asdict(),
                "ste_loss": float(np.mean(ste)),
                "arms": {
                    name: {
                        "share": float(np.mean(loss) / np.mean(ste)),
                        "wins": int(np.sum(loss < ste)),
                        "losses": loss.tolist(),
                    }
                    for name, loss in losses.items()
                },
            }
        )
    doses = {
        f"{name}, {optimizer}": _dose(peak_rate, peak, silence, steps)
        for name, (peak, silence) in STRENGTHS.items()
        for optimizer, peak_rate in PEAK_RATE.items()
    }
    targets = [
        target
        for figure in figures
        if figure["problem"] == str(TARGET)
        for target in _quadratic_targets(figure)
    ]
    shares = [figure["arms"]["recommended"]["share"] for figure in figures]
    targets.append(
        measurement.target(
            "loss of the recommended one as a share of STE's, the worst problem",
            max(shares),
            1.0,
        )
    )
    return {
        "name": "effect_quadratic",
        "benchmark": "effect",
        "title": f"Quadratics: final loss as a share of STE's, and wins of {seeds}",
        "environment": measurement.environment(),
        "settings": {
            "seeds": seeds,
            "steps": steps,
            "weights": WEIGHTS,
            "peak_learning_rate": PEAK_RATE,
            "start": "the exact optimum",
            "strengths": STRENGTHS
            | {name: (1.0, silence) for name, (_, silence) in SOURCES.items()},
            "doses": doses,
        },
        "figures": figures,
        "targets": targets,
    }


def _quadratic_targets(figure):
    share = {name: arm["share"] for name, arm in figure["arms"].items()}
    plain = min(share[name] for name in STRENGTHS)
    return [
        measurement.target(f"{figure['problem']}: loss of {text}", found, bound)
        for text, found, bound in (
            ("CAGE 3/.5 as a share of STE's", share["CAGE 3/.5"], 0.75),
            ("diag(H), 1/.5 as a share of STE's", share["diag(H), 1/.5"], 0.62),
            (
                "diag(H), 1/.5 as a share of the better CAGE's",
                share["diag(H), 1/.5"] / plain,
                0.92,
            ),
            (
                "H e, 1/.5 as a share of coordinate descent's",
                share["H e, 1/.5"] / share["coordinate descent"],
                1.15,
            ),
            (
                "diag(H), 1/0 as a share of coordinate descent's",
                share["diag(H), 1/0"] / share["coordinate descent"],
                1.15,
            ),
        )
    ]


def _dose(peak_rate, peak, silence, steps) -> float:
    rate = optax.cosine_decay_schedule(peak_rate, steps, 0.1)
    with warnings.catch_warnings():
        # Here it goes far above what training bears; the table shows what comes of it.
        warnings.simplefilter("ignore")
        return cage.dose(rate, cage.silence_then_ramp(steps, peak, silence), steps)


def _quadratic_rows(record) -> Rows:
    names = [name for name in record["figures"][0]["arms"] if name != "STE"]
    cells = []
    for figure in record["figures"]:
        arms = [figure["arms"][name] for name in names]
        shares = [f"{arm['share']:.2f}, {arm['wins']}" for arm in arms]
        cells.append([figure["problem"], f"{figure['ste_loss']:.3f}", *shares])
    return Rows(["problem", "STE's loss", *names], cells)


# --- digits ---------------------------------------------------------------------------

DIGITS_TARGETS = {4: -0.002, 3: -0.005, 2: -0.012}


def digits(seeds: int, steps: int = 2000, bits=(4, 3, 2)) -> dict[str, Any]:
    """CAGE against the other arms on scikit-learn's digits, see examples/digits.py.

    As published and as recommended, with the learning rate to 10 % and to 0.
    """
    settings = digits_example.Settings(bits=tuple(bits), seeds=seeds, steps=steps)
    runs = {
        (recommended, floor): digits_example.run(
            dataclasses.replace(settings, recommended=recommended, floor=floor)
        )
        for recommended in (False, True)
        for floor in (settings.floor, 0.0)
    }
    results = runs[False, settings.floor]
    figures, targets = [], []
    for width, arms in results.items():
        paired = digits_example.compare(arms)
        name = f"W{width}A{width}"
        ours = runs[True, settings.floor][width]
        to_zero = {
            arm: _differences(run[width], "ste")
            for arm, run in (("cage", runs[False, 0.0]), ("ours", runs[True, 0.0]))
        }
        against = {
            "recommended": _differences(ours, "ste"),
            "recommended_averaged": _differences(ours, "averaged"),
            "cage_to_zero": to_zero["cage"],
            "recommended_to_zero": to_zero["ours"],
        }
        found = {key: digits_example.estimate(each) for key, each in against.items()}
        figures.append(
            {"bits": width}
            | _paired(name, arms)
            | {key: value._asdict() for key, value in found.items()}
        )
        best = found["recommended_to_zero"]
        targets += [
            measurement.target(
                f"{name}: paired t of the recommended one - STE, rate to 0",
                best.mean / best.error,
                -5.0,
                "+.1f",
            ),
            measurement.target(
                f"{name}: what the recommended one gains on STE, less what CAGE does",
                found["recommended"].mean - paired.train_loss.mean,
                0.0,
                "+.4f",
            ),
            measurement.target(
                f"{name}: train loss, CAGE - STE",
                paired.train_loss.mean,
                DIGITS_TARGETS.get(width, 0.0),
                "+.4f",
            ),
            measurement.target(
                f"{name}: seeds in which CAGE is not lower", seeds - paired.wins, 0, "d"
            ),
        ]
    details = digits_example.record(settings, results)
    return {
        "name": "effect_digits",
        "benchmark": "effect",
        "title": f"Digits: mean ± standard error over {seeds} seeds, paired",
        "environment": measurement.environment(),
        "settings": details["settings"],
        "figures": figures,
        "seed_by_seed": details["results"],
        "targets": targets,
    }


def _differences(arms, other) -> np.ndarray:
    """The train loss of CAGE less that of another arm, seed by seed."""
    return arms["cage"].train_loss - arms[other].train_loss


def _paired(name: str, arms) -> dict[str, Any]:
    """CAGE against the other arms, for a record."""
    return {
        "name": name,
        "ste_loss": float(np.mean(arms["ste"].train_loss)),
        "cage_loss": float(np.mean(arms["cage"].train_loss)),
        **{
            name: value._asdict() if isinstance(value, tuple) else value
            for name, value in digits_example.compare(arms)._asdict().items()
        },
    }


def _paired_rows(record) -> Rows:
    def show(value, form="+.4f"):
        return format(digits_example.Estimate(**value), form)

    def column(figure):
        ours = {
            "recommended - STE": "recommended",
            "recommended - averaged STE": "recommended_averaged",
            "recommended - STE, both to 0": "recommended_to_zero",
            "CAGE - STE, both to 0": "cage_to_zero",
        }
        return {
            "STE": f"{figure['ste_loss']:.4f}",
            "CAGE": f"{figure['cage_loss']:.4f}",
            "CAGE - STE": show(figure["train_loss"]),
            "seeds where lower": f"{figure['wins']}/{record['settings']['seeds']}",
            "gap to full precision recovered": f"{figure['recovered']:.0%}",
            "CAGE - averaged STE": show(figure["averaged"]),
            "CAGE - STE, rate to 0": show(figure["ste0"]),
            "test loss, CAGE - STE": show(figure["test_loss"]),
            "test accuracy, CAGE - STE": show(figure["test_accuracy"], "+.2%"),
        } | {name: show(figure[key]) for name, key in ours.items() if key in figure}

    columns = [column(figure) for figure in record["figures"]]
    names = [figure["name"] for figure in record["figures"]]
    cells = [[name, *(each[name] for each in columns)] for name in columns[0]]
    return Rows(["train loss", *names], cells)


# --- images ---------------------------------------------------------------------------


def images(
    seeds: int, steps: int | None = None, data: Path | None = None
) -> dict[str, Any]:
    """CAGE against the other arms on Fashion-MNIST, see examples/fashion_mnist.py."""
    seeds, console = min(seeds, IMAGE_SEEDS), Console()
    figures, losses = [], {}
    for model, bits in IMAGE_MODELS:
        settings = fashion_mnist.Settings(
            model=model,
            w_bits=bits,
            a_bits=bits,
            seeds=seeds,
            steps=steps or IMAGE_STEPS,
            data=data,
            out=Path("runs/effect_images") / f"{model}{bits}_steps_{steps or 'all'}",
            resume=True,
            tiny=steps is not None,
        ).resolved()
        arms = fashion_mnist.run(settings, console).arms
        console.print(fashion_mnist.verdict(settings, arms), soft_wrap=True)
        figures.append(_paired(settings.label, arms))
        losses[settings.label] = {
            arm: {name: of.tolist() for name, of in scores._asdict().items()}
            for arm, scores in arms.items()
        }
    return {
        "name": "effect_images",
        "benchmark": "effect",
        "title": f"Fashion-MNIST, {settings.steps} steps: mean ± standard error over "
        f"{seeds} seeds, paired",
        "environment": measurement.environment("flax"),
        "settings": {"seeds": seeds, "steps": settings.steps},
        "figures": figures,
        "seed_by_seed": losses,
        "targets": [],
    }


# --- a language model -----------------------------------------------------------------


def lm(seeds: int, steps: int | None = None) -> dict[str, Any]:
    """CAGE against the other arms on a small language model."""
    seeds = min(seeds, LM_SEEDS)
    console = Console()
    losses: list[dict[str, float]] = []
    for seed in range(seeds):
        out = Path("runs/effect_lm") / f"seed_{seed}_steps_{steps or 'all'}"
        settings = train_lm.Settings(
            seed=seed, steps=steps, devices=1, out=out, resume=True
        )
        if steps is not None:  # a trial
            settings = dataclasses.replace(settings, size="tiny")
        results = train_lm.run(settings, console)
        ours = train_lm.run(
            dataclasses.replace(
                settings, arms=("cage",), recommended=True, out=out / "recommended"
            ),
            console,
        )
        losses.append(
            {arm: result.loss for arm, result in results.items()}
            | {"recommended": ours["cage"].loss}
        )
    settings = settings.resolved()

    def against(arm, ours="cage"):
        return [each[ours] - each[arm] for each in losses]

    def compared(arm, ours):
        if arm == ours:
            return {"difference": None, "wins": None}
        differences = against(arm, ours)
        wins = sum(difference < 0 for difference in differences)
        return {"difference": _estimate(differences), "wins": wins}

    delta, best = against("ste"), against("ste", "recommended")
    averaged = against("averaged", "recommended")
    gap = np.mean([each["ste"] - each["full"] for each in losses])
    return {
        "name": "effect_lm",
        "benchmark": "effect",
        "title": f"Validation loss of a language model, W{settings.w_bits}"
        f"A{settings.a_bits}, {settings.steps} steps, {seeds} seeds",
        "environment": measurement.environment(),
        "settings": {
            name: getattr(settings, name)
            for name in ("size", "steps", "batch", "sequence", "learning_rate", "floor")
            + ("strength", "silence")
        }
        | {"seeds": seeds, "dose": train_lm.Experiment(settings).dose()},
        "losses": losses,
        "figures": [
            {
                "arm": arm,
                "loss": _estimate([each[arm] for each in losses]),
                "cage": compared(arm, "cage"),
                "recommended": compared(arm, "recommended"),
            }
            for arm in LM_ARMS
        ],
        "recovered": float(-np.mean(delta) / gap),
        "recovered_recommended": float(-np.mean(best) / gap),
        "targets": [
            measurement.target(
                "mean of CAGE minus STE", float(np.mean(delta)), -0.002, ".4f"
            ),
            measurement.target("seeds not won", sum(d >= 0 for d in delta), 0, "d"),
            measurement.target(
                "twice the gain of CAGE, less that of the recommended one",
                float(np.mean(best) - 2 * np.mean(delta)),
                0.0,
                "+.4f",
            ),
            measurement.target(
                "seeds in which the recommended one is not below averaged STE",
                sum(difference >= 0 for difference in averaged),
                0,
                "d",
            ),
        ],
    }


def _estimate(values: list[float]) -> dict[str, float]:
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return {"mean": float(np.mean(values)), "error": float(error)}


def _lm_rows(record) -> Rows:
    def show(value, form):
        if value is None:
            return ""
        return f"{value['mean']:{form}} ± {value['error']:.4f}"

    def compared(found):
        wins = found["wins"]
        difference = show(found["difference"], "+.4f")
        return [difference, "" if wins is None else f"{wins}/{len(record['losses'])}"]

    cells = [
        [
            LM_ARMS[figure["arm"]],
            show(figure["loss"], ".4f"),
            *compared(figure["cage"]),
            *compared(figure["recommended"]),
        ]
        for figure in record["figures"]
    ]
    names = ["CAGE - arm", "wins", "recommended - arm", "wins"]
    return Rows(["arm", "validation loss", *names], cells)


# --- all parts ------------------------------------------------------------------------

_ROWS: dict[str, Callable[[Any], Rows]] = {
    "effect_quadratic": _quadratic_rows,
    "effect_digits": _paired_rows,
    "effect_lm": _lm_rows,
    "effect_images": _paired_rows,
}
PLAN = {
    "quadratic": "9 quadratics, 8 trainings of 1500 steps a seed: 5 minutes",
    "digits": "digits at 3 widths, 40 trainings of 2000 steps a seed: five minutes",
    "lm": "a language model, 7 arms, 3 seeds: 40 minutes (resumes when stopped)",
    "images": "4 models, 5 trainings of 500 steps a seed: an hour (resumes, too)",
}


def table(record: dict[str, Any]) -> Rows:
    """The table of a record, for the console and for the README."""
    return _ROWS[record["name"]](record)


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    seeds = 2 if settings.tiny else settings.seeds
    try:
        if seeds < 2:
            raise ValueError(
                f"`--seeds` must be at least 2, for a standard error; got {seeds}. The "
                f"published figures have 20."
            )
        for part in settings.parts:
            console.print(f"{part}: {PLAN[part]}.", soft_wrap=True, highlight=False)
        for part in settings.parts:
            measure: Callable[..., dict[str, Any]] = {
                "quadratic": quadratic,
                "digits": digits,
                "lm": lm,
                "images": partial(images, data=settings.data),
            }[part]
            record = measure(seeds, steps=40) if settings.tiny else measure(seeds)
            measurement.finish(record, table(record), console, keep=not settings.tiny)
    except (ValueError, NotImplementedError) as error:
        console.print(f"[red]error[/]: {escape(str(error))}", soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
