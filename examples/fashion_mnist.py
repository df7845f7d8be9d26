"""Trains a ResNet or a ViT on Fashion-MNIST at few bits, with and without CAGE.

All arms of a seed share the initial weights, the batches and, while CAGE is still
silent, the same steps. The models are plain Flax (the ResNet is Linen, the ViT NNX) and
contain nothing about quantization. Run `python examples/fashion_mnist.py --tiny` for a
run of half a minute.
"""

import dataclasses
import hashlib
import json
import math
import platform
import time
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
    from batches import Batches
    from checkpoints import Failed, RunFolder
    from digits import ARMS, Arm, Scores, estimate
    from flax import linen, nnx
    from images import CLASSES, SIDE, Images, load_images, random_images
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table

    import cage_jax as cage
    import cage_jax.flax
    from cage_jax import formats, scales

BATCH = 100
LEARNING_RATES = {"resnet": 1e-2, "vit": 3e-3}
AVERAGED_SHARE = 0.2
# Mean and standard deviation of Fashion-MNIST's pixels, scaled to [0, 1].
MEAN, DEVIATION = 0.286, 0.353
# Number of images for the final evaluation, and for the curves.
MEASURED, CURVE = 10_000, 1_000
EVALUATIONS = 40
# Longest time between checkpoints and, without a terminal for a progress bar, between
# lines of progress.
SAVE_SECONDS = 60
LOG_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains a ResNet or a ViT on Fashion-MNIST at few bits, and compares arms."""

    model: Literal["resnet", "vit"] = "resnet"
    """A ResNet of 78,000 parameters in Linen, or a ViT of 72,000 in NNX."""
    w_bits: int = 4
    """Bits of the weights in the blocks, 2 to 8."""
    a_bits: int = 4
    """Bits of the inputs of these weights, 2 to 8, or 16 for no quantization."""
    seeds: int | None = None
    """Number of runs of each arm; by default 3, with --tiny 2."""
    steps: int | None = None
    """Optimizer steps of a run; by default 1500, with --tiny 20."""
    data: Path | None = None
    """Folder with the IDX files; by default that of Debian's dataset-fashion-mnist."""
    strength: float = 10.0
    """Peak of CAGE's strength, reached at the last step."""
    silence: float = 0.8
    """Fraction of the steps without correction."""
    floor: float = 0.1
    """Final learning rate of the cosine decay, as a fraction of the peak."""
    out: Path | None = None
    """Folder for checkpoints, results and plot; by default runs/MODEL-wBITSaBITS."""
    resume: bool = False
    """Resume the run in --out; --seeds may be larger than before."""
    tiny: bool = False
    """Check that everything works, with a small model and random images or --data."""

    def resolved(self) -> "Settings":
        """Returns the settings with values in place of None; checks all of them."""
        sizes = {"seeds": 2, "steps": 20} if self.tiny else {"seeds": 3, "steps": 1500}
        name = f"{self.model}-w{self.w_bits}a{self.a_bits}" + "-tiny" * self.tiny
        values = {**sizes, "out": Path("runs") / name}
        chosen = {key: v for key, v in values.items() if getattr(self, key) is None}
        settings = dataclasses.replace(self, **chosen)
        program.check(settings, LIMITS)
        return settings

    @property
    def label(self) -> str:
        """Name of the model and its bit widths."""
        name = {"resnet": "ResNet", "vit": "ViT"}[self.model]
        return f"{name} W{self.w_bits}A{self.a_bits}"


LIMITS = (
    Limit(
        "w_bits",
        lambda bits: 2 <= bits <= 8,
        "from 2 to 8",
        "Full precision is always among the arms.",
    ),
    Limit(
        "a_bits",
        lambda bits: 2 <= bits <= 8 or bits == 16,
        "from 2 to 8, or 16 for none",
        "Use as many as for weights.",
    ),
    Limit("seeds", lambda seeds: seeds >= 1, "at least 1", "Use 3 for an error."),
    program.STEPS,
    program.STRENGTH,
    program.SILENCE,
    program.FLOOR,
    program.OUT,
)


# --- models: plain Flax, without quantization -----------------------------------------


