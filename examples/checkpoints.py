"""A folder of a run: its settings, and an Orbax checkpoint of each of its segments."""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class RunFolder:
    """Keeps what a run needs to go on where it stopped.

    A run is a list of segments (a stretch of steps of one arm). Each has its own Orbax
    checkpoints, of which the newest whole one counts: a save that was cut off leaves
    the one before.

    Args:
      folder: made where it is missing.
      settings: what must be the same for a run to go on; kept as JSON.
      resume: go on with the run that is in `folder`; `resumed` says whether one was.

    Raises:
      ValueError: for a folder with a run in it when not resuming, and for another
        run's settings when resuming. Nothing is overwritten.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, resume: bool):
        self.folder = folder.resolve()
        path = self.folder / "settings.json"
        if path.exists() and not resume:
            raise ValueError(
                f"`--out` must not hold a run already; got {str(folder)!r}. Add "
                f"--resume to go on with it, or use another folder."
            )
        self.resumed = path.exists()
        if self.resumed:
            _compare(folder, json.loads(path.read_text()), settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n")

    def save(self, segment: str, step: int, state: Any) -> None:
        """Writes a checkpoint, whole or not at all, and removes the one before."""
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        with ocp.CheckpointManager(self._path(segment), options=options) as manager:
            manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def latest_step(self, segment: str) -> int | None:
        """The step of the newest checkpoint, or None."""
        if not self._path(segment).exists():
            return None
        with ocp.CheckpointManager(self._path(segment)) as manager:
            return manager.latest_step()

    def restore(self, segment: str, step: int, like: Any) -> Any:
        """Reads a checkpoint.

        Raises:
          ValueError: for one that is truncated or of another model.
        """
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with ocp.CheckpointManager(self._path(segment)) as manager:
            try:
                state = manager.restore(step, args=ocp.args.StandardRestore(shapes))
                jax.tree.map(_check_shape, state, shapes)
                return state
            except (ValueError, KeyError, OSError) as error:
                raise ValueError(
                    f"`--resume` needs a whole checkpoint of this model; cannot read "
                    f"{self._path(segment) / str(step)}: {error}. Nothing was "
                    f"overwritten. Remove that folder to redo its segment, or start "
                    f"again in another --out."
                ) from error

    def _path(self, segment: str) -> Path:
        return self.folder / "checkpoints" / segment


def _check_shape(array, like):
    if array.shape != like.shape:
        raise ValueError(f"an array has shape {array.shape} in place of {like.shape}")


def _compare(folder, before, now):
    now = json.loads(json.dumps(now))
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
