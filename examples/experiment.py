"""A comparison: its flags, its model and data, its arms and their segments."""

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import layout
import lm
import numpy as np
import optax
import program
from batches import Batches, Source, Windows
from flax import nnx
from jax import lax
from methods import METHODS, RIVALS, Training
from program import Limit
from sizes import SIZES
from tokens import load_tokens

import cage_jax as cage

ARMS: dict[str, str] = {
    "full": "full precision",
    "ptq": "rounded after training (PTQ)",
    "ste": "straight through (STE)",
    "averaged": "STE, last steps averaged",
    "ste0": "STE, learning rate to 0",
    "cage": "CAGE",
} | {name: METHODS[name].words for name in RIVALS}
Arm = Literal[tuple(ARMS)]  # type: ignore[valid-type]
# The arms of a run without --arms.
USUAL = tuple(arm for arm in ARMS if arm not in RIVALS)
# "averaged" takes at most this fraction of the steps, the last ones.
AVERAGED_SHARE = 0.2
# Evenly spread over the steps of a run.
EVALUATIONS = 40
VALIDATION_BATCHES = 16
# With --distill: the number of windows that the teacher generates, or fewer if the
# steps read fewer, and how many it generates at a time.
WRITTEN, WRITTEN_AT_ONCE = 2**13, 256
# The tokens that begin a generated window are found in this many tokens of the text.
LOOKED_AT = 2**24


def _nothing(text: str) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains a Llama-style language model at few bits, and compares arms."""

    size: Literal[tuple(SIZES)] | None = None  # type: ignore[valid-type]
    """Model and hyperparameters; by default demo. 30m to 800m are the CAGE paper's."""
    w_bits: int = 4
    """Bits of the weights in the layers, 1 to 8."""
    a_bits: int = 4
    """Bits of the inputs of the layers, 1 to 8, or 16 for no quantization."""
    kv_bits: int | None = None
    """Bits of attention's keys and values, 2 to 8; by default not quantized."""
    arms: tuple[Arm, ...] = USUAL
    """Arms to compare; by default without rivals and other settings of CAGE."""
    text: tuple[Path, ...] = ()
    """Text files to train on; by default the sources of Python's standard library."""
    dataset: str | None = None
    """A Hugging Face dataset to train on: a name or a folder."""
    limit: int | None = None
    """Largest number of bytes to read from --dataset; by default 1 GB."""
    vocabulary: int = 256
    """256 for bytes; more for a byte-level BPE of that size, trained on the text."""
    cache: Path = Path("runs/tokens")
    """Folder that caches the tokens."""
    layers: int | None = None
    """Transformer blocks of the model; by default the size's."""
    steps: int | None = None
    """Optimizer steps; by default the size's."""
    batch: int | None = None
    """Windows per step; by default the size's."""
    sequence: int | None = None
    """Tokens per window; by default the size's."""
    microbatch: int | None = None
    """Windows per microbatch, for gradient accumulation; by default the size's."""
    learning_rate: float | None = None
    """Peak of the learning rate; by default the size's."""
    floor: float = 0.1
    """Final learning rate of the cosine decay, as a fraction of the peak."""
    strength: float = 10.0
    """Peak of CAGE's strength, reached at the last step."""
    silence: float = 0.8
    """Fraction of the steps without correction."""
    recommended: bool = False
    """Use cage.recommended instead of --strength and --silence."""
    distill: bool = False
    """Distill the full-precision model as in LLM-QAT, from its weights, on its text."""
    stochastic: bool = False
    """Round the weights stochastically in training."""
    max_skipped: int = 100
    """Steps in a row without a finite loss and gradient that end the run."""
    seed: int = 0
    """Seed of the initial weights, the batches and stochastic rounding."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute dtype; by default the size's. Parameters are float32."""
    devices: int | None = None
    """Number of devices to use; by default all."""
    model_devices: int = 1
    """Devices that share a product (tensor parallel); the others split batches."""
    cluster: bool = False
    """Join the processes that Cloud TPU, Slurm or Kubernetes started."""
    out: Path = Path("runs/lm")
    """Folder for checkpoints, table, plot and codes."""
    save_seconds: float = 60.0
    """Seconds between checkpoints; a killed run loses at most that."""
    resume: bool = False
    """Resume the run in --out."""
    tiny: bool = False
    """Check that everything works, with a model of one layer for 60 steps."""

    def resolved(self) -> "Settings":
        """Returns the settings with the size's values in place of None; checks all."""
        if self.tiny and self.size not in (None, "tiny"):
            raise ValueError(
                f"`--tiny` must come without --size, which it would ignore; got --size "
                f"{self.size}. Leave one of them out."
            )
        name = "tiny" if self.tiny else self.size or "demo"
        size = SIZES[name]
        chosen = {
            field: value
            for field, value in dataclasses.asdict(size).items()
            if getattr(self, field, value) is None
        }
        settings = dataclasses.replace(self, size=name, **chosen)
        program.check(settings, LIMITS)
        settings = program.with_recommended(settings)
        if self.distill and set(self.arms) <= {"full", "ptq"}:
            raise ValueError(
                f"`--distill` must have an arm that is trained quantized; got --arms "
                f"{' '.join(self.arms)}. Add ste or cage, or leave --distill out."
            )
        microbatch = min(settings.microbatch, settings.batch)
        if settings.batch % microbatch:
            raise ValueError(
                f"`--microbatch` must divide --batch; got {microbatch} and "
                f"{settings.batch}. Use a divisor."
            )
        return dataclasses.replace(settings, microbatch=microbatch)