class ResidualBlock(linen.Module):
    """Two 3 x 3 convolutions with a residual connection."""

    channels: int
    stride: int

    @linen.compact
    def __call__(self, x):
        """Maps images (n, height, width, channels) to images."""

        def normed(x, size, stride, name):
            conv = linen.Conv(
                self.channels, (size, size), stride, use_bias=False, name=name
            )
            return linen.GroupNorm(8, name=f"{name}_norm")(conv(x))

        hidden = linen.relu(normed(x, 3, self.stride, "first"))
        hidden = normed(hidden, 3, 1, "second")
        if x.shape != hidden.shape:
            x = normed(x, 1, self.stride, "shortcut")
        return linen.relu(x + hidden)


class ResNet(linen.Module):
    """A residual network with one block for each number of channels."""

    channels: tuple[int, ...]

    @linen.compact
    def __call__(self, images):
        """Images (n, 28, 28, 1) to logits (n, 10)."""
        x = linen.Conv(self.channels[0], (3, 3), 2, use_bias=False, name="stem")(images)
        x = linen.relu(linen.GroupNorm(8, name="stem_norm")(x))
        for number, channels in enumerate(self.channels):
            stride = 1 if number == 0 else 2
            x = ResidualBlock(channels, stride, name=f"blocks_{number}")(x)
        return linen.Dense(CLASSES, name="head")(x.mean((1, 2)))


