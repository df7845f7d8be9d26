"""The shapes, quantizers and small trainings that tests share."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cage_jax as cage
from cage_jax import Quantizer, int2, int3, int4, int8, quest
from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.quantizers.codeless import CodelessQuantizer
from cage_jax.quantizers.formats import Codebook, Integer, MidRise
from cage_jax.quantizers.scales import AbsMax, Fixed, Gaussian, MinMax, SignedMax

KERNEL = (64, 32)

# Every format, scale rule, gradient and kind of group, each on a kernel.
QUANTIZERS = {
    "int2": int2(),
    "int3": int3(group_size=8),
    "int4": int4(),
    "int4 groups": int4(group_size=16),
    "int4 full range": int4(narrow=False),
    "int4 asymmetric": int4(symmetric=False, group_size=32),
    "int4 clipped": int4(scale=AbsMax(0.7), group_size=32),
    "int4 hadamard": int4(hadamard=32, gradient="clip"),
    "int4 hadamard groups": int4(hadamard=32, group_size=16),
    "int4 tiles": int4(axis=(0, 1), group_size=(16, 8)),
    "int8 tensor": int8(axis=None),
    "int8 asymmetric": int8(symmetric=False, axis=-1),
    "int8 fixed": int8(scale=Fixed(2.0**-5)),
    "int2 gaussian": int2(scale=Gaussian()),
    "midrise": Quantizer(MidRise(3), AbsMax(), group_size=32),
    "midrise trust": Quantizer(MidRise(3), AbsMax(0.6), gradient="trust"),
    "quest1": quest(1, hadamard=None),
    "quest4": quest(4, hadamard=32),
    "quest2 trust": quest(2, hadamard=64, gradient="trust"),
    "quest3 groups": quest(3, hadamard=16, group_size=32),
}

# Other layouts of parameters: vectors, attention, convolutions, scanned layers.
LAYOUTS = {
    "vector": ((64,), int4(axis=-1, group_size=16)),
    "vector quest": ((64,), quest(4, axis=-1, hadamard=64)),
    "tokens": ((16, 64), quest(4, axis=-1, hadamard=32)),
    "attention out": ((4, 16, 32), int4(axis=(0, 1), group_size=(None, 8))),
    "attention in": ((32, 4, 16), Quantizer(Integer(4), AbsMax(), axis=0)),
    "convolution": ((3, 3, 16, 8), int8(axis=(0, 1, 2))),
    "scanned": ((2, 64, 16), int4(axis=-2, group_size=32)),
    "scanned quest": ((2, 64, 16), quest(4, axis=-2, hadamard=32)),
}

CASES = {name: (KERNEL, quantizer) for name, quantizer in QUANTIZERS.items()} | LAYOUTS

# The other presets, formats and scale types, each on a kernel.
PRESETS = {
    "int3 asymmetric": int3(symmetric=False, group_size=32),
    "uint4 asymmetric": Quantizer(
        Integer(4, narrow=False, signed=False), MinMax(), group_size=32
    ),
    "midrise 1": Quantizer(MidRise(1), AbsMax()),
    "five levels": Quantizer(Codebook((-2.0, -0.5, 0.0, 1.0, 2.0)), AbsMax()),
    "fp8": cage.fp8(),
    "fp8 e5m2": cage.fp8("e5m2"),
    "mxfp8": cage.mxfp8(),
    "mxfp8 e5m2 up": cage.mxfp8("e5m2", rounding="up"),
    "mxfp6": cage.mxfp6(),
    "mxfp6 e3m2 nearest": cage.mxfp6("e3m2", rounding="nearest"),
    "mxfp4": cage.mxfp4(),
    "mxfp4 nearest": cage.mxfp4(rounding="nearest"),
    "mxfp4 up": cage.mxfp4(rounding="up"),
    "nvfp4": cage.nvfp4(),
    "nvfp4 alone": cage.nvfp4(tensor_divisor=False),
    "nf4": cage.nf4(),
    "ternary": cage.ternary(),
    "binary": cage.binary(),
    "q4_0": cage.q4_0(),
    "q4_1": cage.q4_1(),
    "q8_0": cage.q8_0(),
    "ct_w4a16": cage.ct_w4a16(group_size=64),
    "ct_w4a16 asymmetric": cage.ct_w4a16(group_size=32, symmetric=False),
    "ct_w8a8 bfloat16": cage.ct_w8a8(scale_dtype="bfloat16"),
}


def along_inputs(quantizer):
    """Names the axis of a quantizer for kernels (in, out), alone or in a stack."""
    if quantizer.axis != "contracted":
        return quantizer
    return dataclasses.replace(quantizer, axis=-2)


def normal(rng, *shape, dtype="float32"):
    """Standard normal numbers as a jax array."""
    return jnp.asarray(rng.standard_normal(shape), dtype)


def random_codes(rng, quantizer, shape, dtype="float32"):
    """Draws codes that no array was rounded to, for which nothing is compiled.

    Args:
      rng: of NumPy.
      quantizer: whose codes they are: any of its grid, and positive scales.
      shape: of the array.
      dtype: of the array.
    """
    format, like = quantizer.format, QuantizedArray.abstract(quantizer, shape, dtype)
    numbers = format.values - (format.code_offset or 0)
    if isinstance(format, Codebook):
        numbers = np.arange(len(format.values)) - 2 ** (format.bits - 1)

    def drawn(part):
        if part is not None:
            return jnp.asarray(rng.choice(numbers, part.shape).astype(part.dtype))

    def powers(part, sign=1):
        if part is not None:
            found = sign * 2 ** rng.uniform(-6, 1, part.shape)
            return jnp.asarray(found.astype(part.dtype))

    signs = 1
    if isinstance(quantizer.scale, SignedMax):
        signs = rng.choice([-1, 1], like.scale.shape)
    return dataclasses.replace(
        like,
        codes=drawn(like.codes),
        zero_point=drawn(like.zero_point),
        scale=powers(like.scale, signs),
        offset=powers(like.offset, -1),
        tensor_divisor=powers(like.tensor_divisor),
    )


def assert_same(actual, expected):
    """Compares trees to the bit: their arrays, dtypes, and quantizers of codes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    paths = jax.tree.leaves_with_path(expected)
    for ours, (path, theirs) in zip(jax.tree.leaves(actual), paths):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), path
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes(), path


