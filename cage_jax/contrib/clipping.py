"""Learned clips of frozen weights, which ZeroQAT trains without a backward pass."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import path_in_errors
from cage_jax.core.rules import Rules, check_rules, nothing_quantized
from cage_jax.quantizers.grid import Grid
from cage_jax.quantizers.quantizer import check_has_codes
from cage_jax.quantizers.rounding import fit_grid


@names_checked
def first_clips(params: Any, rules: Rules) -> dict[str, jax.Array]:
    """Returns the clips that `clipped_grids` starts with: 3, whose sigmoid is 0.953.

    Args:
      params: a tree of parameters, or of their shapes.
      rules: which parameters are quantized, and how.

    Returns:
      A dict by path of float32 arrays, a number for each scale: what is trained.

    Raises:
      TypeError, ValueError: for anything but `Rules`, and for rules that match nothing.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r"kernel", cage.int4(group_size=8))])
      >>> clips = contrib.first_clips({"kernel": jnp.ones((16, 4))}, rules)
      >>> jax.tree.map(jnp.shape, clips)
      {'kernel': (2, 4)}

    Source: OmniQuant, arXiv 2308.13137, and the code of ZeroQAT, arXiv 2509.00031.
    """
    check_rules(rules)
    quantized = rules.quantized(params)
    if not quantized:
        raise ValueError(nothing_quantized(rules, params))
    return {
        path: jnp.full(quantizer.blocks(x.shape).scale_shape, 3.0, jnp.float32)
        for path, (quantizer, x) in quantized.items()
    }


@names_checked
def clipped_grids(
    params: Any, rules: Rules, clips: Mapping[str, jax.Array]
) -> dict[str, Grid]:
    """Returns the grids of the weights, their scales times the sigmoids of the clips.

    Give them to `fake_quant` and `quantize` as `grid`. A scale of `sigmoid(clip)` times
    that of the scale rule cuts the largest weights, and rounds the others finer. Train
    the clips, and any few other parameters, with `two_point_gradient`, and leave the
    weights frozen: no backward pass keeps the values of layers, and the optimizer has a
    number for each scale alone. Grids are constants for `jax.grad`.

    Args:
      params: a tree of parameters, frozen.
      rules: which parameters are quantized, and how.
      clips: as `first_clips` returns them.

    Returns:
      A dict from path to `Grid`, in float32 (float64 for float64).

    Raises:
      TypeError: for anything but `Rules`.
      ValueError: for a path without clips, for learned scales, which are trained
        themselves, and for a quantizer without codes.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> rules = cage.Rules([(r"kernel", cage.int4())])
      >>> params = {"kernel": jnp.array([[0.5], [-0.6], [7.0]])}
      >>> grid = contrib.clipped_grids(params, rules, {"kernel": jnp.zeros((1, 1))})
      >>> cage.fake_quant(params, rules, grid=grid)["kernel"].ravel().tolist()
      [0.5, -0.5, 3.5]

    Source: OmniQuant, arXiv 2308.13137, learnable weight clipping. The code of ZeroQAT
    has a clip for each sign, of which the larger decides where grids are symmetric; one
    clip does here, for both ends of a grid with zero points too.
    """
    check_rules(rules)
    found = {}
    for path, (quantizer, x) in rules.quantized(params).items():
        with path_in_errors(path):
            check_has_codes(quantizer, "clipped_grids")
            if path not in clips or quantizer.scale.needs_grid:
                raise ValueError(
                    f"`clips` must have an entry for each quantized parameter, whose "
                    f"scale must not be learned; got {quantizer}, and the paths "
                    f"{list(clips)}. Use first_clips(params, rules), and int4() in "
                    f"place of lsq(4)."
                )
            grid = fit_grid(x, quantizer)
            share = jax.nn.sigmoid(clips[path].astype(grid.scale.dtype))
            grid = grid._replace(scale=grid.scale * share)
            axes = quantizer.blocks(x.shape).tensor_axes
            found[path] = quantizer.scale_type.nearest(grid, quantizer.format, axes)
    return found