class TransformerBlock(nnx.Module):
    """Attention and an MLP, each after a norm and with a residual connection."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        """Maps patches (n, patches, width) to patches."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class ViT(nnx.Module):
    """A vision transformer on patches of 4 x 4 pixels."""

    def __init__(self, width: int, blocks: int, *, rngs: nnx.Rngs):
        self.patches = nnx.Conv(1, width, (4, 4), 4, rngs=rngs)
        shape = ((SIDE // 4) ** 2, width)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        self.blocks = nnx.List(
            [TransformerBlock(width, rngs=rngs) for _ in range(blocks)]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images):
        """Images (n, 28, 28, 1) to logits (n, 10)."""
        x = self.patches(images)
        x = x.reshape(len(x), -1, x.shape[-1]) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


# --- their quantization, by path ------------------------------------------------------


def rules_of(settings: Settings) -> cage.Rules:
    """Returns the rules of weights and inputs; stem and head are not quantized.

    Weights have one scale per output channel, along axes that `cage.resolve` finds.
    Inputs have 2**bits levels between their minimum and their maximum, with one scale
    for the batch in the ResNet and one per token in the ViT.
    """
    weights = cage.Quantizer(formats.Integer(settings.w_bits), scales.AbsMax())
    inputs = None
    if settings.a_bits != 16:
        format = formats.Integer(settings.a_bits, narrow=False)
        axis = None if settings.model == "resnet" else -1
        inputs = cage.Quantizer(format, scales.MinMax(), axis=axis)
    return cage.Rules([(r"blocks.*/kernel", weights, inputs), (r".*", None)])


class Network(NamedTuple):
    """A model as functions, with inputs quantized or not.

    `initial` maps a seed to parameters; the others take parameters and images.
    """

    initial: Callable[[int], Any]
    plain: Callable[[Any, jax.Array], jax.Array]
    quantized: Callable[[Any, jax.Array], jax.Array]


def network(settings: Settings, rules: cage.Rules) -> Network:
    """Returns the model of the settings."""
    if settings.model == "resnet":
        return _linen_network(ResNet((8, 16) if settings.tiny else (16, 32, 64)), rules)
    width, blocks = (16, 1) if settings.tiny else (64, 2)
    return _nnx_network(lambda key: ViT(width, blocks, rngs=nnx.Rngs(key)), rules)


def _key(seed):
    # For each shape, these compile a second faster than the default random numbers.
    return jax.random.key(seed, impl="rbg")


def _linen_network(model, rules):
    @jax.jit
    def initial(seed):
        images = jnp.zeros((1, SIDE, SIDE, 1))
        return model.init(_key(seed), images)["params"]

    def logits_by(model, params, images):
        return model.apply({"params": params}, images)

    quantized = cage_jax.flax.quantize_activations(model, rules)
    return Network(initial, partial(logits_by, model), partial(logits_by, quantized))


def _nnx_network(make, rules):
    @jax.jit
    def initial(seed):
        return nnx.state(make(_key(seed)), nnx.Param)

    def logits_by(graph, params, images):
        return nnx.merge(graph, params)(images)

    model = nnx.eval_shape(lambda: make(_key(0)))
    quantized = cage_jax.flax.quantize_activations(model, rules)
    plain, quantized = nnx.graphdef(model), nnx.graphdef(quantized)
    return Network(initial, partial(logits_by, plain), partial(logits_by, quantized))


# --- the training of an arm -----------------------------------------------------------


class State(NamedTuple):
    """The state from which a segment continues."""

    params: Any
    optimizer: Any
    average: Any  # of the parameters over the last steps
    loss: jax.Array  # of the last step
    curve: jax.Array  # (evaluations + 1,) test loss; NaN for evaluations to come
    distance: jax.Array  # (evaluations + 1,) mean of ||x - Q(x)|| / ||x||, likewise


class Segment(NamedTuple):
    """Consecutive steps of an arm; `parent` names the segment that it continues."""

    name: str
    start: int
    stop: int
    quantized: bool
    floor: float
    peak: float
    parent: str | None = None


class Experiment:
    """The model, its data, its rules and its arms."""

    def __init__(self, settings: Settings):
        self.settings = settings
        if settings.tiny and settings.data is None:
            self.train, self.test = random_images(500, 200)
        else:
            self.train, self.test = load_images(settings.data, BATCH)
        rules = rules_of(settings)
        self.network = network(settings, rules)
        self.evaluations = min(EVALUATIONS, settings.steps)
        params = jax.eval_shape(lambda: self.network.initial(0))
        images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 1), jnp.float32)
        self.rules = cage.resolve(rules, self.network.plain, params, images)
        self.report = self.rules.report(params)

    def segments(self) -> list[Segment]:
        """Returns the segments of each seed, parents before children."""
        steps, floor = self.settings.steps, self.settings.floor
        branch = int(self.settings.silence * steps)
        return [
            Segment("full", 0, steps, False, floor, 0.0),
            Segment("trunk", 0, branch, True, floor, 0.0),
            Segment("ste", branch, steps, True, floor, 0.0, "trunk"),
            Segment(
                "cage", branch, steps, True, floor, self.settings.strength, "trunk"
            ),
            Segment("ste0", 0, steps, True, 0.0, 0.0),
        ]

    def learning_rate(self, floor) -> optax.Schedule:
        """Returns a warm-up over a tenth of the steps and a cosine decay to `floor`."""
        peak, steps = LEARNING_RATES[self.settings.model], self.settings.steps
        return optax.warmup_cosine_decay_schedule(
            0.0, peak, steps // 10, steps, floor * peak
        )

    def strength(self, peak) -> Callable:
        """Returns a silence, then a linear ramp to `peak`, which may be traced."""
        settings = self.settings
        ramp = cage.silence_then_ramp(settings.steps, 1.0, settings.silence)
        return lambda count: peak * ramp(count)

    def dose(self) -> tuple[float, str]:
        """Returns the sum of learning rate times strength, and a warning, if any."""
        settings = self.settings
        rate = self.learning_rate(settings.floor)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dose = cage.dose(rate, self.strength(settings.strength), settings.steps)
        return dose, " ".join(str(warning.message) for warning in caught)

    def optimizer(self, floor, peak) -> optax.GradientTransformationExtraArgs:
        """Returns AdamW with CAGE; with `peak` 0 it equals plain AdamW, to the bit."""
        return cage.cage_adamw(
            self.learning_rate(floor),
            self.rules,
            strength=self.strength(peak),
            b1=0.9,
            b2=0.95,
            weight_decay=0.01,
        )

    def logits(self, params: Any, pixels: jax.Array, quantized: bool) -> jax.Array:
        """Computes the network, with quantized weights and inputs or neither."""
        images = (pixels.astype(jnp.float32) / 255 - MEAN) / DEVIATION
        if not quantized:
            return self.network.plain(params, images[..., None])
        params = cage.fake_quant(params, self.rules)
        return self.network.quantized(params, images[..., None])

    def loss(self, params: Any, images: Images, quantized: bool) -> jax.Array:
        """Computes the mean cross-entropy, in nats."""
        logits = self.logits(params, images.pixels, quantized)
        labels = images.labels.astype(jnp.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def first_state(self, seed: int) -> State:
        """Returns the start of a segment without a parent."""
        params = self.network.initial(seed)
        return State(
            params,
            self.optimizer(0.0, 0.0).init(params),
            jax.tree.map(jnp.zeros_like, params),
            jnp.float32(jnp.nan),
            jnp.full([self.evaluations + 1], jnp.nan),
            jnp.full([self.evaluations + 1], jnp.nan),
        )

    def batches(self, seed: int) -> Batches:
        """Returns the training batches, the same for all arms."""
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return Batches(self.train, batch=BATCH, seed=seed, sharding=here)

    def step(self, segment: Segment, state: State, images: Images, step: int) -> State:
        """Trains for one step. All segments but the first are one compiled program."""
        floor, peak = np.float32(segment.floor), np.float32(segment.peak)
        return self._step(segment.quantized, state, images, np.int32(step), floor, peak)

    @partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
    def _step(self, quantized, state, images, step, floor, peak):
        loss, gradients = jax.value_and_grad(self.loss)(state.params, images, quantized)
        updates, optimizer = self.optimizer(floor, peak).update(
            gradients, state.optimizer, state.params
        )
        params = optax.apply_updates(state.params, updates)
        steps = self.settings.steps
        before = steps - max(1, round(AVERAGED_SHARE * steps))
        # The running mean of the last steps; 0 before them.
        weight = jnp.where(step < before, 0.0, 1 / jnp.maximum(step - before + 1, 1))
        average = jax.tree.map(lambda a, x: a + weight * (x - a), state.average, params)
        return state._replace(
            params=params, optimizer=optimizer, average=average, loss=loss
        )

    def evaluated(self, state: State, quantized: bool, number: int) -> State:
        """Returns the state with one more point of the curves."""
        loss = self.mean_scores(state.params, self.test, CURVE, quantized)[0]
        return state._replace(
            curve=state.curve.at[number].set(loss),
            distance=state.distance.at[number].set(self.distance(state.params)),
        )

    def mean_scores(self, params: Any, images: Images, most: int, quantized: bool):
        """Computes the mean loss and accuracy over the first images.

        Batches are as large as in training, since a batch may share a scale.
        """
        whole = min(most, len(images)) // BATCH * BATCH
        each = [
            self._batch_scores(params, images[i : i + BATCH], quantized)
            for i in range(0, whole, BATCH)
        ]
        return np.mean(np.asarray(each, np.float64), 0)

    @partial(jax.jit, static_argnums=(0, 3))
    def _batch_scores(self, params, images, quantized):
        logits = self.logits(params, images.pixels, quantized)
        labels = images.labels.astype(jnp.int32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        hits = jnp.argmax(logits, -1) == labels
        return loss, jnp.mean(hits, dtype=jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def distance(self, params: Any) -> jax.Array:
        """Computes the mean of ||x - Q(x)|| / ||x|| over the quantized parameters."""

        def norm(x):
            return jnp.linalg.norm(x.ravel())

        ratios = [
            norm(cage.quantization_error(x, quantizer)) / norm(x)
            for quantizer, x in self.rules.quantized(params).values()
        ]
        return jnp.mean(jnp.stack(ratios))


# --- training, with checkpoints -------------------------------------------------------


class Results(NamedTuple):
    """Results of a run.

    Attributes:
      arms: the `Scores` of each arm, one entry per seed.
      curves: by segment, (seeds, evaluations + 1): test loss and distance to the grid.
    """

    arms: dict[Arm, Scores]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]


def run(settings: Settings, console: Console) -> Results:
    """Trains all arms, with checkpoints in `settings.out`."""
    settings = settings.resolved()
    experiment = Experiment(settings)
    with RunFolder(
        settings.out, identity(experiment), resume=settings.resume
    ) as folder:
        return train(experiment, folder, console)


def identity(experiment: Experiment) -> dict[str, Any]:
    """Returns what a resumed run must share with the first; seeds may be added."""
    values = dataclasses.asdict(experiment.settings)
    for name in ("out", "resume", "data", "seeds"):
        del values[name]
    arrays = jax.tree.leaves((experiment.train, experiment.test))
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays))
    return values | {"data": digest.hexdigest()[:16]}


