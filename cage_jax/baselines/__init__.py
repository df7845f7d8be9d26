"""Rivals and relatives of CAGE, as pieces that compose with it and with Optax."""

from cage_jax.baselines.averaging import averaged, averaging
from cage_jax.baselines.ewgs import ewgs, ewgs_delta
from cage_jax.baselines.oscillation import cosine_ramp, dampening, freezing
from cage_jax.baselines.winq import interpolation, noisy_fake_quant

__all__ = [
    "averaged",
    "averaging",
    "cosine_ramp",
    "dampening",
    "ewgs",
    "ewgs_delta",
    "freezing",
    "interpolation",
    "noisy_fake_quant",
]
