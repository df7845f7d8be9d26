"""Trains a Llama-style language model at few bits and shows what CAGE buys.

All arms share the initial weights, the batches and, where CAGE is still silent, the
very same steps. Run `python examples/train_lm.py --tiny` for a minute's worth.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import program
from program import Limit

with program.imports(__name__):
    import jax
    import jax.numpy as jnp
    import lm
    import numpy as np
    import optax
    import orbax.checkpoint as ocp
    import tyro
    from checkpoints import RunFolder
    from flax import nnx
    from jax import lax
    from llama import SIZES
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
    from text import batch_at, load_text

    import cage_jax as cage

Arm = Literal["full", "ptq", "ste", "averaged", "ste0", "cage"]
ARMS: dict[Arm, str] = {
    "full": "full precision",
    "ptq": "rounded after training (PTQ)",
    "ste": "straight through (STE)",
    "averaged": "STE, last steps averaged",
    "ste0": "STE, learning rate to 0",
    "cage": "CAGE",
}
# Checkpoints are this many seconds apart at most, evaluations a share of the steps.
SAVE_SECONDS = 60
# Where there is no terminal for a bar, a line says how far it is as often.
LOG_SECONDS = 30
EVALUATIONS = 40
VALIDATION_BATCHES = 16
# With --distill: windows that the teacher writes, or fewer if the steps read fewer, and
# how many at a time.
WRITTEN, WRITTEN_AT_ONCE = 2**13, 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains a Llama-style byte-level language model at few bits, and compares arms."""

    size: Literal[tuple(SIZES)] | None = None  # type: ignore[valid-type]
    """Model and hyperparameters, by default demo; 30m to 800m are the CAGE paper's."""
    w_bits: int = 4
    """Bits of the weights in the layers, 1 to 8."""
    a_bits: int = 4
    """Bits of the inputs of the layers, 1 to 8, or 16 to leave them alone."""
    kv_bits: int | None = None
    """Bits of the keys and values in attention, 2 to 8; by default left alone."""
    arms: tuple[Arm, ...] = tuple(ARMS)
    """What to compare."""
    text: tuple[Path, ...] = ()
    """Text files to train on; by default the sources of Python's standard library."""
    steps: int | None = None
    """Optimizer steps; by default the size's."""
    batch: int | None = None
    """Windows a step; by default the size's."""
    sequence: int | None = None
    """Bytes a window; by default the size's."""
    microbatch: int | None = None
    """Windows at a time, gradients being summed; by default the size's."""
    learning_rate: float | None = None
    """Peak of the learning rate; by default the size's."""
    floor: float = 0.1
    """Share of the peak at which the cosine ends."""
    strength: float = 10.0
    """Peak of CAGE's strength, reached at the last step."""
    silence: float = 0.8
    """Share of the steps without correction."""
    distill: bool = False
    """Learn as LLM-QAT: from the end of full precision on, its logits, its own text."""
    seed: int = 0
    """Of the initial weights and the batches."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of computation; parameters are float32. By default the size's."""
    out: Path = Path("runs/lm")
    """Folder for checkpoints, table, plot and codes."""
    resume: bool = False
    """Go on with the run in --out."""
    tiny: bool = False
    """A model of one layer for 60 steps, to see that everything works."""

    def resolved(self) -> "Settings":
        """With the size's values in place of None, after checking them all."""
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
        Limit(field, lambda count: count >= 1, "positive", "Leave it out.")
        for field in ("batch", "sequence", "microbatch")
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


# --- what is trained: the model, its rules, its optimizers ----------------------------


