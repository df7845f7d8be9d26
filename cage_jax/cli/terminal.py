"""Output of a command: its result on stdout, everything else on stderr."""

import contextlib
import io
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cage_jax._project import missing

FAILED = 1
STOPPED = 130  # the shells' exit code of a program that was stopped by Ctrl-C
_SECONDS = 10.0  # between two lines of progress if stderr is not a terminal


class Terminal:
    """The output of a command.

    Args:
      json: whether to print only JSON to stdout.
      quiet: whether to hide progress.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False):
        self._json, self._quiet = json, quiet

    def result(self, content: Any, text: str) -> None:
        """Prints the result: `content` as JSON, or `text`."""
        print(json.dumps(content, indent=2) if self._json else text, flush=True)

    def warn(self, message: Any) -> None:
        """Prints a warning."""
        _say(f"warning: {_one_line(message)}")

    def fail(self, message: Any, more: dict[str, Any]) -> int:
        """Prints an error, with `more` in its JSON; returns the exit code."""
        _say(f"error: {_one_line(message)}")
        if self._json:
            print(json.dumps(more | {"error": _one_line(message)}, indent=2))
        return FAILED

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Shows what is being done until the context ends."""
        if self._quiet:
            yield
        elif not sys.stderr.isatty():
            _say(what)
            yield
        else:
            from rich.console import Console

            with Console(stderr=True).status(what):
                yield

    def track(self, parts: Iterable, what: str, count: int) -> Iterator:
        """Yields `parts` with a progress bar, or regular lines without a terminal."""
        if self._quiet:
            yield from parts
        elif not sys.stderr.isatty():
            said = time.monotonic()
            for number, part in enumerate(parts):
                if time.monotonic() - said >= _SECONDS:
                    said = time.monotonic()
                    _say(f"{what}: {number} of {count}")
                yield part
        else:
            from rich.console import Console
            from rich.progress import track

            console = Console(stderr=True)
            yield from track(parts, what, total=count, console=console, transient=True)


def run(
    command: Callable[[], int],
    terminal: Terminal,
    *,
    debug: bool = False,
    more: dict[str, Any] | None = None,
    writes: bool = False,
) -> int:
    """Runs a command, prints its errors as one line, and returns its exit code.

    Args:
      command: the function to run.
      terminal: receives its warnings and errors.
      debug: whether to print the traceback of an error.
      more: entries to add to the JSON of an error.
      writes: whether the command writes files, all or nothing.
    """
    try:
        with _signals(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: terminal.warn(message)
            return command()
    except (KeyboardInterrupt, _StoppedError) as stop:
        _say("stopped; nothing was written." if writes else "stopped.")
        return stop.exit_code if isinstance(stop, _StoppedError) else STOPPED
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ImportError, ValueError, TypeError, OSError) as error:
        if debug:
            traceback.print_exc()
        return terminal.fail(_text(error), more or {})


def prepare_streams() -> None:
    """Makes stdout and stderr take any text, and stand for none where they are closed.

    Names of files may have characters that the terminal's encoding has not.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(nowhere, "w"))
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say(text):
    """Prints a line to stderr; a command goes on where nobody reads that any more."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class _StoppedError(BaseException):
    """The program was asked to stop, by `kill` or by the end of its terminal."""

    def __init__(self, number: int):
        self.exit_code = 128 + number


@contextlib.contextmanager
def _signals():
    """Turns signals to stop into exceptions, so that partial files are removed."""

    def stop(number, _):
        raise _StoppedError(number)

    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: stop}
    if hasattr(signal, "SIGHUP"):
        handlers[signal.SIGHUP] = stop
    before = {number: signal.signal(number, each) for number, each in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _text(error):
    if isinstance(error, ModuleNotFoundError) and error.name:
        return str(missing(error.name, "the command", "export"))
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    # The library's `path` is MODEL here, because OUT was checked before.
    return str(error).replace("`path`", "`MODEL`").replace("`params`", "`MODEL`")


def _one_line(message):
    return " ".join(str(message).split())
