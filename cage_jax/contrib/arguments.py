"""What the methods ask of their arguments, and how they say so."""

import math
import warnings
from typing import Any

import jax
import numpy as np

from cage_jax.core.rules import Rules
from cage_jax.quantizers.quantizer import Quantizer


def check_number(
    value: Any, name: str, remedy: str, most: float = math.inf, *, known: bool = False
) -> None:
    """Raises for a number outside of [0, most].

    An array, which `optax.inject_hyperparams` makes of it, passes unless it must be
    `known` where the program is traced.
    """
    if isinstance(value, (jax.Array, np.ndarray)) and not known:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"`{name}` must be a number; got {value!r}. {remedy}")
    if not (math.isfinite(value) and 0 <= value <= most):
        bound = "not negative" if most == math.inf else f"in [0, {most:g}]"
        raise ValueError(f"`{name}` must be finite and {bound}; got {value}. {remedy}")


def check_steps(value: Any, name: str, least: int, remedy: str) -> None:
    """Raises for something else than a number of steps of at least `least`.

    An array passes, as in `check_number`.
    """
    if isinstance(value, (jax.Array, np.ndarray)):
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an int; got {value!r}. {remedy}")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}; got {value}. {remedy}")


def quantized(rules: Rules, params: Any) -> dict[str, tuple[Quantizer, Any]]:
    """`rules.quantized(params)`, with a warning where that is nothing."""
    found = rules.quantized(params)
    if not found:
        warnings.warn(
            f"no parameter is quantized by {rules.in_words}, so there is nothing to "
            f"do. Print rules.report(params) to see the paths.",
            stacklevel=3,
        )
    return found


def check_known_values(quantizer: Quantizer, method: str) -> None:
    """Raises where it is not known which values are next to a weight."""
    if quantizer.scale.finds_values:
        raise ValueError(
            f"`rules` must have quantizers of known values for `{method}`; got "
            f"{quantizer}, which rounds by itself. Use a preset of cage_jax."
        )


def check_own_codes(quantizer: Quantizer, method: str) -> None:
    """Raises where a weight has no code that is its alone."""
    check_known_values(quantizer, method)
    if quantizer.hadamard is not None:
        raise ValueError(
            f"`rules` must give each weight a code of its own for `{method}`, which a "
            f"rotation does not; got {quantizer}. Use one with hadamard=None."
        )
