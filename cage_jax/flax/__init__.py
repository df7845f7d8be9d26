"""Quantization of the activations of Flax models, Linen and NNX, by path.

The models need no edits. Each one is run as a function of its variables, which
`cage_jax.quantize_activations` transforms like any other function, so custom layers
work too.
"""

try:
    import flax  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "cage_jax.flax cannot be used without the package flax, which is not "
        'installed. Run pip install "cage_jax[flax]", or in a clone '
        "pip install -e '.[flax]'."
    ) from error

from cage_jax.flax.linen import QuantizedLinen
from cage_jax.flax.models import calibrate, fake_quant, quantize_activations, report
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
]
