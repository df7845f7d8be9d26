"""One line of `Rules`, and its check."""

import re
from typing import NamedTuple

from cage_jax.arrays.paths import path_in_errors
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.registry import named

REMEDY = 'Use Rules([(r".*kernel", "int4"), (r".*", None)]).'
Entry = Quantizer | str | None


class Rule(NamedTuple):
    """One line of `Rules`.

    Attributes:
      pattern: a regular expression for whole paths.
      weights: the quantizer of the parameter, or None.
      inputs: the quantizer of the parameter's input, or None.
    """

    pattern: str
    weights: Quantizer | None
    inputs: Quantizer | None = None

    def __str__(self) -> str:
        inputs = f", inputs {self.inputs}" if self.inputs else ""
        return f"({self.pattern!r}, {self.weights}{inputs})"


def rule_of_entry(entry) -> Rule:
    """Converts an entry of the table to a `Rule`; raises for anything but rules."""
    if not isinstance(entry, (tuple, list)) or len(entry) not in (2, 3):
        raise TypeError(
            f"`rules` must be a list of (pattern, quantizer) pairs, or triples with a "
            f"quantizer for inputs; got the entry {entry!r}. {REMEDY}"
        )
    pattern, *quantizers = entry
    if not isinstance(pattern, str):
        raise TypeError(
            f"`rules` must have strings as patterns; got {pattern!r}. {REMEDY}"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`rules` must have regular expressions as patterns; got {pattern!r}: "
            f"{error}. Write '.*' for any text."
        ) from None
    found = []
    for quantizer in quantizers:
        if isinstance(quantizer, str):
            with path_in_errors(pattern):
                quantizer = named(quantizer)
        if not isinstance(quantizer, Quantizer | None):
            name = getattr(quantizer, "__name__", "int4")
            call = f"Call the preset: {name}(...). " if callable(quantizer) else ""
            raise TypeError(
                f"`rules` must map {pattern!r} to a Quantizer, the name of a preset or "
                f"None; got {quantizer!r}. {call}{REMEDY}"
            )
        found.append(quantizer)
    return Rule(pattern, *found)
