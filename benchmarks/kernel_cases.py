"""What kernels are measured on, for TPU and for GPU."""

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp

import cage_jax as cage

# 1 GiB of float32: neither it nor its mask stays beside the matrix units of a chip.
LONG, WIDE = 4096, 65536


class Case(NamedTuple):
    """What is compiled.

    Attributes:
      quantizer: of an array whose longer axis is not the one of the groups.
      what: `fake_quant` alone, with its gradient, or a step of AdamW with CAGE.
      dtype: of the array.
    """

    quantizer: cage.Quantizer
    what: Literal[
        "forward",
        "forward and backward",
        "step",
        "step, error after the update",
        "step, statistics",
        "step, weights",
    ] = "forward"
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the array."""
        return (LONG, WIDE) if self.quantizer.axis == -2 else (WIDE, LONG)

    @property
    def least(self) -> float:
        """Units that any program moves.

        A value is read and written, twice with a mask; a step reads the gradient, the
        parameter and its moments, and writes the last three; statistics read and write
        codes. A scale of the whole tensor is found by reading it once more.
        """
        if self.is_step:
            return 7.5 if self.what == "step, statistics" else 7.0
        mask = 2 / jnp.dtype(self.dtype).itemsize
        found = 2.0 if self.what == "forward" else 4 + mask
        return found + self.quantizer.scale_type.has_tensor_divisor

    @property
    def is_step(self) -> bool:
        """Whether it is one of AdamW with CAGE."""
        return self.what.startswith("step")

    @property
    def in_place(self) -> float:
        """Units that are written where they were read."""
        if not self.is_step:
            return 0.0
        return 3.25 if self.what == "step, statistics" else 3.0

    @property
    def kernels(self) -> list[str]:
        """The names of those that do it."""
        if self.is_step:
            return ["cage_adamw_step"]
        backward = ["cage_masked_gradient"] * (self.what != "forward")
        first = self.quantizer.scale_type.has_tensor_divisor
        return ["cage_fake_quant", *["cage_largest_bounds"] * first, *backward]

    def __str__(self) -> str:
        return f"{self.quantizer}, {self.dtype}, {self.what}"


def _last(quantizer: cage.Quantizer) -> cage.Quantizer:
    return dataclasses.replace(quantizer, axis=-1)


CASES = [
    Case(cage.quest(4, axis=-2)),
    Case(cage.quest(4, axis=-2), "forward and backward"),
    Case(cage.quest(4, axis=-2), dtype="bfloat16"),
    Case(_last(cage.quest(4))),
    Case(_last(cage.quest(4)), "forward and backward"),
    Case(cage.int4(group_size=128, hadamard=128, axis=-2)),
    Case(cage.int4(group_size=32, axis=-2)),
    Case(_last(cage.int4(group_size=128))),
    Case(_last(cage.int4(group_size=32))),
    Case(cage.mxfp4(axis=-2)),
    Case(_last(cage.mxfp4())),
    Case(cage.int8(axis=-2)),
    Case(_last(cage.int8())),
    Case(cage.quest(4, axis=-2), "step"),
    Case(_last(cage.quest(4)), "step"),
    Case(cage.int4(group_size=128, axis=-2), "step"),
    Case(_last(cage.int4(group_size=32)), "step"),
    Case(cage.int8(axis=-2), "step"),
]
# The pull of the recommended setting. For TPU a test has it.
CASES_FOR_GPU = [
    *CASES,
    Case(cage.quest(4, axis=-2), "step, weights"),
    Case(_last(cage.int4(group_size=32)), "step, weights"),
]
# What there is no kernel of for GPU.
CASES_FOR_TPU = [
    *CASES,
    Case(cage.nvfp4(axis=-2)),
    Case(_last(cage.nvfp4())),
    Case(cage.quest(4, axis=-2), "step, error after the update"),
    Case(cage.quest(4, axis=-2), "step, statistics"),
]
