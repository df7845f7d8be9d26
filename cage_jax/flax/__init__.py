"""Quantization of the activations of Flax models, Linen and NNX, by path.

The models need no edits. Each one is run as a function of its variables, which
`cage_jax.quantize_activations` transforms like any other function, so custom layers
work too.
"""

from cage_jax._project import missing

try:
    import flax  # noqa: F401
except ModuleNotFoundError as error:
    raise missing("flax", "cage_jax.flax", "flax") from error

from cage_jax.flax.linen import QuantizedLinen
from cage_jax.flax.models import (
    calibrate,
    fake_quant,
    quantize_activations,
    report,
    resolve,
    suggest,
)
from cage_jax.flax.nnx import CalibratedScale, LearnedScale
from cage_jax.flax.products import conv_general_dilated, dot_general

__all__ = [
    "CalibratedScale",
    "LearnedScale",
    "QuantizedLinen",
    "calibrate",
    "conv_general_dilated",
    "dot_general",
    "fake_quant",
    "quantize_activations",
    "report",
    "resolve",
    "suggest",
]