LIMITS = (
    program.STEPS,
    *(
        Limit(field, lambda n: n is None or n >= 1, "positive", "Leave it out.")
        for field in ("layers", "batch", "sequence", "microbatch", "devices")
    ),
    *(
        Limit(field, lambda count: count >= 1, "positive", "Use 1 or more.")
        for field in ("model_devices", "max_skipped")
    ),
    Limit(
        "save_seconds",
        lambda seconds: 0 <= seconds < math.inf,
        "finite and not negative",
        "Use 60 for one a minute.",
    ),
    Limit(
        "learning_rate",
        lambda rate: 0 < rate < math.inf,
        "positive and finite",
        "Leave it out for the size's own.",
    ),
    Limit(
        "w_bits",
        lambda bits: 1 <= bits <= 8,
        "from 1 to 8",
        "Unquantized weights are the arm full.",
    ),
    Limit(
        "a_bits",
        lambda bits: 1 <= bits <= 8 or bits == 16,
        "from 1 to 8, or 16 for none",
        "The paper uses as many as for weights.",
    ),
    Limit(
        "kv_bits",
        lambda bits: bits is None or 2 <= bits <= 8,
        "from 2 to 8",
        "Leave it out to leave keys and values alone.",
    ),
    program.STRENGTH,
    program.SILENCE,
    program.FLOOR,
    Limit("arms", bool, f"some of {' '.join(ARMS)}", "Leave it out for all."),
    program.OUT,
)


