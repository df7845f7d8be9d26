"""Sources of the loss's curvature, which weight the correction; one file a family.

`lambda e` pulls all weights equally, though moving one to the grid costs far more than
moving another. With the Hessian `H`, the pull that undoes the effect of rounding on the
gradient is `H e`, with strength 1 and nothing to tune. Pass a source to a correction as
`curvature=`.
"""

from cage_jax.optim.curvature.diagonal import DiagonalState, diagonal
from cage_jax.optim.curvature.factored import FactoredState
from cage_jax.optim.curvature.fisher import fisher
from cage_jax.optim.curvature.hessian import gauss_newton, hessian, hutchinson
from cage_jax.optim.curvature.kronecker import KroneckerState, kronecker
from cage_jax.optim.curvature.second_moment import second_moment
from cage_jax.optim.curvature.source import (
    Curvature,
    Step,
    apply_weights,
    stateless_source,
)

__all__ = [
    "Curvature",
    "DiagonalState",
    "FactoredState",
    "KroneckerState",
    "Step",
    "apply_weights",
    "diagonal",
    "fisher",
    "gauss_newton",
    "hessian",
    "hutchinson",
    "kronecker",
    "second_moment",
    "stateless_source",
]