class State(NamedTuple):
    """All that a segment goes on from."""

    params: Any
    optimizer: Any
    average: Any  # of the parameters over the last steps
    losses: jax.Array  # (steps,) training loss; NaN where there is none yet
    validation: jax.Array  # (EVALUATIONS + 1,) validation loss, likewise
    distance: jax.Array  # (EVALUATIONS + 1,) mean of ||x - Q(x)|| / ||x||, likewise


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of steps; `parent` is the segment whose end it goes on from.

    It learns from the end of `teacher`, and without a parent starts there.
    """

    name: str
    start: int
    stop: int
    quantized: bool
    optimizer: optax.GradientTransformationExtraArgs
    parent: "Segment | None" = None
    averages: bool = False
    teacher: "Segment | None" = None


class Experiment:
    """The model, its data and its arms, for one seed."""

    def __init__(self, settings: Settings):
        self.settings = settings
        size = dataclasses.replace(SIZES[settings.size], dtype=settings.dtype)
        self.train, self.held_out = load_text(list(settings.text), settings.sequence)
        self.model = lm.LanguageModel(
            size,
            w_bits=settings.w_bits,
            a_bits=settings.a_bits,
            kv_bits=settings.kv_bits,
            microbatch=settings.microbatch,
            seed=settings.seed,
        )
        shapes = jax.eval_shape(self.model.initial_params)
        self.report = self.model.rules.report(shapes)
        self.segments = self._segments()

    def learning_rate(self, floor: float) -> optax.Schedule:
        """Warm-up over a tenth of the steps, then a cosine to `floor` of the peak."""
        settings = self.settings
        return lm.learning_rate(settings.learning_rate, settings.steps, floor)

    def strength(self) -> Callable:
        """CAGE's strength over the steps."""
        settings = self.settings
        return cage.silence_then_ramp(
            settings.steps, settings.strength, settings.silence
        )

    def dose(self) -> float:
        """The sum of learning rate times strength."""
        rate = self.learning_rate(self.settings.floor)
        return cage.dose(rate, self.strength(), self.settings.steps)

    def _optimizer(self, strength, floor):
        return self.model.optimizer(self.learning_rate(floor), strength)

    def _segments(self) -> list[Segment]:
        """The stretches that the arms need, a parent before its children."""
        steps, floor = self.settings.steps, self.settings.floor
        branch = int(self.settings.silence * steps)
        plain, pulled = (
            self._optimizer(0.0, floor),
            self._optimizer(self.strength(), floor),
        )
        full = Segment("full", 0, steps, False, plain)
        teacher = full if self.settings.distill else None
        taught = partial(Segment, quantized=True, teacher=teacher)
        trunk = taught("trunk", 0, branch, optimizer=plain)
        ste = taught("ste", branch, steps, optimizer=plain, parent=trunk, averages=True)
        pull = taught("cage", branch, steps, optimizer=pulled, parent=trunk)
        needed = {
            "full": [full],
            "ptq": [full],
            "ste": [trunk, ste],
            "averaged": [trunk, ste],
            "cage": [trunk, pull],
            "ste0": [taught("ste0", 0, steps, optimizer=self._optimizer(0.0, 0.0))],
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

    def first_state(self, segment: Segment, teacher: Any = None) -> State:
        """Where a segment without a parent starts: at the teacher's parameters, if any.

        Nothing in it is shared with the teacher.
        """
        params = self.model.initial_params()
        if teacher is not None:
            params = jax.tree.map(jnp.copy, teacher)
        return State(
            params,
            segment.optimizer.init(params),
            jax.tree.map(jnp.copy, params),
            jnp.full([self.settings.steps], jnp.nan),
            jnp.full([EVALUATIONS + 1], jnp.nan),
            jnp.full([EVALUATIONS + 1], jnp.nan),
        )

    def step_of(self, segment: Segment) -> Callable:
        """The jitted `(state, windows, step) -> state` of a segment.

        With a teacher its parameters are one more argument.
        """

        @partial(jax.jit, donate_argnums=0)
        def run(state: State, windows, step, teacher=None) -> State:
            loss, gradients = self.model.gradient(
                state.params, windows, segment.quantized, teacher
            )
            updates, optimizer = segment.optimizer.update(
                gradients, state.optimizer, state.params
            )
            params = optax.apply_updates(state.params, updates)
            average = state.average
            if segment.averages:
                weight = 1 / (step - segment.start + 1).astype(jnp.float32)
                average = jax.tree.map(
                    lambda a, x: a + weight * (x - a), average, params
                )
            losses = state.losses.at[step].set(loss)
            return state._replace(
                params=params, optimizer=optimizer, average=average, losses=losses
            )

        return run

    @partial(jax.jit, static_argnums=0)
    def rounded(self, params: Any) -> Any:
        """The parameters with quantized weights."""
        return cage.fake_quant(params, self.model.rules)

    def validation_loss(self, weights: Any, quantized: bool) -> jax.Array:
        """Mean loss on fixed windows of the text held out.

        The weights are taken as they are; `quantized` says whether inputs are rounded.
        """
        settings = self.settings
        windows = [
            batch_at(self.held_out, 2**32, i, settings.microbatch, settings.sequence)
            for i in range(VALIDATION_BATCHES)
        ]
        return self._mean_loss(weights, jnp.asarray(np.stack(windows)), quantized)

    @partial(jax.jit, static_argnums=(0, 3))
    def _mean_loss(self, weights, windows, quantized):
        def one(_, part):
            return None, self.model.cross_entropy(weights, part, quantized)

        return jnp.mean(lax.scan(one, None, windows)[1])

    @property
    def written(self) -> tuple[int, int]:
        """How many windows the teacher writes, and how long."""
        settings = self.settings
        windows = min(settings.steps * settings.batch, WRITTEN)
        return windows, settings.sequence + 1

    def write(self, weights: Any, part: int) -> jax.Array:
        """Windows that the model of full precision writes, `WRITTEN_AT_ONCE` of them.

        Each starts with another byte of the text, then come the 3 to 5 most likely
        ones, so that it makes sense, then bytes are drawn, so that windows differ.
        """
        bytes_there = np.unique(self.train)
        window = part * WRITTEN_AT_ONCE + np.arange(WRITTEN_AT_ONCE)
        first = bytes_there[window % len(bytes_there)].astype(np.int32)
        likely = 3 + window // len(bytes_there) % 3
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
        return jnp.concatenate([first[None], rest]).T.astype(jnp.uint8)

    @partial(jax.jit, static_argnums=0)
    def distance(self, params: Any) -> jax.Array:
        """Mean over the quantized parameters of ||x - Q(x)|| / ||x||."""
        ratios = [
            jnp.linalg.norm(cage.quantization_error(x, quantizer)) / jnp.linalg.norm(x)
            for quantizer, x in self.model.rules.quantized(params).values()
        ]
        return jnp.mean(jnp.stack(ratios))


# --- training, and stopping at any moment ---------------------------------------------


class Stopped(Exception):  # noqa: N818 - not an error
    """The user, or the system, asked the run to stop; a checkpoint is written."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = program.STOPPED if signal_number == signal.SIGINT else 0


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that gets the number of a signal that asks to stop; a second one stops."""
    requests: list[int] = []

    def ask(number, frame):
        if requests:
            raise KeyboardInterrupt
        requests.append(number)
        # Not print, which fails where the signal comes while it prints.
        os.write(2, b"stopping; the steps so far are being saved\n")

    before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    experiment: Experiment, folder: RunFolder, console: Console
) -> dict[str, State]:
    """Runs all segments, each from its newest checkpoint; the state at the ends."""
    ends: dict[str, State] = {}
    columns = (
        TextColumn("{task.description:<6}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with _stop_requests() as stop, Progress(*columns, console=console) as progress:
        for segment in experiment.segments:
            ends[segment.name] = _train_segment(
                experiment, segment, ends, folder, progress, stop
            )
    return ends


def _train_segment(experiment, segment, ends, folder, progress, stop) -> State:
    taught, written = {}, None
    if segment.teacher is not None:
        taught = {"teacher": ends[segment.teacher.name].params}
        written = _written(experiment, taught["teacher"], folder, progress, stop)
    shapes = jax.eval_shape(lambda: experiment.first_state(segment))
    step = folder.latest_step(segment.name)
    if step is not None:
        state = folder.restore(segment.name, step, shapes)
    elif segment.parent is not None:
        step, state = segment.start, jax.tree.map(jnp.copy, ends[segment.parent.name])
    else:
        step, state = 0, experiment.first_state(segment, **taught)
        state = jax.block_until_ready(_evaluated(experiment, segment, 0, state))
    total = segment.stop - segment.start
    status = "done" if step == segment.stop else "compiling"
    task = progress.add_task(
        segment.name, total=total, completed=step - segment.start, status=status
    )
    run = experiment.step_of(segment)
    settings = experiment.settings
    saved = logged = time.monotonic()
    shown, shown_step = time.monotonic(), step
    while step < segment.stop:
        windows = _windows(experiment, written, step)
        state = run(state, windows, jnp.int32(step), **taught)
        step += 1
        due = _evaluation(settings.steps, step)
        if due is not None:
            # The rate is that of the steps, which may still be under way here.
            jax.block_until_ready(state)
            paused = time.monotonic()
            state = jax.block_until_ready(_evaluated(experiment, segment, due, state))
            shown += time.monotonic() - paused
        if time.monotonic() - shown > 1 or step == segment.stop:
            loss = float(state.losses[step - 1])  # waits for the steps under way
            now = time.monotonic()
            rate = (step - shown_step) / (now - shown)
            status = f"loss {loss:.4f}  {rate:.1f} steps/s"
            progress.update(task, completed=step - segment.start, status=status)
            if not progress.console.is_terminal and now - logged > LOG_SECONDS:
                progress.console.print(f"{segment.name}  step {step}  {status}")
                logged = now
            shown, shown_step = now, step
            if not np.isfinite(loss):
                raise ValueError(
                    f"the loss of {segment.name} is {loss} at step {step}. Lower "
                    f"--learning-rate, or use more bits."
                )
        if stop or step == segment.stop or time.monotonic() - saved > SAVE_SECONDS:
            folder.save(segment.name, step, state)
            saved = time.monotonic()
            if stop:
                raise Stopped(stop[0])
    return state


def _windows(experiment, written, step):
    """The batch of a step: windows of the text, or of those that the teacher wrote."""
    settings = experiment.settings
    if written is None:
        source, length = experiment.train, settings.sequence
    else:
        source, length = np.arange(len(written)), 0
    drawn = batch_at(source, settings.seed, step, settings.batch, length)
    return drawn if written is None else written[drawn[:, 0]]


def _written(experiment, teacher, folder, progress, stop) -> np.ndarray:
    """What the teacher writes to learn from, once in a run."""
    path, (windows, length) = folder.folder / "written.npy", experiment.written
    if path.exists():
        return _read_written(path, (windows, length))
    task = progress.add_task("text", total=windows, completed=0, status="writing")
    parts: list[np.ndarray] = []
    while (done := sum(map(len, parts))) < windows:
        parts.append(np.asarray(experiment.write(teacher, len(parts))))
        progress.update(task, completed=min(done + len(parts[-1]), windows))
        if stop:
            raise Stopped(stop[0])
    text = np.concatenate(parts)[:windows]
    # Whole or not at all.
    with open(path.with_suffix(".part"), "wb") as file:
        np.save(file, text)
    path.with_suffix(".part").replace(path)
    progress.update(task, status="done")
    return text


def _read_written(path, shape):
    try:
        text = np.load(path)
        if (text.shape, text.dtype) != (shape, np.uint8):
            raise ValueError(f"it has {text.dtype} of shape {text.shape}, not {shape}")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"`--resume` needs the whole text that the teacher wrote; cannot read "
            f"{path}: {error}. Remove that file to have it written again."
        ) from error
    return text


def _evaluation(steps, step):
    """The number of the evaluation that is due after `step` steps, or None."""
    number = step * EVALUATIONS // steps
    return number if number != (step - 1) * EVALUATIONS // steps else None


def _evaluated(experiment, segment, number, state):
    weights = experiment.rounded(state.params) if segment.quantized else state.params
    loss = experiment.validation_loss(weights, segment.quantized)
    return state._replace(
        validation=state.validation.at[number].set(loss),
        distance=state.distance.at[number].set(experiment.distance(state.params)),
    )


# --- results --------------------------------------------------------------------------


class Result(NamedTuple):
    """What one arm came to; `weights` are those its loss was measured with."""

    loss: float
    params: Any
    weights: Any
    history: State


def results_of(experiment: Experiment, ends: dict[str, State]) -> dict[str, Result]:
    """The final validation loss of each arm that was asked for."""
    results = {}
    for arm in ARMS:
        if arm not in experiment.settings.arms:
            continue
        state = ends[{"ptq": "full", "averaged": "ste"}.get(arm, arm)]
        params = state.average if arm == "averaged" else state.params
        weights = params if arm == "full" else experiment.rounded(params)
        loss = float(experiment.validation_loss(weights, quantized=arm != "full"))
        results[arm] = Result(loss, params, weights, state)
    return results


def run(settings: Settings, console: Console) -> dict[str, Result]:
    """Trains all arms, with checkpoints in `settings.out`."""
    settings = settings.resolved()
    experiment = Experiment(settings)
    folder = RunFolder(settings.out, _identity(experiment), resume=settings.resume)
    return results_of(experiment, train(experiment, folder, console))


def _identity(experiment: Experiment) -> dict[str, Any]:
    """What must not change when a run goes on. Arms may be added."""
    identity = dataclasses.asdict(experiment.settings)
    for name in ("out", "resume", "arms", "tiny", "text"):
        del identity[name]
    for name in ("kv_bits", "distill"):
        if not identity[name]:  # so runs of before these flags can go on
            del identity[name]
    text = hashlib.sha256(experiment.train.tobytes() + experiment.held_out.tobytes())
    return identity | {"text": text.hexdigest()[:16]}


def check_codes(experiment: Experiment, result: Result, path: Path) -> dict[str, Any]:
    """Writes the codes of an arm, reads them back, and compares what they stand for."""
    codes = cage.quantize(result.params, experiment.model.rules)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.resolve(), codes, force=True)
    with ocp.StandardCheckpointer() as checkpointer:
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, codes)
        loaded = checkpointer.restore(path.resolve(), shapes)
    weights = cage.dequantize(loaded)
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), weights, result.weights)
    return {
        "path": str(path),
        "loss": float(experiment.validation_loss(weights, quantized=True)),
        "weights_equal": all(jax.tree.leaves(equal)),
    }