def assert_raises(table):
    """Makes each call of a table and compares the error that it raises.

    Args:
      table: rows of a call, an error's class and a regular expression for its text.
    """
    for call, error, text in table:
        try:
            call()
        except error as raised:
            assert re.search(text, str(raised), re.DOTALL), (
                f"{text!r} is not in {raised}"
            )
        else:
            raise AssertionError(f"no {error.__name__} was raised: {text!r}")


def awkward(rng, *shape, dtype="float32"):
    """Numbers with a group of zeros, an outlier, and values halfway between levels."""
    x = rng.standard_normal((-(-np.prod(shape) // shape[-1]), shape[-1])) * 0.05
    if len(x) < 16:  # of a vector
        x = x.reshape(-1, 8)
    half = len(x) // 2
    x[:half, 3] = 0
    x[5, 5] = 100
    x[:half, 7] = (np.arange(half) - half // 2) / 4
    return jnp.asarray(x.reshape(shape), dtype)


@dataclasses.dataclass(frozen=True)
class Halves(CodelessQuantizer):
    """A quantizer without codes, as those of other libraries."""

    bits, idempotent = 8, True

    def fake_quant(self, x):
        return jnp.round(2 * x) / 2

    def storage_bits(self, shape, scale_dtype=None):
        return 8 * math.prod(shape)

    def __str__(self):
        return "halves"


def train(tx, params, gradients, *, jit=False):
    """The parameters and the state after each step, two lists.

    Args:
      tx: an Optax transformation.
      params: where training starts, a tree of NumPy or jax arrays.
      gradients: one tree a step.
      jit: compile the update. The addition to the parameters stays outside: compiled
        with it, a multiply-add may be fused in one program and not in another.
    """
    params = jax.tree.map(jnp.asarray, params)
    state, update = tx.init(params), jax.jit(tx.update) if jit else tx.update
    trajectory, states = [], []
    for gradient in gradients:
        updates, state = update(jax.tree.map(jnp.asarray, gradient), state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
        states.append(state)
    return trajectory, states
