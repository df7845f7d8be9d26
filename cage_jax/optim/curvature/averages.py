"""Exponential averages of estimates, which come at some steps only."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.arrays.checks import check_int, check_number


def check_averaging(decay: float, period: int, start: int = 0) -> None:
    """Raises TypeError or ValueError for arguments of averages out of range."""
    check_number("decay", decay, "Use 0.99.", least=0, below=1)
    check_int("period", period, "Use 10.", least=1)
    check_int("start", start, "Use 0.", least=0)


def average(decay: float, before: jax.Array, new: jax.Array) -> jax.Array:
    """Returns the next average, which is still to be debiased."""
    mean = decay * before + (1 - decay) * new
    # One overflow must not stay in the average forever.
    return jnp.where(jnp.isfinite(mean), mean, before)


def total_weight(decay: float, estimates: jax.Array) -> jax.Array:
    """Returns the sum of the weights in an average, by which it is debiased."""
    return 1 - decay ** estimates.astype(jnp.float32)


def advance(
    state: Any, estimated: Callable[[], tuple], period: int, start: int = 0
) -> Any:
    """Counts a step in `state.steps`, the first of the fields of a state.

    At step `start` and every `period` steps from there, the other fields become
    `estimated()`.
    """
    if period == 1 and start == 0:
        rest = estimated()
    else:
        due = (state.steps >= start) & ((state.steps - start) % period == 0)
        rest = lax.cond(due, estimated, lambda: tuple(state[1:]))
    return type(state)(state.steps + 1, *rest)
