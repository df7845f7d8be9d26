"""Shared by the tests of contrib: quantizers, their rounding, small trees."""

import jax
import jax.numpy as jnp
import numpy as np
from oracles import absmax_round

import cage_jax as cage
from cage_jax import contrib
from cage_jax.quantizers.formats import Integer
from cage_jax.quantizers.scales import Fixed

GROUP = 4
STEP = 0.25
RULES = cage.Rules([(r".*kernel", cage.int4(group_size=GROUP))])
CLIPPED = cage.Quantizer(Integer(4), Fixed(STEP), gradient="clip")
# The grid ends at 7 * STEP, which normal numbers of deviation 1 exceed.
CLIPPED_RULES = cage.Rules([(r".*kernel", CLIPPED)])
ROTATED = cage.Quantizer(Integer(4), Fixed(STEP), hadamard=8, gradient="clip")
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# Both sides in float64: what is left is rounding in another order of operations.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-13}

# What takes the place of `fake_quant`.
FORWARD = {
    "ewgs": lambda x, rules: contrib.ewgs(x, rules, 0.5),
    "stable_qat": lambda x, rules: contrib.stable_qat(x, rules),
    "soft_quant": lambda x, rules: contrib.soft_quant(x, rules, 0.5),
    "noisy_fake_quant": lambda x, rules: contrib.noisy_fake_quant(
        x, rules, jax.random.key(0)
    ),
    "binary_relax": lambda x, rules: contrib.binary_relax(x, rules, 0.5),
    "parq": lambda x, rules: contrib.parq(x, rules, 0.5),
}


def rounded(x):
    """The weights of `RULES`."""
    return absmax_round(x, group=GROUP)


def rounded_and_clipped(x):
    """The weights of `CLIPPED`."""
    return np.clip(np.round(x / STEP), -7, 7) * STEP


def drawn(rng, dtype=np.float64):
    """Parameters or gradients, in NumPy."""
    kernel, bias = rng.normal(size=(8, 3)), rng.normal(size=3)
    return {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def apply(params, updates):
    """`optax.apply_updates`, for which None is no update."""
    return jax.tree.map(
        lambda x, update: x if update is None else x + update,
        params,
        updates,
        is_leaf=lambda x: x is None,
    )


def updated(tx, gradient, params):
    """The updates of the first step, compiled."""
    gradient, params = arrays(gradient), arrays(params)
    return jax.jit(tx.update)(gradient, tx.init(params), params)[0]