def train(experiment: Experiment, folder: RunFolder, console: Console) -> Results:
    """Runs all segments of all seeds, each from its newest checkpoint."""
    seeds, segments = range(experiment.settings.seeds), experiment.segments()
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    found = {
        (seed, segment.name): folder.latest_step(_checkpoint(seed, segment))
        for seed in seeds
        for segment in segments
    }
    done = sum(
        step - segment.start
        for segment in segments
        for seed in seeds
        if (step := found[seed, segment.name]) is not None
    )
    total = len(seeds) * sum(segment.stop - segment.start for segment in segments)
    scores: list[dict[Arm, tuple]] = []
    curves: dict[str, list] = {segment.name: [] for segment in segments}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=total, completed=done, status="")
        for seed in seeds:
            ends: dict[str, State] = {}
            for segment in segments:
                with folder.checkpoints(_checkpoint(seed, segment)) as checkpoints:
                    end = _train_segment(
                        experiment, seed, segment, ends, checkpoints, progress, task
                    )
                ends[segment.name] = end
                curves[segment.name].append((end.curve, end.distance))
            progress.update(task, description=f"seed {seed}", status="measuring")
            scores.append(_scores(experiment, ends))
        progress.update(task, description="done", status="")
    arms = {
        arm: Scores(*np.array([each[arm] for each in scores]).T) for arm in scores[0]
    }
    return Results(
        arms,
        {
            name: (np.array([each[0] for each in of]), np.array([d for _, d in of]))
            for name, of in curves.items()
        },
    )


