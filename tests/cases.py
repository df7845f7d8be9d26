"""The shapes, quantizers and small trainings that tests share."""

import jax
import jax.numpy as jnp
import optax

from cage_jax import Quantizer, int2, int3, int4, int8, quest
from cage_jax.formats import Integer, MidRise
from cage_jax.scales import AbsMax, Fixed, Gaussian

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
    "scanned": ((2, 64, 16), int4(group_size=32)),
    "scanned quest": ((2, 64, 16), quest(4, hadamard=32)),
}

CASES = {name: (KERNEL, quantizer) for name, quantizer in QUANTIZERS.items()} | LAYOUTS


def normal(rng, *shape, dtype="float32"):
    """Standard normal numbers as a jax array."""
    return jnp.asarray(rng.standard_normal(shape), dtype)


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