class State(NamedTuple):
    """The state from which a segment continues."""

    params: Any
    optimizer: Any
    average: Any  # of the parameters over the last steps, if the segment has one
    key: jax.Array  # of stochastic rounding, as key data
    losses: jax.Array  # (steps,) training loss; NaN for steps to come
    validation: jax.Array  # (EVALUATIONS + 1,) validation loss, likewise
    distance: jax.Array  # (EVALUATIONS + 1,) mean of ||x - Q(x)|| / ||x||, likewise


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive steps of an arm; `parent` is the segment that it continues.

    The final state of `teacher`, if any, is the model to distill, and also the start if
    there is no parent. `weights(parameters, step, key)` returns the weights of the loss
    if those are not the quantized ones.
    """

    name: str
    start: int
    stop: int
    quantized: bool
    optimizer: optax.GradientTransformationExtraArgs
    parent: "Segment | None" = None
    averages: bool = False
    teacher: "Segment | None" = None
    weights: Callable[[Any, jax.Array, jax.Array], Any] | None = None


class Experiment:
    """The model, its data and its arms on a mesh of devices, for one seed."""

    def __init__(self, settings: Settings, say: Callable[[str], None] = _nothing):
        self.settings = settings
        size = dataclasses.replace(
            SIZES[settings.size], dtype=settings.dtype, layers=settings.layers
        )
        self.mesh = _mesh(settings)
        self.tokens = load_tokens(
            text=settings.text,
            dataset=settings.dataset,
            limit=settings.limit,
            vocabulary=settings.vocabulary,
            cache=settings.cache,
            sequence=settings.sequence,
            say=say,
        )
        self.model = lm.LanguageModel(
            size,
            w_bits=settings.w_bits,
            a_bits=settings.a_bits,
            kv_bits=settings.kv_bits,
            microbatch=settings.microbatch,
            seed=settings.seed,
            vocabulary=settings.vocabulary,
            stochastic=settings.stochastic,
        )
        shapes = jax.eval_shape(self.model.initial_params)
        self.report = self.model.rules.report(shapes)
        self.segments = self._segments()

    def learning_rate(self, floor: float) -> optax.Schedule:
        """Returns a warm-up over a tenth of the steps and a cosine decay to `floor`."""
        settings = self.settings
        return lm.learning_rate(settings.learning_rate, settings.steps, floor)

    def correction(self) -> dict[str, Any]:
        """Returns CAGE's strength by step, and its curvature, if any."""
        settings = self.settings
        if settings.recommended:
            rate = self.learning_rate(settings.floor)
            return cage.recommended(rate, settings.steps, silence=settings.silence)
        strength = cage.silence_then_ramp(
            settings.steps, settings.strength, settings.silence
        )
        return {"strength": strength}

    def dose(self) -> float:
        """Returns the sum of learning rate times strength."""
        rate = self.learning_rate(self.settings.floor)
        return cage.dose(rate, self.correction()["strength"], self.settings.steps)

    def _optimizer(self, floor, **correction):
        return self.model.optimizer(self.learning_rate(floor), **correction)

    def _segments(self) -> list[Segment]:
        """Returns the segments that the arms need, parents before children."""
        steps, floor = self.settings.steps, self.settings.floor
        correction = self.correction()
        branch = int(self.settings.silence * steps)
        pulled = self._optimizer(floor, **correction)
        # The steps before the branch also keep the state of the curvature.
        plain = self._optimizer(floor, **correction | {"strength": 0.0})
        full = Segment("full", 0, steps, False, self._optimizer(floor, strength=0.0))
        teacher = full if self.settings.distill else None
        taught = partial(Segment, quantized=True, teacher=teacher)
        trunk = taught("trunk", 0, branch, optimizer=plain)
        ste = taught("ste", branch, steps, optimizer=plain, parent=trunk, averages=True)
        pull = taught("cage", branch, steps, optimizer=pulled, parent=trunk)
        rivals = [name for name in RIVALS if name in self.settings.arms]
        needed = {name: [self._rival(name, taught)] for name in rivals} | {
            "full": [full],
            "ptq": [full],
            "ste": [trunk, ste],
            "averaged": [trunk, ste],
            "cage": [trunk, pull],
            "ste0": [
                taught("ste0", 0, steps, optimizer=self._optimizer(0.0, strength=0.0))
            ],
        }
        chosen = [
            segment
            for arm in ARMS
            if arm in self.settings.arms
            for part in needed[arm]
            for segment in (part.teacher, part)
            if segment is not None
        ]
        return list(dict.fromkeys(chosen))

    def _rival(self, name, taught) -> Segment:
        """Returns a segment with all steps of another method."""
        settings, method = self.settings, METHODS[name]
        rate, rules = self.learning_rate(settings.floor), self.model.rules

        def training(base):
            return Training(rules, settings.steps, rate, base)

        def adamw(rate, **options):
            return method.optimizer(training(optax.adamw(rate, **options)))

        weights = partial(method.weights, training(optax.identity()))
        optimizer = lm.optimizer_of(adamw, rate)
        return taught(name, 0, settings.steps, optimizer=optimizer, weights=weights)

    def first_state(self, segment: Segment, teacher: Any = None) -> State:
        """Returns the start of a segment without a parent: the teacher, if any.

        Its arrays are not shared with the teacher.
        """
        params = self.model.initial_params() if teacher is None else _copy(teacher)
        return State(
            params,
            segment.optimizer.init(params),
            _copy(params) if segment.averages else None,
            jax.random.key_data(jax.random.key(self.settings.seed)),
            jnp.full([self.settings.steps], jnp.nan),
            jnp.full([EVALUATIONS + 1], jnp.nan),
            jnp.full([EVALUATIONS + 1], jnp.nan),
        )

    def abstract_state(self, segment: Segment) -> State:
        """Returns the shapes, dtypes and shardings of a segment's state."""
        shapes = jax.eval_shape(lambda: self.first_state(segment))
        return layout.placed(shapes, self.mesh)

    def start(self, segment: Segment, teacher: Any = None) -> State:
        """Computes `first_state` directly on the mesh."""
        places = layout.shardings_of(self.abstract_state(segment))
        make = jax.jit(partial(self.first_state, segment), out_shardings=places)
        return make(teacher)

    def branch(self, segment: Segment, end: State) -> State:
        """Returns the start of a segment, from a copy of its parent's final state."""
        start = _copy(end)
        if segment.averages:
            start = start._replace(average=_copy(end.params))
        return start

    def step_of(self, segment: Segment) -> Callable:
        """Returns the jitted `(state, windows, step) -> state` of a segment.

        With a teacher, its parameters are one more argument.
        """
        places = layout.shardings_of(self.abstract_state(segment))
        learn = self.model.step(segment.optimizer)

        @partial(jax.jit, donate_argnums=0, out_shardings=places)
        def run(state: State, windows, step, teacher=None) -> State:
            key, drawn = state.key, None
            if segment.quantized and self.settings.stochastic:
                key, drawn = jax.random.split(jax.random.wrap_key_data(key))
                key = jax.random.key_data(key)
            weights = None
            if segment.weights is not None:
                own = jax.random.fold_in(jax.random.key(self.settings.seed), step)
                weights = partial(segment.weights, step=step, key=own)
            before = state.params, state.optimizer
            (params, optimizer), loss = learn(
                before, windows, segment.quantized, teacher, drawn, weights
            )
            average = state.average
            if segment.averages:
                steps = self.settings.steps
                first = max(segment.start, steps - int(AVERAGED_SHARE * steps))
                count = jnp.maximum(step - first + 1, 1)
                weight = 1 / count.astype(jnp.float32)
                average = jax.tree.map(
                    lambda a, x: a + weight * (x - a), average, params
                )
            losses = state.losses.at[step].set(loss)
            return state._replace(
                params=params,
                optimizer=optimizer,
                average=average,
                key=key,
                losses=losses,
            )

        return run

    def batches(self, source: Source) -> Batches:
        """Returns the training batches: windows of the text or of a teacher's text."""
        settings = self.settings
        return Batches(
            source,
            batch=settings.batch,
            seed=settings.seed,
            sharding=layout.batch_sharding(self.mesh),
        )

    @property
    def unit(self) -> str:
        """Name of a token in messages."""
        return "byte" if self.settings.vocabulary == 256 else "token"

    @property
    def text(self) -> Windows:
        """Windows of the training text."""
        return Windows(self.tokens.train, self.settings.sequence)

    @partial(jax.jit, static_argnums=0)
    def rounded(self, params: Any) -> Any:
        """Returns the parameters with quantized weights."""
        return cage.fake_quant(params, self.model.rules)

    def validation_loss(self, weights: Any, quantized: bool) -> float:
        """Computes the mean loss on fixed windows of the held-out text.

        The weights are used as given; `quantized` says whether inputs are quantized.
        """
        losses = [self._loss(weights, windows, quantized) for windows in self._held_out]
        return float(np.mean([float(loss) for loss in losses]))

    @functools.cached_property
    def _held_out(self) -> list[jax.Array]:
        batches = Batches(
            Windows(self.tokens.held_out, self.settings.sequence),
            batch=self.settings.microbatch,
            seed=0,
            sharding=layout.batch_sharding(self.mesh),
        )
        return [batches[step] for step in range(VALIDATION_BATCHES)]

    @partial(jax.jit, static_argnums=(0, 3))
    def _loss(self, weights, windows, quantized):
        return self.model.cross_entropy(weights, windows, quantized)

    @property
    def written(self) -> tuple[int, int]:
        """Number and length of the windows that the teacher generates."""
        settings = self.settings
        windows = min(settings.steps * settings.batch, WRITTEN)
        return windows, settings.sequence + 1

    def write(self, weights: Any, part: int) -> jax.Array:
        """Generates `WRITTEN_AT_ONCE` windows with the full-precision model.

        Each starts with another token of the text. The next 3 to 5 tokens are the most
        likely ones, so that the text makes sense; the others are drawn, so that windows
        differ.
        """
        there = np.unique(self.tokens.train[:LOOKED_AT])
        window = part * WRITTEN_AT_ONCE + np.arange(WRITTEN_AT_ONCE)
        first = there[window % len(there)].astype(np.int32)
        likely = 3 + window // len(there) % 3
        key = jax.random.fold_in(jax.random.key(self.settings.seed), part)
        return self._write(weights, first, likely, key)

    @partial(jax.jit, static_argnums=0)
    def _write(self, weights, first, likely, key):
        model = nnx.merge(self.model.graphs[False], weights)
        length = self.settings.sequence

        def one_more(carry, place):
            tokens, caches = carry
            logits, caches = model.decode(tokens, caches)
            drawn = jax.random.categorical(jax.random.fold_in(key, place), logits)
            best = jnp.argmax(logits, axis=-1)
            tokens = jnp.where(place < likely, best, drawn).astype(jnp.int32)
            return (tokens, caches), tokens

        start = (first, model.empty_caches(len(first), length))
        _, rest = lax.scan(one_more, start, jnp.arange(length))
        written = jnp.concatenate([first[None], rest]).T
        # Every process keeps all of them.
        whole = layout.everywhere(self.mesh)
        written = lax.with_sharding_constraint(written, whole)
        return written.astype(self.tokens.train.dtype)

    @partial(jax.jit, static_argnums=0)
    def distance(self, params: Any) -> jax.Array:
        """Computes the mean of ||x - Q(x)|| / ||x|| over the quantized parameters."""
        ratios = [
            jnp.linalg.norm(cage.quantization_error(x, quantizer)) / jnp.linalg.norm(x)
            for quantizer, x in self.model.rules.quantized(params).values()
        ]
        return jnp.mean(jnp.stack(ratios))


def _mesh(settings):
    """Makes the mesh of the requested devices; checks that it divides the batches."""
    devices = jax.devices()
    if settings.devices not in (None, len(devices)):
        if settings.devices > len(devices):
            raise ValueError(
                f"`--devices` must be at most the {len(devices)} that there are; got "
                f"{settings.devices}. Leave it out for all."
            )
        if jax.process_count() > 1:
            raise ValueError(
                f"`--devices` must be all {len(devices)} where several processes run; "
                f"got {settings.devices}. Leave it out, or start fewer processes."
            )
        devices = devices[: settings.devices]
    mesh = layout.mesh_of(devices, settings.model_devices)
    layout.check_batch(settings.batch, settings.microbatch, mesh)
    return mesh


def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


def identity(experiment: Experiment) -> dict[str, Any]:
    """Returns what a resumed run must share; arms and devices may differ."""
    settings = dataclasses.asdict(experiment.settings)
    for name in ("out", "resume", "arms", "tiny", "text", "dataset", "cache", "limit"):
        del settings[name]
    for name in ("devices", "model_devices", "cluster", "max_skipped", "save_seconds"):
        del settings[name]
    rules = str(experiment.model.rules)
    return settings | {"text": experiment.tokens.identity, "rules": rules}
