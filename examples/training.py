"""Runs the segments of an experiment, with checkpoints; can be stopped at any time."""

import contextlib
import io
import os
import signal
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import processes
import program
from checkpoints import Failed, RunFolder, newest_in_words, write_whole
from experiment import EVALUATIONS, Experiment, State
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

# Without a terminal for a progress bar, a line reports progress this often.
LOG_SECONDS = 30
# The processes exchange their status this often.
LOOK_SECONDS = 1


class Stopped(Exception):  # noqa: N818 - not an error
    """The user or the system asked the run to stop; a checkpoint has been written."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = program.STOPPED if signal_number == signal.SIGINT else 0


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Yields a list that receives a request to stop; a second request interrupts."""
    requests: list[int] = []

    def ask(number, frame):
        if requests:
            raise KeyboardInterrupt
        requests.append(number)
        # `print` fails if the signal interrupts another `print`.
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
    """Runs all segments, each from its newest checkpoint; returns their final states.

    The experiment's mesh must be set.

    Raises:
      Stopped: after a signal, with all steps saved.
      Failed: if a checkpoint cannot be written, or too many steps were skipped.
    """
    ends: dict[str, State] = {}
    columns = (
        TextColumn("{task.description:<6}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with (
        _stop_requests() as requests,
        Progress(*columns, console=console) as progress,
    ):
        for segment in experiment.segments:
            with folder.checkpoints(segment.name) as checkpoints:
                ends[segment.name] = _train_segment(
                    experiment, segment, ends, folder, checkpoints, progress, requests
                )
    return ends


def _train_segment(
    experiment, segment, ends, folder, checkpoints, progress, requests
) -> State:
    taught, source = {}, experiment.text
    if segment.teacher is not None:
        taught = {"teacher": ends[segment.teacher.name].params}
        source = _written(experiment, taught["teacher"], folder, progress, requests)
    step = checkpoints.latest_step()
    if step is not None:
        state = checkpoints.restore(step, experiment.abstract_state(segment))
        if step < segment.stop:
            progress.console.print(f"{segment.name} goes on from step {step}.")
    elif segment.parent is not None:
        step = segment.start
        state = experiment.branch(segment, ends[segment.parent.name])
    else:
        step, state = 0, experiment.start(segment, **taught)
        state = jax.block_until_ready(_evaluated(experiment, segment, 0, state))
    total = segment.stop - segment.start
    status = "done" if step == segment.stop else "compiling"
    task = progress.add_task(
        segment.name, total=total, completed=step - segment.start, status=status
    )
    run = experiment.step_of(segment)
    batches = experiment.batches(source).start(step)
    watch = _Watch(step, requests, experiment.settings.save_seconds)
    while step < segment.stop:
        state = run(state, next(batches), jnp.int32(step), **taught)
        step += 1
        number = _evaluation(experiment.settings.steps, step)
        if number is not None:
            # Steps in progress count in the rate, the evaluation does not.
            jax.block_until_ready(state)
            with watch.paused():
                state = _evaluated(experiment, segment, number, state)
                jax.block_until_ready(state)
        if step != watch.next and step != segment.stop:
            continue
        progress_made = _progress_made(state, step)  # waits for steps in progress
        look = watch.look(step)
        status = f"{progress_made.text}  {look.rate:.1f} steps/s"
        progress.update(task, completed=step - segment.start, status=status)
        if look.log and not progress.console.is_terminal:
            progress.console.print(f"{segment.name}  step {step}  {status}")
        if progress_made.skipped_in_a_row >= experiment.settings.max_skipped:
            checkpoints.wait()
            raise _diverged(segment, step, progress_made, folder)
        checkpoints.check()
        if look.stop or look.save or step == segment.stop:
            checkpoints.save(step, state)
        if look.stop:
            checkpoints.wait()
            raise Stopped(look.stop)
    return state


class Look(NamedTuple):
    """Decisions that all processes share after a step."""

    rate: float  # steps per second since the last look
    save: bool
    log: bool
    stop: int  # number of the signal that a process received, or 0


class _Watch:
    """Schedule of the steps after which processes exchange their status."""

    def __init__(self, step: int, requests: list[int], save_seconds: float):
        self.next = step + 1
        self._step, self._requests = step, requests
        self._save_seconds = save_seconds
        self._began = self._saved = self._logged = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes its block from the time of steps."""
        before = time.monotonic()
        yield
        self._began += time.monotonic() - before

    def look(self, step: int) -> Look:
        """Exchanges status, with the first process's clock and any process's signal."""
        now = time.monotonic()
        times = now - self._began, now - self._saved, now - self._logged
        stop = self._requests[0] if self._requests else 0
        found = processes.gather(*times, stop)
        took, since_saved, since_logged = (float(each) for each in found[0, :3])
        rate = (step - self._step) / max(took, 1e-6)
        save, log = since_saved > self._save_seconds, since_logged > LOG_SECONDS
        self._step, self._began = step, now
        self._saved = now if save else self._saved
        self._logged = now if log else self._logged
        self.next = step + max(1, round(rate * LOOK_SECONDS))
        return Look(rate, save, log, int(found[:, 3].max()))


class _Made(NamedTuple):
    """Progress of training."""

    loss: float
    skipped: int
    skipped_in_a_row: int

    @property
    def text(self) -> str:
        skipped = f"  {self.skipped} skipped" if self.skipped else ""
        return f"loss {self.loss:.4f}{skipped}"


def _progress_made(state, step):
    losses = np.asarray(state.losses.addressable_data(0))  # replicated on all devices
    optimizer = state.optimizer
    return _Made(
        float(losses[step - 1]),
        int(optimizer.total_notfinite),
        int(optimizer.notfinite_count),
    )


def _diverged(segment, step, made, folder):
    return Failed(
        f"the last {made.skipped_in_a_row} steps of {segment.name} had a loss or "
        f"gradient that is not finite and changed nothing; stopped at step {step}. In "
        f"{folder.folder} {newest_in_words(folder.folder)}. Where it was the text, go "
        f"on with --resume and a higher --max-skipped; else start again in another "
        f"--out with a lower --learning-rate or more bits."
    )


def _written(experiment, teacher, folder, progress, requests) -> np.ndarray:
    """Returns the text that the teacher generates, once per run."""
    path, (windows, length) = folder.folder / "written.npy", experiment.written
    if path.exists():
        return _read_written(path, (windows, length), experiment.tokens.train.dtype)
    task = progress.add_task("text", total=windows, completed=0, status="writing")
    parts: list[np.ndarray] = []
    while (done := sum(map(len, parts))) < windows:
        parts.append(np.asarray(experiment.write(teacher, len(parts))))
        progress.update(task, completed=min(done + len(parts[-1]), windows))
        asked = processes.gather(requests[0] if requests else 0)
        if asked.any():
            raise Stopped(int(asked.max()))
    text = np.concatenate(parts)[:windows]

    def keep():
        file = io.BytesIO()
        np.save(file, text)
        write_whole(path, file.getvalue())

    processes.by_first(keep)
    progress.update(task, status="done")
    return text


def _read_written(path, shape, dtype):
    try:
        text = np.load(path)
        if (text.shape, text.dtype) != (shape, dtype):
            raise ValueError(
                f"it has {text.dtype} of shape {text.shape}, not {dtype} of {shape}"
            )
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"`--resume` needs the whole text that the teacher wrote; cannot read "
            f"{path}: {error}. Remove that file to have it written again."
        ) from error
    return text


def _evaluation(steps, step):
    """Returns the number of the evaluation that is due after `step` steps, or None."""
    number = step * EVALUATIONS // steps
    return number if number != (step - 1) * EVALUATIONS // steps else None


def _evaluated(experiment, segment, number, state):
    weights = experiment.rounded(state.params) if segment.quantized else state.params
    loss = experiment.validation_loss(weights, segment.quantized)
    return state._replace(
        validation=state.validation.at[number].set(loss),
        distance=state.distance.at[number].set(experiment.distance(state.params)),
    )
