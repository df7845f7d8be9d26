"""Choosing, for each parameter, whether it is rotated before it is quantized."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from cage_jax.arrays.names import names_checked
from cage_jax.core.quantize import quantization_error
from cage_jax.core.rules import Rules


@names_checked
def choose_rotation(params: Any, rules: Rules) -> Rules:
    """Returns rules that rotate a parameter only if that lowers its error.

    Args:
      params: a tree of arrays with values, outside of `jax.jit`.
      rules: a table in which some quantizers have a rotation.

    Returns:
      `rules`, with a quantizer without a rotation for each parameter whose error is
      smaller without it among `rules.resolved`.

    Raises:
      TypeError: for abstract parameters.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> exact = {"kernel": jnp.tile(jnp.arange(-7.0, 8), (4, 1)).T[:8]}
      >>> rules = cage.Rules([(r".*kernel", cage.int4(hadamard=8))])
      >>> cage.choose_rotation(exact, rules).match("kernel").hadamard is None
      True

    Source: RoSTE, arXiv 2502.09003, the lower level of its problem.
    """
    plain = {}
    for path, (quantizer, x) in rules.quantized(params).items():
        if quantizer.hadamard is None:
            continue
        other = dataclasses.replace(quantizer, hadamard=None, hadamard_seed=None)
        sizes = [
            float(jnp.sum(jnp.square(quantization_error(x, q).astype(jnp.float32))))
            for q in (quantizer, other)
        ]
        if sizes[1] < sizes[0]:
            plain[path] = other
    return Rules(rules, resolved={**rules.resolved, **plain})
