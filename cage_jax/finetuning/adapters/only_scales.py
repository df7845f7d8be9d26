"""Training of the scales of frozen codes."""

from typing import Any

import jax
import jax.numpy as jnp

from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import flatten_with_paths
from cage_jax.core.quantized_array import QuantizedArray, grid_of
from cage_jax.finetuning.adapters.frozen_weights import (
    Adapter,
    FrozenWeight,
    is_codes,
    trained_parts,
)
from cage_jax.quantizers.scale_types import of_the_size_of_weights


@names_checked
def only_scales(codes: Any) -> tuple[dict[str, Adapter], Any]:
    """Freezes codes, and returns their scales to be trained.

    A weight becomes `scale * (code - zero point) + offset`. The gradient of a scale is
    the sum over its group of the gradient times the code, and not LSQ's, which is zero
    at a weight that lies on its grid. `weights` makes the parameters, `adapted` a loss
    of a loss of parameters, and `merge` the codes with the trained scales.

    Args:
      codes: a tree of parameters with codes, the result of `quantize` or of `gptq`.
        All else in it is frozen.

    Returns:
      Two trees. The scales: by path a dict of `scale`, and `offset` where the grid has
      one, of their shapes in the codes, float32 (float64 for float64 weights), whatever
      they are stored in: each use rounds them to that, and the gradient passes straight
      through. Zero points are not trained. And the frozen codes.

    Raises:
      ValueError: for a tree without codes.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r"kernel", cage.int3())])
      >>> params = {"kernel": jnp.array([[3.0], [-2.0]])}
      >>> scales, frozen = cage.finetuning.only_scales(cage.quantize(params, rules))
      >>> def loss(params, x):
      ...     return jnp.sum(x @ params["kernel"])
      >>> loss_of_scales = cage.finetuning.adapted(loss)
      >>> jax.grad(loss_of_scales)(scales, frozen, jnp.array([[1.0, 10.0]]))
      {'kernel': {'scale': Array([[-17.]], dtype=float32)}}
      >>> cage.dequantize(cage.finetuning.merge(scales, frozen))["kernel"].tolist()
      [[3.0], [-2.0]]

    Source: EfficientQAT, arXiv 2407.11062, its second phase.
    """
    paths, leaves, structure = flatten_with_paths(codes, QuantizedArray)
    scales, frozen = {}, []
    for path, leaf in zip(paths, leaves):
        if is_codes(leaf):
            grid = of_the_size_of_weights(grid_of(leaf))
            scales[path] = jax.tree.map(jnp.copy, trained_parts(grid))
            leaf = FrozenWeight(
                leaf, grid, leaf.quantizer, leaf.dtype, 1.0, "steps", "output"
            )
        frozen.append(leaf)
    if not scales:
        raise ValueError(
            f"`codes` must have at least one QuantizedArray; got a tree of "
            f"{len(leaves)} other leaves. Use only_scales(quantize(params, rules))."
        )
    return scales, structure.unflatten(frozen)
