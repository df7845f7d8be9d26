"""Named tuples of arrays whose repr is a line, not all their numbers."""

from typing import TypeVar

import jax
import numpy as np

Kind = TypeVar("Kind", bound=type)


def brief_repr(kind: Kind) -> Kind:
    """Gives a NamedTuple a repr with shapes of arrays and values of scalars."""

    def text(self):
        parts = (f"{name}={_part(getattr(self, name))}" for name in self._fields)
        return f"{kind.__name__}({', '.join(parts)})"

    kind.__repr__ = text  # type: ignore[assignment]
    return kind


def _part(value):
    if hasattr(value, "dtype"):
        return _number(value) or f"{value.dtype}{list(value.shape)}"
    if hasattr(value, "_fields"):
        return f"{type(value).__name__}(...)"
    if isinstance(value, (dict, list, tuple)):
        number, what = len(jax.tree.leaves(value)), "array"
        if not number and isinstance(value, dict):
            number, what = len(value), "key"
        return f"{number} {what}{'s' * (number != 1)}"
    return repr(value)


def _number(value):
    """Returns a scalar's value, or None for an array and for what is not known."""
    is_known = isinstance(value, (np.ndarray, np.generic, jax.Array))
    if not is_known or value.shape or isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, jax.Array) and value.is_deleted():
        return None
    return f"{value.item():.4g}" if isinstance(value.dtype, np.dtype) else None
