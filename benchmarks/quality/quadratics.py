"""Quadratics: a method's final loss as a share of STE's, over a whole factorial design.

`½ (x - x*)ᵀ H (x - x*)`, started at x*, as fine-tuning is. What differs by number is
mapped over in one program: geometries, conditions, noises and problems.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cells import Table
from methods import METHODS, Method, Training, full, train
from rich.console import Console

import cage_jax as cage
from cage_jax.quantizers.formats import Integer
from cage_jax.quantizers.scales import Fixed

Geometry = Literal["axis-aligned", "rotated", "badly scaled", "correlated"]
SHAPE = (8, 8)  # of the weights: a matrix, for Muon
GEOMETRIES = ("axis-aligned", "rotated", "badly scaled", "correlated")
CONDITIONS = (1, 10, 100)
NOISES = (0.0, 0.5, 2.0)
BITS = (4, 3, 2)
GRIDS = ("absmax", "fixed", "RMS")
OPTIMIZERS = ("SGD", "Adam", "Muon")
FLOORS = (0.1, 0.0)
TINY = {"seeds": 2, "steps": 20}
# Chosen for STE at W4 of absmax, correlated, κ 100, noise 0, and for nothing else.
PEAK_RATE = {"SGD": 0.1, "Adam": 0.01, "Muon": 0.02}
# Of the largest weights over the smallest, where scales differ.
SPREAD = 10.0
# Where each best value for N(0, 1) is, in standard deviations: see cage_jax.scales.
WIDEST = {2: 1.4935, 3: 2.0511, 4: 2.5139}


class Problems(NamedTuple):
    """A batch of problems: Hessians (n, w, w), optima (n, *SHAPE), noises (n,)."""

    curvature: jax.Array
    optimum: jax.Array
    noise: jax.Array


def combinations() -> list[tuple[Geometry, int, float]]:
    """Geometry, condition and noise of the problems of a program.

    Of condition 1 the first, second and last geometry are the same.
    """
    return [
        (geometry, condition, noise)
        for geometry, condition, noise in itertools.product(
            GEOMETRIES, CONDITIONS, NOISES
        )
        if condition > 1 or geometry in ("axis-aligned", "badly scaled")
    ]


def problem(
    geometry: Geometry, condition: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The Hessian and the optimum of a seed.

    The optimum is drawn from N(0, 1), the same for all geometries and conditions.

    - axis-aligned: the eigenvalues go from 1 down to 1 / condition in geometric
      progression, along weights in random order;
    - rotated: the same along random axes;
    - correlated: `H[i, j] = r ** |i - j|`, with the r that has the condition, as of
      inputs that are alike where they are near;
    - badly scaled: the rotated one for weights that are multiplied by factors from 1
      down to 1 / SPREAD, so that the small ones share a grid with the large ones.
    """
    generator = np.random.default_rng([seed, 0])
    count = int(np.prod(SHAPE))
    optimum = generator.normal(size=count)
    eigenvalues = np.geomspace(1, 1 / condition, count)
    order = generator.permutation(count)
    basis, _ = np.linalg.qr(generator.normal(size=(count, count)))
    factors = generator.permutation(np.geomspace(1, 1 / SPREAD, count))
    if geometry == "axis-aligned":
        curvature = np.diag(eigenvalues[order])
    elif geometry == "correlated":
        curvature = _correlated(count, condition)
    else:
        curvature = (basis * eigenvalues) @ basis.T
    if geometry == "badly scaled":
        curvature = curvature / factors[:, None] / factors
        optimum = optimum * factors
    return curvature / np.linalg.norm(curvature, 2), optimum


def _correlated(count, condition):
    """`r ** |i - j|` of the condition, by bisection in r."""
    places = np.arange(count)

    def of(r):
        return np.power(float(r), np.abs(places[:, None] - places))

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if np.linalg.cond(of(middle)) < condition else (low, middle)
        )
    return of(low)


def problems(seeds: int) -> Problems:
    """All combinations, `seeds` problems each; the same order as `combinations()`."""
    found = [
        (*problem(geometry, condition, seed), noise)
        for geometry, condition, noise in combinations()
        for seed in range(seeds)
    ]
    curvatures, optima, noises = (np.float32(part) for part in zip(*found))
    return Problems(
        jnp.asarray(curvatures),
        jnp.asarray(optima.reshape(-1, *SHAPE)),
        jnp.asarray(noises),
    )


