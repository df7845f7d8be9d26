"""The processes of a run: they find each other, agree, and fail together."""

import os
import re
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

# A process that is silent for this long counts as dead, and the others exit.
HEARTBEAT_SECONDS = 20
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LONGEST_MESSAGE = 4096
# Beginnings of JAX's messages about a peer or the network, not about the input.
_LOST = re.compile(
    r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|"
    r"FAILED_PRECONDITION):"
)


def join(cluster: bool = False) -> None:
    """Joins the other processes of the run, before JAX looks for its devices.

    `launch.py` describes them in the environment. A process alone joins nothing.

    Args:
      cluster: let JAX find the processes automatically, as it can on Cloud TPU, Slurm,
        Open MPI and Kubernetes.

    Raises:
      ValueError: for an incomplete environment.
    """
    told = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if told and not cluster:
        missing = [name for name in _VARIABLES if name not in told]
        if missing:
            raise ValueError(
                f"the environment must have all of {', '.join(_VARIABLES)}, or none; "
                f"{' and '.join(missing)} is missing. `python examples/launch.py` sets "
                f"them."
            )
        address, count, own = (told[name] for name in _VARIABLES)
        _initialize(
            coordinator_address=address, num_processes=int(count), process_id=int(own)
        )
    elif cluster:
        try:
            _initialize()
        except ValueError as error:
            raise ValueError(
                f"`--cluster` must be given where Cloud TPU, Slurm, Open MPI or "
                f"Kubernetes started the processes; JAX finds none of them ({error}) "
                f"Leave it out; several processes of one machine are started by "
                f"examples/launch.py."
            ) from error


def _initialize(**known):
    # This service would swallow the SIGTERM that `training` waits for.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        **known,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )


def is_first() -> bool:
    """Says whether this process is the one that prints and writes shared files."""
    return jax.process_index() == 0


def gather(*numbers: float) -> np.ndarray:
    """Gathers the numbers of each process, float32 of shape (processes, numbers).

    All processes must call it at the same point of the program.
    """
    own = np.array(numbers, np.float32)
    if jax.process_count() == 1:
        return own[None]
    return multihost_utils.process_allgather(own)


def by_first(act: Callable[[], None]) -> None:
    """Runs `act` in the first process; the others wait for it, and fail if it fails.

    Raises:
      ValueError: with the message of the ValueError that `act` raised.
    """
    if jax.process_count() == 1:
        act()
        return
    message = b""
    if is_first():
        try:
            act()
        except (ValueError, OSError) as error:
            message = (str(error) or repr(error)).encode()[:_LONGEST_MESSAGE]
    letters = np.zeros(_LONGEST_MESSAGE, np.uint8)
    letters[: len(message)] = np.frombuffer(message, np.uint8)
    letters = np.asarray(multihost_utils.broadcast_one_to_all(letters))
    if letters.any():
        raise ValueError(letters.tobytes().rstrip(b"\0").decode(errors="replace"))


def lost(error: BaseException) -> bool:
    """Says whether an error means that another process of the run is unreachable."""
    return jax.process_count() > 1 and _LOST.match(str(error)) is not None
