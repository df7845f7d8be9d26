"""Images: an MLP, a CNN and a ViT on digits and on Fashion-MNIST, seeds paired.

All methods of a seed share the initial weights and the batches. All seeds of a method
train at once.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import digits as digits_example
import jax
import jax.numpy as jnp
import numpy as np
import optax
import prose
from cells import Table
from images import load_images
from jax import lax
from methods import METHODS, Method, Trained, Training, full, train
from networks import CLASSES, NETWORKS, Network, product_of, rules_of
from rich.console import Console

import cage_jax as cage

BATCH = 64
LABEL_SMOOTHING = 0.1
BITS = (4, 3, 2)
FLOORS = (0.1, 0.0)
TINY = {"seeds": 2, "steps": 20}
# Of Fashion-MNIST's images the loss of training is taken over so many.
_MOST = 4096


class Images(NamedTuple):
    """Standardized images (n, side, side) float32, and their labels (n,) int32."""

    pixels: jax.Array
    labels: jax.Array


def load_digits() -> tuple[Images, Images]:
    """scikit-learn's: 1347 of 8 x 8 to train on, 450 to test with."""

    def images(data):
        return Images(data.images.reshape(-1, 8, 8), data.labels)

    train_data, test_data = digits_example.load()
    return images(train_data), images(test_data)


def load_fashion(folder: Path) -> tuple[Images, Images]:
    """Fashion-MNIST: 60,000 and 10,000, their 28 x 28 pixels in means of 2 x 2.

    Of `folder`/fashion-mnist, or of Debian's package.
    """
    own = folder / "fashion-mnist"

    def images(data):
        side = data.pixels.shape[1] // 2
        pixels = data.pixels.reshape(-1, side, 2, side, 2).mean((2, 4), np.float32)
        return np.asarray(pixels, np.float32), np.asarray(data.labels, np.int32)

    (pixels, labels), test_data = map(
        images, load_images(own if own.exists() else None, BATCH)
    )
    mean, deviation = pixels.mean(), pixels.std()
    return tuple(
        Images(jnp.asarray((pixels - mean) / deviation), jnp.asarray(labels))
        for pixels, labels in ((pixels, labels), test_data)
    )


# By name, of the folder of what is downloaded.
DATA = {"digits": lambda folder: load_digits(), "Fashion-MNIST": load_fashion}


def loss_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy with smoothed labels, in nats."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), LABEL_SMOOTHING)
    return optax.softmax_cross_entropy(logits, targets).mean()


def train_all(
    method: Method,
    network: Network,
    bits: int | None,
    floor: float,
    data: Images,
    seeds: int,
    steps: int,
    key: int = 0,
) -> Trained:
    """What all seeds end with; `bits` None quantizes nothing."""
    rules = rules_of(bits or 8)
    rate = optax.cosine_decay_schedule(network.learning_rate, steps, floor)
    base = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.01)
    training, product = Training(rules, steps, rate, base), product_of(bits)

    def gradient(weights, params, step, key):
        del step
        chosen = jax.random.randint(key, (BATCH,), 0, len(data.labels))

        def loss(params):
            logits = network.logits(weights(params), data.pixels[chosen], product)
            return loss_of(logits, data.labels[chosen])

        return jax.grad(loss)(params)

    @jax.jit
    @jax.vmap
    def one(key):
        first, rest = jax.random.split(key)
        params = network.initial(first, data.pixels.shape[1])
        return train(method, training, params, gradient, rest)

    return one(jax.random.split(jax.random.key(key), seeds))


class Scores(NamedTuple):
    """What a method came to, one entry a seed."""

    train_loss: np.ndarray
    test_loss: np.ndarray
    accuracy: np.ndarray


