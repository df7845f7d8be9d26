"""Start, checks of flags, and end of the example programs."""

import contextlib
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

# A shell's exit status after Ctrl-C.
STOPPED = 130
TINY = (
    "A run this small shows only that everything works; it proves nothing about the "
    "arms."
)


@contextlib.contextmanager
def imports(name: str) -> Iterator[None]:
    """Reports Ctrl-C or a missing package during slow imports in one line.

    Args:
      name: the module's `__name__`; if that is not "__main__", errors are raised.
    """
    if name != "__main__":
        yield
        return
    # In force until `run`. An exception would not do: extension modules may turn it
    # into another.
    signal.signal(
        signal.SIGINT, lambda *_: leave(STOPPED, "stopped; nothing was written.")
    )
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: the package {error.name!r} must be installed, and is not. Run "
            f'pip install -e ".[demo]" in the folder of pyproject.toml.'
        )


def run(main: Callable[[], int], *, stopped: str) -> NoReturn:
    """Ends the process with the status of `main`; prints `stopped` after Ctrl-C."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main()
    except KeyboardInterrupt:
        leave(STOPPED, f"stopped; {stopped}")
    if status == STOPPED:
        leave(STOPPED)
    sys.exit(status)


def leave(status: int, message: str = "") -> NoReturn:
    """Exits at once; an orderly exit crashes while XLA still compiles or computes."""
    if message:
        print(message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Limit(NamedTuple):
    """Rule for the value of a flag."""

    field: str
    holds: Callable[[Any], bool]
    rule: str
    remedy: str


STEPS = Limit(
    "steps",
    lambda steps: steps >= 10,
    "at least 10, for a silence and a ramp",
    "Use --tiny for a short run.",
)
STRENGTH = Limit(
    "strength",
    lambda strength: 0 <= strength < math.inf,
    "finite and not negative",
    "The paper uses 10.",
)
SILENCE = Limit(
    "silence",
    lambda silence: 0 <= silence < 1,
    "in [0, 1), a share of the steps",
    "The paper uses 0.8.",
)
FLOOR = Limit(
    "floor",
    lambda floor: 0 <= floor <= 1,
    "in [0, 1], a share of the peak",
    "The paper uses 0.1.",
)
OUT = Limit(
    "out", lambda out: out.is_dir() or not out.exists(), "a folder", "Name another."
)


# The default of `cage_jax.recommended`.
RECOMMENDED_SILENCE = 0.5


def with_recommended(settings: Any) -> Any:
    """Returns the settings; --recommended sets its own silence."""
    if not settings.recommended:
        return settings
    own = {field.name: field.default for field in dataclasses.fields(settings)}
    silences = own["silence"], RECOMMENDED_SILENCE
    if settings.strength != own["strength"] or settings.silence not in silences:
        raise ValueError(
            f"`--recommended` must come without --strength and --silence, which it "
            f"would ignore; got {settings.strength:g} and {settings.silence:g}. Leave "
            f"one of them out."
        )
    return dataclasses.replace(settings, silence=RECOMMENDED_SILENCE)


def check(settings: Any, limits: Iterable[Limit]) -> None:
    """Checks the values of flags.

    Raises:
      ValueError: for the first wrong value, with flag, rule, value and remedy.
    """
    for field, holds, rule, remedy in limits:
        value = getattr(settings, field)
        if holds(value):
            continue
        if isinstance(value, tuple):
            value = " ".join(map(str, value)) or "none"
        flag = field.replace("_", "-")
        raise ValueError(f"`--{flag}` must be {rule}; got {value}. {remedy}")
