"""The quantizer of Ternary Weight Networks."""

from cage_jax.arrays.names import names_checked
from cage_jax.quantizers.axes import CONTRACTED, Axis
from cage_jax.quantizers.formats import Integer
from cage_jax.quantizers.quantizer import Quantizer
from cage_jax.quantizers.scales import KeptMean, Thresholds


@names_checked
def twn(*, axis: Axis = CONTRACTED, group_size: int | None = None) -> Quantizer:
    """Returns the ternary quantizer of Ternary Weight Networks: -s, 0 or s.

    Values above `0.7 mean|x|` in size are kept, and `s` is the mean of their sizes.

    Args:
      axis: the axes that share a scale; None for one scale per tensor. See `Quantizer`.
      group_size: how many neighbours along `axis` share a scale; None for all.

    Example:
      >>> import cage_jax as cage
      >>> from cage_jax import contrib
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.25], [-2.0], [1.0], [0.75]])
      >>> cage.fake_quant(x, contrib.twn()).ravel().tolist()
      [0.0, -1.25, 1.25, 1.25]

    Source: Ternary Weight Networks, arXiv 1605.04711, equations 3, 5 and 6.
    """
    return Quantizer(
        Integer(2),
        KeptMean(),
        axis=axis,
        group_size=group_size,
        scale_type=Thresholds(),
    )
