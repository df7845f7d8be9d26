"""The start of the command `cage-jax`, beside the package.

The package imports JAX, for seconds. Until the command runs, and so knows better,
Ctrl-C ends the process here: JAX's parts answer it with errors of their own.
"""

import contextlib
import os
import signal


def main() -> int:
    """Runs the command; returns its exit code."""
    signal.signal(signal.SIGINT, _stop)
    from cage_jax.cli.main import main as run

    return run()


def _stop(*_) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"stopped.\n")
    os._exit(130)
