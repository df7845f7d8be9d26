"""Schedules of the correction's strength, and its dose."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cage_jax.arrays.checks import check_int, check_number, is_int, is_traced, warn
from cage_jax.arrays.names import names_checked

Schedule = Callable[[jax.Array], jax.Array]
ScalarOrSchedule = float | jax.Array | Schedule

# The published runs have doses of 1.6 to 2.9; above 3 gains were seen to reverse.
_LARGEST_DOSE = 3.0

# Steps are counted in int32.
_MOST_STEPS = 2**31 - 1

_BRANCHES = (
    "A schedule must not branch on the step's count in Python, because jax.jit does "
    "not know it. Use jnp.where(count < 10, 0.1, 0.01), or one of Optax's schedules "
    "such as optax.join_schedules."
)


@names_checked
def silence_then_ramp(
    total_steps: int, peak: float = 10.0, silence: float = 0.8
) -> Schedule:
    """Returns a strength of 0, then a linear ramp up to `peak` at the last step.

    With r = (count + 1) / total_steps, the strength is 0 while r <= silence, then
    peak * (r - silence) / (1 - silence).

    Args:
      total_steps: length of the training in optimizer steps.
      peak: the strength at the last step and after it.
      silence: the fraction of training without correction, in [0, 1).

    Returns:
      A schedule that maps the step count (from 0) to the strength.

    Raises:
      TypeError, ValueError: for arguments out of range.

    Example:
      >>> import cage_jax as cage
      >>> strength = cage.silence_then_ramp(10, peak=10.0, silence=0.8)
      >>> [float(strength(count)) for count in (7, 8, 9)]
      [0.0, 5.0, 10.0]

    Source: CAGE, arXiv 2510.18784; the defaults are the paper's.
    """
    silent_steps = _silent_steps(total_steps, peak, silence)
    peak = peak if isinstance(peak, jax.Array) else float(peak)

    def schedule(count):
        elapsed = optax.safe_increment(jnp.asarray(count))
        elapsed = elapsed.astype(jnp.result_type(float))
        start, length = float(silence * total_steps), float((1 - silence) * total_steps)
        ramp = (elapsed - start) / length
        strength = peak * jnp.minimum(ramp, 1.0)
        return jnp.where(elapsed > silent_steps, strength, 0.0)

    return schedule


@names_checked
def silence_then_constant(
    total_steps: int, peak: float = 10.0, silence: float = 0.8
) -> Schedule:
    """Returns a strength of 0, then of `peak`.

    Args:
      total_steps, silence: as in `silence_then_ramp`.
      peak: the strength once the silence is over.

    Returns:
      A schedule that maps the step count (from 0) to the strength.

    Raises:
      TypeError, ValueError: for arguments out of range.

    Example:
      >>> import cage_jax as cage
      >>> strength = cage.silence_then_constant(10, peak=1.0, silence=0.8)
      >>> [float(strength(count)) for count in (7, 8, 9)]
      [0.0, 1.0, 1.0]

    Source: CAGE, arXiv 2510.18784.
    """
    silent_steps = _silent_steps(total_steps, peak, silence)
    peak = peak if isinstance(peak, jax.Array) else float(peak)

    def schedule(count):
        elapsed = optax.safe_increment(jnp.asarray(count))
        return jnp.where(elapsed > silent_steps, peak, 0.0)

    return schedule


@names_checked
def ramp_to_dose(
    learning_rate: ScalarOrSchedule,
    total_steps: int,
    dose: float = 0.7,
    silence: float = 0.5,
    power: float = 3.0,
) -> Schedule:
    """Returns a strength of 0, then a ramp whose height gives a dose.

    With r = (count + 1) / total_steps, the strength is 0 while r <= silence, then
    peak * ((r - silence) / (1 - silence)) ** power. The peak is chosen so that the sum
    of learning rate times strength is `dose`. A dose that is right for one learning
    rate, number of steps and floor is right for others too.

    Args:
      learning_rate: the optimizer's, a number or a schedule of the step count.
      total_steps, silence: as in `silence_then_ramp`.
      dose: the sum of learning rate times strength, see `cage_jax.dose`.
      power: 1 for a line; 3 leaves most of the pull to the end.

    Returns:
      A schedule that maps the step count (from 0) to the strength.

    Raises:
      TypeError, ValueError: for arguments out of range, and for a learning rate that
        is 0 in every step after the silence.

    Example:
      >>> import cage_jax as cage
      >>> strength = cage.ramp_to_dose(1e-3, 1000)
      >>> round(cage.dose(1e-3, strength, 1000), 4)
      0.7
    """
    ramp = silence_then_ramp(total_steps, 1.0, silence)
    remedy = "Use 0.7, or 0.0 for no correction."
    check_number("dose", dose, remedy, least=0, or_array=True)
    # With a power of 0 there would be no silence.
    remedy = "Use 3.0, 1.0 for a line, or silence_then_constant for a step."
    check_number("power", power, remedy, above=0, or_array=True)
    check_learning_rate(learning_rate)

    def shape(count):
        return ramp(count) ** power

    counts = steps(total_steps)
    rates = values_at("learning_rate", learning_rate, counts)
    total = jnp.sum(rates * values_at("strength", shape, counts))
    if not isinstance(total, jax.core.Tracer) and not total > 0:
        raise ValueError(
            f"`learning_rate` must be positive in some step after the silence, or "
            f"there is no dose; got a sum of {float(total):g}. Use the optimizer's."
        )
    peak = dose / total
    return lambda count: peak * shape(count)


@names_checked
def dose(
    learning_rate: ScalarOrSchedule, strength: ScalarOrSchedule, total_steps: int
) -> float:
    """Computes the dose of the pull: the sum of learning rate times strength.

    The dose says how far the whole pull moves a weight. While the grid stays the same,
    the decoupled pull shrinks a weight's distance to it by a factor of exp(-dose). The
    published recipe has a dose of 1.6 to 2.9; at 0.01 CAGE does nothing, and above 3
    its gain was seen to reverse. If the optimizer, the learning rate or the number of
    steps differs from a known good run, match its dose rather than its strength. The
    dose means nothing for the coupled placement under Adam, which normalises the pull.

    Args:
      learning_rate: a number, or a schedule of the step count.
      strength: a number, or a schedule of the step count.
      total_steps: length of the training in optimizer steps.

    Returns:
      The dose, summed in float64. Warns when it is above 3.

    Raises:
      TypeError, ValueError: for arguments out of range, and for a schedule that is
        negative or NaN at a step.

    Example:
      >>> import cage_jax as cage
      >>> round(cage.dose(1.2e-3, cage.silence_then_ramp(1000), 1000), 2)
      1.21
    """
    check_total_steps(total_steps)
    check_learning_rate(learning_rate)
    check_strength(strength)
    counts = steps(total_steps)
    rates = values_at("learning_rate", learning_rate, counts)
    total = sum_of_products(rates, values_at("strength", strength, counts))
    if total > _LARGEST_DOSE:
        warn(
            f"the dose is {total:.3g}, above {_LARGEST_DOSE:g}, where CAGE was seen to "
            f"do harm. Lower the strength's peak, or raise the silence.",
        )
    return total


def sum_of_products(rates: jax.Array, strengths: jax.Array) -> float:
    """Sums learning rate times strength over steps, in float64."""
    return float(np.sum(np.float64(rates) * np.float64(strengths)))


def values_at(
    name: str, number_or_schedule: ScalarOrSchedule, counts: jax.Array | np.ndarray
) -> jax.Array:
    """Evaluates a schedule or a number at each of some steps, in one program.

    Raises:
      ValueError: if a value is known and negative, infinite or NaN.
    """
    if not callable(number_or_schedule):
        return jnp.full(counts.shape, number_or_schedule, jnp.result_type(float))
    schedule = number_or_schedule
    try:
        values = jax.jit(jax.vmap(schedule))(counts)
    except jax.errors.JAXTypeError:  # it branches on the count
        each = [float(schedule(count)) for count in np.asarray(counts)]
        values = jnp.asarray(each, jnp.result_type(float))
    if not is_traced(values):
        known = np.asarray(values, np.float64)
        wrong = ~(np.isfinite(known) & (known >= 0))
        if wrong.any():
            step = np.argmax(wrong)
            raise ValueError(
                f"`{name}` must be at least 0, and finite, at each step; got "
                f"{known[step]:g} at step {counts[step]}. Mend the schedule."
            )
    return values


def steps(total_steps: int) -> jax.Array:
    """Returns the counts of all steps, int32."""
    return jnp.arange(total_steps, dtype=jnp.int32)


def check_strength(strength, name: str = "strength") -> None:
    """Raises for a strength that is a negative number, NaN, or no number at all."""
    remedy = "Use silence_then_ramp(total_steps), a number, or 0.0 for no correction."
    _check_number_or_schedule(name, strength, remedy)


def check_learning_rate(learning_rate) -> None:
    """Raises for a learning rate that is a negative number, NaN, or no number."""
    remedy = "Use the learning rate, or the schedule, that the optimizer has."
    _check_number_or_schedule("learning_rate", learning_rate, remedy)


def _check_number_or_schedule(name, value, remedy):
    rule = f"`{name}` must be a number, or a schedule that maps a step's count to one"
    if is_optimizer(value):
        raise TypeError(
            f"{rule}; got an optimizer. For optimizers other than AdamW and SGD use "
            f"decoupled(optimizer, rules, learning_rate=..., strength=...)."
        )
    if isinstance(value, Mapping):
        raise TypeError(
            f"{rule}; got a dict. Unpack it: **recommended(learning_rate, steps)."
        )
    if not callable(value):
        check_number(name, value, remedy, least=0, or_array=True)
        return
    # Optax's schedules multiply ints and floats.
    with jax.numpy_dtype_promotion("standard"):
        if why := _why_no_schedule(value):
            got = getattr(value, "__name__", "a function")
            raise TypeError(
                f"{rule}; got {got}, which {why}. If it makes a schedule, call it. "
                f"{remedy}"
            )
        with contextlib.suppress(jax.errors.JAXTypeError):  # it is traced
            values_at(name, value, np.zeros(1, np.int32))


def is_optimizer(value: Any) -> bool:
    """Returns whether `value` looks like an Optax optimizer."""
    return hasattr(value, "init") and hasattr(value, "update")


def _why_no_schedule(function) -> str | None:
    """Says what a function does that maps no step count to a number, or None."""
    first = np.int32(0)
    try:
        try:
            found = jax.eval_shape(function, first)
        except jax.errors.JAXTypeError:
            found = function(first)  # it branches on the count
    except jax.errors.JAXTypeError:
        return None  # it depends on what is traced
    except Exception as error:
        return f"raised {type(error).__name__}, {str(error).rstrip('.')}"
    if getattr(found, "shape", None) == () or is_int(found) or isinstance(found, float):
        return None
    return f"returned {found}"


def check_total_steps(total_steps: Any, *, or_array: bool = False) -> None:
    """Raises for anything but a number of steps that an int32 can count."""
    check_int(
        "total_steps",
        total_steps,
        "Use the number of optimizer steps, or int(n) of an array.",
        least=1,
        most=_MOST_STEPS,
        or_array=or_array,
    )


def _silent_steps(total_steps, peak, silence) -> int:
    """Counts the steps without correction, after checking the arguments."""
    check_total_steps(total_steps)
    if callable(peak):
        raise TypeError(
            "`peak` must be a number; got a function. Pass a schedule of your own "
            "straight to `coupled` as its strength."
        )
    check_strength(peak, "peak")
    remedy = "The paper uses 0.8; for no correction at all use strength 0.0."
    check_number("silence", silence, remedy, least=0, below=1)
    # The last step t with (t / total_steps) <= silence, in exactly the arithmetic of
    # the definition: silence * total_steps may round to the wrong side.
    steps = int(silence * total_steps)
    while (steps + 1) / total_steps <= silence:
        steps += 1
    while steps / total_steps > silence:
        steps -= 1
    return steps


def value_at(number_or_schedule: ScalarOrSchedule, count: jax.Array) -> Any:
    """Returns the number, or the value of the schedule at a step."""
    if not callable(number_or_schedule):
        return number_or_schedule
    try:
        return number_or_schedule(count)
    except jax.errors.JAXTypeError as error:
        if not getattr(error, "__notes__", None):
            error.add_note(_BRANCHES)
        raise


def with_remedy(number_or_schedule: ScalarOrSchedule) -> ScalarOrSchedule:
    """Makes a schedule that branches on the count say what to do about it."""
    if not callable(number_or_schedule):
        return number_or_schedule
    return functools.partial(value_at, number_or_schedule)
