"""Alternatives to CAGE that compose with it and with Optax.

All of them use the same `Rules`. Methods that change gradients or weights are
transformations: put `dampening` and `lotion` before the optimizer, and `freezing`,
`interpolation`, `prox_quant`, `sparse_codes`, `trained_rows`, `gradual_pruning`,
`locked_zeros` and `averaging` after it. Methods that change the forward pass replace
`fake_quant`: `ewgs`, `stable_qat`, `soft_quant`, `noisy_fake_quant`, `binary_relax` and
`parq`. `two_point_gradient` and `fogzo` replace `jax.value_and_grad`, and
`clipped_grids` gives `fake_quant` its grids.
`quantization_vector` and `apply_vector` do without training. `binary_coding` makes
codes of which scales alone are trained. `tapped` lets tensors of a teacher stand in for
those of the student. For rules, `dual_scale` and `chunked` are quantizers, and
`choose_rotations` changes them.
"""

from cage_jax.contrib.averaging import averaged, averaging
from cage_jax.contrib.binary_coding import binary_coding, coded_weights, with_scales
from cage_jax.contrib.clipping import clipped_grids, first_clips
from cage_jax.contrib.efqat import trained_rows
from cage_jax.contrib.ewgs import ewgs, ewgs_delta
from cage_jax.contrib.lotion import lotion
from cage_jax.contrib.oscillation import cosine_ramp, dampening, freezing
from cage_jax.contrib.proxquant import prox_quant
from cage_jax.contrib.pruning import cubic_sparsity, gradual_pruning, locked_zeros
from cage_jax.contrib.pv_tuning import sparse_codes
from cage_jax.contrib.quantization_vectors import (
    QuantizationVector,
    apply_vector,
    quantization_vector,
)
from cage_jax.contrib.relaxation import binary_relax, parq, parq_schedule
from cage_jax.contrib.roste import choose_rotations
from cage_jax.contrib.segquant import chunked, dual_scale
from cage_jax.contrib.surrogates import soft_quant, stable_qat
from cage_jax.contrib.teacher_intervention import (
    intervention_stage,
    tap_distance,
    tapped,
)
from cage_jax.contrib.ternary import twn
from cage_jax.contrib.winq import interpolation, noisy_fake_quant
from cage_jax.contrib.zeroth_order import fogzo, fogzo_doubt, two_point_gradient

__all__ = [
    "QuantizationVector",
    "apply_vector",
    "averaged",
    "averaging",
    "binary_coding",
    "binary_relax",
    "choose_rotations",
    "chunked",
    "clipped_grids",
    "coded_weights",
    "cosine_ramp",
    "cubic_sparsity",
    "dampening",
    "dual_scale",
    "ewgs",
    "ewgs_delta",
    "first_clips",
    "fogzo",
    "fogzo_doubt",
    "freezing",
    "gradual_pruning",
    "interpolation",
    "intervention_stage",
    "locked_zeros",
    "lotion",
    "noisy_fake_quant",
    "parq",
    "parq_schedule",
    "prox_quant",
    "quantization_vector",
    "soft_quant",
    "sparse_codes",
    "stable_qat",
    "tap_distance",
    "tapped",
    "trained_rows",
    "twn",
    "two_point_gradient",
    "with_scales",
]
