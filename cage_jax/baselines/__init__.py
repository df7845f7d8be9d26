"""Rivals and relatives of CAGE, as pieces that compose with it and with Optax."""

from cage_jax.baselines.averaging import averaged, averaging
from cage_jax.baselines.ewgs import ewgs, ewgs_delta
from cage_jax.baselines.lotion import lotion
from cage_jax.baselines.oscillation import cosine_ramp, dampening, freezing
from cage_jax.baselines.relaxation import binary_relax, parq, parq_schedule
from cage_jax.baselines.winq import interpolation, noisy_fake_quant

__all__ = [
    "averaged",
    "averaging",
    "binary_relax",
    "cosine_ramp",
    "dampening",
    "ewgs",
    "ewgs_delta",
    "freezing",
    "interpolation",
    "lotion",
    "noisy_fake_quant",
    "parq",
    "parq_schedule",
]
