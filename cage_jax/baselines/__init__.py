"""Rivals and relatives of CAGE, as pieces that compose with it and with Optax."""

from cage_jax.baselines.averaging import averaged, averaging
from cage_jax.baselines.oscillation import cosine_ramp, dampening, freezing

__all__ = [
    "averaged",
    "averaging",
    "cosine_ramp",
    "dampening",
    "freezing",
]