def quantizer_of(bits: int, grid: str) -> cage.Quantizer:
    """The quantizer of the weights: one grid for all of them."""
    if grid == "RMS":
        return cage.Quantizer(
            cage.quest(bits).format, cage.quest(bits).scale, axis=None
        )
    format = Integer(bits)
    if grid == "fixed":
        return cage.Quantizer(format, Fixed(WIDEST[bits] / format.high), axis=None)
    return cage.Quantizer(format, axis=None)


def base_optimizer(
    optimizer: str, rate: optax.Schedule
) -> optax.GradientTransformation:
    """Returns the optimizer of a name, which all methods share."""
    if optimizer == "Muon":
        return optax.contrib.muon(rate)
    return optax.sgd(rate) if optimizer == "SGD" else optax.adam(rate)


def loss_of(weights: jax.Array, of: Problems) -> jax.Array:
    """Computes the loss of one problem."""
    offset = (weights - of.optimum).ravel()
    return offset @ (of.curvature @ offset) / 2


def _gradient(of, weights, params, step, key):
    del step
    there, back = jax.vjp(weights, params)
    slope = of.curvature @ (there["x"] - of.optimum).ravel()
    (gradient,) = back({"x": slope.reshape(SHAPE)})
    noise = jax.random.normal(key, SHAPE)
    return {"x": gradient["x"] + of.noise * noise}


def final_losses(
    bits: int, grid: str, optimizer: str, floor: float, seeds: int, steps: int
) -> dict[str, np.ndarray]:
    """The last loss of each method for all problems, float64."""
    quantizer = quantizer_of(bits, grid)
    rules = cage.Rules([("x", quantizer)])
    given = problems(seeds)
    keys = jax.random.split(jax.random.key(0), len(given.noise))

    def train_all(method, floor):
        rate = optax.cosine_decay_schedule(PEAK_RATE[optimizer], steps, floor)
        training = Training(rules, steps, rate, base_optimizer(optimizer, rate))

        @jax.jit
        @jax.vmap
        def one(of, key):
            found = train(
                method, training, {"x": of.optimum}, partial(_gradient, of), key
            )
            ends = [found.last["x"], found.average["x"]]
            rounded = [cage.fake_quant(x, quantizer) for x in ends]
            return [loss_of(x, of) for x in (*rounded, ends[0])]

        return [np.asarray(value, np.float64) for value in one(given, keys)]

    rounded, _, unrounded = train_all(Method("", weights=full), floor)
    losses = {"full": unrounded, "ptq": rounded}
    for name, method in METHODS.items():
        losses[name], average, _ = train_all(method, floor)
        if name == "ste":
            losses["averaged"] = average
            to_zero = losses["ste"] if floor == 0 else train_all(method, 0.0)[0]
            losses["ste0"] = to_zero
    return losses


def measure(
    console: Console,
    *,
    seeds: int = 20,
    steps: int = 1500,
    only: Sequence[str] = (),
    table: Table | None = None,
) -> Table:
    """Fills the table, program by program.

    Args:
      console: is told of each.
      seeds: problems of each combination.
      steps: of each training.
      only: the keys of some cells, such as "W4 absmax SGD 0.1"; none for all.
      table: to fill; None for the one that is kept.
    """
    settings = {
        "seeds": seeds,
        "steps": steps,
        "weights": int(np.prod(SHAPE)),
        "peak_learning_rate": PEAK_RATE,
        "combinations": combinations(),
    }
    table = table or Table("quadratics", settings)

    def one(key):
        width, grid, optimizer, floor = key.split()
        losses = final_losses(
            int(width[1:]), grid, optimizer, float(floor), seeds, steps
        )
        return _summary(losses, seeds)

    table.measure(only or names(), one, console)
    return table


def names() -> list[str]:
    """Returns the names of all cells: width, grid, optimizer, floor."""
    return [
        f"W{bits} {grid} {optimizer} {floor:g}"
        for floor, optimizer, grid, bits in itertools.product(
            FLOORS, OPTIMIZERS, GRIDS, BITS
        )
    ]


def _summary(losses, seeds) -> dict[str, list[Any]]:
    """For each combination STE's mean loss, and of each method its share and wins.

    None stands for what has diverged.
    """
    by_problem = {name: loss.reshape(-1, seeds) for name, loss in losses.items()}
    ste = by_problem["ste"]
    found: dict[str, list[Any]] = {"ste": _short(ste.mean(1))}
    for name, loss in by_problem.items():
        if name != "ste":
            found[name] = _short(loss.mean(1) / ste.mean(1))
            found[f"{name} wins"] = (loss < ste).sum(1).tolist()
    return found


def _short(values):
    return [float(f"{x:.4g}") if np.isfinite(x) else None for x in values]
