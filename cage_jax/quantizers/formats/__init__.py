"""Number formats: the values that codes can take, in units of the scale.

A format knows nothing about array shapes, scales or gradients. Every method acts
elementwise on values that were already divided by the scale.
"""

from cage_jax.quantizers.formats.base import Format
from cage_jax.quantizers.formats.codebook import NF4, Codebook
from cage_jax.quantizers.formats.evenly_spaced import Integer, MidRise, Ties
from cage_jax.quantizers.formats.floats import Float, FloatName

__all__ = [
    "NF4",
    "Codebook",
    "Float",
    "FloatName",
    "Format",
    "Integer",
    "MidRise",
    "Ties",
]
