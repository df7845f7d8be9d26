"""The frequencies with which queries and keys are rotated by position."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from cage_jax.arrays.checks import check_int, check_number, make_plain

_REMEDY = "Use the rope_scaling of the model's config.json."


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Slower rotations, with which a model reads longer texts than it was trained on.

    With the factor alone, all frequencies are divided by it ("linear" in files). With
    the other fields, those that turn less than `low_freq_factor` times within the
    original context are, those that turn more than `high_freq_factor` times stay, and
    those in between go from one to the other ("llama3").

    Args:
      factor: what frequencies are divided by.
      low_freq_factor: turns within the original context, or None.
      high_freq_factor: turns within the original context, or None.
      original_max_position_embeddings: length of the original context, or None.

    Raises:
      TypeError, ValueError: for numbers that are out of range, and for some of the last
        three fields without the others.

    Example:
      >>> from cage_jax.llama.rope import RopeScaling
      >>> RopeScaling(8.0, 1.0, 4.0, 8192).fields()["rope_type"]
      'llama3'

    Source: Llama 3.1, arXiv 2407.21783; `modeling_rope_utils.py` of transformers.
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self):
        make_plain(self)
        check_number("factor", self.factor, _REMEDY, least=1, most=1e6)
        _, low, high, context = dataclasses.astuple(self)
        if (low, high, context) == (None, None, None):
            return
        check_number("low_freq_factor", low, _REMEDY, above=0, most=1e6)
        check_number("high_freq_factor", high, _REMEDY, above=low, most=1e6)
        name = "original_max_position_embeddings"
        check_int(name, context, _REMEDY, least=1, most=2**24)

    def fields(self) -> dict[str, Any]:
        """Returns what a `config.json` says of it."""
        said = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return {"rope_type": "llama3" if len(said) > 1 else "linear", **said}

    def scaled(self, frequency: jax.Array) -> jax.Array:
        """Returns the frequencies, in radians per token, that are used for these."""
        _, low, high, context = dataclasses.astuple(self)
        slow = frequency / self.factor
        if low is None:
            return slow
        turns = context * frequency / (2 * math.pi)
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        return (1 - kept) * slow + kept * frequency
