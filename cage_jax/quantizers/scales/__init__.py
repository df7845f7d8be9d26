"""Scale rules: how the grid of a group of values is found.

A rule reduces each group of an array to a `Grid`. It is an immutable, hashable
description, so that a `Quantizer` made of it can be static under `jit`.

A scale must be equal, to the bit, in every program that computes it: training,
evaluation, export. Constants are therefore folded here, to one operation each, because
a compiler may fold them in one program and not in another.
"""

from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.scales.asymmetric import MinMax
from cage_jax.quantizers.scales.learned import Calibrated, Learned
from cage_jax.quantizers.scales.reduced import AbsMax, AbsMean, Gaussian, ReducedScale
from cage_jax.quantizers.scales.rule import ScaleRule
from cage_jax.quantizers.scales.symmetric import (
    Fixed,
    FourOverSix,
    Percentile,
    Searched,
    SignedMax,
)
from cage_jax.quantizers.scales.ternary import KeptMean, Thresholds

__all__ = [
    "AbsMax",
    "AbsMean",
    "Calibrated",
    "Fixed",
    "FourOverSix",
    "Gaussian",
    "Grid",
    "KeptMean",
    "Learned",
    "MinMax",
    "Percentile",
    "ReducedScale",
    "ScaleRule",
    "Searched",
    "SignedMax",
    "Thresholds",
]
