"""Checks of the methods' arguments."""

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
    """Raises for a number outside [0, most].

    Arrays, such as those of `optax.inject_hyperparams`, pass unless the value must be
    `known` when the program is traced.
    """
    if isinstance(value, (jax.Array, np.ndarray)) and not known:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"`{name}` must be a number; got {value!r}. {remedy}")
    if not (math.isfinite(value) and 0 <= value <= most):
        bound = "not negative" if most == math.inf else f"in [0, {most:g}]"
        raise ValueError(f"`{name}` must be finite and {bound}; got {value}. {remedy}")


def check_steps(value: Any, name: str, least: int, remedy: str) -> None:
    """Raises unless `value` is an int of at least `least`; arrays pass."""
    if isinstance(value, (jax.Array, np.ndarray)):
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an int; got {value!r}. {remedy}")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}; got {value}. {remedy}")


def quantized(rules: Rules, params: Any) -> dict[str, tuple[Quantizer, Any]]:
    """Returns `rules.quantized(params)`, and warns if it is empty."""
    found = rules.quantized(params)
    if not found:
        warnings.warn(
            f"no parameter is quantized by {rules.in_words}, so there is nothing to "
            f"do. Print rules.report(params) to see the paths.",
            stacklevel=3,
        )
    return found


def check_known_values(quantizer: Quantizer, method: str) -> None:
    """Raises if the grid values next to a weight are unknown."""
    if quantizer.scale.finds_values:
        raise ValueError(
            f"`rules` must have quantizers of known values for `{method}`; got "
            f"{quantizer}, which rounds by itself. Use a preset of cage_jax."
        )


def check_own_codes(quantizer: Quantizer, method: str) -> None:
    """Raises if weights do not have one code each, as under a rotation."""
    check_known_values(quantizer, method)
    if quantizer.hadamard is not None:
        raise ValueError(
            f"`rules` must give each weight a code of its own for `{method}`, which a "
            f"rotation does not; got {quantizer}. Use one with hadamard=None."
        )
