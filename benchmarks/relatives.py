"""Relatives of CAGE on small networks: what each gains, in seconds a training.

A network of two hidden layers sees images of 8 x 8 pixels: scikit-learn's digits, and
Fashion-MNIST reduced to their size. Nothing is tuned; all arms of a seed share the
start and the batches. Each part writes its figures to `results/relatives_PART.json`.
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable
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

import cage_jax as cage
from cage_jax import contrib, finetuning

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import images
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Part = Literal["vectors", "pruning", "coding"]
WIDTH, CLASSES, BATCH = 128, 10, 64
RATE = 3e-3  # of AdamW at the start of each training; a cosine ends at a tenth
SPARSITIES = (0.5, 0.8, 0.9)
TEMPERATURE = 2.0  # of the paper's distillation
BITS = (2, 3)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measures related methods, and writes a record for each part."""

    parts: tuple[Part, ...] = ("pruning",)
    """What to measure; vectors and coding, which need Fashion-MNIST, only if named."""
    seeds: int = 5
    """Trainings of each arm."""
    steps: int = 1000
    """Steps of the first training; those after it take half of them."""
    data: Path | None = None
    """Folder with Fashion-MNIST's files; by default that of Debian's package."""
    tiny: bool = False
    """A few steps with random images, to see that everything works."""


# --- data and model -------------------------------------------------------------------


class Data(NamedTuple):
    """Images (n, 64) of mean 0 and deviation 1, and labels (n,)."""

    images: jax.Array
    labels: jax.Array


class Split(NamedTuple):
    """What to train on, and what judges."""

    train: Data
    test: Data


def digits() -> Split:
    """Scikit-learn's digits, a quarter of them for testing."""
    pixels, labels = load_digits(return_X_y=True)
    train, test, *labels = train_test_split(
        pixels, labels, test_size=0.25, stratify=labels, random_state=0
    )
    return _split(train, test, *labels)


def fashion(folder: Path | None, tiny: bool) -> Split:
    """Fashion-MNIST in 8 x 8 pixels, means of 4 x 4 with a frame of two zeros."""
    if tiny:
        parts = images.random_images(200, 100)
    else:
        parts = images.load_images(folder, BATCH)

    return _split(*map(reduced, parts), *(part.labels for part in parts))


def reduced(part: images.Images) -> np.ndarray:
    """Returns images of 8 x 8 pixels, (n, 64)."""
    framed = np.pad(part.pixels.astype(np.float64), ((0, 0), (2, 2), (2, 2)))
    return framed.reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64)


def _split(train, test, *labels):
    mean, deviation = train.mean(), train.std()

    def data(pixels, labels):
        pixels = jnp.asarray((pixels - mean) / deviation, jnp.float32)
        return Data(pixels, jnp.asarray(labels, jnp.int32))

    return Split(data(train, labels[0]), data(test, labels[1]))


def initial(key: jax.Array) -> Any:
    """Draws a backbone of two layers, and a head."""
    sizes = (64, WIDTH, WIDTH, CLASSES)
    init = jax.nn.initializers.he_normal()
    layers = [
        {"kernel": init(key, shape), "bias": jnp.zeros(shape[1])}
        for key, shape in zip(jax.random.split(key, 3), itertools.pairwise(sizes))
    ]
    return {"backbone": layers[:2], "head": layers[2]}


def logits(params: Any, x: jax.Array, inputs: cage.Quantizer | None = None):
    """Computes the network; `inputs` quantizes those of the backbone."""
    for layer in params["backbone"]:
        if inputs is not None:
            x = cage.fake_quant(x, inputs)
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def rules_of(quantizer: cage.Quantizer) -> cage.Rules:
    """Quantizes the kernels of the backbone; head and biases are left alone."""
    return cage.Rules([("backbone/.*/kernel", quantizer), (r".*", None)])


