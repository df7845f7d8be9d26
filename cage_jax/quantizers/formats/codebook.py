"""Codebooks: formats of any values, and NF4, which is one."""

import dataclasses
import functools
import itertools
import math

import numpy as np

from cage_jax.arrays.checks import make_plain
from cage_jax.quantizers.formats.base import Format, constant


@dataclasses.dataclass(frozen=True)
class Codebook(Format):
    """Any 2 to 256 values; the code of a value is its index minus `2**(bits - 1)`.

    A number halfway between two levels rounds to the lower one.

    Args:
      levels: the values, ascending.
      name: the codebook's name, shown when it is printed.
    """

    levels: tuple[float, ...]
    name: str = "codebook"

    def __post_init__(self):
        make_plain(self)
        levels = self.levels
        if not isinstance(levels, tuple) or not 2 <= len(levels) <= 256:
            raise ValueError(
                f"`levels` must be a tuple of 2 to 256 numbers; got {levels!r}. Use "
                f"tuple(values)."
            )
        if not all(a < b < math.inf for a, b in itertools.pairwise(levels)):
            raise ValueError(
                f"`levels` must be finite and ascending; got {levels}. Use "
                f"tuple(sorted(set(values)))."
            )

    @functools.cached_property
    def bits(self) -> int:  # type: ignore[override]
        return (len(self.levels) - 1).bit_length()

    @functools.cached_property
    def values(self) -> np.ndarray:
        return constant(self.levels)

    def __str__(self):
        return self.name


# QLoRA (arXiv 2305.14314), appendix E: quantiles of N(0, 1), with a zero.
NF4 = Codebook(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "nf4",
)
