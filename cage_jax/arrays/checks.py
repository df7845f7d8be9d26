"""Checks of arguments, with one wording for all errors."""

import dataclasses
import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Packages through which a user's line comes to a warning.
_BETWEEN = {"cage_jax", "flax", "jax", "optax"}


def warn(text: str) -> None:
    """Warns of the user's line that called this package, also through another one."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame) in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def first_lines(lines: Sequence[str], most: int = 8) -> str:
    """Joins the first lines of a text about many parameters, and counts the others."""
    more = [f"and {len(lines) - most} more."] if len(lines) > most else []
    return "\n".join([*lines[:most], *more])


def _package(frame):
    return frame.f_globals.get("__name__", "").partition(".")[0]


def is_int(value: Any) -> bool:
    """Tells whether a value is an int, of Python or NumPy, and not a bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Returns Python's number for one of NumPy, also in a tuple.

    NumPy's numbers look otherwise in a repr, and JSON does not take them.
    """
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(plain, value)) if type(value) is tuple else value


def make_plain(description: Any) -> None:
    """Makes the numbers in the fields of a frozen dataclass those of Python."""
    for field in dataclasses.fields(description):
        value = getattr(description, field.name)
        object.__setattr__(description, field.name, plain(value))


def check_int(
    name: str,
    value: Any,
    remedy: str,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    or_array: bool = False,
) -> None:
    """Raises as `check_number` does, for anything but an int in range."""
    if or_array and isinstance(value, (jax.Array, np.ndarray)):
        value = _number_in(name, value, remedy, "an int", np.integer)
        if value is None:
            return
    if not is_int(value):
        raise TypeError(f"`{name}` must be an int; got {value!r}. {remedy}")
    if not least <= value <= most:
        rule = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"`{name}` must be {rule}; got {value}. {remedy}")


def check_number(
    name: str,
    value: Any,
    remedy: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    or_array: bool = False,
) -> None:
    """Raises TypeError for anything but a real number, ValueError for one out of range.

    Args:
      name: name of the argument.
      value: its value.
      remedy: a sentence that says what to use instead.
      least, above, most, below: the range; `least` and `most` belong to it. Infinities
        and NaN are always out of range.
      or_array: whether the number may be in an array without axes. If its value is
        known only when the program runs, as under `optax.inject_hyperparams` in a
        `jax.jit`, it is not checked.
    """
    if or_array and isinstance(value, (jax.Array, np.ndarray)):
        value = _number_in(name, value, remedy, "a number", np.integer, np.floating)
        if value is None:
            return
    if not is_int(value) and not isinstance(value, (float, np.floating)):
        raise TypeError(f"`{name}` must be a number; got {value!r}. {remedy}")
    number = value if is_int(value) else float(value)  # NumPy's warn of large limits
    inside = least <= number <= most and above < number < below
    if inside and abs(number) <= sys.float_info.max:
        return
    limits = {"at least": least, "above": above, "at most": most, "below": below}
    rules = [f"{word} {x:g}" for word, x in limits.items() if math.isfinite(x)]
    rule = " and ".join(rules or ["finite"])
    raise ValueError(f"`{name}` must be {rule}; got {value}. {remedy}")


def _number_in(name, array, remedy, kind, *dtypes):
    """Returns the number in an array without axes, or None if it is not known yet."""
    if array.shape or not any(jnp.issubdtype(array.dtype, each) for each in dtypes):
        raise TypeError(
            f"`{name}` must be {kind}; got an array of shape {array.shape} and dtype "
            f"{array.dtype}. {remedy}"
        )
    return None if is_traced(array) else np.asarray(array).item()


def check_byte_order(what: str, array: Any) -> None:
    """Raises ValueError for an array of NumPy in the other byte order.

    JAX has no such arrays, and says only that they are none.
    """
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        raise ValueError(
            f"{what} must be in the byte order of this machine; got dtype "
            f"{array.dtype}. Use array.astype(array.dtype.newbyteorder('='))."
        )


def is_traced(array: Any) -> bool:
    """Tells whether the value of an array is not known here.

    It is traced, or a part of it is with other processes.
    """
    if isinstance(array, jax.core.Tracer):
        return True
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def check_callable(name: str, value: Any, remedy: str) -> None:
    """Raises TypeError for anything that cannot be called."""
    if not callable(value):
        raise TypeError(
            f"`{name}` must be a function; got {type(value).__name__}. {remedy}"
        )


def check_float_dtype(name: str, dtype: Any) -> None:
    """Raises TypeError for anything but a dtype of floats."""
    try:
        is_float = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_float = False
    if not is_float:
        raise TypeError(
            f"`{name}` must be a dtype of floats; got {dtype!r}. Use 'bfloat16'."
        )


def check_choice(
    name: str, value: Any, choices: Sequence[Any], remedy: str = ""
) -> None:
    """Raises ValueError for a value that is none of `choices`."""
    if value not in choices:
        remedy = remedy or f"Use {choices[0]!r}."
        raise ValueError(
            f"`{name}` must be one of {tuple(choices)}; got {value!r}. {remedy}"
        )