def summary(experiment: Experiment, results: dict[str, Result]) -> list[dict[str, Any]]:
    """A row an arm: loss, gap, share recovered if STE lost anything, dose, size."""
    losses = {arm: result.loss for arm, result in results.items()}
    full, ste = losses.get("full"), losses.get("ste")
    rows = []
    for arm, loss in losses.items():
        gap = None if full is None else loss - full
        recovered = None
        lost = full is not None and ste is not None and ste > full
        if lost and arm not in ("full", "ste"):
            recovered = (ste - loss) / (ste - full)
        report = experiment.report
        size = report.bytes_before if arm == "full" else report.bytes_after
        rows.append(
            {
                "arm": arm,
                "validation_loss": loss,
                "gap_to_full": gap,
                "share_recovered": recovered,
                "dose": experiment.dose() if arm == "cage" else 0.0,
                "size_mb": size / 1e6,
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]], settings: Settings) -> Table:
    """The summary for people."""
    table = Table(title=f"{_kind(settings)}, {settings.steps} steps")
    table.add_column("arm")
    for name in ("validation loss", "gap to full", "recovered of STE's", "dose", "MB"):
        table.add_column(name, justify="right")

    def show(value, form):
        return "" if value is None else format(value, form)

    for row in rows:
        table.add_row(
            ARMS[row["arm"]],
            show(row["validation_loss"], ".4f"),
            show(row["gap_to_full"], "+.4f"),
            show(row["share_recovered"], ".0%"),
            show(row["dose"] or None, ".2f"),
            show(row["size_mb"], ".2f"),
        )
    return table


