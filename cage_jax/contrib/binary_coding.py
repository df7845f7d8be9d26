"""AlphaTuning: weights as sums of scaled signs, of which only scales are trained."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cage_jax.arrays.checks import check_int
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.core.quantize import dequantize, quantize
from cage_jax.core.quantized_array import QuantizedArray, decoded
from cage_jax.core.rules import Rules, check_rules
from cage_jax.quantizers.presets import binary

Scales = dict[str, jax.Array]


@names_checked
def binary_coding(
    params: Any,
    rules: Rules,
    *,
    bits: int = 3,
    rounds: int = 15,
    trained: int = 1,
) -> tuple[Scales, Any]:
    """Writes each weight as a sum of scaled signs: `sum_i a_i b_i`, `b_i` -1 or 1.

    The first signs are those of the weight `w`, and their scale is the mean of `|w|` in
    a group. Each further term does the same with what is left. Each of the `rounds`
    then finds the scales with the least squared error for the signs, and the nearest of
    the `2**bits` sums for each weight, so that the error does not rise. Computed in
    float32 (float64 for float64).

    Args:
      params: a tree of parameters.
      rules: which parameters are coded; all quantizers are `binary()`, of any groups.
      bits: number of terms, 1 to 8. One is that of `quantize`, to the bit.
      rounds: number of refinements; 0 for none.
      trained: number of terms whose scales are trained; the paper trains the first.

    Returns:
      Two trees. The scales to be trained, by path, (trained, scales...). And the codes:
      `params` with a dict of `term0`, `term1` and so on, a `QuantizedArray` each, in
      place of each coded parameter. `cage_jax.export.save` and `cage_jax.load` take
      them.

    Raises:
      TypeError, ValueError: for arguments out of range and for other quantizers.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}
      >>> rules = cage.Rules([(r"kernel", cage.binary())])
      >>> for bits in (1, 2, 3):
      ...     scales, codes = contrib.binary_coding(params, rules, bits=bits)
      ...     values = contrib.coded_weights(scales, codes)
      ...     print(jnp.var(params["kernel"] - values["kernel"]).round(2))
      0.35
      0.11
      0.03

    Source: AlphaTuning, arXiv 2210.03858, section 3; the refinement is that of
    alternating multi-bit quantization, arXiv 1802.00150.
    """
    check_rules(rules)
    check_int("bits", bits, "The paper uses 1 to 4.", least=1, most=8)
    check_int("rounds", rounds, "Use 15, or 0 for none.", least=0)
    check_int("trained", trained, "The paper uses 1.", least=1, most=bits)
    scales: Scales = {}

    def code(path, quantizer, x):
        plain = binary(axis=quantizer.axis, group_size=quantizer.group_size)
        if quantizer != plain:
            raise ValueError(
                f"`rules` must quantize coded parameters by binary(); got {quantizer}. "
                f"Use binary(), and `bits` for the number of terms."
            )
        terms, rest = [], x.astype(compute_dtype(x.dtype))
        for _ in range(bits):
            terms.append(quantize(rest, quantizer))
            rest = rest - dequantize(terms[-1])
        for _ in range(rounds if bits > 1 else 0):
            terms = _refined(x, terms)
        terms = [dataclasses.replace(term, dtype=x.dtype) for term in terms]
        scales[path] = jnp.stack([term.scale for term in terms[:trained]])
        return {f"term{i}": term for i, term in enumerate(terms)}

    return scales, rules.map(code, params)


@names_checked
def coded_weights(scales: Mapping[str, jax.Array], codes: Any) -> Any:
    """Returns the parameters that scales and codes make.

    The gradient goes to the scales alone: that of `a_i` is the sum over a group of the
    gradient times `b_i`.

    Args:
      scales: the trained tree of `binary_coding`; {} for the scales in the codes.
      codes: its codes.

    Returns:
      A tree like the parameters given to `binary_coding`, in their dtypes.

    Raises:
      ValueError: for scales of other codes.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r"kernel", cage.binary())])
      >>> params = {"kernel": jnp.array([[1.0], [3.0]]), "bias": jnp.zeros(1)}
      >>> scales, codes = contrib.binary_coding(params, rules, bits=2)
      >>> loss = lambda scales: jnp.sum(contrib.coded_weights(scales, codes)["kernel"])
      >>> loss(scales), jax.grad(loss)(scales)["kernel"].tolist()
      (Array(4., dtype=float32), [[[1.0]]])

    Source: AlphaTuning, arXiv 2210.03858, equation 4.
    """

    def value(node):
        if not _is_coded(node):
            return node
        dtype = node["term0"].dtype
        return sum(map(_wide, node.values())).astype(dtype)

    return jax.tree.map(value, with_scales(scales, codes), is_leaf=_is_coded)


@names_checked
def with_scales(scales: Mapping[str, jax.Array], codes: Any) -> Any:
    """Puts trained scales into the codes: what is shipped.

    Args:
      scales: the trained tree of `binary_coding`.
      codes: its codes, which stay as they are.

    Returns:
      A tree like `codes`.

    Raises:
      ValueError: for scales of other codes.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r"kernel", cage.binary())])
      >>> params = {"kernel": jnp.array([[1.0], [3.0]])}
      >>> scales, codes = contrib.binary_coding(params, rules, bits=1)
      >>> trained = {"kernel": 2 * scales["kernel"]}
      >>> shipped = contrib.with_scales(trained, codes)
      >>> contrib.coded_weights({}, shipped)["kernel"].tolist()
      [[4.0], [4.0]]

    Source: AlphaTuning, arXiv 2210.03858.
    """
    paths, leaves, structure = flatten_with_paths(codes, QuantizedArray)
    trained = {
        f"{path}/term{i}": scale
        for path, stacked in scales.items()
        for i, scale in enumerate(stacked)
    }
    shapes = {
        path: leaf.scale.shape
        for path, leaf in zip(paths, leaves)
        if isinstance(leaf, QuantizedArray)
    }
    for path, scale in trained.items():
        if scale.shape != shapes.get(path):
            raise ValueError(
                f"`scales` must be those of `codes`, of shape {shapes.get(path)} at "
                f"{path}; got {scale.shape}. Take both from one call of binary_coding."
            )
    return structure.unflatten(
        dataclasses.replace(leaf, scale=trained[path]) if path in trained else leaf
        for path, leaf in zip(paths, leaves)
    )


def _is_coded(node):
    return isinstance(node, dict) and isinstance(node.get("term0"), QuantizedArray)


def _wide(term):
    return decoded(dataclasses.replace(term, dtype=compute_dtype(term.dtype)))


@jax.jit
def _refined(x, terms):
    """Returns terms of least squared error for the signs, then the nearest signs."""
    x = x.astype(terms[0].dtype)
    format, blocks = terms[0].quantizer.format, terms[0].quantizer.blocks(x.shape)
    signs = [format.decode(term.codes, x.dtype) for term in terms]
    sum_of_group = functools.partial(
        blocks.reduce, functools.partial(jnp.sum, keepdims=True)
    )
    rows = [[sum_of_group(one * other) for other in signs] for one in signs]
    gram = jnp.stack([jnp.stack(row, -1) for row in rows], -2)
    right = jnp.stack([sum_of_group(sign * x) for sign in signs], -1)
    # Signs of two terms can be equal in a group: any solution does.
    scales = (jnp.linalg.pinv(gram, hermitian=True) @ right[..., None])[..., 0]
    scales = jnp.abs(scales)  # The sums stay the same.
    steps = [blocks.spread(scales[..., i]) for i in range(len(terms))]

    def nearer(number, best):
        tried = [jnp.where((number >> i) & 1, 0.5, -0.5) for i in range(len(terms))]
        value = sum(sign.astype(x.dtype) * step for sign, step in zip(tried, steps))
        error = jnp.abs(x - value)
        least, found = best
        return jnp.minimum(error, least), jnp.where(error < least, number, found)

    first = jnp.full_like(x, jnp.inf), jnp.zeros(x.shape, jnp.int32)
    _, found = lax.fori_loop(0, 2 ** len(terms), nearer, first)
    return [
        dataclasses.replace(
            term,
            codes=((found >> i) & 1).astype(term.codes.dtype) - 1,
            scale=scales[..., i],
        )
        for i, term in enumerate(terms)
    ]
