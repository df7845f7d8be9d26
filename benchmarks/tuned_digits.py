"""Methods that tune a trained network of digits to 2-bit weights and 4-bit inputs.

    python benchmarks/tuned_digits.py    # five minutes on an idle core

RoSTE, ZeroQAT, LR-QAT, L4Q and DL-QAT beside straight-through training, in the network
of `relatives.py`. All arms of a seed share the trained network, the batches, the steps
and Adam; head and biases stay as they are. Each arm takes the learning rate, of the
same few, with the lowest training loss at a seed that is not shown; scales of adapters
learn at a hundredth of it, as published. What is compared is the accuracy on test
images.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measurement
import numpy as np
import optax
import relatives
from jax import lax
from measurement import Rows

import cage_jax as cage
from cage_jax import contrib, finetuning

SEEDS, FIRST_STEPS, STEPS = 5, 1000, 500
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
CHOICES, JUDGED = 5, 256  # RoSTE's choices in a training, and the images of each
OF_SCALES = 0.01  # of the learning rate: LR-QAT's 1e-5 beside 1e-3
RADIUS = 0.1  # of the two points, for clips


def _table(**rotation: int) -> cage.Rules:
    quantizers = cage.int2(**rotation), cage.int4(axis=-1, **rotation)
    return cage.Rules([("backbone/.*/kernel", *quantizers), (r".*", None)])


PLAIN, ROTATED = _table(), _table(hadamard=64)


class Method(NamedTuple):
    """What is trained in place of the kernels, and how.

    Attributes:
      start: maps the kernels to two trees, trained and frozen.
      kernels: maps both trees and a table to rounded kernels.
      rules: the table.
      chooses: whether rotations are chosen, `CHOICES` times.
      radius: of the loss at two points; None for the gradient.
    """

    start: Callable[[Any], tuple[Any, Any]]
    kernels: Callable[[Any, Any, cage.Rules], Any]
    rules: cage.Rules = PLAIN
    chooses: bool = False
    radius: float | None = None


def _all_weights(**options: Any) -> Method:
    return Method(
        lambda kernels: (kernels, None),
        lambda trained, _, rules: cage.fake_quant(trained, rules),
        **options,
    )


def _adapters(**options: Any) -> Method:
    return Method(
        lambda kernels: finetuning.low_rank(kernels, PLAIN, **options),
        lambda trained, frozen, _: finetuning.weights(trained, frozen),
    )


def _of_clips(clips, frozen, rules):
    grids = contrib.clipped_grids(frozen, rules, clips)
    return cage.fake_quant(frozen, rules, grid=grids)


STE = "straight through"
METHODS = {
    STE: _all_weights(),
    "straight through, all rotated": _all_weights(rules=ROTATED),
    "RoSTE": _all_weights(rules=ROTATED, chooses=True),
    "LR-QAT": _adapters(),
    "L4Q": _adapters(units="weights", scale="grid"),
    "DL-QAT": _adapters(units="weights", store="float32"),
    "ZeroQAT, all weights": _all_weights(radius=1e-3),
    "ZeroQAT, clips of frozen weights": Method(
        lambda kernels: (contrib.first_clips(kernels, PLAIN), kernels),
        _of_clips,
        radius=RADIUS,
    ),
}


# --- training -------------------------------------------------------------------------


def kernels_of(params: Any) -> Any:
    """Returns the kernels of the backbone."""
    return {"backbone": [{"kernel": each["kernel"]} for each in params["backbone"]]}


def with_kernels(params: Any, kernels: Any) -> Any:
    """Puts kernels into the network."""
    pairs = zip(params["backbone"], kernels["backbone"])
    return params | {"backbone": [own | given for own, given in pairs]}


def loss_of(params: Any, kernels: Any, rules: cage.Rules, data: relatives.Data):
    """Computes the cross-entropy at rounded kernels and inputs, and the accuracy."""
    run = cage.quantize_activations(relatives.logits, rules)
    found = run(with_kernels(params, kernels), data.images)
    right = jnp.mean(jnp.argmax(found, -1) == data.labels, dtype=jnp.float32)
    return relatives.cross_entropy(found, data.labels), right


def _optimizer(rate, steps):
    def slower(updates, params):
        del params
        return jax.tree.map_with_path(
            lambda path, x: x * OF_SCALES if "scale" in path[-1].key else x, updates
        )

    adam = optax.adam(optax.cosine_decay_schedule(rate, steps, 0.1))
    return optax.chain(adam, optax.stateless(slower))


@functools.partial(jax.jit, static_argnames=("method", "rules", "steps"))
def _advance(carry, frozen, params, data, keys, rate, *, method, rules, steps):
    """Trains for as many of all `steps` as there are keys."""
    tx = _optimizer(rate, steps)

    def step(carry, key):
        trained, state = carry
        rows = jax.random.randint(key, (relatives.BATCH,), 0, len(data.labels))
        batch = jax.tree.map(lambda x: x[rows], data)

        def loss(trained):
            kernels = method.kernels(trained, frozen, rules)
            return loss_of(params, kernels, rules, batch)[0]

        if method.radius is None:
            gradient = jax.grad(loss)(trained)
        else:
            gradient = contrib.two_point_gradient(
                loss, trained, jax.random.fold_in(key, 1), radius=method.radius
            )[1]
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(trained, updates), state), None

    return lax.scan(step, carry, keys)[0]


@functools.partial(jax.jit, static_argnames=("method", "rules"))
def _judged(trained, frozen, params, data, *, method, rules):
    return loss_of(params, method.kernels(trained, frozen, rules), rules, data)


def tune(
    method: Method, params: Any, data: relatives.Split, key: jax.Array, rate, steps: int
) -> dict[str, float]:
    """Trains one arm; returns its loss and accuracy on test images, and the rest."""
    rules, kernels = method.rules, kernels_of(params)
    trained, frozen = method.start(kernels)
    carry = trained, _optimizer(rate, steps).init(trained)
    keys = jax.random.split(key, steps)
    for part in np.array_split(np.arange(steps), min(CHOICES, steps)):
        if method.chooses:
            batch = (data.train.images[:JUDGED],)
            whole = with_kernels(params, carry[0])
            rules = contrib.choose_rotations(
                relatives.logits, method.rules, whole, [batch]
            )
        carry = _advance(
            carry,
            frozen,
            params,
            data.train,
            keys[part],
            jnp.float32(rate),
            method=method,
            rules=rules,
            steps=steps,
        )
    judged = functools.partial(_judged, carry[0], frozen, params)
    loss, right = judged(data.test, method=method, rules=rules)
    train_loss, _ = judged(data.train, method=method, rules=rules)
    return {
        "right": float(right),
        "loss": float(loss),
        "train loss": float(train_loss),
        "trained": sum(x.size for x in jax.tree.leaves(trained)),
    }


# --- the record -----------------------------------------------------------------------


def memory(layers: int = 8, width: int = 512, tokens: int = 1024) -> dict[str, float]:
    """Returns the MiB that a gradient takes beside its arguments and its result."""
    rules = cage.Rules([("kernel", cage.int4(axis=-2))])
    frozen = {"kernel": jnp.zeros((layers, width, width))}
    x, key = jnp.zeros((tokens, width)), jax.random.key(0)

    def loss(weights, x):
        ended, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights["kernel"])
        return jnp.mean(ended)

    def two_points(clips, frozen, x, key):
        def at(clips):
            return loss(_of_clips(clips, frozen, rules), x)

        return contrib.two_point_gradient(at, clips, key, radius=RADIUS)

    def backward(frozen, x):
        return jax.value_and_grad(lambda p: loss(cage.fake_quant(p, rules), x))(frozen)

    def temporary(function, *args):
        compiled = jax.jit(function).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    return {
        "two points": temporary(
            two_points, contrib.first_clips(frozen, rules), frozen, x, key
        ),
        "backward": temporary(backward, frozen, x),
    }


def measure(
    seeds: int = SEEDS, first: int = FIRST_STEPS, steps: int = STEPS, rates=RATES
) -> dict[str, Any]:
    """Returns the record."""
    data = relatives.digits()
    pretrain = jax.jit(
        relatives.train(relatives.full_loss, relatives.adamw(first), data.train, first)
    )

    def network(seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        return pretrain(keys[0], relatives.initial(keys[1])), keys[2]

    other, key = network(seeds)
    arms, taken = {}, {}
    for name, method in METHODS.items():
        losses = {
            rate: tune(method, other, data, key, rate, steps)["train loss"]
            for rate in rates
        }
        taken[name] = min(losses, key=losses.__getitem__)
    for seed in range(seeds):
        params, key = network(seed)
        rounded = cage.fake_quant(kernels_of(params), PLAIN)
        found = {
            "full precision": (kernels_of(params), cage.Rules([(".*", None)])),
            "rounded": (rounded, PLAIN),
        }
        for name, (kernels, rules) in found.items():
            judged = jax.jit(loss_of, static_argnums=2)
            loss, right = judged(params, kernels, rules, data.test)
            figures = {"right": float(right), "loss": float(loss)}
            arms.setdefault(name, []).append(figures)
        for name, method in METHODS.items():
            arms.setdefault(name, []).append(
                tune(method, params, data, key, taken[name], steps)
            )
    return {
        "name": "tuned_digits",
        "benchmark": "tuned_digits",
        "title": f"Digits at 2-bit weights and 4-bit inputs after {steps} steps, "
        f"{seeds} seeds",
        "environment": measurement.environment(),
        "settings": {"first": first, "steps": steps, "rates": list(rates)},
        "figures": {"arms": arms, "rates": taken, "memory": memory()},
        "targets": [],
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record: means over seeds, and paired differences."""
    arms, rates = record["figures"]["arms"], record["figures"]["rates"]
    cells = []
    for name, runs in arms.items():
        right = np.array([run["right"] for run in runs])
        away = right - [run["right"] for run in arms[STE]]
        cells.append(
            [
                name,
                f"{runs[0]['trained']:,}" if "trained" in runs[0] else "",
                f"{rates[name]:g}" if name in rates else "",
                relatives.estimate(right),
                relatives.estimate(away) if name != STE else "",
                f"{np.mean([run['loss'] for run in runs]):.3f}",
            ]
        )
    less = f"less “{STE}”, paired"
    return Rows(["arm", "trained", "rate", "percent right", less, "test loss"], cells)


def main() -> int:
    """Runs the program; the exit status."""
    from rich.console import Console

    tiny = "--tiny" in sys.argv
    record = measure(*((1, 4, 4, RATES[:1]) if tiny else ()))
    measurement.finish(record, table(record), Console(), keep=not tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