def _kind(settings: Settings) -> str:
    """What is quantized, and how it is trained, in short."""
    kv = "" if settings.kv_bits is None else f"KV{settings.kv_bits}"
    distilled = ", distilled" if settings.distill else ""
    return f"W{settings.w_bits}A{settings.a_bits}{kv}{distilled}"


def verdict(results: dict[str, Result]) -> str:
    """In a sentence, whether CAGE won, and against what."""
    if "cage" not in results or len(results) < 2:
        return ""
    cage_loss = results["cage"].loss
    parts = []
    for arm in ("ste", "averaged", "ste0", "ptq"):
        if arm in results:
            difference = cage_loss - results[arm].loss
            word = "beats" if difference < 0 else "loses to"
            parts.append(f"{word} {ARMS[arm]} by {abs(difference):.4f} nat")
    if not parts:
        return ""
    text = f"With this one seed CAGE {'; '.join(parts)}."
    if {"full", "ste"} <= results.keys() and results["ste"].loss <= results[
        "full"
    ].loss:
        text += " STE lost nothing to full precision here: there was no gap to close."
    return text


def main() -> int:
    """Runs the program; the exit status."""
    console = Console()
    try:
        settings = tyro.cli(Settings, description=__doc__).resolved()
        experiment = Experiment(settings)
        folder = RunFolder(settings.out, _identity(experiment), resume=settings.resume)
        if settings.resume and not folder.resumed:
            console.print(
                f"--resume finds no run in {escape(str(settings.out))}, so this one "
                f"starts from the beginning.",
                soft_wrap=True,
            )
        announce(experiment, console)
        results = results_of(experiment, train(experiment, folder, console))
    except ValueError as error:
        console.print(f"[red]error[/]: {escape(str(error))}", soft_wrap=True)
        return 2
    except Stopped as stopped:
        console.print(
            f"stopped by {stopped}; all steps so far are saved. Go on with --resume "
            f"and the same flags.",
            soft_wrap=True,
        )
        return stopped.exit_code
    rows = summary(experiment, results)
    console.print(table_of(rows, settings))
    codes = None
    if arm := next(
        (arm for arm in ("cage", "ste", "averaged") if arm in results), None
    ):
        codes = check_codes(experiment, results[arm], settings.out / "codes")
        same = "the same" if codes["loss"] == results[arm].loss else "ANOTHER"
        console.print(
            f"The codes of {ARMS[arm]}, saved and loaded back, give {same} validation "
            f"loss: {codes['loss']:.6f}."
        )
    outcome = program.TINY if settings.size == "tiny" else verdict(results)
    if outcome:
        console.print(outcome, soft_wrap=True)
    write_json(experiment, rows, codes, settings.out / "results.json")
    plot(experiment, results, settings.out / "curves.png")
    written = "Table, plot and codes" if codes else "Table and plot"
    console.print(f"{written} are in {escape(str(settings.out))}.", soft_wrap=True)
    return 0