def _checkpoint(seed, segment):
    return f"seed{seed}-{segment.name}"


def _train_segment(
    experiment, seed, segment, ends, checkpoints, progress, task
) -> State:
    """Trains a segment from its newest checkpoint on; returns the final state."""
    step, steps = checkpoints.latest_step(), experiment.settings.steps
    if step is not None:
        shapes = jax.eval_shape(lambda: experiment.first_state(seed))
        state = checkpoints.restore(step, shapes)
        if step < segment.stop:
            progress.console.print(
                f"seed {seed}, {segment.name} goes on from step {step}."
            )
    elif segment.parent is not None:
        step, state = segment.start, jax.tree.map(jnp.copy, ends[segment.parent])
    else:
        step, state = segment.start, experiment.first_state(seed)
        state = experiment.evaluated(state, segment.quantized, 0)
    description = f"seed {seed}, {segment.name}"
    progress.update(task, description=description, status="compiling")
    saved = shown = logged = time.monotonic()
    counted, batches = step, experiment.batches(seed).start(step)
    while step < segment.stop:
        state = experiment.step(segment, state, next(batches), step)
        step += 1
        number = step * experiment.evaluations // steps
        if number != (step - 1) * experiment.evaluations // steps:
            state = experiment.evaluated(state, segment.quantized, number)
        if time.monotonic() - shown > 1 or step == segment.stop:
            loss = float(state.loss)  # waits for steps in progress
            shown = time.monotonic()
            progress.update(task, advance=step - counted, status=f"loss {loss:.4f}")
            counted = step
            if not progress.console.is_terminal and shown - logged > LOG_SECONDS:
                progress.console.print(f"{description}, step {step}, loss {loss:.4f}")
                logged = shown
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss of {segment.name} is {loss} at step {step}. Use more "
                    f"bits, or a smaller --strength."
                )
        if step == segment.stop or time.monotonic() - saved > SAVE_SECONDS:
            checkpoints.save(step, state)
            saved = time.monotonic()
    return state


def _scores(experiment, ends) -> dict[Arm, tuple]:
    """Returns the scores of each arm of one seed."""
    measured: dict[Arm, tuple[Any, bool]] = {
        "full": (ends["full"].params, False),
        "ptq": (ends["full"].params, True),
        "ste": (ends["ste"].params, True),
        "averaged": (ends["ste"].average, True),
        "ste0": (ends["ste0"].params, True),
        "cage": (ends["cage"].params, True),
    }

    def scores(params, quantized):
        train, test = (
            experiment.mean_scores(params, images, MEASURED, quantized)
            for images in (experiment.train, experiment.test)
        )
        return train[0], test[0], test[1]

    return {arm: scores(*each) for arm, each in measured.items()}


