"""Quantizing without data: images from batch-norm statistics, then distillation.

A convolutional network of scikit-learn's digits is trained in full precision. Images
are made of it alone: noise that Adam changes until the network finds given classes in
it, and the statistics of its batch norms. A student with learned scales (LSQ) is then
distilled on such images, on real ones, and on noise. Written from the formulas of
zero-shot quantization of detectors; here the task is classification. Nothing is tuned.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measurement
import numpy as np
import optax
import tyro
from jax import lax
from measurement import Rows
from rich.console import Console

import cage_jax as cage
from cage_jax import finetuning

sys.path.insert(0, str(Path(__file__).resolve().parent))

import relatives
from relatives import BATCH, CLASSES, Data, adamw, cross_entropy

CHANNELS = (1, 16, 32)
STRIDES = (1, 2)
EPSILON, MOMENTUM = 1e-3, 0.95
VARIATION, STATISTICS, SYNTHESIS_RATE = 1e-4, 0.05, 0.1
TEMPERATURE = 4.0
CONVOLUTIONS = ("0", "1")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compares synthetic images with real ones and with noise."""

    seeds: int = 5
    """Networks."""
    steps: int = 800
    """Steps of the full-precision training; each later training takes half of them."""
    images: int = 256
    """Images that a student is distilled on."""
    tiny: bool = False
    """A few steps, to see that everything works."""


# --- the network ----------------------------------------------------------------------


def initial(key: jax.Array) -> Any:
    """Draws two convolutions with batch norms, and a head."""
    init = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, 3)
    params: dict[str, Any] = {
        name: {
            "kernel": init(keys[n], (3, 3, *CHANNELS[n : n + 2])),
            "scale": jnp.ones(CHANNELS[n + 1]),
            "bias": jnp.zeros(CHANNELS[n + 1]),
        }
        for n, name in enumerate(CONVOLUTIONS)
    }
    shape = CHANNELS[-1], CLASSES
    return params | {"head": {"kernel": init(keys[2], shape), "bias": jnp.zeros(10)}}


def network(params: Any, x: jax.Array, known: Any = None, quantize=lambda x: x):
    """Computes logits, features and statistics; by `known` statistics if there are."""
    features, found = [], {}
    for name, stride in zip(CONVOLUTIONS, STRIDES):
        layer = params[name]
        x = lax.conv_general_dilated(
            quantize(x),
            layer["kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        found[name] = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
        mean, variance = found[name] if known is None else known[name]
        x = (x - mean) * lax.rsqrt(variance + EPSILON)
        x = jax.nn.relu(x * layer["scale"] + layer["bias"])
        features.append(x)
    x = quantize(jnp.mean(x, (1, 2)))
    return x @ params["head"]["kernel"] + params["head"]["bias"], features, found


def rules() -> cage.Rules:
    """LSQ at 2 bits: a learned scale for each output channel."""
    convolution = dataclasses.replace(cage.lsq(2), axis=(0, 1, 2))
    return cage.Rules(
        [("[01]/kernel", convolution), ("head/kernel", cage.lsq(2)), (r".*", None)]
    )


def quantize_inputs(x: jax.Array) -> jax.Array:
    """Quantizes the inputs of a layer to 16 levels, one scale for a batch."""
    format = cage.formats.Integer(4, narrow=False)
    quantizer = cage.Quantizer(format, cage.scales.MinMax(), axis=None)
    return cage.fake_quant(x.reshape(1, -1), quantizer).reshape(x.shape)


# --- its training, the images, and the student ----------------------------------------


def trained(key: jax.Array, data: Data, steps: int) -> tuple[Any, Any]:
    """Trains in full precision; returns parameters and statistics."""
    tx, first = adamw(steps), initial(key)

    def step(carry, key):
        params, state, known = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(data.labels))

        def loss(params):
            logits, _, found = network(params, data.images[rows])
            return cross_entropy(logits, data.labels[rows]), found

        gradients, found = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        known = jax.tree.map(
            lambda x, y: MOMENTUM * x + (1 - MOMENTUM) * y, known, found
        )
        return (optax.apply_updates(params, updates), state, known), None

    known = network(first, data.images[:BATCH])[2]
    keys = jax.random.split(jax.random.fold_in(key, 1), steps)
    (params, _, known), _ = lax.scan(step, (first, tx.init(first), known), keys)
    return params, known


def synthesized(key: jax.Array, params: Any, known: Any, count: int, steps: int):
    """Changes noise until the network finds classes and its own statistics in it."""
    tx = optax.adam(SYNTHESIS_RATE)
    labels = jnp.arange(count) % CLASSES
    first = jax.random.normal(key, (count, 8, 8, 1))

    def loss(x):
        logits, _, found = network(params, x)
        away = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), found, known)
        variation = sum(jnp.sum(jnp.abs(jnp.diff(x, axis=axis))) for axis in (1, 2))
        away = sum(jax.tree.leaves(away))
        value = cross_entropy(logits, labels) + VARIATION * variation / count
        return value + STATISTICS * away

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(jax.grad(loss)(x), state)
        return (optax.apply_updates(x, updates), state), None

    return lax.scan(step, (first, tx.init(first)), length=steps)[0][0]


