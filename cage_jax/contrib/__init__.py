"""Alternatives to CAGE that compose with it and with Optax.

All of them use the same `Rules`. Methods that change gradients or weights are
transformations: put `dampening` and `lotion` before the optimizer, and `freezing`,
`interpolation`, `trained_rows` and `averaging` after it. Methods that change the
forward pass replace `fake_quant`: `ewgs`, `noisy_fake_quant`, `binary_relax` and
`parq`. `two_point_gradient` and `fogzo` replace `jax.value_and_grad`. `dual_scale` and
`chunked` are quantizers for rules, and `choose_rotations` changes rules.
"""

from cage_jax.contrib.averaging import averaged, averaging
from cage_jax.contrib.efqat import trained_rows
from cage_jax.contrib.ewgs import ewgs, ewgs_delta
from cage_jax.contrib.lotion import lotion
from cage_jax.contrib.oscillation import cosine_ramp, dampening, freezing
from cage_jax.contrib.relaxation import binary_relax, parq, parq_schedule
from cage_jax.contrib.roste import choose_rotations
from cage_jax.contrib.segquant import chunked, dual_scale
from cage_jax.contrib.winq import interpolation, noisy_fake_quant
from cage_jax.contrib.zeroth_order import fogzo, two_point_gradient

__all__ = [
    "averaged",
    "averaging",
    "binary_relax",
    "choose_rotations",
    "chunked",
    "cosine_ramp",
    "dampening",
    "dual_scale",
    "ewgs",
    "ewgs_delta",
    "fogzo",
    "freezing",
    "interpolation",
    "lotion",
    "noisy_fake_quant",
    "parq",
    "parq_schedule",
    "trained_rows",
    "two_point_gradient",
]