# --- results --------------------------------------------------------------------------


def arms_table(settings: Settings, arms: dict[Arm, Scores]) -> Table:
    """Makes a table of the losses and accuracy of every arm."""
    seeds = len(arms["cage"].train_loss)
    table = Table(title=f"{settings.label}, {_seeds(seeds)}, mean ± standard error")
    table.add_column("arm")
    for name in Scores._fields:
        table.add_column(name.replace("_", " "), justify="right")
    for arm, scores in arms.items():
        table.add_row(
            ARMS[arm],
            f"{estimate(scores.train_loss):.4f}",
            f"{estimate(scores.test_loss):.4f}",
            f"{estimate(scores.test_accuracy):.1%}",
        )
    return table


def comparison_table(arms: dict[Arm, Scores]) -> Table:
    """Makes a table of CAGE against every other arm."""
    table = Table(title="CAGE - others, paired by seed (negative: CAGE is lower)")
    table.add_column("other")
    for name in ("train loss", "lower in", "test loss"):
        table.add_column(name, justify="right")
    ours = arms["cage"]
    for arm, scores in arms.items():
        if arm == "cage":
            continue
        difference = ours.train_loss - scores.train_loss
        table.add_row(
            ARMS[arm],
            f"{estimate(difference):+.4f}",
            f"{np.sum(difference < 0)} of {len(difference)}",
            f"{estimate(ours.test_loss - scores.test_loss):+.4f}",
        )
    return table


def verdict(settings: Settings, arms: dict[Arm, Scores]) -> str:
    """Says in a sentence which arms of quantized training CAGE beat."""
    parts = []
    for arm, name in {
        "ste": "plain STE",
        "averaged": "averaged STE",
        "ste0": "STE with the learning rate to 0",
    }.items():
        difference = estimate(arms["cage"].train_loss - arms[arm].train_loss)
        if math.isnan(difference.error):
            word = "has one seed, no more than a hint, against"
        elif abs(difference.mean) <= 2 * difference.error:
            word = "does not differ beyond noise from"
        else:
            word = "beats" if difference.mean < 0 else "loses to"
        parts.append(f"{word} {name} ({difference:+.4f})")
    text = f"{settings.label}, train loss: CAGE {', '.join(parts)}."
    gap = np.mean(arms["ste"].train_loss - arms["full"].train_loss)
    if gap <= 0:
        return f"{text} STE lost nothing to full precision: there was no gap to close."
    share = np.mean(arms["ste"].train_loss - arms["cage"].train_loss) / gap
    return f"{text} Of STE's gap to full precision it recovers {share:.0%}."


def _seeds(number: int) -> str:
    return f"{number} seed{'s' * (number > 1)}"


def announce(experiment: Experiment, console: Console) -> None:
    """Announces the run."""
    settings, report = experiment.settings, experiment.report
    weights = sum(row.size for row in report.rows)
    quantized = sum(row.size for row in report.rows if row.quantizer)
    steps = settings.seeds * sum(
        part.stop - part.start for part in experiment.segments()
    )
    dose, warning = experiment.dose()
    console.print(
        f"{settings.label}: {weights:,} parameters, of which {quantized / weights:.0%} "
        f"are quantized; stem, head, norms and biases are not:",
        soft_wrap=True,
        highlight=False,
    )
    for rule in experiment.rules:
        if rule.weights is not None:
            console.print(f"  {escape(str(rule))}", soft_wrap=True, highlight=False)
    minutes = {"resnet": 0.06, "vit": 0.12}[settings.model] * steps / 60
    duration = "" if settings.tiny else f", about {minutes:.0f} minutes on two cores"
    console.print(
        f"{len(experiment.train):,} images to train on, "
        f"{_seeds(settings.seeds)}, "
        f"{steps} steps of {BATCH} images in all{duration}.\n"
        f"CAGE's dose, the sum of learning rate times strength, is {dose:.2f} (the "
        f"paper's: 1.6 to 2.9).",
        soft_wrap=True,
        highlight=False,
    )
    if warning:
        console.print(f"Note: {warning}", soft_wrap=True, highlight=False)