def distilled(key: jax.Array, teacher: Any, known: Any, x: jax.Array, steps: int):
    """Trains a student on images without labels."""
    variables, tx = cage.with_grids(teacher, rules()), adamw(steps)

    def step(carry, key):
        variables, state = carry
        batch = x[jax.random.randint(key, (BATCH,), 0, len(x))]
        given, theirs, _ = network(teacher, batch, known)

        def loss(variables):
            params = cage.fake_quant(variables, rules())["params"]
            found, own, _ = network(params, batch, known, quantize_inputs)
            away = sum(jnp.mean((a - b) ** 2) for a, b in zip(own, theirs))
            return finetuning.kl(found, given, temperature=TEMPERATURE) + away

        updates, state = tx.update(jax.grad(loss)(variables), state, variables)
        return (optax.apply_updates(variables, updates), state), None

    first = variables, tx.init(variables)
    variables, _ = lax.scan(step, first, jax.random.split(key, steps))[0]
    return cage.fake_quant(variables, rules())["params"]


# --- records --------------------------------------------------------------------------


def measure(settings: Settings) -> dict[str, Any]:
    """Measures the accuracy on test images, a list over seeds for each arm."""
    train, test = (
        Data(data.images.reshape(-1, 8, 8, 1), data.labels)
        for data in relatives.digits()
    )
    half, count = settings.steps // 2, settings.images

    def accuracy(params, known, quantize=lambda x: x):
        guess = jnp.argmax(network(params, test.images, known, quantize)[0], -1)
        return jnp.mean(guess == test.labels, dtype=jnp.float32)

    student_of = jax.jit(functools.partial(distilled, steps=half))
    judged = jax.jit(functools.partial(accuracy, quantize=quantize_inputs))
    figures: dict[str, list[float]] = {}
    for seed in range(settings.seeds):
        keys = jax.random.split(jax.random.key(seed), 5)
        params, known = jax.jit(functools.partial(trained, steps=settings.steps))(
            keys[0], train
        )
        make = functools.partial(synthesized, count=count, steps=half)
        rows = jax.random.permutation(keys[1], len(train.labels))[:count]
        sources = {
            "real images": train.images[rows],
            "synthetic images": jax.jit(make)(keys[2], params, known),
            "noise": jax.random.normal(keys[3], (count, 8, 8, 1)),
        }
        rounded = cage.fake_quant(cage.with_grids(params, rules()), rules())["params"]
        found = {
            "full precision": accuracy(params, known),
            "rounded": judged(rounded, known),
        }
        for name, x in sources.items():
            found[name] = judged(student_of(keys[4], params, known, x), known)
        for name, value in found.items():
            figures.setdefault(name, []).append(float(value))
    return {
        "name": "synthetic",
        "benchmark": "synthetic",
        "title": f"Digits at W2A4, distilled on {count} images, {settings.seeds} seeds",
        "environment": measurement.environment(),
        "settings": dataclasses.asdict(settings),
        "figures": figures,
        "targets": [],
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record."""
    base = np.array(record["figures"]["real images"])
    cells = []
    for name, values in record["figures"].items():
        difference = np.array(values) - base
        told = relatives.estimate(difference) if difference.any() else ""
        cells.append([name, relatives.estimate(np.array(values)), told])
    return Rows(["distilled on", "percent right", "less real images, paired"], cells)


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    if settings.tiny:
        settings = dataclasses.replace(settings, seeds=1, steps=4, images=32)
    console.print(f"Training {4 * settings.seeds} networks: two minutes on a core.")
    record = measure(settings)
    measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