def announce(experiment: Experiment, console: Console) -> None:
    """Says what will be done."""
    settings, report = experiment.settings, experiment.report
    size = experiment.model.size
    weights = sum(row.size for row in report.rows)
    quantized = sum(row.size for row in report.rows if row.quantizer)
    steps = sum(segment.stop - segment.start for segment in experiment.segments)
    lines = [
        f"A Llama of {size.layers} layers x {size.width}, "
        f"{weights / 1e6:.2f} M parameters, of which {quantized / weights:.0%} are "
        f"quantized: {next(row.quantizer for row in report.rows if row.quantizer)}.",
        f"{len(experiment.train) / 1e6:.1f} MB of text, {settings.steps} steps of "
        f"{settings.batch} x {settings.sequence} bytes; in all {steps} steps:",
    ]
    for part in experiment.segments:
        after = f" after {part.parent.name}" if part.parent else ""
        lines.append(f"  {part.name:<6} {part.stop - part.start:>6} steps{after}")
    if settings.distill:
        windows, length = experiment.written
        lines.append(
            f"All but full start from its end and learn its logits, on {windows} x "
            f"{length} bytes that it writes."
        )
    if "cage" in settings.arms:
        lines.append(
            f"CAGE's dose is {experiment.dose():.2f} (the paper's: 1.6 to 2.9)."
        )
    if settings.size == "demo":
        lines.append("All arms of the standard run take about 8 minutes on 2 cores.")
    console.print(escape("\n".join(lines)), soft_wrap=True)