@partial(jax.jit, static_argnums=(1, 2))
def _scores(params, network, bits, parts):
    """At quantized weights and inputs; seeds and batches one after the other."""
    product = product_of(bits)
    if bits is not None:
        params = jax.vmap(lambda p: cage.fake_quant(p, rules_of(bits)))(params)

    def of_seed(params):
        def of_batch(batch):
            logits = network.logits(params, batch.pixels, product)
            right = jnp.argmax(logits, -1) == batch.labels
            return loss_of(logits, batch.labels), jnp.mean(right, dtype=jnp.float32)

        return [tuple(map(jnp.mean, lax.map(of_batch, part))) for part in parts]

    return lax.map(of_seed, params)


def scores(
    params: Any, network: Network, bits: int | None, parts: Sequence[Images]
) -> Scores:
    """What parameters of many seeds come to.

    Args:
      params: with an axis of seeds in front.
      network: theirs.
      bits: of weights and inputs; None quantizes nothing.
      parts: to train on and to test with, in batches.
    """
    (train_loss, _), (test_loss, accuracy) = _scores(params, network, bits, parts)
    found = train_loss, test_loss, accuracy
    return Scores(*(np.asarray(each, np.float64) for each in found))


def batches_of(data: Images) -> Images:
    """Batches of equal size, (batches, size, ...), of no more than `_MOST` images."""
    count = min(len(data.labels), _MOST)
    size = max(n for n in range(1, 513) if count % n == 0)
    return jax.tree.map(lambda x: x[:count].reshape(-1, size, *x.shape[1:]), data)


def scores_of_methods(
    network: Network,
    bits: int,
    floor: float,
    data: tuple[Images, Images],
    seeds: int,
    steps: int,
) -> dict[str, Scores]:
    """All methods, and what comes of them."""
    parts = tuple(map(batches_of, data))

    def ended(method, bits, floor):
        return train_all(method, network, bits, floor, data[0], seeds, steps)

    def judged(params, bits):
        return scores(params, network, bits, parts)

    unquantized = ended(Method("", weights=full), None, floor)
    found = {"full": judged(unquantized.last, None)}
    found["ptq"] = judged(unquantized.last, bits)
    for name, method in METHODS.items():
        trained = ended(method, bits, floor)
        found[name] = judged(trained.last, bits)
        if name == "ste":
            found["averaged"] = judged(trained.average, bits)
            to_zero = trained if floor == 0 else ended(method, bits, 0.0)
            found["ste0"] = judged(to_zero.last, bits)
    return found


def rounded(values: np.ndarray) -> list[float]:
    """Rounds values to the six digits that the record keeps."""
    return [float(f"{value:.6g}") for value in values]


def names() -> list[str]:
    """Returns the names of all cells: data, network, width, floor."""
    return [
        f"{data} {network} W{bits}A{bits} {floor:g}"
        for data, network, floor, bits in itertools.product(
            DATA, NETWORKS, FLOORS, BITS
        )
        if network == "MLP" or floor == FLOORS[0]
    ]


def measure(
    console: Console,
    *,
    seeds: int = 10,
    steps: int | None = None,
    only: Sequence[str] = (),
    table: Table | None = None,
    data: Path = prose.DATA,
) -> Table:
    """Fills the table, cell by cell, as `quadratics.measure` does.

    What else it takes is the folder of Fashion-MNIST.
    """
    steps_of = {name: steps or net.steps for name, net in NETWORKS.items()}
    settings = {
        "seeds": seeds,
        "steps": steps_of,
        "batch": BATCH,
        "label_smoothing": LABEL_SMOOTHING,
        "learning_rate": {name: net.learning_rate for name, net in NETWORKS.items()},
    }
    table = table or Table("classifiers", settings)
    loaded: dict[str, Any] = {}

    def one(key):
        name, network, width, floor = key.split()
        if name not in loaded:
            loaded[name] = DATA[name](data)
        bits = int(width.partition("A")[2])
        found = scores_of_methods(
            NETWORKS[network],
            bits,
            float(floor),
            loaded[name],
            seeds,
            steps_of[network],
        )
        return {
            name: {part: rounded(values) for part, values in each._asdict().items()}
            for name, each in found.items()
        }

    table.measure(only or names(), one, console)
    return table