def write_json(experiment: Experiment, results: Results, path: Path) -> None:
    """Writes the results of every seed, with the versions that produced them."""
    record = {
        "settings": identity(experiment) | {"dose": experiment.dose()[0]},
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "results": {
            arm: {name: list(values) for name, values in scores._asdict().items()}
            for arm, scores in results.arms.items()
        },
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def plot(experiment: Experiment, results: Results, path: Path) -> None:
    """Plots loss, distance to the grid, and CAGE against other arms, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = experiment.settings
    steps = settings.steps
    at = np.arange(experiment.evaluations + 1) * steps / experiment.evaluations
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(14, 4.2), layout="constrained"
    )
    colors = {"full": "0.45", "ste": "tab:blue", "ste0": "tab:green", "cage": "tab:red"}
    late = []
    for arm, color in colors.items():
        # Dashed and on top, because it coincides with CAGE before the pull.
        style = {"linestyle": "--", "zorder": 3} if arm == "ste" else {}
        for axes, values in zip((left, middle), results.curves[arm]):
            axes.plot(at, values.mean(0), color=color, label=ARMS[arm], **style)
        late.append(results.curves[arm][0].mean(0)[at >= 0.5 * steps])
    low, high = np.min(late), np.max(late)
    left.set_xlim(0.5 * steps, 1.02 * steps)
    left.set_ylim(low - 0.05 * (high - low), high + 0.25 * (high - low))
    measured = min(CURVE, len(experiment.test.labels))
    left.set(xlabel="step", ylabel=f"test loss of the first {measured} images (nat)")
    left.set_title(f"{settings.label}, mean of {_seeds(settings.seeds)}")
    middle.set(
        xlabel="step",
        ylabel="mean ||x - Q(x)|| / ||x||",
        title="distance of the weights to their grid",
    )
    for axes in (left, middle):
        pull = settings.silence * steps
        axes.axvspan(pull, steps, color="tab:red", alpha=0.07, label="CAGE pulls")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    names = {"ste": "STE", "averaged": "STE,\naveraged", "ste0": "STE,\nrate to 0"}
    for place, arm in enumerate(names):
        values = results.arms["cage"].train_loss - results.arms[arm].train_loss
        mean, error = estimate(values)
        right.plot(
            np.full(len(values), place), values, "o", color="tab:blue", alpha=0.5
        )
        right.errorbar(place + 0.15, mean, np.nan_to_num(error), fmt="ks", capsize=4)
    right.axhline(0, color="0.45", linewidth=1)
    right.set_xticks(range(len(names)), names.values())
    right.set_xlim(-0.5, len(names) - 0.5)
    right.set_ylabel("CAGE - other, train loss (nat)")
    right.set_title("paired by seed; below 0 CAGE is better")
    right.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    """Runs the program; returns the exit status."""
    console = Console()
    try:
        settings = tyro.cli(Settings, description=__doc__).resolved()
        experiment = Experiment(settings)
        with RunFolder(
            settings.out, identity(experiment), resume=settings.resume
        ) as folder:
            if settings.resume and not folder.resumed:
                console.print(
                    f"--resume finds no run in {escape(str(settings.out))}, so this "
                    f"one starts from the beginning.",
                    soft_wrap=True,
                )
            announce(experiment, console)
            results = train(experiment, folder, console)
    except (ValueError, Failed) as error:
        console.print(f"[red]error[/]: {escape(str(error))}", soft_wrap=True)
        return 1 if isinstance(error, Failed) else 2
    console.print(arms_table(settings, results.arms))
    console.print(comparison_table(results.arms))
    outcome = program.TINY if settings.tiny else verdict(settings, results.arms)
    console.print(outcome, soft_wrap=True, highlight=False)
    write_json(experiment, results, settings.out / "results.json")
    plot(experiment, results, settings.out / "curves.png")
    console.print(
        f"Figures and plot are in {escape(str(settings.out))}.", soft_wrap=True
    )
    return 0


if __name__ == "__main__":
    program.run(
        main,
        stopped="all but the last minute is saved, and --resume goes on from there.",
    )