def cross_entropy(found: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the mean over examples."""
    return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()


# --- training -------------------------------------------------------------------------

Loss = Callable[[Any, Any, Data], jax.Array]


def adamw(steps: int) -> optax.GradientTransformation:
    """AdamW with a cosine decay to a tenth."""
    return optax.adamw(optax.cosine_decay_schedule(RATE, steps, 0.1), weight_decay=0.01)


def train(
    loss: Loss, tx: optax.GradientTransformation, data: Data, steps: int
) -> Callable[..., Any]:
    """Returns `run(key, params, given)`: `loss(params, given, batch)` goes down."""

    def run(key, params, given=None):
        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (BATCH,), 0, len(data.labels))
            batch = Data(data.images[rows], data.labels[rows])
            gradients = jax.grad(loss)(params, given, batch)
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        first = params, tx.init(params)
        return lax.scan(step, first, jax.random.split(key, steps))[0][0]

    return run


def full_loss(params, given, batch):
    """The loss of full precision."""
    del given
    return cross_entropy(logits(params, batch.images), batch.labels)


def quantized_loss(rules: cage.Rules) -> Loss:
    """The loss of straight-through training."""

    def loss(params, given, batch):
        return full_loss(cage.fake_quant(params, rules), given, batch)

    return loss


def accuracy(params: Any, test: Data, inputs: cage.Quantizer | None = None):
    """Computes the share of images that are classified right."""
    guess = jnp.argmax(logits(params, test.images, inputs), -1)
    return jnp.mean(guess == test.labels, dtype=jnp.float32)


def over_seeds(one: Callable[[jax.Array], dict[str, jax.Array]], seeds: int):
    """Returns what `one` measures for each seed, as lists."""
    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), seeds))
    return {name: [float(x) for x in values] for name, values in found.items()}


# --- the parts ------------------------------------------------------------------------


def vectors(settings: Settings) -> dict[str, dict[str, list[float]]]:
    """Quantization vectors at 3 bits between both tasks, which share a start.

    The start is trained on both at once, with a head for each. Donor and receiver are
    fine-tuned from it; the vector is what quantization-aware training adds to the
    donor's backbone.
    """
    rules = rules_of(cage.int3())
    tasks = {"digits": digits(), "Fashion": fashion(settings.data, settings.tiny)}
    half = settings.steps // 2

    def joint(params, given, batches):
        del given
        return sum(
            full_loss(
                {"backbone": params["backbone"], "head": params[name]}, None, each
            )
            for name, each in batches.items()
        )

    def start_of(key):
        heads = {
            name: initial(jax.random.fold_in(key, n))["head"]
            for n, name in enumerate(tasks)
        }
        first = {"backbone": initial(key)["backbone"], **heads}
        tx = adamw(settings.steps)

        def step(carry, key):
            params, state = carry
            batches = {}
            for name, task in tasks.items():
                rows = jax.random.randint(key, (BATCH,), 0, len(task.train.labels))
                batches[name] = jax.tree.map(lambda x, rows=rows: x[rows], task.train)
            gradients = jax.grad(joint)(params, None, batches)
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, settings.steps)
        return lax.scan(step, (first, tx.init(first)), keys)[0][0]

    def one(key):
        start, full, qat = start_of(key), {}, {}
        for name, task in tasks.items():
            params = {"backbone": start["backbone"], "head": start[name]}
            tune = train(full_loss, adamw(half), task.train, half)
            full[name] = tune(jax.random.fold_in(key, 1), params)
            tune = train(quantized_loss(rules), adamw(half), task.train, half)
            qat[name] = tune(jax.random.fold_in(key, 2), full[name])
        measured = {}
        for donor, receiver in (("digits", "Fashion"), ("Fashion", "digits")):
            own = full[receiver]
            backbones = [each[donor]["backbone"] for each in (qat, full)]
            vector = contrib.quantization_vector(*backbones)
            shuffled = jax.tree.map(
                lambda x: jax.random.permutation(jax.random.key(0), x.ravel()).reshape(
                    x.shape
                ),
                vector.difference,
            )
            none = jax.tree.map(jnp.zeros_like, shuffled)
            arms = {
                "rounded": own,
                "vector": _moved(own, vector),
                "shuffled vector": _moved(
                    own, contrib.QuantizationVector(shuffled, none)
                ),
                "own training": qat[receiver],
            }
            test, label = tasks[receiver].test, f"{donor} to {receiver}"
            measured[f"{label}: full precision"] = accuracy(own, test)
            for arm, params in arms.items():
                params = cage.fake_quant(params, rules)
                measured[f"{label}: {arm}"] = accuracy(params, test)
        return measured

    return over_seeds(one, settings.seeds)


def _moved(params, vector):
    return {**params, "backbone": contrib.apply_vector(params["backbone"], vector)}


def pruning(settings: Settings) -> dict[str, list[float]]:
    """Prune Once for All on digits: sparse W8A8, distilled from the dense network.

    Pruning takes half of the steps of the first training, and so does training on the
    grid. "at once" prunes before any step, and then trains as long as both.
    """
    task, half = digits(), settings.steps // 2
    rules, inputs = rules_of(cage.int8()), cage.int8(axis=-1)

    def distilled(quantized: bool) -> Loss:
        def loss(params, teacher, batch):
            if quantized:
                params = cage.fake_quant(params, rules)
            found = logits(params, batch.images, inputs if quantized else None)
            given = logits(teacher, batch.images)
            soft = finetuning.kl(found, given, temperature=TEMPERATURE)
            return 0.5 * cross_entropy(found, batch.labels) + 0.5 * soft

        return loss

    def pruner(final, steps):
        ramp = contrib.cubic_sparsity(max(1, round(0.8 * steps)), 1.0)
        every = max(1, steps // 50)
        return contrib.gradual_pruning(rules, lambda n: final * ramp(n), every=every)

    def zeros(params):
        kernels = [layer["kernel"] for layer in params["backbone"]]
        return sum(jnp.sum(x == 0) for x in kernels) / sum(x.size for x in kernels)

    def judged(params):
        return accuracy(cage.fake_quant(params, rules), task.test, inputs)

    def one(key):
        keys = jax.random.split(key, 4)
        run = functools.partial(train, data=task.train)
        dense = run(full_loss, adamw(settings.steps), steps=settings.steps)(
            keys[0], initial(keys[1])
        )
        locked = optax.chain(adamw(half), contrib.locked_zeros(rules))
        on_grid = distilled(True)
        qat = run(on_grid, adamw(half), steps=half)(keys[3], dense, dense)
        measured = {
            "dense, full precision": accuracy(dense, task.test),
            "dense, W8A8": judged(qat),
        }
        for final in SPARSITIES:
            gradual = optax.chain(adamw(half), pruner(final, half))
            sparse = run(distilled(False), gradual, steps=half)(keys[2], dense, dense)
            ended = run(on_grid, locked, steps=half)(keys[3], sparse, dense)
            free = run(on_grid, adamw(half), steps=half)(keys[3], sparse, dense)
            pruned = optax.chain(
                adamw(2 * half), contrib.gradual_pruning(rules, final, every=10**9)
            )
            once = run(on_grid, pruned, steps=2 * half)(keys[2], dense, dense)
            measured |= {
                f"{final:.0%}, sparse, full precision": accuracy(sparse, task.test),
                f"{final:.0%}, rounded to W8A8": judged(sparse),
                f"{final:.0%}, locked, W8A8": judged(ended),
                f"{final:.0%}, at once, W8A8": judged(once),
                f"{final:.0%}, zeros of locked": zeros(ended),
                f"{final:.0%}, zeros without the lock": zeros(free),
            }
        return measured

    return over_seeds(one, settings.seeds)


def coding(settings: Settings) -> dict[str, list[float]]:
    """AlphaTuning: a network of Fashion-MNIST learns digits by its scales and a head.

    All arms train a new head. "head" trains nothing else.
    """
    source, task = fashion(settings.data, settings.tiny), digits()
    half = settings.steps // 2

    def one(key):
        keys = jax.random.split(key, 4)
        first = train(full_loss, adamw(settings.steps), source.train, settings.steps)(
            keys[0], initial(keys[1])
        )
        start = {"backbone": first["backbone"], "head": initial(keys[2])["head"]}

        def tuned(loss, trained, given=None):
            run = train(loss, adamw(half), task.train, half)
            return run(keys[3], trained, given)

        full = tuned(full_loss, start)
        measured = {"full precision": accuracy(full, task.test)}
        for bits in BITS:
            quantizer = {2: cage.int2(), 3: cage.int3()}[bits]
            rules = rules_of(quantizer)
            qat = cage.fake_quant(tuned(quantized_loss(rules), start), rules)
            rounded = cage.fake_quant(full, rules)
            measured[f"{bits} bits, rounded after training"] = accuracy(
                rounded, task.test
            )
            measured[f"{bits} bits, straight through"] = accuracy(qat, task.test)
            for trained in (0, 1, bits):
                scales, codes = contrib.binary_coding(
                    start["backbone"],
                    cage.Rules([(".*kernel", cage.binary())]),
                    bits=bits,
                    trained=max(trained, 1),
                )

                def whole(params, codes):
                    backbone = contrib.coded_weights(params.get("scales", {}), codes)
                    return {"backbone": backbone, "head": params["head"]}

                def loss(params, codes, batch, whole=whole):
                    return full_loss(whole(params, codes), None, batch)

                params = {"head": start["head"]} | (
                    {"scales": scales} if trained else {}
                )
                ended = whole(tuned(loss, params, codes), codes)
                label = {0: "head alone", 1: "first scale", bits: "all scales"}[trained]
                measured[f"{bits} bits, {label}"] = accuracy(ended, task.test)
        return measured

    return over_seeds(one, settings.seeds)


# --- records --------------------------------------------------------------------------

PARTS: dict[Part, Callable[[Settings], dict[str, list[float]]]] = {
    "vectors": vectors,
    "pruning": pruning,
    "coding": coding,
}
TITLES = {
    "vectors": "Quantization vectors: accuracy of 3-bit backbones",
    "pruning": "Prune Once for All on digits",
    "coding": "AlphaTuning: digits by the scales of a network of Fashion-MNIST",
}
# What each row is compared with, pair by pair.
BASES = {"vectors": "rounded", "pruning": "dense, W8A8", "coding": "straight through"}


def table(record: dict[str, Any]) -> Rows:
    """The table of a record: means over seeds, and paired differences."""
    figures, part = record["figures"], record["settings"]["part"]
    cells = []
    for name, values in figures.items():
        head, mark, _ = name.partition({"vectors": ": ", "coding": ", "}.get(part, "|"))
        base = figures.get(head + mark + BASES[part] if mark else BASES[part])
        difference = np.array(values) - np.array(base if base else values)
        told = "" if not difference.any() or "zeros" in name else estimate(difference)
        cells.append([name, estimate(np.array(values)), told])
    return Rows(["arm", "percent", f"less “{BASES[part]}”, paired"], cells)


def estimate(values: np.ndarray) -> str:
    """Formats a mean and its standard error, in percent."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0
    return f"{100 * np.mean(values):.1f} ± {100 * error:.1f}"


def record_of(part: Part, settings: Settings) -> dict[str, Any]:
    """Measures a part."""
    shown = {"part": part, "seeds": settings.seeds, "steps": settings.steps}
    return {
        "name": f"relatives_{part}",
        "benchmark": "relatives",
        "title": f"{TITLES[part]}, {settings.seeds} seeds",
        "environment": measurement.environment(),
        "settings": shown | {"rate": RATE, "batch": BATCH, "width": WIDTH},
        "figures": PARTS[part](settings),
        "targets": [],
    }


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    settings = tyro.cli(Settings, description=__doc__)
    if settings.tiny:
        settings = dataclasses.replace(settings, seeds=2, steps=4)
    for part in settings.parts:
        console.print(f"Training the networks of {part}: a minute on an idle core.")
        record = record_of(part, settings)
        measurement.finish(record, table(record), console, keep=not settings.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
