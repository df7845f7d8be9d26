"""CAGE and quantization-aware training for JAX.

One table of rules says how each parameter is quantized; it drives the straight-through
forward pass (`fake_quant`), the correction (`cage` and its relatives), the report and
what is shipped (`quantize`).
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

from cage_jax.activations import calibrate, quantize_activations
from cage_jax.export.loading import load
from cage_jax.optimizers import cage_adamw, cage_sgd
from cage_jax.presets import (
    binary,
    ct_w4a16,
    ct_w8a8,
    fp8,
    int2,
    int3,
    int4,
    int8,
    lsq,
    mxfp4,
    mxfp6,
    mxfp8,
    nf4,
    nvfp4,
    q4_0,
    q4_1,
    q8_0,
    quest,
    ternary,
)
from cage_jax.quantization import (
    QuantizedArray,
    dequantize,
    fake_quant,
    quantization_error,
    quantize,
    with_grids,
)
from cage_jax.quantizers import Quantizer
from cage_jax.recommendation import recommended
from cage_jax.rotation import choose_rotation
from cage_jax.rules import Rules
from cage_jax.schedules import (
    dose,
    ramp_to_dose,
    silence_then_constant,
    silence_then_ramp,
)
from cage_jax.serving import low_bit, low_bit_dot
from cage_jax.transform import cage, decoupled, post_step

__all__ = [
    "QuantizedArray",
    "Quantizer",
    "Rules",
    "binary",
    "cage",
    "cage_adamw",
    "cage_sgd",
    "calibrate",
    "choose_rotation",
    "ct_w4a16",
    "ct_w8a8",
    "decoupled",
    "dequantize",
    "dose",
    "fake_quant",
    "fp8",
    "int2",
    "int3",
    "int4",
    "int8",
    "load",
    "low_bit",
    "low_bit_dot",
    "lsq",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "nf4",
    "nvfp4",
    "post_step",
    "q4_0",
    "q4_1",
    "q8_0",
    "quantization_error",
    "quantize",
    "quantize_activations",
    "quest",
    "ramp_to_dose",
    "recommended",
    "silence_then_constant",
    "silence_then_ramp",
    "ternary",
    "with_grids",
]

try:
    __version__ = version("cage_jax")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name):
    # What needs an extra is imported where it is first used, and says which.
    if name in ("flax", "llama", "qwix"):
        return importlib.import_module(f"cage_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
