"""PV-Tuning: few codes change in a step, those furthest from their latent weights."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cage_jax.arrays.checks import check_number
from cage_jax.arrays.exact import compute_dtype
from cage_jax.arrays.names import names_checked
from cage_jax.arrays.paths import path_in_errors
from cage_jax.arrays.reprs import brief_repr
from cage_jax.contrib.transformation import transformation
from cage_jax.core.grids import needed_grid
from cage_jax.core.quantize import fake_quant
from cage_jax.core.rules import Rules
from cage_jax.quantizers.quantizer import check_has_codes
from cage_jax.quantizers.rounding import fit_grid


@brief_repr
class SparseCodesState(NamedTuple):
    """State of `sparse_codes`.

    Attributes:
      sparse_codes_count: number of steps done, int32.
      latents: latent weights by path, float32 or wider.
      grids: grids by path; None for a learned one.
    """

    sparse_codes_count: jax.Array
    latents: dict[str, jax.Array]
    grids: dict[str, Any]


@names_checked
def sparse_codes(
    rules: Rules, share: float = 0.01, *, decay: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Lets a share of each parameter's codes change in a step, the others stay.

    Put it last, after the learning rate, and take the gradient at the parameters as
    they are, which lie on the grid from the first step on. An update moves latent
    weights in the state. Then the `share` of the weights that are furthest from their
    latent ones are rounded anew. At last the latent weights become
    `(1 - decay) * latent + decay * rounded`: 0 is straight-through training, 1 keeps
    only what changed codes. The grids are those of the first weights, except for
    learned ones, which are trained beside the weights. Latent weights and grids are
    float32 (float64 for float64).

    Args:
      rules: which parameters are quantized, and how, without rotations.
      share: the largest part of a parameter's codes that changes, in [0, 1], rounded up
        to whole codes. Of equal distances the first ones count.
      decay: delta, in [0, 1].

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError, ValueError: for arguments out of range; in `init` for a rotation; in
        `update` without `params`.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> import optax
      >>> rules = cage.Rules([(r".*kernel", cage.int4())])
      >>> tx = optax.chain(optax.sgd(1.0), contrib.sparse_codes(rules, 0.25))
      >>> params = {"kernel": jnp.array([[1.0], [-7.0], [3.0], [2.0]])}
      >>> gradients = {"kernel": jnp.array([[-0.6], [0.0], [-0.7], [-0.9]])}
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> updates["kernel"].ravel().tolist()
      [0.0, 0.0, 0.0, 1.0]

    Source: PV-Tuning, arXiv 2405.14852, and its code, whose default share is 1 and
    whose example uses 0.01; its codes stand for groups of weights, here each for one.
    """
    remedy = "The authors use 0.01."
    check_number("share", share, remedy, least=0, most=1)
    remedy = "Use 0 for straight-through training."
    check_number("decay", decay, remedy, least=0, most=1, or_array=True)

    def init(quantized, params):
        latents, grids = {}, {}
        for path, (quantizer, x) in quantized.items():
            with path_in_errors(path):
                check_has_codes(quantizer, "sparse_codes")
                if quantizer.hadamard is not None:
                    raise ValueError(
                        f"`rules` must not rotate weights for `sparse_codes`, which "
                        f"needs one code per weight; got {quantizer}. Use "
                        f"hadamard=None."
                    )
            latents[path] = jnp.array(x, compute_dtype(x.dtype))
            learned = quantizer.scale.needs_grid
            grids[path] = None if learned else fit_grid(x, quantizer)
        return latents, grids

    def step(before, after, params):
        def change(path, quantizer, x, update):
            latent = before.latents[path] + update.astype(before.latents[path].dtype)
            grid = before.grids[path] or needed_grid(path, quantizer, params)
            old, new = (
                fake_quant(each, quantizer, grid=grid)
                for each in (x.astype(latent.dtype), latent)
            )
            distance = jnp.abs(latent - old).ravel()
            _, chosen = jax.lax.top_k(distance, math.ceil(share * distance.size))
            mask = jnp.zeros(distance.shape, bool).at[chosen].set(True)
            values = jnp.where(mask.reshape(x.shape), new, old)
            after.latents[path] = latent + jnp.asarray(decay, latent.dtype) * (
                values - latent
            )
            return (values - x.astype(latent.dtype)).astype(update.dtype)

        return change

    return transformation(rules, SparseCodesState, step, init)
