"""The folder of a run: its settings, a lock, and Orbax checkpoints of its segments."""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
import processes


class Failed(Exception):  # noqa: N818 - not always an error
    """A run cannot continue, despite valid flags; the message says what to do."""


class RunFolder:
    """Keeps the files that a run needs to continue where it stopped.

    A run is a list of segments (consecutive steps of one arm), each with its own
    checkpoints. Several processes share one folder.

    Args:
      folder: created if it is missing.
      settings: must be equal for a run to continue; kept as JSON.
      resume: continue the run in `folder`; `resumed` is True if there was one.

    Raises:
      ValueError: for a folder with a run in it when not resuming, for another run's
        settings when resuming, and for a folder that another run is using. Nothing is
        overwritten.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, resume: bool):
        self._given, self.folder = folder, folder.resolve()
        self._lock: Any = None
        path = self.folder / "settings.json"
        # A run without a checkpoint has nothing to lose, so it may be replaced.
        self.resumed = path.exists() and newest(self.folder) is not None

        def claim():
            if self.resumed and not resume:
                raise ValueError(
                    f"`--out` must not hold a run already; got {str(folder)!r}. Add "
                    f"--resume to go on with it, or use another folder."
                )
            if self.resumed:
                _compare(folder, _settings(path), json.loads(json.dumps(settings)))
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"`--out` must be a folder that can be written; got "
                    f"{str(folder)!r} ({error.strerror}). Name another."
                ) from error
            self._take()
            if not self.resumed:
                write_whole(path, (json.dumps(settings, indent=2) + "\n").encode())

        processes.by_first(claim)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            self._lock.close()

    def checkpoints(self, segment: str) -> "Checkpoints":
        """Returns the checkpoints of a segment, a context manager."""
        return Checkpoints(self._segments / segment)

    def latest_step(self, segment: str) -> int | None:
        """Returns the step of a segment's newest checkpoint, or None."""
        return _latest(self._segments / segment)

    def forget(self, segment: str) -> None:
        """Removes the checkpoints of a segment that are no longer needed."""
        shutil.rmtree(self._segments / segment, ignore_errors=True)

    @property
    def _segments(self) -> Path:
        return self.folder / "checkpoints"

    def _take(self):
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(
                f"`--out` must be used by one run at a time; another one runs in "
                f"{str(self._given)!r}. Wait for its end, or use another folder."
            ) from None


class Checkpoints:
    """The checkpoints of a segment, written in the background.

    A checkpoint is complete or absent, and is removed when the next one is complete.
    Each process writes and reads the parts of its own devices.
    """

    def __init__(self, path: Path):
        self._path = path
        self._manager = ocp.CheckpointManager(
            path,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1, cleanup_tmp_directories=True
            ),
            item_handlers=ocp.StandardCheckpointHandler(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, _) -> None:
        if error is None:
            with self._failing("close"):
                self._manager.close()
        elif not processes.lost(error):  # closing would wait for that process
            with contextlib.suppress(Exception):  # the first error says what is wrong
                self._manager.close()

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Begins to write a checkpoint; `state` may be donated afterwards.

        Raises:
          Failed: if this one or the one before cannot be written.
        """
        with self._failing(f"write a checkpoint of step {step}"):
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def check(self) -> None:
        """Raises `Failed` if a checkpoint in progress could not be written."""
        with self._failing("write a checkpoint"):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits for a checkpoint in progress; raises `Failed` as in `check`."""
        with self._failing("write a checkpoint"):
            self._manager.wait_until_finished()

    def restore(self, step: int, like: Any) -> Any:
        """Reads a checkpoint, also onto other devices than it was written from.

        Args:
          step: of an existing checkpoint.
          like: its tree of abstract arrays, with their shardings.

        Raises:
          ValueError: for a checkpoint that is truncated, or of another model or
            optimizer; the message names the differences.
        """
        try:
            there = _arrays(self._manager.item_metadata(step))
            if different := _differences(there, _arrays(_plain(like))):
                raise ValueError(different)
            return self._manager.restore(step, args=ocp.args.StandardRestore(like))
        except Exception as error:  # Orbax raises many types, and its own class
            if processes.lost(error):
                raise
            raise ValueError(
                f"`--resume` needs a whole checkpoint of this model and optimizer; "
                f"cannot read {self._path / str(step)}: {_cause(error)}. Nothing was "
                f"overwritten. Remove that folder to redo its segment, or start again "
                f"in another --out."
            ) from error

    @contextlib.contextmanager
    def _failing(self, what) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if processes.lost(error):
                raise
            kept = self._whole()
            raise Failed(
                f"cannot {what} in {self._path}: {_cause(error)}. {kept} Make room or "
                f"mend the disk, then go on with --resume."
            ) from error

    def _whole(self):
        step = _latest(self._path)
        if step is None:
            return "No checkpoint of this segment is whole yet."
        return f"The checkpoint of step {step} is whole and kept."


def newest(folder: Path) -> tuple[str, int] | None:
    """Returns the segment and the step of a run's newest complete checkpoint."""
    found = [
        (path / str(step), step)
        for path in folder.glob("checkpoints/*")
        if (step := _latest(path)) is not None
    ]
    if not found:
        return None
    path, step = max(found, key=lambda each: each[0].stat().st_mtime)
    return path.parent.name, step


def newest_in_words(folder: Path) -> str:
    """Returns `newest` in words, for a message."""
    found = newest(folder)
    if found is None:
        return "there is no checkpoint yet"
    segment, step = found
    return f"the newest checkpoint is step {step} of {segment}"


def _latest(path):
    steps = ocp.utils.checkpoint_steps(path) if path.exists() else []
    return max(steps, default=None)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def _cause(error):
    """Returns the first line of a library's message."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or repr(error)).strip().splitlines()[0].rstrip(".")


def _plain(tree):
    """Replaces all nodes by dicts, as Orbax does."""
    return ocp.tree.serialize_tree(tree, keep_empty_nodes=True)


def _arrays(tree):
    """Returns the shape and dtype of each array, by path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            tuple(leaf.shape),
            str(leaf.dtype),
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
        if hasattr(leaf, "shape")
    }


def _differences(there, here):
    """Describes up to three differences; empty if there is none."""

    def form(array):
        return "nothing" if array is None else f"{array[1]}{list(array[0])}"

    found = [
        f"{path} is {form(there.get(path))} there and {form(here.get(path))} here"
        for path in sorted(there.keys() | here.keys())
        if there.get(path) != here.get(path)
    ]
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def _settings(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"`--resume` needs the settings of the run; {path} is no JSON ({error}). "
            f"Use another --out."
        ) from error


def _compare(folder, before, now):
    differences = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"`--resume` must have the settings of the run in {str(folder)!r}: "
            f"{'; '.join(differences)}. Use the same flags, or another --out. Nothing "
            f"was overwritten."
        )