def write_json(experiment, rows, codes, path: Path) -> None:
    """What was measured, with what."""
    record = {
        "settings": _identity(experiment),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "machine": {"system": platform.platform(), "device": str(jax.devices()[0])},
        "date": datetime.date.today().isoformat(),
        "results": rows,
        "codes": codes,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def plot(experiment: Experiment, results: dict[str, Result], path: Path) -> None:
    """Loss and distance to the grid over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = experiment.settings.steps
    at = np.arange(EVALUATIONS + 1) * steps / EVALUATIONS
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colors = {"full": "0.45", "ste": "tab:blue", "ste0": "tab:green", "cage": "tab:red"}
    for arm, color in colors.items():
        if arm not in results:
            continue
        state = results[arm].history
        # One line with CAGE before the pull, and next to it afterwards: dashes on top.
        style = {"linestyle": "--", "zorder": 3} if arm == "ste" else {}
        for axes, values in ((left, state.validation), (right, state.distance)):
            axes.plot(at, values, color=color, label=ARMS[arm], **style)
    for arm, marker in (("ptq", "x"), ("averaged", "+")):
        if arm in results:
            left.plot(steps, results[arm].loss, f"k{marker}", label=ARMS[arm], zorder=5)
    final = [result.loss for result in results.values()]
    margin = 1.5 * (max(final) - min(final)) + 0.02
    left.set_xlim(0.5 * steps, 1.02 * steps)
    left.set_ylim(min(final) - margin / 3, max(final) + 2 * margin)
    left.set(xlabel="step", ylabel="validation loss (nat a byte)")
    right.set(
        xlabel="step",
        ylabel="mean ||x - Q(x)|| / ||x||",
        title="distance of the weights to their grid",
    )
    settings = experiment.settings
    left.set_title(f"{_kind(settings)}, seed {settings.seed}")
    for axes in (left, right):
        if "cage" in results:
            pull = settings.silence * steps
            axes.axvspan(pull, steps, color="tab:red", alpha=0.07, label="CAGE pulls")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    program.run(
        main,
        stopped="what was saved before is kept, and --resume goes on from there.",
    )
