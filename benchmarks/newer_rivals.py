"""Newer rivals of CAGE on the study's quadratics: final losses as shares of STE's.

    python benchmarks/newer_rivals.py    # three minutes on an idle core

StableQAT, HESTIA's soft quantizer, ProxQuant, PV-Tuning's sparse updates and FOGZO. All
arms of a problem share its start and its noise, and nothing is tuned. ProxQuant's
strength and HESTIA's first temperature are ours, since no paper has one for this.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measurement
import numpy as np
import optax
from measurement import Rows

sys.path.insert(0, str(Path(__file__).resolve().parent / "quality"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import quadratics
from methods import METHODS, Training, full

import cage_jax as cage
from cage_jax import contrib

SEEDS, STEPS, FLOOR = 4, 400, 0.1
SETTINGS = {f"W{b}, {o}": (b, o) for b in (4, 2) for o in ("SGD", "Adam")}
STRENGTH, TEMPERATURE, COLDEST = 1e-3, 0.5, 1e-3
SPARSITY = 0.01  # of codes that may change in a step, PV-Tuning's
DOUBT = 1e-3  # at the end, FOGZO's


class Rival(NamedTuple):
    """A method: what is last in the optimizer, weights, and the gradient.

    Attributes:
      last: of a `Training`, or None.
      weights: maps a `Training`, the parameters, the step and a key to the weights.
      gradient: None for that of the loss at the weights; or a function of the loss, a
        `Training`, the parameters, the step and a key.
    """

    last: Callable[[Training], Any] | None = None
    weights: Callable[..., Any] = METHODS["ste"].weights
    gradient: Callable[..., Any] | None = None


def _stable(training, params, step, key):
    del step, key
    return contrib.stable_qat(params, training.rules)


def _soft(training, params, step, key):
    del key
    falling = optax.cosine_decay_schedule(TEMPERATURE, training.steps)
    return contrib.soft_quant(
        params, training.rules, jnp.maximum(falling(step), COLDEST)
    )


def _prox(training):
    def rising(step):
        return STRENGTH * step / training.steps

    return contrib.prox_quant(training.rules, strength=rising)


def _two_points(loss, training, params, step, key):
    doubt = contrib.fogzo_doubt(training.steps, DOUBT)(step)
    return contrib.fogzo(loss, params, training.rules, key, doubt=doubt)[1]


RIVALS = {
    "StableQAT": Rival(weights=_stable),
    "HESTIA's soft quantizer": Rival(weights=_soft),
    "ProxQuant": Rival(last=_prox, weights=full),
    "sparse updates of PV-Tuning": Rival(
        last=lambda training: contrib.sparse_codes(training.rules, SPARSITY),
        weights=full,
    ),
    "FOGZO": Rival(gradient=_two_points),
}


def final_losses(bits: int, optimizer: str, seeds: int, steps: int) -> dict[str, Any]:
    """Returns the last loss of each method for all problems, float64."""
    quantizer = quadratics.quantizer_of(bits, "absmax")
    rules = cage.Rules([("x", quantizer)])
    rate = optax.cosine_decay_schedule(quadratics.PEAK_RATE[optimizer], steps, FLOOR)
    base = quadratics.base_optimizer(optimizer, rate)
    training = Training(rules, steps, rate, base)
    given = quadratics.problems(seeds)
    keys = jax.random.split(jax.random.key(0), len(given.noise))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(method, tx, given, keys):
        def one(of, key):
            def step(carry, number):
                params, state = carry
                noise_key, own_key = jax.random.split(jax.random.fold_in(key, number))
                noise = of.noise * jax.random.normal(noise_key, quadratics.SHAPE)

                def at(weights):
                    return quadratics.loss_of(weights["x"], of) + jnp.sum(
                        noise * weights["x"]
                    )

                def loss(params):
                    return at(method.weights(training, params, number, own_key))

                if method.gradient is None:
                    gradient = jax.grad(loss)(params)
                else:
                    gradient = method.gradient(loss, training, params, number, own_key)
                updates, state = tx.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), None

            start = {"x": of.optimum}
            carry = start, tx.init(start)
            (params, _), _ = jax.lax.scan(step, carry, jnp.arange(steps))
            return quadratics.loss_of(cage.fake_quant(params["x"], quantizer), of)

        return jax.vmap(one)(given, keys)

    found = {}
    for name, rival in ({"STE": Rival()} | RIVALS).items():
        tx = optax.chain(base, rival.last(training)) if rival.last else base
        found[name] = run(rival, tx, given, keys)
    recommended = METHODS["recommended"].optimizer(training)
    found["CAGE as recommended"] = run(Rival(), recommended, given, keys)
    return {name: np.asarray(losses, np.float64) for name, losses in found.items()}


def measure(seeds: int = SEEDS, steps: int = STEPS) -> dict[str, Any]:
    """Returns the record."""
    figures: dict[str, Any] = {}
    for setting, (bits, optimizer) in SETTINGS.items():
        losses = final_losses(bits, optimizer, seeds, steps)
        ste = losses.pop("STE")
        figures[setting] = {
            name: {
                "share": float(np.exp(np.mean(np.log(found / ste)))),
                "won": float(np.mean(found < ste)),
            }
            for name, found in losses.items()
        }
    return {
        "name": "newer_rivals",
        "benchmark": "newer_rivals",
        "title": f"Final loss over STE's, geometric mean of {len(ste)} problems, "
        f"and how many are won; {steps} steps",
        "environment": measurement.environment(),
        "settings": {"seeds": seeds, "steps": steps, "floor": FLOOR},
        "figures": figures,
        "targets": [],
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record."""
    settings = record["figures"]
    cells = [
        [
            name,
            *(
                f"{f[name]['share']:.2f} ({f[name]['won']:.0%})"
                for f in settings.values()
            ),
        ]
        for name in next(iter(settings.values()))
    ]
    return Rows(["method", *settings], cells)


def main() -> int:
    """Runs the program; the exit status."""
    from rich.console import Console

    tiny = "--tiny" in sys.argv
    record = measure(*((1, 4) if tiny else ()))
    measurement.finish(record, table(record), Console(), keep=not tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
