"""CAGE and quantization-aware training for JAX.

One table of rules says how each parameter is quantized; it drives the straight-through
forward pass (`fake_quant`), the correction (`coupled` and its relatives), the report
and what is shipped (`quantize`).
"""

import importlib
from typing import TYPE_CHECKING

from cage_jax._project import VERSION
from cage_jax.arrays.names import did_you_mean
from cage_jax.core.grids import with_grids
from cage_jax.core.quantize import (
    QuantizedArray,
    dequantize,
    fake_quant,
    quantization_error,
    quantize,
)
from cage_jax.core.rules import Rules
from cage_jax.optim.continuing import init_from, move_state
from cage_jax.optim.optimizers import cage_adamw, cage_sgd
from cage_jax.optim.placements import cage, coupled, decoupled, post_step
from cage_jax.optim.recommended import recommended
from cage_jax.optim.schedules import (
    dose,
    ramp_to_dose,
    silence_then_constant,
    silence_then_ramp,
)
from cage_jax.quantizers.file_presets import ct_w4a16, ct_w8a8, q4_0, q4_1, q8_0
from cage_jax.quantizers.presets import (
    binary,
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
    quest,
    seq,
    ternary,
)
from cage_jax.quantizers.quantizer import Quantizer

__all__ = [
    "QuantizedArray",
    "Quantizer",
    "Rules",
    "audit",
    "binary",
    "cage",
    "cage_adamw",
    "cage_sgd",
    "calibrate",
    "choose_bits",
    "choose_rotation",
    "coupled",
    "ct_w4a16",
    "ct_w8a8",
    "decoupled",
    "dequantize",
    "distill",
    "dose",
    "fake_quant",
    "fp8",
    "gptq",
    "init_from",
    "int2",
    "int3",
    "int4",
    "int8",
    "load",
    "low_bit",
    "low_bit_dot",
    "lsq",
    "move_state",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "nf4",
    "nvfp4",
    "plan",
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
    "report",
    "resolve",
    "seq",
    "silence_then_constant",
    "silence_then_ramp",
    "suggest",
    "ternary",
    "tune",
    "with_grids",
]

__version__ = VERSION

# Imported where they are first used, because they take time.
_FUNCTIONS = {
    "audit": "export.audit",
    "calibrate": "program.activations",
    "choose_bits": "finetuning.bits.choose_bits",
    "choose_rotation": "core.choose_rotation",
    "distill": "finetuning.distillation.distill",
    "gptq": "finetuning.gptq.gptq",
    "load": "export.loading",
    "low_bit": "program.low_bit",
    "low_bit_dot": "core.low_bit_dot",
    "plan": "finetuning.planning",
    "quantize_activations": "program.activations",
    "report": "program.model_report",
    "resolve": "program.resolving",
    "suggest": "program.suggesting",
    "tune": "program.tuning",
}
# The same for public modules, some of which need an extra and say which.
_MODULES = {
    "contrib": "contrib",
    "curvature": "optim.curvature",
    "export": "export",
    "finetuning": "finetuning",
    "flax": "flax",
    "formats": "quantizers.formats",
    "kv_cache": "program.kv_cache",
    "llama": "llama",
    "packing": "arrays.packing",
    "qwix": "qwix",
    "scale_types": "quantizers.scale_types",
    "scales": "quantizers.scales",
    "weightings": "optim.weightings",
}
# What is looked for here and is elsewhere.
_ELSEWHERE = {
    "cage_lion": "decoupled(optax.lion(lr), rules, learning_rate=lr, ...)",
    "cage_muon": "decoupled(optax.contrib.muon(lr), rules, learning_rate=lr, ...)",
    "compressed_tensors": "export.compressed_tensors",
    "gguf": "export.gguf",
    "save": "export.save",
    "stablehlo": "export.stablehlo",
}

if TYPE_CHECKING:
    from cage_jax import contrib as contrib
    from cage_jax import export as export
    from cage_jax import finetuning as finetuning
    from cage_jax import flax as flax
    from cage_jax import llama as llama
    from cage_jax import qwix as qwix
    from cage_jax.arrays import packing as packing
    from cage_jax.core.choose_rotation import choose_rotation
    from cage_jax.core.low_bit_dot import low_bit_dot
    from cage_jax.export.audit import audit
    from cage_jax.export.loading import load
    from cage_jax.finetuning.bits.choose_bits import choose_bits
    from cage_jax.finetuning.distillation.distill import distill
    from cage_jax.finetuning.gptq.gptq import gptq
    from cage_jax.finetuning.planning import plan
    from cage_jax.optim import curvature as curvature
    from cage_jax.optim import weightings as weightings
    from cage_jax.program import kv_cache as kv_cache
    from cage_jax.program.activations import calibrate, quantize_activations
    from cage_jax.program.low_bit import low_bit
    from cage_jax.program.model_report import report
    from cage_jax.program.resolving import resolve
    from cage_jax.program.suggesting import suggest
    from cage_jax.program.tuning import tune
    from cage_jax.quantizers import formats as formats
    from cage_jax.quantizers import scale_types as scale_types
    from cage_jax.quantizers import scales as scales
else:  # a type checker would take any name for known

    def __getattr__(name):
        if name in _MODULES:
            try:
                return importlib.import_module(f"cage_jax.{_MODULES[name]}")
            except ImportError as error:  # which `help` and `hasattr` would not catch
                raise AttributeError(str(error)) from error
        if name in _FUNCTIONS:
            module = importlib.import_module(f"cage_jax.{_FUNCTIONS[name]}")
            return getattr(module, name)
        hint = did_you_mean(name, __dir__())
        if name in _ELSEWHERE:
            hint = f" Use `{_ELSEWHERE[name]}`."
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
